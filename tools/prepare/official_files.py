"""Reads official files as they are published: csv, lists of names, JSON lists and JSON lines."""
import csv
import json
from array import array
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"  # lists that ship with the tools
YOUTUBE_ID = r"[A-Za-z0-9_-]{11}"


def read_csv(path, columns):
    """Yields ("file:line", fields) for the rows of a csv file; empty lines and lines that begin with "# " are skipped.

    Raises:
        ValueError: another number of columns, broken quotes, or not text. The message begins with "file:line".
    """
    with open(path, encoding="utf-8-sig", newline="") as file:  # newline="": the csv module itself handles CRLF
        rows = csv.reader(file, skipinitialspace=True, strict=True)
        try:
            for fields in rows:
                if not fields or fields[0].startswith("# "):  # a spreadsheet writes #NAME? for an id that begins with -
                    continue
                if len(fields) != columns:
                    got = ",".join(fields)[:60]
                    raise ValueError(f"{columns} columns are expected, got {len(fields)}: {got!r}")
                yield f"{path}:{rows.line_num}", fields
        except (csv.Error, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"{path}:{rows.line_num}: {error}") from None


def read_list(path):
    """Yields ("file:line", text) for the lines of a text file; empty lines and those that begin with # are skipped."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                line = line.strip()
                if line and not line.startswith("#"):
                    yield f"{path}:{number}", line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: no text: {error}") from None


def read_json_records(path):
    """Yields (record, None) for the items of a JSON list or the lines of a JSONL file.

    A line that is not JSON yields (None, what is wrong with it).

    Raises:
        ValueError: the file is not text, or begins as a list and is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] == "[":
            for record in json.loads(text):
                yield record, None
            return
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            record, problem = json.loads(line), None
        except (ValueError, RecursionError) as error:
            record, problem = None, str(error)
        yield record, problem


class RepeatedIds:
    """Recognises an id that comes a second time, in 8 bytes an id.

    All ids are added first; then `is_repeat` is asked for each, in order, as often as the rows are read.
    """

    def __init__(self):
        self.hashes, self.suspects, self.seen = array("q"), set(), set()

    def add(self, id):
        self.hashes.append(hash(id))

    def start_pass(self):
        """Before each pass over the rows."""
        hashes = np.sort(np.frombuffer(self.hashes, np.int64))
        self.suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())  # repeated ids, and some that share a hash
        self.seen = set()

    def is_repeat(self, id):
        if hash(id) not in self.suspects:
            return False
        repeated = id in self.seen
        self.seen.add(id)
        return repeated
