"""Stage FactCheck: does a trace claim only what its clip holds? Audio-grounded fact verification, section 3.2 of
SightSound-R1.

Who judges: an audio model, by the log-odds of yes against no where its answer would start; an OpenAI-compatible
endpoint that hears; a small verifier trained on verdicts of one of those (learning/verifier.py); or verdicts given
already, for another threshold. It judges the thoughts and is not shown the answer after them: whether the two agree can
be seen without listening. Each verdict is kept with its score. A trace that nobody could judge is not accepted.
"""
import os
from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from minixmd import load, pack
from minixmd.inputs.examples import build_conversation, check_media, read_manifest
from minixmd.inputs.media import MediaError
from minixmd.inputs.prompts import batch_by_tokens, prefetch
from minixmd.runs.device import runtime_of
from minixmd.runs.distributed import compute_shards
from minixmd.runs.files import read_json, write_json
from minixmd.runs.records import bad_record, count_bad, read_traces, read_verdicts, write_jsonl
from minixmd.runs.seeds import hash_seed
from minixmd.stages import verifier as small
from minixmd.stages.endpoint import ask_endpoint, audio_part, key_from, log_odds, yes_no
from minixmd.stages.switch import load_logmel
from minixmd.stages.traces import refuse_many
from minixmd.tasks.answers import thoughts

WORDS = (("yes", "Yes", "YES", " yes", " Yes"), ("no", "No", "NO", " no", " No"))


def run(stage, folder, log):
    """Writes verdicts.jsonl (each trace's score), traces.jsonl (the accepted ones, with it) and results.json."""
    examples = read_manifest(stage.manifest)
    check_media(stage.name, stage.manifest, examples, "audio")
    traces = chosen(stage, {e.id: e for e in examples})
    beside = {}
    verdicts = {"model": by_model, "endpoint": by_endpoint, "verifier": by_verifier, "verdicts": by_verdicts}[
        stage.checker](stage, folder, traces, beside, log)
    if verdicts is not None:
        collect(stage, folder, log, traces, verdicts, beside)


def collect(stage, folder, log, traces, verdicts, beside):
    bad = count_bad(verdicts, stage.name, stage.max_bad)
    for verdict in verdicts:
        if "bad" not in verdict:
            verdict["accepted"] = verdict["score"] > stage.threshold
    accepted = [{**trace, "score": verdict["score"]} for (_, trace), verdict in zip(traces, verdicts, strict=True)
                if verdict.get("accepted")]
    results = {"checker": stage.checker, "threshold": stage.threshold, "traces": len(traces), "accepted": len(accepted),
               "rejected": len(traces) - len(accepted) - sum(bad.values()), "bad": bad,
               "clips": len({trace["id"] for _, trace in traces}),
               "clips_with_accepted": len({trace["id"] for trace in accepted}), **beside}
    for name, belongs in (("first", lambda one: one["sample"] == 0), ("unanimous", lambda one: one["unanimous"])):
        results[name] = {"judged": sum(belongs(trace) for _, trace in traces), "accepted": sum(map(belongs, accepted))}
    write_jsonl(folder / "verdicts.jsonl", verdicts)
    write_jsonl(folder / "traces.jsonl", accepted)
    write_json(folder / "results.json", results)
    log(results)
    tqdm.write(f"{stage.name}: {len(accepted):,} of {len(traces):,} traces accepted, of "
               f"{results['clips_with_accepted']:,} of {results['clips']:,} clips" + (f", bad: {bad}" if bad else ""))
    if not accepted:
        raise ValueError(f"{stage.name}: no trace was accepted: see the scores in {folder / 'verdicts.jsonl'}")


def chosen(stage, examples):
    """[(example, trace)] of the traces that `which` names, in the file's order. A file that is not stage Traces' may
    leave out "sample" (counted then, clip by clip) and "unanimous" (true).

    Raises:
        ValueError: a line that is no trace, of no clip of the manifest, or stands twice; or nothing to judge.
    """
    found, counts = {}, Counter()
    for number, trace in enumerate(read_traces(stage.traces), 1):
        if trace["id"] not in examples:
            raise ValueError(f"{stage.traces}: trace {number} is of {trace['id']!r}, which is not in {stage.manifest}")
        trace = {"sample": counts[trace["id"]], "unanimous": True, **trace}
        if type(trace["sample"]) is not int:
            raise ValueError(f"{stage.traces}: trace {number}: 'sample' must be an int, got {trace['sample']!r}")
        counts[trace["id"]] += 1
        if (trace["id"], trace["sample"]) in found:
            raise ValueError(f"{stage.traces}: sample {trace['sample']} of {trace['id']!r} stands twice")
        found[trace["id"], trace["sample"]] = trace
    used = [trace for trace in found.values()
            if stage.trace_filter == "all" or trace["sample"] == 0 or trace["unanimous"]]
    if stage.trace_filter == "calibration":
        used = calibration(stage, used)
    if not used:
        raise ValueError(f"{stage.name}: {stage.traces} holds no trace to judge")
    return [(examples[trace["id"]], trace) for trace in used]


def calibration(stage, traces):
    """`limit` traces of as many clips, drawn by seed, clip and sample alone."""
    drawn = {}
    for trace in sorted(traces, key=lambda trace: hash_seed(stage.seed, trace["id"], trace["sample"])):
        drawn.setdefault(trace["id"], trace)
    kept = {id(trace) for trace in list(drawn.values())[:stage.limit]}
    return [trace for trace in traces if id(trace) in kept]


def verdict(trace, score):
    return {"id": trace["id"], "sample": trace["sample"], "score": round(score, 5)}


def bad_verdict(trace, reason, detail):
    return {"id": trace["id"], "sample": trace["sample"], "bad": reason, "detail": detail}


def conversation(stage, example, text):
    """What a checker is asked about a clip: whether the thoughts of a trace are true of it."""
    return build_conversation(example, media="audio", prompt=stage.prompt, trace=thoughts(text))


# ---- a model here ----


def by_model(stage, folder, traces, beside, log):
    runtime = runtime_of(stage)
    model, processor = load(stage.model, device=runtime.device, dtype=runtime.dtype, backend=runtime.backend)
    yes, no = ({processor.encode(word)[0] for word in words} for words in WORDS)
    yes, no = sorted(yes - no), sorted(no - yes)  # a blank that is a token of its own tells nothing
    if not yes or not no:
        raise ValueError(f"{stage.name}: in the tokenizer of {stage.model}, yes and no start with the same tokens")
    with tqdm(total=len(traces), desc=stage.name, unit="trace", smoothing=0.1) as bar:
        return compute_shards(partial(listen, stage, model, processor, yes, no), traces, folder / "shards", bar.update)


@torch.inference_mode()
def listen(stage, model, processor, yes, no, part):
    """Verdicts on (example, trace)s: the log-odds of the tokens with which yes begins against those of no."""
    device, found, clips = model.device, {}, {}

    def prompt(item):
        example, trace = item
        try:
            return item, processor(conversation(stage, example, trace["text"]))
        except MediaError:
            raise
        except ValueError as error:  # too long, or with a placeholder in its text
            found[id(trace)] = bad_verdict(trace, "no prompt", str(error))

    def on_bad(item, error):
        found[id(item[1])] = bad_verdict(item[1], error.reason, str(error))

    def good():
        for pair in prefetch(prompt, part, on_bad):
            if pair is not None:
                (example, trace), asked = pair
                if example.id not in clips:  # the tower hears a clip once, however many traces it has
                    clips.clear()
                    clips[example.id] = model.encode_media(asked).media
                media = tuple(replace(heard, rows_P=m.rows_P)
                              for heard, m in zip(clips[example.id], asked.media, strict=True))
                yield trace, replace(asked, media=media)

    for run in batch_by_tokens(good(), stage.batch_tokens):
        batch = pack([asked for _, asked in run]).to(device)
        last_B = torch.tensor([end - 1 for _, end in batch.spans], device=device)
        logits_BV = model.logits(model(batch)[last_B]).cpu()
        score_B = logits_BV[:, yes].logsumexp(-1) - logits_BV[:, no].logsumexp(-1)
        if not score_B.isfinite().all():
            raise ValueError(f"{stage.name}: the logits are not finite: the weights of {stage.model} are broken, or "
                             f"too large for {stage.dtype}")
        for (trace, _), score in zip(run, score_B.tolist(), strict=True):
            found[id(trace)] = verdict(trace, score)
    return [found[id(trace)] for _, trace in part]


# ---- an endpoint ----


def by_endpoint(stage, folder, traces, beside, log):
    asked = [(f"{trace['id']}/{trace['sample']}", partial(messages, stage, example, trace), 0)
             for example, trace in traces]
    with tqdm(total=len(asked), desc=stage.name, unit="trace", smoothing=0.1) as bar:
        said = ask_endpoint(stage, asked, folder / "endpoint.jsonl", bar.update, api_key=key_from(os.environ, stage),
                            max_tokens=8, temperature=0.0, logprobs=stage.logprobs,
                            valid=lambda text: yes_no(text) is not None)
    refuse_many([one for one in said.values() if "bad" in one], len(said), stage)
    return [bad_verdict(trace, said[key]["bad"], said[key]["detail"]) if "bad" in said[key] else
            verdict(trace, remote_score(said[key])) for (key, *_), (_, trace) in zip(asked, traces, strict=True)]


def messages(stage, example, trace):
    [turn] = conversation(stage, example, trace["text"])
    return [{"role": "user", "content": [audio_part(example.audio), turn["content"][-1]]}]


def remote_score(said):
    """The log-odds of an endpoint's first token, if it gave any that agree with what it said, else +1 or -1."""
    yes = yes_no(said["text"])
    odds = log_odds(said["top"]) if said.get("top") else None
    return (1.0 if yes else -1.0) if odds is None or (odds > 0) != yes else odds


# ---- a verifier trained on another checker's verdicts ----


def by_verifier(stage, folder, traces, beside, log):
    """Trained on the traces that `verdicts` judges, it judges all; frames are held in memory shard by shard."""
    given = read_verdicts(stage.verdicts, needs_accepted=stage.checker == "verifier")
    runtime = runtime_of(stage)
    model, processor = load(stage.model, device=runtime.device, dtype=runtime.dtype, backend=runtime.backend)
    judged = [(e, trace) for e, trace in traces if "score" in given.get((trace["id"], trace["sample"]), {})]
    if not judged:
        raise ValueError(f"{stage.name}: {stage.verdicts} judges none of the traces in {stage.traces}")

    def read(part):  # what of it could be heard, its frames, and its traces' vectors; and the others' records
        bad = [None] * len(part)

        def on_bad(indexed, error):
            i, (example, trace) = indexed
            bad[i] = {**bad_record(example.id, error), "sample": trace["sample"]}

        frames = list(prefetch(lambda indexed: load_logmel(indexed[1][0].audio, stage.clip_s), enumerate(part), on_bad))
        good = [i for i, record in enumerate(bad) if record is None]
        said = [thoughts(part[i][1]["text"]) for i in good]
        text_BD = small.trace_vectors(model, processor, said, stage.batch_tokens)
        return good, [frames[i] for i in good], text_BD, bad

    kept, tally = folder / "verifier.safetensors", folder / "calibration.json"
    if tally.exists():  # written last
        verifier = small.restore(stage, model.config.text.hidden_size, kept, runtime_of(stage).device)
        beside["calibration"] = read_json(tally)
    else:
        good, frames, text_BD, _ = read(judged)
        verifier, used = small.make_verifier(stage, text_BD.shape[1]), [judged[i][1] for i in good]
        beside["calibration"] = small.fit(
            stage, verifier, frames, text_BD, [given[trace["id"], trace["sample"]]["accepted"] for trace in used],
            [trace.get("option", trace["text"]) for trace in used], log, runtime_of(stage).device)
        small.save(verifier, kept)
        write_json(tally, beside["calibration"])
    one = beside["calibration"]
    tqdm.write(f"{stage.name}: agrees with the checker on {100 * one['agreement']:.1f} % of {one['count']} held-out "
               f"traces, area under ROC {one['auc']:.3f}")

    def judge(part):
        good, frames, text_BD, bad = read(part)
        score = dict(zip(good, small.scores(verifier, frames, text_BD, stage.batch_size), strict=True))
        return [bad[i] or verdict(trace, score[i]) for i, (_, trace) in enumerate(part)]

    with tqdm(total=len(traces), desc=stage.name, unit="trace", smoothing=0.1) as bar:
        return compute_shards(judge, traces, folder / "shards", bar.update, first_process_only=True)


# ---- verdicts given already ----


def by_verdicts(stage, folder, traces, beside, log):
    given = read_verdicts(stage.verdicts, needs_accepted=stage.checker == "verifier")
    missing = next((trace for _, trace in traces if (trace["id"], trace["sample"]) not in given), None)
    if missing:
        raise ValueError(f"{stage.name}: {stage.verdicts}: no verdict on sample {missing['sample']} of "
                         f"{missing['id']!r}")
    return [given[trace["id"], trace["sample"]] for _, trace in traces]
