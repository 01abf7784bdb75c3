"""bench_distill: KL from the teacher's logits or from its stored top-64, and the gradient of the student's logits.

Bound by memory. With student logits of i bytes, teacher logits of j, the gradient of o, and C = common_vocab, the bytes
are N (2 (i + j) C + o V) from both rows of logits and N (2 i C + o V) from the stored ids; a rate counts them for every
side. No id is suppressed, since the other libraries cannot do that. TRL's and Liger's losses are given the first C
columns; they have no dropped shares.

Run: python -m bench.bench_distill [--device cpu] [--out bench/results/NAME.json]
On a CPU a minute, in 3 GB. The last line of stdout is JSON.
"""
import torch

from bench import measure
from minixmd.kernels import distill, distill_topk

CASES = [  # what learns from what, N (a chunk of the head), V, W, common_vocab, dtypes of student, teacher, gradient
    ("Qwen2-VL-7B from Qwen2-Audio-7B", 1024, 152_064, 156_032, 151_646, "float32", "float32", "bfloat16"),
    ("Qwen2-Audio-7B from Qwen2-VL-7B", 1024, 156_032, 152_064, 151_646, "float32", "float32", "bfloat16"),
]  # torch.compile, which takes long, in the last only
SMALL = [("small", 6, 4_099, 4_200, 4_000, "float32", "float32", "bfloat16")]
CPU_ROWS, CPU_CHECKED = 128, 2  # bytes and memory grow with the rows alone; the interpreter needs 0.5 s a row
TEMPERATURE, J = 2.0, 64


class Problem:
    def __init__(self, of, device, N, V, W, common_vocab, dtype, teacher_dtype, out_dtype):
        self.student_NV = (4 * torch.randn(N, V, device=device)).to(getattr(torch, dtype))
        self.teacher_NW = (4 * torch.randn(N, W, device=device)).to(getattr(torch, teacher_dtype))
        self.out_dtype, self.common_vocab = getattr(torch, out_dtype), common_vocab
        self.how = common_vocab, torch.zeros(0, dtype=torch.long, device=device), TEMPERATURE
        self.weight_N = torch.full((N,), 1 / N, device=device)
        self.rows = torch.arange(N - 1, -1, -max(1, N // 16), device=device)  # those that are compared with fp64
        if of == "full":
            self.given, self.module = [self.teacher_NW], distill
            self.ref, self.kernel = distill.distill_kl_ref, distill.distill_kl_grad
            read = self.teacher_NW[:, :common_vocab].nbytes * 2
        else:
            logq_NK = (self.teacher_NW[:, :common_vocab].float() / TEMPERATURE).log_softmax(-1)
            logq_NJ, id_NJ = logq_NK.topk(J)
            self.given, self.module = [id_NJ, logq_NJ, (1 - logq_NJ.exp().sum(-1)).clamp(min=0)], distill_topk
            self.ref, self.kernel = distill_topk.distill_topk_ref, distill_topk.distill_topk_grad
            read = N * (8 * J + 4)  # ids and log-probabilities of 4 bytes, the tail
        self.moved = 2 * self.student_NV[:, :common_vocab].nbytes + read + N * V * self.out_dtype.itemsize + 16 * N

    def ours(self, backend):
        """The gradient, the losses, and the dropped share or shares."""
        out_NV = torch.empty_like(self.student_NV, dtype=self.out_dtype)
        return out_NV, *self.kernel(self.student_NV, *self.given, self.weight_N, *self.how, out_NV, backend)

    def autograd(self, fn, rows=slice(None), dtype=None):
        x_NV = self.student_NV[rows].detach().to(dtype).requires_grad_()
        given = [t[rows].to(dtype if t.is_floating_point() else None) for t in self.given]
        loss_N, *shares = fn(x_NV, *given, *self.how)
        return *torch.autograd.grad(loss_N, x_NV, self.weight_N[rows].to(loss_N.dtype)), loss_N.detach(), *shares

    def truth(self):
        return self.autograd(self.ref, self.rows, torch.float64)

    def pick(self, results):
        return [t[self.rows] for t in results]

    def sides(self):
        return {"triton": lambda: self.ours("triton"), "torch": lambda: self.ours("torch"),
                "ref": lambda: self.autograd(self.ref)}  # fmt: skip

    def others(self, compiled):
        found = {}
        if self.module is distill and measure.installed("trl"):
            found["trl"] = lambda: self.gradient_of_mean(trl)
        if self.module is distill and measure.installed("liger_kernel"):
            found["liger"] = lambda: self.gradient_of_mean(liger)
        if compiled:
            fast = torch.compile(self.ref, dynamic=False)
            found["compiled ref"] = lambda: self.autograd(fast)
        return found

    def gradient_of_mean(self, mean_kl):
        x_NV = self.student_NV.detach().requires_grad_()
        mean = mean_kl(x_NV[:, :self.common_vocab], self.teacher_NW[:, :self.common_vocab])
        return torch.autograd.grad(TEMPERATURE**2 * mean, x_NV)


def trl(student_NK, teacher_NK):
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student_NK, teacher_NK, beta=0, temperature=TEMPERATURE)


def liger(student_NK, teacher_NK):
    from liger_kernel.transformers import LigerKLDIVLoss

    logp_NK, logq_NK = ((z_NK / TEMPERATURE).log_softmax(-1) for z_NK in (student_NK, teacher_NK))
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(logp_NK, logq_NK)


def run(bench, of, pair, N, V, W, common_vocab, dtype, teacher_dtype, out_dtype, compiled):
    cpu, sizes = bench.device == "cpu", (V, W, common_vocab, dtype, teacher_dtype, out_dtype)
    p = Problem(of, bench.device, min(N, CPU_CHECKED) if cpu else N, *sizes)
    measure.check(p.sides(), p.truth, p.pick)
    if cpu:
        p = Problem(of, "cpu", min(N, CPU_ROWS), *sizes)
    case = {"of": of, "model": pair, "N": len(p.weight_N), "V": V, "W": W, "common_vocab": common_vocab,
            "logits": dtype, "teacher": teacher_dtype, "gradient": out_dtype}  # fmt: skip
    bench.rows(case, p.sides(), None if cpu else p.others(compiled), p.moved, module=p.module, truth=p.truth,
               pick=p.pick)  # fmt: skip


def main(argv=None):
    bench = measure.Bench(__doc__, argv)
    cases = SMALL if bench.small else CASES if bench.device == "cuda" else CASES[-1:]
    for case in cases:
        for of in ("full", "top-64"):
            run(bench, of, *case, compiled=case is cases[-1])
    bench.end("distill", "distill_topk")


if __name__ == "__main__":
    main()
