"""Example: one line of a manifest, and the conversation that asks its question."""
import json
import os
import re
import sys
import unicodedata
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated

from minixmd.runs.files import read_json, remembered
from minixmd.runs.records import numbered_records
from minixmd.runs.value_checks import check_fields

MEDIA_KINDS = {"audio": ("audio",), "video": ("video",), "both": ("video", "audio"), "sounded": ("video",), "none": ()}


@dataclass(frozen=True)
class Example:
    """Neutral facts about one clip and one question; what is shown and how it is asked belongs to the stage."""
    id: str
    audio: str | None  # path; in a manifest relative to it
    video: str | None
    question: str
    options: tuple[str, ...]
    answer: Annotated[int, ">= 0"] | None = None  # index of the right option
    label: str | None = None  # class name
    source: str | None = None  # data set and split it came from
    meta: dict = field(default_factory=dict)


NEEDED = ("id", "question", "options")  # of a line of a manifest
LINE = {f.name if f.name in NEEDED else f"{f.name}?": f.type for f in fields(Example)}  # as check_fields takes it
KNOWN = {f.name for f in fields(Example)}
META = {"video_question?": str, "group?": str | None}
SPECIAL_TOKEN = re.compile(r"<\|[^<>|\s]+\|>")  # a media token or another special one: no such text may reach a prompt
# as options are compared; clips share theirs
plain_text = lru_cache(1 << 14)(lambda option: " ".join(unicodedata.normalize("NFKC", option).split()))


def _check_line(record, place):
    """Raises ValueError, naming `place`, if a manifest's line is no Example."""
    if extra := sorted(record.keys() - KNOWN):
        raise ValueError(f"{place}: unknown field {extra[0]!r}; an example has {', '.join(sorted(KNOWN))}")
    check_fields(record, LINE, f"{place}:")
    options, answer, meta = record["options"], record.get("answer"), record.get("meta", {})
    check_fields(meta, META, f"{place}: field 'meta'")
    if not 2 <= len(options) <= 26 or answer is not None and answer >= len(options):
        raise ValueError(f"{place}: needs 2 to 26 'options' and as 'answer' the index of one, or null, got "
                         f"{len(options)} and {answer}")
    plain = [plain_text(option) for option in options]
    for option, text in zip(options, plain, strict=True):
        if not text or plain.count(text) > 1 and "sub_category" not in meta:  # MMAU's own are repeated
            raise ValueError(f"{place}: field 'options': {option!r} is empty or stands twice")
    for name, text in {**record, **meta}.items():
        if text == "" and name in ("id", "audio", "video", "question", "video_question", "group"):
            raise ValueError(f"{place}: field {name!r} is empty")
    if found := SPECIAL_TOKEN.search("\n".join([record["question"], *options, meta.get("video_question", "")])):
        raise ValueError(f"{place}: field 'question' or 'options' holds {found[0]}, which models take for a token")


def data_root(manifest):
    """The folder that holds all files of a manifest: the common parent of its own and, by the summary.json of
    tools/prepare_* beside it, of the clips'."""
    folder = os.path.realpath(Path(manifest).parent)
    try:
        clips = read_json(Path(folder, "summary.json"))["clips_folder"]
        return os.path.commonpath([folder, os.path.normpath(os.path.join(folder, clips))])
    except (OSError, ValueError, KeyError, TypeError):
        return folder


def read_manifest(path, allow_outside=False):
    """The Examples of a JSONL manifest, media paths made absolute; outside of data_root only where allow_outside says.
    Raises ValueError naming file, line and field: no example, a line that is none, a repeated id, a path outside."""
    return list(_read_manifest(path, allow_outside, data_root(path)))


@remembered(8)  # many stages read one manifest
def _read_manifest(path, allow_outside, root):
    folder = os.path.realpath(Path(path).parent)
    inside = os.path.join(root, "")  # how the paths of files in it begin
    examples, line_of = [], {}
    for number, record in numbered_records(path):
        _check_line(record, f"{path}:{number}")
        first = line_of.setdefault(record["id"], number)
        if first != number:
            raise ValueError(f"{path}:{number}: field 'id' {record['id']!r} already stands in line {first}")
        for kind in ("audio", "video"):
            if (name := record.setdefault(kind, None)) is not None:
                record[kind] = os.path.normpath(os.path.join(folder, name))
                if not allow_outside and not f"{record[kind]}/".startswith(inside):
                    raise ValueError(f"{path}:{number}: field {kind!r} {name!r} is outside of {root}; where that is "
                                     "meant, set allow_outside=True, or run prepare_* again")
        record["options"] = tuple(map(sys.intern, record["options"]))  # of all clips of a class the same
        examples.append(Example(**record))
    if not examples:
        raise ValueError(f"{path}: the manifest holds no example")
    return examples


def check_answers(examples, manifest, purpose):
    """Raises ValueError for the first example without an answer. purpose: what it is needed for, for the message."""
    for example in examples:
        if example.answer is None:
            raise ValueError(f"{manifest}: example {example.id!r} has no answer to {purpose}")


def manifest_text(examples):
    """JSON lines of Examples whose media paths are relative to where the text will be written."""
    return "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples)


def build_conversation(example, *, media, prompt, answer=None, trace="", video_options=None):
    """The conversation that shows `example` and asks its question, of a silent video alone meta's "video_question".

    media: "audio", "video", "both" (video first), or "sounded": the video and its own sound. prompt: format string over
    {question} {options} {first} {last} {trace}; options are lettered lines. answer: what the assistant turn gives, the
    index of an option or a text; None for no such turn. video_options: the video part's fps, min_pixels,
    max_pixels, nframes. Raises ValueError: the example lacks the medium."""
    content = []
    for kind in MEDIA_KINDS[media]:
        path = getattr(example, kind)
        if path is None:
            raise ValueError(f"example {example.id!r} has no {kind}")
        picture = video_options or {} if kind == "video" else {}
        sound = {"use_audio": True} if media == "sounded" else {}
        content.append({"type": kind, kind: path, **picture, **sound})
    letters = ascii_uppercase[: len(example.options)]
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, example.options, strict=True))
    question = example.meta.get("video_question", example.question) if media == "video" else example.question
    text = prompt.format(question=question, options=options, first=letters[0], last=letters[-1], trace=trace)
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer if isinstance(answer, str) else letters[answer]})
    return turns


def read_examples(stage, field="manifest"):
    """read_manifest's Examples of a stage's field. Raises ValueError also for the first that lacks what it shows."""
    manifest = getattr(stage, field)
    examples = read_manifest(manifest, stage.allow_outside)
    check_media(stage.name, manifest, getattr(stage, "media", "audio"), examples)
    return examples


def check_media(name, manifest, media, examples):
    """Raises ValueError for the first example that lacks what stage `name` shows."""
    for example in examples:
        for kind in MEDIA_KINDS[media]:
            if getattr(example, kind) is None:
                raise ValueError(f"{name}: {manifest}: example {example.id!r} has no {kind}")
