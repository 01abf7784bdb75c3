"""Attention of one new token a completion over a prompt that n completions share and over the completion's own rows.

With s = q kᵀ / sqrt(K), each part X of the keys (a stretch of the prompt, or the suffix) gives

    lse_X = log sum_{x in X} exp s[x],        o_X = sum_{x in X} exp(s[x] - lse_X) v[x]

and parts are put together exactly:  lse = log sum_X exp lse_X,   o = sum_X exp(lse_X - lse) o_X.

The prompt's kernel has one program for each (prompt, kv head, SPLIT rows of it): the n H / J queries that see them are
the rows of one product, so keys and values are read once for all of them. The suffix's kernel has one for each
(completion, kv head) and merges the prompt's parts into its own. A row's arithmetic depends on its own lengths alone,
not on the batch: the splits are fixed, and no sum runs over what others need.

Bytes a kv head, i bytes an element: 2 K i (P + n C) for a prompt of P rows and n suffixes of C, against 2 K i n (P + C)
with a copy of the prompt each; the parts take 8 n H / J ceil(P / SPLIT) (K + 1) more, written and read. For n = 8,
P = 850, C = 256 at Qwen2-Audio-7B's shape (32 heads, each its own keys; K = 128, bf16): 49 MB a layer for 8 completions
against 145, that is 3.0 times fewer. Counted, not measured: no GPU was at hand.

Dims: G prompts, n completions each, B = G n slots, slot b sees prompt b // n; H query heads, J kv heads, K head size,
P and C rows that the pools have room for.
"""
import torch
import triton
import triton.language as tl

SPLIT = 256  # prompt rows a program: 8 prompts of 850 rows and 4 kv heads make 128 programs for 132 SMs
MOST_R, BLOCK_S = 64, 64  # queries a program at most, the others find the prompt's rows in L2; rows of keys a step
FP32_MOST_R, FP32_BLOCK_S = 16, 16  # exact fp32 products keep their operands in registers, and larger tiles spill
NUM_WARPS, NUM_STAGES = 4, 2
LOWEST = -1e30  # stands for -inf where a difference of two must not be NaN
_LOWEST, _LOG2E = tl.constexpr(LOWEST), tl.constexpr(1.4426950408889634)


def _part(q_XRK, k_XSK, v_XSK, length_X):
    """(o, lse) of one part over the first `length` of its rows; X stands for two dims, the second of them J."""
    seen_XS = torch.arange(k_XSK.shape[2], device=q_XRK.device) < length_X[:, None]
    s_XRS = (q_XRK @ k_XSK.to(q_XRK.dtype).transpose(2, 3)).where(seen_XS[:, None, None], LOWEST)
    top_XR1 = s_XRS.amax(-1, keepdim=True)
    e_XRS = (s_XRS - top_XR1).exp_()
    sum_XR1 = e_XRS.sum(-1, keepdim=True)
    return e_XRS @ v_XSK.to(q_XRK.dtype) / sum_XR1, top_XR1 + sum_XR1.log()


def decode_attention_ref(q_BHK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G, k_BJCK, v_BJCK, length_B):
    """Same contract as decode_attention in plain PyTorch."""
    (G, J, _, K), (B, H, _) = prompt_k_GJPK.shape, q_BHK.shape
    n, dtype = B // G, torch.promote_types(q_BHK.dtype, torch.float32)
    q_BJRK = (q_BHK.to(dtype) * K**-0.5).view(B, J, H // J, K)
    q_GJRK = q_BJRK.view(G, n, J, -1, K).transpose(1, 2).flatten(2, 3)  # a prompt's queries side by side
    first = _part(q_GJRK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G)
    o, lse = (x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1) for x in first)
    own_o, own_lse = _part(q_BJRK, k_BJCK, v_BJCK, length_B)
    return torch.lerp(o, own_o, torch.sigmoid(own_lse - lse)).reshape(B, H, K).to(q_BHK.dtype)


@triton.jit
def _attend_rows(q, k_ptr, v_ptr, start, end, scale, m, total, acc, c, K: tl.constexpr, BLOCK_S: tl.constexpr):
    """The running maximum m, total and output acc of the queries q, continued over rows start ... end - 1."""
    for at in range(start, end, BLOCK_S):
        s = at + tl.arange(0, BLOCK_S)
        rows = s.to(tl.int64)[:, None] * K + c[None, :]
        ok = (s[:, None] < end) & (c[None, :] < K)
        k = tl.load(k_ptr + rows, mask=ok, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        z = tl.where(s[None, :] < end, z, _LOWEST)
        top = tl.maximum(m, tl.max(z, 1))
        e, shrink = tl.exp2(z - top[:, None]), tl.exp2(m - top)
        v = tl.load(v_ptr + rows, mask=ok, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(e, 1)
        m = top
    return m, total, acc


@triton.jit(do_not_specialize=["n"])
def _prompt_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, o_ptr, lse_ptr,
    stride_kg, stride_kj, scale, n, H, J, splits,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    g, j = (tl.program_id(0) // J).to(tl.int64), tl.program_id(0) % J
    split, R = tl.program_id(1), H // J
    start, length = split * SPLIT, tl.load(length_ptr + g).to(tl.int32)
    if start < length:  # the merge reads no part that lies past the length
        r, c = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
        row = (g * n + r // R) * H + j * R + r % R  # of q: the slot's, then the head's
        ok = (r[:, None] < n * R) & (c[None, :] < K)
        q = tl.load(q_ptr + row[:, None] * K + c[None, :], mask=ok, other=0.0)
        at = g * stride_kg + j * stride_kj
        m, total = tl.full([BLOCK_R], _LOWEST, tl.float32), tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        m, total, acc = _attend_rows(q, k_ptr + at, v_ptr + at, start, tl.minimum(start + SPLIT, length),
                                 tl.cast(scale, tl.float32) * _LOG2E, m, total, acc, c, K, BLOCK_S)
        part = row * splits + split
        tl.store(o_ptr + part[:, None] * K + c[None, :], acc / total[:, None], mask=ok)
        tl.store(lse_ptr + part, m + tl.log2(total), mask=r < n * R)  # to the base 2


@triton.jit(do_not_specialize=["n"])
def _suffix_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, prompt_length_ptr, part_ptr, lse_ptr, out_ptr,
    stride_kb, stride_kj, scale, n, H, J, splits,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    b, j, R = (tl.program_id(0) // J).to(tl.int64), tl.program_id(0) % J, H // J
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    row, ok = b * H + j * R + r, (r[:, None] < R) & (c[None, :] < K)
    q = tl.load(q_ptr + row[:, None] * K + c[None, :], mask=ok, other=0.0)
    at = b * stride_kb + j * stride_kj
    m, total = tl.full([BLOCK_R], _LOWEST, tl.float32), tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    m, total, acc = _attend_rows(q, k_ptr + at, v_ptr + at, 0, tl.load(length_ptr + b).to(tl.int32),
                             tl.cast(scale, tl.float32) * _LOG2E, m, total, acc, c, K, BLOCK_S)
    for split in range(0, tl.cdiv(tl.load(prompt_length_ptr + b // n).to(tl.int32), SPLIT)):
        part = row * splits + split
        lse = tl.load(lse_ptr + part, mask=r < R, other=0.0)
        o = tl.load(part_ptr + part[:, None] * K + c[None, :], mask=ok, other=0.0)
        top = tl.maximum(m, lse)
        shrink, weight = tl.exp2(m - top), tl.exp2(lse - top)
        acc = acc * shrink[:, None] + o * weight[:, None]
        total = total * shrink + weight
        m = top
    tl.store(out_ptr + row[:, None] * K + c[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=ok)


def decode_attention(q_BHK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G, k_BJCK, v_BJCK, length_B, backend="triton"):
    """softmax(q kᵀ / sqrt(K)) v of every slot b over the first rows of prompt b // (B / G), then of its own.

    Args:
        q_BHK: (B, H, K) fp32 | bf16 | fp16 queries, one new token each. "torch" also takes fp64.
        prompt_k_GJPK, prompt_v_GJPK: (G, J, P, K), of q's dtype; G divides B. prompt_length_G: (G,) int64, 1 to P.
        k_BJCK, v_BJCK: (B, J, C, K) the completions' own rows, the new token's among them. length_B: (B,) int64, 0 to
            C. Lengths are not checked: it would sync. "triton" reads nothing past a length, and wants (., K) packed;
            "torch" multiplies the values there by 0, so they must be finite.
        backend: "triton" | "torch".
    Returns:
        (B, H, K) of q's dtype.
    Raises:
        ValueError: shapes that do not go together, strides, or backend.
    Source: definition in the module docstring; tests/test_decode.py compares it with one softmax in fp64.
    """
    (B, H, K), (G, J, P, _), C = q_BHK.shape, prompt_k_GJPK.shape, k_BJCK.shape[2]
    shapes = [tuple(x.shape) for x in (prompt_k_GJPK, prompt_v_GJPK, k_BJCK, v_BJCK, prompt_length_G, length_B)]
    if B % G or H % J or shapes != [(G, J, P, K)] * 2 + [(B, J, C, K)] * 2 + [(G,), (B,)]:
        raise ValueError(f"need pools (G, J, P, K) and (B, J, C, K), with G dividing B and J dividing H, and a length "
                         f"for each G and B, got queries {(B, H, K)} and {shapes}")
    if backend == "torch":
        return decode_attention_ref(q_BHK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G, k_BJCK, v_BJCK, length_B)
    if backend != "triton":
        raise ValueError(f"backend must be 'triton' or 'torch', got {backend!r}")
    for a, b in ((prompt_k_GJPK, prompt_v_GJPK), (k_BJCK, v_BJCK)):
        if a.stride() != b.stride() or a.stride()[2:] != (K, 1):
            raise ValueError(f"keys and values need equal strides ending in {(K, 1)}, got {a.stride()}, {b.stride()}")
    n, R, splits = B // G, H // J, triton.cdiv(P, SPLIT)
    q_BHK, out_BHK = q_BHK.contiguous(), torch.empty_like(q_BHK, memory_format=torch.contiguous_format)
    part = torch.empty(B, H, splits, K, dtype=torch.float32, device=q_BHK.device)
    lse = torch.empty(B, H, splits, dtype=torch.float32, device=q_BHK.device)
    most_r, block_s = (FP32_MOST_R, FP32_BLOCK_S) if q_BHK.dtype == torch.float32 else (MOST_R, BLOCK_S)
    how = dict(K=K, BLOCK_K=max(16, triton.next_power_of_2(K)), BLOCK_S=block_s, SPLIT=SPLIT, num_warps=NUM_WARPS,
               num_stages=NUM_STAGES)
    block = min(most_r, max(16, triton.next_power_of_2(n * R)))  # a tensor core takes no fewer than 16 rows
    _prompt_kernel[(G * J, splits, triton.cdiv(n * R, block))](
        q_BHK, prompt_k_GJPK, prompt_v_GJPK, prompt_length_G, part, lse, *prompt_k_GJPK.stride()[:2], K**-0.5, n, H, J,
        splits, BLOCK_R=block, **how)
    _suffix_kernel[(B * J,)](
        q_BHK, k_BJCK, v_BJCK, length_B, prompt_length_G, part, lse, out_BHK, *k_BJCK.stride()[:2], K**-0.5, n, H, J,
        splits, BLOCK_R=max(16, triton.next_power_of_2(R)), **how)
    return out_BHK


CONFIGS = [  # for tools/kernel_report.py: (kernel, types, constants, num_warps, num_stages, kind)
    (kernel, types.replace("T", t), {"K": 128, "BLOCK_K": 128, "BLOCK_R": rows, "BLOCK_S": block, "SPLIT": SPLIT},
     NUM_WARPS, NUM_STAGES, "row" if t == "fp32" else "dot")
    for t, block, sizes in (("bf16", BLOCK_S, (16, MOST_R)), ("fp32", FP32_BLOCK_S, (FP32_MOST_R,)))
    for kernel, types, sizes in (
        (_prompt_kernel, "*T:16 *T:16 *T:16 *i64:16 *fp32:16 *fp32:16 i32:16 i32:16 fp32 i32 i32 i32 i32", sizes),
        (_suffix_kernel, "*T:16 *T:16 *T:16 *i64:16 *i64:16 *fp32:16 *fp32:16 *T:16 i32:16 i32:16 fp32 i32 i32 i32 i32",
         (16,)))
    for rows in sizes
]
