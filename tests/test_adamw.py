"""The AdamW update: both backends against fp64 and an fp32 master, the 8-bit codes, and faults planted in the file."""
import importlib.util
from pathlib import Path

import pytest
import torch
from kernel_checks import BACKENDS, assert_as_good_as, assert_compiles, grid

from minixmd.kernels import adamw
from minixmd.learning import optim
from minixmd.models.lora import Linear, add_lora

pytestmark = pytest.mark.usefixtures("on_device")

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEVELS = {"exp_avg": 127, "exp_avg_sq": 255}
SIZES = {"one": (1,), "block - 1": (255,), "block": (256,), "block + 1": (257,), "odd": (37, 81), "programs": (5, 1024)}


def start(module, p, moments):
    layout = module.state_layout(p, moments)
    return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}


def numbers(p, state):
    """The fp32 numbers that a parameter stands for."""
    return adamw.join(p, state["residual"]) if "residual" in state else p.clone()


def moments_of(p, state):
    """The two moments of a state as fp32 numbers."""
    if "exp_avg_scale" not in state:
        return [state[name].clone() for name in LEVELS]
    return [adamw.decode(state[name], state[f"{name}_scale"], levels).view(-1)[:p.numel()].view(p.shape)
            for name, levels in LEVELS.items()]


def eager(w, g, m, v, t, *, lr, betas, eps, weight_decay):
    """One update in PyTorch's own operations, in the dtype of what is given: (w, m, v)."""
    w, m, v = (x.clone() for x in (w, m, v))
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = v.sqrt().div_((1 - beta2**t) ** 0.5).add_(eps)
    return w.mul_(1 - lr * weight_decay).addcdiv_(m, root, value=-lr / (1 - beta1**t)), m, v


def rounded(w):
    """The nearest bf16 numbers of fp32 ones, of two the one farther from zero, in exact arithmetic."""
    low = (w.view(torch.int32) & -0x10000).view(torch.float32).double()
    high = ((w.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
    return torch.where(w.double() - low == 0, low, torch.where((w.double() - low).abs() < (high - w.double()).abs(),
                                                               low, high)).bfloat16()


# ---- what must hold, of any module and backend ----


def check_updates(module, backend, size=(5, 1024), kind="bf16", grad_kind="bf16", moments="8bit"):
    """Three updates, each as good as eager's against fp64 from the same state; 8-bit moments lie within a level."""
    p = torch.randn(size).to(KINDS[kind])
    state = start(module, p, moments)
    for t in range(1, 4):
        g = torch.randn(size).to(KINDS[grad_kind])
        kept = g.clone()
        before = numbers(p, state), *moments_of(p, state)
        module.adamw_update(p, g, state, t, **OPTIONS, backend=backend)
        assert torch.equal(g, kept)
        plain = eager(before[0], g.float(), *before[1:], t, **OPTIONS)
        truth = eager(before[0].double(), g.double(), *(x.double() for x in before[1:]), t, **OPTIONS)
        found = numbers(p, state), *moments_of(p, state)
        assert_as_good_as(found[0], plain[0], truth[0])
        if kind == "bf16":
            assert torch.equal(p, rounded(found[0]))
        for ours, theirs, true in zip(found[1:], plain[1:], truth[1:], strict=True):
            if moments == "float32":
                assert_as_good_as(ours, theirs, true)
            else:
                least = true.abs().max() / 2**15
                assert ((ours - true).abs() <= true.abs() / 7.9 + least).all()
    if moments == "8bit":
        assert all((state[name].view(-1)[p.numel():] == 0).all() for name in LEVELS)  # behind the end


def check_masters(module, backend):
    """Steps at lr 1e-6 are those of an fp32 parameter, to the last bit; ties are rounded away from zero."""
    steps = 500 if backend == "torch" else 60  # the interpreter is slow
    options = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    w = 1 + torch.randn(300) / 2
    w[:100] = ((w[:100].view(torch.int32) & -0x10000) + 0x8000).view(torch.float32)  # half-way
    p, residual = adamw.split(w)
    ours, theirs = start(module, p, "float32"), start(module, w, "float32")
    ours["residual"] = residual
    first = w.clone()
    by_eager = w.clone(), *moments_of(w, theirs)
    for t in range(1, steps + 1):
        g = 0.3 + torch.randn(300)
        g[:50] = 0.0  # those stay where they are: half-way
        module.adamw_update(p, g, ours, t, **options, backend=backend)
        module.adamw_update(w, g, theirs, t, **options, backend=backend)
        by_eager = eager(by_eager[0], g, *by_eager[1:], t, **options)
    assert torch.equal(numbers(p, ours), w) and torch.equal(p, rounded(w))
    assert torch.equal(w[:50], first[:50]) and (w[50:] != first[50:]).all()
    assert (p[:50].float().abs() > first[:50].abs()).all()
    if backend == "torch":
        assert torch.equal(w, by_eager[0])
    torch.testing.assert_close(w, by_eager[0], rtol=1e-6, atol=1e-7)


def check_every_pattern(module, backend):
    """An update by nothing changes no bit of any fp32 number around any bf16 one, and the bf16 one is the nearest."""
    high = torch.arange(-2**15, 2**15, 1 if backend == "torch" else 13, dtype=torch.int32) << 16
    bits = (high[:, None] + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)).view(-1)
    w = bits.view(torch.float32)
    w = w[~w.isnan()]
    high = (w.view(torch.int32) + 0x8000) >> 16
    p = high.short().view(torch.bfloat16)
    state = start(module, p, "float32")
    state["residual"] = (w.view(torch.int32) - (high << 16)).short()
    module.adamw_update(p, torch.zeros_like(w), state, 1, **{**OPTIONS, "lr": 0.0}, backend=backend)
    assert torch.equal(numbers(p, state).view(torch.int32), w.view(torch.int32))
    finite = w.abs() < 3.38e38
    assert torch.equal(p[finite], rounded(w[finite]))
    p = torch.tensor([0x7FC0, -0x8000, 0], dtype=torch.int16).view(torch.bfloat16)
    state = start(module, p, "float32")
    state["residual"] = torch.tensor([0, -1, -1], dtype=torch.int16)  # 0x7FC00000, 0x7FFFFFFF (a GPU's) and 0xFFFFFFFF
    assert numbers(p, state).isnan().all()
    module.adamw_update(p, torch.zeros(3), state, 1, **OPTIONS, backend=backend)
    assert p.isnan().all()


def check_decay(module, backend):
    """Updates without a gradient bring v down to 0.999^updates of what it was, on average."""
    updates = 500 if backend == "torch" else 80
    p = torch.zeros(1024)
    state = start(module, p, "8bit")
    ones = torch.ones(4, 256)
    state["exp_avg_sq"], state["exp_avg_sq_scale"] = adamw.encode(ones, torch.zeros_like(ones, dtype=torch.int32), 255)
    for t in range(1, updates + 1):
        module.adamw_update(p, torch.zeros(1024), state, t, **OPTIONS, backend=backend)
    assert moments_of(p, state)[1].mean().item() == pytest.approx(0.999**updates, rel=0.02)


def check_codes(module, backend):
    """Both moments after one update of a block in which one element is huge, others tiny or zero."""
    g = torch.logspace(0, -12, 240, dtype=torch.float64).float()
    g = torch.cat([g, torch.zeros(16), torch.full((256,), 3e-15), torch.zeros(256)])
    g[1:240:2] *= -1
    p = torch.zeros_like(g)
    state = start(module, p, "8bit")
    module.adamw_update(p, g, state, 1, **OPTIONS, backend=backend)
    m, v = moments_of(p, state)
    exact_m, exact_v = eager(p, g, torch.zeros_like(g), torch.zeros_like(g), 1, **OPTIONS)[1:]
    assert (m[240:256] == 0).all() and (v[240:256] == 0).all() and (m[512:] == 0).all() and (v[512:] == 0).all()
    assert (v[:240] > 0).all() and (v[256:512] > 0).all()
    large = g.abs() > 2.0**-15
    large[256:512] = True
    assert ((m - exact_m).abs() <= exact_m.abs() / 7.9)[large].all()
    assert ((v - exact_v).abs() <= exact_v.abs() / 7.9)[large].all()
    assert (m[:240][g[:240].abs() < 1e-8] == 0).all()  # too small for m; between, 0 or its least
    assert (m[:256].abs() <= 2.0**-15 / 7.9)[~large[:256]].all()
    assert (v[:256] <= 1e-3 * 2.0**-30)[~large[:256]].all()
    assert m[0] >= m[:256].abs().max() and (torch.sign(m) * torch.sign(g) >= 0).all()


def check_unbiased(module, backend):
    """Over many updates' noise a number is right on average, in both moments, and the noise of both is independent."""
    updates = 500 if backend == "torch" else 200
    g = torch.logspace(0, -3, 256, dtype=torch.float64).float()
    exact = eager(torch.zeros(256), g, torch.zeros(256), torch.zeros(256), 1, **OPTIONS)[1:]
    p, off = torch.zeros(256), []
    for t in range(1, updates + 1):
        state = start(module, p, "8bit")
        module.adamw_update(p, g, state, t, **OPTIONS, backend=backend)
        off.append(torch.stack([m / true - 1 for m, true in zip(moments_of(p, state), exact, strict=True)]))
    off = torch.stack(off)  # (updates, 2, 256)
    assert off.abs().max() <= 1 / 8 and off.std(0).max() > 0.02
    assert off.mean(0).abs().max() < 5 * 0.0625 / updates**0.5  # a level is 1/8 wide at most
    assert abs(off.mean()) < 5 * 0.0625 / (updates * 512) ** 0.5
    standard = off / off.std(0).clamp(min=1e-3)
    for a, b in ((standard[:, 0], standard[:, 1]), (standard[1:], standard[:-1]),
                 (standard[:, :, 1:], standard[:, :, :-1])):  # fmt: skip
        assert abs((a * b).mean()) < 0.03  # of both moments, of one update and the next, of neighbours


# ---- and does ----


@pytest.mark.parametrize("size, kind, grad_kind, moments, backend", grid(
    SIZES, list(KINDS), list(KINDS), ["float32", "8bit"], BACKENDS))
def test_an_update_is_as_good_as_eager(size, kind, grad_kind, moments, backend):
    check_updates(adamw, backend, size, kind, grad_kind, moments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", [check_masters, check_every_pattern, check_decay, check_codes])
def test_it_holds(check, backend):
    check(adamw, backend)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_rounding_is_right_on_average(backend):
    check_unbiased(adamw, backend)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_kernel_and_twin_agree_to_the_rounding_of_fp32(moments):
    """Their noise is the same, so hardly a code differs, and none by more than a level."""
    results = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        p = torch.randn(3000).bfloat16()
        state = start(adamw, p, moments)
        for t in range(1, 6):
            adamw.adamw_update(p, torch.randn(3000), state, t, **OPTIONS, backend=backend)
        results.append((numbers(p, state), *moments_of(p, state)))
    for ours, theirs in zip(*results, strict=True):
        close = torch.isclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert close.float().mean() > (0.995 if moments == "8bit" else 0.9999)
        assert torch.allclose(ours, theirs, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_the_twins_chunks_change_no_bit(moments, monkeypatch):
    results = []
    for chunk in (adamw.CHUNK, 2):
        monkeypatch.setattr(adamw, "CHUNK", chunk)
        torch.manual_seed(0)
        p = torch.randn(5, 300).bfloat16()
        state = start(adamw, p, moments)
        for t in range(1, 4):
            adamw.adamw_update(p, torch.randn(5, 300), state, t, **OPTIONS, backend="torch")
        results.append({"p": p, **state})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_noise_is_the_same_for_the_same_update_and_element_only():
    noise = [adamw.rounding_noise(block, 2, seed, "cpu") for block, seed in ((0, 5), (0, 5), (adamw.CHUNK, 5), (0, 6))]
    for first, again, *others in zip(*noise, strict=True):
        assert torch.equal(first, again) and first.min() >= 0 and first.max() < 2**20
        assert all((first == other).float().mean() < 0.01 for other in others)
        assert (first.double().mean() / 2**20 - 0.5).abs() < 0.05
    many = torch.cat(adamw.rounding_noise(2**23 - adamw.CHUNK, 64, 2**31 - 1, "cpu"))  # up to element 2^31
    assert many.min() >= 0 and many.max() < 2**20


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_with_gaps_is_read_right_and_nothing_is_nothing(backend):
    p, wide = torch.randn(6, 5), torch.randn(5, 12)
    results = []
    for g in (wide.T[::2], wide.T[::2].contiguous()):
        q, state = p.clone(), start(adamw, p, "8bit")
        adamw.adamw_update(q, g, state, 1, **OPTIONS, backend=backend)
        results.append(q)
    assert torch.equal(*results) and not torch.equal(results[0], p)
    empty = torch.zeros(0, 3)
    adamw.adamw_update(empty, empty, start(adamw, empty, "8bit"), 1, **OPTIONS, backend=backend)


def test_what_does_not_fit_is_refused():
    p, half = torch.ones(4, 6), torch.ones(4, 6).bfloat16()
    state, small = start(adamw, p, "float32"), start(adamw, half, "8bit")
    for q, g, s, backend, says in (
        (p.T, p.T, state, "torch", "needs a contiguous parameter"),
        (p, p[:3], state, "torch", "a gradient of its shape"),
        (p.half(), p, state, "torch", "fp32 or bf16, got .* of torch.float16"),
        (p, p.half(), state, "torch", "fp32 or bf16"),
        (p, p, state, "cuda", "backend must be 'triton' or 'torch', got 'cuda'"),
        (half, p, state, "torch", "residual must be .* of torch.int16, contiguous, got none"),
        (p, p, {"exp_avg": state["exp_avg"]}, "triton", "exp_avg_sq must be .* of torch.float32, contiguous, got none"),
        (half, p, {**small, "exp_avg": state["exp_avg"]}, "torch", r"exp_avg must be \(1, 256\) of torch.uint8"),
        (half, p, {**small, "exp_avg_sq_scale": torch.ones(2)}, "torch", r"exp_avg_sq_scale must be \(1,\) of"),
        (p, p, {**state, "exp_avg": torch.ones(6, 4).T}, "torch", "exp_avg must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            adamw.adamw_update(q, g, s, 1, **OPTIONS, backend=backend)


# ---- planted faults: (what is written in its place, the check that sees it) of each backend ----

BITS, TIES = "high = (bits + 0x8000) >> 16", "high = (bits + 0x7FFF) >> 16"
LEAST = "(size > 0).to(tl.int32) if LEVELS == V_LEVELS else 0"
NOISE, SAME_NOISE = "(h & 0xFFFF) << 4 | 8\n\n", "(h >> 16 & 0xFFFF) << 4 | 8\n\n"
FAULTS = {
    "rounding to the nearest, twin": ("torch", "noise_CB) >> 20", "0x80000) >> 20", check_decay),
    "rounding to the nearest, kernel": ("triton", "noise.to(tl.int32)) >> 20", "0x80000) >> 20", check_decay),
    "rounding down, twin": ("torch", "noise_CB) >> 20", "0) >> 20", check_unbiased),
    "rounding down, kernel": ("triton", "noise.to(tl.int32)) >> 20", "0) >> 20", check_unbiased),
    "one noise for both, twin": ("torch", NOISE, SAME_NOISE, check_unbiased),
    "the noise of every update the same, twin": ("torch", "seed, size = t *", "seed, size = 1 *", check_unbiased),
    "a tiny v held as 0, twin": ("torch", "(levels == V_LEVELS.value)", "0", check_codes),
    "a tiny v held as 0, kernel": ("triton", LEAST, "0", check_codes),
    "a tiny m held as the least, kernel": ("triton", LEAST, "(size > 0).to(tl.int32)", check_codes),
    "a scale rounded down, twin": ("torch", "amax(1) + 0xFFFFF", "amax(1)", check_codes),
    "a scale rounded down, kernel": ("triton", "tl.max(size, 1) + 0xFFFFF", "tl.max(size, 1)", check_codes),
    "no sign, twin": ("torch", "bits_CB >> 24 & 0x80", "0", check_codes),
    "no sign, kernel": ("triton", "(bits >> 24) & 0x80", "0", check_codes),
    "truncated, twin": ("torch", BITS, "high = bits >> 16", check_masters),
    "truncated, kernel": ("triton", BITS, "high = bits >> 16", check_every_pattern),
    "ties to zero, twin": ("torch", BITS, TIES, check_masters),
    "ties to zero, kernel": ("triton", BITS, TIES, check_masters),
    "a NaN lost, twin": ("torch", ".masked_fill(w.isnan(), 0x7FC00000)", "", check_every_pattern),
    "a NaN lost, kernel": ("triton", "tl.where(w != w, 0x7FC00000, w.to(tl.int32, bitcast=True))",
                           "w.to(tl.int32, bitcast=True)", check_every_pattern),
    "a residual left out, twin": ("torch", "<< 16) + residual)", "<< 16))", check_masters),
    "a residual left out, kernel": ("triton", "<< 16) + residual)", "<< 16))", check_masters),
    "no bias correction, twin": ("torch", ".div_(root_divisor)", "", check_updates),
    "no bias correction, kernel": ("triton", "tl.div_rn(tl.sqrt_rn(v), tl.cast(root_divisor, tl.float32))",
                                   "tl.sqrt_rn(v)", check_updates),
    "no decay, kernel": ("triton", "w = w * tl.cast(decay, tl.float32) +", "w = w +", check_updates),
    "programs that overlap, kernel": ("triton", "tl.int64) * ROWS +", "tl.int64) +", check_updates),
}  # fmt: skip


def is_slow(fault):
    backend, _, _, check = FAULTS[fault]
    return backend == "triton" and check in (check_decay, check_unbiased)  # in the interpreter


@pytest.mark.parametrize("fault", [
    pytest.param(fault, marks=pytest.mark.slow if is_slow(fault) else ()) for fault in FAULTS])
def test_a_planted_fault_is_seen(fault, tmp_path):
    backend, right, wrong, check = FAULTS[fault]
    text = Path(adamw.__file__).read_text()
    assert text.count(right) >= 1
    at = text.rindex(right) if backend == "triton" else text.index(right)
    path = tmp_path / "faulty_adamw.py"
    path.write_text(text[:at] + wrong + text[at + len(right):])
    spec = importlib.util.spec_from_file_location("faulty_adamw", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError):
        check(module, backend)


@pytest.mark.slow
def test_the_kernel_compiles_without_spills():
    assert_compiles("adamw")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_update_is_seen_by_what_keeps_casts_of_a_parameter(backend):
    layer = Linear(8, 8)
    layer.backend = backend
    add_lora(torch.nn.ModuleDict({"layer": layer}), rank=2, alpha=2.0, targets="layer", seed=0)
    optimizer = optim.adamw({"A": layer.lora_A, "B": layer.lora_B}, lr=0.1, betas=(0.9, 0.999), eps=1e-8,
                            weight_decay=0.0, moments="8bit", backend=backend)
    x_ND, outputs = torch.randn(4, 8, dtype=torch.bfloat16), []
    layer.weight.data = layer.weight.data.bfloat16()
    layer.bias.data = layer.bias.data.bfloat16()
    for _ in range(2):
        y_ND = layer(x_ND)
        outputs.append(y_ND.detach())
        y_ND.float().square().sum().backward()
        optimizer.step()
    assert (outputs[1] - outputs[0]).abs().max() > 0.01
