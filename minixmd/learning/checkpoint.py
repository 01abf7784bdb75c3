"""What training writes: the state that a stopped run resumes from, and the finished model."""
from minixmd.learning.optim import optimizer_rows, optimizer_tensors, restore_optimizer
from minixmd.models.hub import pinned
from minixmd.models.lora import adapted
from minixmd.models.weights import save_adapter, save_model
from minixmd.runs.distributed import broadcast, rank_and_world_size
from minixmd.runs.training_state import fill, load_state, rewind_logs, save_state, tensor_files


def save(folder, parameters, optimizer, progress, rows=None):
    """Replaces the resumable state. progress: as save_state takes it. rows: {name: (first, all)} of parameters of which
    each process holds so many rows; None = all hold the same, and the first writes."""
    if rows is not None:
        rows = rows | optimizer_rows(rows, parameters, optimizer)
    save_state(folder, parameters, optimizer_tensors(optimizer, parameters), progress, rows)


def restore(folder, parameters, optimizer, rows=None):
    """Puts back the last saved state, of as many processes as there may have been, and drops the log lines of steps
    that will be redone. Returns (progress as saved, None before the first save; the lines of log.jsonl that stay)."""
    state, step = load_state(folder), 0
    if state is not None:
        step = state["step"]
        restore_weights(folder, step, parameters, rows)
        restore_optimizer(optimizer, parameters, tensor_files(folder, "optimizer", step), rows)
    lines = rewind_logs(folder, step) if rank_and_world_size()[0] == 0 else None
    return state, broadcast(lines)


def restore_weights(folder, step, parameters, rows=None):
    """Puts back the weights that were saved after a step."""
    fill(parameters, tensor_files(folder, "weights", step), rows)


def publish(folder, model, processor, base):
    """Writes best/, an adapter or a whole model. base: what training started from, a model or an adapter, which an
    adapter names."""
    if adapted(model):
        save_adapter(model, pinned(base), folder / "best")
    else:
        save_model(model, processor.folder, folder / "best")
