"""Log-probability of one chosen token a row, and the row's entropy, over the ids that are not suppressed.

With K the ids below `vocab_limit` that are not listed as suppressed, and M the largest of a row's logits z over K,

    logsum[n]     = log sum_{v in K} exp((z[v] - M) / T)
    logp[n]       = (z[y] - M) / T - logsum,              -inf where y is suppressed or out of range
    entropy[n]    = logsum - sum_{v in K} p[v] (z[v] - M) / T
    dlogits[n, v] = g[n] / T (1[v == y] - p[v]) in K, 0 elsewhere,   p[v] = exp((z[v] - M) / T - logsum)

M and logsum are kept apart: their sum would round to the logits' size, and p with it. Each lane runs a softmax over its
own columns (m, s = sum e^d, u = sum e^d d, for d = (z - m) / T), with one exp2 a column, since of the old and the new
maximum one has d = 0; lanes meet once, after the loop.

Bytes a row, V columns of i bytes, gradient of o: row_stats iV, logits_grad (i + o)V. With 152,064 columns, fp32 in and
bf16 out: 0.61 + 0.91 MB, for 1024 rows 0.36 ms at 4.3 TB/s by counting. log_softmax and its backward in eager fp32
move at least 6 times 0.61 MB, more with suppressed ids. Nothing was measured on a GPU.

Dims: N tokens (rows), V vocabulary, Z listed suppressed ids.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK_V = 2048  # columns a step, 8 a thread: 16-byte loads, and three statistics a column fit the registers
NUM_WARPS = 8  # BLOCK_V is a multiple of 32 * NUM_WARPS: no column is held twice, which writing over the input needs
ROWS = 64  # rows at a time for backend="torch": its temporaries stay below 0.2 GB at 152,064 columns
LOWEST = -1e30  # stands for -inf where a difference of two must not be NaN
_LOWEST, _LOG2E, _LN2 = tl.constexpr(LOWEST), tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


def split_suppressed(suppressed_ids, V):
    """(vocab_limit, rest) of sorted suppressed ids: the tail [vocab_limit, V) costs a kernel nothing, the listed rest a comparison each
    in the blocks of columns from the first to the last of them."""
    rest, vocab_limit = list(suppressed_ids), V
    while rest and rest[-1] == vocab_limit - 1:
        vocab_limit = rest.pop()
    return vocab_limit, rest


def token_logprob_ref(logits_NV, index_N, temperature=1.0, suppressed_Z=None, vocab_limit=None):
    """Same contract as token_logprob in plain PyTorch, by autograd; pass fp64 logits for ground truth."""
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature  # softmax sums need fp32
    z_NV[:, vocab_limit or z_NV.shape[1]:] = -torch.inf
    logp_NV = F.log_softmax(z_NV if suppressed_Z is None else z_NV.index_fill(1, suppressed_Z, -torch.inf), dim=-1)
    inside_N = (index_N >= 0) & (index_N < z_NV.shape[1])
    logp_N = logp_NV.gather(1, index_N.where(inside_N, 0)[:, None]).squeeze(1)
    return logp_N.where(inside_N, -torch.inf), torch.special.entr(logp_NV.detach().exp()).sum(-1)


@triton.jit
def _allowed(v, start, vocab_limit, suppressed_ptr, first, last, Z, BLOCK_V: tl.constexpr):
    """Which of the columns v = start ... start + BLOCK_V - 1 are not suppressed; only blocks near the list look at it."""
    ok = v < vocab_limit
    if (first < start + BLOCK_V) & (last >= start):
        for i in range(0, Z):
            ok = ok & (v != tl.load(suppressed_ptr + i).to(tl.int32))
    return ok


@triton.jit(do_not_specialize=["N", "vocab_limit", "Z"])
def _row_stats_kernel(
    logits_ptr, index_ptr, suppressed_ptr, stats_ptr,
    stride_n, N, V, vocab_limit, Z, inv_temp, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    inv_temp = tl.cast(inv_temp, tl.float32)  # torch.compile hands Python floats over as fp64
    scale, row_ptr = inv_temp * _LOG2E, logits_ptr + n * stride_n
    first, last = tl.load(suppressed_ptr, mask=Z > 0, other=V), tl.load(suppressed_ptr + Z - 1, mask=Z > 0, other=-1)
    m = tl.full([BLOCK_V], _LOWEST, tl.float32)
    s, u = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab_limit, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        # masked by V, a multiple of 16, and not by vocab_limit: so loads are 16 bytes wide
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
    y = tl.load(index_ptr + n)
    ok = (y >= 0) & (y < vocab_limit)
    for i in range(0, Z):
        ok = ok & (y != tl.load(suppressed_ptr + i))
    z_y = tl.load(row_ptr + y, mask=ok, other=-float("inf")).to(tl.float32)
    tl.store(stats_ptr + n, (z_y - top) * inv_temp - logsum)
    tl.store(stats_ptr + N + n, logsum - tl.sum(e * (u + d * s), 0) / total * _LN2)
    tl.store(stats_ptr + 2 * N + n, top)
    tl.store(stats_ptr + 3 * N + n, logsum)


@triton.jit(do_not_specialize=["vocab_limit", "Z"])
def _logits_grad_kernel(
    coef_ptr, logits_ptr, index_ptr, suppressed_ptr, max_ptr, logsum_ptr, out_ptr,
    stride_n, stride_on, V, vocab_limit, Z, inv_temp, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    inv_temp = tl.cast(inv_temp, tl.float32)
    coef = tl.load(coef_ptr + n) * inv_temp
    top, shift, y = tl.load(max_ptr + n), tl.load(logsum_ptr + n) * _LOG2E, tl.load(index_ptr + n).to(tl.int32)
    first, last = tl.load(suppressed_ptr, mask=Z > 0, other=V), tl.load(suppressed_ptr + Z - 1, mask=Z > 0, other=-1)
    end = tl.where(coef != 0.0, V, 0)  # a row without a gradient is not read
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + n * stride_n + v, mask=v < end, other=-float("inf")).to(tl.float32)
        ok = _allowed(v, start, vocab_limit, suppressed_ptr, first, last, Z, BLOCK_V) & (v < end)
        p = tl.exp2((tl.where(ok, z, _LOWEST) - top) * (inv_temp * _LOG2E) - shift)
        tl.store(out_ptr + n * stride_on + v, tl.where(ok, coef * ((v == y).to(tl.float32) - p), 0.0), mask=v < V)


def _kept(logits_NV, index_N, suppressed_Z, vocab_limit):
    """A copy in fp32 (fp64) with LOWEST for -inf and suppressed ids; which indices are allowed; them, 0 for the others."""
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).clamp(min=LOWEST)
    z_NV[:, vocab_limit:] = LOWEST
    ok_N = (index_N >= 0) & (index_N < vocab_limit)
    if suppressed_Z is not None:
        z_NV.index_fill_(1, suppressed_Z, LOWEST)
        ok_N &= ~torch.isin(index_N, suppressed_Z)
    return z_NV, ok_N, index_N.where(ok_N, 0)[:, None]


def _check(logits_NV, index_N, temperature, suppressed_Z, vocab_limit, backend):
    """The vocab_limit as an integer; ValueError for what the kernels cannot take."""
    if logits_NV.ndim != 2 or logits_NV.stride(1) != 1 or index_N.shape != logits_NV.shape[:1]:
        raise ValueError(f"need (N, V) logits with unit stride in V and (N,) index, got {tuple(logits_NV.shape)} "
                         f"strides {logits_NV.stride()} and {tuple(index_N.shape)}")
    V = logits_NV.shape[1]
    if not temperature > 0 or vocab_limit is not None and not 0 < vocab_limit <= V or backend not in ("triton", "torch"):
        raise ValueError(f"temperature must be > 0, vocab_limit in [1, {V}] and backend 'triton' or 'torch', got {temperature}, "
                         f"{vocab_limit} and {backend!r}")
    return V if vocab_limit is None else vocab_limit


def row_stats(logits_NV, index_N, temperature=1.0, suppressed_Z=None, vocab_limit=None, backend="triton"):
    """(logp_N, entropy_N, max_N, logsum_N), fp32, from one read of the logits. Arguments as token_logprob.

    Not differentiable. All in nats but for max_N, the largest logit allowed; a row's normaliser, its logsumexp, is
    max_N / temperature + logsum_N.
    """
    vocab_limit = _check(logits_NV, index_N, temperature, suppressed_Z, vocab_limit, backend)
    N, V = logits_NV.shape
    stats_4N = torch.empty(4, N, device=logits_NV.device, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    if backend == "triton":
        listed, Z = (index_N, 0) if suppressed_Z is None else (suppressed_Z.contiguous(), len(suppressed_Z))
        if N:
            _row_stats_kernel[(N,)](
                logits_NV, index_N.contiguous(), listed, stats_4N, logits_NV.stride(0), N, V, vocab_limit, Z,
                1.0 / temperature, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS)
        return tuple(stats_4N)
    for rows in (slice(a, a + ROWS) for a in range(0, N, ROWS)):
        z_NV, ok_N, at_N1 = _kept(logits_NV[rows], index_N[rows], suppressed_Z, vocab_limit)
        max_N = z_NV.amax(1)
        d_NV = z_NV.sub_(max_N[:, None]).div_(temperature)
        e_NV = d_NV.exp()
        total_N, d_y_N = e_NV.sum(1), d_NV.gather(1, at_N1).squeeze(1)
        d_y_N[~ok_N | (d_y_N < LOWEST / 2)] = -torch.inf
        logsum_N = total_N.log()
        entropy_N = logsum_N - e_NV.mul_(d_NV).sum(1) / total_N
        stats_4N[:, rows] = torch.stack([d_y_N - logsum_N, entropy_N, max_N, logsum_N])
    return tuple(stats_4N)


def logits_grad(logits_NV, index_N, stats, coef_N, temperature=1.0, suppressed_Z=None, vocab_limit=None, backend="triton", out=None):
    """d sum(coef_N * logp_N) / d logits, from one read of the logits and one write; returns `out`.

    Args: as token_logprob, and
        stats: what row_stats gave for the same arguments. coef_N: (N,) fp32; rows with 0 get exact zeros.
        out: (N, V) of any float dtype, unit stride in V; None = new, in the logits' dtype. May be logits_NV itself,
            which the gradient then replaces; other memory shared with it is undefined.
    """
    vocab_limit = _check(logits_NV, index_N, temperature, suppressed_Z, vocab_limit, backend)
    (N, V), (_, _, max_N, logsum_N) = logits_NV.shape, stats
    out_NV = torch.empty_like(logits_NV) if out is None else out
    if out_NV.shape != logits_NV.shape or out_NV.stride(1) != 1 or coef_N.shape != (N,):
        raise ValueError(f"need out {(N, V)} with unit stride in V and coef {(N,)}, got {tuple(out_NV.shape)} strides "
                         f"{out_NV.stride()} and {tuple(coef_N.shape)}")
    if backend == "triton":
        listed, Z = (index_N, 0) if suppressed_Z is None else (suppressed_Z.contiguous(), len(suppressed_Z))
        if N:
            _logits_grad_kernel[(N,)](
                coef_N.contiguous(), logits_NV, index_N.contiguous(), listed, max_N, logsum_N, out_NV,
                logits_NV.stride(0), out_NV.stride(0), V, vocab_limit, Z, 1.0 / temperature, BLOCK_V=BLOCK_V,
                num_warps=NUM_WARPS)
        return out_NV
    for rows in (slice(a, a + ROWS) for a in range(0, N, ROWS)):
        d_NV, ok_N, at_N1 = _kept(logits_NV[rows], index_N[rows], suppressed_Z, vocab_limit)
        coef_N1 = coef_N[rows, None] / temperature
        d_NV.sub_(max_N[rows, None]).div_(temperature).sub_(logsum_N[rows, None]).exp_().mul_(-coef_N1)
        d_NV.scatter_add_(1, at_N1, (coef_N1 * ok_N[:, None]).to(d_NV.dtype))
        out_NV[rows] = d_NV.masked_fill_(coef_N1 == 0, 0.0)
    return out_NV


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, index_N, *options):
        stats = row_stats(logits_NV, index_N, *options)
        ctx.save_for_backward(logits_NV, index_N, *stats)
        ctx.options = options
        ctx.mark_non_differentiable(stats[1])
        return stats[:2]

    @staticmethod
    def backward(ctx, grad_N, _):
        logits_NV, index_N, *stats = ctx.saved_tensors
        return logits_grad(logits_NV, index_N, stats, grad_N, *ctx.options), *[None] * 5


def token_logprob(logits_NV, index_N, temperature=1.0, suppressed_Z=None, vocab_limit=None, backend="triton"):
    """Log-probability of token index_N[n] under softmax(logits_NV[n] / temperature) over the ids that are not suppressed.

    Args:
        logits_NV: (N, V) fp32 | bf16 | fp16, unit stride in V; differentiable. "torch" also takes fp64.
        index_N: (N,) int64. For a suppressed id or one outside [0, V) the result is defined: -inf, with gradient -g p / T.
        temperature: > 0, dimensionless; a Python float.
        suppressed_Z: (Z,) int64, sorted (not checked: it would sync), or None. vocab_limit: ids from here on are suppressed too;
            None = V. split_suppressed makes both of one list.
        backend: "triton" | "torch".
    Returns:
        (logp_N, entropy_N): (N,) fp32 in nats, at most and at least 0. The entropy is not differentiable. Where every
        allowed logit is -inf, logp is -inf and the entropy means nothing.
    Raises:
        ValueError: wrong rank, stride, temperature, vocab_limit or backend.
    Source: definition in the module docstring; tests/test_logprob.py compares it with token_logprob_ref in fp64.
    """
    return _TokenLogprob.apply(logits_NV, index_N, temperature, suppressed_Z, vocab_limit, backend)


CONFIGS = [  # for tools/kernel_report.py: (kernel, types, constants, num_warps, num_stages, kind)
    *((_row_stats_kernel, f"*{logits}:16 *i64:16 *i64:16 *fp32:16 i32:16 i32 i32:16 i32 i32 fp32",
       {"BLOCK_V": BLOCK_V}, NUM_WARPS, 3, "row") for logits in ("fp32", "bf16")),
    *((_logits_grad_kernel, f"*fp32:16 *{logits}:16 *i64:16 *i64:16 *fp32:16 *fp32:16 *{out}:16 i32:16 i32:16 i32:16 "
       "i32 i32 fp32", {"BLOCK_V": BLOCK_V}, NUM_WARPS, 3, "row")
      for logits, out in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"))),
]
