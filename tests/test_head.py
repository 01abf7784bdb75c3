"""The chunked LM head against torch's cross_entropy in fp64: value, both gradients, work done and memory held."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import Largest, cross_entropy
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("on_device")


def problem(T, V, D=24, dtype=torch.float32, seed=0):
    """hidden_ND, head_VD and targets: about a third of the rows repeat, weights are uneven and a few are zero."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    hidden_ND = torch.randn(T + 3, D, generator=g).to(dtype)
    head_VD = torch.randn(V, D, generator=g).to(dtype)
    weight_T = torch.rand(T, generator=g) + 0.1
    weight_T[2::5] = 0
    targets = SimpleNamespace(target_row_T=torch.randint(0, max(1, T), (T,), generator=g),
                              target_id_T=torch.randint(0, V, (T,), generator=g), target_weight_T=weight_T)
    return hidden_ND, head_VD, targets


def plain(hidden_ND, head_VD, batch, chunk=None):
    """The same by torch: all logits at once."""
    logits_TV = hidden_ND[batch.target_row_T] @ head_VD.T
    if logits_TV.dtype != torch.float64:
        logits_TV = logits_TV.float()
    nll_T = F.cross_entropy(logits_TV, batch.target_id_T, reduction="none")
    return (nll_T * batch.target_weight_T).sum(), nll_T


def results(function, hidden_ND, head_VD, batch, train_head=True, chunk=1024, dtype=None):
    """Loss, every nll, dHidden and (if the head trains) dWeight, for an incoming gradient of 1.7."""
    hidden_ND = hidden_ND.to(dtype or hidden_ND.dtype, copy=True).requires_grad_()
    head_VD = head_VD.to(dtype or head_VD.dtype, copy=True).requires_grad_(train_head)
    loss, nll_T = function(hidden_ND, head_VD, batch, chunk)
    (1.7 * loss).backward()
    return [loss.detach(), nll_T.detach(), hidden_ND.grad] + ([head_VD.grad] if train_head else [])


def assert_as_good_as(ours, eager, truth, cond):
    """The error may be twice eager's plus rounding; cond is the largest |logit|, of which exp(z - lse) loses eps."""
    assert torch.isfinite(ours).all() and ours.shape == truth.shape
    error, base = ((x.double() - truth).abs().max().item() for x in (ours, eager))
    eps, scale = torch.finfo(torch.float32).eps, truth.abs().max().item()
    assert error <= 2 * base + 4 * eps * (scale + min(cond, 30)), f"error {error:.2e}, eager's {base:.2e}"


@pytest.mark.parametrize("train_head", [True, False], ids=["training head", "frozen head"])
@pytest.mark.parametrize("T, V, chunk", [(1, 2, 1), (1, 97, 1024), (7, 97, 1), (7, 101, 7), (64, 333, 64),
                                         (65, 333, 64), (65, 1023, 16), (130, 97, 64), (65, 97, 1000)])
def test_value_and_gradients_equal_torchs_cross_entropy_in_fp64(T, V, chunk, train_head):
    hidden_ND, head_VD, batch = problem(T, V)
    ours = results(cross_entropy, hidden_ND, head_VD, batch, train_head, chunk)
    eager = results(plain, hidden_ND, head_VD, batch, train_head)
    truth = results(plain, hidden_ND, head_VD, batch, train_head, dtype=torch.float64)
    cond = (hidden_ND @ head_VD.T).abs().max().item()
    for a, b, c in zip(ours, eager, truth, strict=True):
        assert_as_good_as(a, b, c, cond)


def test_the_chunk_size_changes_nothing_beyond_rounding():
    hidden_ND, head_VD, batch = problem(50, 97)
    first, *others = (results(cross_entropy, hidden_ND, head_VD, batch, chunk=chunk) for chunk in (50, 1, 7, 49, 1024))
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_logits_of_ten_thousand_stay_finite_and_exact():
    hidden_ND, head_VD, batch = problem(20, 97)
    hidden_ND[:5] *= 1e4 / (hidden_ND[:5] @ head_VD.T).abs().amax(-1, keepdim=True)
    batch.target_row_T = torch.arange(20)
    batch.target_weight_T = torch.ones(20)
    z_NV = hidden_ND @ head_VD.T
    batch.target_id_T[0], batch.target_id_T[1] = z_NV[0].argmin(), z_NV[1].argmax()  # nll of about 20,000 and of 0
    ours = results(cross_entropy, hidden_ND, head_VD, batch, chunk=8)
    eager = results(plain, hidden_ND, head_VD, batch)
    truth = results(plain, hidden_ND, head_VD, batch, dtype=torch.float64)
    assert truth[1][0] > 1e4 and truth[1][1] < 1e-6 and abs(z_NV[:5]).amax() > 9999
    for a, b, c in zip(ours, eager, truth, strict=True):
        assert_as_good_as(a, b, c, 1e4)


@pytest.mark.parametrize("train_head", [True, False], ids=["training head", "frozen head"])
def test_bf16_weights_give_fp32_losses_and_bf16_gradients(train_head):
    hidden_ND, head_VD, batch = problem(33, 97, dtype=torch.bfloat16)
    ours = results(cross_entropy, hidden_ND, head_VD, batch, train_head, chunk=8)
    truth = results(plain, hidden_ND, head_VD, batch, train_head, dtype=torch.float64)  # of the same quantised inputs
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [torch.bfloat16] * (len(ours) - 2)
    for a, b in zip(ours[:2], truth[:2], strict=True):  # products of bf16 are exact in fp32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[2:], truth[2:], strict=True):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()  # a rounding or two of 2^-9


def test_inputs_need_not_be_contiguous_and_are_left_alone():
    hidden_ND, head_VD, batch = problem(20, 97)
    views = hidden_ND.T.contiguous().T, torch.cat([head_VD, head_VD], 1)[:, : head_VD.shape[1]]
    kept = [view.clone() for view in views]
    strided, whole = results(cross_entropy, *views, batch), results(cross_entropy, hidden_ND, head_VD, batch)
    for a, b in zip(strided, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(view, copy) for view, copy in zip(views, kept, strict=True))


def test_a_target_of_weight_zero_is_scored_but_teaches_nothing():
    hidden_ND, head_VD, batch = problem(4, 97)
    batch.target_row_T, batch.target_weight_T = torch.arange(4), torch.tensor([1.0, 0.0, 1.0, 0.0])
    _, nll_T, grad_ND, grad_VD = results(cross_entropy, hidden_ND, head_VD, batch)
    assert (nll_T > 0).all() and not grad_ND[[1, 3]].any() and grad_ND[[0, 2]].any(dim=1).all()
    batch.target_row_T, batch.target_id_T = batch.target_row_T[::2], batch.target_id_T[::2]
    batch.target_weight_T = torch.ones(2)
    torch.testing.assert_close(grad_VD, results(cross_entropy, hidden_ND, head_VD, batch)[3])


def test_a_row_that_predicts_two_tokens_gets_the_sum_of_their_gradients():
    hidden_ND, head_VD, batch = problem(2, 97)
    batch.target_row_T, batch.target_id_T = torch.tensor([1, 1]), torch.tensor([3, 8])
    batch.target_weight_T = torch.ones(2)
    grad_ND = results(cross_entropy, hidden_ND, head_VD, batch)[2]
    p_V = (hidden_ND[1] @ head_VD.T).softmax(-1)
    torch.testing.assert_close(grad_ND[1], 1.7 * (2 * p_V @ head_VD - head_VD[3] - head_VD[8]))
    assert not grad_ND[[0, 2, 3, 4]].any()


def test_uniform_logits_cost_log_v_nats():
    batch = problem(6, 97)[2]
    loss, nll_T = cross_entropy(torch.zeros(9, 24), torch.randn(97, 24), batch)
    assert nll_T.tolist() == pytest.approx([4.574711] * 6)  # log 97
    assert loss.item() == pytest.approx(4.574711 * batch.target_weight_T.sum().item())


def test_the_single_losses_are_detached_and_a_frozen_head_gets_no_gradient():
    hidden_ND, head_VD, batch = problem(6, 97)
    hidden_ND.requires_grad_()
    loss, nll_T = cross_entropy(hidden_ND, head_VD, batch)
    assert loss.requires_grad and not nll_T.requires_grad
    loss.backward()
    assert head_VD.grad is None and hidden_ND.grad is not None


def test_a_batch_without_targets_is_an_error():
    hidden_ND, head_VD, batch = problem(0, 97)
    with pytest.raises(ValueError, match="no target"):
        cross_entropy(hidden_ND, head_VD, batch)


# ---- work and memory ----


def products(train_hidden, train_head, chunk=16, T=50, V=97, D=24):
    """Matrix products of T x D x V that a step takes, counted in FLOPs."""
    hidden_ND, head_VD, batch = problem(T, V, D)
    hidden_ND.requires_grad_(train_hidden)
    head_VD.requires_grad_(train_head)
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # unknown to the counter
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss, _ = cross_entropy(hidden_ND, head_VD, batch, chunk)
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops() / (2 * T * V * D)


def test_a_frozen_head_takes_two_matrix_products_a_training_one_three_and_scoring_one():
    assert products(True, False) == 2
    assert products(True, True) == 3
    assert products(False, True) == 2
    assert products(False, False) == 1


def largest_tensor(function, train_head, chunk):
    hidden_ND, head_VD, batch = problem(200, 331, D=8)
    with Largest() as largest:
        results(function, hidden_ND, head_VD, batch, train_head, chunk)
    return largest.numel


@pytest.mark.parametrize("train_head", [True, False], ids=["training head", "frozen head"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(train_head):
    assert largest_tensor(cross_entropy, train_head, chunk=16) == 16 * 331
    assert largest_tensor(cross_entropy, train_head, chunk=1) <= 331 * 8  # the head itself
    assert largest_tensor(plain, train_head, chunk=16) == 200 * 331  # what would be caught
