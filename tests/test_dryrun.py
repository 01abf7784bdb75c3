"""--dry-run: models without weights, prompts, and estimates of memory beside measured peaks."""
import json
import socket
from dataclasses import replace
from pathlib import Path
from weakref import finalize

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from mini import AUDIO, VISION, write_config, write_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minixmd
from minixmd import train
from minixmd.config import Evaluate, FactCheck, Label, Switch, Traces, Train
from minixmd.dryrun.estimate import PARTS, Found, estimate, find
from minixmd.dryrun.memory import tracing
from minixmd.dryrun.plan import EXAMPLE, know, stand_in
from minixmd.dryrun.shapes import PUBLISHED
from minixmd.kernels import logprob
from minixmd.learning.rollout import pool_bytes
from minixmd.models.cnn14 import make_cnn14, mixup, spec_augment
from minixmd.models.families import read_config
from minixmd.models.lora import add_lora
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import save_adapter, save_model
from minixmd.stages.multiple_choice import score_letters
from minixmd.train import main

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


def case(models, objective, name="ears", **more):
    fields = dict(batch_size=4, micro_batch_size=2, device="cpu", media="video" if name == "eyes" else "audio")
    if objective == "grpo":
        fields |= dict(batch_size=2, micro_batch_size=1, group_size=2, max_new_tokens=16, completions_every=0)
    return Train(name="case", objective=objective, model=str(models / name), manifest="none.jsonl", **fields | more)


def rows_of(stage, tmp_path, *stages):
    stand_in(tmp_path, [stage])
    found, prompt, _ = know(stage, [*stages, stage], tmp_path)
    return {row.doing: row for row in estimate(stage, found, prompt, train)}


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


@pytest.mark.parametrize("objective, more", [
    ("sft", {}),
    ("sft", dict(trainable="full", micro_batch_size=1)),
    ("sft", dict(trainable="full", micro_batch_size=4)),
    ("sft", dict(trainable="decoder", name="eyes", dtype="bfloat16", min_pixels=3136, max_pixels=50_176)),
    ("grpo", {}),
    ("grpo", dict(trainable="decoder", decode_slots=2)),
    ("grpo", dict(trainable="full", micro_batch_size=2, beta=0.0, ratio="sequence")),
])  # fmt: skip
def test_an_estimate_is_the_measured_peak(objective, more, models, tmp_path):
    stage = case(models, objective, **more)
    found, prompt, _ = know(stage, [stage], tmp_path)
    rows = estimate(stage, found, prompt, train)
    prompts = [replace(prompt) for _ in range(stage.batch_size)]
    good = [(prompt, (replace(EXAMPLE, id=str(i)), 0, None)) for i, prompt in enumerate(prompts)]

    def two_steps():
        run, processor = train.build(stage, prompts)
        for run.step in range(2):
            if objective == "sft":
                train.supervised_step(run, stage, good)
            else:
                line = train.grpo_step(run, stage, processor, good, tmp_path)
                assert line["completion_tokens"] > 0.8 * stage.max_new_tokens

    measured = peak(two_steps)
    clips = stage.micro_batch_size * sum(m.features.nbytes for m in prompt.media)  # on a GPU a pass has its own copy
    assert measured <= 1.02 * max(row.total for row in rows)
    assert max(row.total for row in rows) <= 1.02 * (measured + clips)
    assert [row.doing for row in rows] == ["update", "optimizer"] if objective == "sft" else \
        ["rollout", *["scoring"] * (stage.beta > 0), "update", "optimizer"]


@pytest.mark.parametrize("answer", ["letters", "generate"])
def test_an_estimate_of_asking_is_the_measured_peak(answer, models, tmp_path):
    stage = Evaluate(name="a", model=str(models / "ears"), manifest="none.jsonl", answer=answer, max_new_tokens=12,
                     batch_tokens=1500, device="cpu")
    found, prompt, _ = know(stage, [stage], tmp_path)
    (row,) = estimate(stage, found, prompt, train)
    examples = [replace(EXAMPLE, id=str(i)) for i in range(1500 // len(prompt))]

    def asking():
        model, _ = minixmd.load(stage.model)
        score_letters(model, found.processor, stage, examples, batch_tokens=1500,
                      max_new_tokens=12 if answer == "generate" else 0)

    clips = len(examples) * prompt.media[0].features.nbytes  # which wait here; on a GPU they are the pass's own copies
    assert row.total == pytest.approx(peak(asking), abs=1.01 * clips)


def test_a_cnn14s_estimate_is_the_measured_peak():
    switch = Switch(name="switch", teacher="x", student="x", manifest="x", train_manifest="x", device="cpu", clip_s=1.0,
                    width=1 / 16, batch_size=4)
    (row,) = estimate(switch, None, None, train)
    heard_BAM, noise = torch.randn(8, 101, 64), torch.Generator()

    def two_steps():
        model = make_cnn14(2, 1 / 16, 0)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            x, y = mixup(spec_augment(model.normalise(heard_BAM), noise), torch.eye(2).repeat(4, 1), noise)
            F.cross_entropy(model.fc_audioset(model.embed(x, noise)), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert row.total == pytest.approx(peak(two_steps), rel=0.05)


@pytest.mark.parametrize("trainable", ["decoder", "full"])
def test_the_parts_of_an_update_are_what_they_are_called(trainable, models, tmp_path):
    stage = case(models, "grpo", trainable=trainable, dtype="bfloat16", device="cuda")
    parts = rows_of(stage, tmp_path)["update"].parts
    sizes = {name: p.numel() for name, p in minixmd.load(stage.model)[0].named_parameters()}
    learnt = sum(size for name, size in sizes.items() if name.startswith(("model.", "lm_head."))) \
        if trainable == "decoder" else sum(sizes.values()) - sizes["audio_tower.embed_positions.weight"]
    assert set(parts) <= set(PARTS)
    assert parts["weights"] == pytest.approx(2 * sum(sizes.values()), abs=100) and parts["reference"] == 2 * learnt
    assert 12 * learnt <= parts["optimizer"] < 12.01 * learnt + 1000  # two moments and a master
    assert 2 * learnt <= parts["gradients"] < 2.01 * learnt + 1000


def test_a_rollouts_keys_and_values_are_its_pools(models, tmp_path):
    stage = case(models, "grpo", decode_slots=4, dtype="bfloat16", device="cuda")
    found, prompt, _ = know(stage, [stage], tmp_path)
    pools = pool_bytes(found.config.text, 2, len(prompt), 4, 16, torch.bfloat16)
    assert pools < rows_of(stage, tmp_path)["rollout"].parts["keys, values"] < pools + 2000


def test_grpo_of_a_7b_decoder_takes_131_gib_before_activations(tmp_path):
    stage = Train(name="grpo", objective="grpo", model="Qwen/Qwen2-Audio-7B-Instruct", manifest="none.jsonl",
                  trainable="decoder", dtype="bfloat16", batch_size=2, micro_batch_size=1, group_size=2,
                  max_new_tokens=2)
    parts = rows_of(stage, tmp_path)["update"].parts
    lasting = sum(parts[name] for name in ("weights", "reference", "gradients", "optimizer"))
    assert lasting / 2**30 == pytest.approx(131, abs=0.5)


def test_a_gpu_has_no_copy_of_the_head_and_no_torch_twins(models, tmp_path):
    stage = Label(name="labels", model=str(models / "wide"), manifest="none.jsonl", dtype="bfloat16", batch_tokens=400)
    gpu, cpu = (rows_of(replace(stage, device=device), tmp_path)["reading"] for device in ("cuda", "cpu"))
    copy = 4 * 50_000 * 96  # in fp32, which the CPU's product makes
    assert cpu.parts["logits"] >= copy > gpu.total - gpu.parts["weights"]
    stage = case(models, "grpo", name="wide")
    gpu, cpu = (rows_of(replace(stage, device=device), tmp_path)["update"] for device in ("cuda", "cpu"))
    assert cpu.total > gpu.total + 4 * 32 * 50_000  # the twins' own logits, of 32 tokens
    assert "row_stats" in logprob._row_stats_kernel.__name__  # back in its place


def test_whatever_runs_a_model_is_estimated(models, tmp_path):
    ears, eyes, common = str(models / "ears"), str(models / "eyes"), dict(manifest="none.jsonl", dtype="bfloat16")
    small = dict(min_pixels=3136, max_pixels=50_176)
    traces = Traces(name="traces", model=eyes, max_new_tokens=40, **small, **common)
    judge = FactCheck(name="judge", traces="@traces", model=ears, **common)
    for stage, wanted in (
        (Evaluate(name="a", model=ears, **common), {"reading"}),
        (Evaluate(name="a", model=eyes, media="video", answer="generate", **small, **common), {"writing"}),
        (Evaluate(name="a", model=ears, answer="generate", n=4, temperature=1.0, **common), {"writing"}),
        (traces, {"writing"}), (judge, {"reading"}),
        (replace(judge, checker="verifier", verdicts="@judge/verdicts.jsonl", width=1 / 16), {"reading", "learning"}),
        (case(models, "distill", teacher_labels="x/labels.jsonl", teacher_loss="kl+ce", dtype="bfloat16"),
         {"update", "optimizer"}),
        (case(models, "distill", teacher_labels="x/labels.jsonl", teacher_loss="kl", device="cuda"),
         {"update", "optimizer"}),
        (case(models, "sft", traces="x.jsonl", max_new_tokens=64, val_manifest="y.jsonl", device="cuda"),
         {"update", "optimizer", "validation"}),
    ):  # fmt: skip
        rows = rows_of(stage, tmp_path, traces, judge)
        assert rows.keys() == wanted, stage
        assert all(row.total > row.parts["weights"] > 0 for row in rows.values())


def test_storages_are_followed_from_birth_to_death():
    with tracing(7, "cuda") as live:
        assert torch.empty(1, device="meta").is_cuda
        live.watch("activations")
        x = torch.empty(100, 7, device="meta")
        y = x.T[1:]
        assert (live.total, live.now["logits"]) == (2800, 2800)
        del x
        z = y + 1
        assert live.total == 2800 + 2400 and z.shape == (6, 100)
        del y, z
        assert (live.total, live.top, live.most) == (0, 5200, {"weights": 0, "logits": 2800, "activations": 2400})
        number_N = torch.tensor([3, 0, 2], device="meta")
        assert number_N.tolist() == [3, 0, 2] and number_N.repeat_interleave(number_N).shape == (5,)
        assert torch.empty(2, device="meta").sum().item() == 1
        live.watch("weights")
        assert live.top == live.total


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
        assert sum(p.nbytes for p in Found(name, ours, None, "").load(torch.bfloat16).parameters()) == 4_417_971_200
    for field in ("family", "text", "audio", "vision", "tie_word_embeddings", "ids_per_s", "chunk_s"):
        assert getattr(ours, field) == getattr(theirs, field)


def test_a_model_is_found_in_its_folder_the_hubs_cache_or_by_its_name(models, tmp_path, cache):
    stand_in(tmp_path, [])
    assert find("models/Qwen2-Audio-7B-Instruct", [], tmp_path).config.text.hidden_size == 4096
    assert find("Qwen/Qwen2.5-Omni-3B@abc", [], tmp_path).config.text.num_hidden_layers == 36
    assert "config.json" in find(str(models / "wide"), [], tmp_path).source
    commit = cache / "models--Qwen--Qwen2-Audio-7B-Instruct" / "snapshots" / "abc"
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("abc")
    for file in (models / "wide").iterdir():
        (commit / file.name).write_bytes(file.read_bytes())
    assert find("Qwen/Qwen2-Audio-7B-Instruct", [], tmp_path).config.text.vocab_size == 50_000
    with pytest.raises(ValueError, match="'somebody/else' is neither here nor in the hub's cache"):
        find("somebody/else", [], tmp_path)
    model, _ = minixmd.load(models / "ears")
    add_lora(model, rank=3, alpha=1.0, targets=r".*q_proj", seed=0)
    save_adapter(model, models / "ears", tmp_path / "adapter")
    adapted = find(str(tmp_path / "adapter"), [], tmp_path).load(torch.bfloat16)
    assert adapted.model.layers[0].self_attn.q_proj.lora_A.shape == (3, 96)
    stages = [case(models, "sft", lora_rank=5), replace(case(models, "sft", trainable="full"), name="full")]
    ranks = {name: find(name, stages, tmp_path).load(torch.float32).model.layers[0].mlp.up_proj.lora_A
             for name in ("@case", "@full")}
    assert ranks["@case"].shape == (5, 96) and ranks["@full"] is None


# ---- the command ----


def dry(tmp_path, capsys, stages, *overrides):
    """(exit status, stdout, stderr without progress bars)"""
    config = write_config(tmp_path / "config.py", f"[{', '.join(map(repr, stages))}]")
    status = main([str(config), f"run_dir={tmp_path / 'run'}", *overrides, "--dry-run"])
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if line.startswith("minixmd")]


def test_a_dry_run_shows_every_stage_its_prompt_and_its_memory(models, tmp_path, capsys):
    stages = [case(models, "sft"),
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
    rows = {line.split()[0]: line.split() for line in memory.split("tokens: packed")[0].splitlines()}
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


def test_what_cannot_run_is_told_in_a_line_and_the_rest_is_shown(models, tmp_path, capsys):
    ears, common = str(models / "ears"), dict(manifest="x.jsonl", device="cpu")
    stages = [Evaluate(name="blind", model=ears, media="video", **common),
              Evaluate(name="unknown", model="somebody/else", **common),
              case(models, "sft"), replace(case(models, "sft"), name="twice", model="@case"),
              Evaluate(name="long", model=ears, answer="generate", max_new_tokens=2000, **common),
              Evaluate(name="good", model=ears, **common)]
    status, out, err = dry(tmp_path, capsys, stages)
    assert status == 1 and "\ngood" in out.split("memory, MiB\n")[1]
    for line, said in zip(err, ("blind: example 'example': turn 0: a qwen2_audio model cannot take a part of type",
                                "unknown: model 'somebody/else' is neither here",
                                "long: example 'example': the prompt's", "twice: @case carries an adapter already"),
                          strict=True):
        assert said in line
    assert main([str(write_config(tmp_path / "c.py", "[Evaluate(name='a', modell='b')]")), "--dry-run"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
