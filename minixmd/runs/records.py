"""Every JSONL file of a run: what a line holds, and how lines are written, read back and checked.

    labels.jsonl     of Label and Traces: LABEL       verdicts.jsonl   of FactCheck: VERDICT
    answers.jsonl    of Evaluate: ANSWER              switch.jsonl     of Switch: DECISION
    traces.jsonl     of Traces and FactCheck: TRACE   endpoint.jsonl   of a server: ENDPOINT_ANSWER
    samples.jsonl    of Traces: {"id", "samples": [{"text", "finished", "answer", "use"}]}
    log.jsonl        of training                      completions.jsonl   of GRPO and OnPolicy: SCORED

A clip that cannot be used has the record BAD in any of them but the last three. Lines may have other fields, too.
"""
import json
import os
import sys
from array import array
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from minixmd.runs.files import parse_json, remembered, write_bytes
from minixmd.runs.value_checks import check_fields

Share = Annotated[float, ">= 0", "<= 1"]
BAD = {"id": str, "bad": str, "detail?": str}  # the reason, and what was wrong with the file
TOPK = {"temperature": Annotated[float, "> 0"], "logsumexp": float, "ids": tuple[int, ...], "logits": tuple[float, ...]}
LABEL = {"id": str, "option": str, "top?": TOPK}
ANSWER = {"id": str, "question": str, "answer": Annotated[int, ">= 0"] | None, "right": bool}
TRACE = {"id": str, "text": str, "sample?": int, "option?": str | None, "unanimous?": bool, "ids?": tuple[int, ...],
         "top?": {"ids": tuple[int, ...], "logprobs": tuple[float, ...]}}
VERDICT = {"id": str, "sample": int, "score": float, "accepted?": bool}
BAD_VERDICT = {"id": str, "sample": int, "bad": str, "detail": str}
DECISION = {"id": str, "p_teacher?": Share, "oracle?": Share}
LogP = Annotated[float, "<= 0.001"]  # 0 but for rounding
SCORED = {"step": int, "id": str, "reward": float, "teacher?": tuple[tuple[str, LogP, LogP, str, LogP], ...]}
ENDPOINT_ANSWER = {"key": str, "text": str, "finished": bool}
ARRAYS = {"ids": "i", "logits": "d", "logprobs": "d"}  # fields of "top", with the type of their numbers


def write_jsonl(path, records):
    """Replaces a file by one JSON object a line, atomically."""
    texts = (json.dumps(record, ensure_ascii=False, default=list) for record in records)  # default: of arrays
    write_bytes(path, (f"{text}\n".encode() for text in texts))


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


def read_jsonl(path):
    """The records of numbered_records."""
    return [record for _, record in numbered_records(path)]


def numbered_records(path):
    """Yields (line number, object) of a JSONL file, UTF-8 with or without a mark; blank lines are passed over. Raises
    ValueError, with file and line, for a line that is not a JSON object."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError as error:
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


def read_records(path, kind, bad=BAD, key=None):
    """Yields the lines of a file, each checked to have the fields of a kind, such as LABEL, or of `bad` where it has
    "bad". key: fields of which no two records may have the same values, such as "id sample"."""
    line_of = {}
    for number, record in numbered_records(path):
        check_fields(record, bad if "bad" in record else kind, f"{path}:{number}:")
        if key:
            value = itemgetter(*key.split())(record)
            if line_of.setdefault(value, number) != number:
                raise ValueError(f"{path}:{number}: {value!r} already stands in line {line_of[value]}")
        yield record


def compact(record):
    """A record with its best ids and their numbers, or its samples', in arrays: a quarter of the memory of lists."""
    for holder in (record, *record.get("samples", ())):
        top = holder.get("top", {})
        for name in top.keys() & ARRAYS:
            top[name] = array(ARRAYS[name], top[name])
    return record


@remembered(2)
def read_labels(path):
    """{clip id: its "bad", or "option" and "top"} of labels, which all store as many of the teacher's best ids."""
    found, sizes = {}, set()
    for record in read_records(path, LABEL, key="id"):
        if top := record.get("top"):
            sizes |= {len(top["ids"]), len(top["logits"])}
            if not top["ids"] or min(top["ids"]) < 0 or max(top["ids"]) >= 2**31:
                raise ValueError(f"{path}: 'top' of {record['id']!r} must hold ids from 0 to 2**31 - 1")
        record = compact(record)
        found[record["id"]] = {name: record[name] for name in ("bad", "option", "top") if name in record}
    if len(sizes) > 1:
        raise ValueError(f"{path}: 'top' must hold as many ids and logits in every line, got {sorted(sizes)}")
    return found


def read_traces(path):
    """Yields the records of traces. One with "top" has the "ids" that its teacher sampled and, in "top", a row of the
    teacher's best ids and one of their log-probabilities for each, row after row, of one width in all the file."""
    width = None
    for record in read_records(path, TRACE):
        if "top" in record and "bad" not in record:
            top = record["top"]
            sampled, ids, logprobs = record.get("ids", ()), top["ids"], top["logprobs"]
            width = width or len(ids) // max(len(sampled), 1)
            if not (sampled and 1 <= width <= 64 and len(ids) == len(logprobs) == width * len(sampled)):
                raise ValueError(f"{path}: 'top' of {record['id']!r} must hold 1 to 64 ids and logprobs for each of "
                                 f"its {len(sampled)} 'ids', as in other lines, got {len(ids)} and {len(logprobs)}")
            if min(*sampled, *ids) < 0 or max(*sampled, *ids) >= 2**31 or max(logprobs) > 0:
                raise ValueError(f"{path}: {record['id']!r} must hold ids from 0 to 2**31 - 1, and logprobs up to 0")
            compact(record)
        yield record


@remembered(2)
def read_decisions(path):
    """{clip id: record} of a switch's decisions."""
    return {record["id"]: record for record in read_records(path, DECISION, key="id")}


def read_verdicts(path, needs_accepted=False):
    """{(clip id, sample): record} of a FactCheck stage's verdicts."""
    found = {}
    for record in read_records(path, VERDICT, bad=BAD_VERDICT, key="id sample"):
        if needs_accepted and "bad" not in record and "accepted" not in record:
            raise ValueError(f"{path}: the verdict on sample {record['sample']} of {record['id']!r} has no 'accepted'")
        found[record["id"], record["sample"]] = record
    return found


def read_endpoint_answers(path):
    """{key: record} of endpoint.jsonl; empty if there is none. A torn last line is dropped first."""
    drop_torn_line(path, "; it is asked again")
    records = read_records(path, ENDPOINT_ANSWER, key="key") if path.exists() else ()
    return {record["key"]: record for record in records}


def answers_beside(results):
    """The records of the answers.jsonl that Evaluate wrote beside this results.json."""
    return list(read_records(Path(results).with_name("answers.jsonl"), ANSWER))


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
