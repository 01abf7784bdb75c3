"""bench_prepare: clips a second that tools/prepare_vggsound.py opens, by number of cores, and its memory by rows.

The clip is made: 10 s of 640 x 360 at 25 frames a second with 44.1 kHz sound, as VGGSound's are, opened, decoded and
checked as the tool does it. Rounds interleave the numbers of workers; a ratio is taken within a round.

Run: python -m bench.bench_prepare [--rounds 3] [--clips 24] [--out bench/results/NAME.json]
The last line of stdout is JSON.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from children import Task, run_tasks  # noqa: E402
from clips import look  # noqa: E402

from bench.bench_train import environment  # noqa: E402
from minixmd.runs.files import write_json  # noqa: E402

SECONDS, WIDTH, HEIGHT, FPS, RATE = 10, 640, 360, 25, 44_100
ROWS = (2_000, 200_000)


def make_clip(path):
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (HEIGHT // 8 + 64, WIDTH // 8 + 64, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "fast", "crf": "28"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="stereo")
        for t in range(SECONDS * FPS):
            frame = np.ascontiguousarray(texture[t:t + HEIGHT, 2 * t:2 * t + WIDTH])
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        wave = (0.1 * rng.standard_normal((2, SECONDS * RATE))).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
        sound.sample_rate, sound.pts = RATE, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


def clips_per_second(path, workers, count):
    """The first two clips a worker start it, and do not count."""
    warm = 2 * workers
    tasks = [Task(i, None, (path.name, path.stat().st_size, str(path), None)) for i in range(count + warm)]
    done = run_tasks(tasks, look, workers=workers, limit_s=60, preload=["minixmd.inputs.media"])
    for _ in range(warm):
        next(done)
    began = time.perf_counter()
    results = [task.result for task in done]
    seconds = time.perf_counter() - began
    assert not [result for result in results if "reason" in result], results[0]
    return count / seconds


def peak_mib(folder, count):
    """Peak resident memory of the tool itself, without opening clips."""
    (folder / "csv").mkdir(parents=True)
    labels = [f"class {i}" for i in range(100)]
    (folder / "csv" / "stat.csv").write_text("".join(f"{label},{count // 100},x\n" for label in labels))
    with open(folder / "csv" / "train.csv", "w") as file:
        file.writelines(f"{i:011d}_000030.mp4,{labels[i % 100]}\n" for i in range(count))
    (folder / "classes.txt").write_text("".join(label + "\n" for label in labels))
    tool = Path(__file__).resolve().parents[1] / "tools" / "prepare_vggsound.py"
    command = [sys.executable, tool, folder / "csv", folder, folder / "out", "--no-open", "--analysis", "5",
               "--classes", folder / "classes.txt"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, f"the tool ended with status {status}"
    with open(folder / "out" / "train.jsonl") as file:
        lines = sum(1 for _ in file)
    return lines, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="at least 1")
    parser.add_argument("--clips", type=int, default=24, help="that a worker opens in a round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cores = os.cpu_count()
    counts = sorted({1, 2, cores} & set(range(1, cores + 1)))
    with tempfile.TemporaryDirectory() as folder:
        memory = [dict(zip(("rows", "peak_mib"), peak_mib(Path(folder, str(count)), count), strict=True))
                  for count in ROWS]
        clip = Path(folder, "clip.mp4")
        make_clip(clip)
        rounds = []
        for number in range(args.rounds):
            order = counts if number % 2 else counts[::-1]
            rates = {workers: clips_per_second(clip, workers, args.clips * workers) for workers in order}
            rounds.append({str(workers): rates[workers] for workers in counts})
            print(f"round {number}: " + ", ".join(f"{n} workers {rate:.2f} clips/s" for n, rate in rounds[-1].items()),
                  flush=True)
    ratios = {str(n): sorted(one[str(n)] / one["1"] for one in rounds) for n in counts}
    for one in memory:
        print(f"{one['rows']:,} rows in the manifest: {one['peak_mib']:.0f} MiB resident")
    for n, values in ratios.items():
        print(f"{n} workers: {values[len(values) // 2]:.2f} times one worker's ({values[0]:.2f} to {values[-1]:.2f})")
    found = {"bench": "bench_prepare", "env": environment(), "cores": cores, "clips_per_second": rounds,
             "ratio": ratios, "memory": memory}
    if args.out:
        write_json(args.out, found)
    print(json.dumps({"ratio": ratios, "memory": memory}))


if __name__ == "__main__":
    main()
