"""The Qwen2 decoder: pre-norm blocks of grouped-query attention and a SwiGLU MLP, over packed rows."""
import torch
from torch import nn

from minixmd.kernels.rmsnorm import rms_norm
from minixmd.kernels.rotary import rotate
from minixmd.kernels.swiglu import swiglu
from minixmd.models.checkpointing import run_block
from minixmd.models.lora import Linear, apply_linears


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.backend = "torch"  # lora.set_backend

    def forward(self, x_ND):
        return self.after_sum(x_ND, None)[0]

    def after_sum(self, x_ND, added_ND):
        """(the norm of x + added, x + added); added_ND: None is 0."""
        return rms_norm(x_ND, self.weight, self.eps, added_ND, self.backend)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.H = config.num_attention_heads
        self.J = config.num_key_value_heads
        D = config.hidden_size
        kv_width = D // self.H * self.J
        self.q_proj = Linear(D, D)
        self.k_proj = Linear(D, kv_width)
        self.v_proj = Linear(D, kv_width)
        self.o_proj = Linear(D, D, bias=False)
        self.backend = "torch"

    def forward(self, x_ND, cos_NK, sin_NK, attend):
        q, k, v = apply_linears(x_ND, self.q_proj, self.k_proj, self.v_proj)
        q_NHK = q.unflatten(-1, (self.H, -1))
        k_NJK = k.unflatten(-1, (self.J, -1))
        q_NHK, k_NJK = rotate(q_NHK, k_NJK, cos_NK, sin_NK, self.backend)
        v_NJK = v.unflatten(-1, (self.J, -1))
        o_NHK = attend(self.layer, q_NHK, k_NJK, v_NJK)
        return self.o_proj(o_NHK.flatten(1))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Also the MLP of Qwen2.5's vision tower, there with biases."""

    def __init__(self, width, hidden, bias):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias)
        self.up_proj = Linear(width, hidden, bias)
        self.down_proj = Linear(hidden, width, bias)
        self.backend = "torch"

    def forward(self, x_ND):
        gate_NF, up_NF = apply_linears(x_ND, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(gate_NF, up_NF, self.backend))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x_ND, added_ND, cos_NK, sin_NK, attend):
        """(the residual stream, what is still to be added to it): each sum is made with the norm that reads it."""
        normed_ND, x_ND = self.input_layernorm.after_sum(x_ND, added_ND)
        attended_ND = self.self_attn(normed_ND, cos_NK, sin_NK, attend)
        normed_ND, x_ND = self.post_attention_layernorm.after_sum(x_ND, attended_ND)
        return x_ND, self.mlp(normed_ND)

    def summed(self, x_ND, cos_NK, sin_NK, attend):
        """The residual stream with nothing left to be added."""
        x_ND, added_ND = self(x_ND, None, cos_NK, sin_NK, attend)
        return x_ND + added_ND


class Qwen2(nn.Module):
    """Embeddings to hidden states. How rows see each other is the caller's attend(layer, q_NHK, k_NJK, v_NJK) -> o_NHK:
    packed training, prefill that keeps keys and values, and one-token decoding are three such functions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False  # checkpointing.set_checkpointing

    def rotary(self, positions_3N):
        """cos, sin (N, K) in fp32. With M-RoPE a frequency turns by time, height or width, section by section."""
        K = self.config.hidden_size // self.config.num_attention_heads
        exponent = torch.arange(0, K, 2, device=positions_3N.device).float() / K
        frequencies = 1.0 / self.config.rope_theta ** exponent
        sections = frequencies.split(self.config.mrope_section or (K // 2,))  # by time, height and width
        angles = [positions_3N[row].float()[:, None] * section for row, section in enumerate(sections)]
        angle_NK = torch.cat([*angles, *angles], dim=-1)
        return angle_NK.cos(), angle_NK.sin()

    def forward(self, x_ND, positions_3N, attend):
        cos_NK, sin_NK = self.rotary(positions_3N)
        added_ND = None
        for layer in self.layers:
            if self.checkpointing:  # what it keeps of a block is then one tensor, not two
                x_ND = run_block(self, layer.summed, x_ND, cos_NK, sin_NK, attend)
            else:
                x_ND, added_ND = layer(x_ND, added_ND, cos_NK, sin_NK, attend)
        return self.norm.after_sum(x_ND, added_ND)[0]
