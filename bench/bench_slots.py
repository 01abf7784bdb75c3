"""bench_slots: how busy the decode slots are, and what is computed, by the engine's own schedule with known lengths.

A Decoder that computes nothing writes completions of given lengths, so Schedule (learning/rollout.py) runs as it does
with a model: in single steps, or several captured ones at a time. Lengths are log-normal (sigma 0.5, mean 200 tokens,
at most 512) or those of a file with lines {"samples": [{"text"}]} or {"text"}, in words. Beside it stand the schedules
that it took the place of: a prompt's completions kept their slots until the slowest was finished (traces), and answers
were written in packs of 8,192 prompt tokens (evaluation).

    use        share of the rows that steps computed in which a completion was written
    rows       tokens that steps computed, of all slots; steps: how often all weights are read
    flops      of prefill and rows, of a decoder of the 7B's proportions

Run: python -m bench.bench_slots [--lengths FILE] [--out bench/results/slots.json]. Status 1 if a target is missed.
"""
import argparse
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.measure import report
from minixmd.learning.decoder import STEPS_PER_SYNC
from minixmd.learning.rollout import Schedule, Usage, prompt_slots_for

END = 1
MEAN, SIGMA, MOST = 200, 0.5, 512  # tokens of a completion
SLOTS, SAMPLES = 64, 8
PROMPT, PACK = 850, 8192  # tokens of a prompt, and of a pack of them
LAYERS, WIDTH, PARAMETERS = 32, 4096, 6.5e9  # of a decoder like Qwen2-Audio-7B's, without its embeddings
TARGETS = {1024: 0.90, 512: 0.80, 192: 0.63}  # completions -> least use


class BlankDecoder:
    """The interface of learning/decoder.Decoder. The first number that is drawn for a completion is its length."""

    def __init__(self, slots, num_samples, num_prompts, captured):
        self.num_samples = num_samples
        self.captured = captured
        self.prompt_of = [-1] * slots
        self.position_after = [0] * prompt_slots_for(slots, num_samples, num_prompts)
        self.slots_in_use = slots
        self.cache = SimpleNamespace(rows_in_use=0)
        self.left = [0] * slots
        self.steps = self.rows = self.seen = self.prefilled = 0

    def prefill(self, prompts, prompt_slots, length_B):
        self.prefilled += sum(map(len, prompts))
        lengths = length_B.tolist()
        return None, [END if length == 1 else 0 for length in lengths], [0.0] * len(lengths)

    def place(self, slots, tokens, prompt_slots, length_ST):
        for slot, prompt_slot, length in zip(slots, prompt_slots, length_ST[:, 0].tolist(), strict=True):
            self.prompt_of[slot] = prompt_slot
            self.left[slot] = int(length) - 1

    def move(self, slots, others):
        for slot, other in zip(slots, others, strict=True):
            self.left[other], self.prompt_of[other] = self.left[slot], self.prompt_of[slot]

    def run(self, steps):
        ids = []
        for _ in range(steps):
            self.left = [left - 1 for left in self.left]
            ids.append([END if left == 0 else 0 for left in self.left[:self.slots_in_use]])
            self.steps += 1
            self.rows += self.slots_in_use
        return ids, [[0.0] * self.slots_in_use] * steps


def write(lengths, slots, num_samples, captured):
    """Completions of these lengths, prompt by prompt: {"steps", "rows", "prefilled", "use"}."""
    num_prompts = len(lengths) // num_samples
    decoder = BlankDecoder(min(slots, len(lengths)), num_samples, num_prompts, captured)
    processor = SimpleNamespace(end_id=END, decode=lambda ids: "")
    usage = Usage()
    schedule = Schedule(
        decoder, processor, iter([range(PROMPT)] * num_prompts), lambda i: torch.tensor([lengths[i]]), usage,
        max_new_tokens=max(lengths), stop=(), prefill_tokens=PACK, on_token=None, on_prompts=None)
    while schedule.fill():
        schedule.run()
    assert [len(ids) for ids in schedule.ids] == lengths
    assert (usage.rows, usage.tokens) == (decoder.rows, sum(lengths) - len(lengths))
    return {"steps": decoder.steps, "rows": decoder.rows, "prefilled": decoder.prefilled, "use": usage.slot_use}


def by_prompts(lengths, slots, num_samples, sync):
    """As before: a prompt's completions leave their slots together. sync: steps between two looks."""
    groups = [max(lengths[i:i + num_samples]) - 1 for i in range(0, len(lengths), num_samples)]
    left, steps = [], 0
    while groups or left:
        while groups and len(left) < slots // num_samples:
            left.append(groups.pop(0))
        left = [length - sync for length in left if length > sync]
        steps += sync
    return {"steps": steps, "rows": steps * slots}


def by_packs(lengths, sync):
    """As before: answers of a pack of prompts are written until the slowest is finished."""
    size = PACK // PROMPT
    packs = [lengths[i:i + size] for i in range(0, len(lengths), size)]
    steps = [math.ceil((max(pack) - 1) / sync) * sync for pack in packs]
    return {"steps": sum(steps), "rows": sum(len(pack) * count for pack, count in zip(packs, steps, strict=True))}


def flops(found, prompts):
    """Of products with the weights, and of attention over a prompt and half a completion."""
    rows = prompts * PROMPT + found["rows"]
    attended = prompts * PROMPT**2 / 2 + found["rows"] * (PROMPT + MEAN / 2)
    return 2 * PARAMETERS * rows + 4 * LAYERS * WIDTH * attended


def drawn_lengths(count, seed):
    generator = random.Random(seed)
    mu = math.log(MEAN) - SIGMA**2 / 2
    return [min(MOST, max(2, round(generator.lognormvariate(mu, SIGMA)))) for _ in range(count)]


def recorded_lengths(path):
    lengths = []
    for line in Path(path).read_text().splitlines():
        record = json.loads(line)
        for sample in record.get("samples", [record]):
            lengths.append(len(sample["ids"]) if "ids" in sample else len(sample["text"].split()) + 1)
    return lengths


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", help="file of recorded completions; default: log-normal ones")
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args(argv)
    recorded = recorded_lengths(args.lengths) if args.lengths else None

    def lengths_of(count, seed):
        return random.Random(seed).choices(recorded, k=count) if recorded else drawn_lengths(count, seed)

    use, ok = [], True
    for count, least in TARGETS.items():
        for captured in (False, True):
            found = [write(lengths_of(count, seed), SLOTS, SAMPLES, captured)["use"] for seed in range(5)]
            use.append({"completions": count, "captured": captured, "use": sum(found) / len(found),
                        "least": min(found)})
            ok = ok and use[-1]["use"] >= least
            print(f"{count:5} completions, {'captured steps' if captured else 'single steps':15} use "
                  f"{use[-1]['use']:.3f} (at least {least})")
    ratios = []
    for title, num_samples, before in (("traces", SAMPLES, by_prompts), ("evaluation", 1, by_packs)):
        for captured in (False, True):
            lengths, sync = lengths_of(512 * num_samples, 0), STEPS_PER_SYNC if captured else 1
            more = (SLOTS, num_samples) if before is by_prompts else ()
            old, new = before(lengths, *more, sync), write(lengths, SLOTS, num_samples, captured)
            over = {"rows": old["rows"] / new["rows"], "steps": old["steps"] / new["steps"],
                    "flops": flops(old, 512) / flops(new, 512)}
            ratios.append({"what": title, "captured": captured, "before": old, "now": new, "over": over})
            print(f"{title:11}{'captured steps' if captured else 'single steps':15} before over now: "
                  + ", ".join(f"{name} {value:.2f}" for name, value in over.items()))
    return report({"bench": "bench_slots", "lengths": args.lengths or "log-normal", "use": use, "ratios": ratios,
                   "ok": ok}, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
