"""The LoRA matmul against its twin: value and every gradient, in fp64 truth from the same inputs."""
import pytest
import torch

from minixmd.kernels.lora import lora_linear, lora_linear_ref


def run(function, inputs, g_NF, scale):
    leaves = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    y_NF = function(*leaves, scale)
    y_NF.backward(g_NF)
    return [y_NF.detach()] + [t.grad for t in leaves if t is not None and t.requires_grad]


@pytest.mark.parametrize("N, D, F, R", [(1, 1, 1, 1), (7, 12, 5, 3), (33, 64, 48, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", [(), ("w", "bias"), ("x",), ("x", "w", "bias")], ids="+".join)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_value_and_every_gradient_equal_the_twin(N, D, F, R, dtype, trained, bias):
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
