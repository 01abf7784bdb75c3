"""What the prepare_* tools for files of ready questions share: their records, clips and manifests."""
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from math import isfinite
from reprlib import repr as shortly

from clips import MAX_SECONDS, Row, judge
from prepare import LETTERS, Manifests, base_parser

from minixmd.inputs.audio import WINDOW_S

MAX_TEXT = 6_000  # bytes of a question and its options: tokens at most, and Qwen2-Audio takes 8,192 with the sound


class Unusable(ValueError):
    """What a record lacks: its reason (a phrase that can be counted) and detail are its args."""


@dataclass
class Question:
    """One question of an official file, ready but for its clip."""

    id: str
    clip: str  # name of its clip, which other questions may have too
    files: tuple[str, ...]  # that the clip may have in the folder of clips; the first is the official one
    question: str
    options: list[str]
    answer: int
    meta: dict
    odd: list[str] = field(default_factory=list)  # what is wrong with the record, and could be put up with

    def __post_init__(self):
        if not 2 <= len(self.options) <= LETTERS:
            raise Unusable(f"too {'few' if len(self.options) < 2 else 'many'} options", f"{len(self.options)}")
        if (size := len("".join([self.question, *self.options]).encode())) > MAX_TEXT:
            raise Unusable("too long to ask", f"{size} bytes, at most {MAX_TEXT}")


def text_of(record, name):
    """The string of this name, its white space made single blanks."""
    if (text := text_in(record.get(name))) is None or not isinstance(record[name], str):
        raise Unusable(f"no {name}", shortly(record.get(name)))
    return text


def id_of(record, name):
    """The integer or short string of this name, as a string."""
    id = record.get(name)
    if isinstance(id, bool) or not isinstance(id, int | str) or not 0 < len(text := text_in(id) or "") <= 64:
        raise Unusable(f"no {name}", shortly(id))
    return text


def clip_of(name):
    """`name` (str), if a file can be called so."""
    if not re.fullmatch(r"[^\x00-\x1f/\\]{1,200}", name) or len(name.encode()) > 200 or set(name) == {"."}:
        raise Unusable("no name of a file", shortly(name))
    return name


def options_of(record, name):
    """(options, what is odd) of the list of this name; an option that is missing or no text is None."""
    if not isinstance(options := record.get(name), list) or not options:
        raise Unusable("no options", shortly(options))
    texts = [text_in(option) for option in options]
    odd = {"option missing": None in texts,
           "option not a string": any(text is not None and not isinstance(option, str)
                                      for text, option in zip(texts, options, strict=True)),
           "option repeated": len({text.casefold() for text in texts if text}) < len(texts) - texts.count(None)}
    return texts, [what for what in odd if odd[what]]


def text_in(value):
    """The words of a string, number or boolean; None where there are none, or they cannot be written as UTF-8."""
    if isinstance(value, float) and not isfinite(value) or not isinstance(value, str | int | float):
        return None
    text = " ".join(str(value).split())
    return text if text and not re.search(r"[\ud800-\udfff]", text) else None


def read_records(path):
    """Yield what a JSON list holds, or each line of a file of JSON lines: Unusable for a line that is none.

    Raises:
        ValueError: it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] == "[":
            yield from json.loads(text)
            return
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    for line in text.split("\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Unusable("not JSON", str(error))


def prepare_questions(args, source, keys, read, max_seconds=MAX_SECONDS, inputs=(), **more):
    """The whole of a tool for files of questions: a manifest for each, named by split_of.

    Args:
        args: those of questions_parser. source: name of the data set.
        keys: that its records have; a file without a record that has them all is another data set's.
        read: function(record, path) -> Question, or raises Unusable. max_seconds: of sound, that a clip may last.
        inputs: other files that were read, for their hashes. more: of summary.json.
    """
    rows, wanted = [], {}  # every record's Row and Question; the Row of every clip
    splits = [split_of(path) for path in args.questions]
    for split, path in zip(splits, args.questions, strict=True):
        if split == "drops" or splits.count(split) > 1 or path.resolve() == (args.out / f"{split}.jsonl").resolve():
            raise ValueError(f"{path}: {args.out / split}.jsonl, its manifest, would be written over something else")
        rows += _rows(path, split, keys, read, wanted)
    judged = judge(wanted.values(), args, len(wanted), "opening clips", max_seconds)
    verdicts = {row.id: verdict for row, verdict in judged}
    odd, groups = Counter(), {split: Counter() for split in splits}
    with Manifests(args, source, splits) as manifests:
        for row, question in rows:
            verdict = verdicts[question.clip] if question else dict(zip(("reason", "detail"), row.drop, strict=True))
            if "reason" in verdict:
                manifests.drop(row, verdict)
                continue
            manifests.write(row.split, question.clip, verdict, id=question.id, question=question.question,
                            options=question.options, answer=question.answer, label=None,
                            source=f"{source}/{row.split}", meta=question.meta)
            odd.update(question.odd)
            groups[row.split][question.meta.get("group", "unknown")] += 1
    long = sum(verdict.get("seconds", 0) > WINDOW_S for verdict in verdicts.values())
    for split, kept in groups.items():
        print(f"{split}: {kept.total():,} of {sum(row.split == split for row, _ in rows):,} questions ("
              + ", ".join(f"{name} {number:,}" for name, number in sorted(kept.items())) + ")")
    if odd:
        print("odd and kept: " + ", ".join(f"{what} {number:,}" for what, number in odd.most_common()))
    if long:
        print(f"longer than {WINDOW_S} s, of which Qwen2-Audio hears no more: {long:,} of {len(wanted):,} clips")
    manifests.tell([*args.questions, *inputs], groups=groups, odd=odd, clips=len(wanted),
                   **{f"longer_than_{WINDOW_S}_s": long}, **more)


def split_of(path):
    """train_qa.json -> train, avqa-test.json -> test, mmau-test-mini.json -> test-mini."""
    return re.sub(r"^(avqa|mmau)-|_qa$", "", path.stem)


def _rows(path, split, keys, read, wanted):
    """[(Row, Question or None)] of a file's records; the Rows of clips that are not in `wanted` yet are added to it."""
    rows, ids, right = [], set(), False
    for number, record in enumerate(read_records(path), 1):
        try:
            if isinstance(record, Unusable):
                raise record
            if not isinstance(record, dict):
                raise Unusable("not an object", shortly(record))
            right |= record.keys() >= set(keys)
            question = read(record, path)
            if question.id in ids:
                raise Unusable("repeated id", question.id)
            clip = wanted.setdefault(question.clip, Row(question.clip, split, question.files, {}))
            if clip.names != question.files:
                raise Unusable("another clip has its name", shortly(question.files))
            ids.add(question.id)
            rows.append((Row(question.id, split, (), {"record": number, "clip": question.clip}), question))
        except Unusable as error:
            rows.append((Row(f"{split} {number}", split, (), {"record": number}, error.args), None))
    if not right:
        raise ValueError(f"{path}: {len(rows)} records, and none has {', '.join(keys)}; is it the right file?")
    return rows


def questions_parser(tool, doc, questions_help):
    return base_parser(tool, doc, "questions", metavar="QUESTIONS", nargs="+", help=questions_help)
