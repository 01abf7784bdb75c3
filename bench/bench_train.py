"""bench_train: one LoRA distillation step of a Qwen2-Audio model, minixmd against transformers + PEFT, same weights.

The letter and the end of the turn are learnt, so 2 of a sequence's 360 rows need logits; and a 10 s clip fills a third
of the 30 s that the published audio tower runs on. A step is forward, backward through frozen weights to rank-16
adapters on every linear of the decoder, clipping and AdamW. In multiply-adds (no weight gradients, no tower backward):

    transformers as it comes     A(30 s)  +  2 N W  +  2 N V D     N tokens, padding included; W decoder weights
    head on the needed rows      A(30 s)  +  2 N W
    minixmd                      A(clips) +  2 n W                 n tokens that exist

The timed model has the 7B's proportions (printed): head 8-10 % of the decoder's FLOPs, tower on 30 s 25-30 % of the
baseline's forward, which is about 15 % of its step. So on clips of equal length FLOPs alone allow 1.13, whatever the
code; what is measured above the FLOPs' ratio (they stand beside the times) is memory traffic, the passes over N x F
values around the products. A small width overstates it: against the products it shrinks as 1 / width. With the
published vocabulary of 152,064 the peak of memory is the logits, N V fp32 values several times over.

Both sides must agree (loss, every adapter's gradient) before anything is timed. Rounds interleave the sides in turning
order and each ratio is taken within a round, so that a busy machine disturbs all alike. Peak memory is what torch's CPU
allocator hands out during one step above what was alive when it began (weights, adapters, AdamW's moments), from the
profiler's record of every allocation, those inside operators included.

Run: python -m bench.bench_train [--rounds 9] [--threads 2] [--out bench/results/NAME.json]
Needs transformers, peft and 6 GB, takes 3 to 8 minutes. The last line of stdout is JSON.
"""
import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor
from transformers.utils import logging

from bench import measure
from minixmd.inputs.audio import SAMPLE_RATE, log_mel, num_audio_tokens, num_mel_frames
from minixmd.inputs.batch import Media, Prompt
from minixmd.learning.optim import adamw
from minixmd.models.lora import add_lora
from minixmd.models.weights import load_model, save_adapter
from minixmd.runs.directory import versions
from minixmd.train import Run, accumulate, update

# The 7B: width 4096, mlp 11008, 32 layers, vocabulary 156,032; its tower 1280 wide, 32 layers, heads of 64.
TIMED = dict(vocab=5_000, width=512, mlp=1_376, layers=8, heads=8, tower_width=320, tower_layers=1, tower_heads=5)
WIDE = dict(vocab=152_064, width=256, mlp=688, layers=4, heads=4, tower_width=64, tower_layers=1, tower_heads=1)
EQUAL_S = [10.0] * 8
MIXED_S = [5.4, 10.0, 2.0, 7.7, 3.1, 8.9, 4.3, 6.6]  # evenly over 2-10 s
MEMORY_S = [10.0] * 4
TARGETS = {"equal lengths": 1.3, "mixed lengths": 1.6, "memory": 1 / 3}
BEFORE, AFTER = 20, 90  # text tokens around a clip: the system turn; question, options, answer
AUDIO_ID, PAD_ID = 4_990, 0
RANK, ALPHA, LINEARS = 16, 32, r"model\.layers\.\d+\..*_proj"
STAGE = SimpleNamespace(micro_batch_size=8, lr=1e-4, warmup_ratio=0.0, clip=1.0, weight_decay=0.0, betas=(0.9, 0.999),
                        eps=1e-8)  # the fields of config.Train that a step reads
MINE, ROWS, FULL = "minixmd", "needed rows", "as it comes"


class Pair:
    """One checkpoint, saved by the reference and read by minixmd; one adapter, saved by minixmd and read by PEFT."""

    def __init__(self, shape, folder):
        generator = torch.Generator().manual_seed(0)
        reference = reference_model(shape, generator)
        reference.save_pretrained(folder / "model")
        model = load_model(folder / "model")
        add_lora(model, rank=RANK, alpha=ALPHA, targets=LINEARS, seed=0)
        self.mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, p in self.mine.items():  # B starts at zero, which would hide A's gradients
                if name.endswith("lora_B"):
                    p.normal_(0, 0.02, generator=generator)
        save_adapter(model, folder / "model", folder / "adapter")
        self.run = Run(model, self.mine, adamw(self.mine, STAGE), steps=10_000)
        self.peft = PeftModel.from_pretrained(reference, folder / "adapter", is_trainable=True).train()
        self.reference = self.peft.base_model.model
        self.theirs = {our_name(name): p for name, p in self.peft.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.theirs, STAGE)


def reference_model(shape, generator):
    """Qwen2-Audio of these sizes, attention by sdpa, every parameter random."""
    text = dict(model_type="qwen2", vocab_size=shape["vocab"], hidden_size=shape["width"], rms_norm_eps=1e-5,
                intermediate_size=shape["mlp"], num_hidden_layers=shape["layers"], rope_theta=10000.0,
                num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"])
    tower = dict(model_type="qwen2_audio_encoder", num_mel_bins=128, encoder_layers=shape["tower_layers"],
                 d_model=shape["tower_width"], encoder_ffn_dim=4 * shape["tower_width"],
                 encoder_attention_heads=shape["tower_heads"], max_source_positions=1500)
    config = Qwen2AudioConfig(text_config=text, audio_config=tower, audio_token_index=AUDIO_ID)
    reference = Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, p in reference.named_parameters():  # the default init's zeros and ones would leave terms unseen
            noise = torch.randn(p.shape, generator=generator)
            gain = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + 0.1 * noise if gain else noise * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
    return reference


def our_name(name):
    """base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight -> model.layers.0.….lora_A"""
    return name.replace("base_model.model.model.language_model.", "model.").removesuffix(".default.weight")


def clips(durations_s, vocab):
    """The same clips for both: Prompts, and transformers' right-padded inputs (30 s of mel a clip) with target_BT."""
    generator = torch.Generator().manual_seed(1)
    prompts, waves = [], []
    for i, duration_s in enumerate(durations_s):
        t_S = torch.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
        tones_S = sum(torch.sin(2 * torch.pi * f * t_S * (1 + 0.05 * t_S)) for f in (180 + 40 * i, 900 + 210 * i))
        wave_S = 0.2 * tones_S + 0.05 * torch.randn(len(t_S), generator=generator)
        frames = num_mel_frames(len(wave_S))
        rows_P = BEFORE + torch.arange(num_audio_tokens(frames))
        media = Media("audio", log_mel(wave_S), rows_P, frames=frames)
        text_T = torch.randint(1, min(vocab, AUDIO_ID), (BEFORE + AFTER,), generator=generator)
        ids_N = torch.cat([text_T[:BEFORE], torch.full_like(rows_P, AUDIO_ID), text_T[BEFORE:]])
        target_N = torch.arange(len(ids_N)) >= len(ids_N) - 2  # the letter and the end of the turn
        prompts.append(Prompt(ids_N, torch.arange(len(ids_N)).expand(3, -1), (media,), target_N))
        waves.append(wave_S.numpy())
    extractor = WhisperFeatureExtractor(feature_size=128)
    heard = extractor(waves, sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt")
    ids_BT = pad_sequence([p.ids_N for p in prompts], batch_first=True, padding_value=PAD_ID)
    attention_BT = pad_sequence([torch.ones_like(p.ids_N) for p in prompts], batch_first=True)
    target_BT = pad_sequence([p.target_N for p in prompts], batch_first=True)
    inputs = dict(input_features=heard["input_features"], feature_attention_mask=heard["attention_mask"])
    return prompts, target_BT, dict(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False, **inputs)


def losses(pair, prompts, target_BT, inputs):
    """{side: forward and backward, returning the loss}."""
    ids_BT = inputs["input_ids"]

    def rows():
        hidden_BTD = pair.reference.model(**inputs).last_hidden_state
        predicts_BT = target_BT.roll(-1, dims=1)  # the row before a target
        return cross_entropy(pair.reference.lm_head(hidden_BTD[predicts_BT]), ids_BT[target_BT])

    def backward(loss):
        loss.backward()
        return loss.item()

    return {MINE: lambda: accumulate(pair.run, STAGE, prompts)["loss"], ROWS: lambda: backward(rows()),
            FULL: lambda: backward(pair.peft(**inputs, labels=ids_BT.masked_fill(~target_BT, -100)).loss)}


def steps(pair, sides):
    """{side: a whole optimizer step}."""
    def mine():
        sides[MINE]()
        update(pair.run, STAGE)

    def theirs(side):
        sides[side]()
        torch.nn.utils.clip_grad_norm_(pair.theirs.values(), STAGE.clip)
        pair.optimizer.step()
        pair.optimizer.zero_grad(set_to_none=True)

    return {MINE: mine, ROWS: lambda: theirs(ROWS), FULL: lambda: theirs(FULL)}


def check_parity(pair, sides):
    """Raises unless all sides agree on the loss (1e-4) and on every adapter's gradient (1e-3 of its norm)."""
    loss, worst = sides[MINE](), 0.0
    for side in (ROWS, FULL):
        other = sides[side]()
        if not abs(other - loss) <= 1e-4 * abs(loss):
            raise ValueError(f"parity: {side} has loss {other:.6f}, minixmd {loss:.6f}; nothing is timed")
        for name, p in pair.mine.items():
            grad = pair.theirs[name].grad
            worst = max(worst, ((p.grad - grad).norm() / grad.norm()).nan_to_num(torch.inf).item())
            if worst > 1e-3:
                raise ValueError(f"parity: {name}'s gradient is off by {worst:.1e} of its norm against {side}")
        pair.optimizer.zero_grad()
    pair.run.optimizer.zero_grad()
    return {"loss": loss, "worst_gradient_error": worst}


def flops(function):
    """(a call's floating-point operations, {module: of its forward}); attention counts as if nothing were masked."""
    aten = torch.ops.aten
    attention, backward = (getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{s}") for s in ("", "_backward"))
    unknown = {aten.addmm_: lambda y, a, b, *_, **__: 2 * a[0] * a[1] * b[1],
               attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
               backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)}  # to FlopCounterMode
    with FlopCounterMode(display=False, depth=None, custom_mapping=unknown) as counter:
        function()
    return counter.get_total_flops(), {name: sum(c.values()) for name, c in counter.get_flop_counts().items()}


def proportions(pair, inputs):
    """The head's share of the decoder, and the 30 s tower's of the baseline's forward (whose head is next to none)."""
    with torch.no_grad():
        _, modules = flops(lambda: pair.reference(**inputs))
    at = {name.partition(".")[2]: count for name, count in modules.items()}
    return {"head_of_decoder": at["lm_head"] / at["model.language_model"],
            "tower_of_baseline_forward": at["model.audio_tower"] / at["model"]}


def quantiles(values):
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return {"median": p50, "p20": p20, "p80": p80}


def time_steps(sides, rounds, warmup_ratio=2):
    """{side: seconds and FLOPs of a step, and its time over minixmd's in the same round}."""
    times, order = {side: [] for side in sides}, list(sides)
    for i in range(warmup_ratio + rounds):
        for side in order[i % len(order):] + order[:i % len(order)]:  # what ran before leaves its mark on the heap
            began = time.perf_counter()
            sides[side]()
            if i >= warmup_ratio:
                times[side].append(time.perf_counter() - began)
    return {side: {"step_s": quantiles(values), "gflop": flops(sides[side])[0] / 1e9,
                   "ratio": quantiles([t / mine for t, mine in zip(values, times[MINE], strict=True)])}
            for side, values in times.items()}


def speed(name, durations_s, rounds):
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(TIMED, Path(folder))
    prompts, target_BT, inputs = clips(durations_s, TIMED["vocab"])
    sides = losses(pair, prompts, target_BT, inputs)
    row = {"what": name, "durations_s": durations_s, "parity": check_parity(pair, sides), "target": TARGETS[name],
           "padded_tokens": target_BT.numel(), "tokens": sum(map(len, prompts)), **proportions(pair, inputs),
           "sides": time_steps(steps(pair, sides), rounds)}
    print(f"{name}: {row['tokens']} tokens of {row['padded_tokens']}; head / decoder {row['head_of_decoder']:.1%}, "
          f"30 s tower / baseline's forward {row['tower_of_baseline_forward']:.1%}; target {row['target']}")
    for side, cells in row["sides"].items():
        ms, x = ({k: scale * v for k, v in cells[key].items()} for key, scale in (("step_s", 1000), ("ratio", 1)))
        print(f"  {side:12} {ms['median']:6.0f} ms ({ms['p20']:.0f} to {ms['p80']:.0f})  {cells['gflop']:4.0f} GFLOP  "
              f"{x['median']:.2f} ({x['p20']:.2f} to {x['p80']:.2f}) times minixmd", flush=True)
    return row


def memory():
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(WIDE, Path(folder))
    sides, peaks = losses(pair, *clips(MEMORY_S, WIDE["vocab"])), {}
    parity = check_parity(pair, sides)
    for side, step in steps(pair, sides).items():
        step()  # AdamW makes its moments in the first one
        peaks[side] = measure.peak(step, "cpu")
    weights = sum(p.numel() * p.element_size() for p in pair.run.model.parameters())
    share, whole = peaks[MINE] / peaks[FULL], (peaks[MINE] + weights) / (peaks[FULL] + weights)
    print(f"memory: peak above {weights / 2**20:.0f} MiB of weights: "
          + ", ".join(f"{side} {peak / 2**20:.0f} MiB" for side, peak in peaks.items())
          + f"; minixmd over as it comes {share:.3f}, with the weights {whole:.3f}, target {TARGETS['memory']:.3f}")
    return {"what": "memory", "durations_s": MEMORY_S, "parity": parity, "target": TARGETS["memory"],
            "weight_bytes": weights, "peak_bytes": peaks, "share": share, "share_with_weights": whole}


def environment():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {**versions(), "transformers": version("transformers"), "peft": version("peft"), "cpu": cpu,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="it measures on a CPU only")
    parser.add_argument("--out", help="file to write the JSON to as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    result = {"bench": "bench_train", **environment(), "timed_model": TIMED, "memory_model": WIDE, "lora_rank": RANK,
              "text_tokens": BEFORE + AFTER, "rounds": args.rounds, "rows": []}
    for name, durations_s in (("equal lengths", EQUAL_S), ("mixed lengths", MIXED_S)):
        result["rows"].append(speed(name, durations_s, args.rounds))
    result["rows"].append(memory())
    line = json.dumps(result)
    if args.out:
        Path(args.out).write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
