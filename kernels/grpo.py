"""GRPO from a row of logits: the token's loss, its gradient and the diagnostics, in one kernel.

SightSound-R1, equation 2, maximises over a prompt's G completions o_i, the mean of 1 / |o_i| times the sum over t of

    min[ratio A, clip(ratio, 1 - eps, 1 + eps) A] - beta D_KL[pi || pi_ref],     ratio = pi / pi_old = exp(logp - old)

with A the completion's advantage, eps split into clip_low and clip_high. We minimise sum_n weight[n] loss[n] over rows
n = (i, t); weight holds 1 / (G |o_i|), or what another aggregation wants:

    loss[n] = -min[ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A] + beta kl
    kl      = exp(ref - logp) - (ref - logp) - 1  (k3, >= 0)   or   logp - ref  (k1)
    c[n]    = weight (-A ratio where the minimum is the first term, else 0, + beta (1 - exp(ref - logp) or 1))
    dlogits[n, v] = c / T (1[v == id] - p[v]) over the ids that are not suppressed (kernels/logprob.py: logp, p, entropy)

With one ratio a sequence (GSPO), exp of the mean of logp - old over its rows, c waits for all of them: then
logprob.row_stats, grpo_coefficient on (N,) vectors and logprob.logits_grad do the same in three steps.

Bytes a row, V columns of i bytes, gradient of o: (2i + o)V, as in those steps; the second read walks backwards to find
the row's end still in L2, but three rows of 608 KB at work on each of 132 SMs are far over its 50 MB. 1024 rows of
152,064 fp32 columns, bf16 out: 0.36 ms at 4.3 TB/s by counting. What one kernel saves is some 50 launches on (N,)
vectors, about 0.1 ms; the head's two matrix products take 2.8. Nothing was measured on a GPU. Dims as in logprob.py.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK_V = 2048  # columns a step, 8 a thread: 16-byte loads, and three statistics a column fit the registers
NUM_WARPS = 8  # BLOCK_V is a multiple of 32 * NUM_WARPS: no column is held twice, which writing over the input needs
ROWS = 64  # rows at a time for backend="torch": its temporaries stay below 0.2 GB at 152,064 columns
_LOWEST, _LOG2E, _LN2 = tl.constexpr(-1e30), tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


class ClipConfig:
    """What is optimised: the ratio's bounds 1 - clip_low and 1 + clip_high, the KL term's weight beta (0 = off) and its
    estimator, "k3" or "k1" (ValueError for another)."""

    def __init__(self, clip_low, clip_high, beta, kl):
        if kl not in ("k1", "k3"):
            raise ValueError(f"kl must be 'k1' or 'k3', got {kl!r}")
        self.clip_low, self.clip_high, self.beta, self.kl = clip_low, clip_high, beta, kl


def grpo_terms(logp_N, old_N, ref_N, advantage_N, weight_N, objective, sequence_N=None):
    """(loss_N, ratio_N, clipped_N, kl_N) of grpo_loss in plain PyTorch; loss_N is differentiable in logp_N.

    Arguments as grpo_loss, and sequence_N, (N,) int64 in [0, N): the rows of one number are a whole sequence and share
    its ratio; None = one ratio a token.
    """
    live_N = weight_N != 0  # rows left out may hold NaN, and 0 * NaN would reach the gradient
    logp_N, old_N, advantage_N = (x.where(live_N, 0.0) for x in (logp_N, old_N, advantage_N))
    log_ratio_N = logp_N - old_N
    if sequence_N is not None:
        sum_S = torch.zeros_like(log_ratio_N).index_add(0, sequence_N, log_ratio_N)
        count_S = torch.zeros_like(log_ratio_N).index_add(0, sequence_N, live_N.to(log_ratio_N.dtype))
        log_ratio_N = (sum_S / count_S.clamp(min=1))[sequence_N]
    ratio_N = log_ratio_N.exp()
    first_N = ratio_N * advantage_N
    second_N = ratio_N.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantage_N
    kl_N = torch.zeros_like(logp_N)
    if ref_N is not None:
        delta_N = ref_N.where(live_N, 0.0) - logp_N
        kl_N = delta_N.exp() - delta_N - 1 if objective.kl == "k3" else -delta_N
    loss_N = objective.beta * kl_N - torch.minimum(first_N, second_N)
    return loss_N, ratio_N * live_N, (second_N < first_N).to(ratio_N.dtype), kl_N


def grpo_coefficient(logp_N, old_N, ref_N, advantage_N, weight_N, objective, sequence_N=None):
    """(c_N, terms), c_N = d sum(weight_N * loss_N) / d logp_N for logprob.logits_grad. Arguments as grpo_terms."""
    with torch.enable_grad():
        logp_N = logp_N.detach().requires_grad_()
        terms = grpo_terms(logp_N, old_N, ref_N, advantage_N, weight_N, objective, sequence_N)
        (c_N,) = torch.autograd.grad((terms[0] * weight_N).sum(), logp_N)
    return c_N, tuple(x.detach() for x in terms)


def grpo_loss_ref(logits_NV, id_N, old_N, ref_N, advantage_N, weight_N, objective, temperature=1.0, suppressed_Z=None,
                  vocab_limit=None, sequence_N=None):
    """Same contract as grpo_loss in plain PyTorch, by autograd; pass fp64 logits for ground truth."""
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature  # softmax sums need fp32
    z_NV[:, vocab_limit or z_NV.shape[1]:] = -torch.inf
    logp_NV = F.log_softmax(z_NV if suppressed_Z is None else z_NV.index_fill(1, suppressed_Z, -torch.inf), dim=-1)
    logp_N, entropy_N = logp_NV.gather(1, id_N[:, None]).squeeze(1), torch.special.entr(logp_NV.detach().exp()).sum(-1)
    terms = grpo_terms(logp_N, old_N, ref_N, advantage_N, weight_N, objective, sequence_N)
    return (terms[0] * weight_N).sum(), logp_N.detach(), entropy_N, tuple(x.detach() for x in terms)


@triton.jit
def _allowed(v, start, vocab_limit, suppressed_ptr, first, last, Z, BLOCK_V: tl.constexpr):
    """Which of the columns v = start ... start + BLOCK_V - 1 are not suppressed; only blocks near the list look at it."""
    ok = v < vocab_limit
    if (first < start + BLOCK_V) & (last >= start):
        for i in range(0, Z):
            ok = ok & (v != tl.load(suppressed_ptr + i).to(tl.int32))
    return ok


@triton.jit(do_not_specialize=["N", "vocab_limit", "Z"])
def _grpo_kernel(
    logits_ptr, id_ptr, old_ptr, ref_ptr, advantage_ptr, weight_ptr, suppressed_ptr, rows_ptr, out_ptr,
    stride_n, stride_on, N, V, vocab_limit, Z, inv_temp, clip_low, clip_high, beta,
    BLOCK_V: tl.constexpr, HAS_REF: tl.constexpr, K3: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    inv_temp = tl.cast(inv_temp, tl.float32)  # torch.compile hands Python floats over as fp64
    scale, row_ptr = inv_temp * _LOG2E, logits_ptr + n * stride_n
    first, last = tl.load(suppressed_ptr, mask=Z > 0, other=V), tl.load(suppressed_ptr + Z - 1, mask=Z > 0, other=-1)
    y = tl.load(id_ptr + n).to(tl.int32)
    z_y = tl.load(row_ptr + y).to(tl.float32)  # here, for at the end another warp may have written over it
    m = tl.full([BLOCK_V], _LOWEST, tl.float32)  # m, s and u as in logprob.py
    s, u = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab_limit, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        z = tl.maximum(z, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
        z = tl.where(_allowed(v, start, vocab_limit, suppressed_ptr, first, last, Z, BLOCK_V), z, _LOWEST)
        d = (z - m) * scale
        e = tl.exp2(-tl.abs(d))
        u = tl.where(d > 0, e * (u - d * s), u + e * d)
        s = tl.where(d > 0, e * s + 1, s + e)
        m = tl.where(d > 0, z, m)
    top = tl.max(m, 0)
    d = (m - top) * scale
    e = tl.exp2(d)
    total = tl.sum(e * s, 0)
    logsum = tl.log2(total) * _LN2
    entropy = logsum - tl.sum(e * (u + d * s), 0) / total * _LN2
    logp = (z_y - top) * inv_temp - logsum
    weight = tl.load(weight_ptr + n)
    live = weight != 0.0  # what stands in a row left out may be NaN
    advantage = tl.load(advantage_ptr + n, mask=live, other=0.0)
    ratio = tl.exp(tl.where(live, logp - tl.load(old_ptr + n, mask=live, other=0.0), 0.0))
    low, high = 1.0 - tl.cast(clip_low, tl.float32), 1.0 + tl.cast(clip_high, tl.float32)
    bounded = tl.minimum(tl.maximum(ratio, low), high)
    clipped = bounded * advantage < ratio * advantage  # false for a NaN, which then reaches loss and c
    loss = tl.where(clipped, -bounded * advantage, -ratio * advantage)
    c = tl.where(clipped, 0.0, -ratio * advantage)
    kl = 0.0
    if HAS_REF:
        delta = tl.where(live, tl.load(ref_ptr + n, mask=live, other=0.0) - logp, 0.0)
        kl = tl.exp(delta) - delta - 1.0 if K3 else -delta
        loss += tl.cast(beta, tl.float32) * kl
        c += tl.cast(beta, tl.float32) * (1.0 - tl.exp(delta) if K3 else 1.0)
    tl.store(rows_ptr + n, loss)  # in the order of grpo_terms
    tl.store(rows_ptr + N + n, tl.where(live, ratio, 0.0))
    tl.store(rows_ptr + 2 * N + n, tl.where(clipped, 1.0, 0.0))
    tl.store(rows_ptr + 3 * N + n, kl)
    tl.store(rows_ptr + 4 * N + n, logp)
    tl.store(rows_ptr + 5 * N + n, entropy)
    if HAS_OUT:
        c *= weight * inv_temp
        end = tl.where(c != 0.0, V, 0)  # a row without a gradient is not read again
        for back in range(0, V, BLOCK_V):
            start = (V - 1) // BLOCK_V * BLOCK_V - back  # the end of the row is what L2 still holds
            v = start + tl.arange(0, BLOCK_V)
            z = tl.load(row_ptr + v, mask=v < end, other=-float("inf")).to(tl.float32)
            ok = _allowed(v, start, vocab_limit, suppressed_ptr, first, last, Z, BLOCK_V) & (v < end)
            p = tl.exp2((tl.where(ok, z, _LOWEST) - top) * scale - logsum * _LOG2E)
            tl.store(out_ptr + n * stride_on + v, tl.where(ok, c * ((v == y).to(tl.float32) - p), 0.0), mask=v < V)


def grpo_rows(logits_NV, id_N, old_N, ref_N, advantage_N, weight_N, objective, temperature=1.0, suppressed_Z=None,
              vocab_limit=None, backend="triton", out=None):
    """(logp_N, entropy_N, terms), and in `out` the gradient of grpo_loss; not differentiable. Arguments as there.

    out: (N, V) of any float dtype with unit stride in V, all of which is written; None = no gradient. It may be
    logits_NV itself; other memory shared with it is undefined.
    """
    N, V = logits_NV.shape
    vectors = [id_N, old_N, advantage_N, weight_N] + [ref_N] * (ref_N is not None)
    if logits_NV.stride(1) != 1 or any(x.shape != (N,) for x in vectors):
        raise ValueError(f"need logits with unit stride in V and vectors of {N}, got strides {logits_NV.stride()} and "
                         f"{[tuple(x.shape) for x in vectors]}")
    if out is not None and (out.shape != (N, V) or out.stride(1) != 1):
        raise ValueError(f"need out {(N, V)} with unit stride in V, got {tuple(out.shape)} strides {out.stride()}")
    vocab_limit = V if vocab_limit is None else vocab_limit
    if objective.beta and ref_N is None:
        raise ValueError(f"beta {objective.beta} needs ref_N, got None")
    if not temperature > 0 or not 0 < vocab_limit <= V or backend not in ("triton", "torch"):
        raise ValueError(f"temperature must be > 0, vocab_limit in [1, {V}] and backend 'triton' or 'torch', got {temperature}, "
                         f"{vocab_limit} and {backend!r}")
    rows_6N = torch.empty(6, N, device=logits_NV.device, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    if backend == "torch":
        for at in (slice(a, a + ROWS) for a in range(0, N, ROWS)):
            with torch.enable_grad():
                z_NV = logits_NV[at].detach().to(rows_6N.dtype).requires_grad_()
                args = [None if x is None else x[at] for x in (id_N, old_N, ref_N, advantage_N, weight_N)]
                loss, logp_N, entropy_N, terms = grpo_loss_ref(z_NV, *args, objective, temperature, suppressed_Z, vocab_limit)
            if out is not None:
                grad_NV = torch.autograd.grad(loss, z_NV)[0]
                out[at] = grad_NV.masked_fill_((weight_N[at] == 0)[:, None], 0)  # a row left out may hold NaN
            rows_6N[:, at] = torch.stack([*terms, logp_N, entropy_N])
    elif N:
        listed, Z = (id_N, 0) if suppressed_Z is None else (suppressed_Z.contiguous(), len(suppressed_Z))
        id_N, old_N, advantage_N, weight_N = (x.contiguous() for x in vectors[:4])
        _grpo_kernel[(N,)](
            logits_NV, id_N, old_N, old_N if ref_N is None else ref_N.contiguous(), advantage_N, weight_N, listed,
            rows_6N, rows_6N if out is None else out, logits_NV.stride(0), 0 if out is None else out.stride(0), N, V,
            vocab_limit, Z, 1.0 / temperature, objective.clip_low, objective.clip_high, objective.beta, BLOCK_V=BLOCK_V,
            HAS_REF=ref_N is not None, K3=objective.kl == "k3", HAS_OUT=out is not None, num_warps=NUM_WARPS)
    return rows_6N[4], rows_6N[5], tuple(rows_6N[:4])


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, *args):
        dlogits_NV = torch.empty_like(logits_NV)
        logp_N, entropy_N, terms = grpo_rows(logits_NV, *args, out=dlogits_NV)
        ctx.save_for_backward(dlogits_NV)
        ctx.mark_non_differentiable(logp_N, entropy_N, *terms)
        return (terms[0] * args[4]).sum(), logp_N, entropy_N, *terms

    @staticmethod
    def backward(ctx, grad, *_):
        return (ctx.saved_tensors[0] * grad).to(ctx.saved_tensors[0].dtype), *[None] * 10


def grpo_loss(logits_NV, id_N, old_N, ref_N, advantage_N, weight_N, objective, temperature=1.0, suppressed_Z=None,
              vocab_limit=None, backend="triton"):
    """sum_n weight_N[n] * loss[n] with one ratio a token; its gradient is made in the forward pass.

    Args:
        logits_NV: (N, V) fp32 | bf16 | fp16, unit stride in V; differentiable. "torch" also takes fp64.
        id_N: (N,) int64 in [0, V), none of them suppressed_ids (not checked: it would sync): the sampled tokens.
        old_N, ref_N: (N,) fp32, log-probabilities at the same temperature and bans; ref_N may be None if beta is 0.
        advantage_N, weight_N: (N,) fp32. A row of weight 0 counts for nothing and may hold NaN in these vectors.
        objective: ClipConfig. temperature: > 0, a Python float. backend: "triton" | "torch".
        suppressed_Z: (Z,) int64, sorted, or None. vocab_limit: ids from here on are suppressed too; None = V (logprob.split_suppressed).
    Returns:
        (loss, logp_N, entropy_N, (loss_N, ratio_N, clipped_N, kl_N)), all but the first detached, all fp32. loss_N is
        before the weight; clipped_N is 1 where clipping stops the first term's gradient, else 0; kl_N is 0 without a
        reference. These four are 0 where the weight is.
    Raises:
        ValueError: wrong shapes or stride, an option out of range, or beta without ref_N.
    Source: SightSound-R1, equation 2; tests/test_grpo_kernel.py: TRL's formulas and grpo_loss_ref, in fp64.
    """
    loss, logp_N, entropy_N, *terms = _GrpoLoss.apply(logits_NV, id_N, old_N, ref_N, advantage_N, weight_N, objective,
                                                      temperature, suppressed_Z, vocab_limit, backend)
    return loss, logp_N, entropy_N, tuple(terms)


CONFIGS = [  # for tools/kernel_report.py: (kernel, types, constants, num_warps, num_stages, kind)
    (_grpo_kernel, f"*{logits}:16 *i64:16 *fp32:16 *fp32:16 *fp32:16 *fp32:16 *i64:16 *fp32:16 *{out}:16 i32:16 i32:16 "
     "i32 i32:16 i32 i32 fp32 fp32 fp32 fp32", {"BLOCK_V": BLOCK_V, "HAS_REF": ref, "K3": k3, "HAS_OUT": grad},
     NUM_WARPS, 3, "row") for logits, out, ref, k3, grad in (
        ("fp32", "fp32", True, True, True), ("fp32", "bf16", True, True, True), ("bf16", "bf16", True, True, True),
        ("fp32", "bf16", True, False, True), ("fp32", "bf16", False, True, True), ("fp32", "fp32", True, True, False))
]
