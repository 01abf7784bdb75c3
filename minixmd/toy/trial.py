"""--trial: every stage of a config in minutes, with a handful of clips and tiny settings. For checkpoints, data and
other files that are not here the toy's models, its clips in the manifests' form, and made-up answers stand in."""
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from minixmd.config import (
    AUDIO_COT_PROMPT,
    CHECK_PROMPT,
    PROMPT,
    THINK_PROMPT,
    TRACE_PROMPT,
    FactCheck,
    Report,
    Toy,
)
from minixmd.config.load import Config
from minixmd.inputs.examples import MEDIA_KINDS, manifest_text, read_manifest
from minixmd.runs.files import write_json, write_text
from minixmd.runs.records import write_jsonl
from minixmd.stages.answers import checksum
from minixmd.tasks.statistics import digest
from minixmd.toy import world

WORLD = Path("runs/trial-world")  # one for all trials
CLASSES = CLIPS = 12  # of a manifest that stands in
REAL_CLIPS = 24  # of a manifest that is here
MANIFESTS = ("manifest", "val_manifest", "train_manifest", "clips")
MOST = {"max_steps": 2, "epochs": 1, "batch_size": 8, "eval_every": 2, "save_every": 2, "num_samples": 2, "limit": 24,
        "group_size": 4, "max_new_tokens": 40, "top_k": 16}  # fmt: skip
PROMPTS = {THINK_PROMPT: world.THINK_PROMPT, AUDIO_COT_PROMPT: world.THINK_PROMPT, CHECK_PROMPT: world.CHECK_PROMPT,
           TRACE_PROMPT: "{trace}\n" + PROMPT}  # as the toy's models have learnt them
METAS = {  # folder of a benchmark's manifest -> what its clips' meta holds, by their number
    "mmau": lambda i: {"task": ("sound", "speech", "music")[i % 3], "difficulty": ("easy", "medium", "hard")[i % 4 % 3],
                       "sub_category": "made up", "version": "made up", "sha256": "0" * 64},
    "mmar": lambda i: {"modality": ("sound", "speech", "music")[i % 3], "category": "Signal Layer",
                       "sub_category": "made up", "version": "made up", "sha256": "0" * 64},
    "music_avqa": lambda i: {"modality": ("Audio", "Audio-Visual", "Visual")[i % 3],
                             "type": ("Counting", "Location", "Existential", "Comparative", "Temporal")[i % 5]},
}  # fmt: skip


def world_config(config):
    """The Config that makes what stands in."""
    return Config(WORLD, (Toy(thinking=True),), config.source)


def shrink(config):
    """The Config of a trial. Writes the clips' manifests, and what stands in for other files, into its run_dir."""
    run_dir = config.run_dir.with_name(f"{config.run_dir.name}-trial")
    absent, changes_of = set(), {}
    for stage in config.stages:
        changes = changes_of[stage.name] = smaller(stage)
        for name in (*MANIFESTS, "model", "weights", "file"):
            path = getattr(stage, name, None)
            if path is None or path.startswith("@"):
                continue
            is_here = os.path.exists(path)
            if not is_here:
                absent.add(path)
            if name in MANIFESTS:
                changes[name] = str(handful(Path(path), run_dir))
                changes["allow_outside"] = True
            elif is_here:
                continue
            elif name == "model":
                changes |= stand_in_model(stage)
            elif name == "weights":
                changes |= {"weights": None, "width": 1 / 16, "clip_s": 1.0}
            else:
                changes[name] = str(make_answers(stage, Path(changes["manifest"]), run_dir))
    note = ("A trial, of 2 steps and a few clips a stage: no figure here means anything. Not here, so others stand "
            f"in for them: {', '.join(sorted(absent)) or 'nothing'}")
    print(f"minixmd: {note}", flush=True)
    stages = []
    for stage in config.stages:
        changes = changes_of[stage.name]
        if isinstance(stage, Report):
            changes["missing"] = {"The real run": note}
        if absent and getattr(stage, "prompt", None) in PROMPTS:
            changes["prompt"] = PROMPTS[stage.prompt]
        stages.append(replace(stage, **changes))
    return Config(run_dir, tuple(stages), config.source)


def smaller(stage):
    """The fields that make a stage short, on this machine."""
    changes = {}
    for name, most in MOST.items():
        if hasattr(stage, name):
            value = getattr(stage, name)
            if value:
                changes[name] = min(value, most)
            elif name == "max_steps":
                changes[name] = most
    if getattr(stage, "traces", "") is None and hasattr(stage, "trace_filter"):
        changes.pop("max_new_tokens", None)  # of SFT on letters, which writes nothing
    if hasattr(stage, "device"):
        changes["device"] = "auto"
    if hasattr(stage, "dtype") and not torch.cuda.is_available():
        changes["dtype"] = "float32"
    return changes


def stand_in_model(stage):
    """The fields with which the toy's model takes the place of one. Omni's sees the silent video."""
    if isinstance(stage, FactCheck):
        return {"model": f"{WORLD}/toy/checker"}
    if "video" not in MEDIA_KINDS[stage.media]:
        return {"model": f"{WORLD}/toy/student"}
    return {"model": f"{WORLD}/toy/teacher", "media": "video", "min_pixels": 3_136, "max_pixels": 3_136}


def handful(path, run_dir):
    """The manifest of a few clips of one or, where there is none, of the toy's."""
    out = run_dir / "clips" / path.parent.name / path.name
    if out.exists():
        return out
    if path.exists():
        examples = read_manifest(path, allow_outside=True)
        examples = examples[::max(1, len(examples) // REAL_CLIPS)][:REAL_CLIPS]
    else:
        known = {"train": "train_truth", "analysis": "analysis", "unseen": "unseen", "val": "val"}
        split = known.get(path.stem, "test")
        examples, counts = [], Counter()
        for example in read_manifest(WORLD / "toy" / f"{split}.jsonl"):
            counts[example.label] += 1
            if counts[example.label] <= CLIPS and list(counts).index(example.label) < CLASSES:
                meta = example.meta | METAS.get(path.parent.name, lambda i: {})(len(examples))
                examples.append(replace(example, meta=meta))
    relative = []
    for example in examples:
        files = {}
        for kind in ("audio", "video"):
            path = getattr(example, kind)
            if path is not None:
                files[kind] = os.path.relpath(path, out.parent)
        relative.append(replace(example, **files))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, manifest_text(relative))
    return out


def make_answers(stage, manifest, run_dir):
    """Answers of another system or of three participants, two of three right."""
    examples = read_manifest(manifest, allow_outside=True)
    if stage.condition is None:
        out = run_dir / "answers" / Path(stage.file).name
        out.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(out, [{"id": example.id, "answer": made_up(example, i)} for i, example in enumerate(examples)])
        return out
    out = run_dir / "people"
    out.mkdir(parents=True, exist_ok=True)
    for number in (1, 2, 3):
        session = {"listening_test": 1, "test": "made up", "participant": number, "finished": "made up", "trials": []}
        for i, example in enumerate(examples[number - 1::3]):
            for shift, condition in enumerate(("ears", "eyes", "both")):
                session["trials"].append({"id": example.id, "condition": condition, "question": digest(example),
                                          "answer": made_up(example, i + shift), "ms": 1000, "replays": 0})
        write_json(out / f"{number}.json", session | {"checksum": checksum(json.loads(json.dumps(session)))})
    return out


def made_up(example, i):
    return (example.answer + (i % 3 == 0)) % len(example.options)
