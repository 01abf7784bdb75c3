"""python -m minixmd.verify: a right model passes every check, and each check fails on a fault planted for it."""
import importlib.util
import json
import shutil
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from media_files import write_mp4, write_wav
from mini import AUDIO, OMNI, VISION, write_tokenizer
from safetensors.torch import load_file, save_file
from tiny import TOKENS, published_config, randomise

from minixmd import load
from minixmd.inputs.batch import Segment, Segments
from minixmd.models.families import read_config
from minixmd.models.lora import add_lora
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import adapted, save_adapter, save_model
from minixmd.verify import __main__ as verify
from minixmd.verify import against_transformers
from minixmd.verify.subject import Subject, choose_clips

KINDS = ("audio", "vision", "windowed", "omni")
SPECIAL = {"audio": AUDIO, "vision": VISION, "windowed": VISION, "omni": OMNI}
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")


def write_model(folder, kind):
    """A tiny random model of a family with its tokenizer, in the published layout."""
    tokenizer, raw = write_tokenizer(folder, SPECIAL[kind]), published_config(kind, vocab=340)
    part = raw.get("thinker_config", raw)
    for name, token in TOKENS[raw["model_type"]].items():
        if name in part:
            part[name] = tokenizer.token_to_id(token)
    save_model(randomise(MultimodalLM(read_config(raw))), folder, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def copied(folders, tmp_path):
    """copied(kind): a copy of the family's folder, to be damaged."""
    return lambda kind: shutil.copytree(folders[kind], tmp_path / kind)


def subject(folder, dtype="float32", audios=(), videos=()):
    model, processor = load(folder, dtype=getattr(torch, dtype))
    return Subject(model, processor, dtype, choose_clips(model.config.family, audios, videos))


def table(capsys, *argv):
    """(exit status, {check: its row}, stderr) of the command."""
    status = verify.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    rows = {name: line for name in verify.CHECKS for line in out.splitlines() if line.startswith(name)}
    return status, rows, err


# ---- right models ----


@pytest.mark.parametrize("kind, dtype", [
    ("vision", "float32"), ("windowed", "float32"), ("omni", "float32"), ("vision", "bfloat16"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("audio", "float32"), ("audio", "bfloat16"), ("windowed", "bfloat16"), ("omni", "bfloat16")))])  # fmt: skip
def test_a_right_model_passes_every_check(folders, capsys, kind, dtype):
    status, rows, err = table(capsys, folders[kind], "--dtype", dtype)
    assert list(rows) == list(verify.CHECKS) and err == ""
    skips = [name for name, row in rows.items() if not row.endswith(" PASS")]
    expected = [] if torch.cuda.is_available() else ["captured decoding = step by step"]
    if importlib.util.find_spec("transformers") is None:
        expected.append("logits = transformers'")
    assert status == 0 and skips == expected, rows


@pytest.mark.slow
def test_own_clips_and_an_adapter_are_taken(folders, tmp_path, capsys):
    t_S = np.arange(20000) / 16000
    wave_S = (0.3 * np.sin(2 * np.pi * 500 * t_S)).astype(np.float32)
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), dtype=np.uint8)
    clip, one, two = tmp_path / "a.mp4", tmp_path / "a.wav", tmp_path / "b.wav"
    write_mp4(clip, frames, fps=4)
    write_wav(one, wave_S)
    write_wav(two, wave_S[:9000] ** 2)
    s = subject(folders["omni"], audios=[one, two], videos=[clip])
    assert [part["audio"] for part in s.clips["audio"]] == [one, two]
    assert s.clips["video"][0]["video"] == clip and isinstance(s.clips["video"][1]["video"], torch.Tensor)
    with torch.no_grad():
        add_lora(s.model, rank=2, alpha=3, targets=r"model\.layers\..*", seed=0)
        for m in adapted(s.model).values():
            m.lora_B.normal_()
    save_adapter(s.model, folders["omni"], tmp_path / "adapter")
    own = ["--audio", one, "--audio", two, "--video", clip]
    status, rows, _ = table(capsys, tmp_path / "adapter", *own)
    assert status == 0 and all(row.endswith(("PASS", "SKIP")) for row in rows.values()), rows
    before = s.logits()
    verify.run_check("logits = transformers'", s)
    assert torch.equal(before, s.logits())  # the model's own adapter is back


def test_a_large_model_is_compared_with_transformers_only_when_that_is_asked_for(folders, capsys, monkeypatch):
    monkeypatch.setattr(against_transformers, "LARGE", 1000)
    status, rows, _ = table(capsys, folders["vision"])
    assert status == 0 and "--against transformers does it" in rows["logits = transformers'"]
    assert rows["logits = transformers'"].endswith("SKIP")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    outcome = verify.run_check("logits = transformers'", subject(folders["vision"]))
    assert (outcome.measured, outcome.verdict) == ("transformers is not installed", "SKIP")
    status, rows, err = table(capsys, folders["vision"], "--against", "transformers")
    assert (status, rows) == (2, {}) and err == "minixmd: --against transformers needs transformers: pip install " \
        "transformers\n"


@needs_transformers
def test_asked_for_a_large_model_is_compared_with_transformers(folders, capsys, monkeypatch):
    monkeypatch.setattr(against_transformers, "LARGE", 1000)
    status, rows, _ = table(capsys, folders["vision"], "--against", "transformers")
    assert status == 0 and rows["logits = transformers'"].endswith("PASS")


def test_parts_that_are_not_built_are_passed_over(copied, capsys):
    folder = copied("omni")
    state = load_file(folder / "model.safetensors")
    save_file(state | {"talker.a": torch.ones(2), "talker.b": torch.ones(1)}, folder / "model.safetensors")
    s = subject(folder)
    outcome = verify.run_check("every tensor, and no other", s)
    assert outcome.passed and outcome.measured == "120 of 120"
    names = dict.fromkeys([*state, "talker.a", "talker.b"], "model.safetensors")
    names |= {f"token2wav.{i}": "gone.safetensors" for i in range(3)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    outcome = verify.run_check("every tensor, and no other", s)
    assert outcome.passed and outcome.measured == "120 of 120"


@pytest.mark.parametrize("name, parameters", [  # published; a tied head counts once
    ("Qwen2-Audio-7B-Instruct", 8_397_094_912), ("Qwen2-VL-7B-Instruct", 8_291_375_616),
    ("Qwen2-VL-2B-Instruct", 2_208_985_600), ("Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    ("Qwen2.5-VL-32B-Instruct", 33_452_718_336), ("Qwen2.5-Omni-7B-thinker", 8_931_813_888),
])  # fmt: skip
def test_a_published_config_makes_the_published_number_of_parameters(name, parameters):
    path = Path(__file__).parent / "configs" / f"{name}.json"
    with torch.device("meta"):
        model = MultimodalLM(read_config(json.loads(path.read_text())))
    assert sum(p.numel() for p in model.parameters()) == parameters


# ---- planted faults: check -> (family, what breaks it) ----


def weights(change):
    """A fault in the loaded model's weights."""
    return lambda monkeypatch, s: change(dict(s.model.named_parameters()), s)


def files(change):
    """A fault in the checkpoint's tensors after it was loaded (which would itself refuse it)."""
    def fault(monkeypatch, s):
        path = s.processor.folder / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)
    return fault


def patched(target, make):
    """`target` is replaced by make(what it was)."""
    return lambda monkeypatch, s: monkeypatch.setattr(target, make(resolve_name(target)))


def one_segment(attend):
    """Attention to which all rows are one sequence."""
    return lambda q, k, v, segments, causal=True: attend(q, k, v, Segments([Segment(0, len(q))]), causal)


def drop(state):
    del state["audio_tower.layers.1.fc1.bias"]


def swap_rows(state):
    name = "visual.blocks.0.attn.qkv.weight"
    state[name] = state[name].roll(32, 0)


def flip_heads(parameters, s):
    w = s.model.model.layers[1].self_attn.q_proj.weight
    w.copy_(w.unflatten(0, (4, -1)).flip(0).flatten(0, 1))


def wrong_place(decode):
    """The cache puts a new row where the last one stands."""
    def late(cache, layer, q, k, v):
        cache.length_B = cache.length_B - 1
        out = decode(cache, layer, q, k, v)
        cache.length_B = cache.length_B + 1
        return out
    return late


def blind_to_itself(decode):
    """A new row does not see itself: the row before takes its place."""
    def blind(cache, layer, q, k, v):
        length_B = cache.length_B[:len(q)]
        k, v = (pool[layer][torch.arange(len(q)), :, length_B - 1] for pool in cache.pool)
        return decode(cache, layer, q, k, v)
    return blind


def deaf(embed):
    return lambda model, batch: model.model.embed_tokens(batch.ids_N)


def noisy(encode):
    return lambda model, kind, media: (x := encode(model, kind, media)) + 1e-6 * torch.randn_like(x)


def off_by_one(convolve):
    """A position table that starts at its second row."""
    def shifted(tower, media):
        x_AE, lengths = convolve(tower, media)
        table = tower.embed_positions.weight
        return x_AE + torch.cat([table[1:A + 1] - table[:A] for A in lengths]), lengths
    return shifted


def resumed(batch):
    """A batch whose last rows have the position of their row."""
    for start, end in batch.spans:
        batch.positions_3N[:, end - 1] = end - 1 - start
    return batch


FAULTS = [
    ("every tensor, and no other", "audio", "a tensor is not there", files(drop)),
    ("every tensor, and no other", "audio", "a tensor too many", files(lambda t: t.update(x=torch.ones(2)))),
    ("every tensor, and no other", "vision", "queries stand where keys stood", files(swap_rows)),
    ("every tensor, and no other", "vision", "a NaN", weights(
        lambda p, s: p["visual.merger.ln_q.bias"].data[3].fill_(torch.nan))),
    ("packed = one at a time", "audio", "clips see each other", patched(
        "minixmd.models.whisper.packed_attention", one_segment)),
    ("logits = transformers'", "audio", "the tower's positions start at 1", patched(
        "minixmd.models.whisper.Whisper.convolve", off_by_one)),
    ("packed = one at a time", "omni", "clips see each other", patched(
        "minixmd.models.whisper.packed_attention", one_segment)),
    ("packed = one at a time", "vision", "clips see each other", patched(
        "minixmd.models.vit.packed_attention", one_segment)),
    ("packed = one at a time", "windowed", "clips see each other", patched(
        "minixmd.models.vit.packed_attention", one_segment)),
    ("packed = one at a time", "audio", "attention ignores segments", patched(
        "minixmd.models.multimodal.packed_attention", one_segment)),
    ("packed = one at a time", "omni", "media of all prompts in the wrong rows", patched(
        "minixmd.models.multimodal.MultimodalLM.encode",
        lambda encode: lambda model, kind, media: encode(model, kind, media[::-1]))),
    ("cached decoding = full forward", "vision", "the cache writes to the row before", patched(
        "minixmd.learning.kv_cache.KVCache.decode", wrong_place)),
    ("cached decoding = full forward", "audio", "a new row does not see itself", patched(
        "minixmd.learning.kv_cache.KVCache.decode", blind_to_itself)),
    ("cached decoding = full forward", "vision", "positions resume after the rows, not after the largest", patched(
        "minixmd.learning.decoder.pack", lambda was: lambda prompts: resumed(was(prompts)))),
    ("log-probs generated = scored", "audio", "the temperature is forgotten", patched(
        "minixmd.learning.decoder.sample", lambda draw: lambda z, u, t, suppressed: draw(z, u, 1.0, suppressed))),
    ("log-probs generated = scored", "audio", "suppressed ids are in the sum", patched(
        "minixmd.learning.decoder.sample", lambda draw: lambda z, u, t, suppressed: draw(z, u, t, suppressed[:0]))),
    ("only another clip changes the answer", "audio", "features are not scattered", patched(
        "minixmd.models.multimodal.MultimodalLM._embed", deaf)),
    ("only another clip changes the answer", "omni", "one kind's features are not scattered", patched(
        "minixmd.models.multimodal.MultimodalLM.encode",
        lambda encode: lambda model, kind, media: encode(model, kind, media) * (kind == "video"))),
    ("only another clip changes the answer", "vision", "the tower is noisy", patched(
        "minixmd.models.multimodal.MultimodalLM.encode", noisy)),
    ("logits = transformers'", "audio", "heads are flipped", weights(flip_heads)),
    ("logits = transformers'", "windowed", "another wavelength", patched(
        "minixmd.models.qwen2.Qwen2.rotary", lambda rotary: lambda model, positions: rotary(model, 1.01 * positions))),
    ("logits = transformers'", "omni", "a tower's bias is lost", weights(
        lambda p, s: p["visual.blocks.1.attn.v.bias"].data.zero_())),
    ("logits = transformers'", "vision", "norm's epsilon", lambda _, s: setattr(s.model.model.norm, "eps", 1e-2)),
]  # fmt: skip


@pytest.mark.parametrize("check, kind, what, fault", FAULTS, ids=[" / ".join(row[:3]) for row in FAULTS])
def test_the_check_fails_on_a_planted_fault(copied, monkeypatch, check, kind, what, fault):
    if check == "logits = transformers'":
        pytest.importorskip("transformers")
    folder = copied(kind)
    assert verify.run_check(check, subject(folder)).verdict == "PASS"
    s = subject(folder)
    fault(monkeypatch, s)
    outcome = verify.run_check(check, s)
    assert outcome.verdict == "FAIL", f"{outcome.measured} (bound {outcome.bound})"
    assert "Error" not in outcome.measured, outcome.measured  # measured, not stumbled over


def test_a_wrong_count_of_placeholders_is_the_row_of_what_reads_clips(folders, monkeypatch):
    monkeypatch.setattr("minixmd.inputs.tokenizer.num_audio_tokens", lambda frames: 3)
    outcome = verify.run_check("packed = one at a time", subject(folders["audio"]))
    assert outcome.verdict == "FAIL" and "placeholders for" in outcome.measured


def test_every_check_has_a_planted_fault():
    elsewhere = {"captured decoding = step by step"}  # its fault is in test_absent_device.py
    assert {row[0] for row in FAULTS} | elsewhere == set(verify.CHECKS)


# ---- broken checkpoints and bad input ----


def test_a_failing_check_is_exit_status_1_and_what_it_raises_is_its_row(folders, capsys, monkeypatch):
    def broken(s):
        raise RuntimeError("no\nway")

    monkeypatch.setitem(verify.CHECKS, "only another clip changes the answer", broken)
    status, rows, _ = table(capsys, folders["vision"])
    assert status == 1 and "RuntimeError: no way" in rows["only another clip changes the answer"]
    assert sum(row.endswith("FAIL") for row in rows.values()) == 1


def test_weights_that_are_not_numbers_fail_every_check_of_a_number(copied, capsys):
    folder = copied("vision")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][:] = torch.nan
    save_file(state, folder / "model.safetensors")
    status, rows, err = table(capsys, folder)
    assert status == 1 and err == ""
    passed = {name for name, row in rows.items() if not row.endswith("FAIL")}
    assert passed <= {"captured decoding = step by step", "logits = transformers'"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_pair_that_is_no_number_or_of_another_shape_is_not_close(dtype):
    one, nan = torch.ones(2, 3), torch.full((2, 3), torch.nan)
    s = SimpleNamespace(dtype=dtype)
    assert Subject.compare(s, [one, one], [one, one]).verdict == "PASS"
    for ours in ([one, nan], [nan, one], [one, one[:1]], [one, 1.1 * one]):
        assert Subject.compare(s, ours, [one, one]).verdict == "FAIL"


@pytest.mark.parametrize("damage", ["no folder", "a tensor less", "half a file", "no tokenizer", "another's tokenizer",
                                    "no config"])
def test_a_checkpoint_that_does_not_load_is_one_line_and_status_2(copied, folders, capsys, damage):
    folder = copied("vision")
    path = folder / "model.safetensors"
    if damage == "no folder":
        folder = folder / "nowhere"
    elif damage == "a tensor less":
        state = load_file(path)
        del state["visual.merger.ln_q.bias"]
        save_file(state, path)
    elif damage == "half a file":
        path.write_bytes(path.read_bytes()[:50_000])
    elif damage == "another's tokenizer":
        shutil.copy(folders["audio"] / "tokenizer.json", folder)
    else:
        (folder / {"no tokenizer": "tokenizer.json", "no config": "config.json"}[damage]).unlink()
    status, rows, err = table(capsys, folder)
    assert (status, rows) == (2, {}) and err.startswith("minixmd: ") and err.count("\n") == 1
    assert str(folder) in err


def test_a_clip_that_cannot_be_used_is_one_line_and_status_2(folders, tmp_path, capsys):
    (tmp_path / "text.wav").write_text("not a clip")
    for kind, argv, said in (("audio", ["--audio", tmp_path / "no.wav"], "no.wav: missing"),
                             ("audio", ["--audio", tmp_path / "text.wav"], "text.wav: "),
                             ("vision", ["--audio", tmp_path / "text.wav"], "a qwen2_vl model cannot take audio"),
                             ("audio", ["--video", tmp_path / "text.wav"], "a qwen2_audio model cannot take video")):
        status, rows, err = table(capsys, folders[kind], *argv)
        assert (status, rows) == (2, {}) and err.startswith("minixmd: ") and said in err and err.count("\n") == 1
