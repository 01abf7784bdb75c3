"""What we write, transformers and PEFT read with the same logits, for every family; an export is whole or absent."""
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LINEARS,
    TARGETS,
    assert_close,
    assert_same_weights,
    error_of,
    fill,
    logits_of,
    reference_logits,
    with_adapter,
)
from mini import write_model
from safetensors.torch import load_file, save_file
from tiny import REFERENCES, published_config, tiny_model

import minixmd
from minixmd.models import shards, weights
from minixmd.models.lora import add_lora, merge_lora
from minixmd.models.weights import adapted, load_adapter, load_model, save_adapter, save_model

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

# PEFT asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOOL = Path(__file__).parents[1] / "tools" / "merge_adapter.py"
_spec = importlib.util.spec_from_file_location("merge_adapter", TOOL)
merge_adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(merge_adapter)

KINDS = ["audio", "vision", "windowed", "omni"]
CLASSES = {"audio": "Qwen2AudioForConditionalGeneration", "vision": "Qwen2VLForConditionalGeneration",
           "windowed": "Qwen2_5_VLForConditionalGeneration", "omni": "Qwen2_5OmniThinkerForConditionalGeneration"}
WHOLE = "Qwen2_5OmniForConditionalGeneration"
OLD = {  # transformers 5's module paths -> the published file's
    "audio": {"model.language_model.": "language_model.model.", "model.audio_tower.": "audio_tower.",
              "model.multi_modal_projector.": "multi_modal_projector."},
    "vision": {"model.language_model.": "model.", "model.visual.": "visual."},
    "windowed": {"model.language_model.": "model.", "model.visual.": "visual."},
    "omni": {"model.language_model.": "model.", "model.visual.": "visual.", "model.audio_tower.": "audio_tower."},
}  # fmt: skip


def in_transformers(folder, kind):
    return getattr(transformers, CLASSES[kind]).from_pretrained(folder).eval()


BASES = [("audio", 2, False), ("vision", 1, True), ("windowed", 2, False), ("omni", 1, True),
         *(pytest.param(case, marks=pytest.mark.slow)
           for case in (("vision", 2, False), ("windowed", 1, True), ("omni", 2, False)))]  # fmt: skip


@pytest.fixture(scope="module", params=BASES, ids=lambda p: f"{p[0]}-{p[1]}kv{'-tied' * p[2]}")
def base(request, tmp_path_factory):
    """A checkpoint that transformers wrote: (kind, folder)."""
    kind, kv, tie = request.param
    folder = tmp_path_factory.mktemp("base")
    REFERENCES[kind](kv, tie).save_pretrained(folder)
    return kind, folder


@pytest.fixture(scope="module", params=[(2, False), pytest.param((1, True), marks=pytest.mark.slow)],
                ids=["2kv", "1kv-tied"])
def whole(request, tmp_path_factory):
    """A Qwen2.5-Omni checkpoint, talker's and vocoder's tensors included, in shards, the last without the thinker."""
    folder = tmp_path_factory.mktemp("omni")
    model = tiny_model("omni", *request.param)
    save_model(model, folder, folder, shard_bytes=60_000)
    (folder / "spk_dict.pt").unlink()
    torch.save({"Ada": {"bos_token": torch.ones(3)}}, folder / "spk_dict.pt")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    mixed = load_file(folder / first) | {"talker.codec_head.weight": torch.ones(2, 3)}
    save_file(mixed, folder / first, {"format": "pt"})
    index["weight_map"].update({"talker.codec_head.weight": first, "talker.model.norm.weight": "far.safetensors",
                                "token2wav.dit.weight": "far.safetensors"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "enable_audio_output": True}))
    return folder, model


# ---- whole models ----


def test_a_merged_model_gives_the_logits_of_the_unmerged_one_here_and_in_transformers(base, tmp_path):
    kind, folder = base
    model = with_adapter(folder)
    plain, unmerged = logits_of(load_model(folder), kind), logits_of(model, kind)
    assert (unmerged - plain).abs().max() > 0.1 * plain.abs().max()
    merge_lora(model)
    merged = logits_of(model, kind)
    assert_close(merged, unmerged)
    save_model(model, folder, tmp_path)
    reference = in_transformers(tmp_path, kind)
    assert_close(reference_logits(reference, kind), merged)
    tied = model.config.tie_word_embeddings
    assert (reference.lm_head.weight is reference.get_input_embeddings().weight) == tied
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert torch.equal(logits_of(load_model(tmp_path), kind), merged)


def test_of_the_whole_omni_the_thinker_is_written_and_both_of_transformers_classes_read_it(whole, tmp_path):
    folder, model = whole
    truth = logits_of(model, "omni")
    loaded = load_model(folder)
    assert torch.equal(logits_of(loaded, "omni"), truth)
    save_model(loaded, folder, tmp_path)
    assert all(name.startswith("thinker.") for name in load_file(tmp_path / "model.safetensors"))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["enable_audio_output"] is False and raw["model_type"] == "qwen2_5_omni"
    assert_close(reference_logits(in_transformers(tmp_path, "omni"), "omni"), truth)
    reference = getattr(transformers, WHOLE).from_pretrained(tmp_path).eval()
    assert_close(reference_logits(reference.thinker, "omni"), truth)
    assert not hasattr(reference, "talker") and list(reference.speaker_map) == ["Ada"]
    (tmp_path / "bare").mkdir()
    save_model(loaded, tmp_path / "bare", tmp_path / "again")  # from a source without the talker's voices
    reference = getattr(transformers, WHOLE).from_pretrained(tmp_path / "again")
    assert_close(reference_logits(reference.thinker, "omni"), truth) and not reference.speaker_map


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_above_the_limit_a_model_is_cut_into_shards_that_transformers_reads(tmp_path, dtype):
    model = tiny_model("vision").to(dtype)
    limit = 20_000
    save_model(model, tmp_path, tmp_path, shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    sizes = {name: [t.nbytes for t in load_file(tmp_path / name).values()] for name in files}
    assert all(sum(each) <= limit or len(each) == 1 for each in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    full = [sum(each) for each in sizes.values()]
    assert all(a + b > limit for a, b in zip(full, full[1:], strict=False))  # no shard is cut before it must be
    reference = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    assert reference.dtype == dtype
    again = load_model(tmp_path, dtype=dtype)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    save_model(model, tmp_path, tmp_path, shard_bytes=sum(full))
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_config_json_names_the_dtype_written_wherever_it_names_one(kind, tmp_path):
    REFERENCES[kind](2, False).save_pretrained(tmp_path / "from")
    before = (tmp_path / "from/config.json").read_text()
    model = load_model(tmp_path / "from", dtype=torch.bfloat16)
    save_model(model, tmp_path / "from", tmp_path / "to")
    after = (tmp_path / "to/config.json").read_text()
    assert '"dtype": "float32"' in before
    assert json.loads(after) == json.loads(before.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    assert model.config.raw == json.loads(before)
    assert in_transformers(tmp_path / "to", kind).dtype == torch.bfloat16


def test_a_config_without_a_dtype_gets_one_under_the_published_name(tmp_path):
    raw = published_config("audio")
    save_model(tiny_model("audio").half(), tmp_path, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {**raw, "torch_dtype": "float16"}
    raw["text_config"]["torch_dtype"] = raw["torch_dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_model(load_model(tmp_path), tmp_path, tmp_path)
    raw["text_config"]["torch_dtype"] = raw["torch_dtype"] = "float32"
    assert json.loads((tmp_path / "config.json").read_text()) == raw


STEPS = [(shards, "write_safetensors", 1), (shards, "write_safetensors", 2), (shards, "write_json", 1),
         (weights.shutil, "copyfile", 1), (weights, "write_json", 1)]  # fmt: skip


@pytest.mark.parametrize("module, name, call", STEPS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_export_that_is_cut_short_leaves_a_folder_that_nothing_loads(tmp_path, monkeypatch, module, name, call):
    old, new = tiny_model("vision", seed=1), tiny_model("vision", seed=2)
    (tmp_path / "from").mkdir()
    (tmp_path / "from/tokenizer.json").write_text("{}")
    save_model(old, tmp_path / "from", tmp_path / "to")
    calls, whole = [], getattr(module, name)

    def cut(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, cut)
        with pytest.raises(KeyboardInterrupt):
            save_model(new, tmp_path / "from", tmp_path / "to", shard_bytes=60_000)
    assert error_of(lambda: load_model(tmp_path / "to")) == f"{tmp_path / 'to/config.json'}: no such file"
    with pytest.raises((OSError, ValueError), match="config.json"):
        transformers.AutoModelForMultimodalLM.from_pretrained(tmp_path / "to")
    save_model(new, tmp_path / "from", tmp_path / "to")
    assert torch.equal(logits_of(load_model(tmp_path / "to"), "vision"), logits_of(new, "vision"))


def test_an_export_over_another_leaves_nothing_of_it(tmp_path):
    old, new = tiny_model("vision", seed=1), tiny_model("vision", seed=2)
    for first, second in ((20_000, 60_000), (10**9, 60_000), (20_000, 10**9)):
        save_model(old, tmp_path, tmp_path, shard_bytes=first)
        save_model(new, tmp_path, tmp_path, shard_bytes=second)
        assert torch.equal(logits_of(load_model(tmp_path), "vision"), logits_of(new, "vision"))
        files = {path.name for path in tmp_path.glob("*.safetensors")}
        infos = shards.read_headers(tmp_path, new.config.family)
        assert {info.file for info in infos.values()} == files


def test_a_whole_model_is_not_written_over_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert error_of(lambda: save_model(tiny_model("audio"), tmp_path, tmp_path)) == (
        f"{tmp_path}: holds an adapter; a whole model needs another folder")


# ---- adapters ----


@pytest.mark.parametrize("where", TARGETS)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(base, tmp_path, where):
    kind, folder = base
    model = with_adapter(folder, TARGETS[where])
    save_adapter(model, folder, tmp_path)
    ours = logits_of(model, kind)
    assert (ours - logits_of(load_model(folder), kind)).abs().max() > 0.05 * ours.abs().max()
    reference = peft.PeftModel.from_pretrained(in_transformers(folder, kind), tmp_path)
    assert_close(reference_logits(reference, kind), ours)
    theirs = {name for name, _ in reference.named_modules() if name.endswith(".lora_A")}
    assert len(theirs) == len(adapted(model))
    again = load_model(folder)
    load_adapter(again, tmp_path)
    assert_same_weights(again, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_on_an_adapter_loads_and_merges_to_the_model_that_was_trained(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(minixmd, "Processor", lambda *_: None)  # there is no tokenizer
    model, home = tiny_model("audio").to(dtype), tmp_path / "home"
    save_model(model, home, home / "base")
    trained = model
    for number, targets in enumerate((TARGETS["decoder"], LINEARS)):  # of other layers, ranks and scales
        merge_lora(trained)
        add_lora(trained, rank=2 + number, alpha=3.0, targets=targets, seed=number)
        fill((name, p) for name, p in trained.named_parameters() if "lora_" in name)
        save_adapter(trained, home / ("base" if number == 0 else "a0"), home / f"a{number}")
    ours = logits_of(trained, "audio")
    assert torch.equal(logits_of(minixmd.load(home / "a1", dtype=dtype)[0], "audio"), ours)
    moved = tmp_path / "moved"
    os.rename(home, moved)  # all of it together
    assert torch.equal(logits_of(minixmd.load(moved / "a1", dtype=dtype)[0], "audio"), ours)
    assert run(moved / "a1", moved / "out") == 0
    merge_lora(trained)
    assert torch.equal(logits_of(load_model(moved / "out", dtype=dtype), "audio"), logits_of(trained, "audio"))
    assert run(moved / "a0", moved / "first") == 0  # PEFT takes the second on the first's merged model
    if dtype == torch.float32:
        reference = peft.PeftModel.from_pretrained(in_transformers(moved / "first", "audio"), moved / "a1")
        assert_close(reference_logits(reference, "audio"), ours)
    config = json.loads((moved / "a1" / "adapter_config.json").read_text())
    (moved / "a1" / "minixmd_base.json").unlink()
    config["base_model_name_or_path"] = str(moved / "a1")
    (moved / "a1" / "adapter_config.json").write_text(json.dumps(config))
    assert "the adapter's base model is the adapter itself" in error_of(lambda: minixmd.load(moved / "a1"))


def peft_adapter(model, kind, out):
    """An adapter made by PEFT in `out`, and the logits that it gives there."""
    modules = ["q_proj", "v_proj", "down_proj", "fc1", "linear", "qkv", "mlp.2", "q", "up_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules)).eval()
    fill(model.named_parameters())
    model.save_pretrained(out)
    return reference_logits(getattr(model.base_model.model, "thinker", model), kind)


def test_an_adapter_of_pefts_gives_the_same_logits_here_under_new_and_old_module_paths(base, tmp_path):
    kind, folder = base
    theirs = peft_adapter(in_transformers(folder, kind), kind, tmp_path)
    model = load_model(folder)
    load_adapter(model, tmp_path)
    assert_close(logits_of(model, kind), theirs)
    path, state = tmp_path / "adapter_model.safetensors", {}
    for key, tensor in load_file(path).items():
        name = key.removeprefix("base_model.model.")
        new = next(prefix for prefix in OLD[kind] if name.startswith(prefix))
        state[f"base_model.model.{OLD[kind][new]}{name.removeprefix(new)}"] = tensor
    save_file(state, path)
    again = load_model(folder)
    load_adapter(again, tmp_path)
    assert_same_weights(again, model)


def test_adapters_of_the_whole_omni_class_and_of_its_thinker_load_on_the_whole_checkpoint(whole, tmp_path):
    folder, model = whole
    save_model(load_model(folder), folder, tmp_path / "base")
    theirs = peft_adapter(getattr(transformers, WHOLE).from_pretrained(tmp_path / "base"), "omni", tmp_path / "whole")
    names = load_file(tmp_path / "whole/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.thinker.model.") for name in names)
    again = load_model(folder)
    load_adapter(again, tmp_path / "whole")
    assert_close(logits_of(again, "omni"), theirs)
    save_adapter(again, folder, tmp_path / "ours")
    reference = peft.PeftModel.from_pretrained(in_transformers(tmp_path / "base", "omni"), tmp_path / "ours")
    assert_close(reference_logits(reference, "omni"), theirs)
    once = load_model(folder)
    load_adapter(once, tmp_path / "ours")
    assert torch.equal(logits_of(once, "omni"), logits_of(again, "omni"))


# ---- tools/merge_adapter.py ----


def run(*args):
    return merge_adapter.main([str(arg) for arg in args])


def test_the_tool_merges_what_load_would_add(base, tmp_path, capsys):
    kind, folder = base
    model = with_adapter(folder)
    save_adapter(model, folder, tmp_path / "adapter")
    assert run(tmp_path / "adapter", tmp_path / "out") == 0
    assert f"{tmp_path / 'out'}: " in capsys.readouterr().out
    assert_close(reference_logits(in_transformers(tmp_path / "out", kind), kind), logits_of(model, kind))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_tool_rounds_once_to_the_bases_dtype_or_the_one_asked_for(tmp_path, stored):
    base = tmp_path / "base"
    save_model(tiny_model("audio").to(stored), tmp_path, base)
    model = with_adapter(base)
    save_adapter(model, base, tmp_path / "adapter")
    merge_lora(model)
    for flags, dtype in (((), stored), (("--dtype", "bfloat16"), torch.bfloat16),
                         (("--dtype", "float16"), torch.float16), (("--dtype", "float32"), torch.float32)):
        out = tmp_path / "-".join(("out", *flags))
        assert run(tmp_path / "adapter", out, *flags) == 0
        for (name, p), q in zip(model.named_parameters(), load_model(out, dtype=dtype).parameters(), strict=True):
            assert torch.equal(p.to(dtype), q), name
        assert load_file(out / "model.safetensors")["language_model.lm_head.weight"].dtype == dtype


def test_the_tool_rewrites_an_adapters_module_paths_both_ways(base, tmp_path):
    kind, folder = base
    model = with_adapter(folder)
    save_adapter(model, folder, tmp_path / "new")
    assert run(tmp_path / "new", tmp_path / "old", "--layout", "old") == 0
    assert run(tmp_path / "old", tmp_path / "back", "--layout", "new") == 0
    new, old, back = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("new", "old", "back"))
    assert new.keys() == back.keys() and all(torch.equal(new[name], back[name]) for name in new)
    renamed = set()
    for key in new:
        path = key.removeprefix("base_model.model.")
        prefix = next(prefix for prefix in OLD[kind] if path.startswith(prefix))
        renamed.add(f"base_model.model.{OLD[kind][prefix]}{path.removeprefix(prefix)}")
    assert old.keys() == renamed and not old.keys() & new.keys()
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("new", "old", "back")]
    assert configs[0] == configs[2] and configs[0]["target_modules"] != configs[1]["target_modules"]
    again = load_model(folder)
    load_adapter(again, tmp_path / "old")
    assert torch.equal(logits_of(again, kind), logits_of(model, kind))


def test_what_the_tool_cannot_do_is_one_line_on_stderr_and_status_1(tmp_path, capsys):
    folder = write_model(tmp_path / "ears", "audio")
    save_adapter(with_adapter(folder, TARGETS["decoder"]), folder, tmp_path / "adapter")
    save_adapter(with_adapter(folder, TARGETS["decoder"]), tmp_path / "gone", tmp_path / "orphan")
    (tmp_path / "torn").mkdir()
    shutil.copy(tmp_path / "adapter/adapter_config.json", tmp_path / "torn")
    for args, said in (
        (("gone", "out"), "no such model folder"),
        (("ears", "out"), "holds no adapter_config.json"),
        (("orphan", "out"), f"base model {tmp_path / 'gone'} is not there"),
        (("torn", "out"), "adapter_model.safetensors: no such file"),
        (("torn", "out", "--layout", "old"), "adapter_model.safetensors: no such file"),
        (("adapter", "ears"), "exists and is not an empty folder"),
        (("adapter", "ears/config.json"), "exists and is not an empty folder"),
        (("adapter", "out", "--layout", "old", "--dtype", "float16"), "--layout merges nothing"),
    ):
        assert run(tmp_path / args[0], tmp_path / args[1], *args[2:]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("merge_adapter: ") and said in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_tool_explains_itself(capsys):
    with pytest.raises(SystemExit) as caught:
        run("-h")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("ADAPTER", "OUT", "--dtype", "--layout", "published checkpoint"))
    with pytest.raises(SystemExit) as caught:
        run("a", "b", "--dtype", "float64")
    assert caught.value.code == 2
