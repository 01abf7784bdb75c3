"""Whisper's encoder as Qwen2-Audio uses it, on the frames that exist instead of a padded 30 seconds.

The padded encoder masks the keys beyond the clip, so only its convolutions look past the end: two mel frames, which the
log-mel carries as a halo. Everything after runs on the clip's own A frames and gives the same numbers.

Qwen2.5-Omni's tower has the same blocks, but cuts a clip into chunks of 2 s that do not see each other.
"""
import math
from itertools import accumulate, groupby

import torch
from torch import nn

from minixmd.inputs.batch import Segment
from minixmd.models.attention import packed_attention
from minixmd.models.lora import Linear, linears


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.H = config.encoder_attention_heads
        self.k_proj = Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = Linear(config.d_model, config.d_model)
        self.q_proj = Linear(config.d_model, config.d_model)
        self.out_proj = Linear(config.d_model, config.d_model)

    def forward(self, x_AE, segments):
        q, k, v = (y.unflatten(-1, (self.H, -1)) for y in linears(x_AE, self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(packed_attention(q, k, v, segments, causal=False).flatten(1))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x_AE, segments):
        x_AE = x_AE + self.self_attn(self.self_attn_layer_norm(x_AE), segments)
        return x_AE + self.fc2(nn.functional.gelu(self.fc1(self.final_layer_norm(x_AE))))


class Whisper(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, media):
        """Clips to audio tokens.

        Args:
            media: list of audio Media; features mel_MA with up to two frames of halo after `frames`.
        Returns:
            (sum of tokens, E): each clip's A = ceil(frames / 2) positions, averaged in pairs (an odd last one drops).
        """
        x_AE, lengths = self.convolve(media)
        segments = [Segment(end - A, A) for A, end in zip(lengths, accumulate(lengths), strict=True)]
        for layer in self.layers:
            x_AE = layer(x_AE, segments)
        return self.layer_norm(_pool(x_AE, lengths))

    def convolve(self, media):
        """Both convolutions and the position table: (sum of A, E) and each clip's A; like neighbours share a call."""
        rows, lengths = [], []
        for (frames, _), run in groupby(media, key=lambda m: (m.frames, m.features.shape)):
            mel_BMA = torch.stack([m.features for m in run]).to(self.conv1.weight.dtype)
            A = (frames + 1) // 2
            x = nn.functional.gelu(self.conv2(nn.functional.gelu(self.conv1(mel_BMA))))[:, :, :A].transpose(1, 2)
            rows.append((x + self.embed_positions.weight[:A]).flatten(0, 1))
            lengths += [A] * len(mel_BMA)
        return torch.cat(rows), lengths


class ChunkedWhisper(nn.Module):
    """Omni's audio tower: up to the pooling, every chunk of 2 n_window mel frames is a clip of its own."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.ln_post = nn.LayerNorm(config.d_model)
        self.proj = Linear(config.d_model, config.output_dim)
        self.audio_bos_eos_token = nn.Embedding(2, config.output_dim)  # in the file; nothing reads it

    def positions(self, device):
        return sinusoids(self.config.n_window, self.config.d_model, device)

    def forward(self, media):
        """Clips to audio tokens in the decoder's width.

        Args:
            media: list of audio Media; only the first `frames` columns of their features are read.
        Returns:
            (sum of tokens, D): the clip's chunks in a row, averaged in pairs (an odd last one drops).
        """
        size = 2 * self.config.n_window
        chunks = [chunk for m in media for chunk in m.features[:, :m.frames].split(size, dim=1)]
        lengths = [(chunk.shape[1] + 1) // 2 for chunk in chunks]
        positions_AE = self.positions(chunks[0].device)
        rows = []
        for length, run in groupby(chunks, key=lambda chunk: chunk.shape[1]):
            mel_BMA = torch.stack(list(run)).to(self.conv1.weight.dtype)
            x = nn.functional.gelu(self.conv2(nn.functional.gelu(self.conv1(mel_BMA)))).transpose(1, 2)
            rows.append((x + positions_AE[:(length + 1) // 2].to(x.dtype)).flatten(0, 1))
        x_AE = torch.cat(rows)
        segments = [Segment(end - A, A) for A, end in zip(lengths, accumulate(lengths), strict=True)]
        for layer in self.layers:
            x_AE = layer(x_AE, segments)
        clips = [(m.frames + 1) // 2 for m in media]
        return self.proj(self.ln_post(_pool(x_AE, clips)))


def sinusoids(length, width, device="cpu"):
    """Positions (length, width), fp32: sines, then cosines, of width/2 wavelengths from 2 pi to 10,000 times that."""
    half = width // 2
    speed_E = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=device).float())
    angle_AE = torch.arange(length, device=device)[:, None].float() * speed_E
    return torch.cat([angle_AE.sin(), angle_AE.cos()], dim=1)


def _pool(x_AE, lengths):
    """The mean of each clip's neighbouring rows, two by two; an odd last row drops."""
    ends = accumulate(lengths)
    first = torch.cat([torch.arange(end - A, end - 1, 2) for A, end in zip(lengths, ends, strict=True)]).to(x_AE.device)
    return (x_AE[first] + x_AE[first + 1]) / 2
