"""PANN's Cnn14_16k: six blocks of 3 x 3 convolutions over the log-mel picture of a sound, one vector, then classes.

Attribute names equal the published file's, Cnn14_16k_mAP=0.438.pth. Three of its tensors are the front end's, which
inputs/panns.py computes before the model: the model keeps them, frozen and unused, so that a file is accounted for both
ways, and a file whose front end is another is refused.

Letters: B clips, A frames of 10 ms, M = 64 mel bins, C channels, E the embedding's width, K classes.
"""
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minixmd.inputs.panns import MELS, front_end
from minixmd.models.shards import open_safetensors
from minixmd.runs.seeds import hash_seed

CHANNELS = (64, 128, 256, 512, 1024, 2048)
MIN_FRAMES = 32  # five poolings by 2 leave one
DROP_CONV, DROP_FC = 0.2, 0.5
STRIPES, TIME_STRIPE, MEL_STRIPE = 2, 64 / 1001, 8  # the widest: a share of the frames (64 of 10 s) and mel bins


class ConvBlock(nn.Module):
    def __init__(self, C_in, C_out):
        super().__init__()
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(C_out, C_out, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(C_out), nn.BatchNorm2d(C_out)

    def forward(self, x_BCAM):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_BCAM))))))


class Cnn14(nn.Module):
    """Args: classes; width, by which all channel counts are multiplied, 1 = as published."""

    def __init__(self, classes=527, width=1.0):
        super().__init__()
        C = [1, *(max(1, round(width * channels)) for channels in CHANNELS)]
        for name, tensor in front_end().items():
            _place(self, name, nn.Parameter(tensor, requires_grad=False))
        self.bn0 = nn.BatchNorm2d(MELS)
        for i in range(len(CHANNELS)):
            self.add_module(f"conv_block{i + 1}", ConvBlock(C[i], C[i + 1]))
        self.fc1 = nn.Linear(C[-1], C[-1])
        self.fc_audioset = nn.Linear(C[-1], classes)

    def forward(self, logmel_BAM):
        """Logits (B, K); the original's outputs are their sigmoid."""
        return self.fc_audioset(self.embed(self.normalise(logmel_BAM)))

    def normalise(self, logmel_BAM):
        """Every mel bin by its own mean and variance, (B, 1, A, M). Here the original augments."""
        if logmel_BAM.shape[1] < MIN_FRAMES:
            raise ValueError(f"too short: {logmel_BAM.shape[1]} frames of 10 ms, Cnn14 needs {MIN_FRAMES}")
        return self.bn0(logmel_BAM[..., None].transpose(1, 2)).permute(0, 3, 2, 1)

    def embed(self, x_B1AM, generator=None):
        """The embedding (B, E) of normalised frames. generator: of the dropout masks; None = no dropout."""
        x = x_B1AM
        for i in range(len(CHANNELS)):
            x = self.get_submodule(f"conv_block{i + 1}")(x)  # BCAM
            x = F.avg_pool2d(x, 2) if i < len(CHANNELS) - 1 else x
            x = _dropout(x, DROP_CONV, generator)
        x = x.mean(3)
        x = _dropout(x.max(2).values + x.mean(2), DROP_FC, generator)  # BC
        return _dropout(F.relu(self.fc1(x)), DROP_FC, generator)


def _place(model, name, parameter):
    """model.a.b.c = parameter for the name "a.b.c"; what is missing on the way becomes a bare module."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = getattr(model, part)
    model.register_parameter(leaf, parameter)


def _dropout(x, p, generator):
    """torch's own draws from the global generator, which a resumed run could not go on with."""
    if generator is None:
        return x
    return x * (torch.rand(x.shape, generator=generator, device=x.device) >= p) / (1 - p)


def spec_augment(x_B1AM, generator):
    """SpecAugment: of every clip two stripes of time and two of mel bins become 0, the mean."""
    B, _, A, M = x_B1AM.shape
    keep_BA = _stripes(B, A, round(TIME_STRIPE * A), generator)
    return x_B1AM * keep_BA[:, None, :, None] * _stripes(B, M, MEL_STRIPE, generator)[:, None, None]


def _stripes(count, size, widest, generator):
    """(count, size) bool, False in stripes: widths uniform in 0 … widest - 1, places uniform."""
    at, keep = torch.arange(size, device=generator.device), True
    for _ in range(STRIPES):
        width, place = torch.rand(2, count, 1, generator=generator, device=generator.device)
        width = (width * widest).long()
        start = (place * (size - width)).long()
        keep = keep & ((at < start) | (at >= start + width))
    return keep


def mixup(x_B1AM, target_BK, generator):
    """Clips 0 and 1 in one, 2 and 3 in one …, and their targets likewise; B is even. The share of the first is from
    Beta(1, 1), which is uniform."""
    share_B1 = torch.rand(len(x_B1AM) // 2, 1, generator=generator, device=generator.device)
    share_B111 = share_B1[..., None, None]
    return (x_B1AM[0::2] * share_B111 + x_B1AM[1::2] * (1 - share_B111),
            target_BK[0::2] * share_B1 + target_BK[1::2] * (1 - share_B1))


def make_cnn14(classes, width, seed):
    """A Cnn14 whose weights are drawn from `seed` and their names: Xavier's uniform, as the original's."""
    with torch.device("meta"):
        model = Cnn14(classes, width)
    model.to_empty(device="cpu")
    for name, t in model.state_dict().items():
        if name in front_end():
            t.copy_(front_end()[name])
        elif t.ndim > 1:
            bound = (6 / (t[0].numel() + t[:, 0].numel())) ** 0.5
            generator = torch.Generator().manual_seed(hash_seed(seed, name))
            t.copy_(torch.rand(t.shape, generator=generator) * 2 * bound - bound)
        else:
            t.fill_(1 if name.endswith(("weight", "running_var")) else 0)
    return model


def load_weights(model, path, head=True):
    """Fill a Cnn14 from a checkpoint: PANNs' .pth ({"model": tensors, …} or the tensors alone) or safetensors.

    Args:
        head: False leaves the model its own fc_audioset, for other classes than the file's.
    Raises:
        ValueError: no checkpoint that can be read without running code; or missing, unexpected and misshapen tensors
            and a front end that is not ours, all in one message.
    """
    given, ours = _read(Path(path)), model.state_dict()
    if not head:
        given, ours = ({n: t for n, t in state.items() if not n.startswith("fc_audioset.")} for state in (given, ours))
    faults = {name: f"missing {name}" for name in ours.keys() - given.keys()}
    for name, tensor in given.items():
        if name not in ours:
            faults[name] = f"unexpected {name}"
        elif tensor.shape != ours[name].shape:
            faults[name] = f"{name} has shape {list(tensor.shape)}, expected {list(ours[name].shape)}"
        elif name in front_end() and not torch.allclose(tensor.float(), front_end()[name], rtol=0, atol=1e-5):
            faults[name] = f"{name} is of another front end"
    if faults:
        listed = "; ".join(sorted(faults.values()))
        raise ValueError(f"{path}: not this Cnn14_16k, {len(faults)} tensors do not fit: {listed}")
    for name, tensor in given.items():
        ours[name].copy_(tensor)


def _read(path):
    """{name: tensor} of a file."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split()).split(". ")[0]  # not the advice
        raise ValueError(f"{path}: no checkpoint that can be read without running code: {reason}") from None
    state = found.get("model", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{path}: holds no tensors by name, as PANNs' checkpoints do under 'model'")
    return state


def _numpy_globals():
    """What unpickles plain numpy arrays and numbers, under the names of numpy 1 and 2: PANNs' training script stored
    the state of its sampler beside the weights."""
    rebuild, scalar = np.zeros(1).__reduce__()[0], np.int64(0).__reduce__()[0]
    named = [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
             for function, name in ((rebuild, "_reconstruct"), (scalar, "scalar"))]
    return [*named, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefdO"}]
