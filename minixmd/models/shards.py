"""Which safetensors file holds which tensor: one file, or shards and their index. Headers only, until a tensor is asked
for.
"""
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from minixmd.runs.files import read_json, write_json, write_safetensors

SINGLE, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Held(NamedTuple):
    """Where a tensor is and what it is like, from its file's header."""

    file: str
    shape: list[int]
    dtype: str  # a key of DTYPES, or another that is not read


def open_safetensors(path):
    """The file's header and, on demand, its tensors; ValueError, naming the file, if it is absent or cut short."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def _file_of(folder):
    """{tensor: file} as the index has it; None without an index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: has no weight_map that says which file holds which tensor")
    if not found:
        raise ValueError(f"{path}: its weight_map names no tensor")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path}: {name} must be in a file of the same folder, got {file!r}")
    return found


def tensor_files(folder, family):
    """Names of the files that hold anything that is built; a shard of nothing but skipped tensors is not among them."""
    file_of = _file_of(Path(folder)) or {"": SINGLE}
    return sorted({file for name, file in file_of.items() if not name.startswith(tuple(family.skipped))})


def survey(folder, family):
    """Every tensor that is to be built, from the headers alone, and what is wrong with their distribution.

    Returns:
        ({tensor: Held}, {tensor: fault}): it is in two shards, in another one than the index says, or not in the index.
    Raises:
        ValueError: a missing or truncated file, or an index that is none.
    """
    folder, file_of = Path(folder), _file_of(Path(folder))
    held, faults = {}, {}
    for file in tensor_files(folder, family):
        with open_safetensors(folder / file) as shard:
            for name in shard.keys():
                if name.startswith(tuple(family.skipped)):
                    continue
                if name in held:
                    faults[name] = f"{name} is in {held[name].file} and in {file}"
                    continue
                part = shard.get_slice(name)
                held[name] = Held(file, part.get_shape(), part.get_dtype())
                if file_of is not None and name not in file_of:
                    faults[name] = f"{name} is in {file}, but the index does not name it"
    for name, file in (file_of or {}).items():
        if not name.startswith(tuple(family.skipped)):
            found = held[name].file if name in held else "no shard"
            if found != file:
                faults.setdefault(name, f"{name} is in {found}, but the index says {file}")
    return held, faults


def skipped_parts(folder, family):
    """{part: number of tensors} of what the checkpoint holds beyond the model that is built, as Omni's talker."""
    if not family.skipped:
        return {}
    folder = Path(folder)
    names = _file_of(folder)
    if names is None:
        with open_safetensors(folder / SINGLE) as file:
            names = file.keys()
    return dict(Counter(part for name in names for prefix, part in family.skipped.items() if name.startswith(prefix)))


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
    file_of = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, {"format": "pt"})
        file_of.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})
