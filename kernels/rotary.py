"""Rotary embedding of queries and keys in one pass, in the half-split layout.

    y[i]       = x[i] cos[i] - x[i + K/2] sin[i]           i < K/2, each angle stands in both halves of cos and sin
    y[i + K/2] = x[i + K/2] cos[i] + x[i] sin[i]

in fp32, rounded once to x's dtype. The gradient of a rotation is the rotation back, by -sin; nothing but the angles is
kept for it. cos and sin have no gradient.

Bytes per row, elements of i bytes, counted: 2 i (H + J) K, and 4 K of angles; eager moves nine times as many at i = 2.
Dims: N rows (tokens), H query and J key heads, K head size (even)."""
import torch
import triton
import triton.language as tl

BLOCK_H = 8  # heads a program
NUM_WARPS = 4


def rotate_ref(x_NHK, cos_NK, sin_NK):
    """A rotation in plain PyTorch, of x's dtype; fp64 for ground truth."""
    half = x_NHK.shape[-1] // 2
    wide = torch.promote_types(x_NHK.dtype, torch.float32)
    x = x_NHK.to(wide)
    sin = sin_NK[:, None, :half].to(wide)
    y_NHK = x * cos_NK[:, None].to(wide)
    y_NHK[..., :half].addcmul_(x[..., half:], sin, value=-1)
    y_NHK[..., half:].addcmul_(x[..., :half], sin)
    return y_NHK.to(x_NHK.dtype)


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, stride_qn, stride_kn, H, J, K, sign,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, half = tl.program_id(0).to(tl.int64), K // 2
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)  # the queries' heads, then the keys'
    i = tl.arange(0, BLOCK_K)
    cos = tl.load(cos_ptr + n * K + i, mask=i < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + n * K + i, mask=i < half, other=0.0)[None, :] * tl.cast(sign, tl.float32)
    at_q, at_k = h[:, None] * K + i[None, :], (h - H)[:, None] * K + i[None, :]
    is_q = (h < H)[:, None] & (i < half)[None, :]
    is_k = ((h >= H) & (h < H + J))[:, None] & (i < half)[None, :]
    q, k = q_ptr + n * stride_qn + at_q, k_ptr + n * stride_kn + at_k
    a = tl.load(q, mask=is_q, other=0.0).to(tl.float32) + tl.load(k, mask=is_k, other=0.0).to(tl.float32)
    b = tl.load(q + half, mask=is_q, other=0.0).to(tl.float32) + tl.load(k + half, mask=is_k, other=0.0).to(tl.float32)
    dtype = q_out_ptr.dtype.element_ty
    first, second = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    q_out, k_out = q_out_ptr + n * H * K + at_q, k_out_ptr + n * J * K + at_k
    tl.store(q_out, first, mask=is_q)
    tl.store(q_out + half, second, mask=is_q)
    tl.store(k_out, first, mask=is_k)
    tl.store(k_out + half, second, mask=is_k)


def _launch(q_NHK, k_NJK, cos_NK, sin_NK, sign):
    (N, H, K), J = q_NHK.shape, k_NJK.shape[1]
    q_NHK, k_NJK = (x if x.stride()[1:] == (K, 1) else x.contiguous() for x in (q_NHK, k_NJK))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_NHK, k_NJK))
    _rotate_kernel[(N, triton.cdiv(H + J, BLOCK_H))](
        q_NHK, k_NJK, q_out, k_out, cos_NK, sin_NK, q_NHK.stride(0), k_NJK.stride(0), H, J, K, sign, BLOCK_H=BLOCK_H,
        BLOCK_K=triton.next_power_of_2(K // 2), num_warps=NUM_WARPS)
    return q_out, k_out


class _Rotate(torch.autograd.Function):
    """Both backends: autograd would keep and add up five tensors of x's size."""

    @staticmethod
    def forward(ctx, q_NHK, k_NJK, cos_NK, sin_NK, backend):
        ctx.save_for_backward(cos_NK, sin_NK)
        ctx.backend = backend
        if backend == "triton":
            return _launch(q_NHK, k_NJK, cos_NK, sin_NK, 1.0)
        return rotate_ref(q_NHK, cos_NK, sin_NK), rotate_ref(k_NJK, cos_NK, sin_NK)

    @staticmethod
    def backward(ctx, dq_NHK, dk_NJK):
        cos_NK, sin_NK = ctx.saved_tensors
        if ctx.backend == "triton":
            return *_launch(dq_NHK, dk_NJK, cos_NK, sin_NK, -1.0), None, None, None
        return rotate_ref(dq_NHK, cos_NK, -sin_NK), rotate_ref(dk_NJK, cos_NK, -sin_NK), None, None, None


def rotate(q_NHK, k_NJK, cos_NK, sin_NK, backend="triton"):
    """Queries and keys, rotated, of their dtype.

    q_NHK, k_NJK: (N, H, K) and (N, J, K) of one dtype, fp32 | bf16 | fp16; rows may be strided. cos_NK, sin_NK: (N, K)
    fp32, contiguous, each angle in both halves; without a gradient. backend: "triton" | "torch". ValueError: another,
    or an odd K. Source: tests/test_passes.py compares both with fp64, tests/test_models.py with transformers."""
    if backend not in ("triton", "torch") or q_NHK.shape[-1] % 2:
        raise ValueError(f"rotate needs backend 'triton' or 'torch' and an even head size, got {backend!r} and "
                         f"{q_NHK.shape[-1]}")
    return _Rotate.apply(q_NHK, k_NJK, cos_NK, sin_NK, backend)
