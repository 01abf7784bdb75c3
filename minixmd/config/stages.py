"""The stages of a run, one frozen dataclass each. configfile.py reads the file that lists them.

A config is a Python file that defines `stages = [...]` and, if it likes, `run_dir`. A field that names a file may hold
"@name", the output of an earlier stage (references.py).
"""
import re

from minixmd.config.prompts import AUDIO_COT_PROMPT, CHECK_PROMPT, PROMPT, THINK_PROMPT
from minixmd.config.schema import (
    ConfigError,
    check_asking,
    check_prompt,
    check_types,
    check_url,
    one_of,
    require,
    stage,
)


@stage
class Toy:
    """Makes a small world of audio and video files, its manifests, and the models that start out in it."""

    name: str = "toy"
    seed: int = 0  # drives the world, both models and their training
    thinking: bool = False  # the teacher also learns to think before it answers, at times of a sound that is not there;
    # the student has read such thoughts; a third model, the checker, learns to hear what is true

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
    backend: str = "auto"  # "triton" | "torch" | "auto", Triton kernels on a GPU and PyTorch elsewhere
    dtype: str = "float32"  # "float32" | "bfloat16" | "float16"
    seed: int = 0

    def __post_init__(self, needs=("options",)):
        check_types(self)
        check_asking(self, needs)
        require(self, "batch_tokens >= 1")


@stage
class Evaluate(_Asking):
    """A model's accuracy on a manifest."""

    # how it answers
    answer: str = "letters"  # "letters", the largest of their logits | "generate", what its own words say, beside it
    max_new_tokens: int = 32  # tokens of a generated answer, at least 2: a letter and the end of turn
    rule: str = "option"  # how its words are read: "option", the letter or the most similar option | "mmau", MMAU's own
    n: int = 1  # answers sampled, of which the commonest counts; 1 = one
    temperature: float = 0.0  # of the sampling; 0 = greedy
    stop: tuple[str, ...] = ()  # strings that end an answer, beside the end of turn
    traces: str | None = None  # "@traces": the clip's first trace that fits the prompt's {trace}; None = none

    def __post_init__(self):
        _Asking.__post_init__(self, ("options",) if self.traces is None else ("options", "trace"))
        one_of(self, "answer", "letters", "generate")
        one_of(self, "rule", "option", "mmau")
        require(self, "max_new_tokens >= 2", "n >= 1", "temperature >= 0")
        if self.answer == "letters":
            for name, unused in (("rule", "option"), ("n", 1), ("temperature", 0.0), ("stop", ())):
                if getattr(self, name) != unused:
                    raise ConfigError(f"config: answer 'letters' does not use {name}, got {getattr(self, name)!r}")
        if "" in self.stop:
            raise ConfigError("config: a stop string must not be empty, got ''")
        if self.n > 1 and self.temperature == 0:
            raise ConfigError(f"config: n {self.n} at temperature 0.0 would give {self.n} equal answers")


@stage
class Label(_Asking):
    """A model's predicted letters on a manifest, with the letters' logits."""

    top_k: int = 0  # best ids of the vocabulary stored with each letter, for KL distillation, at most 64; 0 = none
    temperature: float = 2.0  # at which what the others hold together is stored: that of the distillation

    def __post_init__(self):
        _Asking.__post_init__(self)
        require(self, "top_k >= 0", "top_k <= 64", "temperature > 0")


@stage
class _Remote:
    """The fields of a stage that may ask an OpenAI-compatible endpoint in place of a model here."""

    endpoint: str | None = None  # base URL, such as http://localhost:8000/v1; None = no endpoint
    served: str | None = None  # the model's name there
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key, if the endpoint wants one
    concurrency: int = 8  # requests at a time
    timeout_s: float = 120.0  # of a request
    attempts: int = 5  # of a request that times out, cannot connect, meets a server error or brings nonsense
    retry_backoff_s: float = 1.0  # before the second attempt; each further one waits twice as long

    def check_remote(self, model):
        """Either an endpoint with the model's name there, or a model."""
        require(self, "concurrency >= 1", "timeout_s > 0", "attempts >= 1", "retry_backoff_s >= 0")
        if (self.endpoint is None) == (model is None):
            raise ConfigError(f"config: either model or endpoint must be given, got {model!r} and {self.endpoint!r}")
        if self.endpoint is not None:
            check_url(self.endpoint)
        if (self.endpoint is None) != (self.served is None):
            raise ConfigError(f"config: endpoint {self.endpoint!r} with served {self.served!r}: both or neither")


@stage
class Traces(_Asking, _Remote):
    """A teacher's chains of thought on a manifest, several a clip; those on which all agree are marked."""

    model: str | None = None  # folder, hub name or "@train"; None = an endpoint
    media: str = "video"  # as in Evaluate; an endpoint is shown "video" or "audio"
    prompt: str = AUDIO_COT_PROMPT  # as in Evaluate
    # how it samples
    n: int = 8  # samples a clip
    temperature: float = 1.0  # of the sampling
    max_new_tokens: int = 512  # of a sample, the end of turn included; a longer one is not used
    decode_slots: int | None = None  # samples decoded at once, at least n; None = 8 n

    def __post_init__(self):
        _Asking.__post_init__(self)
        self.check_remote(self.model)
        require(self, "n >= 1", "temperature > 0", "max_new_tokens >= 2")
        if self.decode_slots is not None and self.decode_slots < self.n:
            raise ConfigError(f"config: decode_slots {self.decode_slots} is below n {self.n}")
        if self.endpoint is not None:
            one_of(self, "media", "video", "audio")
            for name in ("fps", "min_pixels", "max_pixels", "nframes"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(f"config: the server at an endpoint chooses the frames and does not use {name}, "
                                      f"got {getattr(self, name)!r}")


@stage
class FactCheck(_Remote):
    """Hears the clip of each trace and accepts or rejects what it says (audio-grounded fact verification)."""

    name: str
    # what is judged
    traces: str  # "@traces"
    manifest: str  # JSONL file of the clips
    trace_filter: str = "used"  # "used", first traces and unanimous ones | "all" | "calibration", `limit` of them
    limit: int | None = None  # traces of "calibration", at most one a clip, drawn by seed
    checker: str = "model"  # "model" | "endpoint" | "verifier", trained on another's verdicts | "verdicts", as given
    threshold: float = 0.0  # a trace is accepted above it; scores are log-odds of yes (endpoints without: +1, -1)
    # who judges
    model: str | None = None  # of "model" the one that hears; of "verifier" the one whose decoder reads the traces
    prompt: str = CHECK_PROMPT  # format string over {trace} and what Evaluate has
    verdicts: str | None = None  # "@factcheck/verdicts.jsonl": what "verifier" learns from, or "verdicts" takes over
    logprobs: bool = True  # of "endpoint"; False for a server that refuses them: scores are then +1 and -1
    # the trained verifier: a Cnn14 beside the decoder's mean hidden state
    weights: str | None = None  # checkpoint to start from, .pth or .safetensors; None = from scratch
    width: float = 1.0  # by which its channel counts are multiplied; 1 = as published
    clip_s: float = 10.0  # seconds heard of every clip; a shorter one is followed by silence
    epochs: int = 30
    batch_size: int = 32  # traces of an optimizer step
    lr: float = 1e-4  # peak, of Adam
    warmup_ratio: float = 0.1  # share of the steps; 0 = off
    # how it runs
    batch_tokens: int = 8192  # tokens packed into a forward pass
    max_bad: float = 0.01  # share of traces that could not be judged above which the stage fails; 1 = never
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    backend: str = "auto"  # "triton" | "torch" | "auto", Triton kernels on a GPU and PyTorch elsewhere
    dtype: str = "float32"  # "float32" | "bfloat16" | "float16"
    seed: int = 0  # of the calibration set and the verifier

    def __post_init__(self):
        check_types(self)
        one_of(self, "checker", "model", "endpoint", "verifier", "verdicts")
        one_of(self, "trace_filter", "used", "all", "calibration")
        one_of(self, "device", "auto", "cpu", "cuda")
        one_of(self, "backend", "auto", "triton", "torch")
        one_of(self, "dtype", "float32", "bfloat16", "float16")
        require(self, "limit >= 2", "width > 0", "clip_s >= 0.31", "epochs >= 1", "batch_size >= 2", "lr > 0",
                "warmup_ratio >= 0", "warmup_ratio <= 1", "batch_tokens >= 1", "max_bad >= 0", "max_bad <= 1", "seed >= 0")
        check_prompt(self.prompt, ("trace",))
        if (self.trace_filter == "calibration") != (self.limit is not None):
            raise ConfigError(f"config: trace_filter {self.trace_filter!r} with limit {self.limit!r}: 'calibration' needs one, the "
                              "others none")
        needs = {"model": ("model",), "endpoint": ("endpoint", "served"), "verifier": ("model", "verdicts"),
                 "verdicts": ("verdicts",)}[self.checker]
        for name in ("model", "endpoint", "served", "verdicts"):
            if (getattr(self, name) is not None) != (name in needs):
                raise ConfigError(f"config: checker {self.checker!r} {'needs' if name in needs else 'does not use'} "
                                  f"{name}, got {getattr(self, name)!r}")
        if self.checker == "endpoint":
            self.check_remote(None)
        elif not self.logprobs:
            raise ConfigError(f"config: checker {self.checker!r} does not use logprobs, got False")


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
    warmup_ratio: float = 0.1  # share of the steps; 0 = off
    augment: str = "both"  # "spec", SpecAugment | "mixup" | "both" | "off"
    # how it runs
    max_bad: float = 0.01  # share of bad clips above which the stage fails; 1 = never
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    seed: int = 0  # new weights, split, order and augmentation

    def __post_init__(self):
        check_types(self)
        one_of(self, "augment", "spec", "mixup", "both", "off")
        one_of(self, "device", "auto", "cpu", "cuda")
        require(self, "width > 0", "clip_s >= 0.31", "epochs >= 1", "batch_size >= 1", "lr > 0", "warmup_ratio >= 0",
                "warmup_ratio <= 1", "max_bad >= 0", "max_bad <= 1", "seed >= 0")


USED_BY = {  # Train's fields that other objectives do not read
    **dict.fromkeys(("student_labels", "switch", "gate", "teacher_loss"), ("distill",)),
    **dict.fromkeys(("teacher_labels", "temperature"), ("distill", "grpo")),
    "traces": ("sft",), "trace_filter": ("sft",), "max_new_tokens": ("sft", "grpo"),
    **dict.fromkeys(("group_size", "beta", "kl", "clip_low", "clip_high", "ratio", "aggregation", "scale_rewards",
                     "truncated", "zero_variance", "num_iterations", "decode_slots", "stop", "completions_every"), ("grpo",)),
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
    trace_filter: str = "all"  # of the traces: "all" | "first", the first sample of a clip | "unanimous", if all samples agree
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
    decode_slots: int | None = None  # completions decoded at once, at least group_size; None = all of a step's
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
    warmup_ratio: float = 0.1  # share of the steps; 0 = off
    weight_decay: float = 0.0  # 0 = off
    clip: float = 1.0  # gradient norm; 0 = off
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    # how it runs
    eval_every: int = 0  # optimizer steps; 0 = only at the end
    save_every: int = 100  # optimizer steps between resumable states; 0 = only at the end and to validate
    max_bad: float = 0.01  # share of bad clips above which the stage fails; 1 = never
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    backend: str = "auto"  # "triton" | "torch" | "auto", Triton kernels on a GPU and PyTorch elsewhere
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
        check_asking(self)
        one_of(self, "trace_filter", "all", "first", "unanimous")
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
                "micro_batch_size >= 1", "lr > 0", "warmup_ratio >= 0", "warmup_ratio <= 1", "weight_decay >= 0", "clip >= 0",
                "eps > 0", "eval_every >= 0", "save_every >= 0", "temperature > 0", "group_size >= 2",
                "max_new_tokens >= 1", "beta >= 0", "clip_low >= 0", "clip_low <= 1", "clip_high >= 0",
                "num_iterations >= 1", "completions_every >= 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"config: betas must be >= 0 and < 1, got {self.betas}")
        if self.objective == "distill" and self.teacher_labels is None and self.gate != "never":
            raise ConfigError("config: objective 'distill' needs teacher_labels, got None")
        if self.decode_slots is not None and self.decode_slots < self.group_size:
            raise ConfigError(f"config: decode_slots {self.decode_slots} is below group_size {self.group_size}")
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
        # in float16 gradients below 6e-8 are 0: those of weights, and of logits where thousands of tokens share a step
        for name, value in (("objective", "grpo"), ("trainable", "decoder"), ("trainable", "full")):
            if self.dtype == "float16" and getattr(self, name) == value:
                raise ConfigError(f"config: {name} {value!r} needs dtype 'float32' or 'bfloat16', got 'float16'")
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
    published: str | None = None  # "xmd" | "sightsound": that paper's figures beside rows and columns of its titles
    # class by class and clip by clip
    roles: tuple[str, str, str] | None = None  # rows of tables: teacher, student before, student after; None = off
    gap: str = "analysis"  # column on which the teacher's lead over the student before chooses the classes
    bars: tuple[str, ...] = ("test",)  # columns whose classes are drawn
    clips: str | None = None  # JSONL file: manifest of the column clips_of, for clips to play; None = none
    clips_of: str = "test"  # column
    embed_mib: float = 16.0  # media files that the page itself holds, MiB in all; the others are linked
    gallery: tuple[str, ...] = ()  # rows whose answers stand beside each clip; () = those of roles
    traces: str | None = None  # "@traces" on these clips, to stand beside them; None = none
    verdicts: str | None = None  # "@factcheck/verdicts.jsonl" on those traces; None = none
    # how the traces came about: title -> {"traces" | "checked" | "verifier": "@stage/results.json"}
    funnel: dict[str, dict[str, str]] | None = None  # None = none
    # how it was trained
    switch: str | None = None  # "@switch", against the true classes; None = none
    curves: dict[str, dict[str, str]] | None = None  # title -> {line title: "@train/log.jsonl"}; None = none

    def __post_init__(self):
        check_types(self)
        require(self, "embed_mib >= 0")
        one_of(self, "published", None, "xmd", "sightsound")
        if self.clips is not None and self.roles is None and not self.gallery:
            raise ConfigError(f"config: clips {self.clips!r} needs roles or a gallery, got neither")
        for name in ("gallery", "traces", "verdicts"):
            if getattr(self, name) and self.clips is None:
                raise ConfigError(f"config: {name} {getattr(self, name)!r} needs clips, got None")
        if self.verdicts is not None and self.traces is None:
            raise ConfigError(f"config: verdicts {self.verdicts!r} needs traces, got None")
        if self.traces is not None and not self.gallery:
            raise ConfigError(f"config: traces {self.traces!r} needs a gallery, got none")
        for row in self.gallery:
            if self.clips_of not in {**self.tables, **(self.ablation or {})}.get(row, {}):
                raise ConfigError(f"config: gallery needs column {self.clips_of!r} in row {row!r} of a table")
        for title, parts in (self.funnel or {}).items():
            if unknown := set(parts) - {"traces", "checked", "verifier"}:
                raise ConfigError(f"config: funnel {title!r} must be of 'traces', 'checked' and 'verifier', got "
                                  f"{unknown.pop()!r}")
        for row in self.roles or ():
            for column in (self.gap, *self.bars, *[self.clips_of] * (self.clips is not None)):
                if column not in self.tables.get(row, {}):
                    raise ConfigError(f"config: roles need column {column!r} in row {row!r} of tables")


STAGES = (Toy, Evaluate, Label, Traces, FactCheck, Switch, Train, Report)
