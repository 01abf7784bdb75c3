"""The learning-rate schedule and the optimizer, with its state as named tensors."""
import math

import torch


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to zero.

    Args:
        step: 0-based; the rate of the update that makes step + 1 of `steps`.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def adamw(parameters, stage):
    """AdamW over {name: parameter}; matrices decay, vectors (biases, gains) do not."""
    decay = [p for p in parameters.values() if p.ndim > 1]
    plain = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.lr, betas=stage.betas, eps=stage.eps)


def optimizer_tensors(optimizer, parameters):
    """{"name.exp_avg": tensor, …}: the optimizer's state by parameter name."""
    return {f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}


def restore_optimizer(optimizer, parameters, tensors):
    """Put back what optimizer_tensors gave, on each parameter's device (AdamW's step count stays on the CPU)."""
    for name, p in parameters.items():
        if f"{name}.step" not in tensors:
            continue  # it has had no gradient yet, as a tower that no clip went through
        optimizer.state[p] = {key: tensors[f"{name}.{key}"].to("cpu" if key == "step" else p.device)
                              for key in ("step", "exp_avg", "exp_avg_sq")}
