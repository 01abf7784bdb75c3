"""Every JSONL file of a run: how its lines are written, read back and checked.

    labels.jsonl       Label      {"id", "answer", "option", "logits", "top"?}
    answers.jsonl      Evaluate   {"id", "answer", "right", "question", …}
    samples.jsonl      Traces     {"id", "samples": [{"text", "finished", "answer", "use"}]}
    traces.jsonl       Traces, FactCheck   {"id", "sample", "text", "answer", "option", "unanimous"}
    verdicts.jsonl     FactCheck  {"id", "sample", "score", "accepted"}
    switch.jsonl       Switch     {"id", "p_teacher", "oracle"?}
    endpoint.jsonl     what a server answered   {"key", "text", "finished", "top"?}
    log.jsonl, completions.jsonl   training

A clip that cannot be used has the record {"id", "bad": reason, "detail"} in any of the first six.
"""
import codecs
import json
import os
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from minixmd.runs.files import write_text

TYPE_NAMES = {str: "a string", int: "an int", float: "a float", bool: "true or false"}


def write_jsonl(path, records):
    """Replaces a file by one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def append_jsonl(path, record, sync=False):
    """Appends one line. sync: wait until it is on disk."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:  # a full disk's own error names no file
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def read_jsonl(path, own=False):
    """The records of numbered_records."""
    return [record for _, record in numbered_records(path, own)]


def numbered_records(path, own=False):
    """Yields (line number, object) of a JSONL file, UTF-8 with or without a mark; blank lines are passed over. own: the
    file is one to which this program appends: a blank line is an error, and a last line without its end, which a kill
    left behind, is passed over. Raises ValueError, with file and line, for a line that is not a JSON object."""
    data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    if own:
        data = data[:data.rfind(b"\n") + 1]
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], 1):
        if not own and not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or brackets in brackets without an end
            raise ValueError(f"{path}:{number}: not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: must be a JSON object, got {type(record).__name__}")
        yield number, record


def drop_torn_line(path, consequence=""):
    """Cuts off a last line without its end, which a kill left behind. stderr says so, with the consequence."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
        tqdm.write(f"{path}: dropped the last line, cut short after {len(data) - whole} bytes{consequence}",
                   file=sys.stderr)


def check_record(record, kinds, where):
    """Raises ValueError for a record that lacks a field or has one of another type. kinds: {field: types}."""
    for name, types in kinds.items():
        if type(record.get(name)) not in types:
            wanted = " or ".join(TYPE_NAMES[kind] for kind in types)
            raise ValueError(f"{where} needs {name!r}, {wanted}, got {record.get(name)!r}")


def read_by_id(path):
    """{id: record} of labels or a switch's decisions."""
    found = {}
    for number, record in numbered_records(path):
        check_record(record, {"id": (str,)}, f"{path}:{number}:")
        found[record["id"]] = record
    return found


def read_traces(path):
    """The lines of a file of traces, {"id", "text", …}."""
    records = read_jsonl(path)
    for number, record in enumerate(records, 1):
        check_record(record, {"id": (str,), "text": (str,)}, f"{path}: trace {number}")
    return records


def read_verdicts(path, needs_accepted=False):
    """{(clip id, sample): record} of a FactCheck stage's verdicts."""
    found = {}
    for number, record in enumerate(read_jsonl(path), 1):
        kinds = {"id": (str,), "sample": (int,)}
        if "bad" in record:
            kinds |= {"bad": (str,), "detail": (str,)}
        else:
            kinds |= {"score": (float, int)} | ({"accepted": (bool,)} if needs_accepted else {})
        check_record(record, kinds, f"{path}: not the verdicts of a FactCheck stage: record {number}")
        found[record["id"], record["sample"]] = record
    return found


def read_endpoint_answers(path):
    """{key: record} of endpoint.jsonl; empty if there is none. A torn last line is dropped if the others are good."""
    found = {}
    for number, record in numbered_records(path, own=True) if path.exists() else ():
        kinds = {"key": (str,), "text": (str,), "finished": (bool,)}
        check_record(record, kinds, f"{path}:{number}: not an answer of an endpoint: it")
        if record["key"] in found:
            raise ValueError(f"{path}:{number}: {record['key']!r} is answered for the second time")
        found[record["key"]] = record
    drop_torn_line(path, "; it is asked again")
    return found


def answers_beside(results):
    """The records of the answers.jsonl that Evaluate wrote beside this results.json."""
    return read_jsonl(Path(results).with_name("answers.jsonl"))


def bad_record(example, error):
    """The record of an Example whose clip raised this MediaError."""
    return {"id": example.id, "bad": error.reason, "detail": str(error)}


def count_bad(records, name, max_bad):
    """{reason: count} of a stage's bad records. Raises ValueError when all are, or more than the share max_bad."""
    bad = [record for record in records if "bad" in record]
    reasons = dict(Counter(record["bad"] for record in bad).most_common())
    if len(bad) > max_bad * len(records) or len(bad) == len(records):
        raise ValueError(f"{name}: {len(bad)} of {len(records)} clips are bad ({reasons}), with max_bad {max_bad}; "
                         f"the first: {bad[0]['detail']}")
    return reasons
