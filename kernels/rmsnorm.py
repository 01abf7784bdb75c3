"""RMSNorm of rows, after an addition if there is one: the residual stream's and the norm behind it in one pass.

    s  = x + added, rounded to x's dtype (without `added`, x)        r = 1 / sqrt(mean(s²) + eps)
    y  = w (s r), where s r is rounded to the dtype before the product, as in the reference
    ds = r (w dy - s r² mean(w dy s)) + ds'                          dx = dadded = ds
    dw = sum_n dy[n] s[n] r[n]

ds' is the gradient that reaches s from the residual stream. Statistics and sums are fp32.

Bytes per row, elements of i bytes, counted: 4 i D forward and 4 i D backward, 4 for r; eager forward in bf16 42 D.
Dims: N rows (tokens), D width."""
import torch
import triton
import triton.language as tl

PROGRAMS = 512  # of the backward pass, each of which adds up dw over its rows
NUM_WARPS = 8


def rms_norm_ref(x_ND, w_D, eps, added_ND=None):
    """(y, s) of rms_norm in plain PyTorch, differentiable; fp64 inputs for ground truth."""
    s_ND = x_ND if added_ND is None else x_ND + added_ND
    s = s_ND.to(torch.promote_types(s_ND.dtype, torch.float32))  # a 16-bit mean of squares loses the small channels
    scale_N1 = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return w_D * (s * scale_N1).to(s_ND.dtype), s_ND


@triton.jit
def _rms_norm_kernel(
    x_ptr, added_ptr, w_ptr, s_ptr, y_ptr, r_ptr, stride_xn, stride_an, D, eps,
    HAS_ADDED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    dtype = y_ptr.dtype.element_ty
    s = tl.load(x_ptr + n * stride_xn + d, mask=d < D, other=0.0).to(tl.float32)
    if HAS_ADDED:
        total = (s + tl.load(added_ptr + n * stride_an + d, mask=d < D, other=0.0).to(tl.float32)).to(dtype)
        tl.store(s_ptr + n * D + d, total, mask=d < D)
        s = total.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(s * s, 0) / D + tl.cast(eps, tl.float32))
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * D + d, (w * (s * r).to(dtype).to(tl.float32)).to(dtype), mask=d < D)
    tl.store(r_ptr + n, r)


@triton.jit(do_not_specialize=["N"])
def _rms_norm_grad_kernel(
    dy_ptr, residual_ptr, s_ptr, w_ptr, r_ptr, ds_ptr, dw_ptr, stride_dn, stride_rn, stride_sn, N, D,
    HAS_RESIDUAL: tl.constexpr, HAS_DW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, d = tl.program_id(0), tl.arange(0, BLOCK_D)
    dtype = ds_ptr.dtype.element_ty
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], tl.float32)
    for row in range(first, N, tl.num_programs(0)):
        n = tl.cast(row, tl.int64)
        dy = tl.load(dy_ptr + n * stride_dn + d, mask=d < D, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + n * stride_sn + d, mask=d < D, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + n)
        normed, dz = s * r, dy * w
        ds = r * (dz - normed * (tl.sum(dz * normed, 0) / D))
        if HAS_RESIDUAL:
            ds += tl.load(residual_ptr + n * stride_rn + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(ds_ptr + n * D + d, ds.to(dtype), mask=d < D)
        if HAS_DW:
            dw += dy * normed.to(dtype).to(tl.float32)
    if HAS_DW:
        tl.store(dw_ptr + first * D + d, dw, mask=d < D)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_D, eps, added_ND):
        ctx.set_materialize_grads(False)
        x_ND = _rows(x_ND)
        N, D = x_ND.shape
        y_ND = torch.empty(N, D, dtype=x_ND.dtype, device=x_ND.device)
        r_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
        s_ND, added = (x_ND, x_ND) if added_ND is None else (torch.empty_like(y_ND), _rows(added_ND))
        _rms_norm_kernel[(N,)](
            x_ND, added, w_D, s_ND, y_ND, r_N, x_ND.stride(0), added.stride(0), D, eps, HAS_ADDED=added_ND is not None,
            BLOCK_D=triton.next_power_of_2(D), num_warps=NUM_WARPS)
        ctx.save_for_backward(s_ND, w_D, r_N)
        return y_ND if added_ND is None else (y_ND, s_ND)

    @staticmethod
    def backward(ctx, dy_ND, residual_ND=None):
        s_ND, w_D, r_N = ctx.saved_tensors
        if dy_ND is None:  # only the sum was used
            return residual_ND, None, None, residual_ND
        (N, D), (_, need_w, _, need_added) = s_ND.shape, ctx.needs_input_grad
        dy_ND = _rows(dy_ND)
        residual = dy_ND if residual_ND is None else _rows(residual_ND)
        ds_ND = torch.empty(N, D, dtype=s_ND.dtype, device=s_ND.device)
        programs = max(1, min(N, PROGRAMS))
        dw_PD = torch.empty(programs if need_w else 0, D, dtype=torch.float32, device=s_ND.device)
        _rms_norm_grad_kernel[(programs,)](
            dy_ND, residual, s_ND, w_D, r_N, ds_ND, dw_PD, dy_ND.stride(0), residual.stride(0), s_ND.stride(0), N, D,
            HAS_RESIDUAL=residual_ND is not None, HAS_DW=need_w, BLOCK_D=triton.next_power_of_2(D), num_warps=NUM_WARPS)
        dw_D = dw_PD.sum(0).to(w_D.dtype) if need_w else None
        return ds_ND, dw_D, None, ds_ND if need_added else None


def _rows(x_ND):
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def rms_norm(x_ND, w_D, eps, added_ND=None, backend="triton"):
    """RMSNorm of x, or of x + added.

    x_ND: (N, D) fp32 | bf16 | fp16. w_D: (D,), added_ND: (N, D) or None, of its dtype. backend: "triton" | "torch".
    Returns (y_ND, s_ND), both differentiable: the normed rows, and what was normed, x itself without `added`. Raises
    ValueError: shapes, dtypes or backend that do not fit. Source: tests/test_passes.py compares both with fp64."""
    fit = x_ND.ndim == 2 and w_D.shape == x_ND.shape[1:] and (added_ND is None or added_ND.shape == x_ND.shape)
    if not fit or any(t is not None and t.dtype != x_ND.dtype for t in (w_D, added_ND)):
        raise ValueError(f"rms_norm needs rows, a gain and an addend of one dtype that fit, got {tuple(x_ND.shape)} of "
                         f"{x_ND.dtype}, {tuple(w_D.shape)} of {w_D.dtype}")
    if backend == "torch":
        return rms_norm_ref(x_ND, w_D, eps, added_ND)
    if backend != "triton":
        raise ValueError(f"backend must be 'triton' or 'torch', got {backend!r}")
    out = _RMSNorm.apply(x_ND, w_D, eps, added_ND)
    return (out, x_ND) if added_ND is None else out
