"""bench_passes: RMSNorm after a residual sum, rotary embedding of queries and keys, SwiGLU, forward and with backward.

Bound by memory: the kernels read and write each tensor once (the formulas are in kernels/rmsnorm.py, rotary.py and
swiglu.py), eager PyTorch goes over them again and again. A rate counts the kernels' bytes for every side. "torch" and
"ref" are the same eager code, but for the rotation, whose "torch" keeps less for the backward pass.

Run: python -m bench.bench_passes [--device cpu] [--out bench/results/NAME.json]
On a CPU under a minute, in 3 GB. The last line of stdout is JSON.
"""
import torch

from bench import measure
from minixmd.kernels import rmsnorm, rotary, swiglu
from minixmd.kernels.rmsnorm import rms_norm, rms_norm_ref
from minixmd.kernels.rotary import rotate, rotate_ref

CASES = [  # model, N, D, query heads, key heads, K, F
    ("Qwen2-VL-7B", 4096, 3584, 28, 4, 128, 18_944),
    ("Qwen2-Audio-7B", 4096, 4096, 32, 32, 128, 11_008),
]
SMALL = [("small", 5, 96, 3, 1, 32, 130)]
CPU_ROWS, CPU_CHECKED = 256, 4  # bytes and memory grow with the rows alone; the interpreter is slow
EPS = 1e-6


class Problem:
    """Inputs of one operation, the gradients of its outputs, and the two ways to compute it."""

    def __init__(self, name, device, N, D, H, J, K, F):
        def normal(*shape):
            return torch.randn(*shape, device=device).to(torch.bfloat16)

        self.name = name
        angle_NK = (6 * torch.rand(N, K // 2, device=device)).repeat(1, 2)
        cos_NK, sin_NK = angle_NK.cos(), angle_NK.sin()
        if name == "norm":
            self.inputs, self.upstream = (normal(N, D), normal(N, D)), (normal(N, D), normal(N, D))
            gain_D = normal(D)
            self.ours = lambda backend: lambda x, added: rms_norm(x, gain_D, EPS, added, backend)
            self.ref = lambda x, added: rms_norm_ref(x, gain_D.to(x.dtype), EPS, added)
        elif name == "rotary":
            self.inputs = self.upstream = normal(N, H, K), normal(N, J, K)
            self.ours = lambda backend: lambda q, k: rotate(q, k, cos_NK, sin_NK, backend)
            self.ref = lambda q, k: (rotate_ref(q, cos_NK, sin_NK), rotate_ref(k, cos_NK, sin_NK))
        else:
            self.inputs, self.upstream = (normal(N, F), normal(N, F)), (normal(N, F),)
            self.ours = lambda backend: lambda gate, up: (swiglu.swiglu(gate, up, backend),)
            self.ref = lambda gate, up: (swiglu.swiglu_ref(gate, up),)

    def forward(self, function, dtype=None):
        with torch.no_grad():
            return tuple(function(*(x.to(dtype) for x in self.inputs)))

    def whole(self, function, dtype=None):
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.inputs]
        outputs = tuple(function(*leaves))
        upstream = [g.to(x.dtype) for g, x in zip(self.upstream, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        return *(x.detach() for x in outputs), *gradients

    def sides(self, of):
        run = getattr(self, of)
        return {"triton": lambda: run(self.ours("triton")), "torch": lambda: run(self.ours("torch")),
                "ref": lambda: run(self.ref)}  # fmt: skip

    def truth(self):
        return self.whole(self.ref, torch.float64)

    def moved(self):
        """{"forward" | "whole": bytes that the kernels move}."""
        size = sum(x.nbytes for x in self.inputs)
        if self.name == "norm":  # x, added, s and y, and a number a row; dy, ds', s and ds, and that number
            forward = 2 * size + 4 * len(self.inputs[0])
            return {"forward": forward, "whole": 2 * forward}
        if self.name == "rotary":  # every element once in and once out, and half of the angles
            forward = 2 * size + 4 * len(self.inputs[0]) * self.inputs[0].shape[-1]
            return {"forward": forward, "whole": 2 * forward}
        return {"forward": 3 * size // 2, "whole": 8 * size // 2}


MODULES = {"norm": rmsnorm, "rotary": rotary, "swiglu": swiglu}


def run(bench, model, N, *sizes):
    cpu = bench.device == "cpu"
    for name, module in MODULES.items():
        p = Problem(name, bench.device, min(N, CPU_CHECKED) if cpu else N, *sizes)
        measure.check(p.sides("whole"), p.truth, list)
        if cpu:
            p = Problem(name, "cpu", min(N, CPU_ROWS), *sizes)
        for of, moved in p.moved().items():
            case = {"of": f"{name}, {of}", "model": model, "N": len(p.inputs[0])}
            bench.rows(case, p.sides(of), {}, moved, module=module, truth=p.truth, pick=list)


def main(argv=None):
    bench = measure.Bench(__doc__, argv)
    for case in SMALL if bench.small else CASES:
        run(bench, *case)
    bench.end("rmsnorm", "rotary", "swiglu")


if __name__ == "__main__":
    main()
