"""GRPO's loss against TRL's formulas, written out here in fp64, and against its own twin; gradients and diagnostics."""
from dataclasses import dataclass

import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as, assert_compiles, grid

from minixmd.kernels.grpo import ClipConfig, grpo_coefficient, grpo_loss_ref, grpo_rows, grpo_terms
from minixmd.kernels.logit_rows import BLOCK_V
from minixmd.kernels.logprob import logits_grad, row_stats, token_logprob_ref

SIZES = [(0, 5), (1, 1), (3, BLOCK_V), (2, BLOCK_V + 1), (70, 123), (5, 3 * BLOCK_V + 17)]
CLIP_CONFIGS = {"k3": ClipConfig(0.2, 0.28, 0.04, "k3"), "k1": ClipConfig(0.1, 0.3, 0.5, "k1"),
                "no KL": ClipConfig(0.2, 0.2, 0.0, "k3")}  # fmt: skip


@dataclass
class Case:
    logits_NV: torch.Tensor
    id_N: torch.Tensor
    old_N: torch.Tensor
    ref_N: torch.Tensor
    advantage_N: torch.Tensor
    weight_N: torch.Tensor

    @property
    def vectors(self):
        return self.id_N, self.old_N, self.ref_N, self.advantage_N, self.weight_N


def case(logits_NV, temperature=1.0, suppressed_Z=None, vocab_limit=None):
    """Old and reference log-probs around the row's own: ratios from 0.6 to 1.6, advantages of both signs."""
    N, V = logits_NV.shape
    device, suppressed = logits_NV.device, set() if suppressed_Z is None else set(suppressed_Z.tolist())
    allowed = torch.tensor(sorted(set(range(vocab_limit or V)) - suppressed), device=device)
    id_N = allowed[torch.randint(0, len(allowed), (N,), device=device)]
    logp_N = token_logprob_ref(logits_NV.double(), id_N, temperature, suppressed_Z, vocab_limit)[0].float()
    advantage_N = torch.randn(N, device=device)
    weight_N = torch.rand(N, device=device) + 0.1
    weight_N[3::5] = 0
    return Case(logits_NV, id_N, logp_N + torch.rand(N, device=device) - 0.5, logp_N + torch.randn(N, device=device),
                advantage_N, weight_N)


def check(backend, c, clip_config, *args):
    """The backend is as good as eager autograd of the twin: loss, log-prob, entropy, terms, gradient."""
    before_NV, out_NV = c.logits_NV.clone(), torch.empty_like(c.logits_NV)
    logp_N, entropy_N, terms = grpo_rows(c.logits_NV, *c.vectors, clip_config, *args, backend=backend, out=out_NV)
    runs = [((terms[0] * c.weight_N).sum(), logp_N, entropy_N, *terms, out_NV)]
    assert torch.equal(c.logits_NV, before_NV)
    for x in (c.logits_NV, c.logits_NV.double()):
        x = x.detach().requires_grad_()  # no clone, which would pack the rows
        loss, logp_N, entropy_N, terms = grpo_loss_ref(x, *c.vectors, clip_config, *args)
        loss.backward()
        runs.append((loss.detach(), logp_N, entropy_N, *terms, x.grad))
    for ours, eager, truth in zip(*runs, strict=True):
        assert_as_good_as(ours, eager, truth, cond=8)  # logp, up to 8 or so, loses its rounding in logp - old
    return runs[0]


@pytest.mark.parametrize("size, clip_config, dtype, backend", grid(SIZES, CLIP_CONFIGS, DTYPES, BACKENDS))
def test_loss_gradient_and_diagnostics_at_sizes_around_a_block(size, clip_config, dtype, backend, device):
    logits_NV = torch.randn(size, device=device).to(dtype)
    check(backend, case(logits_NV, 0.7), clip_config, 0.7)


@pytest.mark.parametrize("dtype, backend", grid(DTYPES, BACKENDS))
def test_rows_that_break_an_online_softmax(dtype, backend, device):
    V = 2 * BLOCK_V + 5
    alone_V, late_V = torch.full((V,), -torch.inf), torch.randn(V)
    alone_V[V - 2] = -7.0
    late_V[:BLOCK_V + 3] = -torch.inf
    rows = [(torch.linspace(-1e4, 1e4, V), V - 1), (torch.linspace(1e4, -1e4, V), 0), (alone_V, V - 2),
            (torch.where(torch.arange(V) % 2 == 0, 1e4, -1e4), 2), (late_V, V - 1), (torch.ones(V) * 9, 3)]
    c = case(torch.stack([row for row, _ in rows]).to(device, dtype))
    c.id_N = torch.tensor([index for _, index in rows], device=device)
    logp_N = token_logprob_ref(c.logits_NV.double(), c.id_N)[0].float()
    c.old_N, c.ref_N, c.weight_N = logp_N - 0.1, logp_N + 0.3, torch.ones_like(c.weight_N)
    check(backend, c, CLIP_CONFIGS["k3"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("listed, vocab_limit", [([0, BLOCK_V - 1, BLOCK_V], None), (None, BLOCK_V),
                                                 ([2], BLOCK_V + 7)])
def test_suppressed_ids_count_for_nothing_whatever_they_hold(listed, vocab_limit, backend, device):
    V = 2 * BLOCK_V + 9
    suppressed_Z = None if listed is None else torch.tensor(listed, device=device).repeat_interleave(2)[::2]  # apart
    out = (listed or []) + list(range(V if vocab_limit is None else vocab_limit, V))
    logits_NV = torch.randn(5, V, device=device)
    logits_NV[:, out] = 1e4
    c = case(logits_NV, 0.7, suppressed_Z, vocab_limit)
    options = CLIP_CONFIGS["k3"], 0.7, suppressed_Z, vocab_limit
    before = check(backend, c, *options)
    c.logits_NV[:, out] = torch.nan
    grad_NV = torch.full_like(logits_NV, torch.nan)
    logp_N, _, _ = grpo_rows(c.logits_NV, *c.vectors, *options, backend, grad_NV)
    assert torch.equal(logp_N, before[1]) and (grad_NV[:, out] == 0).all() and grad_NV.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("held", [-torch.inf, torch.nan])
def test_a_token_without_weight_counts_for_nothing_whatever_its_row_holds(held, backend, device):
    c = case(torch.randn(3, BLOCK_V + 1, device=device))
    c.weight_N[1], c.logits_NV[1, c.id_N[1]] = 0, held
    grad_NV = torch.full_like(c.logits_NV, torch.nan)
    _, _, (loss_N, ratio_N, clipped_N, kl_N) = grpo_rows(c.logits_NV, *c.vectors, CLIP_CONFIGS["k3"], backend=backend,
                                                         out=grad_NV)
    assert (loss_N * c.weight_N).sum().isfinite() and grad_NV.isfinite().all() and (grad_NV[1] == 0).all()
    assert ratio_N[1] == clipped_N[1] == kl_N[1] == loss_N[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [pytest.param(152_064, marks=pytest.mark.slow), 156_032])
def test_the_real_vocabularies(V, backend, device):
    suppressed_Z, vocab_limit = torch.tensor([151_643, 151_644, *range(151_646, 151_657)], device=device), 151_665
    c = case(4 * torch.randn(2, V, device=device), 0.9, suppressed_Z, vocab_limit)
    check(backend, c, CLIP_CONFIGS["k3"], 0.9, suppressed_Z, vocab_limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_lie_apart_in_memory_and_vectors_too(backend, device):
    wide = torch.full((12, BLOCK_V + 16), torch.nan, device=device)
    wide[:, :BLOCK_V + 3] = torch.randn(12, BLOCK_V + 3, device=device)
    c = case(wide[:, :BLOCK_V + 3])
    check(backend, Case(c.logits_NV[::2], *(x[::2] for x in c.vectors)), CLIP_CONFIGS["k3"])


# ---- against TRL's formulas ----


def trl_loss(logits_BTV, ids_BT, old_BT, ref_BT, advantage_B, mask_BT, clip_config, temperature, level, aggregation):
    """The loss as TRL's GRPOTrainer._compute_loss states it, in the tensors' own dtype."""
    logps_BT = (logits_BTV / temperature).log_softmax(-1).gather(2, ids_BT[..., None]).squeeze(2)
    log_ratio_BT = logps_BT - old_BT
    if level == "sequence":
        log_ratio_BT = (log_ratio_BT * mask_BT).sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    coef_1 = log_ratio_BT.exp()
    coef_2 = coef_1.clamp(1 - clip_config.clip_low, 1 + clip_config.clip_high)
    loss_BT = -torch.min(coef_1 * advantage_B[:, None], coef_2 * advantage_B[:, None])
    kl_BT = (ref_BT - logps_BT).exp() - (ref_BT - logps_BT) - 1
    loss_BT = loss_BT + clip_config.beta * kl_BT
    if aggregation == "grpo":
        return ((loss_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)).mean()
    if aggregation == "bnpo":
        return (loss_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)
    return (loss_BT * mask_BT).sum() / mask_BT.numel()  # dr_grpo: a constant


def weights(mask_BT, aggregation):
    """What row weights say the same."""
    divisor = {"grpo": len(mask_BT) * mask_BT.sum(-1, keepdim=True).clamp(min=1), "bnpo": mask_BT.sum(),
               "dr_grpo": mask_BT.numel()}  # fmt: skip
    return mask_BT / divisor[aggregation]


@pytest.mark.parametrize("backend, level, aggregation",
                         grid(BACKENDS, ["token", "sequence"], ["grpo", "bnpo", "dr_grpo"]))
def test_loss_and_gradient_equal_trls_for_every_level_and_aggregation(backend, level, aggregation, device):
    B, T, V, temperature, clip_config = 8, 7, 33, 0.7, ClipConfig(0.1, 0.14, 0.04, "k3")
    logits_BTV = torch.randn(B, T, V, device=device)
    ids_BT = torch.randint(0, V, (B, T), device=device)
    logp_BT = (logits_BTV / temperature).log_softmax(-1).gather(2, ids_BT[..., None]).squeeze(2)
    shift_B1 = torch.linspace(-0.4, 0.4, B, device=device)[:, None]  # so that sequences are clipped as well as tokens
    old_BT = logp_BT + shift_B1 + 0.2 * torch.randn(B, T, device=device)
    ref_BT = logp_BT + 0.3 * torch.randn(B, T, device=device)
    advantage_B = torch.tensor([1.0, -1.5] * (B // 2), device=device).roll(1) * torch.rand(B, device=device).add(0.5)
    mask_BT = (torch.arange(T, device=device) < torch.tensor([7, 3, 1, 0, 5, 7, 2, 6], device=device)[:, None]).float()
    old_BT, ref_BT = (x.masked_fill(mask_BT == 0, 5.0) for x in (old_BT, ref_BT))  # what padding holds is no matter

    truth_BTV = logits_BTV.double().requires_grad_()
    want = trl_loss(truth_BTV, ids_BT, *(x.double() for x in (old_BT, ref_BT, advantage_B, mask_BT)), clip_config,
                    temperature, level, aggregation)
    want.backward()
    advantage_N, weight_N = advantage_B.repeat_interleave(T), weights(mask_BT, aggregation).flatten()
    logits_NV, vectors = logits_BTV.reshape(B * T, V), (ids_BT.flatten(), old_BT.flatten(), ref_BT.flatten(),
                                                        advantage_N, weight_N)
    grad_NV = torch.full_like(logits_NV, torch.nan)
    if level == "token":
        _, _, (loss_N, _, clipped_N, _) = grpo_rows(logits_NV, *vectors, clip_config, temperature, backend=backend,
                                                    out=grad_NV)
    else:
        stats = row_stats(logits_NV, vectors[0], temperature, backend=backend)
        sequence_N = torch.arange(B, device=device).repeat_interleave(T)
        c_N, (loss_N, _, clipped_N, _) = grpo_coefficient(stats[0], *vectors[1:], clip_config, sequence_N)
        logits_grad(logits_NV, vectors[0], stats, c_N, temperature, backend=backend, out=grad_NV)
        twin = grpo_loss_ref(logits_NV, *vectors, clip_config, temperature, sequence_N=sequence_N)
        torch.testing.assert_close(twin[0], (loss_N * weight_N).sum(), atol=1e-6, rtol=0)
    torch.testing.assert_close((loss_N * weight_N).sum().double(), want.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(grad_NV.double(), truth_BTV.grad.view(B * T, V), atol=2e-8, rtol=1e-5)
    clipped, up = clipped_N > 0, advantage_N > 0
    assert (clipped & up).any() and (clipped & ~up).any() and (~clipped & up & (weight_N > 0)).any()


# ---- properties ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clip_by_hand(backend, device):
    """Two equal logits: p = 1/2. Ratios 1.5 and 0.5, advantages 2 and -2, bounds 0.8 and 1.28."""
    ratio_N, advantage_N = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.5]), torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, 2.0])
    weight_N = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.25, 0.0])
    vectors = torch.zeros(6, dtype=torch.long), (0.5 / ratio_N).log(), None, advantage_N, weight_N
    grad_NV = torch.empty(6, 2, device=device)
    _, _, terms = grpo_rows(torch.zeros(6, 2, device=device), *(x if x is None else x.to(device) for x in vectors),
                            ClipConfig(0.2, 0.28, 0.0, "k3"), backend=backend, out=grad_NV)
    close = {"atol": 1e-6, "rtol": 0}
    loss_N, ratio_N, clipped_N, kl_N = terms
    torch.testing.assert_close(loss_N.cpu(), torch.tensor([-2.56, 3.0, -1.0, 1.6, -2.0, 0.0]), **close)
    torch.testing.assert_close(ratio_N.cpu(), torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 0.0]), **close)
    assert clipped_N.tolist() == [1, 0, 0, 1, 0, 0] and kl_N.tolist() == [0] * 6
    torch.testing.assert_close(grad_NV[:, 0].cpu(), torch.tensor([0.0, 1.5, -0.5, 0.0, -0.25, 0.0]), **close)
    assert torch.equal(grad_NV[:, 1], -grad_NV[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_weight_zero_counts_for_nothing_whatever_its_vectors_hold(backend, device):
    c = case(torch.randn(6, 50, device=device))
    c.weight_N[:] = 1
    c.weight_N[[1, 4]] = 0
    grads = []
    for filler in (0.0, torch.nan, torch.inf):
        for x in (c.old_N, c.ref_N, c.advantage_N):
            x[[1, 4]] = filler
        grad_NV = torch.full_like(c.logits_NV, torch.nan)
        _, _, terms = grpo_rows(c.logits_NV, *c.vectors, CLIP_CONFIGS["k3"], backend=backend, out=grad_NV)
        sequence_N = torch.tensor([0, 0, 0, 1, 1, 2], device=device)
        c_N, others = grpo_coefficient(c.old_N, c.old_N, *c.vectors[2:], CLIP_CONFIGS["k3"], sequence_N)
        assert all((x[[1, 4]] == 0).all() for x in (*terms, *others, grad_NV, c_N))
        assert all(x.isfinite().all() for x in (*terms, *others, c_N))
        grads.append(grad_NV)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_is_never_hidden(backend, device):
    c = case(torch.randn(2, 50, device=device))
    c.logits_NV[0, 3], c.weight_N[:] = torch.nan, 1
    for clip_config in CLIP_CONFIGS.values():
        c.ref_N = None if clip_config.beta == 0 else c.ref_N  # with one, the NaN would come by way of the KL
        grad_NV = torch.zeros_like(c.logits_NV)
        logp_N, _, terms = grpo_rows(c.logits_NV, *c.vectors, clip_config, backend=backend, out=grad_NV)
        assert logp_N.isnan().tolist() == terms[0].isnan().tolist() == [True, False]
        assert grad_NV[0].isnan().all() and grad_NV[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_the_gradient_is_reinforces_and_the_kl_is_zero(backend, device):
    c = case(torch.randn(4, 60, device=device))
    stats = row_stats(c.logits_NV, c.id_N, backend=backend)
    c.old_N = c.ref_N = stats[0]
    grad_NV = torch.empty_like(c.logits_NV)
    _, _, terms = grpo_rows(c.logits_NV, *c.vectors, CLIP_CONFIGS["k3"], backend=backend, out=grad_NV)
    assert (terms[3].abs() < 1e-6).all()
    want_NV = logits_grad(c.logits_NV, c.id_N, stats, -c.advantage_N * c.weight_N, backend=backend)
    torch.testing.assert_close(grad_NV, want_NV, atol=1e-7, rtol=1e-5)


def test_sequences_of_one_row_are_tokens():
    c = case(torch.randn(9, 20))
    logp_N = row_stats(c.logits_NV, c.id_N, backend="torch")[0]
    for clip_config in CLIP_CONFIGS.values():
        token, sequence = (grpo_coefficient(logp_N, *c.vectors[1:], clip_config, s) for s in (None, torch.arange(9)))
        assert torch.equal(token[0], sequence[0])
        assert all(torch.equal(x, y) for x, y in zip(token[1], sequence[1], strict=True))


def test_the_coefficient_is_the_gradient_of_the_terms():
    c = case(torch.randn(9, 20))
    logp_N = row_stats(c.logits_NV, c.id_N, backend="torch")[0].requires_grad_()
    (grpo_terms(logp_N, *c.vectors[1:], CLIP_CONFIGS["k3"])[0] * c.weight_N).sum().backward()
    c_N, _ = grpo_coefficient(logp_N, *c.vectors[1:], CLIP_CONFIGS["k3"])
    assert torch.equal(c_N, logp_N.grad) and not c_N.requires_grad


@pytest.mark.parametrize("dtype, backend", grid(DTYPES, BACKENDS))
def test_the_gradient_is_written_to_the_given_tensor(backend, dtype, device):
    c = case(torch.randn(4, BLOCK_V + 9, device=device).to(dtype))
    exact_NV = torch.full((4, 2 * BLOCK_V), torch.nan, device=device)[:, :BLOCK_V + 9]  # fp32, rows apart
    with_out = grpo_rows(c.logits_NV, *c.vectors, CLIP_CONFIGS["k3"], backend=backend, out=exact_NV)
    half_NV = torch.empty(c.logits_NV.shape, device=device).half()
    grpo_rows(c.logits_NV, *c.vectors, CLIP_CONFIGS["k3"], backend=backend, out=half_NV)
    assert torch.equal(exact_NV.half(), half_NV) and exact_NV.isfinite().all()
    full_NV = torch.empty(c.logits_NV.shape, device=device)
    grpo_rows(c.logits_NV.float(), *c.vectors, CLIP_CONFIGS["k3"], backend=backend, out=full_NV)
    assert torch.equal(exact_NV, full_NV)  # never rounded on the way
    without = grpo_rows(c.logits_NV, *c.vectors, CLIP_CONFIGS["k3"], backend=backend)
    for x, y in zip((*with_out[:2], *with_out[2]), (*without[:2], *without[2]), strict=True):
        assert torch.equal(x, y)
    own_NV = c.logits_NV.clone()
    grpo_rows(own_NV, *c.vectors, CLIP_CONFIGS["k3"], backend=backend, out=own_NV)
    assert torch.equal(own_NV, exact_NV.to(dtype))


@pytest.mark.parametrize("change, message", [
    ({"logits_NV": torch.ones(8, 4).T}, "unit stride"), ({"old_N": torch.ones(3)}, r"\(3,\)"),
    ({"ref_N": None}, "beta 0.04"), ({"temperature": -1.0}, "got -1.0"), ({"vocab_limit": 9}, r"\[1, 8\]"),
    ({"backend": "cuda"}, "'cuda'"), ({"out": torch.ones(4, 9)}, "out must be"),
])  # fmt: skip
def test_bad_input_is_refused(change, message):
    one_N = torch.ones(4)
    good = {"logits_NV": torch.ones(4, 8), "id_N": one_N.long(), "old_N": one_N, "ref_N": one_N, "advantage_N": one_N,
            "weight_N": one_N, "clip_config": CLIP_CONFIGS["k3"]}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        grpo_rows(**good | change)
    with pytest.raises(ValueError, match="'k2'"):
        ClipConfig(0.2, 0.2, 0.0, "k2")


@pytest.mark.slow
def test_the_kernel_compiles_as_shipped_without_a_spill():
    assert_compiles("grpo")
