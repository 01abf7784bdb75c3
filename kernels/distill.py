"""Distillation: KL(teacher || student) or its reverse, at a temperature, over the ids that both know, from the logits.

Kept ids K: those below `common_vocab` (where the two vocabularies begin to differ), not suppressed. At temperature T

    q = softmax(teacher / T over K)       p = softmax(student / T over K)
    loss[n] = T² sum_{v in K} q[v] (log q[v] - log p[v])      (T² makes the gradient as large as at T = 1)
    dstudent[n, v] = weight[n] T (p[v] - q[v]) in K, 0 elsewhere
    reverse: loss = T² KL with KL = sum_K p (log p - log q), dstudent = weight T p (log p - log q - KL) in K
    dropped[n] = share of softmax(logits / T over the whole row) outside K, for the student and for the teacher

With a and b the logits over T of the distribution in front (the teacher's; reverse: the student's) and of the other,
m_a + log l_a and m_b + log l_b their log-sum-exps over K (m is the maximum), c the best id in front and
u = sum_K softmax(a) ((a - m_a) - (b - b[c])), the kernel computes

    loss = T² (u + m_b - b[c] + log l_b - log l_a)

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


def distill_kl_ref(student_NV, teacher_NW, common_vocab, suppressed_Z, temperature, reverse=False):
    """distill_kl_grad in plain PyTorch, with a loss differentiable in the student; fp64 logits give ground truth."""
    options = common_vocab, suppressed_Z, temperature
    _, logp_NK, student_dropped_N = logit_rows.kept_log_softmax(student_NV, *options)
    _, logq_NK, teacher_dropped_N = logit_rows.kept_log_softmax(teacher_NW.detach(), *options)
    logq_NK = logq_NK.clamp(min=LOWEST.value)  # reverse: a finite gradient, which a weight of 0 makes 0
    front_NK, behind_NK = (logp_NK, logq_NK) if reverse else (logq_NK, logp_NK)
    gap_NK = (front_NK - behind_NK).masked_fill(front_NK.exp() == 0, 0)  # 0 log 0 is 0, also beside a logit of -inf
    return temperature**2 * (front_NK.exp() * gap_NK).sum(-1), student_dropped_N, teacher_dropped_N


@triton.jit(do_not_specialize=["common_vocab"])
def _kl_kernel(
    a_ptr, b_ptr, kept_ptr, weight_ptr, loss_ptr, lse_a_ptr, lse_b_ptr, out_ptr,
    stride_an, stride_bn, stride_on, common_vocab, columns_a, columns_b, temperature,
    BLOCK_V: tl.constexpr, REVERSE: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    temperature = tl.cast(temperature, tl.float32)  # torch.compile passes Python floats as fp64
    inv_temp = 1.0 / temperature
    a_ptr += n * stride_an
    b_ptr += n * stride_bn
    zero = tl.zeros([BLOCK_V], tl.float32)
    m_a, sum_a, m_b, sum_b, u, b_c = zero + LOWEST, zero, zero + LOWEST, zero, zero, zero  # b_c: b at the largest a
    for start in range(0, common_vocab, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        kept = tl.load(kept_ptr + v) != 0
        # masked by the columns, multiples of 16, and not by common_vocab: so loads are 16 bytes wide
        a = tl.load(a_ptr + v, mask=v < columns_a, other=0.0).to(tl.float32) * inv_temp
        b = tl.load(b_ptr + v, mask=v < columns_b, other=0.0).to(tl.float32) * inv_temp
        a = tl.where(kept, tl.maximum(a, LOWEST, propagate_nan=tl.PropagateNan.ALL), LOWEST)
        b = tl.where(kept, tl.maximum(b, LOWEST, propagate_nan=tl.PropagateNan.ALL), 0.0)  # 0 * inf below is NaN
        m_b, sum_b = online_sum(m_b, sum_b, tl.where(kept, b, -float("inf")))
        gap = (a - m_a) - (b - b_c)
        e = tl.where(kept, tl.exp(-tl.abs(a - m_a)), 0.0)
        u = tl.where(a > m_a, (u - sum_a * gap) * e, u + e * gap)  # a new maximum shifts every earlier term by -gap
        b_c = tl.where(a > m_a, b, b_c)
        sum_a = tl.where(a > m_a, sum_a * e + 1.0, sum_a + e)
        m_a = tl.maximum(m_a, a)
    top_b, all_b = merge_lanes(m_b, sum_b)
    top_a = tl.max(m_a, 0)
    top_c = tl.max(tl.where(m_a == top_a, b_c, LOWEST), 0)
    rescaled = sum_a * tl.exp(m_a - top_a)
    all_a = tl.sum(rescaled, 0)
    u = tl.sum(u * tl.exp(m_a - top_a) + rescaled * ((m_a - top_a) - (b_c - top_c)), 0) / all_a
    log_a, log_b = tl.log(all_a), tl.log(all_b)
    kl = u + (top_b - top_c) + (log_b - log_a)
    tl.store(loss_ptr + n, temperature * temperature * kl)
    tl.store(lse_a_ptr + n, top_a + log_a)
    tl.store(lse_b_ptr + n, top_b + log_b)
    if GRAD:
        factor = tl.load(weight_ptr + n).to(tl.float32) * temperature
        live = zero + factor != 0.0  # a row without a gradient is not read
        columns = columns_a if REVERSE else columns_b
        for start in range(0, columns, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            kept = (tl.load(kept_ptr + v) != 0) & live
            a = tl.load(a_ptr + v, mask=(v < columns_a) & live, other=0.0).to(tl.float32) * inv_temp
            b = tl.load(b_ptr + v, mask=(v < columns_b) & live, other=0.0).to(tl.float32) * inv_temp
            a = (tl.maximum(a, LOWEST, propagate_nan=tl.PropagateNan.ALL) - top_a) - log_a
            b = (tl.maximum(b, LOWEST, propagate_nan=tl.PropagateNan.ALL) - top_b) - log_b
            a, b = tl.where(kept, a, LOWEST), tl.where(kept, b, LOWEST)  # log-probabilities
            slope = tl.exp(a) * ((a - b) - kl) if REVERSE else tl.exp(b) - tl.exp(a)
            tl.store(out_ptr + n * stride_on + v, factor * slope, mask=v < columns)


@torch.no_grad()
def distill_kl_grad(student_NV, teacher_NW, weight_N, common_vocab, suppressed_Z, temperature, out_NV, backend,
                    reverse=False):
    """T² KL(teacher || student) of each row, at temperature T, over the kept ids, and its gradient in the same pass.

    student_NV: (N, V) fp32 | bf16 | fp16, unit stride in V. teacher_NW: (N, W) likewise. They may hold -inf: a kept
        id costs nothing if the row in front has it (`reverse`: the student), about infinity if the other alone does.
    weight_N: (N,) fp32, the gradient's factors; a row of weight 0 gets exact zeros. The losses are not weighted.
    common_vocab: ids below it mean the same in both vocabularies.
    suppressed_Z: (Z,) int64, distinct, on the same device; those from common_vocab on change nothing. At least one
        id must remain (not checked: it would synchronise).
    temperature: > 0. backend: "triton" | "torch".
    out_NV: (N, V) fp32 | bf16 | fp16, unit stride in V: takes weight_N[n] dloss[n]/dstudent. None = no gradient. It
        may be student_NV itself, or have the teacher's dtype, address and stride (views of a buffer of max(V, W)
        columns), and overwrites it: each column is read first. Otherwise it must share no memory with them.
    reverse: T² KL(student || teacher) instead. An infinite loss then has a gradient as large.
    Returns (loss_N, student_dropped_N, teacher_dropped_N), (N,) fp32, not differentiable; shares are in [0, 1]. Raises
    ValueError for a wrong shape, stride, common_vocab, temperature or backend."""
    logit_rows.check(student_NV, common_vocab, temperature, backend, weight_N, out_NV=out_NV)
    logit_rows.check(teacher_NW, common_vocab, temperature, backend)
    if len(teacher_NW) != len(student_NV):
        raise ValueError(f"need as many rows of teacher as of student, got {len(teacher_NW)} and {len(student_NV)}")
    options, grad = (common_vocab, suppressed_Z, temperature), out_NV is not None
    if backend == "torch":
        return logit_rows.by_autograd(distill_kl_ref, student_NV, [teacher_NW], weight_N, (*options, reverse), out_NV)
    loss_N, lse_s_N, lse_t_N = torch.empty(3, len(student_NV), dtype=torch.float32, device=student_NV.device)
    kept_V = logit_rows.kept_mask(student_NV, common_vocab, suppressed_Z)
    outside_s_N = logit_rows.outside_logsumexp(student_NV, *options)  # now: the gradient may overwrite the logits
    outside_t_N = logit_rows.outside_logsumexp(teacher_NW, *options)
    out_NV, weight_N = (out_NV, weight_N.contiguous()) if grad else (student_NV, loss_N)  # not used without a gradient
    pairs = [(teacher_NW, lse_t_N), (student_NV, lse_s_N)]
    (a_NV, lse_a_N), (b_NV, lse_b_N) = pairs[::-1] if reverse else pairs  # the row in front, the one behind
    _kl_kernel[(len(loss_N),)](
        a_NV, b_NV, kept_V, weight_N, loss_N, lse_a_N, lse_b_N, out_NV, a_NV.stride(0), b_NV.stride(0),
        out_NV.stride(0), common_vocab, a_NV.shape[1], b_NV.shape[1], temperature, BLOCK_V=BLOCK_V, REVERSE=reverse,
        GRAD=grad, num_warps=NUM_WARPS, num_stages=NUM_STAGES)
    return loss_N, torch.sigmoid(outside_s_N - lse_s_N), torch.sigmoid(outside_t_N - lse_t_N)
