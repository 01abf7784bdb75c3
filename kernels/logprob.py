"""Log-probability of one chosen token per row of logits.

    z = logits / temperature,   lse[n] = log sum_v exp(z[n, v])
    logp[n]       = z[n, y[n]] - lse[n]
    dlogits[n, v] = g[n] / temperature * (1[v == y[n]] - exp(z[n, v] - lse[n]))

Dims: N tokens (rows), V vocabulary.
"""
import torch
import torch.nn.functional as F


def token_logprob_ref(logits_NV, index_N, temperature=1.0):
    """Log-probability of token index_N[n] under softmax(logits_NV[n] / temperature), in plain PyTorch.

    Args:
        logits_NV: (N, V) fp32 | bf16 | fp16, or fp64 for ground truth; differentiable.
        index_N: (N,) int64 in [0, V).
        temperature: > 0, dimensionless; a Python float.
    Returns:
        (N,) fp32 (fp64 for fp64 logits), in nats, <= 0.
    Source: definition in the module docstring.
    """
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature  # softmax sums need fp32
    return F.log_softmax(z_NV, dim=-1).gather(-1, index_N[:, None]).squeeze(-1)
