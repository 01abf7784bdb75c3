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
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from bench import measure
from bench.measure import quantiles
from bench.reference import (
    AFTER,
    BEFORE,
    EQUAL_S,
    MIXED_S,
    SMALL,
    TIMED,
    count_flops,
    environment,
    load_with,
    make_clips,
    parse_arguments,
    reference_model,
    write_result,
)
from minixmd.config import Distill
from minixmd.inputs.examples import Example
from minixmd.learning.optim import adamw
from minixmd.learning.steps import count
from minixmd.learning.targets import Item
from minixmd.models.weights import save_adapter
from minixmd.train import Trainer

WIDE = dict(vocab=152_064, width=256, mlp=688, layers=4, heads=4, tower_width=64, tower_layers=1, tower_heads=1)
MEMORY_S = [10.0] * 4
TARGETS = {"equal lengths": 1.3, "mixed lengths": 1.6, "memory": 1 / 3}
WARMUP = 2  # rounds that are not timed
STAGE = Distill(name="bench", model="-", manifest="-", teacher_labels="-", batch_size=8, lr=1e-4,
                warmup_ratio=0.0, lora_rank=16, lora_alpha=32.0, lora_targets=r"model\.layers\.\d+\..*_proj",
                device="cpu")  # fmt: skip
ITEM = Item(Example("clip", None, None, "?", ("dog", "cat")), target=0, source="teacher")
MINIXMD, NEEDED_ROWS, AS_IT_COMES = "minixmd", "needed rows", "as it comes"  # the sides


class Pair:
    """One checkpoint, saved by transformers and read by minixmd; one adapter, saved by minixmd and read by PEFT."""

    def __init__(self, shape, folder):
        generator = torch.Generator().manual_seed(0)
        reference = reference_model(shape, generator)
        reference.save_pretrained(folder / "model")
        stage = replace(STAGE, model=str(folder / "model"))
        self.trainer = Trainer(stage, num_items=10_000 * stage.batch_size, load=load_with(None))
        self.ours = self.trainer.parameters
        with torch.no_grad():
            for name, p in self.ours.items():  # B starts at zero, which would hide A's gradients
                if name.endswith("lora_B"):
                    p.normal_(0, 0.02, generator=generator)
        save_adapter(self.trainer.model, folder / "model", folder / "adapter")
        self.peft = PeftModel.from_pretrained(reference, folder / "adapter", is_trainable=True).train()
        self.reference = self.peft.base_model.model
        self.theirs = {our_name(name): p for name, p in self.peft.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.theirs, lr=stage.lr, betas=stage.betas, eps=stage.eps,
                               weight_decay=stage.weight_decay)

    def update_theirs(self):
        torch.nn.utils.clip_grad_norm_(self.theirs.values(), STAGE.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def our_name(name):
    """base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight -> model.layers.0.….lora_A"""
    return name.replace("base_model.model.model.language_model.", "model.").removesuffix(".default.weight")


class Sides:
    """What is compared on some clips: {side: forward and backward, returning the loss} and {side: a whole step}."""

    def __init__(self, pair, clips):
        self.pair, self.clips = pair, clips
        self.samples = [(prompt, ITEM) for prompt in clips.prompts]
        self.gradients = {MINIXMD: self.our_gradients, NEEDED_ROWS: self.needed_rows, AS_IT_COMES: self.as_it_comes}
        self.micro_batches = pair.trainer.micro_batches(self.samples)
        self.steps = {MINIXMD: lambda: pair.trainer.distill_step(self.micro_batches)}
        for side in (NEEDED_ROWS, AS_IT_COMES):
            self.steps[side] = lambda side=side: self.their_step(side)

    def our_gradients(self):
        return self.pair.trainer.distill_gradients(self.micro_batches, count(self.micro_batches))["loss"].item()

    def needed_rows(self):
        reference, clips = self.pair.reference, self.clips
        hidden_BTD = reference.model(**clips.inputs).last_hidden_state
        predicts_BT = clips.target_BT.roll(-1, dims=1)  # the row before a target
        logits_NV = reference.lm_head(hidden_BTD[predicts_BT])
        return backward(cross_entropy(logits_NV, clips.ids_BT[clips.target_BT]))

    def as_it_comes(self):
        labels_BT = self.clips.ids_BT.masked_fill(~self.clips.target_BT, -100)
        return backward(self.pair.peft(**self.clips.inputs, labels=labels_BT).loss)

    def their_step(self, side):
        self.gradients[side]()
        self.pair.update_theirs()

    def check_parity(self):
        """Raises unless all sides agree on the loss (1e-4) and on every adapter's gradient (1e-3 of its norm)."""
        loss, worst = self.gradients[MINIXMD](), 0.0
        for side in (NEEDED_ROWS, AS_IT_COMES):
            other = self.gradients[side]()
            if not abs(other - loss) <= 1e-4 * abs(loss):
                raise ValueError(f"parity: {side} has loss {other:.6f}, minixmd {loss:.6f}; nothing is timed")
            for name, p in self.pair.ours.items():
                grad = self.pair.theirs[name].grad
                error = ((p.grad - grad).norm() / grad.norm()).nan_to_num(torch.inf).item()
                worst = max(worst, error)
                if error > 1e-3:
                    raise ValueError(f"parity: {name}'s gradient is off by {error:.1e} of its norm against {side}")
            self.pair.optimizer.zero_grad()
        self.pair.trainer.optimizer.zero_grad()
        return {"loss": loss, "worst_gradient_error": worst}


def backward(loss):
    loss.backward()
    return loss.item()


def proportions(pair, clips):
    """The head's share of the decoder, and the 30 s tower's of the baseline's forward (whose head is next to none)."""
    with torch.no_grad():
        _, modules = count_flops(lambda: pair.reference(**clips.inputs))
    flop = {name.partition(".")[2]: count for name, count in modules.items()}
    return {"head_of_decoder": flop["lm_head"] / flop["model.language_model"],
            "tower_of_baseline_forward": flop["model.audio_tower"] / flop["model"]}


def time_steps(steps, rounds):
    """{side: seconds and FLOPs of a step, and its time over minixmd's in the same round}."""
    times, order = {side: [] for side in steps}, list(steps)
    for i in range(WARMUP + rounds):
        for side in order[i % len(order):] + order[:i % len(order)]:  # what ran before leaves its mark on the heap
            began = time.perf_counter()
            steps[side]()
            if i >= WARMUP:
                times[side].append(time.perf_counter() - began)
    found = {}
    for side, seconds in times.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds, times[MINIXMD], strict=True)]
        found[side] = {"step_s": quantiles(seconds), "gflop": count_flops(steps[side])[0] / 1e9,
                       "ratio": quantiles(ratios)}
    return found


def speed(name, shape, durations_s, rounds):
    """The row of a list of clips."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(shape, Path(folder))
    clips = make_clips(durations_s, shape["vocab"])
    sides = Sides(pair, clips)
    row = {"what": name, "durations_s": durations_s, "parity": sides.check_parity(), "target": TARGETS[name],
           "padded_tokens": clips.target_BT.numel(), "tokens": sum(map(len, clips.prompts)),
           **proportions(pair, clips), "sides": time_steps(sides.steps, rounds)}
    print(f"{name}: {row['tokens']} tokens of {row['padded_tokens']}; head / decoder {row['head_of_decoder']:.1%}, "
          f"30 s tower / baseline's forward {row['tower_of_baseline_forward']:.1%}; target {row['target']}")
    for side, cells in row["sides"].items():
        ms = {key: 1000 * value for key, value in cells["step_s"].items()}
        ratio = cells["ratio"]
        print(f"  {side:12} {ms['median']:6.0f} ms ({ms['p20']:.0f} to {ms['p80']:.0f})  {cells['gflop']:4.0f} GFLOP  "
              f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f}) times minixmd", flush=True)
    return row


def memory(shape, durations_s):
    """The row of peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(shape, Path(folder))
    sides, peaks = Sides(pair, make_clips(durations_s, shape["vocab"])), {}
    parity = sides.check_parity()
    for side, step in sides.steps.items():
        step()  # AdamW makes its moments in the first one
        peaks[side] = measure.peak(step, "cpu")
    weights = sum(p.nbytes for p in pair.trainer.model.parameters())
    ours, theirs = peaks[MINIXMD], peaks[AS_IT_COMES]
    share, whole = ours / theirs, (ours + weights) / (theirs + weights)
    listed = ", ".join(f"{side} {peak / 2**20:.0f} MiB" for side, peak in peaks.items())
    print(f"memory: peak above {weights / 2**20:.0f} MiB of weights: {listed}; minixmd over as it comes {share:.3f}, "
          f"with the weights {whole:.3f}, target {TARGETS['memory']:.3f}")
    return {"what": "memory", "durations_s": durations_s, "parity": parity, "target": TARGETS["memory"],
            "weight_bytes": weights, "peak_bytes": peaks, "share": share, "share_with_weights": whole}


def main(argv=None):
    args = parse_arguments(__doc__, argv, rounds=9, threads=2)
    timed, wide, equal_s, mixed_s, memory_s = TIMED, WIDE, EQUAL_S, MIXED_S, MEMORY_S
    if args.small:
        timed, wide, equal_s, mixed_s, memory_s = SMALL, SMALL, [0.5, 0.5], [0.3, 0.6], [0.4]
    result = {"bench": "bench_train", "small": args.small, **environment(), "timed_model": timed, "memory_model": wide,
              "lora_rank": STAGE.lora_rank, "text_tokens": BEFORE + AFTER, "rounds": args.rounds,
              "rows": [speed("equal lengths", timed, equal_s, args.rounds),
                       speed("mixed lengths", timed, mixed_s, args.rounds), memory(wide, memory_s)]}  # fmt: skip
    write_result(result, args.out)


if __name__ == "__main__":
    main()
