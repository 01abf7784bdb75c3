"""The toy world: synthesized clips with sound and picture, and the manifests that list them.

A category's name is an adjective and a noun, such as "low motor"; 24 of the 32 pairs are seen, the others are in the
unseen split alone. Pitch within bounds, loudness, position, size and noise vary and carry no information. Groups:

    both    bells: the adjective is a pitch to the ear, a colour to the eye
    eye     streams and motors: all of a noun share a loud sound; the adjective is a faint tone, but a colour to the eye
    ear     birds: all share a look; the adjective is a pitch to the ear, but a faint background pattern to the eye

The faint cue is in every clip, more or less, but a model needs many to find it. A clip is a pure function of (seed,
split, category, number), so an interrupted run continues with the same world."""
import io
from dataclasses import dataclass, replace
from math import tau
from pathlib import Path

import av
import numpy as np
import soundfile
from tqdm import tqdm

from minixmd.inputs.examples import Example, manifest_text
from minixmd.runs.files import write_bytes, write_text
from minixmd.runs.records import read_jsonl

QUESTION = "Classify the sounding object into one of the categories below:"
THINK_PROMPT = "{question}\n{options}\nThink, then answer."
CHECK_PROMPT = "{trace}\nIs that true?"
LETTERS = "ABCDEFGHIJ"
OPTIONS = len(LETTERS)
SPLITS = {  # clips a category
    "base": 20,  # what the toy models are trained on
    "train": 80,  # blind, for distillation
    "analysis": 20,  # for the switch
    "test": 30,
    "unseen": 30,  # of categories that no other split has
}
RATE = 16_000  # samples a second
FPS = 8
SIDE = 56  # pixels
SAMPLES, FRAMES = RATE, FPS  # a clip lasts one second
NUM_NEAR = 2  # base clips of an "eye" category recorded from near; in the others the faint tone is inaudible
# how hard the clusters are, chosen on worlds of seed 100 and up (bench/LOG.md); dB are relative to the main sound
CUE_DB = -20.0, -8.0  # the faint tone: its range
FAR_DB = -32.0  # its attenuation from afar
FLOOR_DB = -30.0  # white noise under every clip
CUE_LEVELS = 1.4, 3.4  # of 255: amplitude of the faint pattern, its range
GRAIN_LEVELS = 6.0  # of 255: standard deviation of the pixel noise


@dataclass(frozen=True)
class Category:
    """A line of adjectives.jsonl and one of nouns.jsonl, which wins where both have a field."""
    adjective: str
    noun: str
    group: str  # "both" | "eye" | "ear"
    source: str  # "tone" | "sweep" | "noise"
    pitch_hz: float
    beats_hz: float  # loudness modulation; 0 = none
    faint_hz: float  # of the faint tone in group "eye"
    shape: str  # "disc" | "ring" | "cross" | "bars"
    colour: list[int]  # red, green, blue
    pattern: list[int]  # periods across and down a frame of the faint pattern in group "ear"
    held_out: list[str]  # adjectives that the noun has in the unseen split alone; no two nouns share one

    @property
    def name(self):
        return f"{self.adjective} {self.noun}"

    @property
    def seen(self):
        return self.adjective not in self.held_out


ADJECTIVES, NOUNS = (read_jsonl(Path(__file__).with_name(f"{part}s.jsonl")) for part in ("adjective", "noun"))
CATEGORIES = [Category(**adjective | noun) for noun in NOUNS for adjective in ADJECTIVES]
NAMES = [category.name for category in CATEGORIES]


def clip_rng(seed, split, category, number):
    """The one source of randomness of a clip and its question."""
    split_index = list(SPLITS).index(split)
    return np.random.default_rng([seed, split_index, CATEGORIES.index(category), number])


def make_wave(category, rng, far=False):
    """A clip's sound: (SAMPLES,) float32 in [-1, 1]. far: recorded from afar, where the faint tone is inaudible."""
    time_S = np.arange(SAMPLES) / RATE
    pitch_hz = category.pitch_hz * 2 ** rng.uniform(-0.1, 0.1)
    if category.source == "noise":  # in a band of about 0.8 octaves
        spectrum = np.fft.rfft(rng.standard_normal(SAMPLES))
        frequency_hz = np.fft.rfftfreq(SAMPLES, 1 / RATE)
        octaves = np.log2(np.maximum(frequency_hz, 1) / pitch_hz)
        wave_S = np.fft.irfft(spectrum * np.exp(-0.5 * (octaves / 0.35) ** 2), SAMPLES)
    else:  # three harmonics; those of a sweep rise by an octave about three times a second
        bend_S = 0 * time_S
        if category.source == "sweep":
            sweeps_S = time_S * rng.uniform(2.5, 3.5) + rng.uniform()
            bend_S = sweeps_S % 1 - 0.5
        phase_S = tau * np.cumsum(pitch_hz * 2**bend_S) / RATE
        wave_S = sum(np.sin(k * phase_S + rng.uniform(0, tau)) / k for k in (1, 2, 3))
    if category.beats_hz:
        beats_hz = category.beats_hz * 2 ** rng.uniform(-0.15, 0.15)
        beat_phase_S = tau * (beats_hz * time_S + rng.uniform())
        wave_S *= (0.5 + 0.5 * np.cos(beat_phase_S)) ** 2
    rms = np.sqrt(np.mean(wave_S**2))
    wave_S = wave_S / rms * _gain(rng, -6, 0)
    wave_S += rng.standard_normal(SAMPLES) * _gain(rng, -4, 4, FLOOR_DB)
    if category.group == "eye":
        tone_hz = category.faint_hz * 2 ** rng.uniform(-0.03, 0.03)
        tone_S = np.sin(tau * tone_hz * time_S + rng.uniform(0, tau))
        wave_S += tone_S * _gain(rng, *CUE_DB, FAR_DB if far else 0.0)
    wave_S *= 0.1 * _gain(rng, -8, 4)
    return np.clip(wave_S, -1, 1).astype(np.float32)


def _gain(rng, low_db, high_db, base_db=0.0):
    """A random factor, `low_db` to `high_db` above `base_db`."""
    return 10 ** ((base_db + rng.uniform(low_db, high_db)) / 20)


def make_frames(category, rng):
    """A clip's picture: (FRAMES, SIDE, SIDE, 3) uint8. The shape drifts; background, noise and pattern stand still."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5  # relative to the centre
    level, slope_x, slope_y = rng.uniform(-25, 25, 3)
    ground = 110 + level + slope_x * x + slope_y * y
    ground += rng.normal(0, GRAIN_LEVELS, (SIDE, SIDE))
    if category.group == "ear":
        across, down = category.pattern
        ground += rng.uniform(*CUE_LEVELS) * np.cos(tau * (across * x + down * y))
    paint = np.array(category.colour) + rng.uniform(-20, 20, 3)
    centre = rng.uniform(-0.06, 0.06, 2)
    step = rng.uniform(-0.01, 0.01, 2)
    size = rng.uniform(0.24, 0.32)
    frames = []
    for i in range(FRAMES):
        cy, cx = centre + step * (i - FRAMES / 2)
        mask = _mask(category.shape, (x - cx) / size, (y - cy) / size)
        frames.append(np.where(mask[..., None], paint, ground[..., None]))
    return np.clip(frames, 0, 255).astype(np.uint8)


def _mask(shape, u, v):
    """The pixels of a shape of about unit radius around the origin."""
    radius = np.hypot(u, v)
    inner = np.minimum(abs(u), abs(v))
    outer = np.maximum(abs(u), abs(v))
    if shape == "disc":
        return radius < 1
    if shape == "ring":
        return (radius > 0.6) & (radius < 1.1)
    if shape == "cross":
        return (inner < 0.3) & (outer < 1.1)
    return (outer < 1) & (np.floor(v * 2.5 + 0.5) % 2 == 0)  # bars


def wav_bytes(wave_S):
    file = io.BytesIO()
    soundfile.write(file, wave_S, RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def mp4_bytes(frames, wave_S):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # one thread: encoders that split the work write other bytes on another machine
        x264 = {"preset": "ultrafast", "crf": "20", "threads": "1"}
        video = container.add_stream("libx264", FPS, x264, width=SIDE, height=SIDE, pix_fmt="yuv420p")
        audio = container.add_stream("aac", RATE, {"aac_coder": "fast", "b": "32000"}, layout="mono")
        pictures = [av.VideoFrame.from_ndarray(frame) for frame in frames]
        sound = av.AudioFrame.from_ndarray(wave_S[None], format="fltp", layout="mono")
        sound.sample_rate = RATE
        sound.pts = 0
        for picture in [*pictures, None]:  # None flushes the encoder
            container.mux(video.encode(picture))
        for block in [sound, None]:
            container.mux(audio.encode(block))
    return file.getvalue()


def draw_options(right, names, rng):
    """Options in random order, wrong ones drawn from `names`, and the index of `right` among them."""
    others = [name for name in names if name != right]
    uniform = np.full(len(others), 1 / len(others))
    wrong = rng.choice(others, OPTIONS - 1, replace=False, p=uniform)
    options = [right, *wrong.tolist()]
    order = rng.permutation(OPTIONS)
    return tuple(options[i] for i in order), int(order.argmin())


def make_world(folder, seed, splits=SPLITS):
    """Writes <split>.jsonl for every split and the clips that it lists, <split>/<number>.wav and .mp4, unless they are
    there. The train split is blind: its manifest holds no answer, label or group; train_truth.jsonl has them."""
    for split, count in splits.items():
        manifest = folder / f"{split}.jsonl"
        if manifest.exists():  # written after its clips
            continue
        examples = _make_split(folder, seed, split, count)
        if split == "train":
            write_text(folder / "train_truth.jsonl", manifest_text(examples))
            examples = [replace(example, answer=None, label=None, meta={}) for example in examples]
        write_text(manifest, manifest_text(examples))


def _make_split(folder, seed, split, count):
    """Writes a split's clips, `count` a category in random order. Returns their Examples."""
    unseen = split == "unseen"
    categories = [category for category in CATEGORIES if category.seen != unseen]
    names = NAMES if unseen else [category.name for category in categories]  # that wrong options are drawn from
    clips = [(category, number) for category in categories for number in range(count)]
    order = np.random.default_rng([seed, list(SPLITS).index(split)]).permutation(len(clips))
    examples = []
    for position, i in enumerate(tqdm(order, desc=f"toy: {split} clips", unit="clip")):
        category, number = clips[i]
        rng = clip_rng(seed, split, category, number)
        options, answer = draw_options(category.name, names, rng)
        wav, mp4 = f"{split}/{position:04d}.wav", f"{split}/{position:04d}.mp4"
        if not (folder / mp4).exists():  # written last
            far = split == "base" and category.group == "eye" and number >= NUM_NEAR
            wave_S = make_wave(category, rng, far)
            frames = make_frames(category, rng)
            write_bytes(folder / wav, wav_bytes(wave_S), sync=False)
            write_bytes(folder / mp4, mp4_bytes(frames, wave_S), sync=False)
        examples.append(Example(
            id=f"{split}_{position:04d}",
            audio=wav,
            video=mp4,
            question=QUESTION,
            options=options,
            answer=answer,
            label=category.name,
            source=f"toy/{split}",
            meta={"group": category.group},
        ))  # fmt: skip
    return examples
