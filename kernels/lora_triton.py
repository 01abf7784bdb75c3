"""Triton kernels of lora.py: the forward product with the low-rank update inside, and one pass over the gradient.

    lora_forward   y = x Wᵀ + bias + scale xa Bᵀ            xa = x Aᵀ is given
    dy_pass        gb = scale g B,  dB = scale gᵀ xa        g = dL/dy

lora_forward starts its accumulator with the rank-R product and then loops over D; with the rank-R product after the
loop, the ptxas of Triton 3.6 serialises every wgmma (C7515). It saves one read and one write of y.

dy_pass gives each program `rows` rows and DY_BLOCK_F columns of g. A tile is read once and used twice: times B for gb,
and transposed times xa for dB, which stays in registers over the rows. Neither sum is complete within a program, so
both go to fp32 partials that a second kernel adds in a fixed order: no atomics, the same bits every time.

dy_pass moves g once, and the partials twice (dy_pass_bytes): counted, 44 MB at N 4096, F 3584, R 16 in bf16, where the
two vendor products read 59. dy_pass_pays asks for 1.2 times fewer, which excludes k and v of few heads, and R = 64.

Dims: N rows (tokens), D inputs, F outputs, R rank; BLOCK_R is R, padded to what a tensor core takes."""
import torch
import triton
import triton.language as tl

# lora_forward: the accumulator takes 128 registers per thread in 8 warps. BLOCK_D = 64 spills on sm_80 (Triton 3.6).
BLOCK_N, BLOCK_F, BLOCK_D = 128, 256, 32
FORWARD_WARPS, FORWARD_STAGES = 8, 4
GROUP_N = 8  # row blocks that share a sweep over the columns, so that W's tiles come from L2
# dy_pass: 64 rows are what one wgmma takes; wide tiles make few partial sums of gb.
DY_BLOCK_N, DY_BLOCK_F = 64, 256
DY_WARPS, DY_STAGES = 4, 3
DY_PROGRAMS = 264  # two for each of the 132 SMs of an H200
BLOCK_SUM, SUM_WARPS, SUM_STAGES = 1024, 4, 3


@triton.jit(do_not_specialize=["N"])
def _lora_forward_kernel(
    x_ptr, w_ptr, bias_ptr, xa_ptr, b_ptr, y_ptr,
    stride_xn, stride_wf, stride_yn, N, D, F, R, scale,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)  # torch.compile passes Python floats as fp64
    sweep = GROUP_N * tl.cdiv(F, BLOCK_F)  # blocks of a group: its rows vary fastest
    first = tl.program_id(0) // sweep * GROUP_N
    height = tl.minimum(tl.cdiv(N, BLOCK_N) - first, GROUP_N)
    block_n = first + tl.program_id(0) % sweep % height
    block_f = tl.program_id(0) % sweep // height
    n = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    f = (block_f * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    xa = tl.load(xa_ptr + n[:, None] * R + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
    b = tl.load(b_ptr + f[None, :] * R + r[:, None], mask=(f < F)[None, :] & (r < R)[:, None], other=0.0)
    acc = tl.dot(xa, b, input_precision="ieee") * scale
    for start in range(0, D, BLOCK_D):
        rest = D - start
        x = tl.load(x_ptr + n[:, None] * stride_xn + (start + d)[None, :],
                    mask=(n < N)[:, None] & (d < rest)[None, :], other=0.0)  # fmt: skip
        w = tl.load(w_ptr + f[None, :] * stride_wf + (start + d)[:, None],
                    mask=(f < F)[None, :] & (d < rest)[:, None], other=0.0)  # fmt: skip
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + n[:, None] * stride_yn + f[None, :], acc, mask=(n < N)[:, None] & (f < F)[None, :])


@triton.jit(do_not_specialize=["N", "rows"])
def _dy_pass_kernel(
    g_ptr, xa_ptr, b_ptr, gb_ptr, db_ptr,
    stride_gn, N, F, R, rows,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    split, block_f = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    f, r = block_f * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_R)
    b = tl.load(b_ptr + f[:, None] * R + r[None, :], mask=(f < F)[:, None] & (r < R)[None, :], other=0.0)
    db = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = split * rows + start + tl.arange(0, BLOCK_N)
        g = tl.load(g_ptr + n[:, None] * stride_gn + f[None, :], mask=(n < N)[:, None] & (f < F)[None, :], other=0.0)
        xa = tl.load(xa_ptr + n[:, None] * R + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
        db = tl.dot(tl.trans(g), xa, db, input_precision="ieee")
        gb = tl.dot(g, b, input_precision="ieee")
        tl.store(gb_ptr + (block_f * N + n)[:, None] * R + r[None, :], gb, mask=(n < N)[:, None] & (r < R)[None, :])
    tl.store(db_ptr + (split * F + f)[:, None] * R + r[None, :], db, mask=(f < F)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["size", "count"])
def _sum_partials_kernel(part_ptr, out_ptr, size, count, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(count):
        total += tl.load(part_ptr + i, mask=i < size, other=0.0)
        part_ptr += size
    tl.store(out_ptr + i, total * tl.cast(scale, tl.float32), mask=i < size)


def _block_f(R):
    """Columns of y per tile of lora_forward: beside a rank above 32 the wide tile spills on sm_80."""
    return BLOCK_F if R <= 32 else BLOCK_F // 2


def _rows(N, F):
    """Rows of g per program: a multiple of DY_BLOCK_N that makes about DY_PROGRAMS programs."""
    splits = max(1, DY_PROGRAMS // triton.cdiv(F, DY_BLOCK_F))
    return triton.cdiv(triton.cdiv(N, splits), DY_BLOCK_N) * DY_BLOCK_N


def dy_pass_bytes(N, F, R, itemsize):
    """Bytes that dy_pass moves; the two products it replaces read 2 N F itemsize."""
    return N * F * itemsize + 8 * R * (N * triton.cdiv(F, DY_BLOCK_F) + F * triton.cdiv(N, _rows(N, F)))


def dy_pass_pays(N, F, R, itemsize):
    """Whether dy_pass, for 16 bits and R <= 32, moves at least 1.2 times fewer bytes than two reads of g."""
    return itemsize == 2 and N > 0 and R <= 32 and 1.2 * dy_pass_bytes(N, F, R, itemsize) <= 2 * N * F * itemsize


def lora_forward(x_ND, w_FD, bias_F, xa_NR, b_FR, scale):
    """x Wᵀ + bias + scale xa Bᵀ, (N, F), in x's dtype, which w, bias (or None), xa and b must have; R <= 64. x and w
    without unit stride in D are copied. fp32 avoids the tensor cores: exact to rounding, but slow."""
    (N, D), (F, R) = x_ND.shape, b_FR.shape
    x_ND, w_FD = (t if t.stride(1) == 1 else t.contiguous() for t in (x_ND, w_FD))
    y_NF, block_f = torch.empty(N, F, dtype=x_ND.dtype, device=x_ND.device), _block_f(R)
    _lora_forward_kernel[(triton.cdiv(N, BLOCK_N) * triton.cdiv(F, block_f),)](
        x_ND, w_FD, w_FD if bias_F is None else bias_F.contiguous(), xa_NR.contiguous(), b_FR.contiguous(), y_NF,
        x_ND.stride(0), w_FD.stride(0), y_NF.stride(0), N, D, F, R, scale, BLOCK_N=BLOCK_N, BLOCK_F=block_f,
        BLOCK_D=BLOCK_D, BLOCK_R=max(16, triton.next_power_of_2(R)), GROUP_N=GROUP_N, HAS_BIAS=bias_F is not None,
        num_warps=FORWARD_WARPS, num_stages=FORWARD_STAGES)  # fmt: skip
    return y_NF


def dy_pass(g_NF, xa_NR, b_FR, scale):
    """scale g B, (N, R) in g's dtype, and scale gᵀ xa, (F, R) fp32, from one read of g; xa, b have g's dtype. R <= 32.
    g without unit stride in F is copied (one that autograd has expanded has stride 0)."""
    (N, F), R = g_NF.shape, b_FR.shape[1]
    g_NF = g_NF if g_NF.stride(1) == 1 else g_NF.contiguous()
    rows = _rows(max(N, 1), F)
    splits, blocks = triton.cdiv(N, rows), triton.cdiv(F, DY_BLOCK_F)
    gb_part, db_part = (torch.empty(n, R, dtype=torch.float32, device=g_NF.device) for n in (blocks * N, splits * F))
    _dy_pass_kernel[(splits, blocks)](
        g_NF, xa_NR.contiguous(), b_FR.contiguous(), gb_part, db_part, g_NF.stride(0), N, F, R, rows,
        BLOCK_N=DY_BLOCK_N, BLOCK_F=DY_BLOCK_F, BLOCK_R=max(16, triton.next_power_of_2(R)), num_warps=DY_WARPS,
        num_stages=DY_STAGES)
    gb_NR = torch.empty(N, R, dtype=g_NF.dtype, device=g_NF.device)
    db_FR = torch.empty(F, R, dtype=torch.float32, device=g_NF.device)
    for part, out, count in ((gb_part, gb_NR, blocks), (db_part, db_FR, splits)):
        _sum_partials_kernel[(triton.cdiv(out.numel(), BLOCK_SUM),)](
            part, out, out.numel(), count, scale, BLOCK=BLOCK_SUM, num_warps=SUM_WARPS, num_stages=SUM_STAGES)
    return gb_NR, db_FR
