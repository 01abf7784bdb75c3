"""What a stage leaves in its directory, how a finished one is recognised, and the state a stopped one resumes from.

    config.json    the stage as resolved           inputs.json        a fingerprint of each file that it reads
    config.py      the config file as given        state.safetensors  Train: where to resume
    versions.json  what it last ran with           done.json          written last: the stage is finished
    log.jsonl      a line a `log_line`             completions.jsonl  Train, GRPO: some completions as text

A file's fingerprint is the SHA-256 of its content, or above 64 MiB of its size and of 256 blocks spread evenly over it:
the whole of a 15 GB checkpoint would take a minute on every start, and a time stamp changes when a folder is copied. A
folder's is that of its files' names and fingerprints. A model's that is on the hub is its name with the commit. The
clips that a manifest lists are not looked at.
"""
import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from minixmd.models.hub import pinned
from minixmd.runs.files import write_bytes, write_json, write_safetensors

WHOLE_BYTES = 64 << 20  # up to here a file is read whole
SAMPLES, SAMPLE_BYTES = 256, 64 << 10  # beyond it, so many blocks of so many bytes
STATE = "state.safetensors"
LOGS = ("log.jsonl", "completions.jsonl")  # they grow line by line
# fields that may change under a stage: when it gives up, and how an endpoint is asked. With a model here in the
# endpoint's place or the other way round, `model` and `served` change too
FREE = ("max_bad", "endpoint", "api_key_env", "concurrency", "timeout_s", "attempts", "retry_backoff_s", "logprobs")


def begin(run_dir, stage, inputs, source):
    """Opens a stage's directory for a first run or for going on with an interrupted one, where FREE fields may differ
    from those that it began with.

    Args:
        run_dir: directory of the run; the stage's is run_dir/stage.name.
        stage: a stage dataclass.
        inputs: field -> path of every file or folder that the stage reads (references.input_paths).
        source: the config file.
    Returns:
        The stage's directory, or None if the stage is finished.
    Raises:
        ValueError: the directory belongs to another config or other inputs, or an input is missing; one line.
        OSError: it cannot be written.
    """
    folder = Path(run_dir) / stage.name
    config = json.loads(json.dumps({"stage": type(stage).__name__.lower(), **asdict(stage)}))  # tuples to lists
    prints = {field: pinned(path) if field == "model" and not path.exists() else fingerprint(path)
              for field, path in inputs.items()}
    if (folder / "config.json").exists():
        old_config, old_prints = _read(folder / "config.json"), _read(folder / "inputs.json")
        differences = _differences(old_config, config)
        if differences:
            _refuse(folder, "another config", differences)
        changed = [f"{field} {inputs[field]} changed" for field in inputs if prints[field] != old_prints.get(field)]
        if changed:
            _refuse(folder, "other inputs", changed)
        if (folder / "done.json").exists():
            return None
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.rglob(".*.tmp"):  # of a write that a kill cut short
        leftover.unlink()
    for name in LOGS:
        _drop_torn_line(folder / name)
    write_json(folder / "versions.json", versions())
    if not (folder / "config.json").exists():
        write_bytes(folder / "config.py", Path(source).read_bytes())
        write_json(folder / "inputs.json", prints)
    write_json(folder / "config.json", config)  # last: with it the directory is complete
    return folder


def finish(folder):
    """Marks a stage as finished. What it wrote must be on disk by now."""
    marks = {name: fingerprint(Path(folder) / f"{name}.json") for name in ("config", "inputs")}
    write_json(Path(folder) / "done.json", marks)


def log_line(folder, record, name="log.jsonl"):
    """Appends a dict to one of the stage's LOGS."""
    path = Path(folder) / name
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:  # a full disk's own error names no file
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def fingerprint(path):
    """Hex digest of a file or folder by the rule above; ValueError if there is none."""
    path = Path(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for part in sorted(part for part in path.rglob("*") if part.is_file() and not part.name.startswith(".")):
            digest.update(f"{part.relative_to(path).as_posix()}\n{fingerprint(part)}\n".encode())
        return digest.hexdigest()
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size <= WHOLE_BYTES:
                return hashlib.sha256(file.read()).hexdigest()
            digest = hashlib.sha256(str(size).encode())
            for i in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
            return digest.hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file or folder") from None


def versions():
    """What the program runs with: versions, the checkout's commit if it runs from one, and the hardware."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "minixmd"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # triton where there is none; minixmd in a checkout that is not installed
            found[name] = None
    commit, dirty = _git(Path(__file__).resolve().parents[2])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**found, "commit": commit, "dirty": dirty, "gpu": gpu, "machine": platform.platform()}


def save_state(folder, tensors, meta):
    """Replaces the training state, named tensors and a JSON-able `meta`. A kill leaves the old one or the new one."""
    write_safetensors(Path(folder) / STATE, tensors, {"meta": json.dumps(meta)})


def load_state(folder):
    """(tensors on the CPU, meta) as last saved, bit for bit; None before the first save."""
    path = Path(folder) / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["meta"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a training state ({error}); delete it to start the stage anew") from error


def _read(path):
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path}: missing or not JSON; delete {path.parent} to run the stage anew") from error


def _differences(old, new):
    def shown(config, field):
        return json.dumps(config[field]) if field in config else "(no such field)"

    fields = [field for field in {**old, **new} if field not in FREE and shown(old, field) != shown(new, field)]
    return [f"{field} {shown(old, field)} -> {shown(new, field)}" for field in fields]


def _refuse(folder, what, differences):
    raise ValueError(f"{folder} was made by {what}: {', '.join(differences)}; set another run_dir or delete {folder}")


def _drop_torn_line(log):
    """A kill may have cut the last line short, and the next one would be glued to it. stderr says so."""
    data = log.read_bytes() if log.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(log, whole)
        tqdm.write(f"{log}: dropped the last line, cut short after {len(data) - whole} bytes", file=sys.stderr)


def _git(root):
    """(commit, whether it was changed since) of a checkout; (None, None) if `root` is not the top of one."""
    answers = []
    for command in (["rev-parse", "--show-toplevel", "HEAD"], ["status", "--porcelain"]):
        try:
            done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None, None
        if done.returncode:
            return None, None
        answers.append(done.stdout)
    top, commit = answers[0].split("\n")[:2]
    return (commit, bool(answers[1])) if Path(top).resolve() == root else (None, None)
