"""What a training stage learns: which target each example has, and whose it is."""
from collections import Counter
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch

from minixmd.config import GRPO, SFT, Distill, OnPolicy
from minixmd.inputs.batch import Prompt
from minixmd.inputs.examples import SPECIAL_TOKEN, Example, check_answers, check_media
from minixmd.inputs.tokenizer import common_vocab_size
from minixmd.runs.records import read_decisions, read_labels, read_traces
from minixmd.runs.seeds import shuffled

TRACE_FILTERS = {"all": (None, None), "first": ("sample", 0), "unanimous": ("unanimous", True)}  # field, its value
GATE_FIELDS = {"learned": "p_teacher", "oracle": "oracle"}  # gate -> what it reads of a clip in switch.jsonl


@dataclass(frozen=True)
class Item:
    example: Example
    target: int | str  # index of an option, or a text; GRPO rewards it instead of learning to write it
    source: str  # whose it is: "manifest" | "teacher" | "student" | "trace"
    teacher_topk: dict | None = None  # of a distillation KL: the teacher's best ids, as Label or Traces stores them
    ids: list[int] | None = None  # of a trace with them: the tokens that its teacher wrote, learnt as they are
    # of OnPolicy
    shown: Example | None = None  # what the teacher is shown; None = it is silent
    teacher_prompt: Prompt | None = None  # made of that
    texts: tuple[str, ...] = ()  # what the teacher wrote of the clip, in place of a rollout


def resolve_targets(stage, examples):
    """The Items of a training stage, and {reason: count} of whose they are and what was left out.

    SFT learns the manifest's own answers or a teacher's traces; GRPO is rewarded for the manifest's or the teacher's
    answers; Distill learns what the gate says (label_items).

    No Items at all where a gate leaves every clip out. Raises ValueError: an example without an answer, labels,
    decisions or traces of other clips, labels without stored logits, or nothing else left to learn."""
    if isinstance(stage, SFT) and stage.traces is not None:
        items, counts = trace_items(examples, stage.manifest, stage.traces, stage.trace_filter,
                                    stage.teacher_loss == "kl")
    elif isinstance(stage, SFT) or isinstance(stage, GRPO) and stage.teacher_labels is None:
        check_answers(examples, stage.manifest, "learn from")
        items = [Item(example, example.answer, "manifest") for example in examples]
        counts = Counter(manifest=len(items))
    else:
        items, counts = label_items(stage, examples)
    if isinstance(stage, OnPolicy):
        items, more = taught_items(stage, examples, items)
        counts = counts + more
    if not items and not counts["left out: switch open"]:
        raise ValueError(f"{stage.name}: no clip is left to learn from ({dict(counts)})")
    return items, dict(counts)


def label_items(stage, examples):
    """The labels of the teacher. In a distillation the gate decides clip by clip whose label is the target. Where it
    does not send a clip to the teacher, the target is the student's own earlier letter, which keeps what the student
    knew (the anti-forgetting loss); without the student's letters such a clip is left out."""
    distills = isinstance(stage, Distill)
    paths = {"teacher": stage.teacher_labels, "student": stage.student_labels if distills else None}
    labels = {source: read_labels(path) for source, path in paths.items() if path}
    to_teacher = follows_teacher(stage, examples) if distills else {}
    items, counts = [], Counter()
    for example in examples:
        source = "teacher" if to_teacher.get(example.id, True) else "student"
        if source not in labels:
            counts["left out: switch open"] += 1
            continue
        record = labels[source].get(example.id)
        if record is None:
            raise ValueError(f"{paths[source]}: no label for example {example.id!r} of {stage.manifest}")
        if "bad" in record:
            counts[f"left out: {record['bad']}"] += 1
            continue
        option = record["option"]
        if option not in example.options:
            raise ValueError(f"the {source}'s label of {example.id!r} is {option!r}, not among its options: the labels "
                             f"were made from another manifest than {stage.manifest}")
        topk = None
        if distills and source == "teacher" and stage.teacher_loss != "ce":
            topk = record.get("top")
            if topk is None or topk["temperature"] != stage.temperature:
                raise ValueError(f"{stage.name}: teacher_loss {stage.teacher_loss!r} at temperature "
                                 f"{stage.temperature} needs labels made with top_k, at that temperature: "
                                 f"{stage.teacher_labels}")
        items.append(Item(example, example.options.index(option), source, topk))
        counts[source] += 1
    return items, counts


def taught_items(stage, examples, items):
    """The Items of an OnPolicy stage with what its teacher is shown where the gate lets it speak, and with its texts,
    in turns until there are group_size, where those are learnt from. Returns them and {reason: count}."""
    texts, counts = {}, Counter()
    if stage.traces is not None:
        found, counts = trace_items(examples, stage.manifest, stage.traces, "all")
        for trace in found:
            texts.setdefault(trace.example.id, []).append(trace.target)
        items = [item for item in items if item.example.id in texts]
    if stage.teacher_weight:
        check_media(stage.name, stage.manifest, stage.teacher_format.media, examples)
    shown = {example.id: example for example in examples}
    if stage.teacher_media == "shuffled":
        shown = other_videos(stage, examples)
    speaks = follows_teacher(stage, examples)
    taught = []
    for item in items:
        own = None
        if stage.teacher_weight and speaks[item.example.id]:
            own = shown[item.example.id]
        repeated = islice(cycle(texts.get(item.example.id, ())), stage.group_size)
        taught.append(replace(item, shown=own, texts=tuple(repeated)))
    silent = sum(item.shown is None for item in taught)
    counts += Counter({"with a teacher": len(taught) - silent, "without a teacher": silent})
    return taught, counts


def other_videos(stage, examples):
    """{example id: the Example with the video of another one}: all videos, shuffled by seed, move on by one place."""
    videos = shuffled(list({example.video: None for example in examples}), stage.seed, "other videos")
    if len(videos) < 2:
        raise ValueError(f"{stage.name}: teacher_media 'shuffled' needs two videos at least, got {len(videos)}")
    after = dict(zip(videos, videos[1:] + videos[:1], strict=True))
    return {example.id: replace(example, video=after[example.video]) for example in examples}


def follows_teacher(stage, examples):
    """{example id: whether XMD's gate sends the clip to the teacher}. "learned" and "oracle" do where the switch's
    p_teacher, or the true class's, is at least 0.5; "always" and "never" need no switch. Raises ValueError for a
    switch.jsonl that has no decision that this gate reads, or none on an example."""
    if stage.gate not in GATE_FIELDS:
        return {example.id: stage.gate == "always" for example in examples}
    field, decisions = GATE_FIELDS[stage.gate], read_decisions(stage.switch)
    if not any(field in record for record in decisions.values()):
        raise ValueError(f"{stage.switch}: no clip has the {field!r} that gate {stage.gate!r} goes by")
    follows = {}
    for example in examples:
        if example.id not in decisions:
            raise ValueError(f"{stage.switch}: no decision on example {example.id!r} of {stage.manifest}")
        follows[example.id] = decisions[example.id].get(field, 0.0) >= 0.5
    return follows


def trace_items(examples, manifest, traces_path, trace_filter, with_topk=False):
    """A teacher's traces: an example of n of them stands n times, in their order; one without is left out. A trace need
    not have the form of a thought and an answer, but holds no special token and no second answer. with_topk: whether
    the Items have the teacher's tokens and best ids."""
    field, wanted = TRACE_FILTERS[trace_filter]
    by_id = {example.id: example for example in examples}
    items, left_out = [], Counter()
    for number, record in enumerate(read_traces(traces_path), 1):
        if record["id"] not in by_id:
            raise ValueError(f"{traces_path}: trace {number} is of {record['id']!r}, which is not in {manifest}")
        if field and field not in record:
            raise ValueError(f"{traces_path}: trace {number} has no {field!r}, by which {trace_filter!r} goes")
        if record.get(field) != wanted:
            left_out[f"traces that are not {trace_filter}"] += 1
        elif SPECIAL_TOKEN.search(record["text"]):
            left_out["traces left out: special token"] += 1
        elif record["text"].count("<answer>") > 1:
            left_out["traces left out: several answers"] += 1
        elif with_topk and "top" not in record:
            raise ValueError(f"{traces_path}: trace {number} has no 'top', which teacher_loss 'kl' needs: make traces "
                             "with top_k")
        else:
            stored = (record["top"], record["ids"]) if with_topk else ()
            items.append(Item(by_id[record["id"]], record["text"], "trace", *stored))
    without = len(examples) - len({item.example.id for item in items})
    counts = Counter({"traces": len(items), "left out: no trace": without})
    return items, counts + left_out  # a sum leaves out what counts 0


def distilled_vocabulary(stage, processor):
    """How many ids from 0 on student and teacher share, by the tokenizer.json beside what the teacher left, and a
    tensor of those that the student never writes, which the KL leaves out."""
    stored = stage.traces if isinstance(stage, SFT) else stage.teacher_labels
    return common_vocab_size(processor, Path(stored).parent), torch.tensor(processor.suppressed_ids)


def stored_rows(topk, common_vocab, suppressed_Z, count=None):
    """The teacher's best ids at K = `count` tokens, None = one of each clip, as kernels/distill_topk.py takes them:
    (id_KJ, logq_KJ, tail_K, dropped_K). Ids outside the common vocabulary are taken out and the rest is normalised
    again; in the tail they cannot be told."""
    ids, logq = [], []
    for stored in topk:
        ids.append(torch.tensor(stored["ids"], dtype=torch.int32))
        if "logprobs" in stored:
            logq.append(torch.tensor(stored["logprobs"], dtype=torch.float64))
        else:
            logits = torch.tensor(stored["logits"], dtype=torch.float64)
            logq.append(logits / stored["temperature"] - stored["logsumexp"])
    shape = count or len(topk), -1
    id_KJ = torch.cat(ids).view(shape)
    logq_KJ = torch.cat(logq).view(shape).float()
    tail_K = (1 - logq_KJ.exp().sum(-1)).clamp(min=0)
    outside_KJ = (id_KJ >= common_vocab) | torch.isin(id_KJ, suppressed_Z)
    dropped_K = logq_KJ.exp().where(outside_KJ, 0).sum(-1)
    kept_K = (1 - dropped_K).clamp(min=1e-6)  # logprobs are rounded: it may be 0 where little is left
    id_KJ = id_KJ.masked_fill(outside_KJ, -1)
    logq_KJ = logq_KJ - kept_K.log()[:, None]
    return id_KJ, logq_KJ, tail_K / kept_K, dropped_K
