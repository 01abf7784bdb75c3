"""The loop and the runner: what is learnt, exact resume after SIGKILL, and one clear line for every wrong input."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from media_files import write_mp4
from mini import CLASSES, write_clips, write_config, write_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, trainer_of

import minixmd
import minixmd.models.lora
from minixmd import runner
from minixmd.config import GRPO, SFT, Distill, FactCheck, Label, Traces
from minixmd.inputs.examples import Example, read_manifest
from minixmd.inputs.prompts import build_prompt
from minixmd.kernels import logprob
from minixmd.learning import decoder
from minixmd.learning.optim import adamw, optimizer_tensors, restore_optimizer
from minixmd.learning.targets import Item, resolve_targets
from minixmd.models import head, weights
from minixmd.runner import main
from minixmd.runs.device import describe_device
from minixmd.runs.files import write_safetensors
from minixmd.runs.records import write_jsonl
from minixmd.runs.training_state import load_state, tensor_file
from minixmd.stages import multiple_choice
from minixmd.train import Trainer

FRAMES = "min_pixels=3136, max_pixels=3136"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models and clips that every test here may read."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "ears", "audio")
    write_model(folder / "eyes", "vision")
    write_clips(folder / "clips")
    write_clips(folder / "blind", answers=False)
    return folder


def train(world, kind="SFT", **more):
    fields = dict(name="student", allow_outside=True, model=f"{world}/ears",
                  manifest=f"{world}/clips/manifest.jsonl", batch_size=4, lr=1e-2, device="cpu")
    return f"{kind}({', '.join(f'{key}={value!r}' for key, value in {**fields, **more}.items())})"


def run(tmp_path, stages, *overrides):
    config = write_config(tmp_path / "config.py", f"[{stages}]")
    return main([str(config), f"run_dir={tmp_path / 'run'}", *overrides])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- memory that runs out ----


def gpu(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")


def host(*_):
    torch.empty(2**50)


def python(*_):
    raise MemoryError


@pytest.mark.parametrize("name, ran_out, said", [
    ("backward of SFT", gpu, "the GPU ran out of memory; .* what to lower [(]OutOfMemoryError: CUDA out of memory.*"),
    ("backward of SFT", host, "this machine ran out of memory; .* [(]RuntimeError: .*DefaultCPUAllocator.*"),
    ("rollout", python, "this machine ran out of memory; .* [(]MemoryError: [)]"),
    ("loading", host, "this machine ran out of memory; .*"),
])
def test_memory_that_runs_out_is_a_line_and_the_same_command_goes_on(
        world, tmp_path, capsys, monkeypatch, name, ran_out, said):
    holder, function = {
        "backward of SFT": (head, "raw_logits"), "rollout": (decoder, "KVCache"),
        "loading": (weights, "build")}[name]  # fmt: skip
    works, calls = getattr(holder, function), []

    def fails_once(*args, **options):
        calls.append(name)
        return works(*args, **options) if len(calls) > 1 else ran_out()

    monkeypatch.setattr(holder, function, fails_once)
    fields = dict(kind="GRPO", group_size=2, max_new_tokens=4) if name == "rollout" else {}
    stage = train(world, max_steps=1, val_manifest=f"{world}/clips/manifest.jsonl", **fields)
    assert run(tmp_path, stage) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minixmd: student")]
    assert re.fullmatch(f"minixmd: student: {said}", line), line
    assert run(tmp_path, stage) == 0  # from where it stopped


def test_another_runtime_error_is_not_taken_for_a_shortage(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "sft_step", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run(tmp_path, train(world))


# ---- what it does ----


@pytest.mark.slow
def test_sft_learns_what_it_has_seen_and_evaluates_as_it_validated(world, tmp_path):
    seen = f"{world}/clips/manifest.jsonl"
    more = dict(epochs=60, val_manifest=seen, eval_every=30, trainable="full", lr=3e-3)
    assert run(tmp_path, train(world, **more) + f", Evaluate(name='after', model='@student', manifest='{seen}')") == 0
    log = log_of(tmp_path / "run" / "student")
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 180 and losses[-1] < losses[0] / 10
    best = max(line["val_accuracy"] for line in log if "val_accuracy" in line)
    results = json.loads((tmp_path / "run" / "after" / "results.json").read_text())
    assert results["accuracy"] == best == 1.0
    assert set(results["classes"]) == set(CLASSES) and results["groups"]["one"]["count"] == 12


def test_full_training_changes_every_tensor_but_the_position_table(world, tmp_path):
    assert run(tmp_path, train(world, trainable="full", max_steps=2, lr=1e-3)) == 0
    before, _ = minixmd.load(world / "ears")
    after, _ = minixmd.load(tmp_path / "run" / "student" / "best")
    same = {name for name, p in after.named_parameters() if torch.equal(p, before.get_parameter(name))}
    assert same == {"audio_tower.embed_positions.weight"}


def test_lora_training_leaves_the_base_alone_and_writes_an_adapter_that_loads(world, tmp_path):
    assert run(tmp_path, train(world, max_steps=3)) == 0
    before, _ = minixmd.load(world / "ears")
    after, processor = minixmd.load(tmp_path / "run" / "student" / "best")
    adapter = {name for name, p in after.named_parameters() if "lora_" in name}
    base = {name: p for name, p in after.named_parameters() if name not in adapter}
    assert all(torch.equal(p, before.get_parameter(name)) for name, p in base.items())
    assert len(adapter) == 2 * 7 * 2 and all(after.get_parameter(name).abs().sum() > 0 for name in adapter)


def test_training_with_triton_kernels_equals_training_without(world, tmp_path, capsys, monkeypatch):
    used, logs = set(), {}

    def noted(function, *args, **options):
        used.add((function.__name__, options.get("backend") or next(a for a in args if isinstance(a, str))))
        return function(*args, **options)

    for module, name in ((logprob, "row_stats"), (logprob, "logits_grad"), (minixmd.models.lora, "lora_linears")):
        monkeypatch.setattr(module, name, partial(noted, getattr(module, name)))
    for backend in ("torch", "triton"):
        (tmp_path / backend).mkdir()
        short = dict(max_steps=2, batch_size=1)
        assert run(tmp_path / backend, train(world, **short, backend=backend)) == 0
        assert f"on cpu, float32, kernels in {backend}, " in capsys.readouterr().out
        assert used == {(name, backend) for name in ("row_stats", "logits_grad", "lora_linears")}
        used.clear()
        logs[backend] = [(line["loss"], line["grad_norm"]) for line in log_of(tmp_path / backend / "run/student")[1:]]
    assert len(logs["torch"]) == 2
    for a, b in zip(*logs.values(), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_triton_kernels_are_refused_where_they_cannot_run(world, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "backend 'triton' needs a GPU" in refused(tmp_path, capsys, train(world, backend="triton"))
    assert not (tmp_path / "run").exists()
    assert run(tmp_path, train(world, backend="auto", max_steps=1)) == 0
    assert "kernels in torch" in capsys.readouterr().out


def test_the_whole_distillation_line_runs_without_an_answer_in_the_training_manifest(world, tmp_path, capsys):
    blind, seen = f"{world}/blind/manifest.jsonl", f"{world}/clips/manifest.jsonl"
    stages = f"""
        Evaluate(name='ears', model='{world}/ears', manifest='{seen}'),
        Evaluate(name='eyes', model='{world}/eyes', manifest='{seen}', media='video', {FRAMES}),
        Label(name='own', model='{world}/ears', manifest='{blind}'),
        Label(name='taught', model='{world}/eyes', manifest='{blind}', media='video', {FRAMES}),
        Switch(name='switch', teacher='@eyes', student='@ears', manifest='{seen}', train_manifest='{blind}',
               width=1/32, clip_s=0.5, epochs=1),
        {train(world, 'Distill', manifest=blind, teacher_labels='@taught', student_labels='@own',
               switch='@switch', gate='learned')},
        Evaluate(name='after', model='@student', manifest='{seen}'),
        Report(tables={{'before': {{'seen': '@ears'}}, 'after': {{'seen': '@after'}}}})"""
    assert run(tmp_path, stages) == 0
    out = capsys.readouterr().out
    assert "| before" in out and "| after" in out
    start, *steps = log_of(tmp_path / "run" / "student")
    switch = (tmp_path / "run/switch/switch.jsonl").read_text().splitlines()
    to_teacher = sum(json.loads(line)["p_teacher"] >= 0.5 for line in switch)
    assert start["learns_from"].get("teacher", 0) == to_teacher and sum(start["learns_from"].values()) == 12
    assert sum(line["to_teacher"] for line in steps) == to_teacher and len(steps) == 3  # one epoch
    assert run(tmp_path, stages) == 0
    assert capsys.readouterr().out.count("finished before, skipped") == 8


def test_where_the_switch_says_so_the_teachers_letter_is_learnt_and_elsewhere_the_students(tmp_path):
    examples = [Example(id=i, audio="a.wav", video=None, question="?", options=CLASSES, answer=2) for i in "abcd"]

    def write(name, records):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))
        return str(tmp_path / name)

    teacher = write("teacher", [dict(id=i, option="dog") for i in "abc"] + [dict(id="d", bad="missing", detail="")])
    student = write("student", [dict(id=i, option="cat") for i in "abcd"])
    switch = write("switch", [dict(id="a", p_teacher=1.0), dict(id="b", p_teacher=0.0), dict(id="c", bad="missing"),
                              dict(id="d", p_teacher=1.0)])
    base = dict(manifest="m", model="m", name="s", teacher_labels=teacher)

    def learnt(**more):
        items, counts = resolve_targets(Distill(**base | more), examples)
        return {item.example.id: item.target for item in items}, counts

    assert learnt() == ({"a": 0, "b": 0, "c": 0}, {"teacher": 3, "left out: missing": 1})
    assert learnt(gate="learned", switch=switch) == (
        {"a": 0}, {"teacher": 1, "left out: switch open": 2, "left out: missing": 1})  # fmt: skip
    assert learnt(gate="learned", switch=switch, student_labels=student) == (
        {"a": 0, "b": 1, "c": 1}, {"teacher": 1, "student": 2, "left out: missing": 1})  # fmt: skip
    half = write("half", [dict(id=i, p_teacher=0.0) for i in "abd"])
    with pytest.raises(ValueError, match="half: no decision on example 'c' of m"):
        learnt(gate="learned", switch=half, student_labels=student)
    half = write("half", [dict(id=i, option="cat") for i in "abd"])
    for more in (dict(gate="learned", switch=switch), dict(gate="never", teacher_labels=None)):
        with pytest.raises(ValueError, match="half: no label for example 'c' of m"):
            learnt(student_labels=half, **more)
    assert learnt(gate="learned", switch=write("all", [dict(id=i, p_teacher=1.0) for i in "abcd"]),
                  student_labels=half)[1]["teacher"] == 3  # c's is not needed


def test_sft_learns_every_trace_of_a_clip_and_leaves_out_clips_without_one(tmp_path):
    examples = [Example(id=i, audio="a.wav", video=None, question="?", options=CLASSES) for i in "abc"]
    path = tmp_path / "traces.jsonl"

    def learnt(*records):
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        items, counts = resolve_targets(SFT(name="s", model="m", manifest="m", traces=str(path)), examples)
        assert all(item.source == "trace" and item.teacher_topk is None for item in items)
        return [(item.example.id, item.target) for item in items], counts

    traces = [dict(id="c", text="<think>x</think><answer>A</answer>", score=1.5), dict(id="a", text="B"),
              dict(id="c", text="C")]  # fmt: skip
    assert learnt(*traces) == ([(r["id"], r["text"]) for r in traces], {"traces": 3, "left out: no trace": 1})
    for wrong, message in (([dict(id="z", text="B")], "traces.jsonl: trace 1 is of 'z', which is not in m"),
                           ([traces[0], dict(id="a", text=None)], "traces.jsonl:2: needs 'text', a str"),
                           ([], "no clip is left to learn from .*'left out: no trace'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            learnt(*wrong)


@pytest.mark.parametrize("text, why", [
    ("<think>I hear <|AUDIO|>.</think><answer>A</answer>", "traces left out: special token"),
    ("I hear it.<|im_end|>", "traces left out: special token"),
    ("I hear it at <|1.20|> s.", "traces left out: special token"),  # Qwen2-Audio has such
    ("<think>x</think><answer>A</answer><answer>B</answer>", "traces left out: several answers"),
    ("<answer>A</answer> or rather <answer>A", "traces left out: several answers"),
])
def test_a_trace_that_cannot_be_learnt_is_left_out_and_counted(tmp_path, text, why):
    examples = [Example(id=i, audio="a.wav", video=None, question="?", options=CLASSES) for i in "ab"]
    path = tmp_path / "traces.jsonl"
    stage = SFT(name="s", model="m", manifest="m", traces=str(path), trace_filter="first")
    records = [dict(id="a", sample=0, text="It barks: A"), dict(id="b", sample=0, text=text),
               dict(id="a", sample=1, text=text)]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    items, counts = resolve_targets(stage, examples)
    assert items == [Item(examples[0], "It barks: A", "trace")]
    assert counts == {"traces": 1, "left out: no trace": 1, why: 1, "traces that are not first": 1}
    path.write_text(json.dumps(records[1]) + "\n")
    with pytest.raises(ValueError, match=rf"s: no clip is left to learn from .*'{why}': 1"):
        resolve_targets(stage, examples)


@pytest.mark.parametrize("record, says", [
    ({"clip": 1}, "labels:2: needs 'id', a str"), (7, "labels:2: must be a JSON object, got int"),
    ({"id": ["b"], "option": "dog"}, "labels:2: needs 'id', a str, got \\['b'\\]"),
    ({"id": "b"}, "labels:2: needs 'option', a str"),
])
def test_labels_that_are_none_are_one_line(tmp_path, record, says):
    examples = [Example(id=i, audio="a.wav", video=None, question="?", options=CLASSES) for i in "ab"]
    path = tmp_path / "labels"
    path.write_text("".join(json.dumps(r) + "\n" for r in (dict(id="a", option="dog"), record)))
    with pytest.raises(ValueError, match=says):
        resolve_targets(GRPO(name="g", model="m", manifest="m", teacher_labels=str(path)), examples)


def test_what_a_trace_says_is_the_turn_that_is_learnt(tmp_path):
    stage = SFT(name="s", model="m", manifest="m", traces="t", prompt="{options}")
    example = Example(id="a", audio=str(tmp_path), video=None, question="?", options=CLASSES)
    seen = []
    build_prompt(lambda conversation, *options: seen.append(conversation), example, stage.prompt_format,
                 answer="<think>hm</think>")
    assert seen[0][1] == {"role": "assistant", "content": "<think>hm</think>"}


def test_a_clip_over_the_token_budget_is_counted_and_the_run_goes_on(world, tmp_path):
    soundfile.write(tmp_path / "long.wav", torch.rand(25 * 16_000).numpy() / 10, 16_000)
    lines = (world / "clips" / "manifest.jsonl").read_text().splitlines()
    long = {**json.loads(lines[0]), "id": "long", "audio": "long.wav"}
    clips = [{**json.loads(line), "audio": str(world / "clips" / json.loads(line)["audio"])} for line in lines]
    write_jsonl(tmp_path / "manifest.jsonl", [long, *clips])
    stage = train(world, manifest=str(tmp_path / "manifest.jsonl"), epochs=2, max_bad=0.2, micro_batch_tokens=600)
    assert run(tmp_path, stage) == 0
    log = log_of(tmp_path / "run" / "student")
    bad = [line for line in log if "bad" in line]
    assert [line["bad"] for line in bad] == ["too long"] * 2  # once an epoch
    assert re.fullmatch(r"long: too long \(the prompt has \d+ tokens, over micro_batch_tokens 600\)", bad[0]["detail"])
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))


@pytest.mark.slow
def test_a_video_of_five_minutes_among_the_clips_is_counted_and_the_run_goes_on(world, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (300, 240, 320, 3), dtype=np.uint8)
    write_mp4(tmp_path / "film.mp4", frames, fps=1)
    lines = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()]
    clips = [{**line, "video": str(world / "clips" / line["video"])} for line in lines]
    write_jsonl(tmp_path / "manifest.jsonl", [*clips, {**lines[0], "id": "film", "video": "film.mp4"}])
    shutil.copytree(world / "eyes", tmp_path / "eyes")  # with the positions of the published model
    raw = json.loads((tmp_path / "eyes" / "config.json").read_text())
    (tmp_path / "eyes" / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 32_768}))
    stage = train(world, model=str(tmp_path / "eyes"), media="video", manifest=str(tmp_path / "manifest.jsonl"),
                  epochs=2, max_bad=0.2, min_pixels=3136, max_pixels=262_144)
    assert run(tmp_path, stage) == 0
    log = log_of(tmp_path / "run" / "student")
    bad = [line["detail"] for line in log if "bad" in line]
    assert len(bad) == 2 and all("over micro_batch_tokens 8192" in detail for detail in bad)
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))


@pytest.mark.parametrize("kind", ["SFT", "Distill", "GRPO"])
def test_a_step_whose_clips_are_all_bad_changes_nothing_and_the_run_goes_on(world, tmp_path, kind):
    lines = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()]
    clips = [{**line, "audio": str(world / "clips" / line["audio"])} for line in lines[:3]]
    write_jsonl(tmp_path / "manifest.jsonl", [*clips, {**clips[0], "id": "gone", "audio": "gone.wav"}])
    (tmp_path / "gone.wav").write_bytes(b"no sound")
    fields = dict(manifest=str(tmp_path / "manifest.jsonl"), batch_size=1, max_bad=0.5)
    if kind == "Distill":
        write_jsonl(tmp_path / "labels.jsonl", [{"id": name, "option": CLASSES[0]} for name in
                                                ("clip0", "clip1", "clip2", "gone")])
        fields["teacher_labels"] = str(tmp_path / "labels.jsonl")
    if kind == "GRPO":
        fields |= dict(group_size=2, max_new_tokens=4)
    assert run(tmp_path, train(world, kind, **fields)) == 0
    log = log_of(tmp_path / "run" / "student")
    steps = [line for line in log if "loss" in line]
    assert len(steps) == 4 and sum("grad_norm" in line for line in steps) == 3
    assert [line["bad"] for line in log if "bad" in line] == ["unreadable"]


def test_every_epoch_is_a_new_permutation_of_all_examples():
    stage = SFT(name="s", model="m", manifest="m", seed=3, batch_size=4, device="cpu")
    trainer = trainer_of(stage, tiny_model("audio"), num_items=10)
    epochs = [[i for step in (3 * epoch, 3 * epoch + 1, 3 * epoch + 2) for i in trainer.batch_indices(step)]
              for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]


def test_a_device_is_named_and_looked_for_only_where_a_model_runs_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    common = dict(name="s", manifest="m.jsonl", device="cuda")
    assert describe_device(Traces(**common, endpoint="http://localhost:8000/v1", served="x")) == ""
    assert describe_device(FactCheck(**common, traces="t", checker="endpoint", endpoint="http://localhost:8000/v1",
                                     served="x")) == ""
    assert describe_device(FactCheck(**common, traces="t", checker="verdicts", verdicts="v.jsonl")) == ""
    for stage in (Traces(**common, model="m"), FactCheck(**common, traces="t", model="m"), Label(**common, model="m")):
        with pytest.raises(ValueError, match="s: device 'cuda' was asked for, but torch sees no GPU"):
            describe_device(stage)
    said = describe_device(Label(**common | dict(device="cpu"), model="m"))
    assert said.startswith(" on cpu, float32, kernels in torch, ")


# ---- exact resume ----


ADAPTER = "student/best/adapter_model.safetensors"


def state_files(folder):
    names = [path.name for path in folder.iterdir()]
    return sorted(name for name in names if name.startswith(("state", "weights", "optimizer", ".")))


def start(config, run_dir):
    command = [sys.executable, "-m", "minixmd.train", str(config), f"run_dir={run_dir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            cwd=Path(__file__).resolve().parents[1])


@pytest.mark.slow
def test_a_run_killed_at_random_steps_ends_with_the_weights_of_an_uninterrupted_one(world, tmp_path):
    stages = train(world, epochs=40, batch_size=3, eval_every=10, save_every=7,
                   val_manifest=f"{world}/clips/manifest.jsonl")
    config = write_config(tmp_path / "config.py", f"[{stages}]")
    assert start(config, tmp_path / "whole").wait() == 0
    seed = random.randrange(10**6)
    killed = []
    for stop in sorted(random.Random(seed).sample(range(2, 120), 2)):
        process, log = start(config, tmp_path / "killed"), tmp_path / "killed" / "student" / "log.jsonl"
        while process.poll() is None and (not log.exists() or f'"step": {stop},' not in log.read_text()):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed.append(process.wait())
    assert -signal.SIGKILL in killed, f"seed {seed}: the runs ended before they were killed"
    assert start(config, tmp_path / "killed").wait() == 0
    whole, again = (load_file(tmp_path / side / ADAPTER) for side in ("whole", "killed"))
    assert whole.keys() == again.keys(), f"seed {seed}"
    assert all(torch.equal(whole[key], again[key]) for key in whole), f"seed {seed}"
    assert state_files(tmp_path / "killed" / "student") == [], f"seed {seed}"
    steps = [[(line["step"], line.get("loss"), line.get("val_accuracy")) for line in log_of(folder / "student")]
             for folder in (tmp_path / "whole", tmp_path / "killed")]
    assert steps[0] == steps[1], f"seed {seed}"


def test_a_validation_that_fails_costs_no_step_and_is_done_by_the_next_run_once(world, tmp_path, monkeypatch):
    stages = train(world, epochs=2, max_steps=5, eval_every=2, val_manifest=f"{world}/clips/manifest.jsonl")
    monkeypatch.setattr(runner, "finish", lambda folder: None)  # which deletes the states that are compared
    (tmp_path / "whole").mkdir()
    assert run(tmp_path / "whole", stages) == 0
    seen, step, score = [], Trainer.sft_step, multiple_choice.score_letters

    def stepping(trainer, micro_batches):
        seen.append(trainer.step + 1)
        if seen.count(3) == 1 and trainer.step == 2:
            raise KeyboardInterrupt
        return step(trainer, micro_batches)

    def scoring(*given, **more):
        seen.append("validation")
        if seen.count("validation") % 2:  # each for the first time
            raise ValueError("the logits are not finite")
        return score(*given, **more)

    monkeypatch.setattr(Trainer, "sft_step", stepping)
    monkeypatch.setattr(multiple_choice, "score_letters", scoring)
    assert [run(tmp_path, stages) for _ in range(5)] == [1, 130, 1, 1, 0]
    twice = ["validation"] * 2
    assert seen == [1, 2, *twice, 3, 3, 4, *twice, 5, *twice]
    whole, again = tmp_path / "whole/run/student", tmp_path / "run/student"
    assert state_files(whole) == state_files(again) and load_state(whole) == load_state(again)
    for name in ("best/adapter_model.safetensors", *state_files(whole)):
        if name.endswith("safetensors"):
            a, b = load_file(whole / name), load_file(again / name)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    steps = [[(line["step"], line.get("loss"), line.get("val_accuracy")) for line in log_of(folder)]
             for folder in (whole, again)]
    assert steps[0] == steps[1] and sum(accuracy is not None for *_, accuracy in steps[0]) == 3


def test_a_new_best_writes_no_tensor_and_its_weights_are_published(world, tmp_path, monkeypatch):
    written, seen, accuracies = [], {}, [0.25, 0.75, 0.5, 0.75]

    def writing(path, tensors, metadata):
        written.append(path.name)
        write_safetensors(path, tensors, metadata)

    def validating(model, *given):
        seen[len(seen)] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        return accuracies[len(seen) - 1], {}

    monkeypatch.setattr("minixmd.runs.training_state.write_safetensors", writing)
    monkeypatch.setattr("minixmd.train.validation_accuracy", validating)
    monkeypatch.setattr(runner, "finish", lambda folder: None)
    assert run(tmp_path, train(world, epochs=4, max_steps=8, eval_every=2, save_every=3,
                               val_manifest=f"{world}/clips/manifest.jsonl")) == 0
    saved = [2, 3, 4, 6, 8]
    assert written == [f"{kind}-{step:06d}.safetensors" for step in saved for kind in ("weights", "optimizer")]
    folder = tmp_path / "run" / "student"
    assert load_state(folder) == {"step": 8, "best": 0.75, "best_step": 4, "bad": 0, "varied": False}  # earliest
    assert state_files(folder) == ["optimizer-000008.safetensors", "state.json", "weights-000004.safetensors",
                                   "weights-000008.safetensors"]
    model, _ = minixmd.load(folder / "best")
    kept = load_file(tensor_file(folder, "weights", 4))
    assert kept.keys() == seen[1].keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, seen[1][name]) and torch.equal(tensor, model.get_parameter(name))
    assert any(not torch.equal(tensor, seen[3][name]) for name, tensor in kept.items())


@pytest.mark.parametrize("validated", [False, True])
def test_a_kill_between_the_weights_and_the_mark_is_made_good(world, tmp_path, monkeypatch, validated):
    more = dict(max_steps=4, eval_every=2, val_manifest=f"{world}/clips/manifest.jsonl") if validated else {}
    stages = train(world, **more)
    (tmp_path / "whole").mkdir()
    assert run(tmp_path / "whole", stages) == 0
    folder = tmp_path / "run" / "student"

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", killed)
        assert run(tmp_path, stages) == 130
        assert (folder / "best").exists() and "state.json" in state_files(folder)
        shutil.rmtree(folder / "best")
        patch.setattr(Trainer, "sft_step", lambda *given: pytest.fail("a step was taken again"))
        assert run(tmp_path, stages) == 130
    assert run(tmp_path, stages) == 0
    names = [sorted(path.relative_to(side).as_posix() for path in side.rglob("*"))
             for side in (tmp_path / "whole/run/student", folder)]
    assert names[0] == names[1] and "done.json" in names[0] and state_files(folder) == []
    adapters = [(tmp_path / side / ADAPTER).read_bytes() for side in ("whole/run", "run")]
    assert adapters[0] == adapters[1]


def test_a_state_that_does_not_fit_the_model_is_refused(world, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", lambda folder: None)
        assert run(tmp_path, train(world, max_steps=1)) == 0
    path = tensor_file(tmp_path / "run" / "student", "weights", 1)
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name][1:].clone()}, path)
    shutil.rmtree(tmp_path / "run" / "student" / "best")
    line = refused(tmp_path, capsys, train(world, max_steps=1))
    assert line.startswith(f"minixmd: {path}: not a state of this model: {name} is torch.float32 [")


# ---- wrong input: one line, exit status 1, nothing half-written ----


def refused(tmp_path, capsys, stages, *overrides):
    """The one line that a run ends with."""
    assert run(tmp_path, stages, *overrides) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minixmd: ")]
    assert len(lines) == 1
    assert not list((tmp_path / "run").rglob("best/*")) and not list((tmp_path / "run").rglob("done.json"))
    return lines[0]


def broken_clip(world, tmp_path, name, data):
    """A copy of the clips in which clip 0's sound is `data` (bytes, or None for no file) under `name`."""
    shutil.copytree(world / "clips", tmp_path / "clips")
    manifest = tmp_path / "clips" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"0.wav"', json.dumps(name)))
    if data is not None:
        (tmp_path / "clips" / name).write_bytes(data)
    return manifest


def audio_bytes(world, kind):
    wav, mp4 = (world / "clips" / "0.wav").read_bytes(), (world / "clips" / "0.mp4").read_bytes()
    return {"missing": None, "empty file": b"", "truncated": wav[: len(wav) // 2], "unreadable": b"no media at all" * 9,
            "too short": wav[:44] + wav[44:244], "truncated mp4": mp4[: len(mp4) // 2]}[kind]


@pytest.mark.parametrize("kind", ["missing", "empty file", "truncated", "unreadable", "truncated mp4"])
def test_a_bad_clip_is_named_with_its_reason_when_too_many_are_bad(world, tmp_path, capsys, kind):
    manifest = broken_clip(world, tmp_path, "odd name é.wav", audio_bytes(world, kind))
    line = refused(tmp_path, capsys, f"Label(name='own', model='{world}/ears', manifest='{manifest}', max_bad=0.05)")
    assert "1 of 12 clips are bad" in line and "odd name é.wav" in line and "max_bad 0.05" in line
    assert kind.split(" mp4")[0] in line or "unreadable" in line


@pytest.mark.parametrize("stage", ["Label", "Evaluate"])
def test_a_bad_clip_below_the_limit_is_counted_and_left_out(world, tmp_path, stage):
    manifest = broken_clip(world, tmp_path, "gone.wav", None)
    assert run(tmp_path, f"{stage}(name='own', model='{world}/ears', manifest='{manifest}', max_bad=0.1)") == 0
    assert log_of(tmp_path / "run" / "own")[-1]["bad"] == {"missing": 1}


def test_training_counts_bad_clips_and_stops_above_the_limit(world, tmp_path, capsys):
    manifest = broken_clip(world, tmp_path, "gone.wav", None)
    assert run(tmp_path, train(world, manifest=str(manifest), max_bad=0.1)) == 0
    assert [line["bad"] for line in log_of(tmp_path / "run" / "student") if "bad" in line] == ["missing"]
    shutil.rmtree(tmp_path / "run")
    line = refused(tmp_path, capsys, train(world, manifest=str(manifest), max_bad=0.05))
    assert "1 bad clips, above max_bad 0.05 of the 12 to be read" in line and "gone.wav: missing" in line
    shutil.rmtree(tmp_path / "run")  # epochs that max_steps cuts off are not read
    assert refused(tmp_path, capsys, train(world, manifest=str(manifest), max_bad=0.05, epochs=9, max_steps=3)) == line


def test_a_file_without_the_needed_track_is_refused(world, tmp_path, capsys):
    from media_files import grey_frames, write_mp4

    silent = write_mp4(tmp_path / "silent.mp4", grey_frames(4))
    manifest = broken_clip(world, tmp_path, "silent.mp4", silent.read_bytes())
    line = refused(tmp_path, capsys, f"Label(name='own', model='{world}/ears', manifest='{manifest}')")
    assert "silent.mp4: no audio track" in line


@pytest.mark.parametrize("stage", ["Evaluate", "Label", "SFT", "SFT val"])
def test_a_clip_without_what_a_stage_shows_stops_it_before_the_first_clip(world, tmp_path, capsys, monkeypatch, stage):
    manifest = broken_clip(world, tmp_path, "gone.wav", None)
    *lines, last = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines, json.dumps(json.loads(last) | {"video": None})]))
    monkeypatch.setattr("minixmd.inputs.prompts.build_conversation", lambda *args, **more: pytest.fail("asked"))
    manifests = dict(manifest=str(manifest))
    if stage == "SFT val":
        manifests = dict(manifest=f"{world}/clips/manifest.jsonl", val_manifest=str(manifest))
    fields = dict(model=f"{world}/eyes", media="video", **manifests)
    line = refused(tmp_path, capsys, train(world, **fields) if "SFT" in stage else
                   f"{stage}(name='student', {', '.join(f'{key}={value!r}' for key, value in fields.items())})")
    assert line == f"minixmd: student: {manifest}: example 'clip11' has no video"


def test_audio_too_short_for_one_token_is_refused(world, tmp_path, capsys):
    from media_files import sine, write_wav

    short = write_wav(tmp_path / "short.wav", sine(440, 0.02))
    manifest = broken_clip(world, tmp_path, "short.wav", short.read_bytes())
    line = refused(tmp_path, capsys, f"Label(name='own', model='{world}/ears', manifest='{manifest}')")
    assert "short.wav: too short" in line and "320 samples" in line


def test_a_prompt_over_the_models_limit_is_refused(world, tmp_path, capsys):
    write_model(tmp_path / "narrow", "audio", limit=40)
    line = refused(tmp_path, capsys, train(world, model=f"{tmp_path}/narrow"))
    assert "above max_bad" in line and "too long (the prompt has" in line and "over the model's limit of 40" in line


@pytest.mark.parametrize("fault", ["missing", "unexpected", "has shape"])
def test_a_checkpoint_with_a_wrong_tensor_is_refused(world, tmp_path, capsys, fault):
    from safetensors.torch import save_file

    shutil.copytree(world / "ears", tmp_path / "ears")
    path, name = tmp_path / "ears" / "model.safetensors", "language_model.model.norm.weight"
    tensors = load_file(path)
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        name = "language_model.extra.weight"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(31)
    save_file(tensors, path)
    line = refused(tmp_path, capsys, train(world, model=f"{tmp_path}/ears"))
    assert fault in line and name in line and "1 tensors do not fit" in line


@pytest.mark.parametrize("override, message", [
    ("student.batch_sise=2", "config: sft 'student' has no field 'batch_sise'; did you mean 'batch_size'?"),
    ("lr=fast", "config: lr must be a float, got 'fast'"),
])  # fmt: skip
def test_a_wrong_config_is_refused_before_any_work(world, tmp_path, capsys, override, message):
    assert message in refused(tmp_path, capsys, train(world), override)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_config_is_refused_with_the_difference(world, tmp_path, capsys):
    assert run(tmp_path, train(world, max_steps=1)) == 0
    assert run(tmp_path, train(world, max_steps=1), "lr=0.5") == 1
    assert "lr 0.01 -> 0.5" in capsys.readouterr().err


def test_an_unwritable_run_directory_is_named(world, tmp_path, capsys):
    (tmp_path / "run").write_text("a file stands where the directory should be")
    config = write_config(tmp_path / "config.py", f"[{train(world)}]")
    assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("minixmd: ") and str(tmp_path / "run") in error and error.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_the_last_state_whole(world, tmp_path, capsys, monkeypatch):
    real = os.fsync

    def full(number):
        if "optimizer-000002" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    line = refused(tmp_path, capsys, train(world, save_every=1))
    assert "optimizer-000002.safetensors" in line and "No space left on device" in line
    folder = tmp_path / "run" / "student"
    assert load_state(folder)["step"] == 1
    assert state_files(folder) == ["optimizer-000001.safetensors", "state.json", "weights-000001.safetensors",
                                   "weights-000002.safetensors"]  # the last goes at the next start
    monkeypatch.undo()
    assert run(tmp_path, train(world, save_every=1)) == 0


def test_a_manifest_line_that_is_no_example_is_named_by_file_line_and_field(tmp_path):
    good = dict(id="a", question="?", options=["x", "y"])
    cases = [("{", "not JSON"), ("[]", "must be a JSON object"), (json.dumps({**good, "anser": 1}), "'anser'"),
             (json.dumps({"id": "a", "question": "?"}), "needs 'options', a list of str"),
             (json.dumps({**good, "answer": 2}), "'answer'"),
             (json.dumps({**good, "options": ["x", None]}), "'options'"), (json.dumps({**good, "audio": 3}), "'audio'"),
             (json.dumps(good) + "\n" + json.dumps(good), "'id' 'a' already stands in line 1")]  # fmt: skip
    for text, message in cases:
        (tmp_path / "m.jsonl").write_text(text)
        with pytest.raises(ValueError, match="m.jsonl:[12]: ") as caught:
            read_manifest(tmp_path / "m.jsonl")
        assert message in str(caught.value)


def test_the_stage_that_trains_accepts_its_own_defaults():
    assert SFT(name="t", model="m", manifest="x").lr == 1e-4


# ---- what must not pass in silence ----


def test_logits_that_are_not_finite_stop_a_stage_instead_of_answering_a(world, tmp_path, capsys):
    folder = tmp_path / "nan"
    shutil.copytree(world / "ears", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stage = f"Evaluate(name='e', model='{folder}', manifest='{world}/clips/manifest.jsonl', device='cpu')"
    assert "the logits of example 'clip0' are not finite" in refused(tmp_path, capsys, stage)
    model, processor = minixmd.load(folder)
    for temperature in (0.0, 0.7):
        with pytest.raises(ValueError, match="logits are not finite"):
            minixmd.generate(model, processor, [[{"role": "user", "content": "Hm"}]], max_new_tokens=2, seed=0,
                             temperature=temperature)


def test_a_validation_manifest_without_answers_is_refused(world, tmp_path, capsys):
    stages = train(world, val_manifest=f"{world}/blind/manifest.jsonl")
    assert "example 'clip0' has no answer to validate against" in refused(tmp_path, capsys, stages)


def test_an_evaluation_in_which_no_clip_can_be_used_is_refused_whatever_max_bad_says(world, tmp_path, capsys):
    records = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()]
    path = tmp_path / "gone.jsonl"
    path.write_text("".join(json.dumps({**record, "audio": "/nowhere.wav"}) + "\n" for record in records))
    stage = (f"Evaluate(name='e', model='{world}/ears', manifest='{path}', max_bad=1.0, device='cpu', "
             "allow_outside=True)")
    said = refused(tmp_path, capsys, stage)
    assert "gone.jsonl: none of the 12 files that it names is there, such as /nowhere.wav" in said
    for record in records:
        (tmp_path / record["id"]).write_text("no sound")
    path.write_text("".join(json.dumps({**r, "audio": str(tmp_path / r["id"])}) + "\n" for r in records))
    assert "12 of 12 clips are bad" in refused(tmp_path, capsys, stage)


def test_line_separators_inside_a_string_do_not_cut_a_manifest_or_a_label(world, tmp_path):
    lines = (world / "clips" / "manifest.jsonl").read_text().split("\n")
    record = json.loads(lines[0])
    record.update(question="Which\u2028one?", options=["d\u2028og", "c\u0085at", "owl"],
                  audio=str(world / "clips" / record["audio"]))
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_manifest(path, True)[0].options[0] == "d\u2028og"
    stage = f"Label(name='l', model='{world}/ears', manifest='{path}', device='cpu', allow_outside=True)"
    assert run(tmp_path, stage) == 0


@pytest.mark.parametrize("fault, says", [
    ("no labels", "example 'clip0' has no label"),
])  # fmt: skip
def test_a_switch_that_could_decide_nothing_is_refused(world, tmp_path, capsys, fault, says):
    records = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()]
    for record in records:
        record["label"] = None if fault == "no labels" else f"the {record['label']}"
        record.update({kind: str(world / "clips" / record[kind]) for kind in ("audio", "video")})
    path = tmp_path / "analysis.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    seen = f"manifest='{path}', device='cpu', allow_outside=True"
    stages = (f"Evaluate(name='t', model='{world}/eyes', media='video', {FRAMES}, {seen}), "
              f"Evaluate(name='s', model='{world}/ears', {seen}), Label(name='l', model='{world}/ears', {seen}), "
              f"Switch(name='w', teacher='@t', student='@s', manifest='{path}', train_manifest='{path}', "
              "allow_outside=True)")
    assert run(tmp_path, stages) == 1
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_parameter_that_has_had_no_gradient_yet_is_restored_as_such(tmp_path):
    options = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("heard", "seen")}
    optimizer = adamw(parameters, **options)
    parameters["heard"].grad = torch.ones(2)
    optimizer.step()
    tensors = optimizer_tensors(optimizer, parameters)
    restored = adamw(parameters, **options)
    write_safetensors(tmp_path / "o.safetensors", tensors)
    restore_optimizer(restored, parameters, [tmp_path / "o.safetensors"])
    assert set(tensors) == {"heard.step", "heard.exp_avg", "heard.exp_avg_sq"}
    parameters["seen"].grad = torch.ones(2)
    restored.step()  # both
    assert restored.state[parameters["seen"]]["step"] == 1


def test_written_weights_can_be_read_by_others(world, tmp_path):
    before = os.umask(0o022)
    try:
        assert run(tmp_path, train(world, max_steps=1)) == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run" / "student" / "best").iterdir()}
    assert modes == {0o644}
