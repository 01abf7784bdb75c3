"""What the start of a stage costs: no model for nothing, no file read twice, labels in little memory."""
import json
import tracemalloc
from array import array

import pytest
import torch
from mini import CLASSES, write_clips, write_model

from minixmd.config import Evaluate, FactCheck, Label, Traces
from minixmd.inputs import examples
from minixmd.inputs.examples import read_manifest
from minixmd.learning.targets import stored_rows
from minixmd.runs import distributed, records, value_checks
from minixmd.runs.distributed import compute_shards
from minixmd.runs.records import read_jsonl, read_labels, read_records, write_jsonl
from minixmd.runs.value_checks import check_value, is_plain
from minixmd.stages import evaluate, factcheck, label, multiple_choice, traces
from minixmd.train import Trainer

TOP = {"temperature": 2.0, "logsumexp": 34.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    write_model(folder / "ears", "audio")
    write_model(folder / "eyes", "vision")
    write_clips(folder / "clips")
    lines = []
    for i in range(12):
        for sample in range(2):
            text = f"<think>I hear {CLASSES[(i + sample) % 3]}.</think>"
            lines.append({"id": f"clip{i}", "sample": sample, "text": text})
    write_jsonl(folder / "traces.jsonl", lines)
    return folder


STAGES = {
    "evaluate": (evaluate, Evaluate, {}),
    "written": (evaluate, Evaluate, dict(answer="generate", max_new_tokens=2)),
    "label": (label, Label, dict(top_k=4, temperature=1.0)),
    "traces": (traces, Traces, dict(media="video", num_samples=2, max_new_tokens=3, min_pixels=3136, max_pixels=3136)),
    "model": (factcheck, FactCheck, dict(threshold=-1e6)),
    "verifier": (factcheck, FactCheck, dict(checker="verifier", width=1 / 16, clip_s=0.5, epochs=1, batch_size=8,
                                            threshold=-1e6, trace_filter="all")),
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_whose_shards_are_all_there_loads_no_model_and_makes_the_same(world, tmp_path, monkeypatch, name):
    module, cls, more = STAGES[name]
    fields = dict(name=name, model=str(world / ("eyes" if name == "traces" else "ears")), device="cpu",
                  manifest=str(world / "clips" / "manifest.jsonl")) | more
    if cls is FactCheck:
        fields |= dict(traces=str(world / "traces.jsonl"))
    if name == "verifier":
        verdicts = []
        for i in range(24):
            accepted = i // 2 % 2 == i % 2
            verdicts.append({"id": f"clip{i // 2}", "sample": i % 2, "score": 1.0, "accepted": accepted})
        write_jsonl(tmp_path / "verdicts.jsonl", verdicts)
        fields["verdicts"] = str(tmp_path / "verdicts.jsonl")
    stage, folder = cls(**fields), tmp_path / "run"
    folder.mkdir()
    module.run(stage, folder, lambda line: None)
    made = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for path in made:
        if path not in ("verifier.safetensors", "calibration.json"):
            (folder / path).unlink()
    monkeypatch.setattr(multiple_choice, "load", None)
    module.run(stage, folder, lambda line: None)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == made
    next((folder / "shards").iterdir()).unlink()
    with pytest.raises(TypeError):  # what has to be computed needs it
        module.run(stage, folder, lambda line: None)


@pytest.mark.parametrize("there, calls", [((), 2), ((0,), 2), ((0, 1), 0)])
def test_all_processes_finish_together_if_any_has_something_to_compute(tmp_path, monkeypatch, there, calls):
    """Those that have no shard take part in the others' passes, for which a sharded model is loaded by all."""
    finished = []
    for i in there:
        write_jsonl(tmp_path / f"{i:07d}.jsonl", [{"item": i}])
    done = [i in there for i in range(2)]
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank_and_world_size", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(distributed, "gather", lambda value: [value])
        monkeypatch.setattr(distributed, "broadcast", lambda value: done)
        compute_shards(lambda part: [{"item": part[0]}], [0, 1], tmp_path, "t", "u", 1, lambda: finished.append(None))
    assert len(finished) == calls


def test_only_a_sharded_model_is_loaded_by_processes_without_a_shard(world, monkeypatch):
    loaded = []
    monkeypatch.setattr(multiple_choice, "load", lambda *_, sharded, **more: loaded.append(sharded) or (None, None))
    monkeypatch.setattr(multiple_choice, "finish_passes", lambda model: None)
    monkeypatch.setattr(multiple_choice, "rank_and_world_size", lambda: (1, 2))
    for sharded in (False, True):
        stage = Label(name="own", model=str(world / "ears"), manifest="m.jsonl", device="cpu", sharded=sharded)
        get_model, finish = multiple_choice.model_of(stage)
        assert loaded == [] and (finish is not None) == sharded
    finish()
    get_model()
    assert loaded == [True]  # once


def test_an_epochs_order_is_drawn_once(monkeypatch):
    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: drawn.append(args) or real(*args, **options))
    trainer = Trainer.__new__(Trainer)
    trainer.stage, trainer.num_items, trainer.orders = Label(name="a", model="m", manifest="m"), 10, {}
    object.__setattr__(trainer.stage, "batch_size", 3)
    steps = [trainer.batch_indices(step) for ahead in range(9) for step in (ahead, ahead + 3)]  # prefetch, and the loop
    assert len(drawn) == 3
    for epoch in range(3):
        epochs_own = sum((trainer.batch_indices(step) for step in range(4 * epoch, 4 * epoch + 4)), [])
        assert sorted(epochs_own) == list(range(10))
    assert steps[0] != steps[8]


# ---- labels ----


def top_of(i):
    return {**TOP, "ids": [i + k for k in range(64)], "logits": [k / 7 + i for k in range(64)]}


def write_labels(path, count):
    lines = []
    for i in range(count):
        letters = [i + k / 3 for k in range(10)]
        line = {"id": f"clip{i:06d}", "answer": 0, "option": "dog", "logits": letters, "top": top_of(i)}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def memory(function):
    """(What a function returns, bytes that it holds then, and at most until then)."""
    tracemalloc.start()
    found = function()
    sizes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found, *sizes


def test_labels_with_best_ids_take_little_memory(tmp_path):
    """1.7 KB a clip where lists would take 5; of 150,000 clips 0.26 GB."""
    write_labels(tmp_path / "labels.jsonl", 2000)
    found, held, peak = memory(lambda: read_labels(tmp_path / "labels.jsonl"))
    assert held < 1800 * 2000 and peak < held + 500_000  # the file itself has 3.4 MB
    top = top_of(3)
    assert found["clip000003"]["top"] == {**TOP, "ids": array("i", top["ids"]), "logits": array("d", top["logits"])}
    _, held, _ = memory(lambda: list(read_records(tmp_path / "labels.jsonl", records.LABEL)))
    assert held > 4000 * 2000  # what it was


def test_a_label_stages_records_are_read_and_written_in_little_memory(tmp_path):
    (tmp_path / "shards").mkdir()
    write_labels(tmp_path / "shards" / "0000000.jsonl", 2000)
    found, held, _ = memory(lambda: compute_shards(None, range(2000), tmp_path / "shards", "t", "u", 2000))
    assert held < 2600 * 2000
    _, _, peak = memory(lambda: write_jsonl(tmp_path / "labels.jsonl", found))
    assert peak < 200_000
    assert (tmp_path / "labels.jsonl").read_bytes() == (tmp_path / "shards" / "0000000.jsonl").read_bytes()
    _, _, peak = memory(lambda: sum(1 for _ in records.numbered_records(tmp_path / "labels.jsonl")))
    assert peak < 200_000


def test_rows_of_arrays_are_those_of_lists():
    top, Z = [top_of(0), top_of(40)], torch.tensor([5])
    arrays = [records.compact({"top": top_of(i)})["top"] for i in (0, 40)]
    for ours, theirs in zip(stored_rows(arrays, 90, Z), stored_rows(top, 90, Z), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


# ---- files that several read ----


def write_lines(path, count, **more):
    lines = []
    for i in range(count):
        line = dict(id=f"clip{i}", audio=f"{i}.wav", question="Which?", options=list(CLASSES), answer=i % 3) | more
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def test_a_manifest_is_read_again_only_if_it_or_its_folder_changed(tmp_path, monkeypatch):
    read, real = [], examples.numbered_records
    monkeypatch.setattr(examples, "numbered_records", lambda path: read.append(path) or real(path))
    path = tmp_path / "m.jsonl"
    write_lines(path, 3)
    first = read_manifest(path)
    first.append(None)  # a list of its own
    assert len(read_manifest(path)) == len(read_manifest(str(path))) == 3 and len(read) == 1
    assert first[0].options[0] is first[1].options[0]
    write_lines(path, 3, answer=2)  # of the same size
    assert read_manifest(path)[0].answer == 2 and len(read) == 2
    write_lines(path, 1, audio="../outside.wav")
    for _ in range(2):
        with pytest.raises(ValueError, match="is outside of"):
            read_manifest(path)
    assert len(read_manifest(path, True)) == 1
    (tmp_path / "summary.json").write_text('{"clips_folder": ".."}')
    assert len(read_manifest(path)) == 1


def test_labels_are_read_once_until_they_change(tmp_path, monkeypatch):
    read, real = [], records.numbered_records
    monkeypatch.setattr(records, "numbered_records", lambda *args: read.append(args) or real(*args))
    path = tmp_path / "labels.jsonl"
    for option in ("dog", "cat"):
        write_jsonl(path, [{"id": "a", "option": option}])
        assert read_labels(path) == read_labels(str(path)) == {"a": {"option": option}}
    assert len(read) == 2 and read_jsonl(path)


ANNOTATIONS = [*examples.LINE.values(), *records.LABEL.values(), *records.TOPK.values(), *records.TRACE.values(), bool,
               int, float | None, dict[str, int], tuple[int, int], tuple[bool, ...]]  # fmt: skip
VALUES = [None, True, 0, -1, 3, 2.5, float("inf"), float("nan"), 10**400, "", "a", [], ["a"], ["a", None], ["a", 1],
          [1, 2], [1, True], [1.5, 2.5], [1, 2.5], [1.5, float("inf")], [1.5, None], [["a"]], {}, {"a": 1}, (1, 2)]


def test_what_is_plain_is_right_and_most_lines_are(tmp_path, monkeypatch):
    plain = 0
    for annotation in ANNOTATIONS:
        for value in VALUES:
            if is_plain(annotation, value):
                plain += 1
                check_value(annotation, value)  # raises nothing
    assert plain == 45
    taken, real = [], value_checks.take_apart
    monkeypatch.setattr(value_checks, "take_apart", lambda annotation: taken.append(annotation) or real(annotation))
    write_lines(tmp_path / "m.jsonl", 100)
    read_manifest(tmp_path / "m.jsonl")
    write_labels(tmp_path / "labels.jsonl", 100)
    read_labels(tmp_path / "labels.jsonl")
    assert len(taken) == 200  # an answer's, and a temperature's, which have bounds
