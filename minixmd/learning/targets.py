"""What a Train stage learns: which answer, of whom, to each example."""
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from minixmd.inputs.examples import read_manifest
from minixmd.stages.multiple_choice import check_media, read_records, read_traces

TAG = re.compile(r"<\|[^<>|\s]+\|>")  # a media token or another special one: no such text may reach a prompt


def sources(stage, examples):
    """Which answer each training example learns: the manifest's own or every trace of it (SFT), the teacher's or the
    student's (distill). In GRPO none is given: the example's, from the manifest or the teacher, is what is rewarded.

    In distillation the gate decides a clip: closed (p_teacher >= 0.5), the teacher's letter or its stored logits are
    the target; open, the student's own earlier letter is, which keeps what it knew (the anti-forgetting loss). Without
    the student's letters an open clip is left out. The manifest's answers are not read.

    Returns:
        ([(example, answer: an index, a text or None, the teacher's best ids or None)], {reason: count} of what stands
        where and what was left out).
    Raises:
        ValueError: an example without the answer that is to be learnt or without what is shown, labels, decisions or
            traces of other clips, labels without stored logits, or nothing left to learn.
    """
    check_media(stage.name, stage.manifest, examples, stage.media)
    if stage.val_manifest is not None:
        check_media(stage.name, stage.val_manifest, read_manifest(stage.val_manifest), stage.media)
    if stage.traces is not None:
        return traced(stage, examples)
    given = stage.objective != "grpo"
    if stage.objective == "sft" or not given and stage.teacher_labels is None:
        if missing := next((e for e in examples if e.answer is None), None):
            raise ValueError(f"{stage.manifest}: example {missing.id!r} has no answer to learn from")
        return [(e, e.answer if given else None, None) for e in examples], {"manifest": len(examples)}
    teacher, student, switch = (_by_id(path) if path else {} for path in (stage.teacher_labels, stage.student_labels,
                                                                          stage.switch))
    looked_up = {"learned": "p_teacher", "oracle": "oracle"}.get(stage.gate)
    if looked_up and not any(looked_up in record for record in switch.values()):
        raise ValueError(f"{stage.switch}: no clip has the {looked_up!r} that gate {stage.gate!r} goes by")
    chosen, counts = [], Counter()
    for e in examples:
        if looked_up and e.id not in switch:
            raise ValueError(f"{stage.switch}: no decision on example {e.id!r} of {stage.manifest}")
        to_teacher = switch[e.id].get(looked_up, 0.0) >= 0.5 if looked_up else stage.gate == "always"
        path, labels = (stage.teacher_labels, teacher) if to_teacher else (stage.student_labels, student)
        if path and e.id not in labels:
            raise ValueError(f"{path}: no label for example {e.id!r} of {stage.manifest}")
        record = labels[e.id] if path else {"bad": "switch open"}
        source = "teacher" if to_teacher else "student"
        if "bad" in record:
            counts[f"left out: {record['bad']}"] += 1
        elif record.get("option") not in e.options:
            raise ValueError(f"the {source}'s label of {e.id!r} is {record.get('option')!r}, not among its options: "
                             f"the labels were made from another manifest than {stage.manifest}")
        else:
            by_logits = to_teacher and stage.teacher_loss != "ce"
            top = record.get("top") if by_logits else None
            if by_logits and (top is None or top["temperature"] != stage.temperature):
                raise ValueError(f"{stage.name}: teacher_loss {stage.teacher_loss!r} at temperature "
                                 f"{stage.temperature} needs labels made with top_k, at that temperature: "
                                 f"{stage.teacher_labels}")
            answer = e.options.index(record["option"])
            chosen.append((e, answer, top) if given else (replace(e, answer=answer), None, None))
            counts[source] += 1
    if not chosen:
        raise ValueError(f"{stage.name}: no clip is left to learn from ({dict(counts)})")
    return chosen, dict(counts)


def traced(stage, examples):
    """As sources, for the traces that `which` names: an example of n of them stands n times, in their order, one
    without is left out. First traces are those with "sample" 0, unanimous ones those with "unanimous" true. A trace
    need not have the form of a thought and an answer, but holds no special token and no second answer."""
    by_id, chosen, passed = {e.id: e for e in examples}, [], Counter()
    for number, record in enumerate(read_traces(stage.traces), 1):
        if record["id"] not in by_id:
            raise ValueError(f"{stage.traces}: trace {number} is of {record['id']!r}, which is not in {stage.manifest}")
        field, wanted = {"all": (None, None), "first": ("sample", 0), "unanimous": ("unanimous", True)}[stage.trace_filter]
        if field and field not in record:
            raise ValueError(f"{stage.traces}: trace {number} has no {field!r}, by which {stage.trace_filter!r} goes")
        if record.get(field) != wanted:
            passed[f"traces that are not {stage.trace_filter}"] += 1
        elif TAG.search(record["text"]):
            passed["traces left out: special token"] += 1
        elif record["text"].count("<answer>") > 1:
            passed["traces left out: several answers"] += 1
        else:
            chosen.append((by_id[record["id"]], record["text"], None))
    if not chosen:
        raise ValueError(f"{stage.name}: {stage.traces} holds no trace to learn from"
                         + (f" ({dict(passed)})" if passed else ""))
    without = len(examples) - len({e.id for e, *_ in chosen})
    return chosen, {"traces": len(chosen), **({"left out: no trace": without} if without else {}), **passed}


def _by_id(path):
    found = {}
    for number, record in enumerate(read_records(Path(path)), 1):
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise ValueError(f"{path}:{number}: needs an 'id', a string")
        found[record["id"]] = record
    return found
