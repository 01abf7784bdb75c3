"""The head with each row loss against plain PyTorch on all logits at once, in fp64, with both backends."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_dryrun import peak
from tiny import Largest
from torch.utils.flop_counter import FlopCounterMode

from minixmd.kernels import distill, distill_topk, grpo, logit_rows, logprob
from minixmd.learning import logprobs
from minixmd.learning.policy import token_weights
from minixmd.models.head import (
    CrossEntropy,
    DistillKL,
    DistillTopK,
    PolicyLoss,
    PolicyWithTeacher,
    head_loss,
    raw_logits,
)

pytestmark = pytest.mark.usefixtures("on_device")

T, V, W, D, E = 37, 203, 211, 16, 12  # the teacher has W columns, of which the first 190 mean the same
COMMON, SUPPRESSED, TEMPERATURE = 190, [3, 50, 189, 195], 2.0
LENGTHS = (7, 1, 12, 17)
KINDS = ["ce", "kl", "reverse", "topk", "grpo", "gspo", "grpo+kl", "gspo+reverse"]


def problem(kind, backend="torch", dtype=torch.float32):
    """hidden_ND, head_VD, row_T and the row loss; uneven weights, some of them zero."""
    if "+" in kind:
        *model, policy = problem(kind.split("+")[0], backend, dtype)
        teacher = problem(kind.split("+")[1], backend, dtype)[-1]
        weight_T = teacher.weight_T.roll(1)  # of the zeros some are the policy's alone, some the teacher's, one both's
        weight_T[7] = 0
        return *model, PolicyWithTeacher(policy, replace(teacher, weight_T=weight_T))
    g = torch.Generator(torch.get_default_device()).manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    hidden_ND, head_VD = randn(T + 4, D).to(dtype), randn(V, D).to(dtype)
    row_T = torch.randint(0, T + 4, (T,), generator=g)
    weight_T = torch.rand(T, generator=g) + 0.1
    weight_T[2::5] = 0
    id_T = torch.randint(60, 180, (T,), generator=g)
    if kind == "ce":
        return hidden_ND, head_VD, row_T, CrossEntropy(id_T, weight_T, backend)
    if kind in ("kl", "reverse"):
        teacher = randn(T, E).to(dtype), randn(W, E).to(dtype)
        return hidden_ND, head_VD, row_T, DistillKL(*teacher, weight_T, COMMON, torch.tensor(SUPPRESSED), TEMPERATURE,
                                                    backend, reverse=kind == "reverse")
    if kind == "topk":
        allowed = torch.tensor([v for v in range(COMMON) if v not in SUPPRESSED])
        logq_TK = (2 * randn(T, len(allowed))).log_softmax(-1)
        best_TJ = logq_TK.topk(9, -1).indices
        tail_T = 1 - logq_TK.gather(1, best_TJ).exp().sum(-1)
        id_TJ, order_TJ = allowed[best_TJ].sort(-1)
        logq_TJ = logq_TK.gather(1, best_TJ).gather(1, order_TJ)
        return hidden_ND, head_VD, row_T, DistillTopK(id_TJ.int(), logq_TJ, tail_T, weight_T, COMMON,
                                                      torch.tensor(SUPPRESSED), TEMPERATURE, backend)
    logp_T = (hidden_ND[row_T].float() @ head_VD.float().T / 0.8).log_softmax(-1).gather(1, id_T[:, None]).squeeze(1)
    old_T, ref_T = logp_T + 0.4 * randn(T), logp_T + 0.4 * randn(T)  # far enough for both bounds to act
    clip_config = grpo.ClipConfig(0.2, 0.28, 0.04, "k3")
    return hidden_ND, head_VD, row_T, PolicyLoss(id_T, old_T, ref_T, randn(T), weight_T, clip_config, backend, 0.8,
                                                 torch.tensor(SUPPRESSED), 200, LENGTHS if kind == "gspo" else None)


def plain(hidden_ND, head_VD, row_T, row_loss, dtype=torch.float64):
    """(loss, its values before the weight) from all logits at once, by autograd."""
    o = row_loss
    if isinstance(o, PolicyWithTeacher):
        (policy, columns), (teacher, more) = (plain(hidden_ND, head_VD, row_T, x, dtype) for x in (o.policy, o.teacher))
        return policy + teacher, (*columns, *more)
    z_TV = hidden_ND[row_T].to(dtype) @ head_VD.to(dtype).T
    if isinstance(o, PolicyLoss):
        sequence_T = None if o.lengths is None else torch.arange(len(o.lengths)).repeat_interleave(
            torch.tensor(o.lengths))
        vectors = [x.to(dtype) for x in (o.old_T, o.ref_T, o.advantage_T, o.weight_T)]
        loss, logp_T, entropy_T, terms = grpo.grpo_loss_ref(z_TV, o.id_T, *vectors, o.clip_config, o.temperature,
                                                            o.suppressed_Z, o.vocab_limit, sequence_T)
        return loss, (*terms, logp_T, entropy_T)
    if isinstance(o, CrossEntropy):
        columns = (-logprob.token_logprob_ref(z_TV, o.id_T)[0],)
    elif isinstance(o, DistillKL):
        teacher_TW = o.teacher_TE.to(dtype) @ o.teacher_head_WE.to(dtype).T
        columns = distill.distill_kl_ref(z_TV, teacher_TW, o.common_vocab, o.suppressed_Z, o.temperature, o.reverse)
    else:
        columns = distill_topk.distill_topk_ref(z_TV, o.id_TJ, o.logq_TJ.to(dtype), o.tail_T.to(dtype), o.common_vocab,
                                                o.suppressed_Z, o.temperature)
    return (columns[0] * o.weight_T).sum(), columns


def gradients(function, hidden_ND, head_VD, row_T, row_loss, train_head=True, **options):
    """Loss, columns and the gradients of the hidden states and (if it trains) of the head, incoming gradient 1.7."""
    hidden_ND, head_VD = hidden_ND.clone().requires_grad_(), head_VD.clone().requires_grad_(train_head)
    loss, columns = function(hidden_ND, head_VD, row_T, row_loss, **options)
    (1.7 * loss).backward()
    columns = columns.values() if isinstance(columns, dict) else columns
    return [loss.detach(), *(c.detach() for c in columns), hidden_ND.grad, *([head_VD.grad] if train_head else [])]


@pytest.mark.parametrize("train_head", [True, False], ids=["training head", "frozen head"])
@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_columns_and_gradients_equal_plain_pytorchs(kind, chunk, train_head):
    case = problem(kind)
    ours = gradients(head_loss, *case, train_head, chunk=chunk)
    truth = gradients(plain, *case, train_head)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
def test_triton_kernels_give_what_pytorch_gives(kind):
    ours, twin = (gradients(head_loss, *problem(kind, backend), chunk=16) for backend in ("triton", "torch"))
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_give_fp32_losses_and_gradients_to_two_roundings(kind, backend):
    hidden_ND, head_VD, row_T, row_loss = problem(kind, backend, torch.bfloat16)
    ours = gradients(head_loss, hidden_ND, head_VD, row_T, row_loss, chunk=16)
    truth = gradients(plain, hidden_ND.double(), head_VD.double(), row_T, row_loss)
    assert all(x.dtype == torch.float32 for x in ours[:-2]) and all(x.dtype == torch.bfloat16 for x in ours[-2:])
    for a, b in zip(ours[:-2], truth[:-2], strict=True):  # products of bf16 are exact in fp32
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)
    for a, b in zip(ours[-2:], truth[-2:], strict=True):
        assert (a.double() - b).norm() <= 5e-3 * b.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_without_gradients_takes_one_product_and_gives_the_same_columns(kind):
    hidden_ND, head_VD, row_T, row_loss = problem(kind)
    expected = gradients(head_loss, hidden_ND, head_VD, row_T, row_loss, chunk=8)
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # unknown to the counter
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss, columns = head_loss(hidden_ND.requires_grad_(), head_VD.requires_grad_(), row_T, row_loss, chunk=8)
    teacher = 2 * T * W * E if "kl" in kind or "reverse" in kind else 0
    assert counter.get_total_flops() == 2 * T * V * D + teacher and not loss.requires_grad
    for a, b in zip([loss, *columns.values()], expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_outgrows_a_chunk_of_logits(kind):
    hidden_ND, head_VD, row_T, row_loss = problem(kind)
    with Largest() as largest:
        gradients(head_loss, hidden_ND, head_VD, row_T, row_loss, chunk=17)
    assert largest.numel <= 17 * (W if "kl" in kind or "reverse" in kind else V)


def test_a_sequence_longer_than_the_chunk_is_not_cut():
    case = problem("gspo")
    whole, cut = (gradients(head_loss, *case, chunk=chunk) for chunk in (1024, 5))
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_masked_sequence_changes_nothing_for_the_others():
    hidden_ND, head_VD, row_T, row_loss = problem("gspo")
    weight_T = row_loss.weight_T.clone()
    weight_T[8:20] = 0  # the third sequence
    spoilt = replace(row_loss, weight_T=weight_T, old_T=row_loss.old_T.clone(), ref_T=row_loss.ref_T.clone())
    spoilt.old_T[8:20] = spoilt.ref_T[8:20] = torch.nan
    left_out = torch.cat([torch.arange(8), torch.arange(20, T)])
    fewer = replace(spoilt, **{name: getattr(spoilt, name)[left_out] for name in (
        "id_T", "old_T", "ref_T", "advantage_T", "weight_T")}, lengths=(7, 1, 0, 17))  # fmt: skip
    a = gradients(head_loss, hidden_ND, head_VD, row_T, spoilt)
    b = gradients(head_loss, hidden_ND, head_VD, row_T[left_out], fewer)
    for i in (0, -1, -2):
        torch.testing.assert_close(a[i], b[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_log_probabilities_alone_are_those_of_the_policy_loss_to_the_bit(backend, monkeypatch):
    hidden_ND, head_VD, row_T, policy_loss = problem("grpo", backend)
    p = policy_loss
    monkeypatch.setattr(logprobs, "CHUNK", 16)
    model = SimpleNamespace(logits=lambda hidden_ND: raw_logits(hidden_ND, head_VD), backend=backend)
    batch = SimpleNamespace(target_row_T=row_T, target_id_T=p.id_T)
    vocabulary = logprobs.SampledVocabulary(p.temperature, p.suppressed_Z, p.vocab_limit)
    alone_T = logprobs.token_logprobs(model, hidden_ND, batch, vocabulary)
    logp_T = head_loss(hidden_ND.requires_grad_(), head_VD, row_T, policy_loss, chunk=16)[1]["logp"]
    assert torch.equal(alone_T, logp_T)
    truth = plain(hidden_ND, head_VD, row_T, policy_loss)[1][-2]  # of the policy loss's columns: logp, entropy
    torch.testing.assert_close(alone_T.double(), truth.double(), rtol=1e-5, atol=1e-5)


def test_token_weights_by_hand():
    assert token_weights([2, 1], "sequence").tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    assert token_weights([2, 1], "token").tolist() == pytest.approx([1 / 3] * 3)
    assert token_weights([2, 1], "constant", 10).tolist() == pytest.approx([1 / 20] * 3)
    assert token_weights([2, 0, 1], "sequence").tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3])


def test_targets_and_row_loss_must_be_as_many():
    hidden_ND, head_VD, row_T, row_loss = problem("gspo")
    with pytest.raises(ValueError, match="no target"):
        head_loss(hidden_ND, head_VD, row_T[:0], row_loss)
    with pytest.raises(ValueError, match="36 targets, but 37 weights"):
        head_loss(hidden_ND, head_VD, row_T[:36], row_loss)
    with pytest.raises(ValueError, match="37 targets, but 37 weights and sequences of"):
        head_loss(hidden_ND, head_VD, row_T, replace(row_loss, lengths=(7, 1, 12)))


# ---- the policy loss with a live teacher ----


def oracle(hidden_ND, head_VD, row_T, row_loss):
    """The total, its columns and the gradients of hidden states and head, in fp64 by autograd over log_softmax."""
    policy, teacher = row_loss.policy, row_loss.teacher
    hidden_ND = hidden_ND.detach().double().requires_grad_()
    head_VD = head_VD.detach().double().requires_grad_()
    z_TV = hidden_ND[row_T] @ head_VD.T

    forbidden = torch.tensor([*SUPPRESSED, *range(policy.vocab_limit, V)])
    logp_TV = (z_TV / policy.temperature).index_fill(1, forbidden, -torch.inf).log_softmax(1)
    logp_T = logp_TV[torch.arange(T), policy.id_T]
    live_T = policy.weight_T != 0
    log_ratio_T = logp_T - policy.old_T.double()
    if policy.lengths is not None:
        means, start = [], 0
        for length in policy.lengths:
            of_sequence = slice(start, start + length)
            total = (log_ratio_T[of_sequence] * live_T[of_sequence]).sum()
            means.append((total / max(1, live_T[of_sequence].sum())).expand(length))
            start += length
        log_ratio_T = torch.cat(means)
    ratio_T = log_ratio_T.exp()
    low, high = 1 - policy.clip_config.clip_low, 1 + policy.clip_config.clip_high
    advantage_T = policy.advantage_T.double()
    delta_T = policy.ref_T.double() - logp_T
    loss_T = -torch.minimum(ratio_T * advantage_T, ratio_T.clamp(low, high) * advantage_T)
    loss_T = loss_T + policy.clip_config.beta * (delta_T.exp() - delta_T - 1)

    kept = [v for v in range(COMMON) if v not in SUPPRESSED]
    teacher_TW = teacher.teacher_TE.double() @ teacher.teacher_head_WE.double().T
    first_TK = (teacher_TW[:, kept] / TEMPERATURE).log_softmax(1)
    second_TK = (z_TV[:, kept] / TEMPERATURE).log_softmax(1)
    if teacher.reverse:
        first_TK, second_TK = second_TK, first_TK
    kl_T = TEMPERATURE**2 * (first_TK.exp() * (first_TK - second_TK)).sum(1)

    total = (policy.weight_T.double() * loss_T).sum() + (teacher.weight_T.double() * kl_T).sum()
    (1.7 * total).backward()
    columns = {"loss": loss_T, "ratio": ratio_T, "logp": logp_T, "teacher_kl": kl_T}
    return total.detach(), {name: x.detach() for name, x in columns.items()}, hidden_ND.grad, head_VD.grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("chunk", [9, 1024])
@pytest.mark.parametrize("reverse", [False, True], ids=["teacher first", "student first"])
@pytest.mark.parametrize("policy", ["grpo", "gspo"])
@pytest.mark.parametrize("columns_of_teacher", [W, 195])  # more than the student has, and fewer
def test_the_policy_loss_with_a_teacher_equals_an_oracle_in_fp64(columns_of_teacher, policy, reverse, chunk, backend):
    *model, row_loss = problem(f"{policy}+{'reverse' if reverse else 'kl'}", backend)
    head_WE = row_loss.teacher.teacher_head_WE[:columns_of_teacher]
    row_loss = replace(row_loss, teacher=replace(row_loss.teacher, teacher_head_WE=head_WE))
    silent_T = row_loss.teacher.weight_T == 0
    row_loss.teacher.teacher_TE[silent_T] = 1e3  # no hidden state was made there
    expected, columns, *expected_grads = oracle(*model, row_loss)
    hidden_ND, head_VD, row_T = model
    leaves = [hidden_ND.clone().requires_grad_(), head_VD.clone().requires_grad_()]
    total, found = head_loss(*leaves, row_T, row_loss, chunk)
    (1.7 * total).backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    for leaf, grad in zip(leaves, expected_grads, strict=True):
        torch.testing.assert_close(leaf.grad.double(), grad, rtol=2e-5, atol=2e-5 * grad.abs().max().item())
    assert tuple(found) == row_loss.columns and len(found) == 9
    for name, column_T in columns.items():
        counts_T = ~silent_T if name == "teacher_kl" else row_loss.weight_T != 0
        torch.testing.assert_close(found[name][counts_T].double(), column_T[counts_T], rtol=2e-5, atol=2e-5)


def test_a_policy_loss_without_weight_leaves_the_divergence_alone_and_the_reverse():
    *model, row_loss = problem("grpo+kl")
    nothing_T = torch.zeros(T)
    for part, other in (("teacher", "policy"), ("policy", "teacher")):
        silenced = replace(row_loss, **{other: replace(getattr(row_loss, other), weight_T=nothing_T)})
        loss, *_, hidden_grad, head_grad = gradients(head_loss, *model, silenced)
        alone = gradients(head_loss, *model, getattr(row_loss, part))
        for a, b in zip((loss, hidden_grad, head_grad), (alone[0], *alone[-2:]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("student, teacher", [(3300, 3000), (3000, 3300)])
def test_a_teacher_takes_one_chunk_of_fp32_logits_more(student, teacher, dtype, monkeypatch):
    monkeypatch.setattr(logit_rows, "ROWS", 1)  # PyTorch's temporaries are small then, as the kernels' are
    count, chunk, none_Z = 128, 64, torch.zeros(0, dtype=torch.long)
    hidden_TD, head_VD, teacher_TE, head_WE = (
        torch.randn(rows, 1).to(dtype) for rows in (count, student, count, teacher))
    id_T, vector_T = torch.zeros(count, dtype=torch.long), torch.ones(count)
    policy = PolicyLoss(id_T, vector_T, vector_T, vector_T, vector_T, grpo.ClipConfig(0.2, 0.2, 0.1, "k3"), "torch")
    divergence = DistillKL(teacher_TE, head_WE, vector_T, 2990, none_Z, 2.0, "torch")
    model = hidden_TD, head_VD, torch.arange(count)
    alone = peak(lambda: gradients(head_loss, *model, policy, False, chunk=chunk))
    both = peak(lambda: gradients(head_loss, *model, PolicyWithTeacher(policy, divergence), False, chunk=chunk))
    assert 1 <= (both - alone) / (4 * chunk * 3300) < 1.15
