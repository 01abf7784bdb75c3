"""An optimizer step's clips, packed into micro-batches of a budget of tokens."""
from collections import namedtuple
from dataclasses import dataclass

import torch

from minixmd.inputs.batch import Batch, Group, pack
from minixmd.inputs.media import MediaError
from minixmd.inputs.prompts import cut_by_tokens
from minixmd.learning.targets import Item
from minixmd.runs.distributed import gather, rank_and_world_size, total

StepCounts = namedtuple("StepCounts", "tokens targets clips")  # of an optimizer step, over all processes

@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass learns from."""

    items: list[Item]  # none: a filler, a pass for the sake of those that other processes make
    batch: Batch  # of their Prompts, in this order, on the CPU; in pinned memory if a GPU learns


def check_length(prompt, example, max_new_tokens, most, whose="the prompt"):
    """Raises MediaError where a prompt and what is written after it cannot share a pass of `most` tokens."""
    if len(prompt) + max_new_tokens > most:
        written = f" and max_new_tokens is {max_new_tokens}" if max_new_tokens else ""
        detail = f"{whose} has {len(prompt)} tokens{written}, over micro_batch_tokens {most}"
        raise MediaError(example.id, "too long", detail)


def append_trace(prompt, item, common_vocab, suppressed_Z):
    """The Group of a Prompt and an Item's ids. Raises MediaError where the student cannot write one of them."""
    ids_T = torch.tensor(item.ids)
    if (ids_T >= common_vocab).any() or torch.isin(ids_T, suppressed_Z).any():
        raise MediaError(item.example.id, "other ids", "its trace has a token that the student cannot write")
    return Group(prompt, (ids_T,))


def make_micro_batches(samples, most, device, spare=None):
    """[(Prompt, Item)] as MicroBatches of at most `most` tokens, for a model on `device`. spare: a sample of which
    fillers are made, so that all processes have as many; they then call this together."""
    cuts = cut_by_tokens([len(prompt) for prompt, _ in samples], most)
    if spare is not None:
        cuts += [[]] * (max(gather(len(cuts))) - len(cuts))
    made = []
    for cut in cuts:
        chosen = [samples[i] for i in cut]
        batch = pack([prompt for prompt, _ in chosen or [spare]])
        batch = batch.pinned() if device.type == "cuda" else batch
        made.append(MicroBatch([item for _, item in chosen], batch))
    return made


def deal(items, indices):
    """This process's share of a step's Items, given by number: in turn, those with the longest targets first."""
    rank, world_size = rank_and_world_size()
    chosen = [items[i] for i in indices]
    chosen.sort(key=lambda item: -len(item.target) if isinstance(item.target, str) else 0)
    return chosen[rank::world_size]


def count(micro_batches):
    """The StepCounts of a step; all processes call it together."""
    real = [micro_batch for micro_batch in micro_batches if micro_batch.items]
    tokens = sum(len(micro_batch.batch.ids_N) for micro_batch in real)
    targets = sum(len(micro_batch.batch.target_id_T) for micro_batch in real)
    clips = sum(len(micro_batch.items) for micro_batch in real)
    return StepCounts(*total(tokens, targets, clips))
