"""Damages the files that users hand in, and reports every one that is neither read nor refused in one line.

    python tests/fuzz.py                       1,000 checkpoints, 1,000 JSON files, 500 adapters, 500 manifests
    python tests/fuzz.py --seconds 60          as many of them as that time allows
    python tests/fuzz.py --only adapters 17    one of them, with its traceback

A case is a function of the seed, its kind and its number. It passes if the file is read, or refused by a ValueError or
OSError of one line. It fails with any other exception, after 10 s, when the process grows by 1 GB or dies, or if a
loaded tensor is not the one in the file, which a reader of this module's own says.
"""
import argparse
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from mini import AUDIO, OMNI, VISION, write_tokenizer
from tiny import TOKENS, tiny_model

import minixmd
from minixmd.config import SFT, Distill, FactCheck, Report, Switch
from minixmd.config.load import Config
from minixmd.inputs.examples import build_conversation, read_manifest
from minixmd.inputs.media import MediaError
from minixmd.learning.targets import resolve_targets, stored_rows
from minixmd.models.lora import adapted, add_lora
from minixmd.models.weights import load_adapter, load_model, save_adapter, save_model
from minixmd.report import gather
from minixmd.runner import run_stage, shortened
from minixmd.runs.records import read_endpoint_answers
from minixmd.stages.input_checks import check_inputs
from minixmd.stages.switch import gains
from minixmd.tasks.statistics import digest, tabulate

COUNTS = {"checkpoints": 1000, "json": 1000, "adapters": 500, "manifests": 500}
LIMIT_S, LIMIT_KB, LIMIT_CHARS = 10, 1 << 20, 2000
FAMILIES = {"audio": AUDIO, "vision": VISION, "windowed": VISION, "omni": OMNI}
OPTIONS = ["dog", "cat", "owl"]
VALUES = [None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**40, 0.5, -0.0, 1e-30, 1e300, float("nan"), float("inf"),
          "", " ", "a", "0", "cat", "\u0000", "\ud800", "..", "/", "../x", "x" * 20_000, "ä" * 300, [], [[]], ["a"],
          [1, 2], ["cat", None], {}, {"a": 1}, [[[[{}]]]]]  # fmt: skip


# ---- damage ----


def damage_json(rng, value):
    """A JSON value with one to three changes: a part replaced, left out, renamed, moved or doubled."""
    value = deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = [(None, None), *places_of(value)]
        parent, key = rng.choice(places[1:] or places)
        if parent is None:
            value = deepcopy(rng.choice(VALUES))
            continue
        act = rng.choice(("replace", "replace", "replace", "nudge", "remove", "rename", "swap", "wrap", "double"))
        if act == "remove":
            del parent[key]
        elif act == "nudge" and isinstance(parent[key], (int, float)):
            number = parent[key]
            parent[key] = rng.choice((-number, number + 1, number * 2, number / 2, number * 1e6))
        elif act == "rename" and isinstance(parent, dict):
            parent[rng.choice((key + "x", key[:-1], key.upper(), "name"))] = parent.pop(key)
        elif act == "swap":
            other, place = rng.choice(places[1:])
            parent[key], other[place] = deepcopy(other[place]), deepcopy(parent[key])
        elif act == "wrap":
            parent[key] = [parent[key]]
        elif act == "double" and isinstance(parent, list):
            parent.insert(key, parent[key])
        else:
            parent[key] = deepcopy(rng.choice(VALUES))
    return value


def places_of(value):
    """(object or list, key or index) of every part of a JSON value."""
    parts = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    places = []
    for key, part in parts:
        places.append((value, key))
        places += places_of(part)
    return places


def damage_text(rng, data):
    """The bytes of a text file, cut, overwritten, in another encoding, or something else."""
    act = rng.randrange(9)
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 2, 10, 100)))
    if act == 0:
        return data[:start]
    if act == 1:
        return data[:start] + rng.randbytes(end - start) + data[end:]
    if act == 2:
        return data[:start] + data[end:]
    if act == 3:
        return data[:end] + data[start:]
    if act == 4:
        return data.decode().encode(rng.choice(("utf-16", "utf-8-sig", "utf-32", "utf-16-le")))
    if act == 5:
        added = rng.choice((b"\0", b"\xff", b"\xe4", b"NaN", b"1e999", b'"', b"\n", b"{", b"]"))
        return data[:start] + added + data[start:]
    if act == 6:
        return rng.choice((b"", b"\n", b"[]", b"{}", b"null", b"1", b'"a"', b"[" * 100_000, b'{"a":' * 100_000))
    if act == 7:
        return data + data
    return data[:start] + b"[" * 5000 + b"]" * 5000 + data[start:]


def write_damaged(rng, path, lines=False):
    """Damages a JSON or, with lines, a JSONL file, as text or as values."""
    data = path.read_bytes()
    if rng.random() < 0.25:
        path.write_bytes(damage_text(rng, data))
        return
    if not lines:
        path.write_text(json.dumps(damage_json(rng, json.loads(data))))
        return
    records = [json.loads(line) for line in data.splitlines()]
    place = rng.randrange(len(records))
    records[place] = damage_json(rng, records[place])
    if rng.random() < 0.2:
        records.insert(rng.randrange(len(records)), rng.choice(records))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def damage_safetensors(rng, path):
    """Damages the length, the header or the end of a safetensors file; never a tensor's bytes alone, which no reader
    can tell from others."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8:8 + length], data[8 + length:]
    act = rng.randrange(8)
    if act < 4:
        header = json.dumps(damage_json(rng, json.loads(header))).encode()
    elif act == 4:
        header = damage_text(rng, header.rstrip())
    elif act == 5:
        body = rng.choice((body[:rng.randrange(len(body))], body + rng.randbytes(rng.randrange(1, 100)), b""))
    elif act == 6:
        path.write_bytes(rng.choice((b"", data[:rng.randrange(8 + length)], rng.randbytes(200), data + data)))
        return
    claimed = len(header)
    if act == 7:
        claimed = rng.choice((0, claimed - 1, claimed + 1, len(data), 2**31, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", claimed) + header + body)


# ---- what is read, and what it must be ----


def make_world(folder):
    """Writes the whole files that cases damage copies of."""
    for name, special in FAMILIES.items():
        tokenizer = write_tokenizer(folder / name, special)
        for tie in (False, True):
            path = folder / f"{name}{'-tied' * tie}"
            rows = tokenizer.get_vocab_size() + 3
            model = tiny_model(name, tie=tie, vocab=rows)
            settle_ids(model.config, tokenizer)
            save_model(model, folder / name, path, shard_bytes=20_000 if tie else 5_000_000)
        add_lora(model, rank=3, alpha=5, targets=r"model\.layers\..*", seed=0)
        save_adapter(model, path, folder / f"{name}-adapter")
    make_run(folder / "run")


def settle_ids(config, tokenizer):
    """Gives a config the ids that its tokenizer has for the media tokens."""
    section = config.raw.get("thinker_config", config.raw)
    for field, token in TOKENS[config.family.model_type].items():
        if field in section:
            section[field] = tokenizer.token_to_id(token)


def make_run(folder):
    """A manifest and what stages write of its clips."""
    folder.mkdir()
    clips = [{"id": f"c{i}", "audio": f"{i}.wav", "video": f"{i}.mp4", "question": "Which?", "options": OPTIONS,
              "answer": i % 3, "label": OPTIONS[i % 3], "source": "s", "meta": {"group": "g", "video_question": "See?"}}
             for i in range(6)]  # fmt: skip
    top = {"temperature": 2.0, "ids": [1, 2, 3], "logits": [0.3, 0.2, 0.1], "logsumexp": 4.0}
    files = {
        "manifest": clips,
        "labels": [{"id": clip["id"], "answer": clip["answer"], "option": clip["label"], "logits": [1.0, 0.5, 0.1],
                    "top": top} for clip in clips],
        "switch": [{"id": clip["id"], "p_teacher": 0.8, "oracle": 1.0} for clip in clips],
        "traces": [{"id": clip["id"], "sample": 0, "text": "<think>hm</think><answer>A</answer>", "answer": 0,
                    "option": "dog", "unanimous": True, "ids": [4, 5], "top": {"ids": [4, 1, 5, 2],
                    "logprobs": [-0.1, -3.0, -0.2, -2.0]}} for clip in clips],
        "verdicts": [{"id": clip["id"], "sample": 0, "score": 1.5, "accepted": True} for clip in clips],
        "endpoint": [{"key": clip["id"], "text": "B", "finished": True} for clip in clips],
        "log": [{"step": i, "loss": 1.0 / (i + 1), "val_accuracy": 0.5} for i in range(4)],
    }  # fmt: skip
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    examples = read_manifest(folder / "manifest.jsonl")
    for name, shift in (("teacher", 0), ("student", 1)):
        answers = [{"id": example.id, "answer": (i + shift * (i % 2)) % 3, "right": not shift * (i % 2),
                    "question": digest(example), "option": "dog"} for i, example in enumerate(examples)]  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in answers))
        (folder / name / "results.json").write_text(json.dumps(tabulate(examples, answers)))
    (folder / "results.json").write_text(json.dumps({"clips": len(clips), "clips_to_teacher": len(clips)}))
    (folder / "summary.json").write_text(json.dumps({"clips_folder": "../clips"}))


def case_checkpoints(rng, world, folder):
    name = rng.choice(list(FAMILIES)) + rng.choice(("", "-tied"))
    copy_of(world / name, folder)
    if (index := folder / "model.safetensors.index.json").exists() and rng.random() < 0.5:
        write_damaged(rng, index)
    else:
        damage_safetensors(rng, rng.choice(sorted(folder.glob("*.safetensors"))))

    def check():
        model = load_model(folder)
        held = {}
        for path in sorted(folder.glob("*.safetensors")):
            held.update(tensors_in(path))
        for ours, tensor in model.named_parameters():
            theirs = held[model.config.family.checkpoint_name(ours)]
            assert torch.equal(tensor, theirs.float()), f"{ours} is not the file's"

    return check


def tensors_in(path):
    """{name: tensor} of a safetensors file, read without that library."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    found = {}
    for name, about in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            kind = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}[about["dtype"]]
            values = np.frombuffer(data[start + first:start + last], kind).reshape(about["shape"])
            values = torch.from_numpy(values.copy())
            found[name] = values.view(torch.bfloat16) if about["dtype"] == "BF16" else values
    return found


def case_adapters(rng, world, folder):
    name = rng.choice(list(FAMILIES))
    base = world / f"{name}-tied"
    copy_of(world / f"{name}-adapter", folder)
    if rng.random() < 0.5:
        write_damaged(rng, folder / "adapter_config.json")
    else:
        damage_safetensors(rng, folder / "adapter_model.safetensors")

    def check():
        model = load_model(base)
        load_adapter(model, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        held = tensors_in(folder / "adapter_model.safetensors")
        layers = adapted(model)
        assert len(held) == 2 * len(layers), "not all pairs were taken"
        for ours, layer in layers.items():
            for half, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                path = f"base_model.model.{model.config.family.transformers_path(ours)}.{half}.weight"
                assert torch.equal(tensor, held[path].float()), f"{path} is not the file's"
            divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
            assert layer.scale == config["lora_alpha"] / divisor

    return check


def case_manifests(rng, world, folder):
    copy_of(world / "run", folder)
    path = folder / "manifest.jsonl"
    write_damaged(rng, path, lines=True)
    processor = minixmd.load(world / "vision-tied")[1]

    def check():
        stage = Switch(name="z", teacher="@x", student="@y", manifest=str(path), train_manifest=str(path))
        check_stages(folder, stage)
        frames = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
        prompt = "{question} {options} {first} {last}"
        for example in read_manifest(path):
            processor(build_conversation(example, media="video", prompt=prompt, answer=example.answer),
                      load=lambda *_: (frames, 1.0))
            digest(example)

    return check


def check_stages(folder, *stages):
    check_inputs(Config(folder / "out", stages, folder), clips=False)


def case_json(rng, world, folder):
    kind = rng.choice(("config", "tokenizer", "index", "base", *RUN_FILES))
    if kind in RUN_FILES:
        copy_of(world / "run", folder)
        file, check = RUN_FILES[kind]
        write_damaged(rng, folder / file, lines=file.endswith("l"))
        return lambda: check(folder)
    name = rng.choice(list(FAMILIES)) + "-tied"
    if kind == "base":
        copy_of(world / name.replace("tied", "adapter"), folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
        write_damaged(rng, folder / "minixmd_base.json")
    else:
        copy_of(world / name, folder)
        file = {"config": "config.json", "tokenizer": "tokenizer.json", "index": "model.safetensors.index.json"}[kind]
        write_damaged(rng, folder / file)
    return lambda: minixmd.load(folder)


def distil(folder):
    stage = Distill(name="z", model="x", manifest=f"{folder}/manifest.jsonl", gate="learned", teacher_loss="kl",
                    teacher_labels=f"{folder}/labels.jsonl", student_labels=f"{folder}/labels.jsonl",
                    switch=f"{folder}/switch.jsonl")  # fmt: skip
    check_stages(folder, stage)
    items, _ = resolve_targets(stage, read_manifest(stage.manifest))
    stored = [item.teacher_topk for item in items if item.teacher_topk]
    if stored:
        stored_rows(stored, 100, torch.tensor([5]))


def sft_kl(folder):
    stage = SFT(name="z", model="x", manifest=f"{folder}/manifest.jsonl", traces=f"{folder}/traces.jsonl",
                teacher_loss="kl")  # fmt: skip
    check_stages(folder, stage)
    items, _ = resolve_targets(stage, read_manifest(stage.manifest))
    stored_rows([item.teacher_topk for item in items], 100, torch.tensor([5]), sum(len(item.ids) for item in items))


def fact_check(folder):
    stage = FactCheck(name="z", traces=f"{folder}/traces.jsonl", manifest=f"{folder}/manifest.jsonl",
                      checker="verdicts", verdicts=f"{folder}/verdicts.jsonl")  # fmt: skip
    check_stages(folder, stage)
    run_stage(Config(folder / "out", (stage,), folder / "summary.json"), 0, {}, stage)


def switch_gains(folder):
    stage = Switch(name="z", teacher=f"{folder}/teacher/results.json", student=f"{folder}/student/results.json",
                   manifest=f"{folder}/manifest.jsonl", train_manifest=f"{folder}/manifest.jsonl")  # fmt: skip
    gains(stage, read_manifest(stage.manifest))


def report(folder):
    stage = Report(tables={"t": {"analysis": f"{folder}/teacher/results.json"},
                           "s": {"analysis": f"{folder}/student/results.json"}},
                   roles=("t", "s", "s"), bars=("analysis",), switch=f"{folder}/switch.jsonl",
                   curves={"c": {"l": f"{folder}/log.jsonl"}})  # fmt: skip
    check_stages(folder, stage)
    gather.run(stage, folder, lambda line: None)


RUN_FILES = {  # what a case of "json" damages, and who then reads it
    "labels": ("labels.jsonl", distil),
    "decisions": ("switch.jsonl", distil),
    "traces": ("traces.jsonl", fact_check),
    "rows": ("traces.jsonl", sft_kl),
    "verdicts": ("verdicts.jsonl", fact_check),
    "endpoint": ("endpoint.jsonl", lambda folder: read_endpoint_answers(folder / "endpoint.jsonl")),
    "answers": ("teacher/answers.jsonl", switch_gains),
    "reported answers": ("student/answers.jsonl", report),
    "results": ("teacher/results.json", report),
    "reported decisions": ("switch.jsonl", report),
    "curves": ("log.jsonl", report),
    "summary": ("summary.json", lambda folder: read_manifest(folder / "manifest.jsonl")),
}
CASES = {"checkpoints": case_checkpoints, "json": case_json, "adapters": case_adapters, "manifests": case_manifests}


# ---- running ----


class Hang(BaseException):
    pass


def copy_of(source, folder):
    shutil.copytree(source, folder)


def run_case(seed, kind, number, world, raises=False):
    """(outcome, what was said): "read", "refused" or "fault"."""
    rng = random.Random(f"{seed} {kind} {number}")

    def too_long(*_):
        raise Hang(f"more than {LIMIT_S} s")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "case"
        check = CASES[kind](rng, world, folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(LIMIT_S)
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), catch_warnings():
                simplefilter("ignore")
                check()
            outcome = "read", ""
        except (ValueError, OSError, MediaError) as error:
            said = shortened(str(error))
            clear = said and "\n" not in said and len(said) <= LIMIT_CHARS and not isinstance(error, UnicodeError)
            outcome = ("refused" if clear else "fault"), said
            if raises and not clear:
                raise
        except (Exception, Hang) as error:
            if raises:
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = "fault", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        finally:
            signal.alarm(0)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > LIMIT_KB:
            outcome = "fault", "the process grew by 1 GB"
    return outcome


def run_all(seed, counts, world, deadline=math.inf):
    """{kind: {"read" | "refused": count}} and [(kind, number, what was said)] of the faults. Cases run in a child
    process, which is replaced when it dies or hangs."""
    order = [(kind, number) for kind, count in counts.items() for number in range(count)]
    random.Random(seed).shuffle(order)
    tallies, faults = {kind: {"read": 0, "refused": 0} for kind in counts}, []
    while order and time.monotonic() < deadline:
        lines, child = start_child(seed, order, world)
        done = 0
        while done < len(order) and time.monotonic() < deadline:
            kind, number = order[done]
            ready, _, _ = select.select([lines], [], [], LIMIT_S + 10)
            line = lines.readline() if ready else ""
            if line:
                outcome, said = json.loads(line)
            else:
                outcome, said = "fault", "it died" if ready else "it hung"
            done += 1
            if outcome == "fault":
                faults.append((kind, number, said))
            else:
                tallies[kind][outcome] += 1
            if not line:
                break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines.close()
        order = order[done:]
    return tallies, faults


def start_child(seed, order, world):
    """(file of a JSON line a case, process id)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return open(reading), child
    try:
        with open(writing, "w") as out:
            for kind, number in order:
                print(json.dumps(run_case(seed, kind, number, world)), file=out, flush=True)
    finally:
        os._exit(1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        make_world(world)
        if args.only:
            print(*run_case(args.seed, args.only[0], int(args.only[1]), world, raises=True))
            return 0
        tallies, faults = run_all(args.seed, COUNTS, world, time.monotonic() + args.seconds)
    for kind, tally in tallies.items():
        print(f"{kind}: {tally['read']} read, {tally['refused']} refused")
    for kind, number, said in faults:
        print(f"FAULT {kind} {number}: {said[:300]}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
