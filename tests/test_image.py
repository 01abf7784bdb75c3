import itertools

import numpy as np
import pytest
import torch

from minixmd.inputs import image
from minixmd.inputs.image import grid_of, patchify, resize, sample_frames, smart_resize

LIMITS = [(100352, 602112), (100352, 262144), (3136, 1003520)]
# height, width: the size under each of LIMITS, from transformers 5.23's smart_resize; None: refused
SIZES = {
    (240, 320): [(280, 392), (280, 392), (252, 308)],
    (360, 480): [(364, 476), (364, 476), (364, 476)],
    (360, 360): [(364, 364), (364, 364), (364, 364)],
    (720, 1280): [(560, 1008), (364, 672), (728, 1288)],
    (144, 256): [(252, 448), (252, 448), (140, 252)],
    (180, 320): [(252, 448), (252, 448), (168, 308)],
    (1080, 1920): [(560, 1008), (364, 672), (728, 1316)],
    (28, 28): [(336, 336), (336, 336), (56, 56)],
    (1, 1): [(336, 336), (336, 336), (56, 56)],
    (2, 3): [(280, 392), (280, 392), (56, 84)],
    (1, 200): [(28, 4480), (28, 4480), (28, 812)],
    (1, 1000): [None, None, None],
    (640, 368): [(644, 364), (644, 364), (644, 364)],
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", range(3))
def test_smart_resize_equals_the_references_table(size, limits):
    min_pixels, max_pixels = LIMITS[limits]
    expected = SIZES[size][limits]
    if expected is None:
        with pytest.raises(ValueError, match="factor of 200"):
            smart_resize(*size, min_pixels=min_pixels, max_pixels=max_pixels)
    else:
        assert smart_resize(*size, min_pixels=min_pixels, max_pixels=max_pixels) == expected


def test_smart_resize_rounds_halves_to_even():
    assert smart_resize(70, 98, min_pixels=1, max_pixels=10**9) == (56, 112)  # 2.5 -> 2, 3.5 -> 4


def test_smart_resize_refuses_contradictions():
    with pytest.raises(ValueError, match="200 and 100"):
        smart_resize(240, 320, min_pixels=200, max_pixels=100)
    with pytest.raises(ValueError, match="0 x 320"):
        smart_resize(0, 320)


@pytest.mark.parametrize("total, video_fps, expected", [  # the first three are real clips under qwen-vl-utils' rule
    (302, 29.97, [0, 33, 67, 100, 134, 167, 201, 234, 268, 301]),
    (236, 23.648, [0, 34, 67, 101, 134, 168, 201, 235]),  # 9.98 s: 9 frames, floored to 8
    (300, 30.0, [0, 33, 66, 100, 133, 166, 199, 233, 266, 299]),
    (30, 10.0, [0, 10, 19, 29]),  # 3 s: the minimum of 4
    (5, 10.0, [0, 1, 3, 4]),
    (3, 10.0, [0, 2]),
    (2, 10.0, [0, 1]),
    (1, 10.0, [0]),
])
def test_sample_frames_follows_qwen_vl_utils(total, video_fps, expected):
    assert sample_frames(total, video_fps, fps=1.0) == expected


def test_sample_frames_counts():
    assert len(sample_frames(30_000, 30.0)) == 768  # 1,000 s: the maximum
    assert len(sample_frames(30_000, 30.0, fps=0.25)) == 250
    assert sample_frames(100, 30.0, nframes=2) == [0, 99]
    for total in range(1, 60):
        picked = sample_frames(total, 1.0, fps=5.0)
        assert len(picked) == max(1, total // 2 * 2) and len(set(picked)) == len(picked) and max(picked) < total


@pytest.mark.parametrize("arguments", [
    dict(total=9, video_fps=0.0), dict(total=9, video_fps=10.0, fps=-1.0),
    dict(total=9, video_fps=10.0, nframes=3), dict(total=9, video_fps=10.0, nframes=10),
])  # fmt: skip
def test_sample_frames_refuses(arguments):
    with pytest.raises(ValueError, match="video_fps|fps|nframes"):
        sample_frames(**arguments)


def pattern(t, h, w):
    """A frame of pseudo-random bytes that needs no generator."""
    i = torch.arange(t * 3 * h * w, dtype=torch.int64)
    return ((i * i * 31 + i * 7) % 251).to(torch.uint8).view(t, 3, h, w)


def test_resize_filters_the_bytes_themselves():
    """Golden bytes of the fixed-point filter, which equals the published processor; filtering in floats differs."""
    out = resize(pattern(1, 40, 50), min_pixels=28 * 28, max_pixels=28 * 28)
    assert out.shape == (1, 3, 28, 28) and out.dtype == torch.uint8
    assert out[0, 0, 0, :12].tolist() == GOLDEN_BYTES
    floats = torch.nn.functional.interpolate(pattern(1, 40, 50).float(), size=(28, 28), mode="bicubic", antialias=True)
    assert not torch.equal(floats.round().clamp(0, 255).to(torch.uint8), out)


GOLDEN_BYTES = [39, 103, 55, 128, 77, 96, 70, 114, 119, 67, 129, 122]


def test_resize_keeps_what_fits_and_grows_what_is_small():
    frames_TCHW = pattern(2, 336, 336)
    assert torch.equal(resize(frames_TCHW), frames_TCHW)
    assert resize(pattern(3, 2, 3)).shape == (3, 3, 280, 392)


def test_a_long_video_shares_a_total_budget(monkeypatch):
    monkeypatch.setattr(image, "TOTAL_PIXELS", 8 * 56 * 56)
    small = dict(min_pixels=28 * 28, max_pixels=112 * 112)
    assert resize(pattern(4, 112, 112), **small).shape[-2:] == (112, 112)  # 2 * 8 / 4 of 56 x 56
    assert resize(pattern(16, 112, 112), **small).shape[-2:] == (56, 56)


def test_patch_order_by_hand():
    """One bright value at a known place must turn up in the row and column that the published order gives it."""
    T, H, W = 4, 56, 84
    for t, c, y, x in itertools.product((0, 1, 2, 3), (0, 1, 2), (0, 13, 14, 27, 28, 55), (0, 13, 14, 28, 42, 83)):
        frames_TCHW = torch.zeros(T, 3, H, W, dtype=torch.uint8)
        frames_TCHW[t, c, y, x] = 255
        patches_PC, grid_thw = patchify(frames_TCHW), grid_of(frames_TCHW)
        assert grid_thw == (2, 4, 6) and patches_PC.shape == (48, 1176)
        block = (t // 2 * 2 + y // 28) * 3 + x // 28  # frame pair, then 28-pixel blocks row by row
        row = block * 4 + y % 28 // 14 * 2 + x % 28 // 14  # then the block's four patches
        column = c * 392 + t % 2 * 196 + y % 14 * 14 + x % 14
        lit = (patches_PC > 1.5).nonzero()  # white is at least 1.9 in every colour, black at most -1.4
        assert lit.tolist() == [[row, column]]


def test_patches_are_normalised_per_colour():
    frames_TCHW = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    frames_TCHW[:, 1], frames_TCHW[:, 2] = 128, 255
    patches_PC = patchify(frames_TCHW)
    expected = [(0 - 0.48145466) / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(patches_PC[0, [0, 392, 784]], torch.tensor(expected), atol=1e-6, rtol=0)


def test_an_odd_number_of_frames_repeats_the_last():
    frames_TCHW = pattern(3, 28, 56)
    patches_PC, grid_thw = patchify(frames_TCHW), grid_of(frames_TCHW)
    assert grid_thw == (2, 2, 4)
    assert torch.equal(patches_PC, patchify(torch.cat([frames_TCHW, frames_TCHW[2:]])))
    one, grid_thw = patchify(frames_TCHW[:1]), grid_of(frames_TCHW[:1])
    assert grid_thw == (1, 2, 4) and torch.equal(one.view(8, 3, 2, 196)[:, :, 0], one.view(8, 3, 2, 196)[:, :, 1])


def test_patchify_refuses_what_was_not_resized():
    for wrong in (torch.zeros(2, 3, 30, 28, dtype=torch.uint8), torch.zeros(2, 3, 28, 28), pattern(0, 28, 28)):
        with pytest.raises(ValueError, match="uint8"):
            patchify(wrong)


def test_patches_of_a_still_equal_transformers_image_processor():
    """Its video processor needs torchvision; its image processor orders a still, doubled, in the same way."""
    pytest.importorskip("PIL")
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    frames_TCHW = pattern(1, 112, 84)
    processor = module.Qwen2VLImageProcessorPil(do_resize=False)
    out = processor(images=[frames_TCHW[0].permute(1, 2, 0).numpy()], return_tensors="np")
    patches_PC, grid_thw = patchify(frames_TCHW), grid_of(frames_TCHW)
    assert tuple(out["image_grid_thw"][0]) == grid_thw
    np.testing.assert_allclose(patches_PC.numpy(), out["pixel_values"], atol=1e-6, rtol=0)
