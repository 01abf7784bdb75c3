"""What training a Cnn14 takes, for Switch and FactCheck's verifier: the clips' log-mel frames and the epochs."""
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.clips import read_sound
from minixmd.inputs.panns import log_mel
from minixmd.inputs.prompts import prefetch
from minixmd.learning.optim import learning_rate
from minixmd.runs.heartbeat import beat
from minixmd.runs.records import bad_record
from minixmd.runs.seeds import hash_seed, shuffled


def load_logmel(path, clip_s, cache=None):
    """The log-mel frames (A, M) of a clip's first clip_s seconds, then of silence, in numpy. Raises MediaError."""
    wave_S = read_sound(path, clip_s, cache)
    return log_mel(F.pad(wave_S, (0, round(clip_s * SAMPLE_RATE) - len(wave_S)))).numpy()


def load_logmels(examples, stage):
    """({id: log-mel frames (A, M)} of the clips that can be used, {id: bad record} of the others), in order."""
    logmels, bad = {}, {}

    def load_one(example, load):
        return torch.from_numpy(load(example.audio, stage.clip_s))

    loaded = prefetch(load_one, examples, bad_record, load=load_logmel, reading=stage.reading)
    bar = tqdm(loaded, f"{stage.name}: reading clips", len(examples), unit="clip", leave=False)
    for example, found in zip(examples, bar, strict=True):
        kind = bad if isinstance(found, dict) else logmels
        kind[example.id] = found
    return logmels, bad


def train_epochs(stage, model, optimizer, batch_loss, items, batch_size, first_epoch=0):
    """Trains epoch by epoch on every item in a new order, by seed and epoch; a smaller last batch is left out.
    batch_loss: function(items of a batch, generator for augmentation and dropout) -> scalar. first_epoch: epochs that
    are done. Yields after each its number, from 1, and its steps' losses (S,), fp32. Raises ValueError: not finite."""
    device = next(model.parameters()).device
    steps = len(items) // batch_size
    bar = tqdm(range(first_epoch, stage.epochs), stage.name, stage.epochs, initial=first_epoch, unit="epoch")
    for epoch in bar:
        noise = torch.Generator(device).manual_seed(hash_seed(stage.seed, "noise", epoch))
        order = shuffled(items, stage.seed, "order", epoch)
        losses = []
        model.train()
        for step in range(steps):
            beat()
            loss = batch_loss(order[step * batch_size:(step + 1) * batch_size], noise)
            lr = learning_rate(epoch * steps + step, stage.epochs * steps, stage.lr, stage.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        loss_S = torch.stack(losses)
        mean = loss_S.mean().item()
        if not math.isfinite(mean):
            raise ValueError(f"{stage.name}: the loss of epoch {epoch + 1} is {mean}; stopped")
        bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
        yield epoch + 1, loss_S
