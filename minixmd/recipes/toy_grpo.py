"""SFT on traces, then GRPO, on the toy world: what the rewards add to what traces teach.

    python -m minixmd.train toy_grpo               (another world: … toy_grpo seed=1 run_dir=runs/toy_grpo-1)

Traces exist for 10 clips a class. "continued" goes on learning those for as many updates as GRPO has; GRPO learns from
all clips of the train split, by nothing but its rewards: the right answer, and the form. CPU, 2 cores.
"""
from minixmd.config import Evaluate, Report, Toy, Train

UPDATES = 200
ASKED = dict(media="audio", prompt="{question}\n{options}\nThink, then answer.", max_new_tokens=40)
LEARNING = dict(manifest="@toy/train_truth.jsonl", trainable="full", batch_size=24, micro_batch_size=24, **ASKED)
TRACED = dict(objective="sft", traces="@toy/traces.jsonl", epochs=100, lr=1e-4, **LEARNING)
ROWS = {"before": "@toy/student", "sft": "@sft", "continued": "@continued", "grpo": "@grpo"}
TITLES = {"before": "before", "sft": "SFT", "continued": "SFT continued", "grpo": "SFT, then GRPO"}

stages = [
    Toy(name="toy", thinking="both"),
    Train(name="sft", model="@toy/student", max_steps=40, **TRACED),
    Train(name="continued", model="@sft", max_steps=UPDATES, **TRACED),
    Train(name="grpo", model="@sft", objective="grpo", epochs=2, max_steps=UPDATES, lr=3e-4, save_every=40, **LEARNING),
    *(Evaluate(name=f"{name}_test", model=model, manifest="@toy/test.jsonl", answer="generate", **ASKED)
      for name, model in ROWS.items()),
    Report(name="report", tables={title: {"test": f"@{name}_test"} for name, title in TITLES.items()},
           curves={"GRPO": {"GRPO": "@grpo/log.jsonl"},
                   "SFT": {"SFT": "@sft/log.jsonl", "SFT continued": "@continued/log.jsonl"}}),
]  # fmt: skip
