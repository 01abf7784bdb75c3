"""Equalities that hold for a right model whatever its weights, up to rounding. 16-bit weights round at every layer
(random models of 28 layers: 2.0 % against transformers, 1.7 % between two forms of our own): float32 proves more."""
from dataclasses import replace

import torch

from minixmd import Group, pack
from minixmd.verify.subject import QUESTION, TEMPERATURE, Outcome

ANSWER = "A dog runs and barks."
MIN_CHANGE = {"float32": 1e-3, "bfloat16": 1e-2}  # nats by which another clip must change the answer's log-probs
MAX_GAP = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.5)}  # nats, mean and largest: generated - scored


def packed(subject):
    """Logits of all prompts and their clips in one batch, and of each by itself."""
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
    """Log-probs of an answer about a clip, about another one in its place, and about the first again."""
    changes, repeats = {}, []
    for kind in subject.clips:
        first = answer_logprobs(subject, kind)
        media = [m for m in pack(subject.prompts).media if m.kind == kind]
        changes[kind] = difference(first, answer_logprobs(subject, kind, other=media[1]))
        repeats.append(difference(first, answer_logprobs(subject, kind)))
    floor = MIN_CHANGE[subject.dtype]
    return Outcome(
        ", ".join(f"{kind} {change:.1e}" for kind, change in changes.items()) + f"; {max(repeats):.0e}",
        f">= {floor:.0e} nats; exactly 0",
        all(change >= floor for change in changes.values()) and not any(repeats),
    )


def difference(a, b):
    return (a - b).abs().max().item()
