"""The vision tower: a ViT over frame pairs with two-dimensional rotary positions, then a 2x2 merge.

Qwen2-VL: LayerNorm, a plain MLP, every block sees a whole frame pair. Qwen2.5-VL and Omni: RMSNorm, a gated MLP, and
most blocks see windows of 112 pixels; the rows are put in window order once, so that a window is a run of neighbours.
"""
from itertools import accumulate

import torch
from torch import nn

from minixmd.inputs.batch import Segment
from minixmd.models.attention import packed_attention, rotate
from minixmd.models.lora import Linear, linears
from minixmd.models.qwen2 import RMSNorm


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, hence one product over each patch's 3 x 2 x 14 x 14 values."""

    def __init__(self, config):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.width, size, stride=size, bias=False)

    def forward(self, patches_PC):
        return nn.functional.linear(patches_PC.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class Attention(nn.Module):
    def __init__(self, config, split_qkv):
        super().__init__()
        self.H, self.split_qkv = config.num_heads, split_qkv
        if split_qkv:
            self.q, self.k, self.v = (Linear(config.width, config.width) for _ in range(3))
        else:
            self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def forward(self, x_PE, cos_PK, sin_PK, segments):
        three = linears(x_PE, self.q, self.k, self.v) if self.split_qkv else self.qkv(x_PE).chunk(3, dim=-1)
        q, k, v = (x.unflatten(-1, (self.H, -1)) for x in three)
        o_PHK = packed_attention(rotate(q, cos_PK, sin_PK), rotate(k, cos_PK, sin_PK), v, segments, causal=False)
        return self.proj(o_PHK.flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.width, int(config.width * config.mlp_ratio))
        self.fc2 = Linear(int(config.width * config.mlp_ratio), config.width)

    def forward(self, x_PE):
        x = self.fc1(x_PE)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # "quick" GELU


class GatedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.width, config.intermediate_size)
        self.up_proj = Linear(config.width, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.width)

    def forward(self, x_PE):
        gate_PF, up_PF = linears(x_PE, self.gate_proj, self.up_proj)
        return self.down_proj(nn.functional.silu(gate_PF) * up_PF)


def _norm(config):
    return nn.LayerNorm(config.width, eps=1e-6) if config.window_size is None else RMSNorm(config.width, 1e-6)


class Block(nn.Module):
    def __init__(self, config, split_qkv):
        super().__init__()
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = Attention(config, split_qkv)
        self.mlp = MLP(config) if config.window_size is None else GatedMLP(config)

    def forward(self, x_PE, cos_PK, sin_PK, segments):
        x_PE = x_PE + self.attn(self.norm1(x_PE), cos_PK, sin_PK, segments)
        return x_PE + self.mlp(self.norm2(x_PE))


class Merger(nn.Module):
    """Four neighbouring patches become one token of the decoder's width."""

    def __init__(self, config):
        super().__init__()
        self.width = config.width * config.spatial_merge_size**2
        self.ln_q = _norm(config)
        self.mlp = nn.Sequential(Linear(self.width, self.width), nn.GELU(), Linear(self.width, config.out_width))

    def forward(self, x_PE):
        return self.mlp(self.ln_q(x_PE).reshape(-1, self.width))


def window_order(grid_thw, side):
    """The merged tokens of a clip, window by window: their numbers in frame order, and each window's token count.

    Windows are `side` x `side` merged tokens, cut from a frame's top left corner; those at the right and lower edge
    hold what is left.
    """
    t, h, w = grid_thw[0], grid_thw[1] // 2, grid_thw[2] // 2
    frame_hw = torch.arange(h * w).view(h, w)
    windows = [tile.flatten() for rows in frame_hw.split(side) for tile in rows.split(side, dim=1)]
    order = torch.cat([torch.cat(windows) + i * h * w for i in range(t)])
    return order, [len(window) for window in windows] * t


class ViT(nn.Module):
    def __init__(self, config, split_qkv=False):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config, split_qkv) for _ in range(config.depth))
        self.merger = Merger(config)

    def rotary(self, media):
        """cos, sin (P, K) fp32: the first half of the frequencies turns by patch row, the second by patch column, in
        the order of the patches (merge block by merge block)."""
        K, m = self.config.width // self.config.num_heads, self.config.spatial_merge_size
        angles = []
        for clip in media:
            t, h, w = clip.grid_thw
            device = clip.features.device
            inv_freq = 1.0 / 10000.0 ** (torch.arange(0, K // 2, 2, device=device).float() / (K // 2))
            rows_hw = torch.arange(h, device=device)[:, None].expand(h, w)
            columns_hw = torch.arange(w, device=device).expand(h, w)
            place_P2 = torch.stack([rows_hw, columns_hw], -1).unflatten(0, (h // m, m)).unflatten(2, (w // m, m))
            place_P2 = place_P2.transpose(1, 2).reshape(-1, 2).repeat(t, 1)
            angles.append((place_P2[..., None].float() * inv_freq).flatten(1))
        angle_PK = torch.cat(angles).repeat(1, 2)
        return angle_PK.cos(), angle_PK.sin()

    def forward(self, media):
        """Clips to video tokens.

        Args:
            media: list of video Media; features patches_PC in merge-block order.
        Returns:
            (sum of t h w / 4, D): patches of one frame pair see each other (in most blocks of a tower with windows:
            those of one window), pairs do not.
        """
        x_PE = self.patch_embed(torch.cat([clip.features for clip in media]))
        cos_PK, sin_PK = self.rotary(media)
        frames = _runs(h * w for t, h, w in (clip.grid_thw for clip in media) for _ in range(t))
        if self.config.window_size is None:
            for block in self.blocks:
                x_PE = block(x_PE, cos_PK, sin_PK, frames)
            return self.merger(x_PE)
        merge = self.config.spatial_merge_size**2
        side = self.config.window_size // self.config.patch_size // self.config.spatial_merge_size
        orders, counts, at = [], [], 0
        for clip in media:
            order, lengths = window_order(clip.grid_thw, side)
            orders.append(order + at)
            counts += lengths
            at += len(order)
        order = torch.cat(orders).to(x_PE.device)
        x_PE, cos_PK, sin_PK = (x.unflatten(0, (-1, merge))[order].flatten(0, 1) for x in (x_PE, cos_PK, sin_PK))
        windows = _runs(merge * count for count in counts)
        for i, block in enumerate(self.blocks):
            x_PE = block(x_PE, cos_PK, sin_PK, frames if i in self.config.fullatt_block_indexes else windows)
        return self.merger(x_PE)[order.argsort()]


def _runs(lengths):
    """Segments of these lengths, one after another."""
    lengths = list(lengths)
    return [Segment(end - length, length) for length, end in zip(lengths, accumulate(lengths), strict=True)]
