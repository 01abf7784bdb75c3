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
    """Keys and values of prompts, once each, and of their completions; decode slot b's prompt is in slot b // n. k, v:
    (layers, decode slots, J, C, K), of which `length_B` rows a slot are real. prompt_k, prompt_v: (layers, prompt
    slots, J, P, K), of which `prompt_length_G` rows are real."""

    def __init__(self, shapes, device, dtype, backend):
        prompt_shape, shape = shapes
        self.prompt_pool = torch.empty(prompt_shape, device=device, dtype=dtype)
        self.pool = torch.empty(shape, device=device, dtype=dtype)
        self.prompt_k, self.prompt_v = self.prompt_pool
        self.k, self.v = self.pool
        counts = dict(dtype=torch.int64, device=device)
        self.prompt_length_G = torch.ones(self.prompt_k.shape[1], **counts)
        self.length_B = torch.zeros(self.k.shape[1], **counts)
        self.backend = backend
        self.rows_in_use = self.k.shape[3]  # rows of C beyond which no unfinished slot has any

    def clear(self, prompt_slot_G, decode_slot_B):
        """Zeroes slots that get new sequences: a weight of 0 hides a stale value, but not a NaN."""
        self.prompt_pool[:, :, prompt_slot_G] = 0
        self.pool[:, :, decode_slot_B] = 0
        self.length_B[decode_slot_B] = 0

    def prefill(self, segments, slot_N, row_N, layer, q_NHK, k_NJK, v_NJK):
        """Attention over packed prompts that stores row n's key and value as row row_N[n] of prompt slot slot_N[n]."""
        self.prompt_k[layer][slot_N, :, row_N] = k_NJK
        self.prompt_v[layer][slot_N, :, row_N] = v_NJK
        return packed_attention(q_NHK, k_NJK, v_NJK, segments)

    def decode(self, layer, q_BHK, k_BJK, v_BJK):
        """Attention of one new token a slot: its key and value are appended; it sees its prompt and all its own."""
        slot_B = torch.arange(len(q_BHK), device=q_BHK.device)
        self.k[layer][slot_B, :, self.length_B] = k_BJK
        self.v[layer][slot_B, :, self.length_B] = v_BJK
        k, v = self.pool[:, layer, :, :, :self.rows_in_use]
        prompt_k, prompt_v = self.prompt_pool[:, layer]
        lengths_B = self.length_B + 1
        return decode_attention(q_BHK, prompt_k, prompt_v, self.prompt_length_G, k, v, lengths_B, self.backend)
