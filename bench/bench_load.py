"""bench_load: peak memory and time of loading a sharded checkpoint on the CPU, minixmd against transformers.

A Qwen2-Audio of 1.0 billion random bf16 weights (2 GB) in six shards is written to a temporary folder. Then each side
loads it in a process of its own, into bf16 and into fp32. A thread reads /proc/self/status every 2 ms; what is reported
is the most by which anonymous memory (RssAnon) stood above its value before the load, and the same of all resident
memory, which counts the mapped pages of the files too: those the kernel takes back when it needs the room. Weights that
a loader leaves in the file's mapping are therefore in the second figure only.

minixmd's peak must be at most the weights in the dtype asked for, the largest tensor once more, and 64 MiB. (torch
imports 69 MiB of itself, in 0.8 s, when a process builds its first model on `meta`; that is in its figures.) All sides
must have loaded the same weights (shape and fp64 sum of every tensor) or nothing is reported; that first pass over the
weights is timed too, since it is then that a mapped file is read. The files are in the page cache, so the times are
those of page faults, copies and casts, not of a disk. Sides take turns in going first.

Run: python -m bench.bench_load [--rounds 3] [--threads 2] [--out bench/results/NAME.json]
Needs Linux, transformers, 5 GB of memory and 2 GB of disk, takes 1 to 3 minutes. The last line of stdout is JSON.
"""
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from minixmd.models.families import read_config
from minixmd.models.weights import build, load_model, save_model

CONFIG = {
    "model_type": "qwen2_audio", "audio_token_index": 31_990,
    "text_config": dict(model_type="qwen2", vocab_size=32_000, hidden_size=2048, intermediate_size=5504,
                        num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, rms_norm_eps=1e-5,
                        rope_theta=10000.0, max_position_embeddings=8192),
    "audio_config": dict(num_mel_bins=128, encoder_layers=8, encoder_attention_heads=10, encoder_ffn_dim=2560,
                         d_model=640, max_source_positions=1500),
}  # fmt: skip
SMALL = {
    **CONFIG, "text_config": CONFIG["text_config"] | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2),
    "audio_config": CONFIG["audio_config"] | dict(encoder_layers=1, encoder_ffn_dim=96, d_model=80),
}  # fmt: skip
SHARD_BYTES, SMALL_SHARD_BYTES = 400_000_000, 2_000_000
ALLOWED = 64 << 20  # bytes beyond the weights and the largest tensor
ROOT = Path(__file__).resolve().parents[1]
SIDES = [(side, dtype) for dtype in ("bfloat16", "float32") for side in ("minixmd", "transformers")]


def write_checkpoint(folder, config, shard_bytes):
    """Returns {"parameters", "largest" tensor's parameters, "shards"}."""
    model = build(read_config(config)).bfloat16().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02, generator=generator)
    save_model(model, folder, folder, shard_bytes)
    sizes = [p.numel() for p in model.parameters()]
    return {"parameters": sum(sizes), "largest": max(sizes), "shards": len(list(folder.glob("*.safetensors")))}


# ---- in a process of its own ----


def resident():
    """(RssAnon, VmRSS) of this process in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[name].split()[0]) << 10 for name in ("RssAnon", "VmRSS"))


@contextmanager
def sampled_memory():
    """A list of `resident()`, one before the block and one every 2 ms in it."""
    samples, done = [resident()], threading.Event()

    def sample():
        while not done.wait(0.002):
            samples.append(resident())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def measure(side, dtype, folder, threads):
    """Loads once and prints what it took as JSON."""
    torch.set_num_threads(threads)
    load = load_model
    if side == "transformers":  # only here: minixmd's process does without it, and its import is not part of the load
        from transformers import Qwen2AudioForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        load = Qwen2AudioForConditionalGeneration.from_pretrained
    with sampled_memory() as samples:
        began = time.perf_counter()
        model = load(folder, dtype=getattr(torch, dtype))
        wall_s = time.perf_counter() - began
    samples.append(resident())
    peak_anon, peak_resident = (max(column) - column[0] for column in zip(*samples, strict=True))
    began = time.perf_counter()
    digest = sorted((list(p.shape), p.sum(dtype=torch.float64).item()) for p in model.parameters())
    print(json.dumps({"wall_s": wall_s, "first_pass_s": time.perf_counter() - began, "peak_anon": peak_anon,
                      "peak_resident": peak_resident, "samples": len(samples) - 1, "digest": digest}))


def run_process(side, dtype, folder, threads):
    command = [sys.executable, "-m", "bench.bench_load", "process", side, dtype, folder, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{side} {dtype}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the table ----


def row_of(checkpoint, side, dtype, runs):
    """A side's row over all rounds, printed."""
    size = getattr(torch, dtype).itemsize
    weights, largest = checkpoint["parameters"] * size, checkpoint["largest"] * size
    row = {"side": side, "dtype": dtype, "weight_bytes": weights, "bound_bytes": weights + largest + ALLOWED,
           "largest_bytes": largest, "peak_anon_bytes": max(run["peak_anon"] for run in runs),
           "peak_resident_bytes": max(run["peak_resident"] for run in runs), "wall_s": [run["wall_s"] for run in runs],
           "first_pass_s": [run["first_pass_s"] for run in runs], "samples": min(run["samples"] for run in runs)}
    print(f"{side:12}  {dtype:8}  weights {weights / 2**20:5.0f} MiB  peak: anonymous "
          f"{row['peak_anon_bytes'] / 2**20:5.0f} MiB, resident {row['peak_resident_bytes'] / 2**20:5.0f} MiB  load "
          f"{median(row['wall_s']):5.2f} s, first pass {median(row['first_pass_s']):5.2f} s")
    return row


def main(argv=None):
    """Returns the exit status: 1 if minixmd's peak was above its bound in any round."""
    from bench.reference import environment, parse_arguments, write_result  # imports transformers

    args = parse_arguments(__doc__, argv, rounds=3, threads=2)
    config, shard_bytes = (CONFIG, SHARD_BYTES)
    if args.small:
        config, shard_bytes = SMALL, SMALL_SHARD_BYTES
    rounds = {case: [] for case in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder), config, shard_bytes)
        for i in range(args.rounds):
            first = i % len(SIDES)
            for side, dtype in SIDES[first:] + SIDES[:first]:
                rounds[side, dtype].append(run_process(side, dtype, folder, args.threads))
    digests = [run["digest"] for runs in rounds.values() for run in runs]
    if any(digest != digests[0] for digest in digests):
        raise ValueError("parity: the sides did not load the same weights; nothing is reported")
    print(f"{checkpoint['parameters']:,} parameters in {checkpoint['shards']} shards of bf16; the largest tensor has "
          f"{checkpoint['largest']:,}")
    rows = [row_of(checkpoint, side, dtype, runs) for (side, dtype), runs in rounds.items()]
    within = all(row["peak_anon_bytes"] <= row["bound_bytes"] for row in rows if row["side"] == "minixmd")
    print(f"minixmd's peak of anonymous memory is {'within' if within else 'ABOVE'} the weights + the largest tensor + "
          f"{ALLOWED >> 20} MiB")
    write_result({"bench": "bench_load", "small": args.small, **environment(), "checkpoint": checkpoint,
                  "rounds": args.rounds, "rows": rows, "within_bound": within}, args.out)
    return 0 if within else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["process"]:
        side, dtype, folder, threads = sys.argv[2:]
        measure(side, dtype, folder, int(threads))
    else:
        sys.exit(main())
