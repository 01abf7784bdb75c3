"""The Linear that every model here is made of, with room for a low-rank adapter, and what makes and merges adapters."""
import re

import torch
from torch import nn

from minixmd.kernels.lora import lora_linear, lora_linears
from minixmd.runs.seeds import hash_seed


class Linear(nn.Linear):
    """y = x Wᵀ + bias + scale (x Aᵀ) Bᵀ; without an adapter (lora_A is None) the last term is absent."""

    def __init__(self, n_in, n_out, bias=True):
        super().__init__(n_in, n_out, bias)
        self.register_parameter("lora_A", None)  # (R, in) fp32
        self.register_parameter("lora_B", None)  # (out, R) fp32
        self.scale = 0.0
        self.backend = "torch"  # of the adapter's product: set_backend

    def forward(self, x_ND):
        if self.lora_A is None:
            return nn.functional.linear(x_ND, self.weight, self.bias)
        return lora_linear(x_ND, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, self.backend)


def linears(x_ND, *layers):
    """What several Linears make of the same x; adapters of two or more of them share its reads."""
    adapted = [layer for layer in layers if layer.lora_A is not None]
    if len(adapted) < 2:
        return [layer(x_ND) for layer in layers]
    outputs = iter(lora_linears(x_ND, [(layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scale)
                                       for layer in adapted], adapted[0].backend))
    return [layer(x_ND) if layer.lora_A is None else next(outputs) for layer in layers]


def set_backend(model, backend):
    """Chooses the kernels of a model, "triton" or "torch": of its adapters, its head and its rollouts.

    New models use "torch".
    """
    model.backend = backend
    for module in model.modules():
        if isinstance(module, Linear):
            module.backend = backend


def add_lora(model, *, rank, alpha, targets, seed):
    """Freeze the model and give every Linear whose name fully matches `targets` an fp32 adapter (A uniform, B zero).

    Args:
        model: MultimodalLM. rank, alpha: as in the LoRA paper; the product is scaled by alpha / rank.
        targets: regular expression over module names. seed: of A; each module's draw depends on its name only.
    Returns:
        The list of adapted module names.
    Raises:
        ValueError: the pattern matches no Linear.
    """
    model.requires_grad_(False)
    linears = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    names = [name for name in linears if re.fullmatch(targets, name)]
    if not names:
        raise ValueError(f"lora_targets {targets!r} matches no linear layer of this model")
    for name in names:
        module = model.get_submodule(name)
        out_features, in_features = module.weight.shape
        generator = torch.Generator().manual_seed(hash_seed(seed, name))
        bound = in_features ** -0.5  # kaiming_uniform with a = sqrt(5), the field's convention
        a_RD = (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
        device = module.weight.device
        module.lora_A = nn.Parameter(a_RD.to(device))
        module.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        module.scale = alpha / rank
    return names


def merge_lora(model):
    """Fold every adapter into its weight (in fp32, then rounded to the storage dtype) and drop it."""
    for module in model.modules():
        if isinstance(module, Linear) and module.lora_A is not None:
            with torch.no_grad():
                delta = module.scale * (module.lora_B @ module.lora_A)
                module.weight.copy_((module.weight.float() + delta).to(module.weight.dtype))
            module.lora_A = module.lora_B = None
            module.scale = 0.0
