"""Distillation: KL(teacher || student) at a temperature, over the ids that both know, from two rows of logits.

Kept ids K: those below `common_vocab` (where the two vocabularies begin to differ), not suppressed. At temperature T

    q = softmax(teacher / T over K)       p = softmax(student / T over K)
    loss[n] = T² sum_{v in K} q[v] (log q[v] - log p[v])      (T² makes the gradient as large as at T = 1)
    dstudent[n, v] = weight[n] T (p[v] - q[v]) in K, 0 elsewhere
    dropped[n] = share of softmax(logits / T over the whole row) outside K, for the student and for the teacher

The kernel computes the loss without log q. Let t and s be the logits over T, m_t + log l_t and m_s + log l_s their
log-sum-exps over K (m is the maximum), c the teacher's best id and u = sum_K q ((t - m_t) - (s - s[c])). Then

    loss = T² (u + m_s - s[c] + log l_s - log l_t)

Only differences of logits occur, so nothing is lost to their size. One read of both rows gives the loss, a second one
the gradient; lanes as in logit_rows.py. distill_topk.py does the same from a stored top-k of the teacher.

Bytes per row, with student, teacher and gradient elements of i, j and o bytes: 2 (i + j) common_vocab + oV. From fp32
and bf16 rows into fp32 that is 2.4 MB, or 0.6 ms for 1024 rows at 4.3 TB/s. Counted, not measured on a GPU.
Dims: N rows, V and W columns of student and teacher, Z suppressed ids, K kept ids."""
import torch
import triton
import triton.language as tl

from minixmd.kernels import logit_rows
from minixmd.kernels.logit_rows import BLOCK_V, LOWEST, NUM_STAGES, NUM_WARPS, merge_lanes, online_sum


def distill_kl_ref(student_NV, teacher_NW, common_vocab, suppressed_Z, temperature):
    """distill_kl_grad in plain PyTorch, with a loss differentiable in the student; fp64 logits give ground truth."""
    options = common_vocab, suppressed_Z, temperature
    _, logp_NK, student_dropped_N = logit_rows.kept_log_softmax(student_NV, *options)
    _, logq_NK, teacher_dropped_N = logit_rows.kept_log_softmax(teacher_NW.detach(), *options)
    q_NK = logq_NK.exp()
    kl_N = (q_NK * (logq_NK - logp_NK)).masked_fill(q_NK == 0, 0).sum(-1)  # 0 log 0 is 0, also beside a logit of -inf
    return temperature**2 * kl_N, student_dropped_N, teacher_dropped_N


@triton.jit(do_not_specialize=["common_vocab"])
def _kl_kernel(
    student_ptr, teacher_ptr, kept_ptr, weight_ptr, loss_ptr, lse_s_ptr, lse_t_ptr, out_ptr,
    stride_sn, stride_tn, stride_on, common_vocab, V, W, temperature,
    BLOCK_V: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    temperature = tl.cast(temperature, tl.float32)  # torch.compile passes Python floats as fp64
    inv_temp = 1.0 / temperature
    student_ptr += n * stride_sn
    teacher_ptr += n * stride_tn
    zero = tl.zeros([BLOCK_V], tl.float32)
    m_s, sum_s, m_t, sum_t, u, s_c = zero + LOWEST, zero, zero + LOWEST, zero, zero, zero  # s_c: s at the largest t
    for start in range(0, common_vocab, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        kept = tl.load(kept_ptr + v) != 0
        # masked by V and W, multiples of 16, and not by common_vocab: so loads are 16 bytes wide
        s = tl.load(student_ptr + v, mask=v < V, other=0.0).to(tl.float32) * inv_temp
        t = tl.load(teacher_ptr + v, mask=v < W, other=0.0).to(tl.float32) * inv_temp
        s = tl.where(kept, tl.maximum(s, LOWEST, propagate_nan=tl.PropagateNan.ALL), 0.0)  # 0 * inf below is NaN
        t = tl.where(kept, tl.maximum(t, LOWEST, propagate_nan=tl.PropagateNan.ALL), LOWEST)
        m_s, sum_s = online_sum(m_s, sum_s, tl.where(kept, s, -float("inf")))
        gap = (t - m_t) - (s - s_c)
        e = tl.where(kept, tl.exp(-tl.abs(t - m_t)), 0.0)
        u = tl.where(t > m_t, (u - sum_t * gap) * e, u + e * gap)  # a new maximum shifts every earlier term by -gap
        s_c = tl.where(t > m_t, s, s_c)
        sum_t = tl.where(t > m_t, sum_t * e + 1.0, sum_t + e)
        m_t = tl.maximum(m_t, t)
    top_s, all_s = merge_lanes(m_s, sum_s)
    top_t = tl.max(m_t, 0)
    top_c = tl.max(tl.where(m_t == top_t, s_c, LOWEST), 0)
    rescaled = sum_t * tl.exp(m_t - top_t)
    all_t = tl.sum(rescaled, 0)
    u = tl.sum(u * tl.exp(m_t - top_t) + rescaled * ((m_t - top_t) - (s_c - top_c)), 0) / all_t
    log_s, log_t = tl.log(all_s), tl.log(all_t)
    tl.store(loss_ptr + n, temperature * temperature * (u + (top_s - top_c) + (log_s - log_t)))
    tl.store(lse_s_ptr + n, top_s + log_s)
    tl.store(lse_t_ptr + n, top_t + log_t)
    if GRAD:
        factor = tl.load(weight_ptr + n).to(tl.float32) * temperature
        live = zero + factor != 0.0  # a row without a gradient is not read
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            kept = (tl.load(kept_ptr + v) != 0) & live
            s = tl.load(student_ptr + v, mask=(v < V) & live, other=0.0).to(tl.float32) * inv_temp
            t = tl.load(teacher_ptr + v, mask=(v < W) & live, other=0.0).to(tl.float32) * inv_temp
            p = tl.exp(tl.where(kept, (s - top_s) - log_s, -float("inf")))
            q = tl.exp(tl.where(kept, (t - top_t) - log_t, -float("inf")))
            tl.store(out_ptr + n * stride_on + v, factor * (p - q), mask=v < V)


@torch.no_grad()
def distill_kl_grad(student_NV, teacher_NW, weight_N, common_vocab, suppressed_Z, temperature, out_NV, backend):
    """T² KL(teacher || student) of each row, at temperature T, over the kept ids, and its gradient in the same pass.

    student_NV: (N, V) fp32 | bf16 | fp16, unit stride in V. teacher_NW: (N, W) likewise. They may hold -inf: a kept
        id costs nothing if both rows have it, about infinity if the student alone does.
    weight_N: (N,) fp32, the gradient's factors; a row of weight 0 gets exact zeros. The losses are not weighted.
    common_vocab: ids below it mean the same in both vocabularies.
    suppressed_Z: (Z,) int64, distinct, on the same device; those from common_vocab on change nothing. At least one
        id must remain (not checked: it would synchronise).
    temperature: > 0. backend: "triton" | "torch".
    out_NV: (N, V) fp32 | bf16 | fp16, unit stride in V: takes weight_N[n] dloss[n]/dstudent. None = no gradient. It
        may be student_NV itself, which is then overwritten, but must not share memory with it otherwise.
    Returns (loss_N, student_dropped_N, teacher_dropped_N), (N,) fp32, not differentiable; shares are in [0, 1]. Raises
    ValueError for a wrong shape, stride, common_vocab, temperature or backend."""
    logit_rows.check(student_NV, common_vocab, temperature, backend, weight_N, out_NV=out_NV)
    logit_rows.check(teacher_NW, common_vocab, temperature, backend)
    if len(teacher_NW) != len(student_NV):
        raise ValueError(f"need as many rows of teacher as of student, got {len(teacher_NW)} and {len(student_NV)}")
    options, grad = (common_vocab, suppressed_Z, temperature), out_NV is not None
    if backend == "torch":
        return logit_rows.by_autograd(distill_kl_ref, student_NV, [teacher_NW], weight_N, options, out_NV)
    (N, V), W = student_NV.shape, teacher_NW.shape[1]
    loss_N, lse_s_N, lse_t_N = torch.empty(3, N, dtype=torch.float32, device=student_NV.device)
    kept_V = logit_rows.kept_mask(student_NV, common_vocab, suppressed_Z)
    outside_s_N = logit_rows.outside_logsumexp(student_NV, *options)  # now: the gradient may overwrite the logits
    outside_t_N = logit_rows.outside_logsumexp(teacher_NW, *options)
    out_NV, weight_N = (out_NV, weight_N.contiguous()) if grad else (student_NV, loss_N)  # not used without a gradient
    _kl_kernel[(N,)](
        student_NV, teacher_NW, kept_V, weight_N, loss_N, lse_s_N, lse_t_N, out_NV, student_NV.stride(0),
        teacher_NW.stride(0), out_NV.stride(0), common_vocab, V, W, temperature, BLOCK_V=BLOCK_V, GRAD=grad,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES)
    return loss_N, torch.sigmoid(outside_s_N - lse_s_N), torch.sigmoid(outside_t_N - lse_t_N)
