"""Several processes of a run give what one gives: every stage, on 1, 2 and 3, with counts that do not divide.

The steps have 5 clips of 11, so the last one of an epoch has one: with 3 processes two of them have nothing to learn
there. Kills, hangs and signals are in test_process_faults.py."""
import json
import subprocess

import processes
import pytest
from processes import TRAINED, difference, largest_gap, log_of, run, weights, write_world

from minixmd.runs.records import read_jsonl

ALL = tuple(name for name in processes.STAGES if name not in processes.NOT_BY_DEFAULT)
QUICK = ("labels", "sft_decoder", "grpo_decoder")  # of the fast suite, on 2 processes


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return runs_of(tmp_path_factory.mktemp("quick"), QUICK, (1, 2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return runs_of(tmp_path_factory.mktemp("ranks"), ALL, (1, 2, 3))


def runs_of(home, names, counts):
    """{number of processes: the directory of their run}."""
    config, found = write_world(home, names), {}
    for count in counts:
        done = run(config, home / f"run{count}", count)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert done.stdout.count("runs in") == len(names)  # one process speaks
        found[count] = home / f"run{count}"
    return found


def assert_trained_alike(one, several):
    assert difference(weights(one), weights(several)) < 1e-6
    for before, after in zip(log_of(one), log_of(several), strict=True):
        # a difference of log-probabilities, of a distillation times T²: it is rounded as they are
        assert after.pop("kl", 0) == pytest.approx(before.pop("kl", 0), abs=1e-5)
        assert largest_gap(before, after) < 1e-5, (before, after)
        if "loss" in before:
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-6, abs=5e-7)
    completions = [read_jsonl(folder / "completions.jsonl") for folder in (one, several) if "grpo" in folder.name]
    if completions:
        assert len(completions[0]) == len(completions[1]) > 3 and largest_gap(*completions) < 1e-6


@pytest.mark.parametrize("name", ["sft_decoder", "grpo_decoder"])
def test_sharded_weights_train_alike_on_two_processes(quick, name):
    assert_trained_alike(quick[1] / name, quick[2] / name)


def test_labels_of_two_processes_are_those_of_one(quick):
    assert largest_gap(*(read_jsonl(quick[n] / "labels" / "labels.jsonl") for n in (1, 2))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", TRAINED)
def test_every_way_to_train_gives_the_same(runs, name, count):
    assert_trained_alike(runs[1] / name, runs[count] / name)


def without_times(path):
    """The lines of a file but for the one that says where a stage's time went."""
    return [line for line in read_jsonl(path) if "slot_use" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", [name for name in ALL if name not in TRAINED])
def test_every_other_stage_gives_the_same(runs, name, count):
    one, several = runs[1] / name, runs[count] / name
    files = sorted(path.name for path in one.glob("*.jsonl")) + [path.name for path in one.glob("results.json")]
    assert len(files) >= 2
    for file in files:
        read = without_times if file.endswith("l") else lambda path: json.loads(path.read_text())
        assert largest_gap(read(one / file), read(several / file)) < 1e-5, file


@pytest.mark.slow
def test_a_finished_run_is_skipped_by_any_number_of_processes(runs):
    done = run(runs[2].parent / "config.py", runs[2], 3)
    assert done.returncode == 0 and done.stdout.count("finished before, skipped") == len(ALL)


@pytest.mark.slow
def test_more_processes_than_clips_are_no_trouble(tmp_path):
    names = ("labels", "sharded", "sft", "sft_full", "grpo_decoder")
    config = write_world(tmp_path, names, clips=2)
    for count in (1, 3):
        done = run(config, tmp_path / f"run{count}", count)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in names[2:]:
        assert difference(weights(tmp_path / "run1" / name), weights(tmp_path / "run3" / name)) < 1e-6


@pytest.mark.slow
def test_an_error_of_all_processes_is_one_line(runs, tmp_path):
    done = run(runs[1].parent / "config.py", tmp_path / "run", 2, "labels.manifest=nowhere.jsonl")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("minixmd: ")]
    assert "manifest 'nowhere.jsonl' does not exist" in line


def test_a_world_size_without_torchrun_is_one_line(tmp_path):
    line, environment = processes.command(write_world(tmp_path, ("labels",)), tmp_path / "run", 1)
    done = subprocess.run(line, env={**environment, "WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        "minixmd: WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start several processes "
        "with torchrun, or unset WORLD_SIZE")
