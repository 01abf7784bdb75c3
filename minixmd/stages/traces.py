"""Stage Traces: what a teacher that sees the silent video thinks would be heard, n times a clip.

Section 3.1 of SightSound-R1. A sample can be used if it ended in time and has the form that the student shall learn,
<think>…</think><answer>…</answer> with one of the options in it. A clip on which all n samples can be used and agree is
unanimous, and its answer the teacher's label. Everything sampled is kept, in samples.jsonl; why a sample or a clip is
not used is counted. What is drawn depends on (seed, clip, sample) alone: the first of 8 samples is the only one of 1.
"""
import os
from collections import Counter
from functools import partial

from tqdm import tqdm

from minixmd import generate, load
from minixmd.inputs.examples import build_conversation, check_media, read_manifest
from minixmd.inputs.prompts import build_prompt, check_length, prefetch
from minixmd.learning.targets import SPECIAL_TOKEN
from minixmd.runs.device import runtime_of
from minixmd.runs.distributed import compute_shards
from minixmd.runs.files import write_json
from minixmd.runs.records import bad_record, count_bad, write_jsonl
from minixmd.runs.seeds import hash_seed
from minixmd.stages.endpoint import ask_endpoint, audio_part, key_from, silent_video_part
from minixmd.tasks.rewards import FORMAT, parse_answer

CLIPS = 64  # of a shard: their frames are held in memory, 13 MB a clip of 10 frames


def run(stage, folder, log):
    """Writes samples.jsonl, traces.jsonl (a line a usable sample), labels.jsonl (as Label's) and results.json."""
    examples = read_manifest(stage.manifest)
    check_media(stage.name, stage.manifest, examples, stage.media)
    records = (sample_here if stage.endpoint is None else sample_there)(stage, folder, examples)
    if records is not None:
        collect(stage, folder, log, examples, records)


def collect(stage, folder, log, examples, records):
    for example, record in zip(examples, records, strict=True):
        for sample in record.get("samples", ()):
            sample["answer"] = parse_answer(sample["text"], example.options)
            sample["use"] = sample.get("bad") or use(sample)
    traces, labels, results = sort(examples, records, count_bad(records, stage.name, stage.max_bad))
    write_jsonl(folder / "samples.jsonl", records)
    write_jsonl(folder / "traces.jsonl", traces)
    write_jsonl(folder / "labels.jsonl", labels)
    write_json(folder / "results.json", results)
    log(results)
    tqdm.write(f"{stage.name}: {results['samples']:,} samples of {results['clips']:,} clips, {results['usable']:,} "
               f"usable ({results['unusable'] or 'no other'}); clips: {results['clips_by']}"
               + (f", bad: {results['bad']}" if results["bad"] else ""))


def use(sample):
    """ "ok", or why a sample is of no use to a student."""
    if not sample["finished"]:
        return "too long"
    if SPECIAL_TOKEN.search(sample["text"]):
        return "special token"
    return "unparsable" if sample["answer"] is None or not FORMAT.fullmatch(sample["text"]) else "ok"


def sort(examples, records, bad):
    """(traces, labels, results) of the clips' samples, each with its "use"."""
    traces, labels, clips, unusable = [], [], Counter(), Counter()
    for example, record in zip(examples, records, strict=True):
        if "bad" in record:
            labels.append(record)
            continue
        samples = record["samples"]
        unusable.update(sample["use"] for sample in samples if sample["use"] != "ok")
        options = {example.options[sample["answer"]] for sample in samples if sample["use"] == "ok"}
        why = next((sample["use"] for sample in samples if sample["use"] != "ok"), "not unanimous")
        unanimous = len(options) == 1 and all(sample["use"] == "ok" for sample in samples)
        clips["unanimous" if unanimous else why] += 1
        if unanimous:
            answer = samples[0]["answer"]
            labels.append({"id": example.id, "answer": answer, "option": example.options[answer]})
        else:
            labels.append({"id": example.id, "bad": why, "detail": "no answer on which all samples agree"})
        traces += [{"id": example.id, "sample": i, "text": sample["text"], "answer": sample["answer"],
                    "option": example.options[sample["answer"]], "unanimous": unanimous}
                   for i, sample in enumerate(samples) if sample["use"] == "ok"]
    count = sum(len(record.get("samples", ())) for record in records)
    return traces, labels, {
        "clips": len(examples), "bad": bad, "samples": count, "usable": count - sum(unusable.values()),
        "unusable": dict(unusable.most_common()), "clips_by": dict(clips.most_common()), "traces": len(traces),
        "traces_of_unanimous": sum(trace["unanimous"] for trace in traces)}


def sample_here(stage, folder, examples):
    """By the stage's model, shard by shard."""
    runtime = runtime_of(stage)
    model, processor = load(stage.model, device=runtime.device, dtype=runtime.dtype, backend=runtime.backend)

    def compute(part):
        records = {}

        def on_bad(example, error):
            records[example.id] = bad_record(example.id, error)

        def build(example):
            return example, build_prompt(processor, example, stage.prompt_format)

        good = [pair for pair in prefetch(build, part, on_bad) if pair is not None]
        for example, prompt in good:
            check_length(processor, example, prompt, stage.max_new_tokens)
        if good:
            completions = generate(
                model, processor, [prompt for _, prompt in good], num_samples=stage.num_samples,
                temperature=stage.temperature, max_new_tokens=stage.max_new_tokens, seed=stage.seed,
                keys=[example.id for example, _ in good], decode_slots=stage.decode_slots or 8 * stage.num_samples)
            for (example, _), group in zip(good, completions, strict=True):
                samples = [{"text": c.text.strip(), "finished": c.finished} for c in group]
                records[example.id] = {"id": example.id, "samples": samples}
        return [records[example.id] for example in part]

    with tqdm(total=len(examples), desc=stage.name, unit="clip", smoothing=0.1) as bar:
        return compute_shards(compute, examples, folder / "shards", bar.update, CLIPS)


def sample_there(stage, folder, examples):
    """By the stage's endpoint, sample by sample; what it has answered stands in endpoint.jsonl."""
    asked = [(f"{e.id}/{i}", partial(messages, stage, e), hash_seed(stage.seed, e.id, i) % 2**31)
             for e in examples for i in range(stage.num_samples)]
    with tqdm(total=len(asked), desc=stage.name, unit="sample", smoothing=0.1) as bar:
        said = ask_endpoint(stage, asked, folder / "endpoint.jsonl", bar.update, api_key=key_from(os.environ, stage),
                            max_tokens=stage.max_new_tokens, temperature=stage.temperature)
    refuse_many([one for one in said.values() if "bad" in one], len(said), stage)
    return [clip_record(e, [said[f"{e.id}/{i}"] for i in range(stage.num_samples)]) for e in examples]


def refuse_many(bad, count, stage):
    """Raises ValueError where more than max_bad of the requests came to nothing; those may be made again."""
    if len(bad) > stage.max_bad * count:
        raise ValueError(f"{stage.name}: {len(bad)} of {count} requests came to nothing "
                         f"({dict(Counter(one['bad'] for one in bad).most_common())}), with max_bad {stage.max_bad}; "
                         f"the first: {bad[0]['detail']}; the same command asks for those again, and with a larger "
                         "max_bad goes on without them")


def clip_record(example, said):
    """What the endpoint said of a clip, as `sample_here` writes it; a clip of which it said nothing is a bad one."""
    if all("bad" in one for one in said):
        return {"id": example.id, "bad": said[0]["bad"], "detail": said[0]["detail"]}
    return {"id": example.id, "samples": [
        {"text": "", "finished": False, "bad": one["bad"]} if "bad" in one else
        {"text": one["text"].strip(), "finished": one["finished"]} for one in said]}


def messages(stage, example):
    """What an endpoint is asked: the clip, silent where it is a video, and the question."""
    [turn] = build_conversation(example, media=stage.media, prompt=stage.prompt)
    clip = silent_video_part(example.video) if stage.media == "video" else audio_part(example.audio)
    return [{"role": "user", "content": [clip, turn["content"][-1]]}]
