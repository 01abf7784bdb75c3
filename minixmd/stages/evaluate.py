"""Stage Evaluate: accuracies with Wilson intervals, overall, by class, group and the fields of a benchmark."""
from collections import Counter
from functools import partial

from tqdm import tqdm

from minixmd.inputs.examples import SPECIAL_TOKEN, check_answers, read_examples
from minixmd.models.sharding import finish_passes
from minixmd.runs.distributed import compute_shards
from minixmd.runs.files import write_json
from minixmd.runs.records import TRACE, count_bad, read_records, write_jsonl
from minixmd.stages.multiple_choice import Writing, load_model, score_letters, write_answers
from minixmd.tasks.benchmarks import NAMES, VERSIONED, WAYS, benchmark_of, mmau_table, music_table, same
from minixmd.tasks.statistics import digest, summary, tabulate

PRINTED_TABLES = {  # tables of a benchmark that are printed, and as what
    "mmau": {"task": "task", "difficulty": "difficulty"},
    "mmar": {"modality": "modality", "category": "category"},
    "music_avqa": {"audio": "audio, audio-visual", "every": "all modalities"},
}
LOGGED = ("count", "correct", "accuracy", "interval", "bad", "without_trace", "how", "unfinished", "disagreement")


def run(stage, folder, log):
    examples = read_examples(stage)
    check_answers(examples, stage.manifest, "evaluate against")
    benchmark = describe_benchmark(stage, examples)
    traces, without_trace = first_traces(stage, examples)
    model, processor = load_model(stage)
    ask = score_letters
    if stage.answer == "generate":
        writing = Writing(stage.max_new_tokens, stage.num_samples, stage.temperature, stage.stop, stage.rule,
                          stage.seed)
        ask = partial(write_answers, writing=writing)
    compute = partial(ask, model, processor, prompt_format=stage.prompt_format, batch_tokens=stage.batch_tokens,
                      traces=traces)
    records = compute_shards(compute, examples, folder / "shards", stage.name, "clip",
                             finish=partial(finish_passes, model))
    if records is not None:
        collect(stage, folder, log, examples, records, without_trace, benchmark)


def collect(stage, folder, log, examples, records, without_trace, benchmark):
    """Writes results.json and answers.jsonl: a record a clip, with a digest of the question and whether it is right."""
    results = {"model": stage.model, "manifest": stage.manifest, "media": stage.media}
    if stage.traces is not None:
        results["traces"] = stage.traces
        results["without_trace"] = dict(Counter(without_trace.values()).most_common())
    results["bad"] = count_bad(records, stage.name, stage.max_bad)
    results |= tabulate(examples, records, stage.rule)
    if stage.answer == "generate":
        results |= writing_fields(stage) | letters_beside(examples, records, stage.rule)
    metas = []
    rights = []
    for example, record in zip(examples, records, strict=True):
        record["question"] = digest(example)
        if example.id in without_trace:
            record["without_trace"] = without_trace[example.id]
        if "bad" not in record:
            record["right"] = same(example.options, record["answer"], example.answer, stage.rule)
            metas.append(example.meta)
            rights.append(record["right"])
    if benchmark:
        results["benchmark"] = benchmark | breakdown(benchmark["name"], metas, rights)
    write_jsonl(folder / "answers.jsonl", records)
    write_json(folder / "results.json", results)
    log({name: results[name] for name in LOGGED if name in results})
    print_results(stage, results)


def writing_fields(stage):
    """How answers were written, for results.json; fields at their default are left out."""
    names = ["answer", "max_new_tokens"]
    if stage.rule != "option":
        names.append("rule")
    if stage.stop:
        names.append("stop")
    if stage.temperature > 0:
        names += ["num_samples", "temperature", "seed"]
    return {name: getattr(stage, name) for name in names}


def letters_beside(examples, records, rule="option"):
    """{"how": {way: answers read so; "none" counts as wrong}, "unfinished": answers cut at max_new_tokens,
    "disagreement": share of answers that are not the letter with the largest logit, "letters": their tabulate}."""
    ways, unfinished, differ = Counter(), 0, 0
    for example, record in zip(examples, records, strict=True):
        if "bad" not in record:
            ways[record["how"]] += 1
            unfinished += not record["finished"]
            differ += not same(example.options, record["answer"], record["by_letters"], rule)
    letters = [{**record, "answer": record.get("by_letters")} for record in records]
    return {"how": {way: ways[way] for way in WAYS[rule]}, "unfinished": unfinished,
            "disagreement": differ / ways.total(), "letters": tabulate(examples, letters, rule)}


def first_traces(stage, examples):
    """({id: the first trace in the file}, {id: why there is none}). ValueError: none at all, or a line is no trace."""
    if stage.traces is None:
        return {}, {}
    in_file = {}
    for record in read_records(stage.traces, TRACE):
        in_file.setdefault(record["id"], record["text"])
    traces, without = {}, {}
    for example in examples:
        text = in_file.get(example.id)
        if text is None:
            without[example.id] = "no trace"
        elif SPECIAL_TOKEN.search(text):  # the processor would refuse it, or the turn would end there
            without[example.id] = "special token"
        else:
            traces[example.id] = text
    if not traces:
        raise ValueError(f"{stage.name}: {stage.traces} holds no trace of a clip in {stage.manifest} that can be shown")
    return traces, without


def describe_benchmark(stage, examples):
    """{"name", of MMAU and MMAR also "version", "sha256"} of a manifest's benchmark, or None. ValueError: two versions
    of it."""
    name = benchmark_of(examples)
    sources = {(e.source or "").casefold()[:4] for e in examples}
    official = [other for other in VERSIONED if other == name or other in sources]
    if stage.answer == "generate" and bool(official) != (stage.rule == "mmau"):
        title = NAMES[official[0] if official else "mmau"]
        tqdm.write(f"{stage.name}: note: {stage.manifest} is {'' if official else 'not '}{title}, and rule "
                   f"{stage.rule!r} is {'not ' if official else ''}{title}'s own")
    if name not in VERSIONED:
        return name and {"name": name}
    versions = {tuple(str(e.meta.get(key, "unknown")) for key in ("version", "sha256")) for e in examples}
    if len(versions) > 1:
        listed = "; ".join(" ".join(version) for version in sorted(versions))
        raise ValueError(f"{stage.manifest}: mixes {len(versions)} versions of {NAMES[name]}, whose accuracies do not "
                         f"compare: {listed}")
    [(version, sha256)] = versions
    return {"name": name, "version": version, "sha256": sha256}


def breakdown(name, metas, rights):
    """The tables of a benchmark with a summary for each list, from the meta of all good clips and a boolean each."""
    grouped = music_table(metas, rights) if name == "music_avqa" else mmau_table(metas, rights, name)
    tables = {}
    for title, table in grouped.items():
        if isinstance(table, list):
            tables[title] = summary(table)
        else:
            tables[title] = {row: summary(hits) for row, hits in table.items()}
    return tables


def print_results(stage, results):
    benchmark = results.get("benchmark", {})
    title = " ".join(benchmark[key] for key in ("name", "version") if key in benchmark)
    line = f"{stage.name}: {percent(results)} of {results['count']} right" + (f" on {title}" if title else "")
    if stage.num_samples > 1:
        line += f" by the majority of {stage.num_samples}"
    line += f" (95 % interval {interval(results)})"
    if stage.answer == "generate":
        line += (f"; by the letters' logits {percent(results['letters'])}, which differ on "
                 f"{100 * results['disagreement']:.1f} % (read by {results['how']})")
    if results.get("without_trace"):
        line += f"; asked without a trace: {results['without_trace']}"
    tqdm.write(line + (f", bad: {results['bad']}" if results["bad"] else ""))
    if benchmark:
        tqdm.write(f"{stage.name}: {title}")
        for table, heading in PRINTED_TABLES[benchmark["name"]].items():
            for name, row in benchmark[table].items():
                if row["count"]:
                    tqdm.write(f"  {heading:22}{name:24}{percent(row):>7} of {row['count']:<5} ({interval(row)})")


def percent(part):
    return f"{100 * part['accuracy']:.1f} %"


def interval(part):
    low, high = part["interval"]
    return f"{100 * low:.1f} to {100 * high:.1f}"
