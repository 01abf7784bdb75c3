"""Distillation: KL(teacher || student) at a temperature, over the ids that both know, from two rows of logits.

Kept ids K: those below `common_vocab` (where two vocabularies begin to differ), less the suppressed ones. At temperature T

    q = softmax(teacher / T over K)       p = softmax(student / T over K)
    loss[n] = T² sum_{v in K} q[v] (log q[v] - log p[v])      (T² makes the gradient as large as at T = 1)
    dstudent[n, v] = weight[n] T (p[v] - q[v]) in K, 0 elsewhere
    dropped[n] = share of softmax(logits / T over the whole row) outside K, of the student and of the teacher

With t, s the logits over T, m + log l their log-sum-exps over K (m the largest), c the teacher's best id and
u = sum_K q ((t - m_t) - (s - s[c])), loss = T² (u + m_s - s[c] + log l_s - log l_t). These are differences of logits,
so nothing is lost to their size. One read of both rows gives the loss, a second one the gradient. Every lane keeps the
sums of its own columns, so the loops have no step across lanes.
Bytes a row, for student, teacher and result elements of i, j, o bytes: (i + j) common_vocab for the loss, as much again and
oV with the gradient: 2.4 MB from fp32 and bf16 rows into fp32, 0.6 ms for 1024 rows at 4.3 TB/s. Counted, not measured:
no GPU was at hand. The mask of kept ids (1 B a column) stays in L2. kernels/distill_topk.py has the stored teacher.

Dims: N rows, V and W columns of student and teacher, Z suppressed ids, K kept ids.
"""
import torch
import triton
import triton.language as tl

BLOCK_V = 2048  # columns a step: 8 a thread, loads of 16 bytes and five statistics that fit the registers
NUM_WARPS = 8  # BLOCK_V is a multiple of 32 * NUM_WARPS: no column is held twice, which writing over the logits needs
NUM_STAGES = 3
ROWS = 64  # rows at a time for backend="torch" with a gradient: its temporaries stay below 0.3 GB at 152,064 columns
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


def distill_kl_ref(student_NV, teacher_NW, common_vocab, suppressed_Z, temperature):
    """Same contract as distill_kl in plain PyTorch; pass fp64 logits for ground truth."""
    _, logp_NK, student_dropped_N = _split(student_NV, common_vocab, suppressed_Z, temperature)
    _, logq_NK, teacher_dropped_N = _split(teacher_NW.detach(), common_vocab, suppressed_Z, temperature)
    q_NK = logq_NK.exp()
    kl_N = (q_NK * (logq_NK - logp_NK)).masked_fill(q_NK == 0, 0).sum(-1)  # 0 log 0 is 0, also beside a logit of -inf
    return temperature**2 * kl_N, student_dropped_N, teacher_dropped_N


@triton.jit
def _online(m, s, a):
    """One more value a lane: m is the largest so far, s the sum of exp(value - m); a = -inf adds nothing."""
    e = tl.exp(-tl.abs(a - m))  # the smaller less the larger, so one exponential serves both cases
    return tl.maximum(m, a), tl.where(a > m, s * e + 1.0, s + e)


@triton.jit(do_not_specialize=["common_vocab"])
def _kl_kernel(
    student_ptr, teacher_ptr, kept_ptr, weight_ptr, loss_ptr, lse_s_ptr, lse_t_ptr, out_ptr,
    stride_sn, stride_tn, stride_on, common_vocab, V, W, temperature,
    BLOCK_V: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    temperature = tl.cast(temperature, tl.float32)  # torch.compile hands Python floats over as fp64
    inv_temp = 1.0 / temperature
    student_ptr += n * stride_sn
    teacher_ptr += n * stride_tn
    zero = tl.zeros([BLOCK_V], tl.float32)
    m_s, sum_s, m_t, sum_t, u, s_c = zero + LOWEST, zero, zero + LOWEST, zero, zero, zero  # s_c: s at the largest t
    for start in range(0, common_vocab, BLOCK_V):  # loads end at V and W, not at `common_vocab`: multiples of 16 keep them wide
        v = start + tl.arange(0, BLOCK_V)
        kept = tl.load(kept_ptr + v) != 0
        s = tl.load(student_ptr + v, mask=v < V, other=0.0).to(tl.float32) * inv_temp
        t = tl.load(teacher_ptr + v, mask=v < W, other=0.0).to(tl.float32) * inv_temp
        s = tl.where(kept, tl.maximum(s, LOWEST, propagate_nan=tl.PropagateNan.ALL), 0.0)  # 0 * inf below is NaN
        t = tl.where(kept, tl.maximum(t, LOWEST, propagate_nan=tl.PropagateNan.ALL), LOWEST)
        m_s, sum_s = _online(m_s, sum_s, tl.where(kept, s, -float("inf")))
        gap = (t - m_t) - (s - s_c)
        e = tl.where(kept, tl.exp(-tl.abs(t - m_t)), 0.0)
        u = tl.where(t > m_t, (u - sum_t * gap) * e, u + e * gap)  # a new maximum shifts every earlier term by -gap
        s_c = tl.where(t > m_t, s, s_c)
        sum_t = tl.where(t > m_t, sum_t * e + 1.0, sum_t + e)
        m_t = tl.maximum(m_t, t)
    top_s, top_t = tl.max(m_s, 0), tl.max(m_t, 0)
    top_c = tl.max(tl.where(m_t == top_t, s_c, LOWEST), 0)
    rescaled = sum_t * tl.exp(m_t - top_t)
    all_t = tl.sum(rescaled, 0)
    u = tl.sum(u * tl.exp(m_t - top_t) + rescaled * ((m_t - top_t) - (s_c - top_c)), 0) / all_t
    log_s, log_t = tl.log(tl.sum(sum_s * tl.exp(m_s - top_s), 0)), tl.log(all_t)
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


def _launch(student_NV, teacher_NW, weight_N, common_vocab, suppressed_Z, temperature, out_NV):
    """Losses and dropped shares; the gradient into out_NV unless that is None."""
    N, V = student_NV.shape
    kept_V = torch.zeros(triton.cdiv(V, BLOCK_V) * BLOCK_V + 1, dtype=torch.int8, device=student_NV.device)
    kept_V[:common_vocab] = 1
    kept_V[suppressed_Z.clamp(max=common_vocab)] = 0
    loss_N, lse_s_N, lse_t_N = torch.empty(3, N, dtype=torch.float32, device=student_NV.device)
    grad = out_NV is not None
    out_NV, weight_N = (out_NV, weight_N) if grad else (student_NV, loss_N)  # neither is touched then
    s_out_N = _outside(student_NV, common_vocab, suppressed_Z, temperature)  # now: the gradient may take its place
    t_out_N = _outside(teacher_NW, common_vocab, suppressed_Z, temperature)
    if N:
        _kl_kernel[(N,)](student_NV, teacher_NW, kept_V, weight_N, loss_N, lse_s_N, lse_t_N, out_NV,
                         student_NV.stride(0), teacher_NW.stride(0), out_NV.stride(0), common_vocab, V, teacher_NW.shape[1],
                         temperature, BLOCK_V=BLOCK_V, GRAD=grad, num_warps=NUM_WARPS, num_stages=NUM_STAGES)
    return loss_N, torch.sigmoid(s_out_N - lse_s_N), torch.sigmoid(t_out_N - lse_t_N)


class _DistillKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_NV, teacher_NW, *options):
        ctx.save_for_backward(student_NV, teacher_NW)
        ctx.options = options
        results = _launch(student_NV, teacher_NW, None, *options, None)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx, grad_N, *_):
        student_NV, teacher_NW = ctx.saved_tensors
        out_NV = torch.empty_like(student_NV)
        _launch(student_NV, teacher_NW, grad_N.contiguous(), *ctx.options, out_NV)
        return out_NV, None, None, None, None


def _check(student_NV, teacher_NW, common_vocab, temperature, backend):
    rows = student_NV, teacher_NW
    if any(z.ndim != 2 or z.stride(1) != 1 or len(z) != len(student_NV) or z.shape[1] < common_vocab for z in rows):
        raise ValueError(f"need as many rows of teacher as of student, with unit stride and at least {common_vocab} columns, "
                         f"got {[tuple(z.shape) for z in rows]} with strides {[z.stride() for z in rows]}")
    if not (common_vocab >= 1 and temperature > 0 and backend in ("triton", "torch")):
        raise ValueError(f"need common_vocab >= 1, temperature > 0, backend 'triton' or 'torch', got {common_vocab}, {temperature}, "
                         f"{backend!r}")


def distill_kl(student_NV, teacher_NW, common_vocab, suppressed_Z, temperature, backend):
    """T² KL(teacher || student) of each row, at temperature T, over the kept ids; differentiable in the student.

    Args:
        student_NV: (N, V) fp32 | bf16 | fp16, unit stride in V. teacher_NW: (N, W) likewise; never differentiated.
        common_vocab: ids below it mean the same in both vocabularies. suppressed_Z: (Z,) int64, distinct, on the same device;
            those from `common_vocab` on say nothing new. At least one id must remain (not checked: it would sync).
        temperature: > 0. backend: "triton" | "torch".
        Logits may be -inf: a kept id costs nothing if both rows say so, about infinity if the student alone does.
    Returns:
        (loss_N, student_dropped_N, teacher_dropped_N) fp32; shares in [0, 1], detached.
    Raises:
        ValueError: wrong rank, width, stride, common_vocab, temperature or backend.
    Source: the module docstring; tests/test_distill.py.
    """
    _check(student_NV, teacher_NW, common_vocab, temperature, backend)
    if backend == "torch":
        return distill_kl_ref(student_NV, teacher_NW, common_vocab, suppressed_Z, temperature)
    return _DistillKL.apply(student_NV, teacher_NW, common_vocab, suppressed_Z, temperature)


def distill_kl_grad(student_NV, teacher_NW, weight_N, common_vocab, suppressed_Z, temperature, out_NV, backend):
    """distill_kl with weight_N[n] dloss[n]/dstudent written to out_NV (fp32 | bf16 | fp16) in the same pass.

    out_NV may be student_NV itself, whose logits are then gone, but must not overlap it otherwise. weight_N: (N,) fp32.
    The losses returned are not weighted; a row of weight 0 gets exact zeros. Nothing here is differentiable.
    """
    _check(student_NV, teacher_NW, common_vocab, temperature, backend)
    if out_NV.shape != student_NV.shape or out_NV.stride(1) != 1:
        raise ValueError(f"out must be {tuple(student_NV.shape)} with unit stride, got {tuple(out_NV.shape)} "
                         f"with strides {out_NV.stride()}")
    if backend == "triton":
        with torch.no_grad():
            return _launch(student_NV, teacher_NW, weight_N.contiguous(), common_vocab, suppressed_Z, temperature, out_NV)
    results = []
    for start in range(0, max(1, len(student_NV)), ROWS):
        rows = slice(start, start + ROWS)
        with torch.enable_grad():
            leaf_NV = student_NV[rows].detach().requires_grad_()
            loss_N, *dropped = distill_kl_ref(leaf_NV, teacher_NW[rows], common_vocab, suppressed_Z, temperature)
            out_NV[rows] = torch.autograd.grad(loss_N, leaf_NV, weight_N[rows].to(loss_N.dtype))[0]
        results.append((loss_N.detach(), *dropped))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


CONFIGS = [  # see tools/kernel_report.py; 152,064 and 156,032 columns are multiples of 16, `common_vocab` is not
    (_kl_kernel, f"*fp32:16 *{teacher}:16 *i8:16 *fp32:16 *fp32:16 *fp32:16 *fp32:16 *{out}:16 "
     "i32:16 i32:16 i32:16 i32 i32:16 i32:16 fp32", {"BLOCK_V": BLOCK_V, "GRAD": grad}, NUM_WARPS, NUM_STAGES, "row")
    for teacher in ("bf16", "fp32") for out, grad in (("fp32", False), ("fp32", True), ("bf16", True))
]  # fmt: skip
