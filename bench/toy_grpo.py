"""SFT, SFT continued, and GRPO on the toy over several seeds: accuracy and reward of written answers, pooled.

    python -m minixmd.train toy_grpo seed=K run_dir=runs/toy_grpo-K        for K in 0, 1, 2
    python -m bench.toy_grpo runs/toy_grpo-0 runs/toy_grpo-1 runs/toy_grpo-2 [--out bench/results/toy_grpo.json]

Clips of all seeds count alike. Intervals (95 %) of accuracies are Wilson's, of their differences on the same questions
Newcombe's, of differences of the mean reward 1.96 standard errors of the paired differences; they speak of clips, not
of seeds: each seed's own figures stand in the JSON. Exit status 1 when a claim does not hold. The last line is JSON.
"""
import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev

from minixmd.files import write_json
from minixmd.inputs.examples import read_manifest
from minixmd.learning.rewards import REWARDS
from minixmd.learning.scoring import read_records
from minixmd.stages.evaluate import compare, summary

ROWS = {"before": "before", "SFT": "sft", "SFT continued": "continued", "SFT, then GRPO": "grpo"}
EDGE = 20  # steps at either end of a run, whose mean reward is compared
CURVE = ("reward", "accuracy", "format", "kl", "entropy", "completion_tokens", "truncated", "zero_variance")


def answers(run, name):
    """Records of a row's answers to the test split, with ids of this run's own and what each earned."""
    examples = {e.id: e for e in read_manifest(run / "toy" / "test.jsonl")}
    return [{**record, "id": f"{run.name}/{record['id']}",
             "reward": sum(reward(record["text"], examples[record["id"]]) for reward in REWARDS.values())}
            for record in read_records(run / f"{name}_test" / "answers.jsonl")]


def table(runs):
    found = {}
    for title, name in ROWS.items():
        records = [record for run in runs for record in answers(run, name)]
        found[title] = {**summary([record["right"] for record in records]),
                        "reward": mean(record["reward"] for record in records)}
    return found


def less(runs, a, b):
    """How much more often a is right than b, and earns, on the same questions."""
    a, b = ([record for run in runs for record in answers(run, name)] for name in (a, b))
    gains = [one["reward"] - other["reward"] for one, other in zip(a, b, strict=True)]
    half = 1.96 * stdev(gains) / math.sqrt(len(gains))
    return {**compare(a, b), "reward": mean(gains), "reward_interval": [mean(gains) - half, mean(gains) + half]}


def curve(run):
    """The means of every 20 steps of GRPO's log."""
    lines = [line for line in read_records(run / "grpo" / "log.jsonl") if "reward" in line]
    return {key: [round(mean(line[key] for line in lines[i:i + EDGE]), 4) for i in range(0, len(lines), EDGE)]
            for key in CURVE} | {"steps": len(lines), "largest_kl": max(line["kl"] for line in lines)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    found = {"rows": table(args.runs), "seeds": {run.name: table([run]) for run in args.runs},
             "differences": {f"GRPO less {title}": less(args.runs, "grpo", ROWS[title])
                             for title in ("SFT", "SFT continued")},
             "curves": {run.name: curve(run) for run in args.runs}}
    differences, curves = found["differences"].values(), found["curves"].values()
    found["claims"] = {
        "GRPO is right more often than SFT and than SFT continued": all(x["interval"][0] > 0 for x in differences),
        "GRPO earns more than SFT and than SFT continued": all(x["reward_interval"][0] > 0 for x in differences),
        "the mean reward of a run's last steps is above that of its first": all(
            x["reward"][-1] > x["reward"][0] for x in curves),
        "KL stays finite": all(math.isfinite(x["largest_kl"]) for x in curves),
        "no collapse: no 20 steps earn less than the first 20, less 0.2": all(
            min(x["reward"]) > x["reward"][0] - 0.2 for x in curves),
    }  # fmt: skip
    print("| on test | right, % | mean reward |\n|---|---|---|")
    for title, row in found["rows"].items():
        low, high = row["interval"]
        print(f"| {title} | {100 * row['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f}) | {row['reward']:.3f} |")
    print()
    for title, x in found["differences"].items():
        (low, high), (least, most) = x["interval"], x["reward_interval"]
        print(f"{title}: {100 * x['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), reward "
              f"{x['reward']:+.3f} ({least:+.3f} to {most:+.3f})")
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
