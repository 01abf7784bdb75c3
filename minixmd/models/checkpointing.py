"""Activation checkpointing: of a block only the input is kept, and the backward pass computes the rest again."""
import torch
from torch.utils.checkpoint import checkpoint


def run_block(stack, block, *inputs):
    """block(*inputs), checkpointed if its stack is and there will be a backward pass."""
    if stack.checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # no block draws numbers
    return block(*inputs)


def set_checkpointing(model, on):
    """Chooses it for a model's decoder and towers, of which new ones have it off."""
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = on
