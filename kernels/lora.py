"""A linear layer with a low-rank update.

    y  = x Wᵀ + bias + scale (x Aᵀ) Bᵀ
    dX = g W + scale (g B) A
    dA = scale (g B)ᵀ x            dB = scale gᵀ (x Aᵀ)
    dW = gᵀ x                      dbias = sum_n g[n]          (only where the base layer trains)

impl="torch" leaves every product to the vendor's library and adds the updates in place. impl="triton" uses
kernels/lora_triton.py for two parts. The evidence is counted bytes and published speeds: no GPU was at hand.
    y where D <= FUSED_D and R <= 64: one kernel. It saves a read and a write of y, 367 / D of the product's time on an
        H200, but Triton products of this kind ran at 76 to 86 % of the vendor's (triton #5726, fb-triton #1038); at
        86 % they break even at D = 2254. Above that, and for xa, dX, dA and dW, the vendor's product.
    scale g B and dB where reading g once moves 1.2 times fewer bytes (lora_triton.dy_pass_pays): one kernel, and a
        second that adds its partial sums. Elsewhere the vendor's two products.

Dims: N tokens (rows), D inputs, F outputs, R rank. Weights stand as in torch's Linear: (out, in).
"""
import torch
import torch.nn.functional as F

FUSED_D = 2048  # inputs up to which impl="triton" computes y in one kernel: derived above, not measured


def lora_linear_ref(x_ND, w_FD, bias_F, a_RD, b_FR, scale):
    """Linear layer plus `scale` times its rank-R update, in plain PyTorch.

    Args:
        x_ND: (N, D) fp32 | bf16 | fp16, or fp64 for ground truth; sets the dtype of the matmuls and of the result.
        w_FD: (F, D), any of these dtypes, cast to x's at the matmul.
        bias_F: (F,) or None, cast likewise.
        a_RD, b_FR: (R, D) and (F, R) fp32, cast likewise, so their gradients arrive in fp32.
        scale: lora_alpha / rank, dimensionless; a Python float.
    Returns:
        (N, F) in x's dtype.
    Source: Hu et al. 2021, equation 3; PEFT's LoRA layer for fp32 inputs.
    """
    dtype = x_ND.dtype
    base_NF = F.linear(x_ND, w_FD.to(dtype), None if bias_F is None else bias_F.to(dtype))
    xa_NR = F.linear(x_ND, a_RD.to(dtype))
    return base_NF + scale * F.linear(xa_NR, b_FR.to(dtype))


def _kernels():
    from minixmd.kernels import lora_triton  # not at the top: impl="torch" must run where there is no Triton

    return lora_triton


class _LoraLinear(torch.autograd.Function):
    """Fewer passes over y and dX than autograd of the _ref: updates are added in place, scale (g B) is made once."""

    @staticmethod
    def forward(ctx, x_ND, w_FD, bias_F, a_RD, b_FR, scale, impl):
        w, a, b = (t.to(x_ND.dtype) for t in (w_FD, a_RD, b_FR))
        bias = None if bias_F is None else bias_F.to(x_ND.dtype)
        xa_NR = x_ND @ a.T
        ctx.save_for_backward(x_ND, xa_NR, w_FD, a_RD, b_FR)
        ctx.scale, ctx.impl = scale, impl
        if impl == "triton" and x_ND.shape[1] <= FUSED_D and len(a) <= 64:
            return _kernels().lora_forward(x_ND, w, bias, xa_NR, b, scale)
        return F.linear(x_ND, w, bias).addmm_(xa_NR, b.T, alpha=scale)

    @staticmethod
    def backward(ctx, g_NF):
        x_ND, xa_NR, w_FD, a_RD, b_FR = ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        w, a, b = (t.to(g_NF.dtype) for t in (w_FD, a_RD, b_FR))
        one_pass = ctx.impl == "triton" and _kernels().dy_pass_pays(*g_NF.shape, len(a), g_NF.element_size())
        if one_pass:
            gb_NR, db_FR = _kernels().dy_pass(g_NF, xa_NR, b, ctx.scale)
        else:
            gb_NR = (g_NF @ b).mul_(ctx.scale)
        dx_ND = (g_NF @ w).addmm_(gb_NR, a) if need_x else None
        dw_FD = (g_NF.T @ x_ND).to(w_FD.dtype) if need_w else None
        dbias_F = g_NF.sum(0) if need_bias else None
        da_RD = (gb_NR.T @ x_ND).to(a_RD.dtype)
        if not one_pass:
            db_FR = (g_NF.T @ xa_NR).mul_(ctx.scale)
        return dx_ND, dw_FD, dbias_F, da_RD, db_FR.to(b_FR.dtype), None, None


def lora_linear(x_ND, w_FD, bias_F, a_RD, b_FR, scale, impl="torch"):
    """lora_linear_ref with a hand-written backward; saves x Aᵀ, (N, R), beside x.

    Args and returns: as lora_linear_ref; x_ND has exactly two dimensions. impl: "torch" | "triton" (module docstring).
    Raises:
        ValueError: x_ND is not two-dimensional, or no such impl.
    Source: the module docstring; tests/test_lora.py compares value and every gradient with the _ref in fp64.
    """
    if x_ND.ndim != 2:
        raise ValueError(f"lora_linear needs a two-dimensional x, got {tuple(x_ND.shape)}")
    if impl not in ("torch", "triton"):
        raise ValueError(f"lora_linear has impl 'torch' and 'triton', got {impl!r}")
    return _LoraLinear.apply(x_ND, w_FD, bias_F, a_RD, b_FR, scale, impl)
