"""An optimizer step's clips, packed into micro-batches of a budget of tokens."""
from dataclasses import dataclass

from minixmd.inputs.batch import Batch, pack
from minixmd.inputs.media import MediaError
from minixmd.inputs.prompts import cut_by_tokens
from minixmd.learning.targets import Item


@dataclass(frozen=True)
class BadClip:
    """Stands where a sample would."""

    error: MediaError


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass learns from."""

    items: list[Item]
    batch: Batch  # of their Prompts, in this order, on the CPU; in pinned memory if a GPU learns


def check_length(prompt, example, max_new_tokens, most):
    """Raises MediaError where a prompt and what is written after it cannot share a pass of `most` tokens."""
    if len(prompt) + max_new_tokens > most:
        written = f" and max_new_tokens is {max_new_tokens}" if max_new_tokens else ""
        detail = f"the prompt has {len(prompt)} tokens{written}, over micro_batch_tokens {most}"
        raise MediaError(example.id, "too long", detail)


def make_micro_batches(samples, most, device):
    """[(Prompt, Item)] as MicroBatches of at most `most` tokens, for a model on `device`."""
    made = []
    for cut in cut_by_tokens([len(prompt) for prompt, _ in samples], most):
        batch = pack([samples[i][0] for i in cut])
        items = [samples[i][1] for i in cut]
        made.append(MicroBatch(items, batch.pinned() if device.type == "cuda" else batch))
    return made


def count_tokens(micro_batches):
    return sum(len(micro_batch.batch.ids_N) for micro_batch in micro_batches)


def count_targets(micro_batches):
    return sum(len(micro_batch.batch.target_id_T) for micro_batch in micro_batches)
