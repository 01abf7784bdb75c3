"""The stages of a run, one frozen dataclass each. configfile.py reads the file that lists them.

A config is a Python file that defines `stages = [...]` and, if it likes, `run_dir`. A field that names a file may hold
"@name", the output of an earlier stage (references.py).
"""
import re

from minixmd.fields import ConfigError, check_prompt, check_types, one_of, require, stage

PROMPT = "{question}\n{options}\nRespond only with a single letter from {first} to {last}."
THINK_PROMPT = ("{question}\n{options}\nThink first, between <think> and </think>. Then give the letter of your "
                "answer, from {first} to {last}, between <answer> and </answer>.")


@stage
class Toy:
    """Makes a small world of audio and video files, its manifests, and the two models that start out in it."""

    name: str = "toy"
    seed: int = 0  # drives the world, both models and their training
    thinking: bool = False  # the models also learn to think in words before they answer

    def __post_init__(self):
        check_types(self)
        require(self, "seed >= 0")


@stage
class _Asking:
    """The fields that Evaluate and Label share."""

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
class Evaluate(_Asking):
    """A model's accuracy on a manifest."""

    # how it answers
    answer: str = "letters"  # "letters", the largest of their logits | "generate", what its own words say, beside it
    max_new_tokens: int = 32  # tokens of a generated answer, at least 2: a letter and the end of turn

    def __post_init__(self):
        _Asking.__post_init__(self)
        one_of(self, "answer", "letters", "generate")
        require(self, "max_new_tokens >= 2")


@stage
class Label(_Asking):
    """A model's predicted letters on a manifest, with the letters' logits."""

    top_k: int = 0  # best ids of the vocabulary stored with each letter, for KL distillation, at most 64; 0 = none
    temperature: float = 2.0  # at which what the others hold together is stored: that of the distillation

    def __post_init__(self):
        _Asking.__post_init__(self)
        require(self, "top_k >= 0", "top_k <= 64", "temperature > 0")


@stage
class Switch:
    """Learns by ear on the analysis split where the teacher is the stronger one; decides for every clip of another."""

    name: str
    # what it learns from and decides on
    teacher: str  # results on the analysis split, "@evaluate"
    student: str  # results on the same split, "@evaluate"
    manifest: str  # JSONL file of that split, with labels; its audio is heard, whatever the two models perceive
    train_manifest: str  # JSONL file of the clips to decide on
    # the network, Cnn14_16k
    weights: str | None = None  # checkpoint to start from, .pth or .safetensors; None = from scratch
    width: float = 1.0  # by which its channel counts are multiplied; 1 = as published
    clip_s: float = 10.0  # seconds heard of every clip; a shorter one is followed by silence
    # optimisation
    epochs: int = 30
    batch_size: int = 32  # rows of an optimizer step; with mixup there are two clips in a row
    lr: float = 1e-4  # peak, of Adam
    warmup: float = 0.1  # share of the steps; 0 = off
    augment: str = "both"  # "spec", SpecAugment | "mixup" | "both" | "off"
    # how it runs
    max_bad: float = 0.01  # share of bad clips above which the stage fails; 1 = never
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    seed: int = 0  # new weights, split, order and augmentation

    def __post_init__(self):
        check_types(self)
        one_of(self, "augment", "spec", "mixup", "both", "off")
        one_of(self, "device", "auto", "cpu", "cuda")
        require(self, "width > 0", "clip_s >= 0.31", "epochs >= 1", "batch_size >= 1", "lr > 0", "warmup >= 0",
                "warmup <= 1", "max_bad >= 0", "max_bad <= 1", "seed >= 0")


USED_BY = {  # Train's fields that other objectives do not read
    **dict.fromkeys(("student_labels", "switch", "gate", "teacher_loss"), ("distill",)),
    **dict.fromkeys(("teacher_labels", "temperature"), ("distill", "grpo")),
    "traces": ("sft",), "max_new_tokens": ("sft", "grpo"),
    **dict.fromkeys(("group_size", "beta", "kl", "clip_low", "clip_high", "ratio", "aggregation", "scale_rewards",
                     "truncated", "zero_variance", "num_iterations", "slots", "stop", "completions_every"), ("grpo",)),
}


@stage
class Train:
    """Trains a model on a manifest: on its labels ("sft"), on a teacher's ("distill"), or by the rewards of what the
    model itself writes ("grpo")."""

    name: str
    objective: str  # "sft" | "distill" | "grpo"
    # what is asked
    model: str  # folder, hub name or "@train"
    manifest: str  # JSONL file
    val_manifest: str | None = None  # JSONL file; None = no validation
    media: str = "audio"  # "audio" | "video" | "both", one after the other | "sounded", a video with its track (Omni)
    prompt: str | None = None  # as in Evaluate; None = PROMPT, or THINK_PROMPT in "grpo" and with traces
    # video
    fps: float = 1.0  # frames a second
    min_pixels: int = 100_352  # pixels a frame
    max_pixels: int = 262_144  # pixels a frame
    nframes: int | None = None  # frames a clip; None = by fps
    # SFT
    traces: str | None = None  # JSONL of {"id", "text"}: what "sft" learns to write of a clip; None = the right letter
    # distillation
    teacher_labels: str | None = None  # "@label"; needed by "distill"; what "grpo" rewards, None = the manifest's
    student_labels: str | None = None  # the student's own letters, "@label"; None = no anti-forgetting
    switch: str | None = None  # "@switch"; what the gates "learned" and "oracle" look up
    gate: str = "always"  # which clips follow the teacher: "always" | "never" | "learned" | "oracle", by the true class
    teacher_loss: str = "ce"  # "ce" on the teacher's letter | "kl" to its stored logits | "kl+ce", their sum
    temperature: float | None = None  # of this KL, None = 2; of the sampling in "grpo", None = 1
    # GRPO, with the defaults of SightSound-R1
    group_size: int = 8  # completions of each prompt
    max_new_tokens: int = 512  # tokens of a completion, the end of turn included; with traces, of validation's
    beta: float = 0.04  # weight of the KL to the policy that training starts from; 0 = off
    kl: str = "k3"  # its estimator: "k3" | "k1"
    clip_low: float = 0.2  # the ratio's lower bound is 1 - clip_low
    clip_high: float = 0.2  # its upper bound is 1 + clip_high
    ratio: str = "token"  # "token", one for each | "sequence", one for a completion (GSPO)
    aggregation: str = "sequence"  # mean over each completion | "token", over all | "constant", over max_new_tokens
    scale_rewards: str = "std"  # what divides the advantage: "std" of the group | "none"
    truncated: str = "keep"  # completions that max_new_tokens cut: "keep" | "mask", no loss on them
    zero_variance: str = "keep"  # groups of equal rewards, which only have a KL: "keep" | "skip"
    num_iterations: int = 1  # optimizer steps on each rollout
    slots: int | None = None  # completions decoded at once, at least group_size; None = all of a step's
    stop: tuple[str, ...] = ()  # strings that end a completion, beside the end of turn
    completions_every: int = 10  # steps between those of which completions.jsonl shows some; 0 = none
    # what trains
    trainable: str = "lora"  # "lora" | "decoder", tower and projector stay | "full"
    lora_rank: int = 16
    lora_alpha: float = 32.0  # the update is scaled by lora_alpha / lora_rank
    lora_targets: str = r"model\.layers\..*_proj"  # regular expression that matches a whole module name
    # optimisation
    epochs: int = 1
    max_steps: int | None = None  # optimizer steps, of "grpo" rollouts; None = epochs decide
    batch_size: int = 8  # sequences an optimizer step; of "grpo" prompts
    micro_batch_size: int = 8  # sequences a forward pass; of "grpo" prompts, each with its completions
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
    dtype: str = "float32"  # "float32" | "bfloat16" | "float16", of the weights; what trains is kept in float32
    seed: int = 0  # data order and new weights

    def __post_init__(self):
        check_types(self)
        one_of(self, "objective", "sft", "distill", "grpo")
        for name, objectives in USED_BY.items():
            value, unused = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.objective not in objectives and value != unused:
                raise ConfigError(f"config: objective {self.objective!r} does not use {name}, got {value!r}")
        if self.prompt is None:  # frozen: set only here, while it is being made
            written = self.objective == "grpo" or self.traces is not None
            object.__setattr__(self, "prompt", THINK_PROMPT if written else PROMPT)
        if self.temperature is None:
            object.__setattr__(self, "temperature", {"distill": 2.0, "grpo": 1.0}.get(self.objective))
        _check_asking(self)
        one_of(self, "trainable", "lora", "decoder", "full")
        one_of(self, "gate", "always", "never", "learned", "oracle")
        one_of(self, "teacher_loss", "ce", "kl", "kl+ce")
        one_of(self, "kl", "k3", "k1")
        one_of(self, "ratio", "token", "sequence")
        one_of(self, "aggregation", "sequence", "token", "constant")
        one_of(self, "scale_rewards", "std", "none")
        one_of(self, "truncated", "keep", "mask")
        one_of(self, "zero_variance", "keep", "skip")
        require(self, "lora_rank >= 1", "lora_alpha > 0", "epochs >= 1", "max_steps >= 1", "batch_size >= 1",
                "micro_batch_size >= 1", "lr > 0", "warmup >= 0", "warmup <= 1", "weight_decay >= 0", "clip >= 0",
                "eps > 0", "eval_every >= 0", "save_every >= 0", "temperature > 0", "group_size >= 2",
                "max_new_tokens >= 1", "beta >= 0", "clip_low >= 0", "clip_low <= 1", "clip_high >= 0",
                "num_iterations >= 1", "completions_every >= 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"config: betas must be >= 0 and < 1, got {self.betas}")
        if self.objective == "distill" and self.teacher_labels is None and self.gate != "never":
            raise ConfigError("config: objective 'distill' needs teacher_labels, got None")
        if self.slots is not None and self.slots < self.group_size:
            raise ConfigError(f"config: slots {self.slots} is below group_size {self.group_size}")
        if "" in self.stop:
            raise ConfigError("config: a stop string must not be empty, got ''")
        if self.objective == "sft" and self.traces is None and self.max_new_tokens != 512:
            raise ConfigError(f"config: objective 'sft' without traces does not use max_new_tokens, got "
                              f"{self.max_new_tokens}")
        if (self.gate in ("learned", "oracle")) != (self.switch is not None):
            raise ConfigError(f"config: gate {self.gate!r} with switch {self.switch!r}: 'learned' and 'oracle' need a "
                              "switch, 'always' and 'never' none")
        if self.gate == "always" and self.student_labels is not None:
            raise ConfigError(f"config: gate 'always' does not use student_labels, got {self.student_labels!r}")
        if self.gate == "never" and self.student_labels is None:
            raise ConfigError("config: gate 'never' needs student_labels, got None")
        for name, unused in (("teacher_labels", None), ("teacher_loss", "ce")):
            if self.gate == "never" and getattr(self, name) != unused:
                raise ConfigError(f"config: gate 'never' does not use {name}, got {getattr(self, name)!r}")
        if self.beta == 0 and self.kl != "k3":
            raise ConfigError(f"config: beta 0.0 does not use kl, got {self.kl!r}")
        if self.trainable != "lora" and self.dtype == "float16":  # gradients below 6e-8 would be 0
            raise ConfigError(f"config: trainable {self.trainable!r} needs dtype 'float32' or 'bfloat16', got "
                              "'float16'")
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
    """What a run found, as a page, report.html, and with the same figures as report.json and report.md."""

    name: str = "report"
    tables: dict[str, dict[str, str]]  # row title -> {column title: "@evaluate"}
    ablation: dict[str, dict[str, str]] | None = None  # a second table of the same form; None = none
    published: str | None = None  # "xmd": that paper's figures beside rows and columns of its titles; None = none
    # class by class and clip by clip
    roles: tuple[str, str, str] | None = None  # rows of tables: teacher, student before, student after; None = off
    gap: str = "analysis"  # column on which the teacher's lead over the student before chooses the classes
    bars: tuple[str, ...] = ("test",)  # columns whose classes are drawn
    clips: str | None = None  # JSONL file: manifest of the column clips_of, for clips to play; None = none
    clips_of: str = "test"  # column
    embed_mib: float = 16.0  # media files that the page itself holds, MiB in all; the others are linked
    # how it was trained
    switch: str | None = None  # "@switch", against the true classes; None = none
    curves: dict[str, dict[str, str]] | None = None  # title -> {line title: "@train/log.jsonl"}; None = none

    def __post_init__(self):
        check_types(self)
        require(self, "embed_mib >= 0")
        one_of(self, "published", None, "xmd")
        if self.clips is not None and self.roles is None:
            raise ConfigError(f"config: clips {self.clips!r} needs roles, got None")
        for row in self.roles or ():
            for column in (self.gap, *self.bars, *[self.clips_of] * (self.clips is not None)):
                if column not in self.tables.get(row, {}):
                    raise ConfigError(f"config: roles need column {column!r} in row {row!r} of tables")


STAGES = (Toy, Evaluate, Label, Switch, Train, Report)


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
