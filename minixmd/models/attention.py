"""Attention over packed rows: one scaled-dot-product call for each run of like segments, so no N x N mask exists."""
from itertools import groupby

import torch
import torch.nn.functional as F


def packed_attention(q_NHK, k_NJK, v_NJK, segments, causal=True):
    """softmax(q kᵀ / sqrt(K)) v, where a segment's rows see its parent's rows and (causally, unless told) their own.

    Args:
        q_NHK: (N, H, K) queries. k_NJK, v_NJK: (N, J, K) keys and values; J divides H.
        segments: Segments in packed order that cover the N rows; parents stand before their children.
        causal: False for the encoders; needs parentless segments.
    Returns:
        (N, H, K), of q's dtype.
    """
    runs = [list(run) for _, run in groupby(segments, key=lambda s: (s.length, s.parent))]  # go through one call each
    rows = [run[0].length * len(run) for run in runs]
    at = {segment.start: (i, j) for i, run in enumerate(runs) for j, segment in enumerate(run)}
    # split once: a slice's derivative would fill N rows with zeros for each of the segments
    q_R, k_R, v_R = ([part.unflatten(0, (len(run), -1)).transpose(1, 2)  # B h T K
                      for part, run in zip(x.split(rows), runs, strict=True)] for x in (q_NHK, k_NJK, v_NJK))
    out = []
    for run, q, k, v in zip(runs, q_R, k_R, v_R, strict=True):
        mask_TS = None
        if run[0].parent >= 0:
            i, j = at[segments[run[0].parent].start]
            k, v = (torch.cat([x_R[i][j].expand(len(run), -1, -1, -1), own], dim=2)
                    for x_R, own in ((k_R, k), (v_R, v)))
            T, S = q.shape[2], k.shape[2]
            mask_TS = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, is_causal=causal and mask_TS is None,
                                           enable_gqa=q.shape[1] != k.shape[1])
        out.append(o.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _turn(x_NHK, cos_NK, sin_NK):
    half = x_NHK.shape[-1] // 2
    sin = sin_NK[:, None, :half]  # both halves hold the same angles
    y_NHK = x_NHK * cos_NK[:, None]
    y_NHK[..., :half].addcmul_(x_NHK[..., half:], sin, value=-1)
    y_NHK[..., half:].addcmul_(x_NHK[..., :half], sin)
    return y_NHK


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: autograd would keep and add up five tensors of x's size instead."""

    @staticmethod
    def forward(ctx, x_NHK, cos_NK, sin_NK):
        ctx.save_for_backward(cos_NK, sin_NK)
        return _turn(x_NHK.float(), cos_NK, sin_NK).to(x_NHK.dtype)

    @staticmethod
    def backward(ctx, g_NHK):
        cos_NK, sin_NK = ctx.saved_tensors
        return _turn(g_NHK.float(), cos_NK, -sin_NK).to(g_NHK.dtype), None, None


def rotate(x_NHK, cos_NK, sin_NK):
    """Rotary embedding in the half-split layout, computed in fp32 and returned in x's dtype.

    Args:
        x_NHK: (N, heads, K). cos_NK, sin_NK: (N, K) fp32, each angle in both halves; not differentiated.
    """
    return _Rotate.apply(x_NHK, cos_NK, sin_NK)
