"""The toy models before they have learnt anything: their tokenizers, their config.json, and their first weights.

Both are the published families in small: one language model, two towers, and two tokenizers that agree up to <|im_end|>
and mean different things by the ids after it.
"""
import json
import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minixmd.config import PROMPT
from minixmd.models.families import SYSTEM, read_config
from minixmd.models.multimodal import MultimodalLM
from minixmd.runs.files import write_json, write_text
from minixmd.runs.seeds import hash_seed
from minixmd.toy.world import KINDS, QUESTION

QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
               r"\s+(?!\S)|\s+")
BASE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL = {
    "qwen2_audio": BASE + ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    "qwen2_vl": BASE + ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
                        "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                        "<|video_pad|>"),
}  # fmt: skip
ROWS = {"qwen2_audio": 704, "qwen2_vl": 672}  # of the embedding; as published, more than the tokenizer names
WIDTH, LAYERS, HEADS, MLP = 128, 3, 4, 256  # the decoder
TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS = 96, 2, 4
MAX_POSITIONS = 4096


def train_tokenizer():
    """A byte-level BPE in Qwen2's format, without special tokens, in which every class name is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words, bytelevel = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytelevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    options = "\n".join(f"{letter}. {kind.name}" for letter, kind in zip("ABCDEFGHIJ" * 3, KINDS, strict=False))
    ask = PROMPT.format(question=QUESTION, options=options, first="A", last="J")
    corpus = [f"system\n{SYSTEM}\nuser\nAudio 1: \n{ask}\nassistant\n" + "".join(f" {kind.name}" for kind in KINDS)]
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=sorted(bytelevel.alphabet()),
                                  special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def write_processor(folder, model_type):
    """tokenizer.json, tokenizer_config.json, generation_config.json and preprocessor_config.json of a family."""
    folder = Path(folder)
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL[model_type]])
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL[model_type]}
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    added = {str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                      "special": True} for token, i in ids.items()}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[model_type][1:]), "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace", "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS})
    write_json(folder / "generation_config.json", {
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"], "do_sample": False})
    audio = {"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "Qwen2AudioProcessor",
             "feature_size": 128, "sampling_rate": 16_000, "hop_length": 160, "n_fft": 400, "chunk_length": 30,
             "n_samples": 480_000, "nb_max_frames": 3000, "padding_side": "right", "padding_value": 0.0,
             "return_attention_mask": True}
    vision = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
              "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
              "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    write_json(folder / "preprocessor_config.json", audio if model_type == "qwen2_audio" else vision)


def make_config(model_type, ids):
    """config.json in the published form: nested and sparse for Qwen2-Audio, flat for Qwen2-VL. ids: token -> id."""
    text = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // 2, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITIONS, "vocab_size": ROWS[model_type], "torch_dtype": "float32",
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}  # fmt: skip
    if model_type == "qwen2_audio":
        tower = {"model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "d_model": TOWER_WIDTH,
                 "encoder_layers": TOWER_LAYERS, "encoder_attention_heads": TOWER_HEADS,
                 "encoder_ffn_dim": 4 * TOWER_WIDTH, "max_source_positions": 1500, "activation_function": "gelu",
                 "scale_embedding": False}  # fmt: skip
        return {"architectures": ["Qwen2AudioForConditionalGeneration"], "model_type": model_type,
                "audio_config": tower, "audio_token_index": ids["<|AUDIO|>"], "ignore_index": -100,
                "vocab_size": text["vocab_size"],
                "text_config": {"model_type": "qwen2", **text}, "torch_dtype": "float32"}  # fmt: skip
    half = WIDTH // HEADS // 2
    rope = {"type": "mrope", "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]}
    tower = {"depth": TOWER_LAYERS, "embed_dim": TOWER_WIDTH, "mlp_ratio": 4, "num_heads": TOWER_HEADS, "in_chans": 3,
             "hidden_size": WIDTH, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
             "temporal_patch_size": 2}
    places = {f"{name}_token_id": ids[f"<|{token}|>"] for name, token in (
        ("vision_start", "vision_start"), ("vision_end", "vision_end"), ("vision", "vision_pad"),
        ("image", "image_pad"), ("video", "video_pad"))}
    return {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": model_type, **text, **places,
            "rope_scaling": rope, "vision_config": tower, "tie_word_embeddings": False, "use_sliding_window": False}


def make_model(folder, model_type, seed):
    """A model for the processor files in `folder`, every weight drawn from its own name and `seed`.

    Two families made with one seed have the same decoder, embedding rows of the common tokens included.
    """
    added = json.loads((Path(folder) / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    config = read_config(make_config(model_type, {token["content"]: int(i) for i, token in added.items()}))
    with torch.device("meta"):
        model = MultimodalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(hash_seed(seed, name))
            if name.endswith("embed_positions.weight"):
                p.copy_(_sinusoids(*p.shape))
            elif p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                std = 0.5 if name.endswith("embed_tokens.weight") else math.prod(p.shape[1:]) ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def _sinusoids(length, width):
    """Whisper's table of positions."""
    rate_E = torch.exp(-math.log(10_000.0) / (width // 2 - 1) * torch.arange(width // 2))
    angle = torch.arange(length)[:, None] * rate_E
    return torch.cat([angle.sin(), angle.cos()], dim=1)
