"""The stages of a run, one frozen dataclass each, and `load_config`, which reads a config file.

A config is a Python file that defines `stages = [...]` and, if it likes, `run_dir`. A field that names a file may hold
"@name", the output of an earlier stage (references.py).
"""
import re
import runpy
import traceback
from dataclasses import dataclass, fields, replace
from pathlib import Path

from minixmd.fields import ConfigError, check_prompt, check_types, kind, nearest, one_of, parse_field, require, stage
from minixmd.references import check_references

PROMPT = "{question}\n{options}\nRespond only with a single letter from {first} to {last}."


@stage
class Toy:
    """Makes a small world of audio and video files, its manifests, and the two models that start out in it."""

    name: str = "toy"
    seed: int = 0  # drives the world, both models and their training

    def __post_init__(self):
        check_types(self)
        require(self, "seed >= 0")


@stage
class Evaluate:
    """Letter accuracy of a model on a manifest."""

    name: str
    # what is asked
    model: str  # folder, hub name or "@train"
    manifest: str  # JSONL file
    media: str = "audio"  # "audio" | "video" | "both", one after the other | "sounded", a video with its track (Omni)
    prompt: str = PROMPT  # format string over {question} {options} {first} {last}
    # video
    fps: float = 1.0  # frames a second
    min_pixels: int = 100_352  # pixels a frame
    max_pixels: int = 262_144  # pixels a frame
    nframes: int | None = None  # frames a clip; None = by fps
    # how it runs
    batch_tokens: int = 8192  # tokens packed into a forward pass
    max_bad: float = 0.01  # share of bad clips above which the stage fails; 1 = never
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    impl: str = "auto"  # "triton" | "torch" | "auto", Triton kernels on a GPU and PyTorch elsewhere
    dtype: str = "float32"  # "float32" | "bfloat16" | "float16"
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        _check_asking(self)
        require(self, "batch_tokens >= 1")


@stage
class Label(Evaluate):
    """A model's predicted letters on a manifest, with the letters' logits; the fields are Evaluate's."""


@stage
class Switch:
    """Decides for every clip of a split whether the teacher is the stronger one."""

    name: str
    teacher: str  # results on the analysis split, "@evaluate"
    student: str  # results on the same split, "@evaluate"
    labels: str  # the student's letters for the split to decide on, "@label"

    def __post_init__(self):
        check_types(self)


@stage
class Train:
    """Trains a model on a manifest: on its labels ("sft") or on a teacher's ("distill")."""

    name: str
    objective: str  # "sft" | "distill"
    # what is asked
    model: str  # folder, hub name or "@train"
    manifest: str  # JSONL file
    val_manifest: str | None = None  # JSONL file; None = no validation
    media: str = "audio"  # "audio" | "video" | "both", one after the other | "sounded", a video with its track (Omni)
    prompt: str = PROMPT  # format string over {question} {options} {first} {last}
    # video
    fps: float = 1.0  # frames a second
    min_pixels: int = 100_352  # pixels a frame
    max_pixels: int = 262_144  # pixels a frame
    nframes: int | None = None  # frames a clip; None = by fps
    # distillation
    teacher_labels: str | None = None  # "@label"; needed by "distill"
    student_labels: str | None = None  # the student's own letters, "@label"; None = no anti-forgetting
    switch: str | None = None  # "@switch"; None = every clip follows the teacher
    # what trains
    trainable: str = "lora"  # "lora" | "full"
    lora_rank: int = 16
    lora_alpha: float = 32.0  # the update is scaled by lora_alpha / lora_rank
    lora_targets: str = r"model\.layers\..*_proj"  # regular expression that matches a whole module name
    # optimisation
    epochs: int = 1
    max_steps: int | None = None  # optimizer steps; None = epochs decide
    batch_size: int = 8  # sequences an optimizer step
    micro_batch_size: int = 8  # sequences a forward pass
    lr: float = 1e-4  # peak
    warmup: float = 0.1  # share of the steps; 0 = off
    weight_decay: float = 0.0  # 0 = off
    clip: float = 1.0  # gradient norm; 0 = off
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    # how it runs
    eval_every: int = 0  # optimizer steps; 0 = only at the end
    save_every: int = 100  # optimizer steps between resumable states; 0 = only at the end
    max_bad: float = 0.01  # share of bad clips above which the stage fails; 1 = never
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    impl: str = "auto"  # "triton" | "torch" | "auto", Triton kernels on a GPU and PyTorch elsewhere
    dtype: str = "float32"  # "float32" | "bfloat16" | "float16"; of the frozen weights: LoRA trains in float32
    seed: int = 0  # data order and new weights

    def __post_init__(self):
        check_types(self)
        _check_asking(self)
        one_of(self, "objective", "sft", "distill")
        one_of(self, "trainable", "lora", "full")
        require(self, "lora_rank >= 1", "lora_alpha > 0", "epochs >= 1", "max_steps >= 1", "batch_size >= 1",
                "micro_batch_size >= 1", "lr > 0", "warmup >= 0", "warmup <= 1", "weight_decay >= 0", "clip >= 0",
                "eps > 0", "eval_every >= 0", "save_every >= 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"config: betas must be >= 0 and < 1, got {self.betas}")
        if self.objective == "distill" and self.teacher_labels is None:
            raise ConfigError("config: objective 'distill' needs teacher_labels, got None")
        for name in ("teacher_labels", "student_labels", "switch"):
            if self.objective == "sft" and getattr(self, name) is not None:
                raise ConfigError(f"config: objective 'sft' does not use {name}, got {getattr(self, name)!r}")
        if self.student_labels is not None and self.switch is None:
            raise ConfigError(f"config: student_labels {self.student_labels!r} needs a switch, got None")
        if self.trainable == "full" and self.dtype != "float32":  # a 16-bit weight loses small updates
            raise ConfigError(f"config: trainable 'full' needs dtype 'float32', got {self.dtype!r}")
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(f"config: batch_size {self.batch_size} is not a multiple of micro_batch_size "
                              f"{self.micro_batch_size}")
        if self.eval_every and self.val_manifest is None:
            raise ConfigError(f"config: eval_every {self.eval_every} needs val_manifest, got None")
        try:
            re.compile(self.lora_targets)
        except re.error as error:
            raise ConfigError(f"config: lora_targets {self.lora_targets!r} is no regular expression: {error}") from None


@stage
class Report:
    """Prints and writes tables of accuracies."""

    name: str = "report"
    tables: dict[str, dict[str, str]]  # row title -> {column title: "@evaluate"}

    def __post_init__(self):
        check_types(self)


STAGES = (Toy, Evaluate, Label, Switch, Train, Report)


@dataclass(frozen=True)
class Config:
    run_dir: Path  # holds one directory a stage
    stages: tuple  # in the order they run; names are unique
    source: Path  # the config file


def load_config(source, overrides=()):
    """Runs a config file, applies the overrides in order (the last wins) and checks the whole.

    Args:
        source: path of a Python file, or the bare name of a bundled recipe.
        overrides: "stage.field=value", "field=value" (every stage that has the field) or "run_dir=path".
    Returns:
        Config; run_dir is `runs/<file stem>` unless the file or an override says otherwise.
    Raises:
        ConfigError: anything wrong in the file, its stages, their references or the overrides; one line.
    """
    source = _find(source)
    given = _run(source)
    run_dir, stages = given.get("run_dir", Path("runs") / source.stem), given.get("stages")
    if not isinstance(stages, (list, tuple)) or not stages:
        raise ConfigError(f"config: {source} defines no list of stages named 'stages'")
    for i, item in enumerate(stages):
        if not isinstance(item, STAGES):
            raise ConfigError(f"config: {source}: stages[{i}] must be a stage, got {item!r}")
        if item.name in [earlier.name for earlier in stages[:i]]:
            raise ConfigError(f"config: two stages are named {item.name!r}")
    changes = {item.name: {} for item in stages}
    for override in overrides:
        target, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"config: override {override!r} must read stage.field=value, field=value or run_dir=path")
        if target == "run_dir":
            run_dir = text
            continue
        for item, name in _targets(stages, target):
            changes[item.name][name] = parse_field(item, name, text)
    if not isinstance(run_dir, (str, Path)) or not str(run_dir):
        raise ConfigError(f"config: run_dir must be a path, got {run_dir!r}")
    # all of a stage's overrides at once: a pair such as batch_size and micro_batch_size may only fit together
    stages = tuple(replace(item, **changes[item.name]) for item in stages)
    check_references(stages)
    return Config(Path(run_dir), stages, source)


def _check_asking(item):
    """What Evaluate, Label and Train have in common."""
    one_of(item, "media", "audio", "video", "both", "sounded")
    one_of(item, "device", "auto", "cpu", "cuda")
    one_of(item, "impl", "auto", "triton", "torch")
    one_of(item, "dtype", "float32", "bfloat16", "float16")
    require(item, "fps > 0", "min_pixels >= 1", "nframes >= 2", "max_bad >= 0", "max_bad <= 1", "seed >= 0")
    if item.min_pixels > item.max_pixels:
        raise ConfigError(f"config: min_pixels {item.min_pixels} is more than max_pixels {item.max_pixels}")
    check_prompt(item.prompt)


def _find(source):
    """The file of a config: a path, or the bare name of a bundled recipe."""
    path, folder = Path(source), Path(__file__).parent / "recipes"
    if path.suffix == ".py" or path.name != str(source):
        if not path.is_file():
            raise ConfigError(f"config: no file {source}")
        return path
    names = sorted(recipe.stem for recipe in folder.glob("[!_]*.py"))
    if path.name not in names:
        raise ConfigError(f"config: no recipe {path.name!r}{nearest(path.name, names)} (available: {', '.join(names)})")
    return folder / f"{path.name}.py"


def _run(path):
    """The names that a config file defines. Whatever goes wrong in it becomes one line with the file and line."""
    try:
        return runpy.run_path(str(path))
    except SyntaxError as error:
        raise ConfigError(f"config: {error.filename or path}:{error.lineno or 1}: {error.msg}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = ":".join(map(str, [path, *lines[-1:]]))
        if isinstance(error, ConfigError):
            raise ConfigError(f"{error} ({where})") from error
        raise ConfigError(f"config: {where}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _targets(stages, target):
    """(stage, field) of every field that the left side of an override names."""
    name, dot, field = target.rpartition(".")
    chosen = [item for item in stages if not dot or item.name == name]
    if not chosen:
        raise ConfigError(f"config: no stage {name!r}{nearest(name, [item.name for item in stages])}")
    known = {known.name: None for item in chosen for known in fields(item)}
    if field not in known:
        who = f"{kind(type(chosen[0]))} {name!r} has no field" if dot else "no stage has a field"
        raise ConfigError(f"config: {who} {field!r}{nearest(field, known)}")
    if field == "name":
        raise ConfigError(f"config: a stage's name is set in the config file only, got override {target!r}")
    return [(item, field) for item in chosen if hasattr(item, field)]
