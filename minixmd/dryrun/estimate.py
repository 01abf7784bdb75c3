"""What a stage would take, without its weights: a model as far as config.json tells, and the memory of the stage's own
code, part by part, run on `meta` (learning/memory.py).

What is traced is the fullest case: passes of micro_batch_size or batch_tokens, completions at max_new_tokens, gradients
of earlier micro-batches and the optimizer's state there already. All prompts are alike, with clips of CLIP_S.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache

from minixmd.config import GRPO, TRAINING, Distill, Evaluate, FactCheck, Label, Switch, Toy, Traces
from minixmd.dryrun.memory import tracing
from minixmd.dryrun.shapes import PUBLISHED
from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.batch import pack
from minixmd.inputs.image import sample_frames, smart_resize
from minixmd.inputs.panns import HOP, MELS
from minixmd.inputs.tokenizer import Processor
from minixmd.learning.logprobs import reference_logprobs
from minixmd.learning.policy import make_rollout
from minixmd.learning.rollout import Completion, Decoder
from minixmd.learning.targets import Item
from minixmd.models.cnn14 import Cnn14
from minixmd.models.families import ModelConfig, read_config
from minixmd.models.lora import add_lora, set_backend
from minixmd.models.weights import build, config_of, load_adapter
from minixmd.runs.files import read_json
from minixmd.runs.hub_names import parse_hub_name
from minixmd.stages.multiple_choice import BATCH_TOKENS, Writing
from minixmd.stages.traces import CLIPS
from minixmd.stages.verifier import WIDTH
from minixmd.toy.models import make_model, write_processor
from minixmd.toy.pretrain import FAMILY
from minixmd.train import Trainer

CLIP_S, RATE, FRAME = 10, 30, (720, 1280)  # seconds; frames a second; height and width
PARTS = ("weights", "reference", "gradients", "optimizer", "keys, values", "logits", "activations")
TOP = 64  # best ids of a teacher

# ---- a model without its weights ----


@dataclass(frozen=True)
class Found:
    """A model as far as it is known."""

    name: str
    config: ModelConfig
    processor: Processor
    source: str  # where its config.json was found
    adapters: tuple = ()  # that it carries: items of add_lora's arguments, or a PEFT folder

    def load(self, dtype):
        """On `meta`, frozen, in `dtype`, with its adapters."""
        model = build(self.config).to(dtype)
        for how in self.adapters:
            load_adapter(model, how) if isinstance(how, Path) else add_lora(model, **dict(how), seed=0)
        return model.requires_grad_(False)


class Listener(Processor):
    """Reads no file: every clip is silent and black, and lasts CLIP_S."""

    def _audio(self, source):
        return super()._audio(torch.zeros(CLIP_S * SAMPLE_RATE))

    def _video(self, part):
        count = len(sample_frames(CLIP_S * RATE, RATE, fps=part["fps"], nframes=part["nframes"]))
        size = smart_resize(*FRAME, min_pixels=part["min_pixels"], max_pixels=part["max_pixels"])
        return super()._video({**part, "video": torch.zeros(count, 3, *size, dtype=torch.uint8)})


def find(value, stages, home):
    """The Found that a stage's field `model` stands for: by the config.json of its folder or in the hub's cache, else
    by its name. home: a folder with a tokenizer.json, which stands in where the model's is not here.

    Raises:
        ValueError: nothing is known of it, or it is none of our families.
    """
    name, _, file = value[1:].partition("/")
    by = next((item for item in stages if value.startswith("@") and item.name == name), None)
    if isinstance(by, TRAINING) and file in ("", "best"):
        found = find(by.model, stages, home)
        how = dict(rank=by.lora_rank, alpha=by.lora_alpha, targets=by.lora_targets)
        return replace(found, adapters=(*found.adapters, tuple(how.items())) if by.trainable == "lora" else ())
    if isinstance(by, Toy):
        family, _ = FAMILY.get(file, FAMILY["student"])  # what is neither student nor teacher goes on from the student
        write_processor(home / family, family)
        config = make_model(home / family, family, 0).config
        return Found(f"toy {file}", config, Listener(home / family, config), f"made by stage {name}")
    if by is not None:
        raise ValueError(f"model {value!r} is not known before the run")
    folder = Path(value)
    if not folder.is_dir() and parse_hub_name(value):
        repo, revision = parse_hub_name(value)
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    if (folder / "adapter_config.json").is_file():
        base = find(str(read_json(folder / "adapter_config.json").get("base_model_name_or_path")), stages, home)
        return replace(base, source=f"{base.source}, with the adapter {value}", adapters=(*base.adapters, folder))
    name = Path(value).name.partition("@")[0]
    if folder.is_dir():
        config, source = config_of(folder), str(folder / "config.json")
    elif name in PUBLISHED:
        config, source = read_config(PUBLISHED[name]), f"its name alone, as published; {value} is not here"
    else:
        raise ValueError(f"model {value!r} is neither here nor in the hub's cache, and not one of those known by name: "
                         f"{', '.join(PUBLISHED)}")
    if (folder / "tokenizer.json").is_file():
        return Found(name, config, Listener(folder, config), source)
    return Found(name, config, Listener(home, replace(config, section={})), source)  # section: ids of its own tokenizer


# ---- the memory of a stage ----


@dataclass(frozen=True)
class Row:
    """One thing that a stage does."""

    doing: str
    tokens: int  # packed into a pass; 0 where none are
    parts: dict[str, int]  # bytes of PARTS at the moment when their sum is the largest

    @property
    def total(self):
        return sum(self.parts.values())


def estimate(stage, found, prompt):
    """A stage's Rows.

    Args:
        found: its model, and prompt: an example's Prompt, with the answer where it is learnt; None of a Switch.
    Raises:
        ValueError: the stage cannot train this model.
    """
    device = "cpu" if stage.device == "cpu" else "cuda"
    backend = "torch" if device == "cpu" or getattr(stage, "backend", "") == "torch" else "triton"
    with tracing(found.config.text.vocab_size if found else 0, device) as live:
        if isinstance(stage, Switch):
            return [classifying(live, stage, 2, stage.augment in ("both", "mixup"))]
        model = found.load(getattr(torch, stage.dtype))
        set_backend(model, backend)
        if isinstance(stage, TRAINING):
            return list(training(live, stage, model, found.processor, prompt, backend))
        if isinstance(stage, FactCheck):
            return list(judging(live, stage, model, prompt))
        count = max(1, stage.batch_tokens // len(prompt))
        if isinstance(stage, Label) or isinstance(stage, Evaluate) and stage.answer == "letters":
            return [reading(live, model, [prompt] * count)]
        if isinstance(stage, Traces):
            count, decode_slots = CLIPS, stage.decode_slots or 8 * stage.num_samples
        else:
            decode_slots = Writing(stage.max_new_tokens, stage.num_samples,
                                   stage.temperature).decode_slots(stage.batch_tokens) or count
        return [writing(live, stage, model, found.processor, [prompt] * count, stage.num_samples, decode_slots)]


def reading(live, model, prompts, doing="reading"):
    """A pass over prompts, and the logits that follow each."""
    live.watch("activations")
    with torch.no_grad():
        batch = pack(prompts).to("meta")
        last_B = torch.tensor([end - 1 for _, end in batch.spans], device="meta")
        model.logits(model(batch)[last_B])
    return Row(doing, len(batch.ids_N), live.most)


def writing(live, stage, model, processor, prompts, n, decode_slots, doing="writing"):
    """The prompts that the decode_slots have room for, and a step of n completions of each, at full length."""
    prompt_slots, longest = min(decode_slots // n, len(prompts)), max(map(len, prompts))
    temperature = 0.0 if doing == "validation" else stage.temperature
    live.watch("keys, values")
    with torch.no_grad():
        decoder = Decoder(model, prompt_slots, longest, n, max_new_tokens=stage.max_new_tokens, temperature=temperature,
                          suppressed_ids=[], end_id=processor.end_id, backend=model.backend)
        live.part = "activations"
        uniform_BT = torch.zeros(prompt_slots * n, stage.max_new_tokens, dtype=torch.float64)
        logits_GV, *_ = decoder.fill(prompts[:prompt_slots], list(range(prompt_slots)), uniform_BT)
        decoder.run(1)
        del logits_GV  # which rollout.decode keeps as long
    return Row(doing, prompt_slots * longest, live.most)


def judging(live, stage, model, prompt):
    """FactCheck by a model, or by a verifier, for which a model reads the traces."""
    live.watch("activations")
    heard = model.encode_media(prompt)
    yield reading(live, model, [heard] * max(1, stage.batch_tokens // len(heard)))
    if stage.checker == "verifier":
        yield classifying(live, stage, WIDTH, False)


def training(live, stage, model, processor, prompt, backend):
    """An optimizer step that is not the first of its run."""
    alone = replace(stage, device="cpu", backend="torch")  # asks for no GPU
    if isinstance(stage, Distill):
        alone = replace(alone, teacher_loss="ce")  # and for no labels
    trainer = Trainer(alone, stage.batch_size, load=lambda *_, **__: (model, processor))
    trainer.stage, trainer.common_vocab = stage, processor.vocab_size
    set_backend(model, backend)
    reference = getattr(trainer, "reference", None)
    if reference is not None:
        set_backend(reference, backend)
        policy = {p.untyped_storage()._cdata for p in model.parameters()}
        live.move([p for p in reference.parameters() if p.untyped_storage()._cdata not in policy], "reference")
    if stage.device != "cpu" and type(trainer.optimizer) is torch.optim.AdamW:
        for group in trainer.optimizer.param_groups:
            group["foreach"] = True  # as torch chooses on a GPU
    for p in trainer.parameters.values():
        p.register_post_accumulate_grad_hook(lambda p: live.move([p.grad], "gradients"))
    add_gradients(live, trainer)
    live.watch("optimizer")
    trainer.update(1.0)
    stepped = Row("optimizer", 0, live.most)
    if isinstance(stage, GRPO):
        yield from reinforcing(live, stage, trainer, prompt)
    else:
        topk = None
        if isinstance(stage, Distill) and stage.teacher_loss != "ce":
            topk = {"ids": list(range(TOP)), "logits": [0.0] * TOP, "temperature": stage.temperature, "logsumexp": 5.0}
            trainer.suppressed_Z = torch.zeros(1, dtype=torch.int64, device="meta")
        samples = [(prompt, Item(None, 0, "teacher", topk))] * stage.micro_batch_size
        if stage.batch_size > stage.micro_batch_size:
            add_gradients(live, trainer)
        live.watch("activations")
        (trainer.distill_gradients if isinstance(stage, Distill) else trainer.sft_gradients)(samples)
        yield Row("update", len(prompt) * len(samples), live.most)
    yield stepped
    if stage.val_manifest is not None:
        trainer.optimizer.zero_grad()
        prompts = [prompt] * max(1, BATCH_TOKENS // len(prompt))
        if isinstance(stage, GRPO) or getattr(stage, "traces", None) is not None:
            yield writing(live, stage, model, processor, prompts, 1, len(prompts), "validation")
        else:
            yield reading(live, model, prompts, "validation")


def reinforcing(live, stage, trainer, prompt):
    """GRPO: completions, their reference's log-probabilities, and the gradients of a micro-batch of prompts."""
    live.watch("activations")
    model, prompts = trainer.model, [prompt] * stage.batch_size
    if model.encoders_frozen():
        one = model.encode_media(prompt)
        prompts = [replace(one, media=tuple(replace(m, features=m.features.clone()) for m in one.media))
                   for _ in prompts]
    G, T = stage.group_size, stage.max_new_tokens
    yield writing(live, stage, model, trainer.processor, prompts, G, stage.decode_slots or G * len(prompts), "rollout")
    said, part = Completion("", (0,) * T, (0.0,) * T, True), prompts[:stage.micro_batch_size]
    rollout = make_rollout(stage, part, [[said] * G] * len(part), torch.arange(G).float().repeat(len(part), 1))
    tokens = len(part) * (len(prompt) + G * T)
    if stage.beta:
        live.watch("activations")
        rollout.ref_T = reference_logprobs(trainer.reference, rollout.groups, stage.micro_batch_size,
                                           trainer.vocabulary)
        yield Row("scoring", tokens, live.most)
    if stage.batch_size > stage.micro_batch_size:
        add_gradients(live, trainer)
    live.watch("activations")
    trainer.policy_gradient(rollout)
    yield Row("update", tokens, live.most)


def add_gradients(live, run):
    """Those of an earlier micro-batch."""
    live.watch("gradients")
    for p in run.parameters.values():
        p.grad = torch.zeros_like(p)


def classifying(live, stage, classes, mixed):
    """Training steps of a Cnn14."""
    live.watch("weights")
    with torch.device("meta"):
        model = Cnn14(classes, stage.width)
    model.to("meta")  # its front end was not made there
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, foreach=stage.device != "cpu")
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: live.move([p.grad], "gradients"))
    frames = round(stage.clip_s * SAMPLE_RATE) // HOP + 1
    for _ in range(2):
        live.watch("activations")
        x_B1AM = model.normalise(torch.empty(stage.batch_size * (2 if mixed else 1), frames, MELS, device="meta"))
        if mixed:
            x_B1AM = x_B1AM[0::2] + x_B1AM[1::2]
        out_BK = model.fc_audioset(model.embed(x_B1AM, torch.Generator()))
        F.cross_entropy(out_BK, torch.zeros(len(out_BK), dtype=torch.int64, device="meta")).backward()
        live.part = "optimizer"
        optimizer.step()
        optimizer.zero_grad()
    return Row("learning", 0, live.most)
