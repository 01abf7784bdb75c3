"""Attention over packed rows: one scaled-dot-product call for each run of like segments, so no N x N mask exists."""
from itertools import groupby

import torch
import torch.nn.functional as F


def attend(q_NHK, k_NJK, v_NJK, segments, causal=True):
    """softmax(q kᵀ / sqrt(K)) v, where a segment's rows see its parent's rows and (causally, unless told) their own.

    Args:
        q_NHK: (N, H, K) queries. k_NJK, v_NJK: (N, J, K) keys and values; J divides H.
        segments: Segments in packed order that cover the N rows; parents stand before their children.
        causal: False for the encoders; needs parentless segments.
    Returns:
        (N, H, K), of q's dtype.
    """
    out = []
    for (length, parent), run in groupby(segments, key=lambda s: (s.length, s.parent)):
        run = list(run)  # neighbours of equal length and parent go through one call
        start, end, B = run[0].start, run[-1].start + length, len(run)
        q, k, v = (x[start:end].unflatten(0, (B, length)).transpose(1, 2) for x in (q_NHK, k_NJK, v_NJK))  # B h T K
        mask_TS = None
        if parent >= 0:
            rows = slice(segments[parent].start, segments[parent].start + segments[parent].length)
            k, v = (torch.cat([x[rows].transpose(0, 1).expand(B, -1, -1, -1), own], dim=2)
                    for x, own in ((k_NJK, k), (v_NJK, v)))
            S = k.shape[2]
            mask_TS = torch.ones(length, S, dtype=torch.bool, device=q.device).tril(S - length)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, is_causal=causal and mask_TS is None,
                                           enable_gqa=q.shape[1] != k.shape[1])
        out.append(o.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def rotate(x_NHK, cos_NK, sin_NK):
    """Rotary embedding in the half-split layout, computed in fp32 and returned in x's dtype."""
    x = x_NHK.float()
    a, b = x.chunk(2, dim=-1)
    return (x * cos_NK[:, None] + torch.cat([-b, a], dim=-1) * sin_NK[:, None]).to(x_NHK.dtype)
