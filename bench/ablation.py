"""The toy's ablation over several seeds: every distillation's accuracy, pooled, and the claims that it supports.

    python -m minixmd.train toy_ablation seed=K run_dir=runs/ablation-K        for K in 0, 1, 2
    python -m bench.ablation runs/ablation-0 runs/ablation-1 runs/ablation-2 [--out bench/results/ablation.json]

Clips of all seeds count alike. An interval (95 %) is Wilson's for a share and Newcombe's for a difference on the same
questions (minixmd/tasks/statistics.py). It covers the choice of clips, not of seeds: the JSON has each seed's figures.
Exit status 1 when a claim does not hold. The last line of stdout is JSON.
"""
import sys

from bench.claims import judge_runs
from minixmd.inputs.examples import read_manifest
from minixmd.recipe_parts.xmd import ABLATION
from minixmd.runs.files import read_json
from minixmd.runs.records import read_jsonl
from minixmd.tasks.statistics import compare, summary
from minixmd.toy.world import OPTIONS

COLUMNS = {  # title -> (split, group of the toy's categories or None)
    "analysis": ("analysis", None),
    "test": ("test", None),
    "unseen": ("unseen", None),
    "test: both": ("test", "both"),
    "test: ear": ("test", "ear"),
    "test: eye": ("test", "eye"),
    "unseen: both": ("unseen", "both"),
    "unseen: ear": ("unseen", "ear"),
    "unseen: eye": ("unseen", "eye"),
}
ROWS = {  # title -> stage, whose results are <stage>_<split>
    "Audio model before": "audio",
    "Video model before": "video",
    **ABLATION,
    "Video model taught by the audio model": "video_distilled",
}
DIFFERENCES = {  # title -> (stage, stage subtracted from it, column)
    "learned less always, test": ("distilled", "always", "test"),
    "learned less always, test: ear": ("distilled", "always", "test: ear"),
    "learned less never, test": ("distilled", "never", "test"),
    "learned less never, unseen": ("distilled", "never", "unseen"),
    "learned less before, test": ("distilled", "audio", "test"),
    "learned less before, unseen": ("distilled", "audio", "unseen"),
    "learned less before, unseen: eye": ("distilled", "audio", "unseen: eye"),
    "learned less before, unseen: ear": ("distilled", "audio", "unseen: ear"),
    "learned less the video model, test": ("distilled", "video", "test"),
    "video model taught less before, test": ("video_distilled", "video", "test"),
    "video model taught less before, test: ear": ("video_distilled", "video", "test: ear"),
    **{f"ground truth less {title}, test": ("truth", stage, "test")
       for title, stage in ABLATION.items() if stage != "truth"},
}
CHANCE = 1 / OPTIONS
POINTS = 5  # that the learned switch must gain over the student's own answers


def read_answers(runs, stage, column):
    """A column's records of answers.jsonl from all runs, with ids that differ between runs."""
    split, group = COLUMNS[column]
    records = []
    for run in runs:
        groups = {example.id: example.meta["group"] for example in read_manifest(run / "toy" / f"{split}.jsonl")}
        for record in read_jsonl(run / f"{stage}_{split}" / "answers.jsonl"):
            if group in (None, groups[record["id"]]):
                records.append({**record, "id": f"{run.name}/{record['id']}"})
    return records


def accuracy(runs, stage, column):
    records = read_answers(runs, stage, column)
    return summary([record["right"] for record in records if "bad" not in record])


def make_table(runs):
    """{row title: {column title: summary}}"""
    return {title: {column: accuracy(runs, stage, column) for column in COLUMNS} for title, stage in ROWS.items()}


def switch_accuracy(run):
    """{switch stage: {"validation" | "training": accuracy}}"""
    accuracies = {}
    for stage in ("switch", "video_switch"):
        results = read_json(run / stage / "results.json")
        accuracies[stage] = {split: results[split]["accuracy"] for split in ("validation", "training")}
    return accuracies


def gather(runs):
    """{"rows": make_table, "seeds": {run: make_table}, "switch": {run: …}, "differences": {title: compare}}"""
    differences = {}
    for title, (stage, other, column) in DIFFERENCES.items():
        differences[title] = compare(read_answers(runs, stage, column), read_answers(runs, other, column))
    return {
        "rows": make_table(runs),
        "seeds": {run.name: make_table([run]) for run in runs},
        "switch": {str(run): switch_accuracy(run) for run in runs},
        "differences": differences,
    }


def check_claims(results):
    """{claim about the toy: whether it holds}"""
    differences, switches = results["differences"], results["switch"].values()
    to_truth = [value["difference"] for title, value in differences.items() if title.startswith("ground truth less")]
    return {
        "ground truth is the best on test": min(to_truth) >= 0,
        "the learned switch is no worse than always, within the interval":
            differences["learned less always, test"]["interval"][1] >= 0,
        "it loses less than always where the student was stronger":
            differences["learned less always, test: ear"]["difference"] > 0,
        f"it beats never by {POINTS} points or more":
            differences["learned less never, test"]["difference"] >= POINTS / 100,
        "the switch is right on 80 % or more of its validation clips, on every seed": all(
            accuracies["switch"]["validation"] >= 0.8 for accuracies in switches),
        "unseen classes do not get worse, within the interval":
            differences["learned less before, unseen"]["interval"][1] >= 0,
        "both models are above chance on unseen classes before": all(
            results["rows"][f"{title} model before"]["unseen"]["interval"][0] > CHANCE for title in ("Audio", "Video")),
    }  # fmt: skip


def percent(cell):
    low, high = cell["interval"]
    return f"{100 * cell['accuracy']:.1f} ± {50 * (high - low):.1f}"


def print_results(results):
    print("| accuracy, % | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for title, row in results["rows"].items():
        print(f"| {title} | " + " | ".join(percent(cell) for cell in row.values()) + " |")
    print()
    for title, value in results["differences"].items():
        low, high = value["interval"]
        print(f"{title}: {100 * value['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")
    print()
    for run, accuracies in results["switch"].items():
        shares = [f"{stage} {split} {100 * share:.1f} %" for stage, splits in accuracies.items()
                  for split, share in splits.items()]
        print(f"{run}: " + ", ".join(shares))
    print()


def main(argv=None):
    return judge_runs(argv, __doc__, gather, check_claims, print_results)


if __name__ == "__main__":
    sys.exit(main())
