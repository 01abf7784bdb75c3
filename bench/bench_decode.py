"""bench_decode: one new token a completion, its attention in one layer and, on a GPU, the whole step of a 7B.

Attention, over the prompt that n completions share and over a completion's own rows, is bound by memory. The kernels
read a prompt's keys and values once for its n completions, and no row past a length:
2 J K i (sum of the prompts' lengths + sum of the completions'), and write and read the prompt's parts in fp32. "ref" is
scaled_dot_product_attention under a mask over a cache in which every completion has its own copy of the prompt, as
without sharing; the copy is made beforehand, and is neither timed nor in the peak. A rate counts the kernels' bytes.

The whole step is learning/rollout.py's, sampling included, by Qwen2-Audio-7B's decoder with random weights: "triton" as
rollouts run it, replayed from a CUDA graph, and "eager", the same kernels launched one by one. 8 completions a prompt
are half way to 300 tokens. A step reads the weights (of the embedding a few rows), every prompt's keys and values once
and the completions' own: the rate is of these bytes, "percent" of the roofline. A row also has what capturing took,
in seconds (the first compiles) and in MiB that stay taken beside the pools, and by how much the log-probs of all tokens
differ between sampling and training's pass over them.

Run: python -m bench.bench_decode [--device cpu] [--out bench/results/NAME.json]
On a CPU under a minute, in 2 GB: one prompt stands for all, and the whole step runs with --small only. On a GPU in
60 GB. The last line of stdout is JSON.
"""
import json
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from bench import measure
from minixmd.inputs.batch import Group, Prompt
from minixmd.kernels import decode
from minixmd.kernels.decode import SPLIT, decode_attention
from minixmd.learning.decoder import STEPS_PER_SYNC, Decoder
from minixmd.learning.logprobs import SampledVocabulary, reference_logprobs
from minixmd.models.families import read_config
from minixmd.models.lora import set_backend
from minixmd.models.weights import build

CASES = [  # model, prompts, completions each, prompt's rows, most of a completion, query heads, kv heads, K, dtype
    ("Qwen2-VL-7B", 8, 8, 850, 512, 28, 4, 128, "bfloat16"),
    ("Qwen2-Audio-7B", 1, 8, 850, 512, 32, 32, 128, "bfloat16"),
    ("Qwen2-Audio-7B", 8, 8, 850, 512, 32, 32, 128, "bfloat16"),
]
SMALL = [("small", 2, 3, SPLIT + 20, 20, 4, 2, 32, "float32")]
CPU_CHECKED = (1, 3, SPLIT + 20, 70, 4, 2, 128, "float32")  # the interpreter is slow, and wrong in bf16
SEVEN_B = measure.ROOT / "tests" / "configs" / "Qwen2-Audio-7B-Instruct.json"
WHOLE = [(G, 8, 400, 300) for G in (1, 8, 24)]  # prompts, completions each, prompt's rows, tokens of a completion
SMALL_WHOLE = [(1, 2, 5, 10)]
SMALL_TEXT = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=1,
                  num_key_value_heads=1)  # fmt: skip
BANNED = 50  # ids, the last
LOGITS_STD = 5.0  # as in bench_head
# of log-probs, in the mean: 32 layers in bf16 had 0.05 on a CPU, and 0.4 to 0.7 with completions one position late
MAX_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.15}


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
        self.members_GM = torch.arange(G * n, device=device).view(G, n)  # completions of a prompt stand together
        self.prompt_B = torch.arange(G, device=device).repeat_interleave(n)
        both_B = self.prompt_length_G.repeat_interleave(n), self.length_B
        self.copy = torch.cat([self.prompt.repeat_interleave(n, 1), self.own], 3)
        self.seen_BS = torch.cat([torch.arange(rows, device=device) < length_B[:, None]
                                  for rows, length_B in zip((P, C), both_B, strict=True)], 1)  # fmt: skip

    def ours(self, backend):
        slots = self.prompt_length_G, self.members_GM, self.prompt_B
        return decode_attention(self.q_BHK, *self.prompt, *slots, *self.own, self.length_B, backend),

    def ref(self, dtype=None):
        q_BHK, (k, v) = self.q_BHK.to(dtype), self.copy.to(dtype)
        return F.scaled_dot_product_attention(q_BHK[:, :, None], k, v, attn_mask=self.seen_BS[:, None, None],
                                              enable_gqa=q_BHK.shape[1] != k.shape[1]).squeeze(2),

    def truth(self):
        return self.ref(torch.float64)

    def sides(self):
        return {"triton": lambda: self.ours("triton"), "torch": lambda: self.ours("torch"), "ref": self.ref}

    def moved(self):
        """Bytes that the kernels move: rows that are real, lengths, slots, queries, outputs, and parts, written and
        read."""
        (B, H, K), J, n = self.q_BHK.shape, self.own.shape[2], len(self.length_B) // len(self.prompt_length_G)
        rows = (self.prompt_length_G.sum() + self.length_B.sum()).item()
        parts = n * -(-self.prompt_length_G // SPLIT).sum().item()
        return 2 * J * K * rows * self.q_BHK.itemsize + 2 * self.q_BHK.nbytes + 8 * (H * (K + 1) + J) * parts + 24 * B


def run(bench, model, *sizes):
    cpu = bench.device == "cpu"
    p = Problem(bench.device, *(CPU_CHECKED if cpu and not bench.small else sizes))
    measure.check(p.sides(), p.truth, list)
    if cpu:
        p = Problem("cpu", 1, *sizes[1:])
    names = "prompts", "completions", "prompt_rows", "rows", "heads", "kv_heads", "head_size", "dtype"
    case = {"of": "step", "model": model, **dict(zip(names, sizes, strict=True)), "prompts": len(p.prompt_length_G)}
    bench.rows(case, p.sides(), moved=p.moved(), module=decode, truth=p.truth, pick=list)


def random_model(device, dtype, text):
    """Qwen2-Audio-7B without its tower, on `text` instead of its decoder's sizes where they are given."""
    config = read_config(json.loads(SEVEN_B.read_text()))
    config = replace(config, audio=None, text=replace(config.text, **text))
    model = build(config).to(dtype).to_empty(device=device).requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.fill_(float(name.endswith("weight")))  # gains are 1, biases 0
        else:
            p.normal_(0, (LOGITS_STD if name == "lm_head.weight" else 1) * p.shape[1] ** -0.5)
    set_backend(model, "triton")
    return model


def free_bytes(device):
    """Of the GPU, with what torch keeps for later given back; on a CPU nothing is counted."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def sampled(d, prompts, C):
    """ids and log-probs of the completions, (B, C) each."""
    prompt_slots, uniform_BT = list(range(len(prompts))), torch.rand(len(d.token_B), C, dtype=torch.float64)
    drawn = d.prefill(prompts, prompt_slots, uniform_BT[:, 0])[1:]
    slots = list(range(len(d.token_B)))
    d.place(slots, drawn[0], [slot // d.num_samples for slot in slots], uniform_BT)
    ids, logps = ([row] for row in drawn)
    while len(ids) < C:
        more, more_logps = d.run(min(STEPS_PER_SYNC, C - len(ids)))
        ids, logps = ids + more, logps + more_logps
    return torch.tensor(ids).T, torch.tensor(logps).T


@torch.inference_mode()
def whole_step(bench, model, name, G, n, P, C):
    head_VD, text = model.lm_head.weight, model.config.text
    limit, dtype = len(head_VD) - BANNED, head_VD.dtype
    prompts = [Prompt(torch.randint(limit, (P,)), torch.arange(P).expand(3, -1)) for _ in range(G)]
    free, began = free_bytes(bench.device), time.perf_counter()
    d = Decoder(model, G, P, G * n, n, max_new_tokens=C, temperature=1.0, suppressed_ids=range(limit, len(head_VD)),
                end_id=-1, backend="triton")
    taken, seconds = free - free_bytes(bench.device), time.perf_counter() - began
    ids_BC, logp_BC = sampled(d, prompts, C)
    groups = [Group(prompt, tuple(ids_GC)) for prompt, ids_GC in zip(prompts, ids_BC.split(n), strict=True)]
    trained_T = reference_logprobs(model, [[group] for group in groups], SampledVocabulary(1.0, None, limit)).cpu()
    gap_T = (logp_BC.flatten() - trained_T).abs()
    if not gap_T.mean() <= MAX_GAP[dtype]:
        raise ValueError(f"parity: log-probs of sampling and training differ by {gap_T.mean():.2g} in the mean, more "
                         f"than {MAX_GAP[dtype]}; nothing is timed")

    def side(step):
        d.next_row_1.zero_()
        d.cache.length_B.fill_(C // 2)
        step()
        return d.ids_SB,

    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    kv = 2 * text.num_hidden_layers * d.cache.pool[0, 0, 0, :, 0].nbytes * (G * P + G * n * (C // 2 + 1))
    case = {"of": "whole step", "model": name, "prompts": G, "completions": n, "prompt_rows": P, "rows": C // 2 + 1,
            "dtype": str(dtype).removeprefix("torch."), "weight_bytes": weights, "kv_bytes": kv,
            "logp_gap_mean": gap_T.mean().item(), "logp_gap_max": gap_T.max().item()}  # fmt: skip
    sides, moved = {"triton": lambda: side(d.replay or d.step)}, kv
    if d.captured:
        beside_pools = taken - d.cache.prompt_pool.nbytes - d.cache.pool.nbytes
        case |= {"capture_s": seconds, "capture_mib": beside_pools / 2**20}
        sides["eager"], moved = lambda: side(d.step), kv + weights  # on a CPU the operators' reads of them are counted
    bench.rows(case, sides, moved=moved, module=decode)


def main(argv=None):
    bench = measure.Bench(__doc__, argv)
    for case in SMALL if bench.small else CASES if bench.device == "cuda" else CASES[-1:]:
        run(bench, *case)
    if bench.small or bench.device == "cuda":
        how = (torch.float32, SMALL_TEXT) if bench.small else (torch.bfloat16, {})
        model = random_model(bench.device, *how)
        for sizes in SMALL_WHOLE if bench.small else WHOLE:
            whole_step(bench, model, "small" if bench.small else "Qwen2-Audio-7B", *sizes)
    bench.end("decode")


if __name__ == "__main__":
    main()
