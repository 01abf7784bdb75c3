"""bench_memory: a dry run's estimate of a training stage's memory against the measured peak, on a Qwen2-Audio of 60 M
parameters.

Measured is a whole stage, up to writing best/, in a process of its own: by how much its anonymous memory (RssAnon, read
every 2 ms) rises, in the second of two runs, so that libraries have their work space; memory of more than 64 KiB goes
back to the system when it is freed. That includes the clips that wait to be used. A reference on the host is anonymous
memory too, in every phase but scoring, which on a CPU needs no second copy: its bytes are added to the estimate there.
Two steps a stage, so that the second meets the optimizer's state. fp32 unless said, clips of 10 s. The estimate's
assumptions hold: the tokenizer is at hand, and hardly a completion ends before max_new_tokens.

Run: python -m bench.bench_memory [--threads 1] [--out bench/results/memory_cpu.json]
Exit status 1 if an estimate is off by more than 5 %. Takes 10 minutes on one core. The last line of stdout is JSON.
"""
import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench import measure
from minixmd import train
from minixmd.config import GRPO, SFT, Distill
from minixmd.dryrun.memory_estimate import estimate
from minixmd.dryrun.models import CLIP_S
from minixmd.dryrun.plan import EXAMPLE, plan_stage
from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.examples import manifest_text
from minixmd.models.families import read_config
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import save_model

ROWS, BOUND = 16_384, 0.05
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
SHAPE = {
    "text_config": dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
                        num_key_value_heads=8, max_position_embeddings=2048),
    "audio_config": dict(d_model=384, encoder_layers=9, encoder_attention_heads=6, encoder_ffn_dim=1536),
}  # fmt: skip
STEPS = 2
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed memory, to the system
TRACES = {"traces": "traces.jsonl", "max_new_tokens": 257}
ROLLOUTS = {"batch_size": 2, "group_size": 4, "max_new_tokens": 64, "micro_batch_tokens": 900}
LABELS = {"teacher_labels": "labels.jsonl"}
FULL, HALF = {"trainable": "full"}, {"trainable": "decoder", "dtype": "bfloat16"}
CASES = {
    "SFT, LoRA, 1 letter a pass": (SFT, {"batch_size": 2, "micro_batch_tokens": 600}),
    "SFT, LoRA, 4 letters a pass": (SFT, {}),
    "SFT, LoRA, 2 traces of 256 tokens a pass": (SFT, {**TRACES, "batch_size": 4, "micro_batch_tokens": 1700}),
    "SFT, decoder, 4 letters a pass": (SFT, {"trainable": "decoder"}),
    "SFT, full, 1 letter a pass": (SFT, {"batch_size": 2, "micro_batch_tokens": 600, "trainable": "full"}),
    "SFT, full, 4 letters a pass": (SFT, {"trainable": "full"}),
    "SFT, full, a step in one pass": (SFT, {"batch_size": 4, "trainable": "full"}),
    "GRPO, LoRA, 1 x 4 a pass": (GRPO, {}),
    "GRPO, LoRA, 2 x 4 a pass": (GRPO, {"micro_batch_tokens": 1800}),
    "GRPO, decoder, 1 x 4 a pass": (GRPO, {"trainable": "decoder"}),
    "GRPO, full, 1 x 4 a pass": (GRPO, {"trainable": "full"}),
    "GRPO, full, 2 x 4 a pass, no reference": (GRPO, {"micro_batch_tokens": 1800, "trainable": "full", "beta": 0.0}),
    "GRPO, LoRA, 4 x 4 a step in 4 decode slots": (GRPO, {"batch_size": 4, "decode_slots": 4}),
    "Distill, LoRA, 4 letters a pass": (Distill, LABELS),
    "Distill, full, 4 letters a pass, checkpointed": (Distill, {**LABELS, **FULL, "checkpointing": "on"}),
    "SFT, decoder, 2 traces a pass, checkpointed": (
        SFT, {**TRACES, "micro_batch_tokens": 1700, "trainable": "decoder", "checkpointing": "on"}),
    "SFT, full, 4 letters a pass, 8-bit moments": (SFT, {**FULL, "moments": "8bit"}),
    "SFT, decoder, 1 letter a pass, bf16 with residual": (SFT, {**HALF, "micro_batch_tokens": 600}),
    "SFT, decoder, 1 letter a pass, bf16, residual, 8-bit": (
        SFT, {**HALF, "micro_batch_tokens": 600, "moments": "8bit"}),
    "GRPO, decoder, 1 x 4 a pass, reference on the host": (GRPO, {"trainable": "decoder", "reference": "host"}),
    "GRPO, decoder, bf16, residual, 8-bit, host, checkpointed": (
        GRPO, {**HALF, "moments": "8bit", "reference": "host", "checkpointing": "on"}),
}  # fmt: skip


def make_stage(title, home):
    """The stage of a case."""
    cls, fields = CASES[title]
    fields = {**(ROLLOUTS if cls is GRPO else {"batch_size": 8, "micro_batch_tokens": 2100}), **fields}
    for name in ("traces", "teacher_labels"):
        if name in fields:
            fields[name] = str(home / fields[name])
    return cls(name="case", model=str(home / "model"), manifest=str(home / "clips.jsonl"), device="cpu",
               max_steps=STEPS, **fields)


def write_model(folder, shape=None):
    """A Qwen2-Audio of random weights, in fp32, and a tokenizer that names every id."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([f"word{i}" for i in range(ROWS - tokenizer.get_vocab_size())])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    raw = {"model_type": "qwen2_audio", "audio_token_index": tokenizer.token_to_id("<|AUDIO|>"), **(shape or SHAPE)}
    raw["text_config"] = {**raw["text_config"], "vocab_size": ROWS}
    torch.manual_seed(0)
    model = MultimodalLM(read_config(raw))
    save_model(model, folder, folder)
    return sum(p.numel() for p in model.parameters())


def write_data(folder, count):
    """A manifest of `count` clips of noise that ask the dry run's example, and a trace for each."""
    noise_S = torch.randn(CLIP_S * SAMPLE_RATE, generator=torch.Generator().manual_seed(0)) / 10
    soundfile.write(folder / "clip.wav", noise_S.numpy(), SAMPLE_RATE)
    examples = [replace(EXAMPLE, id=f"clip{i}", audio="clip.wav", video=None) for i in range(count)]
    (folder / "clips.jsonl").write_text(manifest_text(examples))
    lines = (json.dumps({"id": e.id, "text": "a" * 256}) + "\n" for e in examples)
    (folder / "traces.jsonl").write_text("".join(lines))
    lines = (json.dumps({"id": e.id, "option": e.options[0]}) + "\n" for e in examples)
    (folder / "labels.jsonl").write_text("".join(lines))


def rss_anon():
    """This process's anonymous memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The most that rss_anon was within it."""

    def __enter__(self):
        self.most, self.ended = rss_anon(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.ended.wait(0.002):
            self.most = max(self.most, rss_anon())

    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()


def run_case(title, home):
    """Prints, as JSON, by how much anonymous memory rises in a stage, and what it logs."""
    stage = make_stage(title, home)
    for number in range(2):
        folder, log = home / f"{title.replace(' ', '_')}-{number}", []
        folder.mkdir()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = rss_anon()
        with Peak() as peak:
            train.train(stage, folder, log.append)
    print(json.dumps({"bytes": peak.most - before, "log": log}))


def expected(stage, home):
    """(bytes, Phase) of the phase that holds most, with a reference that is on the host."""
    plan = plan_stage(stage, [stage], home)
    phases = estimate(stage, plan.model, plan.prompt)
    host = 0
    if isinstance(stage, GRPO) and stage.reference == "host":
        host = next(phase.bytes["reference"] for phase in phases if phase.name == "scoring")
    sizes = [(phase.total + host - phase.bytes["reference"] * (host > 0), phase) for phase in phases]
    return max(sizes, key=lambda pair: pair[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose title has this in it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    parser.add_argument("--case", nargs=2, metavar=("TITLE", "FOLDER"), help="run one here; of this bench's own use")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        run_case(args.case[0], Path(args.case[1]))
        return 0
    result = {"bench": "bench_memory", "env": measure.env(), "steps": STEPS, "bound": BOUND, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        result["parameters"] = write_model(home / "model")
        write_data(home, 8 * STEPS)
        for title in CASES:
            if args.only not in title:
                continue
            stage = make_stage(title, home)
            size, fullest = expected(stage, home)
            command = [sys.executable, "-m", "bench.bench_memory", "--threads", str(args.threads)]
            command += ["--case", title, name]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **GIVE_BACK})
            found = json.loads(child.stdout.splitlines()[-1])
            row = {"case": title, "estimated": size, "measured": found["bytes"], "over": size / found["bytes"],
                   "in": fullest.name, "parts": fullest.bytes}
            if isinstance(stage, GRPO):
                lines = [line["completion_tokens"] for line in found["log"] if "completion_tokens" in line]
                row["completion_tokens"] = lines
            result["rows"].append(row)
            print(f"{title:56} {size / 1e6:8.1f} MB estimated, {found['bytes'] / 1e6:8.1f} MB measured: "
                  f"{100 * (row['over'] - 1):+5.1f} %  ({fullest.name})", flush=True)
    result["ok"] = all(abs(row["over"] - 1) <= BOUND for row in result["rows"])
    return measure.report(result, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
