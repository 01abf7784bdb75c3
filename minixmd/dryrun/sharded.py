"""What a phase holds, and sends, in one of several processes whose model is sharded (models/sharding.py).

All that trains, its gradients, its optimizer state and the reference are held in parts. A rollout, validation and
scoring gather a whole copy. A pass gathers what is in no block, and two blocks at a time. At an update's end the
gradients of what is in no block exist whole, and are added up in float32."""
from collections import Counter

from minixmd.models.sharding import blocks_of


def size_of(parameters):
    return sum(p.nbytes for p in parameters)


def shard_training(phases, model, gpus):
    """Changes Phases of one GPU, of a model that trains whole, into those of one of several."""
    trained = {p for p in model.parameters() if p.requires_grad}
    blocks = [trained.intersection(block.parameters()) for block in blocks_of(model)]
    total = size_of(trained)
    block = max(map(size_of, blocks))
    rest = size_of(trained.difference(*blocks))
    in_float32 = 4 // model.dtype.itemsize  # of gradients while they are added up
    for phase in phases:
        held = phase.bytes
        sent = 0
        held["weights"] -= total - total // gpus
        held["gradients"] //= gpus
        held["optimizer"] //= gpus
        if phase.name == "scoring":
            sent = held["reference"]
        held["reference"] = held["reference"] // gpus + sent
        if phase.name in ("rollout", "validation"):
            held["weights"] += total
            sent = total
        if phase.name == "update":
            held["weights"] += rest
            at_the_end = held + Counter(gradients=rest * (1 + in_float32))
            at_the_end["logits"] = at_the_end["activations"] = 0
            held["weights"] += 2 * block
            phase.bytes = max(held, at_the_end, key=Counter.total)
            sent = (2 + in_float32) * total  # forward, backward, gradients
        phase.sent = sent * (gpus - 1) // gpus


def shard_reading(phases, model, gpus, category="weights"):
    """The same of a frozen model, whose decoder's blocks are sharded. category: of its weights, "teacher" of a stage's
    second model, which works in phase "reading" alone."""
    blocks = [size_of(block.parameters()) for block in model.model.layers]
    total = sum(blocks)
    for phase in phases:
        phase.bytes[category] -= total - total // gpus
        phase.bytes[category] += 2 * max(blocks)
        if category == "weights" or phase.name == "reading":
            phase.sent = total * (gpus - 1) // gpus
