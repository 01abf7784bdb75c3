"""The LM head over the target rows only, in chunks, with the gradient computed in the forward pass.

Row t of the targets contributes weight[t] * nll[t]; the gradient of its logits, weight[t] * (softmax(z) - onehot), is
known as soon as its normaliser is. So each chunk is finished before the next one starts: logits in fp32, loss, dLogits,
then dHidden (and dWeight when the head trains). A frozen head takes two matrix products; no logits are kept, none
recomputed.
"""
import torch

from minixmd.models.multimodal import raw_logits

CHUNK = 1024  # target rows whose logits exist at once: 0.6 GB of fp32 at a vocabulary of 152,064


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, id_T, weight_T, chunk):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        nll_T = torch.empty(len(id_T), dtype=torch.float32, device=hidden_TD.device)
        grad_TD = torch.empty_like(hidden_TD) if need_hidden else None
        grad_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if need_weight else None
        for start in range(0, len(id_T), chunk):
            rows = slice(start, start + chunk)
            z_TV = raw_logits(hidden_TD[rows], weight_VD)
            lse_T = z_TV.logsumexp(-1)
            nll_T[rows] = lse_T - z_TV.gather(1, id_T[rows, None]).squeeze(1)
            if need_hidden or need_weight:
                dz_TV = z_TV.sub_(lse_T[:, None]).exp_()  # in place: the chunk's logits are ours and no longer needed
                dz_TV[torch.arange(len(dz_TV), device=dz_TV.device), id_T[rows]] -= 1
                dz_TV.mul_(weight_T[rows, None])
                if need_weight:
                    grad_VD.addmm_(dz_TV.T, hidden_TD[rows].float())
                if need_hidden:
                    grad_TD[rows] = dz_TV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(grad_TD, grad_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll_T)
        return (nll_T * weight_T).sum(), nll_T

    @staticmethod
    def backward(ctx, grad, _):
        grad_TD, grad_VD = ctx.saved_tensors
        return (None if grad_TD is None else grad_TD * grad.to(grad_TD.dtype),
                None if grad_VD is None else (grad_VD * grad).to(ctx.weight_dtype), None, None, None)


def cross_entropy(hidden_ND, head_VD, batch, chunk=CHUNK):
    """Sum over targets of target_weight * -log p(target), never with more than `chunk` rows of logits.

    Args:
        hidden_ND: (N, D) from the model, differentiable. head_VD: (V, D) the LM head's weight, differentiable.
        batch: its target vectors say which rows predict what; rows may repeat.
    Returns:
        (loss, nll_T): the differentiable weighted sum, and every target's own -log p in nats (fp32, detached).
    Raises:
        ValueError: the batch has no target.
    Source: tests/test_head.py compares value and gradients with torch's cross_entropy in fp64.
    """
    if len(batch.target_id_T) == 0:
        raise ValueError("the batch has no target to learn from")
    return _CrossEntropy.apply(hidden_ND[batch.target_row_T], head_VD, batch.target_id_T, batch.target_weight_T, chunk)
