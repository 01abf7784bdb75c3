"""Which settings make a phase of a stage take less memory, by --dry-run and where a card ran out of it."""

FIELDS = {  # by phase
    "forward": "batch_tokens",
    "generate": "decode_slots batch_tokens",
    "rollout": "decode_slots moments reference",
    "scoring": "micro_batch_tokens micro_batch_size moments reference",
    "update": "micro_batch_tokens micro_batch_size checkpointing moments reference",
    "optimizer": "moments reference",
    "validation": "moments reference",
    "training": "batch_size",
}
SAVED = {"moments": {"optimizer": 2 / 3}, "reference": {"reference": 1}}  # the most, as shares of what a phase holds
SAVED_BY_OTHERS = {"KV cache": 1, "logits": 1, "activations": 1}


def settings_to_lower(stage, phase_name):
    """{field: its smallest value} of the stage's fields that can be lowered so that the phase of this name
    (meta_tracer.Phase) takes less; empty if there is none."""
    smallest = {"checkpointing": "on", "moments": "8bit", "reference": "host", "batch_size": 2,
                "decode_slots": getattr(stage, "group_size", None) or getattr(stage, "num_samples", 1)}
    needless = set()
    if getattr(stage, "trainable", None) == "lora":
        needless = {"moments", "reference"}  # an adapter's own are small
    if not getattr(stage, "beta", 0):
        needless.add("reference")  # there is none
    found = {}
    for name in FIELDS[phase_name].split():
        least = smallest.get(name, 1)
        if getattr(stage, name, least) not in (least, 1) and name not in needless:
            found[name] = least
    return found
