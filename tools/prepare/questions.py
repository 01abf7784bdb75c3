"""Benchmarks that bring their own questions: checks each record and writes a manifest for each file."""
import re
from collections import Counter
from dataclasses import dataclass, field
from math import isfinite
from reprlib import repr as shortly

from minixmd.inputs.audio import WINDOW_S
from minixmd.inputs.examples import SPECIAL_TOKEN
from prepare.clip_checks import MAX_SECONDS, Row, check_clips, dropped
from prepare.manifests import ManifestWriter
from prepare.official_files import read_json_records
from prepare.option_sampling import MAX_OPTIONS

MAX_TEXT = 6_000  # bytes of a question and its options, so at most as many tokens; Qwen2-Audio takes 8,192 in all


class UnusableRecord(ValueError):
    """A record that cannot become a question: a reason, which is a phrase that can be counted, and a detail."""

    def __init__(self, reason, detail=""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass
class Question:
    """One question of an official file, complete but for its clip."""

    id: str
    clip: str  # name of its clip, which several questions may share
    file_names: tuple[str, ...]  # under which the clip may lie in the folder of clips; the first is the official one
    question: str
    options: list[str]
    answer: int  # index of the right option
    meta: dict
    oddities: list[str] = field(default_factory=list)  # faults of the record that were mended

    def __post_init__(self):
        if len(self.options) < 2:
            raise UnusableRecord("too few options", f"{len(self.options)}")
        if len(self.options) > MAX_OPTIONS:
            raise UnusableRecord("too many options", f"{len(self.options)}")
        size = len("".join([self.question, *self.options]).encode())
        if size > MAX_TEXT:
            raise UnusableRecord("too long to ask", f"{size} bytes, at most {MAX_TEXT}")


# ---- fields of a record ----


def as_text(value):
    """A string, number or boolean as text with single blanks; None if it is empty, cannot be written as UTF-8, or holds
    a special token."""
    if isinstance(value, float) and not isfinite(value) or not isinstance(value, str | int | float):
        return None
    text = " ".join(str(value).split())
    unusable = re.search(r"[\ud800-\udfff]", text) or SPECIAL_TOKEN.search(text)
    return text if text and not unusable else None


def text_field(record, name):
    """The string of this name, with single blanks."""
    text = as_text(record.get(name))
    if text is None or not isinstance(record[name], str):
        raise UnusableRecord(f"no {name}", shortly(record.get(name)))
    return text


def id_field(record, name):
    """The integer or short string of this name, as a string."""
    value = record.get(name)
    text = as_text(value) or ""
    if isinstance(value, bool) or not isinstance(value, int | str) or not 0 < len(text) <= 64:
        raise UnusableRecord(f"no {name}", shortly(value))
    return text


def options_field(record, name):
    """(options, oddities) of the list of this name; an option that is missing or not text is None."""
    options = record.get(name)
    if not isinstance(options, list) or not options:
        raise UnusableRecord("no options", shortly(options))
    texts, oddities = [as_text(option) for option in options], []
    if None in texts:
        oddities.append("option missing")
    if any(text is not None and not isinstance(option, str) for text, option in zip(texts, options, strict=True)):
        oddities.append("option not a string")
    present = [text.casefold() for text in texts if text is not None]
    if len(set(present)) < len(present):
        oddities.append("option repeated")
    return texts, oddities


def check_file_name(name):
    """Returns `name` if a file can be called so, inside one folder."""
    if not re.fullmatch(r"[^\x00-\x1f/\\]{1,200}", name) or len(name.encode()) > 200 or set(name) == {"."}:
        raise UnusableRecord("no name of a file", shortly(name))
    return name


# ---- a tool's whole work ----


def prepare_questions(args, source, keys, read, max_seconds=MAX_SECONDS, inputs=(), **more):
    """Writes a manifest for each file of questions, named by split_name.

    Args:
        args: of command_line.questions_parser. source: name of the data set.
        keys: fields of its records; a file in which no record has them all is another data set's.
        read: function(record, path) -> Question, or raises UnusableRecord.
        max_seconds: length of sound above which a clip is "too long".
        inputs: other files that were read, for their hashes. more: fields of summary.json.
    """
    splits = [split_name(path) for path in args.questions]
    records = []  # (Row, its Question or None) of every record
    clips = {}  # clip name -> the Row of its file
    for split, path in zip(splits, args.questions, strict=True):
        target = args.out / f"{split}.jsonl"
        if split == "drops" or splits.count(split) > 1 or path.resolve() == target.resolve():
            raise ValueError(f"{path}: {target}, its manifest, would be written over something else")
        records += _read_file(path, split, keys, read, clips)
    verdicts = {}
    for row, verdict in check_clips(clips.values(), args, len(clips), "opening clips", max_seconds):
        verdicts[row.id] = verdict
    oddities, groups = Counter(), {split: Counter() for split in splits}
    with ManifestWriter(args, source, splits) as writer:
        for row, question in records:
            verdict = verdicts[question.clip] if question else row.drop
            if "reason" in verdict:
                writer.drop(row, verdict)
                continue
            writer.keep(row.split, question.clip, verdict, id=question.id, question=question.question,
                        options=question.options, answer=question.answer, label=None, source=f"{source}/{row.split}",
                        meta=question.meta)
            oddities.update(question.oddities)
            groups[row.split][question.meta.get("group", "unknown")] += 1
    num_long = sum(verdict.get("seconds", 0) > WINDOW_S for verdict in verdicts.values())
    _print_counts(groups, Counter(row.split for row, _ in records))
    if oddities:
        print("odd and kept: " + ", ".join(f"{what} {number:,}" for what, number in oddities.most_common()))
    if num_long:
        print(f"longer than {WINDOW_S} s, of which Qwen2-Audio hears no more: {num_long:,} of {len(clips):,} clips")
    counts = {"groups": groups, "odd": oddities, "clips": len(clips), f"longer_than_{WINDOW_S}_s": num_long}
    writer.summarise([*args.questions, *inputs], **counts, **more)


def split_name(path):
    """train_qa.json -> train, avqa-test.json -> test, mmau-test-mini.json -> test-mini, MMAR-meta.json -> test."""
    return re.sub(r"^(avqa|mmau)-|_qa$", "", path.stem.replace("MMAR-meta", "test"))


def _read_file(path, split, keys, read, clips):
    """[(Row, Question or None)] of a file's records; the Rows of clips that are new are added to `clips`."""
    rows, ids, recognised = [], set(), False
    for number, (record, problem) in enumerate(read_json_records(path), 1):
        recognised |= isinstance(record, dict) and record.keys() >= set(keys)
        facts = {"record": number}
        try:
            question = _read_record(record, problem, path, read, ids)
            clip = clips.setdefault(question.clip, Row(question.clip, split, question.file_names, {}))
            if clip.file_names != question.file_names:
                raise UnusableRecord("another clip has its name", shortly(question.file_names))
        except UnusableRecord as error:
            rows.append((Row(f"{split} {number}", split, (), facts, dropped(error.reason, error.detail)), None))
            continue
        ids.add(question.id)
        rows.append((Row(question.id, split, (), facts | {"clip": question.clip}), question))
    if not recognised:
        raise ValueError(f"{path}: {len(rows)} records, and none has {', '.join(keys)}; is it the right file?")
    return rows


def _read_record(record, problem, path, read, ids):
    if problem is not None:
        raise UnusableRecord("not JSON", problem)
    if not isinstance(record, dict):
        raise UnusableRecord("not an object", shortly(record))
    question = read(record, path)
    if question.id in ids:
        raise UnusableRecord("repeated id", question.id)
    return question


def _print_counts(groups, num_records):
    for split, kept in groups.items():
        listed = ", ".join(f"{name} {number:,}" for name, number in sorted(kept.items()))
        print(f"{split}: {kept.total():,} of {num_records[split]:,} questions ({listed})")
