"""KL distillation, from two rows of logits and from a stored top-k, against fp64 truth from the same inputs."""
import math
from functools import partial

import pytest
import torch
from kernel_checks import BACKENDS, assert_as_good_as, assert_compiles, distill_kl, distill_topk, grid

from minixmd.kernels.distill import distill_kl_grad, distill_kl_ref
from minixmd.kernels.distill_topk import distill_topk_grad, distill_topk_ref
from minixmd.kernels.logit_rows import BLOCK_V

pytestmark = pytest.mark.usefixtures("on_device")

KL = distill_kl_grad, distill_kl_ref
REVERSE = partial(distill_kl_grad, reverse=True), partial(distill_kl_ref, reverse=True)
DIRECTIONS = {"teacher first": KL, "student first": REVERSE}
TOPK = distill_topk_grad, distill_topk_ref
DTYPES = {"fp32": (torch.float32, torch.float32), "fp32-bf16": (torch.float32, torch.bfloat16),
          "fp16": (torch.float16, torch.float16), "bf16": (torch.bfloat16, torch.bfloat16)}  # fmt: skip
SIZES = {  # N, V, W, common_vocab, suppressed_ids
    "one id": (1, 1, 1, 1, []),
    "one id kept": (2, 2, 3, 2, [1]),
    "a block": (8, BLOCK_V, BLOCK_V, BLOCK_V, []),
    "a block and one": (8, BLOCK_V + 1, BLOCK_V + 1, BLOCK_V + 1, [0, BLOCK_V - 1]),
    "odd": (8, 123, 140, 119, [7, 118, 119, 130, 9999]),
    "several blocks": (8, 5 * 1021, 4500, 4321, [0, 1, 2047, 2048, 4320, 4400]),
    "whole blocks in common": (8, 4500, 5105, 2 * BLOCK_V, [5]),
}


def stress(logits_NV, suppressed_ids, level):
    """Rows that an online softmax gets wrong first: row i % 8 is treated in place, in fp32."""
    last = logits_NV.shape[1] - 1
    for n, row_V in enumerate(logits_NV):
        match n % 8:
            case 0:
                row_V.copy_(row_V.sort().values)  # every block raises the maximum
            case 1:
                row_V.copy_(row_V.sort(descending=True).values)
            case 2:
                row_V[last // 2] = level  # all mass on one id
            case 3:
                row_V[[v for v in suppressed_ids if v <= last]] = level  # a suppressed id must not count, however large
            case 4:
                row_V.fill_(-3.0)
            case 5:
                row_V.sub_(level)
            case 6:
                row_V[-1] = level
    return logits_NV


def problem(N, V, W, suppressed_ids, dtypes, level=200.0):
    student_NV = stress(4 * torch.randn(N, V), suppressed_ids, level).to(dtypes[0])
    teacher_NW = stress(4 * torch.randn(N, W), suppressed_ids[:1], level / 2).roll(1, 0).to(dtypes[1])
    return student_NV, teacher_NW, torch.tensor(suppressed_ids, dtype=torch.long)


def kept(common_vocab, suppressed_ids):
    return [v for v in range(common_vocab) if v not in suppressed_ids]


def softmax_by_hand(logits_NV, ids, T):
    """Log-probabilities of `ids` and what share of the row stands elsewhere, in fp64."""
    a_NV = logits_NV.double() / T
    outside_NV = a_NV.index_fill(1, torch.tensor(ids), -torch.inf)
    return a_NV[:, ids].log_softmax(1), (outside_NV.logsumexp(1) - a_NV.logsumexp(1)).exp()


def truth(student_NV, teacher_NW, g_N, ids, T, operation=KL):
    """Loss, dropped shares and dstudent from the definition of KL or REVERSE."""
    logp_NK, s_dropped_N = softmax_by_hand(student_NV, ids, T)
    logq_NK, t_dropped_N = softmax_by_hand(teacher_NW, ids, T)
    if operation is REVERSE:
        kl_N = (logp_NK.exp() * (logp_NK - logq_NK)).sum(1)
        slope_NK = logp_NK.exp() * (logp_NK - logq_NK - kl_N[:, None])
    else:
        kl_N = (logq_NK.exp() * (logq_NK - logp_NK)).sum(1)
        slope_NK = logp_NK.exp() - logq_NK.exp()
    grad_NV = torch.zeros(student_NV.shape, dtype=torch.float64)
    grad_NV[:, ids] = T * g_N[:, None].double() * slope_NK
    return [T * T * kl_N, s_dropped_N, t_dropped_N, grad_NV]


def results(operation, student_NV, teacher, g_N, common_vocab, suppressed_Z, T, backend):
    """What KL, REVERSE or TOPK returns, then dstudent; by autograd of the PyTorch twin if the backend is "eager"."""
    with_grad, ref = operation
    options = common_vocab, suppressed_Z, T
    if backend == "eager":
        leaf_NV = student_NV.detach().clone().requires_grad_()
        first, *rest = ref(leaf_NV, *teacher, *options)
        (first * g_N).sum().backward()
        return [first.detach(), *rest, leaf_NV.grad]
    out_NV = torch.empty_like(student_NV)
    return [*with_grad(student_NV, *teacher, g_N, *options, out_NV, backend), out_NV]


def compare(kernel, eager, exact, cond):
    assert len(kernel) == len(eager) == len(exact)
    for a, b, c in zip(kernel, eager, exact, strict=True):
        assert_as_good_as(a, b, c, cond)


@pytest.mark.parametrize("size, dtypes, T, operation", grid(SIZES, DTYPES, [2.0, 0.7], DIRECTIONS))
def test_loss_shares_and_gradient_are_as_good_as_eager(size, dtypes, T, operation):
    N, V, W, common_vocab, suppressed_ids = size
    student_NV, teacher_NW, suppressed_Z = problem(N, V, W, suppressed_ids, dtypes)
    g_N = torch.randn(N)
    ours, eager = (results(operation, student_NV, [teacher_NW], g_N, common_vocab, suppressed_Z, T, backend)
                   for backend in ("triton", "eager"))
    exact = truth(student_NV, teacher_NW, g_N, kept(common_vocab, suppressed_ids), T, operation)
    compare(ours[:1], eager[:1], exact[:1], T * T)  # not cond = |logits|: only differences enter
    compare(ours[3:], eager[3:], exact[3:], T)
    compare(ours[1:3], eager[1:3], exact[1:3], 200 / T)


@pytest.mark.parametrize("operation", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_of_ten_thousand_lose_nothing_beyond_their_own_rounding(offset, operation):
    student_NV = (torch.randn(3, 3000) + offset).round(decimals=2)
    teacher_NW = torch.randn(3, 3100) - offset
    teacher_NW[2, :3000] = student_NV[2] - 2 * offset  # the same distribution: KL 0
    suppressed_Z = torch.tensor([4])
    g_N = torch.ones(3)
    ours = results(operation, student_NV, [teacher_NW], g_N, 2900, suppressed_Z, 2.0, "triton")
    exact = truth(student_NV, teacher_NW, g_N, kept(2900, [4]), 2.0, operation)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_example_to_check_by_hand(backend):
    """Student (1/4, 3/4), teacher (3/4, 1/4): KL = (3/4 - 1/4) log 3; id 2 is suppressed, id 3 is not common."""
    s, t = math.log(3), 5.0
    student_NV, teacher_NW = torch.tensor([[t, t + s, 99.0, t]]), torch.tensor([[s, 0.0, 0.0]])
    suppressed_Z = torch.tensor([2])
    loss_N, s_dropped_N, t_dropped_N, grad_NV = results(
        KL, student_NV, [teacher_NW], torch.ones(1), 3, suppressed_Z, 1.0, backend)
    assert loss_N.item() == pytest.approx(0.5 * math.log(3)) and t_dropped_N.item() == pytest.approx(1 / 5)
    assert s_dropped_N.item() == pytest.approx(1) and grad_NV.tolist()[0] == pytest.approx([-0.5, 0.5, 0, 0])
    # the reverse is as large here: (3/4 - 1/4) log 3; its gradient is p (log p/q - KL), 1/4 (-log 3 - 1/2 log 3) first
    reverse_N, *_, slope_NV = results(REVERSE, student_NV, [teacher_NW], torch.ones(1), 3, suppressed_Z, 1.0, backend)
    assert reverse_N.item() == pytest.approx(0.5 * math.log(3))
    assert slope_NV.tolist()[0] == pytest.approx([-0.375 * math.log(3), 0.375 * math.log(3), 0, 0])
    student_NV[0, 2] = -torch.inf  # 4 e^5 inside, e^5 outside
    for ids in ([2], [2, 3, 7]):  # suppressing ids that are not common changes nothing
        _, share_N, _ = distill_kl(student_NV, teacher_NW, 3, torch.tensor(ids), 1.0, backend)
        assert share_N.item() == pytest.approx(1 / 5)
    doubled = results(KL, 2 * student_NV[:, :2], [2 * teacher_NW], torch.ones(1), 2, suppressed_Z, 2.0, backend)
    assert doubled[0].item() == pytest.approx(4 * loss_N.item())  # the same two distributions, T² the loss
    assert doubled[3].tolist()[0] == pytest.approx([-1.0, 1.0])  # T the gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("held", [torch.nan, torch.inf, -torch.inf, 1e4])
def test_ids_left_out_count_for_nothing_whatever_they_hold(held, operation, backend):
    suppressed_ids = [0, BLOCK_V, BLOCK_V + 2]
    student_NV, teacher_NW, suppressed_Z = problem(3, BLOCK_V + 9, BLOCK_V + 5, suppressed_ids, DTYPES["fp32"])
    weight_N = torch.rand(3) + 0.1
    with_grad, options = operation[0], (BLOCK_V + 3, suppressed_Z, 2.0)
    before = with_grad(student_NV, teacher_NW, None, *options, None, backend)[0]
    out = [*suppressed_ids, *range(BLOCK_V + 3, BLOCK_V + 9)]
    student_NV[:, out] = held
    teacher_NW[:, out[:-4]] = held
    grad_NV = torch.full_like(student_NV, torch.nan)
    after = with_grad(student_NV, teacher_NW, weight_N, *options, grad_NV, backend)[0]
    assert torch.equal(after, before) and after.isfinite().all()
    assert grad_NV.isfinite().all() and (grad_NV[:, out] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity_count_for_nothing(backend):
    """A kept id that both rows rule out, one that the teacher alone does, suppressed ones: as without those columns."""
    student_NV, teacher_NW = torch.randn(4, 2500), torch.randn(4, 2500)
    student_NV[:, [0, 2100, 5, 9]], teacher_NW[:, [0, 2100, 6, 9]] = -torch.inf, -torch.inf
    student_NV[0, 40:], teacher_NW[0, 40:] = -torch.inf, -torch.inf  # most lanes see no number
    suppressed_Z, g_N = torch.tensor([5, 9]), torch.rand(4)
    ours = results(KL, student_NV, [teacher_NW], g_N, 2400, suppressed_Z, 2.0, backend)
    ids = [v for v in kept(2400, [5, 9, 0, 2100])]
    exact = truth(student_NV[1:], teacher_NW[1:], g_N[1:], [v for v in ids if v != 6], 2.0)
    logp_N6, _ = softmax_by_hand(student_NV[1:], ids, 2.0)
    q = truth(student_NV[1:], teacher_NW[1:], g_N[1:], ids, 2.0)[3]
    torch.testing.assert_close(ours[3][1:].double(), q, rtol=1e-5, atol=1e-8)
    # the teacher's share of id 6 is 0, so it only takes from the student's normaliser: KL + log(sum with 6 / without)
    extra = torch.log1p(-logp_N6[:, ids.index(6)].exp()).neg()
    torch.testing.assert_close(ours[0][1:].double(), exact[0] + 4 * extra, rtol=1e-5, atol=1e-6)
    assert ours[0].isfinite().all() and ours[3].isfinite().all() and not ours[3][:, [0, 2100]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_the_student_first_logits_of_minus_infinity_may_be_the_students_or_both(backend):
    """A kept id that both rows rule out, or the student alone, has p = 0: no loss, no gradient, its q still counts."""
    student_NV, teacher_NW = torch.randn(4, 2500), torch.randn(4, 2500)
    student_NV[:, [0, 2100, 6]], teacher_NW[:, [0, 2100]] = -torch.inf, -torch.inf
    student_NV[0, 40:] = -torch.inf  # most lanes see no number
    g_N, none_Z = torch.rand(4), torch.zeros(0, dtype=torch.long)
    ours = results(REVERSE, student_NV, [teacher_NW], g_N, 2400, none_Z, 2.0, backend)
    lowest = [z_NV.clamp(min=-1e6) for z_NV in (student_NV, teacher_NW)]  # p and q of it are 0 in fp64
    exact = truth(*lowest, g_N, kept(2400, []), 2.0, REVERSE)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=1e-5, atol=1e-7)
    assert not ours[3][:, [0, 2100, 6]].any() and not ours[3][0, 40:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_the_student_first_an_id_that_the_teacher_alone_rules_out_costs_about_infinity(backend):
    student_NV, teacher_NW, none_Z = torch.zeros(3, 9), torch.zeros(3, 9), torch.zeros(0, dtype=torch.long)
    teacher_NW[:2, 4] = -torch.inf
    loss_N, _, _, grad_NV = results(
        REVERSE, student_NV, [teacher_NW], torch.tensor([1.0, 0.0, 1.0]), 9, none_Z, 1.0, backend)
    assert (loss_N[:2] > 1e28).all() and loss_N[2].abs() < 1e-6
    assert grad_NV[0, 4] > 1e28 and not grad_NV[1].any()  # a weight of 0 makes it 0


@pytest.mark.slow
@pytest.mark.parametrize("operation", DIRECTIONS.values(), ids=DIRECTIONS)
def test_the_published_vocabularies_at_once(operation):
    """Qwen2-Audio learns from Qwen2-VL: 156,032 and 152,064 columns, of which the first 151,646 are common."""
    suppressed_ids = [151_643, 151_644, 3, 100_000, 151_700, 156_031]
    student_NV, teacher_NW, suppressed_Z = problem(3, 156_032, 152_064, suppressed_ids, DTYPES["fp32-bf16"], 30.0)
    g_N = torch.tensor([1.0, -0.3, 2.0])
    ours, eager = (results(operation, student_NV, [teacher_NW], g_N, 151_646, suppressed_Z, 2.0, backend)
                   for backend in ("triton", "eager"))
    exact = truth(student_NV, teacher_NW, g_N, kept(151_646, suppressed_ids), 2.0, operation)
    compare(ours, eager, exact, 4.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", [KL, REVERSE, TOPK], ids=["kl", "reverse", "topk"])
def test_the_form_without_a_gradient_returns_the_same(operation, backend):
    N, V, W, common_vocab, suppressed_ids = SIZES["several blocks"]
    student_NV, teacher_NW, suppressed_Z = problem(N, V, W, suppressed_ids, DTYPES["fp32"])
    teacher = [teacher_NW] if operation is not TOPK else store(teacher_NW, kept(common_vocab, suppressed_ids), 7, 2.0)
    plain = operation[0](
        student_NV.requires_grad_(), *teacher, None, common_vocab, suppressed_Z, 2.0, None, backend)
    found = results(operation, student_NV, teacher, torch.ones(N), common_vocab, suppressed_Z, 2.0, backend)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(plain, found[:-1], strict=True))


# ---- where the gradient goes ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("out", ["fp32", "bf16", "in place"])
def test_the_gradient_is_written_where_the_caller_says_and_inputs_are_left_alone(backend, out, operation):
    N = 70 if backend == "torch" else 7  # PyTorch takes 64 rows at a time
    student_NV, teacher_NW, suppressed_Z = problem(N, 2200, 2300, [3, 2100], DTYPES["fp32"])
    weight_N = torch.rand(N)
    weight_N[1::3] = 0
    exact = truth(student_NV, teacher_NW, weight_N, kept(2150, [3, 2100]), 2.0, operation)
    inputs = student_NV, teacher_NW, weight_N, suppressed_Z
    before = [t.clone() for t in inputs]
    out_NV = student_NV
    if out != "in place":
        out_NV = torch.empty(N, 2200, dtype=torch.float32 if out == "fp32" else torch.bfloat16)
    parts = operation[0](student_NV, teacher_NW, weight_N, 2150, suppressed_Z, 2.0, out_NV, backend)
    for a, b in zip((*parts, out_NV), exact, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=max(eps, 1e-4), atol=1e-4 if b.ndim == 1 else 2e-6)
    assert not out_NV[1::3].any() and not out_NV[:, 2150:].any() and not out_NV[:, [3, 2100]].any()
    assert out == "in place" or torch.equal(student_NV, before[0])
    assert all(torch.equal(t, old) for t, old in zip(inputs[1:], before[1:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V, W", [(4200, 6200), (6200, 4200)])
def test_the_gradient_may_be_written_over_the_teachers_logits(V, W, dtype, operation, backend):
    """As one written elsewhere, to the bit; columns of the buffer that belong to neither are left alone."""
    N = 70 if backend == "torch" else 5  # PyTorch takes 64 rows at a time
    student_NV, teacher_NW, suppressed_Z = problem(N, V, W, [3, 2100], (torch.float32, dtype))
    weight_N = torch.randn(N)
    weight_N[1::3] = 0
    options = weight_N, 4150, suppressed_Z, 2.0
    elsewhere_NV, before_NV = torch.empty(N, V, dtype=dtype), student_NV.clone()
    expected = operation[0](student_NV, teacher_NW, *options, elsewhere_NV, backend)
    buffer = torch.full((N, max(V, W) + 5), 7.0, dtype=dtype)
    buffer[:, :W] = teacher_NW
    found = operation[0](student_NV, buffer[:, :W], *options, buffer[:, :V], backend)
    assert all(torch.equal(a, b) for a, b in zip((*found, buffer[:, :V]), (*expected, elsewhere_NV), strict=True))
    assert (buffer[:, max(V, W):] == 7).all() and torch.equal(buffer[:, V:W], teacher_NW[:, V:])
    assert torch.equal(student_NV, before_NV) and elsewhere_NV.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_strided_and_may_be_none(backend):
    student_NV, teacher_NW, suppressed_Z = problem(5, 300, 310, [3], DTYPES["fp32"])
    wide_NV, wide_NW = torch.cat([student_NV, student_NV], 1), torch.cat([teacher_NW] * 3, 1)
    out_NV = torch.full((5, 700), 7.0)
    views = wide_NV[:, :300], wide_NW[:, :310]
    parts = distill_kl_grad(*views, torch.ones(5), 299, suppressed_Z, 2.0, out_NV[:, :300], backend)
    plain_NV = torch.empty(5, 300)
    again = distill_kl_grad(student_NV, teacher_NW, torch.ones(5), 299, suppressed_Z, 2.0, plain_NV, backend)
    assert all(torch.equal(a, b) for a, b in zip((*parts, out_NV[:, :300]), (*again, plain_NV), strict=True))
    assert (out_NV[:, 300:] == 7).all()
    none = distill_kl_grad(student_NV[:0], teacher_NW[:0], torch.ones(0), 299, suppressed_Z, 2.0, plain_NV[:0], backend)
    assert [t.shape for t in none] == [(0,)] * 3
    none = results(KL, student_NV[:0], [teacher_NW[:0]], torch.ones(0), 299, suppressed_Z, 2.0, backend)
    assert none[-1].shape == (0, 300)


# ---- the stored top-k ----


def store(teacher_NW, ids, J, T):
    """The J best ids of each row in random order, their log q and the tail, as a file of labels would hold them."""
    logq_NK, _ = softmax_by_hand(teacher_NW, ids, T)
    best = logq_NK.topk(J).indices
    best = best[:, torch.randperm(J)]
    tail_N = logq_NK.exp().scatter(1, best, 0).sum(1)
    return torch.tensor(ids)[best], logq_NK.gather(1, best).float(), tail_N.float()


def truth_topk(student_NV, id_NJ, logq_NJ, tail_N, g_N, ids, T):
    """Loss, dropped share and dstudent, row by row, from the definition and autograd."""
    leaf_NV = student_NV.detach().double().requires_grad_()
    losses = []
    for n, z_V in enumerate(leaf_NV):
        a_V = z_V / T
        lse = a_V[ids].logsumexp(0)
        pairs = [(v, q) for v, q in zip(id_NJ[n].tolist(), logq_NJ[n].double(), strict=True) if v >= 0]
        loss = sum((q.exp() * (q - (a_V[v] - lse)) for v, q in pairs if q > -torch.inf), 0 * lse)
        rest = sorted(set(ids) - {v for v, _ in pairs})
        if rest and tail_N[n] > 0:
            tail = tail_N[n].double()
            loss = loss + tail * (tail.log() - (a_V[rest].logsumexp(0) - lse))
        losses.append(T * T * loss)
    loss_N = torch.stack(losses)
    (loss_N * g_N).sum().backward()
    return [loss_N.detach(), softmax_by_hand(student_NV, ids, T)[1], leaf_NV.grad]


@pytest.mark.parametrize("size, dtypes, J", grid(SIZES, {name: DTYPES[name] for name in ("fp32", "fp16", "bf16")},
                                                 [1, 7, 20]))
def test_topk_loss_share_and_gradient_are_as_good_as_eager(size, dtypes, J):
    N, V, W, common_vocab, suppressed_ids = size
    T = 0.7 if J == 7 else 2.0
    student_NV, teacher_NW, suppressed_Z = problem(N, V, W, suppressed_ids, dtypes, 60.0)
    ids = kept(common_vocab, suppressed_ids)
    id_NJ, logq_NJ, tail_N = store(teacher_NW, ids, min(J, len(ids)), T)
    if J == 7:
        id_NJ[::2, 0] = -1  # an empty slot; its probability is then in no bucket
        logq_NJ[1::2, -1] = -torch.inf
    g_N = torch.randn(N)
    stored = id_NJ, logq_NJ, tail_N
    ours, eager = (results(TOPK, student_NV, stored, g_N, common_vocab, suppressed_Z, T, backend)
                   for backend in ("triton", "eager"))
    exact = truth_topk(student_NV, *stored, g_N, ids, T)
    compare(ours[::2], eager[::2], exact[::2], T * T)
    compare(ours[1:2], eager[1:2], exact[1:2], 60 / T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_topk_of_every_kept_id_is_the_full_kl_and_of_fewer_is_less(backend):
    student_NV, teacher_NW, suppressed_Z = problem(3, 80, 70, [3, 50], DTYPES["fp32"], 9.0)
    ids = kept(66, [3, 50])
    assert len(ids) == 64
    g_N = torch.rand(3)
    full = results(KL, student_NV, [teacher_NW], g_N, 66, suppressed_Z, 2.0, backend)
    stored = store(teacher_NW, ids, 64, 2.0)
    assert not stored[2].any()  # nothing is left for the tail
    whole = results(TOPK, student_NV, stored, g_N, 66, suppressed_Z, 2.0, backend)
    torch.testing.assert_close(whole, [full[0], full[1], full[3]])
    parts = [store(teacher_NW, ids, J, 2.0) for J in (1, 10, 40)]
    losses = [distill_topk(student_NV, *part, 66, suppressed_Z, 2.0, backend)[0] for part in parts]
    for less, more in zip(losses, [*losses[1:], full[0]], strict=True):
        assert (less <= more + 1e-5).all()
    assert (losses[0] < 0.9 * full[0]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_that_rounds_away_beside_the_rest_keeps_its_gradient(backend):
    """1 - p of the best id is 0 in fp32; the sum over the other ids is 6e-9, and the teacher wants half there."""
    student_NV = torch.zeros(1, 61)
    student_NV[0, 17] = 23.0
    stored = torch.tensor([[17]]), torch.tensor([[math.log(0.5)]]), torch.tensor([0.5])
    suppressed_Z = torch.tensor([60])
    ours = results(TOPK, student_NV, stored, torch.ones(1), 61, suppressed_Z, 1.0, backend)
    exact = truth_topk(student_NV, *stored, torch.ones(1), kept(61, [60]), 1.0)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[2].double(), exact[2], rtol=1e-6, atol=0)
    assert ours[2][0, :5].tolist() == pytest.approx([-0.5 / 59] * 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_with_no_id_left_to_hold_it_counts_in_neither_loss_nor_gradient(backend):
    student_NV, weight_N, grad_NV = torch.randn(2, 4), torch.ones(2), torch.full((2, 4), torch.nan)
    stored = torch.tensor([[0, 1, 3]] * 2), torch.tensor([[0.2, 0.3, 0.4]] * 2).log(), torch.full((2,), 0.1)
    distill_topk_grad(student_NV, *stored, weight_N, 4, torch.tensor([2]), 1.0, grad_NV, backend)
    p_NV = student_NV.index_fill(1, torch.tensor([2]), -torch.inf).softmax(1)
    torch.testing.assert_close(grad_NV, 0.9 * p_NV - torch.tensor([0.2, 0.3, 0.0, 0.4]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stored_nan_is_never_hidden(backend):
    stored = torch.tensor([[0, 1]] * 2), torch.tensor([[0.5, 0.4], [math.nan, 0.4]]).log(), torch.full((2,), 0.1)
    loss_N = distill_topk(torch.randn(2, 9), *stored, 9, torch.tensor([2]), 1.0, backend)[0]
    assert loss_N[0].isfinite() and loss_N[1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", ["fp32", "bf16", "in place"])
def test_topk_writes_the_gradient_where_the_caller_says(backend, out):
    N = 70 if backend == "torch" else 7  # PyTorch takes 64 rows at a time
    student_NV, teacher_NW, suppressed_Z = problem(N, 2200, 2300, [3, 2100], DTYPES["fp32"], 30.0)
    ids = kept(2150, [3, 2100])
    stored = store(teacher_NW, ids, 20, 2.0)
    weight_N = torch.rand(N)
    weight_N[1::3] = 0
    exact = truth_topk(student_NV, *stored, weight_N, ids, 2.0)
    before = [t.clone() for t in (student_NV, *stored, weight_N, suppressed_Z)]
    out_NV = student_NV
    if out != "in place":
        out_NV = torch.empty(N, 2200, dtype=torch.float32 if out == "fp32" else torch.bfloat16)
    parts = distill_topk_grad(student_NV, *stored, weight_N, 2150, suppressed_Z, 2.0, out_NV, backend)
    for a, b in zip((*parts, out_NV), exact, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=max(eps, 1e-4), atol=1e-4 if b.ndim == 1 else 2e-6)
    assert not out_NV[1::3].any() and not out_NV[:, 2150:].any() and not out_NV[:, [3, 2100]].any()
    assert out == "in place" or torch.equal(student_NV, before[0])
    assert all(torch.equal(t, old) for t, old in zip((*stored, weight_N, suppressed_Z), before[1:], strict=True))
    rows = [t[:0] for t in (student_NV, *stored, weight_N)]
    none = distill_topk_grad(*rows, 2150, suppressed_Z, 2.0, out_NV[:0], backend)
    assert [t.shape for t in none] == [(0,)] * 2


@pytest.mark.slow
def test_topk_over_the_published_vocabulary():
    suppressed_ids = [151_643, 151_644, 151_700]
    student_NV, teacher_NW, suppressed_Z = problem(2, 156_032, 152_064, suppressed_ids, DTYPES["fp32-bf16"], 30.0)
    ids = kept(151_646, suppressed_ids)
    stored = store(teacher_NW, ids, 64, 2.0)
    g_N = torch.tensor([1.0, -0.3])
    wide = torch.cat([student_NV, student_NV], 1)[:, :156_032]  # rows of another stride
    ours, eager = (results(TOPK, wide, stored, g_N, 151_646, suppressed_Z, 2.0, backend)
                   for backend in ("triton", "eager"))
    compare(ours, eager, truth_topk(student_NV, *stored, g_N, ids, 2.0), 4.0)


# ---- refusals and machine code ----


def test_bad_input_is_refused_with_what_was_expected():
    z_NV, none_Z, out_NV = torch.randn(4, 8), torch.zeros(0, dtype=torch.long), torch.empty(4, 8)
    stored = torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2), torch.zeros(4)
    for args, message in [((z_NV.T, z_NV.T, 3, none_Z, 2.0, "torch"), "unit stride"),
                          ((z_NV, z_NV[:3], 3, none_Z, 2.0, "torch"), "as many rows"),
                          ((z_NV, z_NV[:, :5], 6, none_Z, 2.0, "torch"), r"common_vocab in \[1, 5\] .* got 2.0, 6"),
                          ((z_NV, z_NV, 0, none_Z, 2.0, "torch"), r"common_vocab in \[1, 8\] .* got 2.0, 0"),
                          ((z_NV, z_NV, 3, none_Z, 0.0, "torch"), "temperature must be > 0"),
                          ((z_NV, z_NV, 3, none_Z, 2.0, "cuda"), "'cuda'")]:
        with pytest.raises(ValueError, match=message):
            distill_kl(*args)
    with pytest.raises(ValueError, match="out must be"):
        distill_kl_grad(z_NV, z_NV, torch.ones(4), 3, none_Z, 2.0, out_NV[:, 1:], "triton")
    with pytest.raises(ValueError, match=r"common_vocab in \[1, 8\] .* got 2.0, 9"):
        distill_topk(z_NV, *stored, 9, none_Z, 2.0, "triton")
    with pytest.raises(ValueError, match="4 rows of 1 to 64 ids"):
        distill_topk(z_NV, stored[0][:3], *stored[1:], 3, none_Z, 2.0, "triton")
    with pytest.raises(ValueError, match="1 to 64 ids"):
        distill_topk(z_NV, torch.zeros(4, 65), torch.zeros(4, 65), stored[2], 3, none_Z, 2.0, "triton")
    with pytest.raises(ValueError, match="temperature"):
        distill_topk(z_NV, *stored, 3, none_Z, -1.0, "triton")
    with pytest.raises(ValueError, match="out must be"):
        distill_topk_grad(z_NV, *stored, torch.ones(4), 3, none_Z, 2.0, out_NV.T, "torch")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill", "distill_topk"])
def test_the_kernels_compile_without_spills(name):
    assert_compiles(name)
