"""RMSNorm, rotary embedding and SwiGLU: both backends, values and gradients, against eager and fp64."""
import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as, assert_compiles, grid

from minixmd.kernels import rmsnorm, rotary, swiglu
from minixmd.kernels.rmsnorm import rms_norm, rms_norm_ref
from minixmd.kernels.rotary import rotate, rotate_ref

pytestmark = pytest.mark.usefixtures("on_device")

EPS = 1e-6


def values_and_gradients(function, inputs, upstream, dtype=None):
    """The outputs of a function of some tensors, and the gradient of each that needs one."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad) for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(dtype or g.dtype) for g in upstream])
    return [x.detach() for x in outputs] + [x.grad for x in leaves if x.requires_grad]


def check(function, reference, inputs, upstream):
    """Each result is as good as eager's; nothing is written to."""
    before = [x.clone() for x in (*inputs, *upstream)]
    ours = values_and_gradients(function, inputs, upstream)
    eager = values_and_gradients(reference, inputs, upstream)
    truth = values_and_gradients(reference, inputs, upstream, torch.float64)
    for result, plain, exact in zip(ours, eager, truth, strict=True):
        assert_as_good_as(result, plain, exact)
    assert all(torch.equal(x, y) for x, y in zip((*inputs, *upstream), before, strict=True))


def normal(*shape, dtype, grad=True):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


# ---- RMSNorm ----


@pytest.mark.parametrize("size, dtype, added, trained, backend", grid(
    {"one": (1, 1), "odd": (5, 37), "rows": (11, 16)}, DTYPES, {"added": True, "alone": False},
    {"gain": True, "frozen": False}, BACKENDS))  # fmt: skip
def test_a_norm_is_as_good_as_eager(size, dtype, added, trained, backend, monkeypatch):
    monkeypatch.setattr(rmsnorm, "PROGRAMS", 4)  # fewer than rows
    x, gain = normal(*size, dtype=dtype), (1 + normal(size[1], dtype=torch.float32, grad=False) / 4)
    inputs = [x, gain.to(dtype).requires_grad_(trained)]
    upstream = [normal(*size, dtype=dtype, grad=False)]
    if added:
        inputs.append(normal(*size, dtype=dtype))
        upstream.append(normal(*size, dtype=dtype, grad=False))

    def run(backend):
        def norm(x, gain, added=None):
            y, s = rms_norm(x, gain, EPS, added, backend)
            return y if added is None else (y, s)

        return norm

    def reference(x, gain, added=None):
        y, s = rms_norm_ref(x, gain, EPS, added)
        return y if added is None else (y, s)

    check(run(backend), reference, inputs, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_large_and_small_rows_keeps_their_small_channels(backend):
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    x[0, 0], x[1] = 300.0, 1e-4
    y, s = rms_norm(x, torch.ones(64, dtype=torch.bfloat16), EPS, None, backend)
    truth, _ = rms_norm_ref(x.double(), torch.ones(64).double(), EPS)
    assert s is x and ((y.double() - truth).abs() <= truth.abs() / 128).all()


def test_only_the_sum_or_only_the_norm_may_have_a_gradient():
    for used in (0, 1):
        gradients = []
        for backend in BACKENDS:
            torch.manual_seed(0)
            x, added = normal(3, 8, dtype=torch.float32), normal(3, 8, dtype=torch.float32)
            rms_norm(x, torch.ones(8), EPS, added, backend)[used].square().sum().backward()
            gradients.append((x.grad, added.grad))
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_strided_and_empty_rows_are_read_right():
    wide = torch.randn(6, 32)
    for x in (wide[:, 8:24], wide[::2], wide.T[:, :5]):
        ours, theirs = (rms_norm(x, torch.ones(x.shape[1]), EPS, x, backend) for backend in BACKENDS)
        assert torch.allclose(ours[0], theirs[0], atol=1e-6) and torch.equal(ours[1], theirs[1])
    x = torch.randn(0, 8, requires_grad=True)
    y, s = rms_norm(x, torch.ones(8), EPS, x * 2, "triton")
    (y.sum() + s.sum()).backward()
    assert x.grad.shape == (0, 8)


def test_a_norm_refuses_what_does_not_fit():
    x = torch.ones(2, 4)
    for arguments in ((x[0], torch.ones(4)), (x, torch.ones(5)), (x, torch.ones(4, dtype=torch.float64)),
                      (x, torch.ones(4), torch.ones(1, 4)), (x, torch.ones(4), None, "cuda")):  # fmt: skip
        x_ND, w_D, *rest = arguments
        with pytest.raises(ValueError, match="rms_norm needs|backend must be"):
            rms_norm(x_ND, w_D, EPS, *rest)


# ---- rotary embedding ----


def angles(N, K):
    angle_NK = (torch.rand(N, K // 2) * 6).repeat(1, 2)
    return angle_NK.cos(), angle_NK.sin()


@pytest.mark.parametrize("heads, K, dtype, backend", grid(
    {"one": (1, 1), "grouped": (7, 2), "more than a block": (rotary.BLOCK_H + 1, 3)}, [2, 12, 64], DTYPES, BACKENDS))
def test_a_rotation_is_as_good_as_eager(heads, K, dtype, backend):
    (H, J), N = heads, 5
    cos, sin = angles(N, K)
    inputs = [normal(N, H, K, dtype=dtype), normal(N, J, K, dtype=dtype)]
    upstream = [normal(N, H, K, dtype=dtype, grad=False), normal(N, J, K, dtype=dtype, grad=False)]
    check(lambda q, k: rotate(q, k, cos, sin, backend),
          lambda q, k: (rotate_ref(q, cos, sin), rotate_ref(k, cos, sin)), inputs, upstream)


def test_a_rotation_reads_rows_with_gaps_and_turns_back():
    cos, sin = angles(4, 8)
    qkv = torch.randn(4, 3 * 16)
    q, k, _ = (x.unflatten(-1, (2, 8)) for x in qkv.chunk(3, -1))
    ours, theirs = (rotate(q, k, cos, sin, backend) for backend in BACKENDS)
    back = rotate(*ours, cos, -sin, "triton")
    for a, b in ((ours[0], theirs[0]), (ours[1], theirs[1]), (back[0], q), (back[1], k)):
        assert torch.allclose(a, b, atol=1e-6)
    none = torch.randn(0, 2, 8)
    assert rotate(none, none, cos[:0], sin[:0])[0].shape == (0, 2, 8)
    with pytest.raises(ValueError, match="even head size, got 'triton' and 7"):
        rotate(q[..., :7], k[..., :7], cos, sin)


# ---- SwiGLU ----


@pytest.mark.parametrize("size, dtype, backend", grid(
    {"one": (1, 1), "odd": (3, 37), "more than a block": (3, swiglu.BLOCK - 5)}, DTYPES, BACKENDS))
def test_a_product_is_as_good_as_eager(size, dtype, backend):
    gate = (4 * torch.randn(size)).to(dtype).requires_grad_()
    gate.data[0, 0] = -60.0  # silu is 0 there and its derivative, too
    inputs, upstream = [gate, normal(*size, dtype=dtype)], [normal(*size, dtype=dtype, grad=False)]
    check(lambda g, u: swiglu.swiglu(g, u, backend), swiglu.swiglu_ref, inputs, upstream)


def test_a_product_refuses_what_does_not_fit_and_takes_nothing():
    x = torch.ones(2, 4)
    for arguments in ((x, x[:, :3]), (x, x.double()), (x, x, "cuda")):
        with pytest.raises(ValueError, match="swiglu needs"):
            swiglu.swiglu(*arguments)
    assert swiglu.swiglu(x[:0], x[:0]).shape == (0, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rmsnorm", "rotary", "swiglu"])
def test_the_kernels_compile_without_spills(name):
    assert_compiles(name)
