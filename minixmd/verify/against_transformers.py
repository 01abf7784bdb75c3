"""The check against transformers' implementation of the same model."""
import importlib.util
from contextlib import contextmanager

import torch
from torch.nn.functional import pad

from minixmd.models.lora import adapted
from minixmd.verify.subject import ROWS, Outcome

LARGE = 1e9  # parameters from which a second copy of the model is made only when asked for
MEL_FRAMES = 3000  # Qwen2-Audio's encoder takes clips padded to 30 s


def same_logits(subject):
    """Logits of both implementations on our ids, positions and features."""
    count = sum(p.numel() for p in subject.model.parameters())
    if importlib.util.find_spec("transformers") is None:
        return Outcome("transformers is not installed")
    if count >= LARGE and not subject.force_transformers:
        return Outcome(f"it takes a second copy of {count / 1e9:.1f}e9 parameters; --against transformers does it")
    theirs = reference_logits(subject)
    with without_adapter(subject.model):  # which is not in the base's files
        ours = torch.cat([subject.logits([prompt]) for prompt in subject.prompts])
    outcome = subject.compare(ours, theirs)
    if subject.dtype == "float32":
        return outcome
    gaps = []  # from their best next token's logit to their logit of ours, in units of their largest
    for ours_V, theirs_V in zip(ours[:, -1], theirs[:, -1], strict=True):
        below = theirs_V.max() - theirs_V[ours_V.argmax()]
        gaps.append((below / theirs_V.abs().max()).item())
    return Outcome(
        f"{outcome.measured}, best token {max(gaps):.2%} off",
        f"{outcome.bound}, <= 2 %",
        outcome.passed and max(gaps) <= 0.02,
    )


@contextmanager
def without_adapter(model):
    kept = {m: (m.lora_A, m.lora_B) for m in adapted(model).values()}
    for m in kept:
        m.lora_A = m.lora_B = None
    try:
        yield
    finally:
        for m, adapter in kept.items():
            m.lora_A, m.lora_B = adapter


def reference_logits(subject):
    """transformers' logits (P, ROWS, V) of each prompt's last rows."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    cls = transformers.AutoModelForMultimodalLM
    if subject.family.section:
        cls = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    model = cls.from_pretrained(subject.processor.folder, dtype=subject.dtype, attn_implementation="sdpa")
    model.to(subject.device)
    model.lm_head.register_forward_pre_hook(lambda module, inputs: inputs[0][:, -ROWS:])  # as ours: never (N, V)
    return torch.cat([model(**inputs_of(subject, prompt)).logits.float() for prompt in subject.prompts])


def inputs_of(subject, prompt):
    """A Prompt as the keyword arguments of transformers' model, on its device."""
    positions_3N = prompt.positions_3N
    inputs = {
        "input_ids": prompt.ids_N[None],
        "attention_mask": torch.ones_like(prompt.ids_N)[None],
        "position_ids": positions_3N[:, None] if subject.family.video else positions_3N[:1],
    }
    audios = [m for m in prompt.media if m.kind == "audio"]
    if audios:
        length = max(MEL_FRAMES, *(m.features.shape[1] for m in audios))
        padded = []
        for m in audios:
            padded.append(pad(m.features, (0, length - m.features.shape[1]), value=-1.5))
        frames = torch.tensor([[m.frames] for m in audios])
        inputs["input_features"] = torch.stack(padded).to(subject.model.dtype)
        inputs["feature_attention_mask"] = (torch.arange(length) < frames).long()
    videos = [m for m in prompt.media if m.kind == "video"]
    if videos:
        inputs["pixel_values_videos"] = torch.cat([m.patches() for m in videos]).to(subject.model.dtype)
        inputs["video_grid_thw"] = torch.tensor([m.grid_thw for m in videos])
    return {name: value.to(subject.device) for name, value in inputs.items()}
