"""A small trained verifier: is what a trace says true of a clip? It learns that from the verdicts of a larger checker.

Section 3.2 of SightSound-R1 names it without saying how it is built; this form is ours. The clip is a Cnn14's output;
the trace is the mean hidden state of its tokens in the frozen student's decoder, projected to the same width. Their
scaled product is the score. Audio embeddings are mean-centred, so text alone carries no score. Beside each judged pair
stands a mismatched one, the same clip with the trace of a clip that was answered otherwise, which is taken to be false:
a few hundred verdicts hold too few falsehoods to learn from. Four judged traces in five train; the others calibrate: a
scale and an offset make the score a log-odds of the checker's "yes"."""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from minixmd.inputs.batch import Prompt, pack
from minixmd.inputs.positions import positions_of
from minixmd.inputs.prompts import batch_by_tokens
from minixmd.models.cnn14 import make_cnn14, spec_augment
from minixmd.runs.seeds import hash_seed, shuffled
from minixmd.stages.cnn14_training import train_epochs
from minixmd.tasks.yes_no import agreement

WIDTH = 128  # C: of the space in which a clip and a trace are compared
HELD_OUT = 5  # one judged trace in so many is not trained on


@dataclass(frozen=True)
class Pair:
    logmel_AM: torch.Tensor  # frames of the clip
    text_D: torch.Tensor  # the trace's row of trace_vectors
    option: str  # text of the option that the trace ends in
    accepted: bool | None = None  # by the larger checker; None = not judged


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
    verifier = Verifier(make_cnn14(WIDTH, width, seed, weights), D)
    generator = torch.Generator().manual_seed(hash_seed(seed, "text"))
    with torch.no_grad():
        verifier.text.weight.copy_(torch.randn(verifier.text.weight.shape, generator=generator) / math.sqrt(D))
        verifier.text.bias.zero_()
    return verifier


def load_verifier(path, width):
    weights = load_file(path)
    verifier = Verifier(make_cnn14(WIDTH, width, seed=0), len(weights["mean_D"]))
    verifier.load_state_dict(weights)
    return verifier


def text_prompt(processor, text):
    """A Prompt of a text alone. Raises ValueError for no token, or more than the model's limit."""
    ids = processor.encode(text)
    if not 0 < len(ids) <= processor.max_positions:
        raise ValueError(f"a trace of {len(ids)} tokens: {text[:60]!r}; the model's limit is {processor.max_positions}")
    positions_3N = positions_of(len(ids), [])
    return Prompt(torch.tensor(ids), positions_3N)


@torch.inference_mode()
def trace_vectors(model, processor, texts, batch_tokens):
    """The mean hidden state of each text's tokens: (B, D) fp32 on the CPU. Raises as text_prompt."""
    prompts = [(text, text_prompt(processor, text)) for text in texts]
    means = [torch.empty(0, model.config.text.hidden_size)]  # for no text
    for run in batch_by_tokens(prompts, batch_tokens):
        batch = pack([prompt for _, prompt in run]).to(model.device)
        hidden_ND = model(batch).float()
        for start, end in batch.spans:
            means.append(hidden_ND[start:end].mean(0, keepdim=True).cpu())
    return torch.cat(means)


def fit_verifier(stage, verifier, pairs, log):
    """Trains a Verifier, where it is, on judged Pairs, and calibrates it on those held out. Returns {"verdicts": number
    of pairs, agreement's fields on those held out}. Raises ValueError for a part with all verdicts alike or none."""
    order = shuffled(pairs, stage.seed, "held")
    held_out = order[:len(pairs) // HELD_OUT]
    train = order[len(pairs) // HELD_OUT:]
    for part, purpose in ((train, "train"), (held_out, "validate")):
        if len({pair.accepted for pair in part}) < 2:
            raise ValueError(f"{stage.name}: of {len(pairs)} verdicts the {len(part)} to {purpose} with are all the "
                             "same, or none: nothing can be learnt from them")
    batch_size = min(stage.batch_size, len(train))
    text_BD = torch.stack([pair.text_D for pair in train])
    verifier.mean_D.copy_(text_BD.mean(0))
    verifier.std_D.copy_(text_BD.std(0).clamp(min=1e-6))
    optimizer = torch.optim.Adam(verifier.parameters(), lr=stage.lr)
    for epoch, loss_S in train_epochs(stage, verifier, optimizer, partial(batch_loss, verifier), train, batch_size):
        log({"epoch": epoch, "loss": loss_S.double().mean().item()})
    score_B = torch.tensor(score_pairs(verifier, held_out, batch_size))
    accepted = [pair.accepted for pair in held_out]
    scale, offset = platt(score_B, torch.tensor(accepted).float())
    verifier.scale.fill_(scale)
    verifier.offset.fill_(offset)
    return {"verdicts": len(pairs), **agreement((scale * score_B + offset).tolist(), accepted)}


def batch_loss(verifier, pairs, noise):
    """Binary cross-entropy of judged Pairs and of mismatched ones, which count as false: each clip with the next trace
    in the batch that gives another answer."""
    logmel_BAM, text_BD = _stack(pairs, noise.device)
    x_B1AM = spec_augment(verifier.cnn.normalise(logmel_BAM), noise)
    clip_BC = verifier.centre(verifier.cnn.fc_audioset(verifier.cnn.embed(x_B1AM, noise)))
    target_B = torch.tensor([float(pair.accepted) for pair in pairs], device=noise.device)
    loss = F.binary_cross_entropy_with_logits(verifier.match(clip_BC, text_BD), target_B, reduction="sum")
    rows, mismatches = [], []  # rows of the batch, and of the traces that they are wrongly paired with
    for row, pair in enumerate(pairs):
        for i in range(row + 1, row + len(pairs)):
            other = i % len(pairs)
            if pairs[other].option != pair.option:
                rows.append(row)
                mismatches.append(other)
                break
    if rows:
        wrong_B = verifier.match(clip_BC[rows], text_BD[mismatches])
        loss = loss + F.binary_cross_entropy_with_logits(wrong_B, torch.zeros_like(wrong_B), reduction="sum")
    return loss / (len(pairs) + len(rows))


@torch.inference_mode()
def score_pairs(verifier, pairs, batch_size):
    verifier.eval()
    found = []
    for start in range(0, len(pairs), batch_size):
        logmel_BAM, text_BD = _stack(pairs[start:start + batch_size], verifier.scale.device)
        found += verifier(logmel_BAM, text_BD).tolist()
    return found


def _stack(pairs, device):
    logmel_BAM = torch.stack([pair.logmel_AM for pair in pairs])
    text_BD = torch.stack([pair.text_D for pair in pairs])
    return logmel_BAM.to(device), text_BD.to(device)


def platt(score_B, truth_B):
    """(scale > 0, offset) that make the scores log-odds of the truth: Platt scaling, with his smoothed targets."""
    true, false = truth_B.sum(), (1 - truth_B).sum()
    smooth_B = torch.where(truth_B > 0, (true + 1) / (true + 2), 1 / (false + 2))
    log_scale = torch.zeros((), requires_grad=True)
    offset = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, offset], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(log_scale.exp() * score_B + offset, smooth_B)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_scale.exp().item(), offset.item()
