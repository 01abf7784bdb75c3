"""A stage's directory: what is in it, how a finished stage is recognised, and when a directory is refused.

    config.json    the stage as resolved           inputs.json        a fingerprint of each file that it reads
    config.py      the config file as given        versions.json      what it last ran with
    log.jsonl      one line a step or event        completions.jsonl  GRPO: some completions as text
    state.json     training: where to resume, with the weights and the optimizer (training_state.py), until it is done
    validation/    training: answers to val_manifest, a file for each step after which it was validated
    slots.json     what decode_slots "auto" was, on a GPU
    done.json      written last: the stage is finished

What a stage reads has a fingerprint (files.fingerprint), a hub model its name and commit. The clips that a manifest
lists are not looked at.
"""
import json
import platform
import subprocess
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from minixmd.runs.files import fingerprint, write_bytes, write_json
from minixmd.runs.records import drop_torn_line
from minixmd.runs.training_state import LOGS, load_state, remove_leftovers

# fields that may change between two starts of an unfinished stage, those for memory among them, which change results
# by rounding (but a clip may be too long for one micro_batch_tokens and not for another); a local model in an
# endpoint's place, or the reverse, changes `model` and `served` too and is refused
MAY_CHANGE = ("micro_batch_tokens", "checkpointing", "reference", "teacher_place", "decode_slots",
              "max_bad", "clip_limit_s", "allow_outside", "cache_gib", "endpoint", "api_key_env", "concurrency",
              "timeout_s", "attempts", "retry_backoff_s", "logprobs")


def begin(run_dir, stage, inputs, source, hub_names=None):
    """Opens a stage's directory, run_dir/stage.name, new or of an interrupted run; None if the stage is finished.
    inputs: field -> path of every file or folder that the stage reads (references.input_paths). hub_names: field ->
    "owner/name@commit" of inputs that are on the hub. Raises ValueError: the directory belongs to another config
    (MAY_CHANGE aside) or to other inputs, or an input is missing."""
    folder = Path(run_dir) / stage.name
    config = json.loads(json.dumps({"stage": type(stage).__name__.lower(), **asdict(stage)}))  # tuples become lists
    for field, path in inputs.items():
        if field in config and not config[field].startswith("@") and field not in (hub_names or {}):
            config[field] = str(path.resolve())
    fingerprints = {field: (hub_names or {}).get(field) or fingerprint(path) for field, path in inputs.items()}
    if (folder / "config.json").exists():
        _check_same(folder, config, inputs, fingerprints)
        if (folder / "done.json").exists():
            remove_leftovers(folder)  # a kill may have come before `finish` did
            return None
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.rglob(".*.tmp"):  # of a write that a kill cut short
        leftover.unlink()
    remove_leftovers(folder, load_state(folder))
    for name in LOGS:
        drop_torn_line(folder / name)
    write_json(folder / "versions.json", versions())
    if not (folder / "config.json").exists():
        write_bytes(folder / "config.py", Path(source).read_bytes())
        write_json(folder / "inputs.json", fingerprints)
    write_json(folder / "config.json", config)  # last: with it the directory is complete
    return folder


def finish(folder):
    """Marks a stage as finished, which then needs no training state. What it wrote must be on disk by now."""
    marks = {name: fingerprint(Path(folder) / f"{name}.json") for name in ("config", "inputs")}
    write_json(Path(folder) / "done.json", marks)
    remove_leftovers(folder)


def _check_same(folder, config, inputs, fingerprints):
    """Raises ValueError if the directory was made by another config or from other inputs."""
    old_config, old_fingerprints = _read(folder / "config.json"), _read(folder / "inputs.json")
    if old_config.get("stage") != config["stage"]:
        _refuse(folder, "another kind of stage", [f"{old_config.get('stage')} -> {config['stage']}"])
    other_fields = sorted((old_config.keys() ^ config.keys()) - set(MAY_CHANGE))
    _refuse(folder, "a version of minixmd whose stages have other fields", other_fields)
    differences = []
    for field, value in config.items():
        moved = field in inputs and field in old_fingerprints  # what lies there decides
        if field not in MAY_CHANGE and value != old_config[field] and not moved:
            differences.append(f"{field} {json.dumps(old_config[field])} -> {json.dumps(value)}")
    _refuse(folder, "another config", differences)
    changed = [field for field in inputs if fingerprints[field] != old_fingerprints.get(field)]
    _refuse(folder, "other inputs", [f"{field} {inputs[field]} changed" for field in changed])


def versions():
    """What the program runs with: versions, the checkout's commit if it runs from one, and the hardware."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "minixmd"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # triton where there is none; minixmd in a checkout that is not installed
            found[name] = None
    commit, dirty = _git(Path(__file__).resolve().parents[2])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**found, "commit": commit, "dirty": dirty, "gpu": gpu, "machine": platform.platform()}


def _read(path):
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path}: missing or not JSON; delete {path.parent} to run the stage anew") from error


def _refuse(folder, what, differences):
    if differences:
        raise ValueError(f"{folder} was made by {what}: {', '.join(differences)}; set another run_dir or delete "
                         f"{folder}")


def _git(root):
    """(commit, whether it was changed since) of a checkout; (None, None) if `root` is not the top of one."""
    ask = partial(subprocess.check_output, stderr=subprocess.DEVNULL, text=True, timeout=60)
    try:
        head = ask(["git", "-C", root, "rev-parse", "--show-prefix", "HEAD"])
        changes = ask(["git", "-C", root, "status", "--porcelain"])
    except (OSError, subprocess.SubprocessError):
        return None, None
    below_top, commit = head.split("\n")[:2]
    return (None, None) if below_top else (commit, bool(changes))
