"""Stage Traces: which samples and clips can be used, and that what is sampled depends on nothing else."""
import json

import pytest
from mini import write_clips, write_model

from minixmd.config import GRPO, SFT, Traces
from minixmd.inputs.examples import read_manifest
from minixmd.learning.rollout import Completion
from minixmd.learning.targets import resolve_targets
from minixmd.runs import distributed
from minixmd.runs.records import read_jsonl
from minixmd.stages import traces

FRAMES = dict(min_pixels=3136, max_pixels=3136)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    write_model(folder / "eyes", "vision")
    write_clips(folder / "clips")
    return folder


def stage_of(world, **more):
    given = dict(name="traces", allow_outside=True, model=str(world / "eyes"),
                 manifest=str(world / "clips" / "manifest.jsonl"),
                 num_samples=3, max_new_tokens=6, **FRAMES)
    return Traces(**given | more)


def run(stage, folder):
    folder.mkdir(exist_ok=True)
    lines = []
    traces.run(stage, folder, lines.append)
    return {name: read_jsonl(folder / f"{name}.jsonl") for name in ("samples", "traces", "labels")} | {
        "results": json.loads((folder / "results.json").read_text()), "log": lines}


def said(letter, thought="It barks."):
    return f"<think>{thought}</think><answer>{letter}</answer>"


USES = [
    (said("A"), True, "ok"),
    (said("A", "It\nbarks, then\nstops."), True, "ok"),
    (said("B. cat"), True, "ok"),
    (said("A"), False, "too long"),
    ("<think>It", False, "too long"),
    ("A", True, "unparsable"),
    ("", True, "unparsable"),
    (said("horse"), True, "unparsable"),
    (said("D"), True, "unparsable"),  # there are three options
    (said("A") + said("A"), True, "unparsable"),
    ("<think>It barks.</think><answer>A</answer><answer>A</answer>", True, "unparsable"),
    ("Well: " + said("A"), True, "unparsable"),
    (said("A", "I hear <|AUDIO|>."), True, "special token"),
    (said("A", "I hear <|vision_start|>."), True, "special token"),
    (said("A", "a <|b and c|> d"), True, "ok"),  # no token
]


def puppet(monkeypatch, texts):
    """A model that says texts[clip's number][sample]; a text None is one that was cut."""
    def write(model, questions, writing, **options):
        for example, _ in questions.prompts():
            said = texts[int(example.id.removeprefix("clip"))]
            yield example, [Completion(text or "<think>It", (1,), (0.0,), text is not None) for text in said]

    monkeypatch.setattr(traces, "write", write)


@pytest.mark.parametrize("text, finished, reason", USES)
def test_a_sample_is_of_use_if_it_ends_in_time_and_in_form(monkeypatch, world, tmp_path, text, finished, reason):
    many = [[said("A")]] * 11
    puppet(monkeypatch, [[text if finished else None]] + many)
    found = run(stage_of(world, num_samples=1), tmp_path / "run")
    assert found["samples"][0]["samples"][0]["use"] == reason
    assert found["results"]["unusable"] == ({} if reason == "ok" else {reason: 1})
    assert len(found["traces"]) == 11 + (reason == "ok") and found["results"]["usable"] == len(found["traces"])
    kept = found["traces"][0]
    assert (kept["id"] == "clip0") == (reason == "ok") and kept["sample"] == 0
    if reason == "ok":
        assert kept["text"] == text and kept["option"] == ("cat" if "cat" in text else "dog")


def test_a_clip_is_unanimous_if_all_samples_can_be_used_and_agree(monkeypatch, world, tmp_path):
    texts = [[said("A")] * 3, [said("A"), said("A"), said("B")], [said("A"), said("dog"), said("A. dog")],
             [said("A"), None, said("A")], [said("A"), "hm", None], [said("C"), said("C"), said("C", "Hoo")]]
    puppet(monkeypatch, texts + [[said("B")] * 3] * 6)
    found = run(stage_of(world), tmp_path / "run")
    labels = {label["id"]: label.get("option", label.get("bad")) for label in found["labels"]}
    assert [labels[f"clip{i}"] for i in range(6)] == ["dog", "not unanimous", "dog", "too long", "unparsable", "owl"]
    assert found["results"]["clips_by"] == {"unanimous": 9, "not unanimous": 1, "too long": 1, "unparsable": 1}
    assert found["results"]["unusable"] == {"too long": 2, "unparsable": 1}
    by_clip = {}
    for trace in found["traces"]:
        by_clip.setdefault(trace["id"], []).append((trace["sample"], trace["unanimous"]))
    assert by_clip["clip0"] == [(0, True), (1, True), (2, True)]
    assert by_clip["clip1"] == [(0, False), (1, False), (2, False)]
    assert by_clip["clip3"] == [(0, False), (2, False)] and by_clip["clip4"] == [(0, False)]
    results = found["results"]
    assert (results["clips"], results["samples"], results["usable"], results["traces"]) == (12, 36, 33, 33)
    assert results["traces_of_unanimous"] == 27 and found["log"] == [results]


def test_equal_options_under_two_letters_are_one_answer(monkeypatch, world, tmp_path):
    lines = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        line.update({kind: f"{world}/clips/{line[kind]}" for kind in ("audio", "video")}, options=["dog", "cat", "dog"],
                    meta={"sub_category": "as MMAU, which alone repeats options"})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    puppet(monkeypatch, [[said("A"), said("C")]] * 12)
    found = run(stage_of(world, num_samples=2, manifest=str(tmp_path / "m.jsonl")), tmp_path / "run")
    assert found["results"]["clips_by"] == {"unanimous": 12}


def test_a_bad_clip_is_recorded_and_gives_nothing(monkeypatch, world, tmp_path):
    lines = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        line.update({kind: f"{world}/clips/{line[kind]}" for kind in ("audio", "video")})
    lines[4]["video"] = "gone.mp4"
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    puppet(monkeypatch, [[said("A")]] * 12)
    stage = stage_of(world, num_samples=1, manifest=str(tmp_path / "m.jsonl"), max_bad=0.1)
    found = run(stage, tmp_path / "run")
    assert sum(found["results"]["bad"].values()) == 1 and "bad" in found["samples"][4] and "bad" in found["labels"][4]
    assert len(found["traces"]) == 11 and "clip4" not in {trace["id"] for trace in found["traces"]}
    with pytest.raises(ValueError, match="traces: 1 of 12 clips are bad"):
        run(stage_of(world, num_samples=1, manifest=str(tmp_path / "m.jsonl"), max_bad=0.05), tmp_path / "other")


def texts_of(found):
    return {record["id"]: [sample["text"] for sample in record["samples"]] for record in found["samples"]}


def test_the_first_sample_of_many_is_the_only_one_of_one_and_a_seed_changes_all(world, tmp_path):
    many = texts_of(run(stage_of(world), tmp_path / "many"))
    one = texts_of(run(stage_of(world, num_samples=1, decode_slots=2), tmp_path / "one"))
    assert [texts[0] for texts in many.values()] == [text for [text] in one.values()]
    assert len({text for texts in many.values() for text in texts}) > 30  # of 36
    other = texts_of(run(stage_of(world, seed=1), tmp_path / "other"))
    assert all(many[name] != other[name] for name in many)


def test_a_stopped_stage_goes_on_with_the_shards_it_has(monkeypatch, world, tmp_path):
    monkeypatch.setattr(distributed, "SHARD", 5)
    whole = run(stage_of(world), tmp_path / "whole")
    sampled, real = [], traces.write

    def interrupted(model, questions, writing, **options):
        sampled.append(questions.examples)
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return real(model, questions, writing, **options)

    monkeypatch.setattr(traces, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(stage_of(world), tmp_path / "run")
    found = run(stage_of(world), tmp_path / "run")
    assert [len(examples) for examples in sampled] == [5, 5, 5, 2]
    assert found.pop("log")[1:] == whole.pop("log")[1:]  # the first line has times
    assert found == whole


def test_the_labels_have_the_form_of_the_labels_that_training_reads(monkeypatch, world, tmp_path):
    puppet(monkeypatch, [[said("A"), said("A" if i % 2 else "B")] for i in range(12)])
    run(stage_of(world, num_samples=2), tmp_path / "run")
    given = dict(model="m", manifest=str(world / "clips" / "manifest.jsonl"))
    examples = read_manifest(given["manifest"])
    stage = GRPO(name="t", teacher_labels=str(tmp_path / "run" / "labels.jsonl"), **given)
    items, counts = resolve_targets(stage, examples)
    assert counts == {"teacher": 6, "left out: not unanimous": 6} and {item.target for item in items} == {0}
    for trace_filter, count in (("all", 24), ("first", 12), ("unanimous", 12)):
        stage = SFT(name="s", traces=str(tmp_path / "run" / "traces.jsonl"), trace_filter=trace_filter, **given)
        items, counts = resolve_targets(stage, examples)
        assert counts["traces"] == len(items) == count
        assert sum(counts.values()) - counts.get("left out: no trace", 0) == 24
