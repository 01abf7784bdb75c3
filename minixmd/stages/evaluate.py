"""Stage Evaluate: a model's accuracy on a manifest, by class, by group and overall, with Wilson intervals; on MMAU and
MUSIC-AVQA also as those break it down.
"""
from collections import Counter
from functools import partial

from tqdm import tqdm

from minixmd import load
from minixmd.inputs.examples import read_manifest
from minixmd.learning.targets import TAG
from minixmd.models.lora import set_backend
from minixmd.runs.files import write_json
from minixmd.stages.multiple_choice import (
    check_media,
    count_bad,
    device_of,
    dtype_of,
    impl_of,
    read_traces,
    score_in_shards,
    score_letters,
    write_records,
)
from minixmd.tasks.benchmarks import WAYS, benchmark_of, mmau_table, music_table, same
from minixmd.tasks.statistics import digest, summary, tabulate

SHOWN = {  # tables of a benchmark that are printed, and as what
    "mmau": {"task": "task", "difficulty": "difficulty"},
    "music_avqa": {"audio": "audio, audio-visual", "every": "all modalities"},
}


def score(stage, folder, ask):
    """Load the stage's model and put its manifest to it, shard by shard; finished ones are read back.

    Args:
        ask: function(model, processor, examples=…) -> records.
    Returns:
        (examples, records, processor).
    """
    examples = read_manifest(stage.manifest)
    check_media(stage.name, stage.manifest, examples, stage.media)
    model, processor = load(stage.model, device=device_of(stage), dtype=dtype_of(stage))
    set_backend(model, impl_of(stage))
    with tqdm(total=len(examples), desc=stage.name, unit="clip", smoothing=0.1) as bar:
        records = score_in_shards(lambda part: ask(model, processor, examples=part), examples, folder / "shards",
                                  bar.update)
    return examples, records, processor


def run(stage, folder, log):
    """Writes answers.jsonl (a record a clip, with a digest of what was asked and whether it is right) and results.json.
    """
    examples = read_manifest(stage.manifest)
    if missing := next((e for e in examples if e.answer is None), None):
        raise ValueError(f"{stage.manifest}: example {missing.id!r} has no answer to evaluate against")
    ask = partial(score_letters, stage=stage, batch_tokens=stage.batch_tokens)
    results = {"model": str(stage.model), "manifest": str(stage.manifest), "media": stage.media}
    benchmark = describe(stage, examples)
    without = {}
    if stage.traces is not None:
        shown, without = first_traces(stage, examples)
        ask = partial(ask, traces=shown)
        results |= {"traces": str(stage.traces), "without_trace": dict(Counter(without.values()).most_common())}
    written = stage.answer == "generate"
    if written:
        ask = partial(ask, max_new_tokens=stage.max_new_tokens, n=stage.n, temperature=stage.temperature,
                      rule=stage.rule, stop=stage.stop)
    _, records, _ = score(stage, folder, ask)
    results |= {"bad": count_bad(records, stage), **tabulate(examples, records, stage.rule)}
    if written:
        how = ["answer", "max_new_tokens", *["rule"] * (stage.rule != "option"), *["stop"] * (stage.stop != ()),
               *["n", "temperature", "seed"] * (stage.temperature > 0)]
        results |= {name: getattr(stage, name) for name in how} | letters_beside(examples, records, stage.rule)
    for example, record in zip(examples, records, strict=True):
        record["question"] = digest(example)
        if example.id in without:
            record["without_trace"] = without[example.id]
        if "bad" not in record:
            record["right"] = same(example.options, record["answer"], example.answer, stage.rule)
    if benchmark:
        results["benchmark"] = benchmark | breakdown(benchmark["name"], examples, records)
    write_records(folder / "answers.jsonl", records)
    write_json(folder / "results.json", results)
    log({name: results[name] for name in ("count", "correct", "accuracy", "interval", "bad")}
        | {name: results[name] for name in ("without_trace", "how", "unfinished", "disagreement") if name in results})
    tell(stage, results)


def letters_beside(examples, records, rule="option"):
    """What stands beside the accuracy of written answers: how each was read ("none" counts as wrong), how many had no
    end within max_new_tokens, the share of which another letter had the largest logit, and those letters' accuracy."""
    pairs = [(e, record) for e, record in zip(examples, records, strict=True) if "bad" not in record]
    how = Counter(record["how"] for _, record in pairs)
    differ = sum(not same(e.options, record["answer"], record["by_letters"], rule) for e, record in pairs)
    scored = [record if "bad" in record else {"answer": record["by_letters"]} for record in records]
    return {"how": {way: how[way] for way in WAYS[rule]}, "unfinished": sum(not one["finished"] for _, one in pairs),
            "disagreement": differ / len(pairs), "letters": tabulate(examples, scored, rule)}


# ---- the teacher's traces in the prompt ----


def first_traces(stage, examples):
    """({id: the first trace of it in the file}, {id: why there is none}) of the examples; those are asked without.

    Raises:
        ValueError: a line of the file that is no trace, or no example with one.
    """
    first, without = {}, {}
    for trace in read_traces(stage.traces):
        first.setdefault(trace["id"], trace["text"])
    for e in examples:
        if e.id not in first:
            without[e.id] = "no trace"
        elif TAG.search(first[e.id]):  # the processor would refuse it, or the turn would end there
            without[e.id] = "special token"
    if len(without) == len(examples):
        raise ValueError(f"{stage.name}: {stage.traces} holds no trace of a clip in {stage.manifest} that can be shown")
    return {e.id: first[e.id] for e in examples if e.id not in without}, without


# ---- MMAU and MUSIC-AVQA ----


def describe(stage, examples):
    """{"name", and of MMAU its "version" and "sha256"} of the benchmark that a manifest is, or None.

    Raises:
        ValueError: more than one version of MMAU.
    """
    name = benchmark_of(examples)
    official = name == "mmau" or any((e.source or "").casefold().startswith("mmau") for e in examples)
    if stage.answer == "generate" and official != (stage.rule == "mmau"):
        tqdm.write(f"{stage.name}: note: {stage.manifest} is {'' if official else 'not '}MMAU, and rule {stage.rule!r} "
                   f"is {'not ' if official else ''}MMAU's own")
    if name != "mmau":
        return name and {"name": name}
    versions = {tuple(str(e.meta.get(key, "unknown")) for key in ("version", "sha256")) for e in examples}
    if len(versions) > 1:
        raise ValueError(f"{stage.manifest}: mixes {len(versions)} versions of MMAU, whose accuracies do not compare: "
                         + "; ".join(" ".join(one) for one in sorted(versions)))
    [(version, sha256)] = versions
    return {"name": name, "version": version, "sha256": sha256}


def breakdown(name, examples, records):
    """The tables of a benchmark with a summary for each list. A missing answer is a wrong one, a bad clip left out."""
    asked = [(e.meta, record["right"]) for e, record in zip(examples, records, strict=True) if "bad" not in record]
    tables = {"mmau": mmau_table, "music_avqa": music_table}[name](*zip(*asked, strict=True))
    return {name: summary(part) if isinstance(part, list) else {row: summary(rights) for row, rights in part.items()}
            for name, part in tables.items()}


def tell(stage, results):
    """The result on the screen: a line, and a short table of a benchmark."""
    low, high = results["interval"]
    line = f"{stage.name}: {100 * results['accuracy']:.1f} % of {results['count']} right"
    line += f" by the majority of {stage.n}" if stage.answer == "generate" and stage.n > 1 else ""
    line += f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    if stage.answer == "generate":
        line += (f"; by the letters' logits {100 * results['letters']['accuracy']:.1f} %, which differ on "
                 f"{100 * results['disagreement']:.1f} % (read by {results['how']})")
    if results.get("without_trace"):
        line += f"; asked without a trace: {results['without_trace']}"
    tqdm.write(line + (f", bad: {results['bad']}" if results["bad"] else ""))
    if "benchmark" in results:
        tqdm.write(f"{stage.name}: " + "\n  ".join(rows_of(results["benchmark"])))


def rows_of(benchmark):
    """A benchmark's name and its rows, as text; those without a question are left out."""
    rows = [" ".join(benchmark[key] for key in ("name", "version") if key in benchmark)]
    for table, title in SHOWN[benchmark["name"]].items():
        for name, one in benchmark[table].items():
            if one["count"]:
                low, high = one["interval"]
                rows.append(f"{title:22}{name:14}{100 * one['accuracy']:5.1f} % of {one['count']:<5} ({100 * low:.1f} "
                            f"to {100 * high:.1f})")
    return rows
