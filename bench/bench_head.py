"""bench_head: log-probs of the targets and their gradient through the LM head, against computing all logits.

With N targets, width D and V columns one product is 2 N V D FLOPs. A frozen head needs two: logits and dX. minixmd does
1024 rows at a time, with the gradient in the forward pass, so 4 * 1024 * V bytes of logits live at once (0.6 GB at
152,064). All logits with log_softmax are the same two products, and live as logits, log-probs and their gradients.
Heads in chunks that compute the logits again in the backward pass take three. So the claim is memory, not time.

Compared on the same hidden states and frozen head (fp32 on a CPU, bf16 on CUDA), weighted sum of log-probs:
    triton      models/head.py with the row kernels (CUDA only: the interpreter would take hours)
    torch       the same with their PyTorch twins
    grpo        the same with the policy loss, ratio, KL and entropy in place of cross-entropy
    ref         all logits at once, torch.log_softmax, gather
    trl         all logits at once, TRL's selective_log_softmax
    liger       its fused linear cross-entropy (CUDA only)
Parity first: every log-prob, and the gradient of some rows, against fp64. Logits have std 5, the largest are near 29.

Run: python -m bench.bench_head [--device cpu] [--out bench/results/NAME.json]
On a CPU (width 512, since logits know nothing of the width): 8 GB, 5 minutes. The last line of stdout is JSON.
"""
import torch

from bench.measure import Bench, check, installed
from minixmd.kernels.grpo import ClipConfig
from minixmd.models.head import CrossEntropy, PolicyLoss, head_loss

CASES = [  # N targets, D, V
    (2048, 3584, 152_064),  # Qwen2-VL-7B: 7 completions of 300 tokens
    (4096, 4096, 156_032),  # Qwen2-Audio-7B
]
CPU = [(2048, 512, 152_064)]
SMALL = [(70, 16, 500)]
GRAD_ROWS = 64  # rows whose gradient is compared with fp64


class Case:
    """One size: hidden states, head, targets; a side returns (log-probs, gradient of the hidden states)."""

    def __init__(self, N, D, V, device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.hidden_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
        self.head_VD = (torch.randn(V, D, device=device) * (5 / D**0.5)).to(dtype)
        self.id_N = torch.randint(0, V, (N,), device=device)
        self.weight_N = torch.rand(N, device=device) / N
        self.row_N = torch.arange(N, device=device)
        self.rows = torch.arange(0, N, max(1, N // GRAD_ROWS), device=device)
        self.old_N = None  # log-probs of the old policy and of the reference, for `grpo`

    def by_head(self, row_loss):
        loss, columns = head_loss(self.hidden_ND, self.head_VD, self.row_N, row_loss)
        (grad_ND,) = torch.autograd.grad(loss, self.hidden_ND)
        return columns, grad_ND

    def cross_entropy(self, backend):
        columns, grad_ND = self.by_head(CrossEntropy(self.id_N, self.weight_N, backend))
        return -columns["nll"], grad_ND

    def grpo(self, backend):
        """With ratio 1, KL 0 and advantage 1 its gradient is cross-entropy's."""
        advantage_N, clip_config = torch.ones_like(self.weight_N), ClipConfig(0.2, 0.28, 0.04, "k3")
        columns, grad_ND = self.by_head(
            PolicyLoss(self.id_N, self.old_N, self.old_N, advantage_N, self.weight_N, clip_config, backend))
        return columns["logp"], grad_ND

    def eager(self, log_softmax):
        logits_NV = self.hidden_ND @ self.head_VD.T
        logp_N = log_softmax(logits_NV, self.id_N)
        (grad_ND,) = torch.autograd.grad(-(logp_N * self.weight_N).sum(), self.hidden_ND)
        return logp_N.detach(), grad_ND

    def liger(self):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        nll_N = liger_fused_linear_cross_entropy(self.hidden_ND, self.head_VD, self.id_N, reduction="none")
        (grad_ND,) = torch.autograd.grad((nll_N * self.weight_N).sum(), self.hidden_ND)
        return -nll_N.detach(), grad_ND

    def truth(self):
        """In fp64, a slice of the vocabulary at a time: all log-probs, and the gradient of self.rows."""
        hidden_ND, rows = self.hidden_ND.detach().double(), self.rows
        slices = self.head_VD.split(8192)
        lse_N = torch.stack([(hidden_ND @ w.double().T).logsumexp(-1) for w in slices]).logsumexp(0)
        right_ND = self.head_VD[self.id_N].double()
        logp_N = (hidden_ND * right_ND).sum(-1) - lse_N
        mean_RD = 0  # of the head's rows under softmax
        for w in slices:
            w = w.double()
            mean_RD = mean_RD + (hidden_ND[rows] @ w.T - lse_N[rows, None]).exp() @ w
        return logp_N, self.weight_N[rows, None].double() * (mean_RD - right_ND[rows])

    def pick(self, results):
        logp_N, grad_ND = results
        return logp_N, grad_ND[self.rows]


def plain(logits_NV, id_N):
    return logits_NV.log_softmax(-1).gather(1, id_N[:, None]).squeeze(1)


def trl(logits_NV, id_N):
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits_NV, id_N)


def run(bench, N, D, V):
    """The rows of one size."""
    cuda, case = bench.device == "cuda", Case(N, D, V, bench.device)
    sides, others = {}, {}
    if cuda or bench.small:
        sides["triton"] = lambda: case.cross_entropy("triton")
    sides["torch"] = lambda: case.cross_entropy("torch")
    sides["grpo"] = lambda: case.grpo("triton" if cuda else "torch")
    sides["ref"] = lambda: case.eager(plain)
    if installed("trl"):
        others["trl"] = lambda: case.eager(trl)
    if installed("liger_kernel") and cuda:
        others["liger"] = case.liger
    truth = case.truth()
    case.old_N = truth[0].float()
    check({**sides, "triton": sides["grpo"]}, lambda: truth, case.pick)
    check(sides, lambda: truth, case.pick)
    found = bench.rows({"N": N, "D": D, "V": V}, sides, others, flop=4 * N * V * D if cuda else None,
                       truth=lambda: truth, pick=case.pick)
    for name, row in found.items():
        logp_N, _ = {**sides, **others}[name]()
        row["max_dlogp"] = (logp_N.double() - truth[0]).abs().max().item()
        row["peak_of_ref"] = row["peak_bytes"] / found["ref"]["peak_bytes"]
        products = f", {row['flop'] / (2 * N * V * D):.2f} products" if "flop" in row else ""
        print(f"  {name:8} max |d log-prob| {row['max_dlogp']:.1e}, peak {row['peak_of_ref']:.3f} of ref's{products}",
              flush=True)


def main(argv=None):
    bench = Bench(__doc__, argv)
    cases = CPU
    if bench.small:
        cases = SMALL
    elif bench.device == "cuda":
        cases = CASES
    for N, D, V in cases:
        run(bench, N, D, V)
    bench.end()


if __name__ == "__main__":
    main()
