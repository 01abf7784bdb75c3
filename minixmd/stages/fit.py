"""The training loop of the two small networks, Switch's Cnn14 and FactCheck's verifier."""
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minixmd.learning.optim import learning_rate
from minixmd.models.cnn14 import load_weights, make_cnn14
from minixmd.models.lora import hash_seed


@dataclass(frozen=True)
class Schedule:
    """How a small network is trained; both stages have fields of these names."""

    name: str  # of the progress bar and of messages
    epochs: int
    batch_size: int  # items of an optimizer step
    lr: float  # peak, of Adam
    warmup_ratio: float  # share of the steps
    seed: int  # of the order and of the noise


def new_cnn14(outputs, width, weights, seed):
    """A Cnn14 with a new head. weights: path of a checkpoint for the rest of it; None = from scratch."""
    model = make_cnn14(outputs, width, seed)
    if weights:
        load_weights(model, weights, head=False)
    return model


def train_epochs(model, optimizer, batch_loss, items, schedule, first_epoch=0):
    """Trains epoch by epoch on every item in a new order; a smaller last batch is left out.

    Args:
        batch_loss: function(items of a batch, generator) -> loss, a scalar; augmentation and dropout draw from the
            generator, which is on the model's device.
        items: list of at least batch_size.
        first_epoch: epochs that are done. An epoch's order and noise depend on the seed and its number alone.
    Yields:
        After each epoch its number, from 1, and the losses of its steps: (S,) fp32, on the model's device.
    Raises:
        ValueError: a loss is not finite.
    """
    device = next(model.parameters()).device
    size = schedule.batch_size
    steps = len(items) // size
    for epoch in tqdm(range(first_epoch, schedule.epochs), schedule.name, schedule.epochs, initial=first_epoch,
                      unit="epoch"):
        shuffle = torch.Generator().manual_seed(hash_seed(schedule.seed, "order", epoch))
        noise = torch.Generator(device).manual_seed(hash_seed(schedule.seed, "noise", epoch))
        order = [items[i] for i in torch.randperm(len(items), generator=shuffle).tolist()]
        losses = []
        model.train()
        for step in range(steps):
            loss = batch_loss(order[step * size:(step + 1) * size], noise)
            lr = learning_rate(epoch * steps + step, schedule.epochs * steps, schedule.lr, schedule.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        loss_S = torch.stack(losses)
        mean = loss_S.mean().item()
        if not math.isfinite(mean):
            raise ValueError(f"{schedule.name}: the loss of epoch {epoch + 1} is {mean}; stopped")
        yield epoch + 1, loss_S
