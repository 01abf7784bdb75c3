"""--dry-run: what a config asks its models and what memory each stage would take; it needs no weights, data or network.

Prompts are what the stages' own code makes of one example, memory is that of the stages' own code (estimate.py).
"""
import re
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from textwrap import fill

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from minixmd.config import GRPO, TRAINING, Evaluate, FactCheck, Label, Switch, Toy, Traces
from minixmd.config.references import input_paths
from minixmd.config.schema import kind
from minixmd.dryrun.estimate import CLIP_S, FRAME, PARTS, RATE, estimate, find
from minixmd.inputs.batch import Prompt
from minixmd.inputs.examples import Example, build_conversation
from minixmd.inputs.positions import positions_of
from minixmd.inputs.prompts import build_prompt, check_length
from minixmd.models.families import FAMILIES, SYSTEM
from minixmd.models.weights import build
from minixmd.runs.hub_names import parse_hub_name
from minixmd.stages.factcheck import conversation
from minixmd.tasks.answers import thoughts
from minixmd.toy.models import QWEN2_WORDS

EXAMPLE = Example("example", "clip", "clip", "Which of these makes the sound that is heard the most in this clip?",
                  ("a dog that barks", "a car that passes", "people who talk", "rain on a roof"), 0)
TRACE = "<think>I hear it bark twice.</think><answer>A</answer>"
SHOWN = 800  # characters of a prompt
GIB = 1 << 30
CARDS = {"80 GB": 79, "141 GB": 139}  # GiB that such a card has
SHARE, DRIVER = 0.05, 1.0  # of the tensors, what an allocator cannot use; GiB of the driver and the libraries
TITLES = ("weights", "refer.", "grads", "optim.", "k, v", "logits", "activ.")  # of PARTS
APART = frozenset(  # fields on which no memory depends; of some only that they are set
    "name model manifest val_manifest prompt teacher_labels student_labels switch gate traces trace_filter rule threshold "
    "limit lr warmup_ratio weight_decay max_grad_norm betas eps epochs max_steps eval_every save_every max_bad seed "
    "completions_every".split())
ASSUMED = f"""Assumed: clips of {CLIP_S} s, with {RATE} frames a second of {FRAME[1]} x {FRAME[0]}; questions like the \
one shown; traces and completions at max_new_tokens; a token for each word and sign, where a model's tokenizer is not \
here; for device "auto" a GPU, with fused attention."""
LEGEND = f"""tokens: packed into a pass. refer.: GRPO's reference. optim.: moments, and masters of bf16 weights. k, v: \
keys and values. It is what tensors hold when they hold the most. What an allocator cannot use (about {SHARE:.0%}), \
the driver and the libraries (about {DRIVER:g} GiB) come on top; a card has room if those fit too."""


# ---- prompts ----


def know(stage, stages, home):
    """(Found, Prompt, what it reads like) of a stage that runs a model here. What stands for a trace is as long as any
    may be, and short where it is to be read.

    Raises:
        ValueError: the model is not known, or cannot be asked so.
    """
    found = find(stage.model, stages, home)
    by, size = stage, len(found.processor.encode(" the"))
    while isinstance(by, (Evaluate, FactCheck)):  # up to who writes the traces
        by = next((item for item in stages if by.traces and by.traces[1:].partition("/")[0] == item.name), None)
    trace = " the" * ((getattr(by, "max_new_tokens", 512) - 1) // size)
    prompt = ask_example(stage, found.processor, trace)
    written = isinstance(stage, Traces) or "generate" == getattr(stage, "answer", "") or \
        isinstance(stage, GRPO)
    check_length(found.processor, EXAMPLE, prompt, stage.max_new_tokens if written else 0)
    text = found.processor.tokenizer.decode(ask_example(stage, found.processor, TRACE).ids_N.tolist(),
                                            skip_special_tokens=False)
    for sign in {sign for _, sign, _ in filter(None, (found.config.family.audio, found.config.family.video))}:
        text = re.sub(f"(?:{re.escape(sign)})+", lambda run, sign=sign: f"{sign} x {len(run[0]) // len(sign)}", text)
    short = text if len(text) <= SHOWN else f"{text[:SHOWN // 2]} […] {text[-SHOWN // 2:]}"
    return found, prompt, f"{short}\n({len(prompt):,} tokens)"


def ask_example(stage, processor, trace):
    """The Prompt of EXAMPLE, with the answer where it is learnt."""
    if isinstance(stage, FactCheck) and stage.checker == "verifier":  # whose decoder reads nothing but the trace
        ids = processor.encode(thoughts(trace))
        return Prompt(torch.tensor(ids), positions_of(len(ids), []))
    if isinstance(stage, FactCheck):
        return processor(conversation(stage, EXAMPLE, trace))
    answer = None
    if isinstance(stage, TRAINING) and not isinstance(stage, GRPO):
        answer = EXAMPLE.answer if getattr(stage, "traces", None) is None else trace
    return build_prompt(processor, EXAMPLE, stage.prompt_format, answer,
                        "" if isinstance(stage, TRAINING) else trace)


def stand_in(folder, stages):
    """Writes a tokenizer.json with a token for each word and sign of all prompts, cut as Qwen2 cuts them."""
    special, texts = ["<|im_start|>", "<|im_end|>"], [f"system\n{SYSTEM}", "user\n", "assistant\n", TRACE, "\n", "A"]
    for parts in {parts for family in FAMILIES.values() for parts in (family.audio, family.video) if parts}:
        for part in parts:
            special += re.findall(r"<\|\w+\|>", part)
            texts += [text.format(n=1) for text in re.split(r"<\|\w+\|>", part)]
    texts += [question(item) for item in stages if hasattr(item, "prompt")]
    tokenizer = Tokenizer(models.WordLevel(unk_token="\ufffd"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["\ufffd"], show_progress=False))
    tokenizer.add_special_tokens(sorted(set(special)))
    tokenizer.save(str(folder / "tokenizer.json"))


def question(stage):
    """The text that a stage puts beside the clip."""
    [turn] = (conversation(stage, EXAMPLE, TRACE) if isinstance(stage, FactCheck) else
              build_conversation(EXAMPLE, media="audio", prompt=stage.prompt, trace=TRACE))
    return turn["content"][-1]["text"]


# ---- what is printed ----


def does(stage):
    if isinstance(stage, (Evaluate, Label)) and getattr(stage, "answer", "letters") == "letters":
        return f"reads the letters' logits, {stage.batch_tokens:,} tokens a pass"
    if isinstance(stage, (Evaluate, Traces)):
        how = f"{stage.num_samples} samples" if stage.num_samples > 1 else "one sample" if stage.temperature else "greedily"
        return f"writes up to {stage.max_new_tokens} tokens, {how}"
    if isinstance(stage, FactCheck):
        by = {"model": "a model that hears", "endpoint": "an endpoint", "verifier": "a trained verifier",
              "verdicts": stage.verdicts}[stage.checker]
        return f"{stage.traces} are judged by {by}"
    if isinstance(stage, Switch):
        return f"trains a Cnn14 of width {stage.width:g}, {stage.batch_size} rows a step"
    if isinstance(stage, TRAINING):
        how = f"LoRA of rank {stage.lora_rank}" if stage.trainable == "lora" else stage.trainable
        each = f" x {stage.group_size}" if isinstance(stage, GRPO) else ""
        return f"{kind(type(stage))}, {how}, {stage.batch_size}{each} a step, {stage.micro_batch_size}{each} a pass"
    return "makes the toy world" if isinstance(stage, Toy) else "writes report.html"


def table(rows):
    """Rows of strings as lines; a column with numbers in it stands to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [any(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    return "\n".join(" ".join(cell.rjust(width) if at_right else cell.ljust(width) for cell, width, at_right
                              in zip(row, widths, right, strict=True)).rstrip() for row in rows)


def paragraph(text, indent=""):
    return "\n".join(fill(line, 118, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
                     for line in text.split("\n"))


def memory(stages, ready, faults):
    """The table of memory, in MiB where no stage takes a GiB.

    ready: stage name -> (Found, Prompt), both None of a stage without a model. faults: lines are added for stages that
    cannot run as they are written.
    """
    rows, alike = [], {}  # (stage, Row or the name of a stage that takes the same); what memory depends on -> that name
    for item in tqdm([item for item in stages if item.name in ready], desc="memory", unit="stage", leave=False):
        found, prompt = ready[item.name]
        key = (type(item), found and (found.name, found.source, found.adapters), prompt and len(prompt),
               *(getattr(item, field.name) for field in fields(item) if field.name not in APART),
               *(getattr(item, name, None) is not None for name in ("traces", "val_manifest")))
        try:
            rows += [(item, row) for row in ([alike[key]] if key in alike else estimate(item, found, prompt))]
            alike.setdefault(key, item.name)
        except ValueError as error:
            faults.append(str(error))
    large = any(not isinstance(row, str) and row.total >= GIB for _, row in rows)
    unit, unit_name = (GIB, "GiB") if large else (GIB >> 10, "MiB")
    lines = [("stage", "doing", "tokens", *TITLES, "total", *CARDS)]
    for i, (item, row) in enumerate(rows):
        name = item.name if i == 0 or rows[i - 1][0] is not item else ""
        if isinstance(row, str):
            lines.append((name, f"as {row}", *[""] * (len(lines[0]) - 2)))
            continue
        sizes = (row.parts.get(part, 0) / unit for part in PARTS)
        taken = row.total * (1 + SHARE) / GIB + DRIVER
        lines.append((name, row.doing, f"{row.tokens:,}" if row.tokens else "",
                      *(f"{size:.2f}" if size >= 0.005 else "" for size in sizes), f"{row.total / unit:.2f}",
                      *("" if item.device == "cpu" else "yes" if taken <= room else "NO" for room in CARDS.values())))
    return f"memory, {unit_name}\n{table(lines)}"


def to_bring(config):
    """(files and folders that are not here, names that the hub is asked for), each once."""
    files, names = {}, {}
    for item in config.stages:
        for field, path in input_paths(item, config.run_dir, config.stages).items():
            if not path.exists() and config.run_dir not in path.parents:
                (names if field == "model" and parse_hub_name(path) else files)[str(path)] = None
    return files, names


def dry_run(config):
    """Prints what a config would do.

    Returns:
        The exit status: 1 where a stage cannot run as it is written, or its model is not known.
    """
    stages, models, prompts, ready, lines, faults = config.stages, {}, {}, {}, [], []
    with tempfile.TemporaryDirectory() as home:
        stand_in(Path(home), stages)
        for item in stages:
            model, text = getattr(item, "model", None) or "", None
            try:
                if model:
                    found, prompt, text = know(item, stages, Path(home))
                    ready[item.name], models[found.name, found.source] = (found, prompt), found
                    model = model if model.startswith("@") else found.name
                elif isinstance(item, Switch):
                    ready[item.name] = None, None
                elif getattr(item, "endpoint", None):
                    model, text = item.served, f"{question(item)}\n(and the clip, to {item.endpoint})"
            except (ValueError, OSError) as error:
                faults.append(f"{item.name}: {error}")
            number = str(prompts.setdefault(text, len(prompts) + 1)) if text else ""
            lines.append((item.name, kind(type(item)), does(item), model, number))
        print(f"{config.source}: {len(stages)} stages, in {config.run_dir}\n")
        print(table([("stage", "kind", "does", "model", "prompt"), *lines]))
        counted = [(name, f"{sum(p.numel() for p in build(found.config).parameters()):,}", source)
                   for (name, source), found in models.items()]
        print("\n" + table([("model", "parameters", "known by"), *counted]))
        for text, number in prompts.items():
            print(f"\nprompt {number}\n{paragraph(text, '  ')}")
        print("\n" + paragraph(ASSUMED) + "\n", flush=True)
        print(memory(stages, ready, faults) + "\n" + paragraph(LEGEND))
    for what, names in zip(("to bring", "from the hub, where no such folder is"), to_bring(config), strict=True):
        if names:
            print("\n" + paragraph(f"{what}: {', '.join(names)}"))
    for fault in faults:
        print(f"minixmd: {fault}", file=sys.stderr)
    return 1 if faults else 0
