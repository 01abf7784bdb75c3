"""Example: one line of a manifest, and the conversation that asks its question."""
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from string import ascii_uppercase


@dataclass(frozen=True)
class Example:
    """Neutral facts about one clip and one question; what is shown and how it is asked belongs to the stage."""

    id: str
    audio: str | None  # path; in a manifest relative to it
    video: str | None
    question: str
    options: tuple[str, ...]
    answer: int | None = None  # index of the right option
    label: str | None = None  # class name
    source: str | None = None  # data set and split it came from
    meta: dict = field(default_factory=dict)


def _example(line, where):
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a manifest line must be a JSON object, got {type(record).__name__}")
    names = {f.name for f in fields(Example)}
    if extra := sorted(set(record) - names):
        raise ValueError(f"{where}: unknown field {extra[0]!r}; an example has {', '.join(sorted(names))}")
    if missing := [name for name in ("id", "question", "options") if name not in record]:
        raise ValueError(f"{where}: field {missing[0]!r} is missing")
    for name in ("id", "question"):
        if not isinstance(record[name], str) or not record[name]:
            raise ValueError(f"{where}: field {name!r} must be a non-empty string, got {record[name]!r}")
    for name in ("audio", "video"):
        if not isinstance(record.setdefault(name, None), str | None):
            raise ValueError(f"{where}: field {name!r} must be a path or null, got {record[name]!r}")
    options, answer = record["options"], record.get("answer")
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options) or not 2 <= len(options) <= 26:
        raise ValueError(f"{where}: field 'options' must be a list of 2 to 26 strings, got {options!r}")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(options)):
        raise ValueError(f"{where}: field 'answer' must be null or an index below {len(options)}, got {answer!r}")
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise ValueError(f"{where}: field 'meta' must be an object, got {meta!r}")
    if not isinstance(asked := meta.get("video_question", record["question"]), str) or not asked:
        raise ValueError(f"{where}: field 'meta': 'video_question' must be a non-empty string, got {asked!r}")
    return Example(**{**record, "options": tuple(options)})


def read_manifest(path):
    """The Examples of a JSONL manifest, media paths made absolute.

    Raises:
        ValueError: a line that is not an example (file, line and field are named), a repeated id, or no example at all.
        OSError: the file cannot be read.
    """
    path = Path(path)
    examples, seen = [], {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            example = _example(line, where)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error.msg}") from None
        if example.id in seen:
            raise ValueError(f"{where}: field 'id' {example.id!r} already stands in line {seen[example.id]}")
        seen[example.id] = number
        near = {name: str(path.parent.absolute() / clip) for name in ("audio", "video")
                if (clip := getattr(example, name)) is not None}
        examples.append(Example(**{**vars(example), **near}))
    if not examples:
        raise ValueError(f"{path}: the manifest holds no example")
    return examples


def manifest_text(examples):
    """JSON lines of Examples whose media paths are relative to where the text will be written."""
    return "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples)


def build_conversation(example, *, media, prompt, answer=None, trace="", video_options=None):
    """The conversation that shows `example` and asks its question: meta's "video_question", if there is one, where the
    video is shown alone and silent.

    Args:
        media: "audio", "video", "both" (video first), or "sounded": the video and its own sound track.
        prompt: format string over {question} {options} {first} {last} {trace}; options are lettered lines.
        trace: what stands at {trace}.
        answer: what the assistant turn gives, the index of an option or a text; None for no such turn.
        video_options: the video part's fps, min_pixels, max_pixels, nframes.
    Raises:
        ValueError: the example lacks the medium.
    """
    content = []
    for kind in ("video", "audio"):
        if media in (kind, "both") or (media == "sounded" and kind == "video"):
            path = getattr(example, kind)
            if path is None:
                raise ValueError(f"example {example.id!r} has no {kind}")
            content.append({"type": kind, kind: path, **((video_options or {}) if kind == "video" else {})})
            if media == "sounded":
                content[-1]["use_audio"] = True
    letters = ascii_uppercase[: len(example.options)]
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, example.options, strict=True))
    question = example.meta.get("video_question", example.question) if media == "video" else example.question
    text = prompt.format(question=question, options=options, first=letters[0], last=letters[-1], trace=trace)
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer if isinstance(answer, str) else letters[answer]})
    return turns


def check_media(name, manifest, examples, media):
    """Raises ValueError for the first of a manifest's examples that lacks what stage `name` shows."""
    kinds = {"both": ("video", "audio"), "sounded": ("video",)}.get(media, (media,))
    for example in examples:
        for kind in kinds:
            if getattr(example, kind) is None:
                raise ValueError(f"{name}: {manifest}: example {example.id!r} has no {kind}")
