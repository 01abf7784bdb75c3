"""Subject, a loaded checkpoint and the inputs that the checks give it, and Outcome, what a check returns."""
import copy
from dataclasses import dataclass
from functools import cached_property

import torch

from minixmd import generate, pack
from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.learning.logprobs import SampledVocabulary, token_logprobs

QUESTION = {"type": "text", "text": "What is this?"}
TEMPERATURE = 0.7  # of sampled completions
TOKENS = 12  # of a completion
ROWS = 8  # last rows of a prompt whose logits are compared: all (N, V) of a long one would not fit
AUDIO_S = (1.337, 2.71)  # seconds of the synthetic clips
VIDEO_SHAPES = ((5, 150, 170), (4, 100, 64))  # frames, height, width


@dataclass(frozen=True)
class Outcome:
    measured: str
    bound: str = ""
    passed: bool | None = None  # None = skipped

    @property
    def verdict(self):
        return {True: "PASS", False: "FAIL", None: "SKIP"}[self.passed]


@dataclass
class Subject:
    model: torch.nn.Module
    processor: object
    dtype: str  # "float32" | "bfloat16", as asked for
    clips: dict  # kind -> at least two media parts
    force_transformers: bool = False  # compare even a large model with transformers

    def __post_init__(self):
        self.family = self.model.config.family
        self.device = self.model.device
        kinds = list(self.clips.values())
        contents = []
        for clips in kinds:
            contents += [[clip, QUESTION] for clip in clips]
        contents += [[QUESTION, kinds[-1][1], kinds[0][0]], "Hello"]
        self.conversations = [[{"role": "user", "content": content}] for content in contents]
        self.prompts = [self.processor(conversation) for conversation in self.conversations]
        self.endless = copy.copy(self.processor)
        self.endless.end_id = -1  # no token ends a turn

    def logits(self, prompts=None):
        """(P, ROWS, V), each prompt's last rows, from one packed batch."""
        batch = pack(prompts or self.prompts).to(self.device)
        hidden_ND = self.model(batch)
        return torch.stack([self.model.logits(hidden_ND[end - ROWS:end]) for _, end in batch.spans])

    def target_logprobs(self, batch, processor, temperature=1.0):
        """(T,) log-probs of a batch's targets among the ids that generation may draw, on the CPU."""
        batch = batch.to(self.device)
        vocabulary = SampledVocabulary.of(self.model, processor, temperature)
        return token_logprobs(self.model, self.model(batch), batch, vocabulary).cpu()

    @cached_property
    def sampled(self):
        """As `sample`, and the hidden states, (2 P, TOKENS - 1, D), from which all tokens but the first were drawn."""
        hidden = []
        with self.model.register_forward_hook(lambda module, inputs, output: hidden.append(output)):
            ids_P2T, logprobs_P2T = self.sample(captured=False)  # a captured step runs no hooks
        return ids_P2T, logprobs_P2T, torch.stack(hidden[1:], dim=1)  # the first is the prefill's

    def sample(self, captured):
        """Two completions of each of P conversations: ids and log-probs, (P, 2, TOKENS)."""
        pairs = generate(
            self.model, self.endless, self.conversations,
            num_samples=2, max_new_tokens=TOKENS, temperature=TEMPERATURE, seed=0, captured=captured,
        )  # fmt: skip
        ids_P2T = torch.tensor([[completion.ids for completion in pair] for pair in pairs])
        return ids_P2T, torch.tensor([[completion.logprobs for completion in pair] for pair in pairs])

    def compare(self, ours, theirs):
        """The Outcome of two lists of tensors that may differ by rounding only; the worst pair counts."""
        errors = []
        order = torch.inf if self.dtype == "float32" else 2  # the largest number, or the root of the squares' sum
        for a, b in zip(ours, theirs, strict=True):
            if a.shape != b.shape:
                return Outcome(f"shapes {tuple(a.shape)} and {tuple(b.shape)}", "the same", False)
            a, b = a.double(), b.double()
            errors.append((a - b).norm(order) / b.norm(order))
        worst = torch.stack(errors).max().item()  # NaN if one is
        if self.dtype == "float32":
            return Outcome(f"{worst:.1e} of the largest", "<= 1e-5", worst <= 1e-5)
        return Outcome(f"{worst:.2%}", "<= 5 %", worst <= 0.05)


def choose_clips(family, audios, videos):
    """{kind: the given files, and synthetic clips where they are fewer than two, as media parts}; ValueError for a kind
    not taken."""
    clips = {}
    for kind, files in (("audio", audios), ("video", videos)):
        if getattr(family, kind) is not None:
            clips[kind] = [{"type": kind, kind: path} for path in dict.fromkeys(files)]
            clips[kind] += synthetic_clips(kind)[len(clips[kind]):]
        elif files:
            raise ValueError(f"a {family.model_type} model cannot take {kind}, got {files[0]}")
    return clips


def synthetic_clips(kind):
    """Two media parts of odd length or shape: rising tones, or moving waves of colour."""
    parts = []
    if kind == "audio":
        for i, seconds in enumerate(AUDIO_S):
            t_S = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
            frequency_S = (1500 + 2500 * i) * (1 + t_S / 9)
            wave_S = 0.3 * torch.sin(frequency_S * t_S)
            parts.append({"type": "audio", "audio": wave_S})
    else:
        for i, (frames, height, width) in enumerate(VIDEO_SHAPES):
            sizes = (frames, 3, height, width)
            t, c, y, x = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
            wave_TCHW = torch.sin((1 + c) * x / (9 + 5 * i) + y / 17 + t)
            frames_TCHW = (127.5 + 127.5 * wave_TCHW).to(torch.uint8)
            parts.append({"type": "video", "video": frames_TCHW, "min_pixels": 28 * 28})
    return parts
