"""What training writes: the state that a stopped run resumes from, and the finished model."""
from minixmd.learning.optim import optimizer_tensors, restore_optimizer
from minixmd.models.hub import pinned
from minixmd.models.lora import adapted
from minixmd.models.weights import save_adapter, save_model
from minixmd.runs.training_state import fill, load_state, rewind_logs, save_state, tensor_file


def save(folder, parameters, optimizer, progress):
    """Replaces the resumable state. progress: as save_state takes it."""
    save_state(folder, parameters, optimizer_tensors(optimizer, parameters), progress)


def restore(folder, parameters, optimizer):
    """Puts back the last saved state, and drops the log lines of steps that will be redone. Returns (progress as saved,
    or None before the first save; the lines of log.jsonl that stay)."""
    state = load_state(folder)
    if state is None:
        return None, rewind_logs(folder, 0)
    fill(parameters, tensor_file(folder, "weights", state["step"]))
    restore_optimizer(optimizer, parameters, tensor_file(folder, "optimizer", state["step"]))
    return state, rewind_logs(folder, state["step"])


def publish(folder, model, processor, parameters, base):
    """Writes best/, an adapter or a whole model: the best weights in validation, or the last ones without it.

    base: what training started from, a model or an adapter, which an adapter names."""
    state = load_state(folder)
    if state is not None and state["best_step"]:
        fill(parameters, tensor_file(folder, "weights", state["best_step"]))
    if adapted(model):
        save_adapter(model, pinned(base), folder / "best")
    else:
        save_model(model, processor.folder, folder / "best")
