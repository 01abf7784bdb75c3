"""The LoRA matmul against its twin: value and every gradient, in fp64 truth from the same inputs."""
import functools

import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as, assert_compiles, grid
from torch.utils._python_dispatch import TorchDispatchMode

from minixmd.kernels import lora, lora_triton
from minixmd.kernels.lora import lora_linear_ref, lora_linears
from minixmd.models.lora import Linear, apply_linears

pytestmark = pytest.mark.usefixtures("on_device")


if torch.cuda.is_available():  # fp32 is for the interpreter: no kernel in use gets it, and its tiles may not fit
    DTYPES = {name: dtype for name, dtype in DTYPES.items() if name != "fp32"}
BIAS = {"bias": True, "plain": False}


def lora_linear(x_ND, *layer, backend="torch"):
    return lora_linears(x_ND, [layer], backend)[0]


def run(function, inputs, g_NF, scale):
    leaves = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    y_NF = function(*leaves, scale)
    y_NF.backward(g_NF)
    return [y_NF.detach()] + [t.grad for t in leaves if t is not None and t.requires_grad]


@pytest.mark.parametrize("size, dtype, trained, bias", grid(
    [(1, 1, 1, 1), (7, 12, 5, 3), (33, 64, 48, 16)], {"fp32": torch.float32, "bf16": torch.bfloat16},
    {"none": (), "w+bias": ("w", "bias"), "x": ("x",), "all": ("x", "w", "bias")}, BIAS))  # fmt: skip
def test_value_and_every_gradient_equal_the_twin(size, dtype, trained, bias):
    N, D, F, R = size
    x, w, b = (torch.randn(shape).to(dtype) for shape in ((N, D), (F, D), (F,)))
    a_RD, b_FR = torch.randn(R, D, requires_grad=True), torch.randn(F, R, requires_grad=True)
    inputs = [x.requires_grad_("x" in trained), w.requires_grad_("w" in trained),
              b.requires_grad_("bias" in trained) if bias else None, a_RD, b_FR]  # fmt: skip
    g_NF = torch.randn(N, F).to(dtype)
    ours = run(lora_linear, inputs, g_NF, 0.7)
    eager = run(lora_linear_ref, inputs, g_NF, 0.7)
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    truth = run(lora_linear_ref, wide, g_NF.double(), 0.7)
    assert len(ours) == len(truth) == 3 + len([t for t in trained if t != "bias" or bias])
    for o, e, t in zip(ours, eager, truth, strict=True):
        assert o.dtype == e.dtype
        error, base = ((r.double() - t).abs().max() for r in (o, e))
        assert error <= 2 * base + 8 * torch.finfo(o.dtype).eps * t.abs().max()


def test_inputs_and_the_incoming_gradient_are_not_written_to():
    x, w, bias, a, b = (torch.randn(shape) for shape in ((4, 6), (5, 6), (5,), (2, 6), (5, 2)))
    inputs = [x.requires_grad_(), w, bias, a.requires_grad_(), b.requires_grad_()]
    g_NF = torch.randn(4, 5)
    before = [t.detach().clone() for t in (*inputs, g_NF)]
    lora_linear(*inputs, 0.5).backward(g_NF)
    assert all(torch.equal(old, new) for old, new in zip(before, (*inputs, g_NF), strict=True))


def test_three_dimensions_are_refused():
    with pytest.raises(ValueError, match="two-dimensional x, got"):
        lora_linear(torch.randn(1, 2, 3), torch.randn(4, 3), None, torch.randn(1, 3), torch.randn(4, 1), 1.0)


# ---- layers on the same x ----

GROUP = [(48, True, 4), (12, True, 4), (12, False, 7)]  # outputs, bias, rank


def group(D=20, dtype=torch.float32, train_base=False):
    g = torch.Generator().manual_seed(3)

    def leaf(*shape, dtype=torch.float32, train=True):
        return torch.randn(shape, generator=g).to(dtype).requires_grad_(train)

    layers = [(leaf(F, D, dtype=dtype, train=train_base), leaf(F, dtype=dtype, train=train_base) if bias else None,
               leaf(R, D), leaf(F, R), 0.5 + i) for i, (F, bias, R) in enumerate(GROUP)]  # fmt: skip
    return leaf(33, D, dtype=dtype), layers, [torch.randn(33, F, generator=g).to(dtype) for F, _, _ in GROUP]


def group_gradients(function, x_ND, layers, gs, dtype):
    """Outputs, dX and the gradients of every tensor that has one, from copies in `dtype` (None = as they are)."""
    def copy(t):
        return t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) if torch.is_tensor(t) else t

    x_ND, layers = copy(x_ND), [tuple(copy(t) for t in layer) for layer in layers]
    outputs = function(x_ND, layers)
    torch.autograd.backward(outputs, [g.to(y.dtype) for g, y in zip(gs, outputs, strict=True)])
    return [y.detach() for y in outputs] + [t.grad for t in (x_ND, *(t for layer in layers for t in layer))
                                            if torch.is_tensor(t) and t.requires_grad]


@pytest.mark.parametrize("backend, dtype, train_base", grid(BACKENDS, DTYPES, {"frozen": False, "trained": True}))
def test_layers_on_the_same_x_give_what_each_gives_alone(backend, dtype, train_base):
    x_ND, layers, gs = group(dtype=dtype, train_base=train_base)
    ours = group_gradients(functools.partial(lora_linears, backend=backend), x_ND, layers, gs, None)
    alone = [functools.partial(group_gradients, lambda x, layers: [lora_linear_ref(x, *layer) for layer in layers],
                               x_ND, layers, gs, dtype)() for dtype in (None, torch.float64)]  # fmt: skip
    assert len(ours) == 3 + 1 + 6 + 5 * train_base
    for o, e, t in zip(ours, *alone, strict=True):
        assert o.dtype == e.dtype
        error, base = ((r.double() - t).abs().max() for r in (o, e))
        assert error <= 2 * base + 8 * torch.finfo(o.dtype).eps * t.abs().max()


class Reads(TorchDispatchMode):
    """Counts the matrix products that read a tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.at, self.count = tensor.data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.count += any(torch.is_tensor(t) and t.data_ptr() == self.at for t in args)
        return function(*args, **kwargs or {})


def test_adapters_on_the_same_x_read_it_once_forward_and_once_backward():
    x_ND, layers, gs = group()
    with Reads(x_ND) as forward:
        outputs = lora_linears(x_ND, layers)
    with Reads(x_ND) as backward:
        torch.autograd.backward(outputs, gs)
    assert (forward.count, backward.count) == (3 + 1, 1)  # three base products


def test_only_adapted_layers_are_taken_together():
    x_ND, layers, _ = group()
    modules = [Linear(20, F, bias) for F, bias, _ in GROUP]
    for chosen in ((), (1,), (0, 2), (0, 1, 2)):
        for i, module in enumerate(modules):
            module.lora_A, module.lora_B, module.scale = None, None, 0.0
            if i in chosen:
                module.lora_A, module.lora_B = (torch.nn.Parameter(t.detach()) for t in layers[i][2:4])
                module.scale = 0.5
        for y, module in zip(apply_linears(x_ND, *modules), modules, strict=True):
            torch.testing.assert_close(y, module(x_ND))


# ---- backend="triton" ----

SIZES = [(1, 1, 1, 1), (7, 12, 5, 3), (128, 64, 256, 16), (129, 65, 257, 17), (130, 200, 700, 32), (1100, 48, 300, 8)]


@pytest.mark.parametrize("size, dtype, bias", grid([*SIZES, (70, 33, 40, 64)], DTYPES, BIAS))
def test_the_fused_forward_is_as_good_as_eager(size, dtype, bias):
    N, D, F, R = size
    x, w, b, a_RD, b_FR = (torch.randn(shape).to(dtype) for shape in ((N, D), (F, D), (F,), (R, D), (F, R)))
    xa_NR = x @ a_RD.T  # given to all three, rounded
    wide_x, wide_w = (torch.nn.functional.pad(t, (0, 3), value=torch.nan) for t in (x, w))  # rows apart, NaN between
    ours = lora_triton.lora_forward(wide_x[:, :D], wide_w[:, :D], b if bias else None, xa_NR, b_FR, 0.7)
    eager = torch.nn.functional.linear(x, w, b if bias else None).addmm_(xa_NR, b_FR.T, alpha=0.7)
    exact = x.double() @ w.double().T + 0.7 * (xa_NR.double() @ b_FR.double().T) + (b.double() if bias else 0)
    assert_as_good_as(ours, eager, exact, cond=float(exact.abs().max()))


@pytest.mark.parametrize("size, dtype, programs", grid(
    sorted({(N, F, R) for N, _, F, R in SIZES} | {(700, 1030, 5)}), DTYPES,
    {"one block a program": 264, "many blocks": 4}))  # fmt: skip
def test_one_pass_over_the_gradient_is_as_good_as_two_products(size, dtype, programs, monkeypatch):
    N, F, R = size
    monkeypatch.setattr(lora_triton, "DY_PROGRAMS", programs)  # 4 leave each up to 11 blocks of rows here
    g_NF, xa_NR, b_FR = (torch.randn(shape).to(dtype) for shape in ((N, F), (N, R), (F, R)))
    ours = lora_triton.dy_pass(g_NF, xa_NR, b_FR, 0.7)
    assert ours[1].dtype == torch.float32  # the adapter's dtype, where eager would have rounded on the way
    eager = (g_NF @ b_FR).mul_(0.7), (g_NF.T @ xa_NR).mul_(0.7).float()
    exact = 0.7 * (g_NF.double() @ b_FR.double()), 0.7 * (g_NF.double().T @ xa_NR.double())
    for o, e, t in zip(ours, eager, exact, strict=True):
        assert_as_good_as(o, e, t, cond=float(t.abs().max()))


@pytest.mark.parametrize("size, dtype, one_pass", grid(SIZES, DTYPES, {"one pass": True, "two products": False}))
def test_triton_value_and_every_gradient_are_as_good_as_eager(size, dtype, one_pass, monkeypatch):
    N, D, F, R = size
    monkeypatch.setattr(lora_triton, "dy_pass_pays", lambda *_: one_pass)
    x, w, b = ((torch.randn(shape) / 4).to(dtype).requires_grad_() for shape in ((N, D), (F, D), (F,)))
    a_RD, b_FR = (torch.randn(R, D) / 4).requires_grad_(), (torch.randn(F, R) / 4).requires_grad_()
    inputs, g_NF = [x, w, b, a_RD, b_FR], torch.randn(N, F).to(dtype)
    ours = run(functools.partial(lora_linear, backend="triton"), inputs, g_NF, 0.7)
    eager = run(lora_linear_ref, inputs, g_NF, 0.7)
    exact = run(lora_linear_ref, [t.detach().double().requires_grad_() for t in inputs], g_NF.double(), 0.7)
    for o, e, t in zip(ours, eager, exact, strict=True):
        assert o.dtype == e.dtype and o.isfinite().all()
        error, base = ((r.double() - t).abs().max() for r in (o, e))
        assert error <= 2 * base + 8 * torch.finfo(dtype).eps * t.abs().max()


def test_strided_expanded_and_empty_inputs_are_read_right_and_not_written_to(monkeypatch):
    monkeypatch.setattr(lora_triton, "dy_pass_pays", lambda *_: True)
    x, w, bias = torch.randn(9, 24)[:, ::2], torch.randn(12, 5).T, torch.randn(10)[::2]
    a, b = torch.randn(12, 3).T, torch.randn(3, 5).T
    inputs = [t.requires_grad_() for t in (x, w, bias, a, b)]
    before = [t.detach().clone() for t in inputs]
    for g_NF in (torch.randn(1, 5).expand(9, 5), torch.tensor(2.0).expand(9, 5), torch.randn(5, 9).T):
        kept = g_NF.clone()
        ours = run(functools.partial(lora_linear, backend="triton"), inputs, g_NF, 1.3)
        for o, e in zip(ours, run(lora_linear_ref, inputs, g_NF, 1.3), strict=True):
            torch.testing.assert_close(o, e)
        assert torch.equal(g_NF, kept) and all(torch.equal(t, old) for t, old in zip(inputs, before, strict=True))
    none = run(functools.partial(lora_linear, backend="triton"), [x[:0], *inputs[1:]], torch.randn(0, 5), 1.3)
    assert none[0].shape == (0, 5) and not any(grad.any() for grad in none[1:])


def test_the_bytes_of_the_one_pass_are_those_of_its_tensors(monkeypatch):
    N, F, R = 700, 1030, 8
    made, real = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: made.append(real(*size, **kw)) or made[-1])
    g_NF = torch.randn(N, F).half()
    lora_triton.dy_pass(g_NF, torch.randn(N, R).half(), torch.randn(F, R).half(), 1.0)
    partials = sum(t.numel() * 4 for t in made[:2])  # written once and read once
    assert lora_triton.dy_pass_bytes(N, F, R, 2) == g_NF.numel() * 2 + 2 * partials


def test_the_one_pass_is_taken_where_it_moves_fewer_bytes_by_a_fifth():
    assert lora_triton.dy_pass_pays(4096, 3584, 16, 2) and lora_triton.dy_pass_pays(4096, 18944, 16, 2)
    assert not lora_triton.dy_pass_pays(4096, 512, 16, 2)  # k and v of four heads
    assert not lora_triton.dy_pass_pays(16384, 18944, 64, 2)  # partials as large as g
    assert not lora_triton.dy_pass_pays(0, 3584, 16, 2)
    assert not lora_triton.dy_pass_pays(4096, 3584, 16, 4)  # fp32: the kernel would spill
    assert lora_triton.dy_pass_bytes(4096, 3584, 16, 2) == 44_040_192  # 29.4 MB of g, 14.7 MB of partials


def test_wide_inputs_high_ranks_and_fp32_go_to_the_vendors_product(monkeypatch):
    def refuse(*_):
        raise AssertionError("the fused kernel was called")

    monkeypatch.setattr(lora_triton, "lora_forward", refuse)
    for D, R, dtype in ((lora.FUSED_D + 1, 2, torch.half), (8, 65, torch.half), (8, 2, torch.float32)):
        x, w, a, b = (torch.randn(shape).to(dtype) / 8 for shape in ((3, D), (4, D), (R, D), (4, R)))
        ours, eager = lora_linear(x, w, None, a, b, 0.5, backend="triton"), lora_linear_ref(x, w, None, a, b, 0.5)
        torch.testing.assert_close(ours, eager)
    with pytest.raises(AssertionError, match="fused"):
        lora_linear(*(torch.randn(n, lora.FUSED_D).half() for n in (3, 4)), None, torch.randn(2, lora.FUSED_D),
                    torch.randn(4, 2), 0.5, backend="triton")  # fmt: skip


def test_cast_adapters_are_made_anew_after_an_update_and_for_other_tensors_or_dtypes():
    layer = Linear(4, 3)
    x_ND = torch.randn(2, 4)

    def change(scale):
        """New matrices of the same version as the old ones had."""
        layer.lora_A = torch.nn.Parameter(scale * torch.ones(2, 4))
        layer.lora_B = torch.nn.Parameter(torch.ones(3, 2))

    layer.scale = 1.0
    with torch.no_grad():
        base = torch.nn.functional.linear(x_ND, layer.weight, layer.bias)
        for scale in (1.0, 2.0):
            change(scale)
            for dtype in (torch.float32, torch.float64, torch.float32):
                update = (layer.to(dtype)(x_ND.to(dtype)) - base)[:, :1]
                assert torch.allclose(update.float(), 2 * scale * x_ND.sum(1, keepdim=True), atol=1e-5)
        layer.lora_A.mul_(3.0)
        assert torch.allclose((layer(x_ND) - base)[:, 0], 2 * 3 * 2.0 * x_ND.sum(1), atol=1e-5)
        made = layer.casts
        layer(x_ND)
        assert layer.casts is made


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'torch' and 'triton', got 'x'"):
        lora_linear(torch.randn(2, 3), torch.randn(4, 3), None, torch.randn(1, 3), torch.randn(4, 1), 1.0, backend="x")


@pytest.mark.slow
def test_the_kernels_compile_to_tensor_core_code_without_spills():
    assert_compiles("lora_triton")
