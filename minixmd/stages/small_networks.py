"""The training loop of the two small networks, Switch's Cnn14 and FactCheck's verifier."""
import math

import torch
from tqdm import tqdm

from minixmd.learning.optim import learning_rate
from minixmd.runs.seeds import hash_seed


def train_epochs(stage, model, optimizer, batch_loss, items, batch_size, first_epoch=0):
    """Trains epoch by epoch on every item in a new order; a smaller last batch is left out.

    Args:
        stage: Switch or FactCheck, for its name, epochs, lr, warmup_ratio and seed.
        batch_loss: function(items of a batch, generator on the model's device for augmentation and dropout) -> scalar.
        items: list of at least batch_size.
        first_epoch: epochs that are done. An epoch's order and noise depend on the seed and its number alone.
    Yields:
        After each epoch its number, from 1, and the losses of its steps: (S,) fp32, on the model's device. Raises
        ValueError where one is not finite.
    """
    device = next(model.parameters()).device
    steps = len(items) // batch_size
    for epoch in tqdm(range(first_epoch, stage.epochs), stage.name, stage.epochs, initial=first_epoch, unit="epoch"):
        shuffle = torch.Generator().manual_seed(hash_seed(stage.seed, "order", epoch))
        noise = torch.Generator(device).manual_seed(hash_seed(stage.seed, "noise", epoch))
        order = [items[i] for i in torch.randperm(len(items), generator=shuffle).tolist()]
        losses = []
        model.train()
        for step in range(steps):
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
        yield epoch + 1, loss_S
