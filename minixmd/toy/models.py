"""The toy models before training, published families in small: one decoder, two encoders, and two tokenizers that agree
up to <|im_end|>, but not beyond it. <model_type>.json holds a family's config files."""
import json
import math
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minixmd.config import PROMPT
from minixmd.models.families import SYSTEM, read_config
from minixmd.models.weights import build
from minixmd.models.whisper import sinusoids
from minixmd.runs.files import write_json, write_text
from minixmd.runs.seeds import hash_seed
from minixmd.toy.lessons import thoughts_of
from minixmd.toy.world import CHECK_PROMPT, LETTERS, NAMES, QUESTION, THINK_PROMPT

QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
               r"\s+(?!\S)|\s+")


def family_file(model_type, name, tokenizer=None):
    """A config file of <model_type>.json. With a tokenizer every special token in it, "<|…|>", becomes its id."""
    text = Path(__file__).with_name(f"{model_type}.json").read_text()
    if tokenizer is not None:
        text = re.sub(r'"(<\|\w+\|>)"', lambda match: str(tokenizer.token_to_id(match[1])), text)
    return json.loads(text)[name]


def train_tokenizer():
    """A byte-level BPE in Qwen2's format, without special tokens, in which the toy's words are one token each."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    options = "\n".join(f"{LETTERS[i % 10]}. {name}" for i, name in enumerate(NAMES))
    prompts = [prompt.format(question=QUESTION, options=options, first=LETTERS[0], last=LETTERS[-1], trace="")
               for prompt in (PROMPT, THINK_PROMPT, CHECK_PROMPT)]
    answers = [f"<think>{thoughts_of(NAMES[0], 'long')}</think><answer> {NAMES[0]}</answer>", "yes", "no"]
    names = " " + " ".join(NAMES)
    corpus = "\n".join([f"system\n{SYSTEM}\nuser\nAudio 1: ", *prompts, "assistant", *answers, names, names.title()])
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus], trainer)
    return tokenizer


def write_processor(folder, model_type):
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and preprocessor_config.json of a family."""
    config = family_file(model_type, "tokenizer_config.json")
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens([config["pad_token"], *config["additional_special_tokens"]])
    for token in json.loads(tokenizer.to_str())["added_tokens"]:
        token_id = token.pop("id")
        config["added_tokens_decoder"][token_id] = dict(sorted(token.items()))
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", config)
    for name in ("generation_config.json", "preprocessor_config.json"):
        write_json(folder / name, family_file(model_type, name, tokenizer))


def make_model(folder, model_type, seed):
    """A model for the tokenizer in `folder`. A weight is drawn from its name and `seed`, so families share decoders."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = read_config(family_file(model_type, "config.json", tokenizer))
    model = build(config).to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("embed_positions.weight"):
                p.copy_(sinusoids(*p.shape))
            elif p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                std = 0.5 if name.endswith("embed_tokens.weight") else math.prod(p.shape[1:]) ** -0.5
                generator = torch.Generator().manual_seed(hash_seed(seed, name))
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model
