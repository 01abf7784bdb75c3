"""Golden numbers: what training, sampling, labelling and evaluation compute on small models, to the last bit.

    python tests/golden.py --write [FILE]    (FILE: tests/golden.json unless given)
    python tests/golden.py --check [FILE]    (exits with 1 and lists what differs)

Everything runs through the command line, as a user's config does, in float32 with one thread and fixed seeds: two small
models in the published layouts (an audio and a vision one), 32 clips, 20 optimizer steps of each way to learn. On one
machine the file is equal to the bit; machines round differently, so the suite (test_golden.py) compares ids exactly and
losses to 1e-4. A change that means to change numbers rewrites the file in a commit of its own.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch
from mini import write_clips, write_model

import minixmd
from minixmd.inputs.examples import read_manifest
from minixmd.runner import main as run_config
from minixmd.tasks import rewards

GOLDEN = Path(__file__).with_name("golden.json")
LOGGED = ("step", "loss", "lr", "grad_norm", "kl", "teacher_dropped", "student_dropped", "tokens", "entropy",
          "clip_fraction", "accuracy", "format", "rough", "reward", "unparsed", "zero_variance", "completion_tokens",
          "truncated", "logp_gap_mean", "logp_gap_max", "val_accuracy")  # no times, which no two runs share
CONFIG = """
from minixmd.config import GRPO, SFT, Distill, Evaluate, Label, Switch

AUDIO, VIDEO = dict(media="audio"), dict(media="video", min_pixels=784, max_pixels=3136)
STEPS = dict(batch_size=8, micro_batch_tokens=600, epochs=5, lr=3e-3, manifest="{home}/train/manifest.jsonl")
ROLLOUTS = dict(batch_size=4, micro_batch_tokens=300, max_steps=20, epochs=10, lr=3e-3, group_size=4,
                max_new_tokens=9, decode_slots=8, manifest="{home}/train/manifest.jsonl", beta=0.1)
stages = [
    Evaluate(name="ears", model="{home}/audio", manifest="{home}/train/manifest.jsonl", **AUDIO),
    Evaluate(name="eyes", model="{home}/vision", manifest="{home}/train/manifest.jsonl", answer="generate",
             max_new_tokens=8, **VIDEO),
    Evaluate(name="glance", model="{home}/vision", manifest="{home}/train/manifest.jsonl", **VIDEO),
    Evaluate(name="votes", model="{home}/audio", manifest="{home}/train/manifest.jsonl", answer="generate",
             num_samples=3, temperature=1.2, max_new_tokens=8, **AUDIO),
    Label(name="heard", model="{home}/audio", manifest="{home}/train/manifest.jsonl", top_k=6, **AUDIO),
    Label(name="seen", model="{home}/vision", manifest="{home}/train/manifest.jsonl", top_k=6, **VIDEO),
    Switch(name="switch", teacher="@glance", student="@ears", manifest="{home}/train/manifest.jsonl",
           train_manifest="{home}/train/manifest.jsonl", width=1 / 16, clip_s=0.5, epochs=3, batch_size=4, lr=5e-3,
           augment="spec"),
    Distill(name="gated", model="{home}/audio", teacher_labels="@seen", student_labels="@heard",
            switch="{home}/decided.jsonl", gate="learned", val_manifest="{home}/val/manifest.jsonl",
            eval_every=10, **AUDIO, **STEPS),
    Distill(name="kl_ce", model="{home}/vision", teacher_labels="@heard", teacher_loss="kl+ce",
            trainable="decoder", **VIDEO, **STEPS),
    Distill(name="kl", model="{home}/audio", teacher_labels="@seen", student_labels="@heard",
            teacher_loss="kl", switch="{home}/decided.jsonl", gate="learned", trainable="full", **AUDIO, **STEPS),
    SFT(name="letters", model="{home}/vision", weight_decay=0.1, **VIDEO, **STEPS),
    SFT(name="traced", model="{home}/audio", traces="{home}/traces.jsonl", trainable="decoder", max_new_tokens=16,
        **AUDIO, **STEPS),
    GRPO(name="token", model="@traced", trainable="decoder", num_iterations=2, **AUDIO, **ROLLOUTS),
    GRPO(name="sequence", model="{home}/audio", ratio="sequence", aggregation="token", zero_variance="skip",
         teacher_labels="@heard", temperature=0.9, num_iterations=2, **AUDIO, **ROLLOUTS),
]
"""


def rough_reward(completion, example, right, letters):
    """A reward that differs from completion to completion, so that small random models have something to learn."""
    return (sum(map(ord, completion)) % 7) / 3


def build(home):
    """Models, clips and traces, the same on every call."""
    write_model(home / "audio", "audio", seed=3)
    write_model(home / "vision", "vision", seed=2, kv=1)
    write_clips(home / "train", 32)
    write_clips(home / "val", 6)
    examples = read_manifest(home / "train" / "manifest.jsonl")
    lines = []
    for i, e in enumerate(examples):
        thought = f"<think>I hear a {e.options[e.answer]}, {i % 5} times.</think>"
        lines.append({"id": e.id, "text": f"{thought}<answer>{'ABC'[e.answer]}</answer>"})
    # what a switch might decide: the small one below is too small to send a clip to the teacher
    decided = [{"id": e.id, "p_teacher": i * 37 % 100 / 100} for i, e in enumerate(examples)]
    (home / "decided.jsonl").write_text("".join(json.dumps(line) + "\n" for line in decided))
    (home / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def compute(home):
    """{what: its numbers}, JSON-able."""
    build(home)
    (home / "config.py").write_text(CONFIG.replace("{home}", str(home)))
    rewards.REWARDS["rough"] = rough_reward
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = run_config([str(home / "config.py"), f"run_dir={home / 'run'}"])
    finally:
        del rewards.REWARDS["rough"]
    if status:
        raise RuntimeError(f"the golden config ended with status {status}:\n{printed.getvalue()}")

    def records(name):
        return [json.loads(line) for line in (home / "run" / name).read_text().splitlines()]

    found = {}
    for stage in ("gated", "kl_ce", "kl", "letters", "traced", "token", "sequence"):
        found[stage] = [{name: line[name] for name in LOGGED if name in line} for line in records(f"{stage}/log.jsonl")
                        if line["step"]]
    for stage in ("heard", "seen"):
        found[stage] = records(f"{stage}/labels.jsonl")
    for stage in ("ears", "glance", "eyes", "votes"):
        found[stage] = records(f"{stage}/answers.jsonl")
    found["switch"] = [*records("switch/log.jsonl"), *records("switch/switch.jsonl")]
    for record in found["switch"]:
        record.pop("note", None)  # it names the temporary folder
    model, processor = minixmd.load(home / "run" / "token" / "best")
    examples = read_manifest(home / "train" / "manifest.jsonl")[:8]
    conversations = [[{"role": "user", "content": [{"type": "audio", "audio": e.audio},
                                                   {"type": "text", "text": f"{e.question} {e.options}"}]}]
                     for e in examples]
    said = minixmd.generate(model, processor, conversations, num_samples=4, max_new_tokens=12, temperature=0.8, seed=5,
                            keys=[e.id for e in examples])  # the default, a digest of the frames, differs by machine
    found["sampled"] = [[{"ids": list(c.ids), "logprobs": list(c.logprobs)} for c in group] for group in said]
    return json.loads(json.dumps(found))


def differences(a, b, where=""):
    """Paths at which two JSON values differ, with both values; 20 at most."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: fields {sorted(a.keys() ^ b.keys())}"]
        parts = [(f"{where}.{key}", a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} values"]
        parts = [(f"{where}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return [] if a == b else [f"{where}: {a} and {b}"]
    found = []
    for name, x, y in parts:
        found += differences(x, y, name)
        if len(found) >= 20:
            return found[:20]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="compute the numbers and write FILE")
    what.add_argument("--check", action="store_true", help="compute the numbers and compare them with FILE")
    parser.add_argument("file", nargs="?", type=Path, default=GOLDEN)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        found = compute(Path(home))
    if args.write:
        args.file.write_text(json.dumps(found, indent=None, separators=(",", ":")).replace("],", "],\n") + "\n")
        return 0
    wrong = differences(json.loads(args.file.read_text()), found)
    print("\n".join(wrong) if wrong else f"equal to the bit: {args.file}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
