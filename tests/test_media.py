import os
import pickle
import re
import socket
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile
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
    ("mp3", None, 0.05), ("aiff", "PCM_24", 1e-6), ("rf64", "PCM_16", 2e-4),
])  # fmt: skip
def test_sound_formats_keep_length_and_place(tmp_path, suffix, subtype, atol):
    wave = sine(440, 2)
    wave_S = read_audio(write_wav(tmp_path / f"a.{suffix}", wave, subtype=subtype))
    lost = 256 if suffix == "ogg" else 0  # FFmpeg leaves out the last block of a Vorbis file of a single page
    assert wave_S.shape == (32000 - lost,) and wave_S.dtype == torch.float32 and wave_S.is_contiguous()
    torch.testing.assert_close(wave_S, torch.from_numpy(wave)[:len(wave_S)], atol=atol, rtol=0)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE"])
def test_every_sample_format_is_scaled_as_libsndfile_does(tmp_path, subtype):
    wave = np.stack([sine(440, 0.1), 0.5 * sine(3000, 0.1)], 1)  # interleaved stereo
    path = write_wav(tmp_path / "a.wav", wave, subtype=subtype)
    by_sndfile = torch.from_numpy(soundfile.read(path, dtype="float32")[0].mean(1))
    torch.testing.assert_close(read_audio(path), by_sndfile, atol=1e-6, rtol=0)
    torch.testing.assert_close(by_sndfile, torch.from_numpy(wave.mean(1)).float(), atol=0.01, rtol=0)


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


@pytest.mark.parametrize("late_s", [0.3, 1.2])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_sound_before_the_picture_is_left_out(tmp_path, suffix, late_s):
    wave = np.concatenate([np.zeros(32000, np.float32), sine(440, 1)])
    path = write_mp4(tmp_path / f"early.{suffix}", grey_frames(30), wave, picture_late_s=late_s)
    assert abs(onset(read_audio(path)) - 16000 * (2 - late_s)) < 40


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


def test_a_video_too_big_to_hold_is_decoded_twice_to_the_same_frames(tmp_path, monkeypatch):
    path = write_mp4(tmp_path / "a.avi", grey_frames(30), codec="mpeg4")
    once = read_video(path)
    monkeypatch.setattr(media, "KEPT_BYTES", 50_000)
    assert torch.equal(read_video(path), once)


def moving_frames(count, height=64, width=96):
    """Pictures that differ everywhere, and that a codec predicts from their neighbours."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin((x + shift * t) / 7 + y / (5 + channel)) for channel, shift in enumerate((1, 2, 3))]
    return (127 + 120 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("codec, encoder", [
    ("libx264", {"preset": "medium", "bf": "3", "g": "12"}), ("libx264", {"bf": "0"}),
    ("libx264", {"preset": "fast", "bf": "5", "b-pyramid": "normal", "x264-params": "open-gop=1:keyint=9"}),
    ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:bframes=3:pools=1"}),
    ("libvpx-vp9", {"cpu-used": "8"}),
])  # fmt: skip
def test_the_chosen_frames_are_decoded_once_and_as_in_a_full_decode(tmp_path, monkeypatch, suffix, codec, encoder):
    path = write_mp4(tmp_path / f"a.{suffix}", moving_frames(50), codec=codec, encoder=encoder, hidden=7)
    for cut in (path, write_mp4(tmp_path / f"b.{suffix}", moving_frames(13), codec=codec, encoder=encoder)):
        for fps in (1.0, 4.0):
            found = read_frames(cut, fps=fps)
            with monkeypatch.context() as patch:
                patch.setattr(media, "_frame_times", lambda path: (10, []))
                whole = read_frames(cut, fps=fps)
            assert torch.equal(found[0], whole[0]) and found[1] == whole[1]
    monkeypatch.setattr(media, "_decode_all", None)
    decoded, decode = [], media._decode
    monkeypatch.setattr(media, "_decode", lambda *args: (decoded.append(1) or frame for frame in decode(*args)))
    read_frames(path, nframes=2)
    if encoder.get("bf", "0") != "0":
        assert len(decoded) < 0.7 * (43 if suffix == "mp4" else 50)  # the rest were left out: no other depends on them


def test_where_a_packet_gives_no_frame_all_are_decoded(tmp_path, monkeypatch):
    path = write_mp4(tmp_path / "a.mp4", moving_frames(30))
    times = media._frame_times(path)
    whole = read_video(path)
    monkeypatch.setattr(media, "_frame_times", lambda path: (times[0], [*times[1], times[1][-1] + 1]))
    assert torch.equal(read_video(path), whole)


@pytest.mark.parametrize("degrees, matrix, corner", [
    (90, (0, 1, -1, 0), (0, 1)), (180, (-1, 0, 0, -1), (1, 1)), (270, (0, -1, 1, 0), (1, 0)),
])  # fmt: skip
def test_frames_are_turned_as_the_file_says(tmp_path, degrees, matrix, corner):
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    frames[:, :32, :48] = 255  # the upper left corner
    path = write_mp4(tmp_path / "a.mp4", frames)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the track header's matrix
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        data[at + place:at + place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    frames_TCHW = read_video(path)
    height, width = frames_TCHW.shape[2:]
    assert (height, width) == ((96, 64) if degrees % 180 else (64, 96))
    corners = frames_TCHW[0, 0].reshape(2, height // 2, 2, width // 2).float().mean((1, 3))
    assert (corners > 200).nonzero().tolist() == [list(corner)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_a_still_picture_before_the_film_is_not_the_film(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as out:
        still, moving = out.add_stream("mjpeg", rate=10), out.add_stream("libx264", rate=10)
        for stream, pix_fmt in ((still, "yuvj420p"), (moving, "yuv420p")):
            stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
        for stream, frames in ((still, grey_frames(1) + 200), (moving, grey_frames(30))):
            for image in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode(None))
    assert picked(read_video(path)) == [0, 10, 19, 29]


def test_mpeg_ts_segments_that_are_joined_are_decoded_to_the_end(tmp_path):
    parts = [write_mp4(tmp_path / f"{i}.ts", grey_frames(count), sine(440, count / 10)).read_bytes()
             for i, count in enumerate((12, 18))]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    assert picked(read_video(path)) == [0, 10, 7, 17]  # 0, 10, 19 and 29 of 30, of which 12 are the first part's
    assert len(read_audio(path)) > 2.9 * 16000


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(clip, monkeypatch):
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 96 - 1)
    assert reason(read_video, clip) == "too large"
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 96)
    monkeypatch.setattr(media, "MAX_FRAMES", 20)
    assert reason(read_video, clip) == "too long"


@pytest.mark.parametrize("head", [
    "ffconcat version 1.0\nfile a.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\na.mp4\n", ";FFMETADATA1\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n",
])
def test_scripts_playlists_and_sessions_are_not_opened(clip, tmp_path, head):
    (tmp_path / "a.mp4").write_bytes(clip.read_bytes())
    path = tmp_path / "list.mp4"
    path.write_text(head)
    assert reason(read_video, path) == "unreadable" and reason(read_audio, path) == "unreadable"


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


def noise(seconds, seed=0, rate=16000):
    """Sound of which no part is like another."""
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "rf64", "aiff", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("part", [0.1, 0.6, 0.95])
def test_a_cut_file_whose_header_knows_its_length_is_refused(tmp_path, suffix, part):
    path = write_wav(tmp_path / f"a.{suffix}", noise(3), subtype=None)
    data = path.read_bytes()
    path.write_bytes(data[:int(part * len(data))])
    assert reason(read_audio, path) in ("truncated", "unreadable")


@pytest.mark.parametrize("suffix", ["wav", "rf64", "aiff", "mp4", "mkv", "avi"])
def test_files_joined_behind_a_header_that_knows_only_the_first_are_refused(tmp_path, suffix):
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for seed, path in enumerate(paths):
        if suffix in ("mp4", "mkv", "avi"):
            write_mp4(path, grey_frames(20), noise(2, seed))
        else:
            write_wav(path, noise(2, seed), subtype=None)
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(paths[0].read_bytes() + paths[1].read_bytes())
    assert len(read_audio(paths[0])) >= 31000
    assert reason(read_audio, joined) == "wrong length"


def encode(path, wave, codec, rate, format=None):
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 64_000
        for start in range(0, len(wave), 960):
            block = np.ascontiguousarray(wave[None, start:start + 960])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix, codec, rate", [
    ("flac", None, 16000), ("ogg", None, 16000), ("mp3", None, 16000), ("opus", "libopus", 48000),
    ("aac", "aac", 16000), ("ts", "mp2", 16000), ("ac3", "ac3", 48000),
])  # fmt: skip
def test_sounds_joined_where_every_frame_stands_alone_are_read_to_the_end(tmp_path, suffix, codec, rate):
    waves, parts = [], []
    for seed, seconds in enumerate((2.0, 3.0)):
        path = tmp_path / f"{seed}.{suffix}"
        if codec is None:
            write_wav(path, noise(seconds, seed, rate), rate, subtype=None)
        else:
            encode(path, noise(seconds, seed, rate), codec, rate)
        parts.append(path.read_bytes())
        waves.append(read_audio(path, sample_rate=rate))
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(b"".join(parts))
    wave_S = read_audio(joined, sample_rate=rate)
    assert abs(len(wave_S) - sum(map(len, waves))) < 0.04 * len(wave_S)
    tail = rate // 2  # of the second, behind the decoder's memory of the first
    found, wanted = wave_S[-tail - 4000:-4000].double(), waves[1][-tail - 6000:].double()
    match = torch.nn.functional.conv1d(wanted[None, None], found[None, None])[0, 0].max() / found.square().sum()
    assert match > 0.8, match  # AC-3 is decoded with random noise


@pytest.mark.parametrize("factor, says", [(0.5, "wrong length"), (2.0, "truncated")])
@pytest.mark.parametrize("suffix", ["wav", "aiff"])
def test_a_header_that_announces_another_length_than_there_is_is_refused(tmp_path, suffix, factor, says):
    path = write_wav(tmp_path / f"a.{suffix}", noise(2), subtype="PCM_16")
    data = bytearray(path.read_bytes())
    name, order = (b"SSND", "big") if suffix == "aiff" else (b"data", "little")
    place = data.index(name) + 4
    length = int.from_bytes(data[place:place + 4], order)
    data[place:place + 4] = (round(factor * length) // 4 * 4).to_bytes(4, order)
    path.write_bytes(data)
    assert reason(read_audio, path) == says


def test_a_flac_and_an_mp3_that_do_not_know_their_length_are_read(tmp_path):
    path = write_wav(tmp_path / "a.flac", noise(2), subtype="PCM_16")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # as written to a pipe
    path.write_bytes(data)
    assert len(read_audio(path)) == 32000
    loud_then_quiet = np.concatenate([3 * noise(2), np.zeros(4 * 16000, np.float32)])
    path = encode(tmp_path / "a.mp3", loud_then_quiet, "libmp3lame", 16000)
    data = path.read_bytes()
    at = data.index(b"Info") if b"Info" in data else data.index(b"Xing")
    path.write_bytes(data[:at] + b"zzzz" + data[at + 4:])  # no Xing header: any length is an estimate
    assert abs(len(read_audio(path)) - 6 * 16000) < 4000


def test_tags_and_padding_are_no_fault(tmp_path):
    data = write_wav(tmp_path / "a.mp3", noise(2), subtype=None).read_bytes()
    tag = b"ID3\3\0\0\0\0\1\x48" + b"TIT2" + (190).to_bytes(4, "big") + b"\0\0\0" + b"a" * 189
    for content in (tag + data, data + b"TAG" + b"x" * 125, data + bytes(4096)):
        (tmp_path / "b.mp3").write_bytes(content)
        assert abs(len(read_audio(tmp_path / "b.mp3")) - 32000) < 1200
    data = write_wav(tmp_path / "a.wav", noise(2)).read_bytes()
    (tmp_path / "b.wav").write_bytes(data + b"LIST" + (10).to_bytes(4, "little") + b"INFOISFT\0\0")
    assert len(read_audio(tmp_path / "b.wav")) == 32000


@pytest.mark.parametrize("tail", [
    b"LIST\x0a\0\0\0INFOISFT\0\0", b"LIST\xff\0\0\0INFO", b"PAD\0\0\0\0\0", b"\x80\x90\xa0\xb0" * 5, b"x" * 9,
    b"ID3\4\0\0\0\0\0\0", b"APETAGEX" + b"x" * 900, b"TAG" + b"x" * 125, bytes(5000),
])  # fmt: skip
def test_what_programs_leave_behind_a_wavs_sound_is_passed_over(tmp_path, tail):
    data = write_wav(tmp_path / "a.wav", noise(2)).read_bytes()
    (tmp_path / "b.wav").write_bytes(data + tail)
    assert len(read_audio(tmp_path / "b.wav")) == 32000


def test_a_second_sound_in_a_wav_is_refused(tmp_path):
    data = write_wav(tmp_path / "a.wav", noise(2)).read_bytes()
    (tmp_path / "b.wav").write_bytes(data + data[36:])
    assert reason(read_audio, tmp_path / "b.wav") == "wrong length"


@pytest.mark.parametrize("tail", [
    b"LYRICSBEGIN" + b"words " * 200 + b"LYRICS200", b" " * 300, b"\xff" * 500, b"U" * 700,
    b"APETAGEX" + b"\xff\0" * 900, b"some text about the song\n" * 20,
])  # fmt: skip
def test_what_programs_leave_behind_an_mp3s_sound_is_passed_over(tmp_path, tail):
    data = write_wav(tmp_path / "a.mp3", noise(3), subtype=None).read_bytes()
    (tmp_path / "b.mp3").write_bytes(data + tail)
    assert abs(len(read_audio(tmp_path / "b.mp3")) - len(read_audio(tmp_path / "a.mp3"))) < 1200
    (tmp_path / "b.mp3").write_bytes(data + np.random.default_rng(0).bytes(1 << 18).replace(b"\xff", b"\xfe"))
    assert reason(read_audio, tmp_path / "b.mp3") == "truncated"  # so much is no tag
    middle = len(data) // 2
    (tmp_path / "b.mp3").write_bytes(data[:middle] + np.random.default_rng(0).bytes(3000) + data[middle + 3000:])
    assert reason(read_audio, tmp_path / "b.mp3") == "truncated"


@pytest.mark.parametrize("suffix", ["ts", "flv", "mkv"])
def test_a_title_is_no_header_of_an_mp3(tmp_path, suffix):
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as out:
        out.metadata["title"] = out.metadata["service_name"] = "Info about Xing cats"
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise(1)[None], format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame) + stream.encode(None))
    assert len(read_audio(tmp_path / f"a.{suffix}")) >= 15000


def test_an_avi_written_to_a_pipe_is_read_and_a_cut_one_is_not(tmp_path):
    path = write_mp4(tmp_path / "a.avi", grey_frames(30), noise(3), codec="mpeg4")
    data = path.read_bytes()
    (tmp_path / "pipe.avi").write_bytes(data[:4] + b"\xff" * 4 + data[8:])
    assert len(read_audio(tmp_path / "pipe.avi")) == len(read_audio(path))
    (tmp_path / "cut.avi").write_bytes(data[:len(data) * 8 // 10])
    assert reason(read_audio, tmp_path / "cut.avi") == "truncated"


@pytest.mark.parametrize("suffix", ["w64", "au", "caf"])
def test_formats_whose_length_is_not_read_are_refused(tmp_path, suffix):
    path = write_wav(tmp_path / f"a.{suffix}", noise(1), subtype="PCM_16")
    assert reason(read_audio, path) == "unreadable"


def test_a_jpeg_is_a_film_of_one_frame(tmp_path):
    with av.open(str(tmp_path / "a.mjpeg"), "w", format="mjpeg") as out:
        stream = out.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(grey_frames(1)[0], format="rgb24")
        out.mux(stream.encode(frame) + stream.encode(None))
    (tmp_path / "a%03d.jpg").write_bytes((tmp_path / "a.mjpeg").read_bytes())
    assert read_video(tmp_path / "a%03d.jpg").shape == (1, 3, 64, 96)


def test_the_clock_is_the_films_and_not_a_stills_before_it(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        still, film, sound = out.add_stream("mjpeg", rate=10), out.add_stream("libx264", rate=10), None
        sound = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for stream, pix_fmt in ((still, "yuvj420p"), (film, "yuv420p")):
            stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
        out.mux(still.encode(av.VideoFrame.from_ndarray(grey_frames(1)[0], format="rgb24")) + still.encode(None))
        for i, image in enumerate(grey_frames(20)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = 10 + i  # from 1 s on
            out.mux(film.encode(frame))
        out.mux(film.encode(None))
        wave = np.concatenate([np.zeros(24000, np.float32), sine(440, 1)])  # heard from 1.5 s on
        frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        out.mux(sound.encode(frame) + sound.encode(None))
    assert picked(read_video(path)) == [0, 6, 13, 19]
    assert abs(onset(read_audio(path)) - 8000) < 40


def test_frames_may_be_resized_one_by_one(clip, tmp_path):
    lossless = write_mp4(tmp_path / "a.avi", grey_frames(30), codec="mpeg4")
    for path in (clip, lossless):
        found = read_frames(path, fit=lambda frames_1CHW, total: frames_1CHW[..., ::total // 2, ::2])[0]
        assert torch.equal(found, read_video(path)[..., ::2, ::2])


def test_an_ogg_with_a_damaged_or_a_missing_page_is_refused(tmp_path):
    path = write_wav(tmp_path / "a.ogg", noise(6, rate=48000), 48000, subtype=None)
    data = path.read_bytes()
    pages = [match.start() for match in re.finditer(b"OggS", data)]
    assert len(pages) > 4
    middle = (pages[3] + pages[4]) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:])
    assert reason(read_audio, path) == "wrong length"
    path.write_bytes(data[:pages[3]] + data[pages[4]:])
    assert reason(read_audio, path) == "wrong length"


def test_reading_stops_where_hearing_stops(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "long.wav", noise(20))
    whole = read_audio(path)
    assert torch.equal(read_audio(path, max_s=3.0), whole[:48000])
    path = write_wav(tmp_path / "long.flac", noise(20, rate=44100), 44100, subtype="PCM_16")
    torch.testing.assert_close(read_audio(path, max_s=3.0), read_audio(path)[:48000], atol=1e-6, rtol=0)
    frames = []
    decode = media._decode
    monkeypatch.setattr(media, "_decode", lambda *args: (frames.append(1) or frame for frame in decode(*args)))
    read_audio(path, max_s=3.0)
    few = len(frames)
    read_audio(path)
    assert few < 0.25 * (len(frames) - few)


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


def test_a_sample_that_is_left_out_before_the_picture_may_be_anything(tmp_path):
    path = tmp_path / "a.mkv"
    wave = sine(300, 3)
    wave[100] = np.nan
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("libx264", 10), out.add_stream("pcm_f32le", 16000, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="flt", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        out.mux(audio.encode(sound))
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 9 * i, np.uint8), format="rgb24")
            frame.pts = 10 + i  # a second later than the sound
            out.mux(video.encode(frame))
        for stream in (video, audio):
            out.mux(stream.encode(None))
    assert len(read_audio(path)) == 32_000
