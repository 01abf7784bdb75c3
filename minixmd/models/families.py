"""What differs between the families, as data, and config.json read into dataclasses.

A published file is flat or sparse, transformers 5 writes a nested one; absent fields take the reference's defaults. A
field that nothing here implements must stand at the value under which it does nothing, or it raises.
"""
import math
from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True)
class Family:
    model_type: str
    system: str  # the template's default system turn
    audio: tuple[str, str, str] | None  # text before, placeholder, text after; {n} counts the conversation's audios
    video: tuple[str, str, str] | None
    audio_s: int  # seconds of a clip that are heard
    published: dict[str, str]  # our attribute prefix -> prefix in the published file
    modules: dict[str, str]  # our attribute prefix -> module path in transformers 5, which adapters use
    token_fields: dict[str, str]  # config field -> the token whose id it must hold
    part: str | None = None  # config.json holds several models; this field is the one that is built
    skipped: dict[str, str] = field(default_factory=dict)  # prefix in the file of a part that is not built -> its name
    sampled_fps: bool = True  # a frame's time counts by the rate of the chosen frames, as qwen-vl-utils says; False: by
    # the rate asked for, as the published Omni processor does
    split_qkv: bool = False  # the vision tower's queries, keys and values are three matrices in the file


SYSTEM = "You are a helpful assistant."
DECODER = {"model.": "model.language_model.", "lm_head.": "lm_head."}
VISION_TOKENS = {"video_token_id": "<|video_pad|>", "image_token_id": "<|image_pad|>",
                 "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
QWEN2_AUDIO = Family(
    model_type="qwen2_audio", system=SYSTEM,
    audio=("Audio {n}: <|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>\n"), video=None, audio_s=30,
    published={"audio_tower.": "audio_tower.", "multi_modal_projector.": "multi_modal_projector.",
               "model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    modules={"audio_tower.": "model.audio_tower.", "multi_modal_projector.": "model.multi_modal_projector.", **DECODER},
    token_fields={"audio_token_index": "<|AUDIO|>", "audio_token_id": "<|AUDIO|>"},
)
QWEN2_VL = Family(
    model_type="qwen2_vl", system=SYSTEM,
    audio=None, video=("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"), audio_s=0,
    published={"visual.": "visual.", "model.": "model.", "lm_head.": "lm_head."},
    modules={"visual.": "model.visual.", **DECODER}, token_fields=VISION_TOKENS,
)
OMNI_THINKER = Family(  # the part of Qwen2.5-Omni that listens, looks and writes; saved on its own
    model_type="qwen2_5_omni_thinker", system=SYSTEM,
    audio=("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    video=("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"), audio_s=300,
    published={"audio_tower.": "audio_tower.", "visual.": "visual.", "model.": "model.", "lm_head.": "lm_head."},
    modules={"audio_tower.": "model.audio_tower.", "visual.": "model.visual.", **DECODER},
    token_fields={"audio_token_index": "<|AUDIO|>", "audio_token_id": "<|AUDIO|>", "video_token_index": "<|VIDEO|>",
                  "video_token_id": "<|VIDEO|>", "image_token_index": "<|IMAGE|>", "image_token_id": "<|IMAGE|>",
                  "audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>",
                  "vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>"},
    sampled_fps=False, split_qkv=True,
)
FAMILIES = {family.model_type: family for family in (
    QWEN2_AUDIO, QWEN2_VL, replace(QWEN2_VL, model_type="qwen2_5_vl"), OMNI_THINKER,
    replace(OMNI_THINKER, model_type="qwen2_5_omni", part="thinker_config",
            published={ours: "thinker." + theirs for ours, theirs in OMNI_THINKER.published.items()},
            skipped={"talker.": "talker", "token2wav.": "token2wav"}),
)}  # fmt: skip


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
    n_window: int | None  # half the mel frames of a chunk that is encoded on its own; None = the whole clip at once
    output_dim: int | None  # width after the tower's own projection; None = the projector stands outside


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    width: int  # E
    out_width: int  # the decoder's D
    num_heads: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    mlp_ratio: float | None  # a plain MLP of this many times the width, after LayerNorm
    intermediate_size: int | None  # or a gated MLP of this width, after RMSNorm
    window_size: int | None  # side of an attention window in pixels; None = every block sees the whole frame
    fullatt_block_indexes: tuple[int, ...] | None  # blocks that see the whole frame all the same
    tokens_per_second: int | None  # ids that a second of video takes; None = one id a frame pair


# config.json's names of the vision tower's widths: Qwen2-VL says hidden_size where the others say out_hidden_size
WIDTHS = {"qwen2_vl": {"width": "embed_dim", "out_width": "hidden_size"}}
OTHER_WIDTHS = {"width": "hidden_size", "out_width": "out_hidden_size"}


@dataclass(frozen=True)
class ModelConfig:
    family: Family
    text: TextConfig
    audio: AudioConfig | None
    vision: VisionConfig | None
    tie_word_embeddings: bool
    ids_per_s: int | None  # positions that a second of video takes; None = one a frame pair
    chunk_s: int | None  # seconds after which picture and sound take turns in a sounded video
    part: dict  # the part of config.json that describes this model
    raw: dict  # config.json as read, for saving


_TEXT = dict(vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
             num_attention_heads=64, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=32768,
             rope_theta=1000000.0, mrope_section=(16, 24, 24))
_AUDIO = dict(num_mel_bins=128, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, d_model=1280,
              max_source_positions=1500, n_window=None, output_dim=None)
_VISION = dict(depth=32, width=1280, out_width=3584, num_heads=16, in_channels=3, patch_size=14, spatial_merge_size=2,
               temporal_patch_size=2, mlp_ratio=4, intermediate_size=None, window_size=None,
               fullatt_block_indexes=None, tokens_per_second=None)
_WINDOWED = {**_VISION, "width": 3584, "mlp_ratio": None, "intermediate_size": 3420, "window_size": 112,
             "fullatt_block_indexes": (7, 15, 23, 31)}
_OMNI = dict(
    text={**_TEXT, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
          "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    audio={**_AUDIO, "n_window": 100, "output_dim": 3584}, vision=_WINDOWED,
)  # fmt: skip
DEFAULTS = {  # the reference's values of fields that a config.json leaves out; None: the family has no such field
    "qwen2_audio": dict(
        text={**_TEXT, "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
              "mrope_section": None},
        audio=_AUDIO,
    ),
    "qwen2_vl": dict(text=_TEXT, vision=_VISION),
    "qwen2_5_vl": dict(text=_TEXT, vision={**_WINDOWED, "tokens_per_second": 4}),
    "qwen2_5_omni_thinker": _OMNI,
    "qwen2_5_omni": _OMNI,
}  # fmt: skip
INERT = set(  # recorded by other programs; nothing in a forward pass depends on them
    """model_type architectures torch_dtype dtype transformers_version use_cache initializer_range init_std ignore_index
    bos_token_id eos_token_id pad_token_id sliding_window max_window_layers vocab_size vision_token_id user_token_id
    spatial_patch_size in_chans embed_dim tokens_per_second""".split()
)
INERT |= set(  # what transformers 4 wrote of every config class, as in the published Omni: labels, outputs, sampling
    """add_cross_attention attn_implementation bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torchscript typical_p use_bfloat16""".split()
)
FIXED = {  # implemented at this value only
    "activation_function": ("gelu",), "attention_dropout": (0.0,), "dropout": (0.0,), "activation_dropout": (0.0,),
    "encoder_layerdrop": (0.0,), "scale_embedding": (False,), "use_sliding_window": (False,), "use_mrope": (False,),
    "tie_word_embeddings": (False, True),
}  # fmt: skip
FRONT_END = {"num_mel_bins": 128, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _rope(section, where):
    """rope_theta and mrope_section from the published pair of fields or from transformers 5's rope_parameters."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(section.get(name), dict | None):
            raise ValueError(f"config.json: {where}{name} must be an object, got {section[name]!r}")
    out, rope = {}, dict(section.get("rope_parameters") or {})
    if "rope_theta" in section:
        out["rope_theta"] = section["rope_theta"]
    rope.update(section.get("rope_scaling") or {})
    kind = {str(rope.pop(name, "default")) for name in ("rope_type", "type")} - {"default", "mrope", "axial"}
    if "rope_theta" in rope:
        out["rope_theta"] = rope.pop("rope_theta")
    if "mrope_section" in rope:
        sections = rope.pop("mrope_section")
        if not isinstance(sections, list) or not all(type(size) is int and size > 0 for size in sections):
            raise ValueError(f"config.json: {where}mrope_section must be a list of positive ints, got {sections!r}")
        out["mrope_section"] = tuple(sections)
    if kind or rope:
        raise ValueError(f"config.json: {where} asks for rope scaling {sorted(kind) or rope}, which is not implemented")
    return out


def _read(cls, section, defaults, where, names=None, act="silu"):
    """A section of config.json as `cls`; `names` are the fields that config.json calls otherwise."""
    theirs = {f.name: (names or {}).get(f.name, f.name) for f in fields(cls) if defaults[f.name] is not None}
    values = {**defaults, **{ours: section[k] for ours, k in theirs.items() if section.get(k) is not None}}
    if cls is TextConfig:
        values.update(_rope(section, where))
    elif (section.get("rope_parameters") or {}).get("rope_theta", 10000.0) != 10000.0:
        raise ValueError(f"config.json: {where}rope_parameters = {section['rope_parameters']} is not implemented")
    for name, value in section.items():
        if name in theirs.values() or name in INERT or name.startswith(("_", "rope_")) or value is None:
            continue
        if name == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if value not in ((act,) if name == "hidden_act" else FIXED.get(name, ())):
            raise ValueError(f"config.json: {where}{name} = {value!r} is not implemented")
    for entry in fields(cls):
        name, value = theirs.get(entry.name, entry.name), values[entry.name]
        if defaults[entry.name] is None or entry.name == "mrope_section":
            continue
        if entry.name == "fullatt_block_indexes":
            if not isinstance(value, list | tuple) or not all(type(i) is int and i >= 0 for i in value):
                raise ValueError(f"config.json: {where}{name} must be a list of block numbers, got {value!r}")
            values[entry.name] = tuple(value)
            continue
        kind = float if entry.type in (float, float | None) else int
        if type(value) not in {int, kind} or not 0 < value < math.inf:
            raise ValueError(f"config.json: {where}{name} must be a positive {kind.__name__}, got {value!r}")
        if FRONT_END.get(name, value) != value:
            raise ValueError(f"config.json: {where}{name} = {value!r} is not implemented; it must be {FRONT_END[name]}")
    return cls(**values)


def _section(raw, name, where=""):
    if not isinstance(raw.get(name), dict | None):
        raise ValueError(f"config.json: {where}{name} must be an object, got {raw[name]!r}")
    return raw.get(name)


def read_config(raw):
    """config.json (published flat, sparse, or nested as transformers 5 writes it) to a ModelConfig.

    Raises:
        ValueError: an unsupported model_type, or a field that is not implemented at its value (it is named).
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"config.json: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    family, defaults, where, part = FAMILIES[kind], DEFAULTS[kind], "", raw
    if family.part:  # what stands beside the part concerns other models
        where, part = family.part + ".", _section(raw, family.part)
        if part is None:
            raise ValueError(f"config.json: {family.part} is missing")
    text, audio, vision = (_section(part, name, where) for name in ("text_config", "audio_config", "vision_config"))
    own = {"position_id_per_seconds", "seconds_per_chunk"} if family.audio and family.video else set()
    if part.get("quantization_config"):
        raise ValueError(f"config.json: {where}quantization_config: quantised weights are not read")
    parts = {"text_config", *(["audio_config"] if family.audio else []), *(["vision_config"] if family.video else [])}
    top = {k: v for k, v in part.items() if k not in {*family.token_fields, *own, *parts}}
    if text is None:  # flat: the decoder's fields stand at the top
        text = top
    else:
        _read(TextConfig, {k: v for k, v in top.items() if k != "vocab_size"}, defaults["text"], where)
    text = {k: v for k, v in text.items() if k not in family.token_fields}
    names = WIDTHS.get(kind, OTHER_WIDTHS)
    audio_config = vision_config = ids_per_s = chunk_s = None
    if family.audio:
        audio_config = _read(AudioConfig, audio or {}, defaults["audio"], where + "audio_config.")
    if family.video:
        act = "silu" if defaults["vision"]["window_size"] else "quick_gelu"
        vision_config = _read(VisionConfig, vision or {}, defaults["vision"], where + "vision_config.", names, act)
        ids_per_s = vision_config.tokens_per_second
    if own:
        ids_per_s, chunk_s = part.get("position_id_per_seconds", 25), part.get("seconds_per_chunk", 2)
        for name, value in (("position_id_per_seconds", ids_per_s), ("seconds_per_chunk", chunk_s)):
            if type(value) is not int or value <= 0:
                raise ValueError(f"config.json: {where}{name} must be a positive int, got {value!r}")
    text_config = _read(TextConfig, text, defaults["text"], where + "text_config.")
    for name, width in (("audio_config.output_dim", audio_config and audio_config.output_dim),
                        (f"vision_config.{names['out_width']}", vision_config and vision_config.out_width)):
        if width not in (None, text_config.hidden_size):
            raise ValueError(f"config.json: {where}{name} {width} differs from the decoder's hidden_size "
                             f"{text_config.hidden_size}")
    for name, width, heads in (
        ("text_config.num_attention_heads", text_config.hidden_size, text_config.num_attention_heads),
        ("text_config.num_key_value_heads", text_config.num_attention_heads, text_config.num_key_value_heads),
        *([("audio_config.encoder_attention_heads", audio_config.d_model, audio_config.encoder_attention_heads)]
          if audio_config else []),
        *([("vision_config.num_heads", vision_config.width, vision_config.num_heads)] if vision_config else []),
    ):  # fmt: skip
        if width % heads:
            raise ValueError(f"config.json: {where}{name} {heads} does not divide {width}")
    if vision_config and (vision_config.window_size or 28) < 28:
        raise ValueError(f"config.json: {where}vision_config.window_size {vision_config.window_size} is less than a "
                         "merged token's 28 pixels")
    if sum(text_config.mrope_section or ()) not in (0, text_config.hidden_size // text_config.num_attention_heads // 2):
        raise ValueError(f"config.json: mrope_section {text_config.mrope_section} does not add up to half a head "
                         f"({text_config.hidden_size // text_config.num_attention_heads // 2})")
    tied = bool(part.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    return ModelConfig(family, text_config, audio_config, vision_config, tied, ids_per_s, chunk_s, part, raw)
