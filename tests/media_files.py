"""Writers for the clips that the tests decode, made with soundfile and PyAV in the test's own directory."""
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
    """wave: (S,) or (S, channels), full scale 1. subtype "FLOAT" keeps NaN and values beyond 1. Format by suffix."""
    soundfile.write(str(path), wave, rate, subtype=subtype)
    return path


def write_mp4(path, frames, wave=None, fps=10, rate=16000, *, codec="libx264", pix_fmt="yuv420p", late_s=0.0,
              hidden=0, options=None):
    """Write frames (T, H, W, 3) uint8, or None for sound alone, with wave (S,) as AAC; H.264 needs even sides.

    The suffix picks the container (.mkv with codec="ffv1", pix_fmt="bgr0" is lossless and takes odd sides). late_s: the
    sound starts so much later than the picture. hidden: so many first frames lie before time 0, behind an edit list.
    options: the container's, such as {"movflags": "faststart"}.
    """
    with av.open(str(path), "w", options=options or {}) as out:
        video = audio = None
        if frames is not None:
            video = out.add_stream(codec, rate=fps)
            video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
            if codec == "libx264":
                video.options = {"preset": "ultrafast", "crf": "10", "threads": "1"}
        if wave is not None:
            audio = out.add_stream("aac", rate=rate, layout="mono")
        for i, image in enumerate(frames if frames is not None else ()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            _mux(out, video, frame, -hidden / fps)
        if video:
            _mux(out, video, None, -hidden / fps)
        for at in range(0, len(wave) if wave is not None else 0, 1024):
            block = np.ascontiguousarray(wave[None, at : at + 1024], dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
            _mux(out, audio, frame, late_s)
        if audio:
            _mux(out, audio, None, late_s)
    return path


def _mux(out, stream, frame, shift_s):
    for packet in stream.encode(frame):
        shift = round(shift_s / packet.time_base)
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
        out.mux(packet)
