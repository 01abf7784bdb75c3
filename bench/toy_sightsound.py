"""SightSound-R1 on the toy over several seeds: the ladder, the modes without training, the traces and the verifier.

    python -m minixmd.train toy_sightsound_ablation seed=K run_dir=runs/sightsound-K        for K in 0, 1, 2
    python -m bench.toy_sightsound runs/sightsound-0 runs/sightsound-1 runs/sightsound-2 [--out FILE.json]

Clips of all seeds count alike. Intervals (95 %) of shares are Wilson's, of their differences on the same questions
Newcombe's, of differences of the mean reward 1.96 standard errors of the paired differences; they speak of clips, not
of seeds: each seed's own figures stand in the JSON. SFT learns from traces of 72 clips, GRPO from the teacher's letters
on all 2,400; how it does on the 72 alone is a row of its own. A trace is false if it names another sound than the one
that the world put into its clip. Exit status 1 when a claim does not hold. The last line is JSON.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

from minixmd import load
from minixmd.config import FactCheck
from minixmd.inputs.examples import read_manifest
from minixmd.papers.sightsound import CONTROLS, LADDER
from minixmd.runs.files import read_json, write_json
from minixmd.runs.seeds import hash_seed
from minixmd.stages import verifier
from minixmd.stages.multiple_choice import read_records
from minixmd.stages.switch import hear
from minixmd.tasks.answers import thoughts
from minixmd.tasks.rewards import REWARDS
from minixmd.tasks.statistics import compare, summary

ROWS = LADDER | CONTROLS
MODES = {"student, direct": "before_test", "student, zero-shot CoT": "cot", "student, test-time CoT": "test_time",
         "teacher, direct": "teacher", "teacher, CoT": "teacher_cot"}
DIFFERENCES = {  # title -> stages
    "GRPO less SFT": ("grpo_test", "sft_test"), "GRPO less SFT continued": ("grpo_test", "continued_test"),
    "GRPO on the traces' clips alone less SFT continued": ("grpo_traced_test", "continued_test"),
    "AGFV + SFT less SFT, one trace a clip": ("checked_first_test", "first_test"),
    "TTS + AGFV + SFT less AGFV + SFT": ("sft_test", "checked_first_test"),
    "zero-shot CoT less direct": ("cot", "before_test"), "test-time CoT less direct": ("test_time", "before_test"),
}  # fmt: skip
TRACES = {"sampled, first of a clip": ("traces", "first"), "accepted, first of a clip": ("checked", "first"),
          "sampled, unanimous": ("traces", "unanimous"), "accepted, unanimous": ("checked", "unanimous")}
EDGE = 20  # steps at either end of a run, whose mean reward is compared
CURVE = ("reward", "accuracy", "format", "kl", "entropy", "completion_tokens", "truncated", "zero_variance")
LEAST, MOST = 0.8, 0.6  # area under ROC of the verifier; of the same on other clips' sound


def answers(run, name):
    """Records of a stage's answers to the test split, with ids of this run's own and what each text earned."""
    examples = {e.id: e for e in read_manifest(run / "toy" / "test.jsonl")}
    return [{**record, "id": f"{run.name}/{record['id']}",
             "reward": sum(reward(record["text"], examples[record["id"]]) for reward in REWARDS.values())}
            for record in read_records(run / name / "answers.jsonl")]


def table(runs, rows):
    return {title: {**summary([record["right"] for run in runs for record in answers(run, name)]),
                    "reward": mean(record["reward"] for run in runs for record in answers(run, name))}
            for title, name in rows.items()}


def less(runs, a, b):
    """How much more often a is right than b, and earns, on the same questions."""
    a, b = ([record for run in runs for record in answers(run, name)] for name in (a, b))
    gains = [one["reward"] - other["reward"] for one, other in zip(a, b, strict=True)]
    half = 1.96 * stdev(gains) / math.sqrt(len(gains))
    return {**compare(a, b), "reward": mean(gains), "reward_interval": [mean(gains) - half, mean(gains) + half]}


def named(trace):
    """The sound that a trace says it hears; None for one that names none, which is false too."""
    found = re.search(r"I hear (\w+)", trace["text"])
    return found and found[1]


def sounds(run, split):
    return {e.id: e.label for e in read_manifest(run / "toy" / f"{split}.jsonl")}


def false_traces(runs, stage, which):
    """Whether each trace that a row of the ladder may learn from names a sound that was not there."""
    false = []
    for run in runs:
        sounded = sounds(run, "train_truth")
        false += [named(trace) != sounded[trace["id"]] for trace in read_records(run / stage / "traces.jsonl")
                  if (trace["sample"] == 0 if which == "first" else trace["unanimous"])]
    return summary(false)


def verified(run):
    """The verifier against the world's record, on clips that it was not calibrated on: the area under ROC, and that
    with the sound of other such clips; and the checker's own."""
    sounded = sounds(run, "test")
    seen = {record["id"] for record in read_records(run / "calibration" / "verdicts.jsonl")}
    given = {(trace["id"], trace["sample"]): trace for trace in read_records(run / "test_traces" / "traces.jsonl")}
    new = [record for record in read_records(run / "verifier" / "verdicts.jsonl") if record["id"] not in seen]
    traces = [given[record["id"], record["sample"]] for record in new]
    true = [named(trace) == sounded[trace["id"]] for trace in traces]
    asked = {(record["id"], record["sample"]): record["score"]
             for record in read_records(run / "test_traces_checked" / "verdicts.jsonl")}
    fields = read_json(run / "verifier" / "config.json")
    stage = FactCheck(**{name: value for name, value in fields.items() if name != "stage"})
    model, processor = load(run / "toy" / "student")
    small = verifier.restore(stage, model.config.text.hidden_size, run / "verifier" / "verifier.safetensors", "cpu")
    ids = sorted({trace["id"] for trace in traces})
    generator = torch.Generator().manual_seed(hash_seed(0, run.name))
    order = torch.randperm(len(ids), generator=generator).tolist()
    other = {name: ids[order[i]] for i, name in enumerate(ids)}
    examples = {e.id: e for e in read_manifest(run / "toy" / "test.jsonl")}
    frames = {name: hear(stage, examples[name]) for name in ids}
    text_BD = verifier.trace_vectors(model, processor, [thoughts(trace["text"]) for trace in traces],
                                     stage.batch_tokens)
    shuffled = verifier.scores(small, [frames[other[trace["id"]]] for trace in traces], text_BD, stage.batch_size)
    return {"clips": len(ids), "calibrated_on": len(seen), "traces": len(traces), "true": sum(true),
            "auc": verifier.auc([record["score"] for record in new], true),
            "auc_shuffled": verifier.auc(shuffled, true),
            "checker_auc": verifier.auc([asked[record["id"], record["sample"]] for record in new], true),
            "calibration": read_json(run / "verifier" / "results.json")["calibration"]}


def curve(run):
    """The means of every 20 steps of GRPO's log."""
    lines = [line for line in read_records(run / "grpo" / "log.jsonl") if "reward" in line]
    parts = [lines[i:i + EDGE] for i in range(0, len(lines), EDGE)]
    return {key: [round(mean(line[key] for line in part if key in line), 4) for part in parts] for key in CURVE} | {
        "steps": len(lines), "largest_kl": max(line.get("kl", 0.0) for line in lines)}


def claims(found):
    gains = [found["differences"][title] for title in ("GRPO less SFT", "GRPO less SFT continued")]
    curves, checks, false = found["curves"].values(), found["verifier"].values(), found["false traces"]
    return {
        "GRPO is right more often than SFT and than SFT continued": all(x["interval"][0] > 0 for x in gains),
        "GRPO earns more than SFT and than SFT continued": all(x["reward_interval"][0] > 0 for x in gains),
        "the mean reward of a run's last steps is above that of its first": all(
            x["reward"][-1] > x["reward"][0] for x in curves),
        "KL stays finite": all(math.isfinite(x["largest_kl"]) for x in curves),
        "no collapse in at least 200 steps: no 20 of them earn less than the first 20, less 0.2": all(
            x["steps"] >= 200 and min(x["reward"]) > x["reward"][0] - 0.2 for x in curves),
        "fewer traces are false after verification": all(
            false[f"accepted, {which}"]["interval"][1] < false[f"sampled, {which}"]["interval"][0]
            for which in ("first of a clip", "unanimous")),
        f"the verifier's area under ROC is at least {LEAST} on new clips": all(x["auc"] >= LEAST for x in checks),
        f"with other clips' sound at most {MOST}": all(x["auc_shuffled"] <= MOST for x in checks),
    }  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = {title: f"{name}_test" for title, name in ROWS.items()}
    found = {"rows": table(args.runs, rows), "modes": table(args.runs, MODES),
             "seeds": {run.name: {"rows": table([run], rows), "modes": table([run], MODES)} for run in args.runs},
             "differences": {title: less(args.runs, *stages) for title, stages in DIFFERENCES.items()},
             "false traces": {title: false_traces(args.runs, *which) for title, which in TRACES.items()},
             "funnel": {run.name: {name: read_json(run / name / "results.json") for name in ("traces", "checked")}
                        for run in args.runs},
             "verifier": {run.name: verified(run) for run in args.runs},
             "curves": {run.name: curve(run) for run in args.runs}}
    found["claims"] = claims(found)
    for name in ("rows", "modes"):
        print("| on test | right, % | mean reward |\n|---|---|---|")
        for title, row in found[name].items():
            low, high = row["interval"]
            print(f"| {title} | {100 * row['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f}) | {row['reward']:.3f} |")
        print()
    for title, x in found["differences"].items():
        (low, high), (least, most) = x["interval"], x["reward_interval"]
        print(f"{title}: {100 * x['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), reward "
              f"{x['reward']:+.3f} ({least:+.3f} to {most:+.3f})")
    for title, x in found["false traces"].items():
        low, high = x["interval"]
        print(f"false of {x['count']} traces, {title}: {100 * x['accuracy']:.1f} % ({100 * low:.1f} to "
              f"{100 * high:.1f})")
    for run, x in found["verifier"].items():
        print(f"{run}: verifier on {x['traces']} traces of {x['clips']} new clips: area under ROC {x['auc']:.3f}, with "
              f"other clips' sound {x['auc_shuffled']:.3f}; the checker {x['checker_auc']:.3f}")
    for run, x in found["curves"].items():
        print(f"{run}: {x['steps']} steps, reward {x['reward']}, largest KL {x['largest_kl']:.3f}")
    for what, holds in found["claims"].items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {what}")
    if args.out:
        write_json(args.out, found)
    print(json.dumps({"claims": found["claims"]}))
    return 0 if all(found["claims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
