"""One of several processes is killed, raises, hangs, is stopped or sees another folder: all end, the run goes on."""
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import command, difference, largest_gap, log_of, run, weights, write_world

from minixmd.runs.records import read_jsonl
from minixmd.runs.training_state import load_state

pytestmark = pytest.mark.slow
NAMES = ("sft_decoder", "grpo")
# in step 4 of the second process, before its part of the gradients is added up
FAULT = """
import os, signal, sys, time
from minixmd.train import Trainer
clip_gradients = Trainer.clip_gradients

def fault(trainer, *args):
    if trainer.rank == 1 and trainer.step == 3:
        print("the fault begins", time.time(), file=sys.__stdout__, flush=True)
        {fault}
    return clip_gradients(trainer, *args)

Trainer.clip_gradients = fault
"""
KILLED, STANDS = "os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGSTOP)"
RAISES, HANGS = "raise ValueError('the disk is on fire')", "time.sleep(10**6)"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("faults"), NAMES)


@pytest.fixture(scope="module")
def undisturbed(config):
    done = run(config, config.parent / "undisturbed", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return config.parent / "undisturbed"


def assert_like(undisturbed, folder):
    for name in NAMES:
        assert difference(weights(undisturbed / name), weights(folder / name)) < 1e-6
        for before, after in zip(log_of(undisturbed / name), log_of(folder / name), strict=True):
            assert largest_gap(before, after) < 1e-5


def processes_of(folder):
    """Process ids whose command line names a folder, this one's aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("fault, seconds, says", [
    (KILLED, 20, r"minixmd: process 0 of 2 on \S+: another process has ended; torchrun names it below$"),
    (RAISES, 20, r"minixmd: process 1 of 2 on \S+: the disk is on fire"),
    (HANGS, 50, r"minixmd: process 1 has made no progress for 10 s \(--timeout\): it is at train.py:\d+ \(update\)"),
    (STANDS, 50, r"minixmd: process 1 has made no progress for 10 s \(--timeout\): it is at \S+ \(\S+\), process \d+"),
])  # fmt: skip
def test_all_end_soon_and_one_line_says_why(config, undisturbed, tmp_path, fault, seconds, says):
    done = run(config, tmp_path / "run", 2, "--timeout", "10", before=FAULT.format(fault=fault))
    took = time.time() - float(re.search(r"the fault begins (\S+)", done.stdout)[1])
    assert done.returncode == 1 and took < seconds and not processes_of(tmp_path / "run")
    lines = [line for line in done.stderr.splitlines() if line.startswith("minixmd: ")]
    assert len(lines) == 1 and re.match(says, lines[0]), done.stderr[-3000:]
    print(f"{took:.1f} s", lines[0])
    assert run(config, tmp_path / "run", 3).returncode == 0
    assert_like(undisturbed, tmp_path / "run")


def test_a_process_that_waits_for_long_is_no_hang(config, tmp_path):
    slow = "for _ in range(20): time.sleep(1), beat()"
    before = "from minixmd.runs.heartbeat import beat" + FAULT.format(fault=slow)
    assert run(config, tmp_path / "run", 2, "--timeout", "10", before=before).returncode == 0


def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_from_there(config, undisturbed, tmp_path):
    slow = FAULT.replace("trainer.rank == 1 and trainer.step == 3", "True").format(fault="time.sleep(0.3)")
    line, environment = command(config, tmp_path / "run", 2, before=slow)
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        log = tmp_path / "run" / "sft_decoder" / "log.jsonl"
        while not log.exists() or read_jsonl(log)[-1]["step"] < 6:  # the last state is that of step 5
            time.sleep(0.05)
        began = time.time()
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=60)
    print(f"{time.time() - began:.1f} s")
    assert "minixmd: stopped; the same command goes on from where it stopped" in errors
    assert not processes_of(tmp_path / "run")
    state, last = load_state(log.parent)["step"], read_jsonl(log)[-1]["step"]
    assert state == last > 6 and time.time() - began < 30
    assert run(config, tmp_path / "run", 2).returncode == 0
    assert_like(undisturbed, tmp_path / "run")


def test_a_folder_that_one_process_does_not_see_is_one_line(config, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    before = f"import os\nif os.environ['RANK'] == '1': os.chdir({str(tmp_path / 'elsewhere')!r})"
    line, environment = command(config, "run", 2, before=before)
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("minixmd: ")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr[-3000:]
    assert "run/sft_decoder is not the same folder on " in lines[0] and "that all processes share" in lines[0]


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", 2))))
def test_killed_anywhere_and_resumed_on_any_number_it_ends_alike(config, undisturbed, tmp_path, seed):
    line, environment = command(config, tmp_path / "run", 2)
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        first = tmp_path / "run" / "sft_decoder" / ("config.json", "state.json")[seed // 2 % 2]
        while not first.exists():
            time.sleep(0.05)
        time.sleep(random.Random(seed).uniform(0, 10))
        for process in processes_of(tmp_path / "run"):
            os.kill(process, signal.SIGKILL)
        started.wait(timeout=60)
    assert run(config, tmp_path / "run", (1, 3)[seed % 2]).returncode == 0
    assert_like(undisturbed, tmp_path / "run")


def test_a_disk_that_is_slow_for_the_first_process_mixes_no_two_checkpoints(config, tmp_path):
    """The last validation is the best; the second process would read the state that names the one before."""
    before = """
import os, time
import minixmd.train as training
from minixmd.runs import training_state
write_json, accuracies = training_state.write_json, iter([0.25, 0.5])
training.validation_accuracy = lambda *given: (next(accuracies, 0.5), {})

def slowly(path, value):
    time.sleep(SECONDS * (value["step"] == 10))
    write_json(path, value)

training_state.write_json = slowly
"""
    found = []
    for processes, seconds in ((1, 0), (2, 2)):
        folder = tmp_path / f"run{processes}"
        done = run(config, folder, processes, before=before.replace("SECONDS", str(seconds)))
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(weights(folder / "sft_decoder"))
    assert difference(*found) < 1e-6


def test_8_bit_moments_go_on_with_as_many_processes_and_refuse_others_in_a_line(tmp_path):
    """Of a model this narrow: its rows are no whole blocks of 256 (test_optim.py has wide ones)."""
    config = write_world(tmp_path, ("sft_8bit",))
    assert run(config, tmp_path / "whole", 2).returncode == 0
    done = run(config, tmp_path / "run", 2, before=FAULT.replace("step == 3", "step == 7").format(fault=RAISES))
    assert done.returncode == 1 and load_state(tmp_path / "run" / "sft_8bit")["step"] == 5
    for count in (1, 3):
        done = run(config, tmp_path / "run", count)
        [line] = [line for line in done.stderr.splitlines() if line.startswith("minixmd: ")]
        assert done.returncode == 1 and "cannot be sharded anew: go on with 2 processes" in line
    assert run(config, tmp_path / "run", 2).returncode == 0
    whole, again = (weights(tmp_path / name / "sft_8bit") for name in ("whole", "run"))
    assert difference(whole, again) == 0


def test_a_process_that_has_ended_is_no_abort(config, tmp_path):
    """The heartbeat's thread, in the store most of the time, ends before the interpreter does."""
    before = "from minixmd.runs import heartbeat\nheartbeat.INTERVAL_S = 0.0005"
    assert run(config, tmp_path / "run", 2, before=before).returncode == 0
