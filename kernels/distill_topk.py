"""Distillation from a stored top-k of the teacher: KL over its J best ids and one bucket for all other ids.

Kept ids K and temperature T as in kernels/distill.py, whose q = softmax(teacher / T over K) was stored in part: J ids
of K with log q, and `tail`, the q of all other ids of K together. Those others are one bucket for the student too: with
p = softmax(student / T over K) and P the sum of p over them,

    loss[n] = T² (sum_j q_j (log q_j - log p[id_j]) + tail (log tail - log P))       at most the full KL
    dstudent[n, id_j] = weight[n] T (Q p[id_j] - q_j)       with Q = sum_j q_j + tail, which is 1 but for rounding
    dstudent[n, v] = weight[n] T (Q - tail / P) p[v] at the other ids of K, 0 outside K

P is summed over the others themselves (1 - sum_j p[id_j] would cancel), so a block of columns leaves out the ids in it:
they come sorted, and each is compared with the columns of one block only.
Bytes a row, for student and result elements of i and o bytes: i common_vocab for the loss, as much again and oV with the
gradient: 1.8 MB in fp32, 0.44 ms for 1024 rows at 4.3 TB/s. Counted, not measured: no GPU was at hand.

Dims: N rows, V columns, Z suppressed ids, J stored ids, K kept ids.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK_V = 2048  # columns a step: 8 a thread, loads of 16 bytes and five statistics that fit the registers
NUM_WARPS = 8  # BLOCK_V is a multiple of 32 * NUM_WARPS: no column is held twice, which writing over the logits needs
NUM_STAGES = 3
ROWS = 64  # rows at a time for backend="torch" with a gradient: its temporaries stay below 0.5 GB at 152,064 columns
BLOCK_J = 64  # the most ids a row may have stored
LOWEST = tl.constexpr(-1e30)  # stands for -inf where a difference of two must not be NaN


def _outside(logits_NV, common_vocab, suppressed_Z, temperature):
    """Log-sum-exp of the columns outside K; only they are read."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    suppressed_NZ = logits_NV[:, suppressed_Z.clamp(max=logits_NV.shape[1] - 1)].masked_fill(suppressed_Z >= common_vocab, -torch.inf)
    return (torch.cat([logits_NV[:, common_vocab:], suppressed_NZ], 1).to(wide) / temperature).logsumexp(-1)


def _split(logits_NV, common_vocab, suppressed_Z, temperature):
    """The kept ids, their log-softmax and the dropped share, in plain PyTorch."""
    kept = torch.ones(common_vocab, dtype=torch.bool, device=logits_NV.device)
    kept[suppressed_Z[suppressed_Z < common_vocab]] = False
    id_K = kept.nonzero().squeeze(1)
    a_NK = logits_NV[:, id_K].to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature  # sums need fp32
    logp_NK = a_NK.log_softmax(-1)
    lse_N = a_NK.detach().logsumexp(-1)
    dropped_N = torch.sigmoid(_outside(logits_NV.detach(), common_vocab, suppressed_Z, temperature) - lse_N)
    return id_K, logp_NK, dropped_N


def distill_topk_ref(student_NV, id_NJ, logq_NJ, tail_N, common_vocab, suppressed_Z, temperature):
    """Same contract as distill_topk in plain PyTorch; pass fp64 logits for ground truth."""
    id_K, logp_NK, dropped_N = _split(student_NV, common_vocab, suppressed_Z, temperature)
    logp_NS = logp_NK.new_full((len(logp_NK), common_vocab + 1), -torch.inf).index_copy(1, id_K, logp_NK)
    empty_NJ = id_NJ < 0
    id_NJ = id_NJ.long().masked_fill(empty_NJ, common_vocab)  # the column after the last
    q_NJ = logq_NJ.exp().masked_fill(empty_NJ, 0)
    kl_N = (q_NJ * (logq_NJ - logp_NS.gather(1, id_NJ))).masked_fill(q_NJ == 0, 0).sum(-1)
    rest_NS = logp_NS.scatter(1, id_NJ, -torch.inf)
    none_N = rest_NS.isneginf().all(-1) | (tail_N == 0)  # an empty sum, whose logarithm has no gradient
    log_rest_N = rest_NS.masked_fill(none_N[:, None], 0).logsumexp(-1)
    kl_N = kl_N + (tail_N * (tail_N.log() - log_rest_N)).masked_fill(none_N, 0)
    return temperature**2 * kl_N, dropped_N


@triton.jit
def _online(m, s, a):
    """One more value a lane: m is the largest so far, s the sum of exp(value - m); a = -inf adds nothing."""
    e = tl.exp(-tl.abs(a - m))  # the smaller less the larger, so one exponential serves both cases
    return tl.maximum(m, a), tl.where(a > m, s * e + 1.0, s + e)


@triton.jit
def _merge(m, s):
    """The lanes' largest value and the sum of exp(value - largest) over all of them."""
    top = tl.max(m, 0)
    return top, tl.sum(s * tl.exp(m - top), 0)


@triton.jit(do_not_specialize=["common_vocab", "J"])
def _topk_kernel(
    student_ptr, id_ptr, logq_ptr, tail_ptr, kept_ptr, weight_ptr, loss_ptr, lse_ptr, out_ptr,
    stride_sn, stride_on, common_vocab, V, J, temperature,
    BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    temperature = tl.cast(temperature, tl.float32)  # torch.compile hands Python floats over as fp64
    inv_temp = 1.0 / temperature
    student_ptr += n * stride_sn
    id_ptr += n * (J + 1)  # ascending, then one larger than all
    logq_ptr += n * J
    m, total = tl.full([BLOCK_V], LOWEST, tl.float32), tl.zeros([BLOCK_V], tl.float32)
    j = 0
    picked = tl.load(id_ptr)
    for start in range(0, common_vocab, BLOCK_V):  # loads end at V, not at `common_vocab`: a multiple of 16 keeps them wide
        v = start + tl.arange(0, BLOCK_V)
        rest = tl.load(kept_ptr + v) != 0
        while picked < start + BLOCK_V:
            rest = rest & (v != picked)
            j += 1
            picked = tl.load(id_ptr + j)
        s = tl.load(student_ptr + v, mask=v < V, other=0.0).to(tl.float32) * inv_temp
        m, total = _online(m, total, tl.where(rest, s, -float("inf")))
    top_rest, rest_sum = _merge(m, total)
    slot = tl.arange(0, BLOCK_J)
    v_J = tl.load(id_ptr + slot, mask=slot < J, other=-1)
    s_J = tl.load(student_ptr + v_J, mask=v_J >= 0, other=0.0).to(tl.float32) * inv_temp
    s_J = tl.where(v_J >= 0, tl.maximum(s_J, LOWEST, propagate_nan=tl.PropagateNan.ALL), LOWEST)
    logq_J = tl.load(logq_ptr + slot, mask=v_J >= 0, other=LOWEST)
    logq_J = tl.maximum(logq_J, LOWEST, propagate_nan=tl.PropagateNan.ALL)  # 0 LOWEST is 0, 0 inf is not
    q_J = tl.exp(logq_J)
    tail = tl.load(tail_ptr + n).to(tl.float32)
    top = tl.maximum(top_rest, tl.max(s_J, 0))
    p_J = tl.where(v_J >= 0, tl.exp(s_J - top), 0.0)
    log_sum = tl.log(rest_sum * tl.exp(top_rest - top) + tl.sum(p_J, 0))
    kl = tl.sum(q_J * (logq_J - ((s_J - top) - log_sum)), 0)
    log_rest = tl.log(tl.maximum(rest_sum, 1e-30))  # below 1 only if no id is left
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


def _launch(student_NV, id_NJ, logq_NJ, tail_N, weight_N, common_vocab, suppressed_Z, temperature, out_NV):
    """Losses and dropped shares; the gradient into out_NV unless that is None."""
    (N, V), J = student_NV.shape, id_NJ.shape[1]
    kept_V = torch.zeros(triton.cdiv(V, BLOCK_V) * BLOCK_V + 1, dtype=torch.int8, device=student_NV.device)
    kept_V[:common_vocab] = 1
    kept_V[suppressed_Z.clamp(max=common_vocab)] = 0
    loss_N, lse_N = torch.empty(2, N, dtype=torch.float32, device=student_NV.device)
    sorted_NJ, order_NJ = F.pad(id_NJ.int(), (0, 1), value=2**31 - 1).sort(1)
    logq_NJ = logq_NJ.float().gather(1, order_NJ[:, :J])
    grad = out_NV is not None
    out_NV, weight_N = (out_NV, weight_N) if grad else (student_NV, loss_N)  # neither is touched then
    outside_N = _outside(student_NV, common_vocab, suppressed_Z, temperature)  # now: the gradient may take its place
    if N:
        _topk_kernel[(N,)](student_NV, sorted_NJ, logq_NJ, tail_N.contiguous(), kept_V, weight_N, loss_N, lse_N,
                           out_NV, student_NV.stride(0), out_NV.stride(0), common_vocab, V, J, temperature, BLOCK_V=BLOCK_V,
                           BLOCK_J=BLOCK_J, GRAD=grad, num_warps=NUM_WARPS,
                           num_stages=NUM_STAGES)  # fmt: skip
    return loss_N, torch.sigmoid(outside_N - lse_N)


class _DistillTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_NV, *args):
        ctx.save_for_backward(student_NV, *args[:3])
        ctx.options = args[3:]
        results = _launch(student_NV, *args[:3], None, *args[3:], None)
        ctx.mark_non_differentiable(results[1])
        return results

    @staticmethod
    def backward(ctx, grad_N, _):
        student_NV, *stored = ctx.saved_tensors
        out_NV = torch.empty_like(student_NV)
        _launch(student_NV, *stored, grad_N.contiguous(), *ctx.options, out_NV)
        return out_NV, None, None, None, None, None, None


def _check(student_NV, id_NJ, logq_NJ, tail_N, common_vocab, temperature, backend):
    if student_NV.ndim != 2 or student_NV.stride(1) != 1 or student_NV.shape[1] < common_vocab:
        raise ValueError(f"need rows of at least {common_vocab} logits with unit stride, got {tuple(student_NV.shape)} "
                         f"with strides {student_NV.stride()}")
    N = len(student_NV)
    good = id_NJ.ndim == 2 and 1 <= id_NJ.shape[1] <= BLOCK_J and logq_NJ.shape == id_NJ.shape
    if not good or (len(id_NJ), *tail_N.shape) != (N, N):
        raise ValueError(f"need {N} rows of 1 to {BLOCK_J} ids, as many log-probabilities, and {N} tails, got "
                         f"{tuple(id_NJ.shape)}, {tuple(logq_NJ.shape)}, {tuple(tail_N.shape)}")
    if not (common_vocab >= 1 and temperature > 0 and backend in ("triton", "torch")):
        raise ValueError(f"need common_vocab >= 1, temperature > 0, backend 'triton' or 'torch', got {common_vocab}, {temperature}, "
                         f"{backend!r}")


def distill_topk(student_NV, id_NJ, logq_NJ, tail_N, common_vocab, suppressed_Z, temperature, backend):
    """T² times the KL of each row's stored ids and tail against the student's; differentiable in the student.

    Args:
        student_NV: (N, V) fp32 | bf16 | fp16, unit stride in V.
        id_NJ: (N, J) integers, J <= 64: kept ids in any order, distinct in a row, or -1 in an empty slot (not checked:
            it would sync). logq_NJ: (N, J) their log q, at this T and over these kept ids. tail_N: (N,) fp32 >= 0.
        common_vocab, suppressed_Z, temperature, backend: as in distill_kl.
    Returns:
        (loss_N, student_dropped_N) fp32; shares in [0, 1], detached.
    Raises:
        ValueError: wrong shape, stride, common_vocab, temperature or backend.
    Source: the module docstring; tests/test_distill.py.
    """
    _check(student_NV, id_NJ, logq_NJ, tail_N, common_vocab, temperature, backend)
    if backend == "torch":
        return distill_topk_ref(student_NV, id_NJ, logq_NJ, tail_N, common_vocab, suppressed_Z, temperature)
    return _DistillTopK.apply(student_NV, id_NJ, logq_NJ, tail_N, common_vocab, suppressed_Z, temperature)


def distill_topk_grad(student_NV, id_NJ, logq_NJ, tail_N, weight_N, common_vocab, suppressed_Z, temperature, out_NV, backend):
    """distill_topk with weight_N[n] dloss[n]/dstudent written to out_NV (fp32 | bf16 | fp16), as in distill_kl_grad."""
    _check(student_NV, id_NJ, logq_NJ, tail_N, common_vocab, temperature, backend)
    if out_NV.shape != student_NV.shape or out_NV.stride(1) != 1:
        raise ValueError(f"out must be {tuple(student_NV.shape)} with unit stride, got {tuple(out_NV.shape)} "
                         f"with strides {out_NV.stride()}")
    if backend == "triton":
        with torch.no_grad():
            weight_N = weight_N.contiguous()
            return _launch(student_NV, id_NJ, logq_NJ, tail_N, weight_N, common_vocab, suppressed_Z, temperature, out_NV)
    results = []
    for start in range(0, max(1, len(student_NV)), ROWS):
        rows = slice(start, start + ROWS)
        stored = id_NJ[rows], logq_NJ[rows], tail_N[rows]
        with torch.enable_grad():
            leaf_NV = student_NV[rows].detach().requires_grad_()
            loss_N, dropped_N = distill_topk_ref(leaf_NV, *stored, common_vocab, suppressed_Z, temperature)
            out_NV[rows] = torch.autograd.grad(loss_N, leaf_NV, weight_N[rows].to(loss_N.dtype))[0]
        results.append((loss_N.detach(), dropped_N))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


CONFIGS = [  # see tools/kernel_report.py
    (_topk_kernel, f"*fp32:16 *i32:16 *fp32:16 *fp32:16 *i8:16 *fp32:16 *fp32:16 *fp32:16 *{out}:16 "
     "i32:16 i32:16 i32 i32:16 i32 fp32", {"BLOCK_V": BLOCK_V, "BLOCK_J": BLOCK_J, "GRAD": grad}, NUM_WARPS, NUM_STAGES,
     "row")
    for out, grad in (("fp32", False), ("fp32", True), ("bf16", True))
]  # fmt: skip
