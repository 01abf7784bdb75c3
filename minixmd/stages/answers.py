"""Stage Answers: what people or another system answered, as the results that Evaluate gives.

Another system's file has a line a question: {"id", "answer": index or text of an option, or null}, {"id", "text": what
it wrote}, or {"id", "bad": why it could not be asked}, as tools/answers_of.py writes them. People's answers are a
folder with a file a participant, as the page of tools/listening_test.py makes it."""
import json
from collections import Counter
from pathlib import Path

from minixmd.inputs.examples import check_answers, read_manifest
from minixmd.runs.files import read_json
from minixmd.runs.records import BAD, numbered_records
from minixmd.runs.value_checks import check_fields
from minixmd.stages.evaluate import collect, describe_benchmark
from minixmd.stages.multiple_choice import read_texts
from minixmd.tasks.statistics import digest

TRIAL = {"id": str, "condition": str, "question": str, "answer": int, "ms": int, "replays": int}
PARTICIPANT = {"listening_test": int, "test": str, "participant": int, "finished": str | None,
               "trials": tuple[TRIAL, ...], "checksum": str}  # fmt: skip
NOT_ANSWERED = {"bad": "not answered", "detail": "no answer to this question"}


def run(stage, folder, log):
    examples = read_manifest(stage.manifest, stage.allow_outside)
    check_answers(examples, stage.manifest, "compare with")
    records, sessions = read(stage, examples)
    asked = {"file": stage.file, "manifest": stage.manifest, "rule": stage.rule}
    if sessions:
        asked |= {"condition": stage.condition, "sessions": sessions}
    collect(stage, folder, log, examples, records, asked, describe_benchmark(stage, examples))


def read(stage, examples):
    """(a record an example, participants who {"finished", "stopped"}, or None). Raises as the functions below."""
    if Path(stage.file).is_dir() != (stage.condition is not None):
        raise ValueError(f"{stage.name}: file {stage.file!r} with condition {stage.condition!r}: a folder of "
                         "participants' files needs one, another system's file none")
    by_id = {example.id: example for example in examples}
    found, sessions = read_trials(stage, by_id) if stage.condition else (read_answers(stage, by_id), None)
    return [found.get(example.id, {"id": example.id, **NOT_ANSWERED}) for example in examples], sessions


def read_answers(stage, by_id):
    """{id of an Example: its record} of another system's file. Raises ValueError for a line that answers none of them,
    or one again, or by no option."""
    found = {}
    for number, line in numbered_records(stage.file):
        where = f"{stage.file}:{number}:"
        check_fields(line, BAD if "bad" in line else {"id": str}, where)
        example = by_id.get(line["id"])
        if example is None or example.id in found:
            why = "is not in " + stage.manifest if example is None else "already stands in an earlier line"
            raise ValueError(f"{where} {line['id']!r} {why}")
        found[example.id] = record = {"id": example.id}
        if "bad" in line:
            record.update(bad=line["bad"], detail=line.get("detail", ""))
        elif "answer" in line:
            index = option_index(line["answer"], example, where)
            record.update(answer=index, option=None if index is None else example.options[index])
        else:
            check_fields(line, {"text": str, "finished?": bool}, where)
            read_texts(record, example, [(line["text"], line.get("finished", True))], stage.rule, stage.letters)
    return found


def option_index(answer, example, where):
    """The index of an option, given as such or by its text; None for no answer."""
    if answer is None or type(answer) is int and 0 <= answer < len(example.options):
        return answer
    if answer not in example.options:
        raise ValueError(f"{where} {answer!r} is none of the {len(example.options)} options of {example.id!r}")
    return example.options.index(answer)


def read_trials(stage, by_id):
    """({id of an Example: its record}, how many {"finished", "stopped"}) of a folder of participants' files. Raises
    ValueError: a file was changed, is of another test or a participant's second one; or two answered a question."""
    sessions = Counter(finished=0, stopped=0)
    found = {}
    files = {}  # number of a participant -> the file
    test = None  # which all files are of
    for path in sorted(Path(stage.file).iterdir()):
        if path.suffix not in (".json", ".txt"):
            continue
        session = read_json(path)
        check_fields(session, PARTICIPANT, f"{path}: not a participant's file: it")
        if session["checksum"] != checksum(session):
            raise ValueError(f"{path}: was changed or cut since the page made it; ask the participant to send it again")
        number = session["participant"]
        if number in files:
            raise ValueError(f"{path}: participant {number} has a file already, {files[number]}; keep one of the two")
        if files and session["test"] != test:
            raise ValueError(f"{path}: of another test than the files before it")
        files[number], test = path, session["test"]
        sessions["finished" if session["finished"] else "stopped"] += 1
        for trial in session["trials"]:
            example = by_id.get(trial["id"])
            if example is None or digest(example) != trial["question"]:
                raise ValueError(f"{path}: {trial['id']!r} was asked otherwise, or not at all, in {stage.manifest}: "
                                 "take the manifest.jsonl beside the test's page")
            if trial["condition"] != stage.condition:
                continue
            if example.id in found:
                raise ValueError(f"{path}: {example.id!r} was answered by participant "
                                 f"{found[example.id]['participant']} too")
            index = option_index(trial["answer"], example, f"{path}:")
            found[example.id] = {"id": example.id, "answer": index, "option": example.options[index],
                                 "participant": number, "ms": trial["ms"], "replays": trial["replays"]}
    if not found:
        raise ValueError(f"{stage.name}: {stage.file} holds no participant's answer by {stage.condition!r}")
    return found, dict(sessions)


def checksum(session):
    rest = {name: value for name, value in session.items() if name != "checksum"}
    return fnv_1a(json.dumps(rest, separators=(",", ":"), ensure_ascii=False).encode())


def fnv_1a(data):
    """FNV-1a, 32 bits, as 8 hex digits: Fowler, Noll, Vo."""
    value = 0x811C9DC5
    for byte in data:
        value = (value ^ byte) * 0x01000193 % 2**32
    return f"{value:08x}"
