"""Stage Traces: a teacher that sees the silent video writes what it thinks would be heard, several samples a clip.

Section 3.1 of SightSound-R1. A sample is usable if it ended in time and has the form that the student shall learn,
<think>…</think><answer>…</answer> with one of the options in it. A clip whose samples are all usable and agree is
unanimous, and their answer is the teacher's label. A sample depends on (seed, clip, sample number) alone.

With top_k a trace also has the "ids" that were sampled and, in "top", for each of them the teacher's best ids and their
log-probabilities as it samples: at its temperature, without suppressed ids. All other ids have the rest of 1.
"""
from collections import Counter
from itertools import chain

import torch
from tqdm import tqdm

from minixmd.inputs.batch import Group, pack
from minixmd.inputs.examples import SPECIAL_TOKEN, read_examples
from minixmd.inputs.prompts import batch_by_tokens
from minixmd.learning.logprobs import SampledVocabulary, top_logprobs
from minixmd.learning.rollout import Usage
from minixmd.runs.distributed import compute_shards, written_shard
from minixmd.runs.files import write_json
from minixmd.runs.heartbeat import beat
from minixmd.runs.records import compact, count_bad, write_jsonl
from minixmd.stages import endpoint
from minixmd.stages.multiple_choice import BATCH_TOKENS, Questions, Writing, copy_tokenizer, model_of, write
from minixmd.tasks.answers import parse_answer
from minixmd.tasks.rewards import FORMAT


def run(stage, folder, log):
    examples = read_examples(stage)
    sample = sample_locally if stage.endpoint is None else sample_at_endpoint
    records = sample(stage, folder, examples, log)
    if records is not None:
        collect(stage, folder, log, examples, records)


def collect(stage, folder, log, examples, records):
    """Writes samples.jsonl, traces.jsonl (a line a usable sample), labels.jsonl (as Label's) and results.json."""
    bad = count_bad(records, stage.name, stage.max_bad)
    traces, labels = [], []
    clips, uses = Counter(), Counter()
    for example, record in zip(examples, records, strict=True):
        if "bad" in record:
            labels.append(record)
            continue
        samples = record["samples"]
        for sample in samples:
            sample["answer"] = parse_answer(sample["text"], example.options, stage.prompt_format.asks_for_letter)
            sample["use"] = sample.get("bad") or use_of(sample)
            uses[sample["use"]] += 1
        outcome = outcome_of(example, samples)
        clips[outcome] += 1
        if outcome == "unanimous":
            answer = samples[0]["answer"]
            labels.append({"id": example.id, "answer": answer, "option": example.options[answer]})
        else:
            labels.append({"id": example.id, "bad": outcome, "detail": "no answer on which all samples agree"})
        for i, sample in enumerate(samples):
            stored = {name: sample.pop(name) for name in ("ids", "top") if name in sample}
            if sample["use"] == "ok":
                option = example.options[sample["answer"]]
                traces.append({"id": example.id, "sample": i, "text": sample["text"], "answer": sample["answer"],
                               "option": option, "unanimous": outcome == "unanimous", **stored})
    count = uses.total()
    del uses["ok"]
    results = {
        "clips": len(examples),
        "bad": bad,
        "samples": count,
        "usable": len(traces),
        "unusable": dict(uses.most_common()),
        "clips_by": dict(clips.most_common()),
        "traces": len(traces),
        "traces_of_unanimous": sum(trace["unanimous"] for trace in traces),
    }
    write_jsonl(folder / "samples.jsonl", records)
    write_jsonl(folder / "traces.jsonl", traces)
    write_jsonl(folder / "labels.jsonl", labels)
    write_json(folder / "results.json", results)
    log(results)
    line = (f"{stage.name}: {count:,} samples of {len(examples):,} clips, {len(traces):,} usable "
            f"({results['unusable'] or 'no other'}); clips: {results['clips_by']}")
    tqdm.write(line + (f", bad: {bad}" if bad else ""))
    if not traces:
        tqdm.write(f"{stage.name}: note: no sample is usable: a stage that learns from these traces will stop")


def use_of(sample):
    """ "ok", or why a student cannot learn from a sample."""
    if not sample["finished"]:
        return "too long"
    if SPECIAL_TOKEN.search(sample["text"]):
        return "special token"
    if sample["answer"] is None or not FORMAT.fullmatch(sample["text"]):
        return "unparsable"
    return "ok"


def outcome_of(example, samples):
    """ "unanimous" where all samples of a clip are usable and name one option, else the first reason why not."""
    for sample in samples:
        if sample["use"] != "ok":
            return sample["use"]
    options = {example.options[sample["answer"]] for sample in samples}
    return "unanimous" if len(options) == 1 else "not unanimous"


def sample_locally(stage, folder, examples, log):
    """A record a clip: {"id", "samples": [{"text", "finished"}]}, or a bad one. With top_k also "ids", and "top" of
    what is finished."""
    get_model, _ = model_of(stage)
    writing, kept, usage = Writing.of(stage), {}, Usage()

    def sample(examples):
        model, processor = get_model()
        questions = Questions(processor, examples, stage.prompt_format, stage.max_new_tokens)
        for example, own in write(model, questions, writing, kept=kept, usage=usage):
            samples = [{"text": c.text.strip(), "finished": c.finished} for c in own]
            if stage.top_k:
                for sample, completion in zip(samples, own, strict=True):
                    sample["ids"] = completion.ids
            questions.records[example.id] = {"id": example.id, "samples": samples}
        if stage.top_k:
            add_best_ids(model, questions, stage.temperature, stage.top_k)
        return questions.in_order()

    records = compute_shards(sample, examples, folder / "shards", stage.name, "clip", written_shard(len(examples)))
    usage.write_to(log)
    if records is not None and stage.top_k:
        copy_tokenizer(stage, folder)
    return records


@torch.inference_mode()
def add_best_ids(model, questions, temperature, top_k):
    """Adds "top" to the finished samples of Questions, in passes over prompts with their samples behind them. Clips are
    read anew, for a whole shard's frames would fill the memory. With 5 decimals a log-probability puts a probability,
    and the sum of a row's, off by 5e-6 of itself, far less than weights in 16 bits do."""
    vocabulary = SampledVocabulary.of(model, questions.processor, temperature)

    def groups():
        for example, prompt in questions.prompts():
            samples = questions.records[example.id].get("samples", ())
            pairs = [(sample, torch.tensor(sample["ids"])) for sample in samples if sample["finished"]]
            for part in batch_by_tokens(pairs, BATCH_TOKENS - len(prompt)):
                finished, ids = zip(*part, strict=True)
                yield finished, Group(prompt, ids)

    for run in batch_by_tokens(groups(), BATCH_TOKENS):
        beat()
        batch = pack([group for _, group in run]).to(model.device)
        id_TK, logprob_TK = top_logprobs(model, model(batch), batch, vocabulary, top_k)
        end = 0
        for sample in chain(*(finished for finished, _ in run)):
            begin, end = end, end + len(sample["ids"])
            logprobs = logprob_TK[begin:end].flatten().tolist()
            sample["top"] = {
                "ids": id_TK[begin:end].flatten().tolist(),
                "logprobs": [round(logprob, 5) for logprob in logprobs],
            }
            compact(sample)


def sample_at_endpoint(stage, folder, examples, log):
    """As sample_locally, from the stage's endpoint; endpoint.jsonl keeps the answers. A clip without any is bad."""
    answers = endpoint.ask_about(stage, examples, folder / "endpoint.jsonl", "sample", num_samples=stage.num_samples,
                                 max_tokens=stage.max_new_tokens, temperature=stage.temperature)
    records = []
    for example, own in zip(examples, answers, strict=True):
        samples = []
        for answer in own:
            if "bad" in answer:
                samples.append({"text": "", "finished": False, "bad": answer["bad"]})
            else:
                samples.append({"text": answer["text"].strip(), "finished": answer["finished"]})
        if all("bad" in sample for sample in samples):
            records.append({"id": example.id, "bad": samples[0]["bad"], "detail": own[0]["detail"]})
        else:
            records.append({"id": example.id, "samples": samples})
    return records
