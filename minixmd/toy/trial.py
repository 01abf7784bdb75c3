"""--trial: every stage of a config in minutes, with a handful of clips and tiny settings. For checkpoints, data and
other files that are not here the toy's models, its clips in the manifests' form, and made-up answers stand in."""
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from minixmd.config import FactCheck, Report, Toy, prompts
from minixmd.config.load import Config
from minixmd.config.references import MODELS, stage_of
from minixmd.inputs.examples import MEDIA_KINDS, manifest_text, read_manifest
from minixmd.runs.files import write_json, write_text
from minixmd.runs.hub_names import parse_hub_name
from minixmd.runs.records import read_jsonl, write_jsonl
from minixmd.runs.seeds import hash_seed
from minixmd.stages.answers import checksum
from minixmd.tasks.benchmarks import TYPES
from minixmd.tasks.statistics import digest
from minixmd.toy import world

WORLD = Path("runs/trial-world")  # one for all trials
SPLITS = {"train": "train_truth", "analysis": "analysis", "unseen": "unseen"}  # by a manifest's name
CLASSES = CLIPS = 12  # of a manifest that stands in
REAL_CLASSES, REAL_CLIPS = 4, 6  # of a manifest that is here; without labels so many clips in all
TOY_TEACHER = {"min_pixels": 3_136, "max_pixels": 3_136}  # its clips are 56 x 56
MANIFESTS = ("manifest", "val_manifest", "train_manifest", "clips")
MOST = {"max_steps": 2, "epochs": 1, "batch_size": 8, "eval_every": 2, "save_every": 2, "num_samples": 2, "limit": 24,
        "group_size": 4, "top_k": 16}  # fmt: skip
PROMPTS = {  # as the toy's models have learnt them
    prompts.THINK_PROMPT: world.THINK_PROMPT,
    prompts.AUDIO_COT_PROMPT: world.THINK_PROMPT,
    prompts.CHECK_PROMPT: world.CHECK_PROMPT,
    prompts.TRACE_PROMPT: "{trace}\n" + prompts.PROMPT,
}
VERSION = {"sub_category": ("made up",), "version": ("made up",), "sha256": ("0" * 64,)}
METAS = {  # folder of a benchmark's manifest -> values of its clips' meta, in turn
    "mmau": {"task": ("sound", "speech", "music"), "difficulty": ("easy", "medium", "hard"), **VERSION},
    "mmar": {"modality": ("sound", "speech", "music"), "category": ("Signal Layer",), **VERSION},
    "music_avqa": {"modality": ("Audio", "Audio-Visual", "Visual"), "type": TYPES},
}


def absent_inputs(config):
    """{what the user must bring and has not: the field that names it}"""
    absent = {}
    for stage in config.stages:
        for name in (*MANIFESTS, *MODELS, "weights", "file"):
            if is_absent(name, getattr(stage, name, None)):
                absent[getattr(stage, name)] = name
    return absent


def is_absent(name, value):
    if value is None or value.startswith("@") or os.path.exists(value):
        return False
    repo_revision = parse_hub_name(value) if name in MODELS else None
    return repo_revision is None or not isinstance(try_to_load_from_cache(repo_revision[0], "config.json"), str)


def world_config(config):
    """The Config that makes what stands in; None where nothing has to. Raises ValueError for a recipe of the toy."""
    if any(isinstance(stage, Toy) for stage in config.stages):
        raise ValueError("--trial is for real models and data: a config with stage Toy runs in minutes as it is")
    if set(absent_inputs(config).values()) <= {"weights"}:
        return None
    return Config(WORLD, (Toy(thinking=True),), config.source)


def shrink(config):
    """The Config of a trial. Writes the clips' manifests, and what stands in for other files, into run_dir/trial."""
    run_dir = config.run_dir / "trial"
    absent = absent_inputs(config)
    note = ("this is a trial, of 2 steps and a few clips a stage: no figure here means anything. What is not here and "
            f"others stand in for: {', '.join(sorted(absent)) or 'nothing'}")
    print(f"minixmd: {note}", flush=True)
    stand_ins, stages = set(), []  # stand_ins: stages with a model that stands in, or that was one
    for stage in config.stages:
        changes = smaller(stage) | own_files(stage, run_dir)
        model = getattr(stage, "model", None)
        if model in absent:
            changes |= stand_in_model(stage)
        if model in absent or stage_of(model or "") in stand_ins:
            stand_ins.add(stage.name)
            changes["prompt"] = PROMPTS.get(stage.prompt, stage.prompt)
            if hasattr(stage, "max_new_tokens") and getattr(stage, "traces", "") is not None:
                changes["max_new_tokens"] = min(stage.max_new_tokens, 40)
        if getattr(stage, "teacher_model", None) in absent:
            changes["teacher_prompt"] = PROMPTS.get(stage.teacher_prompt, stage.teacher_prompt)
            stand_in = stand_in_model(replace(stage, media=stage.teacher_format.media))
            changes |= {f"teacher_{name}": stand_in.pop(name) for name in ("model", "media") if name in stand_in}
            changes |= stand_in
        if getattr(stage, "weights", None) in absent:
            changes |= {"weights": None, "width": 1 / 16, "clip_s": 1.0}
        if getattr(stage, "file", None) in absent:
            changes["file"] = str(make_answers(stage, changes["manifest"], run_dir))
        if isinstance(stage, Report):
            changes["notes"] = {"No result": note}
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
    if hasattr(stage, "max_bad"):
        changes["max_bad"] = 1.0
    if hasattr(stage, "device"):
        changes["device"] = "auto"
    if hasattr(stage, "dtype") and not torch.cuda.is_available():
        changes["dtype"] = "float32"
    return changes


def own_files(stage, run_dir):
    """The fields that name a stage's manifests, now of a few clips, and the lines about them of its other files."""
    changes = {}
    for name in MANIFESTS:
        path = getattr(stage, name, None)
        if path and not path.startswith("@"):
            changes |= {name: str(handful(path, run_dir)), "allow_outside": True}
    if "manifest" in changes:
        ids = {example.id for example in read_manifest(changes["manifest"], allow_outside=True)}
        for name in ("file", "traces", "teacher_labels", "student_labels", "switch", "verdicts"):
            path = getattr(stage, name, None)
            if path and os.path.isfile(path):
                changes[name] = str(place_for(path, run_dir))
                write_jsonl(changes[name], [record for record in read_jsonl(path) if record.get("id") in ids])
    return changes


def place_for(path, run_dir):
    """Where a trial keeps its own form of a file: by the file's place, and whether it is there."""
    path = Path(path)
    key = f"{hash_seed(str(path.resolve()), path.exists()):016x}"
    out = run_dir / "inputs" / key / path.parent.name / path.name
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def handful(path, run_dir):
    """The manifest of a few clips of one or, where there is none, of the toy's."""
    out, path = place_for(path, run_dir), Path(path)
    if path.exists():
        examples = few(read_manifest(path, allow_outside=True), REAL_CLASSES, REAL_CLIPS)
    else:
        split = SPLITS.get(path.stem, "test")
        examples = few(read_manifest(WORLD / "toy" / f"{split}.jsonl"), CLASSES, CLIPS)
        for i, example in enumerate(examples):
            added = {field: values[i % len(values)] for field, values in METAS.get(path.parent.name, {}).items()}
            examples[i] = replace(example, meta=example.meta | added)
    write_text(out, manifest_text(examples))
    return out


def few(examples, classes, clips):
    """So many clips of each of the first classes, the same ones in every manifest; without labels as many in all."""
    labels = sorted({example.label or "" for example in examples})[:classes]
    counts, chosen = Counter(), []
    for example in examples:
        label = example.label or ""
        if label in labels and counts[label] < (clips if label else classes * clips):
            counts[label] += 1
            chosen.append(example)
    return chosen


def stand_in_model(stage):
    """The fields with which the toy's model takes the place of one. Omni's sees the silent video."""
    if isinstance(stage, FactCheck):
        return {"model": f"{WORLD}/toy/checker"}
    if "video" not in MEDIA_KINDS[stage.media]:
        return {"model": f"{WORLD}/toy/student"}
    return {"model": f"{WORLD}/toy/teacher", "media": "video", **TOY_TEACHER}


def make_answers(stage, manifest, run_dir):
    """Answers of another system or of three participants, two of three right."""
    examples = read_manifest(manifest, allow_outside=True)
    out = place_for(stage.file, run_dir)
    if stage.condition is None:
        write_jsonl(out, [{"id": example.id, "answer": made_up(example, i)} for i, example in enumerate(examples)])
        return out
    out.mkdir(parents=True, exist_ok=True)
    for number in (1, 2, 3):
        session = {"listening_test": 1, "test": "made up", "participant": number, "finished": "made up", "trials": []}
        for i, example in enumerate(examples[number - 1::3]):
            for shift, condition in enumerate(("ears", "eyes", "both")):
                session["trials"].append({"id": example.id, "condition": condition, "question": digest(example),
                                          "answer": made_up(example, i + shift), "ms": 1000, "replays": 0})
        write_json(out / f"{number}.json", session | {"checksum": checksum(session)})
    return out


def made_up(example, i):
    return (example.answer + (i % 3 == 0)) % len(example.options)
