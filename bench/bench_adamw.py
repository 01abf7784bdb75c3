"""bench_adamw: one AdamW update of a matrix of bf16 weights, with fp32 moments and with 8-bit ones.

Bound by memory: the kernel reads and writes each tensor once (the formula is in kernels/adamw.py). "ref" is eager
PyTorch with an fp32 copy of the weights and fp32 moments, "torch" the kernel's twin. A rate counts the kernel's bytes
for every side.

Run: python -m bench.bench_adamw [--device cpu] [--out bench/results/NAME.json]
On a CPU under a minute. The last line of stdout is JSON.
"""
import torch

from bench import measure
from minixmd.kernels import adamw
from minixmd.kernels.adamw import adamw_update

CASES = [("Qwen2-VL-7B, mlp", 18_944 * 3584)]  # matrix, elements
SMALL = [("small", 3001)]
CPU_SIZE, CPU_CHECKED = 1 << 20, 5000  # bytes grow with the size alone; the interpreter is slow
T, OPTIONS = 10, dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


class Problem:
    """A parameter, its gradient and its state; once() updates a copy of them, the sides themselves."""

    def __init__(self, device, size, moments):
        self.moments = moments
        self.p = torch.randn(size, device=device).bfloat16()
        self.grad = torch.randn(size, device=device).bfloat16()
        self.w = self.p.float()
        m, v = torch.randn(size, device=device) / 10, torch.rand(size, device=device)
        self.state = {"exp_avg": m, "exp_avg_sq": v}
        if moments == "8bit":
            self.hold_in_8_bits()
        self.state["residual"] = torch.zeros(size, dtype=torch.int16, device=device)

    def hold_in_8_bits(self):
        for name, levels in (("exp_avg", 127), ("exp_avg_sq", 255)):
            size = self.state[name].numel()
            x_CB = torch.nn.functional.pad(self.state[name], (0, -size % adamw.BLOCK)).view(-1, adamw.BLOCK)
            half_CB = torch.full_like(x_CB, 1 << 19, dtype=torch.int32)  # to the nearest
            self.state[name], self.state[f"{name}_scale"] = adamw.encode(x_CB, half_CB, levels)

    def fp32_moments(self):
        if self.moments == "float32":
            return self.state["exp_avg"], self.state["exp_avg_sq"]
        return [adamw.decode(self.state[name], self.state[f"{name}_scale"], levels).view(-1)[:self.p.numel()]
                for name, levels in (("exp_avg", 127), ("exp_avg_sq", 255))]

    def once(self, backend):
        p, state = self.p.clone(), {name: x.clone() for name, x in self.state.items()}
        adamw_update(p, self.grad, state, T, **OPTIONS, backend=backend)
        return (adamw.join(p, state["residual"]),)

    def eager_once(self, dtype):
        w = self.w.to(dtype, copy=True)
        m, v = (x.to(dtype, copy=True) for x in self.fp32_moments())
        eager(self.p.clone(), self.grad, w, m, v)
        return (w,)

    def parity(self):
        return {"triton": lambda: self.once("triton"), "torch": lambda: self.once("torch"),
                "ref": lambda: self.eager_once(torch.float32)}  # fmt: skip

    def sides(self):
        m, v = (x.clone() for x in self.fp32_moments())

        def ours(backend):
            adamw_update(self.p, self.grad, self.state, T, **OPTIONS, backend=backend)
            return (self.p,)

        def ref():
            eager(self.p, self.grad, self.w, m, v)
            return (self.p,)

        return {"triton": lambda: ours("triton"), "torch": lambda: ours("torch"), "ref": ref}

    def moved(self):
        """Bytes that the kernel moves: the gradient once, all else in and out."""
        return self.grad.nbytes + 2 * self.p.nbytes + 2 * sum(x.nbytes for x in self.state.values())


def eager(p, grad, w, m, v):
    """An update of fp32 weights, of which p is the bf16 rounding, by PyTorch's own operations."""
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    g = grad.to(w.dtype)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = v.sqrt().div_((1 - beta2**T) ** 0.5).add_(OPTIONS["eps"])
    w.mul_(1 - lr * OPTIONS["weight_decay"]).addcdiv_(m, root, value=-lr / (1 - beta1**T))
    p.copy_(w)


def run(bench, matrix, size):
    cpu = bench.device == "cpu"
    for moments in ("float32", "8bit"):
        p = Problem(bench.device, min(size, CPU_CHECKED) if cpu else size, moments)
        measure.check(p.parity(), lambda p=p: p.eager_once(torch.float64), list)
        if cpu:
            p = Problem("cpu", min(size, CPU_SIZE), moments)
        case = {"of": f"update, moments {moments}", "matrix": matrix, "size": p.p.numel()}
        bench.rows(case, p.sides(), {}, p.moved(), module=adamw)


def main(argv=None):
    bench = measure.Bench(__doc__, argv)
    for case in SMALL if bench.small else CASES:
        run(bench, *case)
    bench.end("adamw")


if __name__ == "__main__":
    main()
