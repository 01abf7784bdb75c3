"""Two processes that share the clips of a run's stages write what one alone writes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mini import write_clips, write_config, write_model

from minixmd.runner import main
from minixmd.runs import distributed
from minixmd.runs.distributed import compute_shards

ROOT = Path(__file__).resolve().parents[1]
FILES = ("before/results.json", "before/answers.jsonl", "labels/labels.jsonl", "traces/samples.jsonl",
         "traces/results.json", "checked/verdicts.jsonl", "learnt/log.jsonl")
STAGES = """[
    Evaluate(name="before", model={model!r}, manifest={manifest!r}),
    Label(name="labels", model={model!r}, manifest={manifest!r}),
    Traces(name="traces", model={model!r}, manifest={manifest!r}, media="audio", num_samples=2, max_new_tokens=5),
    FactCheck(name="checked", traces={traces!r}, manifest={manifest!r}, model={model!r}, threshold=-1e9),
    SFT(name="learnt", model={model!r}, manifest={manifest!r}, max_steps=2),
]"""
# shards of 5 clips, so that there is something to share
COMMAND = """
import sys
from minixmd.runner import main
from minixmd.runs import distributed
from minixmd.stages import traces
distributed.SHARD = traces.CLIPS = 5
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model, manifest = write_model(folder / "ears", "audio"), write_clips(folder / "clips")
    traces = [{"id": f"clip{i}", "text": f"<think>Thought {i}.</think><answer>A</answer>"} for i in range(12)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    (folder / "command.py").write_text(COMMAND)
    given = dict(model=str(model), manifest=str(manifest), traces=str(folder / "traces.jsonl"))
    return write_config(folder / "config.py", STAGES.format(**given))


def outputs(run):
    def lines(name):
        kept = [json.loads(line) for line in (run / name).read_text().splitlines()]
        return [{key: value for key, value in line.items() if not key.endswith("_per_s")} for line in kept]

    return {name: lines(name) if name.endswith("jsonl") else json.loads((run / name).read_text()) for name in FILES}


@pytest.mark.slow
def test_two_processes_write_what_one_writes(config, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
                   "OMP_NUM_THREADS": "1"}
    command = [str(config.parent / "command.py"), str(config), f"run_dir={tmp_path / 'two'}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    for skipped in (0, 5):
        done = subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("finished before, skipped") == skipped
    shards = sorted(path.name for path in (tmp_path / "two" / "traces" / "shards").iterdir())
    assert shards == ["0000000.jsonl", "0000005.jsonl", "0000010.jsonl"]
    assert main([str(config), f"run_dir={tmp_path / 'one'}"]) == 0
    assert outputs(tmp_path / "two") == outputs(tmp_path / "one")


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(config, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend",
                           "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(config.parent / "command.py"), str(config),
                           f"run_dir={tmp_path / 'run'}", "before.manifest=nowhere.jsonl"], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "manifest 'nowhere.jsonl' does not exist" in done.stderr


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_shard_is_computed_by_one_process_and_collected_in_order_by_the_first(tmp_path, monkeypatch, world_size):
    computed, waits = [], []

    def compute(items):
        computed.append((rank, items))
        return [{"square": item * item} for item in items]

    monkeypatch.setattr(distributed, "barrier", lambda: waits.append(rank))
    for rank in reversed(range(world_size)):  # the first collects, when the others are done
        monkeypatch.setattr(distributed, "rank_and_world_size", lambda rank=rank: (rank, world_size))
        records = compute_shards(compute, list(range(11)), tmp_path, "squares", "item", shard_size=3)
        assert (records is None) == (rank > 0)
    assert records == [{"square": i * i} for i in range(11)] and len(waits) == world_size * (world_size > 1)
    assert sorted(computed, key=lambda part: part[1]) == [
        (0, [0, 1, 2]), (1 % world_size, [3, 4, 5]), (2 % world_size, [6, 7, 8]), (3 % world_size, [9, 10])]
    (tmp_path / "0000006.jsonl").unlink()
    computed.clear()
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 1))
    assert compute_shards(compute, list(range(11)), tmp_path, "squares", "item", shard_size=3) == records
    assert computed == [(0, [6, 7, 8])]


def test_a_stage_of_the_first_process_alone_computes_every_shard_there(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(distributed, "barrier", None)  # the other would never come
    records = compute_shards(lambda items: [{"item": item} for item in items], [1, 2, 3], tmp_path, "title", "item",
                             shard_size=2, first_process_only=True)
    assert [record["item"] for record in records] == [1, 2, 3]
