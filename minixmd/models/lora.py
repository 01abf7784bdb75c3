"""The Linear that all models here are made of, with room for a low-rank adapter; adding and merging adapters."""
import re

import torch
from torch import nn

from minixmd.kernels.lora import cast_adapters, lora_linears
from minixmd.runs.seeds import hash_seed


class Linear(nn.Linear):
    """y = x Wᵀ + bias + scale (x Aᵀ) Bᵀ; without an adapter (lora_A is None) the last term is absent."""

    def __init__(self, n_in, n_out, bias=True):
        super().__init__(n_in, n_out, bias)
        self.register_parameter("lora_A", None)  # (R, in) fp32
        self.register_parameter("lora_B", None)  # (out, R) fp32
        self.scale = 0.0
        self.backend = "torch"  # of the adapter's product: set_backend
        self.casts = None  # what cast_adapters made last, and of what: apply_adapted

    def forward(self, x_ND):
        if self.lora_A is None:
            return nn.functional.linear(x_ND, self.weight, self.bias)
        return apply_adapted(x_ND, [self])[0]


def apply_linears(x_ND, *layers):
    """Applies several Linears to one input and returns the list of outputs; their adapters share the reads of x."""
    adapted = [layer for layer in layers if layer.lora_A is not None]
    if len(adapted) < 2:
        return [layer(x_ND) for layer in layers]
    outputs = iter(apply_adapted(x_ND, adapted))
    return [layer(x_ND) if layer.lora_A is None else next(outputs) for layer in layers]


def apply_adapted(x_ND, layers):
    """apply_linears of layers that all carry an adapter, whose cast matrices are kept until an update changes them."""
    tensors = [tensor for layer in layers for tensor in (layer.lora_A, layer.lora_B)]
    first = layers[0]
    made_of = [x_ND.dtype, [(id(tensor), tensor._version) for tensor in tensors]]
    if first.casts is None or first.casts[1] != made_of:  # the tensors are kept: no other may get the id of one
        cast = cast_adapters(tensors[0::2], tensors[1::2], x_ND.dtype)
        first.casts = cast, made_of, tensors
    operands = [(layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scale) for layer in layers]
    return lora_linears(x_ND, operands, first.backend, first.casts[0])


def named_linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def adapted(model):
    """{module name: Linear} of the layers that carry an adapter."""
    return {name: layer for name, layer in named_linears(model).items() if layer.lora_A is not None}


def set_backend(model, backend):
    """Chooses the kernels of a model, of its head and of rollouts: "triton" or "torch", which new models have."""
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend


def add_lora(model, *, rank, alpha, targets, seed):
    """Freeze the model and give every Linear whose name fully matches the regular expression `targets` an fp32 adapter
    (A uniform, drawn from seed and name; B zero). Raises ValueError if it matches no Linear."""
    model.requires_grad_(False)
    layers = {name: layer for name, layer in named_linears(model).items() if re.fullmatch(targets, name)}
    if not layers:
        raise ValueError(f"lora_targets {targets!r} matches no linear layer of this model")
    for name, layer in layers.items():
        device = layer.weight.device
        generator = torch.Generator().manual_seed(hash_seed(seed, name))
        bound = layer.in_features ** -0.5  # kaiming_uniform with a = sqrt(5), the field's convention
        a_RD = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) * bound
        layer.lora_A = nn.Parameter(a_RD.to(device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        layer.scale = alpha / rank


def make_trainable(model, what, **adapter):
    """Chooses what trains: "lora", a new adapter, of add_lora's options; "decoder" | "full", the weights themselves. An
    adapter that the model carries is merged into its weights first; returns whether it carried one."""
    carried = bool(adapted(model))
    merge_lora(model)
    if what == "lora":
        add_lora(model, **adapter)
    else:
        model.set_trainable(what)
    return carried


@torch.no_grad()
def merge_lora(model):
    """Fold every adapter into its weight (in fp32, then rounded to the storage dtype) and drop it."""
    for layer in adapted(model).values():
        layer.weight.copy_(layer.weight.float() + layer.scale * (layer.lora_B @ layer.lora_A))
        layer.lora_A = layer.lora_B = layer.casts = None
        layer.scale = 0.0
