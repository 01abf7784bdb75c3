"""Video frames to what Qwen2-VL's vision tower takes: which frames, at what size, as which patches.

It follows qwen-vl-utils and the published processor. Letters: T frames, C channels, H and W pixels, P patches. A patch
is 14 x 14 pixels of 2 frames. The tower merges 2 x 2 patches, four rows, into one token: sides are multiples of 28."""
import math

import torch
import torch.nn.functional as F

PATCH, MERGE, TEMPORAL = 14, 2, 2
SIDE = PATCH * MERGE  # pixels of a merged token's side
MIN_FRAMES, MAX_FRAMES = 4, 768
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 262_144  # of one frame; the maximum is the paper's
TOTAL_PIXELS = int(128_000 * 28 * 28 * 0.9)  # of one video: what 90 % of a 128,000-token context can hold
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, per colour


def sample_frames(total, video_fps, *, fps=1.0, nframes=None):
    """Indices of the frames that qwen-vl-utils chooses: evenly from the first to the last, an even number of them.

    The count is total / video_fps * fps, at least 4 and at most 768 or total, floored to an even number; 9.98 s at 1
    fps are 8 frames. A video of one frame, which qwen-vl-utils refuses, gives that frame; `patchify` repeats it.

    total: frames that decode, >= 1. video_fps: their average rate, in 1/s. fps: frames to choose per second; unused
    when nframes is given. nframes: a fixed count, even, >= 2, <= total. ValueError: one but total out of range."""
    if nframes is not None:
        if nframes < TEMPORAL or nframes % TEMPORAL:
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


def smart_resize(height, width, *, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS):
    """The (height, width) that a frame is resized to: multiples of 28, min_pixels to max_pixels in area, of nearly the
    same shape. Halves round to even. A side is never below 28, so a very flat frame may miss the upper limit. Raises
    ValueError: an empty frame, sides in a ratio above 200, or contradicting limits."""
    if min(height, width) < 1:
        raise ValueError(f"frame sides must be at least 1 pixel, got {height} x {width}")
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"frame sides may differ by a factor of 200 at most, got {height} x {width}")
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(f"min_pixels must lie between 1 and max_pixels, got {min_pixels} and {max_pixels}")
    sides = [round(side / SIDE) * SIDE for side in (height, width)]
    area = sides[0] * sides[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = [max(SIDE, math.floor(side / shrink / SIDE) * SIDE) for side in (height, width)]
    elif area < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * stretch / SIDE) * SIDE for side in (height, width)]
    return tuple(sides)


def resize(frames_TCHW, *, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, total=None):
    """Resize (T, 3, H, W) uint8 frames, of a video of `total` (None = T), to `smart_resize`'s size with an antialiased
    bicubic filter, in uint8 as the reference does: in floating point the result differs by a grey level. Beyond about
    690 frames the video's total budget lowers max_pixels, to 1.05 min_pixels at least."""
    height, width = frames_TCHW.shape[-2:]
    budget = TOTAL_PIXELS * TEMPORAL / (total or len(frames_TCHW))  # of one frame
    max_pixels = min(max_pixels, max(budget, int(min_pixels * 1.05)))
    size = smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
    if size == (height, width):
        return frames_TCHW
    return F.interpolate(frames_TCHW, size=size, mode="bicubic", antialias=True, align_corners=False)


def grid_of(frames_TCHW):
    """(frame pairs, H / 14, W / 14) of frames as patchify takes them: P is their product, and they are P / 4 tokens."""
    T, _, H, W = frames_TCHW.shape
    return -(-T // TEMPORAL), H // PATCH, W // PATCH


def patchify(frames_TCHW):
    """Normalise (T, 3, H, W) uint8 frames, H and W multiples of 28, and cut them into the tower's patches; an odd T
    repeats the last frame. Returns patches_PC: (P, 1176) float32. Rows run over frame pairs, then rows and columns of
    2 x 2 patches, then the four patches inside; a row is (colour 3, frame 2, height 14, width 14). Raises ValueError:
    another dtype or shape. Source: transformers 5.23 Qwen2VLVideoProcessor, its fused constants."""
    T, C, H, W = frames_TCHW.shape
    if frames_TCHW.dtype != torch.uint8 or T < 1 or C != 3 or H % SIDE or W % SIDE:
        raise ValueError(f"patchify needs uint8 frames of (T, 3, 28a, 28b), got {frames_TCHW.dtype} "
                         f"{tuple(frames_TCHW.shape)}")
    if T % TEMPORAL:
        frames_TCHW = torch.cat([frames_TCHW, frames_TCHW[-1:]])
    t, h, w = grid_of(frames_TCHW)
    cut = frames_TCHW.reshape(t, TEMPORAL, C, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    values = TEMPORAL * PATCH * PATCH  # of one colour in a patch
    patches_PC = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, C * values).float()
    mean_C, std_C = ((torch.tensor(rgb) * 255.0).repeat_interleave(values).to(cut.device) for rgb in (MEAN, STD))
    return patches_PC.sub_(mean_C).div_(std_C)
