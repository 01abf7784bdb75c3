"""A run in miniature: a tokenizer, two random models in the published layouts, a dozen clips and their manifest."""
import json

import numpy as np
import torch
from media_files import write_mp4, write_wav
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers import decoders as decode

from minixmd.models.families import read_config
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import save_model

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
COMMON = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
AUDIO = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
OMNI = [*AUDIO, "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"]
CLASSES = ("dog", "cat", "owl")


def write_tokenizer(folder, special, texts=()):
    """A byte-level BPE in Qwen2's form, trained on `texts` too, whose last ids are `special`. Returns it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decode.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    texts = ["Classify the sounding object", "You are a helpful assistant.", *CLASSES, *texts]
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.add_special_tokens([*COMMON, *special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_model(folder, kind, seed=0, kv=2, rows=340, limit=4096):
    """A random tiny model ("audio" or "vision") with its tokenizer, in the published layout."""
    tokenizer = write_tokenizer(folder, AUDIO if kind == "audio" else VISION)
    text = dict(vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=kv, rms_norm_eps=1e-6, max_position_embeddings=limit)
    if kind == "audio":
        raw = {"model_type": "qwen2_audio", "text_config": {"model_type": "qwen2", **text},
               "audio_config": dict(num_mel_bins=128, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
                                    d_model=24, max_source_positions=1500),
               "audio_token_index": tokenizer.token_to_id("<|AUDIO|>")}  # fmt: skip
    else:
        raw = {"model_type": "qwen2_vl", **text, "rope_theta": 1e6, "tie_word_embeddings": False,
               "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
               "vision_config": dict(depth=1, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=32),
               "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
               "image_token_id": tokenizer.token_to_id("<|image_pad|>")}  # fmt: skip
    model = MultimodalLM(read_config(raw))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator) if p.ndim == 1
                    else torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
    save_model(model, folder, folder)
    return folder


def write_clips(folder, count=12, answers=True):
    """`count` half-second clips with sound and picture, and manifest.jsonl. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        label = i % len(CLASSES)
        t = np.arange(8000) / 16000
        wave = (0.3 * np.sin(2 * np.pi * 300 * (label + 1) * t) + 0.01 * rng.standard_normal(8000)).astype(np.float32)
        frames = np.full((4, 56, 56, 3), 60 * label + 40, np.uint8)
        write_wav(folder / f"{i}.wav", wave)
        write_mp4(folder / f"{i}.mp4", frames, wave, fps=8)
        lines.append(dict(id=f"clip{i}", audio=f"{i}.wav", video=f"{i}.mp4", question="Which?", options=list(CLASSES),
                          answer=label if answers else None, label=CLASSES[label] if answers else None,
                          meta={"group": "one"}))  # fmt: skip
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_config(path, stages):
    """A config file with the given stages (source text of a list)."""
    path.write_text(f"from minixmd.config import *\nstages = {stages}\n")
    return path
