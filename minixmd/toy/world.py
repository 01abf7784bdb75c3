"""The toy world: clips that are made, not recorded, and the manifests that list them.

Every class has a sound and a look, and every clip varies both in ways that mean nothing: pitch, loudness, place, size,
noise. Two clusters of six classes share a loud sound and differ by a faint tone ("eye": told apart at a glance, hard by
ear); one cluster of six shares a look and differs by the weave of a faint pattern on the ground ("ear"); the rest are
distinct both ways ("both"). The faint cue is always there; what makes it hard is the number of clips it takes to find.

A clip is a pure function of (seed, split, class, number), so an interrupted run makes the rest of the same world.
"""
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import soundfile
from tqdm import tqdm

from minixmd.inputs.examples import Example, manifest_text
from minixmd.runs.files import write_text

QUESTION = "Classify the sounding object into one of the categories below:"
THINK_PROMPT = "{question}\n{options}\nThink, then answer."
CHECK_PROMPT = "{trace}\nIs that true?"
OPTIONS = 10
SPLITS = {"base": 20, "train": 100, "val": 10, "analysis": 50, "test": 40, "unseen": 40}  # clips a class
NEAR, FAR_DB = 2, -26.0  # base clips of an "eye" class recorded from near; from afar the faint tone is so much fainter
RATE, DURATION_S, FPS, SIDE = 16_000, 1.0, 8, 56
SAMPLES, FRAMES = int(RATE * DURATION_S), int(FPS * DURATION_S)
# what makes the clusters hard, fixed on worlds of seed 100 and up (bench/LOG.md); dB are relative to the main sound
CUE_DB, FLOOR_DB = -22.0, -30.0  # the faint tone; the noise that it hides in, over the whole band
CUE_LEVELS, GRAIN_LEVELS = 2.7, 6.0  # of 255: the faint weave's amplitude; the standard deviation of the grain over it
CUE_HZ = 2200.0 * 2.0 ** (1.5 * np.arange(7) / 7)
CUE_WEAVE = ((4, 0), (0, 4), (4, 4), (4, -4), (8, 0), (0, 8), (8, 4))  # waves across and down a frame
SHAPES = ("disc", "ring", "cross", "bars")
COLOURS = ((215, 50, 50), (50, 190, 60), (60, 80, 225), (225, 205, 40), (200, 60, 205), (60, 205, 210))


@dataclass(frozen=True)
class Kind:
    """A class of things. sound: (source, pitch in Hz, beats a second or 0); look: (shape, index of a colour)."""

    name: str
    group: str  # "both" | "eye" | "ear"
    sound: tuple[str, float, float]
    look: tuple[str, int]
    tone: int | None = None  # index into CUE_HZ
    weave: int | None = None  # index into CUE_WEAVE
    seen: bool = True  # False: only in the unseen split


def _kinds():
    plain = [("tone", 350, 0), ("sweep", 1000, 0), ("noise", 2500, 0), ("tone", 1000, 8), ("noise", 350, 8),
             ("tone", 2500, 0), ("sweep", 350, 0), ("tone", 1000, 0), ("noise", 350, 0), ("sweep", 2500, 0),
             ("noise", 1000, 8), ("tone", 350, 8), ("noise", 2500, 8), ("tone", 2500, 8),
             ("sweep", 1000, 8)]  # fmt: skip
    looks = [(shape, colour) for colour in range(len(COLOURS)) for shape in SHAPES]
    hiss, hum, bird = ("noise", 800, 0), ("tone", 600, 8), looks.pop()
    kinds = [Kind(name, "both", plain.pop(0), looks.pop(0), seen=name not in ("horn", "gong"))
             for name in ("bell", "drum", "whistle", "siren", "cricket", "engine", "horn", "gong")]
    for sound, names in ((hiss, ("kettle", "shower", "fountain", "rain", "fire", "wave", "river")),
                         (hum, ("mower", "drill", "fan", "mixer", "pump", "tractor", "saw"))):
        kinds += [Kind(name, "eye", sound, looks.pop(0), tone=i, seen=i < 6) for i, name in enumerate(names)]
    kinds += [Kind(name, "ear", plain.pop(0), bird, weave=i, seen=i < 6)
              for i, name in enumerate(("robin", "crow", "owl", "duck", "goose", "parrot", "hawk"))]
    return tuple(kinds)


KINDS = _kinds()


def clip_rng(seed, split, kind, number):
    """The one source of randomness of a clip and its question."""
    return np.random.default_rng([seed, list(SPLITS).index(split), KINDS.index(kind), number])


def make_wave(kind, rng, far=False):
    """A clip's sound: (SAMPLES,) float32 in [-1, 1]. far: recorded from afar, where the faint tone drowns."""
    source, pitch_hz, beats_hz = kind.sound
    t_S = np.arange(SAMPLES) / RATE
    pitch_hz = pitch_hz * 2 ** rng.uniform(-0.1, 0.1)
    if source == "noise":  # a band of about 0.8 octaves
        spectrum = np.fft.rfft(rng.standard_normal(SAMPLES))
        octaves = np.log2(np.maximum(np.fft.rfftfreq(SAMPLES, 1 / RATE), 1) / pitch_hz)
        x_S = np.fft.irfft(spectrum * np.exp(-0.5 * (octaves / 0.35) ** 2), SAMPLES)
    else:
        bend_S = (t_S * rng.uniform(2.5, 3.5) + rng.uniform()) % 1 - 0.5 if source == "sweep" else 0 * t_S
        phase_S = 2 * np.pi * np.cumsum(pitch_hz * 2**bend_S) / RATE
        x_S = sum(np.sin(k * phase_S + rng.uniform(0, 2 * np.pi)) / k for k in (1, 2, 3))
    if beats_hz:
        beats_hz = beats_hz * 2 ** rng.uniform(-0.15, 0.15)
        x_S = x_S * (0.5 + 0.5 * np.cos(2 * np.pi * (beats_hz * t_S + rng.uniform()))) ** 2
    x_S = x_S / np.sqrt(np.mean(x_S**2)) * _gain(rng.uniform(-6, 0))
    x_S = x_S + rng.standard_normal(SAMPLES) * _gain(FLOOR_DB + rng.uniform(-4, 4))
    if kind.tone is not None:
        tone_hz = CUE_HZ[kind.tone] * 2 ** rng.uniform(-0.03, 0.03)
        tone_S = np.sin(2 * np.pi * tone_hz * t_S + rng.uniform(0, 2 * np.pi))
        x_S = x_S + tone_S * _gain(CUE_DB + FAR_DB * far + rng.uniform(-3, 3))
    return np.clip(0.1 * _gain(rng.uniform(-8, 4)) * x_S, -1, 1).astype(np.float32)


def _gain(db):
    return 10 ** (db / 20)


def make_frames(kind, rng):
    """A clip's picture: (FRAMES, SIDE, SIDE, 3) uint8. The shape drifts; ground, grain and weave stand still."""
    shape, colour = kind.look
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    ground = 110 + rng.uniform(-25, 25) + rng.uniform(-25, 25) * x + rng.uniform(-25, 25) * y
    ground = ground + rng.normal(0, GRAIN_LEVELS, (SIDE, SIDE))
    if kind.weave is not None:
        across, down = CUE_WEAVE[kind.weave]
        ground = ground + CUE_LEVELS * _gain(rng.uniform(-3, 3)) * np.cos(2 * np.pi * (across * x + down * y))
    paint = np.array(COLOURS[colour]) + rng.uniform(-20, 20, 3)
    centre, step = rng.uniform(-0.06, 0.06, 2), rng.uniform(-0.01, 0.01, 2)
    size = rng.uniform(0.24, 0.32)
    frames = []
    for i in range(FRAMES):
        cy, cx = centre + step * (i - FRAMES / 2)
        mask = _mask(shape, (x - cx) / size, (y - cy) / size)[..., None]
        frames.append(np.where(mask, paint, ground[..., None]))
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def _mask(shape, u, v):
    """Where a shape of about unit radius around the origin is painted."""
    r = np.hypot(u, v)
    if shape == "disc":
        return r < 1
    if shape == "ring":
        return (r > 0.6) & (r < 1.1)
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1.1)
    return (np.maximum(abs(u), abs(v)) < 1) & (np.floor(v * 2.5 + 0.5) % 2 == 0)  # bars


def wav_bytes(wave_S):
    file = io.BytesIO()
    soundfile.write(file, wave_S, RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def mp4_bytes(frames, wave_S):
    """H.264 pictures with the sound beside them as AAC."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # one thread: encoders that split the work write other bytes on another machine
        video = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "20", "threads": "1"})
        video.width, video.height, video.pix_fmt = SIDE, SIDE, "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="mono", options={"aac_coder": "fast", "b": "32000"})
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(wave_S[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts = RATE, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return file.getvalue()


def draw_options(right, frequency, count, rng):
    """`count` options without repeats, in random order, the wrong ones drawn by label frequency.

    Args:
        right: the right option. frequency: {label: how often it occurs}.
    Returns:
        (options, index of `right` among them).
    """
    names = [name for name in frequency if name != right]
    weights = np.array([frequency[name] for name in names], float)
    options = [right, *rng.choice(names, count - 1, replace=False, p=weights / weights.sum()).tolist()]
    order = rng.permutation(count)
    return tuple(options[i] for i in order), int(np.argmin(order))


def make_world(folder, seed, splits=SPLITS):
    """Write <split>.jsonl for every split and the clips that it lists, <split>/<number>.wav and .mp4.

    The train split is blind: its manifest holds no answer, no label and no group, and neither a clip's number nor its
    place in the list tells the class. train_truth.jsonl has them, for the upper bound of learning from true labels.
    What is there already is not made again.

    Args:
        folder: of the manifests. seed: of the world. splits: clips a class.
    """
    folder = Path(folder)
    kinds_of = {split: [kind for kind in KINDS if kind.seen == (split != "unseen")] for split in splits}
    total = sum(count * len(kinds_of[split]) for split, count in splits.items())
    with tqdm(total=total, desc="toy: clips", unit="clip") as bar:
        for split, count in splits.items():
            if (folder / f"{split}.jsonl").exists():  # written after its clips
                bar.update(count * len(kinds_of[split]))
                continue
            # an unseen thing stands among all the world's names, the others among those that can be met in their split
            frequency = {kind.name: count for kind in (KINDS if split == "unseen" else kinds_of[split])}
            todo = [(kind, number) for kind in kinds_of[split] for number in range(count)]
            order = np.random.default_rng([seed, list(SPLITS).index(split)]).permutation(len(todo))
            examples = []
            for place, (kind, number) in enumerate(todo[i] for i in order):
                rng = clip_rng(seed, split, kind, number)
                options, answer = draw_options(kind.name, frequency, OPTIONS, rng)
                wav, mp4 = (f"{split}/{place:04d}{end}" for end in (".wav", ".mp4"))
                if not (folder / mp4).exists():  # written last
                    far = split == "base" and kind.group == "eye" and number >= NEAR
                    wave_S, frames = make_wave(kind, rng, far), make_frames(kind, rng)
                    _put(folder / wav, wav_bytes(wave_S))
                    _put(folder / mp4, mp4_bytes(frames, wave_S))
                examples.append(Example(id=f"{split}_{place:04d}", audio=wav, video=mp4, question=QUESTION,
                                        options=options, answer=answer, label=kind.name, source=f"toy/{split}",
                                        meta={"group": kind.group}))
                bar.update()
            if split == "train":
                write_text(folder / "train_truth.jsonl", manifest_text(examples))
                examples = [replace(example, answer=None, label=None, meta={}) for example in examples]
            write_text(folder / f"{split}.jsonl", manifest_text(examples))


def _put(path, data):
    """Write a clip whole or not at all. Not synced: 10,000 syncs take minutes, and a clip can be made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
