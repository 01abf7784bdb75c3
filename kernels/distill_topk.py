"""Distillation from a stored top-k of the teacher: KL over its J best ids and one bucket for all other ids.

Kept ids K and temperature T are as in distill.py. Of its q = softmax(teacher / T over K) a row stores J ids of K with
their log q, and `tail`, the sum of q over all other ids of K. Those others are one bucket for the student too: with
p = softmax(student / T over K) and P the sum of p over them,

    loss[n] = T² (sum_j q_j (log q_j - log p[id_j]) + tail (log tail - log P))       at most the full KL
    dstudent[n, id_j] = weight[n] T (Q p[id_j] - q_j)       with Q = sum_j q_j + tail, which is 1 but for rounding
    dstudent[n, v] = weight[n] T (Q - tail / P) p[v] at the other ids of K, 0 outside K

P is summed over the other ids themselves, since 1 - sum_j p[id_j] would cancel. So each block of columns must leave out
the stored ids that lie in it: they are sorted first, and each is compared with the columns of one block only. Bytes per
row are those of distill.py less the teacher's: in fp32 1.8 MB, or 0.44 ms for 1024 rows at 4.3 TB/s, counted.
Dims: N rows, V columns, Z suppressed ids, J stored ids, K kept ids, S = common_vocab + 1."""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minixmd.kernels import logit_rows
from minixmd.kernels.logit_rows import BLOCK_V, LOWEST, NUM_STAGES, NUM_WARPS, merge_lanes, online_sum

BLOCK_J = 64  # the most ids a row may have stored


def distill_topk_ref(student_NV, id_NJ, logq_NJ, tail_N, common_vocab, suppressed_Z, temperature):
    """distill_topk_grad in plain PyTorch, with a loss differentiable in the student; fp64 logits give ground truth."""
    id_K, logp_NK, dropped_N = logit_rows.kept_log_softmax(student_NV, common_vocab, suppressed_Z, temperature)
    logp_NS = logp_NK.new_full((len(logp_NK), common_vocab + 1), -torch.inf).index_copy(1, id_K, logp_NK)
    empty_NJ = id_NJ < 0
    id_NJ = id_NJ.long().masked_fill(empty_NJ, common_vocab)  # the extra column
    q_NJ = logq_NJ.exp().masked_fill(empty_NJ, 0)
    kl_N = (q_NJ * (logq_NJ - logp_NS.gather(1, id_NJ))).masked_fill(q_NJ == 0, 0).sum(-1)
    rest_NS = logp_NS.scatter(1, id_NJ, -torch.inf)
    none_N = rest_NS.isneginf().all(-1) | (tail_N == 0)  # an empty sum, whose logarithm has no gradient
    log_rest_N = rest_NS.masked_fill(none_N[:, None], 0).logsumexp(-1)
    kl_N = kl_N + (tail_N * (tail_N.log() - log_rest_N)).masked_fill(none_N, 0)
    return temperature**2 * kl_N, dropped_N


@triton.jit(do_not_specialize=["common_vocab", "J"])
def _topk_kernel(
    student_ptr, id_ptr, logq_ptr, tail_ptr, kept_ptr, weight_ptr, loss_ptr, lse_ptr, out_ptr,
    stride_sn, stride_on, common_vocab, V, J, temperature,
    BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    temperature = tl.cast(temperature, tl.float32)  # torch.compile passes Python floats as fp64
    inv_temp = 1.0 / temperature
    student_ptr += n * stride_sn
    id_ptr += n * (J + 1)  # ascending, then one that is larger than all
    logq_ptr += n * J
    m, total = tl.full([BLOCK_V], LOWEST, tl.float32), tl.zeros([BLOCK_V], tl.float32)
    j = 0
    picked = tl.load(id_ptr)
    for start in range(0, common_vocab, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        rest = tl.load(kept_ptr + v) != 0
        while picked < start + BLOCK_V:
            rest = rest & (v != picked)
            j += 1
            picked = tl.load(id_ptr + j)
        # masked by V, a multiple of 16, and not by common_vocab: so loads are 16 bytes wide
        s = tl.load(student_ptr + v, mask=v < V, other=0.0).to(tl.float32) * inv_temp
        m, total = online_sum(m, total, tl.where(rest, s, -float("inf")))
    top_rest, rest_sum = merge_lanes(m, total)
    slot = tl.arange(0, BLOCK_J)
    v_J = tl.load(id_ptr + slot, mask=slot < J, other=-1)
    s_J = tl.load(student_ptr + v_J, mask=v_J >= 0, other=0.0).to(tl.float32) * inv_temp
    s_J = tl.where(v_J >= 0, tl.maximum(s_J, LOWEST, propagate_nan=tl.PropagateNan.ALL), LOWEST)
    logq_J = tl.load(logq_ptr + slot, mask=v_J >= 0, other=LOWEST)
    logq_J = tl.maximum(logq_J, LOWEST, propagate_nan=tl.PropagateNan.ALL)  # 0 * LOWEST is 0, 0 * -inf is NaN
    q_J = tl.exp(logq_J)
    tail = tl.load(tail_ptr + n).to(tl.float32)
    top = tl.maximum(top_rest, tl.max(s_J, 0))
    p_J = tl.where(v_J >= 0, tl.exp(s_J - top), 0.0)
    log_sum = tl.log(rest_sum * tl.exp(top_rest - top) + tl.sum(p_J, 0))
    kl = tl.sum(q_J * (logq_J - ((s_J - top) - log_sum)), 0)
    log_rest = tl.log(tl.maximum(rest_sum, 1e-30))  # rest_sum is below 1 only if no id is left
    if (tail > 0.0) & (rest_sum > 0.0):
        kl += tail * (tl.log(tail) - ((top_rest - top) + log_rest - log_sum))
    tl.store(loss_ptr + n, temperature * temperature * kl)
    tl.store(lse_ptr + n, top + log_sum)
    if GRAD:
        factor = tl.load(weight_ptr + n).to(tl.float32) * temperature
        mass = tl.sum(q_J, 0) + tl.where(rest_sum > 0.0, tail, 0.0)
        j = 0
        picked = tl.load(id_ptr)
        live = tl.zeros([BLOCK_V], tl.float32) + factor != 0.0  # a row without a gradient is not read
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            kept = (tl.load(kept_ptr + v) != 0) & live
            s = tl.load(student_ptr + v, mask=(v < V) & live, other=0.0).to(tl.float32) * inv_temp
            s = tl.where(kept, s, -float("inf"))
            target = tail * tl.exp(tl.minimum((s - top_rest) - log_rest, 0.0))  # the minimum binds at stored ids only
            while picked < start + BLOCK_V:
                if picked >= 0:
                    target = tl.where(v == picked, tl.exp(tl.load(logq_ptr + j)), target)
                j += 1
                picked = tl.load(id_ptr + j)
            p = tl.exp((s - top) - log_sum)
            tl.store(out_ptr + n * stride_on + v, factor * (mass * p - target), mask=v < V)


@torch.no_grad()
def distill_topk_grad(student_NV, id_NJ, logq_NJ, tail_N, weight_N, common_vocab, suppressed_Z, temperature, out_NV,
                      backend):
    """T² times the KL of each row's stored ids and tail against the student's, and its gradient in the same pass.

    id_NJ: (N, J) integers, J <= 64: kept ids in any order, distinct in a row, or -1 in an unused column (not
        checked: it would synchronise). logq_NJ: (N, J) their log q, at this T and over these kept ids.
    tail_N: (N,) fp32 >= 0, the q of all other kept ids.
    student_NV, weight_N, common_vocab, suppressed_Z, temperature, out_NV, backend: as in distill.distill_kl_grad.
    Returns (loss_N, student_dropped_N), (N,) fp32, not differentiable; shares in [0, 1]. Raises as distill_kl_grad."""
    logit_rows.check(student_NV, common_vocab, temperature, backend, tail_N, weight_N, out_NV=out_NV)
    (N, V), J, grad = student_NV.shape, id_NJ.shape[-1], out_NV is not None
    if id_NJ.shape != (N, J) or logq_NJ.shape != (N, J) or not 1 <= J <= BLOCK_J:
        raise ValueError(f"need {N} rows of 1 to {BLOCK_J} ids and as many log-probabilities, got {tuple(id_NJ.shape)} "
                         f"and {tuple(logq_NJ.shape)}")
    teacher, options = (id_NJ, logq_NJ, tail_N), (common_vocab, suppressed_Z, temperature)
    if backend == "torch":
        return logit_rows.by_autograd(distill_topk_ref, student_NV, teacher, weight_N, options, out_NV)
    loss_N, lse_N = torch.empty(2, N, dtype=torch.float32, device=student_NV.device)
    kept_V = logit_rows.kept_mask(student_NV, common_vocab, suppressed_Z)
    outside_N = logit_rows.outside_logsumexp(student_NV, *options)  # now: the gradient may overwrite the logits
    sorted_NJ, order_NJ = F.pad(id_NJ.int(), (0, 1), value=2**31 - 1).sort(1)
    logq_NJ = logq_NJ.float().gather(1, order_NJ[:, :J])
    out_NV, weight_N = (out_NV, weight_N.contiguous()) if grad else (student_NV, loss_N)  # not used without a gradient
    _topk_kernel[(N,)](
        student_NV, sorted_NJ, logq_NJ, tail_N.contiguous(), kept_V, weight_N, loss_N, lse_N, out_NV,
        student_NV.stride(0), out_NV.stride(0), common_vocab, V, J, temperature, BLOCK_V=BLOCK_V, BLOCK_J=BLOCK_J,
        GRAD=grad, num_warps=NUM_WARPS, num_stages=NUM_STAGES)
    return loss_N, torch.sigmoid(outside_N - lse_N)
