"""What the benches against transformers share: a Qwen2-Audio for both sides, the same clips for both, the command line.

The timed model has the 7B's proportions: width 4096, mlp 11008, 32 layers, vocabulary 156,032; its tower 1280 wide, 32
layers, heads of 64.
"""
import argparse
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor
from transformers.utils import logging

from bench.measure import addmm_flops
from minixmd.inputs.audio import SAMPLE_RATE, log_mel, num_audio_tokens, num_mel_frames
from minixmd.inputs.batch import Media, Prompt
from minixmd.models.weights import load_model
from minixmd.runs.stage_directory import versions

TIMED = dict(vocab=5_000, width=512, mlp=1_376, layers=8, heads=8, tower_width=320, tower_layers=1, tower_heads=5)
SMALL = TIMED | dict(width=32, mlp=48, layers=2, heads=2, tower_width=20)
EQUAL_S = [10.0] * 8  # seconds of the clips
MIXED_S = [5.4, 10.0, 2.0, 7.7, 3.1, 8.9, 4.3, 6.6]  # evenly over 2-10 s
BEFORE, AFTER = 20, 90  # text tokens around a clip: the system turn; question, options, answer
AUDIO_ID, PAD_ID = 4_990, 0


# ---- models ----


def reference_model(shape, generator):
    """transformers' Qwen2-Audio of these sizes, attention by sdpa, every parameter random."""
    text = dict(model_type="qwen2", vocab_size=shape["vocab"], hidden_size=shape["width"], rms_norm_eps=1e-5,
                intermediate_size=shape["mlp"], num_hidden_layers=shape["layers"], rope_theta=10000.0,
                num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"])
    tower = dict(model_type="qwen2_audio_encoder", num_mel_bins=128, encoder_layers=shape["tower_layers"],
                 d_model=shape["tower_width"], encoder_ffn_dim=4 * shape["tower_width"],
                 encoder_attention_heads=shape["tower_heads"], max_source_positions=1500)
    config = Qwen2AudioConfig(text_config=text, audio_config=tower, audio_token_index=AUDIO_ID)
    reference = Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, p in reference.named_parameters():  # the default init's zeros and ones would hide terms
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * p[0].numel() ** -0.5)
            elif name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise)
    return reference


def load_with(processor):
    """What Trainer takes as `load`, for a checkpoint without a tokenizer: it gives this processor."""
    def load(path, *, device, dtype, backend):
        return load_model(path, device=device, dtype=dtype), processor

    return load


# ---- clips ----


@dataclass
class Clips:
    """The same clips and texts for both sides."""

    prompts: list[Prompt]  # whose targets are the letter and the end of the turn
    target_BT: torch.Tensor  # the same targets in transformers' padded rows
    inputs: dict  # transformers' right-padded inputs, with 30 s of mel a clip

    @property
    def ids_BT(self):
        return self.inputs["input_ids"]


def make_clips(durations_s, vocab):
    generator = torch.Generator().manual_seed(1)
    prompts, waves = [], []
    for i, duration_s in enumerate(durations_s):
        wave_S = _tones(duration_s, (180 + 40 * i, 900 + 210 * i), generator)
        frames = num_mel_frames(len(wave_S))
        rows_P = BEFORE + torch.arange(num_audio_tokens(frames))
        media = Media("audio", log_mel(wave_S), rows_P, frames=frames)
        text_T = torch.randint(1, min(vocab, AUDIO_ID), (BEFORE + AFTER,), generator=generator)
        ids_N = torch.cat([text_T[:BEFORE], torch.full_like(rows_P, AUDIO_ID), text_T[BEFORE:]])
        target_N = torch.arange(len(ids_N)) >= len(ids_N) - 2
        prompts.append(Prompt(ids_N, torch.arange(len(ids_N)).expand(3, -1), (media,), target_N))
        waves.append(wave_S.numpy())
    extractor = WhisperFeatureExtractor(feature_size=128)
    mel = extractor(waves, sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt")
    inputs = dict(
        input_ids=pad_sequence([p.ids_N for p in prompts], batch_first=True, padding_value=PAD_ID),
        attention_mask=pad_sequence([torch.ones_like(p.ids_N) for p in prompts], batch_first=True), use_cache=False,
        input_features=mel["input_features"], feature_attention_mask=mel["attention_mask"])
    target_BT = pad_sequence([p.target_N for p in prompts], batch_first=True)
    return Clips(prompts, target_BT, inputs)


def _tones(duration_s, frequencies, generator):
    """Rising tones and some noise, (S,) at 16 kHz."""
    t_S = torch.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
    tones_S = sum(torch.sin(2 * torch.pi * f * t_S * (1 + 0.05 * t_S)) for f in frequencies)
    return 0.2 * tones_S + 0.05 * torch.randn(len(t_S), generator=generator)


# ---- measuring and output ----


def count_flops(function):
    """(a call's floating-point operations, {module: of its forward}); attention counts as if nothing were masked."""
    aten = torch.ops.aten
    unknown = {  # to FlopCounterMode
        aten.addmm_: addmm_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FlopCounterMode(display=False, depth=None, custom_mapping=unknown) as counter:
        function()
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return counter.get_total_flops(), by_module


def environment():
    """Commit, versions, processor, threads and load."""
    cpu, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    return {**versions(), "transformers": version("transformers"), "peft": version("peft"), "cpu": cpu,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}


def parse_arguments(doc, argv=None, *, rounds, threads=None):
    """The arguments of a bench that measures on a CPU only. threads: the default of --threads; None = always one."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds")
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="it measures on a CPU only")
    parser.add_argument("--small", action="store_true", help="tiny sizes: tries the script, measures nothing")
    parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads if threads is not None else 1)
    logging.disable_progress_bar()
    return args


def write_result(result, out):
    """Prints the result as the last line, and writes it to the file `out` if there is one."""
    line = json.dumps(result)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n")
    print(line)
