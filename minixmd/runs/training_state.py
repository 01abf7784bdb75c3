"""The resumable state of a training stage, and its logs.

    state.json                      the last step saved, and the one that was best in validation; written last
    weights-000012.safetensors      what trains, after step 12: kept for both
    optimizer-000012.safetensors    the optimizer's tensors
"""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minixmd.runs.files import parse_json, write_json, write_safetensors, write_text
from minixmd.runs.records import read_jsonl

STATE = "state.json"
LOGS = ("log.jsonl", "completions.jsonl")  # they grow line by line


def tensor_file(folder, kind, step):
    return Path(folder) / f"{kind}-{step:06d}.safetensors"


def save_state(folder, weights, optimizer, progress):
    """Replaces the training state; a kill leaves the old one or the new one. weights, optimizer: {name: tensor}, not
    written again for the same step. progress: JSON-able, with "step" and, where one is to be kept, "best_step"."""
    old, step = load_state(folder), progress["step"]
    if old is None or old["step"] != step:
        write_safetensors(tensor_file(folder, "weights", step), weights)
        write_safetensors(tensor_file(folder, "optimizer", step), optimizer)
    write_json(Path(folder) / STATE, progress)
    remove_leftovers(folder, progress)


def load_state(folder):
    """The progress last saved; None before the first save."""
    path = Path(folder) / STATE
    if not path.exists():
        return None
    try:
        state = parse_json(path.read_bytes())
        int(state["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a training state ({error}); delete it to start the stage anew") from error
    return state


def remove_leftovers(folder, state=None):
    """Deletes the files of steps that the state does not name; without a state all of them, and state.json."""
    kept = []
    if state is not None:
        kept = [Path(folder) / STATE, tensor_file(folder, "optimizer", state["step"])]
        kept += [tensor_file(folder, "weights", step) for step in (state["step"], state.get("best_step", 0))]
    for pattern in (STATE, "weights-*.safetensors", "optimizer-*.safetensors"):
        for path in Path(folder).glob(pattern):
            if path not in kept:
                path.unlink()


def open_tensors(path):
    """safetensors' safe_open, which maps a file's tensors. Raises ValueError for one that is damaged or missing."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not of a training state ({error}); delete {path.parent / STATE} to start the stage "
                         "anew") from error


def fill(tensors, path):
    """Copies a file's tensors into {name: tensor}. Raises ValueError where the two differ in a name, shape or dtype."""
    with open_tensors(path) as file, torch.no_grad():
        if tensors.keys() != set(file.keys()):
            name = min(tensors.keys() ^ file.keys())
            raise ValueError(f"{path}: not a state of this model: only one of the two has {name}")
        for name, tensor in tensors.items():
            saved = file.get_tensor(name)
            if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{path}: not a state of this model: {name} is {saved.dtype} {list(saved.shape)}, "
                                 f"expected {tensor.dtype} {list(tensor.shape)}")
            tensor.copy_(saved)


def rewind_logs(folder, step):
    """Drops the log lines of steps after `step`, which will be redone. Returns the lines of log.jsonl that stay."""
    kept = {}
    for name in LOGS:
        path = Path(folder) / name
        if path.exists():
            kept[name] = [line for line in read_jsonl(path) if line["step"] <= step and step > 0]
            # as append_jsonl wrote them: a resumed run's logs are the same bytes
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept[name]))
    return kept.get("log.jsonl", [])
