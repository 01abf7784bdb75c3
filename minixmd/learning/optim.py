"""The learning-rate schedule and the optimizer, with its state as named tensors."""
import math

import torch

from minixmd.runs.training_state import fill, open_tensors


def learning_rate(step, steps, peak, warmup_ratio):
    """Linear warm-up over the first `warmup_ratio` of the steps, then a cosine to zero. step: updates made before."""
    warmup_steps = round(warmup_ratio * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(progress))


class MasterAdamW(torch.optim.AdamW):
    """AdamW for bf16 parameters, each with an fp32 master in the optimizer's state. A bf16 number near 1 cannot change
    by less than 0.004: at lr 1e-6 nearly every update would be lost. The master takes them all, in fp32, and the
    parameter is its rounding. A gradient's fp32 copy lives for its parameter's turn."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad.float()
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(grad)
                    state["exp_avg_sq"] = torch.zeros_like(grad)
                    state["master"] = p.float()
                state["step"] += 1
                t = state["step"].item()
                m, v, master = state["exp_avg"], state["exp_avg_sq"], state["master"]
                m.lerp_(grad, 1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                root = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
                master.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, root, value=-lr / (1 - beta1**t))
                p.copy_(master)
                del grad, root  # before the next one's are made


def adamw(parameters, *, lr, betas, eps, weight_decay):
    """AdamW over {name: parameter}, with fp32 masters where they are bf16. Only matrices decay, not biases or gains."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    half = any(p.dtype == torch.bfloat16 for p in parameters.values())
    optimizer = MasterAdamW if half else torch.optim.AdamW
    return optimizer(groups, lr=lr, betas=betas, eps=eps)


def optimizer_tensors(optimizer, parameters):
    """{"name.exp_avg": tensor, …}: the optimizer's state by parameter name."""
    tensors = {}
    for name, p in parameters.items():
        for key, value in optimizer.state[p].items():
            tensors[f"{name}.{key}"] = value
    return tensors


def restore_optimizer(optimizer, parameters, path):
    """Puts back what optimizer_tensors gave and `path` holds, tensor by tensor, on each parameter's device. (AdamW's
    step count stays on the CPU.) Raises ValueError where the file does not fit the parameters."""
    keys = ["exp_avg", "exp_avg_sq"]
    dtype = None  # the parameter's
    if isinstance(optimizer, MasterAdamW):
        keys.append("master")
        dtype = torch.float32
    with open_tensors(path) as file:
        saved = set(file.keys())
    for name, p in parameters.items():
        if f"{name}.step" not in saved:
            continue  # it has had no gradient yet, as an encoder that no clip went through
        state = {"step": torch.tensor(0.0)}
        for key in keys:
            state[key] = torch.empty_like(p, dtype=dtype)
        optimizer.state[p] = state
    fill(optimizer_tensors(optimizer, parameters), path)
