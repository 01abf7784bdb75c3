"""Files are whole or absent; a stage's directory knows what made it; a killed run resumes from a whole state."""
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from minixmd.config import SFT, Evaluate, Traces
from minixmd.runs import files as run_files
from minixmd.runs import stage_directory as directory
from minixmd.runs.files import DTYPE_NAMES, fingerprint, write_json, write_safetensors, write_text
from minixmd.runs.records import append_jsonl
from minixmd.runs.stage_directory import begin, finish, versions
from minixmd.runs.training_state import fill, load_state, remove_leftovers, save_state, tensor_file

ROOT = Path(__file__).resolve().parents[1]
WRITERS = [(write_text, "new"), (write_json, {"new": 1}), (write_safetensors, {"new": torch.ones(3)})]
IDS = ["text", "json", "safetensors"]


def files(folder):
    return sorted(path.name for path in folder.rglob("*"))


# writers


@pytest.mark.parametrize("write, value", WRITERS, ids=IDS)
def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path, write, value):
    path = tmp_path / "file"
    path.write_text("old")
    write(path, value)
    assert files(tmp_path) == ["file"] and b"new" in path.read_bytes()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("write, value", WRITERS, ids=IDS)
def test_a_full_disk_names_the_path_and_keeps_the_old_file(tmp_path, monkeypatch, write, value, broken):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(path, value)
    assert str(path) in str(caught.value)
    assert files(tmp_path) == ["file"] and path.read_text() == "old"


LIMITED = """
import resource, sys, torch
from pathlib import Path
from minixmd.runs.files import write_text, write_safetensors
from minixmd.runs.records import append_jsonl
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the system refuses to let a file grow, also for root
folder = Path(sys.argv[1])
for write in (lambda: write_text(folder / "text", "x" * 9999),
              lambda: write_safetensors(folder / "tensors", {"w": torch.zeros(9999)}),
              lambda: append_jsonl(folder / "log.jsonl", {"x": "x" * 9999})):
    try:
        write()
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_write_that_the_system_cuts_short_names_the_path_and_leaves_no_part(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 3 and all("File too large" in line for line in said)
    assert all(str(tmp_path / name) in line for name, line in zip(["text", "tensors", "log.jsonl"], said, strict=True))
    assert files(tmp_path) == ["log.jsonl"]  # the log is appended to; its torn line is dropped by the next `begin`


@pytest.mark.parametrize("write, value", WRITERS, ids=IDS)
def test_an_unwritable_directory_names_the_path(tmp_path, write, value):
    (tmp_path / "file").write_text("a file cannot hold files, not even root's")
    path = tmp_path / "file" / "inner"
    with pytest.raises(OSError) as caught:
        write(path, value)
    assert str(path) in str(caught.value)
    assert files(tmp_path) == ["file"]


KILLED = """
import os, signal, sys, torch
from minixmd.runs.files import write_safetensors
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)  # after the write, before the rename
write_safetensors(sys.argv[1], {"w": torch.ones(3)})
"""


def test_a_kill_between_write_and_rename_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"w": torch.zeros(3)})
    done = subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert torch.equal(load_file(path)["w"], torch.zeros(3))


# safetensors


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same(found, expected):
    """To the bit, in the names, dtypes and shapes too."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def odd_tensors():
    """One of every dtype, of odd sizes, without elements or dimensions, views, and a NaN with a payload."""
    tensors = {str(dtype): (100 * torch.randn(3, 5)).to(dtype) for dtype in DTYPE_NAMES}
    base = torch.randn(6, 4, 3)
    return tensors | {
        "scalar": torch.tensor(7), "none": torch.zeros(0, 3), "no bytes": torch.zeros(0, dtype=torch.bool),
        "transposed": base.transpose(0, 2), "rows": base[2:4], "strided": torch.randn(9)[::2],
        "expanded": torch.randn(1, 3).expand(4, 3), "é/ name": torch.randn(2).bfloat16(),
        "trains": torch.nn.Parameter(torch.randn(3)), "byte": torch.tensor([200, 3, 4], dtype=torch.uint8),
        "nan": torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32),
    }  # fmt: skip


def test_safetensors_reads_every_dtype_and_every_view_to_the_bit(tmp_path, device):
    tensors = odd_tensors()
    path = tmp_path / "w.safetensors"
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    write_safetensors(path, moved, {"format": "pt", "note": "é"})
    assert_same(load_file(path), tensors)
    assert_same(load(path.read_bytes()), tensors)  # which looks at every offset
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(raw[8:8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors[name].itemsize == 0, name


def test_a_file_is_the_one_that_safetensors_writes(tmp_path):
    tensors = {name: torch.randn(5, 3) for name in "ba"} | {"small": torch.randn(3).half(), "one": torch.tensor(2.5)}
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    raw = [(tmp_path / side).read_bytes() for side in ("ours", "theirs")]
    ends = [8 + int.from_bytes(data[:8], "little") for data in raw]
    headers = [json.loads(data[8:end]) for data, end in zip(raw, ends, strict=True)]
    assert headers[0] == headers[1] and raw[0][ends[0]:] == raw[1][ends[1]:]
    write_safetensors(tmp_path / "empty", {})
    assert load_file(tmp_path / "empty") == {}


# training state


def test_a_state_comes_back_bit_for_bit(tmp_path, device):
    assert load_state(tmp_path) is None
    weights, optimizer = odd_tensors(), {"w.step": torch.tensor(7.0), "w.exp_avg": torch.randn(5)}
    progress = {"step": 7, "best": 0.1 + 0.2, "inf": math.inf, "order": ["a", "é"]}
    save_state(tmp_path, weights, optimizer, progress)
    assert files(tmp_path) == ["optimizer-000007.safetensors", "state.json", "weights-000007.safetensors"]
    assert load_state(tmp_path) == progress
    for kind, saved in (("weights", weights), ("optimizer", optimizer)):
        found = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for name, tensor in saved.items()}
        fill(found, [tensor_file(tmp_path, kind, 7)])
        assert_same({name: tensor.cpu() for name, tensor in found.items()}, saved)


def save(folder, step, best_step=0):
    weights = {"w": torch.full((3,), float(step))}
    save_state(folder, weights, {"w.step": torch.tensor(float(step))}, {"step": step, "best_step": best_step})


def steps_on_disk(folder, kind):
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob(f"{kind}-*"))


def test_the_best_weights_are_kept_as_long_as_they_are_the_best_and_nothing_older_is(tmp_path):
    for step, best_step, weights in ((2, 0, [2]), (4, 0, [4]), (4, 4, [4]), (6, 4, [4, 6]), (8, 4, [4, 8]), (8, 8, [8]),
                                     (10, 8, [8, 10])):
        save(tmp_path, step, best_step)
        assert (steps_on_disk(tmp_path, "weights"), steps_on_disk(tmp_path, "optimizer")) == (weights, [step])
        assert all((load_file(tensor_file(tmp_path, "weights", n))["w"] == n).all() for n in weights)


def test_a_step_that_is_saved_is_not_written_again(tmp_path):
    save(tmp_path, 5)
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.safetensors"))]
    save(tmp_path, 5, best_step=5)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.safetensors"))] == before
    assert load_state(tmp_path) == {"step": 5, "best_step": 5}
    write_safetensors(tensor_file(tmp_path, "weights", 6), {"w": torch.zeros(3)})  # a kill came before state.json
    save(tmp_path, 6)
    assert (load_file(tensor_file(tmp_path, "weights", 6))["w"] == 6).all()


@pytest.mark.parametrize("kept", range(3))
def test_a_save_that_is_cut_short_leaves_the_old_state_whole(tmp_path, monkeypatch, kept):
    """A save renames three files into place. After a kill before any of them the old state is there."""
    replace_file, left = os.replace, [kept]

    def replace_until_killed(*paths):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace_file(*paths)

    save(tmp_path, 2)
    save(tmp_path, 4, best_step=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 6, best_step=2)
    assert load_state(tmp_path) == {"step": 4, "best_step": 2}
    assert {2, 4} <= set(steps_on_disk(tmp_path, "weights")) and 4 in steps_on_disk(tmp_path, "optimizer")
    remove_leftovers(tmp_path, load_state(tmp_path))  # as at the next start
    assert (steps_on_disk(tmp_path, "weights"), steps_on_disk(tmp_path, "optimizer")) == ([2, 4], [4])


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:4], lambda b: b"", lambda b: b"\xff" * len(b),
                                    None])  # fmt: skip
@pytest.mark.parametrize("name", ["state.json", "weights-000001.safetensors"])
def test_a_damaged_state_is_one_line_that_names_it(tmp_path, name, damage):
    save(tmp_path, 1)
    path = tmp_path / name
    if damage is None and name != "state.json":
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()) if damage else b'{"w": 1}')
    with pytest.raises(ValueError, match="not (of )?a training state .*; delete .* to start the stage anew") as caught:
        load_state(tmp_path)
        fill({"w": torch.ones(3)}, [tensor_file(tmp_path, "weights", 1)])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("tensors, fault", [
    ({"w": torch.ones(3), "v": torch.ones(1)}, "only one of the two has v"), ({}, "only one of the two has w"),
    ({"w": torch.ones(3, 1)}, r"w is torch.float32 \[3\], expected torch.float32 \[3, 1\]"),
    ({"w": torch.ones(1, 3)}, r"\[3\], expected torch.float32 \[1, 3\]"),  # which copy_ would broadcast to
    ({"w": torch.ones(3).half()}, r"w is torch.float32 \[3\], expected torch.float16"),
])  # fmt: skip
def test_a_state_of_another_model_is_one_line_that_names_it(tmp_path, tensors, fault):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=fault) as caught:
        fill(tensors, [tensor_file(tmp_path, "weights", 1)])
    assert str(caught.value).startswith(f"{tmp_path}/weights-000001.safetensors: not a state of this model: ")


SAVING = """
import sys, torch
from minixmd.runs.training_state import save_state
step, size = 0, int(sys.argv[2])
while True:
    step += 1
    both = [{name: torch.empty(size, 2).fill_(step).T for name in "ab"} for _ in range(2)]
    save_state(sys.argv[1], *both, {"step": step, "best_step": step - step % 2})  # of every second step, as it is saved
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size, rounds, saves, longest_s", [(100_000, 3, 2, 0.05), (64 << 20, 1, 1, 4.0)],
                         ids=["3 MB", "2 GB"])
def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path, size, rounds, saves, longest_s):
    moments = random.Random(0)
    command = [sys.executable, "-c", SAVING, tmp_path, str(size)]
    for _ in range(rounds):
        saving = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(saves):
            said = int(saving.stdout.readline())
        time.sleep(moments.uniform(0, longest_s))
        saving.kill()
        rest, _ = saving.communicate()
        said = int((rest.splitlines() or [said])[-1])
        state = load_state(tmp_path)
        assert state["step"] in (said, said + 1)  # a kill may fall between a save and its line
        for kind, step in (("weights", state["step"]), ("optimizer", state["step"]), ("weights", state["best_step"])):
            if step:
                tensors = load_file(tensor_file(tmp_path, kind, step))
                assert tensors.keys() == {"a", "b"}
                assert all((tensor == step).all() and tensor.shape == (2, size) for tensor in tensors.values())
        for leftover in tmp_path.iterdir():
            leftover.unlink()


MEMORY = """
import gc, sys, threading, torch
from contextlib import contextmanager
from pathlib import Path
from minixmd.learning.checkpoint import restore, save
from minixmd.learning.optim import adamw

folder, count, rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def anonymous():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


@contextmanager
def rise(what):
    gc.collect()
    samples, done = [anonymous()], threading.Event()

    def sample():
        while not done.wait(0.001):
            samples.append(anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    yield
    done.set()
    thread.join()
    print(what, max(samples) - samples[0], anonymous() - samples[0], len(samples), flush=True)


def make(count, rows, transposed):
    made = {}
    for i in range(count):
        w = torch.empty(rows, 1024).fill_(i + 1)
        made[f"p{i}"] = torch.nn.Parameter(w.T if transposed else w)
    optimizer = adamw(made, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for i, p in enumerate(made.values()):
        moments = {key: torch.full_like(p, -1 - i, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(1.0), **moments}
    return made, optimizer


def cycle(step, count, rows, transposed):
    made, optimizer = make(count, rows, transposed)
    kind = "transposed" if transposed else "contiguous"
    with rise(f"save-{kind}"):
        save(folder, made, optimizer, {"step": step})
    for p in made.values():
        p.data.zero_()
    optimizer.state.clear()
    with rise(f"resume-{kind}"):
        restore(folder, made, optimizer)
    for i, p in enumerate(made.values()):
        assert (p == i + 1).all() and (optimizer.state[p]["exp_avg_sq"] == -1 - i).all()


for kind in (False, True):
    cycle(1 + kind, 2, 1, kind)  # what is imported and started at the first use
for kind in (False, True):
    cycle(3 + kind, count, rows, kind)
"""
MIB = 1 << 20


@pytest.mark.parametrize("count, largest_mib", [
    (6, 16),
    pytest.param(10, 64, marks=pytest.mark.slow),  # 1.9 GB: weights and two moments
])  # fmt: skip
def test_saving_and_resuming_take_the_memory_of_one_tensor(tmp_path, count, largest_mib):
    command = [sys.executable, "-c", MEMORY, tmp_path, str(count), str(largest_mib * 256)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in done.stdout.splitlines()]
    peaks = {what: (int(peak), int(end), int(samples)) for what, peak, end, samples in seen}  # the last of each
    assert len(seen) == 8 and all(samples > 5 for _, _, samples in peaks.values())
    state = 2 * count * largest_mib * MIB  # the optimizer's, which resuming makes
    for kind, copies in (("contiguous", 0), ("transposed", 1)):
        peak, end, _ = peaks[f"save-{kind}"]
        assert peak <= copies * largest_mib * MIB + 40 * MIB and end <= 40 * MIB, (kind, peak / MIB, end / MIB)
        peak, _, _ = peaks[f"resume-{kind}"]
        assert peak <= state + 40 * MIB, (kind, peak / MIB)


# stage directories


@pytest.fixture
def world(tmp_path):
    """(run_dir, stage, inputs, source) as `begin` takes them, over real files."""
    (tmp_path / "my.py").write_text("stages = []  # as given\n")
    (tmp_path / "d.jsonl").write_text("{}\n")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weights")
    stage = SFT(name="student", model="m", manifest="d.jsonl")
    return tmp_path / "runs", stage, {"model": tmp_path / "m", "manifest": tmp_path / "d.jsonl"}, tmp_path / "my.py"


def begun(*args):
    """The directory of a stage that has made something."""
    folder = begin(*args)
    (folder / "labels.jsonl").write_text("{}\n")
    return folder


def refusal(*args):
    with pytest.raises(ValueError) as caught:
        begin(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_records_what_made_it(world):
    run_dir, stage, inputs, source = world
    folder = begin(*world)
    assert folder == run_dir / "student"
    config = json.loads((folder / "config.json").read_text())
    assert (config["stage"], config["lr"], config["betas"]) == ("sft", 1e-4, [0.9, 0.999])
    assert (folder / "config.py").read_bytes() == source.read_bytes()
    assert json.loads((folder / "inputs.json").read_text()) == {n: fingerprint(p) for n, p in inputs.items()}
    found = json.loads((folder / "versions.json").read_text())
    assert found == versions() and found["torch"] == torch.__version__ and found["python"] == sys.version.split()[0]
    assert not (folder / "done.json").exists()


def test_a_finished_stage_is_skipped(world):
    finish(begin(*world))
    before = {path: path.stat().st_mtime_ns for path in world[0].rglob("*")}
    assert begin(*world) is None
    assert {path: path.stat().st_mtime_ns for path in world[0].rglob("*")} == before
    assert json.loads((world[0] / "student" / "done.json").read_text()).keys() == {"config", "inputs"}


def test_an_unfinished_stage_goes_on_with_what_it_wrote(world):
    folder = begin(*world)
    append_jsonl(folder / "log.jsonl", {"step": 1})
    save(folder, 1)
    assert begin(*world) == folder
    append_jsonl(folder / "log.jsonl", {"step": 2})
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert load_state(folder)["step"] == 1


def test_a_finished_stage_keeps_no_training_state(world, monkeypatch):
    folder = begin(*world)
    save(folder, 3)
    save(folder, 4, best_step=3)
    made = [path.name for path in folder.iterdir()]
    with monkeypatch.context() as patch:
        patch.setattr(directory, "write_json", lambda *given: pytest.fail("a full disk"))
        with pytest.raises(pytest.fail.Exception):
            finish(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(made)  # it is not finished yet
    with monkeypatch.context() as patch:
        patch.setattr(directory, "remove_leftovers", lambda *given: pytest.fail("a kill"))
        with pytest.raises(pytest.fail.Exception):
            finish(folder)
    assert steps_on_disk(folder, "weights") == [3, 4] and (folder / "done.json").exists()
    expected = ["config.json", "config.py", "done.json", "inputs.json", "versions.json"]
    assert begin(*world) is None
    assert files(folder) == expected
    save(folder, 4)
    finish(folder)
    assert files(folder) == expected


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_config_stops_with_every_difference_and_what_to_do(world, finished):
    run_dir, stage, inputs, source = world
    folder = begun(*world)
    if finished:
        finish(folder)
    changed = replace(stage, lr=2e-4, max_steps=5, media="video")
    assert refusal(run_dir, changed, inputs, source) == (
        f'{folder} was made by another config: media "audio" -> "video", max_steps null -> 5, lr 0.0001 -> 0.0002; '
        f"set another run_dir or delete {folder}"
    )
    assert begin(*world) == (None if finished else folder)  # the refusal changed nothing


@pytest.mark.parametrize("finished", [False, True])
def test_when_a_stage_gives_up_may_change_and_is_recorded(world, finished):
    run_dir, stage, inputs, source = world
    folder = begun(*world)
    if finished:
        finish(folder)
    patient = replace(stage, max_bad=0.5)
    assert begin(run_dir, patient, inputs, source) == (None if finished else folder)
    assert json.loads((folder / "config.json").read_text())["max_bad"] == (0.01 if finished else 0.5)
    assert refusal(run_dir, replace(patient, lr=2e-4), inputs, source).startswith(
        f"{folder} was made by another config: lr 0.0001 -> 0.0002; set")


def test_an_endpoint_in_a_models_place_is_another_config(world):
    run_dir, _, inputs, source = world
    begun(run_dir, Traces(name="t", model="m", manifest="d.jsonl"), inputs, source)
    served = Traces(name="t", manifest="d.jsonl", endpoint="http://localhost/v1", served="m")
    said = refusal(run_dir, served, {"manifest": inputs["manifest"]}, source)
    assert f'another config: served null -> "m", model "{inputs["model"]}" -> null; set' in said


def test_a_run_that_moved_with_its_inputs_goes_on(world, tmp_path):
    run_dir, stage, inputs, source = world
    stage = replace(stage, model=str(inputs["model"]), manifest=str(inputs["manifest"]))
    folder = begun(run_dir, stage, inputs, source)
    assert json.loads((folder / "config.json").read_text())["model"] == str(inputs["model"].resolve())
    there = tmp_path / "there"
    there.mkdir()
    for path in (run_dir, *inputs.values()):
        path.rename(there / path.name)
    inputs = {field: there / path.name for field, path in inputs.items()}
    stage = replace(stage, model=str(inputs["model"]), manifest=str(inputs["manifest"]))
    assert begin(there / "runs", stage, inputs, source) == there / "runs" / "student"
    finish(there / "runs" / "student")
    inputs["manifest"].write_text("another")
    assert "other inputs: manifest" in refusal(there / "runs", stage, inputs, source)


def test_a_stage_of_another_kind_or_with_other_fields_is_refused_in_a_short_line(world):
    run_dir, _, inputs, source = world
    begun(*world)
    said = refusal(run_dir, Evaluate(name="student", model="m", manifest="d.jsonl"), inputs, source)
    assert "was made by another kind of stage: sft -> evaluate; set another run_dir or delete" in said
    folder = world[0] / world[1].name
    config = json.loads((folder / "config.json").read_text())
    config["impl"] = config.pop("backend")  # as older versions called it
    (folder / "config.json").write_text(json.dumps(config))
    said = refusal(*world)
    assert said.startswith(f"{folder} was made by a version of minixmd whose stages have other fields: backend, impl; ")


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("field, file", [("manifest", "d.jsonl"), ("model", "m/model.safetensors"),
                                         ("model", "m/config.json"), ("model", "m/another.json")])
def test_a_changed_input_is_named(world, field, file, finished):
    run_dir, stage, inputs, source = world
    folder = begun(*world)
    if finished:
        finish(folder)
    (run_dir.parent / file).write_text("changed")
    assert refusal(*world) == (f"{folder} was made by other inputs: {field} {inputs[field]} changed; "
                               f"set another run_dir or delete {folder}")


def test_an_input_that_is_written_again_the_same_has_not_changed(world):
    finish(begin(*world))
    path = world[2]["manifest"]
    path.write_bytes(path.read_bytes())
    os.utime(path, (0, 0))
    assert begin(*world) is None


def test_a_missing_input_is_named_before_anything_is_written(world):
    world[2]["manifest"].unlink()
    assert refusal(*world) == f"{world[2]['manifest']}: no such file or folder"
    assert not world[0].exists()


def test_a_run_directory_that_cannot_be_made_is_named(world):
    world[0].write_text("a file")
    with pytest.raises(OSError) as caught:
        begin(*world)
    assert str(world[0]) in str(caught.value)


@pytest.mark.parametrize("last", range(4))
def test_a_start_that_was_killed_starts_again(world, monkeypatch, last):
    """`begin` writes four files; a kill after any of them leaves a directory that the next `begin` completes."""
    replace_file, left = os.replace, [last]

    def replace_until_killed(*paths):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace_file(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_killed)
        with pytest.raises(KeyboardInterrupt):
            begin(*world)
    finish(begin(*world))
    assert files(world[0] / "student") == ["config.json", "config.py", "done.json", "inputs.json", "versions.json"]


def test_what_a_kill_left_behind_is_cleared_away(world, capsys):
    folder = begin(*world)
    append_jsonl(folder / "log.jsonl", {"step": 1})
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": ')  # a line that a kill cut short
    (folder / "best").mkdir()
    (folder / "best" / ".model.safetensors.123.tmp").write_text("half")
    save(folder, 1)
    for kind in ("weights", "optimizer"):
        write_safetensors(tensor_file(folder, kind, 2), {"w": torch.ones(2)})  # whole, but state.json was not replaced
    capsys.readouterr()
    begin(*world)
    assert capsys.readouterr().err == f"{folder / 'log.jsonl'}: dropped the last line, cut short after 9 bytes\n"
    append_jsonl(folder / "log.jsonl", {"step": 2})
    assert (folder / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    begin(*world)
    assert capsys.readouterr().err == ""
    assert files(folder / "best") == []
    assert steps_on_disk(folder, "weights") == steps_on_disk(folder, "optimizer") == [1]


@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
def test_a_damaged_record_is_one_line_that_names_it(world, name):
    path = begun(*world) / name
    path.write_text("{")
    assert refusal(*world) == f"{path}: missing or not JSON; delete {path.parent} to run the stage anew"


# fingerprints


def test_a_small_file_is_read_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180


def test_a_large_file_is_known_by_its_size_and_by_blocks_from_end_to_end(tmp_path, monkeypatch):
    for name, value in {"WHOLE_BYTES": 1000, "SAMPLES": 5, "SAMPLE_BYTES": 10}.items():
        monkeypatch.setattr(run_files, name, value)
    data = bytes(random.Random(0).randbytes(2000))
    path = tmp_path / "a"

    def of(content):
        path.write_bytes(content)
        return fingerprint(path)

    def flipped(at):
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    assert of(data) == of(data)
    for at in (0, 9, 497, 1000, 1999):  # blocks start at 0, 497, 995, 1492 and 1990
        assert of(flipped(at)) != of(data), at
    assert of(flipped(10)) == of(data)  # what the rule gives up: a byte between two blocks
    assert of(bytes(2000)) != of(bytes(2001))  # silence, say: every block is the same


def test_a_folder_is_known_by_the_names_and_contents_of_its_files(tmp_path):
    (tmp_path / "m" / "sub").mkdir(parents=True)
    (tmp_path / "m" / "a").write_text("1")
    (tmp_path / "m" / "sub" / "b").write_text("2")
    first = fingerprint(tmp_path / "m")
    (tmp_path / "m" / ".a.5.tmp").write_text("a write in progress is not content")
    assert fingerprint(tmp_path / "m") == first
    (tmp_path / "m").rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == first
    (tmp_path / "moved" / "sub" / "b").rename(tmp_path / "moved" / "sub" / "c")
    assert fingerprint(tmp_path / "moved") != first


def test_versions_tell_a_changed_checkout_from_a_clean_one(tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *command], check=True,
                       capture_output=True)

    assert directory._git(tmp_path) == (None, None)
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = directory._git(tmp_path)
    assert len(commit) == 40 and dirty is False
    (tmp_path / "a").write_text("2")
    assert directory._git(tmp_path) == (commit, True)
    (tmp_path / "venv").mkdir()
    assert directory._git(tmp_path / "venv") == (None, None)  # inside another project's checkout
    monkeypatch.setenv("PATH", "")
    assert directory._git(tmp_path) == (None, None)
