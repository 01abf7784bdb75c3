"""Equalities that hold for a right model whatever its weights, up to rounding. 16-bit weights round at every layer
(random models of 28 layers: 2.0 % against transformers, 1.7 % between two forms of our own): float32 proves more."""
import tempfile
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.nn.functional import gelu, pad

from minixmd import Group, pack
from minixmd.inputs.batch import consecutive_segments
from minixmd.models.lora import adapted, add_lora
from minixmd.models.weights import load_adapter, save_adapter
from minixmd.verify.subject import QUESTION, TEMPERATURE, Outcome, synthetic_clips

ANSWER = "A dog runs and barks."
MIN_CHANGE = {"float32": 1e-3, "bfloat16": 1e-2}  # nats by which another clip must change the answer's log-probs
MAX_GAP = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.5)}  # nats, mean and largest: generated - scored


def placeholders(subject):
    """The processor's placeholders are as many as the encoder's features, for clips of many sizes."""
    total, faults = 0, []
    for kind, clips in subject.clips.items():
        _, placeholder, _ = getattr(subject.family, kind)
        token = subject.processor.tokenizer.token_to_id(placeholder)
        for clip in clips + synthetic_clips(kind)[2:]:
            prompt = subject.processor([{"role": "user", "content": [clip]}])
            media = pack([prompt]).to(subject.device).media
            features = len(subject.model.encode(kind, media))
            count = prompt.ids_N.eq(token).sum().item()
            total += features
            if count != features:
                faults.append(f"{count} for {features}")
    return Outcome("; ".join([f"{total} features", *faults[:3]]), "one each", not faults)


def encoders(subject):
    """All clips encoded together equal each one encoded alone in a plain form, without padding or packing."""
    together, alone = [], []
    for kind in subject.clips:
        media = [m.to(subject.device) for m in subject.media(kind)]
        encode_alone = plain_audio if kind == "audio" else plain_video
        together.append(subject.model.encode(kind, media))
        alone.append(torch.cat([encode_alone(subject.model, m) for m in media]))
    return subject.compare(together, alone)


def plain_audio(model, m):
    """An audio clip's features: Whisper on its padded window, or (Omni) on each chunk by itself."""
    tower, mel_MA = model.audio_tower, m.features
    table_AE = tower.positions(mel_MA.device)
    window = 2 * len(table_AE)
    if model.config.audio.n_window is None:
        norm = tower.layer_norm
        project = model.multi_modal_projector
        mel_MA = pad(mel_MA, (0, window - mel_MA.shape[1]), value=-1.5)
    else:
        norm = tower.ln_post
        project = tower.proj
        mel_MA = mel_MA[:, :m.frames]
    length, parts = (m.frames + 1) // 2, []
    for part_MA in mel_MA.split(window, dim=1):
        x_EA = gelu(tower.conv1(part_MA.to(tower.conv1.weight.dtype)))
        x_AE = gelu(tower.conv2(x_EA)).T[:length]  # no row sees those beyond
        x_AE = x_AE + table_AE[:len(x_AE)].to(x_AE.dtype)
        for layer in tower.layers:
            x_AE = layer(x_AE, consecutive_segments([len(x_AE)]))
        parts.append(x_AE)
    pairs_A2E = torch.cat(parts)[:length // 2 * 2].unflatten(0, (-1, 2))
    return project(norm(pairs_A2E.mean(1)))


def plain_video(model, m):
    """A video's features, every frame pair encoded by itself."""
    _, height, width = m.grid_thw
    features = []
    for patches_PC in m.patches().split(height * width):
        pair = replace(m, features=patches_PC, grid_thw=(1, height, width))
        features.append(model.encode("video", [pair]))
    return torch.cat(features)


def packed(subject):
    """Logits of all prompts in one batch, and of each by itself."""
    alone = [subject.logits([prompt])[0] for prompt in subject.prompts]
    return subject.compare(subject.logits(), alone)


def cached(subject):
    """Logits of every decoded token, from generation's cache and from a forward pass over prompt and completion."""
    ids_P2T, _, decoded_BTD = subject.sampled
    groups = []
    for prompt, ids_2T in zip(subject.prompts, ids_P2T, strict=True):
        groups += [Group(prompt, (ids_T,)) for ids_T in ids_2T]
    batch = pack(groups).to(subject.device)
    row_BT = batch.target_row_T.unflatten(0, (len(groups), -1))[:, 1:]  # the first token is the prefill's
    forward_BTD = subject.model(batch)[row_BT]
    return subject.compare(subject.model.logits(decoded_BTD), subject.model.logits(forward_BTD))


def logprobs(subject):
    """Log-probs that generation reports, and those from scoring the prompts and their completions in one pass."""
    ids_P2T, generated_P2T, _ = subject.sampled
    groups = [Group(prompt, tuple(ids_2T)) for prompt, ids_2T in zip(subject.prompts, ids_P2T, strict=True)]
    scored_T = subject.target_logprobs(pack(groups), subject.endless, TEMPERATURE)
    gap_T = (scored_T - generated_P2T.flatten()).abs()
    mean = gap_T.mean().item()
    largest = gap_T.max().item()
    max_mean, max_gap = MAX_GAP[subject.dtype]
    return Outcome(
        f"mean {mean:.1e}, max {largest:.1e} nats",
        f"<= {max_mean:.0e}, {max_gap:.0e}",
        mean <= max_mean and largest <= max_gap,
    )


def captured(subject):
    """Tokens and log-probs from a CUDA graph of the decoding step, and from steps that launch their kernels."""
    if subject.device.type != "cuda" or subject.model.backend != "triton":
        return Outcome("decoding is captured on a GPU only")
    ids_P2T, logprobs_P2T, _ = subject.sampled
    again_P2T, again_logprobs_P2T = subject.sample(captured=True)
    same = (ids_P2T == again_P2T).double().mean().item()
    gap = difference(logprobs_P2T, again_logprobs_P2T)
    return Outcome(f"{same:.0%} of tokens, {gap:.0e} nats", "100%, exactly 0", same == 1 and gap == 0)


def answer_logprobs(subject, kind, other=None):
    """Log-probs of ANSWER about the kind's first clip. other: Media in its place, repeated or cut to its length."""
    conversation = [
        {"role": "user", "content": [subject.clips[kind][0], QUESTION]},
        {"role": "assistant", "content": ANSWER},
    ]
    batch = pack([subject.processor(conversation)])
    if other is not None:
        [clip], axis = batch.media, int(kind == "audio")
        own, others = clip.patches(), other.patches()  # of a sound its mel frames
        indices = torch.arange(own.shape[axis]) % others.shape[axis]
        features = others.index_select(axis, indices)
        batch = replace(batch, media=(replace(clip, features=features),))
    return subject.target_logprobs(batch, subject.processor)


def another_clip(subject):
    changes = {}
    for kind in subject.clips:
        other = answer_logprobs(subject, kind, subject.media(kind)[1])
        changes[kind] = difference(answer_logprobs(subject, kind), other)
    floor = MIN_CHANGE[subject.dtype]
    return Outcome(
        ", ".join(f"{kind} {change:.1e}" for kind, change in changes.items()) + " nats",
        f">= {floor:.0e}",
        all(change >= floor for change in changes.values()),
    )


def same_clip(subject):
    changes = []
    for kind in subject.clips:
        first = answer_logprobs(subject, kind)
        second = answer_logprobs(subject, kind)
        changes.append(difference(first, second))
    return Outcome(f"{max(changes):.0e} nats", "exactly 0", all(change == 0 for change in changes))


def difference(a, b):
    return (a - b).abs().max().item()


@contextmanager
def without_adapter(model):
    kept = {m: (m.lora_A, m.lora_B, m.scale) for m in adapted(model).values()}
    detach(model)
    try:
        yield
    finally:
        detach(model)
        for m, adapter in kept.items():
            m.lora_A, m.lora_B, m.scale = adapter


def detach(model):
    for m in adapted(model).values():
        m.lora_A = m.lora_B = None


def attach(model):
    """Gives every linear layer of decoder and encoders an adapter with random A and B."""
    add_lora(model, rank=4, alpha=6, targets=".*", seed=0)
    generator = torch.Generator().manual_seed(0)
    for m in adapted(model).values():
        m.lora_B.copy_(0.05 * torch.randn(m.lora_B.shape, generator=generator))


def adapter_off(subject):
    """Logits with an adapter of scale 0, and after it is taken off, are the base model's; with it they are others."""
    with without_adapter(subject.model):
        base = subject.logits()
        attach(subject.model)
        change = difference(subject.logits(), base) / base.abs().max().item()
        for m in adapted(subject.model).values():
            m.scale = 0.0
        left = difference(subject.logits(), base)
        detach(subject.model)
        left += difference(subject.logits(), base)
    return Outcome(
        f"{left:.0e}; with it {change:.1e}",
        "exactly 0; >= 1e-3",
        left == 0 and change >= 1e-3,
    )


def adapter_export(subject):
    """Logits with an adapter, before and after it is written to a file and read back."""
    with without_adapter(subject.model), tempfile.TemporaryDirectory() as folder:
        attach(subject.model)
        before = subject.logits()
        save_adapter(subject.model, subject.processor.folder, folder)
        detach(subject.model)
        load_adapter(subject.model, folder)
        change = difference(subject.logits(), before)
    return Outcome(f"{change:.0e}", "exactly 0", change == 0)
