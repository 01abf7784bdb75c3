"""PANN's Cnn14_16k: six blocks of 3 x 3 convolutions over a clip's log-mel frames, one embedding, then classes.

Attribute names equal the published file's, Cnn14_16k_mAP=0.438.pth, but for three tensors of the front end, which are
not kept: a file with another front end is refused.
Letters: B clips, A frames of 10 ms, M = 64 mel bins, C channels, E the embedding's width, K classes."""
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minixmd.inputs.panns import MELS, front_end
from minixmd.models.shards import open_safetensors, tensor_faults
from minixmd.runs.seeds import hash_seed

CHANNELS = (64, 128, 256, 512, 1024, 2048)
DROP_CONV, DROP_FC = 0.2, 0.5
STRIPES, TIME_STRIPE, MEL_STRIPE = 2, 64 / 1001, 8  # the widest: a share of the frames (64 of 10 s) and mel bins


class ConvBlock(nn.Module):
    def __init__(self, C_in, C_out):
        super().__init__()
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(C_out, C_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C_out)
        self.bn2 = nn.BatchNorm2d(C_out)

    def forward(self, x_BCAM):
        x_BCAM = F.relu(self.bn1(self.conv1(x_BCAM)))
        return F.relu(self.bn2(self.conv2(x_BCAM)))


class Cnn14(nn.Module):
    """Args: classes; width, by which all channel counts are multiplied, 1 = as published."""

    def __init__(self, classes=527, width=1.0):
        super().__init__()
        channels = [max(1, round(width * C)) for C in CHANNELS]
        self.bn0 = nn.BatchNorm2d(MELS)
        for i, (C_in, C_out) in enumerate(pairwise([1, *channels]), 1):
            self.add_module(f"conv_block{i}", ConvBlock(C_in, C_out))
        self.fc1 = nn.Linear(channels[-1], channels[-1])
        self.fc_audioset = nn.Linear(channels[-1], classes)

    def forward(self, logmel_BAM):
        """Logits (B, K) of A >= 32 frames (after five poolings 1); the original's outputs are their sigmoid."""
        return self.fc_audioset(self.embed(self.normalise(logmel_BAM)))

    def normalise(self, logmel_BAM):
        """Every mel bin by its own mean and variance, (B, 1, A, M). Augmentations go between this and `embed`."""
        return self.bn0(logmel_BAM[..., None].transpose(1, 2)).permute(0, 3, 2, 1)

    def embed(self, x_B1AM, generator=None):
        """The embedding (B, E) of normalised frames. generator: of the dropout masks; None = no dropout."""
        x_BCAM = x_B1AM
        for i in range(1, len(CHANNELS) + 1):
            x_BCAM = self.get_submodule(f"conv_block{i}")(x_BCAM)
            if i < len(CHANNELS):
                x_BCAM = F.avg_pool2d(x_BCAM, 2)
            x_BCAM = _dropout(x_BCAM, DROP_CONV, generator)
        x_BCA = x_BCAM.mean(3)
        x_BC = _dropout(x_BCA.max(2).values + x_BCA.mean(2), DROP_FC, generator)
        return _dropout(F.relu(self.fc1(x_BC)), DROP_FC, generator)


def _dropout(x, p, generator):
    """Dropout from a generator of its own: the global one, which torch's uses, is not resumed with a run."""
    if generator is None:
        return x
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * keep / (1 - p)


def spec_augment(x_B1AM, generator):
    """SpecAugment: of every clip two stripes of time and two of mel bins become 0, the mean."""
    B, _, A, M = x_B1AM.shape
    keep_BA = _stripes(B, A, round(TIME_STRIPE * A), generator)
    keep_BM = _stripes(B, M, MEL_STRIPE, generator)
    return x_B1AM * keep_BA[:, None, :, None] * keep_BM[:, None, None]


def _stripes(count, size, widest, generator):
    """(count, size) bool, False in stripes: widths uniform in 0 … widest - 1, places uniform."""
    index = torch.arange(size, device=generator.device)
    keep = True
    for _ in range(STRIPES):
        width, place = torch.rand(2, count, 1, generator=generator, device=generator.device)
        width = (width * widest).long()
        start = (place * (size - width)).long()
        keep = keep & ((index < start) | (index >= start + width))
    return keep


def mixup(x_B1AM, target_BK, generator):
    """Mixes clips 0 and 1, 2 and 3 …, and their targets likewise, by shares from Beta(1, 1), the uniform one."""
    share_B1 = torch.rand(len(x_B1AM) // 2, 1, generator=generator, device=generator.device)
    share_B111 = share_B1[..., None, None]
    mixed_B1AM = x_B1AM[0::2] * share_B111 + x_B1AM[1::2] * (1 - share_B111)
    return mixed_B1AM, target_BK[0::2] * share_B1 + target_BK[1::2] * (1 - share_B1)


def make_cnn14(classes, width, seed, weights=None):
    """A Cnn14 of Xavier's uniform weights, drawn by `seed` and name. weights: a file for load_weights, or None."""
    with torch.device("meta"):
        model = Cnn14(classes, width)
    model.to_empty(device="cpu")
    for name, t in model.state_dict().items():
        if t.ndim > 1:
            fan_in, fan_out = t[0].numel(), t[:, 0].numel()
            bound = (6 / (fan_in + fan_out)) ** 0.5
            generator = torch.Generator().manual_seed(hash_seed(seed, name))
            t.copy_(torch.rand(t.shape, generator=generator) * 2 * bound - bound)
        else:
            t.fill_(1 if name.endswith(("weight", "running_var")) else 0)
    if weights:
        load_weights(model, weights)
    return model


def load_weights(model, path):
    """Fill a Cnn14, but for its head, from a checkpoint: PANNs' .pth ({"model": tensors, …} or the tensors alone) or
    safetensors. Raises ValueError: the file cannot be read without running code; or all tensors that do not fit."""
    tensors, state = _read(Path(path)), model.state_dict()
    for name in ("fc_audioset.weight", "fc_audioset.bias"):
        tensors.pop(name, None)
        del state[name]
    faults = tensor_faults(tensors, {**state, **front_end()})
    for name, tensor in front_end().items():
        if name not in faults and not torch.allclose(tensors[name].float(), tensor, rtol=0, atol=1e-5):
            faults[name] = f"{name} is of another front end"
    if faults:
        listed = "; ".join(sorted(faults.values()))
        raise ValueError(f"{path}: not this Cnn14_16k, {len(faults)} tensors do not fit: {listed}")
    for name, tensor in state.items():
        tensor.copy_(tensors[name])


def _read(path):
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]
        reason = " ".join(reason.split()).split(". ")[0]  # without torch's advice
        raise ValueError(f"{path}: no checkpoint that can be read without running code: {reason}") from None
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{path}: holds no tensors by name, as PANNs' checkpoints do under 'model'")
    return dict(state)


def _numpy_globals():
    """What unpickles numpy arrays and numbers, as PANNs' training script stored them beside the weights."""
    reconstruct, scalar = (value.__reduce__()[0] for value in (np.zeros(1), np.int64(0)))
    allowed = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefdO"}]
    for core in ("core", "_core"):  # numpy 1's and 2's
        allowed.append((reconstruct, f"numpy.{core}.multiarray._reconstruct"))
        allowed.append((scalar, f"numpy.{core}.multiarray.scalar"))
    return allowed
