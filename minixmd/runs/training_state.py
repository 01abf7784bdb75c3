"""The resumable state of a training stage, and its logs.

    state.json                      the last step saved, and the one that was best in validation; written last
    weights-000012.safetensors      what trains, after step 12: kept for both
    optimizer-000012.safetensors    the optimizer's tensors

Where weights are sharded, each of N processes writes its rows: weights-000012-0-of-N.safetensors, with {name: (first
row, rows of the whole)} in its metadata. Any number of processes reads them.
"""
import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minixmd.runs.distributed import gather, rank_and_world_size
from minixmd.runs.files import parse_json, write_json, write_safetensors, write_text
from minixmd.runs.records import read_jsonl

STATE = "state.json"
LOGS = ("log.jsonl", "completions.jsonl")  # they grow line by line


def tensor_file(folder, kind, step, sharded=False):
    """Path of what this process writes."""
    part = "-{}-of-{}".format(*rank_and_world_size()) if sharded else ""
    return Path(folder) / f"{kind}-{step:06d}{part}.safetensors"


def tensor_files(folder, kind, step):
    """Paths of what all processes wrote."""
    found = sorted(Path(folder).glob(f"{kind}-{step:06d}*.safetensors"))
    return found or [Path(folder) / f"{kind}-{step:06d}.safetensors"]


def save_state(folder, weights, optimizer, progress, rows=None):
    """Replaces the training state; a kill leaves the old one or the new one. weights, optimizer: {name: tensor}, not
    written again for the same step. progress: JSON-able, with "step" and, where one is to be kept, "best_step". rows:
    {name: (first, all)} of tensors that are sharded among the processes, which then call this together; None = none is,
    and the first process writes."""
    old, step = load_state(folder), progress["step"]
    first = rank_and_world_size()[0] == 0
    if (old is None or old["step"] != step) and (first or rows is not None):
        for kind, tensors in (("weights", weights), ("optimizer", optimizer)):
            metadata = None if rows is None else {"rows": json.dumps(rows)}
            write_safetensors(tensor_file(folder, kind, step, rows is not None), tensors, metadata)
    if rows is not None:
        gather(None)  # before all have written theirs the old state holds
    if first:
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
        kept = [Path(folder) / STATE, *tensor_files(folder, "optimizer", state["step"])]
        for step in (state["step"], state.get("best_step", 0)):
            kept += tensor_files(folder, "weights", step)
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


def fill(tensors, paths, rows=None):
    """Copies files' tensors into {name: tensor}. paths: of tensor_files. rows: {name: (first, all)} of tensors that are
    some rows of one. Raises ValueError where the two differ in a name, shape or dtype, or rows are missing."""
    rank, world_size = rank_and_world_size()
    copied = Counter()
    for number, path in enumerate(paths):
        with open_tensors(path) as file, torch.no_grad():
            if tensors.keys() != set(file.keys()):
                name = min(tensors.keys() ^ set(file.keys()))
                raise ValueError(f"{path}: not a state of this model: only one of the two has {name}")
            sharded = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name, tensor in tensors.items():
                # whether its rows are known, here and in the file; of 8-bit blocks they may not be
                movable = (rows is None or name in rows) and (len(paths) == 1 or name in sharded)
                if tensor.ndim and not movable:
                    if len(paths) != world_size:
                        raise ValueError(f"{path}: the 8-bit blocks of {name} cannot be sharded anew: go on with "
                                         f"{len(paths)} processes")
                    if number != rank:
                        continue
                where = f"{path}: not a state of this model: {name}"
                place = (rows or {}).get(name)
                copied[name] += _copy_rows(tensor, place, file.get_tensor(name), sharded.get(name), where)
    for name, tensor in tensors.items():
        if tensor.ndim and copied[name] < len(tensor):
            raise ValueError(f"{paths[0]}: not a training state: rows of {name} are missing beside it; delete "
                             f"{paths[0].parent / STATE} to start the stage anew")


def _copy_rows(tensor, place, saved, saved_place, where):
    """Copies what `saved` has of a tensor's rows; returns how many. The places: (first row, all rows); None = all."""
    tensor, saved = torch.atleast_1d(tensor, saved)
    first, count = place or (0, len(tensor))
    begin, whole = saved_place or (0, len(saved))
    expected, found = [count, *tensor.shape[1:]], [whole, *saved.shape[1:]]
    if (found, saved.dtype) != (expected, tensor.dtype):
        raise ValueError(f"{where} is {saved.dtype} {found}, expected {tensor.dtype} {expected}")
    low, high = max(first, begin), min(first + len(tensor), begin + len(saved))
    if low < high:
        tensor[low - first:high - first].copy_(saved[low - begin:high - begin])
    return max(high - low, 0)


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
