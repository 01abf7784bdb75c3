"""bench_lora: a linear layer with its low-rank update, of rank 16: forward, both uses of dy, and forward with backward.

    forward   one Triton product with the update inside ("triton"), or the vendor's product and addmm_ ("torch")
    dy        scale g B and scale gᵀ xa from one read of g ("triton"), or by two products ("torch")
    whole     lora_linears as shipped, with the gradients of x, A and B

"bare" is the layer without an update: F.linear, and g W in "whole". The base product is bound by compute, 2 N D F;
what an update adds is passes over x, y and g. A rate counts the layer's FLOPs, in "dy" dy_pass' bytes, for every side.
The shipped rules, lora.FUSED_D and lora_triton.dy_pass_pays, are set against the times. PEFT keeps its adapters in
fp32 unless told otherwise. On a CPU parity is checked on small fp32 sizes, bytes and FLOPs are counted on tensors
without storage, and "memory" has real ones, in fp32, for CPU products of bf16 take fp32 copies.

Run: python -m bench.bench_lora [--device cpu] [--out bench/results/NAME.json]
On a CPU a minute, in 2 GB. The last line of stdout is JSON.
"""
import functools

import torch
import torch.nn.functional as F

from bench import measure
from minixmd.kernels import lora, lora_triton
from minixmd.kernels.lora import lora_linear_ref, lora_linears

CASES = [  # layer, N, D, F
    ("Qwen2-Audio-7B q, k, v, o", 4096, 4096, 4096),
    ("Qwen2-Audio-7B gate, up", 4096, 4096, 11_008),
    ("Qwen2-Audio-7B down", 4096, 11_008, 4096),
    ("Qwen2-VL-7B q, o", 4096, 3584, 3584),
    ("Qwen2-VL-7B k, v", 4096, 3584, 512),
    ("Qwen2-VL-7B gate, up", 4096, 3584, 18_944),
    ("Qwen2-VL-7B down", 4096, 18_944, 3584),
    ("Qwen2-Audio's tower, fc1", 4096, 1280, 5120),
    ("Qwen2-Audio's tower, q, k, v, out", 4096, 1280, 1280),
    ("Qwen2-VL-7B q, o", 1024, 3584, 3584),
    ("Qwen2-VL-7B q, o", 16_384, 3584, 3584),  # torch.compile, which takes long, in this one only
]
SMALL, MEMORY = ("small", 70, 48, 80), ("Qwen2-VL-7B q, o", 256, 3584, 3584)  # memory grows with N alone
RANK, SCALE = 16, 2.0  # config.Train's defaults


class Problem:
    def __init__(self, device, dtype, N, n_in, n_out):
        like = {"device": device, "dtype": dtype}
        self.x_ND, self.g_NF = torch.randn(N, n_in, **like), torch.randn(N, n_out, **like)
        self.w_FD = torch.randn(n_out, n_in, **like) * n_in**-0.5
        self.a_RD = torch.randn(RANK, n_in, device=device) * n_in**-0.5
        self.b_FR = torch.randn(n_out, RANK, device=device) / 8
        self.a, self.b = self.a_RD.to(dtype), self.b_FR.to(dtype)
        self.xa_NR = self.x_ND @ self.a.T
        self.rules = {"forward": n_in <= lora.FUSED_D and RANK <= 64,  # whether "triton" is what backend="triton" does
                      "dy": lora_triton.dy_pass_pays(N, n_out, RANK, dtype.itemsize)}  # fmt: skip

    def autograd(self, fn, dtype=None):
        x, a, b = (t.detach().to(dtype).requires_grad_() for t in (self.x_ND, self.a_RD, self.b_FR))
        y_NF = fn(x, self.w_FD.to(dtype), None, a, b, SCALE)
        return y_NF.detach(), *torch.autograd.grad(y_NF, (x, a, b), self.g_NF.to(dtype))

    def no_grad(self, fn, dtype=None):
        with torch.no_grad():
            return (fn(*(t.to(dtype) for t in (self.x_ND, self.w_FD)), None, self.a_RD, self.b_FR, SCALE),)

    def sides(self, of):
        x, w, g, a, b, xa = self.x_ND, self.w_FD, self.g_NF, self.a, self.b, self.xa_NR
        if of == "forward":
            return {"triton": lambda: (lora_triton.lora_forward(x, w, None, x @ a.T, b, SCALE),),
                    "torch": lambda: (F.linear(x, w).addmm_(x @ a.T, b.T, alpha=SCALE),),
                    "ref": lambda: self.no_grad(lora_linear_ref), "bare": lambda: (F.linear(x, w),)}  # fmt: skip
        if of == "dy":
            return {"triton": lambda: lora_triton.dy_pass(g, xa, b, SCALE),
                    "torch": lambda: ((g @ b).mul_(SCALE), (g.T @ xa).mul_(SCALE)),
                    "ref": lambda: (SCALE * (g @ b), SCALE * (g.T @ xa))}  # fmt: skip
        return {"triton": lambda: self.autograd(lambda x, *layer: lora_linears(x, [layer], "triton")[0]),
                "torch": lambda: self.autograd(lambda x, *layer: lora_linears(x, [layer], "torch")[0]),
                "ref": lambda: self.autograd(lora_linear_ref), "bare": lambda: (F.linear(x, w), g @ w)}  # fmt: skip

    def others(self, of, compiled):
        if of == "dy":
            return {}
        found = {}
        if measure.installed("peft"):
            found["peft"] = self.peft(of, self.w_FD.dtype)
            if self.w_FD.dtype != torch.float32:
                found["peft, fp32 adapter"] = self.peft(of, torch.float32)
        if compiled:
            fast = torch.compile(lora_linear_ref, dynamic=False)
            found["compiled ref"] = lambda: (self.no_grad if of == "forward" else self.autograd)(fast)
        return found

    def peft_layer(self, dtype):
        from peft import LoraConfig, get_peft_model

        base = torch.nn.Linear(*reversed(self.w_FD.shape), bias=False, device="meta")
        base.weight = torch.nn.Parameter(self.w_FD, requires_grad=False)
        config = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=["linear"])
        model = get_peft_model(torch.nn.ModuleDict({"linear": base}), config, autocast_adapter_dtype=False)
        layer = model.base_model.model["linear"]
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        a.weight, b.weight = (torch.nn.Parameter(t.to(dtype)) for t in (self.a_RD, self.b_FR))
        return layer, a, b

    def peft(self, of, dtype):
        built = functools.cache(lambda: self.peft_layer(dtype))

        def forward():
            with torch.no_grad():
                return (built()[0](self.x_ND),)

        def whole():
            layer, a, b = built()
            x_ND, a.weight.grad, b.weight.grad = self.x_ND.detach().requires_grad_(), None, None
            y_NF = layer(x_ND)
            y_NF.backward(self.g_NF)  # FlopCounterMode cannot count autograd.grad through a module
            return y_NF.detach(), x_ND.grad, a.weight.grad, b.weight.grad

        return forward if of == "forward" else whole

    def truth(self, of):
        if of == "dy":
            g, b, xa = self.g_NF.double(), self.b.double(), self.xa_NR.double()
            return SCALE * (g @ b), SCALE * (g.T @ xa)
        return (self.no_grad if of == "forward" else self.autograd)(lora_linear_ref, torch.float64)

    def moved(self, of):
        """Bytes that the kernels move; in "whole" those that the rules choose."""
        (N, n_out), size = self.g_NF.shape, self.g_NF.itemsize
        forward = sum(t.nbytes for t in (self.x_ND, self.w_FD, self.g_NF, self.xa_NR, self.b))  # y is as large as g
        dy = lora_triton.dy_pass_bytes(N, n_out, RANK, size) + RANK * (N * size + 4 * n_out)
        return {"forward": forward, "dy": dy, "whole": forward * self.rules["forward"] + dy * self.rules["dy"]}[of]

    def flop(self, of):
        N, base = len(self.x_ND), self.w_FD.numel()
        update = RANK * sum(self.w_FD.shape)
        return {"forward": 2 * N * (base + update), "dy": None, "whole": 2 * N * (2 * base + 3 * update)}[of]


def check(p):
    for of in ("forward", "dy", "whole"):
        measure.check(p.sides(of), lambda of=of: p.truth(of), list, floor=max(1e-5, torch.finfo(p.x_ND.dtype).eps))


def run(bench, p, layer, compiled):
    N, n_in, n_out = *p.x_ND.shape, len(p.w_FD)
    for of in ("forward", "dy", "whole"):
        case = {"of": of, "layer": layer, "N": N, "D": n_in, "F": n_out, "R": RANK, "dtype": str(p.x_ND.dtype)[6:]}
        truth = None if p.x_ND.is_meta else lambda of=of: p.truth(of)
        found = bench.rows(case, p.sides(of), p.others(of, compiled), p.moved(of), p.flop(of), lora_triton, truth, list)
        if of in p.rules and bench.device == "cuda":
            faster = found["triton"]["ms"] < found["torch"]["ms"]
            bench.result["rules"].append({**case, "shipped": p.rules[of], "faster": faster})
            print(f"  triton is shipped: {p.rules[of]}, faster: {faster}")


def main(argv=None):
    bench = measure.Bench(__doc__, argv)
    bench.result["rules"] = []
    cases = [SMALL] if bench.small else CASES
    if bench.device == "cpu":
        check(Problem("cpu", torch.float32, *SMALL[1:]))  # products of bf16 are wrong in Triton's interpreter
        name, *sizes = SMALL if bench.small else MEMORY
        run(bench, Problem("cpu", torch.float32, *sizes), f"memory, {name}", compiled=False)
    for case in cases:
        layer, *sizes = case
        p = Problem("meta" if bench.device == "cpu" else "cuda", torch.bfloat16, *sizes)
        if bench.device == "cuda":
            check(p)
        run(bench, p, layer, compiled=bench.device == "cuda" and case is cases[-1])
    bench.end("lora_triton")


if __name__ == "__main__":
    main()
