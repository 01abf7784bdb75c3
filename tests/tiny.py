"""Tiny models, ours and the reference's, every parameter re-randomised, and the same inputs for both sides."""
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minixmd import Processor
from minixmd.inputs.batch import Media, Prompt
from minixmd.inputs.positions import grid_offsets, positions_of
from minixmd.models.families import read_config
from minixmd.models.head import CHUNK, CrossEntropy, head_loss
from minixmd.models.lora import set_backend
from minixmd.models.multimodal import MultimodalLM
from minixmd.train import Trainer

AUDIO_ID, VIDEO_ID = 90, 91  # placeholders inside a vocabulary of 97
OMNI_TOKENS = {"audio_token_index": "<|AUDIO|>", "audio_token_id": "<|AUDIO|>", "video_token_index": "<|VIDEO|>",
               "video_token_id": "<|VIDEO|>", "image_token_index": "<|IMAGE|>", "image_token_id": "<|IMAGE|>",
               "audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>",
               "vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>"}
VL_TOKENS = {"video_token_id": "<|video_pad|>", "image_token_id": "<|image_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
TOKENS = {  # model_type -> {field of config.json: the token whose id it holds}, which transformers goes by
    "qwen2_audio": {"audio_token_index": "<|AUDIO|>", "audio_token_id": "<|AUDIO|>"}, "qwen2_vl": VL_TOKENS,
    "qwen2_5_vl": VL_TOKENS, "qwen2_5_omni": OMNI_TOKENS, "qwen2_5_omni_thinker": OMNI_TOKENS}


def randomise(model, seed=0):
    """std 0.3 on matrices, 1 ± 0.3 on norm gains: at the default initialisation parity tests are nearly blind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            gain = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + 0.3 * noise if gain else noise * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
    return model


def cross_entropy(hidden_ND, head_VD, batch, chunk=CHUNK, backend="torch"):
    """(loss, nll_T) of the batch's targets, by the head."""
    row_loss = CrossEntropy(batch.target_id_T, batch.target_weight_T, backend)
    loss, columns = head_loss(hidden_ND, head_VD, batch.target_row_T, row_loss, chunk)
    return loss, columns["nll"]


def text_config(kv, vocab=97, **more):
    return dict(vocab_size=vocab, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=kv, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, **more)


def published_config(kind, kv=2, tie=False, vocab=97, **text):
    """A tiny config.json in the form that is published: sparse and nested for "audio", flat for "vision". No field has
    the value that it would have if it were absent."""
    text = text_config(kv, vocab, **text)
    if kind == "audio":
        return dict(model_type="qwen2_audio", audio_token_index=AUDIO_ID,
                    audio_config=dict(num_mel_bins=128, encoder_layers=2, d_model=36, encoder_attention_heads=3,
                                      encoder_ffn_dim=44, max_source_positions=1500),
                    text_config=dict(model_type="qwen2", rms_norm_eps=1e-5, rope_theta=20000, **text))  # fmt: skip
    if kind == "windowed":
        return dict(model_type="qwen2_5_vl", rms_norm_eps=1e-6, rope_theta=500000.0, tie_word_embeddings=tie,
                    rope_scaling={"type": "mrope", "mrope_section": [2, 2, 2]}, image_token_id=92,
                    video_token_id=VIDEO_ID, vision_config=dict(**WINDOWED, tokens_per_second=3), **text)  # fmt: skip
    if kind == "omni":
        return dict(model_type="qwen2_5_omni", thinker_config=dict(
            model_type="qwen2_5_omni_thinker", audio_token_index=AUDIO_ID, video_token_index=VIDEO_ID,
            image_token_index=92, position_id_per_seconds=20, seconds_per_chunk=1, audio_config=OMNI_AUDIO,
            vision_config=WINDOWED, text_config=dict(rope_theta=500000.0, rms_norm_eps=1e-6, tie_word_embeddings=tie,
                                                     rope_scaling={"mrope_section": [2, 2, 2]}, **text)))  # fmt: skip
    return dict(model_type="qwen2_vl", rms_norm_eps=1e-6, rope_theta=500000.0, tie_word_embeddings=tie,
                rope_scaling={"type": "mrope", "mrope_section": [2, 2, 2]}, image_token_id=92, video_token_id=VIDEO_ID,
                vision_config=dict(depth=2, embed_dim=32, num_heads=2, hidden_size=48, mlp_ratio=3),
                **text)  # fmt: skip


WINDOWED = dict(depth=3, hidden_size=32, num_heads=2, intermediate_size=36, out_hidden_size=48, window_size=56,
                fullatt_block_indexes=[1])  # fmt: skip
OMNI_AUDIO = dict(num_mel_bins=128, encoder_layers=2, d_model=36, encoder_attention_heads=3, encoder_ffn_dim=44,
                  max_source_positions=1500, n_window=25, output_dim=48)  # fmt: skip


def tiny_model(kind, kv=2, tie=False, seed=0, **more):
    """Our own model, all of whose parameters train."""
    return randomise(MultimodalLM(read_config(published_config(kind, kv, tie, **more))), seed)


def trainer_of(stage, model, suppressed_ids=(), num_items=1, folder=None, log=None):
    """A Trainer around a model that is there already. Of the processor it has only the suppressed ids."""

    def load(path, *, device, dtype, backend):
        set_backend(model, backend)
        return model, SimpleNamespace(suppressed_ids=list(suppressed_ids))

    return Trainer(stage, num_items, folder, log, load=load)


def processor_of(folder, config, limit=4096):
    """A Processor for a model whose config.json does not say the media tokens' ids."""
    return Processor(folder, replace(config, text=replace(config.text, max_position_embeddings=limit)))


def reference_audio(kv=2):
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2AudioConfig(
        text_config=dict(model_type="qwen2", rms_norm_eps=1e-5, rope_theta=10000.0, **text_config(kv)),
        audio_config=dict(model_type="qwen2_audio_encoder", num_mel_bins=128, encoder_layers=2, d_model=36,
                          encoder_attention_heads=3, encoder_ffn_dim=44, max_source_positions=1500),
        audio_token_index=AUDIO_ID,
    )  # fmt: skip
    return randomise(Qwen2AudioForConditionalGeneration(config).eval())


def reference_vision(kv=2, tie=False):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 2, 2]}
    config = Qwen2VLConfig(
        text_config=dict(rms_norm_eps=1e-6, rope_parameters=rope, **text_config(kv)),
        vision_config=dict(depth=2, embed_dim=32, num_heads=2, hidden_size=48, mlp_ratio=3),
        tie_word_embeddings=tie, image_token_id=92, video_token_id=VIDEO_ID, vision_start_token_id=93,
        vision_end_token_id=94,
    )  # fmt: skip
    return randomise(Qwen2VLForConditionalGeneration(config).eval())


def reference_windowed(kv=2, tie=False, **vision):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 2, 2]}
    config = Qwen2_5_VLConfig(
        text_config=dict(rms_norm_eps=1e-6, rope_parameters=rope, **text_config(kv)),
        vision_config=dict(**{**WINDOWED, **vision}, tokens_per_second=2), tie_word_embeddings=tie, image_token_id=92,
        video_token_id=VIDEO_ID, vision_start_token_id=93, vision_end_token_id=94,
    )  # fmt: skip
    return randomise(Qwen2_5_VLForConditionalGeneration(config).eval())


def reference_omni(kv=2, tie=False, **vision):
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 2, 2]}
    config = Qwen2_5OmniThinkerConfig(
        text_config=dict(rms_norm_eps=1e-6, rope_parameters=rope, tie_word_embeddings=tie, **text_config(kv)),
        vision_config={**WINDOWED, **vision}, audio_config=OMNI_AUDIO, tie_word_embeddings=tie,
        audio_token_index=AUDIO_ID, video_token_index=VIDEO_ID, image_token_index=92, audio_start_token_id=93,
        audio_end_token_id=94, vision_start_token_id=95, vision_end_token_id=96, pad_token_id=0,
    )  # fmt: skip
    return randomise(Qwen2_5OmniThinkerForConditionalGeneration(config).eval())


REFERENCES = {"audio": lambda kv, tie: reference_audio(kv), "vision": reference_vision,
              "windowed": reference_windowed, "omni": reference_omni}  # fmt: skip


def audio_media(frames, start, seed):
    """Noise in place of a log-mel of `frames` real frames: the Media, and the (128, 3000) input it is cut from."""
    mel_MA = torch.randn(128, 3000, generator=torch.Generator().manual_seed(seed))
    tokens = ((frames + 1) // 2) // 2
    return Media("audio", mel_MA[:, :min(frames + 2, 3000)], start + torch.arange(tokens), frames=frames), mel_MA


def video_media(grid, start, seed):
    t, h, w = grid
    patches_PC = torch.randn(t * h * w, 1176, generator=torch.Generator().manual_seed(seed))
    return Media("video", patches_PC, start + torch.arange(t * h * w // 4), grid_thw=grid)


def positions(length, media):
    """Qwen2-VL's positions of a sequence that holds these clips."""
    return positions_of(length, [(int(m.rows_P[0]), grid_offsets(m.grid_thw)) for m in media if m.grid_thw])


def prompt(parts, seed=0, targets=0):
    """A Prompt from parts: an int is that many random text ids, a Media (its rows are set here) its placeholders."""
    generator = torch.Generator().manual_seed(seed)
    ids, media = [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 89, (part,), generator=generator).tolist()
        else:
            media.append(replace(part, rows_P=len(ids) + torch.arange(len(part.rows_P))))
            ids += [AUDIO_ID if part.kind == "audio" else VIDEO_ID] * len(part.rows_P)
    target_N = torch.arange(len(ids)) >= len(ids) - targets
    return Prompt(torch.tensor(ids), positions(len(ids), media), tuple(media), target_N)


def reference_forward(kind, reference, p):
    """The reference on one prompt: hidden states after the final norm, and logits, each (N, ·)."""
    inputs = dict(input_ids=p.ids_N[None], attention_mask=torch.ones(1, len(p), dtype=torch.long))
    audios, videos = ([m for m in p.media if m.kind == k] for k in ("audio", "video"))
    if audios:
        mels, mask = [], torch.zeros(len(audios), 3000, dtype=torch.long)
        for i, m in enumerate(audios):
            mels.append(full_mel(m))
            mask[i, : m.frames] = 1
        inputs.update(input_features=torch.stack(mels), feature_attention_mask=mask)
    if kind != "audio":
        inputs.update(position_ids=p.positions_3N[:, None])
    if videos:
        inputs.update(pixel_values_videos=torch.cat([m.patches() for m in videos]),
                      video_grid_thw=torch.tensor([m.grid_thw for m in videos]))
    out = reference(**inputs, output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]


def full_mel(media):
    mel_MA = torch.randn(128, 3000, generator=torch.Generator().manual_seed(0))  # beyond the halo: masked, so anything
    mel_MA[:, : media.features.shape[1]] = media.features
    return mel_MA


class Largest(TorchDispatchMode):
    """The element count of the largest tensor that any operation makes, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out
