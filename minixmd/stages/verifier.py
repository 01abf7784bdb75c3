"""A small trained verifier: is what a trace says true of a clip? It learns that from the verdicts of a larger checker.

Section 3.2 of SightSound-R1 names it without saying how it is built; this form is ours. The clip is a Cnn14's output;
the trace is the mean hidden state of its tokens in the frozen student's decoder, projected to the same width. Their
scaled product is the score. Audio embeddings are mean-centred, so text alone carries no score. Beside each judged pair
stands a mismatched one, the same clip with the trace of a clip that was answered otherwise, which is taken to be false:
a few hundred verdicts hold too few falsehoods to learn from. Four judged traces in five train; the others calibrate: a
scale and an offset make the score a log-odds of the checker's "yes".
"""
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from minixmd.inputs.batch import Prompt, pack
from minixmd.inputs.positions import positions_of
from minixmd.inputs.prompts import batch_by_tokens
from minixmd.models.cnn14 import spec_augment
from minixmd.models.lora import hash_seed
from minixmd.stages.fit import new_cnn14, train_epochs
from minixmd.tasks.statistics import agreement

WIDTH = 128  # C: of the space in which a clip and a trace are compared
HELD_OUT = 5  # one judged trace in so many is not trained on


@dataclass(frozen=True)
class Pairs:
    """Clips, each with a trace that the larger checker judged."""

    frames: list[torch.Tensor]  # log-mel frames (A, M) of each clip
    text_BD: torch.Tensor  # trace_vectors of the traces
    accepted: list[bool]
    options: list[str]  # text of the option that each trace ends in

    def __len__(self):
        return len(self.frames)


class Verifier(nn.Module):
    """verifier(logmel_BAM, text_BD) gives scores (B,): above 0, more likely true than not."""

    def __init__(self, cnn, D):
        super().__init__()
        self.cnn = cnn
        self.text = nn.Linear(D, WIDTH)
        self.centre = nn.BatchNorm1d(WIDTH, affine=False)
        self.register_buffer("mean_D", torch.zeros(D))  # of the text vectors that it was trained on
        self.register_buffer("std_D", torch.zeros(D))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, logmel_BAM, text_BD):
        return self.match(self.centre(self.cnn(logmel_BAM)), text_BD)

    def match(self, clip_BC, text_BD):
        text_BC = self.text((text_BD - self.mean_D) / self.std_D)
        return self.scale * (clip_BC * text_BC).sum(-1) / math.sqrt(WIDTH) + self.offset


def make_verifier(D, width, weights, seed):
    """A new Verifier for text vectors of width D. width, weights: of its Cnn14, as in config.FactCheck."""
    verifier = Verifier(new_cnn14(WIDTH, width, weights, seed), D)
    generator = torch.Generator().manual_seed(hash_seed(seed, "text"))
    with torch.no_grad():
        verifier.text.weight.copy_(torch.randn(verifier.text.weight.shape, generator=generator) / math.sqrt(D))
        verifier.text.bias.zero_()
    return verifier


def load_verifier(path, D, width):
    """The Verifier whose state_dict is in a safetensors file."""
    verifier = Verifier(new_cnn14(WIDTH, width, None, seed=0), D)
    verifier.load_state_dict(load_file(path))
    return verifier


@torch.inference_mode()
def trace_vectors(model, processor, texts, batch_tokens):
    """The mean hidden state of each text's tokens, with nothing before them: (B, D) fp32 on the CPU.

    Raises:
        ValueError: a text without a token, or over the model's limit.
    """
    prompts = []
    for text in texts:
        ids = processor.encode(text)
        if not 0 < len(ids) <= processor.max_positions:
            raise ValueError(f"a trace of {len(ids)} tokens: {text[:60]!r}; the model's limit is "
                             f"{processor.max_positions}")
        prompts.append((text, Prompt(torch.tensor(ids), positions_of(len(ids), []))))
    means = [torch.empty(0, model.config.text.hidden_size)]
    for run in batch_by_tokens(prompts, batch_tokens):
        batch = pack([prompt for _, prompt in run]).to(model.device)
        hidden_ND = model(batch).float()
        means += [hidden_ND[start:end].mean(0, keepdim=True).cpu() for start, end in batch.spans]
    return torch.cat(means)


def fit(verifier, pairs, schedule, log):
    """Trains a Verifier, on the device that it is on, and calibrates it on held-out pairs.

    Args:
        pairs: Pairs. schedule: fit.Schedule.
    Returns:
        {"verdicts": how many pairs it was given, and the fields of agreement on the held-out ones}.
    Raises:
        ValueError: too few pairs, or all with the same verdict, to train or to calibrate with.
    """
    generator = torch.Generator().manual_seed(hash_seed(schedule.seed, "held"))
    shuffled = torch.randperm(len(pairs), generator=generator).tolist()
    held_out = shuffled[:len(pairs) // HELD_OUT]
    train = shuffled[len(pairs) // HELD_OUT:]
    for indices, purpose in ((train, "train"), (held_out, "validate")):
        if len({pairs.accepted[i] for i in indices}) < 2:
            raise ValueError(f"{schedule.name}: of {len(pairs)} verdicts the {len(indices)} to {purpose} with are all "
                             "the same, or none: nothing can be learnt from them")
    schedule = replace(schedule, batch_size=min(schedule.batch_size, len(train)))
    verifier.mean_D.copy_(pairs.text_BD[train].mean(0))
    verifier.std_D.copy_(pairs.text_BD[train].std(0).clamp(min=1e-6))
    optimizer = torch.optim.Adam([p for p in verifier.parameters() if p.requires_grad], lr=schedule.lr)
    compute_loss = partial(pair_loss, verifier, pairs)
    for epoch, loss_S in train_epochs(verifier, optimizer, compute_loss, train, schedule):
        log({"epoch": epoch, "loss": loss_S.double().mean().item()})
    held_frames = [pairs.frames[i] for i in held_out]
    score_B = torch.tensor(scores(verifier, held_frames, pairs.text_BD[held_out], schedule.batch_size))
    accepted = [pairs.accepted[i] for i in held_out]
    scale, offset = platt(score_B, torch.tensor(accepted).float())
    verifier.scale.fill_(scale)
    verifier.offset.fill_(offset)
    return {"verdicts": len(pairs), **agreement((scale * score_B + offset).tolist(), accepted)}


def pair_loss(verifier, pairs, chosen, noise):
    """Binary cross-entropy of the pairs with the indices `chosen` and of as many mismatched ones, which count as false:
    each clip with the trace of the next pair in the batch that gives another answer, if there is one."""
    device = noise.device
    x_B1AM = verifier.cnn.normalise(torch.stack([pairs.frames[i] for i in chosen]).to(device))
    embedded_BE = verifier.cnn.embed(spec_augment(x_B1AM, noise), noise)
    clip_BC = verifier.centre(verifier.cnn.fc_audioset(embedded_BE))
    score_B = verifier.match(clip_BC, pairs.text_BD[chosen].to(device))
    target_B = torch.tensor([float(pairs.accepted[i]) for i in chosen], device=device)
    loss = F.binary_cross_entropy_with_logits(score_B, target_B, reduction="sum")
    rows, others = [], []  # rows of the batch that have a mismatch, and the pair that it takes the trace of
    for row, i in enumerate(chosen):
        for j in chosen[row + 1:] + chosen[:row]:
            if pairs.options[j] != pairs.options[i]:
                rows.append(row)
                others.append(j)
                break
    if rows:
        wrong = verifier.match(clip_BC[rows], pairs.text_BD[others].to(device))
        loss = loss + F.binary_cross_entropy_with_logits(wrong, torch.zeros_like(wrong), reduction="sum")
    return loss / (len(chosen) + len(rows))


@torch.inference_mode()
def scores(verifier, frames, text_BD, batch_size):
    """Scores of clips' frames (A, M) with a trace vector each, a list of floats."""
    verifier.eval()
    device = verifier.scale.device
    found = []
    for start in range(0, len(frames), batch_size):
        end = start + batch_size
        found += verifier(torch.stack(frames[start:end]).to(device), text_BD[start:end].to(device)).tolist()
    return found


def platt(score_B, truth_B, steps=100):
    """(scale > 0, offset) that make the scores the likeliest log-odds of the truth: Platt scaling, with his smoothed
    targets."""
    true, false = truth_B.sum(), (1 - truth_B).sum()
    smooth_B = torch.where(truth_B > 0, (true + 1) / (true + 2), 1 / (false + 2))
    log_scale = torch.zeros((), requires_grad=True)
    offset = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, offset], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(log_scale.exp() * score_B + offset, smooth_B)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_scale.exp().item(), offset.item()
