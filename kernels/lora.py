"""A linear layer with a low-rank update.

    y  = x Wᵀ + bias + scale (x Aᵀ) Bᵀ
    dX = g W + scale (g B) A
    dA = scale (g B)ᵀ x            dB = scale gᵀ (x Aᵀ)
    dW = gᵀ x                      dbias = sum_n g[n]          (only where the base layer trains)

Dims: N tokens (rows), D inputs, F outputs, R rank. Weights stand as in torch's Linear: (out, in).
"""
import torch
import torch.nn.functional as F


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


class _LoraLinear(torch.autograd.Function):
    """Fewer passes over y and dX than autograd of the _ref: updates are added in place, scale (g B) is made once."""

    @staticmethod
    def forward(ctx, x_ND, w_FD, bias_F, a_RD, b_FR, scale):
        w, a, b = (t.to(x_ND.dtype) for t in (w_FD, a_RD, b_FR))
        xa_NR = x_ND @ a.T
        y_NF = F.linear(x_ND, w, None if bias_F is None else bias_F.to(x_ND.dtype))
        y_NF.addmm_(xa_NR, b.T, alpha=scale)
        ctx.save_for_backward(x_ND, xa_NR, w_FD, a_RD, b_FR)
        ctx.scale = scale
        return y_NF

    @staticmethod
    def backward(ctx, g_NF):
        x_ND, xa_NR, w_FD, a_RD, b_FR = ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        w, a, b = (t.to(g_NF.dtype) for t in (w_FD, a_RD, b_FR))
        gb_NR = (g_NF @ b).mul_(ctx.scale)
        dx_ND = (g_NF @ w).addmm_(gb_NR, a) if need_x else None
        dw_FD = (g_NF.T @ x_ND).to(w_FD.dtype) if need_w else None
        dbias_F = g_NF.sum(0) if need_bias else None
        da_RD = (gb_NR.T @ x_ND).to(a_RD.dtype)
        db_FR = (g_NF.T @ xa_NR).mul_(ctx.scale).to(b_FR.dtype)
        return dx_ND, dw_FD, dbias_F, da_RD, db_FR, None


def lora_linear(x_ND, w_FD, bias_F, a_RD, b_FR, scale):
    """lora_linear_ref with a hand-written backward; saves x Aᵀ, (N, R), beside x.

    Args and returns: as lora_linear_ref; x_ND has exactly two dimensions.
    Raises:
        ValueError: x_ND is not two-dimensional.
    Source: the module docstring; tests/test_lora.py compares value and every gradient with the _ref in fp64.
    """
    if x_ND.ndim != 2:
        raise ValueError(f"lora_linear needs a two-dimensional x, got {tuple(x_ND.shape)}")
    return _LoraLinear.apply(x_ND, w_FD, bias_F, a_RD, b_FR, scale)
