"""MMAU's json file and a folder of its sounds to a manifest.

    python tools/prepare_mmau.py mmau-test-mini.json clips data/mmau

Stopped and started again, it goes on where it was. CLIPS holds test-mini-audios, or is it. Questions and options stay
as they are but for stray blanks, repeated options included. The file changed under one version number: every example's
meta has the hash of the one it came from, and `version`, so that accuracies on different ones are not compared.
"""
import sys
from hashlib import sha256
from math import inf
from pathlib import PurePosixPath

from prepare.command_line import questions_parser, run_tool
from prepare.questions import (
    Question,
    UnusableRecord,
    check_file_name,
    id_field,
    options_field,
    prepare_questions,
    text_field,
)

KEYS = ("audio_id", "choices", "task")
META = {"task": "task", "difficulty": "difficulty", "sub_category": "sub-category", "dataset": "dataset"}
KNOWN_VERSIONS = {  # sha256 of the file -> its version
    "9f18fda99f8dbc2bc5ecd6323fb5063309f54969810b5c6f1caeb3b8d904cf1c": "v05.15.25 of 2025-08-09",
}


def read_question(record, sha):
    """The Question of a record. sha: SHA-256 of its file."""
    meta = {name: text_field(record, key) for name, key in META.items()}
    category = record.get("category")
    if isinstance(category, list) and len(category) == 1:  # so in 13 records
        category = category[0]
    meta["category"] = text_field({"category": category}, "category")
    meta["version"] = KNOWN_VERSIONS.get(sha, f"sha256 {sha[:12]}")
    meta["sha256"] = sha
    meta["group"] = meta["task"]
    return question_of(record, "audio_id", meta)


def question_of(record, sound_field, meta):
    """The Question of a record of MMAU or of another set in its form. sound_field: name of the field with the sound's
    path."""
    texts, oddities = options_field(record, "choices")
    options, right = [text for text in texts if text], text_field(record, "answer")
    if right not in options:
        raise UnusableRecord("answer not among the options", right[:60])
    sound = PurePosixPath(text_field(record, sound_field))
    path = "/".join(check_file_name(part) for part in sound.parts)
    return Question(id_field(record, "id"), check_file_name(sound.stem), tuple(dict.fromkeys([path, sound.name])),
                    text_field(record, "question"), options, options.index(right), meta, oddities)


def prepare(args):
    hashes = {}
    for path in args.questions:
        sha = hashes[path] = sha256(path.read_bytes()).hexdigest()
        version = KNOWN_VERSIONS.get(sha, "not a version that we know; accuracies compare on the same file only")
        print(f"{path}: {version}, sha256 {sha}")
    prepare_questions(args, "mmau", KEYS, lambda record, path: read_question(record, hashes[path]), max_seconds=inf)


def main(argv=None):
    parser = questions_parser("prepare_mmau", __doc__, "mmau-test-mini.json")
    return run_tool("prepare_mmau", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
