"""Rotary positions in three rows: time, height, width.

Text and audio advance all three rows by one a token. A block (a video, or a video with its sound) has positions of its
own, counted from the position reached; what follows resumes at the largest one used + 1, as in the models' training."""
import torch


def positions_of(length, blocks):
    """Positions (3, length) of a sequence. blocks: (first row, offsets_3P) of stretches that do not advance by one."""
    positions_3N = torch.empty(3, length, dtype=torch.int64)
    row = position = 0  # the next of each
    for start, offsets_3P in sorted(blocks, key=lambda block: block[0]):
        text = start - row
        positions_3N[:, row:start] = torch.arange(position, position + text)
        position += text
        row = start + offsets_3P.shape[1]
        positions_3N[:, start:row] = position + offsets_3P
        position += int(offsets_3P.max()) + 1
    positions_3N[:, row:] = torch.arange(position, position + length - row)
    return positions_3N


def grid_offsets(grid_thw, *, ids_per_s=None, fps=None):
    """Offsets (3, t h w / 4) of a video's merged tokens. grid_thw: patch grid before the 2x2 merge; t frame pairs.
    ids_per_s: ids that a second takes, rounded down; None = one id a frame pair. fps: frames sampled per second."""
    t, h, w = grid_thw[0], grid_thw[1] // 2, grid_thw[2] // 2
    time_t = torch.arange(t)
    if ids_per_s is not None:
        time_t = (time_t * torch.tensor(2 / fps) * ids_per_s).long()  # in fp32, as the reference
    return torch.stack(torch.meshgrid(time_t, torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)


def interleave(video_3P, audio_tokens, chunk):
    """A sounded video's order: in every `chunk` of ids first the picture's tokens, then the sound's, one id each. As in
    the reference a token opens one chunk at most, so frame pairs further apart than a chunk are split over two. Returns
    (is_video_P, offsets_3P) over the P video and audio tokens in their new order."""
    offsets_3P = torch.cat([video_3P, torch.arange(audio_tokens).expand(3, -1)], dim=1)
    is_audio_P = torch.arange(offsets_3P.shape[1]) >= video_3P.shape[1]
    chunk_P = torch.tensor(_chunk_numbers(video_3P[0].tolist(), chunk) + _chunk_numbers(range(audio_tokens), chunk))
    order_P = (2 * chunk_P + is_audio_P).argsort(stable=True)
    return ~is_audio_P[order_P], offsets_3P[:, order_P]


def _chunk_numbers(times, size):
    """The chunk of each token: the next one from the token on whose time is past the current one's end."""
    numbers, number = [], 0
    for time in times:
        if time >= (number + 1) * size:
            number += 1
        numbers.append(number)
    return numbers
