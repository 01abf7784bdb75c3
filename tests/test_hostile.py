"""Files that are meant to harm whoever opens them, inside a training stage: each is counted, and the run ends."""
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from hostile_files import write_hostile
from mini import write_clips, write_config, write_model
from test_contained import listen

from minixmd.inputs.clips import load_clip
from minixmd.inputs.contained import Contained
from minixmd.inputs.media import MediaError
from minixmd.runner import main

HEARD = {"10 hours of silence"}  # of which 30 s are read


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "ears", "audio")
    write_clips(folder / "clips")
    paths = write_hostile(folder / "clips" / "hostile")
    lines = (folder / "clips" / "manifest.jsonl").read_text().splitlines()
    for i, path in enumerate(paths.values()):
        record = json.loads(lines[i % 12])
        lines.insert(3 * i, json.dumps({**record, "id": f"hostile {i}", "audio": f"hostile/{path.name}"}))
    (folder / "clips" / "hostile.jsonl").write_text("\n".join(lines) + "\n")
    return folder, paths


def test_each_is_refused_with_its_reason_and_in_little_time_and_memory(world):
    _, paths = world
    load = Contained(load_clip, 20.0)
    reasons = {}
    for name, path in paths.items():
        start = time.monotonic()
        try:
            load(str(path), "audio", dict(max_s=30))
        except MediaError as error:
            reasons[name] = error.reason
        assert time.monotonic() - start < 10, name
    [child] = [child for child in load.children if child.is_alive()]  # one that none of them killed
    with open(f"/proc/{child.pid}/status") as status:
        peak_kb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    load.stop()
    assert peak_kb < 1 << 20
    assert paths.keys() - reasons.keys() == HEARD
    assert "crashed" not in reasons.values() and "out of time" not in reasons.values()


CONFIG = """[SFT(name='student', model='{0}/ears', manifest='{0}/clips/hostile.jsonl', batch_size=4,
                 max_bad=1.0, epochs={1}, device='cpu', clip_limit_s=20.0)]"""


def test_a_stage_among_them_ends_and_counts_them(world, tmp_path, monkeypatch):
    folder, paths = world
    config = write_config(tmp_path / "config.py", CONFIG.format(folder, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/student/log.jsonl").read_text().splitlines()]
    assert sum("bad" in line for line in lines) == len(paths) - len(HEARD)
    assert lines[-1]["step"] == lines[0]["steps"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


@pytest.mark.slow
def test_one_interrupt_ends_it_within_seconds(world, tmp_path):
    folder, _ = world
    config = write_config(tmp_path / "config.py", CONFIG.format(folder, 1000))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "minixmd.train", config, f"run_dir={tmp_path / 'run'}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
                          preexec_fn=listen) as run:
        log = tmp_path / "run" / "student" / "log.jsonl"
        while not log.exists() or log.read_text().count("\n") < 20:
            time.sleep(0.1)
        start = time.monotonic()
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(10) == 130 and time.monotonic() - start < 5
        assert "interrupted" in run.stderr.read()
