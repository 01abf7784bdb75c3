"""The audio tower: Whisper's encoder as Qwen2-Audio uses it, and Qwen2.5-Omni's variant of it.

Qwen2-Audio pads a clip to 30 s and masks the keys beyond its end, so only the convolutions look there: at two mel
frames, which the log-mel carries as a halo. Without the padding the clip's own frames give the same numbers. Omni has
the same blocks, but cuts a clip into chunks of 2 s that do not see each other."""
import math
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from minixmd.inputs.audio import MELS
from minixmd.inputs.batch import consecutive_segments
from minixmd.models.attention import packed_attention
from minixmd.models.checkpointing import run_block
from minixmd.models.lora import Linear, apply_linears


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.H = config.encoder_attention_heads
        E = config.d_model
        self.k_proj = Linear(E, E, bias=False)
        self.v_proj = Linear(E, E)
        self.q_proj = Linear(E, E)
        self.out_proj = Linear(E, E)

    def forward(self, x_AE, segments):
        projected = apply_linears(x_AE, self.q_proj, self.k_proj, self.v_proj)
        q_AHK, k_AHK, v_AHK = (x.unflatten(-1, (self.H, -1)) for x in projected)
        o_AHK = packed_attention(q_AHK, k_AHK, v_AHK, segments, causal=False)
        return self.out_proj(o_AHK.flatten(1))


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
        hidden_AF = F.gelu(self.fc1(self.final_layer_norm(x_AE)))
        return x_AE + self.fc2(hidden_AF)


class Whisper(nn.Module):
    """config.n_window chooses: None, a clip is encoded whole; a number, in chunks of 2 n_window mel frames."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(MELS, config.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3, stride=2, padding=1)
        if config.n_window is None:
            self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.checkpointing = False  # checkpointing.set_checkpointing
        if config.n_window is None:
            self.layer_norm = nn.LayerNorm(config.d_model)
        else:
            self.ln_post = nn.LayerNorm(config.d_model)
            self.proj = Linear(config.d_model, config.output_dim)
            self.audio_bos_eos_token = nn.Embedding(2, config.output_dim)  # in the file; nothing reads it

    def forward(self, media):
        """Audio tokens of a list of Media, (sum of tokens, E), in Omni's tower of the decoder's width. A clip has
        A = ceil(frames / 2) positions, which are averaged in pairs (an odd last one drops)."""
        x_AE, lengths = self.convolve(media)
        segments = consecutive_segments(lengths)
        for layer in self.layers:
            x_AE = run_block(self, layer, x_AE, segments)
        clips = x_AE.split([(m.frames + 1) // 2 for m in media])
        x_AE = torch.cat([F.avg_pool1d(clip_AE.T, 2).T for clip_AE in clips])
        if self.config.n_window is None:
            return self.layer_norm(x_AE)
        return self.proj(self.ln_post(x_AE))

    def convolve(self, media):
        """The first block's input, (sum of A, E), and A of each clip or chunk. Neighbours of one size share a call."""
        chunks = []  # mel_MA, and how many of its frames are not halo
        for m in media:
            if self.config.n_window is None:
                chunks.append((m.features, m.frames))
            else:
                mels = m.features[:, :m.frames].split(2 * self.config.n_window, dim=1)
                chunks += [(mel_MA, mel_MA.shape[1]) for mel_MA in mels]
        positions_AE = self.positions(media[0].features.device)
        rows, lengths = [], []
        for (frames, _), run in groupby(chunks, key=lambda chunk: (chunk[1], chunk[0].shape)):
            A = (frames + 1) // 2
            mel_BMA = torch.stack([mel_MA for mel_MA, _ in run])
            x_BEA = F.gelu(self.conv1(mel_BMA.to(self.conv1.weight.dtype)))
            x_BEA = F.gelu(self.conv2(x_BEA))
            x_BAE = x_BEA[:, :, :A].transpose(1, 2) + positions_AE[:A].to(x_BEA.dtype)
            rows.append(x_BAE.flatten(0, 1))
            lengths += [A] * len(mel_BMA)
        return torch.cat(rows), lengths

    def positions(self, device):
        if self.config.n_window is None:
            return self.embed_positions.weight
        return sinusoids(self.config.n_window, self.config.d_model, device)


def sinusoids(length, width, device="cpu"):
    """Positions (length, width), fp32: sines, then cosines, of width/2 wavelengths from 2 pi to 10,000 times that."""
    half = width // 2
    step = -math.log(10000.0) / (half - 1)
    speed_E = torch.exp(step * torch.arange(half, device=device).float())
    time_A = torch.arange(length, device=device).float()
    angle_AE = time_A[:, None] * speed_E
    return torch.cat([angle_AE.sin(), angle_AE.cos()], dim=1)
