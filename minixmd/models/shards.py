"""Safetensors checkpoints on disk: one file, or shards and their index. Headers only, until a tensor is needed."""
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from minixmd.runs.files import read_json, write_json, write_safetensors

SINGLE, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorInfo(NamedTuple):
    file: str
    key: str  # its name there
    shape: list[int]
    dtype: str  # a key of DTYPES, or another that is not read


def listed(texts, between="; "):
    """At most ten of them, and how many more there are."""
    shown = between.join(texts[:10])
    return shown if len(texts) <= 10 else f"{shown}{between}and {len(texts) - 10} more"


def open_safetensors(path):
    """The file's header and, on demand, its tensors; ValueError, naming the file, if it is absent or cut short."""
    if not path.is_file():
        others = []
        if path.name in (SINGLE, "adapter_model.safetensors"):
            for kind in ("safetensors", "bin", "pt", "pth", "gguf"):
                others += sorted(file.name for file in path.parent.glob(f"*.{kind}"))
        there = f" (there: {listed(others, ', ')}; read is safetensors, shards with {INDEX})" if others else ""
        raise ValueError(f"{path}: no such file{there}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def _read_index(folder):
    """{tensor: file} of a folder's index; None without an index."""
    path = Path(folder, INDEX)
    if not path.is_file():
        return None
    weight_map = read_json(path).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise ValueError(f"{path}: has no weight_map that says which file holds which tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path}: {name} must be in a file of the same folder, got {file!r}")
    return weight_map


def tensor_files(folder, family):
    """Names of the files that hold anything that is built, in order."""
    index = _read_index(folder) or {"": SINGLE}
    return sorted({file for name, file in index.items() if not name.startswith(tuple(family.skipped))})


def read_headers(folder, family):
    """{published name: TensorInfo} of the parts that are built, from the headers alone: what the files hold counts, not
    what the index says. Raises ValueError: a missing or broken file or index, or a tensor in two shards."""
    folder, infos = Path(folder), {}
    for file in tensor_files(folder, family):
        with open_safetensors(folder / file) as shard:
            for key in shard.keys():
                if key.startswith(tuple(family.skipped)):
                    continue
                name = family.published_name(key)
                if name in infos:
                    raise ValueError(f"{folder}: {name} is in {infos[name].file} and in {file}")
                header = shard.get_slice(key)
                infos[name] = TensorInfo(file, key, header.get_shape(), header.get_dtype())
    return infos


def tensor_faults(actual, expected):
    """{name: fault} of tensors that are missing, unexpected or misshapen. Both: {name: what has a .shape}."""
    faults = {name: f"missing {name}" for name in expected.keys() - actual.keys()}
    for name, tensor in actual.items():
        if name not in expected:
            faults[name] = f"unexpected {name}"
        elif list(tensor.shape) != list(expected[name].shape):
            faults[name] = f"{name} has shape {list(tensor.shape)}, expected {list(expected[name].shape)}"
    return faults


def skipped_parts(folder, family):
    """{part: number of tensors} of what the checkpoint holds beyond the model that is built, as Omni's talker."""
    if not family.skipped:
        return {}
    names = _read_index(folder)
    if names is None:
        with open_safetensors(Path(folder) / SINGLE) as file:
            names = file.keys()
    counts = {part: sum(name.startswith(prefix) for name in names) for prefix, part in family.skipped.items()}
    return {part: count for part, count in counts.items() if count}


def write_shards(folder, state, shard_bytes):
    """Write {name: tensor} as one file or, above shard_bytes in all, as shards and their index; older ones go first."""
    folder = Path(folder)
    for stale in [folder / INDEX, folder / SINGLE, *folder.glob(SHARDS)]:
        stale.unlink(missing_ok=True)
    shards, room = [{}], shard_bytes
    for name, tensor in state.items():  # a tensor above the limit has a shard of its own
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, state, {"format": "pt"})
        return
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, {"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
