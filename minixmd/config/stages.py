"""The stages of a run, one frozen dataclass each. A field that names a file may hold "@name" (references.py)."""
import re
from dataclasses import replace
from typing import Annotated, Literal
from urllib.parse import urlsplit

from minixmd.config.field_checks import ConfigError, check_prompt, check_unused, stage
from minixmd.config.prompts import AUDIO_COT_PROMPT, CHECK_PROMPT, PROMPT, THINK_PROMPT, ClipReading, PromptFormat

Count = Annotated[int, ">= 1"]
NonNegativeInt = Annotated[int, ">= 0"]
Positive = Annotated[float, "> 0"]
NonNegative = Annotated[float, ">= 0"]
Share = Annotated[float, ">= 0", "<= 1"]
Media = Literal["audio", "video", "both", "sounded", "none"]
MOST_SLOTS = 256  # of decode_slots "auto"
# without effect where an endpoint answers: its server chooses a video's frames itself
LOCAL_FIELDS = "cache sharded decode_slots stop top_k fps min_pixels max_pixels nframes"


@stage
class Toy:
    """Makes a small world of audio and video files, its manifests, and the models that start out in it."""
    name: str = "toy"
    seed: NonNegativeInt = 0  # of the world, the models and their training
    thinking: bool = False  # the teacher also writes chains of thought, 30 % of them false, and there is a checker
    thoughts: Literal["short", "long"] = "short"  # chains of 5 tokens | of 56, word for word what is heard and what not


@stage
class _Local:
    """Fields of every stage that computes on this machine."""
    name: str
    max_bad: Share = 0.01  # share of bad clips (of FactCheck: traces) above which the stage fails; 1 = never
    device: Literal["auto", "cpu", "cuda"] = "auto"  # "auto" is CUDA where there is one
    seed: NonNegativeInt = 0  # of all randomness in the stage: new weights, data order, sampling, augmentation
    allow_outside: bool = False  # whether a manifest may name files beside its folder and that of prepare_*'s clips
    clip_limit_s: Annotated[float, "> 0", "<= 86400"] = 60.0  # seconds that reading a file may take, in a child process
    cache: str | None = None  # folder that keeps what was read of a clip (inputs/clips.py); None = none
    cache_gib: Positive = 100.0  # GiB that it may take

    @property
    def reading(self):
        return ClipReading(self.clip_limit_s, self.cache, self.cache_gib)


@stage
class _LocalModel(_Local):
    """Fields of every stage that runs a model of ours."""
    backend: Literal["auto", "triton", "torch"] = "auto"  # of the kernels; "auto" is Triton on a GPU, else PyTorch
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights; what trains is kept in float32


@stage
class _Sharded:
    """Fields of stages that only read a model's logits."""
    batch_tokens: Count = 8192  # tokens packed into a forward pass
    sharded: bool = False  # each process of torchrun holds a part of the decoder's layers: for what no card holds


@stage
class _Cnn14:
    """Fields of a stage that trains a Cnn14 on sounds."""
    weights: str | None = None  # checkpoint to start from, .pth or .safetensors; None = from scratch
    width: Positive = 1.0  # by which its channel counts are multiplied; 1 = as published
    clip_s: Annotated[float, ">= 0.31"] = 10.0  # seconds heard of every clip; a shorter one is followed by silence
    epochs: Count = 30
    batch_size: Count = 32  # rows of an optimizer step; with Switch's mixup there are two clips in a row
    lr: Positive = 1e-4  # peak, of Adam
    warmup_ratio: Share = 0.1  # share of the steps; 0 = off


@stage
class _Prompted(_LocalModel):
    """Fields of every stage that puts questions about clips to a model."""
    model: str  # folder, hub name or "@stage"
    manifest: str  # JSONL file
    media: Media = "audio"  # "audio" | "video" | "both", one after the other | "sounded", a video with its track (Omni)
    # | "none", the question alone
    prompt: str = PROMPT  # format string over {question} {options} {first} {last}
    # video
    fps: Positive = 1.0  # frames a second
    min_pixels: Count = 100_352  # pixels a frame
    max_pixels: Count = 262_144  # pixels a frame
    nframes: Annotated[int, ">= 2"] | None = None  # frames a clip; None = by fps

    def check(self, placeholders=("options",)):
        if self.min_pixels > self.max_pixels:
            raise ConfigError(f"config: min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")
        check_prompt(self.prompt, placeholders)
        if "" in getattr(self, "stop", ()):
            raise ConfigError("config: a stop string must not be empty, got ''")

    @property
    def prompt_format(self):
        video_options = {name: getattr(self, name) for name in ("fps", "min_pixels", "max_pixels", "nframes")}
        return PromptFormat(self.media, self.prompt, video_options, self.reading)


@stage
class _Endpoint:
    """Fields of a stage that may ask an OpenAI-compatible endpoint in place of a local model."""
    endpoint: str | None = None  # base URL, such as http://localhost:8000/v1; None = no endpoint
    served: str | None = None  # the model's name there
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key, if the endpoint wants one
    concurrency: Count = 8  # requests at a time
    timeout_s: Positive = 120.0  # of a request
    attempts: Count = 5  # of a request that times out, cannot connect, meets a server error or brings nonsense
    retry_backoff_s: NonNegative = 1.0  # before the second attempt; each further one waits twice as long

    def check_endpoint(self, model):
        """Either an endpoint with the model's name there, or a local model."""
        if (self.endpoint is None) == (model is None):
            raise ConfigError(f"config: either model or endpoint must be given, got {model!r} and {self.endpoint!r}")
        if self.endpoint is not None:
            try:
                url = urlsplit(self.endpoint)
                valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
            except ValueError:  # a port that is no number, a bracket left open
                valid = False
            if not valid:  # without a scheme the client would take it for a model on the hub
                raise ConfigError(f"config: endpoint {self.endpoint!r} is no URL such as http://localhost:8000/v1")
            own = [name for name in LOCAL_FIELDS.split() if name in self.__dataclass_fields__]
            check_unused(self, "an endpoint", " ".join(own))
            if getattr(self, "media", "audio") == "sounded":
                raise ConfigError("config: an endpoint is shown 'video' or 'audio', 'both' or 'none', got 'sounded'")
        if (self.endpoint is None) != (self.served is None):
            raise ConfigError(f"config: endpoint {self.endpoint!r} with served {self.served!r}: both or neither")


@stage
class _Writing:
    """Fields of a stage whose model writes."""
    decode_slots: Count | Literal["auto"] = "auto"  # completions written at once; "auto": up to 256, as many as the
    # GPU's memory has room for when the stage begins, with clips of 10 s
    writes = True  # no field: whether the model writes answers of its own

    @property
    def slots(self):
        """decode_slots as a number; runner.py has put one in the place of "auto" where that depends on a GPU."""
        return MOST_SLOTS if self.decode_slots == "auto" else self.decode_slots


@stage
class _Answering(_Prompted, _Sharded, _Endpoint, _Writing):
    """Fields of a stage that puts multiple-choice questions."""
    model: str | None = None  # folder, hub name or "@stage"; None = an endpoint
    answer: Literal["letters", "generate"] = "letters"  # by the letters' logits | by what it writes
    max_new_tokens: Annotated[int, ">= 2"] = 32  # tokens of a written answer: at least a letter and the end of turn

    @property
    def writes(self):
        return self.answer == "generate"

    def check(self, placeholders=()):
        if self.answer == "letters":
            placeholders = ("options", *placeholders)
            check_unused(self, "answer 'letters'", "decode_slots")
        else:
            check_unused(self, "answer 'generate'", "sharded")
        super().check(placeholders)
        self.check_endpoint(self.model)


@stage
class Evaluate(_Answering):
    """A model's accuracy on a manifest."""
    rule: Literal["option", "mmau"] = "option"  # how it is read: letter or most similar option | by MMAU's own rule
    num_samples: Count = 1  # answers sampled, of which the most frequent counts; 1 = one
    temperature: NonNegative = 0.0  # of the sampling; 0 = greedy
    stop: tuple[str, ...] = ()  # strings that end an answer, beside the end of turn
    traces: str | None = None  # "@traces": the clip's first trace fills the prompt's {trace}; None = none

    def check(self):
        super().check(() if self.traces is None else ("trace",))
        if self.answer == "letters":
            check_unused(self, "answer 'letters'", "rule num_samples temperature stop")
        if self.num_samples > 1 and self.temperature == 0:
            raise ConfigError(f"config: num_samples {self.num_samples} at temperature 0.0 would give equal answers")


@stage
class Label(_Answering):
    """A model's predicted letters on a manifest, with the letters' logits."""
    top_k: Annotated[int, ">= 0", "<= 64"] = 0  # best ids of the vocabulary stored with each letter, for KL; 0 = none
    temperature: Positive = 2.0  # of the distillation: the mass of all other ids is stored at this temperature


@stage
class Answers:
    """Answers that were given elsewhere, by another system or by people, as the results that Evaluate gives."""
    name: str
    manifest: str  # JSONL file of the questions
    file: str  # JSONL file of {"id", "answer" or "text"}; or a folder of participants' files (tools/listening_test.py)
    condition: Literal["ears", "eyes", "both"] | None = None  # of participants' trials; None = of another system
    rule: Literal["option", "mmau"] = "option"  # how a text is read, as in Evaluate
    letters: bool = True  # whether a text may give its option's letter
    max_bad: Share = 0.01  # share of unanswered questions above which the stage fails; 1 = never
    allow_outside: bool = False  # as in Evaluate


@stage
class Traces(_Prompted, _Endpoint, _Writing):
    """A teacher's chains of thought on a manifest, several a clip; clips on which all samples agree are marked."""
    model: str | None = None  # folder, hub name or "@stage"; None = an endpoint
    media: Media = "video"  # as in Evaluate
    prompt: str = AUDIO_COT_PROMPT  # as in Evaluate
    # how it samples
    num_samples: Count = 8  # samples a clip
    temperature: Positive = 1.0  # of the sampling
    max_new_tokens: Annotated[int, ">= 2"] = 512  # of a sample, the end of turn included; a longer one is not used
    top_k: Annotated[int, ">= 0", "<= 64"] = 0  # best ids stored with each token of a trace, for SFT's "kl"; 0 = none

    def check(self):
        super().check()
        self.check_endpoint(self.model)


@stage
class FactCheck(_LocalModel, _Sharded, _Endpoint, _Cnn14):
    """Hears the clip of each trace and accepts or rejects what it says (audio-grounded fact verification)."""
    traces: str  # "@traces"
    manifest: str  # JSONL file of the clips
    trace_filter: Literal["used", "all", "calibration"] = "used"  # first and unanimous ones | all | `limit` of them
    limit: Annotated[int, ">= 2"] | None = None  # traces of "calibration", at most one a clip, drawn by seed
    checker: Literal["model", "endpoint", "verifier", "verdicts"] = "model"  # "verifier" is a small network
    threshold: float = 0.0  # a trace is accepted above it; scores are log-odds of yes (endpoints without: +1, -1)
    # who judges
    model: str | None = None  # of "model" the one that hears; of "verifier" the one whose decoder reads the traces
    prompt: str = CHECK_PROMPT  # format string over {trace} and what Evaluate has
    verdicts: str | None = None  # "@factcheck/verdicts.jsonl": what "verifier" learns from, or "verdicts" takes over
    logprobs: bool = True  # of "endpoint"; False for a server that refuses them: scores are then +1 and -1
    batch_size: Annotated[int, ">= 2"] = 32  # of "verifier": traces of an optimizer step

    def check(self):
        check_prompt(self.prompt, ("trace",))
        if (self.trace_filter == "calibration") != (self.limit is not None):
            raise ConfigError(f"config: trace_filter {self.trace_filter!r} with limit {self.limit!r}: 'calibration' "
                              "needs one, the others none")
        needs = {"model": ("model",), "endpoint": ("endpoint", "served"), "verifier": ("model", "verdicts"),
                 "verdicts": ("verdicts",)}[self.checker]
        for name in ("model", "endpoint", "served", "verdicts"):
            if (getattr(self, name) is not None) != (name in needs):
                verb = "needs" if name in needs else "does not use"
                raise ConfigError(f"config: checker {self.checker!r} {verb} {name}, got {getattr(self, name)!r}")
        if self.checker == "endpoint":
            self.check_endpoint(None)
        else:
            check_unused(self, f"checker {self.checker!r}", "logprobs")
        if self.checker != "model":
            check_unused(self, f"checker {self.checker!r}", "sharded")


@stage
class Switch(_Local, _Cnn14):
    """A Cnn14 that predicts, per clip, whether the teacher beats the student; it decides for every clip of a split."""
    teacher: str  # results on the analysis split, "@evaluate"
    student: str  # results on the same split, "@evaluate"
    manifest: str  # JSONL file of that split, with labels; its audio is heard, whatever the two models perceive
    train_manifest: str  # JSONL file of the clips to decide on
    augment: Literal["spec", "mixup", "both", "off"] = "both"  # "spec" is SpecAugment


@stage
class _Training(_Prompted):
    """Fields that Distill, SFT and GRPO share."""
    val_manifest: str | None = None  # JSONL file; None = no validation
    val_limit: Count = 1000  # clips of it that are validated on, a sample by seed that stays the same
    # what trains
    trainable: Literal["lora", "decoder", "full"] = "lora"  # "decoder": encoders and projector stay frozen
    lora_rank: Count = 16
    lora_alpha: Positive = 32.0  # the update is scaled by lora_alpha / lora_rank
    lora_targets: str = r"model\.layers\..*_proj"  # regular expression that matches a whole module name
    # optimisation
    epochs: Count = 1
    max_steps: Count | None = None  # optimizer steps, of GRPO rollouts; None = epochs decide
    batch_size: Count = 8  # sequences an optimizer step; of GRPO prompts
    micro_batch_tokens: Count = 8192  # tokens a forward pass, packed by length; a clip that makes more is bad
    checkpointing: Literal["auto", "on", "off"] = "auto"  # "on": only a block's input is kept; "auto": on a GPU
    lr: Positive = 1e-4  # peak
    warmup_ratio: Share = 0.1  # share of the steps; 0 = off
    weight_decay: NonNegative = 0.0  # 0 = off
    max_grad_norm: NonNegative = 1.0  # 0 = off
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Positive = 1e-8
    moments: Literal["float32", "8bit"] = "float32"  # of AdamW; "8bit" holds them in blocks of 256 with a scale each
    # how it runs
    eval_every: NonNegativeInt = 0  # optimizer steps; 0 = only at the end
    save_every: NonNegativeInt = 100  # optimizer steps between resumable states; 0 = only at the end and to validate

    def check(self):
        super().check()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"config: betas must be >= 0 and < 1, got {self.betas}")
        # in float16 gradients below 6e-8 are 0: those of weights, and of logits where thousands of tokens share a step
        if self.dtype == "float16" and self.trainable != "lora":
            raise ConfigError(f"config: trainable {self.trainable!r} needs dtype 'float32' or 'bfloat16', got "
                              "'float16'")
        if self.eval_every and self.val_manifest is None:
            raise ConfigError(f"config: eval_every {self.eval_every} needs val_manifest, got None")
        try:
            re.compile(self.lora_targets)
        except re.error as error:
            raise ConfigError(f"config: lora_targets {self.lora_targets!r} is no regular expression: {error}") from None


def check_switch(item):
    if (item.gate in ("learned", "oracle")) != (item.switch is not None):
        raise ConfigError(f"config: gate {item.gate!r} with switch {item.switch!r}: 'learned' and 'oracle' need a "
                          "switch, others none")


@stage
class Distill(_Training):
    """Trains a model on a teacher's labels where the gate says so, and on its own earlier ones elsewhere (XMD)."""
    teacher_labels: str | None = None  # "@label"; needed unless the gate is "never"
    student_labels: str | None = None  # the student's own letters, "@label"; None = no anti-forgetting loss
    switch: str | None = None  # "@switch"; what the gates "learned" and "oracle" look up
    gate: Literal["always", "never", "learned", "oracle"] = "always"  # who follows the teacher; "oracle": by true class
    teacher_loss: Literal["ce", "kl", "kl+ce"] = "ce"  # on the teacher's letter | to its stored logits | their sum
    temperature: Positive = 2.0  # of the KL

    def check(self):
        super().check()
        if self.teacher_labels is None and self.gate != "never":
            raise ConfigError("config: distill needs teacher_labels, got None")
        check_switch(self)
        if self.gate == "always":
            check_unused(self, "gate 'always'", "student_labels")
        if self.gate == "never":
            if self.student_labels is None:
                raise ConfigError("config: gate 'never' needs student_labels, got None")
            check_unused(self, "gate 'never'", "teacher_labels teacher_loss")


@stage
class SFT(_Training, _Writing):
    """Trains a model on the right letters of a manifest, or on a teacher's traces."""
    prompt: str | None = None  # as in Evaluate; None = PROMPT, with traces THINK_PROMPT
    traces: str | None = None  # JSONL of {"id", "text"}: the text to learn for each clip; None = the right letter
    trace_filter: Literal["all", "first", "unanimous"] = "all"  # all | a clip's first | of clips where all agree
    teacher_loss: Literal["ce", "kl"] = "ce"  # on a trace's tokens | to its teacher's best ids at each (Traces.top_k)
    max_new_tokens: Count = 512  # with traces: tokens of an answer in validation, the end of turn included
    temperature = 1.0  # no field: of the KL

    @property
    def writes(self):
        return self.traces is not None

    def check(self):
        if self.prompt is None:  # frozen: set only here, while it is being made
            object.__setattr__(self, "prompt", PROMPT if self.traces is None else THINK_PROMPT)
        super().check()
        if self.traces is None:
            check_unused(self, "sft without traces", "trace_filter teacher_loss max_new_tokens decode_slots")


@stage
class GRPO(_Training, _Writing):
    """Trains a model by the rewards of what it writes itself; the defaults are SightSound-R1's."""
    prompt: str = THINK_PROMPT  # as in Evaluate
    teacher_labels: str | None = None  # "@label" or "@traces/labels.jsonl": what is rewarded; None = the manifest's
    # rollout
    group_size: Annotated[int, ">= 2"] = 8  # completions of each prompt
    max_new_tokens: Count = 512  # tokens of a completion, the end of turn included
    temperature: Positive = 1.0  # of the sampling
    stop: tuple[str, ...] = ()  # strings that end a completion, beside the end of turn
    # objective
    beta: NonNegative = 0.04  # weight of the KL to the policy that training starts from; 0 = off
    reference: Literal["device", "host"] = "device"  # where its weights are; from the host they are copied in to score
    kl: Literal["k3", "k1"] = "k3"  # its estimator
    clip_low: Share = 0.2  # the ratio's lower bound is 1 - clip_low
    clip_high: NonNegative = 0.2  # its upper bound is 1 + clip_high
    ratio: Literal["token", "sequence"] = "token"  # importance ratio of a token, or one of a whole completion (GSPO)
    aggregation: Literal["sequence", "token", "constant"] = "sequence"  # mean over each completion's tokens | over all
    # tokens | the sum over max_new_tokens a completion (Dr. GRPO)
    scale_rewards: Literal["std", "none"] = "std"  # what divides the advantage: "std" of the group
    truncated: Literal["keep", "mask"] = "keep"  # completions that max_new_tokens cut: "mask", no loss on them
    zero_variance: Literal["keep", "skip"] = "keep"  # groups of equal rewards, which only have a KL
    num_iterations: Count = 1  # optimizer steps on each rollout
    completions_every: NonNegativeInt = 10  # steps between those of which completions.jsonl shows some; 0 = none
    reward_weight, samples = 1.0, "student"  # no fields here; of OnPolicy

    def check(self):
        super().check()
        if self.beta == 0:
            check_unused(self, "beta 0.0", "kl reference")
        if self.dtype == "float16":  # see _Training.check
            raise ConfigError("config: grpo needs dtype 'float32' or 'bfloat16', got 'float16'")


@stage
class OnPolicy(GRPO):
    """Trains a model on what it writes itself, by rewards as GRPO and by a teacher that perceives the clip in its own
    way and says of every token what it would have written there: GRPO's loss + teacher_weight * KL, token by token."""
    group_size: Count = 8  # as in GRPO; without a reward 1 will do
    # the teacher
    teacher_model: str  # folder, hub name or "@stage"; it must share the student's vocabulary
    teacher_media: Literal["audio", "video", "both", "sounded", "none", "shuffled"] = "video"  # as media, or
    # "shuffled": the video of another clip, a control
    teacher_prompt: str | None = None  # as prompt; None = prompt
    teacher_place: Literal["device", "host", "sharded"] = "device"  # where its weights are: | on the host, copied in to
    # read | a part of the decoder's layers in each process of torchrun
    # objective
    teacher_kl: Literal["forward", "reverse"] = "forward"  # KL(teacher || student) | KL(student || teacher)
    teacher_weight: NonNegative = 1.0  # of that KL; 0 = no teacher
    reward_weight: NonNegative = 1.0  # of the clipped policy loss; 0 = rewards are logged alone. beta weighs the KL to
    # the reference
    gate: Literal["always", "learned", "oracle"] = "always"  # the clips on which the teacher speaks; others are GRPO's
    switch: str | None = None  # "@switch"; what the gates "learned" and "oracle" look up
    samples: Literal["student", "teacher"] = "student"  # whose words are scored; "teacher": those of traces, no rollout
    traces: str | None = None  # "@traces": the words of samples "teacher", group_size a clip

    @property
    def teacher_format(self):
        """The PromptFormat in which the teacher is asked."""
        media = "video" if self.teacher_media == "shuffled" else self.teacher_media
        return replace(self.prompt_format, media=media, template=self.teacher_prompt or self.prompt)

    def check(self):
        super().check()
        if self.teacher_prompt is not None:
            check_prompt(self.teacher_prompt)
        if not self.teacher_weight and not self.reward_weight:
            raise ConfigError("config: teacher_weight and reward_weight are both 0.0: nothing would be learnt")
        if self.reward_weight and self.group_size == 1:
            raise ConfigError("config: group_size 1 has no advantage: a reward needs 2 or more, or reward_weight=0")
        if self.teacher_weight:
            check_unused(self, "a teacher, whose KL groups of equal rewards have too,", "zero_variance")
        else:
            check_unused(self, "teacher_weight 0.0",
                         "gate samples teacher_media teacher_prompt teacher_kl teacher_place")
        if not self.reward_weight:
            check_unused(self, "reward_weight 0.0", "scale_rewards clip_low clip_high ratio")
        check_switch(self)
        if (self.samples == "teacher") != (self.traces is not None):
            raise ConfigError(f"config: samples {self.samples!r} with traces {self.traces!r}: 'teacher' needs some, "
                              "'student' none")
        if self.samples == "teacher" and self.reward_weight:
            raise ConfigError("config: samples 'teacher' needs reward_weight 0: rewards are of the student's own words")
        if self.teacher_weight and self.teacher_media == self.media and self.teacher_model == self.model:
            raise ConfigError(f"config: teacher_model {self.teacher_model!r} is the student, and both perceive "
                              f"{self.media!r}: it has nothing to say")


@stage
class Report:
    """What a run found, as a page, report.html, and with the same figures as report.json and report.md."""
    name: str = "report"
    tables: dict[str, dict[str, str]]  # row title -> {column title: "@evaluate"}
    ablation: dict[str, dict[str, str]] | None = None  # a second table of the same form; None = none
    differences: dict[str, tuple[str, str]] | None = None  # title -> (row, row taken from it), clip by clip
    notes: dict[str, str] | None = None  # row title or other subject -> what to know; --keep-going, --trial set them
    published: Literal["xmd", "sightsound"] | None = None  # a paper whose figures stand beside rows of its titles
    # class by class and clip by clip
    roles: tuple[str, str, str] | None = None  # rows of tables: teacher, student before, student after; None = off
    gap: str = "analysis"  # column on which the teacher's lead over the student before chooses the classes
    bars: tuple[str, ...] = ("test",)  # columns whose classes are drawn
    senses: dict[str, dict[str, str]] | None = None  # column -> {bar: "@evaluate" or "@answers"}: XMD's Figure 1, of
    # models and people, on the classes that roles and gap choose; None = none
    clips: str | None = None  # JSONL file: manifest of the column clips_of, for clips to play; None = none
    clips_of: str = "test"  # column
    allow_outside: bool = False  # whether it may name files beside its folder and that of prepare_*'s clips
    embed_mib: NonNegative = 16.0  # media files that the page itself holds, MiB in all; the others are linked
    gallery: tuple[str, ...] = ()  # rows whose answers stand beside each clip; () = those of roles
    traces: str | None = None  # "@traces" on these clips, to stand beside them; None = none
    verdicts: str | None = None  # "@factcheck/verdicts.jsonl" on those traces; None = none
    funnel: dict[str, dict[str, str]] | None = None  # title -> {"traces" | "checked" | "verifier": a results.json}
    # how it was trained
    switch: str | None = None  # "@switch", against the true classes; None = none
    curves: dict[str, dict[str, str]] | None = None  # title -> {line title: "@stage/log.jsonl"}; None = none
    scored: dict[str, str] | None = None  # title -> "@onpolicy/completions.jsonl": what the teacher says of each token

    def check(self):
        if self.clips is not None and self.roles is None and not self.gallery:
            raise ConfigError(f"config: clips {self.clips!r} needs roles or a gallery, got neither")
        needs = {"gallery": "clips", "traces": "gallery", "verdicts": "traces", "senses": "roles"}
        for name, needed in needs.items():
            if getattr(self, name) and not getattr(self, needed):
                raise ConfigError(f"config: {name} {getattr(self, name)!r} needs {needed}, got none")
        rows = {**self.tables, **(self.ablation or {})}
        for title, pair in (self.differences or {}).items():
            if missing := set(pair) - set(rows):
                raise ConfigError(f"config: difference {title!r} needs row {missing.pop()!r} in a table")
        for row in self.gallery:
            if self.clips_of not in rows.get(row, {}):
                raise ConfigError(f"config: gallery needs column {self.clips_of!r} in row {row!r} of a table")
        for title, steps in (self.funnel or {}).items():
            if unknown := set(steps) - {"traces", "checked", "verifier"}:
                raise ConfigError(f"config: funnel {title!r} must be of 'traces', 'checked' and 'verifier', got "
                                  f"{unknown.pop()!r}")
        columns = [self.gap, *self.bars] + ([] if self.clips is None else [self.clips_of])
        for row in self.roles or ():
            for column in columns:
                if column not in self.tables.get(row, {}):
                    raise ConfigError(f"config: roles need column {column!r} in row {row!r} of tables")
