"""XMD's gate: whose answer a training clip learns, the teacher's or the student's own earlier one."""
from minixmd.runs.records import read_decisions

FIELD = {"learned": "p_teacher", "oracle": "oracle"}  # gate -> what it reads of a clip in switch.jsonl


def follows_teacher(gate, examples, switch, manifest):
    """{example id: whether the gate sends the clip to the teacher}. "learned" and "oracle" do where the switch's
    p_teacher, or the true class's, is at least 0.5; "always" and "never" need no switch.

    switch: switch.jsonl, or None. manifest: of the examples, for messages. Raises ValueError for a file that has no
    decision that this gate reads, or none on an example.
    """
    if gate not in FIELD:
        return {example.id: gate == "always" for example in examples}
    field, decisions = FIELD[gate], read_decisions(switch)
    if not any(field in record for record in decisions.values()):
        raise ValueError(f"{switch}: no clip has the {field!r} that gate {gate!r} goes by")
    follows = {}
    for example in examples:
        if example.id not in decisions:
            raise ValueError(f"{switch}: no decision on example {example.id!r} of {manifest}")
        follows[example.id] = decisions[example.id].get(field, 0.0) >= 0.5
    return follows
