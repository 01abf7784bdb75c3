"""Stage Evaluate: accuracies with Wilson intervals, overall, by class, group and the fields of a benchmark."""
from collections import Counter, defaultdict

from tqdm import tqdm

from minixmd.inputs.examples import SPECIAL_TOKEN, check_answers, read_examples
from minixmd.runs.files import write_json
from minixmd.runs.records import count_bad, read_traces, write_jsonl
from minixmd.stages.multiple_choice import answer_examples
from minixmd.tasks.benchmarks import NAMES, VERSIONED, WAYS, benchmark_of, same
from minixmd.tasks.statistics import breakdown, clustered_interval, digest, tabulate

WRITING_FIELDS = ("answer", "max_new_tokens", "rule", "stop", "num_samples", "temperature", "seed")  # in results.json
LOGGED = ("count", "correct", "accuracy", "interval", "bad", "without_trace", "how", "unfinished", "disagreement")


def run(stage, folder, log):
    examples = read_examples(stage)
    check_answers(examples, stage.manifest, "evaluate against")
    benchmark = describe_benchmark(stage, examples)
    traces, without_trace = first_traces(stage, examples)
    records = answer_examples(stage, folder, examples, log, traces)
    if records is None:
        return
    asked = {"model": stage.model or stage.served, "manifest": stage.manifest, "media": stage.media}
    if stage.traces is not None:
        asked["traces"] = stage.traces
        asked["without_trace"] = dict(Counter(without_trace.values()).most_common())
        for record in records:
            if record["id"] in without_trace:
                record["without_trace"] = without_trace[record["id"]]
    if stage.answer == "generate":
        asked |= {name: getattr(stage, name) for name in WRITING_FIELDS}
    collect(stage, folder, log, examples, records, asked, benchmark)


def collect(stage, folder, log, examples, records, asked, benchmark):
    """Writes results.json, with `asked` (who answered what and how), and answers.jsonl: the records, each with a digest
    of its question and whether it is right."""
    results = asked | {"bad": count_bad(records, stage.name, stage.max_bad)}
    results |= tabulate(examples, records, stage.rule)
    results |= how_read(examples, records, stage.rule)
    metas = []
    rights = []
    clusters = defaultdict(list)
    for example, record in zip(examples, records, strict=True):
        record["question"] = digest(example)
        if "bad" not in record:
            record["right"] = same(example.options, record["answer"], example.answer, stage.rule)
            metas.append(example.meta)
            rights.append(record["right"])
            if "participant" in record:
                clusters[record["participant"]].append(record["right"])
    if clusters:  # answers of one person are no independent ones
        results["interval"] = clustered_interval(list(clusters.values()))
    if benchmark:
        results["benchmark"] = benchmark | breakdown(benchmark["name"], metas, rights)
    write_jsonl(folder / "answers.jsonl", records)
    write_json(folder / "results.json", results)
    log({name: results[name] for name in LOGGED if name in results})
    print_results(stage, results)


def how_read(examples, records, rule="option"):
    """Of written answers {"how": {way: answers read so; "none" counts as wrong}, "unfinished": answers cut at
    max_new_tokens} and, where their letters' logits are known, "disagreement": share of answers that are not the letter
    with the largest logit, and "letters": their tabulate. Empty where none was written."""
    written = [(example, record) for example, record in zip(examples, records, strict=True) if "how" in record]
    if not written:
        return {}
    ways = Counter(record["how"] for _, record in written)
    found = {"how": {way: ways[way] for way in WAYS[rule]},
             "unfinished": sum(not record["finished"] for _, record in written)}  # fmt: skip
    if all("by_letters" in record for _, record in written):
        differ = 0
        for example, record in written:
            differ += not same(example.options, record["answer"], record["by_letters"], rule)
        letters = [{**record, "answer": record.get("by_letters")} for record in records]
        found |= {"disagreement": differ / len(written), "letters": tabulate(examples, letters, rule)}
    return found


def first_traces(stage, examples):
    """({id: the first trace in the file}, {id: why there is none}). ValueError: none at all, or a line is no trace."""
    if stage.traces is None:
        return {}, {}
    in_file = {}
    for record in read_traces(stage.traces):
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
    """{"name", of MMAU and MMAR also "version", "sha256"} of a manifest's benchmark, or None. ValueError: two of it."""
    name = benchmark_of(examples)
    sources = {(e.source or "").casefold()[:4] for e in examples}
    official = [other for other in VERSIONED if other == name or other in sources]
    if getattr(stage, "answer", "generate") == "generate" and bool(official) != (stage.rule == "mmau"):
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


def print_results(stage, results):
    benchmark = results.get("benchmark", {})
    title = " ".join(benchmark[key] for key in ("name", "version") if key in benchmark)
    line = f"{stage.name}: {percent(results)} of {results['count']} right" + (f" on {title}" if title else "")
    if results.get("num_samples", 1) > 1:
        line += f" by the majority of {results['num_samples']}"
    low, high = results["interval"]
    line += f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    if "letters" in results:
        line += (f"; by the letters' logits {percent(results['letters'])}, which differ on "
                 f"{100 * results['disagreement']:.1f} %")
    if "how" in results:
        line += f"; read by {results['how']}"
    if results.get("without_trace"):
        line += f"; asked without a trace: {results['without_trace']}"
    tqdm.write(line + (f", bad: {results['bad']}" if results["bad"] else ""))


def percent(part):
    return f"{100 * part['accuracy']:.1f} %"
