"""Decode clips: sound to 16 kHz mono float32, video to a few RGB frames. A fault of a file is a MediaError.

FFmpeg's libraries (PyAV) read everything; its programs are not run. The content, not the name, decides how, among the
FORMATS of files that hold sound or pictures themselves: no script, playlist, device or network is ever opened.

Broken files: nothing is repaired, and no part of a clip is passed off as the whole. A file is `truncated` when it is
shorter than its own header says (containers.py) or when decoding fails after some frames came out; when none came out
it is `unreadable`. It has the `wrong length` when a part that its header does not know follows: FFmpeg would stop
before it. Sounds joined in formats without a header over the whole (MP3, AAC, Ogg, FLAC, MPEG-TS) are read to the end.
Not noticed: errors that a video decoder hides, and a cut in a format that does not say how long it is."""
import math
import os
import stat
from collections import Counter

import av
import numpy as np
import torch

from minixmd.inputs.audio import SAMPLE_RATE, resample
from minixmd.inputs.containers import TAGS, announced
from minixmd.inputs.image import sample_frames

FORMATS = (  # FFmpeg's names of the demuxers that may open a file
    "wav,aiff,flac,mp3,aac,ac3,eac3,amr,ogg,mov,matroska,avi,flv,mpegts,mpeg,ivf,nut,gif,h264,hevc,m4v,mpegvideo,"
    "png_pipe,apng,jpeg_pipe,webp_pipe,bmp_pipe")
MAX_PIXELS = 1 << 25  # of a frame: 8K is 33 million
MAX_FRAMES = 1 << 18  # of a video: 2.4 hours at 30 a second
KEPT_BYTES = 256 << 20  # decoded frames kept while their number is unknown; a longer video is decoded twice
TIMED = ("h264", "hevc", "vp9", "av1")  # codecs of one frame a packet, in these containers
ONE_FRAME_A_PACKET = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
SELF_FRAMED = ("mp3", "aac", "ac3", "eac3")  # sound without a container: what is no frame behind the last one is a tag
MAX_JUNK_BYTES = 1 << 16  # of tags; more is lost sound
SIZED_PACKETS = (*ONE_FRAME_A_PACKET, "avi", "flv")  # containers that say how long each packet is
RATES = range(1_000, 768_001)  # Hz; outside, a header is broken and would ask for gigabytes
LOUDEST = 1e9  # full scale is 1; far beyond, the power of the spectrum overflows float32
BEYOND_S = 0.5  # read beyond the seconds that are wanted, for the resampler's filter
MAX_SHIFT_S = 3600.0  # sound that starts further from the picture is a broken time stamp, not a pause
AV_ERRORS = (av.FFmpegError, OSError, ValueError)  # PyAV: codec errors, names it cannot encode, formats without arrays

av.logging.set_level(av.logging.PANIC)  # FFmpeg writes its notes straight to stderr, where a progress bar lives


class MediaError(ValueError):
    """A clip that cannot be used: its path, a reason to count by, and a detail. Reasons: missing, not a file, empty
    file, unreadable, truncated, wrong length, no audio track, no video track, no samples, no frames, no frame rate, not
    finite, too short, too long, too large, bad shape; of child processes out of time, out of memory, crashed."""

    def __init__(self, path, reason, detail=""):
        super().__init__(path, reason, detail)  # all three in args: the error survives pickling out of a worker process
        self.path, self.reason, self.detail = path, reason, detail

    def __str__(self):
        name = str(self.path)
        name = name if name.isprintable() else repr(name)
        return f"{name}: {self.reason}" + (f" ({' '.join(self.detail.split())})" if self.detail else "")


def read_audio(path, *, sample_rate=SAMPLE_RATE, max_s=None):
    """Decode the first audio track of a sound or video file to mono.

    Channels are averaged (opposite channels cancel), then resampled (`audio.resample`). Values are not clipped to +-1.
    In a file with pictures sample n is heard at n / sample_rate on the video's clock: sound that starts later than they
    do is preceded by silence, and what is heard before them is left out. Codec priming is dropped, gaps in the track
    are closed up. max_s: seconds to read; None = all. Returns (S,) float32, finite, S >= 1. Raises MediaError."""
    announced_samples = check_file(path).samples
    with open_media(path, decodes_film=False) as container:
        mono, rate, shift = _read_track(container, path, max_s, announced_samples)
    mono = mono[-shift:] if shift < 0 else np.concatenate([np.zeros(shift, np.float32), mono])
    if not len(mono):
        raise MediaError(path, "no samples")
    if bad := int((~(np.abs(mono) <= LOUDEST)).sum()):  # written so that NaN counts as bad
        raise MediaError(path, "not finite", f"{bad} of {len(mono)} samples are NaN, infinite or above {LOUDEST:g}")
    wave_S = resample(mono, rate, sample_rate)[:None if max_s is None else round(max_s * sample_rate)]
    if not len(wave_S):
        raise MediaError(path, "no samples", f"{len(mono)} samples at {rate} Hz are none at {sample_rate} Hz")
    return torch.from_numpy(wave_S)


def _read_track(container, path, max_s, announced_samples):
    """(mono float32 samples, rate, samples by which they start after the picture). Raises MediaError for a track that
    is read to its end and holds fewer samples than are announced."""
    if not container.streams.audio:
        raise MediaError(path, "no audio track")
    stream = container.streams.audio[0]
    fifo, rate, shift, most = av.AudioFifo(), 0, 0, math.inf
    for frame in _decode(container, stream, path):
        if not rate:
            rate = frame.sample_rate
            if rate not in RATES:
                raise MediaError(path, "unreadable", f"a sample rate of {rate} Hz")
            shift = round(_seconds_after_picture(container, frame, path) * rate)
            if max_s is not None:
                most = round((max_s + BEYOND_S) * rate) - shift
        frame.pts = None  # which closes up gaps
        try:
            fifo.write(frame)
        except ValueError:
            raise MediaError(path, "unreadable", "the format of the sound changes in the middle") from None
        if fifo.samples >= most:
            break
    else:
        if fifo.samples < announced_samples:
            raise MediaError(path, "truncated", f"decoding stops after {fifo.samples} of {announced_samples} samples")
    mono = _mono(fifo.read(partial=True), path) if fifo.samples else np.zeros(0, np.float32)
    return mono, rate, shift


def read_frames(path, *, fps=1.0, nframes=None, fit=None):
    """Decode the frames that Qwen's rule picks (`image.sample_frames`) from the video track.

    Frames that decode count, not the header's number: clips cut without re-encoding list frames that an edit list
    hides. The rate is the track's average. As in the reference, frames are turned and sample aspect ratios ignored.

    fps: frames to pick per second of video. nframes: a fixed number instead, even and >= 2. fit: function((1, 3, H, W),
    T) that resizes each picked frame at once, so that few large ones are held. Returns (frames_TCHW, (T, 3, H, W) uint8
    RGB with T even, or 1 for a video of one frame; frames picked per second, or None if the file does not say its
    rate). Raises MediaError, `too short` for too large an nframes; ValueError: fps or nframes out of range."""
    sample_frames(1 << 20, 1.0, fps=fps, nframes=nframes)  # a wrong argument is the caller's fault, not the file's
    check_file(path)
    rate, times = _frame_times(path)

    def choose(total):
        if not total:
            raise MediaError(path, "no frames")
        if not rate and nframes is None:
            raise MediaError(path, "no frame rate", "ask for a fixed number of frames")
        if nframes is not None and nframes > total:
            raise MediaError(path, "too short", f"{nframes} frames wanted, {total} in the file")
        return sample_frames(total, float(rate or 1), fps=fps, nframes=nframes)

    shapes = set()

    def convert(frame, count):
        turned_HWC = np.rot90(_array(frame, path, format="rgb24"), round(frame.rotation / 90))  # as the file says
        image_1CHW = torch.from_numpy(turned_HWC.copy()).permute(2, 0, 1)[None]
        shapes.add(image_1CHW.shape)
        return image_1CHW.contiguous() if fit is None else fit(image_1CHW, count)

    total = len(times)
    images = _decode_times(path, [times[i] for i in choose(total)], convert) if times else None
    if images is None:
        shapes.clear()
        images, total = _decode_all(path, choose, convert)
    if len(shapes) > 1:
        raise MediaError(path, "unreadable", "the picture size changes in the middle")
    return torch.cat(images), float(len(images) / total * rate) if rate else None


def _frame_times(path):
    """(the track's average rate, or None; the time stamps of its frames in order, from the packets alone). There are
    none where a packet may be another number of frames than one, or its time is not known."""
    with open_media(path, decodes_film=False) as container:
        stream = film(container, path)
        rate = stream.average_rate  # None in a few formats
        if container.format.name not in ONE_FRAME_A_PACKET or stream.codec_context.codec.canonical_name not in TIMED:
            return rate, []
        try:
            times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        except AV_ERRORS:
            return rate, []  # decoding will say what is wrong
    return rate, [] if None in times or len(set(times)) < len(times) else sorted(times)


def _decode_times(path, times, convert):
    """The frames at these time stamps, converted; None if one does not come out. Others are decoded only if needed."""
    images, chosen = {}, set(times)

    def skip_if_unneeded(packet):
        wanted = packet.pts is None or packet.pts in chosen
        packet.stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"

    for frame in _film_frames(path, skip_if_unneeded):
        if frame.pts in chosen:
            images[frame.pts] = convert(frame, len(times))
    return [images[time] for time in times] if images.keys() == chosen else None


def _decode_all(path, choose, convert):
    """(the chosen frames, converted, the number of all frames). choose: function(number of frames) -> indices."""
    kept, total, kept_bytes = [], 0, 0
    for frame in _film_frames(path):
        total += 1
        kept_bytes += sum(plane.buffer_size for plane in frame.planes)
        if kept_bytes <= KEPT_BYTES:
            kept.append(frame)
    index_T = choose(total)  # strictly increasing: there are never more picks than frames
    if len(kept) == total:
        return [convert(kept[i], len(index_T)) for i in index_T], total
    del kept
    chosen = set(index_T)
    return [convert(frame, len(index_T)) for i, frame in enumerate(_film_frames(path)) if i in chosen], total


def _film_frames(path, before_packet=None):
    """Yields the decoded frames of the video track. before_packet: function(packet), called before it is decoded."""
    with open_media(path) as container:
        yield from _decode(container, film(container, path), path, before_packet)


def check_file(path):
    """Its Announced. Refuses a file that is missing, not regular (a pipe would block), empty, or of another length."""
    try:
        status = os.stat(path)
        is_file = stat.S_ISREG(status.st_mode)
        if is_file:
            with open(path, "rb") as file:
                length = announced(file, status.st_size)
    except FileNotFoundError:
        raise MediaError(path, "missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MediaError(path, "unreadable", _message(error)) from None
    if not is_file or not status.st_size:
        raise MediaError(path, "empty file" if is_file else "not a file")
    if length.end > status.st_size:
        raise MediaError(path, "truncated", f"{status.st_size} bytes of the {length.end} its header announces")
    if length.joined:
        raise MediaError(path, "wrong length", f"after {length.end} of {status.st_size} bytes {length.joined}")
    return length


def _message(error):
    return getattr(error, "strerror", None) or str(error)  # strerror leaves out the path, which MediaError names


def open_media(path, decodes_film=True):
    """PyAV's container of a file in one of FORMATS. Raises MediaError. decodes_film: whether a picture will be."""
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        with open(path, "rb") as file:
            head = file.read(8)
        kind = "jpeg_pipe" if head[:3] == b"\xff\xd8\xff" else None  # its name would choose a reader of numbered files
        if not decodes_film and head[4:] == b"ftyp":
            options["codec_whitelist"] = "aac"  # else FFmpeg decodes a frame of the film when it opens an MP4
        # "file:": a name with a colon is no URL
        return av.open("file:" + os.fspath(path), format=kind, options=options, metadata_errors="replace")
    except av.error.ArgumentError:
        raise MediaError(path, "unreadable", "not in a format that is read here") from None
    except AV_ERRORS as error:
        raise MediaError(path, "unreadable", _message(error)) from None


def _film_track(container, path):
    """The video track, FFmpeg's choice among those of more than one frame; None without. A song's cover is no video."""
    still = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & still]
    if len(streams) > 1:
        counts = {stream.index: stream.frames for stream in streams}
        if 0 in counts.values():  # the container does not say
            with open_media(path) as other:
                packets = Counter(packet.stream_index for packet in other.demux(list(counts)))
            counts = {index: packets[index] - 1 for index in counts}  # the last one is empty
        streams = [stream for stream in streams if counts[stream.index] > 1] or streams
        best = container.streams.best("video")
        return next((stream for stream in streams if stream.index == best.index), streams[0])
    return streams[0] if streams else None


def film(container, path):
    """The video track, checked. Raises MediaError."""
    stream = _film_track(container, path)
    if stream is None:
        raise MediaError(path, "no video track")
    context = stream.codec_context
    if context is None:
        raise MediaError(path, "unreadable", "no decoder for its codec")
    if context.width * context.height > MAX_PIXELS:
        raise MediaError(path, "too large", f"frames of {context.width} x {context.height} pixels")
    return stream


def _decode(container, stream, path, before_packet=None):
    """Yields the frames of a track. before_packet: as in _film_frames."""
    count, fault = 0, ""
    if stream.codec_context is None:
        raise MediaError(path, "unreadable", "no decoder for its codec")
    stream.codec_context.thread_count = 1  # the work is divided by clips
    loose = stream.type == "audio" and container.format.name in SELF_FRAMED
    behind, junk_bytes = None, 0  # what a packet raised that may be a tag behind the sound, and the size of such
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt and container.format.name in SIZED_PACKETS:
                fault = "a packet is incomplete"
                break
            if before_packet is not None:
                before_packet(packet)
            try:
                frames = packet.decode()
            except AV_ERRORS as error:
                data = bytes(packet)
                if data.startswith(TAGS) or data and not data.strip(b"\0"):
                    continue  # tags and zeros, as they stand where MP3s are joined or padded, are no sound and no fault
                junk_bytes += packet.size
                if not loose or junk_bytes > MAX_JUNK_BYTES:
                    raise
                behind = error
                continue
            for frame in frames:
                if behind is not None:
                    raise behind
                count += 1
                yield frame
            if count > MAX_FRAMES and stream.type == "video":
                raise MediaError(path, "too long", f"more than {MAX_FRAMES} frames")
    except (MediaError, MemoryError):
        raise
    except AV_ERRORS as error:
        fault = _message(error)
    if behind is not None and not count:
        fault = _message(behind)
    if fault:
        raise MediaError(path, "truncated" if count else "unreadable", f"decoding fails after {count} frames: {fault}")


def _array(frame, path, **options):
    try:
        return frame.to_ndarray(**options)
    except AV_ERRORS as error:
        raise MediaError(path, "unreadable", f"no array from {frame.format.name}: {error}") from None


def _seconds_after_picture(container, first_frame, path):
    """How much later than the picture the sound starts, below 0 if it starts earlier; 0 without pictures."""
    track = _film_track(container, path)
    if track is None or first_frame.pts is None:
        return 0.0
    start = max(0, track.start_time or 0) * track.time_base  # below 0: decoding delay or hidden frames
    seconds = float(first_frame.pts * first_frame.time_base - start)
    if abs(seconds) > MAX_SHIFT_S:
        raise MediaError(path, "unreadable", f"the sound starts {seconds:.0f} s after the picture")
    return seconds


def _mono(frame, path):
    x = _array(frame, path)  # (channels, samples) or, packed, (1, samples * channels)
    if not frame.format.is_planar:
        x = x.reshape(-1, len(frame.layout.channels)).T
    if x.dtype == np.uint8:
        x = (x.astype(np.float32) - 128) / 128
    elif x.dtype.kind == "i":
        x = x / 2.0 ** (8 * x.dtype.itemsize - 1)
    return x.mean(0).astype(np.float32)
