"""Equalities that hold for a right model whatever its weights: what shares a call, a cache or a file changes no number.

Each check takes a verify.Subject and returns (figure, bound, passed); minixmd/verify.py prints them. Equalities up to
rounding are taken over the logits of each prompt's last rows. In float32 the largest difference is at most 1e-5 of the
largest logit. 16-bit weights round at every layer; there |difference| / |logits|, as vectors, is at most 5 % (random
models of 28 layers: 2.0 % against transformers, 1.7 % between two forms of our own), so float32 is the sharper proof.
"""
import math
import tempfile
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.nn.functional import gelu, pad

from minixmd import Group, Prompt, pack
from minixmd.models.lora import add_lora
from minixmd.models.weights import adapted, load_adapter, save_adapter

TEMPERATURE = 0.7
FLOOR = {"float32": 1e-3, "bfloat16": 1e-2}  # nats by which another clip must change the answer's log-probs
LOGPROB = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.5)}  # nats, mean and largest: generated against scored
QUESTION, ANSWER = "What is this?", "A dog runs and barks."


def close(s, ours, theirs):
    """(figure, bound, passed) of two lists of tensors that may differ by rounding only; the worst pair counts."""
    errors, exact = [], s.dtype == "float32"
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return f"shapes {tuple(a.shape)} and {tuple(b.shape)}", "the same", False
        a, b = a.double(), b.double()
        errors.append(((a - b).abs().max() / b.abs().max() if exact else (a - b).norm() / b.norm()).item())
    worst = max(errors, key=lambda x: math.inf if math.isnan(x) else x)
    if exact:
        return f"{worst:.1e} of the largest", "<= 1e-5", worst <= 1e-5
    return f"{worst:.2%}", "<= 5 %", worst <= 0.05


# ---- clips and towers ----


def placeholders(s):
    """The processor's placeholders are as many as the tower's features, for clips of many sizes."""
    counted, bad = 0, []
    for kind, parts in s.clips.items():
        token = s.processor.tokenizer.token_to_id(getattr(s.family, kind)[1])
        for part in [*parts, *s.sizes[kind]]:
            prompt = s.processor([{"role": "user", "content": [part]}])
            rows = int((prompt.ids_N == token).sum())
            features = len(s.model.encode(kind, pack([prompt]).to(s.device).media))
            counted += features
            bad += [f"{rows} for {features}"] * (rows != features)
    return f"{counted} features" + "".join(f"; {x}" for x in bad[:3]), "one each", not bad


def towers(s):
    """What a tower leaves out or runs together changes nothing: all clips at once against one by one, in plain form."""
    ours, plain = [], []
    for kind in s.clips:
        media = s.media(kind)
        ours.append(s.model.encode(kind, media))
        plain.append(torch.cat([features for m in media for features in (
            [hear(s.model, m)] if kind == "audio" else look(s.model, m))]))
    return close(s, ours, plain)


def hear(model, m):
    """An audio clip's features: Whisper on its padded window with the keys beyond the clip masked, or (Omni) on each
    chunk by itself; the attention is written out."""
    tower, A = model.audio_tower, (m.frames + 1) // 2
    if model.config.audio.n_window is None:
        table_AE = tower.embed_positions.weight
        mel_MA = pad(m.features, (0, 2 * len(table_AE) - m.features.shape[1]), value=-1.5)
        x_AE = blocks(tower, mel_MA, table_AE, A)
        return model.multi_modal_projector(tower.layer_norm(pairs(x_AE)))[:A // 2]
    table_AE, chunks = tower.positions(m.features.device), m.features[:, :m.frames].split(2 * tower.config.n_window, 1)
    x_AE = torch.cat([blocks(tower, chunk, table_AE, len(table_AE)) for chunk in chunks])
    return tower.proj(tower.ln_post(pairs(x_AE)))


def blocks(tower, mel_MA, table_AE, real):
    x = gelu(tower.conv2(gelu(tower.conv1(mel_MA[None].to(tower.conv1.weight.dtype)))))[0].T
    x_AE = x + table_AE[:len(x)].to(x.dtype)
    for layer in tower.layers:
        attn, h_AE = layer.self_attn, layer.self_attn_layer_norm(x_AE)
        q, k, v = (f(h_AE).unflatten(-1, (attn.H, -1)).transpose(0, 1) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        scores_HAA = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores_HAA[:, :, real:] = -torch.inf
        x_AE = x_AE + attn.out_proj((scores_HAA.softmax(-1) @ v).transpose(0, 1).flatten(1))
        x_AE = x_AE + layer.fc2(gelu(layer.fc1(layer.final_layer_norm(x_AE))))
    return x_AE


def pairs(x_AE):
    return x_AE[:len(x_AE) // 2 * 2].unflatten(0, (-1, 2)).mean(1)


def look(model, m):
    """A video's features, every frame pair by itself."""
    _, h, w = m.grid_thw
    return [model.encode("video", [replace(m, features=pair, grid_thw=(1, h, w))]) for pair in m.features.split(h * w)]


# ---- one batch or many, one forward or many ----


def packed(s):
    return close(s, s.logits(), [s.logits([prompt])[0] for prompt in s.prompts])


def cached(s):
    """Logits of every decoded token, from generation's cache and from one forward over prompt and completion."""
    answers, hidden, _ = s.spoken
    steps_BTD, ours, theirs = torch.stack(hidden[1:], 1), [], []
    for i, prompt in enumerate(s.prompts):
        for j, completion in enumerate(answers[i]):
            ids_T = torch.tensor(completion.ids)
            after = prompt.positions_3N.max() + 1 + torch.arange(len(ids_T))
            whole = Prompt(torch.cat([prompt.ids_N, ids_T]),
                           torch.cat([prompt.positions_3N, after.expand(3, -1)], 1), prompt.media)
            hidden_TD = s.model(pack([whole]).to(s.device))[len(prompt):-1]
            ours.append(s.model.logits(steps_BTD[2 * i + j]))
            theirs.append(s.model.logits(hidden_TD))
    return close(s, ours, theirs)


def logprobs(s):
    """Log-probabilities that generation reports, and those from scoring a prompt and its completions at once."""
    answers, _, suppressed_ids = s.spoken
    differences = []
    for prompt, completions in zip(s.prompts, answers, strict=True):
        batch = pack([Group(prompt, tuple(torch.tensor(c.ids) for c in completions))]).to(s.device)
        scored_T = chosen(s.model.logits(s.model(batch)[batch.target_row_T]).index_fill(1, suppressed_ids, -torch.inf)
                          / TEMPERATURE, batch.target_id_T)
        differences.append(scored_T.cpu() - torch.tensor([x for c in completions for x in c.logprobs]))
    d = torch.cat(differences).abs()
    mean, largest = LOGPROB[s.dtype]
    return (f"mean {d.mean():.1e}, max {d.max():.1e} nats", f"<= {mean:.0e}, {largest:.0e}",
            bool(d.mean() <= mean and d.max() <= largest))


def chosen(logits_TV, id_T):
    return logits_TV.log_softmax(-1).gather(1, id_T[:, None]).squeeze(1)


# ---- what the clip does to the answer ----


def answer(s, kind, other=None):
    """Log-probabilities of ANSWER after a question about the kind's first clip, or about `other` in its rows."""
    turns = [{"role": "user", "content": [s.clips[kind][0], {"type": "text", "text": QUESTION}]},
             {"role": "assistant", "content": ANSWER}]
    batch = pack([s.processor(turns)]).to(s.device)
    if other is not None:
        axis = int(kind == "audio")
        there = torch.arange(batch.media[0].features.shape[axis], device=s.device) % other.features.shape[axis]
        features = other.features.index_select(axis, there)  # repeated or cut: only the content changes, not the length
        batch = replace(batch, media=(replace(batch.media[0], features=features),))
    return chosen(s.model.logits(s.model(batch)[batch.target_row_T]), batch.target_id_T)


def another_clip(s):
    change = {kind: (answer(s, kind) - answer(s, kind, s.media(kind)[1])).abs().max().item() for kind in s.clips}
    figure = ", ".join(f"{kind} {x:.1e}" for kind, x in change.items()) + " nats"
    return figure, f">= {FLOOR[s.dtype]:.0e}", all(x >= FLOOR[s.dtype] for x in change.values())


def same_clip(s):
    change = max((answer(s, kind) - answer(s, kind)).abs().max().item() for kind in s.clips)
    return f"{change:.0e} nats", "exactly 0", change == 0


# ---- adapters ----


@contextmanager
def bare(model):
    """The model without its adapter, which it has again afterwards."""
    kept = {m: (m.lora_A, m.lora_B, m.scale) for m in adapted(model).values()}
    detach(model)
    try:
        yield
    finally:
        detach(model)
        for m, (a_RD, b_FR, scale) in kept.items():
            m.lora_A, m.lora_B, m.scale = a_RD, b_FR, scale


def detach(model):
    for m in adapted(model).values():
        m.lora_A = m.lora_B = None


def attach(model):
    """An adapter with random A and B on every linear layer of decoder and towers."""
    add_lora(model, rank=4, alpha=6, targets=".*", seed=0)
    generator = torch.Generator().manual_seed(0)
    for m in adapted(model).values():
        m.lora_B.copy_(0.05 * torch.randn(m.lora_B.shape, generator=generator))


def adapter_off(s):
    with bare(s.model):
        base = torch.cat(s.logits())
        attach(s.model)
        on = torch.cat(s.logits())
        for m in adapted(s.model).values():
            m.scale = 0.0
        zero = torch.cat(s.logits())
        detach(s.model)
        left = max((x - base).abs().max().item() for x in (zero, torch.cat(s.logits())))
    change = ((on - base).abs().max() / base.abs().max()).item()
    return f"{left:.0e}; with it {change:.1e}", "exactly 0; >= 1e-3", left == 0 and change >= 1e-3


def adapter_export(s):
    with bare(s.model), tempfile.TemporaryDirectory() as folder:
        attach(s.model)
        before = torch.cat(s.logits())
        save_adapter(s.model, s.processor.folder, folder)
        detach(s.model)
        load_adapter(s.model, folder)
        change = (torch.cat(s.logits()) - before).abs().max().item()
    return f"{change:.0e}", "exactly 0", change == 0
