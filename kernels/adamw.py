"""One AdamW update of a parameter tensor, in place: 16-bit weights without a lost bit, moments in 32 or 8 bits.

    w <- w (1 - lr decay)      m <- m + (1 - beta1) (g - m)      v <- beta2 v + (1 - beta2) g²
    w <- w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)                              all in fp32

A bf16 number near 1 cannot change by less than 0.004: at lr 1e-6 nearly every update would be lost. So a bf16 weight
has an int16 residual, and both together are the fp32 number w, to the last bit:

    bits(w) = (bits(bf16) << 16) + residual        bits(bf16) = (bits(w) + 0x8000) >> 16: w rounded, ties from zero

In 8 bits all but 3 bits of a moment's mantissa are rounded away, which leaves an integer close to 8 log2 |x|. The code
is how far it lies above the lowest level of its block of BLOCK elements, whose scale is the largest element, rounded
up. m has a sign and 127 levels, 16 octaves; v has 255, 32 octaves.

    code = max(((bits(|x|) + noise) >> 20) - offset, 0)        offset = max((bits(scale) >> 20) - LEVELS, 0)

A small m becomes 0, but only 0 is code 0 of v: m over the root of nothing would be a huge step. The noise, below 2^20,
makes the rounding right on average; to the nearest, v would never fall, as beta2 = 0.999 changes it by far less than
half a level. It is a hash of the update's and the element's number: the same on both backends and after a stop.

Bytes a parameter, bf16 with bf16 gradients: 26, with 8-bit moments 14, eager 98; of state 10, 4 and 12. Counted, not
measured on a GPU. Dims: C blocks, B elements of a block."""
import torch
import triton
import triton.language as tl

BLOCK = 256  # elements that share a scale: 8 a thread of one warp, so a block's largest needs no shared memory
ROWS, NUM_WARPS = 4, 4  # blocks of a program: one a warp
CHUNK = 1 << 12  # blocks that the twin updates at a time: 1 M elements, whose temporaries take 55 MB
M_LEVELS, V_LEVELS = tl.constexpr(127), tl.constexpr(255)


def state_layout(p, moments):
    """{name: (shape, dtype)} of an update's tensors, zeros before the first. moments: "float32" | "8bit"."""
    C = triton.cdiv(p.numel(), BLOCK)
    shape, dtype = (p.shape, torch.float32) if moments == "float32" else ((C, BLOCK), torch.uint8)
    layout = {"exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}
    if moments == "8bit":
        layout["exp_avg_scale"] = layout["exp_avg_sq_scale"] = (C,), torch.float32
    if p.dtype == torch.bfloat16:
        layout["residual"] = p.shape, torch.int16
    return layout


def join(p, residual):
    """The fp32 numbers that bf16 parameters and their residuals are."""
    return ((p.view(torch.int16).int() << 16) + residual).view(torch.float32)


def split(w):
    """(bf16, residual) of fp32 numbers; a NaN stays one."""
    bits = w.view(torch.int32).masked_fill(w.isnan(), 0x7FC00000)
    high = (bits + 0x8000) >> 16
    return high.short().view(torch.bfloat16), (bits - (high << 16)).short()


def decode(code_CB, scale_C, levels):
    """The fp32 numbers of codes."""
    code_CB = code_CB.int()
    size_CB = code_CB & levels
    offset_C = ((scale_C.view(torch.int32) >> 20) - levels).clamp(min=0)
    bits_CB = ((size_CB + offset_C[:, None]) << 20).masked_fill(size_CB == 0, 0)
    return (bits_CB | (code_CB - size_CB) << 24).view(torch.float32)


def encode(x_CB, noise_CB, levels):
    """(codes, scales) of fp32 numbers."""
    bits_CB = x_CB.view(torch.int32)
    size_CB = bits_CB & 0x7FFFFFFF
    top_C = (size_CB.amax(1) + 0xFFFFF) >> 20
    code_CB = ((size_CB + noise_CB) >> 20) - (top_C - levels).clamp(min=0)[:, None]
    least_CB = (size_CB > 0).int() * (levels == V_LEVELS.value)
    code_CB = torch.maximum(code_CB, least_CB)
    return (code_CB | bits_CB >> 24 & 0x80).to(torch.uint8), (top_C << 20).view(torch.float32)


def rounding_noise(block, count, seed, device):
    """(of m, of v): int32 noise of `count` blocks from number `block`, a multiple of CHUNK, on."""
    h = torch.arange(count * BLOCK, dtype=torch.int32, device=device).view(count, BLOCK)
    h = h + block * BLOCK % 2**31 ^ seed
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D  # a shift brings in the sign of an int32, which the mask drops
    h = (h ^ (h >> 15 & 0x1FFFF)) * -0x7B935975
    h = h ^ (h >> 16 & 0xFFFF)
    return (h >> 16 & 0xFFFF) << 4 | 8, (h & 0xFFFF) << 4 | 8


def adamw_ref(p, grad, state, seed, numbers):
    """The update in plain PyTorch, CHUNK blocks at a time. p and grad are flat; numbers: as _adamw_kernel's."""
    grad_weight, beta2, square_weight, root_divisor, eps, decay, step_size = numbers
    names, levels = ("exp_avg", "exp_avg_sq"), (M_LEVELS.value, V_LEVELS.value)
    residual = state["residual"].view(-1) if "residual" in state else None
    for block in range(0, triton.cdiv(p.numel(), BLOCK), CHUNK):
        blocks, part = slice(block, block + CHUNK), slice(block * BLOCK, (block + CHUNK) * BLOCK)
        g = grad[part].float()
        moments = [state[name].view(-1)[part] for name in names]
        if "exp_avg_scale" in state:
            moments = [decode(state[name][blocks], state[f"{name}_scale"][blocks], n)
                       for name, n in zip(names, levels, strict=True)]
        m, v = (x.view(-1)[:len(g)] for x in moments)
        w = p[part] if residual is None else join(p[part], residual[part])
        m.lerp_(g, grad_weight)
        v.mul_(beta2).addcmul_(g, g, value=square_weight)
        root = v.sqrt().div_(root_divisor).add_(eps)
        w.mul_(decay).addcdiv_(m, root, value=step_size)
        if residual is not None:
            p[part], residual[part] = split(w)
        if "exp_avg_scale" in state:
            noise = rounding_noise(block, len(moments[0]), seed, p.device)
            for name, x_CB, noise_CB, n in zip(names, moments, noise, levels, strict=True):
                state[name][blocks], state[f"{name}_scale"][blocks] = encode(x_CB, noise_CB, n)


@triton.jit
def _decode(code, scale, LEVELS: tl.constexpr):
    code = code.to(tl.int32)
    size = code & LEVELS
    offset = tl.maximum((scale.to(tl.int32, bitcast=True) >> 20) - LEVELS, 0)
    bits = tl.where(size > 0, (size + offset[:, None]) << 20, 0) | ((code - size) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _encode(x, noise, LEVELS: tl.constexpr):
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    top = (tl.max(size, 1) + 0xFFFFF) >> 20
    code = ((size + noise.to(tl.int32)) >> 20) - tl.maximum(top - LEVELS, 0)[:, None]
    code = tl.maximum(code, (size > 0).to(tl.int32) if LEVELS == V_LEVELS else 0)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8), (top << 20).to(tl.float32, bitcast=True)


# size, the same in every step, is left to Triton: of a multiple of 16 it loads 16 bytes at a time
@triton.jit(do_not_specialize=["seed"])
def _adamw_kernel(
    p_ptr, grad_ptr, residual_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, size, seed, grad_weight, beta2,
    square_weight, root_divisor, eps, decay, step_size, HAS_RESIDUAL: tl.constexpr, HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    g = tl.load(grad_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    w = tl.load(p_ptr + i, mask=i < size, other=0)
    m = tl.load(m_ptr + i, mask=i < size, other=0)
    v = tl.load(v_ptr + i, mask=i < size, other=0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + i, mask=i < size, other=0).to(tl.int32)
        w = ((w.to(tl.int32) << 16) + residual).to(tl.float32, bitcast=True)
    if HAS_SCALES:
        m = _decode(m, tl.load(m_scale_ptr + row, mask=row * BLOCK < size, other=0.0), M_LEVELS)
        v = _decode(v, tl.load(v_scale_ptr + row, mask=row * BLOCK < size, other=0.0), V_LEVELS)
    m += tl.cast(grad_weight, tl.float32) * (g - m)
    v = v * tl.cast(beta2, tl.float32) + tl.cast(square_weight, tl.float32) * g * g
    root = tl.div_rn(tl.sqrt_rn(v), tl.cast(root_divisor, tl.float32)) + tl.cast(eps, tl.float32)
    w = w * tl.cast(decay, tl.float32) + tl.div_rn(tl.cast(step_size, tl.float32) * m, root)
    if HAS_RESIDUAL:
        bits = tl.where(w != w, 0x7FC00000, w.to(tl.int32, bitcast=True))
        high = (bits + 0x8000) >> 16
        tl.store(residual_ptr + i, (bits - (high << 16)).to(tl.int16), mask=i < size)
        w = high.to(tl.int16)
    if HAS_SCALES:
        h = (i & 0x7FFFFFFF).to(tl.uint32) ^ tl.cast(seed, tl.uint32)  # as in rounding_noise
        h = (h ^ (h >> 16)) * 0x7FEB352D
        h = (h ^ (h >> 15)) * 0x846CA68B
        h = h ^ (h >> 16)
        m, m_scale = _encode(m, (h >> 16) << 4 | 8, M_LEVELS)
        v, v_scale = _encode(v, (h & 0xFFFF) << 4 | 8, V_LEVELS)
        tl.store(m_scale_ptr + row, m_scale, mask=row * BLOCK < size)
        tl.store(v_scale_ptr + row, v_scale, mask=row * BLOCK < size)
    tl.store(p_ptr + i, w, mask=i < size)
    tl.store(m_ptr + i, m, mask=i < size)
    tl.store(v_ptr + i, v, mask=i < size)


@torch.no_grad()
def adamw_update(p, grad, state, t, *, lr, betas, eps, weight_decay, backend="triton"):
    """One AdamW update, in place, of a parameter and its state. No value of a tensor is read on the CPU.

    p: fp32 | bf16, contiguous. grad: fp32 | bf16, of its shape; not written to. state: tensors as in state_layout, and
    others that are left alone. t: number of the update, 1 of the first. lr, betas, eps, weight_decay: Python floats.
    backend: "triton" | "torch". Raises ValueError: tensors that do not fit, or another backend.
    Source: torch.optim.AdamW; tests/test_adamw.py compares both backends with fp64."""
    kinds = (torch.float32, torch.bfloat16)
    if p.dtype not in kinds or grad.dtype not in kinds or p.shape != grad.shape or not p.is_contiguous():
        raise ValueError(f"adamw_update needs a contiguous parameter and a gradient of its shape, fp32 or bf16, got "
                         f"{tuple(p.shape)} of {p.dtype} and {tuple(grad.shape)} of {grad.dtype}")
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend must be 'triton' or 'torch', got {backend!r}")
    half = "residual" in state
    scaled = "exp_avg_scale" in state
    for key, (shape, dtype) in state_layout(p, "8bit" if scaled else "float32").items():
        x = state.get(key)
        if x is None or x.shape != shape or x.dtype != dtype or not x.is_contiguous():
            found = "none" if x is None else f"{tuple(x.shape)} of {x.dtype}"
            raise ValueError(f"{key} must be {tuple(shape)} of {dtype}, contiguous, got {found}")
    beta1, beta2 = betas
    numbers = (1 - beta1, beta2, 1 - beta2, (1 - beta2**t) ** 0.5, eps, 1 - lr * weight_decay, -lr / (1 - beta1**t))
    seed, size = t * 0x9E3779B1 % 2**31, p.numel()
    p, grad = p.detach().view(-1), grad.reshape(-1)
    if backend == "torch":
        adamw_ref(p, grad, state, seed, numbers)
    elif size:
        bits = p.view(torch.int16) if half else p
        residual = state.get("residual", grad)  # what is absent is not read
        m_scale = state.get("exp_avg_scale", grad)
        v_scale = state.get("exp_avg_sq_scale", grad)
        _adamw_kernel[(triton.cdiv(size, ROWS * BLOCK),)](
            bits, grad, residual, state["exp_avg"], state["exp_avg_sq"], m_scale, v_scale, size, seed, *numbers,
            HAS_RESIDUAL=half, HAS_SCALES=scaled, ROWS=ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS)
        torch.autograd.graph.increment_version(p)  # of which a kernel's writing tells nobody: kept casts of p go by it
