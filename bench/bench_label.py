"""bench_label: questions answered by their letters, one forward pass each, minixmd against transformers, same weights.

Labelling asks a model about every clip once and reads one row of logits. Both sides apply the head to that row only. In
multiply-adds: transformers A(30 s) + N W, minixmd A(clip) + n W, with N tokens padding included, n those that exist,
and A the audio tower's. The model and the clips are bench_train's (the 7B's proportions; 2 to 10 s, 8 in a batch).

The rows of logits must agree (1e-4 of the largest) before anything is timed. Rounds interleave the sides in turning
order, and the ratio is taken within a round.

Run: python -m bench.bench_label [--rounds 9] [--threads 2] [--out bench/results/NAME.json]
Needs transformers, 3 GB and a minute or two. The last line of stdout is JSON.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers.utils import logging

from bench.bench_train import EQUAL_S, MIXED_S, TIMED, clips, environment, flops, quantiles, reference_model
from minixmd import pack
from minixmd.models.weights import load_model

TARGET = 1.25  # times transformers' questions a second, on mixed lengths


def sides_of(model, reference, durations_s):
    """{side: the letters' row of logits of every clip, (B, V)}."""
    prompts, target_BT, inputs = clips(durations_s, TIMED["vocab"])
    row_B = torch.tensor([len(p) - 3 for p in prompts])  # predicts the letter: two targets end a prompt

    def mine():
        batch = pack(prompts)
        return model.logits(model(batch)[row_B + torch.tensor([start for start, _ in batch.spans])])

    def theirs():
        hidden_BTD = reference.model(**inputs).last_hidden_state
        return reference.lm_head(hidden_BTD[torch.arange(len(prompts)), row_B])

    return {"minixmd": mine, "transformers": theirs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="it measures on a CPU only")
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    reference = reference_model(TIMED, torch.Generator().manual_seed(0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = load_model(folder)
    result = {"bench": "bench_label", **environment(), "model": TIMED, "rounds": args.rounds, "target": TARGET,
              "rows": []}
    with torch.inference_mode():
        for name, durations_s in (("equal lengths", EQUAL_S), ("mixed lengths", MIXED_S)):
            sides, times = sides_of(model, reference, durations_s), {"minixmd": [], "transformers": []}
            ours, reference_BV = (side() for side in sides.values())
            error = ((ours - reference_BV).abs().max() / reference_BV.abs().max()).item()
            if not error <= 1e-4:
                raise ValueError(f"parity: the letters' logits differ by {error:.1e} of the largest; nothing is timed")
            for i in range(2 + args.rounds):
                for side in list(sides)[:: 1 if i % 2 else -1]:
                    began = time.perf_counter()
                    sides[side]()
                    if i >= 2:
                        times[side].append(time.perf_counter() - began)
            ratio = quantiles([t / m for m, t in zip(*times.values(), strict=True)])
            gflop = {side: flops(function)[0] / 1e9 for side, function in sides.items()}
            result["rows"].append({"what": name, "durations_s": durations_s, "error": error, "ratio": ratio,
                                   "gflop": gflop, "seconds": {s: quantiles(t) for s, t in times.items()}})
            print(f"{name}: {ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f}) times transformers' "
                  f"questions a second; {gflop['minixmd']:.0f} and {gflop['transformers']:.0f} GFLOP", flush=True)
    line = json.dumps(result)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
