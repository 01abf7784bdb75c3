"""bench_memory: a dry run's estimate of a training stage's memory against the measured peak, on a Qwen2-Audio of 60 M
parameters.

Measured is a whole stage, up to writing best/: the weights, and the most bytes beside them that PyTorch's CPU allocator
had handed out at a moment, from the profiler's record of every allocation. That includes operators' work space and the
clips that wait to be used. (The weights are loaded before, because the profiler would record their memory-mapped file.)
Two steps a stage, so that the second meets the optimizer's state. fp32, clips of 10 s. The estimate's assumptions hold:
the tokenizer is at hand, and hardly a completion ends before max_new_tokens.

Run: python -m bench.bench_memory [--threads 1] [--out bench/results/memory_cpu.json]
Exit status 1 if an estimate is off by more than 10 %. Takes 10 minutes on one core. The last line of stdout is JSON.
"""
import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench import measure
from minixmd import load, train
from minixmd.config import GRPO, SFT
from minixmd.dryrun.memory_estimate import estimate
from minixmd.dryrun.models import CLIP_S
from minixmd.dryrun.plan import EXAMPLE, plan_stage
from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.examples import manifest_text
from minixmd.models.families import read_config
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import save_model
from minixmd.runs.files import write_json

ROWS, BOUND = 16_384, 0.10
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
STEPS = 2
TRACES = {"traces": "traces.jsonl", "max_new_tokens": 257}
ROLLOUTS = {"batch_size": 2, "group_size": 4, "max_new_tokens": 64, "micro_batch_tokens": 900}
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
}  # fmt: skip


def make_stage(title, home):
    """The stage of a case."""
    cls, fields = CASES[title]
    fields = {**(ROLLOUTS if cls is GRPO else {"batch_size": 8, "micro_batch_tokens": 2100}), **fields}
    if "traces" in fields:
        fields["traces"] = str(home / fields["traces"])
    return cls(name="case", model=str(home / "model"), manifest=str(home / "clips.jsonl"), device="cpu",
               max_steps=STEPS, **fields)


def write_model(folder):
    """A Qwen2-Audio of random weights, in fp32, and a tokenizer that names every id."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([f"word{i}" for i in range(ROWS - tokenizer.get_vocab_size())])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    raw = {"model_type": "qwen2_audio", "audio_token_index": tokenizer.token_to_id("<|AUDIO|>"),
           "text_config": dict(vocab_size=ROWS, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                               num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048),
           "audio_config": dict(d_model=384, encoder_layers=9, encoder_attention_heads=6, encoder_ffn_dim=1536)}
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


def measure_stage(stage, folder, log):
    """Bytes: the weights', and the peak of train.train beside them."""
    loaded = load(stage.model)
    weights = sum(p.nbytes for p in loaded[0].parameters())
    with mock.patch.object(train, "load", lambda *_, **__: loaded):
        beside = measure.peak(lambda: train.train(stage, folder, log.append), "cpu")
    return weights + beside


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose title has this in it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"bench": "bench_memory", "env": measure.env(), "steps": STEPS, "bound": BOUND, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        result["parameters"] = write_model(home / "model")
        write_data(home, 8 * STEPS)
        for title in CASES:
            if args.only not in title:
                continue
            stage = make_stage(title, home)
            folder = home / title.replace(" ", "_")
            folder.mkdir()
            plan = plan_stage(stage, [stage], home)
            fullest = max(estimate(stage, plan.model, plan.prompt), key=lambda phase: phase.total)
            log = []
            measured = measure_stage(stage, folder, log)
            row = {"case": title, "estimated": fullest.total, "measured": measured, "over": fullest.total / measured,
                   "in": fullest.name, "parts": fullest.bytes}
            if isinstance(stage, GRPO):
                row["completion_tokens"] = [line["completion_tokens"] for line in log if "completion_tokens" in line]
            result["rows"].append(row)
            print(f"{title:42} {fullest.total / 1e6:8.1f} MB estimated, {measured / 1e6:8.1f} MB measured: "
                  f"{100 * (row['over'] - 1):+5.1f} %  ({fullest.name})", flush=True)
    result["ok"] = all(abs(row["over"] - 1) <= BOUND for row in result["rows"])
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
