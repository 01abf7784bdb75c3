"""bench_logprob: log-probability of a row's token, the row's entropy, and the gradient of its logits.

Bound by memory. Logits of i bytes are read once for the value, N V i, and once more for the gradient, which is written
in o bytes: N V (2 i + o). Eager PyTorch goes over N V values again and again. A rate counts these bytes for every side.
No id is suppressed, since the other libraries cannot do that; "triton, bans" is the kernel without Qwen2's special ids.

Run: python -m bench.bench_logprob [--device cpu] [--out bench/results/NAME.json]
On a CPU under a minute, in 3 GB. The last line of stdout is JSON.
"""
import torch

from bench import measure
from minixmd.kernels import logprob
from minixmd.kernels.logprob import logits_grad, row_stats, token_logprob_ref

CASES = [  # model, N, V, dtypes of the logits and of the gradient; torch.compile, which takes long, in the last only
    ("Qwen2-VL-7B, logits kept", 4096, 152_064, "bfloat16", "bfloat16"),  # as TRL's GRPO holds them
    ("Qwen2-VL-7B, chunk of the head", 1024, 152_064, "float32", "bfloat16"),  # minixmd/models/head.py
    ("Qwen2-Audio-7B, chunk of the head", 1024, 156_032, "float32", "bfloat16"),
]
SMALL = [("small", 6, 4_099, "float32", "bfloat16")]
CPU_ROWS, CPU_CHECKED = 128, 2  # bytes and memory grow with the rows alone; the interpreter needs 0.5 s a row


class Problem:
    def __init__(self, device, N, V, dtype, out_dtype):
        self.padded_MV = (4 * torch.randn(N + 1, V, device=device)).to(getattr(torch, dtype))
        self.logits_NV = self.padded_MV[:N]  # Liger takes no log-probability from a sequence's last row
        self.out_dtype = getattr(torch, out_dtype)
        self.index_N, self.coef_N = torch.randint(0, V, (N,), device=device), torch.randn(N, device=device)
        self.rows = torch.arange(N - 1, -1, -max(1, N // 16), device=device)  # those that are compared with fp64

    def value(self, backend, suppressed_Z=None, vocab_limit=None):
        return row_stats(self.logits_NV, self.index_N, 1.0, suppressed_Z, vocab_limit, backend)[:2]

    def gradient(self, backend, suppressed_Z=None, vocab_limit=None):
        stats = row_stats(self.logits_NV, self.index_N, 1.0, suppressed_Z, vocab_limit, backend)
        out_NV = torch.empty_like(self.logits_NV, dtype=self.out_dtype)
        logits_grad(self.logits_NV, self.index_N, stats, self.coef_N, 1.0, suppressed_Z, vocab_limit, backend, out_NV)
        return *stats[:2], out_NV

    def no_grad(self, fn):
        with torch.no_grad():
            return fn(self.logits_NV, self.index_N)

    def autograd(self, fn, rows=slice(None), dtype=None):
        x_NV = self.logits_NV[rows].detach().to(dtype).requires_grad_()
        logp_N, entropy_N = fn(x_NV, self.index_N[rows])
        (grad_NV,) = torch.autograd.grad(logp_N, x_NV, self.coef_N[rows].to(logp_N.dtype))
        return logp_N.detach(), entropy_N.detach(), grad_NV

    def truth(self):
        return self.autograd(token_logprob_ref, self.rows, torch.float64)

    def pick(self, results):
        return [t[self.rows] for t in results]

    def sides(self, of):
        """{name: side}, ours, of "value" or "gradient"."""
        ours, eager = (self.value, self.no_grad) if of == "value" else (self.gradient, self.autograd)
        return {"triton": lambda: ours("triton"), "torch": lambda: ours("torch"),
                "ref": lambda: eager(token_logprob_ref)}  # fmt: skip

    def others(self, of, compiled):
        eager, found = self.no_grad if of == "value" else self.autograd, {}
        if measure.installed("trl"):
            found["trl"] = lambda: eager(trl)
        if of == "value" and measure.installed("liger_kernel"):
            found["liger"] = self.liger
        if compiled:
            fast = torch.compile(token_logprob_ref, dynamic=False)
            found["compiled ref"] = lambda: eager(fast)
        return found

    def liger(self):
        from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax  # has no entropy and no gradient

        return fused_selective_log_softmax(self.padded_MV[None], self.index_N[None], 1.0)

    def moved(self):
        """Bytes that the kernels move: logits, indices and 16 bytes of statistics a row; for the gradient the logits
        again, the gradient, and indices, coefficients and two statistics."""
        N, V = self.logits_NV.shape
        value = self.logits_NV.nbytes + (8 + 16) * N
        return {"value": value, "gradient": value + self.logits_NV.nbytes + N * V * self.out_dtype.itemsize + 20 * N}


def trl(logits_NV, index_N):
    from trl.trainer import utils

    if both := getattr(utils, "selective_log_softmax_and_entropy", None):  # of 1.16; earlier they were two
        return both(logits_NV, index_N, entropy_requires_grad=False)
    with torch.no_grad():
        entropy_N = utils.entropy_from_logits(logits_NV)
    return utils.selective_log_softmax(logits_NV, index_N), entropy_N


def run(bench, model, N, V, dtype, out_dtype, compiled):
    cpu = bench.device == "cpu"
    p = Problem(bench.device, min(N, CPU_CHECKED) if cpu else N, V, dtype, out_dtype)
    measure.check(p.sides("gradient"), p.truth, p.pick)  # the value is the same launch
    if cpu:
        p = Problem("cpu", min(N, CPU_ROWS), V, dtype, out_dtype)
    bans = torch.arange(V - 421, V - 408, device=bench.device), V - 399  # as many, and where, as Qwen2's special ids
    for of, moved in p.moved().items():
        sides, others = p.sides(of), {}
        if not cpu:
            ours = getattr(p, of)
            sides["triton, bans"] = lambda ours=ours: ours("triton", *bans)
            others = p.others(of, compiled)
        case = {"of": of, "model": model, "N": len(p.index_N), "V": V, "logits": dtype, "gradient": out_dtype}
        bench.rows(case, sides, others, moved, module=logprob, truth=p.truth, pick=p.pick)


def main(argv=None):
    bench = measure.Bench(__doc__, argv)
    cases = SMALL if bench.small else CASES if bench.device == "cuda" else CASES[-1:]
    for case in cases:
        run(bench, *case, compiled=case is cases[-1])
    bench.end("logprob")


if __name__ == "__main__":
    main()
