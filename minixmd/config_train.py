"""Stage Train, the largest of config.py's."""
import re

from minixmd.fields import ConfigError, check_asking, check_types, one_of, require, stage
from minixmd.prompts import PROMPT, THINK_PROMPT

USED_BY = {  # Train's fields that other objectives do not read
    **dict.fromkeys(("student_labels", "switch", "gate", "teacher_loss"), ("distill",)),
    **dict.fromkeys(("teacher_labels", "temperature"), ("distill", "grpo")),
    "traces": ("sft",), "which": ("sft",), "max_new_tokens": ("sft", "grpo"),
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
    which: str = "all"  # of the traces: "all" | "first", the first sample of a clip | "unanimous", if all samples agree
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
    save_every: int = 100  # optimizer steps between resumable states; 0 = only at the end and to validate
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
        check_asking(self)
        one_of(self, "which", "all", "first", "unanimous")
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
