"""The LM head over the target rows only, in chunks, with the gradient computed in the forward pass.

    z = h Wᵀ        loss = sum_t weight[t] f(z[t])        dh = dz W        dW = dzᵀ h        dz[t] = weight[t] f'(z[t])

f is cross-entropy, a distillation KL or the clipped policy loss. Each needs its own row of logits and a few numbers of
that token, so dz is known as soon as the row is. A chunk is finished before the next one starts: logits in fp32, a row
kernel (kernels/) that gives loss and dz, then dh, and dW when the head trains. A frozen head takes two matrix products;
no logits are kept, none recomputed.
"""
from dataclasses import dataclass

import torch

from minixmd.kernels import distill, distill_topk, grpo, logprob
from minixmd.models.multimodal import raw_logits

CHUNK = 1024  # target rows whose logits exist at once: 0.6 GB of fp32 at a vocabulary of 152,064

# What is optimised. rows(z_TV, at, out_TV) does the targets of a slice `at`, whose logits are z_TV. It returns a tuple
# of their columns, the loss before its weight first, and writes d sum(weight loss) / dz to out_TV unless that is None.
# out_TV may be z_TV itself. backend: "triton" | "torch".


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """-log p(id) over the raw logits of the whole vocabulary, as in SFT.

    id_T: (T,) int64 targets. weight_T: (T,) fp32.
    """

    id_T: torch.Tensor
    weight_T: torch.Tensor
    backend: str
    columns = ("nll",)
    lengths = None

    def rows(self, z_TV, at, out_TV):
        id_T = self.id_T[at]
        stats = logprob.row_stats(z_TV, id_T, backend=self.backend)
        if out_TV is not None:
            logprob.logits_grad(z_TV, id_T, stats, -self.weight_T[at], backend=self.backend, out=out_TV)
        return (-stats[0],)


@dataclass(frozen=True, eq=False)
class DistillKL:
    """T² KL(teacher || student) at `temperature` over the common_vocab ids; the teacher's logits too live for a chunk only.

    teacher_TE, teacher_head_WE: the teacher's hidden states at the targets and its head, never differentiated.
    common_vocab, suppressed_Z, temperature: as in kernels/distill.py.
    """

    teacher_TE: torch.Tensor
    teacher_head_WE: torch.Tensor
    weight_T: torch.Tensor
    common_vocab: int
    suppressed_Z: torch.Tensor
    temperature: float
    backend: str
    columns = ("kl", "student_dropped", "teacher_dropped")
    lengths = None

    def rows(self, z_TV, at, out_TV):
        with torch.no_grad():
            teacher_TW = raw_logits(self.teacher_TE[at], self.teacher_head_WE)
        how = self.common_vocab, self.suppressed_Z, self.temperature
        if out_TV is None:
            return distill.distill_kl(z_TV, teacher_TW, *how, self.backend)
        return distill.distill_kl_grad(z_TV, teacher_TW, self.weight_T[at], *how, out_TV, self.backend)


@dataclass(frozen=True, eq=False)
class DistillTopK:
    """T² KL from the teacher's stored best ids and the mass of all others; arguments as in kernels/distill_topk.py."""

    id_TJ: torch.Tensor
    logq_TJ: torch.Tensor
    tail_T: torch.Tensor
    weight_T: torch.Tensor
    common_vocab: int
    suppressed_Z: torch.Tensor
    temperature: float
    backend: str
    columns = ("kl", "student_dropped")
    lengths = None

    def rows(self, z_TV, at, out_TV):
        stored = self.id_TJ[at], self.logq_TJ[at], self.tail_T[at]
        how = self.common_vocab, self.suppressed_Z, self.temperature
        if out_TV is None:
            return distill_topk.distill_topk(z_TV, *stored, *how, self.backend)
        return distill_topk.distill_topk_grad(z_TV, *stored, self.weight_T[at], *how, out_TV, self.backend)


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """The clipped policy loss with its KL to a reference; arguments as in kernels/grpo.py.

    lengths: targets of each sequence, in order; given, a sequence has one ratio (GSPO). None = one ratio a token.
    """

    id_T: torch.Tensor
    old_T: torch.Tensor
    ref_T: torch.Tensor | None
    advantage_T: torch.Tensor
    weight_T: torch.Tensor
    objective: grpo.ClipConfig
    backend: str
    temperature: float = 1.0
    suppressed_Z: torch.Tensor | None = None
    vocab_limit: int | None = None
    lengths: tuple | None = None
    columns = ("loss", "ratio", "clipped", "kl", "logp", "entropy")

    def rows(self, z_TV, at, out_TV):
        ref_T = None if self.ref_T is None else self.ref_T[at]
        vectors = self.old_T[at], ref_T, self.advantage_T[at], self.weight_T[at], self.objective
        how = self.temperature, self.suppressed_Z, self.vocab_limit, self.backend
        if self.lengths is None:
            logp_T, entropy_T, terms = grpo.grpo_rows(z_TV, self.id_T[at], *vectors, *how, out=out_TV)
            return *terms, logp_T, entropy_T
        stats = logprob.row_stats(z_TV, self.id_T[at], *how)
        coef_T, terms = grpo.grpo_coefficient(stats[0], *vectors, self._sequences(at, z_TV.device))
        if out_TV is not None:
            logprob.logits_grad(z_TV, self.id_T[at], stats, coef_T, *how, out=out_TV)
        return *terms, *stats[:2]

    def _sequences(self, at, device):
        """Which sequence each of a chunk's targets belongs to, as a number of the chunk's own."""
        number_T = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))[at]
        return number_T.unique_consecutive(return_inverse=True)[1].to(device)


def token_weights(lengths, aggregation, constant=None):
    """The weights of a policy loss, for completions of `lengths` tokens: all those of an optimizer step, so that the
    gradient does not depend on the micro-batch size. A completion that is masked counts as one, with length 0.

    aggregation: "sequence", the mean over completions of each one's mean (GRPO); "token", the mean over all tokens;
        "constant", the sum over `constant` tokens a completion (Dr. GRPO: the longest that is allowed).
    Returns:
        (T,) fp32.
    """
    count = torch.tensor(lengths)
    if aggregation == "sequence":
        weight = 1 / (len(count) * count)
    elif aggregation == "token":
        weight = (1 / count.sum()).expand(len(count))
    elif aggregation == "constant" and constant:
        weight = torch.tensor(1 / (len(count) * constant)).expand(len(count))
    else:
        raise ValueError(f"aggregation must be 'sequence', 'token' or 'constant' with a constant, got {aggregation!r} "
                         f"and {constant!r}")
    return weight.repeat_interleave(count)


def _chunks(count, chunk, lengths):
    """Slices of at most `chunk` targets. With lengths no sequence is cut; one that is longer goes alone."""
    start = end = 0
    for length in [1] * count if lengths is None else lengths:
        if end > start and end + length - start > chunk:
            yield slice(start, end)
            start = end
        end += length
    yield slice(start, end)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, objective, chunk):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = weight_VD.dtype
        grad_TD = torch.empty_like(hidden_TD) if need_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        columns = [torch.empty(len(hidden_TD), device=hidden_TD.device) for _ in objective.columns]
        for at in _chunks(len(hidden_TD), chunk, objective.lengths):
            z_TV, dz_TV = raw_logits(hidden_TD[at], weight_VD), None
            if need_hidden or need_weight:  # in place where it can be: the chunk's logits are ours
                dz_TV = z_TV if dtype == torch.float32 else torch.empty_like(z_TV, dtype=dtype)
            for column_T, values in zip(columns, objective.rows(z_TV, at, dz_TV), strict=True):
                column_T[at] = values
            if need_hidden:
                torch.mm(dz_TV, weight_VD, out=grad_TD[at])
            if need_weight and dtype == torch.float32:
                grad_VD.addmm_(dz_TV.T, hidden_TD[at])
            elif need_weight:
                grad_VD += raw_logits(dz_TV.T, hidden_TD[at].T)
            del z_TV, dz_TV  # before the next chunk's are made
        ctx.save_for_backward(grad_TD, grad_VD)
        ctx.weight_dtype = dtype
        ctx.mark_non_differentiable(*columns)
        return (columns[0] * objective.weight_T).sum(), *columns

    @staticmethod
    def backward(ctx, grad, *_):
        grad_TD, grad_VD = ctx.saved_tensors
        return (None if grad_TD is None else grad_TD * grad.to(grad_TD.dtype),
                None if grad_VD is None else (grad_VD * grad).to(ctx.weight_dtype), None, None)


def head_loss(hidden_ND, head_VD, row_T, objective, chunk=CHUNK):
    """Sum over targets of weight * loss, never with more than `chunk` rows of logits (but see PolicyLoss.lengths).

    Args:
        hidden_ND: (N, D) from the model, differentiable. head_VD: (V, D) the LM head's weight, of the same dtype,
            differentiable. row_T: (T,) which row predicts each target; rows may repeat.
        objective: CrossEntropy, DistillKL, DistillTopK or PolicyLoss over these targets.
    Returns:
        (loss, {column: (T,)}): the differentiable sum, and each target's own values (fp32, detached, not weighted).
    Raises:
        ValueError: there is no target, or the objective has another number of them.
    Source: tests/test_head.py compares values and gradients with plain PyTorch in fp64, bench/check_trl.py with TRL.
    """
    count = len(row_T)
    if count == 0:
        raise ValueError("the batch has no target to learn from")
    if len(objective.weight_T) != count or objective.lengths is not None and sum(objective.lengths) != count:
        raise ValueError(f"{count} targets, but {len(objective.weight_T)} weights and sequences of {objective.lengths}")
    if not torch.is_grad_enabled():  # of a weight that trains needs_input_grad is True even under no_grad
        head_VD = head_VD.detach()
    loss, *columns = _Head.apply(hidden_ND[row_T], head_VD, objective, chunk)
    return loss, dict(zip(objective.columns, columns, strict=True))
