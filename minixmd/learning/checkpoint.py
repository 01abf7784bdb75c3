"""What training writes: the state a stopped run resumes from, the best weights so far, and the finished model."""
import torch
from safetensors.torch import load_file

from minixmd.learning.optim import optimizer_tensors, restore_optimizer
from minixmd.models.hub import pinned
from minixmd.models.lora import adapted
from minixmd.models.weights import save_adapter, save_model
from minixmd.runs.files import write_safetensors
from minixmd.runs.training_state import load_state, rewind_logs, save_state

BEST = "best.safetensors"  # the parameters that train, at their best validation


def save(folder, parameters, optimizer, progress):
    """Replaces the resumable state. progress: {"step", …}, JSON-able."""
    tensors = optimizer_tensors(optimizer, parameters)
    for name, p in parameters.items():
        tensors[f"{name}.weight"] = p
    save_state(folder, tensors, progress)


def restore(folder, parameters, optimizer):
    """Puts back the last saved state, and drops the log lines of steps that will be redone. Returns (progress as saved,
    or None before the first save; the lines of log.jsonl that stay)."""
    state = load_state(folder)
    if state is None:
        return None, rewind_logs(folder, 0)
    tensors, progress = state
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"{name}.weight"])
    restore_optimizer(optimizer, parameters, tensors)
    return progress, rewind_logs(folder, progress["step"])


def save_best(folder, parameters):
    write_safetensors(folder / BEST, parameters)


def publish(folder, model, processor, parameters, base):
    """Writes best/, an adapter or a whole model: the best weights in validation, or the last ones without it. base: the
    model that training started from, which an adapter names."""
    if (folder / BEST).exists():
        with torch.no_grad():
            for name, tensor in load_file(folder / BEST).items():
                parameters[name].copy_(tensor)
    if adapted(model):
        save_adapter(model, pinned(base), folder / "best")
    else:
        save_model(model, processor.folder, folder / "best")
