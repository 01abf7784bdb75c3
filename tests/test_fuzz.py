"""Damaged files are read or refused in one line (fuzz.py), and its runner sees each kind of fault."""
import time

import fuzz
import pytest

from minixmd.models import weights


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "world"
    fuzz.make_world(folder)
    return folder


@pytest.mark.slow
def test_a_minute_of_damaged_files(world):
    tallies, faults = fuzz.run_all(0, fuzz.COUNTS, world, time.monotonic() + 60)
    assert not faults and sum(map(sum, (tally.values() for tally in tallies.values()))) > 500


def test_some_damaged_files(world):
    tallies, faults = fuzz.run_all(1, {"checkpoints": 10, "json": 25, "adapters": 10, "manifests": 10}, world)
    assert not faults and sum(tally["refused"] for tally in tallies.values()) > 35


def raised(error):
    def case(rng, world, folder):
        def check():
            raise error

        return check

    return case


def grown(rng, world, folder):
    return lambda: b"x" * (300 << 20)


def slow(rng, world, folder):
    return lambda: time.sleep(60)


@pytest.mark.parametrize("case, said", [
    (raised(KeyError("x")), "KeyError"), (raised(RecursionError()), "RecursionError"), (raised(ValueError()), ""),
    (slow, "more than 1 s"), (grown, "grew"), (raised(SystemExit()), "it died"),
])  # fmt: skip
def test_a_fault_is_seen(world, monkeypatch, case, said):
    monkeypatch.setitem(fuzz.CASES, "json", case)
    monkeypatch.setattr(fuzz, "LIMIT_S", 1)
    monkeypatch.setattr(fuzz, "LIMIT_KB", 200 << 10)
    tallies, [(kind, number, found)] = fuzz.run_all(0, {"json": 1}, world)
    assert (kind, number) == ("json", 0) and said in found and not sum(tallies["json"].values())


def test_a_tensor_that_is_not_the_files_is_seen(world, monkeypatch):
    read = weights.read_headers

    def swapped(folder, family):
        infos = read(folder, family)
        pairs = [name for name in infos if name.endswith(("k_proj.bias", "v_proj.bias")) and "model.layers.0." in name]
        infos[pairs[0]], infos[pairs[1]] = infos[pairs[1]], infos[pairs[0]]
        return infos

    monkeypatch.setattr(fuzz, "damage_safetensors", lambda rng, path: None)
    monkeypatch.setattr(fuzz, "write_damaged", lambda rng, path: None)
    assert not fuzz.run_all(0, {"checkpoints": 4}, world)[1]
    monkeypatch.setattr(weights, "read_headers", swapped)
    _, faults = fuzz.run_all(0, {"checkpoints": 4}, world)
    assert len(faults) == 4 and all("is not the file's" in said for _, _, said in faults)
