"""minixmd: train an audio language model from a vision language model, and back, on the same clips.

Dimension letters, the same everywhere: B sequences, G rollouts a prompt, T text or target positions, S keys or samples,
D decoder width, H query heads, J key-value heads, K head size, F MLP width, V vocabulary, N packed tokens, R LoRA rank,
L layers, A audio frames after the convolutions, M mel bins, P image patches, E encoder width, C channels.
"""
from pathlib import Path

import torch

from minixmd.inputs.batch import Batch, Group, Prompt, pack
from minixmd.inputs.tokenizer import Processor
from minixmd.learning.rollout import Completion, generate
from minixmd.models.weights import load_adapter, load_model, read_json

__version__ = "0.1.0"
__all__ = ["Batch", "Completion", "Group", "Processor", "Prompt", "generate", "load", "pack"]


def load(path, *, device="cpu", dtype=torch.float32):
    """A model and its processor from a folder in the published layout, or from a PEFT adapter's folder.

    Args:
        path: folder with config.json, safetensors and tokenizer.json, or with adapter_config.json, whose base is found
            under the path that it records.
        device: "cpu", "cuda", … dtype: storage and matmul dtype; adapters stay fp32.
    Returns:
        (MultimodalLM, Processor). Every parameter is frozen.
    Raises:
        ValueError: no such folder, an unsupported or misfitting checkpoint, or a tokenizer of another model.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such model folder")
    base = path
    if (path / "adapter_config.json").is_file():
        base = Path(read_json(path / "adapter_config.json").get("base_model_name_or_path") or "unnamed")
        if not base.is_dir():
            raise ValueError(f"{path}: the adapter's base model {base} is not there")
    model = load_model(base, device=device, dtype=dtype)
    if base != path:
        load_adapter(model, path)
    return model, Processor(base, model.config)
