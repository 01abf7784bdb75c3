"""Video frames to what Qwen2-VL's vision tower takes: which frames, at what size, as which patches. Follows
qwen-vl-utils and the published processor.

Letters: T frames, C channels, H and W pixels, P patches. A patch is 14 x 14 pixels of 2 frames; the tower merges 2 x
2 patches into one token, so sides are multiples of 28 and the rows of patches_PC come in runs of four that make one
token.
"""

import math

import torch
import torch.nn.functional as F

PATCH, MERGE, TEMPORAL = 14, 2, 2
MIN_FRAMES, MAX_FRAMES = 4, 768
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 262_144  # of one frame; the maximum is the paper's
TOTAL_PIXELS = int(128_000 * 28 * 28 * 0.9)  # of one video: what 90 % of a 128,000-token context can hold
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, per colour


def sample_frames(total: int, video_fps: float, *, fps: float = 1.0, nframes: int | None = None) -> list[int]:
    """Choose frames as qwen-vl-utils does: evenly from the first to the last, both included, an even number of them.

    The count is total / video_fps * fps, at least 4 and at most 768 or total, floored to an even number; 9.98 s at 1
    fps are 8 frames. A video of one frame, which qwen-vl-utils refuses, gives that frame; `patchify` repeats it.

    Args:
        total: frames that decode, >= 1.
        video_fps: their average rate, in 1/s.
        fps: frames to choose per second; unused when nframes is given.
        nframes: a fixed count, even, >= 2, <= total.
    Returns:
        Indices, strictly increasing.
    Raises:
        ValueError: an argument out of range.
    """
    if total < 1:
        raise ValueError(f"total must be at least 1 frame, got {total}")
    if nframes is not None:
        if nframes != int(nframes) or nframes < TEMPORAL or nframes % TEMPORAL:
            raise ValueError(f"nframes must be an even number >= 2, got {nframes}")
        if nframes > total:
            raise ValueError(f"nframes {nframes} is more than the video's {total} frames")
        count = int(nframes)
    else:
        for name, value in (("video_fps", video_fps), ("fps", fps)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        count = min(max(total / video_fps * fps, MIN_FRAMES), MAX_FRAMES, total)
        count = max(1, int(count // TEMPORAL) * TEMPORAL)
    return torch.linspace(0, total - 1, count).round().long().tolist()  # fp32, halves to even: as the reference


def smart_resize(height: int, width: int, *, factor: int = PATCH * MERGE, min_pixels: int = MIN_PIXELS,
                 max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The size that a frame is resized to: sides are multiples of `factor`, the area lies in [min_pixels,
    max_pixels], the shape is nearly kept.

    Rounding is Python's, halves to even. A side is never below `factor`, so a very flat frame may miss the upper
    limit.
    Raises:
        ValueError: an empty frame, sides in a ratio above 200, or contradicting limits.
    """
    if min(height, width) < 1:
        raise ValueError(f"frame sides must be at least 1 pixel, got {height} x {width}")
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"frame sides may differ by a factor of 200 at most, got {height} x {width}")
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(f"min_pixels must lie between 1 and max_pixels, got {min_pixels} and {max_pixels}")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def resize(frames_TCHW: torch.Tensor, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Resize (T, 3, H, W) uint8 frames to `smart_resize`'s size with an antialiased bicubic filter; returns uint8.

    The filter runs on the uint8 tensor itself, as the reference's does: in floating point the result differs by a
    grey level. Beyond about 690 frames the video's total budget lowers max_pixels, though not below 1.05 *
    min_pixels.
    """
    share = TOTAL_PIXELS * TEMPORAL / len(frames_TCHW)
    max_pixels = min(max_pixels, max(share, int(min_pixels * 1.05)))
    size = smart_resize(*frames_TCHW.shape[-2:], min_pixels=min_pixels, max_pixels=max_pixels)
    if size == tuple(frames_TCHW.shape[-2:]):
        return frames_TCHW
    return F.interpolate(frames_TCHW, size=size, mode="bicubic", antialias=True, align_corners=False)


def patchify(frames_TCHW: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Normalise frames and cut them into the tower's patches.

    Args:
        frames_TCHW: (T, 3, H, W) uint8, T >= 1, H and W multiples of 28; an odd T repeats the last frame.
    Returns:
        patches_PC: (P, 1176) float32. Rows run over frame pairs, then rows and columns of 2 x 2 patches, then the
            four patches inside; a row is (colour 3, frame 2, height 14, width 14).
        grid_thw: (frame pairs, H / 14, W / 14); P is their product and the video takes P / 4 tokens.
    Raises:
        ValueError: another dtype or shape.
    Source: transformers 5.23 Qwen2VLVideoProcessor; its fused constants, so equal to rounding. tests/test_image.py
    checks the order by hand.
    """
    T, C, H, W = frames_TCHW.shape
    if frames_TCHW.dtype != torch.uint8 or T < 1 or C != 3 or H % (PATCH * MERGE) or W % (PATCH * MERGE):
        got = f"{frames_TCHW.dtype} {tuple(frames_TCHW.shape)}"
        raise ValueError(f"patchify needs uint8 frames of (T, 3, 28a, 28b), got {got}")
    if T % TEMPORAL:
        frames_TCHW = torch.cat([frames_TCHW, frames_TCHW[-1:]])
    t, h, w = len(frames_TCHW) // TEMPORAL, H // PATCH, W // PATCH
    cut = frames_TCHW.reshape(t, TEMPORAL, C, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    patches_PC = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, C * TEMPORAL * PATCH * PATCH).float()
    mean_C, std_C = ((torch.tensor(v) * 255.0).repeat_interleave(TEMPORAL * PATCH * PATCH) for v in (MEAN, STD))
    return patches_PC.sub_(mean_C).div_(std_C), (t, h, w)
