"""On-policy distillation on the toy over several seeds: every arm's accuracy after so many updates, and the claims.

    python -m minixmd.train toy_on_policy_ablation seed=K run_dir=runs/on_policy-K SEEDS        for K in 0, 1, 2
    python -m bench.on_policy runs/on_policy-0 runs/on_policy-1 runs/on_policy-2 [--out FILE.json]

SEEDS: grpo_2.seed=101 grpo_3.seed=102 on_policy_2.seed=101 on_policy_3.seed=102 in world 0, from 111 in 1, from 121 in
2: the other randomness of four arms, which may be left out.
Clips of all seeds count alike. Intervals (95 %) of shares are Wilson's, of differences on the same questions
Newcombe's; they cover the choice of clips, not of seeds or of other randomness, whose spread stands beside. A thought
leaks if, on a clip of group "ear", it names another category of the same noun: one that looks like the clip and sounds
otherwise. Tokens are those that an arm's updates read and wrote; FLOPs an update are the dry run's, with completions of
max_new_tokens. Exit status 1 when a claim does not hold. The last line is JSON.
"""
import re
import sys
from dataclasses import replace
from functools import cache
from statistics import mean

from bench.claims import judge_runs
from minixmd.dryrun.memory_estimate import estimate
from minixmd.dryrun.plan import plan_alone
from minixmd.inputs.examples import read_manifest
from minixmd.recipes.toy_on_policy_ablation import AGAIN, ARMS, stages
from minixmd.runs.files import read_json
from minixmd.runs.records import read_jsonl
from minixmd.tasks.statistics import compare, digest, summary

STEPS = 50, 100, 150, 200
STAGES = {title: arm[0].name for title, arm in ARMS.items()}
DEFAULT = "on_policy"
CLAIMS = {  # claim -> (arm, updates, arm subtracted, updates, group of clips or None, points above which it must lie)
    "(a) the default at 50 updates is not below GRPO at 200, by more than 1.5 points": (
        DEFAULT, 50, "grpo", 200, None, -1.5),
    "(b) at 200 updates it is above GRPO": (DEFAULT, 200, "grpo", 200, None, 0.0),
    "(c) it is above the same with another clip's video by more than 10 points": (
        DEFAULT, 200, "shuffled", 200, None, 10.0),
    "(d) on 'ear', where the teacher is the weaker one, it is not below GRPO by more than 1.5 points": (
        DEFAULT, 200, "grpo", 200, "ear", -1.5),
}  # fmt: skip
REPORTED = {  # likewise, but nothing is claimed
    "the student's words less the teacher's, KL alone": ("no_reward", 200, "words", 200, None),
    "live rows less stored ones, on the teacher's words": ("words", 200, "rows", 200, None),
    "stored rows less SFT": ("rows", 200, "sft_words", 200, None),
    "learned gate less none": (DEFAULT, 200, "always", 200, None),
    "learned gate less none, on 'ear'": (DEFAULT, 200, "always", 200, "ear"),
    "KL(T, S) less KL(S, T)": (DEFAULT, 200, "reverse", 200, None),
    "with the reward less without": (DEFAULT, 200, "no_reward", 200, None),
}


@cache
def clips_of(run):
    return {example.id: example for example in read_manifest(run / "toy" / "test.jsonl")}


@cache
def read_answers(run, stage, step):
    """A record for each test clip that `stage` answered after `step` updates: "right", its "group" and what it says."""
    records = []
    for line in read_jsonl(run / stage / "validation" / f"{step:06}.jsonl"):
        example = clips_of(run)[line["id"]]
        records.append({
            "id": f"{run.name}/{example.id}",
            "question": digest(example),
            "right": line["answer"] == example.answer,
            "group": example.meta["group"],
            "leaks": leaks(line["text"], example),
        })
    return records


def leaks(text, example):
    """Whether a thought names what the clip looks like and does not sound like; None of a clip of another group."""
    if example.meta["group"] != "ear":
        return None
    named = re.search(r"I hear (\w+) (\w+)\.", text)
    return named is not None and named[2] == example.label.split()[1] and " ".join(named.groups()) != example.label


def pool_answers(runs, stage, step, group=None):
    records = [record for run in runs for record in read_answers(run, stage, step)]
    return [record for record in records if group in (None, record["group"])]


def subtract(runs, arm, step, other, other_step, group=None):
    return compare(pool_answers(runs, arm, step, group), pool_answers(runs, other, other_step, group))


def accuracy_by_group(runs, stage, step):
    found = {}
    for group in (None, "both", "eye", "ear"):
        hits = [record["right"] for record in pool_answers(runs, stage, step, group)]
        found[group or "all"] = summary(hits)
    found["leaks"] = summary([record["leaks"] for record in pool_answers(runs, stage, step, "ear")])
    return found


def read_training(run, stage):
    """Means of the last 50 updates, tokens and seconds of all."""
    lines = [line for line in read_jsonl(run / stage / "log.jsonl") if "loss" in line]
    found = {}
    for name in ("reward", "accuracy", "kl", "teacher_kl", "entropy", "zero_variance", "completion_tokens"):
        values = [line[name] for line in lines[-50:] if name in line]
        if values:
            found[name] = mean(values)
    for step in STEPS:
        found[f"tokens_{step}"] = sum(line["tokens"] for line in lines[:step])
    return found | {name: sum(line.get(name, 0) for line in lines) for name in ("step_s", "teacher_s")}


def flops_an_update(stage):
    """Of rollout, scoring, the teacher's reading, forward and backward passes; the optimizer's are left out."""
    plan = plan_alone(stage, stages)
    settled = replace(stage, decode_slots=stage.slots)
    total = 0
    for phase in estimate(settled, plan.model, plan.prompt, teacher=plan.teacher):
        if phase.name not in ("optimizer", "validation"):
            passes = stage.batch_size / phase.sequences
            total += passes * (phase.flops + stage.max_new_tokens * phase.step_flops)
    return total


def spread(runs, title):
    """{run: accuracy at the end of an arm and of those of its further runs that are there, with other seeds}"""
    names = [STAGES[title], *(arm[0].name for arm in AGAIN[title])]
    found = {}
    for run in runs:
        there = [name for name in names if (run / name / "done.json").exists()]
        seeds = [read_json(run / name / "config.json")["seed"] for name in there]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{run}: {', '.join(there)} have seeds {seeds}: give each its own")
        accuracies = []
        for stage in there:
            hits = [record["right"] for record in read_answers(run, stage, STEPS[-1])]
            accuracies.append(mean(hits))
        found[run.name] = accuracies
    return found


def gather(runs):
    arms = {}
    for title, stage in STAGES.items():
        arms[title] = {
            "by_step": {step: accuracy_by_group(runs, stage, step) for step in STEPS},
            "seeds": {run.name: summary([r["right"] for r in read_answers(run, stage, STEPS[-1])]) for run in runs},
            "training": {run.name: read_training(run, stage) for run in runs},
            "flops_an_update": flops_an_update(ARMS[title][0]),
        }
    return {
        "arms": arms,
        "claimed": {title: subtract(runs, *claim[:5]) for title, claim in CLAIMS.items()},
        "reported": {title: subtract(runs, *difference) for title, difference in REPORTED.items()},
        "other randomness": {title: spread(runs, title) for title in AGAIN},
    }


def check_claims(results):
    held = {}
    for title, (*_, least) in CLAIMS.items():
        held[title] = 100 * results["claimed"][title]["interval"][0] > least
    return held


def print_results(results):
    print("| arm: right on test, %, all / eye / ear | " + " | ".join(f"{step} updates" for step in STEPS)
          + " | leaking thoughts, % | reward | KL to T |\n|" + "---|" * (len(STEPS) + 4))
    for title, arm in results["arms"].items():
        cells = []
        for step in STEPS:
            at = arm["by_step"][step]
            cells.append(" / ".join(f"{100 * at[group]['accuracy']:.1f}" for group in ("all", "eye", "ear")))
        training = arm["training"].values()
        for name in ("reward", "teacher_kl"):
            values = [values[name] for values in training if name in values]
            cells.append(f"{mean(values):.3f}" if values else "")
        leaking = 100 * arm["by_step"][STEPS[-1]]["leaks"]["accuracy"]
        print(f"| {title} | {' | '.join(cells[:len(STEPS)])} | {leaking:.1f} | {' | '.join(cells[len(STEPS):])} |")
    print("\n| arm | GFLOPs an update | tokens an update | seconds an update |\n|---|---|---|---|")
    for title, arm in results["arms"].items():
        training = arm["training"].values()
        tokens = mean(values[f"tokens_{STEPS[-1]}"] for values in training) / STEPS[-1]
        seconds = mean(values["step_s"] for values in training) / STEPS[-1]
        print(f"| {title} | {arm['flops_an_update'] / 1e9:.1f} | {tokens:,.0f} | {seconds:.2f} |")
    print()
    for title, value in (results["claimed"] | results["reported"]).items():
        low, high = value["interval"]
        print(f"{title}: {100 * value['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")
    for title, runs in results["other randomness"].items():
        print(f"{title}: " + "; ".join(", ".join(f"{100 * share:.1f}" for share in run) for run in runs.values()))


def main(argv=None):
    return judge_runs(argv, __doc__, gather, check_claims, print_results)


if __name__ == "__main__":
    sys.exit(main())
