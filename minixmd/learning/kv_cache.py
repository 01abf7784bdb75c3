"""The keys and values of a rollout: each prompt's once, and those of its completions."""
import math

import torch

from minixmd.kernels.decode import decode_attention
from minixmd.models.attention import packed_attention


def pool_shapes(text, prompt_slots, longest_prompt, decode_slots, max_new_tokens):
    """The shapes (2, layers, slots, kv heads, rows, K) of two pools of keys and values: one of prompts of up to
    `longest_prompt` tokens, one of completions, whose last token needs no row. text: TextConfig."""
    K = text.hidden_size // text.num_attention_heads
    rows = max(max_new_tokens - 1, 1)
    return ((2, text.num_hidden_layers, prompt_slots, text.num_key_value_heads, longest_prompt, K),
            (2, text.num_hidden_layers, decode_slots, text.num_key_value_heads, rows, K))


def pool_bytes(text, prompt_slots, longest_prompt, decode_slots, max_new_tokens, dtype):
    """Bytes of both pools: what a KVCache of these sizes allocates."""
    shapes = pool_shapes(text, prompt_slots, longest_prompt, decode_slots, max_new_tokens)
    return sum(map(math.prod, shapes)) * dtype.itemsize


class KVCache:
    """Keys and values of prompts, once each, and of completions, in pools of pool_shapes; of a prompt slot's rows
    prompt_length_G are real, of a decode slot's length_B. members_GM and prompt_B say which decode slot continues which
    prompt, as in kernels/decode.py; M: decode slots of a prompt at most."""

    def __init__(self, shapes, M, device, dtype, backend):
        prompt_shape, shape = shapes
        self.prompt_pool = torch.empty(prompt_shape, device=device, dtype=dtype)
        self.pool = torch.empty(shape, device=device, dtype=dtype)
        G, B = prompt_shape[2], shape[2]
        integers = dict(dtype=torch.int64, device=device)
        self.prompt_length_G = torch.ones(G, **integers)
        self.length_B = torch.zeros(B, **integers)
        self.members_GM = torch.full((G, M), -1, **integers)
        self.prompt_B = torch.full((B,), -1, **integers)
        self.backend = backend
        self.rows_in_use = shape[4]  # rows of C beyond which no unfinished slot has any
        self.prompts_in_use = G  # prompt slots beyond which none is continued

    def grow(self, longest_prompt, keep):
        """Makes room for longer prompts. keep: whether those that are there are still needed."""
        old, self.prompt_pool = self.prompt_pool, None
        shape = *old.shape[:4], longest_prompt, old.shape[5]
        if keep:
            self.prompt_pool = old.new_zeros(shape)
            self.prompt_pool[:, :, :, :, :old.shape[4]] = old
        else:  # without the old one beside it
            device, dtype = old.device, old.dtype
            del old
            self.prompt_pool = torch.zeros(shape, device=device, dtype=dtype)

    def prefill(self, segments, slot_N, row_N, layer, q_NHK, k_NJK, v_NJK):
        """Attention over packed prompts that stores row n's key and value as row row_N[n] of prompt slot slot_N[n]."""
        prompt_k, prompt_v = self.prompt_pool[:, layer]
        prompt_k[slot_N, :, row_N] = k_NJK
        prompt_v[slot_N, :, row_N] = v_NJK
        return packed_attention(q_NHK, k_NJK, v_NJK, segments)

    def decode(self, layer, q_BHK, k_BJK, v_BJK):
        """Attention of one new token in the first B slots: its key and value are appended; it sees its prompt and all
        of its slot's."""
        B = len(q_BHK)
        slot_B = torch.arange(B, device=q_BHK.device)
        length_B = self.length_B[:B]
        own_k, own_v = self.pool[:, layer]
        own_k[slot_B, :, length_B] = k_BJK
        own_v[slot_B, :, length_B] = v_BJK
        k, v = self.pool[:, layer, :B, :, :self.rows_in_use]
        G = self.prompts_in_use
        prompt_k, prompt_v = self.prompt_pool[:, layer, :G]
        prompts = prompt_k, prompt_v, self.prompt_length_G[:G], self.members_GM[:G], self.prompt_B[:B]
        return decode_attention(q_BHK, *prompts, k, v, length_B + 1, self.backend)
