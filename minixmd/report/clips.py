"""The clips that stage Report shows: which of them, what was said of each, and their media."""
import os
from collections import Counter
from pathlib import Path

from minixmd.inputs.examples import read_manifest
from minixmd.report.cards import MIME
from minixmd.report.charts import ROLES
from minixmd.runs.records import answers_beside, read_jsonl, read_traces
from minixmd.tasks.statistics import digest

CLIPS = 4  # shown of a kind
KINDS = {  # title of a kind of clip -> who was right: the teacher (None: no matter), the student before, after
    "Learnt from the teacher: the teacher was right, the student wrong before and right after": (True, False, True),
    "Forgotten: the student was right before and is wrong after": (None, True, False),
    "Not learnt: the student was wrong before and is wrong after": (None, False, False),
}


def clips(stage, folder, answers):
    """`chosen` of KINDS; answers: {role: records}."""
    def of(wanted):
        return lambda example, records: all(want in (None, records[role]["right"])
                                            for role, want in zip(ROLES, wanted, strict=True))

    return chosen(stage, folder, answers, {title: of(wanted) for title, wanted in KINDS.items()})


def gallery(stage, folder):
    """`chosen` by the answers of the rows in stage.gallery and by the verdicts on the teacher's traces, which stand in
    "traces" of each clip. Of what sounded nothing is known here: a wrong trace can only be told by its answer."""
    cells = {**stage.tables, **(stage.ablation or {})}
    answers = {row: answers_beside(cells[row][stage.clips_of]) for row in stage.gallery}
    traces = judged(stage) if stage.traces else {}
    first, last, kinds = stage.gallery[0], stage.gallery[-1], {}

    def changed(before):
        return lambda example, records: records[first]["right"] is before and records[last]["right"] is not before

    def told(verdict, rights=(True, False, None)):
        return lambda example, records: any(
            trace["verdict"] == verdict and is_right(trace, example.options[example.answer]) in rights
            for trace in traces.get(example.id, ()))

    if first != last:
        kinds = {f"Learnt: {first} is wrong, {last} is right": changed(False),
                 f"Lost: {first} is right, {last} is wrong": changed(True)}
    if stage.verdicts:
        kinds |= {"A trace was rejected": told("rejected"),
                  "A trace was accepted that gives a wrong answer": told("accepted", (False,))}
    found, embedded = chosen(stage, folder, answers, kinds)
    for kind in found["kinds"]:
        for clip in kind["clips"]:
            clip["traces"] = [{**trace, "right": is_right(trace, clip["right"])}
                              for trace in traces.get(clip["id"], ())]
    return found, embedded


def is_right(trace, right):
    """Whether a trace ends in the right option; None where the file does not say in which."""
    return None if trace["option"] is None else trace["option"] == right


def judged(stage):
    """{clip: its traces in the file's order, each with the "verdict" on it: "accepted", "rejected", "not judged" or why
    it could not be, and the score}.

    Raises:
        ValueError: no trace is of a clip in the manifest; no verdicts of a FactCheck stage, or on other traces.
    """
    found = {}
    for trace in read_traces(stage.traces):
        clip = found.setdefault(trace["id"], {})
        sample = trace.get("sample", len(clip))  # as FactCheck numbers them where the file does not
        clip[sample] = {"sample": sample, "text": trace["text"], "option": trace.get("option"), "verdict": "not judged"}
    if not any(example.id in found for example in read_manifest(stage.clips)):
        raise ValueError(f"{stage.name}: {stage.traces} holds no trace of a clip in {stage.clips}")
    if stage.verdicts:
        read_verdicts(stage, found)
    return {clip: list(traces.values()) for clip, traces in found.items()}


def read_verdicts(stage, traces):
    """Adds the verdicts to `traces`, {clip: {sample: trace}}."""
    for number, verdict in enumerate(read_jsonl(Path(stage.verdicts)), 1):
        if not isinstance(verdict, dict) or not any({"id", "sample", *keys} <= set(verdict)
                                                    for keys in (("bad",), ("score", "accepted"))):
            raise ValueError(f"{stage.verdicts}: not the verdicts of a FactCheck stage: record {number} needs 'id', "
                             "'sample' and either 'score' and 'accepted' or 'bad'")
        trace = traces.get(verdict["id"], {}).get(verdict["sample"])
        if trace is None:
            raise ValueError(f"{stage.verdicts}: judges sample {verdict['sample']} of {verdict['id']!r}, which is not "
                             f"in {stage.traces}")
        if "bad" in verdict:
            trace["verdict"] = f"could not be judged: {verdict['bad']}"
        else:
            trace |= {"verdict": "accepted" if verdict["accepted"] else "rejected", "score": verdict["score"]}
    accepted = Path(stage.verdicts).with_name("traces.jsonl")  # FactCheck left there what it accepted, word for word
    for trace in read_traces(accepted) if accepted.exists() else ():
        if traces.get(trace["id"], {}).get(trace.get("sample"), trace)["text"] != trace["text"]:
            raise ValueError(f"{stage.verdicts}: sample {trace['sample']} of {trace['id']!r} was judged with other "
                             f"words than it has in {stage.traces}")


def chosen(stage, folder, answers, kinds):
    """({"kinds", …}, {path as the page writes it: bytes}): up to CLIPS clips of each kind, the first of each class in
    the manifest's order, then the second of each, …, one that stands in an earlier kind last; and the media that fit
    into embed_mib, in the page's order.

    Args:
        answers: {row: the records of its answers.jsonl}. kinds: {title: function(example, {row: record}) -> bool}.
    """
    examples = read_manifest(stage.clips)
    by_id = {row: {record["id"]: record for record in records} for row, records in answers.items()}
    read, embedded, found, taken = [], {}, [], set()
    for example in examples:
        records = {row: by_id[row].get(example.id) for row in by_id}
        if any(record is None or record["question"] != digest(example) for record in records.values()):
            raise ValueError(f"{stage.clips}: clip {example.id!r} was not asked so in column {stage.clips_of!r}")
        if not any("bad" in record for record in records.values()):
            read.append((example, records))
    for title, belongs in kinds.items():
        fit, seen = [], Counter()
        for example, records in read:
            if belongs(example, records):
                fit.append((example.id in taken, seen[example.label], len(fit), example, records))
                seen[example.label] += 1
        shown = [{"id": example.id, "question": example.question, "options": example.options,
                  "right": example.options[example.answer], "media": media(stage, folder, example, embedded),
                  "answers": {row: {name: record[name] for name in ("option", "right", "text") if name in record}
                              for row, record in records.items()}}
                 for *_, example, records in sorted(fit, key=lambda each: each[:3])[:CLIPS]]
        taken |= {clip["id"] for clip in shown}
        found.append({"title": title, "count": len(fit), "clips": shown})
    return {"column": stage.clips_of, "of": len(examples), "kinds": found, "embed_mib": stage.embed_mib}, embedded


def media(stage, folder, example, embedded):
    """A clip's files as the page names them; those that still fit are added to `embedded`."""
    found, files = [], {"video": example.video, "audio": example.audio}
    for kind, file in ({"both": example.video} if example.audio == example.video else files).items():
        if file is None:
            continue
        path = Path(os.path.relpath(file, folder)).as_posix()
        size = os.path.getsize(file) if os.path.isfile(file) else None
        left = int(stage.embed_mib * 2**20) - sum(map(len, embedded.values()))
        if path not in embedded and size is not None and size <= left and Path(file).suffix.lower() in MIME:
            embedded[path] = Path(file).read_bytes()
        found.append({"kind": kind, "path": path, "bytes": size, "embedded": path in embedded})
    return found
