"""Attention over packed rows, without an N x N mask: on a GPU in 16 bits one call a layer, else a few."""
import inspect
from functools import cache
from itertools import chain, groupby

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from minixmd.inputs.batch import send
from minixmd.runs.device import resolve_device


def packed_attention(q_NHK, k_NJK, v_NJK, segments, causal=True):
    """softmax(q kᵀ / sqrt(K)) v, where a segment's rows see all rows of its parent and their own segment.

    q_NHK: (N, H, K) queries. k_NJK, v_NJK: (N, J, K) keys and values; J divides H. segments: Segments in packed order
    that cover the N rows; parents stand before their children. causal: rows see their own segment up to themselves;
    False, for encoders, needs parentless segments. Returns (N, H, K), of q's dtype."""
    at_once = q_NHK.is_cuda and q_NHK.element_size() == 2 and q_NHK.shape[2] % 8 == 0
    if at_once and takes_varlen(q_NHK.device):
        return attend_at_once(q_NHK, k_NJK, v_NJK, segments, causal)
    return attend_by_runs(q_NHK, k_NJK, v_NJK, segments, causal)


@cache
def takes_varlen(device):
    """Whether varlen_attn can be used there: torch's has all that is needed, and the GPU is no older than an A100."""
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def describe_attention(stage):
    """Such as ", attention in one call a layer", of a stage that runs a model on a GPU; else ""."""
    if not hasattr(stage, "backend") or resolve_device(stage.name, stage.device) != "cuda":
        return ""
    if stage.dtype != "float32" and takes_varlen(torch.device("cuda")):
        return ", attention in one call a layer"
    return ", attention in a call for each run of like segments"


def plan_of(segments, device):
    """What varlen_attn takes, made once and kept with the Segments: cumulative lengths of queries and keys (int32), the
    longest of each; and the rows of the keys, a parent's before its child's own, or None: they are the queries'."""
    if segments.attention_plan is not None and segments.attention_plan[0].device == device:
        return segments.attention_plan
    lengths, key_lengths, rows = [], [], []
    for segment in segments:
        seen = [segment] if segment.parent < 0 else [segments[segment.parent], segment]
        for part in seen:
            rows += range(part.start, part.start + part.length)
        lengths.append(segment.length)
        key_lengths.append(sum(part.length for part in seen))
    ends_2 = torch.tensor([[0, *lengths], [0, *key_lengths]]).cumsum(1).to(torch.int32)
    ends_2, row_S = send([ends_2, torch.tensor(rows, dtype=torch.int32)], device)
    has_children = len(rows) > sum(lengths)
    segments.attention_plan = (*ends_2, max(lengths), max(key_lengths), row_S if has_children else None)
    return segments.attention_plan


class _Gather(torch.autograd.Function):
    """x[rows], whose gradient adds up in fp32: a parent's row has as many terms as it has children."""

    @staticmethod
    def forward(ctx, x_NJK, row_S):
        ctx.save_for_backward(row_S)
        ctx.count = len(x_NJK)
        return x_NJK[row_S]

    @staticmethod
    def backward(ctx, grad_SJK):
        [row_S] = ctx.saved_tensors
        grad_NJK = torch.zeros(ctx.count, *grad_SJK.shape[1:], dtype=torch.float32, device=grad_SJK.device)
        return grad_NJK.index_add_(0, row_S, grad_SJK.float()).to(grad_SJK.dtype), None


def attend_at_once(q_NHK, k_NJK, v_NJK, segments, causal=True, attend=None):
    """packed_attention by one call of torch's varlen_attn, or of `attend`, a function like it."""
    *lengths, key_row_S = plan_of(segments, q_NHK.device)
    if key_row_S is not None:
        k_NJK = _Gather.apply(k_NJK, key_row_S)
        v_NJK = _Gather.apply(v_NJK, key_row_S)
    seen = (-1, 0) if causal else (-1, -1)  # how many rows before and after a row's own; -1: all
    return (attend or varlen_attn)(q_NHK, k_NJK, v_NJK, *lengths, window_size=seen, enable_gqa=True)


def attend_by_runs(q_NHK, k_NJK, v_NJK, segments, causal=True):
    """packed_attention by one scaled-dot-product call a run of segments of one length and parent."""
    runs = [list(run) for _, run in groupby(segments, key=lambda s: (s.length, s.parent))]
    q_runs = _split(q_NHK, runs)
    k_runs = _split(k_NJK, runs)
    v_runs = _split(v_NJK, runs)
    keys = list(chain(*k_runs))  # of each segment
    values = list(chain(*v_runs))
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
