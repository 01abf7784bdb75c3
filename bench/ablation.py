"""The toy's ablation over several seeds: every distillation's accuracy, pooled, and what is claimed of them.

    python -m minixmd.train toy_ablation seed=K run_dir=runs/ablation-K        for K in 0, 1, 2
    python -m bench.ablation runs/ablation-0 runs/ablation-1 runs/ablation-2 [--out bench/results/ablation.json]

Clips of all seeds count alike. An interval (95 %) is Wilson's for a share and Newcombe's for a difference on the same
questions (minixmd/learning/statistics.py); it speaks of clips, not of seeds: each seed's own figures stand in the JSON.
Exit status 1 when a claim does not hold. The last line of stdout is JSON.
"""
import argparse
import json
import sys
from pathlib import Path

from minixmd.inputs.examples import read_manifest
from minixmd.papers.xmd import ABLATION
from minixmd.runs.files import read_json, write_json
from minixmd.stages.multiple_choice import read_records
from minixmd.tasks.statistics import compare, summary

SPLITS = ("analysis", "test", "unseen")
GROUPS = {"test": ("both", "ear", "eye")}
ROWS = {"Audio model before": "audio", "Video model before": "video"}
ROWS |= {title: name for title, (name, _) in ABLATION.items()}
ROWS |= {"Video model taught by the audio model": "video_distilled"}
POINTS = 5  # that the learned switch must gain over the student's own answers


def answers(run, name, split, group=None):
    """Records of answers.jsonl with ids of this run's own."""
    groups = {e.id: e.meta["group"] for e in read_manifest(run / "toy" / f"{split}.jsonl")}
    return [{**record, "id": f"{run.name}/{record['id']}"}
            for record in read_records(run / f"{name}_{split}" / "answers.jsonl")
            if group in (None, groups[record["id"]])]


def pooled(runs, name, split, group=None):
    return [record for run in runs for record in answers(run, name, split, group)]


def share(records):
    return summary([record["right"] for record in records if "bad" not in record])


def gather(runs):
    """{"rows": {title: {column: summary}}, "seeds": {run: …}, "switch": {run: {…}}, "differences": {what: compare}}"""
    columns = [(split, None) for split in SPLITS] + [("test", group) for group in GROUPS["test"]]

    def table(runs):
        return {title: {split if group is None else f"{split}: {group}": share(pooled(runs, name, split, group))
                        for split, group in columns} for title, name in ROWS.items()}

    def less(a, b, split, group=None):
        return compare(pooled(runs, a, split, group), pooled(runs, b, split, group))

    others = {title: name for title, (name, _) in ABLATION.items() if name != "truth"}
    differences = {
        "learned less always, test": less("distilled", "always", "test"),
        "learned less always, test: ear": less("distilled", "always", "test", "ear"),
        "learned less never, test": less("distilled", "never", "test"),
        "learned less before, test": less("distilled", "audio", "test"),
        "learned less before, unseen": less("distilled", "audio", "unseen"),
        "video model taught less before, test": less("video_distilled", "video", "test"),
        "video model taught less before, test: ear": less("video_distilled", "video", "test", "ear"),
        **{f"ground truth less {title}, test": less("truth", name, "test") for title, name in others.items()},
    }
    switch = {str(run): {which: {part: read_json(run / which / "results.json")[part]["accuracy"]
                                 for part in ("validation", "training")} for which in ("switch", "video_switch")}
              for run in runs}
    return {"rows": table(runs), "seeds": {run.name: table([run]) for run in runs}, "switch": switch,
            "differences": differences}


def claims(found):
    """{what the toy should show: whether it does}"""
    differences = found["differences"]
    return {
        "ground truth is the best on test": all(
            one["difference"] >= 0 for name, one in differences.items() if name.startswith("ground truth less")),
        "the learned switch is no worse than always, within the interval":
            differences["learned less always, test"]["interval"][1] >= 0,
        "it loses less than always where the student was stronger":
            differences["learned less always, test: ear"]["difference"] > 0,
        f"it beats never by {POINTS} points or more":
            differences["learned less never, test"]["difference"] >= POINTS / 100,
        "the switch is right on 80 % or more of its validation clips, on every seed": all(
            one["switch"]["validation"] >= 0.8 for one in found["switch"].values()),
        "unseen classes do not get worse, within the interval":
            differences["learned less before, unseen"]["interval"][1] >= 0,
    }  # fmt: skip


def percent(one):
    low, high = one["interval"]
    return f"{100 * one['accuracy']:.1f} ± {50 * (high - low):.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = gather(args.runs)
    found["claims"] = claims(found)
    columns = list(next(iter(found["rows"].values())))
    print("| accuracy, % | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for title, row in found["rows"].items():
        print(f"| {title} | " + " | ".join(percent(row[column]) for column in columns) + " |")
    print()
    for what, one in found["differences"].items():
        low, high = one["interval"]
        print(f"{what}: {100 * one['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")
    print()
    for run, one in found["switch"].items():
        print(f"{run}: " + ", ".join(f"{which} {part} {100 * x:.1f} %" for which, parts in one.items()
                                     for part, x in parts.items()))
    print()
    for what, holds in found["claims"].items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {what}")
    if args.out:
        write_json(args.out, found)
    print(json.dumps({"claims": found["claims"]}))
    return 0 if all(found["claims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
