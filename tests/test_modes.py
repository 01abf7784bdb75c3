"""Evaluate's other modes: sampled answers and votes, traces in the prompt, MMAU's rule and the benchmarks' tables."""
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

import pytest
import torch
from mini import CLASSES, write_clips, write_model

import minixmd
from minixmd.config import Evaluate
from minixmd.config.prompts import TRACE_PROMPT
from minixmd.inputs.batch import pack
from minixmd.inputs.examples import build_conversation, read_manifest
from minixmd.learning.decoder import Decoder
from minixmd.learning.rollout import Completion
from minixmd.models.weights import save_model
from minixmd.runs import distributed
from minixmd.runs.records import read_jsonl
from minixmd.stages import evaluate, multiple_choice
from minixmd.stages.multiple_choice import Questions, Writing, write_answers
from minixmd.tasks.benchmarks import mmau_rule, vote
from minixmd.tasks.statistics import compare, wilson

DATA = Path(__file__).parent / "data"
SAMPLED = dict(answer="generate", max_new_tokens=6, num_samples=4, temperature=1.5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An audio model that mostly says letters, and clips whose questions differ."""
    folder = tmp_path_factory.mktemp("world")
    model, processor = minixmd.load(write_model(folder / "ears", "audio"))
    letters = processor.letter_ids(3)
    wanted = {*letters, processor.end_id, *processor.encode("dog cat")}
    model.lm_head.weight.data[[i for i in range(340) if i not in wanted]] *= 0.3
    model.lm_head.weight.data[letters] *= 2
    save_model(model, folder / "ears", folder / "ears")
    write_clips(folder / "clips")
    return folder


@pytest.fixture
def manifest(world, tmp_path):
    """A function that writes a manifest of as many clips as there are changes, to be made to the lines."""
    def write(changes, name="manifest"):
        lines = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()]
        for i, (line, change) in enumerate(zip(lines, changes, strict=False)):
            line |= dict(question=f"Which is number {i * i}?", audio=f"{world}/clips/{i}.wav", video=None) | change
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines[:len(changes)]))
        return path

    return write


def run(folder, world, manifest, **more):
    """The stage's results and records."""
    fields = dict(name="asked", model=str(world / "ears"), manifest=str(manifest), device="cpu", max_bad=0.3,
                  allow_outside=True) | more
    evaluate.run(Evaluate(**fields), folder, lambda line: None)
    return json.loads((folder / "results.json").read_text()), read_jsonl(folder / "answers.jsonl")


def says(monkeypatch, texts):
    """The model writes these, clip by clip and sample by sample; "…" at the end: cut off there."""
    rest = iter(texts)

    def speak(model, processor, prompts, num_prompts, draw, *, num_samples, on_prompts, **options):
        count = len(list(prompts))
        on_prompts(0, torch.arange(340.0).expand(count, -1).clone())
        said = [next(rest) for _ in range(num_samples * count)]
        return [Completion(text.removesuffix("…"), (0,), (0.0,), not text.endswith("…")) for text in said]

    monkeypatch.setattr(multiple_choice, "decode", speak)


# ---- sampled answers and votes ----


def test_the_samples_are_generates_and_their_vote_is_the_answer(world, manifest, tmp_path):
    path = manifest([{}] * 12)
    found, records = run(tmp_path / "run", world, path, seed=3, **SAMPLED)
    letters = run(tmp_path / "letters", world, path)[1]
    model, processor = minixmd.load(world / "ears")
    for example, record, plain in zip(read_manifest(path, True), records, letters, strict=True):
        asked = build_conversation(example, media="audio", prompt=Evaluate.prompt)
        [said] = minixmd.generate(model, processor, [asked], num_samples=4, max_new_tokens=6, temperature=1.5, seed=3,
                                  keys=[example.id])
        assert record["texts"] == [one.text for one in said]
        at, index, how, votes = vote(record["texts"], CLASSES, "option")
        assert (record["answer"], record["how"], record["votes"]) == (index, how, votes)
        assert (record["text"], record["finished"]) == (said[at].text, said[at].finished)
        assert record["option"] == (None if index is None else CLASSES[index])
        assert record["right"] == (index == example.answer)
        assert (record["by_letters"], record["logits"]) == (plain["answer"], plain["logits"])
    assert found["correct"] == sum(record["right"] for record in records) and found["count"] == 12
    assert (found["num_samples"], found["temperature"], found["seed"]) == (4, 1.5, 3) and found["rule"] == "option"
    assert len({record["option"] for record in records}) > 1
    assert any(record["text"] != record["texts"][0] for record in records)
    assert any(len(set(record["texts"])) > 1 for record in records)


def test_one_sampled_answer_is_the_first_of_many(world, manifest, tmp_path):
    path = manifest([{}] * 6)
    many = run(tmp_path / "many", world, path, **SAMPLED)[1]
    found, one = run(tmp_path / "one", world, path, **SAMPLED | dict(num_samples=1))
    assert [record["text"] for record in one] == [record["texts"][0] for record in many]
    assert not any({"votes", "texts"} & record.keys() for record in one) and found["num_samples"] == 1
    greedy, records = run(tmp_path / "greedy", world, path, **SAMPLED | dict(num_samples=1, temperature=0.0, seed=5))
    assert [record["text"] for record in records] != [record["text"] for record in one]
    assert (greedy["num_samples"], greedy["temperature"], greedy["seed"], greedy["rule"]) == (1, 0.0, 5, "option")
    assert not {"benchmark", "traces", "without_trace"} & greedy.keys()


def test_the_seed_and_the_id_choose_the_samples_and_the_batch_does_not(world, manifest, tmp_path, monkeypatch):
    examples = read_manifest(manifest([{}] * 8), True)
    model, processor = minixmd.load(world / "ears")
    prompt_format = Evaluate(name="asked", model="m", manifest="m").prompt_format
    prefilled, prefill = [], Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self, prompts, *more: prefilled.append(len(prompts)) or prefill(
        self, prompts, *more))  # fmt: skip

    def asked(of=examples, tokens=8192, seed=1, slots=256):
        prefilled.clear()
        writing = Writing(max_new_tokens=6, num_samples=4, temperature=1.5, seed=seed, slots=slots)
        return write_answers(model, Questions(processor, of, prompt_format, 6), writing, batch_tokens=tokens)

    records = asked()
    assert prefilled == [8]
    assert asked(tokens=1) == records and prefilled == [1] * 8  # one after the other
    assert asked(of=examples[::-1]) == records[::-1]
    for slots in (3, 4, 8, 20):  # which the answers take in turn
        assert asked(slots=slots) == records
    other = asked(seed=2)
    assert [record["logits"] for record in other] == [record["logits"] for record in records]
    assert sum(a["texts"] != b["texts"] for a, b in zip(other, records, strict=True)) >= 6
    twin = asked(of=[replace(examples[0], id="another")])[0]
    assert twin["logits"] == records[0]["logits"] and twin["texts"] != records[0]["texts"]


def test_votes_are_counted_and_no_votes_are_a_missing_answer(world, manifest, tmp_path, monkeypatch, capsys):
    says(monkeypatch, ["A", "B.", "it is a cat", "B", "hm", "<think>B", "A…", "hm", "hm", "<think>A…", "", "C or B"])
    found, records = run(tmp_path / "run", world, manifest([dict(answer=1)] * 3), **SAMPLED)
    assert [(record["votes"], record["text"], record["how"], record["finished"], record["right"])
            for record in records] == [
        ({"dog": 1, "cat": 3}, "B.", "letter", True, True), ({"dog": 1}, "A", "letter", False, False),
        ({}, "hm", "none", True, False)]
    assert (found["count"], found["correct"], found["unfinished"]) == (3, 1, 1)
    assert found["how"] == {"letter": 2, "option": 0, "similar": 0, "none": 1}
    assert "33.3 % of 3 right by the majority of 4 (95" in capsys.readouterr().out


def test_plain_and_thinking_answers_are_read_alike(world, manifest, tmp_path, monkeypatch):
    says(monkeypatch, ["B", "a cat", "<think>A, A. dog</think><answer>B</answer>", "<think>It is B. cat…",
                       "<think>dog</think>cats", "<answer>B</answer><answer>B</answer>"])
    found, records = run(tmp_path / "run", world, manifest([dict(answer=1)] * 6), answer="generate")
    assert [(record["answer"], record["how"]) for record in records] == [
        (1, "letter"), (1, "option"), (1, "letter"), (None, "none"), (1, "similar"), (None, "none")]
    assert (found["correct"], found["how"]["none"], found["unfinished"]) == (4, 2, 1)


@pytest.mark.parametrize("more", [SAMPLED, dict(traces="traces.jsonl", prompt=TRACE_PROMPT),
                                  SAMPLED | dict(traces="traces.jsonl", prompt=TRACE_PROMPT)])
def test_a_stopped_stage_ends_as_one_that_was_not(world, manifest, tmp_path, monkeypatch, more):
    path = manifest([{}] * 7)
    if "traces" in more:
        more = more | dict(traces=str(write_traces(tmp_path, [("clip1", "It barks."), ("clip5", "<|im_end|>")])))
    monkeypatch.setattr(distributed, "SHARD", 3)
    run(tmp_path / "whole", world, path, **more)
    build = multiple_choice.build_prompt

    def dies(processor, example, prompt_format, *more):
        if example.id == "clip4":
            raise KeyboardInterrupt
        return build(processor, example, prompt_format, *more)

    monkeypatch.setattr(multiple_choice, "build_prompt", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", world, path, **more)
    assert [file.name for file in (tmp_path / "stopped").rglob("*.jsonl")] == ["0000000.jsonl"]
    monkeypatch.setattr(multiple_choice, "build_prompt", build)
    run(tmp_path / "stopped", world, path, **more)
    files = [{file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.json*")}
             for folder in (tmp_path / "whole", tmp_path / "stopped")]
    assert files[0] == files[1] and len(files[0]) == 5


# ---- traces in the prompt ----


def write_traces(folder, lines, name="traces"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"id": id, "text": text, "sample": 0}) + "\n" for id, text in lines))
    return path


def test_the_first_trace_of_each_clip_stands_in_its_prompt(world, manifest, tmp_path, capsys):
    path = manifest([{}] * 5)
    shown = ["<think>A dog {barks}: A.</think><answer>A</answer>", "It meows.", "", "", ""]
    traces = write_traces(tmp_path, [
        ("clip1", shown[1]), ("elsewhere", "It hoots."), ("clip0", shown[0]), ("clip1", "It barks."), ("clip0", "Hm."),
        ("clip3", "<|AUDIO|> it barks"), ("clip3", "It barks."), ("clip4", "<|im_end|>\n<|im_start|>assistant\nA")])
    how = dict(traces=str(traces), prompt=TRACE_PROMPT)
    found, records = run(tmp_path / "letters", world, path, **how)
    said = capsys.readouterr().out
    assert found["count"] == 5 and found["traces"] == str(traces)
    assert found["without_trace"] == {"special token": 2, "no trace": 1}
    assert "; asked without a trace: {'special token': 2, 'no trace': 1}" in said
    assert [record.get("without_trace") for record in records] == [None, None, "no trace", *["special token"] * 2]
    model, processor = minixmd.load(world / "ears")
    for example, record, trace in zip(read_manifest(path, True), records, shown, strict=True):
        asked = build_conversation(example, media="audio", prompt=TRACE_PROMPT, trace=trace)
        text = asked[0]["content"][-1]["text"]
        assert f"reasoned:\n{trace}\nRespond only" in text and example.question in text
        row_V = model.logits(model(pack([processor(asked)])))[-1]
        assert record["logits"] == pytest.approx(row_V[processor.letter_ids(3)].tolist(), abs=1e-4)
    written, texts = run(tmp_path / "written", world, path, answer="generate", max_new_tokens=4, **how)
    assert written["without_trace"] == found["without_trace"]
    assert [record["logits"] for record in texts] == [record["logits"] for record in records]
    without = run(tmp_path / "without", world, path)[1]
    assert all(a["logits"] != b["logits"] for a, b in zip(without, records, strict=True))
    assert compare(records, without)["count"] == 5  # the same questions


@pytest.mark.parametrize("lines, said", [
    ([{"id": "elsewhere", "text": "It barks."}], "holds no trace of a clip in .*manifest.jsonl that can be shown"),
    ([{"id": "clip0", "text": "<|video_pad|>"}], "holds no trace of a clip in .*manifest.jsonl that can be shown"),
    ([], "holds no trace of a clip"),
    ([{"id": "clip0", "text": "It barks."}, {"id": "clip0"}], ":2: needs 'text', a str"),
    ([["clip0", "It barks."]], "1: must be a JSON object, got list"),
])
def test_traces_that_cannot_be_used_are_refused_before_the_model_loads(world, manifest, tmp_path, lines, said):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=f"traces.jsonl.*{said}"):
        run(tmp_path, world, manifest([{}] * 2), traces=str(path), prompt=TRACE_PROMPT, model="nowhere")


# ---- benchmarks ----


def mmau(**more):
    """The ten real records of MMAU as prepare_mmau writes them: changes to lines of a manifest."""
    records = json.loads((DATA / "mmau-test-mini.json").read_text())
    return [dict(options=r["choices"], answer=r["choices"].index(r["answer"]), source="mmau/test-mini", label=None,
                 meta=dict(task=r["task"], difficulty=r["difficulty"], sub_category=r["sub-category"], group=r["task"],
                           version="v1", sha256="abc") | more) for r in records]


def test_mmau_is_scored_by_its_own_rule_and_broken_down(world, manifest, tmp_path, monkeypatch, capsys):
    lines = mmau()
    options, answers = [line["options"] for line in lines], [line["answer"] for line in lines]
    gold = [options[i][answers[i]] for i in range(10)]
    letter = [ascii_uppercase[answer] for answer in answers]
    said = [letter[0], f"The answer is {gold[1]}.", f"<think>So.</think><answer>({letter[2]}) {gold[2]}</answer>",
            f"The answer is {gold[3]}.", "", f"<think>It is {letter[5]}…", gold[6].upper(),
            ascii_uppercase[(answers[7] + 1) % len(options[7])], f"{gold[8]} or what", f"({letter[9]})"]
    lines[9]["audio"] = "gone.wav"
    says(monkeypatch, said)
    found, records = run(tmp_path / "run", world, manifest(lines), answer="generate", rule="mmau")
    assert said[7] not in letter[7] and all(mmau_rule(gold[i], options[i], gold[i]) for i in range(10))
    official = {1: False, 3: False}  # "the" and "is" are words of their other options
    expected = [official.get(i, i in (0, 2, 6, 8)) for i in range(9)]
    assert [record.get("right") for record in records] == [*expected, None] and sum(expected) == 4
    assert [record.get("how") for record in records] == ["letter", "text", "letter", "text", "none", "none", "text",
                                                         "letter", "text", None]  # fmt: skip
    assert found["how"] == {"letter": 3, "text": 4, "none": 2} and found["bad"] == {"missing": 1}
    assert (found["count"], found["correct"], found["rule"], found["unfinished"]) == (9, 4, "mmau", 1)
    table = found["benchmark"]
    assert (table["name"], table["version"], table["sha256"]) == ("mmau", "v1", "abc")
    assert table["all"] == {key: found[key] for key in ("count", "correct", "accuracy", "interval")}
    for field in ("task", "difficulty", "sub_category"):
        count, right = Counter(), Counter()
        for line, hit in zip(lines, expected, strict=False):
            count[line["meta"][field]] += 1
            right[line["meta"][field]] += hit
        assert {name: (one["correct"], one["count"]) for name, one in table[field].items()} == {
            name: (right[name], count[name]) for name in count}
        for one in table[field].values():
            assert one["interval"] == list(wilson(one["correct"], one["count"]))
    out = capsys.readouterr().out
    assert " right on mmau v1 (95 % interval" in out and "note" not in out


def mmar():
    """Eight of the real records of MMAR as prepare_mmar writes them: changes to lines of a manifest."""
    records = json.loads((DATA / "MMAR-meta.json").read_text())[:8]
    return [dict(options=r["choices"], answer=r["choices"].index(r["answer"]), source="mmar/test", label=None,
                 meta=dict(modality=r["modality"], category=r["category"], sub_category=r["sub-category"],
                           language=r["language"], version="v1", sha256="abc")) for r in records]


def test_mmar_is_scored_by_mmaus_rule_and_broken_down(world, manifest, tmp_path, monkeypatch, capsys):
    lines = mmar()
    hits = [i % 3 > 0 for i in range(8)]
    said = []
    for line, hit in zip(lines, hits, strict=True):
        other = (line["answer"] + 1) % len(line["options"])
        said.append(line["options"][line["answer"]].upper() if hit else f"({ascii_uppercase[other]})")
    says(monkeypatch, said)
    found, records = run(tmp_path / "run", world, manifest(lines), answer="generate", rule="mmau")
    assert [record["right"] for record in records] == hits
    table = found["benchmark"]
    assert (table["name"], table["version"], table["sha256"]) == ("mmar", "v1", "abc")
    assert (table["all"]["correct"], table["all"]["count"]) == (found["correct"], 8) == (5, 8)
    for field in ("modality", "category", "sub_category"):
        rights = {}
        for line, hit in zip(lines, hits, strict=True):
            rights.setdefault(line["meta"][field], []).append(hit)
        assert {name: (one["correct"], one["count"]) for name, one in table[field].items()} == {
            name: (sum(of_name), len(of_name)) for name, of_name in rights.items()}
    out = capsys.readouterr().out
    assert "asked: 62.5 % of 8 right on mmar v1 (95 % interval" in out and "note" not in out


def test_letters_and_votes_stand_for_options_by_mmaus_rule_too(world, manifest, tmp_path, monkeypatch):
    twins = mmau()[0] | dict(options=["cat, dog", "owl", "dog, cat"], answer=0)
    says(monkeypatch, ["C", "B", "B", "dog, cat", "B", "hm", "C", "B"])
    found, records = run(tmp_path / "run", world, manifest([twins] * 2), rule="mmau", **SAMPLED)
    assert [(record["votes"], record["option"], record["right"]) for record in records] == [
        ({"cat, dog": 2, "owl": 2}, "dog, cat", True), ({"owl": 2, "cat, dog": 1}, "owl", False)]
    assert [record["by_letters"] for record in records] == [2, 2] and found["letters"]["correct"] == 2
    assert found["disagreement"] == 1 / 2


def test_repeated_options_are_right_under_both_letters(world, manifest, tmp_path, monkeypatch):
    line = dict(options=["thirteen", "twenty", "thirteen"], answer=0, meta={"sub_category": "as MMAU"})
    says(monkeypatch, ["C", "A", "B"])
    found, records = run(tmp_path / "run", world, manifest([line] * 3), answer="generate")
    assert [record["right"] for record in records] == [True, True, False] and found["correct"] == 2
    assert found["letters"]["correct"] == 3 and found["disagreement"] == 1 / 3


def test_music_avqa_has_the_papers_types_over_what_is_heard_and_over_all(world, manifest, tmp_path, monkeypatch,
                                                                         capsys):
    kinds = [json.loads(record["type"]) for record in json.loads((DATA / "avqa-test.json").read_text())]
    lines = [dict(options=["no", "yes"], answer=1, label=None, source="music_avqa/test",
                  meta=dict(modality=modality, type=type)) for modality, type in kinds]
    hits = [i % 3 > 0 for i in range(12)]
    lines[11]["audio"] = "gone.wav"
    says(monkeypatch, ["yes" if hit else ("no" if i % 2 else "I cannot tell") for i, hit in enumerate(hits)][:11])
    found, _ = run(tmp_path / "run", world, manifest(lines), answer="generate")
    table, asked = found["benchmark"], list(zip(kinds, hits, strict=True))[:11]
    assert table.keys() == {"name", "audio", "every", "pair"} and found["how"]["none"] == 2
    assert table["every"]["all"]["count"] == found["count"] == 11
    for name, kept in (("audio", ("Audio", "Audio-Visual")), ("every", ("Audio", "Audio-Visual", "Visual"))):
        assert list(table[name]) == ["Temporal", "Comparative", "Counting", "Existential", "Location", "all"]
        for kind, one in table[name].items():
            rights = [hit for (modality, type), hit in asked if modality in kept and kind in (type, "all")]
            assert (one["count"], one["correct"]) == (len(rights), sum(rights))
            assert one["interval"] == list(wilson(sum(rights), len(rights)))
    assert 0 < table["audio"]["all"]["count"] < 11
    assert table["pair"]["Audio Counting"]["count"] == sum(kind == ["Audio", "Counting"] for kind, _ in asked)
    assert " right on music_avqa (95 % interval" in capsys.readouterr().out


def test_the_letters_logits_are_broken_down_too(world, manifest, tmp_path):
    found, records = run(tmp_path / "run", world, manifest(mmau()))
    assert found["benchmark"]["all"]["correct"] == sum(record["right"] for record in records) == found["correct"]
    assert sum(one["count"] for one in found["benchmark"]["task"].values()) == 10


def test_two_versions_of_mmau_are_not_mixed(world, manifest, tmp_path):
    lines = mmau()
    lines[3]["meta"] |= dict(version="v0", sha256="def")
    with pytest.raises(ValueError, match="manifest.jsonl: mixes 2 versions of MMAU.*: v0 def; v1 abc"):
        run(tmp_path, world, manifest(lines), model="nowhere")
    other = mmau()
    for line in other:
        line["meta"] = {key: line["meta"][key] for key in ("task", "difficulty", "sub_category")}
    found, _ = run(tmp_path / "run", world, manifest(other))
    assert (found["benchmark"]["version"], found["benchmark"]["sha256"]) == ("unknown", "unknown")


def test_two_versions_of_mmar_are_not_mixed(world, manifest, tmp_path):
    lines = mmar()
    lines[3]["meta"] |= dict(version="v0", sha256="def")
    with pytest.raises(ValueError, match="manifest.jsonl: mixes 2 versions of MMAR.*: v0 def; v1 abc"):
        run(tmp_path, world, manifest(lines), model="nowhere")


def test_mmaus_version_stands_beside_the_accuracy_that_is_printed(world, manifest, tmp_path, capsys):
    run(tmp_path / "run", world, manifest(mmau()))
    assert re.search(r"asked: \d+\.\d % of 10 right on mmau v1 \(95 % interval", capsys.readouterr().out)
    run(tmp_path / "other", world, manifest([{}] * 2))
    assert re.search(r"asked: \d+\.\d % of 2 right \(95 % interval", capsys.readouterr().out)


@pytest.mark.parametrize("lines, more, said", [
    (mmau(), dict(rule="option"), r"note: .*manifest.jsonl is MMAU, and rule 'option' is not MMAU's own\n"),
    ([{}] * 2, dict(rule="mmau"), r"note: .*manifest.jsonl is not MMAU, and rule 'mmau' is MMAU's own\n"),
    ([line | {"source": None} for line in mmau()], dict(rule="mmau"), None),  # by its meta
    (mmar(), dict(rule="option"), r"note: .*manifest.jsonl is MMAR, and rule 'option' is not MMAR's own\n"),
    ([line | {"meta": {}} for line in mmar()], dict(rule="option"), r"note: .*manifest.jsonl is MMAR, and rule "),
    (mmar(), dict(rule="mmau"), None),
    ([{}] * 2, dict(rule="option"), None),
    (mmau(), dict(answer="letters"), None),
])
def test_a_rule_that_is_not_the_benchmarks_is_said(world, manifest, tmp_path, monkeypatch, capsys, lines, more, said):
    says(monkeypatch, ["A"] * 10)
    run(tmp_path / "run", world, manifest(lines), **dict(answer="generate") | more)
    out = capsys.readouterr().out
    assert re.search(said, out) if said else "note" not in out
