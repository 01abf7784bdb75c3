"""A small trained verifier: is what a trace says true of a clip? It learns that from the verdicts of a larger checker.

Section 3.2 of SightSound-R1 names it and gives no form; this one is ours. The clip is a Cnn14's output, the trace the
mean hidden state of its tokens in the frozen student's decoder, brought to the same width; their scaled product is the
score. The mean over clips is taken out of the first, so that on an average of clips every trace scores the same: what
the words alone suggest is no evidence. Beside each judged pair stands a mismatched one, the same clip with the trace of
a clip that was answered otherwise, which is taken to be false: a few hundred verdicts hold too few falsehoods to learn
from. Four judged traces in five train; on the others a scale and an offset make the score a log-odds of the checker's
"yes".
"""
import math

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from minixmd.inputs.batch import Prompt, pack
from minixmd.inputs.positions import positions_of
from minixmd.inputs.prompts import batch_by_tokens
from minixmd.learning.optim import learning_rate
from minixmd.models.cnn14 import load_weights, make_cnn14, spec_augment
from minixmd.runs.files import write_safetensors
from minixmd.runs.seeds import hash_seed

WIDTH = 128  # in which a clip and a trace meet
HELD = 5  # one judged trace in so many is not trained on


class Verifier(nn.Module):
    """verifier(logmel_BAM, text_BD) gives scores (B,): above 0, more likely true than not."""

    def __init__(self, cnn, D):
        super().__init__()
        self.cnn, self.text, self.centre = cnn, nn.Linear(D, WIDTH), nn.BatchNorm1d(WIDTH, affine=False)
        for name in ("mean_D", "std_D"):  # of the text vectors that it was trained on
            self.register_buffer(name, torch.zeros(D))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, logmel_BAM, text_BD):
        return self.match(self.centre(self.cnn(logmel_BAM)), text_BD)

    def match(self, clip_BC, text_BD):
        text_BC = self.text((text_BD - self.mean_D) / self.std_D)
        return self.scale * (clip_BC * text_BC).sum(-1) / math.sqrt(WIDTH) + self.offset


def make_verifier(stage, D):
    """A new Verifier for text vectors of width D; its weights are drawn from the stage's seed."""
    cnn = make_cnn14(WIDTH, stage.width, stage.seed)
    if stage.weights:
        load_weights(cnn, stage.weights, head=False)
    verifier = Verifier(cnn, D)
    generator = torch.Generator().manual_seed(hash_seed(stage.seed, "text"))
    with torch.no_grad():
        verifier.text.weight.copy_(torch.randn(verifier.text.weight.shape, generator=generator) / math.sqrt(D))
        verifier.text.bias.zero_()
    return verifier


@torch.inference_mode()
def trace_vectors(model, processor, texts, batch_tokens):
    """The mean hidden state of each text's tokens, with nothing before them: (B, D) fp32 on the CPU.

    Raises:
        ValueError: a text without a token, or over the model's limit.
    """
    found = [torch.empty(0, model.config.text.hidden_size)]

    def prompts():
        for text in texts:
            ids = processor.encode(text)
            if not 0 < len(ids) <= processor.max_positions:
                raise ValueError(f"a trace of {len(ids)} tokens: {text[:60]!r}; the model's limit is "
                                 f"{processor.max_positions}")
            yield text, Prompt(torch.tensor(ids), positions_of(len(ids), []))

    for run in batch_by_tokens(prompts(), batch_tokens):
        batch = pack([prompt for _, prompt in run]).to(model.device)
        hidden_ND = model(batch).float()
        found += [hidden_ND[start:end].mean(0, keepdim=True).cpu() for start, end in batch.spans]
    return torch.cat(found)


def fit(stage, verifier, heard, text_BD, yes, answers, log, device):
    """Trains the verifier on judged pairs.

    Args:
        heard: log-mel frames (A, M) of each pair's clip. text_BD: of its trace. yes: whether the checker accepted it.
        answers: text of the option that its trace ends in.
    Returns:
        How many pairs it was given, and how it agrees with the checker on the held-out ones (agreement).
    Raises:
        ValueError: too few pairs, or all with the same verdict, in either part.
    """
    shuffled = torch.randperm(len(yes), generator=torch.Generator().manual_seed(hash_seed(stage.seed, "held"))).tolist()
    held, train = shuffled[: len(yes) // HELD], shuffled[len(yes) // HELD:]
    for part, name in ((train, "train"), (held, "validate")):
        if len({yes[i] for i in part}) < 2:
            raise ValueError(f"{stage.name}: of {len(yes)} verdicts the {len(part)} to {name} with are all the same, "
                             "or none: nothing can be learnt from them")
    verifier.to(device)
    verifier.mean_D.copy_(text_BD[train].mean(0))
    verifier.std_D.copy_(text_BD[train].std(0).clamp(min=1e-6))
    parameters = [p for p in verifier.parameters() if p.requires_grad]
    optimizer, size = torch.optim.Adam(parameters, lr=stage.lr), min(stage.batch_size, len(train))
    each = len(train) // size  # steps of an epoch; what is over has to wait for the next
    with tqdm(total=stage.epochs, desc=f"{stage.name}: verifier", unit="epoch") as bar:
        for epoch in range(stage.epochs):
            noise = torch.Generator(device).manual_seed(hash_seed(stage.seed, "noise", epoch))
            generator = torch.Generator().manual_seed(hash_seed(stage.seed, "order", epoch))
            order = [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
            losses = []
            verifier.train()
            for at in range(0, each * size, size):
                chosen = order[at:at + size]
                loss = pair_loss(verifier, heard, text_BD, yes, answers, chosen, noise, device)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(epoch * each + at // size, stage.epochs * each, stage.lr, stage.warmup_ratio)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            log({"epoch": epoch + 1, "loss": sum(losses) / len(losses)})
            if not math.isfinite(losses[-1]):
                raise ValueError(f"{stage.name}: the verifier's loss of epoch {epoch + 1} is {losses[-1]}; stopped")
            bar.set_postfix_str(f"loss {sum(losses) / len(losses):.3f}", refresh=False)
            bar.update()
    score_B = torch.tensor(scores(verifier, [heard[i] for i in held], text_BD[held], size))
    truth_B = torch.tensor([float(yes[i]) for i in held])
    scale, offset = platt(score_B, truth_B)
    verifier.scale.fill_(scale)
    verifier.offset.fill_(offset)
    return {"verdicts": len(yes), **agreement((scale * score_B + offset).tolist(), [yes[i] for i in held])}


def pair_loss(verifier, heard, text_BD, yes, answers, chosen, noise, device):
    """Cross-entropy of the judged pairs and, for each, of its clip with the trace of the next pair in the batch that
    gives another answer."""
    x_B1AM = verifier.cnn.normalise(torch.stack([heard[i] for i in chosen]).to(device))
    clip_BC = verifier.centre(verifier.cnn.fc_audioset(verifier.cnn.embed(spec_augment(x_B1AM, noise), noise)))
    score = verifier.match(clip_BC, text_BD[chosen].to(device))
    target = torch.tensor([float(yes[i]) for i in chosen], device=device)
    loss, other = F.binary_cross_entropy_with_logits(score, target, reduction="sum"), []
    for at, i in enumerate(chosen):
        rest = chosen[at + 1:] + chosen[:at]
        other.append(next((j for j in rest if answers[j] != answers[i]), None))
    at = [k for k, j in enumerate(other) if j is not None]
    if at:
        wrong = verifier.match(clip_BC[at], text_BD[[other[k] for k in at]].to(device))
        loss = loss + F.binary_cross_entropy_with_logits(wrong, torch.zeros_like(wrong), reduction="sum")
    return loss / (len(chosen) + len(at))


@torch.inference_mode()
def scores(verifier, heard, text_BD, batch_size):
    """Scores of pairs, a list of floats."""
    verifier.eval()
    device, found = verifier.scale.device, []
    for at in range(0, len(heard), batch_size):
        part = slice(at, at + batch_size)
        found += verifier(torch.stack(heard[part]).to(device), text_BD[part].to(device)).tolist()
    return found


def platt(score_B, truth_B, steps=100):
    """(scale > 0, offset) with which the scores are the likeliest log-odds of the truth: Platt scaling, with his
    smoothed targets."""
    counts = truth_B.sum(), (1 - truth_B).sum()
    smooth_B = torch.where(truth_B > 0, (counts[0] + 1) / (counts[0] + 2), 1 / (counts[1] + 2))
    log_scale, offset = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, offset], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(log_scale.exp() * score_B + offset, smooth_B)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_scale.exp().item(), offset.item()


def save(verifier, path):
    write_safetensors(path, verifier.state_dict())


def restore(stage, D, path, device):
    """The Verifier that `save` wrote, of a stage's shape and text vectors of width D."""
    verifier = make_verifier(stage, D)
    verifier.load_state_dict(load_file(path))
    return verifier.to(device)


# ---- how good it is ----


def auc(scores, truths):
    """Area under the ROC curve: the chance that a true one scores above a false one, ties counting a half; None where
    there are none of either."""
    true, false = (sum(t == wanted for t in truths) for wanted in (True, False))
    if not true or not false:
        return None
    order, ranks = sorted(range(len(scores)), key=scores.__getitem__), [0.0] * len(scores)
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or scores[order[end]] != scores[order[start]]:
            for i in order[start:end]:
                ranks[i] = (start + 1 + end) / 2  # of equal scores the mean
            start = end
    above = sum(rank for rank, truth in zip(ranks, truths, strict=True) if truth)
    return (above - true * (true + 1) / 2) / (true * false)


def roc(scores, truths, points=50):
    """[[false positive rate, true positive rate], …] at up to `points` thresholds, from (0, 0) to (1, 1)."""
    true, false = (sum(t == wanted for t in truths) for wanted in (True, False))
    cuts = sorted(set(scores), reverse=True)
    cuts = cuts[:: -(-len(cuts) // points)]
    curve = [[sum(s >= cut and t == wanted for s, t in zip(scores, truths, strict=True)) / max(1, n)
              for wanted, n in ((False, false), (True, true))] for cut in cuts]
    return [[0.0, 0.0], *curve, [1.0, 1.0]]


def agreement(scores, truths):
    """A score above 0 against the truth: the share that agrees, the counts [[true no said no, true no said yes], [true
    yes said no, true yes said yes]], and the ROC curve with its area."""
    said = [score > 0 for score in scores]
    confusion = [[sum(t == truth and s == one for s, t in zip(said, truths, strict=True)) for one in (False, True)]
                 for truth in (False, True)]
    return {"count": len(truths), "agreement": (confusion[0][0] + confusion[1][1]) / len(truths),
            "confusion": confusion, "auc": auc(scores, truths), "roc": roc(scores, truths)}
