"""Checkpoints in the published layout and adapters in PEFT's: every tensor of the file and of the model is accounted
for, both ways.
"""
import re
import shutil
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from minixmd.models.families import read_config
from minixmd.models.lora import Linear
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.shards import DTYPES, open_safetensors, survey, write_shards
from minixmd.runs.files import read_json, write_json, write_safetensors
from minixmd.runs.hub_names import parse_hub_name

SPEAKERS = "spk_dict.pt"  # Omni's voices
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                   "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "generation_config.json",
                   "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", SPEAKERS)
SHARD_BYTES = 5_000_000_000  # a file's size at most, as on the hub
# fields of PEFT's LoraConfig under which an adapter is more than scale (x Aᵀ) Bᵀ with one rank and one scale
NOT_PLAIN_LORA = ("peft_type", "bias", "fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "rank_pattern",
                  "alpha_pattern", "layer_replication", "alora_invocation_tokens")


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


def published_name(family, name):
    """Our parameter name -> the published file's."""
    ours = next(prefix for prefix in family.published if name.startswith(prefix))
    return family.published[ours] + name[len(ours):]


def build(config):
    """The model without memory: every parameter is on `meta`."""
    with torch.device("meta"):
        return MultimodalLM(config)


def load_model(folder, *, device="cpu", dtype=torch.float32):
    """Build on `meta` from config.json, then stream every tensor of the folder's safetensors files into its place.

    The headers of all files are read and compared first. Then each tensor gets memory of its own and is copied there
    from its file, so the peak is the model, and no parameter keeps a file open.

    Args:
        folder: config.json and model.safetensors (or shards with their index) in fp32, bf16 or fp16. Shards that hold
            nothing but parts that are not built (shards.skipped_parts) need not be there.
    Returns:
        MultimodalLM, frozen, in `dtype` on `device`.
    Raises:
        ValueError: unsupported config; a broken file; or missing, unexpected and misshapen tensors, all in one message.
    """
    folder = Path(folder)
    config = config_of(folder)
    model = build(config)
    ours = {published_name(config.family, name): name for name, _ in model.named_parameters()}
    head, embedding = (published_name(config.family, n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    held, faults = survey(folder, config.family)
    copied_head = held.pop(head, None) if config.tie_word_embeddings else None
    for name, found in held.items():
        if name not in ours:
            faults.setdefault(name, f"unexpected {name}")
            continue
        expected = list(model.get_parameter(ours[name]).shape)
        if found.shape != expected:
            faults[name] = f"{name} has shape {found.shape}, expected {expected}"
        elif found.dtype not in DTYPES:
            faults[name] = f"{name} is {found.dtype}, expected {', '.join(DTYPES)}"
    for name in ours.keys() - held.keys():
        faults.setdefault(name, f"missing {name}")
    if faults:
        listed = "; ".join(sorted(faults.values()))
        raise ValueError(f"{folder}: {len(faults)} tensors do not fit config.json: {listed}")
    for path, names in groupby(sorted(held, key=lambda name: held[name].file), lambda name: held[name].file):
        with open_safetensors(folder / path) as file:
            for name in names:
                module_name, _, leaf = ours[name].rpartition(".")
                tensor = torch.empty(held[name].shape, device=device, dtype=dtype)
                tensor.copy_(file.get_tensor(name))
                setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie()
    if copied_head is not None:
        with open_safetensors(folder / copied_head.file) as file:
            if not torch.equal(file.get_tensor(head).to(device, dtype), model.lm_head.weight):
                raise ValueError(f"{folder}: config.json ties {head} to {embedding}, but the file's two differ")
    return model


def save_model(model, processor_folder, folder, shard_bytes=SHARD_BYTES):
    """Write a model without adapters in the published layout, with the tokenizer and processor files of its source.

    config.json names the dtype written. It is written last, and an older one is removed first: without it nothing loads
    the folder, so a kill leaves no mixture. Of Qwen2.5-Omni the thinker is written, and config.json says so.

    Args:
        processor_folder: where the tokenizer's files are; may be `folder`.
        shard_bytes: above this size in all, the weights are cut into files of at most it.
    Raises:
        ValueError: the model carries an adapter, or `folder` holds one.
    """
    folder, family = Path(folder), model.config.family
    state = {published_name(family, name): p for name, p in model.named_parameters()}
    if any("lora_" in name for name in state):
        raise ValueError("save_model writes plain weights: merge the adapter first (merge_lora)")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: holds an adapter; a whole model needs another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for name in PROCESSOR_FILES:
        source = Path(processor_folder) / name
        if source.is_file() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)
    write_shards(folder, state, shard_bytes)
    raw = _typed(model.config.raw, str(model.lm_head.weight.dtype).removeprefix("torch."))
    if model.config.tie_word_embeddings:  # transformers does not look for it in Omni's text_config
        (raw[family.part] if family.part else raw)["tie_word_embeddings"] = True
    if family.skipped:
        raw["enable_audio_output"] = False  # transformers then builds no talker
        if not (folder / SPEAKERS).exists():
            torch.save({}, folder / SPEAKERS)  # but asks for its voices
    write_json(folder / "config.json", raw)


def _typed(raw, dtype):
    """config.json with `dtype` wherever one is named, and at least at the top."""
    def typed(section):
        return {key: dtype if key in ("dtype", "torch_dtype") else typed(value) if isinstance(value, dict) else value
                for key, value in section.items()}

    return typed(raw if {"dtype", "torch_dtype"} & raw.keys() else {**raw, "torch_dtype": dtype})


def adapted(model):
    """{module name: Linear} of the layers that carry an adapter."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.lora_A is not None}


def save_adapter(model, base, folder):
    """Write the model's adapter in PEFT's format, with transformers 5 module paths (of Omni: the thinker class's).

    Args:
        base: the model it belongs to, recorded for `load` and PEFT: a path, or "owner/name@revision" on the hub.
    """
    layers = adapted(model)
    pairs = {name: {"lora_A": module.lora_A, "lora_B": module.lora_B} for name, module in layers.items()}
    first = next(iter(layers.values()))
    name, revision = (not Path(base).is_dir() and parse_hub_name(base)) or (str(base), None)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name, "revision": revision,
        "r": first.lora_A.shape[0], "lora_alpha": first.scale * first.lora_A.shape[0], "lora_dropout": 0.0,
        "bias": "none", "inference_mode": True, "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True,
    }  # fmt: skip
    write_adapter(folder, config, pairs, model.config.family.modules)


def write_adapter(folder, config, pairs, paths):
    """Write an adapter as PEFT does.

    Args:
        config: adapter_config.json, but for target_modules.
        pairs: {our module name: {"lora_A": (R, in), "lora_B": (out, R)}}.
        paths: our attribute prefix -> module path in the program that is to read it (family.modules or .published).
    """
    tensors, targets = {}, []
    for name, pair in sorted(pairs.items()):
        ours = next(prefix for prefix in paths if name.startswith(prefix))
        targets.append(paths[ours] + name[len(ours):])
        tensors.update({f"base_model.model.{targets[-1]}.{half}.weight": tensor for half, tensor in pair.items()})
    write_safetensors(Path(folder) / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {**config, "target_modules": "|".join(re.escape(path) for path in targets)}
    write_json(Path(folder) / "adapter_config.json", config)


def read_adapter(model, folder):
    """A PEFT folder's adapter, matched to the layers of a model (which may be on `meta`).

    Returns:
        (adapter_config.json, pairs as write_adapter takes them, fp32 on the CPU)
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
    back = _our_prefixes(model.config.family)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    pairs, faults = {}, []
    with open_safetensors(folder / "adapter_model.safetensors") as file:
        for key in file.keys():
            path, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            prefix = max((p for p in back if path.startswith(p)), key=len, default=None)
            name = path if prefix is None else back[prefix] + path[len(prefix):]
            if half not in ("lora_A", "lora_B") or name not in layers:
                faults.append(f"{key} fits no linear layer")
                continue
            pairs.setdefault(name, {})[half] = file.get_tensor(key).to(torch.float32, copy=True)
    if pairs:
        faults += [f"missing {name}" for name in layers if name not in pairs and _targeted(config, name, back)]
    rank = config["r"]
    for name, pair in pairs.items():
        F, D = layers[name].weight.shape
        found = {half: tuple(t.shape) for half, t in pair.items()}
        if found != {"lora_A": (rank, D), "lora_B": (F, rank)}:
            faults.append(f"{name}: expected lora_A {(rank, D)} and lora_B {(F, rank)}, got {found}")
    if faults or not pairs:
        raise ValueError(f"{folder}: adapter does not fit the model: " + "; ".join(faults or ["it holds no tensor"]))
    return config, pairs


def _targeted(config, name, back):
    """Does the adapter's own config say that it has a pair for this layer? Paths may be those of any program."""
    targets = config.get("target_modules")
    if targets == "all-linear" or config.get("exclude_modules") or config.get("layers_to_transform"):
        return False  # what these leave out is PEFT's to say
    paths = [theirs + name[len(ours):] for theirs, ours in back.items() if name.startswith(ours)]
    if isinstance(targets, str):
        return any(re.fullmatch(targets, path) for path in paths)
    return any(f".{path}".endswith(f".{target}") for path in paths for target in targets or ())


def _our_prefixes(family):
    """Module path prefix in another program -> ours: transformers 5's, and the published file's, which older adapters
    have; of a family with several models also transformers 5's in the whole."""
    back = {theirs: ours for paths in (family.published, family.modules) for ours, theirs in paths.items()}
    if family.part:
        whole = family.part.removesuffix("config").replace("_", ".")
        back.update({whole + theirs: ours for ours, theirs in family.modules.items()})
    return back


def load_adapter(model, folder):
    """Attach the adapter of a PEFT folder to a loaded model; ValueError, as read_adapter's, if it does not fit."""
    config, pairs = read_adapter(model, folder)
    for name, pair in pairs.items():
        layer = model.get_submodule(name)
        layer.lora_A, layer.lora_B = (
            nn.Parameter(pair[half].to(layer.weight.device), requires_grad=False) for half in ("lora_A", "lora_B"))
        layer.scale = config["lora_alpha"] / config["r"]
