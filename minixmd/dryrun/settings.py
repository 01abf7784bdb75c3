"""Which settings make a phase of a stage take less memory, by --dry-run and where a card ran out of it."""

FIELDS = {  # by phase
    "forward": "batch_tokens",
    "generate": "decode_slots batch_tokens",
    "rollout": "decode_slots moments reference",
    "scoring": "micro_batch_tokens moments reference",
    "update": "micro_batch_tokens checkpointing moments reference",
    "optimizer": "moments reference",
    "validation": "moments reference",
    "training": "batch_size",
}
SAVED = {"moments": {"optimizer": 2 / 3}, "reference": {"reference": 1}}  # the most, as shares of what a phase holds
SAVED_BY_OTHERS = {"KV cache": 1, "logits": 1, "activations": 1}


def settings_to_lower(stage, phase_name, longest=1):
    """{field: its smallest value} of the stage's fields that can be lowered so that the phase of this name
    (meta_tracer.Phase) takes less; empty if there is none. longest: tokens of a clip, which a pass must take."""
    smallest = {"checkpointing": "on", "moments": "8bit", "reference": "host", "batch_size": 2,
                "batch_tokens": longest, "micro_batch_tokens": longest,
                "decode_slots": getattr(stage, "group_size", None) or getattr(stage, "num_samples", 1)}
    needless = set()
    if getattr(stage, "trainable", None) == "lora":
        needless = {"moments", "reference"}  # an adapter's own are small
    if not getattr(stage, "beta", 0):
        needless.add("reference")  # there is none
    found = {}
    for name in FIELDS[phase_name].split():
        least = smallest[name]
        value = getattr(stage, name, least)
        if value == "auto" and getattr(stage, "device", "auto") != "cpu":
            value = "on"  # of checkpointing
        can_fall = value > least if isinstance(value, int) else value != least
        if can_fall and name not in needless:
            found[name] = least
    return found
