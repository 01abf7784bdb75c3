"""Stage FactCheck: does a trace claim only what its clip holds? Section 3.2 of SightSound-R1.

A checker judges the thoughts and is not shown the answer after them: whether the two agree can be seen without
listening. A trace that could not be judged is not accepted."""
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from minixmd.inputs.batch import Group
from minixmd.inputs.examples import Example, build_conversation, read_examples
from minixmd.inputs.prompts import batch_by_tokens, prefetch
from minixmd.runs.device import resolve_device
from minixmd.runs.distributed import compute_shards, gather, rank_and_world_size
from minixmd.runs.files import read_json, write_json, write_safetensors
from minixmd.runs.records import count_bad, read_traces, read_verdicts, write_jsonl
from minixmd.runs.seeds import hash_seed
from minixmd.stages import endpoint
from minixmd.stages.cnn14_training import load_logmels
from minixmd.stages.multiple_choice import model_of, next_token_logits
from minixmd.stages.verifier import Pair, fit_verifier, load_verifier, make_verifier, score_pairs, trace_vectors
from minixmd.tasks.answers import thoughts
from minixmd.tasks.yes_no import log_odds, yes_no

YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")


@dataclass(frozen=True)
class Trace:
    example: Example  # whose clip it is about
    key: tuple[str, int]  # clip id and its number among the clip's samples, by which verdicts are looked up
    text: str
    record: dict  # its line of traces.jsonl, with "sample" and "unanimous"


def run(stage, folder, log):
    examples = read_examples(stage)
    traces = select_traces(stage, {example.id: example for example in examples})
    calibration = None
    if stage.checker == "model":
        verdicts = judge_by_model(stage, folder, traces)
    elif stage.checker == "endpoint":
        verdicts = judge_by_endpoint(stage, folder, traces)
    elif stage.checker == "verifier":
        verdicts, calibration = judge_by_verifier(stage, folder, traces, log)
    else:
        verdicts = look_up_verdicts(stage, traces)
    if verdicts is not None:
        collect(stage, folder, log, traces, verdicts, calibration)


def collect(stage, folder, log, traces, verdicts, calibration):
    """Writes verdicts.jsonl (each trace's score), traces.jsonl (the accepted ones, with it) and results.json."""
    bad = count_bad(verdicts, stage.name, stage.max_bad)
    judged = [trace.record for trace in traces]
    accepted = []
    for record, verdict in zip(judged, verdicts, strict=True):
        if "bad" not in verdict:
            verdict["accepted"] = verdict["score"] > stage.threshold
            if verdict["accepted"]:
                accepted.append({**record, "score": verdict["score"]})
    results = {
        "checker": stage.checker,
        "threshold": stage.threshold,
        "traces": len(judged),
        "accepted": len(accepted),
        "rejected": len(judged) - len(accepted) - sum(bad.values()),
        "bad": bad,
        "clips": len({record["id"] for record in judged}),
        "clips_with_accepted": len({record["id"] for record in accepted}),
    }
    if calibration is not None:
        results["calibration"] = calibration
    results |= {"first": {}, "unanimous": {}}
    for part, records in (("judged", judged), ("accepted", accepted)):
        results["first"][part] = sum(record["sample"] == 0 for record in records)
        results["unanimous"][part] = sum(record["unanimous"] for record in records)
    write_jsonl(folder / "verdicts.jsonl", verdicts)
    write_jsonl(folder / "traces.jsonl", accepted)
    tokenizer = Path(stage.traces).with_name("tokenizer.json")  # of ids that go with the traces
    if tokenizer.exists():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_json(folder / "results.json", results)
    log(results)
    tqdm.write(f"{stage.name}: {len(accepted):,} of {len(traces):,} traces accepted, of "
               f"{results['clips_with_accepted']:,} of {results['clips']:,} clips" + (f", bad: {bad}" if bad else ""))
    if not accepted:
        raise ValueError(f"{stage.name}: no trace was accepted: see the scores in {folder / 'verdicts.jsonl'}")


def select_traces(stage, examples):
    """The Traces that trace_filter names, in the file's order. examples: {id: Example}. A file that is not Traces' own
    may leave out "sample" (numbered then, clip by clip) and "unanimous" (true). Raises ValueError for a line that is no
    trace, of no clip of the manifest, or a duplicate; or for nothing to judge."""
    traces, counts = {}, Counter()
    for number, record in enumerate(read_traces(stage.traces), 1):
        clip_id = record["id"]
        if clip_id not in examples:
            raise ValueError(f"{stage.traces}: trace {number} is of {clip_id!r}, which is not in {stage.manifest}")
        record = {"sample": counts[clip_id], "unanimous": True, **record}
        key = clip_id, record["sample"]
        if key in traces:
            raise ValueError(f"{stage.traces}: sample {record['sample']} of {clip_id!r} stands twice")
        counts[clip_id] += 1
        traces[key] = Trace(examples[clip_id], key, record["text"], record)
    selected = list(traces.values())
    if stage.trace_filter != "all":
        selected = [trace for trace in selected if trace.record["sample"] == 0 or trace.record["unanimous"]]
    if stage.trace_filter == "calibration":  # `limit` traces of as many clips, drawn by seed, clip and sample alone
        drawn = {}
        for trace in sorted(selected, key=lambda trace: hash_seed(stage.seed, *trace.key)):
            if len(drawn) < stage.limit:
                drawn.setdefault(trace.example.id, trace.key)
        selected = [trace for trace in selected if drawn.get(trace.example.id) == trace.key]
    if not selected:
        raise ValueError(f"{stage.name}: {stage.traces} holds no trace to judge")
    return selected


def make_verdict(key, **found):
    """The line of verdicts.jsonl on the trace with this key. found: its "score", or "bad" and "detail"."""
    return {"id": key[0], "sample": key[1], **found}


def conversation(prompt, example, text):
    """What a checker is asked about a clip: whether the thoughts of a trace are true of it."""
    return build_conversation(example, media="audio", prompt=prompt, trace=thoughts(text))


def judge_by_model(stage, folder, traces):
    """Verdicts by an audio model: the log-odds of the tokens with which yes begins against those of no."""
    get_model, finish = model_of(stage)

    @torch.inference_mode()
    def judge(runs):
        model, processor = get_model()
        yes = {processor.encode(word)[0] for word in YES}
        no = {processor.encode(word)[0] for word in NO}
        yes_ids, no_ids = sorted(yes - no), sorted(no - yes)  # a blank that is a token of its own tells nothing
        if not yes_ids or not no_ids:
            raise ValueError(f"{stage.name}: in the tokenizer of {stage.model}, yes and no start with the same tokens")
        verdicts = {}
        for pairs in batch_by_tokens(usable_prompts(stage, model, processor, runs, verdicts), stage.batch_tokens):
            judged = []
            for part, _ in pairs:
                judged += part
            logits_BV = next_token_logits(model, [item for _, item in pairs])
            score_B = logits_BV[:, yes_ids].logsumexp(-1) - logits_BV[:, no_ids].logsumexp(-1)
            if not score_B.isfinite().all():
                raise ValueError(f"{stage.name}: the logits are not finite: the weights of {stage.model} are "
                                 f"broken, or too large for {stage.dtype}")
            for trace, score in zip(judged, score_B.tolist(), strict=True):
                verdicts[trace.key] = make_verdict(trace.key, score=round(score, 5))
        return [verdicts[trace.key] for run in runs for trace in run]

    runs = [list(run) for _, run in groupby(traces, key=lambda trace: trace.example.id)]  # of a clip
    return compute_shards(judge, runs, folder / "shards", stage.name, "clip", finish=finish)


def usable_prompts(stage, model, processor, runs, verdicts):
    """Yields share_prefix's pairs of what can be judged; fills in the other verdicts. A run's clip is read once."""
    def build(run, load):
        heard = []  # what was read of the clip

        def load_once(*arguments):
            if not heard:
                heard.append(load(*arguments))
            return heard[0]

        prompts = []
        for trace in run:
            asked = conversation(stage.prompt, trace.example, trace.text)
            try:
                prompts.append(processor(asked, load_once))
            except ValueError as error:  # too long, or with a placeholder in its text
                reason = getattr(error, "reason", "no prompt")
                if reason not in ("too long", "no prompt"):
                    raise
                prompts.append(make_verdict(trace.key, bad=reason, detail=str(error)))
        return prompts

    def lose(run, error):
        return [make_verdict(trace.key, bad=error.reason, detail=str(error)) for trace in run]

    for run, prompts in zip(runs, prefetch(build, runs, lose, reading=stage.reading), strict=True):
        usable = []
        for trace, prompt in zip(run, prompts, strict=True):
            if isinstance(prompt, dict):
                verdicts[trace.key] = prompt
            else:
                usable.append((trace, prompt))
        if usable:
            trace, prompt = usable[0]
            usable[0] = trace, model.encode_media(prompt)  # of which share_prefix takes the clip of all
            yield from share_prefix(usable, stage.batch_tokens)


def share_prefix(pairs, batch_tokens):
    """Yields ([item], Group) of one clip's pairs (item, Prompt), in order: the ids with which all the Prompts begin are
    the Group's prompt, and the rest of each, at least one id, a completion. The clip has to stand before the first
    difference. A Group of more than batch_tokens is cut into several. A lone Prompt stays as it is."""
    first_item, first = pairs[0]
    if len(pairs) == 1:
        yield [first_item], first
        return
    shortest = min(len(prompt) for _, prompt in pairs)
    ids_BN = torch.stack([prompt.ids_N[:shortest - 1] for _, prompt in pairs])
    common = int((ids_BN == ids_BN[0]).all(0).long().cumprod(0).sum())
    prefix = replace(first, ids_N=first.ids_N[:common], positions_3N=first.positions_3N[:, :common], target_N=None)
    rests = [(item, prompt.ids_N[common:]) for item, prompt in pairs]
    for part in batch_by_tokens(rests, batch_tokens - common):
        yield [item for item, _ in part], Group(prefix, tuple(rest_T for _, rest_T in part))


def judge_by_endpoint(stage, folder, traces):
    """Verdicts: the log-odds of the first token if they are given and agree with what was written, else +1 or -1."""
    requests = []
    for trace in traces:
        ask = partial(endpoint.messages, trace.example, "audio", stage.prompt, thoughts(trace.text))
        requests.append(endpoint.Request(f"{trace.example.id}/{trace.key[1]}", ask))
    answers = endpoint.ask_endpoint(stage, requests, folder / "endpoint.jsonl", "trace", max_tokens=8, temperature=0.0,
                                    logprobs=stage.logprobs, is_usable=lambda text: yes_no(text) is not None)
    verdicts = []
    for trace, answer in zip(traces, answers, strict=True):
        if "bad" in answer:
            verdicts.append(make_verdict(trace.key, bad=answer["bad"], detail=answer["detail"]))
            continue
        yes, score = yes_no(answer["text"]), log_odds(answer.get("top", {}))
        if score is None or (score > 0) != yes:
            score = 1.0 if yes else -1.0
        verdicts.append(make_verdict(trace.key, score=round(score, 5)))
    return verdicts


def judge_by_verifier(stage, folder, traces, log):
    """(verdicts, calibration) by a small verifier trained on those traces that `verdicts` judges; it judges all."""
    known = read_verdicts(stage.verdicts, needs_accepted=True)
    judged = [trace for trace in traces if "score" in known.get(trace.key, {})]
    if not judged:
        raise ValueError(f"{stage.name}: {stage.verdicts} judges none of the traces in {stage.traces}")
    get_model, _ = model_of(stage)
    device = resolve_device(stage.name, stage.device)
    read = partial(read_pairs, stage, get_model, known)
    weights_path, calibration_path = folder / "verifier.safetensors", folder / "calibration.json"
    if rank_and_world_size()[0] == 0 and not calibration_path.exists():  # written last
        text_width = get_model()[0].config.text.hidden_size
        verifier = make_verifier(text_width, stage.width, stage.weights, stage.seed).to(device)
        pairs, _ = read(judged)
        calibration = fit_verifier(stage, verifier, list(pairs.values()), log)
        write_safetensors(weights_path, verifier.state_dict())
        write_json(calibration_path, calibration)
    gather(None)
    verifier = load_verifier(weights_path, stage.width).to(device)
    calibration = read_json(calibration_path)
    tqdm.write(f"{stage.name}: agrees with the checker on {100 * calibration['agreement']:.1f} % of "
               f"{calibration['count']} held-out traces, area under ROC {calibration['auc']:.3f}")

    def judge(traces):
        pairs, bad = read(traces)
        scores = score_pairs(verifier, list(pairs.values()), stage.batch_size)
        verdicts = {}
        for key, score in zip(pairs, scores, strict=True):
            verdicts[key] = make_verdict(key, score=round(score, 5))
        return [verdicts.get(trace.key) or make_verdict(trace.key) | bad[trace.example.id] for trace in traces]

    verdicts = compute_shards(judge, traces, folder / "shards", stage.name, "trace")
    return verdicts, calibration


def read_pairs(stage, get_model, known, traces):
    """({key: Pair} of traces, {clip id: bad record} of the others' clips). known: the larger checker's verdicts."""
    clips = {trace.example.id: trace.example for trace in traces}
    logmels, bad = load_logmels(clips.values(), stage)
    usable = [trace for trace in traces if trace.example.id in logmels]
    text_BD = trace_vectors(*get_model(), [thoughts(trace.text) for trace in usable], stage.batch_tokens)
    pairs = {}
    for trace, text_D in zip(usable, text_BD, strict=True):
        accepted = known.get(trace.key, {}).get("accepted")
        option = trace.record.get("option", trace.text)
        pairs[trace.key] = Pair(logmels[trace.example.id], text_D, option, accepted)
    return pairs, bad


def look_up_verdicts(stage, traces):
    """The verdicts on the same traces that stand in another stage's file."""
    known = read_verdicts(stage.verdicts)
    for trace in traces:
        if trace.key not in known:
            clip_id, sample = trace.key
            raise ValueError(f"{stage.name}: {stage.verdicts}: no verdict on sample {sample} of {clip_id!r}")
    return [known[trace.key] for trace in traces]
