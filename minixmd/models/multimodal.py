"""MultimodalLM: encoder features take the place of their placeholder tokens in a Qwen2 decoder; an LM head reads it.

What trains or samples never reaches for a submodule's parameters; only what checks does (minixmd.verify, bench/)."""
from dataclasses import replace

import torch
from torch import nn

from minixmd.models.attention import packed_attention
from minixmd.models.head import CHUNK, head_loss, raw_logits
from minixmd.models.lora import Linear, set_backend
from minixmd.models.qwen2 import Qwen2
from minixmd.models.vit import ViT
from minixmd.models.whisper import Whisper

# Whisper's sinusoids are a table, not weights, and nothing reads Omni's begin and end vectors
NEVER_TRAINED = ("embed_positions.weight", "audio_bos_eos_token.weight")
DECODER = ("model.", "lm_head.")  # prefixes of the decoder's parameters; all others belong to the encoders


class MultimodalLM(nn.Module):
    """Returns the hidden states of all N rows; only the rows that need it go through `logits` or `head_loss`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backend = "torch"  # of the kernels: lora.set_backend
        if config.audio is not None:
            self.audio_tower = Whisper(config.audio)
            self.multi_modal_projector = nn.Sequential()  # empty where the tower has a projection of its own
            if config.audio.output_dim is None:
                self.multi_modal_projector.add_module("linear", Linear(config.audio.d_model, config.text.hidden_size))
        if config.vision is not None:
            self.visual = ViT(config.vision, config.family.split_qkv)
        self.model = Qwen2(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """Shares the head with the embedding where config.json says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    def forward(self, batch, attend=None):
        """Hidden states (N, D) in packed order, in the storage dtype, of a Batch on the model's device. attend: as
        Qwen2's; None = packed_attention over the batch's segments. Raises ValueError: a clip with another number of
        features than placeholders, or without an encoder in this model."""
        attend = attend or (lambda layer, *qkv: packed_attention(*qkv, batch.segments))
        return self.model(self._embed(batch), batch.positions_3N, attend)

    def _embed(self, batch):
        """Token embeddings (N, D), with every clip's features written over its placeholders."""
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
        """An encoder's output, one row a placeholder, in the decoder's width. media: all of one kind."""
        if kind == "encoded":
            return torch.cat([m.features for m in media])
        if kind == "audio" and self.config.audio is not None:
            return self.multi_modal_projector(self.audio_tower(media))
        if kind == "video" and self.config.vision is not None:
            return self.visual(media)
        raise ValueError(f"a {self.config.family.model_type} model cannot take {kind}")

    @torch.no_grad()
    def encode_media(self, prompt):
        """The Prompt with its clips replaced by the encoders' output, which later passes reuse; it has no gradient."""
        media = []
        for m in prompt.media:
            features_PD = self.encode(m.kind, [m.to(self.device)])
            media.append(replace(m, features=features_PD, kind="encoded"))
        return replace(prompt, media=tuple(media))

    def logits(self, hidden_ND):
        """(N, V) fp32 logits of the given rows."""
        return raw_logits(hidden_ND, self.lm_head.weight)

    def head_loss(self, hidden_ND, row_T, row_loss, chunk=CHUNK):
        return head_loss(hidden_ND, self.lm_head.weight, row_T, row_loss, chunk)

    def token_embeddings(self, ids):
        return self.model.embed_tokens.weight[ids]

    def set_trainable(self, what):
        """Chooses the parameters that train, of a model without an adapter. what: "decoder" | "full"."""
        trained = {"decoder": DECODER, "full": ("",)}[what]  # prefixes
        for name, p in self.named_parameters():
            p.requires_grad_(name.startswith(trained) and not name.endswith(NEVER_TRAINED))

    def encoders_frozen(self):
        return all(name.startswith(DECODER) for name, p in self.named_parameters() if p.requires_grad)


def frozen_copy(model, values):
    """A frozen copy that shares the parameters, but for those of which `values`, {name: tensor}, holds others. It runs
    the same kernels: as a reference policy its KL is exactly 0 until the first update."""
    with torch.device("meta"):
        copy = MultimodalLM(model.config)
    layers = dict(copy.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            layers[name].scale = module.scale
        for leaf, p in module.named_parameters(recurse=False):
            value = values.get(f"{name}.{leaf}", p.detach())
            layers[name].register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    copy.tie()
    set_backend(copy, model.backend)
    return copy
