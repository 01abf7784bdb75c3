"""bench_media: clips a second that are read, beside plain ways to do the same, in child processes, and from a cache.

The clips are made: 10 s of H.264 with B-frames and 44.1 kHz AAC at 720p and 30 frames a second and at 360p and 25.
"Plain" is the way before packets were counted: every frame is decoded, twice where all do not fit into 256 MiB, and
sound is mixed frame by frame; both sides run on one core. Rounds interleave what is compared, a ratio is of one round's
times, and frames must be equal.

Run: python -m bench.bench_media [--rounds 5] [--labels 500] [--small] [--out bench/results/NAME.json]
The last line of stdout is JSON.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

from bench.reference import environment
from minixmd.inputs import media
from minixmd.inputs.audio import SAMPLE_RATE, resample
from minixmd.inputs.clips import load_clip
from minixmd.inputs.prompts import prefetch
from minixmd.runs.files import write_json

RATE = 44_100
OPTIONS = dict(fps=1.0, nframes=None, min_pixels=100_352, max_pixels=262_144)


def write_clip(path, width, height, fps, seconds, seed=0):
    """A film with moving detail and sound, as a camera's."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (height * 2, width * 2, 3), dtype=np.uint8)
    texture = np.stack([np.kron(texture[::8, ::8, c], np.ones((8, 8), np.uint8)) for c in range(3)], -1)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.options = {"preset": "veryfast", "bf": "3", "g": "60", "threads": "2"}
        audio = out.add_stream("aac", rate=RATE, layout="stereo")
        for i in range(fps * seconds):
            y, x = (3 * i) % height, (5 * i) % width
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[y:y + height, x:x + width]), format="rgb24")
            frame.pts = i
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        wave = (0.2 * rng.standard_normal((2, RATE * seconds))).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = RATE, 0
        out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    return str(path)


def plain_frames(path):
    """read_frames with every frame decoded."""
    times, media._frame_times = media._frame_times, lambda path: (av_rate(path), [])
    try:
        return media.read_frames(path)
    finally:
        media._frame_times = times


def av_rate(path):
    with av.open(path) as container:
        return container.streams.video[0].average_rate


def plain_audio(path):
    """read_audio with every AAC frame mixed by itself."""
    blocks = []
    with av.open(path) as container:
        for frame in container.decode(audio=0):
            blocks.append(frame.to_ndarray().mean(0).astype(np.float32))
            rate = frame.sample_rate
    return torch.from_numpy(resample(np.concatenate(blocks), rate, SAMPLE_RATE))


def compare(rounds, plain, ours, *arguments):
    """Median of plain's time over ours on one core, each round measuring both in turns."""
    ratios = []
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    for i in range(rounds):
        seconds = {}
        for function in ((plain, ours) if i % 2 else (ours, plain)):
            began = time.perf_counter()
            function(*arguments)
            seconds[function] = time.perf_counter() - began
        ratios.append(seconds[plain] / seconds[ours])
    os.sched_setaffinity(0, cores)
    return statistics.median(ratios)


def without_picture(path):
    """The clip's sound alone, packet by packet."""
    name = path.replace(".mp4", ".m4a")
    with av.open(path) as source, av.open(name, "w") as out:
        track = source.streams.audio[0]
        copy = out.add_stream_from_template(track)
        for packet in source.demux(track):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    return name


def in_children(path, kind, options, count, workers):
    """Clips a second; the first two a worker start it and do not count."""
    done = prefetch(lambda _, load: load(path, kind, options), range(count + 2 * workers), None, ahead=2 * workers,
                    workers=workers)
    for _ in range(2 * workers):
        next(done)
    began = time.perf_counter()
    assert sum(1 for _ in done) == count
    return count / (time.perf_counter() - began)


def in_process(path, kind, options, count):
    began = time.perf_counter()
    for _ in range(count):
        load_clip(path, kind, options)
    return count / (time.perf_counter() - began)


LABEL = """
import json, resource, sys, time
from minixmd.runner import main
began = time.perf_counter()
status = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"status": status, "seconds": time.perf_counter() - began, "peak_mib": peak >> 10}))
"""


def label_twice(folder, count, width, height, fps):
    """Labels `count` clips with a tiny vision model, twice with a cache: clips a second and peak memory."""
    from mini import write_model  # of tests/

    write_model(folder / "eyes", "vision")
    lines = []
    for i in range(count):
        if i < 8:
            write_clip(folder / f"{i}.mp4", width, height, fps, 10, seed=i)
        else:  # another file with another digest
            (folder / f"{i}.mp4").write_bytes((folder / f"{i % 8}.mp4").read_bytes() + i.to_bytes(4, "big") * 4)
        lines.append({"id": f"{i}", "audio": None, "video": f"{i}.mp4", "question": "Which?", "options": ["a", "b"]})
    found = {}
    for number in (count // 4, count):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:number]))
    for name, number in (("a quarter", count // 4), ("first", count), ("second", count)):
        (folder / "config.py").write_text(
            f"from minixmd.config import Label\nstages = [Label(name='labels', model='{folder}/eyes', media='video', "
            f"manifest='{folder}/{number}.jsonl', device='cpu', batch_tokens=1024, max_pixels=12544, min_pixels=3136, "
            f"cache='{folder}/cache of {number}')]\n")
        run = subprocess.run([sys.executable, "-c", LABEL, folder / "config.py", f"run_dir={folder}/{name}"],
                             stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(run.stdout.splitlines()[-1])
        assert found[name]["status"] == 0
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--labels", type=int, default=0, help="clips to label twice; 0 = leave that out")
    parser.add_argument("--small", action="store_true", help="2 s clips")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seconds = 2 if args.small else 10
    result = {"bench": "bench_media", "small": args.small}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, width, height, fps, count in (("720p", 1280, 720, 30, 12), ("360p", 640, 360, 25, 40)):
            path = write_clip(folder / f"{title}.mp4", width, height, fps, seconds)
            (ours, rate), (plain, plain_rate) = media.read_frames(path), plain_frames(path)
            assert torch.equal(ours, plain) and rate == plain_rate
            result[f"{title} frames, plain / ours"] = compare(args.rounds, plain_frames, media.read_frames, path)
            rounds = 4 * args.rounds
            result[f"{title} sound, plain / ours"] = compare(rounds, plain_audio, media.read_audio, path)
            if title == "360p":
                path_of_sound = without_picture(path)
                result["AAC alone, plain / ours"] = compare(rounds, plain_audio, media.read_audio, path_of_sound)
            if args.small:
                count = 4
            rows = {"contained / in process": [], "two workers / one": []}
            for _ in range(args.rounds):
                alone = in_process(path, "video", OPTIONS, count)
                one, two = (in_children(path, "video", OPTIONS, workers * count, workers) for workers in (1, 2))
                rows["contained / in process"].append(one / alone)
                rows["two workers / one"].append(two / one)
            for row, ratios in rows.items():
                result[f"{title} {row}"] = statistics.median(ratios)
        if args.labels:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
            result["labels"] = label_twice(folder / "labels", args.labels, 1280, 720, 30)
    for name, value in result.items():
        print(f"{name:32} {value:.2f}" if isinstance(value, float) else f"{name:32} {value}")
    result["environment"] = environment()
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
