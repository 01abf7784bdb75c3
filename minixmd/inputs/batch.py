"""Prompt, Batch and pack: padding does not exist; a batch is one row of tokens cut into segments.

A segment sees itself (causally) and all of its parent: a Group's completions are children of its prompt."""
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from minixmd.inputs.image import patchify

INTEGERS = ("ids_N", "positions_3N", "target_row_T", "target_id_T", "target_segment_T")  # tensors of a Batch


@dataclass(frozen=True)
class Media:
    """One clip's features and the rows of the token sequence that they fill."""
    kind: str  # "audio" | "video" | "encoded"
    features: torch.Tensor  # audio: mel_MA with its halo (fp32); video: frames_TCHW (uint8); encoded: rows for rows_P
    rows_P: torch.Tensor  # its placeholders' rows in the token sequence (int64)
    frames: int = 0  # audio: mel frames that hold sound (the halo not counted)
    grid_thw: tuple[int, int, int] | None = None  # video: patch grid, before the 2x2 merge

    def to(self, device):
        """The Media with its features on a device, as an encoder takes it."""
        return replace(self, features=send([self.features], device)[0])

    def patches(self):
        """A video's patches_PC, cut on its frames' device; features that are patches already are taken as they are."""
        return patchify(self.features) if self.features.dtype == torch.uint8 else self.features


@dataclass(frozen=True)
class Prompt:
    """A conversation as numbers: ids with placeholders expanded, its media, positions, and what is to be learnt."""
    ids_N: torch.Tensor  # (N,) int64
    positions_3N: torch.Tensor  # (3, N) int64: time, height, width; equal rows for text and audio
    media: tuple[Media, ...] = ()
    target_N: torch.Tensor | None = None  # (N,) bool: tokens of the last assistant turn and its end; None = nothing

    def __len__(self):
        return len(self.ids_N)


@dataclass(frozen=True)
class Group:
    """A prompt and its continuations (each an int64 vector), which all become targets. Its len is the rows it takes."""
    prompt: Prompt
    completions: tuple[torch.Tensor, ...]

    def __len__(self):
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True)
class Segment:
    """Rows start:start+length, which also see every row of segment number `parent` (-1: none)."""
    start: int
    length: int
    parent: int = -1


class Segments(tuple):
    """Segments in packed order. attention_plan: what models/attention.py made of them, for all layers."""

    attention_plan = None


def consecutive_segments(lengths):
    """Parentless Segments of the given lengths, one after another."""
    ends = accumulate(lengths)
    return Segments(Segment(end - length, length) for length, end in zip(lengths, ends, strict=True))


@dataclass(frozen=True)
class Batch:
    """N packed rows. Targets are parallel vectors: the hidden state of row target_row predicts token target_id."""
    ids_N: torch.Tensor
    positions_3N: torch.Tensor
    segments: Segments = Segments()
    media: tuple[Media, ...] = ()  # `rows_P` are packed rows
    target_row_T: torch.Tensor | None = None
    target_id_T: torch.Tensor | None = None
    target_weight_T: torch.Tensor | None = None  # fp32, 1 until the row loss says otherwise
    target_segment_T: torch.Tensor | None = None
    spans: tuple[tuple[int, int], ...] = ()  # rows [start, end) of item i

    def to(self, device):
        """The Batch on a device. To a GPU all its integers go in one copy, and each kind of media in one."""
        weight_T = self.target_weight_T
        if weight_T is not None:
            weight_T = torch.ones(len(weight_T), device=device)
        return replace(self._moved(lambda tensors: send(tensors, device)), target_weight_T=weight_T)

    def pinned(self):
        """The Batch in pinned memory, ahead of time: as the pieces that `to` copies."""
        return self._moved(join_pinned)

    def _moved(self, move):
        """The Batch with its integers and each kind of media moved. move: function of tensors of one dtype."""
        names = [name for name in INTEGERS if getattr(self, name) is not None]
        integers = move([getattr(self, name) for name in names] + [m.rows_P for m in self.media])
        media = [replace(m, rows_P=rows_P) for m, rows_P in zip(self.media, integers[len(names):], strict=True)]
        for kind in {m.kind for m in media}:
            chosen = [i for i, m in enumerate(media) if m.kind == kind]
            for i, features in zip(chosen, move([media[i].features for i in chosen]), strict=True):
                media[i] = replace(media[i], features=features)
        return replace(self, media=tuple(media), **dict(zip(names, integers, strict=False)))


def _pinned_base(tensors):
    """The tensor in pinned memory of which these are all parts, in order; None if there is none."""
    base, end = tensors[0]._base, 0
    for x in tensors:
        if x._base is not base or x.storage_offset() != end or not x.is_contiguous():
            return None
        end += x.numel()
    return base if base is not None and base.is_pinned() and base.numel() == end else None


def join_pinned(tensors, device="cpu"):
    """Tensors of one dtype; those of the CPU as views of one tensor in pinned memory, or of its copy on a GPU, for
    which nothing waits. What is joined already is copied as it is."""
    here = [x for x in tensors if x.device.type == "cpu"]
    if not here:
        return tensors
    flat = _pinned_base(here)
    if flat is None:
        flat = torch.cat([x.flatten() for x in here]).pin_memory()
    parts = iter(flat.to(device, non_blocking=True).split([x.numel() for x in here]))
    return [next(parts).view(x.shape) if x.device.type == "cpu" else x for x in tensors]


def send(tensors, device):
    """Tensors of one dtype, on a device. To a GPU those of the CPU go in one copy."""
    if torch.device(device).type == "cuda":
        return join_pinned(tensors, device)
    return [x.to(device) for x in tensors]


def pack(items):
    """Concatenate Prompts and Groups into one Batch. Item i's rows are `spans[i]`: its prompt, then its completions.
    Raises ValueError: no items, an empty completion, or a target that nothing precedes."""
    if not items:
        raise ValueError("pack needs at least one Prompt or Group")
    ids, positions, segments, media, spans = [], [], [], [], []
    target_rows, target_ids, target_segments = ([torch.empty(0, dtype=torch.int64)] for _ in range(3))
    end = 0  # rows so far
    for item in items:
        prompt, completions = (item.prompt, item.completions) if isinstance(item, Group) else (item, ())
        first, parent = end, len(segments)
        segments.append(Segment(first, len(prompt)))
        ids.append(prompt.ids_N)
        positions.append(prompt.positions_3N)
        media += [replace(m, rows_P=m.rows_P + first) for m in prompt.media]
        if prompt.target_N is not None and not isinstance(item, Group):
            target_T = prompt.target_N.nonzero().squeeze(1)
            if len(target_T) and target_T[0] == 0:
                raise ValueError("the first token of a Prompt cannot be a target: nothing precedes it")
            target_rows.append(first + target_T - 1)
            target_ids.append(prompt.ids_N[target_T])
            target_segments.append(torch.full_like(target_T, parent))
        end += len(prompt)
        for completion_T in completions:
            count = len(completion_T)
            if count == 0:
                raise ValueError("a Group has an empty completion")
            position = int(prompt.positions_3N[:, -1].max()) + 1
            target_rows.append(torch.tensor([first + len(prompt) - 1, *range(end, end + count - 1)]))
            target_ids.append(completion_T)
            target_segments.append(torch.full_like(completion_T, len(segments)))
            segments.append(Segment(end, count, parent))
            ids.append(completion_T)
            positions.append(torch.arange(position, position + count).expand(3, -1))
            end += count
        spans.append((first, end))
    target_id_T = torch.cat(target_ids)
    return Batch(
        ids_N=torch.cat(ids), positions_3N=torch.cat(positions, dim=1), segments=Segments(segments), media=tuple(media),
        target_row_T=torch.cat(target_rows), target_id_T=target_id_T, target_weight_T=torch.ones(len(target_id_T)),
        target_segment_T=torch.cat(target_segments), spans=tuple(spans),
    )  # fmt: skip
