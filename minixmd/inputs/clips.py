"""A clip's file as an encoder takes it: read, cut to what is heard and resized to what is seen, and kept in a cache.

A cache is a folder of files named by a digest of the clip's content and of how it is read: sound as 16-bit FLAC, frames
as uint8 in safetensors. Each of its 256 parts takes its share of the limit, and at most a file a child beyond it; all
of it may be deleted at any time. With a cache all sound, found there or not, is rounded to 16 bits and clipped at 1."""
import hashlib
import io
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from minixmd.inputs.audio import SAMPLE_RATE, log_mel, num_audio_tokens, num_mel_frames
from minixmd.inputs.image import resize
from minixmd.inputs.media import MediaError, check_file, read_audio, read_frames
from minixmd.runs.files import write_bytes

LONGEST_S = 300  # of sound that is kept: no model here hears more


@dataclass(frozen=True)
class Cache:
    folder: str
    limit_gib: float  # of all its files

    def place(self, path, how):
        """Where the clip `path`, read so, is kept. Raises MediaError as reading it does."""
        check_file(path)
        digest = hashlib.blake2b(how.encode(), digest_size=16)
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise MediaError(path, "unreadable", error.strerror or str(error)) from None
        name = digest.hexdigest()
        return Path(self.folder, name[:2], name)

    def keep(self, place, data):
        """Writes `data`, if there is room. Raises OSError where the folder cannot be written."""
        place.parent.mkdir(parents=True, exist_ok=True)
        held = 0
        for entry in os.scandir(place.parent):
            with suppress(FileNotFoundError):  # another process has renamed it meanwhile
                held += entry.stat().st_size
        if held + len(data) <= self.limit_gib * 2**30 / 256:
            write_bytes(place, data, sync=False)


def load_clip(source, kind, options, cache=None):
    """What a model's Processor needs of a clip; of a file as numpy arrays, which a child process can send.

    source: path, 16 kHz mono wave (float tensor (S,)) or frames (uint8 tensor (T, 3, H, W)). kind: "audio", then
    (mel_MA, mel frames that hold sound); or "video", then (frames, (T, 3, H, W) uint8, and how many were picked a
    second, or None). options: max_s, seconds heard; or fps, nframes, min_pixels, max_pixels. Raises MediaError."""
    given = isinstance(source, torch.Tensor)
    if kind == "video":
        if given:
            return see(source, kind, options), options["fps"]
        frames_TCHW, sampled_fps = read_film(source, options, cache)
        return frames_TCHW.numpy(), sampled_fps
    max_s = options["max_s"]
    wave_S = source if given else read_sound(source, max_s, cache)
    frames = num_mel_frames(len(wave_S), max_s)
    if num_audio_tokens(frames) == 0:
        name = kind if given else source
        raise MediaError(name, "too short", f"{len(wave_S)} samples at 16 kHz; one audio token takes 321")
    mel_MA = log_mel(wave_S, max_s)
    return mel_MA if given else mel_MA.numpy(), frames


def read_sound(path, max_s, cache=None):
    """read_audio's first max_s seconds, (S,)."""
    if cache is None:
        return read_audio(path, max_s=max_s)
    place = cache.place(path, "sound")  # one for whoever hears how much of it
    try:
        samples_S, _ = soundfile.read(place, dtype="int16")
    except soundfile.LibsndfileError:  # it is not there, or not whole
        wave_S = read_audio(path, max_s=max(max_s, LONGEST_S))
        samples_S = (wave_S * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()
        flac = io.BytesIO()
        soundfile.write(flac, samples_S, SAMPLE_RATE, "PCM_16", format="FLAC")
        cache.keep(place, flac.getvalue())
    return torch.from_numpy(samples_S[:round(max_s * SAMPLE_RATE)]).float() / 32768


def read_film(path, options, cache=None):
    """read_frames' frames at the size that the model sees, and how many were picked a second."""
    fps, nframes, sizes = options["fps"], options["nframes"], (options["min_pixels"], options["max_pixels"])
    place = cache and cache.place(path, f"film {fps} {nframes} {sizes}")
    if place is not None and place.is_file():
        with suppress(SafetensorError, KeyError, TypeError, ValueError):  # it is not whole, and made again
            with safe_open(place, "pt") as file:
                return file.get_tensor("frames"), float(file.metadata()["fps"]) or None
    frames_TCHW, sampled_fps = read_frames(
        path, fps=fps, nframes=nframes, fit=lambda frames_1CHW, total: see(frames_1CHW, path, options, total))
    if place is not None:
        cache.keep(place, save({"frames": frames_TCHW.contiguous()}, {"fps": repr(sampled_fps or 0.0)}))
    return frames_TCHW, sampled_fps


def see(frames_TCHW, name, options, total=None):
    """Frames, of a video of `total`, at the size that the model sees them. name: for the message."""
    try:
        return resize(frames_TCHW, min_pixels=options["min_pixels"], max_pixels=options["max_pixels"], total=total)
    except ValueError as error:
        raise MediaError(name, "bad shape", str(error)) from None
