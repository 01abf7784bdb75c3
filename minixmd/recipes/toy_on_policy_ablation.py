"""On-policy distillation on the toy world, and what it is made of: other gates, losses, teachers and words.

    python -m minixmd.train toy_on_policy_ablation    (another world: … seed=1 run_dir=runs/toy_on_policy_ablation-1)

CPU, 2 cores; its time was not measured yet. Every arm starts from the same SFT model and is validated on test after 50,
100, 150 and 200 updates; nothing is chosen by that. `python -m bench.on_policy RUN…` pools several worlds, pairs the
arms clip by clip and checks the claims.
"""
from dataclasses import replace

from minixmd.config import SFT, Toy, Traces
from minixmd.recipe_parts.sightsound import toy

sound = toy(updates=200)
sound = replace(sound, val="@toy/test.jsonl", grpo_fields=sound.grpo_fields | dict(eval_every=50))
written = dict(traces="@train_traces", val_manifest=sound.val, **sound.asked("think"))  # the teacher's own words
sft = dict(model="@sft", manifest=sound.train, **written, **sound.sft_fields | dict(max_steps=200, eval_every=50))
always = dict(gate="always")
ARMS = {  # title -> its stage; T is the teacher, S the student
    "GRPO": sound.rewarded_only("grpo"),
    "GRPO + KL(T, S), learned gate": sound.on_policy("on_policy"),
    "GRPO + KL(T, S), always": sound.on_policy("always", **always),
    "GRPO + KL(T, S), always, another clip's video": sound.on_policy("shuffled", teacher_media="shuffled", **always),
    "KL(T, S) alone, learned gate": sound.on_policy("no_reward", reward_weight=0.0),
    "GRPO + KL(S, T), learned gate": sound.on_policy("reverse", teacher_kl="reverse"),
    "KL(T, S) on the teacher's words": sound.on_policy("words", samples="teacher", traces="@train_traces", group_size=4,
                                                       reward_weight=0.0, **always),
    "SFT on the teacher's words by stored rows": [SFT(name="rows", teacher_loss="kl", **sft | dict(batch_size=96))],
    "SFT on the teacher's words": [SFT(name="sft_words", **sft | dict(batch_size=96))],
}  # fmt: skip
AGAIN = {  # with other randomness: the command says which seeds
    "GRPO": [sound.rewarded_only("grpo_2"), sound.rewarded_only("grpo_3")],
    "GRPO + KL(T, S), learned gate": [sound.on_policy("on_policy_2"), sound.on_policy("on_policy_3")],
}  # fmt: skip
train_traces = Traces(name="train_traces", model=sound.teacher, manifest=sound.train, num_samples=4, top_k=8,
                      **sound.asked("audio_cot"), **sound.video_fields)
stages = [Toy(name="toy", thinking=True)] + sound.traces() + sound.trained("sft") + sound.switch() + [train_traces]
for arm in [*ARMS.values(), *sum(AGAIN.values(), [])]:
    stages += arm
