"""The learning-rate schedule and the optimizer, with its state as named tensors."""
import math

import torch

from minixmd.kernels.adamw import BLOCK, adamw_update, state_layout
from minixmd.runs.distributed import rank_and_world_size
from minixmd.runs.training_state import fill, open_tensors


def learning_rate(step, steps, peak, warmup_ratio):
    """Linear warm-up over the first `warmup_ratio` of the steps, then a cosine to zero. step: updates made before."""
    warmup_steps = round(warmup_ratio * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(progress))


class FusedAdamW(torch.optim.AdamW):
    """AdamW of kernels/adamw.py: bf16 parameters are updated as if they were fp32, moments may take 8 bits."""

    def __init__(self, groups, *, moments, backend, **options):
        super().__init__(groups, **options)
        self.moments = moments
        self.backend = backend

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(new_state(p, self.moments))
                state["step"] += 1
                adamw_update(
                    p, p.grad, state, int(state["step"]),
                    lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                    backend=self.backend)


def new_state(p, moments):
    """A parameter's state before its first update, on its device; the step count stays on the CPU. moments: those of
    matrices; of vectors they are few, and in float32 any number of processes can divide them."""
    state = {"step": torch.tensor(0.0, device="cpu")}
    for key, (shape, dtype) in state_layout(p, moments if p.ndim > 1 else "float32").items():
        state[key] = torch.zeros(shape, dtype=dtype, device=p.device)
    return state


def adamw(parameters, *, weight_decay, moments="float32", backend="torch", **options):
    """AdamW over {name: parameter}, each fp32 or bf16; PyTorch's where all of them and their moments are fp32. Only
    matrices decay, not biases or gains. moments: "float32" | "8bit". backend: of the kernel, "triton" | "torch".
    options: lr, betas and eps, as PyTorch's takes them."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if moments == "float32" and all(p.dtype == torch.float32 for p in parameters.values()):
        return torch.optim.AdamW(groups, **options)
    return FusedAdamW(groups, moments=moments, backend=backend, **options)


def optimizer_tensors(optimizer, parameters):
    """{"name.exp_avg": tensor, …}: the optimizer's state by parameter name."""
    tensors = {}
    for name, p in parameters.items():
        for key, value in optimizer.state[p].items():
            tensors[f"{name}.{key}"] = value
    return tensors


def optimizer_rows(rows, parameters, optimizer):
    """{"name.exp_avg": (first row, all rows), …} of the state of sharded parameters, whose own `rows` are given. Left
    out are 8-bit moments of which a process's part is no whole number of blocks: they cannot be sharded anew."""
    found = {}
    for name, p in parameters.items():
        if name not in rows:
            continue
        first, count = rows[name]
        width = p.shape[1:].numel()
        in_blocks = math.ceil(count / rank_and_world_size()[1]) * width % BLOCK == 0  # each process's part
        for key, value in optimizer.state[p].items():
            if value.shape == p.shape:
                found[f"{name}.{key}"] = first, count
            elif value.ndim and in_blocks:
                found[f"{name}.{key}"] = first * width // BLOCK, math.ceil(count * width / BLOCK)
    return found


def restore_optimizer(optimizer, parameters, paths, rows=None):
    """Puts back what optimizer_tensors gave and `paths` hold. rows: as fill's. Raises ValueError where the files do not
    fit the parameters."""
    moments = getattr(optimizer, "moments", "float32")  # PyTorch's AdamW holds the same names
    with open_tensors(paths[0]) as file:
        saved = set(file.keys())
    for name, p in parameters.items():
        if f"{name}.step" in saved:  # else it has had no gradient yet, as an encoder that no clip went through
            optimizer.state[p] = new_state(p, moments)
    fill(optimizer_tensors(optimizer, parameters), paths, rows and rows | optimizer_rows(rows, parameters, optimizer))
