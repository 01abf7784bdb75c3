"""bench_start: CPU time and peak memory of starting a stage on 150,000 clips.

A manifest of so many lines like VGGSound's (ten options of 309 classes; all name the same few clips), the shards of a
Label and an Evaluate stage, and labels with the 64 best ids of each clip are written to a temporary folder, beside a
Qwen2-Audio too small to matter. Each case is a process of its own:

    …, files   what is read before the model is: the check of all files, and then what the stage itself reads of them
    label      `python -m minixmd.train`; all shards are on disk, labels.jsonl is still to be written
    evaluate   the same; answers.jsonl and the tables are still to be written
    distill    the same; two steps, on four clips, by the KL to the teacher's best ids
    …, again   the same command once more: the stage is finished and skipped

Reported are the process's CPU seconds, user and system, and the most memory that it held (resident). "imports" is a
process that imports the runner and ends: the seconds "of the start" are without it. A case that fails ends the bench.

Run: OMP_NUM_THREADS=1 python -m bench.bench_start [--clips 150000] [--root CHECKOUT] [--out bench/results/NAME.json]
Takes 2 minutes and 1 GB of disk; of an older checkout's code more. The last line of stdout is JSON.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import measure
from bench.bench_memory import write_data, write_model

SHAPE = {
    "text_config": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=2, max_position_embeddings=2048),
    "audio_config": dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32),
}  # fmt: skip
SHARD, TOP_K = 64, 64
COMMON = "name='case', model='{home}/model', manifest='{home}/manifest.jsonl', media='audio', device='cpu'"
STAGES = {
    "label": f"Label({COMMON}, top_k={TOP_K}, temperature=2.0)",
    "evaluate": f"Evaluate({COMMON})",
    "distill": f"Distill({COMMON}, teacher_labels='{{home}}/labels.jsonl', gate='always', teacher_loss='kl', "
               "temperature=2.0, max_steps=2, batch_size=2)",
}  # fmt: skip
FILES = """
import sys
from minixmd.config.load import load_config
from minixmd.inputs.examples import read_examples
from minixmd.learning.targets import resolve_targets
from minixmd.runner import check_inputs
config = load_config(sys.argv[1], sys.argv[2:])
check_inputs(config)
[stage] = config.stages
examples = read_examples(stage)
if hasattr(stage, "teacher_labels"):
    resolve_targets(stage, examples)
"""


def write_lines(home, clips):
    """manifest.jsonl, labels.jsonl, and the shards of both stages that answer. What this process holds would count as
    its children's, so lines are written one by one. Returns the bytes of labels.jsonl."""
    rng = random.Random(0)
    classes = [f"sounding thing number {i}" for i in range(309)]
    shards = [home / title / "case" / "shards" for title in ("label", "evaluate")]
    for folder in shards:
        folder.mkdir(parents=True)
    for i in range(clips):
        options = rng.sample(classes, 10)
        name = f"{rng.getrandbits(64):011x}_{i % 300:06d}"
        example = {"id": name, "audio": "clip.wav", "video": None, "options": options, "answer": i % 10,
                   "question": "Classify the sounding object into one of the categories below:",
                   "label": options[i % 10], "source": "vggsound train", "meta": {"video_id": name[:11]}}
        logits = sorted((round(rng.gauss(10, 4), 4) for _ in range(TOP_K)), reverse=True)
        top = {"ids": rng.sample(range(16_000), TOP_K), "logits": logits, "temperature": 2.0, "logsumexp": 12.34567}
        letters = [round(rng.gauss(10, 4), 4) for _ in options]
        answer = {"id": name, "answer": i % 7, "option": options[i % 7], "logits": letters}
        label = {**answer, "top": top}
        shard = f"{i // SHARD * SHARD:07d}.jsonl"
        for path, record in ((home / "manifest.jsonl", example), (home / "labels.jsonl", label),
                             (shards[0] / shard, label), (shards[1] / shard, answer)):  # fmt: skip
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
    return (home / "labels.jsonl").stat().st_size


def run(root, *command):
    """(CPU seconds, peak MiB, stdout) of a process. RuntimeError: it failed."""
    process = subprocess.Popen([sys.executable, *command], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed:\n{said}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, said


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=150_000)
    parser.add_argument("--root", type=Path, default=measure.ROOT, help="the checkout whose code is run")
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_model(home / "model", SHAPE)
        write_data(home, 1)
        size = write_lines(home, args.clips)
        shutil.copyfile(home / "model" / "tokenizer.json", home / "tokenizer.json")  # as a Label stage leaves it
        for _ in range(2):  # the first one reads the libraries' files
            imports, peak, _ = run(root, "-c", "import minixmd.runner, minixmd.train")
        print(f"imports: {imports:.1f} s, {peak:,.0f} MiB; labels.jsonl: {size / 1e6:.0f} MB", flush=True)
        for title, source in STAGES.items():
            config = home / f"{title}.py"
            config.write_text(f"from minixmd.config import *\nstages = [{source.format(home=home)}]\n")
            for case in (f"{title}, files", title, f"{title}, again"):
                command = ["-c", FILES] if "files" in case else ["-m", "minixmd.train"]
                seconds, peak, said = run(root, *command, str(config), f"run_dir={home / title}")
                if ("finished before, skipped" in said) != ("again" in case):
                    raise RuntimeError(f"{case} was skipped, or was not:\n{said}")
                rows.append({"case": case, "cpu_s": round(seconds, 2), "start_s": round(seconds - imports, 2),
                             "peak_mib": round(peak)})
                print(f"{case:16}{seconds:6.1f} s,{seconds - imports:6.1f} s of the start,{peak:6,.0f} MiB", flush=True)
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {"bench": "bench_start", "env": measure.env(), "code": commit, "clips": args.clips,
              "labels_bytes": size, "imports_s": round(imports, 2), "rows": rows, "ok": True}
    return measure.report(result, args.out)


if __name__ == "__main__":
    sys.exit(main())
