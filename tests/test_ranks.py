"""Two processes that share the clips of a run's stages write what one alone writes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mini import write_clips, write_config, write_model

from minixmd.train import main

ROOT = Path(__file__).resolve().parents[1]
FILES = ("before/results.json", "before/answers.jsonl", "labels/labels.jsonl", "traces/samples.jsonl",
         "traces/results.json", "checked/verdicts.jsonl", "learnt/log.jsonl")
STAGES = """[
    Evaluate(name="before", model={model!r}, manifest={manifest!r}),
    Label(name="labels", model={model!r}, manifest={manifest!r}),
    Traces(name="traces", model={model!r}, manifest={manifest!r}, media="audio", n=2, max_new_tokens=5),
    FactCheck(name="checked", traces={traces!r}, manifest={manifest!r}, model={model!r}, threshold=-1e9),
    Train(name="learnt", objective="sft", model={model!r}, manifest={manifest!r}, max_steps=2),
]"""
# shards of 5 clips, so that there is something to share
COMMAND = """
import sys
from minixmd.stages import multiple_choice as scoring
from minixmd.stages import traces
scoring.SHARD = traces.CLIPS = 5
from minixmd.train import main
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


def test_an_error_of_one_process_ends_all(config, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend",
                           "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(config.parent / "command.py"), str(config),
                           f"run_dir={tmp_path / 'run'}", "before.manifest=nowhere.jsonl"], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "manifest 'nowhere.jsonl' does not exist" in done.stderr
