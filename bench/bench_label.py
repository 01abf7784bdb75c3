"""bench_label: questions answered by their letters, one forward pass each, minixmd against transformers, same weights.

Labelling asks a model about every clip once and reads one row of logits. Both sides apply the head to that row only. In
multiply-adds: transformers A(30 s) + N W, minixmd A(clip) + n W, with N tokens padding included, n those that exist,
and A the audio tower's. The model and the clips are bench_train's (the 7B's proportions; 2 to 10 s, 8 in a batch).

The rows of logits must agree (1e-4 of the largest) before anything is timed. Rounds interleave the sides in turning
order, and the ratio is taken within a round.

Run: python -m bench.bench_label [--rounds 9] [--threads 2] [--out bench/results/NAME.json]
Needs transformers, 3 GB and a minute or two. The last line of stdout is JSON.
"""
import tempfile
import time

import torch

from bench.measure import quantiles
from bench.reference import (
    EQUAL_S,
    MIXED_S,
    SMALL,
    TIMED,
    count_flops,
    environment,
    make_clips,
    parse_arguments,
    reference_model,
    write_result,
)
from minixmd import pack
from minixmd.models.weights import load_model

TARGET = 1.25  # times transformers' questions a second, on mixed lengths
WARMUP = 2  # rounds that are not timed


def sides_of(model, reference, clips):
    """{side: function that returns the row of logits where each clip's letter is read, (B, V)}."""
    row_B = torch.tensor([len(prompt) - 3 for prompt in clips.prompts])  # predicts the first of a prompt's two targets

    def ours():
        batch = pack(clips.prompts)
        start_B = torch.tensor([start for start, _ in batch.spans])
        return model.logits(model(batch)[start_B + row_B])

    def theirs():
        hidden_BTD = reference.model(**clips.inputs).last_hidden_state
        return reference.lm_head(hidden_BTD[torch.arange(len(row_B)), row_B])

    return {"minixmd": ours, "transformers": theirs}


def check_parity(sides):
    """The largest difference of the logits over the largest; ValueError above 1e-4."""
    ours_BV, theirs_BV = (side() for side in sides.values())
    error = ((ours_BV - theirs_BV).abs().max() / theirs_BV.abs().max()).item()
    if not error <= 1e-4:
        raise ValueError(f"parity: the letters' logits differ by {error:.1e} of the largest; nothing is timed")
    return error


def time_sides(sides, rounds):
    """{side: seconds of each round}."""
    times, order = {side: [] for side in sides}, list(sides)
    for i in range(WARMUP + rounds):
        for side in order if i % 2 else order[::-1]:
            began = time.perf_counter()
            sides[side]()
            if i >= WARMUP:
                times[side].append(time.perf_counter() - began)
    return times


def run(name, model, reference, durations_s, vocab, rounds):
    """The row of a list of clips."""
    sides = sides_of(model, reference, make_clips(durations_s, vocab))
    error = check_parity(sides)
    times = time_sides(sides, rounds)
    ratio = quantiles([theirs / ours for ours, theirs in zip(times["minixmd"], times["transformers"], strict=True)])
    gflop = {side: count_flops(function)[0] / 1e9 for side, function in sides.items()}
    print(f"{name}: {ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f}) times transformers' questions a "
          f"second; {gflop['minixmd']:.0f} and {gflop['transformers']:.0f} GFLOP", flush=True)
    return {"what": name, "durations_s": durations_s, "error": error, "ratio": ratio, "gflop": gflop,
            "seconds": {side: quantiles(seconds) for side, seconds in times.items()}}


@torch.inference_mode()
def main(argv=None):
    args = parse_arguments(__doc__, argv, rounds=9, threads=2)
    shape, equal_s, mixed_s = (SMALL, [0.5, 0.5], [0.3, 0.6]) if args.small else (TIMED, EQUAL_S, MIXED_S)
    reference = reference_model(shape, torch.Generator().manual_seed(0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = load_model(folder)
    rows = [run("equal lengths", model, reference, equal_s, shape["vocab"], args.rounds),
            run("mixed lengths", model, reference, mixed_s, shape["vocab"], args.rounds)]
    write_result({"bench": "bench_label", "small": args.small, **environment(), "model": shape, "rounds": args.rounds,
                  "target": TARGET, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
