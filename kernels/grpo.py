"""GRPO from a row of logits: the token's clipped policy loss, its gradient and the diagnostics, in one kernel.

SightSound-R1, equation 2, maximises, averaged over the G completions o_i of a prompt, 1 / |o_i| times the sum over t of

    min[ratio A, clip(ratio, 1 - eps, 1 + eps) A] - beta D_KL[pi || pi_ref],     ratio = pi / pi_old = exp(logp - old)

with A the completion's advantage; eps is split into clip_low and clip_high here. We minimise sum_n weight[n] loss[n]
over rows n = (i, t), where weight holds 1 / (G |o_i|), or the factor of another aggregation:

    loss[n] = -min[ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A] + beta kl
    kl      = exp(ref - logp) - (ref - logp) - 1  (k3, >= 0)   or   logp - ref  (k1)
    c[n]    = d sum(weight loss) / d logp[n]
            = weight (-A ratio if the minimum is its first term, else 0, + beta (1 - exp(ref - logp)  or  1))
    dlogits[n, v] = c / T (1[v == id] - p[v]) over the ids that are not suppressed (logprob.py: logp, p, entropy)

With one ratio per sequence (GSPO), exp of the mean of logp - old over its rows, c depends on all rows of the sequence.
Then logprob.row_stats, grpo_coefficient on (N,) vectors and logprob.logits_grad do the same in three steps.

Bytes per row, with V columns of i bytes and a gradient of o: (2i + o)V, as in those steps, with about 50 launches less.
Dims: N rows (tokens), V vocabulary, S sequences, Z listed suppressed ids."""
import torch
import triton
import triton.language as tl

from minixmd.kernels import logit_rows
from minixmd.kernels.logit_rows import BLOCK_V, LOG2E, LOWEST, NUM_WARPS, is_allowed, row_softmax, suppressed_range
from minixmd.kernels.logprob import token_logprob_ref


class ClipConfig:
    """Clips the ratio to [1 - clip_low, 1 + clip_high]; beta weighs the KL. ValueError: kl not "k1" or "k3"."""

    def __init__(self, clip_low, clip_high, beta, kl):
        if kl not in ("k1", "k3"):
            raise ValueError(f"kl must be 'k1' or 'k3', got {kl!r}")
        self.clip_low, self.clip_high, self.beta, self.kl = clip_low, clip_high, beta, kl


def grpo_terms(logp_N, old_N, ref_N, advantage_N, weight_N, clip_config, sequence_N=None):
    """(loss_N, ratio_N, clipped_N, kl_N) of grpo_rows in plain PyTorch; loss_N is differentiable in logp_N. sequence_N:
    (N,) int64 in [0, N): rows with the same number share one sequence's ratio; None = one ratio per token."""
    live_N = weight_N != 0  # rows of weight 0 may hold NaN, and 0 * NaN would reach the gradient
    logp_N, old_N, advantage_N = (x.where(live_N, 0.0) for x in (logp_N, old_N, advantage_N))
    log_ratio_N = logp_N - old_N
    if sequence_N is not None:
        sum_S = torch.zeros_like(log_ratio_N).index_add(0, sequence_N, log_ratio_N)
        count_S = torch.zeros_like(log_ratio_N).index_add(0, sequence_N, live_N.to(log_ratio_N.dtype))
        log_ratio_N = (sum_S / count_S.clamp(min=1))[sequence_N]
    ratio_N = log_ratio_N.exp()
    first_N = ratio_N * advantage_N
    second_N = ratio_N.clamp(1 - clip_config.clip_low, 1 + clip_config.clip_high) * advantage_N
    kl_N = torch.zeros_like(logp_N)
    if ref_N is not None:
        delta_N = ref_N.where(live_N, 0.0) - logp_N
        kl_N = delta_N.exp() - delta_N - 1 if clip_config.kl == "k3" else -delta_N
    loss_N = clip_config.beta * kl_N - torch.minimum(first_N, second_N)
    return loss_N, ratio_N * live_N, (second_N < first_N).to(ratio_N.dtype), kl_N


def grpo_coefficient(logp_N, old_N, ref_N, advantage_N, weight_N, clip_config, sequence_N=None):
    """(c_N = d sum(weight_N * loss_N) / d logp_N, for logprob.logits_grad; what grpo_terms returns), all detached."""
    with torch.enable_grad():
        logp_N = logp_N.detach().requires_grad_()
        terms = grpo_terms(logp_N, old_N, ref_N, advantage_N, weight_N, clip_config, sequence_N)
        (c_N,) = torch.autograd.grad((terms[0] * weight_N).sum(), logp_N)
    return c_N, tuple(x.detach() for x in terms)


def grpo_loss_ref(logits_NV, id_N, old_N, ref_N, advantage_N, weight_N, clip_config, temperature=1.0, suppressed_Z=None,
                  vocab_limit=None, sequence_N=None):
    """(sum_n weight_N[n] loss_N[n], logp_N, entropy_N, terms) in plain PyTorch; the sum is differentiable."""
    logp_N, entropy_N = token_logprob_ref(logits_NV, id_N, temperature, suppressed_Z, vocab_limit)
    terms = grpo_terms(logp_N, old_N, ref_N, advantage_N, weight_N, clip_config, sequence_N)
    return (terms[0] * weight_N).sum(), logp_N.detach(), entropy_N, tuple(x.detach() for x in terms)


@triton.jit(do_not_specialize=["N", "vocab_limit", "Z"])
def _grpo_kernel(
    logits_ptr, id_ptr, old_ptr, ref_ptr, advantage_ptr, weight_ptr, suppressed_ptr, rows_ptr, out_ptr,
    stride_n, stride_on, N, V, vocab_limit, Z, inv_temp, clip_low, clip_high, beta,
    BLOCK_V: tl.constexpr, HAS_REF: tl.constexpr, K3: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    inv_temp = tl.cast(inv_temp, tl.float32)  # torch.compile passes Python floats as fp64
    scale, row_ptr = inv_temp * LOG2E, logits_ptr + n * stride_n
    first, last = suppressed_range(suppressed_ptr, Z, V)
    y = tl.load(id_ptr + n).to(tl.int32)
    z_y = tl.load(row_ptr + y).to(tl.float32)  # now: at the end another warp may have overwritten it with the gradient
    top, logsum, entropy = row_softmax(row_ptr, suppressed_ptr, first, last, Z, V, vocab_limit, scale, BLOCK_V)
    logp = (z_y - top) * inv_temp - logsum
    weight = tl.load(weight_ptr + n)
    live = weight != 0.0  # the vectors of a row of weight 0 may hold NaN
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
            start = (V - 1) // BLOCK_V * BLOCK_V - back  # backwards: the end of the row is what L2 still holds
            v = start + tl.arange(0, BLOCK_V)
            z = tl.load(row_ptr + v, mask=v < end, other=-float("inf")).to(tl.float32)
            ok = is_allowed(v, start, vocab_limit, suppressed_ptr, first, last, Z, BLOCK_V) & (v < end)
            p = tl.exp2((tl.where(ok, z, LOWEST) - top) * scale - logsum * LOG2E)
            tl.store(out_ptr + n * stride_on + v, tl.where(ok, c * ((v == y).to(tl.float32) - p), 0.0), mask=v < V)


def grpo_rows(logits_NV, id_N, old_N, ref_N, advantage_N, weight_N, clip_config, temperature=1.0, suppressed_Z=None,
              vocab_limit=None, backend="triton", out=None):
    """Each row's loss and diagnostics, one ratio per token, and in `out` the gradient of sum_n weight_N[n] loss_N[n].

    id_N: (N,) int64, the sampled tokens: in [0, V) and not suppressed (not checked: it would synchronise).
    old_N, ref_N: (N,) fp32, log-probabilities at the same temperature over the same ids; ref_N None if beta is 0.
    advantage_N, weight_N: (N,) fp32. A row of weight 0 counts for nothing and may hold NaN in these vectors.
    logits_NV, temperature, suppressed_Z, vocab_limit, backend: as in logprob.row_stats.
    out: as in logprob.logits_grad, but None = no gradient.
    Returns (logp_N, entropy_N, (loss_N, ratio_N, clipped_N, kl_N)), each (N,) fp32 and not differentiable. loss_N is
        before the weight; clipped_N is 1 where clipping stops the gradient of the first term; kl_N is 0 without a
        reference. The last four are 0 where the weight is. Raises as logprob.row_stats, and for beta without ref_N.
    Source: SightSound-R1, equation 2; tests/test_grpo_kernel.py compares with TRL's formulas and grpo_loss_ref."""
    vectors = id_N, old_N, ref_N, advantage_N, weight_N
    vocab_limit = logit_rows.check(logits_NV, vocab_limit, temperature, backend, *vectors, out_NV=out)
    if clip_config.beta and ref_N is None:
        raise ValueError(f"beta {clip_config.beta} needs ref_N, got None")
    N, V = logits_NV.shape
    rows_6N = torch.empty(6, N, device=logits_NV.device, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    if backend == "torch":
        for start in range(0, N, logit_rows.ROWS):
            at = slice(start, start + logit_rows.ROWS)
            with torch.enable_grad():
                z_NV = logits_NV[at].detach().to(rows_6N.dtype).requires_grad_()
                args = *(None if x is None else x[at] for x in vectors), clip_config, temperature
                loss, logp_N, entropy_N, terms = grpo_loss_ref(z_NV, *args, suppressed_Z, vocab_limit)
            if out is not None:
                grad_NV = torch.autograd.grad(loss, z_NV)[0]
                out[at] = grad_NV.masked_fill_((weight_N[at] == 0)[:, None], 0)  # a row of weight 0 may hold NaN
            rows_6N[:, at] = torch.stack([*terms, logp_N, entropy_N])
    else:
        listed, Z = (id_N, 0) if suppressed_Z is None else (suppressed_Z.contiguous(), len(suppressed_Z))
        _grpo_kernel[(N,)](
            logits_NV, *((old_N if x is None else x).contiguous() for x in vectors), listed, rows_6N,
            rows_6N if out is None else out, logits_NV.stride(0), 0 if out is None else out.stride(0), N, V,
            vocab_limit, Z, 1.0 / temperature, clip_config.clip_low, clip_config.clip_high, clip_config.beta,
            BLOCK_V=BLOCK_V, HAS_REF=ref_N is not None, K3=clip_config.kl == "k3", HAS_OUT=out is not None,
            num_warps=NUM_WARPS)
    return rows_6N[4], rows_6N[5], tuple(rows_6N[:4])
