"""The clips that a report shows: which ones, what was answered on each, the teacher's traces, and their media."""
import os
from base64 import b64encode
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from minixmd.inputs.contained import Contained
from minixmd.inputs.media import MediaError, read_audio, read_frames
from minixmd.runs.records import read_traces, read_verdicts
from minixmd.tasks.statistics import digest

MIME_TYPES = {  # of the media files that a page can hold and play
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".m4a": "audio/mp4",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/webm",
}
CLIPS_PER_KIND = 4


class Kind(NamedTuple):
    """A kind of clip: on which rows are right and wrong, and which have a trace like this one."""
    title: str
    rights: dict  # row or role -> whether it is right; a row that is not here may be either
    trace: dict = {}  # what one of the clip's traces must hold; {} = nothing


ROLE_KINDS = [
    Kind("Learnt from the teacher: the teacher was right, the student wrong before and right after",
         {"teacher": True, "before": False, "after": True}),
    Kind("Forgotten: the student was right before and is wrong after", {"before": True, "after": False}),
    Kind("Not learnt: the student was wrong before and is wrong after", {"before": False, "after": False}),
]


def gallery_kinds(first, last, judged):
    """Kinds by the answers of two rows, unless they are one, and, if `judged`, by the verdicts on traces."""
    kinds = []
    if first != last:
        kinds += [Kind(f"Learnt: {first} is wrong, {last} is right", {first: False, last: True}),
                  Kind(f"Lost: {first} is right, {last} is wrong", {first: True, last: False})]
    if judged:  # what really sounded is not known, so a trace is wrong only where its answer is
        kinds += [Kind("A trace was rejected", {}, {"verdict": "rejected"}),
                  Kind("A trace was accepted that gives a wrong answer", {}, {"verdict": "accepted", "right": False})]
    return kinds


def decodes(path, kind):
    """True for a file that can be read as "audio", "video" or "both"; raises MediaError for another."""
    if kind != "video":
        read_audio(path, max_s=1.0)
    if kind != "audio":
        read_frames(path)
    return True


class Media:
    """The media files of the clips shown: data URIs while they fit into the page's limit_mib and decode, else links."""

    def __init__(self, folder, limit_mib):
        self.folder = folder  # of the page
        self.bytes_left = int(limit_mib * 2**20)
        self.data_uris = {}  # path as the page writes it -> the file

    def add(self, example):
        """[{"kind": "video" | "audio" | "both", "path", "bytes": size or None, "embedded"}] of an Example's files."""
        kinds = {"video": example.video, "audio": example.audio}
        if example.audio == example.video:
            kinds = {"both": example.video}
        files = []
        for kind, file in kinds.items():
            if file is None:
                continue
            path = Path(os.path.relpath(file, self.folder)).as_posix()
            size = os.path.getsize(file) if os.path.isfile(file) else None
            mime_type = MIME_TYPES.get(Path(file).suffix.lower())
            fits = mime_type and size is not None and size <= self.bytes_left
            if path not in self.data_uris and fits and self._decodes(file, kind):
                self.data_uris[path] = f"data:{mime_type};base64,{b64encode(Path(file).read_bytes()).decode()}"
                self.bytes_left -= size
            files.append({"kind": kind, "path": path, "bytes": size, "embedded": path in self.data_uris})
        return files

    def _decodes(self, file, kind):
        contained = Contained(decodes)
        try:
            return contained(file, kind)
        except MediaError:
            return False
        finally:
            contained.stop()


def answered_clips(examples, answers, traces, manifest, column):
    """[(example, what report.json holds of it but for its media)] of the examples that all rows could read. ValueError:
    a row did not answer one, or another question about it. answers: {row: records of its answers.jsonl}."""
    by_id = {row: {record["id"]: record for record in records} for row, records in answers.items()}
    clips = []
    for example in examples:
        right = example.options[example.answer]
        clip = {"id": example.id, "question": example.question,
                "options": example.options, "right": right,
                "media": [], "answers": {}}
        for row, records in by_id.items():
            record = records.get(example.id)
            if record is None or record["question"] != digest(example):
                raise ValueError(f"{manifest}: clip {example.id!r} was not asked so in column {column!r}")
            if "bad" not in record:
                clip["answers"][row] = {name: record[name] for name in ("option", "right", "text") if name in record}
        if traces is not None:
            clip["traces"] = []
            for trace in traces.get(example.id, ()):
                is_right = None if trace["option"] is None else trace["option"] == right
                clip["traces"].append({**trace, "right": is_right})
        if len(clip["answers"]) == len(answers):
            clips.append((example, clip))
    return clips


def show(kinds, answered, media):
    """Up to CLIPS_PER_KIND clips of each kind: each class's first, then its second, …; those shown before come last."""
    shown_before, sections = set(), []
    for kind in kinds:
        number_in_class, clips, shown = Counter(), [], []
        for example, clip in answered:
            rights = {row: answer["right"] for row, answer in clip["answers"].items()}
            traces = clip["traces"] if kind.trace else [{}]
            is_traced = any(kind.trace.items() <= trace.items() for trace in traces)
            if is_traced and kind.rights.items() <= rights.items():
                clips.append((example.id in shown_before, number_in_class[example.label], example, clip))
                number_in_class[example.label] += 1
        for _, _, example, clip in sorted(clips, key=itemgetter(0, 1))[:CLIPS_PER_KIND]:
            shown.append({**clip, "media": media.add(example)})
            shown_before.add(example.id)
        sections.append({"title": kind.title, "count": len(clips), "clips": shown})
    return sections


def read_judged_traces(traces_path, verdicts_path):
    """{clip: [{"sample", "text", "option", "verdict"} and, if judged, "score"]} of a file of traces. verdict:
    "accepted", "rejected", "not judged", or why not. ValueError: no FactCheck stage's verdicts, or on other traces."""
    traces = {}
    for trace in read_traces(traces_path):
        samples = traces.setdefault(trace["id"], {})
        sample = trace.get("sample", len(samples))  # FactCheck numbers them so where the file does not
        samples[sample] = {"sample": sample, "text": trace["text"], "option": trace.get("option"),
                           "verdict": "not judged"}
    verdicts = read_verdicts(verdicts_path, needs_accepted=True) if verdicts_path else {}
    for (clip, sample), verdict in verdicts.items():
        trace = traces.get(clip, {}).get(sample)
        if trace is None:
            raise ValueError(f"{verdicts_path}: judges sample {sample} of {clip!r}, which is not "
                             f"in {traces_path}")
        if "bad" in verdict:
            trace["verdict"] = f"could not be judged: {verdict['bad']}"
        else:
            trace["verdict"] = "accepted" if verdict["accepted"] else "rejected"
            trace["score"] = verdict["score"]
    accepted_path = verdicts_path and Path(verdicts_path).with_name("traces.jsonl")  # what FactCheck accepted
    for judged in read_traces(accepted_path) if accepted_path and accepted_path.exists() else ():
        trace = traces.get(judged["id"], {}).get(judged.get("sample"), judged)
        if trace["text"] != judged["text"]:
            raise ValueError(f"{verdicts_path}: sample {judged['sample']} of {judged['id']!r} was judged with other "
                             f"words than it has in {traces_path}")
    return {clip: list(samples.values()) for clip, samples in traces.items()}
