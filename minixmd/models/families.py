"""What differs between the families, as data, and config.json read into dataclasses.

A published file is flat or sparse, transformers 5 writes a nested one; absent fields take the reference's defaults. A
field that nothing here implements must stand at the value under which it does nothing, or it raises.
"""
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Family:
    model_type: str
    system: str  # the template's default system turn
    audio: tuple[str, str, str] | None  # text before, placeholder, text after; {n} counts the conversation's audios
    video: tuple[str, str, str] | None
    published: dict[str, str]  # our attribute prefix -> prefix in the published file
    modules: dict[str, str]  # our attribute prefix -> module path in transformers 5, which adapters use
    token_fields: dict[str, str]  # config field -> the placeholder whose id it must hold


SYSTEM = "You are a helpful assistant."
FAMILIES = {
    "qwen2_audio": Family(
        model_type="qwen2_audio", system=SYSTEM,
        audio=("Audio {n}: <|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>\n"), video=None,
        published={"audio_tower.": "audio_tower.", "multi_modal_projector.": "multi_modal_projector.",
                   "model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        modules={"audio_tower.": "model.audio_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
                 "model.": "model.language_model.", "lm_head.": "lm_head."},
        token_fields={"audio_token_index": "<|AUDIO|>", "audio_token_id": "<|AUDIO|>"},
    ),
    "qwen2_vl": Family(
        model_type="qwen2_vl", system=SYSTEM,
        audio=None, video=("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
        published={"visual.": "visual.", "model.": "model.", "lm_head.": "lm_head."},
        modules={"visual.": "model.visual.", "model.": "model.language_model.", "lm_head.": "lm_head."},
        token_fields={"video_token_id": "<|video_pad|>", "image_token_id": "<|image_pad|>"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    mrope_section: tuple[int, ...] | None  # half-dimensions that turn by time, height, width; None = one position


@dataclass(frozen=True)
class AudioConfig:
    num_mel_bins: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    d_model: int
    max_source_positions: int


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    in_channels: int
    hidden_size: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int


@dataclass(frozen=True)
class ModelConfig:
    family: Family
    text: TextConfig
    audio: AudioConfig | None
    vision: VisionConfig | None
    tie_word_embeddings: bool
    raw: dict  # config.json as read, for saving


DEFAULTS = {
    "qwen2_audio": {
        "text": dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-6, max_position_embeddings=32768,
                     rope_theta=10000.0, mrope_section=None),
        "audio": dict(num_mel_bins=128, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120,
                      d_model=1280, max_source_positions=1500),
    },
    "qwen2_vl": {
        "text": dict(vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
                     num_attention_heads=64, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=32768,
                     rope_theta=1000000.0, mrope_section=(16, 24, 24)),
        "vision": dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, in_channels=3, hidden_size=3584,
                       patch_size=14, spatial_merge_size=2, temporal_patch_size=2),
    },
}  # fmt: skip
INERT = set(  # recorded by other programs; nothing in a forward pass depends on them
    """model_type architectures torch_dtype dtype transformers_version use_cache initializer_range init_std ignore_index
    bos_token_id eos_token_id pad_token_id sliding_window max_window_layers vocab_size vision_start_token_id
    vision_end_token_id vision_token_id spatial_patch_size in_chans""".split()
)
FIXED = {  # implemented at this value only
    "activation_function": ("gelu",), "attention_dropout": (0.0,), "dropout": (0.0,), "activation_dropout": (0.0,),
    "encoder_layerdrop": (0.0,), "scale_embedding": (False,), "use_sliding_window": (False,), "use_mrope": (False,),
    "tie_word_embeddings": (False, True),
}  # fmt: skip
ACTIVATION = {TextConfig: ("silu",), AudioConfig: (), VisionConfig: ("quick_gelu",)}  # hidden_act of each part


def _rope(section, where):
    """rope_theta and mrope_section from the published pair of fields or from transformers 5's rope_parameters."""
    out, rope = {}, dict(section.get("rope_parameters") or {})
    if "rope_theta" in section:
        out["rope_theta"] = section["rope_theta"]
    rope.update(section.get("rope_scaling") or {})
    kind = {rope.pop("rope_type", "default"), rope.pop("type", "default")} - {"default", "mrope", "axial"}
    if "rope_theta" in rope:
        out["rope_theta"] = rope.pop("rope_theta")
    if "mrope_section" in rope:
        out["mrope_section"] = tuple(rope.pop("mrope_section"))
    if kind or rope:
        raise ValueError(f"config.json: {where} asks for rope scaling {sorted(kind) or rope}, which is not implemented")
    return out


def _read(cls, section, defaults, where):
    known = {f.name for f in fields(cls)}
    values = {**defaults, **{k: v for k, v in section.items() if k in known and v is not None}}
    if cls is TextConfig:
        values.update(_rope(section, where))
    elif (section.get("rope_parameters") or {}).get("rope_theta", 10000.0) != 10000.0:
        raise ValueError(f"config.json: {where}rope_parameters = {section['rope_parameters']} is not implemented")
    for name, value in section.items():
        if name in known or name in INERT or name.startswith(("_", "rope_")) or value is None:
            continue
        if name == "layer_types" and set(value) == {"full_attention"}:
            continue
        fixed = ACTIVATION[cls] if name == "hidden_act" else FIXED.get(name, ())
        if value not in fixed:
            raise ValueError(f"config.json: {where}{name} = {value!r} is not implemented")
    for field in fields(cls):
        name, value = field.name, values[field.name]
        if name != "mrope_section" and (type(value) not in {int, field.type} or value <= 0):
            raise ValueError(f"config.json: {where}{name} must be a positive {field.type.__name__}, got {value!r}")
    return cls(**values)


def read_config(raw):
    """config.json (published flat, sparse, or nested as transformers 5 writes it) to a ModelConfig.

    Raises:
        ValueError: an unsupported model_type, or a field that is not implemented at its value (it is named).
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"config.json: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    family, defaults = FAMILIES[kind], DEFAULTS[kind]
    for name in ("text_config", "audio_config", "vision_config"):
        if not isinstance(raw.get(name), dict | None):
            raise ValueError(f"config.json: {name} must be an object, got {raw[name]!r}")
    top = {k: v for k, v in raw.items() if not isinstance(v, dict) and k not in family.token_fields}
    text = raw.get("text_config")
    if text is None:  # flat: the decoder's fields stand at the top
        text = {k: v for k, v in raw.items() if not k.endswith("_config") and k not in family.token_fields}
    else:
        _read(TextConfig, {k: v for k, v in top.items() if k != "vocab_size"}, defaults["text"], "")
    audio = vision = None
    if family.audio:
        audio = _read(AudioConfig, raw.get("audio_config") or {}, defaults["audio"], "audio_config.")
    if family.video:
        vision = _read(VisionConfig, raw.get("vision_config") or {}, defaults["vision"], "vision_config.")
    text_config = _read(TextConfig, text, defaults["text"], "text_config.")
    if vision is not None and vision.hidden_size != text_config.hidden_size:
        raise ValueError(f"config.json: vision_config.hidden_size {vision.hidden_size} differs from the decoder's "
                         f"hidden_size {text_config.hidden_size}")
    if sum(text_config.mrope_section or ()) not in (0, text_config.hidden_size // text_config.num_attention_heads // 2):
        raise ValueError(f"config.json: mrope_section {text_config.mrope_section} does not add up to half a head "
                         f"({text_config.hidden_size // text_config.num_attention_heads // 2})")
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return ModelConfig(family, text_config, audio, vision, bool(tied), raw)
