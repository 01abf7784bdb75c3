"""The learned switch: what it is taught, what it must not read, exact resume, and one clear line for wrong input."""
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from media_files import sine, write_wav
from mini import CLASSES, write_clips, write_config
from safetensors.torch import load_file

from minixmd.config import Switch
from minixmd.config.field_checks import ConfigError
from minixmd.config.load import load_config
from minixmd.inputs.examples import read_manifest
from minixmd.inputs.panns import front_end
from minixmd.models.cnn14 import make_cnn14
from minixmd.runs import distributed
from minixmd.runs.records import append_jsonl
from minixmd.runs.training_state import tensor_file
from minixmd.stages import switch
from minixmd.stages.cnn14_training import load_logmel, load_logmels, train_epochs
from minixmd.tasks import yes_no
from minixmd.tasks.statistics import digest

TEACHER, STUDENT = {"dog": 0.9, "cat": 0.6, "owl": 0.5}, {"dog": 0.5, "cat": 0.6, "owl": 0.9}  # won, tied, lost


def write_answers(folder, manifest, accuracies, bad=()):
    """What Evaluate leaves of a model that is right on such shares of ten clips a class and could read none of the
    classes `bad`. Returns the path of its results."""
    seen, records = Counter(), []
    for e in read_manifest(manifest, True):
        answer = e.answer if seen[e.label] < 10 * accuracies[e.label] else (e.answer + 1) % 3
        seen[e.label] += 1
        records.append({"id": e.id, "question": digest(e)} | ({"bad": "missing"} if e.label in bad else
                                                              {"answer": answer, "right": answer == e.answer}))
    folder.mkdir()
    (folder / "results.json").write_text("{}")
    (folder / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / "results.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """30 labelled clips of three classes told apart by pitch, 12 others without labels, and two models' answers."""
    folder = tmp_path_factory.mktemp("world")
    write_clips(folder / "analysis", 30)
    write_clips(folder / "blind", answers=False)
    write_clips(folder / "told")
    for name, accuracies in (("teacher", TEACHER), ("student", STUDENT)):
        write_answers(folder / name, folder / "analysis/manifest.jsonl", accuracies)
    return folder


def fields(world, **more):
    return {**dict(name="switch", allow_outside=True, teacher=f"{world}/teacher/results.json",
                   student=f"{world}/student/results.json",
                   manifest=f"{world}/analysis/manifest.jsonl", train_manifest=f"{world}/blind/manifest.jsonl",
                   width=1 / 16, clip_s=0.5, epochs=10, batch_size=4, lr=1e-2, augment="off", device="cpu"), **more}


@pytest.fixture(scope="module")
def learnt(world, tmp_path_factory):
    """The folder, records and log of a run with the defaults of `fields`."""
    folder = tmp_path_factory.mktemp("learnt") / "run"
    return folder, *run(world, folder)


def run(world, folder, **more):
    """The stage's records, by id, and its log."""
    folder.mkdir(parents=True, exist_ok=True)
    switch.run(Switch(**fields(world, **more)), folder, partial(append_jsonl, folder / "log.jsonl"))
    records = [json.loads(line) for line in (folder / "switch.jsonl").read_text().splitlines()]
    return {record["id"]: record for record in records}, log_of(folder)


def go_on(folder, other):
    """A folder that holds what a run stopped after its last epoch leaves."""
    other.mkdir(parents=True)
    for path in (folder / "state.json", *folder.glob("weights-*"), *folder.glob("optimizer-*")):
        shutil.copy(path, other)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def edited(source, folder, edit):
    """A copy of a folder of clips in which every manifest record went through edit(i, record)."""
    shutil.copytree(source, folder)
    path = folder / "manifest.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for i, record in enumerate(records):
        edit(i, record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ---- what it is taught ----


def test_it_learns_which_clips_are_the_teachers_and_decides_for_every_clip(learnt):
    folder, records, log = learnt
    assert list(records) == [f"clip{i}" for i in range(12)]
    assert [record["p_teacher"] >= 0.5 for record in records.values()] == [i % 3 == 0 for i in range(12)]  # "dog"
    results = json.loads((folder / "results.json").read_text())
    assert results == log[-1] and results["validation"]["accuracy"] == 1.0
    assert [results[f"classes_{what}"] for what in ("won", "tied", "lost", "left_out")] == [1, 1, 1, 0]
    assert (results["clips"], results["clips_to_teacher"], results["bad"]) == (12, 4, {})
    assert "training" not in results and "note" not in results
    curve = [line for line in log if "loss" in line]
    assert [line["epoch"] for line in curve] == list(range(1, 11)) and curve[-1]["loss"] < curve[0]["loss"] / 5
    assert log[0]["train_clips"] == 27 and log[0]["validation_clips"] == 3


def test_a_tie_leaves_the_student_its_own_answer_in_both_directions(world):
    stage, examples = Switch(**fields(world)), read_manifest(world / "analysis/manifest.jsonl")
    there = switch.gains(stage, examples)
    back = switch.gains(replace(stage, teacher=stage.student, student=stage.teacher), examples)
    assert there == pytest.approx({"dog": 0.4, "cat": 0.0, "owl": -0.4})
    assert back == pytest.approx({"dog": -0.4, "cat": 0.0, "owl": 0.4}) and there["cat"] == back["cat"] == 0


@pytest.mark.slow
def test_exchanged_results_teach_the_other_direction(world, tmp_path):
    records, _ = run(world, tmp_path / "run", teacher=f"{world}/student/results.json",
                     student=f"{world}/teacher/results.json")
    assert [record["p_teacher"] >= 0.5 for record in records.values()] == [i % 3 == 2 for i in range(12)]  # "owl"


@pytest.mark.slow
def test_it_learns_with_augmentation_too(world, tmp_path):
    _, log = run(world, tmp_path / "run", augment="both", epochs=24, lr=3e-3)
    assert log[-1]["validation"]["accuracy"] == 1.0


@pytest.mark.parametrize("augment, expected", [
    ("off", []), ("spec", ["spec_augment"]), ("mixup", ["mixup"]), ("both", ["spec_augment", "mixup"]),
])  # fmt: skip
def test_a_step_of_training_augments_drops_out_and_follows_the_schedule(monkeypatch, augment, expected):
    calls, rows, lrs = [], [], []

    def noted(function):
        return lambda *args: calls.append(function.__name__) or function(*args)

    for function in (switch.spec_augment, switch.mixup):
        monkeypatch.setattr(switch, function.__name__, noted(function))
    model = make_cnn14(2, 1 / 64, 0)
    embed = model.embed
    model.embed = lambda x, noise: rows.append((len(x), noise is not None)) or embed(x, noise)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    optimizer.register_step_post_hook(lambda optimizer, *_: lrs.append(optimizer.param_groups[0]["lr"]))
    clips = [SimpleNamespace(id=i, label=i % 2) for i in range(20)]
    compute_loss = partial(switch.batch_loss, model, torch.randn(22, 40, 64), [0, 1], augment)
    schedule = SimpleNamespace(name="s", epochs=2, lr=1.0, warmup_ratio=0.5, seed=0)
    batch_size = 8 if "mixup" in expected else 4
    assert [epoch for epoch, _ in train_epochs(schedule, model, optimizer, compute_loss, clips, batch_size)] == [1, 2]
    steps = 2 if "mixup" in expected else 5  # an epoch, of 20 clips
    assert calls == expected * 2 * steps and rows == [(4, True)] * 2 * steps
    half = [(step + 1) / steps for step in range(steps)]  # up in the first epoch, then the cosine from the peak
    assert lrs == pytest.approx(half + [0.5 + 0.5 * math.cos(math.pi * step / steps) for step in range(steps)])


def test_with_mixup_a_row_is_two_clips_and_there_are_never_more_than_clips(world, tmp_path, monkeypatch):
    sizes = []

    def noted(stage, model, optimizer, batch_loss, items, batch_size, first_epoch):
        sizes.append((len(items), batch_size))
        return iter(())

    monkeypatch.setattr(switch, "train_epochs", noted)
    for augment, batch_size in (("off", 4), ("spec", 4), ("mixup", 4), ("both", 4), ("off", 99), ("both", 99)):
        run(world, tmp_path / f"{augment}{batch_size}", augment=augment, batch_size=batch_size)
    assert sizes == [(27, 4), (27, 4), (27, 8), (27, 8), (27, 26), (27, 26)]


def test_every_epoch_has_an_order_and_noise_of_its_own():
    seen, noises = [], []
    model = make_cnn14(2, 1 / 64, 0)

    def batch_loss(items, noise):
        seen.append(items)
        noises.append(torch.rand(1, generator=noise).item())
        return model.fc_audioset.weight.sum()

    def train(epochs, first_epoch=0):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        schedule = SimpleNamespace(name="s", epochs=epochs, lr=0.0, warmup_ratio=0, seed=0)
        return [len(loss_S) for _, loss_S in train_epochs(schedule, model, optimizer, batch_loss, list(range(10)), 4,
                                                          first_epoch)]

    assert train(2) + train(1) + train(2, first_epoch=1) == [2] * 4  # ten items: two steps of four, two left out
    first, second, again, resumed = (sum(seen[at:at + 2], []) for at in (0, 2, 4, 6))
    assert first == again != second == resumed and len(set(first)) == len(set(second)) == 8
    assert noises[:4] == [*noises[4:6], *noises[6:]] and len(set(noises[:4])) == 4


def test_one_clip_in_ten_of_every_class_validates():
    def sizes(count):
        examples = [SimpleNamespace(id=i, label="a" if i < count else "b") for i in range(2 * count)]
        train, val = switch.split(0, examples)
        assert sorted(e.id for e in train + val) == list(range(2 * count))
        assert sum(e.label == "a" for e in val) == len(val) / 2
        return len(train) // 2, len(val) // 2

    assert [sizes(n) for n in (50, 40, 15, 10, 4, 2, 1)] == [(45, 5), (36, 4), (13, 2), (9, 1), (3, 1), (1, 1), (1, 0)]
    examples = [SimpleNamespace(id=i, label="a") for i in range(50)]
    splits = [switch.split(seed, examples) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] and splits[0] != splits[2]


def test_the_tally_by_hand():
    tally = yes_no.tally([0.5, 0.9, 0.49, 0.2, 0.8], [True, False, True, False, True])
    assert (tally["count"], tally["correct"], tally["accuracy"]) == (5, 3, 0.6)
    assert tally["confusion"] == [[1, 1], [1, 2]] and tally["majority"] == 0.6


def test_a_clip_is_cut_or_followed_by_silence(tmp_path):
    write_wav(tmp_path / "a.wav", sine(440, 0.5))
    longer, shorter = (torch.from_numpy(load_logmel(tmp_path / "a.wav", clip_s)) for clip_s in (1.0, 0.4))
    assert longer.shape == (101, 64) and shorter.shape == (41, 64)
    assert longer[53:].eq(-100).all() and longer[:48].max() > 0
    assert torch.equal(longer[:38], shorter[:38])


def test_augmentation_is_off_when_it_decides(world):
    model = make_cnn14(2, 1 / 16, 0).train()
    heard = list(torch.randn(5, 51, 64) * 10 - 40)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    p = switch.teacher_probabilities(model, heard, 2)
    alone = [switch.teacher_probabilities(model, [frames], 1)[0] for frames in heard]
    assert p == pytest.approx(alone, abs=1e-6)  # neighbours do not matter
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


# ---- what it must not read ----


def test_the_labels_of_the_training_manifest_change_no_decision(world, learnt, tmp_path, capsys):
    folder, records, log = learnt
    assert not any("oracle" in record for record in records.values())
    wrong = edited(world / "told", tmp_path / "wrong", lambda i, record: record.update(label=CLASSES[(i + 1) % 3]))
    odd = edited(world / "told", tmp_path / "odd", lambda i, record: record.update(label="gnu" if i else "dog"))
    accuracy = {}
    for name, manifest in (("told", f"{world}/told/manifest.jsonl"), ("mixed", wrong), ("odd", odd)):
        go_on(folder, tmp_path / "runs" / name)
        again, other = run(world, tmp_path / "runs" / name, train_manifest=manifest)
        oracle = [record.pop("oracle", None) for record in again.values()]
        right = {"told": [1.0, 0.0, 0.0] * 4, "mixed": [0.0, 0.0, 1.0] * 4, "odd": [1.0] + [None] * 11}
        assert again == records and oracle == right[name]
        accuracy[name] = other[-1]["training"]["accuracy"]
        assert other[:-1] == log[:-1] and "read for the figures under 'training' and for 'oracle'" in other[-1]["note"]
        assert other[-1]["training"]["count"] == (1 if name == "odd" else 12)
    assert accuracy == {"told": 1.0, "mixed": pytest.approx(1 / 3), "odd": 1.0}
    said = capsys.readouterr().out
    assert "wins 1 classes, ties 1, loses 1" in said
    assert "right for 100.0 % of the validation clips; always giving the more" in said
    assert "right for 33.3 % of the training clips" in said


# ---- bad clips ----


def silence_clips(*which):
    return lambda i, record: record.update(audio="gone.wav") if i in which else None


def test_bad_clips_are_recorded_and_counted_and_do_not_change_the_others(world, learnt, tmp_path):
    folder, records, _ = learnt
    go_on(folder, tmp_path / "run")
    train = edited(world / "blind", tmp_path / "b", silence_clips(0, 7))
    others, log = run(world, tmp_path / "run", train_manifest=train, max_bad=0.2)
    assert list(others) == list(records) and log[-1]["bad"] == {"missing": 2} and log[-1]["clips"] == 10
    for i, (name, record) in enumerate(others.items()):
        if i in (0, 7):
            assert set(record) == {"id", "bad", "detail"} and record["bad"] == "missing"
        else:
            assert record == {"id": name, "p_teacher": pytest.approx(records[name]["p_teacher"], abs=2e-6)}


def test_bad_analysis_clips_are_left_out(world, tmp_path):
    analysis = edited(world / "analysis", tmp_path / "a", silence_clips(4))
    _, log = run(world, tmp_path / "run", manifest=analysis, max_bad=0.2, epochs=1)
    assert log[0]["bad"] == 1 and log[0]["train_clips"] + log[0]["validation_clips"] == 29


@pytest.mark.parametrize("bad", [("cat", ""), ("", "cat"), ("cat", "cat")])
def test_a_class_that_one_of_the_two_never_answered_is_left_out_and_counted(world, tmp_path, capsys, bad):
    clips = f"{world}/analysis/manifest.jsonl"
    teacher, student = (write_answers(tmp_path / name, clips, accuracies, of) for name, accuracies, of in (
        ("t", TEACHER, bad[:1]), ("s", STUDENT, bad[1:])))
    records, log = run(world, tmp_path / "run", teacher=teacher, student=student, epochs=1,
                       train_manifest=f"{world}/told/manifest.jsonl")
    assert [log[-1][f"classes_{what}"] for what in ("won", "tied", "lost", "left_out")] == [1, 0, 1, 1]
    assert log[0]["train_clips"] + log[0]["validation_clips"] == 20 and log[-1]["training"]["count"] == 8
    assert ["oracle" in record for record in records.values()] == [True, False, True] * 4
    assert "loses 1; 1 left out, whose clips were all bad for one of" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["analysis", "blind"])
def test_too_many_bad_clips_fail(world, tmp_path, which):
    path = edited(world / which, tmp_path / "bad", silence_clips(0))
    field = {"analysis": "manifest", "blind": "train_manifest"}[which]
    said = "switch: 1 of (30|12) clips are bad .*with max_bad 0.01; the first: .*gone.wav"
    with pytest.raises(ValueError, match=said):
        run(world, tmp_path / "run", **{field: path}, epochs=1)
    assert not (tmp_path / "run" / "switch.jsonl").exists()


# ---- exact resume ----


def start(config, run_dir):
    command = [sys.executable, "-m", "minixmd.train", str(config), f"run_dir={run_dir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            cwd=Path(__file__).resolve().parents[1])


def test_a_stage_stopped_after_an_epoch_ends_bit_equal(world, tmp_path):
    how = dict(augment="both", epochs=2)
    run(world, tmp_path / "whole", **how)

    def stop(line):
        append_jsonl(tmp_path / "stopped/log.jsonl", line)
        if line["epoch"] == 2:  # logged, but not saved
            raise KeyboardInterrupt

    (tmp_path / "stopped").mkdir()
    with pytest.raises(KeyboardInterrupt):
        switch.run(Switch(**fields(world, **how)), tmp_path / "stopped", stop)
    run(world, tmp_path / "stopped", **how)
    for kind in ("weights", "optimizer"):
        whole, again = (load_file(tensor_file(tmp_path / side, kind, 2)) for side in ("whole", "stopped"))
        assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    for name in ("switch.jsonl", "results.json", "log.jsonl", "state.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "stopped" / name).read_text(), name


@pytest.mark.slow
def test_a_killed_stage_ends_bit_equal(world, tmp_path):
    wanted = fields(world, augment="both")
    config = write_config(tmp_path / "config.py", f"[Switch(**{wanted!r})]")
    assert start(config, tmp_path / "whole").wait() == 0
    process, log = start(config, tmp_path / "killed"), tmp_path / "killed" / "switch" / "log.jsonl"
    while process.poll() is None and (not log.exists() or '"epoch": 3,' not in log.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert start(config, tmp_path / "killed").wait() == 0
    names = [sorted(path.name for path in (tmp_path / side / "switch").iterdir()) for side in ("whole", "killed")]
    assert names[0] == names[1] and not [name for name in names[0] if name.startswith(("state", "weights", "optim"))]
    for name in ("switch.jsonl", "results.json", "log.jsonl"):
        assert (tmp_path / "whole/switch" / name).read_text() == (tmp_path / "killed/switch" / name).read_text(), name


def test_a_stage_stopped_among_its_decisions_goes_on_with_the_shards_it_has(world, learnt, tmp_path, monkeypatch):
    folder, records, log = learnt
    go_on(folder, tmp_path / "stopped")
    monkeypatch.setattr(distributed, "SHARD", 5)
    real, calls = switch.teacher_probabilities, []

    def interrupted(model, heard, batch_size):
        calls.append(len(heard))
        if calls.count(5) == 2:
            raise KeyboardInterrupt
        return real(model, heard, batch_size)

    monkeypatch.setattr(switch, "teacher_probabilities", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "stopped")
    first = (tmp_path / "stopped/shards/0000000.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(switch, "teacher_probabilities", real)
    switch.run(Switch(**fields(world)), tmp_path / "stopped", partial(append_jsonl, tmp_path / "stopped/log.jsonl"))
    assert (tmp_path / "stopped/shards/0000000.jsonl").stat().st_mtime_ns == first
    assert log_of(tmp_path / "stopped") == log
    again = [json.loads(line) for line in (tmp_path / "stopped/switch.jsonl").read_text().splitlines()]
    assert [r["id"] for r in again] == list(records)
    assert [r["p_teacher"] for r in again] == pytest.approx([r["p_teacher"] for r in records.values()], abs=2e-6)


# ---- pretrained weights ----


def test_it_starts_from_a_checkpoint_with_a_head_of_its_own(world, tmp_path):
    theirs = make_cnn14(527, 1 / 16, 5)
    torch.save({"iteration": 1, "model": {**theirs.state_dict(), **front_end()}}, tmp_path / "c.pth")
    _, scratch = run(world, tmp_path / "scratch", epochs=1)
    _, tuned = run(world, tmp_path / "tuned", epochs=1, weights=f"{tmp_path}/c.pth", lr=1e-9, warmup_ratio=0.0)
    assert scratch[1]["loss"] != tuned[1]["loss"]
    state = load_file(tensor_file(tmp_path / "tuned", "weights", 1))
    assert state["fc_audioset.weight"].shape == (2, 128)
    torch.testing.assert_close(state["conv_block3.conv1.weight"], theirs.conv_block3.conv1.weight, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="c.pth: not this Cnn14_16k, .* tensors do not fit: bn0.*|conv_block1"):
        run(world, tmp_path / "wide", epochs=1, weights=f"{tmp_path}/c.pth", width=1 / 8)


# ---- wrong input ----


def test_results_that_cannot_be_compared_are_refused(world, tmp_path):
    def refused(said, **more):
        with pytest.raises(ValueError, match=said):
            run(world, tmp_path / "run", **more)
        assert not list((tmp_path / "run").iterdir()), "before any work"

    other = write_answers(tmp_path / "other", world / "told/manifest.jsonl", TEACHER)  # another split
    for who in ("teacher", "student"):
        refused("switch: .*analysis/manifest.jsonl and .*other/results.json: clip 'clip12': only the f", **{who: other})
    for name, more in (("c", dict(question="Who?")), ("d", dict(options=["cat", "dog", "owl"])), ("e", dict(answer=0))):
        path = edited(world / "analysis", tmp_path / name, lambda i, record, more=more: i == 5 and record.update(more))
        refused(f"{name}/manifest.jsonl and .*teacher.*: clip 'clip5': the two are different questions", manifest=path)
    path = edited(world / "analysis", tmp_path / "f", lambda i, record: i == 7 and record.update(label=None))
    refused("f/manifest.jsonl: example 'clip7' has no label, by which the switch learns", manifest=path)
    answers = [write_answers(tmp_path / f"of {bad[0]}", world / "analysis/manifest.jsonl", TEACHER, bad)
               for bad in (("dog",), ("cat", "owl"))]
    refused("of cat.* have no class that both answered", teacher=answers[0], student=answers[1])


def test_clips_without_sound_or_too_few_of_them_are_refused(world, tmp_path):
    silent = edited(world / "blind", tmp_path / "silent", lambda i, record: record.update(audio=None))
    with pytest.raises(ValueError, match="switch: .*silent/manifest.jsonl: example 'clip0' has no audio"):
        run(world, tmp_path / "a", train_manifest=silent)
    assert not list((tmp_path / "a").iterdir()), "before any work"
    single = tmp_path / "single.jsonl"
    record = json.loads((world / "analysis/manifest.jsonl").read_text().splitlines()[0])
    single.write_text(json.dumps({**record, "audio": f"{world}/analysis/0.wav"}) + "\n")
    answers = write_answers(tmp_path / "t", single, TEACHER)
    with pytest.raises(ValueError, match="1 examples are too few to learn from and to validate"):
        run(world, tmp_path / "b", manifest=str(single), teacher=answers, student=answers)


def test_a_loss_that_is_not_finite_stops_the_stage(world, tmp_path):
    with pytest.raises(ValueError, match="the loss of epoch 1 is (nan|inf); stopped"):
        run(world, tmp_path / "run", lr=1e30)
    assert not (tmp_path / "run" / "state.json").exists()


@pytest.mark.parametrize("field, value, says", [
    ("clip_s", 0.3, "clip_s must be >= 0.31, got 0.3"), ("width", 0.0, "width must be > 0, got 0.0"),
    ("augment", "specaugment", "augment must be 'spec', 'mixup', 'both' or 'off', got 'specaugment'"),
    ("labels", "@own", "has no field 'labels'"), ("device", "gpu", "device must be"),
])  # fmt: skip
def test_a_wrong_field_is_refused(world, field, value, says):
    with pytest.raises(ConfigError) as caught:
        Switch(**fields(world, **{field: value}))
    assert says in str(caught.value)


def test_files_that_are_not_there_are_named_before_any_work(world, tmp_path):
    from minixmd.config.references import check_files

    for field in ("train_manifest", "weights"):
        config = write_config(tmp_path / "c.py", f"[Switch(**{fields(world, **{field: 'no.file'})!r})]")
        with pytest.raises(ConfigError, match=f"switch 'switch' {field} 'no.file' does not exist"):
            check_files(load_config(config).stages)


def test_a_clip_that_cannot_be_read_has_a_record_in_the_place_of_its_frames(world):
    examples = [replace(example, audio="nowhere.wav") if i == 1 else example
                for i, example in enumerate(read_manifest(world / "blind/manifest.jsonl")[:3])]
    logmels, bad = load_logmels(examples, Switch(**fields(world, clip_s=1.0)))
    assert list(logmels) == ["clip0", "clip2"]
    assert bad == {"clip1": {"id": "clip1", "bad": "missing", "detail": "nowhere.wav: missing"}}
