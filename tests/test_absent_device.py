"""Every stage and objective on a CUDA device that is not there (absent_device.py), and what that device catches."""
import shutil

import pytest
import torch
from absent_device import AbsentDevice
from mini import CLASSES, write_clips, write_model

from minixmd.config import GRPO, SFT, Distill, Evaluate, FactCheck, Label, Switch, Traces
from minixmd.runner import RUN
from minixmd.runs.records import write_jsonl
from minixmd.tasks import rewards

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a device is there")

STEPS = dict(batch_size=4, micro_batch_size=2, max_steps=2, epochs=2, lr=1e-3, save_every=1)
ROLLOUT = dict(batch_size=2, micro_batch_size=1, max_steps=2, epochs=2, lr=1e-3, group_size=3, max_new_tokens=5,
               decode_slots=3)  # fmt: skip
FROM_LABELS = dict(teacher_labels="labels.jsonl", gate="learned", student_labels="labels.jsonl", switch="switch.jsonl")
STAGES = {  # class, whether it sees, and the fields that it has beside a model and a manifest
    "letters": (Evaluate, False, {}),
    "letters of video": (Evaluate, True, {}),
    "written": (Evaluate, False, dict(answer="generate", max_new_tokens=6)),
    "labels": (Label, True, dict(top_k=8)),
    "traces": (Traces, True, dict(num_samples=2, decode_slots=4, max_new_tokens=5, max_bad=1.0)),
    "sft": (SFT, False, dict(val_manifest="manifest.jsonl", **STEPS)),
    "sft of video": (SFT, True, STEPS),
    "sft, decoder": (SFT, False, dict(trainable="decoder", **STEPS)),
    "sft, full": (SFT, False, dict(trainable="full", **STEPS)),
    "sft on traces": (SFT, False, dict(traces="traces.jsonl", **STEPS)),
    "gate with letters": (Distill, False, dict(**FROM_LABELS, **STEPS)),
    "kl": (Distill, False, dict(teacher_labels="labels.jsonl", teacher_loss="kl", **STEPS)),
    "kl and letters": (Distill, False, dict(teacher_labels="labels.jsonl", teacher_loss="kl+ce", **STEPS)),
    "grpo": (GRPO, False, ROLLOUT),
    "grpo, decoder": (GRPO, False, dict(trainable="decoder", **ROLLOUT)),
    "grpo, full, by sequence": (GRPO, False, dict(trainable="full", ratio="sequence", num_iterations=2, **ROLLOUT)),
    "checker": (FactCheck, False, dict(traces="traces.jsonl", threshold=-50.0)),
    "verifier": (FactCheck, False, dict(traces="traces.jsonl", checker="verifier", verdicts="verdicts.jsonl",
                                        width=1 / 64, batch_size=4, threshold=-50.0)),
    "switch": (Switch, False, dict(teacher="teacher/results.json", student="student/results.json", width=1 / 64,
                                   train_manifest="manifest.jsonl", batch_size=2, clip_s=1.0)),
}  # fmt: skip
WITHOUT_MEDIA = (FactCheck, Switch)
FAST = {("letters", "triton"), ("sft", "torch"), ("written", "triton"), ("letters of video", "torch")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The clips, two models, and what earlier stages would have written of them."""
    folder = tmp_path_factory.mktemp("world")
    write_clips(folder, 6)
    write_model(folder / "ears", "audio")
    write_model(folder / "eyes", "vision")
    clips = [f"clip{i}" for i in range(6)]
    top = {"temperature": 2.0, "ids": list(range(8)), "logits": [1.0 - i / 8 for i in range(8)], "logsumexp": 6.0}
    write_jsonl(folder / "labels.jsonl", [{"id": clip, "option": CLASSES[i % 3], "top": top}
                                          for i, clip in enumerate(clips)])
    shutil.copy(folder / "ears" / "tokenizer.json", folder)  # beside the labels: what their ids mean
    write_jsonl(folder / "switch.jsonl", [{"id": clip, "p_teacher": i % 2} for i, clip in enumerate(clips)])
    pairs = [(clip, sample) for clip in clips for sample in range(3)]
    write_jsonl(folder / "traces.jsonl", [
        {"id": clip, "sample": sample, "text": f"<think>a {CLASSES[i % 3]}</think><answer>{'ABC'[i % 3]}</answer>",
         "option": CLASSES[i % 3], "unanimous": True} for i, (clip, sample) in enumerate(pairs)])  # fmt: skip
    write_jsonl(folder / "verdicts.jsonl", [{"id": clip, "sample": sample, "score": 1.0, "accepted": i % 2 == 0}
                                            for i, (clip, sample) in enumerate(pairs)])
    for name, media, model in (("teacher", "video", "eyes"), ("student", "audio", "ears")):
        stage = Evaluate(name=name, model=str(folder / model), manifest=str(folder / "manifest.jsonl"), media=media,
                         device="cpu")
        (folder / name).mkdir()
        RUN[Evaluate](stage, folder / name, lambda line: None)
    return folder


def run(world, folder, name, device, backend, dtype):
    """Runs a stage of STAGES in an empty folder. Returns what it logs, without times."""
    kind, sees, fields = STAGES[name]
    files = {field: str(world / value) for field, value in fields.items() if str(value).endswith((".jsonl", ".json"))}
    model = {}
    if kind is not Switch:
        model = dict(model=str(world / ("eyes" if sees else "ears")), backend=backend, dtype=dtype)
    if kind not in WITHOUT_MEDIA:
        model["media"] = "video" if sees else "audio"
    if sees:
        model |= dict(min_pixels=784, max_pixels=3136)
    folder.mkdir()
    lines = []
    stage = kind(name="stage", manifest=str(world / "manifest.jsonl"), device=device, **model, **{**fields, **files})
    RUN[kind](stage, folder, lines.append)
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines]


@pytest.fixture
def spread(monkeypatch):
    """A reward that differs between the completions of a model that has learnt nothing."""
    monkeypatch.setitem(rewards.REWARDS, "accuracy", lambda text, *_: sum(map(str.islower, text)) / max(1, len(text)))


CASES = [pytest.param(name, backend, dtype, id=f"{name}-{backend}-{dtype}",
                      marks=() if (name, backend) in FAST and dtype == "bfloat16" else pytest.mark.slow)
         for name in STAGES for backend in ("torch", "triton") for dtype in ("float32", "bfloat16")]  # fmt: skip


@pytest.mark.parametrize("name, backend, dtype", CASES)
def test_a_stage_runs_on_the_device(world, tmp_path, spread, name, backend, dtype):
    with AbsentDevice() as device:
        found = run(world, tmp_path / "cuda", name, "cuda", backend, dtype)
    assert sum(device.launches.values()) > 100 and not torch.cuda.is_available()
    same_arithmetic = dtype == "float32" and backend == "torch" and name != "switch"  # its Cnn14 is laid out otherwise
    if same_arithmetic:
        assert found == run(world, tmp_path / "cpu", name, "cpu", "torch", dtype)
