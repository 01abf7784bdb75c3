"""What a config's last stage will read is checked before its first one runs, each fault in one line."""
import json
import shutil
import time

import pytest
import torch
from media_files import sine, write_wav
from mini import write_model

from minixmd.runner import main

OPTIONS = ["dog", "cat", "owl"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "ears", "audio")
    for i in range(3):
        write_wav(folder / f"{i}.wav", sine(300 + 100 * i, 1))
    lines = [{"id": f"clip{i}", "audio": f"{i}.wav", "question": "Which?", "options": OPTIONS, "answer": i,
              "label": OPTIONS[i]} for i in range(3)]  # fmt: skip
    write(folder / "good.jsonl", lines)
    write(folder / "labels.jsonl", [{"id": f"clip{i}", "answer": i, "option": OPTIONS[i]} for i in range(3)])
    write(folder / "switch.jsonl", [{"id": f"clip{i}", "p_teacher": 0.9} for i in range(3)])
    write(folder / "traces.jsonl", [{"id": f"clip{i}", "text": "<think>x</think><answer>A</answer>"} for i in range(3)])
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def changed(world, name, **fields):
    """A copy of good.jsonl whose last line has these fields."""
    lines = [json.loads(line) for line in (world / "good.jsonl").read_text().splitlines()]
    lines[-1].update(fields)
    return write(world / name, lines)


def others(world, **fields):
    """Records of a clip that no manifest has."""
    return write(world / f"{'-'.join(fields)}.jsonl", [{"id": "q", **fields}])


GONE = [{"id": "x", "audio": "gone/1.wav", "question": "?", "options": OPTIONS}]
LAST = {  # the last stage's class, its fields but model and manifest, and what is said
    "a bad line": ("Evaluate", lambda w: dict(manifest=changed(w, "a.jsonl", options=["x"])),
                   "a.jsonl:3: needs 2 to 26 'options'"),
    "a numeric label": ("Evaluate", lambda w: dict(manifest=changed(w, "b.jsonl", label=7)),
                        "b.jsonl:3: needs 'label', a str or None, got 7"),
    "a list for a group": ("Evaluate", lambda w: dict(manifest=changed(w, "c.jsonl", meta={"group": ["x"]})),
                           "c.jsonl:3: field 'meta' needs 'group', a str or None, got ['x']"),
    "an option twice": ("Label", lambda w: dict(manifest=changed(w, "d.jsonl", options=["a", "b", "a"])),
                        "d.jsonl:3: field 'options': 'a' is empty or stands twice"),
    "no clips": ("Label", lambda w: dict(manifest=write(w / "e.jsonl", GONE)),
                 "e.jsonl: none of the 1 files that it names is there, such as"),
    "a switch of other clips": (
        "Distill", lambda w: dict(gate="learned", teacher_labels=w / "labels.jsonl", student_labels="@y",
                                  switch=others(w, p_teacher=0.5)), "no decision on example 'clip0'"),
    "labels of other clips": ("Distill", lambda w: dict(teacher_labels=others(w, answer=0, option="dog")),
                              "answer-option.jsonl: no label for example 'clip0'"),
    "an unknown trace": ("FactCheck", lambda w: dict(traces=others(w, text="x")), "text.jsonl: trace 1 is of 'q'"),
    "a trace that is none": ("SFT", lambda w: dict(traces=others(w, text=3)), "text.jsonl:1: needs 'text'"),
    "another file for Cnn14's": ("Switch", lambda w: dict(teacher="@x", student="@x", weights=saved(w / "cnn.pth"),
                                                          train_manifest=w / "good.jsonl"), "cnn.pth: "),
    "not UTF-8": ("Label", lambda w: dict(manifest=raw(w / "v.jsonl", "[1]".encode("utf-16"))),
                  "v.jsonl:1: not JSON: 'utf-8' codec can't decode"),
    "latin-1": ("Label", lambda w: dict(manifest=raw(w / "l.jsonl", '{"id": "ä"}'.encode("latin-1"))),
                "l.jsonl:1: not JSON: 'utf-8' codec can't decode"),
    "half a pair in an id": ("Label", lambda w: dict(manifest=changed(w, "h.jsonl", id=chr(0xDC00))),
                             "h.jsonl:3: not JSON: 'utf-8' codec can't encode"),
    "half a pair in a trace": ("SFT", lambda w: dict(traces=others(w, text="x" + chr(0xD800))),
                               "text.jsonl:1: not JSON"),
    "half a pair in a group": ("Evaluate", lambda w: dict(manifest=changed(w, "p.jsonl", meta={"group": chr(0xD800)})),
                               "p.jsonl:3: not JSON"),
    "a token in a question": ("Label", lambda w: dict(manifest=changed(w, "t.jsonl", question="Is <|AUDIO|> it?")),
                              "t.jsonl:3: field 'question' or 'options' holds <|AUDIO|>"),
    "a token in an option": ("Label", lambda w: dict(manifest=changed(w, "o.jsonl", options=["a", "b<|im_end|>", "c"])),
                             "o.jsonl:3: field 'question' or 'options' holds <|im_end|>"),
    "an option twice but for blanks": (
        "Label", lambda w: dict(manifest=changed(w, "2.jsonl", options=["a", "b", " a "])),
        "2.jsonl:3: field 'options': 'a' is empty or stands twice"),
    "no name of a sound": ("Label", lambda w: dict(manifest=changed(w, "n.jsonl", audio="")),
                           "n.jsonl:3: field 'audio' is empty"),
    "a folder for a manifest": ("Label", lambda w: dict(manifest=w / "ears"), "Is a directory"),
    "a label's temperature": ("Distill", lambda w: dict(teacher_labels=others(
        w, option="dog", top={"temperature": 0, "logsumexp": 1, "ids": [1], "logits": [1]})),
        "option-top.jsonl:1: field 'top' needs 'temperature', > 0, got 0"),
    "nested brackets": ("Label", lambda w: dict(manifest=raw(w / "w.jsonl", b"[" * 100_000)), "w.jsonl:1: not JSON"),
    "half a surrogate pair": ("Label", lambda w: dict(manifest=changed(w, "x.jsonl", question=chr(0xD800))),
                              "x.jsonl:3: not JSON: 'utf-8' codec can't encode character"),
}  # fmt: skip


def raw(path, data):
    path.write_bytes(data)
    return path


def saved(path):
    torch.save({"model": {"fc1.weight": torch.ones(2, 2)}}, path)
    return path


@pytest.mark.parametrize("case", LAST)
def test_a_late_fault_is_told_in_one_line_before_the_first_stage_runs(case, world, tmp_path, capsys):
    kind, fields, said = LAST[case]
    models = {} if kind == "Switch" else {"model": world / "ears"}
    fields = {"name": "z", "manifest": world / "good.jsonl", **models, **fields(world)}
    last = f"{kind}({', '.join(f'{name}={str(value)!r}' for name, value in fields.items())})"
    stages = (f"Evaluate(name='x', model='{world}/ears', manifest='{world}/good.jsonl', device='cpu'), "
              f"Label(name='y', model='{world}/ears', manifest='{world}/good.jsonl', device='cpu'), {last}")
    (tmp_path / "c.py").write_text(f"from minixmd.config import *\nstages = [{stages}]\n")
    start = time.monotonic()
    assert main([str(tmp_path / "c.py"), f"run_dir={tmp_path / 'run'}", "device=cpu"]) == 1
    assert time.monotonic() - start < 10
    line = capsys.readouterr().err.strip()
    assert said in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_a_byte_order_mark_is_read(world, tmp_path, capsys):
    path = world / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (world / "good.jsonl").read_bytes())
    (tmp_path / "c.py").write_text("from minixmd.config import *\nstages = [Label(name='y', "
                                   f"model='{world}/ears', manifest='{path}', device='cpu')]\n")
    assert main([str(tmp_path / "c.py"), f"run_dir={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize("kind", ["Evaluate", "Label", "SFT"])
def test_a_corrected_input_is_another_one_also_where_every_clip_was_bad(world, tmp_path, capsys, kind):
    for i in range(3):
        (world / f"broken{i}.wav").write_bytes(b"no sound")
    lines = [json.loads(line) for line in (world / "good.jsonl").read_text().splitlines()]
    broken = [{**line, "audio": f"broken{i}.wav"} for i, line in enumerate(lines)]
    path = write(world / f"corrected-{kind}.jsonl", broken)
    (tmp_path / "c.py").write_text(f"from minixmd.config import *\nstages = [{kind}(name='y', model='{world}/ears', "
                                   f"manifest='{path}', device='cpu')]\n")
    command = [str(tmp_path / "c.py"), f"run_dir={tmp_path / 'run'}"]
    assert main(command) == 1
    write(path, lines)
    capsys.readouterr()
    assert main(command) == 1
    assert "was made by other inputs: manifest" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "y")
    assert main(command) == 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_run_with_an_adapter_goes_on_after_it_moved_with_all_that_it_reads(tmp_path, capsys):
    here = tmp_path / "here"
    write_model(here / "ears", "audio")
    for i in range(3):
        write_wav(here / f"{i}.wav", sine(300 + 100 * i, 1))
    write(here / "good.jsonl", [{"id": f"clip{i}", "audio": f"{i}.wav", "question": "Which?", "options": OPTIONS,
                                 "answer": i} for i in range(3)])  # fmt: skip
    config = """from minixmd.config import *
stages = [SFT(name="sft", model="{0}/ears", manifest="{0}/good.jsonl", device="cpu", batch_size=3),
          Evaluate(name="after", model="@sft", manifest="{0}/good.jsonl", device="cpu")]
"""
    (here / "c.py").write_text(config.format(here))
    assert main([str(here / "c.py"), f"run_dir={here / 'run'}"]) == 0
    shutil.rmtree(here / "run" / "after")
    there = tmp_path / "there"
    here.rename(there)
    (there / "c.py").write_text(config.format(there))
    capsys.readouterr()
    assert main([str(there / "c.py"), f"run_dir={there / 'run'}"]) == 0
    assert "sft: finished before, skipped" in capsys.readouterr().out
    assert (there / "run" / "after" / "results.json").is_file()
    peft = pytest.importorskip("peft")
    base = pytest.importorskip("transformers").Qwen2AudioForConditionalGeneration.from_pretrained(there / "ears")
    assert peft.PeftModel.from_pretrained(base, there / "run" / "sft" / "best").peft_config["default"].r == 16
