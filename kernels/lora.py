"""A linear layer with a low-rank update.

    y  = x Wᵀ + bias + scale (x Aᵀ) Bᵀ
    dX = g W + scale (g B) A
    dA = scale (g B)ᵀ x            dB = scale gᵀ (x Aᵀ)
    dW = gᵀ x                      dbias = sum_n g[n]          (only where the base layer trains)

Dims: N tokens (rows), D inputs, F outputs, R rank. Weights stand as in torch's Linear: (out, in).
"""
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
