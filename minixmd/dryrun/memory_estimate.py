"""Memory and operations of a stage's phases, by running the stage's own code on `meta` (meta_tracer.py).
Traced is the fullest case: passes of micro_batch_tokens or batch_tokens, completions at max_new_tokens, gradients of an
earlier micro-batch and the optimizer's state there already. All prompts of a stage are alike."""
from copy import deepcopy
from dataclasses import replace
from math import ceil

import torch
import torch.nn.functional as F

from minixmd.config import GRPO, TRAINING, Distill, FactCheck, Switch
from minixmd.config.stages import MOST_SLOTS
from minixmd.dryrun.meta_tracer import trace_memory
from minixmd.dryrun.sharded import shard_reading, shard_training
from minixmd.inputs.audio import SAMPLE_RATE
from minixmd.inputs.batch import Group
from minixmd.inputs.panns import HOP, MELS
from minixmd.learning import steps
from minixmd.learning.decoder import Decoder, prompt_rows
from minixmd.learning.logprobs import reference_logprobs
from minixmd.learning.policy import make_rollout
from minixmd.learning.rollout import PREFILL_TOKENS, Completion, prompt_slots_for
from minixmd.learning.targets import Item
from minixmd.learning.teacher import Teacher
from minixmd.models.cnn14 import Cnn14
from minixmd.models.lora import set_backend
from minixmd.stages.multiple_choice import BATCH_TOKENS, Writing, next_token_logits
from minixmd.stages.verifier import WIDTH
from minixmd.train import Trainer


def estimate(stage, model_info, prompt, gpus=1, teacher=None):
    """A stage's meta_tracer.Phases, in the order in which they run, of one of several processes. prompt: as in
    plan.StagePlan, with its target; of a Switch None, as model_info. teacher: of OnPolicy, the same two of its teacher.
    Raises ValueError: it cannot train this model."""
    if isinstance(stage, TRAINING):
        stage = replace(stage, batch_size=ceil(stage.batch_size / gpus))
    device = "cpu" if stage.device == "cpu" else "cuda"
    vocab_size = model_info.config.text.vocab_size if model_info else 0
    with trace_memory(vocab_size, device) as tracer:
        if isinstance(stage, Switch):
            trace_cnn14(tracer, stage, 2, stage.augment in ("both", "mixup"))
        else:
            model = model_info.on_meta(getattr(torch, stage.dtype))
            set_backend(model, "torch" if device == "cpu" or stage.backend == "torch" else "triton")
            if isinstance(stage, TRAINING):
                trainer = MetaTrainer(stage, model, model_info.processor, tracer, teacher)
                trace_training(tracer, trainer, prompt)
                if gpus > 1 and stage.trainable != "lora":
                    shard_training(tracer.phases, model, gpus)
                if gpus > 1 and getattr(stage, "teacher_place", None) == "sharded":
                    shard_reading(tracer.phases, trainer.teacher.model, gpus, "teacher")
            else:
                trace_answers(tracer, stage, model, prompt)
                if gpus > 1 and getattr(stage, "sharded", False):
                    shard_reading(tracer.phases, model, gpus)
    return tracer.phases


def trace_answers(tracer, stage, model, prompt):
    """A batch of an Evaluate, Label, Traces or FactCheck stage, and the training of a FactCheck's verifier."""
    if isinstance(stage, FactCheck):
        tracer.category = "activations"
        if isinstance(prompt, Group):  # of a clip, encoded once for all its traces
            prompt = replace(prompt, prompt=model.encode_media(prompt.prompt))
        else:
            prompt = model.encode_media(prompt)
    if getattr(stage, "writes", False):  # the pass for Traces' top_k takes no more than a prefill of as many tokens
        prompts = [prompt] * MOST_SLOTS
        prefill_tokens = getattr(stage, "batch_tokens", PREFILL_TOKENS)
        trace_writing(tracer, "generate", model, prompts, Writing.of(stage), prefill_tokens)
    else:
        trace_letters(tracer, "forward", model, prompt, stage.batch_tokens)
    if isinstance(stage, FactCheck) and stage.checker == "verifier":
        trace_cnn14(tracer, stage, WIDTH, mixup=False)


@torch.no_grad()
def trace_letters(tracer, phase, model, prompt, batch_tokens):
    """A pass over as many prompts as it takes."""
    count = max(1, batch_tokens // len(prompt))
    tracer.flops *= count  # one clip was encoded for all of them
    asked = len(prompt.completions) if isinstance(prompt, Group) else 1  # of one
    with tracer.phase(phase, count * len(prompt), sequences=count * asked):
        next_token_logits(model, [prompt] * count)


@torch.no_grad()
def trace_writing(tracer, phase, model, prompts, writing, prefill_tokens=PREFILL_TOKENS):
    """A prefill beside full decode slots, and a step at full length. The phase is of the prompts whose completions fill
    the slots."""
    n, length = writing.num_samples, len(prompts[0])
    slots = min(writing.slots, n * len(prompts))
    count = min(len(prompts), max(1, prefill_tokens // length))  # of a pass; of few slots fewer, so this is too much
    prompt_slots = prompt_slots_for(slots, n, len(prompts))
    encoding = tracer.flops * slots / n  # one clip was encoded for all of them
    tracer.flops = 0
    with tracer.phase(phase, count * length, "KV cache", slots / n) as traced:
        rows = prompt_rows(length, model.backend == "triton")
        decoder = Decoder(
            model, prompt_slots, rows, slots, n, max_new_tokens=writing.max_new_tokens,
            temperature=writing.temperature, suppressed_ids=[], end_id=0, backend=model.backend)
        tracer.category = "activations"
        held = tracer.current.total()
        decoder.prompt_of = [slot // n for slot in range(slots)]
        decoder.run(1)
        step_bytes = tracer.peak.total() - held  # which a captured step keeps for itself
        traced.step_flops, tracer.flops = tracer.flops, 0
        uniform_B = torch.zeros(count * n, dtype=torch.float64)
        taken = [i % prompt_slots for i in range(count)]
        logits_GV, *_ = decoder.prefill(prompts[:count], taken, uniform_B)  # held as long in Schedule
        tracer.flops = encoding + tracer.flops * slots / n / count
    if model.backend == "triton":
        traced.bytes["activations"] += step_bytes


class MetaTrainer(Trainer):
    """A Trainer on `meta`: it loads no weights, asks for no GPU and reads no file of the teacher's."""

    def __init__(self, stage, model, processor, tracer, teacher=None):
        self.loaded = model, processor
        self.tracer = tracer
        self.teacher_info, self.teacher_prompt = teacher or (None, None)
        super().__init__(stage, num_items=stage.batch_size)
        if stage.device != "cpu" and type(self.optimizer) is torch.optim.AdamW:
            for group in self.optimizer.param_groups:
                group["foreach"] = True  # what PyTorch chooses on a GPU

    def on_gpu(self):
        return self.stage.device != "cpu"

    def load_model(self, load):
        return self.loaded

    def load_teacher(self, load):
        info = self.teacher_info
        self.tracer.category = "teacher"
        model = info.on_meta(getattr(torch, self.stage.dtype))
        set_backend(model, self.model.backend)
        smaller = min(info.processor.vocab_size, self.processor.vocab_size)
        nothing = torch.zeros(1, dtype=torch.int64)
        device = self.model.device
        teacher = Teacher(self.stage, model, info.processor, device, smaller, nothing)
        self.tracer.category = "weights"
        return teacher

    def distilled_vocabulary(self):
        return self.processor.vocab_size, torch.zeros(1, dtype=torch.int64)


def trace_training(tracer, trainer, prompt):
    """A step whose optimizer has its state already, of several micro-batches the last, and validation."""
    stage = trainer.stage
    longest = len(prompt) + (stage.max_new_tokens if isinstance(stage, GRPO) else 0)
    if trainer.teacher is not None:
        longest = max(longest, len(trainer.teacher_prompt) + stage.max_new_tokens)
    if longest > stage.micro_batch_tokens:
        raise ValueError(f"{stage.name}: micro_batch_tokens {stage.micro_batch_tokens} is less than the {longest} of a "
                         "clip like the one shown, or of the teacher's prompt and what it reads")
    if isinstance(stage, GRPO) and stage.beta:
        held = [value for value in trainer.reference.values.values() if value.is_meta]
        tracer.recategorize(held, "reference")
    tracer.count_gradients(trainer.parameters.values())
    add_gradients(tracer, trainer)
    tracer.flops = 0  # of an adapter that was merged
    with tracer.phase("optimizer", category="optimizer"):
        trainer.update({"loss": trainer.zero()})
    optimizer_step = tracer.phases.pop()
    if isinstance(stage, GRPO):
        trace_grpo(tracer, trainer, prompt)
    else:
        topk, ids, compute_gradients = None, None, trainer.sft_gradients
        if isinstance(stage, Distill):
            compute_gradients = trainer.distill_gradients
            topk = dict(ids=range(64), logits=[0.0] * 64, logsumexp=5.0, temperature=stage.temperature)
        elif stage.teacher_loss == "kl":
            ids = range(int(prompt.target_N.sum()))
            stored = 64 * len(ids)
            topk = dict(ids=[0] * stored, logprobs=[-5.0] * stored)
        count = min(stage.batch_size, stage.micro_batch_tokens // len(prompt))
        micro_batches = trainer.micro_batches([(prompt, Item(None, 0, "teacher", topk, ids))] * count)
        if count < stage.batch_size:
            add_gradients(tracer, trainer)
        with tracer.phase("update", count * len(prompt), sequences=count):
            compute_gradients(micro_batches, steps.count(micro_batches))
    tracer.phases.append(optimizer_step)
    if stage.val_manifest is not None:
        trainer.optimizer.zero_grad()
        if getattr(stage, "writes", False):
            writing = Writing(stage.max_new_tokens, slots=stage.slots)
            trace_writing(tracer, "validation", trainer.model, [prompt] * MOST_SLOTS, writing)
        else:
            trace_letters(tracer, "validation", trainer.model, prompt, BATCH_TOKENS)


def add_gradients(tracer, trainer):
    """Gradients as an earlier micro-batch leaves them."""
    tracer.category = "gradients"
    for p in trainer.parameters.values():
        p.grad = torch.zeros_like(p)


def trace_grpo(tracer, trainer, prompt):
    """A step's rollout, and of its last micro-batch the reference's log-probs and the gradients."""
    stage, model = trainer.stage, trainer.model
    G, T = stage.group_size, stage.max_new_tokens
    tracer.category = "activations"
    prompts = [prompt] * stage.batch_size
    if model.encoders_frozen():
        encoded = model.encode_media(prompt)
        prompts = [deepcopy(encoded) for _ in prompts]
    if stage.samples == "student":
        writing = Writing(T, G, stage.temperature, slots=stage.slots)
        trace_writing(tracer, "rollout", model, prompts, writing)
    ids, logprobs = (0,) * T, (0.0,) * T
    completion = Completion("", ids, logprobs, finished=True)
    reward_PG = torch.arange(G).float().expand(len(prompts), G)
    teacher_prompts = [trainer.teacher_prompt] * len(prompts)
    rollout = make_rollout(stage, prompts, [[completion] * G] * len(prompts), reward_PG, teacher_prompts)
    several = len(rollout.micro_batches) > 1
    del rollout.micro_batches[1:]
    tokens = sum(map(len, rollout.micro_batches[0]))
    share = sum(len(group.completions) for group in rollout.micro_batches[0]) / G  # prompts with all G completions
    if trainer.teacher is not None:
        tracer.category = "teacher"
        teacher = trainer.teacher.frozen_model()
        longer = len(trainer.teacher_prompt) - len(prompt)
        groups = len(rollout.micro_batches[0])
        with tracer.phase("reading", tokens + groups * longer, sequences=share):
            trainer.read_by_teacher(rollout, teacher_prompts, teacher)
        del teacher
    if stage.beta:
        tracer.category = "reference"
        reference = trainer.reference.frozen_model()
        with tracer.phase("scoring", tokens, sequences=share):
            rollout.ref_T = reference_logprobs(reference, rollout.micro_batches, trainer.vocabulary)
        del reference
    if several:
        add_gradients(tracer, trainer)
    with tracer.phase("update", tokens, sequences=share):
        trainer.policy_gradient(rollout)


def trace_cnn14(tracer, stage, classes, mixup):
    """The second training step of a Cnn14, by a stage's batch_size, clip_s and width."""
    tracer.category = "weights"
    with torch.device("meta"):
        model = Cnn14(classes, stage.width)
    parameters = [p for p in model.parameters() if p.requires_grad]
    tracer.count_gradients(parameters)
    optimizer = torch.optim.Adam(parameters, foreach=stage.device != "cpu")
    clips = (1 + mixup) * stage.batch_size
    frames = round(stage.clip_s * SAMPLE_RATE) // HOP + 1
    for _ in range(2):
        with tracer.phase("training", sequences=clips):
            x_B1AM = model.normalise(torch.empty(clips, frames, MELS, device="meta"))
            if mixup:
                x_B1AM = x_B1AM[0::2] + x_B1AM[1::2]
            logits_BK = model.fc_audioset(model.embed(x_B1AM, torch.Generator()))
            target_B = torch.zeros(stage.batch_size, dtype=torch.int64, device="meta")
            F.cross_entropy(logits_BK, target_B).backward()
            tracer.category = "optimizer"
            optimizer.step()
            optimizer.zero_grad()
    del tracer.phases[-2]
