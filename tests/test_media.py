import os
import pickle
import socket
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from media_files import grey_frames, sine, write_mp4, write_wav

from minixmd.inputs import media
from minixmd.inputs.media import MediaError, read_audio, read_frames


def read_video(path, **options):
    """The frames alone."""
    return read_frames(path, **options)[0]


def reason(read, path, **options):
    with pytest.raises(MediaError) as caught:
        read(path, **options)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(path)) and caught.value.path == path
    return caught.value.reason


def picked(frames_TCHW):
    """Which of grey_frames' frames these are."""
    return ((frames_TCHW.float().mean((1, 2, 3)) - 20) / 6).round().int().tolist()


def onset(wave_S):
    return int((wave_S.abs() > 0.1).nonzero()[0])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """3 s: 30 frames at 10 fps and a 440 Hz tone; the index stands in front, as in files made for streaming."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_mp4(path, grey_frames(30), sine(440, 3), options={"movflags": "faststart"})


@pytest.mark.parametrize("suffix, subtype, atol", [
    ("wav", "PCM_16", 2e-4), ("wav", "FLOAT", 0.0), ("flac", "PCM_24", 1e-6), ("ogg", "VORBIS", 0.05),
    ("mp3", None, 0.05),
])  # fmt: skip
def test_sound_formats_keep_length_and_place(tmp_path, suffix, subtype, atol):
    wave = sine(440, 2)
    wave_S = read_audio(write_wav(tmp_path / f"a.{suffix}", wave, subtype=subtype))
    assert wave_S.shape == (32000,) and wave_S.dtype == torch.float32 and wave_S.is_contiguous()
    torch.testing.assert_close(wave_S, torch.from_numpy(wave), atol=atol, rtol=0)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE"])
def test_pyav_scales_every_sample_format_as_libsndfile_does(tmp_path, monkeypatch, subtype):
    wave = np.stack([sine(440, 0.1), 0.5 * sine(3000, 0.1)], 1)  # interleaved stereo
    path = write_wav(tmp_path / "a.wav", wave, subtype=subtype)
    by_sndfile = read_audio(path)
    monkeypatch.setattr(media, "_is_sndfile", lambda head: False)
    torch.testing.assert_close(read_audio(path), by_sndfile, atol=1e-6, rtol=0)
    torch.testing.assert_close(by_sndfile, torch.from_numpy(wave.mean(1)), atol=0.01, rtol=0)


def test_mono_is_the_mean_over_channels(tmp_path):
    a, b = sine(440, 0.5), sine(1000, 0.5)
    antiphase = read_audio(write_wav(tmp_path / "anti.wav", np.stack([a, -a], 1), subtype="FLOAT"))
    assert antiphase.abs().max() == 0
    six = read_audio(write_wav(tmp_path / "six.wav", np.stack([a, b, 0 * a, a, b, a], 1), subtype="FLOAT"))
    torch.testing.assert_close(six, torch.from_numpy(a / 2 + b / 3), atol=1e-6, rtol=0)


def test_values_beyond_full_scale_are_kept(tmp_path):
    wave_S = read_audio(write_wav(tmp_path / "loud.wav", 8 * sine(440, 0.1), subtype="FLOAT"))
    assert 3.9 < wave_S.max() < 4.1


def test_another_rate_is_resampled_in_place(tmp_path):
    wave_S = read_audio(write_wav(tmp_path / "a.wav", sine(440, 1, 44100), 44100))
    assert len(wave_S) == 16000
    torch.testing.assert_close(wave_S[200:-200], torch.from_numpy(sine(440, 1))[200:-200], atol=1e-3, rtol=0)
    assert len(read_audio(tmp_path / "a.wav", sample_rate=32000)) == 32000


def test_mp4_sound_starts_in_place_without_the_codecs_priming(clip):
    wave_S = read_audio(clip)
    assert 48000 <= len(wave_S) <= 48000 + 1024  # AAC fills its last frame
    torch.testing.assert_close(wave_S[4000:46000], torch.from_numpy(sine(440, 3))[4000:46000], atol=0.01, rtol=0)


def test_late_sound_stays_in_place_on_the_videos_clock(tmp_path):
    late = read_audio(write_mp4(tmp_path / "late.mp4", grey_frames(30), sine(440, 1), late_s=1.5))
    assert abs(onset(late) - 24000) < 20 and late[:22000].abs().max() == 0
    alone = read_audio(write_mp4(tmp_path / "alone.mp4", None, sine(440, 1), late_s=1.5))
    assert onset(alone) < 1100  # no picture: the sound's own clock


def test_the_first_of_two_audio_tracks_is_read(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("pcm_s16le", rate=rate, layout="mono") for rate in (16000, 8000)]
        for stream, hz in zip(streams, (440, 1000), strict=True):
            rate = stream.rate
            ints = (sine(hz, 0.5, rate) * 32768).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(ints, format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            for packet in stream.encode(frame) + stream.encode(None):
                out.mux(packet)
    torch.testing.assert_close(read_audio(path), torch.from_numpy(sine(440, 0.5)), atol=1e-4, rtol=0)


def test_video_frames_are_qwens_choice_in_rgb(clip, tmp_path):
    frames_TCHW = read_video(clip)
    assert frames_TCHW.shape == (4, 3, 64, 96) and frames_TCHW.dtype == torch.uint8 and frames_TCHW.is_contiguous()
    assert picked(frames_TCHW) == [0, 10, 19, 29]  # 29 / 3 = 9.67, 19.33
    assert picked(read_video(clip, nframes=2)) == [0, 29]
    assert picked(read_video(clip, fps=2.0)) == [0, 6, 12, 17, 23, 29]
    red = np.zeros((2, 32, 48, 3), np.uint8)
    red[..., 0] = 255
    pixel = read_video(write_mp4(tmp_path / "red.mp4", red))[0, :, 16, 24].tolist()
    assert pixel[0] > 240 and max(pixel[1:]) < 15


def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path):
    path = write_mp4(tmp_path / "cut.mp4", grey_frames(30), hidden=10)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 30  # what the header says
    assert picked(read_video(path)) == [10, 16, 23, 29]  # 20 frames decode: 0, 6, 13, 19 of them


def test_a_video_too_big_to_hold_is_decoded_twice_to_the_same_frames(clip, monkeypatch):
    once = read_video(clip)
    monkeypatch.setattr(media, "KEPT_BYTES", 50_000)
    assert torch.equal(read_video(clip), once)


@pytest.mark.parametrize("count, expected", [(1, [0]), (2, [0, 1]), (3, [0, 2]), (5, [0, 1, 3, 4])])
def test_short_videos(tmp_path, count, expected):
    assert picked(read_video(write_mp4(tmp_path / "s.mp4", grey_frames(count)))) == expected


@pytest.mark.parametrize("height, width", [(33, 35), (1, 1), (3, 2), (1, 300)])
def test_odd_sizes_decode_exactly_and_lossless_colours_survive(tmp_path, height, width):
    frames = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    frames_TCHW = read_video(write_mp4(tmp_path / "odd.mkv", frames, codec="ffv1", pix_fmt="bgr0"))
    assert torch.equal(frames_TCHW, torch.from_numpy(frames).permute(0, 3, 1, 2))


def test_a_fixed_number_of_frames_must_be_even_and_there(clip):
    for wrong in (0, 1, 3, -2):
        with pytest.raises(ValueError, match=f"nframes must be an even number >= 2, got {wrong}") as caught:
            read_video(clip, nframes=wrong)
        assert not isinstance(caught.value, MediaError)
    assert reason(read_video, clip, nframes=32) == "too short"
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps must be positive"):
            read_video(clip, fps=wrong)


def test_a_missing_track_is_named(clip, tmp_path):
    mute = write_mp4(tmp_path / "mute.mp4", grey_frames(4))
    blind = write_mp4(tmp_path / "blind.mp4", None, sine(440, 0.5))
    assert reason(read_audio, mute) == "no audio track" and reason(read_video, blind) == "no video track"
    assert reason(read_video, write_wav(tmp_path / "a.wav", sine(440, 0.5))) == "no video track"
    assert len(read_audio(blind)) >= 8000 and len(read_video(mute)) == 4


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as out:
        audio = out.add_stream("aac", rate=16000, layout="mono")
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(grey_frames(1, 32, 32)[0], format="rgb24").reformat(format="yuvj420p")
        for packet in cover.encode(frame) + cover.encode(None):
            out.mux(packet)
        frame = av.AudioFrame.from_ndarray(sine(440, 1.0)[None], format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in audio.encode(frame) + audio.encode(None):
            out.mux(packet)
    assert reason(read_video, path) == "no video track"
    assert len(read_audio(path)) >= 16000


@pytest.mark.parametrize("name", ["-dash.mp4", "with spaces & 'q'.mp4", "ünïcode 声.mp4", "http:host.mp4", "a%03d.wav"])
def test_names_are_taken_literally(clip, tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert picked(read_video(name)) == [0, 10, 19, 29] and len(read_audio(name)) >= 48000


def test_the_content_decides_not_the_name(clip, tmp_path):
    (tmp_path / "film.wav").write_bytes(clip.read_bytes())
    assert torch.equal(read_audio(tmp_path / "film.wav"), read_audio(clip))
    write_wav(tmp_path / "a.wav", sine(440, 0.5)).rename(tmp_path / "sound.mp4")
    assert len(read_audio(tmp_path / "sound.mp4")) == 8000


@pytest.mark.parametrize("read", [read_audio, read_video])
@pytest.mark.parametrize("name", ["x.wav", "x.mp4", "x.mp3", "x.ogg", "x"])
def test_files_that_are_no_media(tmp_path, read, name):
    path = tmp_path / name
    assert reason(read, path) == "missing"
    path.write_bytes(b"")
    assert reason(read, path) == "empty file"
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    assert reason(read, path) == "unreadable"
    path.write_text("this is a text file, whatever its name says\n")
    assert reason(read, path) == "unreadable"
    path.write_text("ffconcat version 1.0\nfile /dev/zero\n")  # a playlist that points elsewhere
    assert reason(read, path) == "unreadable"
    path.unlink()
    path.mkdir()
    assert reason(read, path) == "not a file"


def test_a_playlist_does_not_reach_the_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        path, url = tmp_path / "list.m3u8", f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n")
        reason(read_audio, path), reason(read_video, path)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody knocked
            server.accept()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    assert reason(read_audio, tmp_path / "pipe.wav") == "not a file"


def test_a_name_that_no_file_can_have():
    assert "unreadable" in str(pytest.raises(MediaError, read_audio, "nul\0byte.wav").value)
    assert "\n" not in str(MediaError("two\nlines.wav", "unreadable", "one\ntwo"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(clip, tmp_path):
    path = tmp_path / "secret.mp4"
    path.write_bytes(clip.read_bytes())
    path.chmod(0)
    assert reason(read_video, path) == "unreadable"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_not_finite(tmp_path, bad):
    wave = sine(440, 0.1)
    wave[[5, 700]] = bad
    path = write_wav(tmp_path / "bad.wav", wave, subtype="FLOAT")
    assert reason(read_audio, path) == "not finite"
    with pytest.raises(MediaError, match="2 of 1600 samples"):
        read_audio(path)


def test_a_wav_of_a_header_alone_and_one_with_a_rate_of_zero(tmp_path):
    path = write_wav(tmp_path / "h.wav", np.zeros(0, np.float32))
    assert reason(read_audio, path) == "no samples"
    data = bytearray(write_wav(tmp_path / "r.wav", sine(440, 0.1)).read_bytes())
    for rate in (0, 7, 0x7FFFFFFF):
        data[24:28] = rate.to_bytes(4, "little")
        (tmp_path / "r.wav").write_bytes(data)
        assert reason(read_audio, tmp_path / "r.wav") == "unreadable"


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_sound_file_cut_short_is_refused(tmp_path, suffix):
    noise = (0.1 * np.random.default_rng(0).standard_normal(40000)).astype(np.float32)
    path = write_wav(tmp_path / f"a.{suffix}", noise, subtype=None)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    assert reason(read_audio, path) == "truncated"


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_written_to_a_pipe_has_a_placeholder_for_its_size_and_is_whole(tmp_path, size):
    path = write_wav(tmp_path / "a.wav", sine(440, 0.5))
    data = bytearray(path.read_bytes())
    assert data[36:40] == b"data"
    data[40:44] = size.to_bytes(4, "little")
    path.write_bytes(data)
    assert len(read_audio(path)) == 8000


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("movflags", ["faststart", ""])
def test_an_mp4_cut_short_is_refused(tmp_path, part, movflags):
    options = {"movflags": movflags} if movflags else None
    path = write_mp4(tmp_path / "a.mp4", grey_frames(30), sine(440, 3), options=options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert reason(read_audio, path) == "truncated" and reason(read_video, path) == "truncated"


def test_decoding_that_fails_in_the_middle_is_refused(clip, tmp_path):
    """The header is intact, so only the decoder can tell."""
    data, path = bytearray(clip.read_bytes()), tmp_path / "bad.mp4"
    start, end = data.index(b"mdat") + 4, len(data)
    data[start + (end - start) // 2 : end] = b"\xff" * (end - start - (end - start) // 2)
    path.write_bytes(data)
    assert reason(read_audio, path) == "truncated" and reason(read_video, path) == "truncated"
    data[start:end] = b"\xff" * (end - start)
    path.write_bytes(data)
    assert reason(read_audio, path) == "unreadable" and reason(read_video, path) == "unreadable"


def test_a_flac_that_announces_an_absurd_length_costs_no_memory(tmp_path):
    path = write_wav(tmp_path / "a.flac", sine(440, 0.5), subtype="PCM_16")
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # the upper 4 bits of 36 for the number of samples: 68,719,484,736 of them
    data[22:26] = b"\xff" * 4
    path.write_bytes(data)
    assert reason(read_audio, path) in ("truncated", "unreadable")


def test_media_error_survives_pickling():
    error = pickle.loads(pickle.dumps(MediaError("a.wav", "truncated", "half")))
    assert (error.path, error.reason, error.detail) == ("a.wav", "truncated", "half")
    assert str(error) == "a.wav: truncated (half)"


def test_the_rate_of_the_chosen_frames_is_theirs_and_not_the_one_asked_for(clip, tmp_path):
    assert read_frames(clip, fps=2.0)[1] == pytest.approx(2.0)  # 6 of 30 frames at 10 a second
    assert read_frames(clip, fps=1.0)[1] == pytest.approx(4 / 3)  # never fewer than 4
    odd = write_mp4(tmp_path / "odd.mp4", grey_frames(55))
    assert read_frames(odd, fps=0.9)[1] == pytest.approx(4 / 5.5)  # 4.95 wanted, an even number taken


@pytest.mark.slow
def test_ffmpegs_notes_do_not_reach_stderr(clip, tmp_path):
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    (tmp_path / "bad.mp4").write_bytes(data)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4096))
    code = (
        "import sys\nfrom minixmd.inputs.media import *\n"
        "for path in sys.argv[1:]:\n    for read in read_audio, read_frames:\n"
        "        try:\n            read(path)\n        except MediaError as error:\n            print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, "bad.mp4", "noise.mp4"], cwd=tmp_path, capture_output=True,
                         text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    assert run.stderr == "" and len(run.stdout.splitlines()) == 4
