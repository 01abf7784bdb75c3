"""bench_decode: attention of one new token a completion, over the prompt that n share and over its own rows; one layer.

Bound by memory. The kernels read a prompt's keys and values once for its n completions, and no row past a length:
2 J K i (sum of the prompts' lengths + sum of the completions'), and write and read the prompt's parts in fp32. "ref" is
scaled_dot_product_attention under a mask over a cache in which every completion has its own copy of the prompt, as
without sharing; the copy is made beforehand, and is neither timed nor in the peak. A rate counts the kernels' bytes.

Run: python -m bench.bench_decode [--device cpu] [--out bench/results/NAME.json]
On a CPU under a minute, in 2 GB; there one prompt stands for all. The last line of stdout is JSON.
"""
import torch
import torch.nn.functional as F

from bench import measure
from minixmd.kernels import decode
from minixmd.kernels.decode import SPLIT, decode_attention

CASES = [  # model, prompts, completions each, prompt's rows, most of a completion, query heads, kv heads, K, dtype
    ("Qwen2-VL-7B", 8, 8, 850, 512, 28, 4, 128, "bfloat16"),
    ("Qwen2-Audio-7B", 1, 8, 850, 512, 32, 32, 128, "bfloat16"),
    ("Qwen2-Audio-7B", 8, 8, 850, 512, 32, 32, 128, "bfloat16"),
]
SMALL = [("small", 2, 3, SPLIT + 20, 20, 4, 2, 32, "float32")]
CPU_CHECKED = (1, 3, SPLIT + 20, 70, 4, 2, 128, "float32")  # the interpreter is slow, and wrong in bf16


class Problem:
    """Lengths are spread evenly: prompts from half of P to P, completions from 1 to C."""

    def __init__(self, device, G, n, P, C, H, J, K, dtype):
        def random(*size):
            return torch.randn(*size, device=device).to(getattr(torch, dtype))

        self.q_BHK = random(G * n, H, K)
        self.prompt = random(2, G, J, P, K)
        self.own = random(2, G * n, J, C, K)
        self.prompt_length_G = torch.linspace(P, P // 2, G, device=device).long()
        self.length_B = torch.linspace(1, C, G * n, device=device).long()[torch.randperm(G * n, device=device)]
        both_B = self.prompt_length_G.repeat_interleave(n), self.length_B
        self.copy = torch.cat([self.prompt.repeat_interleave(n, 1), self.own], 3)
        self.seen_BS = torch.cat([torch.arange(rows, device=device) < length_B[:, None]
                                  for rows, length_B in zip((P, C), both_B, strict=True)], 1)  # fmt: skip

    def ours(self, impl):
        return decode_attention(self.q_BHK, *self.prompt, self.prompt_length_G, *self.own, self.length_B, impl),

    def ref(self, dtype=None):
        q_BHK, (k, v) = self.q_BHK.to(dtype), self.copy.to(dtype)
        return F.scaled_dot_product_attention(q_BHK[:, :, None], k, v, attn_mask=self.seen_BS[:, None, None],
                                              enable_gqa=q_BHK.shape[1] != k.shape[1]).squeeze(2),

    def truth(self):
        return self.ref(torch.float64)

    def sides(self):
        return {"triton": lambda: self.ours("triton"), "torch": lambda: self.ours("torch"), "ref": self.ref}

    def moved(self):
        """Bytes that the kernels move: rows that are real, lengths, queries, outputs, and parts, written and read."""
        (B, H, K), J, n = self.q_BHK.shape, self.own.shape[2], len(self.length_B) // len(self.prompt_length_G)
        rows = (self.prompt_length_G.sum() + self.length_B.sum()).item()
        parts = n * -(-self.prompt_length_G // SPLIT).sum().item()
        return 2 * J * K * rows * self.q_BHK.itemsize + 2 * self.q_BHK.nbytes + 8 * H * (K + 1) * parts + 16 * B


def run(bench, model, *sizes):
    cpu = bench.device == "cpu"
    p = Problem(bench.device, *(CPU_CHECKED if cpu and not bench.small else sizes))
    measure.check(p.sides(), p.truth, list)
    if cpu:
        p = Problem("cpu", 1, *sizes[1:])
    names = "prompts", "completions", "prompt_rows", "rows", "heads", "kv_heads", "head_size", "dtype"
    case = {"of": "step", "model": model, **dict(zip(names, sizes, strict=True)), "prompts": len(p.prompt_length_G)}
    bench.rows(case, p.sides(), moved=p.moved(), module=decode, truth=p.truth, pick=list)


def main(argv=None):
    bench = measure.Bench(__doc__, argv)
    for case in SMALL if bench.small else CASES if bench.device == "cuda" else CASES[-1:]:
        run(bench, *case)
    bench.end("decode")


if __name__ == "__main__":
    main()
