"""Log-probability of one chosen token per row of logits, and the row's entropy, over the ids that are not suppressed.

Let K be the kept ids: those below `vocab_limit` that are not in the list of suppressed ids. For a row of logits z, its
token y, temperature T and m = max of z over K:

    logsum     = log sum_{v in K} exp((z[v] - m) / T)
    logp       = (z[y] - m) / T - logsum                         -inf if y is not in K
    p[v]       = exp((z[v] - m) / T - logsum)
    entropy    = logsum - sum_{v in K} p[v] (z[v] - m) / T
    dlogits[v] = coef / T (1[v == y] - p[v]) in K, 0 elsewhere   the gradient of coef * logp

m and logsum are kept apart: their sum would be rounded to the size of the logits, and p with it. row_stats reads the
row once (online softmax, logit_rows.py); logits_grad reads it once more and writes the gradient.

Bytes per row, with V columns of i bytes and a gradient of o bytes, counted: iV for row_stats, (i + o)V for logits_grad.
At V = 152,064, fp32 in and bf16 out, that is 0.61 and 0.91 MB; eager fp32 moves at least 2.4 times as much.
Dims: N rows (tokens), V vocabulary, Z listed suppressed ids."""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minixmd.kernels import logit_rows
from minixmd.kernels.logit_rows import BLOCK_V, LOG2E, LOWEST, NUM_WARPS, is_allowed, row_softmax, suppressed_range


def split_suppressed(suppressed_ids, V):
    """(vocab_limit, listed) from sorted suppressed ids of a vocabulary of V. The run that ends at V becomes vocab_limit
    and costs a kernel nothing; each other id costs a comparison in the blocks between the first and the last."""
    listed, vocab_limit = list(suppressed_ids), V
    while listed and listed[-1] == vocab_limit - 1:
        vocab_limit = listed.pop()
    return vocab_limit, listed


def token_logprob_ref(logits_NV, index_N, temperature=1.0, suppressed_Z=None, vocab_limit=None):
    """(logp_N, entropy_N) of row_stats in plain PyTorch, logp_N differentiable; pass fp64 logits for ground truth."""
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature  # softmax sums need fp32
    z_NV[:, vocab_limit or z_NV.shape[1]:] = -torch.inf
    logp_NV = F.log_softmax(z_NV if suppressed_Z is None else z_NV.index_fill(1, suppressed_Z, -torch.inf), dim=-1)
    inside_N = (index_N >= 0) & (index_N < z_NV.shape[1])
    logp_N = logp_NV.gather(1, index_N.where(inside_N, 0)[:, None]).squeeze(1)
    return logp_N.where(inside_N, -torch.inf), torch.special.entr(logp_NV.detach().exp()).sum(-1)


@triton.jit(do_not_specialize=["N", "vocab_limit", "Z"])
def _row_stats_kernel(
    logits_ptr, index_ptr, suppressed_ptr, stats_ptr,
    stride_n, N, V, vocab_limit, Z, inv_temp, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    inv_temp = tl.cast(inv_temp, tl.float32)  # torch.compile passes Python floats as fp64
    scale, row_ptr = inv_temp * LOG2E, logits_ptr + n * stride_n
    first, last = suppressed_range(suppressed_ptr, Z, V)
    top, logsum, entropy = row_softmax(row_ptr, suppressed_ptr, first, last, Z, V, vocab_limit, scale, BLOCK_V)
    y = tl.load(index_ptr + n)
    ok = (y >= 0) & (y < vocab_limit)
    for i in range(0, Z):
        ok = ok & (y != tl.load(suppressed_ptr + i))
    z_y = tl.load(row_ptr + y, mask=ok, other=-float("inf")).to(tl.float32)
    tl.store(stats_ptr + n, (z_y - top) * inv_temp - logsum)
    tl.store(stats_ptr + N + n, entropy)
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
    top, shift, y = tl.load(max_ptr + n), tl.load(logsum_ptr + n) * LOG2E, tl.load(index_ptr + n).to(tl.int32)
    first, last = suppressed_range(suppressed_ptr, Z, V)
    end = tl.where(coef != 0.0, V, 0)  # a row whose coefficient is 0 is not read
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + n * stride_n + v, mask=v < end, other=-float("inf")).to(tl.float32)
        ok = is_allowed(v, start, vocab_limit, suppressed_ptr, first, last, Z, BLOCK_V) & (v < end)
        p = tl.exp2((tl.where(ok, z, LOWEST) - top) * (inv_temp * LOG2E) - shift)
        tl.store(out_ptr + n * stride_on + v, tl.where(ok, coef * ((v == y).to(tl.float32) - p), 0.0), mask=v < V)


def _masked(logits_NV, index_N, suppressed_Z, vocab_limit):
    """A wide copy, LOWEST for suppressed ids and -inf; which indices are allowed, (N,); the indices, else 0, (N, 1)."""
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).clamp(min=LOWEST.value)
    z_NV[:, vocab_limit:] = LOWEST.value
    ok_N = (index_N >= 0) & (index_N < vocab_limit)
    if suppressed_Z is not None:
        z_NV.index_fill_(1, suppressed_Z, LOWEST.value)
        ok_N &= ~torch.isin(index_N, suppressed_Z)
    return z_NV, ok_N, index_N.where(ok_N, 0)[:, None]


def row_stats(logits_NV, index_N, temperature=1.0, suppressed_Z=None, vocab_limit=None, backend="triton"):
    """Log-probability of token index_N[n] under softmax(logits_NV[n] / temperature), the entropy, and the normaliser.

    logits_NV: (N, V) fp32 | bf16 | fp16, unit stride in V. "torch" also takes fp64.
    index_N: (N,) int64. For a suppressed id or one outside [0, V) logp is -inf, and its gradient -coef p / T.
    temperature: > 0, a Python float. backend: "triton" | "torch".
    suppressed_Z: (Z,) int64, sorted (not checked: it would synchronise), or None. vocab_limit: ids from here on are
        suppressed too; None = V. split_suppressed makes both from one list.
    Returns (logp_N, entropy_N, max_N, logsum_N), each (N,) fp32 and not differentiable (see logits_grad). logp_N <= 0
        and entropy_N >= 0 are in nats; max_N is the largest allowed logit, and max_N / temperature + logsum_N the row's
        log-sum-exp. Where every allowed logit is -inf, logp_N is -inf and the entropy is meaningless.
    Raises ValueError for a wrong shape, stride, temperature, vocab_limit or backend."""
    vocab_limit = logit_rows.check(logits_NV, vocab_limit, temperature, backend, index_N)
    N, V = logits_NV.shape
    stats_4N = torch.empty(4, N, device=logits_NV.device, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    if backend == "triton":
        listed, Z = (index_N, 0) if suppressed_Z is None else (suppressed_Z.contiguous(), len(suppressed_Z))
        _row_stats_kernel[(N,)](
            logits_NV, index_N.contiguous(), listed, stats_4N, logits_NV.stride(0), N, V, vocab_limit, Z,
            1.0 / temperature, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS)
        return tuple(stats_4N)
    for start in range(0, N, logit_rows.ROWS):
        rows = slice(start, start + logit_rows.ROWS)
        z_NV, ok_N, index_N1 = _masked(logits_NV[rows], index_N[rows], suppressed_Z, vocab_limit)
        max_N = z_NV.amax(1)
        d_NV = z_NV.sub_(max_N[:, None]).div_(temperature)
        e_NV = d_NV.exp()
        total_N, d_y_N = e_NV.sum(1), d_NV.gather(1, index_N1).squeeze(1)
        d_y_N[~ok_N | (d_y_N < LOWEST.value / 2)] = -torch.inf
        logsum_N = total_N.log()
        entropy_N = logsum_N - e_NV.mul_(d_NV).sum(1) / total_N
        stats_4N[:, rows] = torch.stack([d_y_N - logsum_N, entropy_N, max_N, logsum_N])
    return tuple(stats_4N)


def token_logprob(logits_NV, index_N, temperature=1.0, suppressed_Z=None, vocab_limit=None, backend="triton"):
    """(N,) fp32 log-probabilities, without a gradient: bit-equal to grpo_rows', so an unchanged policy's ratio is 1."""
    if backend == "triton":
        return row_stats(logits_NV, index_N, temperature, suppressed_Z, vocab_limit, backend)[0]
    parts = zip(logits_NV.split(logit_rows.ROWS), index_N.split(logit_rows.ROWS), strict=True)
    return torch.cat([token_logprob_ref(*part, temperature, suppressed_Z, vocab_limit)[0] for part in parts])


def logits_grad(logits_NV, index_N, stats, coef_N, temperature=1.0, suppressed_Z=None, vocab_limit=None,
                backend="triton", out=None):
    """The gradient of sum_n coef_N[n] logp_N[n] with respect to the logits, written to `out`, which is returned.

    Args and errors as row_stats, whose result for them is `stats`. coef_N: (N,) fp32; a row whose coefficient is 0 gets
    exact zeros. out: (N, V) of any float dtype, unit stride in V; None = a new tensor in the logits' dtype. It may be
    logits_NV itself, which is then overwritten, but must not share memory with it otherwise."""
    vocab_limit = logit_rows.check(logits_NV, vocab_limit, temperature, backend, index_N, coef_N, out_NV=out)
    (N, V), (_, _, max_N, logsum_N) = logits_NV.shape, stats
    out_NV = torch.empty_like(logits_NV) if out is None else out
    if backend == "triton":
        listed, Z = (index_N, 0) if suppressed_Z is None else (suppressed_Z.contiguous(), len(suppressed_Z))
        _logits_grad_kernel[(N,)](
            coef_N.contiguous(), logits_NV, index_N.contiguous(), listed, max_N, logsum_N, out_NV, logits_NV.stride(0),
            out_NV.stride(0), V, vocab_limit, Z, 1.0 / temperature, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS)
        return out_NV
    for start in range(0, N, logit_rows.ROWS):
        rows = slice(start, start + logit_rows.ROWS)
        d_NV, ok_N, index_N1 = _masked(logits_NV[rows], index_N[rows], suppressed_Z, vocab_limit)
        coef_N1 = coef_N[rows, None] / temperature
        d_NV.sub_(max_N[rows, None]).div_(temperature).sub_(logsum_N[rows, None]).exp_().mul_(-coef_N1)
        d_NV.scatter_add_(1, index_N1, (coef_N1 * ok_N[:, None]).to(d_NV.dtype))
        out_NV[rows] = d_NV.masked_fill_(coef_N1 == 0, 0.0)
    return out_NV
