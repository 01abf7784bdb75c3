"""Stage Evaluate: a model's accuracy on a manifest, by class, by group and overall, with Wilson intervals; on MMAU and
MUSIC-AVQA also as those break it down.
"""
from collections import Counter
from functools import partial

from tqdm import tqdm

from minixmd import load
from minixmd.inputs.examples import check_media, read_manifest
from minixmd.learning.targets import SPECIAL_TOKEN
from minixmd.runs.device import runtime_of
from minixmd.runs.distributed import compute_shards
from minixmd.runs.files import write_json
from minixmd.runs.records import count_bad, read_traces, write_jsonl
from minixmd.stages.multiple_choice import Writing, score_letters, write_answers
from minixmd.tasks.benchmarks import WAYS, benchmark_of, mmau_table, music_table, same
from minixmd.tasks.statistics import digest, summary, tabulate

PRINTED_TABLES = {  # tables of a benchmark that are printed, and as what
    "mmau": {"task": "task", "difficulty": "difficulty"},
    "music_avqa": {"audio": "audio, audio-visual", "every": "all modalities"},
}


def run(stage, folder, log):
    examples = read_manifest(stage.manifest)
    for example in examples:
        if example.answer is None:
            raise ValueError(f"{stage.manifest}: example {example.id!r} has no answer to evaluate against")
    check_media(stage.name, stage.manifest, examples, stage.media)
    benchmark = describe_benchmark(stage, examples)
    traces, without_trace = {}, {}
    if stage.traces is not None:
        traces, without_trace = first_traces(stage, examples)
    runtime = runtime_of(stage)
    model, processor = load(stage.model, device=runtime.device, dtype=runtime.dtype, backend=runtime.backend)
    options = dict(prompt_format=stage.prompt_format, batch_tokens=stage.batch_tokens, traces=traces)
    if stage.answer == "letters":
        compute = partial(score_letters, model, processor, **options)
    else:
        writing = Writing(stage.max_new_tokens, stage.num_samples, stage.temperature, stage.stop, stage.rule, stage.seed)
        compute = partial(write_answers, model, processor, writing=writing, **options)
    with tqdm(total=len(examples), desc=stage.name, unit="clip", smoothing=0.1) as bar:
        records = compute_shards(compute, examples, folder / "shards", bar.update)
    if records is not None:
        collect(stage, folder, log, examples, records, without_trace, benchmark)


def collect(stage, folder, log, examples, records, without_trace, benchmark):
    """Writes answers.jsonl (a record a clip, with a digest of the question and whether it is right) and results.json."""
    results = {"model": str(stage.model), "manifest": str(stage.manifest), "media": stage.media}
    if stage.traces is not None:
        reasons = dict(Counter(without_trace.values()).most_common())
        results |= {"traces": str(stage.traces), "without_trace": reasons}
    results |= {"bad": count_bad(records, stage.name, stage.max_bad), **tabulate(examples, records, stage.rule)}
    if stage.answer == "generate":
        results |= writing_fields(stage) | letters_beside(examples, records, stage.rule)
    for example, record in zip(examples, records, strict=True):
        record["question"] = digest(example)
        if example.id in without_trace:
            record["without_trace"] = without_trace[example.id]
        if "bad" not in record:
            record["right"] = same(example.options, record["answer"], example.answer, stage.rule)
    if benchmark:
        results["benchmark"] = benchmark | breakdown(benchmark["name"], examples, records)
    write_jsonl(folder / "answers.jsonl", records)
    write_json(folder / "results.json", results)
    logged = ("count", "correct", "accuracy", "interval", "bad", "without_trace", "how", "unfinished", "disagreement")
    log({name: results[name] for name in logged if name in results})
    print_results(stage, results)


def writing_fields(stage):
    """How answers were written, for results.json: what is at its default is left out."""
    names = ["answer", "max_new_tokens"]
    if stage.rule != "option":
        names.append("rule")
    if stage.stop:
        names.append("stop")
    if stage.temperature > 0:
        names += ["num_samples", "temperature", "seed"]
    return {name: getattr(stage, name) for name in names}


def letters_beside(examples, records, rule="option"):
    """What stands beside the accuracy of written answers.

    "how" each was read ("none" counts as wrong), how many were "unfinished" at max_new_tokens, "disagreement": the share
    of which another letter had the largest logit, and those "letters"' accuracy.
    """
    pairs = [(e, record) for e, record in zip(examples, records, strict=True) if "bad" not in record]
    how = Counter(record["how"] for _, record in pairs)
    differ = sum(not same(e.options, record["answer"], record["by_letters"], rule) for e, record in pairs)
    scored = [record if "bad" in record else {"answer": record["by_letters"]} for record in records]
    return {"how": {way: how[way] for way in WAYS[rule]},
            "unfinished": sum(not record["finished"] for _, record in pairs),
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
        elif SPECIAL_TOKEN.search(first[e.id]):  # the processor would refuse it, or the turn would end there
            without[e.id] = "special token"
    if len(without) == len(examples):
        raise ValueError(f"{stage.name}: {stage.traces} holds no trace of a clip in {stage.manifest} that can be shown")
    return {e.id: first[e.id] for e in examples if e.id not in without}, without


# ---- MMAU and MUSIC-AVQA ----


def describe_benchmark(stage, examples):
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


def print_results(stage, results):
    """The result on the screen: a line, and a short table of a benchmark."""
    low, high = results["interval"]
    line = f"{stage.name}: {100 * results['accuracy']:.1f} % of {results['count']} right"
    line += f" by the majority of {stage.num_samples}" if stage.answer == "generate" and stage.num_samples > 1 else ""
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
    for table, title in PRINTED_TABLES[benchmark["name"]].items():
        for name, one in benchmark[table].items():
            if one["count"]:
                low, high = one["interval"]
                rows.append(f"{title:22}{name:14}{100 * one['accuracy']:5.1f} % of {one['count']:<5} ({100 * low:.1f} "
                            f"to {100 * high:.1f})")
    return rows
