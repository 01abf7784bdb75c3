"""Asking a model the questions of a manifest: clips are decoded ahead, packed by tokens, and the letters scored.

A clip that cannot be used never stops a run and never vanishes: it becomes a record with the reason, and a stage fails
only when more than its `max_bad` share are bad.
"""
import json
import os
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import triton

from minixmd.inputs.batch import pack
from minixmd.inputs.examples import build_conversation
from minixmd.inputs.media import MediaError
from minixmd.learning.rollout import decode, uniforms
from minixmd.runs.distributed import Elsewhere, ranks, wait
from minixmd.runs.files import write_text
from minixmd.tasks.benchmarks import vote

SHARD = 512  # examples; a killed stage redoes at most one shard
ROOM = 4  # times batch_tokens: tokens of the answers that are sampled at once; by default 64 answers of 512 tokens


def device_of(stage):
    """ "auto" is CUDA where there is one; the runner prints what it came to."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if stage.device == "auto" else stage.device
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"config: {stage.name}: device 'cuda' was asked for, but torch sees no GPU")
    return name


def dtype_of(stage):
    return getattr(torch, stage.dtype)


def impl_of(stage):
    """ "auto" is Triton on a GPU and PyTorch elsewhere; the runner prints what it came to."""
    if stage.backend == "auto":
        return "triton" if device_of(stage) == "cuda" else "torch"
    if stage.backend == "triton" and device_of(stage) == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(f"config: {stage.name}: backend 'triton' needs a GPU (or TRITON_INTERPRET=1, which is very slow),"
                         " but the device is 'cpu'")
    return stage.backend


def check_media(name, manifest, examples, media):
    """Raises ValueError for the first of a manifest's examples that lacks what stage `name` shows."""
    kinds = {"both": ("video", "audio"), "sounded": ("video",)}.get(media, (media,))
    for e in examples:
        if missing := [kind for kind in kinds if getattr(e, kind) is None]:
            raise ValueError(f"{name}: {manifest}: example {e.id!r} has no {missing[0]}")


def ask(stage, processor, example, answer=None, trace=""):
    """The Prompt with which a stage asks an example's question (and, to learn it, gives `answer`; where the stage's
    prompt has {trace}, with this one), or the MediaError that its clip raised."""
    video_options = {name: getattr(stage, name) for name in ("fps", "min_pixels", "max_pixels", "nframes")}
    conversation = build_conversation(example, media=stage.media, prompt=stage.prompt, answer=answer,
                                      trace=trace, video_options=video_options)
    try:
        return processor(conversation)
    except MediaError as error:
        return error
    except ValueError as error:
        raise ValueError(f"example {example.id!r}: {error}") from error


def check_room(processor, example, prompt, max_new_tokens):
    """Raises ValueError where a prompt and what is to be written after it are over the model's limit."""
    if len(prompt) + max_new_tokens > processor.max_positions:
        raise ValueError(f"example {example.id!r}: the prompt's {len(prompt)} tokens and max_new_tokens "
                         f"{max_new_tokens} are over the model's limit of {processor.max_positions}")


def prefetch(function, items, ahead=16):
    """function(item) for every item, in order, computed by threads up to `ahead` items early."""
    items, workers = iter(items), max(2, min(8, (os.cpu_count() or 2) // 2))
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        try:
            while True:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > ahead:
                        break
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def packs(prompts, batch_tokens):
    """Runs of (item, prompt) whose prompts together hold at most batch_tokens (a longer one goes alone)."""
    run, tokens = [], 0
    for pair in prompts:
        if run and tokens + len(pair[1]) > batch_tokens:
            yield run
            run, tokens = [], 0
        run.append(pair)
        tokens += len(pair[1])
    if run:
        yield run


@torch.inference_mode()
def score_letters(model, processor, stage, examples, batch_tokens=8192, top_k=0, top_temperature=1.0, traces=None,
                  max_new_tokens=0, n=1, temperature=0.0, rule="option", stop=()):
    """Ask every example and read the letters' logits where the answer would start, in one forward pass a batch.

    With max_new_tokens the model goes on from there, and its answer is the option that its words mean (benchmarks.py);
    the letters' logits stay those that they are without. Of n > 1 such answers the one that most of them give counts
    (vote). A sampled token depends on (stage.seed, the example's id, the sample's number, the position) alone.

    Args:
        stage: Evaluate, Label or Train: media, prompt, video options and seed.
        batch_tokens: packed into a forward pass. So many answers are sampled at once that their tokens are at most
            ROOM times as many, or n if those are more; greedy ones for a whole batch at once.
        top_k: best ids to keep of those that are not suppressed, with the logsumexp of all of them at `top_temperature`.
        traces: {id: text that stands at the prompt's {trace}}; an id that is not there has an empty one. None = no ids.
        max_new_tokens: that a written answer may have, the end of turn included; 0 = none is written.
        temperature: of the sampling; 0 = greedy, for n = 1. rule: "option" | "mmau", by which the answers are read.
        stop: strings that end a written answer, as in generate.
    Returns:
        A JSON-able record an example, in order: {"id", "answer": index, "option", "logits"} or {"id", "bad", "detail"};
        with top_k also "top": {"ids", "logits", "temperature", "logsumexp"}. With max_new_tokens "answer" and "option"
        may be None, and there are also "by_letters": index by the logits, "how": one of WAYS, "text", and "finished":
        the model ended its turn or wrote a stop; with n > 1 those are the sample's that speaks for all, beside
        "votes": {option: count} and all "texts".
    Raises:
        ValueError: an example that lacks the medium, or a prompt over the model's limit.
    """
    device = model.lm_head.weight.device
    records, traces = {}, traces or {}
    suppressed_ids = torch.tensor(processor.suppressed_ids if top_k or max_new_tokens else [], dtype=torch.long)

    def prompts():
        for example, prompt in prefetch(lambda e: (e, ask(stage, processor, e, trace=traces.get(e.id, ""))), examples):
            if isinstance(prompt, MediaError):
                records[example.id] = bad_record(example, prompt)
            else:
                check_room(processor, example, prompt, max_new_tokens)
                yield example, prompt

    def read_letters(run, logits_BV):
        for logits_V, (example, _) in zip(logits_BV.cpu(), run, strict=False):  # of the run's rest, so many
            letters = logits_V[processor.letter_ids(len(example.options))]
            if not letters.isfinite().all():
                raise ValueError(f"{stage.name}: the logits of example {example.id!r} are not finite: the weights of "
                                 f"{stage.model} are broken, or too large for {stage.dtype}")
            best = int(letters.argmax())
            records[example.id] = {"id": example.id, "answer": best, "option": example.options[best],
                                   "logits": [round(x, 4) for x in letters.tolist()]}
            if top_k:
                logits_V = logits_V.index_fill(0, suppressed_ids, -torch.inf)
                top = logits_V.topk(top_k)
                records[example.id]["top"] = {
                    "ids": top.indices.tolist(), "logits": [round(x, 4) for x in top.values.tolist()],
                    "temperature": top_temperature,
                    "logsumexp": round((logits_V / top_temperature).logsumexp(0).item(), 5)}

    for run in packs(prompts(), batch_tokens):
        asked = [prompt for _, prompt in run]
        if not max_new_tokens:
            batch = pack(asked).to(device)
            last_B = torch.tensor([end - 1 for _, end in batch.spans], device=device)
            read_letters(iter(run), model.logits(model(batch)[last_B]))
            continue
        uniform_BT, decode_slots = None, None
        if temperature:
            uniform_BT = torch.stack([uniforms(stage.seed, 0, example.id, i, max_new_tokens) for example, _ in run
                                      for i in range(n)])
            decode_slots = max(n, ROOM * batch_tokens // max_new_tokens)
        said = decode(model, processor, asked, uniform_BT, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                      suppressed_ids=suppressed_ids, stop=stop, decode_slots=decode_slots, backend=impl_of(stage),
                      on_prompts=partial(read_letters, iter(run)))
        for i, (example, _) in enumerate(run):
            record, texts = records[example.id], [one.text for one in said[n * i:n * i + n]]
            at, index, how, votes = vote(texts, example.options, rule)
            record.update(by_letters=record["answer"], answer=index, how=how, text=texts[at],
                          option=None if index is None else example.options[index], finished=said[n * i + at].finished)
            if n > 1:
                record.update(votes=votes, texts=texts)
    return [records[example.id] for example in examples]


def score_in_shards(score, examples, folder, progress, size=None, alone=False):
    """The records that score(examples) gives, by shards of `size` (None = SHARD) in the manifest's order, each
    written whole; finished ones are read back. Several processes take them by turns (ranks.py), and all but the first
    end here, by Elsewhere; alone: the others do not come here."""
    size, (rank, count) = size or SHARD, (0, 1) if alone else ranks()
    shards = [(examples[start:start + size], folder / f"{start:07d}.jsonl") for start in range(0, len(examples), size)]
    for part, path in shards[rank::count]:
        if not path.exists():
            write_records(path, score(part))
        progress(len(part))
    if count > 1:
        wait()
    if rank:
        raise Elsewhere
    return [record for _, path in shards for record in read_records(path)]


def bad_record(example, error):
    """Of a clip that could not be used; error: the MediaError that it raised."""
    return {"id": example.id, "bad": error.reason, "detail": str(error)}


def read_traces(path):
    """The lines of a file of traces, {"id", "text", …}. Raises ValueError for one that is no trace."""
    records = read_records(Path(path))
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("id", "text")):
            raise ValueError(f"{path}: trace {number} needs an 'id' and a 'text', both strings")
    return records


def answers_beside(results):
    """The records of the answers.jsonl that Evaluate wrote beside this results.json."""
    return read_records(Path(results).with_name("answers.jsonl"))


def write_records(path, records):
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path):
    """The JSON lines that a stage wrote. Raises ValueError with file and line for one that is not JSON."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:  # after the last one; splitlines would also cut at U+2028 and the like, inside a string
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg}") from None
    return records


def count_bad(records, stage):
    """{reason: count} of the bad records. Raises ValueError when all are, or more than the stage's max_bad share."""
    bad = [record for record in records if "bad" in record]
    reasons = dict(Counter(record["bad"] for record in bad).most_common())
    if len(bad) > stage.max_bad * len(records) or len(bad) == len(records):
        raise ValueError(f"{stage.name}: {len(bad)} of {len(records)} clips are bad ({reasons}), with max_bad "
                         f"{stage.max_bad}; the first: {bad[0]['detail']}")
    return reasons
