"""What the kernels over rows of logits share: block sizes, the mask of suppressed ids, the online softmax, checks.

In logprob.py, grpo.py, distill.py and distill_topk.py one program reads a row of logits in blocks of BLOCK_V columns.
Each lane runs an online softmax over its own columns; the lanes are merged once, after the loop. A lane keeps m, the
largest value so far, s = sum exp(a - m) and, for an expectation, u = sum exp(a - m) (a - m). A new value a changes them
to, with one exponential for both cases, e = exp(-|a - m|),

    a <= m:   s + e,        u + e (a - m)
    a >  m:   s e + 1,      e (u - (a - m) s),        and m becomes a

Dims: N rows, V columns, Z suppressed ids, K kept ids."""
import torch
import triton
import triton.language as tl

BLOCK_V = 2048  # columns a step, 8 per thread: loads of 16 bytes, and up to five statistics fit the registers
NUM_WARPS = 8  # BLOCK_V is a multiple of 32 * NUM_WARPS: no two threads hold one column, so writing in place is safe
NUM_STAGES = 3
ROWS = 64  # rows at a time for backend="torch": its temporaries stay below 0.5 GB at 152,064 columns
LOWEST = tl.constexpr(-1e30)  # stands for -inf where a difference of two must not be NaN
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def suppressed_range(suppressed_ptr, Z, V):
    """The smallest and the largest of Z sorted ids; (V, -1), an empty range, if there are none."""
    return tl.load(suppressed_ptr, mask=Z > 0, other=V), tl.load(suppressed_ptr + Z - 1, mask=Z > 0, other=-1)


@triton.jit
def is_allowed(v, start, vocab_limit, suppressed_ptr, first, last, Z, BLOCK_V: tl.constexpr):
    """Which columns v = start ... start + BLOCK_V - 1 are not suppressed. Blocks outside the list's range skip it."""
    ok = v < vocab_limit
    if (first < start + BLOCK_V) & (last >= start):
        for i in range(0, Z):
            ok = ok & (v != tl.load(suppressed_ptr + i).to(tl.int32))
    return ok


@triton.jit
def row_softmax(row_ptr, suppressed_ptr, first, last, Z, V, vocab_limit, scale, BLOCK_V: tl.constexpr):
    """(m, logsum, entropy) of softmax(z / T) over the columns of a row that are not suppressed: m is their largest
    logit, logsum is log sum exp((z - m) / T). scale: log2(e) / T, for exponentials are to the base 2."""
    m = tl.full([BLOCK_V], LOWEST, tl.float32)
    s, u = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab_limit, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        # masked by V, a multiple of 16, and not by vocab_limit: so loads are 16 bytes wide
        z = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        z = tl.where(is_allowed(v, start, vocab_limit, suppressed_ptr, first, last, Z, BLOCK_V), z, LOWEST)
        d = (z - m) * scale
        e = tl.exp2(-tl.abs(d))
        u = tl.where(d > 0, e * (u - d * s), u + e * d)
        s = tl.where(d > 0, e * s + 1, s + e)
        m = tl.where(d > 0, z, m)
    top = tl.max(m, 0)
    d = (m - top) * scale
    e = tl.exp2(d)
    total = tl.sum(e * s, 0)
    logsum = tl.log2(total) * LN2
    return top, logsum, logsum - tl.sum(e * (u + d * s), 0) / total * LN2


@triton.jit
def online_sum(m, s, a):
    """(m, s) of every lane after one more value a; a = -inf adds nothing."""
    e = tl.exp(-tl.abs(a - m))
    return tl.maximum(m, a), tl.where(a > m, s * e + 1.0, s + e)


@triton.jit
def merge_lanes(m, s):
    """The largest value of all lanes, and the sum of exp(value - largest) over them."""
    top = tl.max(m, 0)
    return top, tl.sum(s * tl.exp(m - top), 0)


def kept_mask(logits_NV, common_vocab, suppressed_Z):
    """int8: 1 for each kept id, then 0 to the end of the last block, and one more that takes the ids not in common."""
    blocks = triton.cdiv(logits_NV.shape[1], BLOCK_V)
    kept_V = torch.zeros(blocks * BLOCK_V + 1, dtype=torch.int8, device=logits_NV.device)
    kept_V[:common_vocab] = 1
    kept_V[suppressed_Z.clamp(max=common_vocab)] = 0
    return kept_V


def outside_logsumexp(logits_NV, common_vocab, suppressed_Z, temperature):
    """(N,) log-sum-exp of logits / temperature over the columns that are not kept; reads no others."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    suppressed_NZ = logits_NV[:, suppressed_Z.clamp(max=logits_NV.shape[1] - 1)]
    suppressed_NZ = suppressed_NZ.masked_fill(suppressed_Z >= common_vocab, -torch.inf)  # these are in the other part
    outside_NV = torch.cat([logits_NV[:, common_vocab:], suppressed_NZ], 1)
    return (outside_NV.to(wide) / temperature).logsumexp(-1)


def kept_log_softmax(logits_NV, common_vocab, suppressed_Z, temperature):
    """The kept ids, (K,); the log-softmax over them, (N, K); the share of the whole softmax outside them, (N,)."""
    id_K = kept_mask(logits_NV, common_vocab, suppressed_Z).nonzero().squeeze(1)
    a_NK = logits_NV[:, id_K].to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature  # sums need fp32
    outside_N = outside_logsumexp(logits_NV.detach(), common_vocab, suppressed_Z, temperature)
    return id_K, a_NK.log_softmax(-1), torch.sigmoid(outside_N - a_NK.detach().logsumexp(-1))


def by_autograd(ref, student_NV, teacher, weight_N, options, out_NV):
    """ref(student_NV, *teacher, *options), and in out_NV, unless None, the gradient of its first result * weight_N."""
    if out_NV is None:
        return ref(student_NV, *teacher, *options)
    results = []
    for start in range(0, max(1, len(student_NV)), ROWS):
        rows = slice(start, start + ROWS)
        with torch.enable_grad():
            leaf_NV = student_NV[rows].detach().requires_grad_()
            loss_N, *dropped = ref(leaf_NV, *(x[rows] for x in teacher), *options)
            out_NV[rows] = torch.autograd.grad(loss_N, leaf_NV, weight_N[rows].to(loss_N.dtype))[0]
        results.append((loss_N.detach(), *dropped))
    return tuple(torch.cat(chunks) for chunks in zip(*results, strict=True))


def check(logits_NV, limit, temperature, backend, *vectors, out_NV=None):
    """`limit` (vocab_limit or common_vocab), or V for None, once the arguments that row kernels share are found right;
    else ValueError. vectors: tensors that must be (N,), or None. out_NV: (N, V), or None."""
    shape, strides = tuple(logits_NV.shape), logits_NV.stride()
    if len(shape) != 2 or strides[1] != 1:
        raise ValueError(f"logits must be (N, V) with unit stride in V, got {shape} with strides {strides}")
    N, V = shape
    limit = V if limit is None else limit
    if not temperature > 0 or not 1 <= limit <= V or backend not in ("triton", "torch"):
        raise ValueError(f"temperature must be > 0, vocab_limit or common_vocab in [1, {V}] and backend 'triton' or "
                         f"'torch', got {temperature}, {limit} and {backend!r}")
    shapes = [tuple(x.shape) for x in vectors if x is not None]
    if shapes != [(N,)] * len(shapes):
        raise ValueError(f"need vectors of {N}, one element per row of logits, got {shapes}")
    if out_NV is not None and (out_NV.shape != (N, V) or out_NV.stride(1) != 1):
        raise ValueError(f"out must be {(N, V)} with unit stride in V, got {tuple(out_NV.shape)} "
                         f"with strides {out_NV.stride()}")
    return limit
