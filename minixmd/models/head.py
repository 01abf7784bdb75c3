"""The LM head over the target rows only, in chunks, with the gradient computed in the forward pass.

    z = h Wᵀ        loss = sum_t weight[t] f(z[t])        dh = dz W        dW = dzᵀ h        dz[t] = weight[t] f'(z[t])

f is a row loss, which needs one row of logits and a few numbers of that token, so dz is known as soon as the row is.
Each chunk is finished before the next starts: logits in fp32, a row kernel (kernels/) that gives loss and dz, then dh,
and dW when the head trains. No logits are kept and none recomputed."""
from dataclasses import dataclass

import torch

from minixmd.kernels import distill, distill_topk, grpo, logprob

CHUNK = 1024  # target rows whose logits exist at once: 0.6 GB of fp32 at a vocabulary of 152,064
frozen = dataclass(frozen=True, eq=False)  # tensors have no single answer to ==


def raw_logits(hidden_ND, weight_VD, out=None):
    """hidden Wᵀ as (N, V) fp32: products of the storage dtype, accumulated in fp32; differentiable without `out`."""
    if weight_VD.dtype == torch.float32:
        return torch.matmul(hidden_ND, weight_VD.T, out=out)
    recorded = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    if weight_VD.is_cuda and not recorded:  # mm has no derivative with an out_dtype
        return torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32, out=out)
    return torch.matmul(hidden_ND.float(), weight_VD.float().T, out=out)


class RowLoss:
    """loss_and_grad(z_TV, rows, out_TV), which runs without autograd, computes the targets of a slice `rows`, whose
    logits z_TV it may overwrite. It returns a tuple of their columns, not weighted, and writes d total / dz to out_TV,
    which may be z_TV itself or None. total(columns): the loss of all targets. backend: "triton" | "torch"."""

    lengths = None  # targets of each sequence that must not be cut in two chunks

    def total(self, columns):
        return (columns[0] * self.weight_T).sum()


@frozen
class CrossEntropy(RowLoss):
    """-log p(id) over the raw logits of the whole vocabulary, as in SFT. id_T: (T,) int64. weight_T: (T,) fp32."""

    id_T: torch.Tensor
    weight_T: torch.Tensor
    backend: str
    columns = ("nll",)

    def loss_and_grad(self, z_TV, rows, out_TV):
        id_T = self.id_T[rows]
        stats = logprob.row_stats(z_TV, id_T, backend=self.backend)
        if out_TV is not None:
            logprob.logits_grad(z_TV, id_T, stats, -self.weight_T[rows], backend=self.backend, out=out_TV)
        return (-stats[0],)


@frozen
class DistillKL(RowLoss):
    """T² KL(teacher || student), or its reverse, from a live teacher, whose logits too exist for one chunk only (in
    teacher_TW). teacher_TE, teacher_head_WE: hidden states at the targets, head. All else: as in kernels/distill.py."""

    teacher_TE: torch.Tensor
    teacher_head_WE: torch.Tensor
    weight_T: torch.Tensor
    common_vocab: int
    suppressed_Z: torch.Tensor
    temperature: float
    backend: str
    reverse: bool = False
    columns = ("kl", "student_dropped", "teacher_dropped")

    def loss_and_grad(self, z_TV, rows, out_TV, teacher_TW=None):
        teacher_TW = raw_logits(self.teacher_TE[rows], self.teacher_head_WE, out=teacher_TW)
        return distill.distill_kl_grad(z_TV, teacher_TW, self.weight_T[rows], self.common_vocab, self.suppressed_Z,
                                       self.temperature, out_TV, self.backend, self.reverse)


@frozen
class DistillTopK(RowLoss):
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

    def loss_and_grad(self, z_TV, rows, out_TV):
        targets = (x[rows] for x in (self.id_TJ, self.logq_TJ, self.tail_T, self.weight_T))
        return distill_topk.distill_topk_grad(z_TV, *targets, self.common_vocab, self.suppressed_Z, self.temperature,
                                              out_TV, self.backend)


@frozen
class PolicyLoss(RowLoss):
    """GRPO's clipped policy loss with its KL to a reference; arguments as in kernels/grpo.py. lengths: targets of each
    sequence, in order, for one importance ratio a sequence (GSPO); None = one ratio a token."""

    id_T: torch.Tensor
    old_T: torch.Tensor
    ref_T: torch.Tensor | None
    advantage_T: torch.Tensor
    weight_T: torch.Tensor
    clip_config: grpo.ClipConfig
    backend: str
    temperature: float = 1.0
    suppressed_Z: torch.Tensor | None = None
    vocab_limit: int | None = None
    lengths: tuple | None = None
    columns = ("loss", "ratio", "clipped", "kl", "logp", "entropy")

    def loss_and_grad(self, z_TV, rows, out_TV):
        id_T = self.id_T[rows]
        ref_T = None if self.ref_T is None else self.ref_T[rows]
        vectors = self.old_T[rows], ref_T, self.advantage_T[rows], self.weight_T[rows], self.clip_config
        options = self.temperature, self.suppressed_Z, self.vocab_limit, self.backend
        if self.lengths is None:
            logp_T, entropy_T, terms = grpo.grpo_rows(z_TV, id_T, *vectors, *options, out=out_TV)
            return *terms, logp_T, entropy_T
        stats = logprob.row_stats(z_TV, id_T, *options)
        coef_T, terms = grpo.grpo_coefficient(stats[0], *vectors, self._sequence_numbers(rows, z_TV.device))
        if out_TV is not None:
            logprob.logits_grad(z_TV, id_T, stats, coef_T, *options, out=out_TV)
        return *terms, *stats[:2]

    def _sequence_numbers(self, rows, device):  # within the chunk
        number_T = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))[rows]
        return number_T.unique_consecutive(return_inverse=True)[1].to(device)


@frozen
class PolicyWithTeacher(RowLoss):
    """The policy loss plus a live teacher's divergence over the same logits: sum of policy.weight_T loss and of
    teacher.weight_T teacher_kl; where the latter weight is 0, teacher_TE may hold anything finite. Beside the policy's
    memory it takes one (chunk, max(V, W)) of fp32: the teacher's logits, which the divergence's gradient overwrites."""

    policy: PolicyLoss
    teacher: DistillKL
    columns = (*PolicyLoss.columns, "teacher_kl", "student_dropped", "teacher_dropped")

    @property
    def weight_T(self):
        return self.policy.weight_T

    @property
    def lengths(self):
        return self.policy.lengths

    def loss_and_grad(self, z_TV, rows, out_TV):
        T, V = z_TV.shape
        W = len(self.teacher.teacher_head_WE)
        buffer = torch.empty(T, max(V, W), device=z_TV.device)
        divergence_TV, policy_TV = buffer[:, :V], z_TV
        if out_TV is None:
            divergence_TV = policy_TV = None
        divergence = self.teacher.loss_and_grad(z_TV, rows, divergence_TV, buffer[:, :W])
        columns = self.policy.loss_and_grad(z_TV, rows, policy_TV)  # last: it overwrites the logits
        if out_TV is not None:
            torch.add(policy_TV, divergence_TV, out=out_TV)  # rounded once
        return *columns, *divergence

    def total(self, columns):
        teacher_kl_T = columns[self.columns.index("teacher_kl")]
        return self.policy.total(columns) + (teacher_kl_T * self.teacher.weight_T).sum()


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
    def forward(ctx, hidden_TD, weight_VD, row_loss, chunk):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = weight_VD.dtype
        grad_TD = torch.empty_like(hidden_TD) if need_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        columns = [torch.empty(len(hidden_TD), device=hidden_TD.device) for _ in row_loss.columns]
        for rows in _chunks(len(hidden_TD), chunk, row_loss.lengths):
            z_TV, dz_TV = raw_logits(hidden_TD[rows], weight_VD), None
            if need_hidden or need_weight:  # in place where it can be: the chunk's logits are ours
                dz_TV = z_TV if dtype == torch.float32 else torch.empty_like(z_TV, dtype=dtype)
            for column_T, values in zip(columns, row_loss.loss_and_grad(z_TV, rows, dz_TV), strict=True):
                column_T[rows] = values
            if need_hidden:
                torch.mm(dz_TV, weight_VD, out=grad_TD[rows])
            if need_weight and dtype == torch.float32:
                grad_VD.addmm_(dz_TV.T, hidden_TD[rows])
            elif need_weight:
                grad_VD += raw_logits(dz_TV.T, hidden_TD[rows].T)
            del z_TV, dz_TV  # before the next chunk's are made
        ctx.save_for_backward(grad_TD, grad_VD)
        ctx.mark_non_differentiable(*columns)
        return row_loss.total(columns), *columns

    @staticmethod
    def backward(ctx, grad, *_):
        grad_TD, grad_VD = ctx.saved_tensors
        return (None if grad_TD is None else grad_TD * grad.to(grad_TD.dtype),
                None if grad_VD is None else grad_VD * grad, None, None)  # which autograd casts to the weight's dtype


def head_loss(hidden_ND, head_VD, row_T, row_loss, chunk=CHUNK):
    """The row loss's total over all targets, never with more than `chunk` rows of logits (but see PolicyLoss.lengths).

    hidden_ND: (N, D) from the model. head_VD: (V, D) the LM head's weight, of the same dtype. Both differentiable.
    row_T: (T,) which row predicts each target of row_loss; rows may repeat. Returns (loss, {column: (T,)}): the
    differentiable sum, and each target's own values (fp32, detached, not weighted). Raises ValueError: there is no
    target, or the row loss has another number of them.
    Source: tests/test_head.py compares values and gradients with plain PyTorch in fp64, bench/check_trl.py with TRL."""
    count = len(row_T)
    if count == 0:
        raise ValueError("the batch has no target to learn from")
    if len(row_loss.weight_T) != count or row_loss.lengths is not None and sum(row_loss.lengths) != count:
        raise ValueError(f"{count} targets, but {len(row_loss.weight_T)} weights and sequences of {row_loss.lengths}")
    if not torch.is_grad_enabled():  # of a weight that trains needs_input_grad is True even under no_grad
        head_VD = head_VD.detach()
    loss, *columns = _Head.apply(hidden_ND[row_T], head_VD, row_loss, chunk)
    return loss, dict(zip(row_loss.columns, columns, strict=True))
