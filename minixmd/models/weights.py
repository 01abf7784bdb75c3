"""Checkpoints in the published layout and adapters in PEFT's; every tensor of file and model is accounted for."""
import hashlib
import math
import os
import re
import shutil
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from minixmd.models.families import CONFIG_FIELDS, read_config
from minixmd.models.lora import adapted, named_linears
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.sharding import part_of, shard_frozen
from minixmd.models.shards import (
    DTYPES,
    listed,
    open_safetensors,
    read_headers,
    tensor_faults,
    tensor_files,
    write_shards,
)
from minixmd.runs.files import fingerprint, read_json, write_json, write_safetensors
from minixmd.runs.heartbeat import beat
from minixmd.runs.hub_names import parse_hub_name
from minixmd.runs.value_checks import check_fields

SPEAKERS = "spk_dict.pt"  # Omni's voices
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                   "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "generation_config.json",
                   "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", SPEAKERS)
SHARD_BYTES = 5_000_000_000  # a file's size at most, as on the hub
BASE_FILE = "minixmd_base.json"  # beside an adapter: where its base lies from there, and a digest of it
ADAPTER = {"r": Annotated[int, "> 0"], "lora_alpha": Annotated[float, "> 0"]}
DTYPE_FIELDS = {"dtype", "torch_dtype"}  # of config.json, in transformers 5 and 4


def config_of(folder):
    """ModelConfig from a folder's config.json; ValueError, naming file and field, if it is not supported."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    raw = read_json(path)
    try:
        return read_config(raw)
    except ValueError as error:  # "config.json: …"
        raise ValueError(f"{folder}/{error}") from None


def build(config):
    """The model without memory: every parameter is on `meta`."""
    with torch.device("meta"):
        return MultimodalLM(config)


def load_model(folder, *, device="cpu", dtype=torch.float32, sharded=False):
    """The frozen MultimodalLM of a folder, in `dtype` on `device`. Each tensor is copied: the peak is the model.

    folder: config.json and model.safetensors, or an index and the shards of which anything is built; no file stays
    open. sharded: by shard_frozen. ValueError: an unsupported config; a broken file; or all tensors that do not fit."""
    folder = Path(folder)
    config = config_of(folder)
    model = build(config).requires_grad_(False)
    if sharded:
        shard_frozen(model, device)
    parameters = {config.family.checkpoint_name(name): name for name, _ in model.named_parameters()}
    infos = read_headers(folder, config.family)
    head = config.family.checkpoint_name("lm_head.weight")
    head_copy = infos.pop(head, None) if config.tie_word_embeddings else None
    faults = tensor_faults(infos, {name: model.get_parameter(ours) for name, ours in parameters.items()})
    for name, info in infos.items():
        if name not in faults and info.dtype not in DTYPES:
            faults[name] = f"{name} is {info.dtype}, expected {', '.join(DTYPES)}"
    if faults:
        by_name = [faults[name] for name in sorted(faults)]
        raise ValueError(f"{folder}: {len(faults)} tensors do not fit config.json: {listed(by_name)}")
    for path, names in groupby(infos, key=lambda name: folder / infos[name].file):
        with open_safetensors(path) as file:
            for name in names:
                beat()
                tensor = file.get_tensor(infos[name].key).to(device, dtype, copy=True)
                tensor = part_of(tensor, model.get_parameter(parameters[name]))
                model.load_state_dict({parameters[name]: tensor}, strict=False, assign=True)
    model.tie()
    if head_copy is not None:
        with open_safetensors(folder / head_copy.file) as file:
            if not torch.equal(file.get_tensor(head_copy.key).to(device, dtype), model.lm_head.weight):
                embedding = config.family.checkpoint_name("model.embed_tokens.weight")
                raise ValueError(f"{folder}: config.json ties {head} to {embedding}, but the file's two differ")
    return model


def save_model(model, processor_folder, folder, shard_bytes=SHARD_BYTES):
    """Write a model without adapters in the published layout, with its source's tokenizer and processor files; of Omni
    the thinker. An older config.json goes first and the new one comes last: a kill leaves no mixture that loads.

    processor_folder: where the tokenizer's files are; may be `folder`. shard_bytes: the largest size of a weight file.
    Raises ValueError: the model carries an adapter, or `folder` holds one."""
    folder, family = Path(folder), model.config.family
    if adapted(model):
        raise ValueError("save_model writes plain weights: merge the adapter first (merge_lora)")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: holds an adapter; a whole model needs another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for name in PROCESSOR_FILES:
        source = Path(processor_folder) / name
        if source.is_file() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)
    state = {family.checkpoint_name(name): p for name, p in model.named_parameters()}
    write_shards(folder, state, shard_bytes)
    raw = model.config.raw
    if not DTYPE_FIELDS & raw.keys():
        raw = {**raw, "torch_dtype": None}
    raw = _with_dtype(raw, str(model.dtype).removeprefix("torch."))
    if model.config.tie_word_embeddings:  # transformers does not look for it in Omni's text_config
        section = raw[family.section] if family.section else raw
        section["tie_word_embeddings"] = True
    if family.skipped:
        raw["enable_audio_output"] = False  # transformers then builds no talker
        if not (folder / SPEAKERS).exists():
            torch.save({}, folder / SPEAKERS)  # but asks for its voices
    write_json(folder / "config.json", raw)


def _with_dtype(section, dtype):
    """A copy of a config in which all dtypes that it names, also in inner sections, are `dtype`; all else stays."""
    if not isinstance(section, dict):
        return section
    return {name: dtype if name in DTYPE_FIELDS else _with_dtype(value, dtype) for name, value in section.items()}


def save_adapter(model, base, folder):
    """Write the model's adapter in PEFT's format, with transformers 5 module paths (of Omni: the thinker class's).
    base: what it stands on, recorded for `load` and PEFT: a path or "owner/name@revision", of a model or an adapter."""
    layers = adapted(model)
    pairs = {}
    for name, layer in layers.items():
        pairs[name] = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    first = next(iter(layers.values()))
    rank = len(first.lora_A)
    hub_name = None if Path(base).is_dir() else parse_hub_name(base)
    name, revision = hub_name or (str(base), None)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name, "revision": revision,
              "r": rank, "lora_alpha": first.scale * rank, "inference_mode": True}
    write_adapter(folder, config, pairs, model.config.family.transformers_path)
    if hub_name is None and any(Path(base, name).is_file() for name in ("config.json", "adapter_config.json")):
        path = os.path.relpath(os.path.realpath(base), os.path.realpath(folder))
        write_json(Path(folder) / BASE_FILE, {"path": path, "digest": digest_of(base)})


def digest_of(folder):
    """A digest of a model's or an adapter's config and weights."""
    files = ["adapter_config.json", "adapter_model.safetensors"]
    if not Path(folder, files[0]).is_file():
        files = ["config.json", *tensor_files(folder, config_of(folder).family)]
    fingerprints = "".join(fingerprint(Path(folder) / file) for file in files)
    return hashlib.sha256(fingerprints.encode()).hexdigest()


def write_adapter(folder, config, pairs, path_of):
    """Write an adapter as PEFT does. config: adapter_config.json, but for target_modules. pairs: {our module name:
    {"lora_A": (R, in), "lora_B": (out, R)}}. path_of: Family.transformers_path, or checkpoint_name for version 4."""
    tensors, targets = {}, []
    for name, pair in sorted(pairs.items()):
        path = path_of(name)
        targets.append(re.escape(path))
        for half, tensor in pair.items():
            tensors[f"base_model.model.{path}.{half}.weight"] = tensor
    write_safetensors(Path(folder) / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(Path(folder) / "adapter_config.json", {**config, "target_modules": "|".join(targets)})


def read_adapter(model, folder):
    """(adapter_config.json, pairs as write_adapter takes them, fp32 on the CPU) of a PEFT folder. model: may be on
    `meta`. Raises ValueError: an adapter that does not fit the model or is not plain LoRA."""
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    for name, value in config.items():
        values = CONFIG_FIELDS["adapter_values"].get(name, [value])
        if value not in values or value and name not in CONFIG_FIELDS["adapter"]:
            raise ValueError(f"{folder}: adapter_config.json {name} = {value!r} is not implemented")
    targets = str if isinstance(config.get("target_modules"), str) else tuple[str, ...] | None
    check_fields(config, {**ADAPTER, "target_modules?": targets}, f"{folder}: adapter_config.json")
    layers = named_linears(model)
    paths = {name: _module_paths(model.config.family, name) for name in layers}
    name_of = {path: name for name, all_paths in paths.items() for path in all_paths}
    pairs, faults, layouts = {}, [], set()
    with open_safetensors(folder / "adapter_model.safetensors") as file:
        for key in file.keys():
            name = key.removeprefix("base_model.model.").removesuffix(".weight")
            path, _, half = name.rpartition(".")
            if half not in ("lora_A", "lora_B") or path not in name_of:
                faults.append(f"{key} fits no linear layer")
                continue
            layouts.add(paths[name_of[path]].index(path))
            pair = pairs.setdefault(name_of[path], {})
            if half in pair:
                faults.append(f"{key} is there under two names")
            pair[half] = file.get_tensor(key).to(torch.float32, copy=True)
    if not pairs and not faults:
        faults.append("it holds no tensor")
    rank = config["r"]
    for name, layer in layers.items():
        out_features, in_features = layer.weight.shape
        shapes = {half: tuple(tensor.shape) for half, tensor in pairs.get(name, {}).items()}
        if shapes and shapes != {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}:
            faults.append(f"{name}: expected lora_A {(rank, in_features)} and lora_B {(out_features, rank)}, got "
                          f"{shapes}")
        elif not shapes and _is_target(config, [paths[name][layout] for layout in layouts]):
            faults.append(f"missing {name}")
    if faults:
        raise ValueError(f"{folder}: adapter does not fit the model: {listed(faults)}")
    return config, pairs


def _module_paths(family, name):
    """The paths that an adapter's file may have for a module of ours; older adapters have the published file's."""
    paths = [name, family.transformers_path(name), family.checkpoint_name(name)]
    if family.section:  # transformers 5's in the class that holds all of the family's models
        paths.append(family.section.removesuffix("_config") + "." + family.transformers_path(name))
    return paths


def _is_target(config, paths):
    """Whether the adapter's own config names the layer that has these paths, so that a pair for it must be there."""
    targets = config.get("target_modules")
    if targets == "all-linear" or config.get("exclude_modules") or config.get("layers_to_transform"):
        return False  # which layers these leave out only PEFT knows
    if isinstance(targets, str):
        try:
            return any(re.fullmatch(targets, path) for path in paths)
        except re.error as error:
            raise ValueError(f"adapter_config.json target_modules {targets!r}: {error}") from None
    return any(f".{path}".endswith(f".{target}") for path in paths for target in targets or ())


def load_adapter(model, folder):
    """Attach the adapter of a PEFT folder to a loaded model; raises as read_adapter."""
    config, pairs = read_adapter(model, folder)
    for name, pair in pairs.items():
        layer = model.get_submodule(name)
        for half, tensor in pair.items():
            setattr(layer, half, nn.Parameter(tensor.to(layer.weight.device), requires_grad=False))
        rank = config["r"]
        layer.scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
