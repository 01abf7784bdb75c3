"""The optimizer of bf16 weights and of 8-bit moments, and that a stopped run goes on from its state, to the bit."""
import math

import pytest
import torch
from absent_device import AbsentDevice
from torch import nn

from minixmd.kernels.adamw import join
from minixmd.learning import checkpoint, optim
from minixmd.learning.optim import FusedAdamW, adamw, optimizer_tensors, restore_optimizer
from minixmd.runs import training_state
from minixmd.runs.files import write_safetensors

OPTIONS = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
SHAPES = {"matrix": (5, 60), "vector": (7,)}
KINDS = {"bf16": (torch.bfloat16, "float32"), "bf16 with 8 bits": (torch.bfloat16, "8bit"),
         "fp32 with 8 bits": (torch.float32, "8bit"), "fp32": (torch.float32, "float32")}  # fmt: skip


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


def masters_of(optimizer, parameters):
    return {name: join(p.detach(), optimizer.state[p]["residual"]) for name, p in parameters.items()}


def farthest(parameters, truth):
    return max((parameters[name].float() - truth[name]).abs().max().item() for name in truth)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_500_steps_at_lr_1e_6_are_those_of_fp32_which_plain_bf16_loses(moments):
    truth, ours, plain = (parameters_of(dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))
    start = {name: p.detach().clone() for name, p in truth.items()}
    optimizer = adamw(ours, moments=moments, **OPTIONS)
    walk(adamw(truth, **OPTIONS), truth, range(500))
    walk(optimizer, ours, range(500))
    walk(torch.optim.AdamW(plain.values(), lr=1e-6, weight_decay=0.1), plain, range(500))
    moved = farthest(truth, start)
    assert moved > 1e-4
    assert farthest(masters_of(optimizer, ours), truth) < (1e-6 if moments == "float32" else 0.2 * moved)
    assert farthest(plain, truth) > 0.9 * moved  # weights of about 1 have not moved at all


@pytest.mark.parametrize("lr, decay", [(1e-2, 0.0), (3e-3, 0.5)])
def test_bf16_with_its_residual_takes_torchs_own_steps(lr, decay):
    options = {**OPTIONS, "lr": lr, "weight_decay": decay}
    truth, ours = parameters_of(torch.float32), parameters_of(torch.bfloat16)
    optimizer = adamw(ours, **options)
    walk(adamw(truth, **options), truth, range(20))
    walk(optimizer, ours, range(20))
    for name, master in masters_of(optimizer, ours).items():
        torch.testing.assert_close(master, truth[name].detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours[name].float(), master, rtol=2**-8, atol=0.0)


def test_pytorchs_own_is_used_where_all_is_fp32_and_ours_elsewhere():
    for dtype, moments in KINDS.values():
        optimizer = adamw(parameters_of(dtype), moments=moments, **OPTIONS)
        plain = dtype == torch.float32 and moments == "float32"
        assert type(optimizer) is (torch.optim.AdamW if plain else FusedAdamW)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    mixed = {"a": parameters_of(torch.float32)["matrix"], "b": parameters_of(torch.bfloat16)["vector"]}
    optimizer = adamw(mixed, **OPTIONS)
    walk(optimizer, mixed, range(2))
    assert set(optimizer_tensors(optimizer, mixed)) == {
        *(f"a.{key}" for key in ("step", "exp_avg", "exp_avg_sq")),
        *(f"b.{key}" for key in ("step", "exp_avg", "exp_avg_sq", "residual"))}  # fmt: skip
    with pytest.raises(ValueError, match="fp32 or bf16, got .* of torch.float16"):
        half = parameters_of(torch.float16)
        walk(adamw(half, **OPTIONS), half, range(1))


@pytest.mark.parametrize("kind, backend", [
    *((kind, "torch") for kind in KINDS), ("bf16 with 8 bits", "triton")])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(kind, backend, tmp_path):
    dtype, moments = KINDS[kind]
    options = dict(OPTIONS, lr=1e-3, moments=moments, backend=backend)
    whole, half = parameters_of(dtype), parameters_of(dtype)
    uninterrupted = adamw(whole, **options)
    walk(uninterrupted, whole, range(20))
    first = adamw(half, **options)
    walk(first, half, range(10))
    path = tmp_path / "optimizer.safetensors"
    write_safetensors(path, optimizer_tensors(first, half))
    again = adamw(half, **options)
    restore_optimizer(again, half, [path])
    path.write_bytes(b"")  # what was restored has memory of its own
    walk(again, half, range(10, 20))
    assert all(torch.equal(p, whole[name]) for name, p in half.items())
    theirs = optimizer_tensors(uninterrupted, whole)
    for name, tensor in optimizer_tensors(again, half).items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_does_not_fit_is_refused_by_file_and_name(kind, tmp_path):
    dtype, moments = KINDS[kind]
    parameters, path = parameters_of(dtype), tmp_path / "o.safetensors"
    optimizer = adamw(parameters, moments=moments, **OPTIONS)
    walk(optimizer, parameters, range(2))
    tensors = optimizer_tensors(optimizer, parameters)

    def restored(tensors, moments=moments):
        write_safetensors(path, tensors)
        restore_optimizer(adamw(parameters, moments=moments, **OPTIONS), parameters, [path])

    restored({name: tensors[name] for name in tensors if "matrix" not in name})  # it had no gradient
    for missing in tensors:
        with pytest.raises(ValueError, match=r"o.safetensors: not a state of this model: only one of the two has \S+$"):
            restored({name: tensor for name, tensor in tensors.items() if name != missing})
    for other, (_, wanted) in KINDS.items():
        if wanted != moments and other != kind:
            with pytest.raises(ValueError, match="o.safetensors: not a state of this model"):
                restored(tensors, wanted)
    for name, wrong in (("matrix.exp_avg", torch.zeros(60, 5)), ("vector.exp_avg_sq", torch.zeros(7).double()),
                        ("matrix.master", torch.zeros(5, 60))):  # the last as older versions wrote it
        with pytest.raises(ValueError, match=f"o.safetensors: not a state of this model: .*{name}"):
            restored({**tensors, name: wrong})


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_parameter_without_a_gradient_is_left_alone(moments):
    ours = parameters_of(torch.bfloat16)
    before, optimizer = {name: p.detach().clone() for name, p in ours.items()}, adamw(ours, moments=moments, **OPTIONS)
    ours["matrix"].grad = torch.ones_like(ours["matrix"])
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert torch.equal(ours["vector"], before["vector"]) and not torch.equal(ours["matrix"], before["matrix"])
    assert {name.partition(".")[0] for name in optimizer_tensors(optimizer, ours)} == {"matrix"}


@pytest.mark.parametrize("moments, bytes_each", [("float32", 10), ("8bit", 4)])
def test_the_state_takes_10_bytes_a_parameter_or_4(moments, bytes_each):
    parameters = {"matrix": torch.nn.Parameter(torch.ones(64, 256).bfloat16())}
    optimizer = adamw(parameters, moments=moments, **OPTIONS)
    walk(optimizer, parameters, range(1))
    taken = sum(tensor.nbytes for tensor in optimizer_tensors(optimizer, parameters).values())
    assert bytes_each <= taken / (64 * 256) < 1.02 * bytes_each


def regression_loss(dtype, moments, steps=400):
    """The loss of a two-layer network that was fitted to noisy numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    y = torch.tanh(x @ torch.randn(16, 4, generator=generator)) + 0.1 * torch.randn(256, 4, generator=generator)
    shapes = {"w1": (16, 48), "b1": (48,), "w2": (48, 4)}
    parameters = {name: torch.nn.Parameter((torch.randn(shape, generator=generator) / 4).to(dtype))
                  for name, shape in shapes.items()}
    optimizer = adamw(parameters, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, moments=moments)
    for _ in range(steps):
        w1, b1, w2 = (p.float() for p in parameters.values())
        loss = (torch.tanh(x @ w1 + b1) @ w2 - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_8_bit_moments_fit_a_regression_nearly_as_well_as_fp32():
    fp32 = regression_loss(torch.float32, "float32")
    assert fp32 < 0.3 * regression_loss(torch.float32, "float32", steps=20)
    for dtype in (torch.float32, torch.bfloat16):
        assert regression_loss(dtype, "8bit") < 1.1 * fp32


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is there")
@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_on_a_device_it_never_waits_and_the_kernel_is_one_launch_a_tensor(moments, backend):
    with AbsentDevice() as device:
        parameters = {name: torch.nn.Parameter(p.detach().to("cuda"))
                      for name, p in parameters_of(torch.bfloat16).items()}
        optimizer = adamw(parameters, moments=moments, backend=backend, **OPTIONS)
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        device.reset()
        optimizer.step()
    assert not device.syncs and not device.copies
    if backend == "triton":
        assert sum(device.launches.values()) == len(parameters)


@pytest.mark.parametrize("writers, readers", [(1, 3), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_state_that_some_processes_wrote_any_number_reads(writers, readers, moments, tmp_path, monkeypatch):
    """Rows as FSDP divides them; those of 256 numbers are whole 8-bit blocks."""
    generator = torch.Generator().manual_seed(0)
    whole = {"matrix": torch.randn(7, 256, generator=generator), "gain": torch.randn(5, generator=generator)}

    def parts(rank, world_size):
        monkeypatch.setattr(training_state, "rank_and_world_size", lambda: (rank, world_size))
        monkeypatch.setattr(optim, "rank_and_world_size", lambda: (rank, world_size))
        rows, found = {}, {}
        for name, x in whole.items():
            chunk = math.ceil(len(x) / world_size)
            found[name] = nn.Parameter(x[rank * chunk:(rank + 1) * chunk].bfloat16())
            rows[name] = min(rank * chunk, len(x)), len(x)
        return found, rows if world_size > 1 else None

    monkeypatch.setattr(training_state, "gather", lambda value: [value])
    monkeypatch.setattr(checkpoint, "rank_and_world_size", lambda: (1, 2))  # rewinds no log
    monkeypatch.setattr(checkpoint, "broadcast", lambda lines: lines)
    written, found = [], []
    for rank in reversed(range(writers)):  # the first one writes state.json
        parameters, rows = parts(rank, writers)
        optimizer = adamw(parameters, moments=moments, **OPTIONS)
        for _ in range(2):
            for p in parameters.values():
                p.grad = p.detach().clone()
            optimizer.step()
        checkpoint.save(tmp_path, parameters, optimizer, {"step": 2, "best_step": 0}, rows)
        written.insert(0, optimizer_tensors(optimizer, parameters))
    for rank in range(readers):
        parameters, rows = parts(rank, readers)
        optimizer = adamw(parameters, moments=moments, **OPTIONS)
        checkpoint.restore(tmp_path, parameters, optimizer, rows)
        found.append(optimizer_tensors(optimizer, parameters))
    for name, x in written[0].items():
        if x.ndim:
            assert torch.equal(torch.cat([part[name] for part in written]), torch.cat([part[name] for part in found]))
        else:
            assert all(part[name] == 2 for part in found)
