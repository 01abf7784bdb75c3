"""Safetensors checkpoints on disk: one file, or shards and their index. Headers only, until a tensor is needed."""
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
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


def tensor_files(folder, family):
    """Names of the files that hold anything that is built, in order: those of the folder's index, if it has one."""
    path = Path(folder, INDEX)
    if not path.is_file():
        return [SINGLE]
    index = read_json(path).get("weight_map")
    if not index or not isinstance(index, dict):
        raise ValueError(f"{path}: has no weight_map that says which file holds which tensor")
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path}: {name} must be in a file of the same folder, got {file!r}")
    return sorted({file for name, file in index.items() if not name.startswith(family.skipped)})


def read_headers(folder, family):
    """{published name: TensorInfo} of the parts that are built, from the headers alone: what the files hold counts, not
    what the index says. Raises ValueError: a missing or broken file or index, or a tensor in two shards."""
    folder, infos = Path(folder), {}
    for file in tensor_files(folder, family):
        with open_safetensors(folder / file) as shard:
            for key in shard.keys():
                if key.startswith(family.skipped):
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


def write_shards(folder, state, shard_bytes):
    """Write {name: tensor} as one file or, above shard_bytes in all, as shards and their index; older ones go first."""
    folder = Path(folder)
    for stale in [folder / INDEX, folder / SINGLE, *folder.glob(SHARDS)]:
        stale.unlink(missing_ok=True)
    split = split_torch_state_dict_into_shards(state, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: state[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
