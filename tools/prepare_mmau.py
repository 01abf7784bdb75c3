"""MMAU's json file and a folder of its sounds to a manifest.

    python tools/prepare_mmau.py mmau-test-mini.json clips data/mmau

Stopped and started again, it goes on where it was. CLIPS holds test-mini-audios, or is it. Questions and options stay
as they are but for stray blanks, repeated options included. The file changed under one version number: every example's
meta has the hash of the one it came from, and `version`, so that accuracies on different ones are not compared.
"""
import sys
from hashlib import sha256
from math import inf
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from prepare import run_tool  # noqa: E402
from questions import (  # noqa: E402
    Question,
    Unusable,
    clip_of,
    id_of,
    options_of,
    prepare_questions,
    questions_parser,
    text_of,
)

KEYS = ("audio_id", "choices", "task")
META = {"task": "task", "difficulty": "difficulty", "sub_category": "sub-category", "dataset": "dataset"}
KNOWN = {"9f18fda99f8dbc2bc5ecd6323fb5063309f54969810b5c6f1caeb3b8d904cf1c": "v05.15.25 of 2025-08-09"}


def reader(args):
    """The function that reads a record, with its file's hash."""
    sums = {path: sha256(path.read_bytes()).hexdigest() for path in args.questions}

    def read(record, path):
        texts, odd = options_of(record, "choices")
        options, right = [text for text in texts if text], text_of(record, "answer")
        if right not in options:
            raise Unusable("answer not among the options", right[:60])
        sound = PurePosixPath(text_of(record, "audio_id"))
        files = tuple(dict.fromkeys(["/".join(map(clip_of, sound.parts)), sound.name]))
        category = record.get("category")  # a list in 13 records
        meta = {**{name: text_of(record, key) for name, key in META.items()},
                "category": category[0] if isinstance(category, list) and len(category) == 1 else category,
                "version": KNOWN.get(sums[path], f"sha256 {sums[path][:12]}"), "sha256": sums[path]}
        meta["category"] = text_of(meta, "category")
        return Question(id_of(record, "id"), clip_of(sound.stem), files, text_of(record, "question"), options,
                        options.index(right), {**meta, "group": meta["task"]}, odd)

    return read, sums


def prepare(args):
    read, sums = reader(args)
    for path, sha in sums.items():
        print(f"{path}: " + KNOWN.get(sha, "not a version that we know; accuracies compare on the same file only")
              + f", sha256 {sha}")
    prepare_questions(args, "mmau", KEYS, read, max_seconds=inf)


def main(argv=None):
    parser = questions_parser("prepare_mmau", __doc__, "mmau-test-mini.json")
    return run_tool("prepare_mmau", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
