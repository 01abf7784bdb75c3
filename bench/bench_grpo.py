"""bench_grpo: from rows of logits to the GRPO loss, its gradient and the diagnostics.

Bound by memory. Logits of i bytes are read twice and their gradient is written in o bytes: N V (2 i + o), which a rate
counts for every side. "three steps" is what a ratio a sequence needs: logprob.row_stats, some fifty small operators,
logprob.logits_grad. The same bytes, so what one kernel saves is those operators' launches. "trl" is its kernel for
log-probabilities and entropies, with our loss on them by autograd: the loss itself is inside TRL's trainer.

The rows are whole sequences, the last row of each with weight 0, as Liger's kernel wants them. Advantages have both
signs and both bounds of the ratio bind.

Run: python -m bench.bench_grpo [--device cpu] [--out bench/results/NAME.json]
On a CPU under a minute, in 3 GB. The last line of stdout is JSON.
"""
import torch
import torch.nn.functional as F

from bench import bench_logprob, measure
from minixmd.kernels import grpo
from minixmd.kernels.grpo import ClipConfig, grpo_coefficient, grpo_loss_ref, grpo_rows, grpo_terms
from minixmd.kernels.logprob import logits_grad, row_stats

CASES = [  # model, sequences, rows in each, V, dtypes of the logits and of the gradient; torch.compile in the last only
    ("Qwen2-VL-7B, logits kept", 8, 512, 152_064, "bfloat16", "bfloat16"),  # as TRL's GRPO holds them
    ("Qwen2-VL-7B, chunk of the head", 4, 256, 152_064, "float32", "bfloat16"),  # minixmd/models/head.py
    ("Qwen2-Audio-7B, chunk of the head", 4, 256, 156_032, "float32", "bfloat16"),
]
SMALL = [("small", 2, 4, 4_099, "float32", "bfloat16")]
CPU_SHAPE, CPU_CHECKED = (4, 32), (2, 2)  # bytes and memory grow with the rows alone; the interpreter is slow
CLIP_CONFIG = ClipConfig(0.2, 0.28, 0.04, "k3")


class Problem:
    def __init__(self, device, sequences, length, V, dtype, out_dtype):
        N = sequences * length
        self.logits_NV = (4 * torch.randn(N, V, device=device)).to(getattr(torch, dtype))
        self.out_dtype, self.shape = getattr(torch, out_dtype), (sequences, length)
        id_N = torch.randint(0, V, (N,), device=device)
        logp_N = row_stats(self.logits_NV, id_N, backend="torch")[0]
        self.advantage_B = torch.linspace(-1, 1.5, sequences, device=device)
        weight_N = torch.full((N,), 1 / N, device=device)
        weight_N[length - 1::length] = 0
        self.vectors = (id_N, logp_N + torch.rand(N, device=device) - 0.5, logp_N + 0.3 * torch.randn(N, device=device),
                        self.advantage_B.repeat_interleave(length), weight_N)
        self.rows = torch.arange(N - 1, -1, -max(1, N // 16), device=device)  # those that are compared with fp64

    def ours(self, backend):
        out_NV = torch.empty_like(self.logits_NV, dtype=self.out_dtype)
        logp_N, entropy_N, terms = grpo_rows(self.logits_NV, *self.vectors, CLIP_CONFIG, backend=backend, out=out_NV)
        return terms[0], out_NV, logp_N, entropy_N

    def three_steps(self):
        id_N, *vectors = self.vectors
        stats = row_stats(self.logits_NV, id_N)
        coef_N, terms = grpo_coefficient(stats[0], *vectors, CLIP_CONFIG)
        out_NV = torch.empty_like(self.logits_NV, dtype=self.out_dtype)
        return terms[0], logits_grad(self.logits_NV, id_N, stats, coef_N, out=out_NV), *stats[:2]

    def autograd(self, fn, rows=slice(None), dtype=None):
        x_NV = self.logits_NV[rows].detach().to(dtype).requires_grad_()
        loss, logp_N, entropy_N, terms = fn(x_NV, *(t[rows] for t in self.vectors), CLIP_CONFIG)
        return terms[0], *torch.autograd.grad(loss, x_NV), logp_N, entropy_N

    def truth(self):
        return self.autograd(grpo_loss_ref, self.rows, torch.float64)

    def pick(self, results):
        return [t[self.rows] for t in results]

    def sides(self):
        return {"triton": lambda: self.ours("triton"), "torch": lambda: self.ours("torch"),
                "ref": lambda: self.autograd(grpo_loss_ref)}  # fmt: skip

    def others(self, compiled):
        found = {}
        if measure.installed("trl"):
            found["trl"] = lambda: self.autograd(trl)
        if measure.installed("liger_kernel"):
            found["liger"] = self.liger
        if compiled:
            fast = torch.compile(grpo_loss_ref, dynamic=False)
            found["compiled ref"] = lambda: self.autograd(fast)
        return found

    def liger(self):
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        x_BLV = self.logits_NV.view(*self.shape, -1).detach().requires_grad_()
        id_BL, old_BL, ref_BL, _, weight_BL = (t.view(self.shape)[:, :-1].contiguous() for t in self.vectors)
        low, high, beta = CLIP_CONFIG.clip_low, CLIP_CONFIG.clip_high, CLIP_CONFIG.beta
        loss_BL, _, _ = triton_grpo_loss(x_BLV, old_BL, ref_BL, id_BL, self.advantage_B, temperature=1.0, beta=beta,
                                         eps_low=low, eps_high=high, inplace=False)
        (grad_BLV,) = torch.autograd.grad(loss_BL, x_BLV, weight_BL)
        return F.pad(loss_BL.detach(), (0, 1)).flatten(), grad_BLV.view_as(self.logits_NV)

    def moved(self):
        """Bytes that the kernel moves: a row of weight 0 is read once; 48 bytes of a row's vectors."""
        N, live = len(self.logits_NV), (self.vectors[-1] != 0).sum().item()
        return self.logits_NV.nbytes // N * (N + live) + self.logits_NV.numel() * self.out_dtype.itemsize + 48 * N


def trl(logits_NV, id_N, old_N, ref_N, advantage_N, weight_N, clip_config):
    logp_N, entropy_N = bench_logprob.trl(logits_NV, id_N)
    terms = grpo_terms(logp_N, old_N, ref_N, advantage_N, weight_N, clip_config)
    return (terms[0] * weight_N).sum(), logp_N.detach(), entropy_N, [t.detach() for t in terms]


def run(bench, model, sequences, length, V, dtype, out_dtype, compiled):
    cpu = bench.device == "cpu"
    p = Problem(bench.device, *(CPU_CHECKED if cpu else (sequences, length)), V, dtype, out_dtype)
    measure.check(p.sides(), p.truth, p.pick)
    if cpu and not bench.small:
        p = Problem("cpu", *CPU_SHAPE, V, dtype, out_dtype)
    sides, others = p.sides(), {}
    if not cpu:
        sides["three steps"], others = p.three_steps, p.others(compiled)
    case = {"of": "gradient", "model": model, "N": len(p.logits_NV), "V": V, "logits": dtype, "gradient": out_dtype}
    bench.rows(case, sides, others, p.moved(), module=grpo, truth=p.truth, pick=p.pick)


def main(argv=None):
    bench = measure.Bench(__doc__, argv)
    cases = SMALL if bench.small else CASES if bench.device == "cuda" else CASES[-1:]
    for case in cases:
        run(bench, *case, compiled=case is cases[-1])
    bench.end("grpo")


if __name__ == "__main__":
    main()
