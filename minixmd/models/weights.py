"""Checkpoints in the published layout: every tensor of the file and of the model is accounted for, both ways."""
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minixmd.files import write_json, write_safetensors
from minixmd.models.families import read_config
from minixmd.models.lora import Linear
from minixmd.models.multimodal import MultimodalLM

PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json",
                   "preprocessor_config.json", "chat_template.json", "chat_template.jinja", "special_tokens_map.json")
# fields of PEFT's LoraConfig under which an adapter is more than scale (x Aᵀ) Bᵀ with one rank and one scale
NOT_PLAIN_LORA = ("peft_type", "bias", "fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "rank_pattern",
                  "alpha_pattern", "layer_replication", "alora_invocation_tokens")


def read_json(path):
    """The object in a JSON file; ValueError, naming the file, if it holds none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(found).__name__}")
    return found


def _tensor_files(folder):
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        shard_of = read_json(index).get("weight_map")
        if not isinstance(shard_of, dict):
            raise ValueError(f"{index}: has no weight_map that says which file holds which tensor")
        names = sorted(set(shard_of.values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file")
    return [folder / name for name in names]


def _open(path):
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def published_name(family, name):
    """Our parameter name -> the published file's."""
    ours = next(prefix for prefix in family.published if name.startswith(prefix))
    return family.published[ours] + name[len(ours):]


def load_model(folder, *, device="cpu", dtype=torch.float32):
    """Build on `meta` from config.json and put every tensor of the folder's safetensors files in its place.

    Args:
        folder: config.json and model.safetensors (or shards with their index).
    Returns:
        MultimodalLM, frozen, in `dtype` on `device`.
    Raises:
        ValueError: unsupported config; a broken file; or missing, unexpected and misshapen tensors, all in one message.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder / 'config.json'}: no such file")
    raw = read_json(folder / "config.json")
    try:
        config = read_config(raw)
    except ValueError as error:  # "config.json: …"
        raise ValueError(f"{folder}/{error}") from None
    with torch.device("meta"):
        model = MultimodalLM(config)
    wanted = {published_name(config.family, name): name for name, _ in model.named_parameters()}
    head, embedding = (published_name(config.family, n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    faults, seen = [], set()
    for path in _tensor_files(folder):
        with _open(path) as file:
            for name in file.keys():
                seen.add(name)
                if name == head and config.tie_word_embeddings:
                    continue  # checked below, when the embedding is in place
                if name not in wanted:
                    faults.append(f"unexpected {name}")
                    continue
                module_name, _, leaf = wanted[name].rpartition(".")
                module = model.get_submodule(module_name)
                expected, found = list(getattr(module, leaf).shape), file.get_slice(name).get_shape()
                if found != expected:
                    faults.append(f"{name} has shape {found}, expected {expected}")
                    continue
                tensor = file.get_tensor(name).to(device=device, dtype=dtype)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    faults += [f"missing {name}" for name in wanted if name not in seen]
    if faults:
        raise ValueError(f"{folder}: {len(faults)} tensors do not fit config.json: " + "; ".join(sorted(faults)))
    model.tie()
    if config.tie_word_embeddings and head in seen:
        for path in _tensor_files(folder):
            with _open(path) as file:
                if head not in file.keys():
                    continue
                if not torch.equal(file.get_tensor(head).to(device, dtype), model.lm_head.weight):
                    raise ValueError(f"{folder}: config.json ties {head} to {embedding}, but the file's two differ")
    return model


def save_model(model, processor_folder, folder):
    """Write a model without adapters in the published layout, with the tokenizer and processor files of its source."""
    folder = Path(folder)
    state = {published_name(model.config.family, name): p for name, p in model.named_parameters()}
    if any("lora_" in name for name in state):
        raise ValueError("save_model writes plain weights: merge the adapter first (merge_lora)")
    write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    for name in PROCESSOR_FILES:
        source = Path(processor_folder) / name
        if source.is_file() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)
    write_json(folder / "config.json", model.config.raw)


def adapted(model):
    """{module name: Linear} of the layers that carry an adapter."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.lora_A is not None}


def save_adapter(model, base, folder):
    """Write the model's adapter in PEFT's format, with transformers 5 module paths.

    Args:
        base: path of the model it belongs to, recorded for `load` and PEFT.
    """
    tensors, paths, layers = {}, [], adapted(model)
    for name, module in layers.items():
        ours = next(prefix for prefix in model.config.family.modules if name.startswith(prefix))
        paths.append(model.config.family.modules[ours] + name[len(ours):])
        tensors[f"base_model.model.{paths[-1]}.lora_A.weight"] = module.lora_A
        tensors[f"base_model.model.{paths[-1]}.lora_B.weight"] = module.lora_B
    rank = next(iter(layers.values())).lora_A.shape[0]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
        "lora_alpha": next(iter(layers.values())).scale * rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": "|".join(re.escape(path) for path in paths), "inference_mode": True, "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "init_lora_weights": True,
    }  # fmt: skip
    write_safetensors(Path(folder) / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(Path(folder) / "adapter_config.json", config)


def load_adapter(model, folder):
    """Attach the adapter of a PEFT folder to a loaded model.

    Raises:
        ValueError: a tensor that belongs to no linear layer of the model, half a pair, another shape, or an adapter
            that is not plain LoRA.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    for name in NOT_PLAIN_LORA:
        if config.get(name) not in (None, False, "none", "LORA", {}, []):
            raise ValueError(f"{folder}: adapter_config.json {name} = {config[name]!r} is not implemented")
    for name in ("r", "lora_alpha"):
        if type(config.get(name)) not in (int, float) or config[name] <= 0:
            raise ValueError(f"{folder}: adapter_config.json {name} must be a number above 0, got {config.get(name)!r}")
    family = model.config.family  # older adapters have the published file's module paths
    back = {theirs: ours for paths in (family.published, family.modules) for ours, theirs in paths.items()}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    pairs, faults = {}, []
    with _open(folder / "adapter_model.safetensors") as file:
        for key in file.keys():
            path, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            prefix = max((p for p in back if path.startswith(p)), key=len, default=None)
            name = path if prefix is None else back[prefix] + path[len(prefix):]
            if half not in ("lora_A", "lora_B") or name not in layers:
                faults.append(f"{key} fits no linear layer")
                continue
            pairs.setdefault(name, {})[half] = file.get_tensor(key).float()
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    for name, pair in pairs.items():
        F, D = layers[name].weight.shape
        found = {half: tuple(t.shape) for half, t in pair.items()}
        if found != {"lora_A": (rank, D), "lora_B": (F, rank)}:
            faults.append(f"{name}: expected lora_A {(rank, D)} and lora_B {(F, rank)}, got {found}")
    if faults or not pairs:
        raise ValueError(f"{folder}: adapter does not fit the model: " + "; ".join(faults or ["it holds no tensor"]))
    for name, pair in pairs.items():
        device = layers[name].weight.device
        layers[name].lora_A = nn.Parameter(pair["lora_A"].to(device), requires_grad=False)
        layers[name].lora_B = nn.Parameter(pair["lora_B"].to(device), requires_grad=False)
        layers[name].scale = scale
