"""Runs of several processes, as torchrun starts them, on small models: a world, its config, comparing two runs."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mini import write_clips, write_config, write_model
from safetensors import safe_open

from minixmd.config.load import load_config
from minixmd.runs.records import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
# shards of 3 clips, so that there is something to share; a reward that differs from completion to completion
COMMAND = """
import sys
from minixmd.runner import main
from minixmd.runs import distributed
from minixmd.tasks import rewards
distributed.SHARD = 3
rewards.REWARDS["rough"] = lambda text, example, right, letters: (sum(map(ord, text)) % 7) / 3
{before}
sys.exit(main(sys.argv[1:]))
"""
# steps of 5 clips of 11: neither 2 nor 3 processes share them evenly, and the last step of an epoch has one clip. eps:
# where a gradient is 0 but for rounding, as of a key's bias, Adam would else make a step of it
STEPS = """dict(batch_size=5, micro_batch_tokens=520, epochs=4, max_steps=10, lr=1e-3, eps=1e-3, save_every=4,
             manifest={manifest!r}, val_manifest={manifest!r}, eval_every=5)"""
ROLLOUTS = """dict(group_size=3, max_new_tokens=6, beta=0.1, completions_every=5, decode_slots=6)"""
TEACHER = """dict(teacher_model={teacher!r}, teacher_media='audio', teacher_prompt='{{options}} {{question}}')"""
STAGES = {
    "letters": "Evaluate(name='letters', model={model!r}, manifest={manifest!r})",
    "written": "Evaluate(name='written', model={model!r}, manifest={manifest!r}, answer='generate', max_new_tokens=5)",
    "labels": "Label(name='labels', model={teacher!r}, manifest={manifest!r}, top_k=4)",
    "sharded": "Label(name='sharded', model={model!r}, manifest={manifest!r}, top_k=4, sharded=True)",
    "traces": "Traces(name='traces', model={model!r}, manifest={manifest!r}, media='audio', num_samples=2, "
              "max_new_tokens=5, top_k=3)",
    "checked": "FactCheck(name='checked', traces={traces!r}, manifest={manifest!r}, model={model!r}, threshold=-1e9)",
    "checked_sharded": "FactCheck(name='checked_sharded', traces={traces!r}, manifest={manifest!r}, model={model!r}, "
                       "threshold=-1e9, sharded=True)",
    "verifier": "FactCheck(name='verifier', traces={traces!r}, manifest={manifest!r}, model={model!r}, width=1 / 16, "
                "clip_s=0.5, epochs=2, batch_size=4, checker='verifier', verdicts={verdicts!r}, "
                "threshold=-1e9, seed=1)",
    "switch": "Switch(name='switch', teacher='@written', student='@letters', manifest={manifest!r}, "
              "train_manifest={manifest!r}, width=1 / 16, clip_s=0.5, epochs=2, batch_size=4)",
    "distill": "Distill(name='distill', model={model!r}, teacher_labels='@labels', student_labels='@labels', "
               "teacher_loss='kl+ce', switch={decided!r}, gate='learned', **STEPS)",
    "sft": "SFT(name='sft', model={model!r}, traces={traces!r}, trace_filter='first', max_new_tokens=5, **STEPS)",
    "sft_kl": "SFT(name='sft_kl', model={model!r}, traces={traces!r}, teacher_loss='kl', trainable='decoder', "
              "max_new_tokens=5, **STEPS)",
    "sft_decoder": "SFT(name='sft_decoder', model={model!r}, trainable='decoder', checkpointing='on', **STEPS)",
    "sft_8bit": "SFT(name='sft_8bit', model={model!r}, trainable='decoder', dtype='bfloat16', moments='8bit', **STEPS)",
    "sft_full": "SFT(name='sft_full', model={model!r}, trainable='full', **STEPS)",
    "grpo": "GRPO(name='grpo', model={model!r}, num_iterations=2, aggregation='token', **ROLLOUTS, **STEPS)",
    "grpo_decoder": "GRPO(name='grpo_decoder', model={model!r}, trainable='decoder', num_iterations=2, **ROLLOUTS, "
                    "**STEPS)",
    "grpo_host": "GRPO(name='grpo_host', model={model!r}, trainable='full', reference='host', zero_variance='skip', "
                 "aggregation='constant', **ROLLOUTS, **STEPS)",
    "on_policy": "OnPolicy(name='on_policy', model={model!r}, switch={decided!r}, gate='learned', num_iterations=2, "
                 "**TEACHER, **ROLLOUTS, **STEPS)",
    "on_policy_decoder": "OnPolicy(name='on_policy_decoder', model={model!r}, trainable='decoder', switch={few!r}, "
                         "gate='learned', teacher_kl='reverse', teacher_place='sharded', **TEACHER, **ROLLOUTS, "
                         "**STEPS)",
}
NOT_BY_DEFAULT = ("sft_8bit",)  # whose blocks of 256 depend on how many processes divide them
TRAINED = ("distill", "sft", "sft_kl", "sft_decoder", "sft_full", "grpo", "grpo_decoder", "grpo_host", "on_policy",
           "on_policy_decoder")
UNLIKE = ("seconds", "_s", "logp_gap_mean", "logp_gap_max", "scoring_gap_max", "val_bad")  # ends of names in logs


def write_world(folder, names, clips=11):
    """A config of the named stages with all that they read; returns its path."""
    model, manifest = write_model(folder / "ears", "audio"), write_clips(folder / "clips", clips)
    teacher = write_model(folder / "teacher", "audio", seed=7)
    lines = {"traces": [], "verdicts": [], "decided": [], "few": []}
    for i in range(clips):
        words = " ".join(["very"] * (i % 4))
        trace = {"id": f"clip{i}", "sample": 0, "text": f"<think>It is {words} loud.</think><answer>A</answer>"}
        ids = [(29 * i + 7 * t) % 250 for t in range(3 + i % 4)]
        best = [(token + j) % 250 for token in ids for j in range(3)]
        trace |= {"ids": ids, "top": {"ids": best, "logprobs": [-0.5, -1.5, -3.0] * len(ids)}}
        lines["traces"].append({**trace, "option": ("dog", "cat", "owl")[i % 3]})
        lines["verdicts"].append({"id": f"clip{i}", "sample": 0, "score": 1.0, "accepted": i % 3 > 0})
        lines["decided"].append({"id": f"clip{i}", "p_teacher": i * 37 % 100 / 100})
        lines["few"].append({"id": f"clip{i}", "p_teacher": float(i in (2, 7))})  # most processes' teachers are silent
    given = dict(model=str(model), teacher=str(teacher), manifest=str(manifest))
    shutil.copyfile(model / "tokenizer.json", folder / "tokenizer.json")  # of the traces' ids
    for name, records in lines.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        given[name] = str(path)
    stages = ",\n    ".join(STAGES[name].format(**given) for name in names)
    config = write_config(folder / "config.py", f"[\n    {stages},\n]")
    shared = f"STEPS = {STEPS.format(**given)}\nROLLOUTS = {ROLLOUTS}\nTEACHER = {TEACHER.format(**given)}\n"
    text = config.read_text().replace("stages =", f"{shared}stages =")
    config.write_text(text)
    load_config(str(config), [])
    return config


def command(config, run_dir, processes, *options, before="", torchrun=()):
    """(command line, environment) that runs a config in so many processes. before: code that each runs first."""
    script = config.parent / f"command{abs(hash(before))}.py"
    script.write_text(COMMAND.format(before=before))
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend",
              "c10d", "--rdzv-endpoint", "127.0.0.1:0", *torchrun]
    return [*(launch if processes > 1 else [sys.executable]), str(script), str(config), f"run_dir={run_dir}",
            *options], environment


def run(config, run_dir, processes, *options, **given):
    """The finished process, with what it printed."""
    line, environment = command(config, run_dir, processes, *options, **given)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=900)


def weights(folder):
    """{name: tensor} of what a training stage left in best/."""
    found = {}
    for path in sorted((folder / "best").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def difference(a, b):
    """The norm of the difference of two {name: tensor} over the norm of the first."""
    assert a.keys() == b.keys() and a
    square = sum((a[name].double() - b[name].double()).square().sum() for name in a)
    return (square / sum(x.double().square().sum() for x in a.values())).sqrt().item()


def log_of(folder):
    """The lines of a training stage's log, without what depends on time or on rounding alone."""
    kept = []
    for line in read_jsonl(folder / "log.jsonl"):
        kept.append({name: value for name, value in line.items() if not name.endswith(UNLIKE)})
    return kept


def largest_gap(a, b, path=""):
    """The largest relative difference of numbers in two JSON values (over 0.1 of smaller ones); the rest is equal."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{path}: {a.keys() ^ b.keys()}"
        return max((largest_gap(a[key], b[key], f"{path}.{key}") for key in a), default=0.0)
    if isinstance(a, list):
        assert len(a) == len(b), f"{path}: {len(a)} and {len(b)}"
        return max((largest_gap(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))), default=0.0)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) / max(abs(a), abs(b), 0.1)
    assert a == b, f"{path}: {a} and {b}"
    return 0.0
