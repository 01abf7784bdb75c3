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
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from prepare.clip_checks import check_clip  # noqa: E402

from bench.reference import environment  # noqa: E402
from minixmd.inputs.prompts import prefetch  # noqa: E402
from minixmd.runs.files import write_json  # noqa: E402

RATE = 44_100  # of the sound
NUM_CLASSES = 100


@dataclass
class Sizes:
    seconds: int  # of the clip
    width: int
    height: int
    fps: int
    rows: tuple[int, int]  # of the csv files


FULL, SMALL = Sizes(10, 640, 360, 25, (2_000, 200_000)), Sizes(1, 64, 48, 5, (1_000, 2_000))


def make_clip(path, sizes):
    """A texture that moves, with noise in stereo."""
    rng, width, height = np.random.default_rng(0), sizes.width, sizes.height
    texture = rng.integers(0, 256, (height // 8 + 64, width // 8 + 64, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=sizes.fps, options={"preset": "fast", "crf": "28"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="stereo")
        for t in range(sizes.seconds * sizes.fps):
            frame = np.ascontiguousarray(texture[t:t + height, 2 * t:2 * t + width])
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        wave = (0.1 * rng.standard_normal((2, sizes.seconds * RATE))).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
        sound.sample_rate, sound.pts = RATE, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


def clips_per_second(path, workers, count):
    """The first two clips a worker start it, and do not count."""
    warmup = 2 * workers
    done = prefetch(lambda _, check: check(str(path), path.name, None), range(count + warmup), None, load=check_clip,
                    ahead=2 * workers, workers=workers)
    for _ in range(warmup):
        next(done)
    began = time.perf_counter()
    results = list(done)
    seconds = time.perf_counter() - began
    dropped = [result for result in results if "reason" in result]
    assert not dropped, dropped[0]
    return count / seconds


def tool_memory(folder, count):
    """(rows of the train manifest, the tool's own peak resident memory) for `count` rows, without opening clips."""
    (folder / "csv").mkdir(parents=True)
    labels = [f"class {i}" for i in range(NUM_CLASSES)]
    (folder / "csv" / "stat.csv").write_text("".join(f"{label},{count // NUM_CLASSES},x\n" for label in labels))
    with open(folder / "csv" / "train.csv", "w") as file:
        file.writelines(f"{i:011d}_000030.mp4,{labels[i % NUM_CLASSES]}\n" for i in range(count))
    command = [sys.executable, TOOLS / "prepare_vggsound.py", folder / "csv", folder, folder / "out", "--no-open",
               "--analysis", "5", "--all-classes"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"the tool ended with status {child.returncode}"
    with open(folder / "out" / "train.jsonl") as file:
        rows = sum(1 for _ in file)
    return rows, usage.ru_maxrss / 1024


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="at least 1")
    parser.add_argument("--clips", type=int, default=24, help="that a worker opens in a round")
    parser.add_argument("--small", action="store_true", help="tiny sizes: tries the script, measures nothing")
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args(argv)
    sizes, cores = SMALL if args.small else FULL, os.cpu_count()
    counts = [workers for workers in sorted({1, 2, cores}) if workers <= cores]
    memory, rounds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for count in sizes.rows:
            rows, mib = tool_memory(Path(folder, str(count)), count)
            memory.append({"rows": rows, "peak_mib": mib})
        clip = Path(folder, "clip.mp4")
        make_clip(clip, sizes)
        for number in range(args.rounds):
            rates = {}
            for workers in counts if number % 2 else counts[::-1]:
                rates[workers] = clips_per_second(clip, workers, args.clips * workers)
            rounds.append({str(workers): rates[workers] for workers in counts})
            listed = ", ".join(f"{workers} workers {rates[workers]:.2f} clips/s" for workers in counts)
            print(f"round {number}: {listed}", flush=True)
    for row in memory:
        print(f"{row['rows']:,} rows in the manifest: {row['peak_mib']:.0f} MiB resident")
    ratios = {}
    for workers in rounds[0]:
        values = sorted(rates[workers] / rates["1"] for rates in rounds)
        ratios[workers] = values
        print(f"{workers} workers: {values[len(values) // 2]:.2f} times one worker's ({values[0]:.2f} to "
              f"{values[-1]:.2f})")
    found = {"bench": "bench_prepare", "small": args.small, "env": environment(), "cores": cores,
             "clips_per_second": rounds, "ratio": ratios, "memory": memory}
    if args.out:
        write_json(args.out, found)
    print(json.dumps({"ratio": ratios, "memory": memory}))


if __name__ == "__main__":
    main()
