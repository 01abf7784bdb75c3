"""config.json of every published family: parameter counts, sparse and nested forms, and what is refused."""
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tiny import published_config

from minixmd.models.families import FAMILIES, FRONT_END, read_config
from minixmd.models.multimodal import MultimodalLM

CONFIGS = Path(__file__).parent / "configs"  # as published; the last three are rebuilt from public quotations
COUNTS = {  # of the published files; half their bytes, in bf16, where only those are published
    "Qwen2-Audio-7B-Instruct": 8_397_094_912,
    "Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen2.5-Omni-7B-thinker": 8_931_813_888,
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_parameters_of_a_published_config_are_counted_to_the_unit(name):
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    with torch.device("meta"):
        model = MultimodalLM(read_config(raw))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]  # a tied head counts once


def test_the_whole_omni_config_is_read_at_its_thinker():
    thinker = json.loads((CONFIGS / "Qwen2.5-Omni-7B-thinker.json").read_text())
    whole = {"model_type": "qwen2_5_omni", "enable_audio_output": True, "thinker_config": thinker, "talker_config": {},
             "token2wav_config": {}}  # fmt: skip
    alone, part = read_config(thinker), read_config(whole)
    assert (part.text, part.audio, part.vision) == (alone.text, alone.audio, alone.vision)
    assert part.raw == whole and part.family.skipped
    assert (part.ids_per_s, part.chunk_s) == (25, 2)
    with pytest.raises(ValueError, match="config.json: thinker_config is missing"):
        read_config({"model_type": "qwen2_5_omni"})


@pytest.mark.parametrize("kind", ["audio", "vision", "windowed", "omni"])
def test_absent_fields_take_the_references_defaults(kind):
    transformers = pytest.importorskip("transformers")
    kind = published_config(kind)["model_type"].replace("omni", "omni_thinker")
    names = {"width": "hidden_size", "out_width": "out_hidden_size"}
    if kind == "qwen2_vl":
        names = {"width": "embed_dim", "out_width": "hidden_size"}
    theirs, raw = transformers.AutoConfig.for_model(kind), {"model_type": kind}
    if kind.endswith("_vl"):  # the reference's defaults are not one model: the tower's width is not the decoder's
        raw["text_config"] = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    ours = read_config(raw)
    compared = 0
    for part, section in ((ours.text, theirs.text_config), (ours.audio, getattr(theirs, "audio_config", None)),
                          (ours.vision, getattr(theirs, "vision_config", None))):  # fmt: skip
        for field, value in vars(part).items() if part else ():
            if field == "rope_theta":
                assert value == section.rope_parameters["rope_theta"]
            elif value is not None and field != "mrope_section" and field not in raw.get("text_config", ()):
                found = getattr(section, names.get(field, field) if part is ours.vision else field)
                assert value == (tuple(found) if isinstance(found, list) else found), field
                compared += 1
        for field, values in FRONT_END.items() if part else ():
            assert getattr(section, field, values[0]) in values, field
            compared += hasattr(section, field)
    assert compared > 13 and ours.tie_word_embeddings == getattr(theirs, "tie_word_embeddings", False)


def test_nested_and_flat_forms_are_the_same_config():
    flat = json.loads((CONFIGS / "Qwen2.5-VL-7B-Instruct.json").read_text())
    nested = {k: flat[k] for k in ("model_type", "vision_config", "video_token_id", "tie_word_embeddings")}
    nested["text_config"] = {
        **{k: flat[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "vocab_size")},
        "model_type": "qwen2_5_vl_text", "layer_types": ["full_attention"] * 28, "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    a, b = read_config(flat), read_config(nested)
    assert (a.text, a.vision, a.ids_per_s) == (b.text, b.vision, b.ids_per_s)
    assert a.tie_word_embeddings == b.tie_word_embeddings


OF_EVERY_CLASS = {  # as transformers 4 dumped the fields of its base class into each section
    "_name_or_path": "", "_attn_implementation_autoset": True, "add_cross_attention": False, "bad_words_ids": None,
    "chunk_size_feed_forward": 0, "diversity_penalty": 0.0, "do_sample": False, "id2label": {"0": "LABEL_0"},
    "is_decoder": False, "label2id": {"LABEL_0": 0}, "length_penalty": 1.0, "max_length": 20, "num_beams": 1,
    "pruned_heads": {}, "return_dict": True, "temperature": 1.0, "tf_legacy_loss": False, "top_k": 50, "top_p": 1.0,
    "torchscript": False, "typical_p": 1.0, "use_bfloat16": False, "tie_encoder_decoder": False, "prefix": None,
}  # fmt: skip


def test_what_the_base_config_class_writes_into_every_section_is_read_past():
    theirs = pytest.importorskip("transformers").PreTrainedConfig().to_dict()
    theirs.pop("model_type", None)
    raw = json.loads((CONFIGS / "Qwen2.5-Omni-7B-thinker.json").read_text())
    full = deepcopy(raw)
    for section in (full, full["text_config"], full["audio_config"], full["vision_config"]):
        section.update({k: v for k, v in {**theirs, **OF_EVERY_CLASS}.items() if k not in section})
    plain, dumped = read_config(raw), read_config(full)
    assert (plain.text, plain.audio, plain.vision) == (dumped.text, dumped.audio, dumped.vision)
    assert plain.tie_word_embeddings == dumped.tie_word_embeddings


@pytest.mark.parametrize("kind, field, value", [
    ("windowed", "some_dict", {"a": 1}), ("audio", "vision_config", {"depth": 2}),
    ("audio", "text_config.num_experts", 8), ("vision", "vision_config.window_size", 112),
    ("vision", "unsloth_fixed", True), ("audio", "unsloth_version", "2026.1"),
    ("audio", "text_config.unsloth_fixed", True), ("omni", "thinker_config.vision_config.my_tool", None),
    ("windowed", "vision_config.my_tool", [1]),
])  # fmt: skip
def test_a_field_that_no_reference_reads_is_passed_over_by_name(kind, field, value):
    plain = published_config(kind)
    raw = deepcopy(plain)
    *path, name = field.split(".")
    section = raw
    for step in path:
        section = section[step]
    section[name] = value
    read, known = read_config(raw), read_config(plain)
    assert (read.text, read.audio, read.vision) == (known.text, known.audio, known.vision)
    assert [ignored.rpartition(".")[2] for ignored in read.ignored] == [name] * (value is not None)
    assert read_config(plain).ignored == ()


REFUSED = [  # kind, the field that is set, its value, the line after "config.json: "
    ("windowed", "use_sliding_window", True, "text_config.use_sliding_window = True is not implemented"),
    ("windowed", "vision_config.hidden_act", "gelu", "vision_config.hidden_act = 'gelu' is not implemented"),
    ("windowed", "rope_scaling", {"type": "yarn", "factor": 4}, "text_config.rope_scaling ['yarn'] is not implemented"),
    ("windowed", "vision_config.window_size", 0, "vision_config.window_size must be > 0, got 0"),
    ("windowed", "vision_config.fullatt_block_indexes", ["1"],
     "vision_config.fullatt_block_indexes must be a list of int or None, got ['1']"),
    ("vision", "vision_config.patch_size", 16, "vision_config.patch_size = 16 is not implemented; it must be 14"),
    ("windowed", "vision_config.out_hidden_size", 32,
     "vision_config.out_hidden_size 32 differs from the decoder's hidden_size 48"),
    ("omni", "thinker_config.audio_config.output_dim", 32,
     "thinker_config.audio_config.output_dim 32 differs from the decoder's hidden_size 48"),
    ("omni", "thinker_config.audio_config.num_mel_bins", 80,
     "thinker_config.audio_config.num_mel_bins = 80 is not implemented; it must be 128"),
    ("omni", "thinker_config.seconds_per_chunk", 2.5,
     "thinker_config.seconds_per_chunk must be an int, got 2.5"),
    ("omni", "thinker_config", [1], "thinker_config must be an object, got [1]"),
    ("omni", "thinker_config.audio_config.dropout", 0.1,
     "thinker_config.audio_config.dropout = 0.1 is not implemented"),
    ("omni", "thinker_config.text_config.head_dim", 16, "thinker_config.text_config.head_dim = 16 is not implemented"),
    ("windowed", "rope_scaling", [1], "text_config.rope_scaling must be an object, got [1]"),
    ("windowed", "rope_scaling", {"mrope_section": [2, "a", 2]},
     "text_config.mrope_section must be a list of int or None, got [2, 'a', 2]"),
    ("windowed", "rope_scaling", {"mrope_section": 6},
     "text_config.mrope_section must be a list of int or None, got 6"),
    ("windowed", "rope_scaling", {"type": ["x"]}, 'text_config.rope_scaling ["[\'x\']"] is not implemented'),
    ("windowed", "layer_types", 5, "text_config.layer_types = 5 is not implemented"),
    ("windowed", "rms_norm_eps", float("nan"), "text_config.rms_norm_eps must be a float, got nan"),
    ("windowed", "vision_config.num_heads", 3, "vision_config.num_heads 3 does not divide 32"),
    ("audio", "audio_config.encoder_attention_heads", 5, "audio_config.encoder_attention_heads 5 does not divide 36"),
    ("windowed", "vision_config.window_size", 20,
     "vision_config.window_size 20 is less than a merged token's 28 pixels"),
    ("windowed", "quantization_config", {"bits": 4}, "quantization_config: quantised weights are not read"),
    ("omni", "quantization_config", {"bits": 4}, "quantization_config: quantised weights are not read"),
    ("omni", "thinker_config.quantization_config", {"bits": 8}, "quantization_config: quantised weights are not read"),
    ("audio", "text_config.quantization_config", {"bits": 4}, "quantization_config: quantised weights are not read"),
    ("vision", "compression_config", {"format": "x"}, "compression_config: quantised weights are not read"),
    ("audio", "audio_config.encoder_layers", 2**63, f"audio_config.encoder_layers must be <= 500, got {2**63}"),
    ("vision", "hidden_size", 10**30, f"text_config.hidden_size must be <= 10000000, got {10**30}"),
    ("audio", "model_type", "llama",
     f"model_type 'llama' is not supported; supported: {', '.join(FAMILIES)}"),
    ("audio", "text_config.use_sliding_window", True, "text_config.use_sliding_window = True is not implemented"),
    ("audio", "text_config.rope_scaling", {"type": "yarn", "factor": 4.0},
     "text_config.rope_scaling ['yarn'] is not implemented"),
    ("vision", "rope_scaling", {"rope_type": "linear", "factor": 2.0},
     "text_config.rope_scaling ['linear'] is not implemented"),
    ("audio", "text_config.rope_parameters", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2},
     "text_config.rope_scaling ['dynamic'] is not implemented"),
    ("vision", "rope_scaling", {"type": "mrope", "mrope_section": [2, 2, 1]},
     "mrope_section (2, 2, 1) does not add up to half a head (6)"),
    ("vision", "hidden_act", "quick_gelu", "text_config.hidden_act = 'quick_gelu' is not implemented"),
    ("vision", "vision_config.hidden_act", "silu", "vision_config.hidden_act = 'silu' is not implemented"),
    ("audio", "audio_config.activation_function", "relu",
     "audio_config.activation_function = 'relu' is not implemented"),
    ("audio", "audio_config.scale_embedding", True, "audio_config.scale_embedding = True is not implemented"),
    ("audio", "text_config.attention_dropout", 0.1, "text_config.attention_dropout = 0.1 is not implemented"),
    ("vision", "vision_config.hidden_size", 40,
     "vision_config.hidden_size 40 differs from the decoder's hidden_size 48"),
    ("vision", "hidden_size", "48", "text_config.hidden_size must be an int, got '48'"),
    ("audio", "audio_config.d_model", 36.0, "audio_config.d_model must be an int, got 36.0"),
    ("audio", "text_config.vocab_size", 0, "text_config.vocab_size must be > 0, got 0"),
    ("audio", "text_config.rms_norm_eps", True, "text_config.rms_norm_eps must be a float, got True"),
    ("audio", "text_config", "qwen2", "text_config must be an object, got 'qwen2'"),
    ("audio", "audio_config", [1], "audio_config must be an object, got [1]"),
]  # fmt: skip


@pytest.mark.parametrize("kind, path, value, line", REFUSED, ids=str)
def test_a_config_that_is_not_implemented_is_one_line_that_names_the_field(kind, path, value, line):
    raw = deepcopy(published_config(kind))
    read_config(raw)
    section, names = raw, path.split(".")
    for name in names[:-1]:
        section = section[name]
    section[names[-1]] = value
    with pytest.raises(ValueError) as caught:
        read_config(raw)
    assert str(caught.value) == f"config.json: {line}"
