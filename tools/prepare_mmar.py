"""MMAR's json file and a folder of its sounds to a manifest.

    python tools/prepare_mmar.py MMAR-meta.json clips data/mmar

Stopped and started again, it goes on where it was. CLIPS holds the folder audio, or is it. MMAR-meta.jsonl is read as
well; the reasoning in it is not copied. Evaluate scores the answers by rule="mmau", from which MMAR's own is derived.
Every example's meta has the hash of its file, and `version`, so that accuracies on different ones are not compared.
"""
import sys
from hashlib import sha256
from math import inf

from prepare.command_line import questions_parser, run_tool
from prepare.questions import as_text, prepare_questions, text_field
from prepare_mmau import question_of

KEYS = ("audio_path", "choices", "modality", "category")
META = {"modality": "modality", "category": "category", "sub_category": "sub-category"}
ORIGIN = ("language", "source", "url", "timestamp")  # may be null


def read_question(record, sha):
    """The Question of a record. sha: SHA-256 of its file."""
    meta = {name: text_field(record, key) for name, key in META.items()}
    meta |= {name: as_text(record.get(name)) for name in ORIGIN}
    meta |= {"version": f"sha256 {sha[:12]}", "sha256": sha, "group": meta["modality"]}
    return question_of(record, "audio_path", meta)


def prepare(args):
    hashes = {}
    for path in args.questions:
        sha = hashes[path] = sha256(path.read_bytes()).hexdigest()
        print(f"{path}: sha256 {sha}; accuracies compare on the same file only")
    prepare_questions(args, "mmar", KEYS, lambda record, path: read_question(record, hashes[path]), max_seconds=inf)


def main(argv=None):
    parser = questions_parser("prepare_mmar", __doc__, "MMAR-meta.json")
    return run_tool("prepare_mmar", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
