"""Writes the clips that the tests decode, with soundfile and PyAV."""
from fractions import Fraction

import av
import numpy as np
import soundfile


def sine(hz, seconds, rate=16000, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def grey_frames(count, height=64, width=96, step=6):
    """(count, height, width, 3) uint8: frame i is one even grey of 20 + step * i, so a decoded frame names itself."""
    greys = np.arange(count, dtype=np.uint8) * step + 20
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()


def write_wav(path, wave, rate=16000, subtype="PCM_16"):
    """Writes sound; the suffix chooses the format. wave: (S,) or (S, channels), full scale 1.

    subtype: "FLOAT" keeps NaN and values beyond full scale.
    """
    soundfile.write(str(path), wave, rate, subtype=subtype)
    return path


def write_mp4(path, frames, wave=None, fps=10, rate=16000, *, codec="libx264", pix_fmt="yuv420p", late_s=0.0,
              picture_late_s=0.0, hidden=0, encoder=None, options=None):
    """Writes a video with its sound track; the suffix chooses the container.

    Args:
        frames: (T, H, W, 3) uint8, or None for sound alone; H.264 needs even sides.
        wave: (S,) float32, written as AAC, or None for no sound.
        codec, pix_fmt: "ffv1" and "bgr0" in an .mkv are lossless and take odd sides.
        late_s: seconds by which the sound starts later than the picture. picture_late_s: the reverse.
        hidden: first frames that lie before time 0, behind an edit list.
        encoder: options of the video encoder, such as {"bf": "3"}.
        options: the container's, such as {"movflags": "faststart"}.
    """
    with av.open(str(path), "w", options=options or {}) as out:
        video = audio = None
        if frames is not None:
            video = out.add_stream(codec, rate=fps)
            video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
            if codec == "libx264":
                video.options = {"preset": "ultrafast", "crf": "10", "threads": "1", **(encoder or {})}
        if wave is not None:
            audio = out.add_stream("aac", rate=rate, layout="mono")
        if video:
            for i, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, fps)
                _mux(out, video, frame, picture_late_s - hidden / fps)
            _mux(out, video, None, picture_late_s - hidden / fps)
        if audio:
            for start in range(0, len(wave), 1024):
                block = np.ascontiguousarray(wave[None, start:start + 1024], dtype=np.float32)
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
                _mux(out, audio, frame, late_s)
            _mux(out, audio, None, late_s)
    return path


def _mux(out, stream, frame, shift_s):
    """Encodes a frame (None = what the encoder still holds) and writes its packets, shifted in time."""
    for packet in stream.encode(frame):
        shift = round(shift_s / packet.time_base)
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
        out.mux(packet)
