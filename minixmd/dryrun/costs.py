"""From a stage's Phases: which cards have room for it, what to lower where one has none, its hours, and its disk."""
from math import ceil, floor, inf

from minixmd.config import TRAINING
from minixmd.config.stages import MOST_SLOTS

# GB by name -> GiB that programs find: of an RTX 4090, an L40S or A40, an A100 or H100, an H200
CARDS = {"24": 23.5, "48": 44.4, "80": 79.1, "141": 139.0}
OVERHEAD = 0.05  # share that an allocator cannot use
DRIVER_GIB = 1.0  # the driver and the libraries
TFLOPS, FP32_TFLOPS, TB_PER_S = 316, 27, 2.8  # what an H200 is taken to reach; the first in 16 bits
LINK_TB_PER_S = 0.3  # what each of several sends, by NVLink
# where nothing else is known
SLOT_USE = {True: 0.65, False: 0.85}  # share of the decode slots that write, in training's short rollouts and elsewhere
ANSWER_TOKENS = 200
CLIPS = 10_000  # of a manifest
# by phase the fields that make it take less
LOWERED = {
    "forward": ("batch_tokens",),
    "generate": ("decode_slots", "batch_tokens"),
    "rollout": ("decode_slots", "moments", "reference", "teacher_place"),
    "reading": ("micro_batch_tokens", "moments", "reference"),
    "scoring": ("micro_batch_tokens", "moments", "reference", "teacher_place"),
    "update": ("micro_batch_tokens", "checkpointing", "moments", "reference", "teacher_place"),
    "optimizer": ("moments", "reference", "teacher_place"),
    "validation": ("moments", "reference", "teacher_place"),
    "training": ("batch_size",),
}


def needed_gib(size):
    return size * (1 + OVERHEAD) / 2**30 + DRIVER_GIB


def has_open_slots(stage):
    """Whether a stage writes on this machine and decode_slots "auto" is to be settled."""
    if not getattr(stage, "writes", False):
        return False
    return stage.model is not None and stage.decode_slots == "auto"


def slots_tried(stage):
    """Two decode_slots of which memory is estimated where they are "auto": of whole prompts, and twice as many."""
    samples = getattr(stage, "group_size", None) or getattr(stage, "num_samples", 1)
    few = samples * ceil(16 / samples)
    return few, 2 * few


def slots_that_fit(stage, few, more, gib):
    """decode_slots for which a card of so many GiB has room, 0 for none. few, more: a stage's Phases with each of
    slots_tried."""
    tried, _ = slots_tried(stage)
    most = MOST_SLOTS
    for phase, larger in zip(few, more, strict=True):
        slot = (larger.total - phase.total) / tried
        if slot > 0:
            room = (gib - DRIVER_GIB) * 2**30 / (1 + OVERHEAD) - phase.total
            most = min(most, tried + floor(room / slot))
        elif needed_gib(phase.total) > gib:
            return 0
    return max(most - most % 8 if most > 8 else most, 0)


def settings_to_lower(stage, phase_name, longest=1):
    """{field: smallest value} of the fields by which a phase takes less. longest: tokens that a pass must take."""
    smallest = {"decode_slots": 1, "batch_tokens": longest, "micro_batch_tokens": longest, "checkpointing": "on",
                "batch_size": 2}
    if getattr(stage, "trainable", None) != "lora":  # an adapter's own are small
        smallest["moments"] = "8bit"
        if getattr(stage, "beta", 0):
            smallest["reference"] = "host"
    if getattr(stage, "teacher_weight", 0):
        smallest["teacher_place"] = "host"
    found = {}
    for name, least in smallest.items():
        value = getattr(stage, name, least)
        if value == "auto" and (name == "decode_slots" or stage.device != "cpu"):
            value = least  # it is chosen so, or is "on" on a GPU
        can_fall = value > least if isinstance(value, int) else value != least
        if can_fall and name in LOWERED[phase_name]:
            found[name] = least
    return found


def to_lower(stage, phases, longest=1):
    """Those of settings_to_lower for the phases that some card has no room for."""
    found = {}
    for phase in phases:
        if needed_gib(phase.total) > min(CARDS.values()):
            found |= settings_to_lower(stage, phase.name, longest)
    return found


def count_items(stage, stages, clips):
    """(How many of a manifest's clips a stage reads or, if it reads traces, how many of theirs at most; how many of a
    clip)."""
    maker, traces = stage, 1
    if getattr(stage, "trace_filter", "first") not in ("first", "calibration"):
        while (getattr(maker, "traces", None) or "").startswith("@"):
            name = maker.traces[1:].partition("/")[0]
            [maker] = [earlier for earlier in stages if earlier.name == name]
        traces = getattr(maker, "num_samples", 1)
    items = clips * traces
    return min(items, getattr(stage, "limit", None) or items), traces


def sequences_of(stage, clips, others, gpus=1):
    """{phase: sequences that go through it in a process, of "optimizer" steps}. clips, others: as in plan.StagePlan."""
    if not isinstance(stage, TRAINING):
        decided = others if hasattr(stage, "train_manifest") else clips  # without the two thirds of a backward pass
        trained = getattr(stage, "epochs", 1) * clips + decided / 3 / gpus
        return {"forward": clips / gpus, "generate": clips / gpus, "training": trained}
    steps = min(stage.epochs * clips / stage.batch_size, stage.max_steps or inf)
    read = steps * ceil(stage.batch_size / gpus)
    updates = getattr(stage, "num_iterations", 1)
    validated = min(others, stage.val_limit) * (ceil(steps / stage.eval_every) if stage.eval_every else 1)
    return {
        "rollout": read,
        "reading": read,
        "scoring": read,
        "update": read * updates,
        "optimizer": steps * updates,
        "validation": validated / gpus,
    }


def stage_hours(stage, phases, clips, others, gpus=1):
    """(hours, those of them in which one process works and the others wait). A pass computes, reads or sends, whatever
    takes longest; a step of decoding reads weights and half-filled caches."""
    seconds = alone = 0.0
    sequences = sequences_of(stage, clips, others, gpus)
    bytes_per_s = 1e12 * TB_PER_S
    for phase in phases:
        size = phase.bytes
        in_fp32 = phase.name == "training" or stage.dtype == "float32"
        flops_per_s = 1e12 * (FP32_TFLOPS if in_fp32 else TFLOPS)
        read = size["weights"]
        if phase.name == "optimizer":
            read += size["gradients"] + size["optimizer"]
        passes = sequences[phase.name] / phase.sequences
        spent = passes * max(phase.flops / flops_per_s, read / bytes_per_s, phase.sent / (1e12 * LINK_TB_PER_S))
        if phase.step_flops:
            steps = passes * min(ANSWER_TOKENS, stage.max_new_tokens) / SLOT_USE[phase.name == "rollout"]
            read += size["KV cache"] / 2
            spent += steps * max(phase.step_flops / flops_per_s, read / bytes_per_s)
        seconds += spent
        alone += spent * (phase.name == "training" and gpus > 1)
    return seconds / 3600, alone / 3600


def disk_of(stage, phases):
    """(bytes that stay, bytes to resume from, which go when it is finished; twice those while it saves) of training."""
    size = {phase.name: phase.bytes for phase in phases}
    if "training" in size:
        return 0, size["training"]["weights"] + size["training"]["optimizer"]
    if "update" not in size:
        return 0, 0
    trained = size["optimizer"]["gradients"]  # as many bytes as the weights that train
    best = trained if stage.val_manifest else 0  # of an earlier step
    stays = trained if stage.trainable == "lora" else size["update"]["weights"]
    return stays, trained + size["update"]["optimizer"] + best
