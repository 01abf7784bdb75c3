"""The model families: what differs between them, as data, and config.json read into dataclasses.

An absent field takes the reference's default; one that is not implemented raises, unless its value changes nothing."""
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, NamedTuple

from minixmd.runs.files import read_json
from minixmd.runs.value_checks import check_value

VISION_NAMES = {"width": "hidden_size", "out_width": "out_hidden_size"}  # our field -> its name in vision_config
Size = Annotated[int, "> 0", "<= 10000000"]
Layers = Annotated[int, "> 0", "<= 500"]
SYSTEM = "You are a helpful assistant."  # the system turn that the chat template adds to a conversation without one


@dataclass(frozen=True)
class TextConfig:
    """Defaults, here and below, are the reference's; families replace some of them. None: there is no such field."""
    vocab_size: Size = 152064
    hidden_size: Size = 8192
    intermediate_size: Size = 29568
    num_hidden_layers: Layers = 80
    num_attention_heads: Size = 64
    num_key_value_heads: Size = 8
    rms_norm_eps: Annotated[float, "> 0"] = 1e-5
    max_position_embeddings: Size = 32768
    rope_theta: Annotated[float, "> 0", "<= 1e12"] = 1000000.0
    mrope_section: tuple[Size, ...] | None = (16, 24, 24)  # frequencies turned by time, height and width; None = RoPE


@dataclass(frozen=True)
class AudioConfig:
    encoder_layers: Layers = 32
    encoder_attention_heads: Size = 20
    encoder_ffn_dim: Size = 5120
    d_model: Size = 1280
    max_source_positions: Size = 1500
    n_window: Size | None = None  # half the mel frames of a chunk encoded on its own; None = the whole clip at once
    output_dim: Size | None = None  # width after the tower's own projection; None = the projector is outside it


@dataclass(frozen=True)
class VisionConfig:
    depth: Layers = 32
    width: Size = 1280  # E
    out_width: Size = 3584  # the decoder's D
    num_heads: Size = 16
    mlp_ratio: Annotated[float, "> 0", "<= 100"] | None = 4  # blocks of LayerNorm and a plain MLP, so much wider
    intermediate_size: Size | None = None  # or blocks of RMSNorm and a gated MLP of this width
    window_size: Size | None = None  # side of an attention window in pixels; None = every block sees the whole frame
    fullatt_block_indexes: tuple[Annotated[int, ">= 0"], ...] | None = None  # blocks that see it all the same
    tokens_per_second: Size | None = None  # positions that a second of video takes; None = one a frame pair


class ClipTemplate(NamedTuple):
    """How the chat template writes a clip; {n} in `before` is the clip's number among the conversation's audios."""
    before: str
    placeholder: str  # repeated until it has as many tokens as the clip has features
    after: str


class Family(NamedTuple):
    model_type: str
    text_defaults: TextConfig
    system: str = SYSTEM
    audio_defaults: AudioConfig | None = None
    audio: ClipTemplate | None = None  # None: the model takes no audio
    max_audio_s: int = 0  # seconds of a clip that are used
    vision_defaults: VisionConfig | None = None
    vision_names: dict[str, str] = VISION_NAMES
    video: ClipTemplate | None = None
    time_fields: dict[str, int] = {}  # config fields of sounded videos -> their defaults
    sampled_fps: bool = True  # frames' times follow the rate of the chosen frames; False: the rate that was asked for
    split_qkv: bool = False  # the vision tower's queries, keys and values are three matrices in the file
    checkpoint_prefixes: dict[str, str] = {"": ""}  # our prefix -> the published file's
    section: str | None = None  # config.json describes several models; this field is the one that is built
    skipped: tuple[str, ...] = ()  # tensor prefixes of parts that are not built

    def checkpoint_name(self, name):
        """The published file's name for our parameter or module `name`."""
        old = next(prefix for prefix in self.checkpoint_prefixes if name.startswith(prefix))
        return self.checkpoint_prefixes[old] + name.removeprefix(old)

    def published_name(self, name):
        """The published file's name of a tensor in a file, which may have transformers 5's own name for it."""
        path = name.removeprefix(self.checkpoint_prefixes.get("", ""))
        for module in ("lm_head.", "model.audio_tower.", "model.visual.", "model.multi_modal_projector."):
            if path.startswith(module):
                return self.checkpoint_name(path.removeprefix("model."))
        if path.startswith("model.language_model."):
            return self.checkpoint_name(path.replace("language_model.", "", 1))
        return name

    def transformers_path(self, name):
        """The path in transformers 5, which PEFT's adapters use, of our parameter or module `name`."""
        if name.startswith("lm_head."):
            return name
        if name.startswith("model."):
            return "model.language_model." + name.removeprefix("model.")
        return "model." + name


@dataclass(frozen=True)
class ModelConfig:
    family: Family
    text: TextConfig
    audio: AudioConfig | None
    vision: VisionConfig | None
    tie_word_embeddings: bool
    ids_per_s: int | None  # positions that a second of video takes; None = one a frame pair
    chunk_s: int | None  # seconds after which picture and sound take turns in a sounded video
    ignored: tuple[str, ...]  # fields that neither this program nor transformers' classes know
    raw: dict  # config.json as read, for saving


WINDOWED_VISION = VisionConfig(width=3584, mlp_ratio=None, intermediate_size=3420, window_size=112,
                               fullatt_block_indexes=(7, 15, 23, 31))
QWEN2_AUDIO = Family(
    model_type="qwen2_audio",
    text_defaults=TextConfig(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                             num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-6, rope_theta=10000.0,
                             mrope_section=None),
    audio_defaults=AudioConfig(), max_audio_s=30,
    audio=ClipTemplate("Audio {n}: <|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>\n"),
    checkpoint_prefixes={"model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "": ""},
)  # fmt: skip
QWEN2_VL = Family(
    model_type="qwen2_vl", text_defaults=TextConfig(), vision_defaults=VisionConfig(),
    vision_names={"width": "embed_dim", "out_width": "hidden_size"},
    video=ClipTemplate("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
)  # fmt: skip
QWEN2_5_VL = QWEN2_VL._replace(model_type="qwen2_5_vl", vision_names=VISION_NAMES,
                               vision_defaults=replace(WINDOWED_VISION, tokens_per_second=4))
OMNI_THINKER = Family(  # the model in Qwen2.5-Omni that listens, looks and writes; saved on its own
    model_type="qwen2_5_omni_thinker",
    text_defaults=TextConfig(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                             num_key_value_heads=4, rms_norm_eps=1e-6),
    audio_defaults=AudioConfig(n_window=100, output_dim=3584), max_audio_s=300, vision_defaults=WINDOWED_VISION,
    audio=ClipTemplate("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    video=ClipTemplate("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
    time_fields={"position_id_per_seconds": 25, "seconds_per_chunk": 2}, sampled_fps=False, split_qkv=True,
)  # fmt: skip
OMNI = OMNI_THINKER._replace(
    model_type="qwen2_5_omni", section="thinker_config", checkpoint_prefixes={"": "thinker."},
    skipped=("talker.", "token2wav."))
FAMILIES = {family.model_type: family for family in (QWEN2_AUDIO, QWEN2_VL, QWEN2_5_VL, OMNI_THINKER, OMNI)}

CONFIG_FIELDS = read_json(Path(__file__).with_name("config_fields.json"))  # how those that build nothing are taken
FRONT_END = {"num_mel_bins": [128], "in_channels": [3], "patch_size": [14], "spatial_merge_size": [2],
             "temporal_patch_size": [2]}  # minixmd.inputs knows no others


def read_config(raw):
    """config.json (published flat, sparse, or nested as transformers 5 writes it) to a ModelConfig. Raises ValueError:
    an unsupported model_type, or a field that is not implemented at its value (it is named)."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    family, section, path = FAMILIES[model_type], raw, ""
    if family.section is not None:  # what stands beside it concerns models that are not built
        section, path = _object(raw, family.section, ""), family.section + "."
        if section is None:
            raise ValueError(f"config.json: {family.section} is missing")
    for part in (raw, section, *section.values()):
        for name in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(name):
                raise ValueError(f"config.json: {name}: quantised weights are not read")
    ignored = []
    text_section = _text_section(family, section, path, ignored)
    text = _read_fields(family, family.text_defaults, text_section, path + "text_config.", ignored)
    audio, vision = (
        defaults and _read_fields(family, defaults, _object(section, name, path), f"{path}{name}.", ignored)
        for name, defaults in (("audio_config", family.audio_defaults), ("vision_config", family.vision_defaults)))
    times = {name: section.get(name, default) for name, default in family.time_fields.items()}
    for name, value in times.items():
        _checked(Size, value, path + name)
    tied = bool(section.get("tie_word_embeddings", text_section.get("tie_word_embeddings", False)))
    ids_per_s = times.get("position_id_per_seconds", vision.tokens_per_second if vision else None)
    _check_sizes(family, text, audio, vision, path)
    ignored = tuple(dict.fromkeys(ignored))
    chunk_s = times.get("seconds_per_chunk")
    return ModelConfig(family, text, audio, vision, tied, ids_per_s, chunk_s, ignored, raw)


def _object(section, name, path):
    """The object in a field of a section; None if there is none."""
    value = section.get(name)
    if not isinstance(value, dict | None):
        raise ValueError(f"config.json: {path}{name} must be an object, got {value!r}")
    return value


def _text_section(family, section, path, ignored):
    """The decoder's fields: those of text_config, or in a flat file those beside the encoders' sections."""
    read_elsewhere = {"text_config", *family.time_fields}
    read_elsewhere.update(["audio_config"] if family.audio else [], ["vision_config"] if family.video else [])
    beside = {name: value for name, value in section.items() if name not in read_elsewhere}
    nested = _object(section, "text_config", path)
    if nested is None:
        return beside
    beside.pop("vocab_size", None)
    _read_fields(family, family.text_defaults, beside, path, ignored)  # only to refuse what is not implemented
    return nested


def _read_fields(family, defaults, section, path, ignored):
    """A section of config.json, or None, as a dataclass. path: as "vision_config.". ignored: takes unknown fields."""
    section = section or {}
    there = [f for f in fields(defaults) if getattr(defaults, f.name) is not None]
    known = {family.vision_names.get(f.name, f.name): f for f in there}  # by their names in config.json
    plain_vision = isinstance(defaults, VisionConfig) and defaults.window_size is None
    allowed = {**CONFIG_FIELDS["allowed"], **FRONT_END, "hidden_act": ("quick_gelu",) if plain_vision else ("silu",)}
    values = {}
    for name, value in _flatten_rope(section, path).items():
        if value is None:
            continue
        implemented = True
        if name in known:
            values[known[name].name] = _checked(known[name].type, value, path + name)
        elif name in allowed:
            implemented = value in allowed[name]
        elif name == "layer_types":
            implemented = isinstance(value, list) and value == ["full_attention"] * len(value)
        elif name not in CONFIG_FIELDS["inert"] and not name.startswith("_"):
            ignored.append(path + name)
        if not implemented:
            must = f"; it must be {FRONT_END[name][0]}" if name in FRONT_END else ""
            raise ValueError(f"config.json: {path}{name} = {value!r} is not implemented{must}")
    read = replace(defaults, **values)
    head_dim = section.get("head_dim")
    if isinstance(read, TextConfig) and head_dim not in (None, read.hidden_size // read.num_attention_heads):
        raise ValueError(f"config.json: {path}head_dim = {head_dim!r} is not implemented")
    return read


def _flatten_rope(section, path):
    """The section with rope_theta and mrope_section taken out of rope_scaling or transformers 5's rope_parameters."""
    flat, rope = dict(section), {}
    for name in ("rope_parameters", "rope_scaling"):
        rope.update(_object(section, name, path) or {})
        flat.pop(name, None)
    kinds = {str(rope.pop(name, "default")) for name in ("rope_type", "type")} - {"default", "mrope", "axial"}
    for name in ("rope_theta", "mrope_section"):
        if name in rope:
            flat[name] = rope.pop(name)
    if kinds or rope:
        raise ValueError(f"config.json: {path}rope_scaling {sorted(kinds) or rope} is not implemented")
    return flat


def _checked(annotation, value, place):
    try:
        return check_value(annotation, value)
    except ValueError as error:
        raise ValueError(f"config.json: {place} must be {error}, got {value!r}") from None


def _check_sizes(family, text, audio, vision, path):
    divisors = [("text_config.num_attention_heads", text.num_attention_heads, text.hidden_size),
                ("text_config.num_key_value_heads", text.num_key_value_heads, text.num_attention_heads)]
    widths = []  # what must be the decoder's
    if audio:
        divisors.append(("audio_config.encoder_attention_heads", audio.encoder_attention_heads, audio.d_model))
        widths.append(("audio_config.output_dim", audio.output_dim))
    if vision:
        divisors.append(("vision_config.num_heads", vision.num_heads, vision.width))
        widths.append((f"vision_config.{family.vision_names['out_width']}", vision.out_width))
        if (vision.window_size or 28) < 28:
            raise ValueError(f"config.json: {path}vision_config.window_size {vision.window_size} is less than a "
                             "merged token's 28 pixels")
    for name, divisor, size in divisors:
        if size % divisor:
            raise ValueError(f"config.json: {path}{name} {divisor} does not divide {size}")
    for name, width in widths:
        if width not in (None, text.hidden_size):
            raise ValueError(f"config.json: {path}{name} {width} differs from the decoder's hidden_size "
                             f"{text.hidden_size}")
    half = text.hidden_size // text.num_attention_heads // 2
    if text.mrope_section and sum(text.mrope_section) != half:
        raise ValueError(f"config.json: mrope_section {text.mrope_section} does not add up to half a head ({half})")
