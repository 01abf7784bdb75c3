"""Positions in time, height and width: by hand, and against transformers for every family and for sounded video."""
from types import SimpleNamespace

import pytest
import torch
from tiny import (
    AUDIO_ID,
    VIDEO_ID,
    audio_media,
    positions,
    reference_omni,
    reference_vision,
    reference_windowed,
    video_media,
)

from minixmd.inputs.positions import grid_offsets, interleave, positions_of


def test_positions_by_hand():
    videos = [video_media((2, 4, 4), 2, 0), video_media((3, 2, 2), 11, 0)]  # 8 tokens at row 2, 3 tokens at row 11
    assert positions(16, videos).tolist() == [
        [0, 1] + [2, 2, 2, 2, 3, 3, 3, 3] + [4] + [5, 6, 7] + [8, 9],
        [0, 1] + [2, 2, 3, 3, 2, 2, 3, 3] + [4] + [5, 5, 5] + [8, 9],
        [0, 1] + [2, 3, 2, 3, 2, 3, 2, 3] + [4] + [5, 5, 5] + [8, 9],
    ]
    assert positions(10, [audio_media(15, 3, 0)[0]]).tolist() == [list(range(10))] * 3


@pytest.mark.parametrize("grid, last, text_at", [
    ((5, 20, 28), (8, 13, 17), 18),  # 10 s at 1 fps of 320 x 240: width ends last
    ((30, 36, 36), (33, 21, 21), 34),  # a minute: time ends last; resuming at max(h, w) / 2 would repeat 22 to 33
    ((1, 40, 2), (4, 23, 4), 24),
])  # fmt: skip
def test_text_after_a_video_resumes_at_the_largest_position_plus_one(grid, last, text_at):
    video = video_media(grid, 4, 0)
    positions_3N = positions(4 + len(video.rows_P) + 2, [video])
    assert positions_3N[:, :5].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert tuple(positions_3N[:, 3 + len(video.rows_P)].tolist()) == last
    assert positions_3N[:, -2:].tolist() == [[text_at, text_at + 1]] * 3


def test_ids_count_time_and_not_frames_where_the_family_says_so():
    at = [offset[0].unique().tolist() for offset in (
        grid_offsets((4, 2, 2)),
        grid_offsets((4, 2, 2), ids_per_s=2, fps=1.0),  # Qwen2.5-VL: 2 s a frame pair
        grid_offsets((4, 2, 2), ids_per_s=2, fps=0.8),  # 8 frames of 9.98 s
        grid_offsets((4, 2, 2), ids_per_s=25, fps=2.0),  # Omni
        grid_offsets((4, 2, 2), ids_per_s=2, fps=3.0),  # 4/3 ids a pair, rounded down
    )]  # fmt: skip
    assert at == [[0, 1, 2, 3], [0, 4, 8, 12], [0, 5, 10, 15], [0, 25, 50, 75], [0, 1, 2, 4]]
    text_at = positions_of(4 + 700 + 1, [(4, grid_offsets((5, 20, 28), ids_per_s=2, fps=1.0))])[:, -1]
    assert text_at.tolist() == [21, 21, 21]  # the last pair stands at 4 + 16; width ends at 17


@pytest.mark.parametrize("fps", [None, 2.0, 1.0, 0.8])
def test_equal_to_transformers_where_no_video_is_longer_in_time_than_in_height_or_width(fps):
    """Beyond that transformers 5.23 lets the text overlap the video, unlike the models' training."""
    pytest.importorskip("transformers")
    videos = [video_media((4, 20, 32), 4, 0), video_media((2, 8, 12), 4 + 640 + 3, 0)]
    kinds_N = torch.zeros(4 + 640 + 3 + 48 + 6, dtype=torch.long)
    for video in videos:
        kinds_N[video.rows_P] = 2
    grids = torch.tensor([video.grid_thw for video in videos])
    model = reference_vision() if fps is None else reference_windowed()
    times = {} if fps is None else {"second_per_grid_ts": torch.tensor([2 / fps] * 2)}
    theirs_3N = model.model.get_rope_index(kinds_N[None], kinds_N[None], video_grid_thw=grids, **times)[0][:, 0]
    options = {} if fps is None else {"ids_per_s": 2, "fps": fps}
    ours_3N = positions_of(len(kinds_N), [(int(v.rows_P[0]), grid_offsets(v.grid_thw, **options)) for v in videos])
    assert torch.equal(ours_3N, theirs_3N)


SOUNDED = [(2.0, (10, 4, 6), 250), (1.0, (5, 20, 28), 250), (1.0, (5, 4, 6), 180), (2.0, (5, 4, 4), 250),
           (2.0, (3, 2, 2), 9), (0.5, (4, 4, 6), 250), (0.7, (4, 4, 6), 333)]  # fmt: skip


@pytest.fixture(scope="module")
def omni():
    pytest.importorskip("transformers")
    return reference_omni()


@pytest.mark.parametrize("fps, grid, audio_tokens", SOUNDED)
def test_a_sounded_video_has_the_order_and_the_positions_of_the_published_omni_processor(omni, fps, grid, audio_tokens):
    from transformers import Qwen2_5OmniProcessor as Theirs

    video_3P = grid_offsets(grid, ids_per_s=25, fps=fps)
    is_video_P, offsets_3P = interleave(video_3P, audio_tokens, 50)
    stub = SimpleNamespace(
        video_token="V", audio_token="A", vision_bos_token="", vision_eos_token="", audio_bos_token="",
        audio_eos_token="", video_processor=SimpleNamespace(merge_size=2),
        get_chunked_index=lambda ids, size: Theirs.get_chunked_index(None, ids, size),
    )  # fmt: skip
    string = Theirs.replace_video_with_audio_token(
        stub, {"video_grid_thw": [grid], "video_second_per_grid": [2 / fps]}, 0,
        {"num_audio_tokens": [audio_tokens]}, 0, position_id_per_seconds=25, seconds_per_chunk=2)  # fmt: skip
    assert "".join("V" if is_video else "A" for is_video in is_video_P) == string

    ids = [1, 2, 95, 93, *torch.where(is_video_P, VIDEO_ID, AUDIO_ID).tolist(), 94, 96, 5, 6]
    theirs_3N = omni.get_rope_index(torch.tensor([ids]), None, torch.tensor([grid]), None, True,
                                    torch.tensor([4 * audio_tokens]), torch.tensor([2 / fps]))[0][:, 0]
    offsets_3P = torch.cat([torch.zeros(3, 2, dtype=torch.int64), offsets_3P + 1], dim=1)
    offsets_3P = torch.cat([offsets_3P, (offsets_3P.max() + 1).expand(3, 2)], dim=1)
    assert torch.equal(positions_of(len(ids), [(2, offsets_3P)]), theirs_3N)


def test_text_after_a_sounded_video_does_not_repeat_positions_of_a_picture_that_outlasts_the_sound(omni):
    """transformers resumes after the last stretch: here the sound, which ends before the picture of the same chunk."""
    is_video_P, offsets_3P = interleave(grid_offsets((8, 2, 2), ids_per_s=25, fps=2.0), 160, 50)
    assert offsets_3P[0, -1] == 159 and offsets_3P.max() == 175 and not is_video_P[-1]
    after_3N = positions_of(8 + 160 + 1, [(0, offsets_3P)])[:, -1]
    assert after_3N.tolist() == [176] * 3


def test_separate_sound_and_picture_equal_transformers(omni):
    grid, tokens = (4, 4, 6), 37
    ids = [1, 2, 93, *[AUDIO_ID] * tokens, 94, 5, 95, *[VIDEO_ID] * 24, 96, 7, 8]
    theirs_3N = omni.get_rope_index(torch.tensor([ids]), None, torch.tensor([grid]), None, False,
                                    torch.tensor([4 * tokens]), torch.tensor([1.0]))[0][:, 0]
    block = (ids.index(VIDEO_ID), grid_offsets(grid, ids_per_s=25, fps=2.0))
    assert torch.equal(positions_of(len(ids), [block]), theirs_3N)
