"""JSONL files: what each reader refuses and in which words; and the shards that several processes share."""
import json
from functools import partial
from types import SimpleNamespace

import pytest

from minixmd.inputs.media import MediaError
from minixmd.runs import distributed, records
from minixmd.runs.distributed import compute_shards
from minixmd.runs.records import (
    append_jsonl,
    bad_record,
    count_bad,
    read_decisions,
    read_endpoint_answers,
    read_jsonl,
    read_labels,
    read_records,
    read_verdicts,
    write_jsonl,
)

read_accepted = partial(read_verdicts, needs_accepted=True)


def read_traces(path):
    return list(read_records(path, records.TRACE))




# ---- what each reader takes and refuses ----

LABEL = {"id": "a", "option": "dog"}
TOP = {"temperature": 1, "logsumexp": 0.5, "ids": [3], "logits": [0.1]}
TRACE = {"id": "a", "text": "<think>x</think>"}
VERDICT = {"id": "a", "sample": 0, "score": 1.5, "accepted": True}
BAD_VERDICT = {"id": "a", "sample": 1, "bad": "missing", "detail": "a.wav: missing"}
ANSWER = {"key": "k", "text": "A", "finished": True}
NOT_VERDICTS = "file:2: needs "
NO_DECISION = "file:2: needs "
NO_ANSWER = "file:2: needs "


@pytest.mark.parametrize("reader, good, second, said", [
    *((reader, good, second, said) for reader, good in (
        (read_jsonl, LABEL), (read_labels, LABEL), (read_traces, TRACE), (read_verdicts, VERDICT),
        (read_endpoint_answers, ANSWER)) for second, said in (
        ("{", "file:2: not JSON: Expecting property name enclosed in double quotes"),
        ("[1]", "file:2: must be a JSON object, got list"), ("7", "file:2: must be a JSON object, got int"),
        ("null", "file:2: must be a JSON object, got NoneType"))),
    (read_labels, LABEL, {"option": "dog"}, "file:2: needs 'id', a str"),
    (read_labels, LABEL, {"id": 7}, "file:2: needs 'id', a str, got 7"),
    (read_labels, LABEL, LABEL, "file:2: 'a' already stands in line 1"),
    (read_labels, LABEL, {"id": "b", "bad": 3}, "file:2: needs 'bad', a str, got 3"),
    (read_labels, LABEL, {"id": "b", "option": "x", "top": {"ids": [1]}},
     "file:2: field 'top' needs 'temperature', a float"),
    (read_labels, LABEL, {"id": "b", "option": "x", "top": TOP | {"ids": [-1]}},
     "file: 'top' of 'b' must hold ids from 0 to 2**31 - 1"),
    (read_labels, LABEL, {"id": "b", "option": "x", "top": TOP | {"ids": [1, 2]}},
     "file: 'top' must hold as many ids and logits in every line, got [1, 2]"),
    (read_decisions, {"id": "a"}, {"id": "b", "p_teacher": 5}, NO_DECISION + "'p_teacher', <= 1, got 5"),
    (read_decisions, {"id": "a"}, {"id": "b", "p_teacher": None}, NO_DECISION + "'p_teacher', a float, got None"),
    (read_decisions, {"id": "a"}, {"id": "b", "oracle": float("nan")}, NO_DECISION + "'oracle', a float, got nan"),
    (read_traces, TRACE, {"text": "x"}, "file:2: needs 'id', a str"),
    (read_traces, TRACE, {"id": "b"}, "file:2: needs 'text', a str"),
    (read_traces, TRACE, {"id": "b", "text": ["x"]}, "file:2: needs 'text', a str, got ['x']"),
    (read_verdicts, VERDICT, {"sample": 0, "score": 1.0}, NOT_VERDICTS + "'id', a str"),
    (read_verdicts, VERDICT, {"id": "b", "score": 1.0}, NOT_VERDICTS + "'sample', an int"),
    (read_verdicts, VERDICT, {"id": "b", "sample": True, "score": 1.0}, NOT_VERDICTS + "'sample', an int, got True"),
    (read_verdicts, VERDICT, {"id": "b", "sample": 0}, NOT_VERDICTS + "'score', a float"),
    (read_verdicts, VERDICT, {"id": "b", "sample": 0, "score": "1"},
     NOT_VERDICTS + "'score', a float, got '1'"),
    (read_verdicts, VERDICT, {"id": "b", "sample": 0, "bad": 1}, NOT_VERDICTS + "'bad', a str, got 1"),
    (read_verdicts, VERDICT, {"id": "b", "sample": 0, "bad": "x"}, NOT_VERDICTS + "'detail', a str"),
    (read_accepted, VERDICT, {"id": "b", "sample": 0, "score": 1.0},
     "file: the verdict on sample 0 of 'b' has no 'accepted'"),
    (read_accepted, VERDICT, {"id": "b", "sample": 0, "score": 1, "accepted": 1},
     NOT_VERDICTS + "'accepted', true or false, got 1"),
    (read_endpoint_answers, ANSWER, {"text": "A", "finished": True}, NO_ANSWER + "'key', a str"),
    (read_endpoint_answers, ANSWER, {"key": "l", "finished": True}, NO_ANSWER + "'text', a str"),
    (read_endpoint_answers, ANSWER, {"key": "l", "text": "A"}, NO_ANSWER + "'finished', true or false"),
    (read_endpoint_answers, ANSWER, ANSWER, "file:2: 'k' already stands in line 1"),
])
def test_a_reader_names_the_file_the_line_and_the_field(tmp_path, reader, good, second, said):
    path = tmp_path / "file"
    lines = [json.dumps(good), second if isinstance(second, str) else json.dumps(second)]
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError) as caught:
        reader(path)
    assert str(caught.value).replace(str(tmp_path) + "/", "") == said
    path.write_text(lines[0] + "\n")
    assert reader(path)  # the first line alone is taken


def test_what_the_readers_give(tmp_path):
    path = tmp_path / "file"
    write_jsonl(path, [LABEL, {"id": "b", "bad": "missing", "detail": ""}])
    assert read_labels(path) == {"a": {"option": LABEL["option"]}, "b": {"bad": "missing"}}  # what a target needs
    write_jsonl(path, [VERDICT, BAD_VERDICT])
    assert read_accepted(path) == {("a", 0): VERDICT, ("a", 1): BAD_VERDICT}  # a bad one has no score and no verdict
    assert read_endpoint_answers(tmp_path / "none") == {}


def test_line_separators_and_other_letters_survive_both_writers(tmp_path):
    record = {"id": "é\u2028狗\u0085", "text": "\u2029"}
    write_jsonl(tmp_path / "a", [record, record])
    append_jsonl(tmp_path / "b", record)
    append_jsonl(tmp_path / "b", record, sync=True)
    assert read_jsonl(tmp_path / "a") == read_jsonl(tmp_path / "b") == [record, record]


def test_a_torn_answer_is_dropped_with_a_word_and_asked_for_again(tmp_path, capsys):
    path = tmp_path / "endpoint.jsonl"
    path.write_text(json.dumps(ANSWER) + "\n" + '{"key": "l", "te')
    assert read_endpoint_answers(path) == {"k": ANSWER}
    assert capsys.readouterr().err == f"{path}: dropped the last line, cut short after 16 bytes; it is asked again\n"
    assert path.read_text() == json.dumps(ANSWER) + "\n"


def test_a_file_that_cannot_grow_is_named(tmp_path):
    with pytest.raises(OSError, match="cannot write: Is a directory") as caught:
        append_jsonl(tmp_path, {})
    assert str(tmp_path) in str(caught.value)


# ---- clips that cannot be used ----


def test_bad_clips_are_counted_by_reason_the_most_frequent_first():
    bad = [bad_record(SimpleNamespace(id=str(i)), MediaError("x.wav", reason))
           for i, reason in enumerate(["short", "missing", "missing"])]
    assert bad[0] == {"id": "0", "bad": "short", "detail": str(MediaError("x.wav", "short"))}
    found = count_bad([*bad, LABEL], "own", 0.75)
    assert found == {"missing": 2, "short": 1} and list(found) == ["missing", "short"]
    assert count_bad([LABEL], "own", 0.0) == {}


@pytest.mark.parametrize("good, max_bad, says", [(1, 0.5, "own: 2 of 3 clips are bad"),
                                                 (0, 1.0, "own: 2 of 2 clips are bad")])
def test_too_many_bad_clips_or_none_but_bad_ones_are_refused_with_the_first(good, max_bad, says):
    bad = [{"id": "a", "bad": "missing", "detail": "a.wav: missing"}, {"id": "b", "bad": "short", "detail": "b.wav"}]
    with pytest.raises(ValueError, match=says) as caught:
        count_bad([LABEL] * good + bad, "own", max_bad)
    assert str(caught.value).endswith(f"with max_bad {max_bad}; the first: a.wav: missing")


# ---- shards ----


@pytest.fixture
def shards_as(monkeypatch, tmp_path):
    """compute_shards as process `rank` of `world_size` calls it; the others' work is done by earlier calls."""
    computed, waited, seen = [], [], []

    def compute(part):
        computed.append(part)
        return [{"item": item} for item in part]

    def run(rank, world_size, items, **options):
        monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (rank, world_size))
        monkeypatch.setattr(distributed, "gather", lambda value: waited.append(rank) or [value])
        monkeypatch.setattr(distributed, "broadcast", lambda done: seen.append(done) or seen[0])  # as the first saw it
        return compute_shards(compute, items, tmp_path, "shards", "item", **options)

    run.computed, run.waited = computed, waited
    return run


def test_every_process_computes_its_shards_and_the_first_alone_gets_the_records(shards_as, tmp_path):
    items = list(range(23))
    for rank in (2, 1, 0):
        found = shards_as(rank, 3, items, shard_size=5)
        assert found == (None if rank else [{"item": item} for item in items])
    assert [part[0] for part in shards_as.computed] == [10, 5, 20, 0, 15]  # shards 2; 1 and 4; 0 and 3
    assert [len(part) for part in shards_as.computed] == [5, 5, 3, 5, 5] and shards_as.waited == [2, 1, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{start:07d}.jsonl" for start in range(0, 25, 5)]


def test_a_shard_that_is_there_is_read_back(shards_as, tmp_path):
    (tmp_path / "0000002.jsonl").write_text('{"item": "kept"}\n')
    assert shards_as(0, 1, [0, 1, 2], shard_size=2) == [{"item": 0}, {"item": 1}, {"item": "kept"}]
    assert shards_as.computed == [[0, 1]]


def test_what_is_left_is_shared_however_much_was_there(shards_as, tmp_path):
    for i in (0, 1, 3):
        (tmp_path / f"{i:07d}.jsonl").write_text(f'{{"item": {i}}}\n')
    for rank in (1, 0):
        found = shards_as(rank, 2, list(range(6)), shard_size=1)
    assert shards_as.computed == [[4], [2], [5]] and found == [{"item": i} for i in range(6)]


def test_a_process_that_is_asked_to_stop_finishes_its_shard(shards_as, tmp_path, monkeypatch):
    asked = iter([False, True])
    monkeypatch.setattr(distributed, "stop_requested", lambda: next(asked))
    with pytest.raises(distributed.Stopped):
        shards_as(0, 1, list(range(6)), shard_size=2)
    assert shards_as.computed == [[0, 1]]
    monkeypatch.setattr(distributed, "stop_requested", lambda: False)
    assert len(shards_as(0, 1, list(range(6)), shard_size=2)) == 6
