"""Rotary positions in three rows (time, height, width): a pure function of where the media stand and of their grids.

Text and audio advance all three rows by one a token. A block (a video, or a video with its sound) has positions of its
own, counted from the position reached; what follows resumes at the largest one used + 1, the rule under which the
published checkpoints were trained.
"""
import torch


def positions_of(length, blocks):
    """Positions (3, length) of a sequence.

    Args:
        blocks: (first row, offsets_3P) of every stretch of rows that is not one step a row, in any order.
    """
    positions_3N = torch.empty(3, length, dtype=torch.int64)
    row, at = 0, 0
    for start, offsets_3P in sorted(blocks, key=lambda block: block[0]):
        positions_3N[:, row:start] = torch.arange(at, at + start - row)
        at += start - row
        row = start + offsets_3P.shape[1]
        positions_3N[:, start:row] = at + offsets_3P
        at += int(offsets_3P.max()) + 1
    positions_3N[:, row:] = torch.arange(at, at + length - row)
    return positions_3N


def grid_offsets(grid_thw, *, ids_per_s=None, fps=None):
    """Offsets (3, t h w / 4) of a video's merged tokens.

    Args:
        grid_thw: patch grid before the 2x2 merge; t counts frame pairs.
        ids_per_s: ids that a second takes (Qwen2.5-VL, Omni), rounded down; None = one id a frame pair (Qwen2-VL).
        fps: frames sampled per second; needed with ids_per_s.
    """
    t, h, w = grid_thw[0], grid_thw[1] // 2, grid_thw[2] // 2
    time_t = torch.arange(t)
    if ids_per_s is not None:
        time_t = (time_t * torch.tensor(2 / fps) * ids_per_s).long()  # in fp32, as the reference
    grid = torch.meshgrid(time_t, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(grid).reshape(3, -1)


def interleave(video_3P, audio_tokens, chunk):
    """A sounded video's order: in every `chunk` of ids first the picture's tokens, then the sound's, one id each.

    As in the reference a token opens one chunk at most, so frame pairs further apart than a chunk are split over two.

    Returns:
        (is_video_P, offsets_3P) over the P video and audio tokens in their new order.
    """
    audio_3A = torch.arange(audio_tokens).expand(3, -1)
    offsets_3P = torch.cat([video_3P, audio_3A], dim=1)
    is_audio_P = torch.arange(offsets_3P.shape[1]) >= video_3P.shape[1]
    chunk_P = torch.tensor([*_chunks(video_3P[0].tolist(), chunk), *_chunks(range(audio_tokens), chunk)])
    order_P = (2 * chunk_P + is_audio_P).argsort(stable=True)
    return ~is_audio_P[order_P], offsets_3P[:, order_P]


def _chunks(ids, size):
    number = 0
    for i in ids:
        number += i >= (number + 1) * size
        yield number
