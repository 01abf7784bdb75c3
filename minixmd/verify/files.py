"""Checks of what the checkpoint's files hold."""
import torch

from minixmd.models.shards import open_safetensors, read_headers, tensor_faults
from minixmd.verify.subject import Outcome


def tensors(subject):
    """Every tensor of the files is accounted for, all numbers are finite, and the first row is the one in memory."""
    folder, config = subject.processor.folder, subject.model.config
    parameters = {}
    for name, p in subject.model.named_parameters():
        if "lora_" not in name:
            parameters[config.family.checkpoint_name(name)] = p
    held = read_headers(folder, config.family)
    if config.tie_word_embeddings:
        held.pop(config.family.checkpoint_name("lm_head.weight"), None)
    faults = list(tensor_faults(held, parameters).values())
    found = sorted(held.keys() & parameters.keys())
    for name in found:
        p = parameters[name]
        with open_safetensors(folder / held[name].file) as file:
            row = file.get_slice(held[name].key)[:1].to(p.device, p.dtype)
        if not p.isfinite().all():
            faults.append(f"{name} is not finite")
        elif not torch.equal(row, p[:1]):
            faults.append(f"{name} differs")
    measured = [f"{len(found)} of {len(parameters)}", *faults[:3]]
    return Outcome("; ".join(measured), "all, none besides", not faults)
