"""The Qwen2 decoder: pre-norm blocks of grouped-query attention and a SwiGLU MLP, over packed rows."""
import torch
from torch import nn

from minixmd.models.attention import rotate
from minixmd.models.lora import Linear, linears


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_ND):
        x = x_ND.float()  # statistics in fp32: a 16-bit mean of squares loses the small channels
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).to(x_ND.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, self.H, self.J = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        K = D // self.H
        self.layer = layer
        self.q_proj = Linear(D, self.H * K)
        self.k_proj = Linear(D, self.J * K)
        self.v_proj = Linear(D, self.J * K)
        self.o_proj = Linear(self.H * K, D, bias=False)

    def forward(self, x_ND, cos_NK, sin_NK, attend):
        q, k, v = linears(x_ND, self.q_proj, self.k_proj, self.v_proj)
        q_NHK = rotate(q.unflatten(-1, (self.H, -1)), cos_NK, sin_NK)
        k_NJK = rotate(k.unflatten(-1, (self.J, -1)), cos_NK, sin_NK)
        v_NJK = v.unflatten(-1, (self.J, -1))
        return self.o_proj(attend(self.layer, q_NHK, k_NJK, v_NJK).flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_ND):
        gate_NF, up_NF = linears(x_ND, self.gate_proj, self.up_proj)
        return self.down_proj(nn.functional.silu(gate_NF) * up_NF)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_ND, cos_NK, sin_NK, attend):
        x_ND = x_ND + self.self_attn(self.input_layernorm(x_ND), cos_NK, sin_NK, attend)
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND))


class Qwen2(nn.Module):
    """Embeddings to hidden states. How rows see each other is the caller's `attend(layer, q, k, v)`: packed training,
    prefill that keeps keys and values, and one-token decoding are three such functions over this one forward."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rotary(self, positions_3N):
        """cos, sin (N, K) in fp32. With M-RoPE each half-dimension turns by time, height or width (config sections)."""
        K = self.config.hidden_size // self.config.num_attention_heads
        half_K = torch.arange(0, K, 2, device=positions_3N.device).float()
        inv_freq_K = 1.0 / self.config.rope_theta ** (half_K / K)
        sections = self.config.mrope_section or (K // 2,)
        parts = inv_freq_K.split(list(sections))
        angle = torch.cat([positions_3N[i].float()[:, None] * f for i, f in enumerate(parts)], dim=-1)
        angle_NK = torch.cat([angle, angle], dim=-1)
        return angle_NK.cos(), angle_NK.sin()

    def forward(self, x_ND, positions_3N, attend):
        cos_NK, sin_NK = self.rotary(positions_3N)
        for layer in self.layers:
            x_ND = layer(x_ND, cos_NK, sin_NK, attend)
        return self.norm(x_ND)
