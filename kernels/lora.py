"""A linear layer with a low-rank update (LoRA), forward and backward.

    y  = x Wᵀ + bias + scale (x Aᵀ) Bᵀ
    dX = g W + scale (g B) A                               g = dL/dy
    dA = scale (g B)ᵀ x            dB = scale gᵀ (x Aᵀ)
    dW = gᵀ x                      dbias = sum_n g[n]      only if the base layer trains

backend="torch" leaves every product to the vendor's library and adds the updates in place. backend="triton" uses
lora_triton.py for two of them, in 16 bits (in fp32 its tiles would spill), where counted bytes and published speeds,
not measurements, favour it:
    y, if D <= FUSED_D and R <= 64: one kernel saves a read and a write of y, 367 / D of the product's time on an H200,
        but ran at 76 to 86 % of the vendor's (triton #5726, fb-triton #1038): it breaks even at D = 1162 to 2254.
    scale g B and dB, if reading g once instead of twice moves 1.2 times fewer bytes (lora_triton.dy_pass_pays).

Dims: N rows (tokens), D inputs, F outputs, R rank. Weights are (out, in), as in torch's Linear."""
import torch
import torch.nn.functional as F

from minixmd.kernels import lora_triton

FUSED_D = 2048  # inputs up to which backend="triton" computes y in one kernel: derived above, not measured


def lora_linear_ref(x_ND, w_FD, bias_F, a_RD, b_FR, scale):
    """A linear layer plus `scale` times its rank-R update, in plain PyTorch.

    x_ND: (N, D) fp32 | bf16 | fp16, or fp64 for ground truth; sets the dtype of the matmuls and of the result, (N, F).
    w_FD, bias_F: (F, D), and (F,) or None, of any of these dtypes; cast to x's at the matmul. a_RD, b_FR: (R, D) and
    (F, R) fp32, cast likewise, so their gradients arrive in fp32. scale: lora_alpha / rank.
    Source: Hu et al. 2021, equation 3; PEFT's LoRA layer for fp32 inputs."""
    dtype = x_ND.dtype
    base_NF = F.linear(x_ND, w_FD.to(dtype), None if bias_F is None else bias_F.to(dtype))
    xa_NR = F.linear(x_ND, a_RD.to(dtype))
    return base_NF + scale * F.linear(xa_NR, b_FR.to(dtype))


class _LoraLinears(torch.autograd.Function):
    """Layers on the same x; `tensors` are w, bias, a, b of the first layer, then of the next. With all A stacked, x is
    read once for x Aᵀ and once for dA. Updates are added in place: fewer passes over y and dX than autograd makes."""

    @staticmethod
    def forward(ctx, x_ND, backend, scales, casts, *tensors):
        ws, biases = ([None if t is None else t.to(x_ND.dtype) for t in tensors[i::4]] for i in range(2))
        ctx.casts = a_RD, Bs = casts or cast_adapters(tensors[2::4], tensors[3::4], x_ND.dtype)
        xa_NR, outputs = x_ND @ a_RD.T, []
        per_layer = xa_NR.split([b.shape[1] for b in Bs], 1)
        for w, bias, b, xa, scale in zip(ws, biases, Bs, per_layer, scales, strict=True):
            if backend == "triton" and x_ND.element_size() == 2 and x_ND.shape[1] <= FUSED_D and b.shape[1] <= 64:
                outputs.append(lora_triton.lora_forward(x_ND, w, bias, xa, b, scale))
            else:
                outputs.append(F.linear(x_ND, w, bias).addmm_(xa, b.T, alpha=scale))
        ctx.save_for_backward(x_ND, xa_NR, *tensors)
        ctx.backend, ctx.scales = backend, scales
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gs):
        x_ND, xa_NR, *tensors = ctx.saved_tensors
        need_x, _, _, _, *need = ctx.needs_input_grad
        ws, (a_RD, Bs) = [w.to(x_ND.dtype) for w in tensors[0::4]], ctx.casts
        ranks, gbs, grads = [b.shape[1] for b in Bs], [], [None] * len(tensors)
        for i, (g_NF, b, xa, scale) in enumerate(zip(gs, Bs, xa_NR.split(ranks, 1), ctx.scales, strict=True)):
            if ctx.backend == "triton" and lora_triton.dy_pass_pays(*g_NF.shape, ranks[i], g_NF.element_size()):
                gb_NR, grads[4 * i + 3] = lora_triton.dy_pass(g_NF, xa, b, scale)
            else:
                gb_NR, grads[4 * i + 3] = (g_NF @ b).mul_(scale), (g_NF.T @ xa).mul_(scale)
            gbs.append(gb_NR)
            if need[4 * i]:
                grads[4 * i] = g_NF.T @ x_ND
            if need[4 * i + 1]:
                grads[4 * i + 1] = g_NF.sum(0)
        gb_NR, dx_ND = torch.cat(gbs, 1), None
        grads[2::4] = (gb_NR.T @ x_ND).split(ranks)
        if need_x:
            dx_ND = gb_NR @ a_RD
            for g_NF, w in zip(gs, ws, strict=True):
                dx_ND.addmm_(g_NF, w)
        grads = [None if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
        return dx_ND, None, None, None, *grads


def cast_adapters(As, Bs, dtype):
    """What lora_linears takes as `casts`: all A in one stack, and a list of the B, in the dtype of its products."""
    with torch.inference_mode(False), torch.no_grad():  # it may be made while sampling and used while training
        return torch.cat(tuple(As)).to(dtype), [b.to(dtype) for b in Bs]


def lora_linears(x_ND, layers, backend="torch", casts=None):
    """lora_linear_ref of several layers on one x, whose adapters share the reads of x: q, k and v, or gate and up. The
    base products stay separate: one over all would need a copy of the weights. layers: [(w_FD, bias_F, a_RD, b_FR,
    scale)]; F and R may differ. casts: their cast_adapters in x's dtype, kept between calls; None = made here. backend:
    "torch" | "triton". Returns a tuple of (N, F) in x's dtype. ValueError: x not two-dimensional, another backend."""
    if x_ND.ndim != 2:
        raise ValueError(f"lora_linears needs a two-dimensional x, got {tuple(x_ND.shape)}")
    if backend not in ("torch", "triton"):
        raise ValueError(f"lora_linears has backend 'torch' and 'triton', got {backend!r}")
    tensors = [tensor for *layer, _ in layers for tensor in layer]
    return _LoraLinears.apply(x_ND, backend, [scale for *_, scale in layers], casts, *tensors)
