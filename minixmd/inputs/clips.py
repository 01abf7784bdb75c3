"""A clip's file as an encoder takes it: read, cut to what is heard and resized to what is seen."""
from minixmd.inputs.audio import log_mel, num_audio_tokens, num_mel_frames
from minixmd.inputs.image import resize
from minixmd.inputs.media import MediaError, read_audio, read_frames


def load_clip(path, kind, options):
    """What a model's Processor needs of a file, as numpy arrays, which a child process can send.

    kind: "audio", then (mel_MA, mel frames that hold sound); or "video", then (frames, (T, 3, H, W) uint8, and how many
    were picked a second, or None). options: of hear or see. Raises MediaError.
    """
    if kind == "audio":
        mel_MA, frames = hear(read_audio(path, max_s=options["max_s"]), path, **options)
        return mel_MA.numpy(), frames
    frames_TCHW, sampled_fps = read_frames(path, fps=options["fps"], nframes=options["nframes"])
    return see(frames_TCHW, path, options["min_pixels"], options["max_pixels"]).numpy(), sampled_fps


def hear(wave_S, name, max_s):
    """(mel_MA, mel frames that hold sound) of a wave's first max_s seconds. name: for the message."""
    frames = num_mel_frames(len(wave_S), max_s)
    if num_audio_tokens(frames) == 0:
        raise MediaError(name, "too short", f"{len(wave_S)} samples at 16 kHz; one audio token takes 321")
    return log_mel(wave_S, max_s), frames


def see(frames_TCHW, name, min_pixels, max_pixels):
    """Frames at the size that the model sees them."""
    try:
        return resize(frames_TCHW, min_pixels=min_pixels, max_pixels=max_pixels)
    except ValueError as error:
        raise MediaError(name, "bad shape", str(error)) from None
