"""The model that a stage names, without its weights: its shapes, its adapters, and the clips that it is shown."""
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from minixmd.config import TRAINING, Toy
from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.clips import load_clip
from minixmd.inputs.image import sample_frames, smart_resize
from minixmd.inputs.tokenizer import Processor
from minixmd.models.families import ModelConfig, read_config
from minixmd.models.lora import add_lora, merge_lora
from minixmd.models.weights import build, config_of, load_adapter
from minixmd.runs.files import read_json
from minixmd.runs.hub_names import parse_hub_name
from minixmd.toy.models import make_model, write_processor
from minixmd.toy.pretrain import MODEL_TYPE

CLIP_S, VIDEO_FPS, VIDEO_SIZE = 10, 30, (720, 1280)  # of every clip: seconds, frames a second, height and width
# config.json of models on the hub by name, less what is the family's default and what no shape depends on
PUBLISHED = read_json(Path(__file__).with_name("published.json"))


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model that is not loaded."""
    name: str
    config: ModelConfig = field(compare=False)
    processor: Processor = field(compare=False, repr=False)
    source: str  # where its shapes are from
    adapters: tuple = field(default=(), compare=False)  # folders of PEFT adapters, and arguments of add_lora

    def on_meta(self, dtype):
        """The frozen model on `meta`, with its adapters."""
        model = build(self.config).to(dtype)
        for adapter in self.adapters:
            merge_lora(model)
            if isinstance(adapter, Path):
                load_adapter(model, adapter)
            else:
                add_lora(model, **adapter, seed=0)
        return model.requires_grad_(False)

    def count_parameters(self):
        """Parameters without the adapters; a tied head counts once."""
        return sum(p.numel() for p in build(self.config).parameters())


def blank_clip(path, kind, options):
    """What load_clip would give: every clip is silent and black, and lasts CLIP_S."""
    if kind == "audio":
        return load_clip(torch.zeros(CLIP_S * SAMPLE_RATE), kind, options)
    indices = sample_frames(CLIP_S * VIDEO_FPS, VIDEO_FPS, fps=options["fps"], nframes=options["nframes"])
    size = smart_resize(*VIDEO_SIZE, min_pixels=options["min_pixels"], max_pixels=options["max_pixels"])
    return torch.zeros(len(indices), 3, *size, dtype=torch.uint8), len(indices) / CLIP_S


def find_model(value, stages, scratch):
    """The ModelInfo of what a stage's field `model` names. Shapes are from the config.json of a folder or of the hub's
    cache, else from PUBLISHED by the name alone. scratch: has a tokenizer.json for models whose own is not at hand.
    Raises ValueError: nothing is known of the model, or its family is not supported."""
    if value.startswith("@"):
        return _model_of_stage(value, stages, scratch)
    folder = Path(value)
    if not folder.is_dir() and parse_hub_name(value):
        repo, revision = parse_hub_name(value)
        for file in ("config.json", "adapter_config.json"):
            cached = try_to_load_from_cache(repo, file, revision=revision)
            if isinstance(cached, str):
                folder = Path(cached).parent
    if (folder / "adapter_config.json").is_file():
        base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "unnamed")
        if Path(base).resolve() == folder.resolve():
            raise ValueError(f"{folder}: the adapter's base model is the adapter itself")
        try:
            model = find_model(base, stages, scratch)
        except ValueError as error:
            raise ValueError(f"{value}: the adapter's base: {error}") from None
        return replace(model, source=f"{model.source}, with the adapter {value}", adapters=(*model.adapters, folder))
    name = Path(value).name.partition("@")[0]
    if folder.is_dir():
        config, source = config_of(folder), str(folder / "config.json")
    elif name in PUBLISHED:
        config, source = read_config(PUBLISHED[name]), f"what is published; {value} is not here"
    else:
        raise ValueError(f"model {value!r} is neither here nor in the hub's cache, and not one of those known by name: "
                         f"{', '.join(PUBLISHED)}")
    if not (folder / "tokenizer.json").is_file():
        folder = scratch
    return ModelInfo(name, config, Processor(folder, config), source)


def _model_of_stage(value, stages, scratch):
    name, _, file = value[1:].partition("/")
    stage = next(stage for stage in stages if stage.name == name)
    if isinstance(stage, Toy):
        family = MODEL_TYPE.get(file, MODEL_TYPE["student"])  # the checker is a student that learns on
        write_processor(scratch / family, family)
        config = make_model(scratch / family, family, 0).config
        return ModelInfo(f"toy {file}", config, Processor(scratch / family, config), f"stage {name}")
    if not isinstance(stage, TRAINING) or file not in ("", "best"):
        raise ValueError(f"model {value!r} is not known before the run")
    model = find_model(stage.model, stages, scratch)
    if stage.trainable != "lora":
        return replace(model, adapters=())  # training merges them
    lora = {"rank": stage.lora_rank, "alpha": stage.lora_alpha, "targets": stage.lora_targets}
    return replace(model, adapters=(*model.adapters, lora))
