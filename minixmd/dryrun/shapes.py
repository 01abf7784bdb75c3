"""The shapes of published checkpoints, for a dry run where none is at hand: config.json without what is the family's
default (models/families.py) and without what no shape depends on.
"""
_VL = dict(vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
           num_key_value_heads=4, rms_norm_eps=1e-6)
_OMNI = dict(max_position_embeddings=32_768, rope_theta=1e6, rms_norm_eps=1e-6)
_OMNI_VISION = dict(hidden_size=1280, intermediate_size=3420)


def _vl(model_type, vision, **text):
    return {"model_type": model_type, **_VL, **text, "vision_config": vision}


def _omni(text, width):
    return {"model_type": "qwen2_5_omni_thinker", "text_config": {**_OMNI, **text},
            "audio_config": {"output_dim": width}, "vision_config": {**_OMNI_VISION, "out_hidden_size": width}}


_AUDIO = {"model_type": "qwen2_audio", "text_config": dict(vocab_size=156_032, intermediate_size=11_008,
                                                           rms_norm_eps=1e-5, max_position_embeddings=8192)}
PUBLISHED = {  # name on the hub, without its owner
    "Qwen2-Audio-7B": _AUDIO,
    "Qwen2-Audio-7B-Instruct": _AUDIO,
    "Qwen2-VL-2B-Instruct": _vl("qwen2_vl", dict(embed_dim=1280, hidden_size=1536), vocab_size=151_936,
                                hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
                                num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2-VL-7B-Instruct": _vl("qwen2_vl", dict(embed_dim=1280, hidden_size=3584)),
    "Qwen2.5-VL-7B-Instruct": _vl("qwen2_5_vl", dict(hidden_size=1280, out_hidden_size=3584, tokens_per_second=2),
                                  max_position_embeddings=128_000),
    "Qwen2.5-VL-32B-Instruct": _vl("qwen2_5_vl", dict(hidden_size=1280, intermediate_size=3456, out_hidden_size=5120,
                                                      tokens_per_second=2),
                                   hidden_size=5120, intermediate_size=27_648, num_hidden_layers=64,
                                   num_attention_heads=40, num_key_value_heads=8, max_position_embeddings=128_000),
    "Qwen2.5-Omni-3B": _omni(dict(vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
                                  num_attention_heads=16, num_key_value_heads=2), 2048),
    "Qwen2.5-Omni-7B": _omni({}, 3584),
}  # fmt: skip
