"""Checkpoints and adapters: what other programs write is read, what we write they read, and a misfit is one line."""
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LINEARS,
    assert_close,
    assert_same_weights,
    error_of,
    fill,
    logits_of,
    reference_logits,
    with_adapter,
)
from mini import write_tokenizer
from safetensors.torch import load_file, save_file
from tiny import REFERENCES, TOKENS, published_config, randomise, reference_audio, tiny_model

import minixmd
from minixmd.models import shards, weights
from minixmd.models.families import read_config
from minixmd.models.hub import base_folder
from minixmd.models.lora import add_lora, merge_lora
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import adapted, load_adapter, load_model, save_adapter, save_model

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

# PEFT asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WRITTEN = [("audio", 2, False), ("vision", 1, True),
           *(pytest.param(case, marks=pytest.mark.slow) for case in (("audio", 4, False), ("vision", 2, False)))]


@pytest.fixture(scope="module", params=WRITTEN, ids=lambda p: f"{p[0]}-{p[1]}kv{'-tied' * p[2]}")
def written(request, tmp_path_factory):
    """A checkpoint that transformers wrote: (kind, whether tied, folder)."""
    kind, kv, tie = request.param
    folder = tmp_path_factory.mktemp("written")
    REFERENCES[kind](kv, tie).save_pretrained(folder)
    return kind, tie, folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"audio", "vision", "tied": a checkpoint in the published layout}"""
    found = {}
    for name, kind, tie in (("audio", "audio", False), ("vision", "vision", False), ("tied", "vision", True)):
        found[name] = tmp_path_factory.mktemp(name)
        save_model(tiny_model(kind, tie=tie), found[name], found[name])
    return found


# ---- whole models ----


def test_what_we_save_transformers_reads_and_we_read_again_bit_for_bit(written, tmp_path):
    kind, tie, folder = written
    model = load_model(folder)
    save_model(model, folder, tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    reference = transformers.AutoModelForMultimodalLM.from_pretrained(tmp_path / "saved")
    assert_same_weights(reference, transformers.AutoModelForMultimodalLM.from_pretrained(folder))
    assert (reference.lm_head.weight is reference.get_input_embeddings().weight) == tie
    assert_close(logits_of(model, kind), reference_logits(reference, kind))
    again = load_model(tmp_path / "saved")
    assert_same_weights(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    assert torch.equal(logits_of(again, kind), logits_of(model, kind))
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("name", ["audio", "vision", "tied"])
def test_a_checkpoint_with_a_config_of_the_published_form_gives_the_same_logits_in_transformers(folders, name):
    kind = "vision" if name == "tied" else name
    assert ("text_config" in json.loads((folders[name] / "config.json").read_text())) == (kind == "audio")
    reference = transformers.AutoModelForMultimodalLM.from_pretrained(folders[name])
    assert_close(logits_of(load_model(folders[name]), kind), reference_logits(reference, kind))


def test_shards_and_one_file_give_the_same_model(written, tmp_path):
    _, _, folder = written
    transformers.AutoModelForMultimodalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(load_model(tmp_path), load_model(folder))


LAYOUTS = [(kind, tie, size) for kind in ("audio", "vision", "windowed", "omni") for tie in (False, True)
           for size in ("1GB", "40KB") if not (kind == "audio" and tie)]  # fmt: skip


@pytest.mark.parametrize("kind, tie, size", LAYOUTS)
def test_both_layouts_that_transformers_5_writes_are_read(kind, tie, size, tmp_path):
    reference = REFERENCES[kind](2, tie)
    truth = reference_logits(reference, kind)
    names = []
    for original in (True, False):
        folder = tmp_path / str(original)
        reference.save_pretrained(folder, save_original_format=original, max_shard_size=size)
        names.append({key for path in folder.glob("*.safetensors") for key in load_file(path)})
        assert_close(logits_of(load_model(folder), kind), truth)
    assert names[0] != names[1] and any(".language_model." in name for name in names[1])


def test_what_lies_in_a_folder_without_safetensors_or_index_is_said(folders, tmp_path):
    reference_audio().save_pretrained(tmp_path / "a", max_shard_size="40KB")
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    assert "there: model-00001-of-000" in error_of(lambda: load_model(tmp_path / "a"))
    folder = broken(folders["audio"], tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no such file (there: pytorch_model.bin; read is safetensors" in error_of(lambda: load_model(folder))
    save_adapter(with_adapter(folders["audio"]), folders["audio"], tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").rename(tmp_path / "b" / "adapter_model.bin")
    assert "there: adapter_model.bin" in error_of(lambda: load_adapter(load_model(folders["audio"]), tmp_path / "b"))


def test_the_dtype_asked_for_is_that_of_every_weight(folders):
    whole, half = load_model(folders["audio"]), load_model(folders["audio"], dtype=torch.bfloat16)
    for (name, p), q in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(p.to(torch.bfloat16), q), name
    assert_close(logits_of(half, "audio"), logits_of(whole, "audio"), 0.05)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_file_of_any_of_the_three_dtypes_is_rounded_once_to_the_one_asked_for(folders, tmp_path, stored, asked):
    state = {name: tensor.to(stored) for name, tensor in load_file(folders["tied"] / "model.safetensors").items()}
    shutil.copytree(folders["tied"], tmp_path, dirs_exist_ok=True)
    save_file(state, tmp_path / "model.safetensors")
    model = load_model(tmp_path, dtype=asked)
    for name, p in model.named_parameters():
        assert p.dtype == asked and torch.equal(p, state[name].to(asked)), name


def test_no_weight_is_part_of_the_file_it_came_from(folders, tmp_path):
    shutil.copytree(folders["audio"], tmp_path, dirs_exist_ok=True)
    model, path = load_model(tmp_path), tmp_path / "model.safetensors"
    before = {name: p.clone() for name, p in model.named_parameters()}
    with open(path, "r+b") as file:  # in place: a mapping of the file would show it
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert str(path) not in Path("/proc/self/maps").read_text()
    storages = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    assert len(storages) == len(before) and all(p.untyped_storage().nbytes() == p.nbytes for p in storages.values())


def test_tensors_are_read_one_at_a_time_and_only_after_all_headers_fit(folders, tmp_path, monkeypatch):
    save_model(load_model(folders["tied"]), folders["tied"], tmp_path, shard_bytes=20_000)
    alive, most, read = set(), [0], []
    whole = shards.open_safetensors

    class Watched:
        def __init__(self, path):
            self.file = whole(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.__exit__(None, None, None)

        def get_tensor(self, name):
            tensor = self.file.get_tensor(name)
            read.append(name)
            alive.add(name)
            weakref.finalize(tensor, alive.discard, name)
            most[0] = max(most[0], len(alive))
            return tensor

        def __getattr__(self, name):
            return getattr(self.file, name)

    for module in (shards, weights):
        monkeypatch.setattr(module, "open_safetensors", Watched)
    model = load_model(tmp_path)
    assert most == [1] and sorted(read) == sorted(name for name, _ in model.named_parameters())
    read.clear()
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    save_file({name: tensor[:1] for name, tensor in load_file(last).items()}, last)
    assert "has shape" in error_of(lambda: load_model(tmp_path)) and not read


def sharded(tmp_path, kind="audio"):
    """Writes a checkpoint in shards. Returns its index and, in it, {tensor: its file}."""
    save_model(tiny_model(kind), tmp_path, tmp_path, shard_bytes=120_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    return index, index["weight_map"]


def test_what_the_shards_hold_counts_and_not_what_the_index_says(tmp_path):
    index, file_of = sharded(tmp_path)
    first = file_of["audio_tower.conv1.bias"]
    second = max(set(file_of.values()) - {first})
    model = load_model(tmp_path)
    file_of["audio_tower.conv1.bias"] = second
    del file_of["audio_tower.conv2.bias"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_weights(load_model(tmp_path), model)
    state, other = load_file(tmp_path / first), load_file(tmp_path / second)
    other["audio_tower.extra"] = torch.ones(1)
    save_file(other, tmp_path / second)
    bias = state.pop("audio_tower.conv1.bias")
    save_file(state, tmp_path / first)
    assert error_of(lambda: load_model(tmp_path)) == (
        f"{tmp_path}: 2 tensors do not fit config.json: missing audio_tower.conv1.bias; unexpected audio_tower.extra")
    save_file({**state, "audio_tower.conv1.bias": bias}, tmp_path / first)
    save_file({**other, "audio_tower.conv1.bias": bias}, tmp_path / second)
    assert error_of(lambda: load_model(tmp_path)) == (
        f"{tmp_path}: audio_tower.conv1.bias is in {min(first, second)} and in {max(first, second)}")


@pytest.mark.parametrize("damage, said", [
    ("{", "not JSON"), ("", "not JSON"), ("\xff", "not JSON"), ("[]", "must hold a JSON object, got list"),
    ("{}", "has no weight_map"), ('{"weight_map": []}', "has no weight_map"),
    ('{"weight_map": {}}', "has no weight_map"),
    ('{"weight_map": {"a": 1}}', "a must be in a file of the same folder, got 1"),
    ('{"weight_map": {"a": "../b.safetensors"}}', "a must be in a file of the same folder, got '../b.safetensors'")])
def test_an_index_that_is_none_is_one_line_that_names_it(tmp_path, damage, said):
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(damage.encode("latin-1"))
    line = error_of(lambda: load_model(tmp_path))
    assert line.startswith(f"{path}: ") and said in line


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_shard_is_one_line_that_names_it(tmp_path, size):
    _, file_of = sharded(tmp_path)
    path = tmp_path / sorted(set(file_of.values()))[1]
    path.write_bytes(path.read_bytes()[:size])
    assert error_of(lambda: load_model(tmp_path)).startswith(f"{path}: not a whole safetensors file: ")


def test_a_tensor_of_a_dtype_that_is_not_read_is_named(folders, tmp_path):
    def damage(state):
        state["audio_tower.conv1.bias"] = state["audio_tower.conv1.bias"].double()
        state["audio_tower.conv2.bias"] = state["audio_tower.conv2.bias"].to(torch.int8)

    folder = broken(folders["audio"], tmp_path, damage)
    assert error_of(lambda: load_model(folder)).endswith(
        ": 2 tensors do not fit config.json: audio_tower.conv1.bias is F64, expected F32, BF16, F16; "
        "audio_tower.conv2.bias is I8, expected F32, BF16, F16")


def whole_omni(folder, extra):
    """A Qwen2.5-Omni checkpoint in one file, with `extra` tensors beside the thinker's, and its tokenizer."""
    tokenizer = write_tokenizer(folder, ["<|AUDIO|>", "<|VIDEO|>", "<|IMAGE|>", "<|audio_bos|>", "<|audio_eos|>",
                                         "<|vision_bos|>", "<|vision_eos|>"])
    raw = published_config("omni", vocab=340)
    for name, token in TOKENS["qwen2_5_omni"].items():
        raw["thinker_config"][name] = tokenizer.token_to_id(token)
    model = randomise(MultimodalLM(read_config(raw)))
    save_model(model, folder, folder)
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(2, dtype=torch.int64) for name in extra}, path)
    if extra:  # as published
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"enable_audio_output": false', '"enable_audio_output": true'))
    return model


def test_the_parts_of_omni_that_are_not_built_are_skipped_and_named_once_on_stderr(tmp_path, capsys):
    model = whole_omni(tmp_path, ["talker.a", "token2wav.b", "talker.c.d"])
    loaded, _ = minixmd.load(tmp_path)
    assert_same_weights(loaded, model)
    assert capsys.readouterr() == ("", f"minixmd: {tmp_path}: not built: talker.*, token2wav.*\n")
    whole_omni(tmp_path, [])
    minixmd.load(tmp_path)
    assert capsys.readouterr() == ("", "")
    whole_omni(tmp_path, ["talker.a", "talkers.b", "thinker.talker.c"])
    assert error_of(lambda: minixmd.load(tmp_path)).endswith(
        ": 2 tensors do not fit config.json: unexpected talkers.b; unexpected thinker.talker.c")


def test_a_shard_that_holds_nothing_that_is_built_need_not_be_there(tmp_path):
    whole_omni(tmp_path / "one", [])
    model = load_model(tmp_path / "one")
    save_model(model, tmp_path / "one", tmp_path, shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"].update({"talker.a": "far.safetensors", "token2wav.b": "far.safetensors"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_weights(load_model(tmp_path), model)
    index["weight_map"]["thinker.x"] = "far.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert error_of(lambda: load_model(tmp_path)) == f"{tmp_path / 'far.safetensors'}: no such file"


def test_the_tokenizers_files_go_with_a_saved_model(folders, tmp_path):
    (tmp_path / "from").mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json", "secrets.txt"):
        (tmp_path / "from" / name).write_text(name)
    save_model(load_model(folders["audio"]), tmp_path / "from", tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"]


# ---- whole models that do not fit ----


def broken(folder, tmp_path, tensors=lambda state: None, config=lambda raw: None):
    """A copy of a checkpoint whose tensors and config the two functions have changed in place."""
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    state, raw = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    tensors(state)
    config(raw)
    save_file(state, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(raw))
    return copy


def test_missing_unexpected_and_misshapen_tensors_are_listed_in_one_message(folders, tmp_path):
    def damage(state):
        del state["language_model.model.layers.1.mlp.up_proj.weight"], state["audio_tower.conv1.bias"]
        state["language_model.model.layers.0.self_attn.q_norm.weight"] = torch.ones(12)
        name = "language_model.model.layers.0.self_attn.k_proj.weight"
        state[name] = state[name].T.contiguous()

    folder = broken(folders["audio"], tmp_path, damage)
    assert error_of(lambda: load_model(folder)) == (
        f"{folder}: 4 tensors do not fit config.json: "
        "missing audio_tower.conv1.bias; "
        "language_model.model.layers.0.self_attn.k_proj.weight has shape [48, 24], expected [24, 48]; "
        "unexpected language_model.model.layers.0.self_attn.q_norm.weight; "
        "missing language_model.model.layers.1.mlp.up_proj.weight")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["audio", "vision"])
def test_each_missing_tensor_is_found(folders, tmp_path, kind):
    state = load_file(folders[kind] / "model.safetensors")
    shutil.copytree(folders[kind], tmp_path, dirs_exist_ok=True)
    for name in state:
        save_file({other: tensor for other, tensor in state.items() if other != name}, tmp_path / "model.safetensors")
        assert error_of(lambda: load_model(tmp_path)).endswith(f": 1 tensors do not fit config.json: missing {name}")


def test_the_other_familys_checkpoint_is_refused(folders, tmp_path):
    folder = broken(folders["vision"], tmp_path)
    shutil.copy(folders["audio"] / "model.safetensors", folder)
    message = error_of(lambda: load_model(folder))
    assert "unexpected audio_tower.conv1.bias" in message and message.count(";") == 10 and " more" in message
    assert "124 tensors do not fit" in message and len(message) < 1500


def test_a_tied_config_over_a_file_with_a_head_of_its_own_is_refused_and_over_a_copy_is_not(folders, tmp_path):
    folder = broken(folders["vision"], tmp_path, config=lambda raw: raw.update(tie_word_embeddings=True))
    assert error_of(lambda: load_model(folder)) == (
        f"{folder}: config.json ties lm_head.weight to model.embed_tokens.weight, but the file's two differ")
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_config_over_a_file_without_a_head_is_refused(folders, tmp_path):
    folder = broken(folders["tied"], tmp_path, config=lambda raw: raw.update(tie_word_embeddings=False))
    assert error_of(lambda: load_model(folder)).endswith("missing lm_head.weight")


@pytest.mark.parametrize("size", [0, 4, 100, 5_000, -1])
def test_a_truncated_file_is_one_line_that_names_it(folders, tmp_path, size):
    folder = broken(folders["audio"], tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert error_of(lambda: load_model(folder)).startswith(f"{path}: not a whole safetensors file: ")


def test_a_missing_file_shard_or_index_entry_is_one_line_that_names_it(folders, tmp_path):
    reference_audio().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "gone")
    assert error_of(lambda: load_model(tmp_path)) == f"{shard}: no such file"
    folder = broken(folders["audio"], tmp_path)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        assert error_of(lambda: load_model(folder)) == f"{folder / name}: no such file"
    assert "no such model folder" in error_of(lambda: minixmd.load(tmp_path / "nowhere"))


@pytest.mark.parametrize("damage", ["", "{", "[1]", "null", '"qwen2_vl"', "{}", '{"model_type": "qwen3"}',
                                    '{"model_type": ["qwen2_vl"]}'])
def test_a_config_that_is_no_config_is_one_line_that_names_it(folders, tmp_path, damage):
    folder = broken(folders["audio"], tmp_path)
    (folder / "config.json").write_text(damage)
    assert error_of(lambda: load_model(folder)).startswith(f"{folder / 'config.json'}: ")


# ---- adapters ----


def test_a_model_with_an_adapter_is_not_saved_as_plain_weights_until_it_is_merged(folders, tmp_path):
    model = with_adapter(folders["audio"])
    assert "merge the adapter first" in error_of(lambda: save_model(model, folders["audio"], tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    merge_lora(model)
    assert not adapted(model) and not [name for name, _ in model.named_parameters() if "lora" in name]
    save_model(model, folders["audio"], tmp_path / "merged")
    assert torch.equal(logits_of(load_model(tmp_path / "merged"), "audio"), logits_of(model, "audio"))


def test_the_targets_are_a_pattern_over_whole_module_names(folders):
    model = load_model(folders["vision"])
    add_lora(model, rank=3, alpha=5, targets=r"model\.layers\.\d+\.self_attn\.(q|v)_proj", seed=0)
    chosen = {f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in "qv"}
    assert adapted(model).keys() == chosen


def test_a_new_adapter_changes_nothing_and_its_draw_depends_on_seed_and_module_name_alone(folders):
    kind, folder = "audio", folders["audio"]
    models = [load_model(folder) for _ in range(3)]
    add_lora(models[0], rank=3, alpha=5, targets=LINEARS, seed=0)
    add_lora(models[1], rank=3, alpha=5, targets=r"model\.layers\.1\..*", seed=0)
    add_lora(models[2], rank=3, alpha=5, targets=r"model\.layers\.1\..*", seed=1)
    assert torch.equal(logits_of(models[0], kind), logits_of(load_model(folder), kind))
    assert models[0].get_submodule("model.layers.1.mlp.up_proj").scale == 5 / 3  # alpha / rank
    a, b, c = (model.get_submodule("model.layers.1.mlp.up_proj").lora_A for model in models)
    assert torch.equal(a, b) and not torch.equal(a, c) and a.abs().max() <= 48**-0.5
    assert not torch.equal(a, models[0].get_submodule("model.layers.1.mlp.gate_proj").lora_A)
    trained = {name for name, p in models[1].named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in models[1].named_parameters() if "lora_" in name}
    assert "matches no linear layer" in error_of(
        lambda: add_lora(models[2], rank=3, alpha=5, targets="lm_head", seed=0))


CONFIG_FAULTS = {"use_dora": True, "modules_to_save": ["lm_head"], "lora_bias": True, "bias": "all",
                 "peft_type": "IA3", "fan_in_fan_out": True, "init_lora_weights": "pissa", "target_parameters": ["x"],
                 "alpha_pattern": {"q_proj": 8}, "rank_pattern": {"q_proj": 8}, "layer_replication": [[0, 1]],
                 "a_later_option": {"on": True}, "r": None, "lora_alpha": "8"}  # fmt: skip


@pytest.mark.parametrize("field", CONFIG_FAULTS)
def test_an_adapter_kind_that_is_not_plain_lora_is_refused_by_field(folders, tmp_path, field):
    model = with_adapter(folders["audio"])
    save_adapter(model, folders["audio"], tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: CONFIG_FAULTS[field]}))
    again = load_model(folders["audio"])
    line = error_of(lambda: load_adapter(again, tmp_path))
    assert line.startswith(f"{tmp_path}: ") and field in line and not adapted(again)


PEFT_OPTIONS = {  # of LoraConfig -> the field that we refuse, None: the adapter is right
    "default": ({}, None), "random": (dict(init_lora_weights=False), None), "rslora": (dict(use_rslora=True), None),
    "gaussian": (dict(init_lora_weights="gaussian"), None), "orthogonal": (dict(init_lora_weights="orthogonal"), None),
    "mica": (dict(init_lora_weights="mica"), None), "dropout": (dict(lora_dropout=0.5), None),
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights"),
    "pissa_niter_4": (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "olora": (dict(init_lora_weights="olora"), "init_lora_weights"),
    "one layer": (dict(layers_to_transform=[1]), None), "excluded": (dict(exclude_modules=["k_proj"]), None),
    "pattern": (dict(target_modules=r".*language_model.*\.(q|v)_proj"), None),
    "all-linear": (dict(target_modules="all-linear"), None),
    "ranks": (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "alphas": (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
    "dora": (dict(use_dora=True), "use_dora"), "bias": (dict(bias="lora_only"), "bias"),
    "lora_bias": (dict(lora_bias=True, target_modules=r".*language_model.*q_proj"), "lora_bias"),
    "saved": (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    "tokens": (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT's, on the biases that it saves
@pytest.mark.parametrize("option", PEFT_OPTIONS)
def test_an_adapter_of_each_of_pefts_options_is_right_or_refused_by_name(option, tmp_path):
    reference_audio().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForMultimodalLM.from_pretrained(tmp_path / "base")
    given, refused = PEFT_OPTIONS[option]
    given = dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM") | given
    adapted_model = peft.get_peft_model(model, peft.LoraConfig(**given)).eval()
    if refused is None:
        fill((name, p) for name, p in adapted_model.named_parameters() if "lora_" in name)
    adapted_model.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base")
    if refused:
        assert f"adapter_config.json {refused} = " in error_of(lambda: load_adapter(ours, tmp_path / "adapter"))
        return
    load_adapter(ours, tmp_path / "adapter")
    assert_close(logits_of(ours, "audio"), reference_logits(adapted_model.base_model.model, "audio"))


def test_an_adapter_finds_its_base_when_both_have_moved(folders, tmp_path):
    (tmp_path / "here" / "runs").mkdir(parents=True)
    shutil.copytree(folders["audio"], tmp_path / "here" / "base")
    save_adapter(with_adapter(folders["audio"]), tmp_path / "here" / "base", tmp_path / "here" / "runs" / "best")
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "runs" / "best"
    assert base_folder(moved) == (tmp_path / "there" / "base").resolve()
    for place in ("there", "here"):  # another model lies in that place; then in the first one, too
        save_model(tiny_model("audio", seed=5), folders["audio"], tmp_path / place / "base")
        line = error_of(lambda: base_folder(moved))
        assert f"{place}/base is another model than the one that this adapter was trained on; to use it" in line
    (moved / "minixmd_base.json").unlink()
    assert base_folder(moved) == tmp_path / "here" / "base"


@pytest.mark.parametrize("left", [{}, {"config.json": "{}"}, {"model.safetensors": "x"}], ids=str)
def test_an_adapter_finds_its_base_where_something_else_lies_in_the_old_place(folders, tmp_path, left):
    shutil.copytree(folders["audio"], tmp_path / "here" / "base")
    save_adapter(with_adapter(folders["audio"]), tmp_path / "here" / "base", tmp_path / "here" / "runs" / "best")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "here" / "base").mkdir(parents=True)
    for name, text in left.items():
        (tmp_path / "here" / "base" / name).write_text(text)
    assert base_folder(tmp_path / "there" / "runs" / "best") == tmp_path / "there" / "base"


def test_an_adapter_in_a_linked_folder_finds_its_base_when_both_have_moved(folders, tmp_path):
    shutil.copytree(folders["audio"], tmp_path / "here" / "base")
    (tmp_path / "here" / "disk" / "deep" / "runs").mkdir(parents=True)
    (tmp_path / "here" / "runs").symlink_to("disk/deep/runs")
    save_adapter(with_adapter(folders["audio"]), tmp_path / "here" / "base", tmp_path / "here" / "runs" / "best")
    (tmp_path / "here").rename(tmp_path / "there")
    assert base_folder(tmp_path / "there" / "runs" / "best") == tmp_path / "there" / "base"


def test_an_adapters_pattern_is_read_by_the_names_of_its_own_layout(folders, tmp_path):
    """As ms-swift writes it for transformers 4: "model" begins the decoder's names, and there not the tower's."""
    targets = r"model\.layers\..*_proj"
    model = with_adapter(folders["vision"], targets)
    pairs = {name: {"lora_A": layer.lora_A, "lora_B": layer.lora_B} for name, layer in adapted(model).items()}
    weights.write_adapter(tmp_path, {"r": 3, "lora_alpha": 5}, pairs, model.config.family.checkpoint_name)
    path = tmp_path / "adapter_config.json"
    pattern = r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": pattern}))
    again = load_model(folders["vision"])
    load_adapter(again, tmp_path)
    assert_close(logits_of(again, "vision"), logits_of(model, "vision"))
    (tensors := load_file(tmp_path / "adapter_model.safetensors")).pop(
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    again = load_model(folders["vision"])
    assert "missing model.layers.0.mlp.up_proj" in error_of(lambda: load_adapter(again, tmp_path))


@pytest.mark.parametrize("fields, said", [
    ({"target_modules": 3}, "needs 'target_modules', a list of str or None, got 3"),
    ({"target_modules": ["q_proj", 3]}, "needs 'target_modules'"), ({"target_modules": "("}, "target_modules '('"),
    ({"r": 0}, "needs 'r', > 0, got 0"), ({"r": "8"}, "needs 'r', an int, got '8'"),
    ({"lora_alpha": float("nan")}, "needs 'lora_alpha', a float, got nan"), ({"use_rslora": "a"}, "use_rslora = 'a'"),
])  # fmt: skip
def test_an_adapters_fields_are_checked(folders, tmp_path, fields, said):
    save_adapter(with_adapter(folders["audio"], r".*layers.0.*q_proj"), folders["audio"], tmp_path)
    path = tmp_path / "adapter_config.json"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert said in error_of(lambda: load_adapter(load_model(folders["audio"]), tmp_path))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": None, "r": 3, "lora_alpha": 5,
                                                               "use_rslora": False}))
    load_adapter(load_model(folders["audio"]), tmp_path)
    name = next(name for name in tensors if ".model.language_model." in name)
    twin = name.replace(".model.language_model.", ".language_model.model.")  # the same layer by the older layout
    save_file({**tensors, twin: tensors[name] + 1}, tmp_path / "adapter_model.safetensors")
    assert "is there under two names" in error_of(lambda: load_adapter(load_model(folders["audio"]), tmp_path))


def test_pefts_dora_is_refused(tmp_path):
    reference_audio().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForMultimodalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    assert "use_dora" in error_of(lambda: load_adapter(load_model(tmp_path / "base"), tmp_path))


def test_misfitting_adapter_tensors_are_listed_in_one_message(folders, tmp_path):
    model = with_adapter(folders["audio"])
    save_adapter(model, folders["audio"], tmp_path)
    path, prefix = tmp_path / "adapter_model.safetensors", "base_model.model.model.language_model.layers.0."
    state = load_file(path)
    del state[f"{prefix}self_attn.q_proj.lora_B.weight"]
    state[f"{prefix}self_attn.k_proj.lora_A.weight"] = torch.ones(3, 40)
    state[f"{prefix}self_attn.v_proj.lora_A.weight"] = torch.ones(2, 48)  # another rank
    state[f"{prefix}self_attn.q_norm.lora_A.weight"] = torch.ones(3, 48)
    state[f"{prefix}mlp.up_proj.lora_magnitude_vector"] = torch.ones(40)
    save_file(state, path)
    again = load_model(folders["audio"])
    line = error_of(lambda: load_adapter(again, tmp_path))
    assert line.startswith(f"{tmp_path}: adapter does not fit the model: ") and not adapted(again)
    for part in ("q_proj", "k_proj", "v_proj", "q_norm", "lora_magnitude_vector", "(3, 40)", "(2, 48)", "(3, 48)"):
        assert part in line


def test_an_adapter_without_tensors_file_or_base_is_one_line_that_says_so(folders, tmp_path):
    model = with_adapter(folders["audio"])
    save_adapter(model, tmp_path / "gone", tmp_path)
    assert f"base model {tmp_path / 'gone'} is not there" in error_of(lambda: minixmd.load(tmp_path))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    assert "base model unnamed is not there" in error_of(lambda: minixmd.load(tmp_path))
    path, again = tmp_path / "adapter_model.safetensors", load_model(folders["audio"])
    path.write_bytes(path.read_bytes()[:1000])
    assert error_of(lambda: load_adapter(again, tmp_path)).startswith(f"{path}: not a whole safetensors file")
    save_file({}, path)
    assert "it holds no tensor" in error_of(lambda: load_adapter(again, tmp_path))
    path.unlink()
    assert error_of(lambda: load_adapter(again, tmp_path)) == f"{path}: no such file"


def test_an_adapter_that_lacks_a_layer_which_its_own_config_names_is_refused(tmp_path):
    model = tiny_model("audio")
    add_lora(model, rank=2, alpha=4, targets=r"model\.layers\..*", seed=0)
    save_adapter(model, "base", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}, file)
    for targets in (None, ["up_proj", "q_proj"]):  # as we write them, a pattern; as PEFT may, names' ends
        if targets:
            config = json.loads((tmp_path / "adapter_config.json").read_text())
            (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
        with pytest.raises(ValueError, match=r"missing model\.layers\.1\.mlp\.up_proj") as caught:
            load_adapter(tiny_model("audio"), tmp_path)
        assert ("audio_tower.layers.0.self_attn.q_proj" in str(caught.value)) == bool(targets)
