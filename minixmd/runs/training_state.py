"""The resumable state of a training stage: named tensors and a few numbers in state.safetensors, and its logs."""
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minixmd.runs.files import write_safetensors, write_text
from minixmd.runs.records import read_jsonl

STATE = "state.safetensors"
LOGS = ("log.jsonl", "completions.jsonl")  # they grow line by line


def save_state(folder, tensors, meta):
    """Replaces the training state, named tensors and a JSON-able `meta`. A kill leaves the old one or the new one."""
    write_safetensors(Path(folder) / STATE, tensors, {"meta": json.dumps(meta)})


def load_state(folder):
    """(tensors on the CPU, meta) as last saved, bit for bit; None before the first save."""
    path = Path(folder) / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["meta"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a training state ({error}); delete it to start the stage anew") from error


def rewind_logs(folder, step):
    """Drops the log lines of steps after `step`, which will be redone. Returns the lines of log.jsonl that stay."""
    kept = {}
    for name in LOGS:
        path = Path(folder) / name
        if path.exists():
            kept[name] = [line for line in read_jsonl(path) if line["step"] <= step and step > 0]
            # as append_jsonl wrote them: a resumed run's logs are the same bytes
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept[name]))
    return kept.get("log.jsonl", [])
