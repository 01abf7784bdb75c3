"""Attention over packed rows: one scaled-dot-product call a run of like segments, so that no N x N mask exists."""
from itertools import chain, groupby

import torch
import torch.nn.functional as F


def packed_attention(q_NHK, k_NJK, v_NJK, segments, causal=True):
    """softmax(q kᵀ / sqrt(K)) v, where a segment's rows see all rows of its parent and their own segment.

    Args:
        q_NHK: (N, H, K) queries. k_NJK, v_NJK: (N, J, K) keys and values; J divides H.
        segments: Segments in packed order that cover the N rows; parents stand before their children.
        causal: rows see their own segment up to themselves; False, for encoders, needs parentless segments.
    Returns (N, H, K), of q's dtype.
    """
    runs = [list(run) for _, run in groupby(segments, key=lambda s: (s.length, s.parent))]  # each is one batched call
    q_runs, k_runs, v_runs = (_split(x, runs) for x in (q_NHK, k_NJK, v_NJK))
    keys = list(chain.from_iterable(k_runs))  # of each segment
    values = list(chain.from_iterable(v_runs))
    outputs = []
    for run, q, k, v in zip(runs, q_runs, k_runs, v_runs, strict=True):
        mask_TS, parent = None, run[0].parent
        if parent >= 0:
            children = (len(run), -1, -1, -1)
            k = torch.cat([keys[parent].expand(children), k], dim=2)
            v = torch.cat([values[parent].expand(children), v], dim=2)
            T, S = q.shape[2], k.shape[2]
            mask_TS = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        o_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, is_causal=causal and mask_TS is None,
                                                enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(o_BHTK.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _split(x_NHK, runs):
    """Each run's rows as (B segments, H, T, K), by one split: slices would each have a gradient of all N rows."""
    parts = x_NHK.split([run[0].length * len(run) for run in runs])
    return [x.unflatten(0, (len(run), -1)).transpose(1, 2) for x, run in zip(parts, runs, strict=True)]


def _turn(x_NHK, cos_NK, sin_NK):
    """Rotates the pairs (x[i], x[i + K/2]) of fp32 vectors."""
    half = x_NHK.shape[-1] // 2
    sin = sin_NK[:, None, :half]  # both halves hold the same angles
    y_NHK = x_NHK * cos_NK[:, None]
    y_NHK[..., :half].addcmul_(x_NHK[..., half:], sin, value=-1)
    y_NHK[..., half:].addcmul_(x_NHK[..., :half], sin)
    return y_NHK


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back; autograd would keep and add up five tensors of x's size."""

    @staticmethod
    def forward(ctx, x_NHK, cos_NK, sin_NK):
        ctx.save_for_backward(cos_NK, sin_NK)
        return _turn(x_NHK.float(), cos_NK, sin_NK).to(x_NHK.dtype)

    @staticmethod
    def backward(ctx, grad_NHK):
        cos_NK, sin_NK = ctx.saved_tensors
        return _turn(grad_NHK.float(), cos_NK, -sin_NK).to(grad_NHK.dtype), None, None


def rotate(x_NHK, cos_NK, sin_NK):
    """Rotary embedding in the half-split layout, in fp32, returned in x's dtype. cos_NK, sin_NK: fp32, each angle in
    both halves; not differentiated."""
    return _Rotate.apply(x_NHK, cos_NK, sin_NK)
