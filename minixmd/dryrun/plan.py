"""--dry-run: prompts, memory and hours of a config's stages, by their own code, without weights, data or network."""
import re
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase

from jinja2 import Environment, FileSystemLoader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from minixmd.config import GRPO, SFT, Distill, FactCheck, OnPolicy, Switch, Traces
from minixmd.config.field_checks import kind
from minixmd.config.references import absent_files, input_paths
from minixmd.dryrun import costs
from minixmd.dryrun.memory_estimate import estimate
from minixmd.dryrun.meta_tracer import CATEGORIES
from minixmd.dryrun.models import CLIP_S, VIDEO_FPS, VIDEO_SIZE, ModelInfo, blank_clip, find_model
from minixmd.inputs.batch import Group, Prompt
from minixmd.inputs.examples import Example, build_conversation, read_manifest
from minixmd.inputs.prompts import build_prompt
from minixmd.models.families import FAMILIES, SYSTEM
from minixmd.stages import factcheck
from minixmd.stages.input_checks import check_inputs
from minixmd.stages.verifier import text_prompt
from minixmd.tasks.answers import thoughts
from minixmd.toy.models import QWEN2_WORDS

EXAMPLE = Example("example", "clip", "clip", "Which of these makes the sound that is heard the most in this clip?",
                  ("a dog that barks", "a car that passes", "people who talk", "rain on a roof"), 0)
TRACE = "<think>I hear it bark twice.</think><answer>A</answer>"
NO_EFFECT_ON_MEMORY = frozenset(  # fields of stages; of "traces" and "val_manifest" only whether they are set matters
    "name model manifest val_manifest val_limit prompt teacher_labels student_labels switch gate traces trace_filter "
    "rule limit threshold lr warmup_ratio weight_decay max_grad_norm betas eps epochs max_steps eval_every save_every "
    "max_bad seed completions_every".split())
NO_CLIPS = {}  # no manifest is here
TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)


@dataclass
class StagePlan:
    stage: object
    clips: int  # that it reads, or their traces
    others: int  # clips of val_manifest or train_manifest
    assumed: bool  # whether the number of clips is
    model: ModelInfo | None = None  # of a stage that runs one here
    prompt: Prompt | Group | None = None  # as long as any that the stage makes; a Group of a clip's traces to judge
    longest: int = 1  # tokens of it and of what a GRPO stage writes after it, which a pass must take
    teacher: tuple | None = None  # of OnPolicy: its teacher's ModelInfo and Prompt
    shown: str = ""  # a typical prompt, as text
    writes: bool = False  # whether the model writes answers of its own
    phases: list = field(default_factory=list)  # meta_tracer.Phase
    hours: float = 0.0  # on the GPUs
    serial: float = 0.0  # of them, those in which one works alone
    hours_of_one: float = 0.0  # on one GPU
    slots: dict = field(default_factory=dict)  # card -> what decode_slots "auto" is there
    same_as: str = ""  # the name of the first stage that takes this memory
    fault: str = ""  # why the stage cannot run


def dry_run(config, gpus=1):
    """Prints what a config would do on so many GPUs. Returns the exit status: 1 where it surely cannot run."""
    clips = read_manifests(config)
    with tempfile.TemporaryDirectory() as scratch:
        write_stand_in_tokenizer(Path(scratch), config.stages, clips)
        plans = [plan_stage(stage, config.stages, Path(scratch), clips) for stage in config.stages]
    print(TEMPLATES.get_template("stages.txt.j2").render(config=config, plans=plans, kind=kind), flush=True)
    estimate_memory(plans, gpus)  # takes a while for large models
    missing = {value: on_hub for _, _, value, on_hub in absent_files(config.stages)}
    print(TEMPLATES.get_template("memory.txt.j2").render(
        plans=plans, missing=missing, categories=CATEGORIES, costs=costs, clip_s=CLIP_S, fps=VIDEO_FPS,
        size=VIDEO_SIZE, gpus=gpus), flush=True)
    faults = [plan.fault for plan in plans if plan.fault]
    try:
        check_inputs(config, clips=False)
    except ValueError as error:
        faults.append(str(error))
    for fault in faults:
        print(f"minixmd: {fault}", file=sys.stderr)
    return int(bool(faults))


def read_manifests(config):
    """{(stage's name, field): Examples} of the manifests that are here; of broken ones check_inputs will tell."""
    found = {}
    for stage in config.stages:
        for name, path in input_paths(stage, config.run_dir, config.stages).items():
            if "manifest" in name:
                with suppress(ValueError, OSError):
                    found[stage.name, name] = read_manifest(path, stage.allow_outside)
    return found


def first_example(stage, clips):
    """The first of a stage's manifest, with a blank clip; a made-up one where there is none."""
    first = clips.get((stage.name, "manifest"), [EXAMPLE])[0]
    return replace(first, audio="clip", video="clip", answer=first.answer or 0)


def plan_stage(stage, stages, scratch, clips=NO_CLIPS):
    """The StagePlan of a stage, without its memory. scratch: of the stand-in tokenizer. clips: of read_manifests."""
    example = first_example(stage, clips)
    counts = {}
    for (name, field_name), found in clips.items():
        if name == stage.name:
            counts[field_name] = len(found)
    items, traces = costs.count_items(stage, stages, counts.get("manifest", costs.CLIPS))
    others = counts.get("train_manifest" if isinstance(stage, Switch) else "val_manifest", costs.CLIPS)
    plan = StagePlan(stage, items, others, "manifest" not in counts)
    plan.writes = getattr(stage, "writes", False) and not isinstance(stage, SFT)  # which writes to validate
    try:
        if getattr(stage, "model", None):
            plan.model = find_model(stage.model, stages, scratch)
            processor = plan.model.processor
            writers = [other for other in stages if isinstance(other, Traces)]
            if isinstance(stage, SFT):
                writers = [stage]
            trace_tokens = max((writer.max_new_tokens for writer in writers), default=512)
            longest_trace = " the" * ((trace_tokens - 1) // len(processor.encode(" the")))
            room = stage.max_new_tokens if plan.writes else 0
            plan.prompt = example_prompt(stage, example, processor, longest_trace, room)
            plan.longest = len(plan.prompt) + (stage.max_new_tokens if isinstance(stage, GRPO) else 0)
            typical = example_prompt(stage, example, processor, TRACE)
            text = processor.tokenizer.decode(typical.ids_N.tolist(), skip_special_tokens=False)
            text = re.sub(r"(<\|\w+\|>)\1+", lambda run: f"{run[1]} x {len(run[0]) // len(run[1])}", text)
            plan.shown = f"{text}\n({len(plan.prompt):,} tokens)"
            if isinstance(stage, OnPolicy) and stage.teacher_weight:
                info = find_model(stage.teacher_model, stages, scratch)
                seen = build_prompt(info.processor, example, stage.teacher_format, load=blank_clip, max_new_tokens=room)
                plan.teacher = info, seen
                plan.longest = max(plan.longest, len(seen) + stage.max_new_tokens)
                plan.shown += f"\nThe teacher's has {len(seen):,} tokens."
            if getattr(stage, "checker", None) == "model" and traces > 1:
                pairs = [(stage, plan.prompt)] * traces + [(stage, typical)]  # whose trace begins with another word
                _, group = next(factcheck.share_prefix(pairs, stage.batch_tokens))
                plan.prompt = replace(group, completions=group.completions[:traces])
        elif getattr(stage, "endpoint", None):
            plan.shown = f"{question_text(stage, example)}\n(and the clip, to {stage.endpoint})"
    except (ValueError, OSError) as error:
        plan.fault = f"{stage.name}: {error}"
    return plan


def plan_alone(stage, stages):
    """The StagePlan of one stage, whatever its manifest holds. Raises ValueError: why it cannot run."""
    with tempfile.TemporaryDirectory() as scratch:
        write_stand_in_tokenizer(Path(scratch), stages)
        plan = plan_stage(stage, stages, Path(scratch))
    if plan.fault:
        raise ValueError(plan.fault)
    return plan


def example_prompt(stage, example, processor, trace, max_new_tokens=0):
    """The Prompt that a stage makes of an Example and a trace, with the answer where one is learnt."""
    if isinstance(stage, FactCheck) and stage.checker == "verifier":  # the decoder reads nothing but the trace
        return text_prompt(processor, thoughts(trace))
    return processor(example_conversation(stage, example, trace), blank_clip, max_new_tokens)


def example_conversation(stage, example, trace):
    if isinstance(stage, FactCheck):
        return factcheck.conversation(stage.prompt, example, trace)
    answer = None
    if isinstance(stage, (SFT, Distill)):
        answer = trace if getattr(stage, "traces", None) else example.answer
    return build_conversation(example, media=stage.media, prompt=stage.prompt, answer=answer, trace=trace,
                              video_options=stage.prompt_format.video_options)


def question_text(stage, example):
    """What a stage writes beside the clip."""
    return example_conversation(stage, example, TRACE)[0]["content"][-1]["text"]


def write_stand_in_tokenizer(folder, stages, clips=NO_CLIPS):
    """A tokenizer.json with a token for each word and sign of the stages' prompts, cut as Qwen2 cuts them."""
    texts = [f"system\n{SYSTEM}", "user\nAudio 1: ", "assistant\n", TRACE, "\n", *ascii_uppercase]
    for stage in stages:
        if hasattr(stage, "prompt"):
            texts.append(question_text(stage, first_example(stage, clips)))
    tokenizer = Tokenizer(models.WordLevel(unk_token="\ufffd"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["\ufffd"], show_progress=False))
    media_tokens = re.findall(r"<\|\w+\|>", str(FAMILIES))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", *sorted(set(media_tokens))])
    tokenizer.save(str(folder / "tokenizer.json"))


def estimate_memory(plans, gpus):
    estimated = {}  # what memory depends on -> the first such stage's name and Phases, on one GPU and on several
    todo = [plan for plan in plans if plan.prompt or isinstance(plan.stage, Switch)]
    for plan in tqdm(todo, desc="memory", unit="stage", leave=False):
        stage = plan.stage
        settings = {name: value for name, value in vars(stage).items() if name not in NO_EFFECT_ON_MEMORY}
        is_set = [getattr(stage, name, None) is not None for name in ("traces", "val_manifest")]
        tokens = plan.prompt and len(plan.prompt)
        key = repr((type(stage), plan.model, tokens, settings, is_set))
        try:
            if key not in estimated:
                of_one = estimate_stage(plan, 1)
                estimated[key] = stage.name, of_one, estimate_stage(plan, gpus) if gpus > 1 else of_one
        except ValueError as error:
            plan.fault = str(error)
            continue
        plan.same_as, of_one, of_all = estimated[key]
        plan.phases, busy, plan.slots = of_all
        if stage.device != "cpu":
            plan.hours_of_one, _ = costs.stage_hours(stage, of_one[1], plan.clips, plan.others)
            plan.hours, plan.serial = costs.stage_hours(stage, busy, plan.clips, plan.others, gpus)


def estimate_stage(plan, gpus):
    """(Phases of a stage; those by which its hours are counted; {card: decode_slots}). With decode_slots "auto" the
    first are of the fewest that are tried, and the second of as many as the largest card has room for."""
    def phases_with(**changes):
        return estimate(replace(plan.stage, **changes), plan.model, plan.prompt, gpus, plan.teacher)

    if not costs.has_open_slots(plan.stage) or plan.stage.device == "cpu":
        phases = phases_with()
        return phases, phases, {}
    few, slots = fit_slots(plan, gpus, costs.CARDS)
    most = max(1, *slots.values())
    return few, phases_with(decode_slots=most), slots


def fit_slots(plan, gpus, cards):
    """(Phases with the fewest decode_slots that are tried, {card: those that it has room for, or 0}). cards: {card: GiB
    that programs find there}."""
    tried = []
    for slots in costs.slots_tried(plan.stage):
        stage = replace(plan.stage, decode_slots=slots)
        tried.append(estimate(stage, plan.model, plan.prompt, gpus, plan.teacher))
    fitting = {}
    for card, gib in cards.items():
        fitting[card] = costs.slots_that_fit(plan.stage, *tried, gib)
    return tried[0], fitting
