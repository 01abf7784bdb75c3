"""Answers that no model of ours gave: an endpoint's letters and words, another system's file, and people's."""
import json

import pytest
from fake_endpoint import FakeEndpoint
from mini import CLASSES, write_clips, write_config, write_model

from minixmd import train
from minixmd.config import SFT, Answers, Evaluate, Label
from minixmd.inputs.examples import read_manifest
from minixmd.runner import main
from minixmd.runs.records import read_jsonl
from minixmd.stages import answers, evaluate, label
from minixmd.stages.multiple_choice import read_validation
from minixmd.tasks.statistics import clustered_interval, digest, wilson


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("elsewhere") / "clips")


def made(stage, folder):
    """results.json of a stage, or the labels, and its answers."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {Evaluate: evaluate.run, Label: label.run, Answers: answers.run}[type(stage)]
    run(stage, folder, lambda line: None)
    if isinstance(stage, Label):
        return read_jsonl(folder / "labels.jsonl")
    return json.loads((folder / "results.json").read_text()), read_jsonl(folder / "answers.jsonl")


# ---- endpoints ----


def says(first):
    """Replies whose first letter is likeliest by log-probs, where it is given, and whose text says another option."""
    def reply(messages, seed):
        assert [part["type"] for part in messages[0]["content"]] in (["input_audio", "text"], ["text"])
        top = {" B": -0.2, "A": -1.9, "The": -4.0}
        return {"text": "It is the owl.", "top": top} if first else "I think that it is a cat"
    return reply


@pytest.mark.parametrize("stage", [Evaluate, Label])
def test_a_server_answers_by_its_log_probs_or_by_what_it_writes(stage, clips, tmp_path):
    with FakeEndpoint(says(first=True)) as endpoint:
        fields = dict(name="asked", manifest=str(clips), endpoint=endpoint.base_url, served="m")
        letters = made(stage(**fields), tmp_path / "letters")
        words = made(stage(**fields, answer="generate"), tmp_path / "words")
        alone = made(stage(**fields, media="none"), tmp_path / "alone")
    found = [records if stage is Label else records[1] for records in (letters, words, alone)]
    assert [{record["option"] for record in records} for records in found] == [{"cat"}, {"owl"}, {"cat"}]
    kinds = [[part["type"] for part in request.body["messages"][0]["content"]] for request in endpoint.requests]
    assert kinds == [["input_audio", "text"]] * 24 + [["text"]] * 12
    if stage is Evaluate:
        results = words[0]
        assert (results["accuracy"], results["model"], results["how"]["option"]) == (1 / 3, "m", 12)
        assert "letters" not in results and "how" not in letters[0]


def test_a_server_without_log_probs_is_told_to_be_asked_for_words(clips, tmp_path, capsys):
    with FakeEndpoint(says(first=False)) as endpoint:
        stage = f"[Evaluate(name='e', manifest={str(clips)!r}, endpoint={endpoint.base_url!r}, served='m')]"
        config = write_config(tmp_path / "config.py", stage)
        assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 1
    assert "gives no log-probs; set answer='generate', and another run_dir" in capsys.readouterr().err
    assert len(endpoint.requests) < 12  # it stops at the first


def test_samples_of_a_server_vote(clips, tmp_path):
    with FakeEndpoint(lambda messages, seed: "ABB"[seed % 3]) as endpoint:
        stage = Evaluate(name="e", manifest=str(clips), endpoint=endpoint.base_url, served="m", answer="generate",
                         num_samples=8, temperature=1.0)
        results, records = made(stage, tmp_path)
    assert len(endpoint.requests) == 96 and results["num_samples"] == 8
    for record in records:
        assert sum(record["votes"].values()) == 8 and record["votes"][record["option"]] == max(record["votes"].values())


# ---- local models ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("elsewhere") / "audio", "audio"))


def test_without_a_clip_the_question_alone_is_asked(model, clips, tmp_path):
    _, records = made(Evaluate(name="e", model=model, manifest=str(clips), media="none"), tmp_path)
    assert len({tuple(record["logits"]) for record in records}) == 1  # twelve times the same question


def test_a_prompt_without_options_is_for_written_answers_alone(model, clips, tmp_path):
    fields = dict(name="e", model=model, manifest=str(clips), prompt="What is that sound?")
    with pytest.raises(ValueError, match="must hold the placeholder 'options'"):
        Evaluate(**fields)
    results, _ = made(Evaluate(**fields, answer="generate"), tmp_path)
    assert results["how"]["letter"] == 0 and results["count"] == 12


def test_validation_is_on_a_sample_that_stays_the_same(clips):
    def sample(**fields):
        stage = SFT(name="s", model="m", manifest=str(clips), val_manifest=str(clips), **fields)
        return [example.id for example in read_validation(stage)]

    assert sample() == [f"clip{i}" for i in range(12)]
    five = sample(val_limit=5)
    assert len(set(five)) == 5 and five == sample(val_limit=5) != sample(val_limit=5, seed=1)


def test_rewards_that_never_differ_stop_grpo(model, clips, tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path / "config.py", f"""[GRPO(name="g", model={model!r}, manifest={str(clips)!r},
        batch_size=2, group_size=2, max_new_tokens=3, max_steps=4)]""")  # a random model earns nothing
    assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 0
    assert "rewards differed in no group" in capsys.readouterr().out
    monkeypatch.setattr(train, "MAX_EQUAL_GROUPS", 6)
    assert main([str(config), f"run_dir={tmp_path / 'stopped'}"]) == 1
    assert "g: in none of 6 groups did the completions' rewards differ" in capsys.readouterr().err


# ---- files ----


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_another_system_is_read_as_evaluate_reads(clips, tmp_path):
    examples = read_manifest(clips)
    lines = [{"id": "clip0", "answer": 0}, {"id": "clip1", "answer": "cat"}, {"id": "clip2", "text": "It is C."},
             {"id": "clip3", "text": "A purring cat"}, {"id": "clip4", "answer": None},
             {"id": "clip5", "bad": "unreadable"}]  # fmt: skip
    path = write_lines(tmp_path / "answers.jsonl", lines)
    results, records = made(Answers(name="a", manifest=str(clips), file=path, max_bad=1.0), tmp_path / "out")
    assert [record.get("option") for record in records[:5]] == ["dog", "cat", "owl", "cat", None]
    assert (results["count"], results["correct"]) == (5, 3)
    assert results["bad"] == {"not answered": 6, "unreadable": 1}
    assert results["how"] == {"letter": 1, "option": 1, "similar": 0, "none": 0}
    assert [record["question"] for record in records] == [digest(example) for example in examples]
    assert results["classes"]["dog"]["count"] == 2 and results["file"] == path


@pytest.mark.parametrize("line, said", [
    ({"id": "clip99", "answer": 0}, "answers.jsonl:2: 'clip99' is not in .*manifest.jsonl"),
    ({"id": "clip0", "answer": 1}, "answers.jsonl:2: 'clip0' already stands in an earlier line"),
    ({"id": "clip1", "answer": "fox"}, "answers.jsonl:2: 'fox' is none of the 3 options of 'clip1'"),
    ({"id": "clip1", "answer": 3}, "answers.jsonl:2: 3 is none of the 3 options of 'clip1'"),
    ({"id": "clip1", "answer": True}, "answers.jsonl:2: True is none of the 3 options of 'clip1'"),
    ({"id": "clip1", "answer": [0]}, "answers.jsonl:2: \\[0\\] is none of the 3 options of 'clip1'"),
    ({"id": "clip1"}, "answers.jsonl:2: needs 'text', a str"),
])  # fmt: skip
def test_a_wrong_line_of_another_system_is_named_before_the_first_stage(line, said, clips, tmp_path, capsys):
    path = write_lines(tmp_path / "answers.jsonl", [{"id": "clip0", "answer": 0}, line])
    stage = Answers(name="a", manifest=str(clips), file=path)
    with pytest.raises(ValueError, match=said):
        made(stage, tmp_path / "out")
    config = write_config(tmp_path / "config.py", f"[Answers(name='a', manifest={str(clips)!r}, file={path!r})]")
    assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "run").exists()


# ---- people ----


def session(number, trials, clips, test="0123456789abcdef", finished="2026-11-30T12:00:00Z"):
    """A participant's file, as the page makes it. trials: [(number of the clip, condition, answer)]."""
    examples = read_manifest(clips)
    made = {"listening_test": 1, "test": test, "participant": number, "started": "2026-11-30T11:50:00Z",
            "finished": finished, "user_agent": "Grüße", "trials": [
                {"id": f"clip{clip}", "condition": condition, "question": digest(examples[clip]), "answer": answer,
                 "ms": 900, "replays": 1} for clip, condition, answer in trials]}  # fmt: skip
    return {**made, "checksum": answers.checksum(made)}


def write_sessions(folder, *sessions):
    folder.mkdir(parents=True)
    for i, made in enumerate(sessions):
        (folder / f"{i}.json").write_text(json.dumps(made))
    return str(folder)


def heard(clips, folder, condition="ears"):
    return Answers(name="people", manifest=str(clips), file=folder, condition=condition, max_bad=1.0)


def test_the_checksum_is_fnv_1a():
    for text, digits in (("", "811c9dc5"), ("a", "e40c292c"), ("foobar", "bf9cf968")):  # the authors' own
        assert answers.fnv_1a(text.encode()) == digits
    assert answers.checksum({"é": [1, "x"], "checksum": "?"}) == answers.fnv_1a('{"é":[1,"x"]}'.encode())


def test_people_are_read_by_condition_with_intervals_by_participant(clips, tmp_path):
    one = session(1, [(0, "ears", 0), (1, "ears", 1), (2, "eyes", 2)], clips)
    two = session(2, [(3, "ears", 1), (4, "ears", 0), (2, "ears", 0)], clips, finished=None)
    folder = write_sessions(tmp_path / "people", one, two)
    results, records = made(heard(clips, folder), tmp_path / "ears")
    assert (results["count"], results["correct"], results["condition"]) == (5, 2, "ears")
    assert results["sessions"] == {"finished": 1, "stopped": 1} and results["bad"] == {"not answered": 7}
    assert [record.get("participant") for record in records[:5]] == [1, 1, 2, 2, 2]
    assert results["interval"] == [0.0, 1.0]  # one is right twice, the other never
    assert made(heard(clips, folder, "eyes"), tmp_path / "eyes")[0]["correct"] == 1


def test_an_interval_by_participant_is_wider_where_participants_differ():
    alike = [[True, False]] * 50
    apart = [[True, True], [False, False]] * 25
    narrow, wide = clustered_interval(alike), clustered_interval(apart)
    assert narrow == [*wilson(50, 100)] and wide[1] - wide[0] > 1.2 * (narrow[1] - narrow[0])
    assert wide == clustered_interval(apart)
    assert clustered_interval([[True]]) == [0.0, 1.0]


def fault(clips, name):
    """The sessions of a folder in which one is wrong."""
    right = session(1, [(0, "ears", 0)], clips)
    if name == "edited":
        right["trials"] = [right["trials"][0] | {"answer": 1}]
    others = {
        "other test": session(2, [(1, "ears", 1)], clips, test="f" * 16),
        "twice": session(1, [], clips),
        "again": session(2, [(0, "ears", 0)], clips),
        "no option": session(2, [(1, "ears", 7)], clips),
    }
    return [right, *([others[name]] if name in others else [])]


@pytest.mark.parametrize("name, said", [
    ("edited", "0.json: was changed or cut since the page made it"),
    ("other test", "1.json: of another test than the files before it"),
    ("twice", "1.json: participant 1 has a file already, .*0.json; keep one of the two"),
    ("again", "1.json: 'clip0' was answered by participant 1 too"),
    ("no option", "1.json: 7 is none of the 3 options of 'clip1'"),
])  # fmt: skip
def test_a_wrong_file_of_a_participant_is_named(name, said, clips, tmp_path):
    folder = write_sessions(tmp_path / "people", *fault(clips, name))
    with pytest.raises(ValueError, match=said):
        made(heard(clips, folder), tmp_path / "out")


def test_a_test_of_other_questions_an_empty_folder_and_half_a_file_are_named(clips, tmp_path):
    asked_otherwise = session(1, [(0, "ears", 0)], clips)
    asked_otherwise["trials"][0]["question"] = "0" * 16
    asked_otherwise["checksum"] = answers.checksum(asked_otherwise)
    with pytest.raises(ValueError, match="'clip0' was asked otherwise, or not at all"):
        made(heard(clips, write_sessions(tmp_path / "a", asked_otherwise)), tmp_path / "out")
    with pytest.raises(ValueError, match="holds no participant's answer by 'ears'"):
        made(heard(clips, write_sessions(tmp_path / "b")), tmp_path / "out")
    folder = write_sessions(tmp_path / "c", session(1, [(0, "ears", 0)], clips))
    (tmp_path / "c" / "0.json").write_text((tmp_path / "c" / "0.json").read_text()[:90])
    with pytest.raises(ValueError, match="0.json"):
        made(heard(clips, folder), tmp_path / "out")
    with pytest.raises(ValueError, match="a folder of participants' files needs one, another system's file none"):
        made(Answers(name="people", manifest=str(clips), file=folder), tmp_path / "out")


def test_people_and_models_stand_in_one_table(clips, model, tmp_path):
    folder = write_sessions(tmp_path / "people", session(1, [(i, "ears", i % 3) for i in range(12)], clips))
    config = write_config(tmp_path / "config.py", f"""[
        Evaluate(name="model", model={model!r}, manifest={str(clips)!r}),
        Answers(name="people", manifest={str(clips)!r}, file={folder!r}, condition="ears"),
        Report(tables={{"model": {{"test": "@model"}}, "people": {{"test": "@people"}}}})]""")
    assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 0
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["tables"]["people"]["test"]["accuracy"] == 1.0
    assert len(CLASSES) == 3
