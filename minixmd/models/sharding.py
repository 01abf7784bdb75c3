"""Weights sharded among the processes of a run: torch's FSDP2, block by block.

What trains of a model that trains whole is sharded with its gradients, and gathered for a rollout into a copy that is
then dropped. Of a frozen model that no card holds, the decoder's blocks are sharded."""
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from minixmd.models.multimodal import frozen_copy
from minixmd.runs.distributed import all_reduce


def blocks_of(model):
    """The blocks of its decoder and towers."""
    blocks = []
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            blocks += module.blocks if hasattr(module, "blocks") else module.layers
    return blocks


def shard_trained(model):
    """Divides what trains of a model, in place. Gradients are then sums over the processes, added up in fp32."""
    options = dict(
        mesh=init_device_mesh(model.device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        ignored_params={p for p in model.parameters() if not p.requires_grad},
    )
    for module in (*blocks_of(model), model):
        if any(p.requires_grad for p in module.parameters()):
            fully_shard(module, **options)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def shard_frozen(model, device):
    """Divides the decoder's blocks of a model on `meta`, whose passes are from then on made by all processes at once:
    one that has none left calls finish_passes."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    others = {p for p in model.model.parameters() if not isinstance(p, DTensor)}
    fully_shard(model.model, mesh=mesh, ignored_params=others)
    model.register_forward_pre_hook(lambda *_: all_reduce(torch.ones(1)) and None)


def finish_passes(model):
    """Takes part in the passes of other processes until none is made, if the model is one that shard_frozen sharded.
    The caller's mode, no_grad or inference_mode, is that of all passes: FSDP keeps what it makes in the first."""
    if not isinstance(model.model, FSDPModule):
        return
    x_1D = torch.zeros(1, model.config.text.hidden_size, device=model.device, dtype=model.dtype)
    position_31 = torch.zeros(3, 1, dtype=torch.int64, device=model.device)
    while all_reduce(torch.zeros(1)).item():
        model.model(x_1D, position_31, lambda layer, q_NHK, k_NJK, v_NJK: q_NHK)


def part_of(tensor, p):
    """This process's part of a tensor as a DTensor like the parameter p; the tensor itself if p is whole."""
    if not isinstance(p, DTensor):
        return tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def local_parameters(model):
    """{name: this process's part} of what trains: plain tensors in the model's memory, for the optimizer."""
    parts = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts[name] = nn.Parameter(p.detach().to_local()) if isinstance(p, DTensor) else p
    return parts


def local_rows(model):
    """{name: (first row, rows of the whole)} of what local_parameters holds of sharded parameters."""
    rows = {}
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            chunk = math.ceil(len(p) / p.device_mesh.size())  # as torch.chunk cuts
            first = p.device_mesh.get_local_rank() * chunk
            rows[name] = min(first, len(p)), len(p)
    return rows


def move_gradients(model, parts):
    """Hands the gradients of sharded parameters over to their local_parameters."""
    for name, p in model.named_parameters():
        if isinstance(p, DTensor) and p.grad is not None:
            parts[name].grad = p.grad.to_local()
            p.grad = None


def whole(model, parts=None):
    """A frozen copy with all weights in this process, which all processes make together; it shares what is not sharded.
    parts: {name: tensor} of other values, each this process's part."""
    values = dict(parts or {})
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            part = values.get(name, p.detach().to_local())
            sharded = DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            values[name] = sharded.full_tensor()
    return frozen_copy(model, values)
