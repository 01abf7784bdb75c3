"""minixmd: train an audio language model from a vision language model, and back, on the same clips.

Dimension letters, the same everywhere: B sequences, G rollouts a prompt, T text or target positions, S keys or samples,
D decoder width, H query heads, J key-value heads, K head size, F MLP width, V vocabulary, N packed tokens, R LoRA rank,
L layers, A audio frames after the convolutions, M mel bins, P image patches, E encoder width, C channels.
"""
import sys

import torch

from minixmd.inputs.batch import Batch, Group, Prompt, pack
from minixmd.inputs.tokenizer import Processor
from minixmd.learning.rollout import Completion, generate
from minixmd.models.hub import base_and_adapters, model_folder
from minixmd.models.lora import merge_lora, set_backend
from minixmd.models.shards import listed
from minixmd.models.weights import load_adapter, load_model

__version__ = "0.1.0"
__all__ = ["Batch", "Completion", "Group", "Processor", "Prompt", "generate", "load", "pack"]


def load(path, *, device="cpu", dtype=torch.float32, backend="torch", sharded=False):
    """A model and its processor from a folder in the published layout or a PEFT adapter's, here or on the hub.

    Args:
        path: folder with config.json, safetensors and tokenizer.json, or with adapter_config.json, whose base is found
            under the name that it records; where there is no such folder, "owner/name" or "owner/name@revision" on the
            hub (models/hub.py).
        device: "cpu", "cuda", … dtype: storage and matmul dtype; adapters stay fp32.
        backend: of the kernels, "torch" | "triton".
        sharded: whether the processes of a run each hold a part of the decoder's blocks (models/sharding.py).
    Returns (MultimodalLM, Processor). Every parameter is frozen; parts of the checkpoint not built are named on stderr.
    Raises ValueError: no such folder or repository, an unsupported or misfitting checkpoint, or another's tokenizer.
    """
    base, adapters = base_and_adapters(model_folder(path))
    if sharded and len(adapters) > 1:
        raise ValueError(f"{path}: an adapter on an adapter cannot be sharded; merge the first one into its base")
    model = load_model(base, device=device, dtype=dtype, sharded=sharded)
    for adapter in adapters:
        merge_lora(model)  # the one that this one stands on
        load_adapter(model, adapter)
    if skipped := model.config.raw.get("enable_audio_output", True) and model.config.family.skipped:
        print(f"minixmd: {path}: not built: {'*, '.join(skipped)}*", file=sys.stderr)
    if ignored := model.config.ignored:
        print(f"minixmd: {path}: config.json: passed over: {listed(ignored, ', ')}", file=sys.stderr)
    set_backend(model, backend)
    return model, Processor(base, model.config)
