"""Checks of what the checkpoint's files hold."""
import torch

from minixmd.models.shards import open_safetensors, read_headers, skipped_parts, tensor_faults
from minixmd.verify.subject import Outcome


def tensors(subject):
    """Every tensor of the files is accounted for, and the first row of each is the one in memory."""
    folder, config = subject.processor.folder, subject.model.config
    parameters = {config.family.checkpoint_name(name): p for name, p in subject.base_parameters().items()}
    held = read_headers(folder, config.family)
    if config.tie_word_embeddings:
        held.pop(config.family.checkpoint_name("lm_head.weight"), None)
    faults = list(tensor_faults(held, parameters).values())
    found = sorted(held.keys() & parameters.keys())
    for name in found:
        p = parameters[name]
        with open_safetensors(folder / held[name].file) as file:
            row = file.get_slice(held[name].key)[:1].to(p.device, p.dtype)
        if not torch.equal(row, p[:1]):
            faults.append(f"{name} differs")
    skipped = [f"{part}'s {count} skipped" for part, count in skipped_parts(folder, config.family).items()]
    measured = [f"{len(found)} of {len(parameters)}", *skipped, *faults[:3]]
    return Outcome("; ".join(measured), "all, none besides", not faults)


def dtypes(subject):
    """Every weight is a finite number of the dtype that was asked for."""
    weights = subject.base_parameters()
    names = sorted({str(p.dtype).removeprefix("torch.") for p in weights.values()})
    bad = [name for name, p in weights.items() if not p.isfinite().all()]
    finite = f"not finite: {bad[0]}" if bad else "all finite"
    passed = names == [subject.dtype] and not bad
    return Outcome(f"{', '.join(names)}; {finite}", f"{subject.dtype}, finite", passed)
