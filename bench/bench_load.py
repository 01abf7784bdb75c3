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
import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
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
SHARD_BYTES = 400_000_000
ALLOWED = 64 << 20  # bytes beyond the weights and the largest tensor
SIDES = [(side, dtype) for dtype in ("bfloat16", "float32") for side in ("minixmd", "transformers")]


def write_checkpoint(folder):
    """Returns {"parameters", "largest" tensor's parameters, "shards"}."""
    model = build(read_config(CONFIG)).bfloat16().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02, generator=generator)
    save_model(model, folder, folder, SHARD_BYTES)
    sizes = [p.numel() for p in model.parameters()]
    return {"parameters": sum(sizes), "largest": max(sizes), "shards": len(list(folder.glob("*.safetensors")))}


def resident():
    """(RssAnon, VmRSS) of this process in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) << 10 for name in ("RssAnon", "VmRSS"))


def load(side, folder, dtype):
    if side == "minixmd":
        return load_model(folder, dtype=dtype)
    from transformers import Qwen2AudioForConditionalGeneration  # not in minixmd's process

    return Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def measure(side, folder, dtype, threads):
    """In a fresh process: load once, and print what it took as JSON."""
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype)
    if side == "transformers":
        from transformers import Qwen2AudioForConditionalGeneration  # noqa: F401  its import is not part of the load
        from transformers.utils import logging

        logging.disable_progress_bar()
    peaks, done = [resident()], threading.Event()

    def sample():
        while not done.wait(0.002):
            peaks.append(resident())

    thread = threading.Thread(target=sample)
    thread.start()
    began = time.perf_counter()
    model = load(side, folder, dtype)
    wall_s = time.perf_counter() - began
    done.set()
    thread.join()
    anon, every = ([p[i] - peaks[0][i] for p in (*peaks, resident())] for i in (0, 1))
    began = time.perf_counter()
    digest = sorted((list(p.shape), p.sum(dtype=torch.float64).item()) for p in model.parameters())
    print(json.dumps({"wall_s": wall_s, "first_pass_s": time.perf_counter() - began, "peak_anon": max(anon),
                      "peak_resident": max(every), "samples": len(peaks), "digest": digest}))


def in_a_process(side, folder, dtype, threads):
    command = [sys.executable, "-m", "bench.bench_load", "--side", side, dtype, str(folder), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    if done.returncode:
        raise RuntimeError(f"{side} {dtype}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def report(found, rounds):
    """The rows of the table, printed; whether minixmd stayed within its bound in every round."""
    rows, kept = [], True
    for side, dtype in SIDES:
        size = getattr(torch, dtype).itemsize
        bound = found["parameters"] * size + found["largest"] * size + ALLOWED
        runs = rounds[side, dtype]
        anon, every = (max(run[key] for run in runs) for key in ("peak_anon", "peak_resident"))
        row = {"side": side, "dtype": dtype, "weight_bytes": found["parameters"] * size, "bound_bytes": bound,
               "largest_bytes": found["largest"] * size, "peak_anon_bytes": anon, "peak_resident_bytes": every,
               "wall_s": [run["wall_s"] for run in runs], "first_pass_s": [run["first_pass_s"] for run in runs],
               "samples": min(run["samples"] for run in runs)}
        rows.append(row)
        print(f"{side:12}  {dtype:8}  weights {row['weight_bytes'] / 2**20:5.0f} MiB  peak: anonymous "
              f"{anon / 2**20:5.0f} MiB, resident {every / 2**20:5.0f} MiB  load "
              f"{median(row['wall_s']):5.2f} s, first pass {median(row['first_pass_s']):5.2f} s")
        if side == "minixmd":
            kept &= anon <= bound
    return rows, kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="loads of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="it measures on a CPU only")
    parser.add_argument("--out", help="file to write the JSON to as well")
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "DTYPE", "FOLDER"), help="(for its own processes)")
    args = parser.parse_args()
    if args.side:
        side, dtype, folder = args.side
        return measure(side, folder, dtype, args.threads)
    from bench.bench_train import environment  # imports transformers, which is no part of minixmd's side

    torch.set_num_threads(args.threads)
    rounds = {case: [] for case in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        found = write_checkpoint(Path(folder))
        for i in range(args.rounds):
            for case in SIDES[i % len(SIDES):] + SIDES[:i % len(SIDES)]:
                rounds[case].append(in_a_process(case[0], folder, case[1], args.threads))
    digests = [run.pop("digest") for runs in rounds.values() for run in runs]
    if any(digest != digests[0] for digest in digests):
        raise ValueError("parity: the sides did not load the same weights; nothing is reported")
    print(f"{found['parameters']:,} parameters in {found['shards']} shards of bf16; the largest tensor has "
          f"{found['largest']:,}")
    rows, kept = report(found, rounds)
    said = "within" if kept else "ABOVE"
    print(f"minixmd's peak of anonymous memory is {said} the weights + the largest tensor + {ALLOWED >> 20} MiB")
    result = {"bench": "bench_load", **environment(), "checkpoint": found, "rounds": args.rounds, "rows": rows,
              "within_bound": kept}
    line = json.dumps(result)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(line + "\n")
    print(line)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
