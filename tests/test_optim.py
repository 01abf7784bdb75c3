"""The optimizer in bf16: its fp32 masters, and that they are what a stopped run goes on from."""
import pytest
import torch

from minixmd.learning.optim import MasterAdamW, adamw, optimizer_tensors, restore_optimizer
from minixmd.runs.files import write_safetensors

OPTIONS = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
SHAPES = {"matrix": (5, 6), "vector": (7,)}


def parameters_of(dtype):
    """Weights of about 1, exact in bf16."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter((1 + 0.5 * torch.randn(shape, generator=generator)).bfloat16().to(dtype))
            for name, shape in SHAPES.items()}


def walk(optimizer, parameters, steps):
    """Gradients that lean one way, the same for every caller and exact in bf16."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = (0.3 + torch.randn(p.shape, generator=generator)).bfloat16().to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def farthest(parameters, truth):
    return max((parameters[name].float() - truth[name]).abs().max().item() for name in truth)


def test_500_steps_at_lr_1e_6_are_those_of_fp32_which_plain_bf16_loses():
    truth, ours, plain = (parameters_of(dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))
    start = {name: p.detach().clone() for name, p in truth.items()}
    optimizer = adamw(ours, **OPTIONS)
    assert type(optimizer) is MasterAdamW and type(adamw(truth, **OPTIONS)) is torch.optim.AdamW
    walk(adamw(truth, **OPTIONS), truth, range(500))
    walk(optimizer, ours, range(500))
    walk(torch.optim.AdamW(plain.values(), lr=1e-6, weight_decay=0.1), plain, range(500))
    masters = {name: optimizer.state[p]["master"] for name, p in ours.items()}
    moved = farthest(truth, start)
    assert moved > 1e-4
    assert farthest(masters, truth) < 1e-6
    assert farthest(plain, truth) > 0.9 * moved  # weights of about 1 have not moved at all
    assert all(value.dtype == torch.float32 for p in ours.values() for value in optimizer.state[p].values())


@pytest.mark.parametrize("lr, decay", [(1e-2, 0.0), (3e-3, 0.5)])
def test_a_master_takes_torchs_own_steps(lr, decay):
    options = {**OPTIONS, "lr": lr, "weight_decay": decay}
    truth, ours = parameters_of(torch.float32), parameters_of(torch.bfloat16)
    optimizer = adamw(ours, **options)
    walk(adamw(truth, **options), truth, range(20))
    walk(optimizer, ours, range(20))
    for name, p in truth.items():
        master = optimizer.state[ours[name]]["master"]
        torch.testing.assert_close(master, p.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(ours[name], master.bfloat16())


def test_a_restored_master_goes_on_bit_for_bit(tmp_path):
    whole, half = parameters_of(torch.bfloat16), parameters_of(torch.bfloat16)
    walk(adamw(whole, **OPTIONS), whole, range(60))
    first = adamw(half, **OPTIONS)
    walk(first, half, range(30))
    tensors = optimizer_tensors(first, half)
    assert "matrix.master" in tensors and tensors["matrix.step"] == 30
    path = tmp_path / "optimizer.safetensors"
    write_safetensors(path, tensors)
    again = adamw(half, **OPTIONS)
    restore_optimizer(again, half, path)
    restored = optimizer_tensors(again, half)
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())
    path.write_bytes(b"")  # what was restored has memory of its own
    walk(again, half, range(30, 60))
    assert all(torch.equal(p, whole[name]) for name, p in half.items())


@pytest.mark.parametrize("dtype, name, tensor", [
    (torch.bfloat16, "matrix.master", None), (torch.float32, "matrix.exp_avg", None),
    (torch.bfloat16, "matrix.exp_avg", torch.zeros(6, 5)), (torch.bfloat16, "vector.exp_avg_sq", torch.zeros(1)),
    (torch.float32, "vector.master", torch.zeros(7)), (torch.bfloat16, "matrix.master", torch.zeros(5, 6).bfloat16()),
])  # fmt: skip
def test_an_optimizers_state_that_does_not_fit_is_refused_by_file_and_name(tmp_path, dtype, name, tensor):
    parameters = parameters_of(dtype)
    optimizer = adamw(parameters, **OPTIONS)
    walk(optimizer, parameters, range(1))
    tensors = optimizer_tensors(optimizer, parameters)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    write_safetensors(tmp_path / "o.safetensors", tensors)
    with pytest.raises(ValueError, match=f"o.safetensors: not a state of this model: .*{name}"):
        restore_optimizer(adamw(parameters, **OPTIONS), parameters, tmp_path / "o.safetensors")


def test_a_parameter_without_a_gradient_is_left_alone():
    ours = parameters_of(torch.bfloat16)
    before, optimizer = {name: p.detach().clone() for name, p in ours.items()}, adamw(ours, **OPTIONS)
    ours["matrix"].grad = torch.ones_like(ours["matrix"])
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert torch.equal(ours["vector"], before["vector"]) and not torch.equal(ours["matrix"], before["matrix"])
    assert set(optimizer_tensors(optimizer, ours)) == {f"matrix.{key}" for key in ("step", "exp_avg", "exp_avg_sq",
                                                                                   "master")}
