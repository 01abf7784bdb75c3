"""SightSound-R1 on the toy over several seeds: the ladder, the modes without training, the traces and the verifier.

    python -m minixmd.train toy_sightsound_ablation seed=K run_dir=runs/sightsound-K        for K in 0, 1, 2
    python -m bench.toy_sightsound runs/sightsound-0 runs/sightsound-1 runs/sightsound-2 [--out FILE.json]

Clips of all seeds count alike. Intervals (95 %) of shares are Wilson's, of their differences on the same questions
Newcombe's, of differences of the mean reward 1.96 standard errors of the paired differences. They cover the choice of
clips, not of seeds: the JSON has each seed's figures. SFT learns from traces of 144 clips, GRPO from the teacher's
letters on all 1,920; a row has GRPO on the 144 alone. A trace is false if it names another sound than the world put
into its clip. Exit status 1 when a claim does not hold. The last line is JSON.
"""
import math
import re
import sys
from functools import cache
from statistics import mean, stdev

import torch

from bench.claims import judge_runs
from minixmd import load
from minixmd.config import FactCheck
from minixmd.inputs.examples import read_manifest
from minixmd.recipe_parts.sightsound import CONTROLS, LADDER
from minixmd.recipes import toy_sightsound_ablation
from minixmd.runs.files import read_json
from minixmd.runs.records import read_jsonl
from minixmd.runs.seeds import hash_seed
from minixmd.stages import verifier
from minixmd.stages.cnn14_training import load_logmel
from minixmd.tasks.answers import thoughts
from minixmd.tasks.rewards import REWARDS
from minixmd.tasks.statistics import compare, summary
from minixmd.tasks.yes_no import auc

MODES = {title: row.name for title, row in toy_sightsound_ablation.MODES.items()}  # title -> Evaluate stage
ROWS = {title: f"{name}_test" for title, name in (LADDER | CONTROLS).items()}  # likewise
DIFFERENCES = {  # title -> (Evaluate stage, stage subtracted from it)
    "GRPO less SFT": ("grpo_test", "sft_test"),
    "GRPO less SFT continued": ("grpo_test", "continued_test"),
    "GRPO on the traces' clips alone less SFT continued": ("grpo_traced_test", "continued_test"),
    "AGFV + SFT less SFT, one trace a clip": ("checked_first_test", "first_test"),
    "TTS + AGFV + SFT less AGFV + SFT": ("sft_test", "checked_first_test"),
    "zero-shot CoT less direct": ("cot", "before_test"),
    "test-time CoT less direct": ("test_time", "before_test"),
}
TRACES = {  # title -> (stage, which of its traces)
    "sampled, first of a clip": ("traces", "first"),
    "accepted, first of a clip": ("checked", "first"),
    "sampled, unanimous": ("traces", "unanimous"),
    "accepted, unanimous": ("checked", "unanimous"),
}
WINDOW = 20  # steps of GRPO whose mean is a point of the curve
CURVE = ("reward", "accuracy", "format", "kl", "entropy", "completion_tokens", "truncated", "zero_variance")
MIN_AUC = 0.8  # of the verifier on new clips
MAX_SHUFFLED_AUC = 0.6  # of the same with other clips' sound


# ---- accuracy and reward ----


@cache
def read_answers(run, stage):
    """Records of a stage's answers to the test split, with ids that differ between runs and the reward of each text."""
    examples = {example.id: example for example in read_manifest(run / "toy" / "test.jsonl")}
    records = []
    for record in read_jsonl(run / stage / "answers.jsonl"):
        example = examples[record["id"]]
        reward = sum(reward(record["text"], example, example.answer, False) for reward in REWARDS.values())
        records.append({**record, "id": f"{run.name}/{record['id']}", "reward": reward})
    return records


def pool_answers(runs, stage):
    return [record for run in runs for record in read_answers(run, stage)]


def make_table(runs, rows):
    """{title: summary and mean reward}. rows: {title: Evaluate stage}."""
    table = {}
    for title, stage in rows.items():
        records = pool_answers(runs, stage)
        table[title] = summary([record["right"] for record in records])
        table[title]["reward"] = mean(record["reward"] for record in records)
    return table


def subtract(runs, stage, other):
    """How much more often a stage is right than the other, and the difference in reward, on the same questions."""
    records, others = pool_answers(runs, stage), pool_answers(runs, other)
    gains = [record["reward"] - its["reward"] for record, its in zip(records, others, strict=True)]
    half = 1.96 * stdev(gains) / math.sqrt(len(gains))
    interval = [mean(gains) - half, mean(gains) + half]
    return {**compare(records, others), "reward": mean(gains), "reward_interval": interval}


# ---- traces and the verifier ----


def named_sound(trace):
    """The sound that a trace says it hears; None if it names none, which counts as false."""
    match = re.search(r"I hear ([\w ]+)", trace["text"])
    return match and match[1]


def true_sounds(run, split):
    """{clip id: label}"""
    return {example.id: example.label for example in read_manifest(run / "toy" / f"{split}.jsonl")}


def count_false(runs, stage, which):
    """Summary of whether a stage's traces are false. which: "first" sample of a clip | "unanimous"."""
    false = []
    for run in runs:
        labels = true_sounds(run, "train_truth")
        for trace in read_jsonl(run / stage / "traces.jsonl"):
            if trace["sample"] == 0 if which == "first" else trace["unanimous"]:
                false.append(named_sound(trace) != labels[trace["id"]])
    return summary(false)


def judge_verifier(run):
    """The verifier against the world's truth, on clips that it was not calibrated on.

    "auc" is its area under the ROC curve, "auc_shuffled" the same when every trace is scored with the sound of another
    such clip, "checker_auc" that of the checker which taught it.
    """
    labels = true_sounds(run, "test")
    calibrated = {record["id"] for record in read_jsonl(run / "calibration" / "verdicts.jsonl")}
    sampled = read_jsonl(run / "test_traces" / "traces.jsonl")
    traces_by_key = {(trace["id"], trace["sample"]): trace for trace in sampled}
    verdicts = [record for record in read_jsonl(run / "verifier" / "verdicts.jsonl") if record["id"] not in calibrated]
    keys = [(record["id"], record["sample"]) for record in verdicts]
    traces = [traces_by_key[key] for key in keys]
    is_true = [named_sound(trace) == labels[trace["id"]] for trace in traces]
    checker_scores = {(record["id"], record["sample"]): record["score"]
                      for record in read_jsonl(run / "test_traces_checked" / "verdicts.jsonl")}
    ids = sorted({trace["id"] for trace in traces})
    return {
        "clips": len(ids),
        "calibrated_on": len(calibrated),
        "traces": len(traces),
        "true": sum(is_true),
        "auc": auc([record["score"] for record in verdicts], is_true),
        "auc_shuffled": auc(shuffled_scores(run, traces, ids), is_true),
        "checker_auc": auc([checker_scores[key] for key in keys], is_true),
        "calibration": read_json(run / "verifier" / "results.json")["calibration"],
    }


def shuffled_scores(run, traces, ids):
    """The verifier's scores of traces, each with the sound of another of the clips `ids`."""
    fields = read_json(run / "verifier" / "config.json")
    stage = FactCheck(**{name: value for name, value in fields.items() if name != "stage"})
    model, processor = load(run / "toy" / "student")
    weights = run / "verifier" / "verifier.safetensors"
    network = verifier.load_verifier(weights, stage.width)
    generator = torch.Generator().manual_seed(hash_seed(0, run.name))
    order = torch.randperm(len(ids), generator=generator).tolist()
    other = {clip_id: ids[place] for clip_id, place in zip(ids, order, strict=True)}
    audio = {example.id: example.audio for example in read_manifest(run / "toy" / "test.jsonl")}
    logmels = {clip_id: load_logmel(audio[clip_id], stage.clip_s) for clip_id in ids}
    texts = [thoughts(trace["text"]) for trace in traces]
    text_BD = verifier.trace_vectors(model, processor, texts, stage.batch_tokens)
    pairs = []
    for trace, text_D in zip(traces, text_BD, strict=True):
        pairs.append(verifier.Pair(logmels[other[trace["id"]]], text_D, trace["option"]))
    return verifier.score_pairs(network, pairs, stage.batch_size)


# ---- GRPO's curve and the claims ----


def read_curve(run):
    """Means of every WINDOW steps of GRPO's log."""
    lines = [line for line in read_jsonl(run / "grpo" / "log.jsonl") if "reward" in line]
    windows = [lines[start:start + WINDOW] for start in range(0, len(lines), WINDOW)]
    curve = {}
    for key in CURVE:
        curve[key] = [round(mean(line[key] for line in window if key in line), 4) for window in windows]
    return {**curve, "steps": len(lines), "largest_kl": max(line.get("kl", 0.0) for line in lines)}


def check_claims(results):
    """{claim: whether it holds}"""
    gains = [results["differences"][title] for title in ("GRPO less SFT", "GRPO less SFT continued")]
    curves, verifiers = results["curves"].values(), results["verifier"].values()
    false = results["false traces"]
    fewer_false = [false[f"accepted, {which}"]["interval"][1] < false[f"sampled, {which}"]["interval"][0]
                   for which in ("first of a clip", "unanimous")]
    return {
        "GRPO is right more often than SFT and than SFT continued": all(gain["interval"][0] > 0 for gain in gains),
        "GRPO earns more than SFT and than SFT continued": all(gain["reward_interval"][0] > 0 for gain in gains),
        "the mean reward of a run's last steps is above that of its first": all(
            curve["reward"][-1] > curve["reward"][0] for curve in curves),
        "KL stays finite": all(math.isfinite(curve["largest_kl"]) for curve in curves),
        "no collapse in at least 200 steps: no 20 of them earn less than the first 20, less 0.2": all(
            curve["steps"] >= 200 and min(curve["reward"]) > curve["reward"][0] - 0.2 for curve in curves),
        "fewer traces are false after verification": all(fewer_false),
        f"the verifier's area under ROC is at least {MIN_AUC} on new clips": all(
            judged["auc"] >= MIN_AUC for judged in verifiers),
        f"with other clips' sound at most {MAX_SHUFFLED_AUC}": all(
            judged["auc_shuffled"] <= MAX_SHUFFLED_AUC for judged in verifiers),
    }  # fmt: skip


def gather(runs):
    """All results but the claims."""
    funnels = {}
    for run in runs:
        funnels[run.name] = {stage: read_json(run / stage / "results.json") for stage in ("traces", "checked")}
    return {
        "rows": make_table(runs, ROWS),
        "modes": make_table(runs, MODES),
        "seeds": {run.name: {"rows": make_table([run], ROWS), "modes": make_table([run], MODES)} for run in runs},
        "differences": {title: subtract(runs, *stages) for title, stages in DIFFERENCES.items()},
        "false traces": {title: count_false(runs, *traces) for title, traces in TRACES.items()},
        "funnel": funnels,
        "verifier": {run.name: judge_verifier(run) for run in runs},
        "curves": {run.name: read_curve(run) for run in runs},
    }


def print_results(results):
    for table in (results["rows"], results["modes"]):
        print("| on test | right, % | mean reward |\n|---|---|---|")
        for title, row in table.items():
            low, high = row["interval"]
            print(f"| {title} | {100 * row['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f}) | {row['reward']:.3f} |")
        print()
    for title, value in results["differences"].items():
        low, high = value["interval"]
        low_reward, high_reward = value["reward_interval"]
        print(f"{title}: {100 * value['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), reward "
              f"{value['reward']:+.3f} ({low_reward:+.3f} to {high_reward:+.3f})")
    for title, value in results["false traces"].items():
        low, high = value["interval"]
        print(f"false of {value['count']} traces, {title}: {100 * value['accuracy']:.1f} % ({100 * low:.1f} to "
              f"{100 * high:.1f})")
    for run, judged in results["verifier"].items():
        print(f"{run}: verifier on {judged['traces']} traces of {judged['clips']} new clips: area under ROC "
              f"{judged['auc']:.3f}, with other clips' sound {judged['auc_shuffled']:.3f}; the checker "
              f"{judged['checker_auc']:.3f}")
    for run, curve in results["curves"].items():
        print(f"{run}: {curve['steps']} steps, reward {curve['reward']}, largest KL {curve['largest_kl']:.3f}")


def main(argv=None):
    return judge_runs(argv, __doc__, gather, check_claims, print_results)


if __name__ == "__main__":
    sys.exit(main())
