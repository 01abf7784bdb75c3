"""Every stage and objective on a CUDA device that is not there (absent_device.py), and what that device catches."""
import re
import shutil
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from absent_device import AbsentDevice, CaptureError, DeviceError
from mini import CLASSES, write_clips, write_model
from tiny import published_config, randomise

from minixmd import pack
from minixmd.config import GRPO, SFT, TRAINING, Distill, Evaluate, FactCheck, Label, OnPolicy, Switch, Traces
from minixmd.inputs.batch import Batch, Prompt
from minixmd.kernels.swiglu import swiglu
from minixmd.learning import decoder, policy, rollout
from minixmd.learning.logprobs import SampledVocabulary
from minixmd.models.families import read_config
from minixmd.models.head import CrossEntropy
from minixmd.models.lora import add_lora, set_backend
from minixmd.models.multimodal import MultimodalLM
from minixmd.runner import RUN
from minixmd.runs.records import write_jsonl
from minixmd.tasks import rewards
from minixmd.verify import __main__ as verify

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a device is there"),
    pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning"),  # of memory that nothing has written to
]


@pytest.fixture(autouse=True)
def _poison_empty():
    """Not here: its NaN would be counted as launches."""


STEPS = dict(batch_size=4, micro_batch_tokens=300, max_steps=2, epochs=2, lr=1e-3, save_every=1)
ROLLOUT = dict(batch_size=2, micro_batch_tokens=200, max_steps=2, epochs=2, lr=1e-3, group_size=3, max_new_tokens=5,
               decode_slots=3)  # fmt: skip
TAUGHT = ROLLOUT | dict(micro_batch_tokens=300, min_pixels=784, max_pixels=3136)
FROM_LABELS = dict(teacher_labels="labels.jsonl", gate="learned", student_labels="labels.jsonl", switch="switch.jsonl")
STAGES = {  # class, whether it sees, and the fields that it has beside a model and a manifest
    "letters": (Evaluate, False, {}),
    "letters of video": (Evaluate, True, {}),
    "written": (Evaluate, False, dict(answer="generate", max_new_tokens=6)),
    "labels": (Label, True, dict(top_k=8)),
    "traces": (Traces, True, dict(num_samples=2, decode_slots=4, max_new_tokens=5, max_bad=1.0, top_k=4)),
    "sft": (SFT, False, dict(val_manifest="manifest.jsonl", **STEPS)),
    "sft of video": (SFT, True, STEPS),
    "sft, decoder": (SFT, False, dict(trainable="decoder", **STEPS)),
    "sft, decoder, 8-bit moments": (SFT, False, dict(trainable="decoder", moments="8bit", **STEPS)),
    "sft, full": (SFT, False, dict(trainable="full", **STEPS)),
    "sft, adapter in 8 bits": (SFT, False, dict(moments="8bit", **{**STEPS, "lr": 1e-2})),
    "sft on traces": (SFT, False, dict(traces="traces.jsonl", **STEPS)),
    "gate with letters": (Distill, False, dict(**FROM_LABELS, **STEPS)),
    "kl": (Distill, False, dict(teacher_labels="labels.jsonl", teacher_loss="kl", **STEPS)),
    "kl and letters": (Distill, False, dict(teacher_labels="labels.jsonl", teacher_loss="kl+ce", **STEPS)),
    "grpo": (GRPO, False, ROLLOUT),
    "grpo, decoder": (GRPO, False, dict(trainable="decoder", **ROLLOUT)),
    "grpo, full, by sequence": (GRPO, False, dict(trainable="full", ratio="sequence", num_iterations=2, **ROLLOUT)),
    "on policy": (OnPolicy, False, dict(gate="learned", switch="switch.jsonl", completions_every=1, **TAUGHT)),
    "on policy, decoder": (OnPolicy, False, dict(trainable="decoder", teacher_place="host", teacher_kl="reverse",
                                                 **TAUGHT)),
    "checker": (FactCheck, False, dict(traces="traces.jsonl", threshold=-50.0)),
    "verifier": (FactCheck, False, dict(traces="traces.jsonl", checker="verifier", verdicts="verdicts.jsonl",
                                        width=1 / 64, batch_size=4, threshold=-50.0)),
    "switch": (Switch, False, dict(teacher="teacher/results.json", student="student/results.json", width=1 / 64,
                                   train_manifest="manifest.jsonl", batch_size=2, clip_s=1.0)),
}  # fmt: skip
WITHOUT_MEDIA = (FactCheck, Switch)
FAST = {("sft", "torch", "float32")}


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


def run(world, folder, name, device, backend, dtype, small=False):
    """Runs a stage of STAGES in an empty folder. Returns what it logs, without times. small: with small rollouts, for
    the interpreter is slow."""
    kind, sees, fields = STAGES[name]
    if small and issubclass(kind, GRPO):
        fields = fields | dict(batch_size=1, group_size=2, decode_slots=2, max_new_tokens=3)
    files = {field: str(world / value) for field, value in fields.items() if str(value).endswith((".jsonl", ".json"))}
    model = {}
    if kind is not Switch:
        model = dict(model=str(world / ("eyes" if sees else "ears")), backend=backend, dtype=dtype)
    if backend == "triton" and kind in TRAINING and "full" not in name:  # the interpreter is slow
        model["checkpointing"] = "off"
    if kind is OnPolicy:
        model["teacher_model"] = str(world / "eyes")
    if kind not in WITHOUT_MEDIA:
        model["media"] = "video" if sees else "audio"
    if sees:
        model |= dict(min_pixels=784, max_pixels=3136)
    folder.mkdir()
    lines = []
    stage = kind(name="stage", manifest=str(world / "manifest.jsonl"), device=device, **model, **{**fields, **files})
    RUN[kind](stage, folder, lines.append)
    lines = [{key: value for key, value in line.items() if not key.endswith(("_s", "slot_use"))} for line in lines]
    return [line for line in lines if line]


@pytest.fixture
def spread(monkeypatch):
    """A reward that differs between the completions of a model that has learnt nothing."""
    monkeypatch.setitem(rewards.REWARDS, "accuracy", lambda text, *_: sum(map(str.islower, text)) / max(1, len(text)))


CASES = [pytest.param(name, backend, dtype, id=f"{name}-{backend}-{dtype}",
                      marks=() if (name, backend, dtype) in FAST else pytest.mark.slow)
         for name in STAGES for backend in ("torch", "triton") for dtype in ("float32", "bfloat16")]  # fmt: skip


@pytest.mark.parametrize("name, backend, dtype", CASES)
def test_a_stage_runs_on_the_device(world, tmp_path, spread, name, backend, dtype):
    with AbsentDevice() as device:
        found = run(world, tmp_path / "cuda", name, "cuda", backend, dtype, small=backend == "triton")
    assert sum(device.launches.values()) > 50 and not torch.cuda.is_available()
    if dtype != "float32" or name == "switch":  # its Cnn14 is laid out otherwise
        return
    expected = run(world, tmp_path / "cpu", name, "cpu", "torch", dtype, small=backend == "triton")
    losses, wanted = ([line["loss"] for line in lines if "loss" in line] for lines in (found, expected))
    assert losses == pytest.approx(wanted, rel=1e-3, abs=2e-3)
    if backend == "torch":
        assert found == expected


@pytest.mark.slow
def test_verify_passes_on_the_device_and_sees_a_graph_that_decodes_otherwise(world, capsys, monkeypatch):
    command = [str(world / "ears"), "--device", "cuda", "--dtype", "bfloat16"]
    few = ("packed = one at a time", "log-probs generated = scored", "captured decoding = step by step")
    monkeypatch.setattr(verify, "CHECKS", {name: verify.CHECKS[name] for name in few})  # all of them take minutes
    with AbsentDevice() as device:
        assert verify.main(command) == 0
        out = capsys.readouterr().out
        assert "bfloat16 on cuda:0, kernels in triton" in out and "captured decoding = step by step" in out
        assert re.search("captured.* 100% of tokens, 0e[+]00 nats .* PASS", out)

        def other_tokens(step):
            replay = device.capture(step)
            return lambda: (replay(), step.__self__.logp_SB.add_(0.5))

        monkeypatch.setattr(decoder, "capture", other_tokens)
        monkeypatch.setattr(verify, "CHECKS", {few[-1]: verify.CHECKS[few[-1]]})
        assert verify.main(command) == 1
        failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAIL")]
        assert len(failed) == 1 and failed[0].startswith("captured decoding")


# ---- how many launches, synchronisations and copies ----


def decoder_of(layers, adapter):
    """A bf16 model of some layers on the device, with Triton's kernels."""
    raw = published_config("audio", 4)
    raw["text_config"]["num_hidden_layers"] = layers
    model = randomise(MultimodalLM(read_config(raw))).to(torch.bfloat16).requires_grad_(False)
    if adapter:
        add_lora(model, rank=4, alpha=8, targets=r"model\.layers\..*_proj", seed=0)
    model = model.to("cuda")
    set_backend(model, "triton")
    return model


def texts(lengths):
    """Prompts of text, whose second half is to be learnt."""
    made = []
    for length in lengths:
        number = torch.arange(length)
        made.append(Prompt(number + 2, number.expand(3, -1), (), number >= length // 2))
    return made


def launches_of_a_decode_step(device, layers, adapter):
    processor = SimpleNamespace(end_id=1, decode=lambda ids: "", suppressed_ids=[0])
    rollout.decode(decoder_of(layers, adapter), processor, texts([5, 7]), 2, lambda i: torch.zeros(4).double(),
                   num_samples=2, max_new_tokens=4, temperature=0)
    return len(device.tape)


def launches_of_training(device, layers, lengths):
    """Of the second forward and backward pass after an update; the first one casts the adapters."""
    model = decoder_of(layers, adapter=True)
    batch = pack(texts(lengths)).to("cuda")
    for _ in range(2):
        device.reset()
        row_loss = CrossEntropy(batch.target_id_T, batch.target_weight_T, "triton")
        model.head_loss(model(batch), batch.target_row_T, row_loss)[0].backward()
    return sum(device.launches.values())


@pytest.mark.slow
@pytest.mark.parametrize("adapter, before, most", [(False, 43, 20), (True, 70, 32)])
def test_a_decode_step_takes_few_launches_a_layer(adapter, before, most):
    with AbsentDevice() as device:
        found = launches_of_a_decode_step(device, 3, adapter) - launches_of_a_decode_step(device, 2, adapter)
    assert 10 < found <= most < before


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(8, 8), (8, 5, 3)])
def test_training_takes_at_most_six_tenths_of_the_launches_of_before(lengths):
    with AbsentDevice() as device:
        found = launches_of_training(device, 3, lengths) - launches_of_training(device, 2, lengths)
    assert 50 < found <= 0.6 * (67 + 129)  # whatever the lengths: attention is one call


@pytest.mark.slow
def test_an_optimizer_step_waits_once_and_copies_little(world, tmp_path):
    found = {}
    for steps in (1, 2):
        with AbsentDevice() as device:
            fields = dict(STEPS, max_steps=steps, save_every=0)
            stage = SFT(name="s", model=str(world / "ears"), manifest=str(world / "manifest.jsonl"), media="audio",
                        dtype="bfloat16", **fields)
            (tmp_path / str(steps)).mkdir()
            RUN[SFT](stage, tmp_path / str(steps), lambda line: None)
        found[steps] = sum(device.syncs.values()), sum(device.copies.values())
    syncs, copies = (two - one for one, two in zip(found[1], found[2], strict=True))
    # losses and norm are read at once; the step's micro-batch goes in three pinned copies: integers, sounds, and what
    # attention needs in the decoder (in a tower with heads of 8 k it would be a fourth)
    assert (syncs, copies) == (1, 3)


# ---- planted faults ----


def item_in_the_step(step):
    return lambda decoder: (step(decoder), decoder.token_B[0].item())


def host_list_in_the_step(step):
    return lambda decoder: (decoder.token_B.copy_(torch.tensor([1] * len(decoder.token_B))), step(decoder))


def cpu_index_in_the_step(step):
    return lambda decoder: (step(decoder), decoder.token_B[torch.tensor([0])])


def boolean_index_in_the_step(step):
    return lambda decoder: (step(decoder), decoder.token_B[decoder.token_B > 0])


def growing_step(step):
    def grow(decoder):
        step(decoder)
        decoder.token_B = decoder.token_B.clone()  # at another address in each replay

    return grow


@pytest.mark.parametrize("fault", [item_in_the_step, host_list_in_the_step, cpu_index_in_the_step,
                                   boolean_index_in_the_step, growing_step])
def test_a_fault_in_the_captured_step_is_caught(monkeypatch, fault):
    monkeypatch.setattr(decoder.Decoder, "step", fault(decoder.Decoder.step))
    with AbsentDevice() as device, pytest.raises(CaptureError):
        launches_of_a_decode_step(device, 2, adapter=False)


def cpu_rows(batch):
    return replace(batch, target_row_T=batch.target_row_T.cpu())


def cpu_positions(batch):
    return replace(batch, positions_3N=batch.positions_3N.cpu())


def cpu_weights(batch):
    return replace(batch, target_weight_T=batch.target_weight_T.cpu())


def cpu_ids(batch):
    return replace(batch, target_id_T=batch.target_id_T.cpu())


@pytest.mark.parametrize("fault", [cpu_positions, cpu_weights, cpu_ids])
def test_a_missing_copy_to_the_device_is_caught(monkeypatch, fault):
    send = Batch.to
    monkeypatch.setattr(Batch, "to", lambda batch, device: fault(send(batch, device)))
    with AbsentDevice() as device, pytest.raises(DeviceError):
        launches_of_training(device, 2, (8, 5))


def media_left_behind(monkeypatch):
    send = Batch.to
    monkeypatch.setattr(Batch, "to", lambda batch, device: replace(send(batch, device), media=batch.media))


def vectors_left_behind(monkeypatch):
    monkeypatch.setattr(policy.Rollout, "send", lambda rollout, device: None)


def suppressed_ids_left_behind(monkeypatch):
    of = SampledVocabulary.of

    def on_the_cpu(*args):
        vocabulary = of(*args)
        return vocabulary._replace(suppressed_Z=vocabulary.suppressed_Z.cpu())

    monkeypatch.setattr(SampledVocabulary, "of", on_the_cpu)


@pytest.mark.parametrize("stage, fault", [("sft", media_left_behind), ("grpo", vectors_left_behind),
                                          ("grpo", suppressed_ids_left_behind)])
def test_a_copy_that_a_stage_forgets_is_caught(world, tmp_path, monkeypatch, spread, stage, fault):
    fault(monkeypatch)
    with AbsentDevice(), pytest.raises(DeviceError):
        run(world, tmp_path / "cuda", stage, "cuda", "torch", "float32")


def test_the_next_steps_clips_are_packed_and_pinned_before_a_step_waits(world, tmp_path, monkeypatch):
    events, pin, send = [], Batch.pinned, Batch.to
    clip = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(Batch, "pinned", lambda batch: (events.append("pin"), pin(batch))[1])
    monkeypatch.setattr(Batch, "to", lambda batch, device: (events.append("send"), send(batch, device))[1])
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_",
                        lambda *args: (events.append("read"), clip(*args))[1])
    with AbsentDevice() as device:
        run(world, tmp_path / "cuda", "sft of video", "cuda", "torch", "float32")
        assert [event for event, _ in groupby(events)] == ["pin", "send", "pin", "read", "send", "read"]
        batch = pin(pack(texts((8, 5))))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pytest.fail("what is pinned is pinned again"))
        device.reset()
        assert send(batch, "cuda").target_row_T.tolist() == pack(texts((8, 5))).target_row_T.tolist()
        assert sum(device.copies.values()) == 1


def test_a_cpu_index_and_a_pageable_copy_in_the_loop_are_counted(monkeypatch):
    send, found = Batch.to, []
    pageable = lambda batch, device: replace(send(batch, device), ids_N=batch.ids_N.to(device))  # noqa: E731
    for to in (send, lambda batch, device: cpu_rows(send(batch, device)), pageable):
        monkeypatch.setattr(Batch, "to", to)
        with AbsentDevice() as device:
            model = decoder_of(2, adapter=True)
            device.reset()
            batch = pack(texts((8, 5))).to("cuda")
            row_loss = CrossEntropy(batch.target_id_T, batch.target_weight_T, "triton")
            model.head_loss(model(batch), batch.target_row_T, row_loss)[0].backward()
        found.append(sum(device.syncs.values()))
    assert found[1] > found[0] and found[2] == found[0] + 1


def test_two_devices_that_meet_are_named():
    with AbsentDevice():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.is_cuda and there.device.type == "cuda" and (there + 1).cpu().tolist() == [2, 2, 2]
        for meet in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.long()],
                     lambda: there.numpy(), lambda: torch.rand(2, generator=torch.Generator(), device="cuda"),
                     lambda: swiglu(there[None], here[None])):
            with pytest.raises(DeviceError):
                meet()
