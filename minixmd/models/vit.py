"""Qwen2-VL's vision tower: a ViT over frame pairs with two-dimensional rotary positions, then a 2x2 merge."""
import torch
from torch import nn

from minixmd.inputs.batch import Segment
from minixmd.models.attention import attend, rotate
from minixmd.models.lora import Linear


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, hence one product over each patch's 3 x 2 x 14 x 14 values."""

    def __init__(self, config):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.embed_dim, size, stride=size, bias=False)

    def forward(self, patches_PC):
        return nn.functional.linear(patches_PC.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.H = config.num_heads
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = Linear(config.embed_dim, config.embed_dim)

    def forward(self, x_PE, cos_PK, sin_PK, segments):
        q, k, v = self.qkv(x_PE).unflatten(-1, (3, self.H, -1)).unbind(1)
        o_PHK = attend(rotate(q, cos_PK, sin_PK), rotate(k, cos_PK, sin_PK), v, segments, causal=False)
        return self.proj(o_PHK.flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.embed_dim, int(config.embed_dim * config.mlp_ratio))
        self.fc2 = Linear(int(config.embed_dim * config.mlp_ratio), config.embed_dim)

    def forward(self, x_PE):
        x = self.fc1(x_PE)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # "quick" GELU


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x_PE, cos_PK, sin_PK, segments):
        x_PE = x_PE + self.attn(self.norm1(x_PE), cos_PK, sin_PK, segments)
        return x_PE + self.mlp(self.norm2(x_PE))


class Merger(nn.Module):
    """Four neighbouring patches become one token of the decoder's width."""

    def __init__(self, config):
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(Linear(self.width, self.width), nn.GELU(), Linear(self.width, config.hidden_size))

    def forward(self, x_PE):
        return self.mlp(self.ln_q(x_PE).reshape(-1, self.width))


class ViT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def rotary(self, media):
        """cos, sin (P, K) fp32: the first half of the frequencies turns by patch row, the second by patch column, in
        the order of the patches (merge block by merge block)."""
        K, m = self.config.embed_dim // self.config.num_heads, self.config.spatial_merge_size
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
            (sum of t h w / 4, D): patches of one frame pair see each other, pairs do not.
        """
        x_PE = self.patch_embed(torch.cat([clip.features for clip in media]))
        cos_PK, sin_PK = self.rotary(media)
        segments, at = [], 0
        for clip in media:
            t, h, w = clip.grid_thw
            segments += [Segment(at + i * h * w, h * w) for i in range(t)]
            at += t * h * w
        for block in self.blocks:
            x_PE = block(x_PE, cos_PK, sin_PK, segments)
        return self.merger(x_PE)
