"""The vision tower: a ViT over frame pairs with two-dimensional rotary positions, then a 2x2 merge.

Qwen2-VL: LayerNorm, a plain MLP, every block sees a whole frame pair. Qwen2.5-VL and Omni: RMSNorm, a gated MLP, and
most blocks see windows of 112 pixels; the rows are put in window order once, so a window is a run of neighbours."""
import torch
from torch import nn

from minixmd.inputs.batch import consecutive_segments
from minixmd.inputs.image import MERGE, PATCH, SIDE, TEMPORAL
from minixmd.kernels.rotary import rotate
from minixmd.models.attention import packed_attention
from minixmd.models.checkpointing import run_block
from minixmd.models.lora import Linear, apply_linears
from minixmd.models.qwen2 import GatedMLP, RMSNorm


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, hence one product over each patch's 3 x 2 x 14 x 14 values."""

    def __init__(self, config):
        super().__init__()
        size = (TEMPORAL, PATCH, PATCH)
        self.proj = nn.Conv3d(3, config.width, size, stride=size, bias=False)

    def forward(self, patches_PC):
        weight_EC = self.proj.weight.flatten(1)
        return nn.functional.linear(patches_PC.to(weight_EC.dtype), weight_EC)


class Attention(nn.Module):
    def __init__(self, config, split_qkv):
        super().__init__()
        self.H = config.num_heads
        self.split_qkv = split_qkv
        E = config.width
        if split_qkv:
            self.q = Linear(E, E)
            self.k = Linear(E, E)
            self.v = Linear(E, E)
        else:
            self.qkv = Linear(E, 3 * E)
        self.proj = Linear(E, E)
        self.backend = "torch"

    def forward(self, x_PE, cos_PK, sin_PK, segments):
        if self.split_qkv:
            projected = apply_linears(x_PE, self.q, self.k, self.v)
        else:
            projected = self.qkv(x_PE).chunk(3, dim=-1)
        q, k, v_PHK = (x.unflatten(-1, (self.H, -1)) for x in projected)
        q_PHK, k_PHK = rotate(q, k, cos_PK, sin_PK, self.backend)
        o_PHK = packed_attention(q_PHK, k_PHK, v_PHK, segments, causal=False)
        return self.proj(o_PHK.flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.fc1 = Linear(config.width, hidden)
        self.fc2 = Linear(hidden, config.width)

    def forward(self, x_PE):
        x_PF = self.fc1(x_PE)
        return self.fc2(x_PF * torch.sigmoid(1.702 * x_PF))  # "quick" GELU


def _norm(config):
    if config.window_size is None:
        return nn.LayerNorm(config.width, eps=1e-6)
    return RMSNorm(config.width, 1e-6)


class Block(nn.Module):
    def __init__(self, config, split_qkv):
        super().__init__()
        self.norm1 = _norm(config)
        self.norm2 = _norm(config)
        self.attn = Attention(config, split_qkv)
        if config.window_size is None:
            self.mlp = MLP(config)
        else:
            self.mlp = GatedMLP(config.width, config.intermediate_size, bias=True)

    def forward(self, x_PE, cos_PK, sin_PK, segments):
        x_PE = x_PE + self.attn(self.norm1(x_PE), cos_PK, sin_PK, segments)
        return x_PE + self.mlp(self.norm2(x_PE))


class Merger(nn.Module):
    """Four neighbouring patches become one token of the decoder's width."""

    def __init__(self, config):
        super().__init__()
        self.width = config.width * MERGE**2
        self.ln_q = _norm(config)
        self.mlp = nn.Sequential(Linear(self.width, self.width), nn.GELU(), Linear(self.width, config.out_width))

    def forward(self, x_PE):
        return self.mlp(self.ln_q(x_PE).reshape(-1, self.width))


class ViT(nn.Module):
    def __init__(self, config, split_qkv=False):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config, split_qkv) for _ in range(config.depth))
        self.merger = Merger(config)
        self.checkpointing = False  # checkpointing.set_checkpointing

    def rotary(self, media):
        """cos, sin (P, K) fp32, merge block by merge block: half of the frequencies turn by row, half by column."""
        half = self.config.width // self.config.num_heads // 2
        device = media[0].features.device
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, half, 2, device=device).float() / half)
        positions = []
        for clip in media:
            t, h, w = clip.grid_thw
            sizes = (h // MERGE, w // MERGE, MERGE, MERGE)  # rows and columns of blocks, then those inside a block
            place_P4 = torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
            row_and_column_P2 = MERGE * place_P4[:, :2] + place_P4[:, 2:]
            positions.append(row_and_column_P2.repeat(t, 1))
        position_P2 = torch.cat(positions).float()
        angle_PK = (position_P2[..., None] * frequencies).flatten(1).repeat(1, 2)
        return angle_PK.cos(), angle_PK.sin()

    def forward(self, media):
        """Video tokens of a list of Media, (sum of t h w / 4, D); patches see their frame pair or their window."""
        x_PE = self.patch_embed(torch.cat([clip.patches() for clip in media]))
        cos_PK, sin_PK = self.rotary(media)
        grids = [clip.grid_thw for clip in media]
        frames = consecutive_segments([h * w for t, h, w in grids for _ in range(t)])
        if self.config.window_size is None:
            for block in self.blocks:
                x_PE = run_block(self, block, x_PE, cos_PK, sin_PK, frames)
            return self.merger(x_PE)
        order, windows = self._windows(grids)
        order = order.to(x_PE.device)
        x_PE, cos_PK, sin_PK = (x.unflatten(0, (-1, MERGE**2))[order].flatten(0, 1) for x in (x_PE, cos_PK, sin_PK))
        for i, block in enumerate(self.blocks):
            segments = frames if i in self.config.fullatt_block_indexes else windows
            x_PE = run_block(self, block, x_PE, cos_PK, sin_PK, segments)
        return self.merger(x_PE)[order.argsort()]

    def _windows(self, grids):
        """The merged tokens of clips in window order, and the windows, squares from the top left, as Segments."""
        side = self.config.window_size // SIDE
        orders, lengths, first = [], [], 0
        for t, h, w in grids:
            number_hw = torch.arange(h * w // MERGE**2).view(h // MERGE, w // MERGE)
            windows = []
            for rows in number_hw.split(side):
                windows += [window.flatten() for window in rows.split(side, dim=1)]
            frame_start_t = first + number_hw.numel() * torch.arange(t)
            orders.append((frame_start_t[:, None] + torch.cat(windows)).flatten())
            lengths += [MERGE**2 * len(window) for window in windows] * t
            first += t * number_hw.numel()
        return torch.cat(orders), consecutive_segments(lengths)
