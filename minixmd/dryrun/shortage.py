"""The line in which a stage ends when memory runs out: where, what --dry-run expects there, and what to lower."""
import traceback
from dataclasses import replace

import torch

from minixmd.config import GRPO
from minixmd.dryrun import costs
from minixmd.dryrun.memory_estimate import estimate
from minixmd.dryrun.plan import plan_alone

PHASES = {  # functions that memory runs out in, outermost first -> their phase
    "validate": "validation",
    **dict.fromkeys(("policy_gradient", "sft_gradients", "distill_gradients"), "update"),
    **dict.fromkeys(("frozen_model", "reference_logprobs"), "scoring"),
    "encode_media": "generate",
    "train_epochs": "training",
    "decode": "generate",
    "next_token_logits": "forward",
    "update": "optimizer",
}
SIGNS = "out of memory", "defaultcpuallocator", "alloc_failed"  # of CUDA, the CPU and cuBLAS


def is_shortage(error):
    said = str(error).lower()
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(sign in said for sign in SIGNS)


def describe_shortage(error, stage, stages):
    inside = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    phase_name = next((phase for name, phase in PHASES.items() if name in inside), None)
    if phase_name == "generate" and isinstance(stage, GRPO):
        phase_name = "rollout"
    of_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    text = f"{stage.name}: {'this machine' if of_host else 'the GPU'} ran out of memory"
    if phase_name is None:
        return f"{text} while the model was loaded or clips were read: {error}"
    text += f" in phase {phase_name!r}"
    longest = 1
    try:
        plan = plan_alone(stage, stages)
        longest = plan.longest
        phases = {phase.name: phase for phase in estimate(stage, plan.model, plan.prompt)}
        gib = costs.needed_gib(phases[phase_name].total)
        text += f", for which --dry-run expects {gib:.1f} GiB with the driver and what the allocator cannot use"
        if torch.cuda.is_available():
            text += f"; the card has {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}"
    except (ValueError, KeyError, OSError, RuntimeError, MemoryError):  # for which there may be no room either
        text += " (not estimated)"
    if getattr(stage, "writes", False):
        stage = replace(stage, decode_slots=stage.slots)  # what "auto" was here
    lower = []
    for name, least in costs.settings_to_lower(stage, phase_name, longest).items():
        if isinstance(least, int):
            lower.append(f"{name} (now {getattr(stage, name)}, at least {least})")
        else:
            lower.append(f"{name}={least}" + " in a new run" * (name == "moments"))  # what is saved has the others
    return f"{text}; to lower: {', '.join(lower)}" if lower else text
