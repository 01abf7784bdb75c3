"""Decode clips: sound to 16 kHz mono float32, video to a few RGB frames. A fault of a file is a MediaError.

The content, not the name, decides who decodes: libsndfile (soundfile) reads what starts like WAV, FLAC, OGG or MP3;
FFmpeg's libraries (PyAV) read everything else and what libsndfile refuses. Neither is run as a program.

Broken files: nothing is repaired, and no part of a clip is passed off as the whole. A file is `truncated` when it is
shorter than its own header says (WAV data chunk, FLAC frame count, OGG end-of-stream flag, MP3 frame count, MP4 boxes)
or when decoding fails after some frames came out; when none came out it is `unreadable`. Not noticed: errors that a
video decoder hides, and a cut in a format that does not say how long it is (Matroska between two clusters). On a
damaged MP3 libsndfile prints notes of its own.
"""
import os
import re
import stat
import struct

import av
import numpy as np
import soundfile
import torch

from minixmd.inputs.audio import SAMPLE_RATE, resample
from minixmd.inputs.image import sample_frames

BLOCK_SAMPLES = 1 << 18  # soundfile allocates what the header promises: in blocks a lying header costs nothing
KEPT_BYTES = 256 << 20  # decoded frames kept while their number is unknown; a longer video is decoded twice
MP4_BOXES = (b"ftyp", b"styp", b"sidx", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"uuid")
MP3_SLACK = 2 * 1152  # samples: an MP3's announced length is right to a frame or two
RATES = range(1_000, 768_001)  # Hz; outside, a header is broken and would ask for gigabytes
LOUDEST = 1e9  # full scale is 1; far beyond, the power of the spectrum overflows float32
AV_ERRORS = (av.FFmpegError, OSError, ValueError)  # PyAV: codec errors, names it cannot encode, formats without arrays
MAX_LATE_S = 3600.0  # sound that starts later than this after the picture is a broken time stamp, not a pause

av.logging.set_level(av.logging.PANIC)  # FFmpeg writes its notes straight to stderr, where a progress bar lives


class MediaError(ValueError):
    """A clip that cannot be used, and why.

    Attributes: path; reason, one of a fixed set of phrases, so that reasons can be counted (missing, not a file, empty
    file, unreadable, truncated, no audio track, no video track, no samples, no frames, no frame rate, not finite, too
    short, bad shape); detail, free text. str() is one line that names the file.
    """

    def __init__(self, path, reason, detail=""):
        super().__init__(path, reason, detail)  # all three in args: the error survives pickling out of a worker process
        self.path, self.reason, self.detail = path, reason, detail

    def __str__(self):
        name = str(self.path)
        name = name if name.isprintable() else repr(name)
        return f"{name}: {self.reason}" + (f" ({' '.join(self.detail.split())})" if self.detail else "")


def read_audio(path, *, sample_rate=SAMPLE_RATE):
    """Decode the first audio track of a sound or video file to mono.

    Channels are averaged (opposite channels cancel), then resampled (`audio.resample`). Values are not clipped to +-1.
    In a file with pictures, sound that starts later than they do is preceded by silence, so that sample n is heard at
    n / sample_rate on the video's clock; codec priming is dropped; gaps inside the track are closed up.

    path: taken literally, never as a URL or pattern. sample_rate: of the result, in Hz. Returns wave_S: (S,) float32,
    finite, S >= 1. Raises MediaError: see the module's policy.
    """
    head = _check_file(path)
    mono, rate = _read_sndfile(path) if _is_sndfile(head) else (None, 0)
    if mono is None:
        mono, rate = _read_pyav_audio(path)
    if not len(mono):
        raise MediaError(path, "no samples")
    if rate not in RATES:
        raise MediaError(path, "unreadable", f"a sample rate of {rate} Hz")
    if bad := int((~(np.abs(mono) <= LOUDEST)).sum()):  # written so that NaN counts as bad
        raise MediaError(path, "not finite", f"{bad} of {len(mono)} samples are NaN, infinite or above {LOUDEST:g}")
    wave_S = resample(mono, rate, sample_rate)
    if not len(wave_S):
        raise MediaError(path, "no samples", f"{len(mono)} samples at {rate} Hz are none at {sample_rate} Hz")
    return torch.from_numpy(wave_S)


def read_frames(path, *, fps=1.0, nframes=None):
    """Decode the frames that Qwen's rule picks (`image.sample_frames`) from the first video track.

    Frames that decode count, not the header's number: clips cut without re-encoding list frames that an edit list
    hides. The rate is the track's average. As in the reference, a rotation tag and a sample aspect ratio are ignored.

    fps: frames to pick per second of video. nframes: a fixed number instead, even and >= 2.
    Returns:
        frames_TCHW: (T, 3, H, W) uint8 RGB. T is even, or 1 for a video of one frame.
        Frames picked per second, T / all frames * the track's rate; None when the file does not say its rate.
    Raises:
        MediaError: see the module's policy; `too short` when nframes is more than there are.
        ValueError: fps or nframes out of range.
    """
    sample_frames(1 << 20, 1.0, fps=fps, nframes=nframes)  # a wrong argument is the caller's fault, not the file's
    _check_file(path)
    kept, total, decoded_bytes = [], 0, 0
    with _open(path) as container:
        stream = first_video(container, path)
        rate = stream.average_rate  # None in a few formats
        for frame in _decode(container, stream, path):
            total += 1
            decoded_bytes += sum(plane.buffer_size for plane in frame.planes)
            if decoded_bytes <= KEPT_BYTES:
                kept.append(frame)
    if not total:
        raise MediaError(path, "no frames")
    if not rate and nframes is None:
        raise MediaError(path, "no frame rate", "ask for a fixed number of frames")
    if nframes is not None and nframes > total:
        raise MediaError(path, "too short", f"{nframes} frames wanted, {total} in the file")
    index_T = sample_frames(total, float(rate or 1), fps=fps, nframes=nframes)
    if len(kept) == total:
        images = [_to_rgb(kept[i], path) for i in index_T]
    else:
        del kept
        chosen = set(index_T)  # strictly increasing: there are never more picks than frames
        with _open(path) as container:
            frames = enumerate(_decode(container, first_video(container, path), path))
            images = [_to_rgb(frame, path) for i, frame in frames if i in chosen]
    if len({image.shape for image in images}) > 1:
        raise MediaError(path, "unreadable", "the picture size changes in the middle")
    frames_TCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return frames_TCHW, float(len(index_T) / total * rate) if rate else None


def _check_file(path):
    """The file's first 12 bytes. Refuses what is missing, no regular file (a pipe would block), empty or cut short."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(path, "not a file")
        if not status.st_size:
            raise MediaError(path, "empty file")
        with open(path, "rb") as file:
            head = file.read(12)
            declared = _declared_bytes(file, head, status.st_size)
    except FileNotFoundError:
        raise MediaError(path, "missing") from None
    except MediaError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MediaError(path, "unreadable", _message(error)) from None
    if declared > status.st_size:
        raise MediaError(path, "truncated", f"{status.st_size} bytes of the {declared} its header announces")
    return head


def _declared_bytes(file, head, size):
    """How long the container itself says the file is at least, in bytes; 0 if it does not say."""
    end = 0
    if head[4:8] == b"ftyp":  # MP4: a chain of boxes, each 4 bytes of size and 4 of name
        while end + 16 <= size:
            file.seek(end)
            length, name, long_length = struct.unpack(">I4sQ", file.read(16))
            length = long_length if length == 1 else length
            if length < 8 or name not in MP4_BOXES:
                break  # 0 means "to the end"; anything else is padding or junk, the decoder's business
            end += length
    elif head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        start = 12
        while start + 8 <= size:
            file.seek(start)
            name, length = struct.unpack("<4sI", file.read(8))
            if name == b"data":
                return start + 8 + length if length < 0x7FFFF000 else 0  # above: written to a pipe, length not known
            start += 8 + length + length % 2
    elif head[:4] == b"OggS":
        file.seek(max(0, size - (1 << 17)))  # a page is at most 65,307 bytes
        pages = re.findall(rb"OggS\0[\0-\7]", file.read())
        if not pages or not pages[-1][5] & 4:  # the flag "last page of the stream"
            return size + 1
    return end


def _message(error):
    return getattr(error, "strerror", None) or str(error)  # strerror leaves out the path, which MediaError names


def _is_sndfile(head):
    mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06  # layer bits 00 would be AAC
    return head[:4] in (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS") or head[:3] == b"ID3" or bool(mpeg)


def _read_sndfile(path):
    """(mono float32 samples, rate), or (None, 0) when libsndfile does not know the format."""
    try:
        file = soundfile.SoundFile(os.fspath(path))
    except (soundfile.LibsndfileError, UnicodeError):
        return None, 0
    with file:
        blocks, failed = [], False
        try:
            while len(block := file.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                blocks.append(block.mean(1))
        except soundfile.LibsndfileError:
            failed = True
        count = sum(map(len, blocks))
        slack = MP3_SLACK if file.format == "MP3" else 0
        if failed or count + slack < file.frames < 1 << 62:  # above: length unknown
            raise MediaError(path, "truncated", f"decoding stops after {count} of {file.frames} samples")
        return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), file.samplerate


def _open(path):
    try:  # "file:": a name with a colon is no URL, and FFmpeg keeps a playlist inside such a file off the network
        return av.open("file:" + os.fspath(path), metadata_errors="replace")
    except AV_ERRORS as error:
        raise MediaError(path, "unreadable", _message(error)) from None


def _pictures(container):
    """The video tracks; the cover picture of a song is none."""
    return [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]


def first_video(container, path):
    if not (streams := _pictures(container)):
        raise MediaError(path, "no video track")
    return streams[0]


def _decode(container, stream, path):
    count, fault = 0, ""
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                fault = "a packet is incomplete"
                break
            for frame in packet.decode():
                count += 1
                yield frame
    except AV_ERRORS as error:
        fault = _message(error)
    if fault:
        raise MediaError(path, "truncated" if count else "unreadable", f"decoding fails after {count} frames: {fault}")


def _to_rgb(frame, path):
    try:
        return frame.to_ndarray(format="rgb24")  # (H, W, 3)
    except AV_ERRORS as error:
        raise MediaError(path, "unreadable", f"no RGB from {frame.format.name}: {error}") from None


def _read_pyav_audio(path):
    """(mono float32 samples, rate) of the first audio track."""
    with _open(path) as container:
        if not container.streams.audio:
            raise MediaError(path, "no audio track")
        blocks, rate, late_s = [], 0, 0.0
        for frame in _decode(container, container.streams.audio[0], path):
            if not blocks:
                rate, late_s = frame.sample_rate, _late_seconds(container, frame)
            if frame.sample_rate != rate:
                raise MediaError(path, "unreadable", "the sample rate changes in the middle")
            blocks.append(_mono(frame, path))
    if late_s > MAX_LATE_S:
        raise MediaError(path, "unreadable", f"the sound starts {late_s:.0f} s after the picture")
    return np.concatenate([np.zeros(round(late_s * rate), np.float32), *blocks]), rate


def _late_seconds(container, first_frame):
    """How much later than the picture the sound starts, >= 0; 0 without pictures, when the clock is the sound's own."""
    streams = _pictures(container)
    if not streams or first_frame.pts is None:
        return 0.0
    start = max(0, streams[0].start_time or 0) * streams[0].time_base  # below 0: decoding delay or hidden frames
    return max(0.0, float(first_frame.pts * first_frame.time_base - start))


def _mono(frame, path):
    try:
        x = frame.to_ndarray()  # (channels, samples) or, packed, (1, samples * channels)
    except AV_ERRORS as error:
        raise MediaError(path, "unreadable", f"no samples from {frame.format.name}: {error}") from None
    if not frame.format.is_planar:
        x = x.reshape(-1, len(frame.layout.channels)).T
    if x.dtype == np.uint8:
        x = (x.astype(np.float32) - 128) / 128
    elif x.dtype.kind == "i":
        x = x / 2.0 ** (8 * x.dtype.itemsize - 1)
    return x.mean(0).astype(np.float32)
