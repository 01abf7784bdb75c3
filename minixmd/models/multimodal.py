"""MultimodalLM: towers whose features take the place of their placeholders, a Qwen2 decoder, and an LM head."""
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from minixmd.models.attention import attend
from minixmd.models.lora import Linear
from minixmd.models.qwen2 import Qwen2
from minixmd.models.vit import ViT
from minixmd.models.whisper import ChunkedWhisper, Whisper


def raw_logits(hidden_ND, weight_VD):
    """hidden Wᵀ as (N, V) fp32: products of the storage dtype, accumulated and returned in fp32; differentiable."""
    if weight_VD.dtype == torch.float32:
        return hidden_ND @ weight_VD.T
    recorded = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    if weight_VD.is_cuda and not recorded:  # mm has no derivative with an out_dtype
        return torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
    return hidden_ND.float() @ weight_VD.float().T


class Projector(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = Linear(config.audio.d_model, config.text.hidden_size)

    def forward(self, x_AE):
        return self.linear(x_AE)


def _packed(segments, layer, q_NHK, k_NJK, v_NJK):
    return attend(q_NHK, k_NJK, v_NJK, segments)


class MultimodalLM(nn.Module):
    """One class for every family; config.family says in data what differs.

    model(batch) gives hidden states of all N rows, never logits: the vocabulary is far wider than the model, so only
    the rows that need it go through `logits`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.audio is not None:
            whole = config.audio.n_window is None
            self.audio_tower = Whisper(config.audio) if whole else ChunkedWhisper(config.audio)
            self.multi_modal_projector = Projector(config) if whole else None
        if config.vision is not None:
            self.visual = ViT(config.vision, config.family.split_qkv)
        self.model = Qwen2(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, batch):
        """Token embeddings (N, D) with every clip's features written over its placeholders, at their stored rows.

        Raises:
            ValueError: a tower gives another number of tokens than the placeholders, or the model lacks the tower.
        """
        x_ND = self.model.embed_tokens(batch.ids_N)
        for kind in sorted({m.kind for m in batch.media}):
            media = [m for m in batch.media if m.kind == kind]
            features_PD = self.encode(kind, media)
            rows_P = torch.cat([m.rows_P for m in media])
            if len(rows_P) != len(features_PD):
                raise ValueError(f"{len(rows_P)} {kind} placeholders for {len(features_PD)} features")
            x_ND = x_ND.index_copy(0, rows_P, features_PD.to(x_ND.dtype))
        return x_ND

    def encode(self, kind, media):
        """A tower's output in the decoder's width, one row a placeholder. Of kind "encoded" it has been made."""
        if kind == "encoded":
            return torch.cat([m.features for m in media])
        if kind == "audio" and self.config.audio is not None:
            features = self.audio_tower(media)
            return features if self.multi_modal_projector is None else self.multi_modal_projector(features)
        if kind == "video" and self.config.vision is not None:
            return self.visual(media)
        raise ValueError(f"a {self.config.family.model_type} model cannot take {kind}")

    @torch.no_grad()
    def encode_ahead(self, prompt):
        """The Prompt with its clips' features for the clips: whoever passes it often, with towers that do not train,
        encodes them once."""
        device = self.lm_head.weight.device
        media = (replace(m, features=self.encode(m.kind, [m.to(device)]), kind="encoded") for m in prompt.media)
        return replace(prompt, media=tuple(media))

    def forward(self, batch):
        """Batch to hidden states (N, D) in packed order, in the storage dtype."""
        return self.model(self.embed(batch), batch.positions_3N, partial(_packed, batch.segments))

    def logits(self, hidden_ND):
        return raw_logits(hidden_ND, self.lm_head.weight)
