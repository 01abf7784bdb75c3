"""--dry-run: models without weights, prompts, and estimates of memory beside measured peaks."""
import json
import re
import shutil
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from weakref import finalize

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
import triton
from mini import AUDIO, VISION, write_config, write_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minixmd
from minixmd.config import GRPO, SFT, Distill, Evaluate, FactCheck, Label, Switch, Traces
from minixmd.dryrun import costs
from minixmd.dryrun.costs import LOWERED, settings_to_lower
from minixmd.dryrun.memory_estimate import estimate
from minixmd.dryrun.meta_tracer import CATEGORIES, Phase, trace_memory
from minixmd.dryrun.models import PUBLISHED, ModelInfo, blank_clip, find_model
from minixmd.dryrun.plan import EXAMPLE, plan_stage, write_stand_in_tokenizer
from minixmd.dryrun.slots import settle_slots
from minixmd.inputs.batch import Prompt, pack
from minixmd.inputs.examples import manifest_text
from minixmd.inputs.positions import positions_of
from minixmd.learning.decoder import prompt_rows
from minixmd.learning.kv_cache import pool_bytes
from minixmd.learning.targets import Item
from minixmd.models.cnn14 import make_cnn14, mixup, spec_augment
from minixmd.models.families import read_config
from minixmd.models.lora import add_lora, set_backend
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import save_adapter, save_model
from minixmd.runner import main
from minixmd.runs import distributed, files
from minixmd.stages.multiple_choice import Questions, Writing, score_letters, write_answers
from minixmd.train import Trainer

CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """ears/ and eyes/, models with weights; wide/, the first's config.json with a wide vocabulary, and no weights."""
    home = tmp_path_factory.mktemp("models")
    text = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=2048, vocab_size=400)
    rope = {"type": "mrope", "mrope_section": [4, 4, 4]}
    write_tokenizer(home / "ears", AUDIO, [EXAMPLE.question])
    write_tokenizer(home / "eyes", VISION, [EXAMPLE.question])
    for name, raw in {
        "ears": {"model_type": "qwen2_audio", "text_config": text, "audio_config": dict(
            d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128)},
        "eyes": {"model_type": "qwen2_vl", **text, "rope_scaling": rope, "vision_config": dict(
            depth=2, embed_dim=64, num_heads=2, hidden_size=96, mlp_ratio=2)},
    }.items():  # fmt: skip
        torch.manual_seed(0)
        model = MultimodalLM(read_config(raw))
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.05)
        save_model(model, home / name, home / name)
    raw = json.loads((home / "ears" / "config.json").read_text())
    raw["text_config"]["vocab_size"] = 50_000
    (home / "wide").mkdir()
    (home / "wide" / "config.json").write_text(json.dumps(raw))
    (home / "wide" / "tokenizer.json").write_bytes((home / "ears" / "tokenizer.json").read_bytes())
    return home


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The hub's cache, an empty folder; and no socket may be opened."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a dry run asked the network"))
    return tmp_path / "cache"


def case(models, cls, name="ears", **more):
    fields = dict(batch_size=4, device="cpu", media="video" if name == "eyes" else "audio")
    if cls is GRPO:
        fields |= dict(batch_size=2, group_size=2, max_new_tokens=16, completions_every=0)
    return cls(name="case", model=str(models / name), manifest="none.jsonl", **fields | more)


def plan_of(stage, tmp_path, *stages):
    write_stand_in_tokenizer(tmp_path, [stage])
    plan = plan_stage(stage, [*stages, stage], tmp_path)
    assert plan.fault == ""
    return plan


def phases_of(stage, tmp_path, *stages):
    plan = plan_of(stage, tmp_path, *stages)
    return {phase.name: phase for phase in estimate(stage, plan.model, plan.prompt)}


# ---- the estimate beside what is measured ----


class Allocated(TorchDispatchMode):
    """Most bytes of CPU storages made within it that were alive at once; bench_memory asks torch's allocator."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0  # address -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage and storage.data_ptr() not in self.alive:
                self.alive[storage.data_ptr()] = storage.nbytes()
                finalize(storage, self.alive.pop, storage.data_ptr())
        self.most = max(self.most, sum(self.alive.values()))
        return out


def peak(side):
    with Allocated() as allocated:
        side()
    return allocated.most


@pytest.mark.parametrize("cls, more", [
    (SFT, {}),
    pytest.param(SFT, dict(trainable="full", clips=1), marks=pytest.mark.slow),
    pytest.param(SFT, dict(trainable="full", clips=4), marks=pytest.mark.slow),
    (SFT, dict(trainable="decoder", name="eyes", dtype="bfloat16", min_pixels=3136, max_pixels=50_176)),
    pytest.param(SFT, dict(trainable="full", clips=1, moments="8bit", batch_size=2),
                 marks=pytest.mark.slow),
    (GRPO, {}),
    pytest.param(GRPO, dict(trainable="decoder", decode_slots=2), marks=pytest.mark.slow),
    (GRPO, dict(trainable="full", clips=2, beta=0.0, ratio="sequence")),
])  # fmt: skip
def test_an_estimate_is_the_measured_peak(cls, more, models, tmp_path):
    more = dict(more)
    clips = more.pop("clips", 1 if cls is GRPO else 2)  # of a pass
    stage = case(models, cls, **more)
    plan = plan_of(stage, tmp_path)
    written = stage.group_size * stage.max_new_tokens if cls is GRPO else 0
    stage = replace(stage, micro_batch_tokens=clips * (len(plan.prompt) + written))
    phases = estimate(stage, plan.model, plan.prompt)
    prompts = [replace(plan.prompt) for _ in range(stage.batch_size)]
    samples = [(prompt, Item(replace(EXAMPLE, id=str(i)), 0, "manifest")) for i, prompt in enumerate(prompts)]

    def two_steps():
        trainer = Trainer(stage, len(samples), tmp_path)
        for trainer.step in range(2):
            if cls is SFT:
                trainer.sft_step(trainer.micro_batches(samples))
            else:
                assert trainer.grpo_step(samples)["completion_tokens"] > 0.8 * stage.max_new_tokens

    measured, largest = peak(two_steps), max(phase.total for phase in phases)
    # on a GPU a pass has its own copy of the clips
    features = clips * sum(m.features.nbytes for m in plan.prompt.media)
    assert measured <= 1.02 * largest
    assert largest <= 1.02 * (measured + features)
    names = ["update", "optimizer"]
    if cls is GRPO:
        names = ["rollout", "scoring", *names] if stage.beta else ["rollout", *names]
    assert [phase.name for phase in phases] == names


class BlankProcessor(minixmd.Processor):
    def __call__(self, conversation, load=None, max_new_tokens=0):
        return super().__call__(conversation, blank_clip, max_new_tokens)


@pytest.mark.parametrize("answer", ["letters", "generate"])
def test_an_estimate_of_an_evaluation_is_the_measured_peak(answer, models, tmp_path):
    stage = Evaluate(name="a", model=str(models / "ears"), manifest="none.jsonl", answer=answer, max_new_tokens=12,
                     batch_tokens=1500, device="cpu")
    plan = plan_of(stage, tmp_path)
    examples = [replace(EXAMPLE, id=str(i)) for i in range(1500 // len(plan.prompt))]
    if answer == "generate":
        stage = replace(stage, decode_slots=len(examples))
    (phase,) = estimate(stage, plan.model, plan.prompt)
    processor = BlankProcessor(stage.model, plan.model.config)

    def evaluate():
        model, _ = minixmd.load(stage.model)
        if answer == "letters":
            score_letters(model, Questions(processor, examples, stage.prompt_format), batch_tokens=1500)
        else:
            questions = Questions(processor, examples, stage.prompt_format, 12)
            write_answers(model, questions, Writing(12, slots=len(examples)), batch_tokens=1500)

    # the clips wait here; on a GPU they are the pass's own copies
    clips = len(examples) * plan.prompt.media[0].features.nbytes
    assert phase.total == pytest.approx(peak(evaluate), abs=1.01 * clips)


def test_a_cnn14s_estimate_is_the_measured_peak():
    switch = Switch(name="switch", teacher="x", student="x", manifest="x", train_manifest="x", device="cpu", clip_s=1.0,
                    width=1 / 16, batch_size=4)
    (phase,) = estimate(switch, None, None)
    heard_BAM, noise = torch.randn(8, 101, 64), torch.Generator()

    def two_steps():
        model = make_cnn14(2, 1 / 16, 0)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            x, y = mixup(spec_augment(model.normalise(heard_BAM), noise), torch.eye(2).repeat(4, 1), noise)
            F.cross_entropy(model.fc_audioset(model.embed(x, noise)), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert phase.total == pytest.approx(peak(two_steps), rel=0.05)


@pytest.mark.parametrize("trainable, moments, state", [
    ("decoder", "float32", 10), ("full", "float32", 10), ("decoder", "8bit", 4)])
def test_the_categories_of_an_update_are_what_they_are_called(trainable, moments, state, models, tmp_path):
    stage = case(models, GRPO, trainable=trainable, moments=moments, dtype="bfloat16", device="cuda",
                 micro_batch_tokens=600)
    phases = phases_of(stage, tmp_path)
    size = phases["update"].bytes
    counts = {name: p.numel() for name, p in minixmd.load(stage.model)[0].named_parameters()}
    if trainable == "decoder":
        trained = sum(count for name, count in counts.items() if name.startswith(("model.", "lm_head.")))
    else:
        trained = sum(counts.values()) - counts["audio_tower.embed_positions.weight"]
    assert set(size) <= set(CATEGORIES)
    assert size["weights"] == pytest.approx(2 * sum(counts.values()), abs=100) and size["reference"] == 2 * trained
    # a residual of 16 bits and two moments; of 8 bits in whole blocks with a scale
    most = 1.03 * state * trained + 1000 + 2 * 256 * len(counts)
    assert state * trained <= size["optimizer"] < most < (state + 2) * trained
    assert phases["optimizer"].bytes["optimizer"] < most  # the kernel makes no fp32 copies
    assert 2 * trained <= size["gradients"] < 2.01 * trained + 1000


@pytest.mark.parametrize("decode_slots, prompt_slots", [(4, 2), (2, 2)])
def test_a_rollouts_kv_cache_is_its_pools(decode_slots, prompt_slots, models, tmp_path):
    stage = case(models, GRPO, decode_slots=decode_slots, dtype="bfloat16", device="cuda")
    plan = plan_of(stage, tmp_path)
    rows = prompt_rows(len(plan.prompt), captured=True)
    assert rows % 256 == 0 and rows >= 1.25 * len(plan.prompt)
    pools = pool_bytes(plan.model.config.text, prompt_slots, rows, decode_slots, 16, torch.bfloat16)
    assert pools < phases_of(stage, tmp_path)["rollout"].bytes["KV cache"] < pools + 2000


WRITERS = {
    "grpo": (GRPO, dict(batch_size=64, group_size=8, val_manifest="val.jsonl")),
    "traces": (Traces, dict(num_samples=8, max_new_tokens=64, media="audio")),
    "written": (Evaluate, dict(answer="generate", max_new_tokens=64)),
    "sft": (SFT, dict(traces="traces.jsonl", val_manifest="val.jsonl", max_new_tokens=64)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_decode_slots_auto_fills_the_card_and_no_more(name, models, tmp_path, monkeypatch, capsys):
    cls, more = WRITERS[name]
    fields = dict(name="a", model=str(models / "ears"), manifest="none.jsonl", device="cuda", dtype="bfloat16")
    stage = cls(**fields | more)
    plan = plan_of(stage, tmp_path)

    def needed(slots):
        return max(phase.total for phase in estimate(replace(stage, decode_slots=slots), plan.model, plan.prompt))

    gib = (needed(96) * 1.05 + 2**20) / 2**30 + 1.0  # with the driver and what the allocator wastes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib * 2**30, 80 * 2**30))
    settled = settle_slots(stage, [stage], tmp_path)
    assert settled.decode_slots == settled.slots and needed(settled.slots) <= needed(96) + 2**20
    assert 88 <= settled.slots <= 104 or needed(settled.slots) == needed(96)  # another phase holds more
    assert f"a: decode_slots {settled.slots}" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    assert settle_slots(stage, [stage], tmp_path).decode_slots == settled.slots  # as it began
    files.write_json(tmp_path / "slots.json", {"decode_slots": 24})
    assert settle_slots(stage, [stage], tmp_path).decode_slots == 24
    assert settle_slots(replace(stage, decode_slots=5), [stage], tmp_path).decode_slots == 5


@pytest.mark.parametrize("trainable", ["lora", "decoder"])
def test_an_estimate_waits_for_no_other_process(trainable, models, tmp_path, monkeypatch):
    """The first of several processes estimates while the others wait for what it finds."""
    stage = case(models, GRPO, trainable=trainable, device="cuda", dtype="bfloat16")
    wanted = phases_of(stage, tmp_path)
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 2))
    with pytest.raises(ValueError, match="process group"):
        distributed.gather(None)
    assert phases_of(stage, tmp_path) == wanted


def test_where_nothing_is_to_be_chosen_decode_slots_stay(models, tmp_path):
    fields = dict(name="a", model=str(models / "ears"), manifest="none.jsonl")
    endpoint = dict(endpoint="http://localhost:1/v1", served="m", model=None)
    for stage in (Evaluate(**fields, device="cpu", answer="generate"), SFT(**fields, device="cuda"),
                  Evaluate(**fields, device="cuda"), Traces(**fields | endpoint),
                  Distill(**fields, teacher_labels="x")):
        assert settle_slots(stage, [stage], tmp_path) is stage
    assert not (tmp_path / "slots.json").exists()


TRACES = Traces(name="a", model="m", manifest="x", num_samples=8)


def test_slots_that_fit_are_few_on_a_small_card_and_256_at_most():
    def phases(slots):
        return [Phase("generate", 0, 1, Counter({"weights": 10 * 2**30, "KV cache": slots * 2**27})),
                Phase("optimizer", 0, 1, Counter({"weights": 10 * 2**30}))]

    assert costs.slots_tried(TRACES) == (16, 32) and costs.slots_tried(replace(TRACES, num_samples=40)) == (40, 80)
    few, more = (phases(slots) for slots in costs.slots_tried(TRACES))
    found = {gib: costs.slots_that_fit(TRACES, few, more, gib) for gib in (11, 12, 20, 44.4, 1000)}
    assert found == {11: 0, 12: 3, 20: 64, 44.4: 248, 1000: 256}
    assert costs.slots_that_fit(TRACES, few[1:], more[1:], 11) == 0  # no phase depends on them, and one does not fit
    for gib, slots in found.items():
        if 1 < slots < 256:
            assert costs.needed_gib(phases(slots)[0].total) <= gib < costs.needed_gib(phases(slots + 8)[0].total)


def test_the_dry_run_says_what_auto_is_on_each_card(models, tmp_path, capsys):
    stage = Traces(name="a", model=str(models / "ears"), manifest="none.jsonl", media="audio", device="cuda",
                   dtype="bfloat16", num_samples=4, prompt="{question}\n{options}")
    status, out, _ = dry(tmp_path, capsys, [stage])
    assert 'decode_slots "auto", here 16: 256 on 24 GB, 256 on 48 GB, 256 on 80 GB, 256 on 141 GB' in out


@pytest.mark.slow
@pytest.mark.parametrize("moments, gib", [("float32", 117), ("8bit", 74)])
def test_what_grpo_of_a_7b_decoder_takes_before_activations(moments, gib, tmp_path):
    stage = GRPO(name="grpo", model="Qwen/Qwen2-Audio-7B-Instruct", manifest="none.jsonl", trainable="decoder",
                 dtype="bfloat16", batch_size=2, group_size=2, max_new_tokens=2, micro_batch_tokens=400,
                 moments=moments)
    size = phases_of(stage, tmp_path)["update"].bytes
    lasting = sum(size[name] for name in ("weights", "reference", "gradients", "optimizer"))
    assert lasting / 2**30 == pytest.approx(gib, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("gpus, gib", [(8, 44.4), (4, 79.1), (2, 139.0)])
@pytest.mark.parametrize("options", [{}, dict(moments="8bit", reference="host")])
def test_grpo_of_a_7b_decoder_fits_the_papers_node_and_two_others(gpus, gib, options, tmp_path):
    stage = GRPO(name="grpo", model="Qwen/Qwen2-Audio-7B-Instruct", manifest="none.jsonl", trainable="decoder",
                 dtype="bfloat16", val_manifest="none.jsonl", decode_slots=16, **options)
    plan = plan_of(stage, tmp_path)
    phases = estimate(stage, plan.model, plan.prompt, gpus)
    assert len(phases) == 5 and all(costs.needed_gib(phase.total) <= gib for phase in phases)


def test_each_of_two_processes_holds_half_of_what_is_sharded_and_a_rollout_a_whole_copy(models, tmp_path):
    stage = case(models, GRPO, trainable="full", dtype="bfloat16", device="cuda", batch_size=4)
    plan = plan_of(stage, tmp_path)
    one, two = (estimate(replace(stage, batch_size=batch), plan.model, plan.prompt, gpus)
                for batch, gpus in ((2, 1), (4, 2)))
    named = plan.model.on_meta(torch.bfloat16).named_parameters()
    trained = sum(p.nbytes for name, p in named if not name.endswith("embed_positions.weight"))
    for alone, part in zip(one, two, strict=True):
        copies = {"rollout": trained, "validation": trained}.get(part.name, 0)
        if part.name != "update":
            assert part.bytes["weights"] == pytest.approx(alone.bytes["weights"] - trained / 2 + copies, rel=0.05)
        assert part.bytes["optimizer"] == alone.bytes["optimizer"] // 2
        assert part.sent > 0 or part.name == "optimizer"


def test_an_adapters_model_is_whole_and_a_step_shared(models, tmp_path):
    stage = case(models, SFT, batch_size=4, device="cuda")
    plan = plan_of(stage, tmp_path)
    one, two = (estimate(stage, plan.model, plan.prompt, gpus) for gpus in (1, 2))
    assert [phase.bytes["weights"] for phase in one] == [phase.bytes["weights"] for phase in two]
    hours, _ = costs.stage_hours(stage, one, 1000, 0)
    assert 0.4 * hours < costs.stage_hours(stage, two, 1000, 0, 2)[0] < hours


def test_of_a_sharded_reader_the_decoders_blocks_are_divided(models, tmp_path):
    stage = Label(name="labels", model=str(models / "ears"), manifest="none.jsonl", sharded=True, device="cuda")
    plan = plan_of(stage, tmp_path)
    (one,), (four,) = (estimate(stage, plan.model, plan.prompt, gpus) for gpus in (1, 4))
    blocks = [sum(4 * p.numel() for p in block.parameters()) for block in minixmd.load(stage.model)[0].model.layers]
    assert one.bytes["weights"] - four.bytes["weights"] == sum(blocks) - sum(blocks) // 4 - 2 * max(blocks)


def test_a_gpu_has_no_copy_of_the_head_and_no_torch_twins(models, tmp_path):
    launch = triton.KernelInterface.__getitem__
    stage = Label(name="labels", model=str(models / "wide"), manifest="none.jsonl", dtype="bfloat16", batch_tokens=400)
    gpu, cpu = (phases_of(replace(stage, device=device), tmp_path)["forward"] for device in ("cuda", "cpu"))
    copy = 4 * 50_000 * 96  # in fp32, which the CPU's product makes
    assert cpu.bytes["logits"] >= copy > gpu.total - gpu.bytes["weights"]
    stage = case(models, GRPO, name="wide")
    gpu, cpu = (phases_of(replace(stage, device=device), tmp_path)["update"] for device in ("cuda", "cpu"))
    assert cpu.total > gpu.total + 4 * 32 * 50_000  # the twins' own logits, of 32 tokens
    assert triton.KernelInterface.__getitem__ is launch  # back in its place


def test_whatever_runs_a_model_is_estimated(models, tmp_path):
    ears, eyes, common = str(models / "ears"), str(models / "eyes"), dict(manifest="none.jsonl", dtype="bfloat16")
    small = dict(min_pixels=3136, max_pixels=50_176)
    traces = Traces(name="traces", model=eyes, max_new_tokens=40, **small, **common)
    judge = FactCheck(name="judge", traces="@traces", model=ears, **common)
    labels = dict(teacher_labels="x/labels.jsonl")
    for stage, wanted in (
        (Evaluate(name="a", model=ears, **common), {"forward"}),
        (Evaluate(name="a", model=eyes, media="video", answer="generate", **small, **common), {"generate"}),
        (Evaluate(name="a", model=ears, answer="generate", num_samples=4, temperature=1.0, **common), {"generate"}),
        (traces, {"generate"}), (judge, {"forward"}),
        (replace(judge, checker="verifier", verdicts="@judge/verdicts.jsonl", width=1 / 16), {"forward", "training"}),
        (case(models, Distill, teacher_loss="kl+ce", dtype="bfloat16", **labels), {"update", "optimizer"}),
        (case(models, Distill, teacher_loss="kl", device="cuda", **labels), {"update", "optimizer"}),
        (case(models, SFT, traces="x.jsonl", max_new_tokens=64, val_manifest="y.jsonl", device="cuda"),
         {"update", "optimizer", "validation"}),
    ):  # fmt: skip
        phases = phases_of(stage, tmp_path, traces, judge)
        assert phases.keys() == wanted, stage
        assert all(phase.total > phase.bytes["weights"] > 0 for phase in phases.values())


def test_storages_are_followed_from_birth_to_death():
    with trace_memory(7, "cuda") as tracer:
        assert torch.empty(1, device="meta").is_cuda
        with tracer.phase("first"):
            x = torch.empty(100, 7, device="meta")
            y = x.T[1:]
            assert (tracer.current.total(), tracer.current["logits"]) == (2800, 2800)
            del x
            z = y + 1
            assert tracer.current.total() == 2800 + 2400 and z.shape == (6, 100)
            del y, z
            assert tracer.current.total() == 0
        (first,) = tracer.phases
        assert first.total == 5200 and first.bytes == {"weights": 0, "logits": 2800, "activations": 2400}
        number_N = torch.tensor([3, 0, 2]).to("meta")
        assert number_N.tolist() == [3, 0, 2] and number_N[number_N > 1].shape == (3,)
        assert torch.empty(2, device="meta").sum().item() == 1
        before = tracer.current.total()
        with tracer.phase("second"):
            pass
        assert tracer.phases[1].total == before


# ---- operations, hours, cards and disk ----


def text_batch(length, count):
    return pack([Prompt(torch.zeros(length, dtype=torch.int64), positions_of(length, []))] * count)


def decoder_flops(length, count):
    """Of ears/: products of the layers, as a formula, and q kᵀ and (softmax) v of all rows with all."""
    D, F_, L, H, J, K = 96, 256, 2, 4, 2, 24
    weights = D * H * K + 2 * D * J * K + H * K * D + 3 * D * F_
    return 2 * L * weights * length * count, 4 * L * H * K * length**2 * count


@pytest.mark.parametrize("device, dtype", [("cpu", "float32"), ("cuda", "bfloat16"), ("cuda", "float32")])
def test_the_operations_of_a_forward_pass_are_those_of_the_formula(device, dtype, models, tmp_path):
    stage = FactCheck(name="judge", checker="verifier", traces="t.jsonl", verdicts="v.jsonl", manifest="none.jsonl",
                      model=str(models / "ears"), device=device, dtype=dtype, width=1 / 16)
    plan = plan_of(stage, tmp_path)
    forward, _ = estimate(stage, plan.model, plan.prompt)
    T, B = len(plan.prompt), forward.sequences
    assert B == 8192 // T and forward.tokens == B * T and forward.step_flops == 0
    assert forward.flops == sum(decoder_flops(T, B)) + 2 * B * 96 * 400  # and the head's rows


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_backward_pass_is_two_forward_passes_and_one_where_an_adapter_trains(device, models, tmp_path):
    plan = plan_of(case(models, SFT), tmp_path)
    products, attention = decoder_flops(50, 3)
    found = {}
    for kind in ("full", "lora"):
        with trace_memory(400, device) as tracer:
            model = plan.model.on_meta(torch.bfloat16)
            set_backend(model, "triton" if device == "cuda" else "torch")
            if kind == "lora":
                add_lora(model, rank=2, alpha=1.0, targets=r"model\.layers\..*_proj", seed=0)
            for name, p in model.named_parameters():
                p.requires_grad_(kind == "full" or "lora_" in name)
            with tracer.phase("forward"):
                hidden_ND = model(text_batch(50, 3).to("meta"))
            with tracer.phase("backward"):
                hidden_ND.sum().backward()
        found[kind] = [phase.flops for phase in tracer.phases]
    assert found["full"] == [products + attention, 2 * products + 2.5 * attention]
    forward, backward = found["lora"]  # also where one kernel computes a layer with its adapter
    assert products + attention < forward < 1.1 * products + attention
    assert 0.8 * products + 2.5 * attention < backward < 1.2 * products + 2.5 * attention  # less the first layer's dx


def test_a_written_answer_costs_its_prompt_and_its_steps(models, tmp_path):
    stage = Evaluate(name="a", model=str(models / "ears"), manifest="none.jsonl", answer="generate", max_new_tokens=40,
                     dtype="bfloat16")
    letters, written = (phases_of(replace(stage, answer=answer), tmp_path) for answer in ("letters", "generate"))
    forward, generate = letters["forward"], written["generate"]
    assert generate.sequences == 256  # the most of "auto"
    assert generate.flops == pytest.approx(forward.flops * 256 / forward.sequences)
    assert generate.step_flops == decoder_flops(1, generate.sequences)[0] + 2 * generate.sequences * 96 * 400
    read = generate.bytes["weights"] + generate.bytes["KV cache"] / 2
    passes = 1000 / generate.sequences
    seconds = passes * max(generate.flops / 316e12, generate.bytes["weights"] / 2.8e12)
    seconds += passes * 40 / 0.85 * max(generate.step_flops / 316e12, read / 2.8e12)
    assert costs.stage_hours(stage, [generate], 1000, 0) == (pytest.approx(seconds / 3600), 0)
    longer = replace(stage, max_new_tokens=1000)  # no answer is taken to be longer than 200
    assert costs.stage_hours(longer, [replace(generate, flops=0)], 1000, 0)[0] < 5.01 * seconds / 3600


def test_a_clips_traces_are_checked_behind_one_prompt(models, tmp_path):
    """The clip and the question count once, for as many traces as fit a batch."""
    common = dict(manifest="none.jsonl", device="cpu", dtype="bfloat16")
    found = {}
    for name, samples, more in (("alone", 1, {}), ("eight", 8, {}), ("cut", 8, dict(batch_tokens=1200)),
                                ("few", 8, dict(trace_filter="calibration", limit=9))):
        traces = Traces(name="traces", model=str(models / "eyes"), num_samples=samples, max_new_tokens=45, **common)
        stage = FactCheck(name="judge", traces="@traces", model=str(models / "ears"), **common | more)
        plan = plan_of(stage, tmp_path, traces)
        (forward,) = estimate(stage, plan.model, plan.prompt)
        found[name] = plan.prompt, forward
    alone, one = found["alone"]
    group, eight = found["eight"]
    assert isinstance(alone, Prompt) and found["few"][1] == one
    rest = len(alone) - len(group.prompt)
    assert [len(rest_T) for rest_T in group.completions] == [rest] * 8 and len(group) == len(alone) + 7 * rest
    clips = 8192 // len(group)
    assert (eight.sequences, eight.tokens) == (8 * clips, clips * len(group))
    model = plan.model.on_meta(torch.bfloat16)
    with trace_memory(400, "cpu") as tracer:
        model.encode_media(alone)
    products = decoder_flops(len(group), 1)[0] + 8 * 2 * 96 * 400
    attention = decoder_flops(len(group.prompt), 1)[1] + 8 * 4 * 2 * 4 * 24 * rest * len(alone)
    assert eight.flops == clips * (tracer.flops + products + attention)
    part, cut = found["cut"]
    assert len(part) <= 1200 < len(part) + rest and cut.sequences == len(part.completions) < 8
    hours = [costs.stage_hours(stage, [phase], 800, 0)[0] for phase in (one, eight)]
    assert hours[0] > 1.5 * hours[1]


def test_clips_are_encoded_once_each(models, tmp_path):
    stage = case(models, GRPO, device="cuda", dtype="bfloat16", batch_size=4, group_size=2, decode_slots=4)
    frozen, trained = (phases_of(replace(stage, trainable=t), tmp_path) for t in ("decoder", "full"))
    assert frozen["rollout"].sequences == 2
    assert frozen["rollout"].flops == trained["rollout"].flops  # encoded beforehand or in the prefill
    assert 3 * frozen["scoring"].flops < frozen["update"].flops < trained["update"].flops


def test_a_stages_passes_are_counted():
    sft = SFT(name="a", model="m", manifest="x", epochs=3, batch_size=8, val_manifest="y", eval_every=10)
    assert costs.sequences_of(sft, 320, 50) == {  # 120 steps
        "rollout": 960, "reading": 960, "scoring": 960, "update": 960, "optimizer": 120, "validation": 12 * 50}
    grpo = GRPO(name="a", model="m", manifest="x", epochs=3, batch_size=8, max_steps=25, num_iterations=2)
    assert costs.sequences_of(grpo, 320, 50) == {
        "rollout": 200, "reading": 200, "scoring": 200, "update": 400, "optimizer": 50, "validation": 50}
    switch = Switch(name="s", teacher="x", student="x", manifest="x", train_manifest="x", epochs=30)
    assert costs.sequences_of(switch, 100, 600)["training"] == 30 * 100 + 200
    traces = Traces(name="traces", model="m", manifest="x", num_samples=8)
    checked = FactCheck(name="checked", traces="@traces", manifest="x", model="m", trace_filter="all")
    calibration = replace(checked, name="few", trace_filter="calibration", limit=60)
    for stage, wanted in ((traces, 100), (checked, 800), (calibration, 60), (replace(sft, traces="@checked"), 800),
                          (replace(sft, traces="@checked", trace_filter="first"), 100), (sft, 100)):
        assert costs.count_items(stage, [traces, checked, calibration], 100)[0] == wanted, stage


def write_manifest(path, count, **changes):
    example = replace(EXAMPLE, audio="clip.wav", video=None, **changes)
    path.write_text(manifest_text([replace(example, id=str(i)) for i in range(count)]))
    return str(path)


def test_hours_grow_with_the_manifests_lines(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(costs, "TFLOPS", 1e-8)  # so that a tiny model takes hours
    hours = {}
    for count in (100, 200, 0):
        manifest = write_manifest(tmp_path / f"{count}.jsonl", count) if count else "none.jsonl"
        stages = [Evaluate(name="one", model=str(models / "ears"), manifest=manifest, dtype="bfloat16"),
                  Evaluate(name="more", model=str(models / "ears"), manifest="none.jsonl", dtype="bfloat16"),
                  Evaluate(name="cpu", model=str(models / "ears"), manifest="none.jsonl", device="cpu")]
        status, out, _ = dry(tmp_path, capsys, stages)
        assert status == 0
        listed, memory = out.split("\nprompt 1\n")[0], out.split("memory, MiB\n")[1]
        clips = {line.split()[0]: line.split()[2] for line in listed.splitlines() if " evaluate " in line}
        assert clips == {"one": str(count) if count else "10,000*", "more": "10,000*", "cpu": "10,000*"}
        rows = {line.split()[0]: line.split()[-1] for line in memory.splitlines() if line}
        hours[count] = float(rows["one"])
        assert rows["more"] == f"{hours[0]:.2f}" if count == 0 else hours[count] > 0.1
        assert float(rows["total"]) == pytest.approx(float(rows["one"]) + float(rows["more"]), abs=0.02)
    assert hours[200] == pytest.approx(2 * hours[100], abs=0.02)
    assert hours[0] == pytest.approx(100 * hours[100], rel=0.05)


def phase_of(name, **gib):
    return Phase(name, 0, 1, Counter({category.replace("_", " "): 2**30 * size for category, size in gib.items()}))


def test_a_card_has_room_beside_its_driver_and_what_the_allocator_wastes():
    assert list(costs.CARDS) == ["24", "48", "80", "141"]
    size = (costs.CARDS["48"] - 1.0) / 1.05 * 2**30
    assert costs.needed_gib(size - 1) <= costs.CARDS["48"] < costs.needed_gib(size + 2**20)


def test_the_setting_to_lower_is_named_where_it_would_help():
    sft = SFT(name="a", model="m", manifest="x", micro_batch_tokens=4096, checkpointing="on")
    assert settings_to_lower(sft, "update", 330) == {"micro_batch_tokens": 330}
    assert settings_to_lower(replace(sft, checkpointing="off"), "update", 4096) == {"checkpointing": "on"}
    assert settings_to_lower(replace(sft, checkpointing="auto"), "update", 4096) == {}  # on a GPU it is on
    assert settings_to_lower(sft, "update", 4096) == {} == settings_to_lower(sft, "optimizer")
    grpo = GRPO(name="a", model="m", manifest="x")
    assert settings_to_lower(grpo, "rollout") == {}  # "auto" takes what there is
    assert settings_to_lower(replace(grpo, decode_slots=8), "rollout") == {"decode_slots": 1}
    evaluate = Evaluate(name="a", model="m", manifest="x", answer="generate")
    assert settings_to_lower(evaluate, "generate") == {"batch_tokens": 1} == settings_to_lower(evaluate, "forward")
    traces = Traces(name="a", model="m", manifest="x", num_samples=3)
    assert settings_to_lower(replace(traces, decode_slots=64), "generate") == {"decode_slots": 1}
    switch = Switch(name="s", teacher="x", student="x", manifest="x", train_manifest="x")
    assert settings_to_lower(switch, "training") == {"batch_size": 2}
    new = SimpleNamespace(trainable="decoder", micro_batch_tokens=8192, checkpointing="off", moments="float32",
                          reference="device", beta=0.04, group_size=8, decode_slots=64)
    wanted = {"micro_batch_tokens": 1, "checkpointing": "on", "moments": "8bit", "reference": "host"}
    assert settings_to_lower(new, "update") == wanted
    assert "reference" not in settings_to_lower(SimpleNamespace(**vars(new) | {"beta": 0.0}), "scoring")
    lowered = SimpleNamespace(**vars(new) | wanted)
    assert all(settings_to_lower(lowered, name) in ({}, {"decode_slots": 1}) for name in LOWERED)
    adapter = SimpleNamespace(**vars(new) | {"trainable": "lora"})
    assert settings_to_lower(adapter, "update") == {"micro_batch_tokens": 1, "checkpointing": "on"}

    fits, large = phase_of("update", weights=15, activations=2), phase_of("update", weights=15, activations=27)
    assert costs.to_lower(sft, [fits]) == {} and costs.to_lower(sft, [fits, large]) == {"micro_batch_tokens": 1}
    hopeless = phase_of("rollout", weights=15, reference=14, optimizer=86, KV_cache=4)
    assert costs.to_lower(grpo, [hopeless]) == {}  # "auto" takes what there is
    assert costs.to_lower(new, [hopeless]) == {"decode_slots": 1, "moments": "8bit", "reference": "host"}


def test_the_table_has_a_column_a_card_and_the_settings_once(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(costs, "DRIVER_GIB", 0.0)
    stage = case(models, SFT, device="cuda", micro_batch_tokens=4096, val_manifest="val.jsonl",
                 checkpointing="off")
    longest = len(plan_of(stage, tmp_path).prompt)
    total = phases_of(stage, tmp_path)["update"].total
    monkeypatch.setattr(costs, "CARDS", {"1": total / 2**30, "2": 2 * total / 2**30})
    status, out, _ = dry(tmp_path, capsys, [stage])
    memory = out.split("memory, MiB\n")[1].splitlines()
    assert status == 0 and memory[0].split()[-4:] == ["total", "1", "2", "hours"]
    assert memory[1].split()[-3:-1] == ["NO", "yes"] and memory[2].split()[-2:] == ["yes", "yes"]
    assert [line.strip() for line in memory if "for less: " in line] == [
        f"for less: micro_batch_tokens down to {longest}, checkpointing=on"]


@pytest.mark.parametrize("cls, more", [
    (SFT, dict(val_manifest="val.jsonl")), (SFT, dict(trainable="decoder", dtype="bfloat16")),
])  # fmt: skip
def test_a_stages_disk_is_what_it_writes(cls, more, models, tmp_path):
    stage = case(models, cls, **more)
    plan = plan_of(stage, tmp_path)
    samples = [(replace(plan.prompt), Item(replace(EXAMPLE, id=str(i)), 0, "manifest")) for i in range(4)]
    folder = tmp_path / "stage"
    trainer = Trainer(stage, len(samples), folder)
    trainer.sft_step(trainer.micro_batches(samples))
    trainer.step = 1
    if stage.val_manifest:
        trainer.best_step = 1
    trainer.save()
    trainer.step = 2
    trainer.save()
    trainer.publish()
    stays, state = costs.disk_of(stage, estimate(stage, plan.model, plan.prompt))
    for estimated, pattern in ((state, "*.safetensors"), (stays, "best/*.safetensors")):
        written = sum(file.stat().st_size for file in folder.glob(pattern))
        assert estimated == pytest.approx(written, rel=0.05, abs=20_000)  # their headers


# ---- models without their weights ----


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_models_shapes_are_those_of_its_config(name):
    ours = read_config(PUBLISHED[name])
    file = CONFIGS / f"{name}{'-thinker' * ('Omni' in name)}.json"
    if name in ("Qwen2-Audio-7B", "Qwen2.5-Omni-3B"):
        assert not file.exists()
        return
    theirs = read_config(json.loads(file.read_text()))
    if name == "Qwen2-VL-2B-Instruct":  # whose head is its embedding, in 16 bits too
        model = ModelInfo(name, ours, None, "").on_meta(torch.bfloat16)
        assert sum(p.nbytes for p in model.parameters()) == 4_417_971_200
    for field in ("family", "text", "audio", "vision", "tie_word_embeddings", "ids_per_s", "chunk_s"):
        assert getattr(ours, field) == getattr(theirs, field)


def test_a_model_is_found_in_its_folder_the_hubs_cache_or_by_its_name(models, tmp_path, cache):
    write_stand_in_tokenizer(tmp_path, [])
    assert find_model("models/Qwen2-Audio-7B-Instruct", [], tmp_path).config.text.hidden_size == 4096
    assert find_model("Qwen/Qwen2.5-Omni-3B@abc", [], tmp_path).config.text.num_hidden_layers == 36
    assert "config.json" in find_model(str(models / "wide"), [], tmp_path).source
    commit = cache / "models--Qwen--Qwen2-Audio-7B-Instruct" / "snapshots" / "abc"
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("abc")
    for file in (models / "wide").iterdir():
        (commit / file.name).write_bytes(file.read_bytes())
    assert find_model("Qwen/Qwen2-Audio-7B-Instruct", [], tmp_path).config.text.vocab_size == 50_000
    with pytest.raises(ValueError, match="'somebody/else' is neither here nor in the hub's cache"):
        find_model("somebody/else", [], tmp_path)
    model, _ = minixmd.load(models / "ears")
    add_lora(model, rank=3, alpha=1.0, targets=r".*q_proj", seed=0)
    save_adapter(model, models / "ears", tmp_path / "adapter")
    adapted = find_model(str(tmp_path / "adapter"), [], tmp_path).on_meta(torch.bfloat16)
    assert adapted.model.layers[0].self_attn.q_proj.lora_A.shape == (3, 96)
    stages = [case(models, SFT, lora_rank=5), replace(case(models, SFT, trainable="full"), name="full")]
    ranks = {name: find_model(name, stages, tmp_path).on_meta(torch.float32).model.layers[0].mlp.up_proj.lora_A
             for name in ("@case", "@full")}
    assert ranks["@case"].shape == (5, 96) and ranks["@full"] is None


def test_a_local_folder_is_found_as_it_is_written(models, tmp_path, monkeypatch):
    write_stand_in_tokenizer(tmp_path, [])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "wide", "Qwen/Qwen2-Audio-7B-Instruct")  # named as a model on the hub
    for name in ("Qwen/Qwen2-Audio-7B-Instruct", "Qwen/Qwen2-Audio-7B-Instruct/", "./Qwen/Qwen2-Audio-7B-Instruct"):
        model = find_model(name, [], tmp_path)
        assert model.config.text.vocab_size == 50_000 and model.source.endswith("config.json")
    elsewhere = find_model("old/Qwen2-Audio-7B-Instruct/", [], tmp_path)
    assert elsewhere.config.text.vocab_size == 156_032 and "is not here" in elsewhere.source
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty/config.json: no such file"):
        find_model("empty", [], tmp_path)


def test_an_adapters_base_is_found_by_the_name_that_it_records(models, tmp_path, cache):
    write_stand_in_tokenizer(tmp_path, [])
    model, _ = minixmd.load(models / "ears")
    add_lora(model, rank=3, alpha=1.0, targets=r".*q_proj", seed=0)
    save_adapter(model, models / "ears", tmp_path / "adapter")
    found = find_model(str(tmp_path / "adapter"), [], tmp_path)
    assert "ears/config.json" in found.source and "with the adapter" in found.source
    commit = cache / "models--me--adapter" / "snapshots" / "abc"
    shutil.copytree(tmp_path / "adapter", commit)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("abc")
    for base, said in ((str(tmp_path / "lost"), f"the adapter's base: model '{tmp_path}/lost' is neither here"),
                       (None, "the adapter's base: model 'unnamed' is neither here")):
        config = {"base_model_name_or_path": base}
        (commit / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=said):
            find_model("me/adapter", [], tmp_path)


def test_an_adapter_that_stands_on_itself_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="the adapter's base model is the adapter itself"):
        find_model(str(tmp_path), [], tmp_path)


# ---- the command ----


def dry(tmp_path, capsys, stages, *overrides):
    """(exit status, stdout, stderr without progress bars)"""
    config = write_config(tmp_path / "config.py", f"[{', '.join(map(repr, stages))}]")
    status = main([str(config), f"run_dir={tmp_path / 'run'}", *overrides, "--dry-run"])
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if line.startswith("minixmd")]


def test_a_dry_run_shows_every_stage_its_prompt_and_its_memory(models, tmp_path, capsys):
    stages = [case(models, SFT),
              Evaluate(name="after", model="@case", manifest="data/test.jsonl", device="cpu"),
              Evaluate(name="again", model="@case", manifest="data/more.jsonl", device="cpu"),
              Traces(name="told", endpoint="http://localhost:8000/v1", served="big", manifest="data/test.jsonl")]
    status, out, err = dry(tmp_path, capsys, stages)
    assert (status, err) == (0, [])
    listed, memory = out.split("\nprompt 1\n")[0], out.split("memory, MiB\n")[1]
    assert all(f"\n{stage.name}" in listed for stage in stages)
    assert "<|AUDIO|> x 250" in out and EXAMPLE.question in out and "A<|im_end|>" in out and "\ufffd" not in out
    assert "and the clip, to http://localhost:8000/v1" in out
    assert "again as after" in " ".join(memory.split()) and "told" not in memory
    assert "to bring: none.jsonl, data/test.jsonl, data/more.jsonl" in " ".join(out.split())
    assert all(len(line) <= 120 for line in out.splitlines() if str(tmp_path.parent) not in line)  # but for paths
    assert not (tmp_path / "run").exists()
    rows = {line.split()[0]: line.split() for line in memory.split("tokens: packed")[0].splitlines() if line}
    assert float(rows["case"][-1]) > float(rows["optimizer"][-1]) > 1  # the totals, in MiB


def test_a_checker_is_shown_what_it_judges(models, tmp_path, capsys):
    """The thoughts, as in stage FactCheck; the answer after them it does not see."""
    common = dict(traces="t.jsonl", manifest="x.jsonl", device="cpu", prompt="{question}\n{trace} True?")
    stages = [FactCheck(name="here", model=str(models / "ears"), **common),
              FactCheck(name="there", checker="endpoint", endpoint="http://localhost:8000/v1", served="big", **common),
              FactCheck(name="small", checker="verifier", model=str(models / "ears"), verdicts="v.jsonl", **common)]
    status, out, err = dry(tmp_path, capsys, stages)
    assert (status, err) == (0, [])
    prompts = out.split("\nprompt ")[1:]
    assert len(prompts) == 3 and all("I hear it bark twice." in prompt for prompt in prompts)
    assert "<answer>" not in out and "<think>" not in out


def test_without_a_tokenizer_the_prompt_is_the_same_in_words(models, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((models / "wide" / "config.json").read_bytes())
    shown = []
    for folder in (models / "wide", tmp_path / "bare"):
        stage = Evaluate(name="one", model=str(folder), manifest="x.jsonl", device="cpu")
        status, out, _ = dry(tmp_path, capsys, [stage])
        assert status == 0
        shown.append(out.split("\nprompt 1\n")[1].split("tokens)")[0].rpartition("(")[0])
    assert shown[0] == shown[1]


def test_the_prompt_shown_asks_the_manifests_own_question(models, tmp_path, capsys):
    own = dict(question="What is it that barks?", options=("the small grey dog", "a seal"), answer=1)
    manifest = write_manifest(tmp_path / "own.jsonl", 3, **own)
    stages = [case(models, SFT), replace(case(models, SFT), name="own", manifest=manifest)]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((models / "ears" / "config.json").read_bytes())
    stages.append(replace(stages[1], name="words", model=str(bare)))
    status, out, err = dry(tmp_path, capsys, stages)
    assert (status, err) == (0, []) and "\ufffd" not in out
    made_up, *theirs = out.partition("\nAssumed")[0].split("\nprompt ")[1:]
    assert EXAMPLE.question in made_up and "small grey" not in made_up
    for prompt in theirs:
        assert "What is it that barks?\n  A. the small grey dog\n  B. a seal\n" in prompt
        assert prompt.count("B<|im_end|>") == 1 and EXAMPLE.question not in prompt


@pytest.mark.parametrize("line, said", [("{", "bad.jsonl:1: not JSON"), ("", "bad.jsonl: the manifest holds no"),
                                        ('{"id": "a", "question": "?", "options": ["a", "b"]}', "has no audio")])
def test_a_broken_manifest_is_a_line_and_the_example_is_shown(line, said, models, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    stage = Evaluate(name="one", model=str(models / "ears"), manifest=str(tmp_path / "bad.jsonl"), device="cpu")
    status, out, err = dry(tmp_path, capsys, [stage])
    assert status == 1 and len(err) == 1 and said in err[0] and "\nprompt 1" in out and "\none " in out


@pytest.mark.parametrize("order", ["--dry-run {} seed=1", "{} --dry-run seed=1", "{} seed=1 --dry-run"])
def test_overrides_may_follow_the_flag(order, models, tmp_path, capsys):
    config = write_config(tmp_path / "config.py", f"[{case(models, SFT)!r}]")
    assert main(order.replace("seed=1", "max_steps=77").format(config).split()) == 0
    assert "max_steps=77" in " ".join(capsys.readouterr().out.split())


def test_several_gpus_have_columns_of_their_own(models, tmp_path, capsys):
    status, out, _ = dry(tmp_path, capsys, [case(models, GRPO, trainable="decoder", device="cuda")], "--gpus", "4")
    assert status == 0 and "memory of each of 4 GPUs, " in out and "one's  alone" in out
    assert re.search(r"\ntotal +\d+\.\d\d +\d+\.\d\d +0\.00: 0 % of the time one GPU works alone\n", out)


def test_what_cannot_run_is_told_in_a_line_and_the_rest_is_shown(models, tmp_path, capsys):
    ears, common = str(models / "ears"), dict(manifest="x.jsonl", device="cpu")
    stages = [Evaluate(name="blind", model=ears, media="video", **common),
              Evaluate(name="unknown", model="somebody/else", **common),
              case(models, SFT), replace(case(models, SFT), name="twice", model="@case", lora_targets="nothing"),
              Evaluate(name="long", model=ears, answer="generate", max_new_tokens=2000, **common),
              Evaluate(name="good", model=ears, **common)]
    status, out, err = dry(tmp_path, capsys, stages)
    assert status == 1 and "\ngood" in out.split("memory, MiB\n")[1]
    for line, said in zip(err, ("blind: turn 0: a qwen2_audio model cannot take a part of type",
                                "unknown: model 'somebody/else' is neither here",
                                "lora_targets 'nothing' matches no linear", "long: clip: too long (the prompt has"),
                          strict=True):
        assert said in line
    assert main([str(write_config(tmp_path / "c.py", "[Evaluate(name='a', modell='b')]")), "--dry-run"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
