"""What is read of a clip, with and without a cache: the same tensors, kept once, bounded, and safe to lose."""
import shutil
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from media_files import grey_frames, sine, write_mp4, write_wav

from minixmd.inputs import clips
from minixmd.inputs.clips import Cache, load_clip
from minixmd.inputs.media import MediaError
from minixmd.inputs.prompts import prefetch

HEARD = dict(max_s=30)
SEEN = dict(fps=1.0, nframes=None, min_pixels=28 * 28, max_pixels=56 * 56)


@pytest.fixture
def film(tmp_path):
    return str(write_mp4(tmp_path / "a.mp4", grey_frames(30), 3 * sine(440, 3)))


@pytest.fixture
def cache(tmp_path):
    return Cache(str(tmp_path / "cache"), 1.0)


def files(cache):
    return sorted(path for path in clips.Path(cache.folder).rglob("*") if path.is_file())


def test_with_a_cache_or_without_frames_are_the_same_and_sound_is_rounded_to_16_bits(film, cache):
    frames, fps = load_clip(film, "video", SEEN)
    assert frames.shape == (4, 3, 28, 56) and frames.dtype == np.uint8 and fps == pytest.approx(4 / 3)
    for _ in range(2):
        again, again_fps = load_clip(film, "video", SEEN, cache)
        assert np.array_equal(again, frames) and again_fps == fps
    wave_S = clips.read_sound(film, 30)
    found_S = [clips.read_sound(film, 30, cache) for _ in range(2)]
    assert torch.equal(*found_S) and wave_S.abs().max() > 1
    expected_S = (wave_S * 32768).round().clamp(-32768, 32767) / 32768
    assert torch.equal(found_S[0], expected_S)
    assert len(files(cache)) == 2


def test_a_clip_that_is_kept_is_not_decoded_again_under_whatever_name(film, cache, tmp_path, monkeypatch):
    first = [load_clip(film, kind, options, cache) for kind, options in (("audio", HEARD), ("video", SEEN))]
    monkeypatch.setattr(clips, "read_audio", None)
    monkeypatch.setattr(clips, "read_frames", None)
    shutil.move(film, tmp_path / "b.mp4")
    mel, frames = load_clip(str(tmp_path / "b.mp4"), "audio", HEARD, cache)
    assert np.array_equal(mel, first[0][0]) and frames == first[0][1]
    assert np.array_equal(load_clip(str(tmp_path / "b.mp4"), "video", SEEN, cache)[0], first[1][0])
    assert load_clip(str(tmp_path / "b.mp4"), "audio", dict(max_s=2), cache)[1] == 200  # of the same sound
    for kind, options in (("video", {**SEEN, "fps": 2.0}), ("video", {**SEEN, "nframes": 2}),
                          ("video", {**SEEN, "max_pixels": 28 * 56})):
        with pytest.raises(TypeError):  # read otherwise it is another entry
            load_clip(str(tmp_path / "b.mp4"), kind, options, cache)


def test_another_content_under_the_same_name_is_another_clip(tmp_path, cache):
    path = write_wav(tmp_path / "a.wav", sine(440, 1))
    one = clips.read_sound(path, 30, cache)
    two = clips.read_sound(write_wav(tmp_path / "a.wav", sine(880, 1)), 30, cache)
    assert not torch.equal(one, two) and len(files(cache)) == 2


@pytest.mark.parametrize("damage", [b"", b"cut", None])
def test_an_entry_that_is_not_whole_is_made_again(film, cache, damage):
    wave_S, (frames, _) = clips.read_sound(film, 30, cache), load_clip(film, "video", SEEN, cache)
    for path in files(cache):
        path.write_bytes(path.read_bytes()[:100] if damage is None else damage)
    assert torch.equal(clips.read_sound(film, 30, cache), wave_S)
    assert np.array_equal(load_clip(film, "video", SEEN, cache)[0], frames)
    assert all(len(path.read_bytes()) > 1000 for path in files(cache))


def test_a_full_cache_takes_no_more_and_changes_nothing(tmp_path):
    cache = Cache(str(tmp_path / "cache"), 256 * 40_000 / 2**30)  # 40 kB a part
    paths = []
    for i in range(40):
        noise = 0.1 * np.random.default_rng(i).standard_normal(16000).astype(np.float32)
        paths.append(write_wav(tmp_path / f"{i}.wav", noise))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(Cache, "place", lambda self, path, how: clips.Path(self.folder, "00", clips.Path(path).stem))
    for _ in range(2):
        for path in paths:
            assert torch.equal(clips.read_sound(path, 30, cache), torch.from_numpy(soundfile.read(path)[0]).float())
    monkey.undo()
    assert 20_000 < sum(path.stat().st_size for path in files(cache)) <= 40_000


def test_what_cannot_be_read_is_not_kept_and_keeps_its_reason(tmp_path, cache):
    (tmp_path / "a.wav").write_text("nothing")
    for path, reason in (("a.wav", "unreadable"), ("none.wav", "missing")):
        with pytest.raises(MediaError, match=reason):
            load_clip(str(tmp_path / path), "audio", HEARD, cache)
    assert files(cache) == []


def test_a_folder_that_cannot_be_written_stops_the_run(film, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        load_clip(film, "audio", HEARD, Cache(str(tmp_path / "taken"), 1.0))


def test_children_share_a_cache(film, cache):
    load = partial(load_clip, cache=cache)
    found = list(prefetch(lambda item, load: load(film, "video", SEEN), range(12), None, load=load, workers=3))
    assert all(np.array_equal(frames, found[0][0]) for frames, _ in found)
    assert [path.name for path in files(cache)] == [cache.place(film, f"film 1.0 None {(784, 3136)}").name]
