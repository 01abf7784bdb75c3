"""tools/ask.py: the streamed answer is generate()'s, no character is ever halved, and errors are one line."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import write_mp4, write_wav
from mini import OMNI, write_model, write_tokenizer
from tiny import TOKENS, published_config, randomise

import minixmd
from minixmd.models.families import read_config
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import save_model

TOOL = Path(__file__).resolve().parents[1] / "tools" / "ask.py"
spec = importlib.util.spec_from_file_location("ask", TOOL)
ask = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ask)
MULTIBYTE = "Ein Käuzchen 🦉 ruft: «hu-hu», 3 €.\n二羽\n\nthe end 👩‍🚀"


class Chunks(list):
    """A stdout that keeps every write apart."""

    write = list.append

    def flush(self):
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{kind: folder}, and "clips": a folder with a.wav and a.mp4, which has sound."""
    found = {kind: write_model(tmp_path_factory.mktemp(kind), kind) for kind in ("audio", "vision")}
    found["omni"], found["clips"] = tmp_path_factory.mktemp("omni"), tmp_path_factory.mktemp("clips")
    tokenizer, raw = write_tokenizer(found["omni"], OMNI), published_config("omni", vocab=340)
    part = raw["thinker_config"]
    for name, token in TOKENS["qwen2_5_omni"].items():
        if name in part:
            part[name] = tokenizer.token_to_id(token)
    save_model(randomise(MultimodalLM(read_config(raw))), found["omni"], found["omni"])
    wave_S = (0.3 * np.sin(np.arange(40000) / 9)).astype(np.float32)
    frames = np.random.default_rng(0).integers(0, 255, (10, 56, 84, 3), dtype=np.uint8)
    write_wav(found["clips"] / "a.wav", wave_S)
    write_mp4(found["clips"] / "a.mp4", frames, wave_S, fps=4)
    return found


def run(monkeypatch, capsys, *argv):
    """(exit status, what was written to stdout, write by write, stderr) of the tool."""
    out = Chunks()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        status = ask.main([str(arg) for arg in argv])
    return status, out, capsys.readouterr().err


def scripted(monkeypatch, ids):
    """Every model says these ids, whatever it is asked."""
    left = list(ids)

    def sample(logits_BV, uniform_B, temperature, suppressed_ids):
        return torch.tensor([left.pop(0)]).expand(len(logits_BV)), torch.zeros(len(logits_BV))

    monkeypatch.setattr("minixmd.learning.decoder.sample", sample)


def part(kind, path, **options):
    return {"type": kind, kind: str(path), **options}


CASES = {
    "text only": ("vision", [], lambda clips: []),
    "audio": ("audio", ["--audio", "a.wav"], lambda clips: [part("audio", clips / "a.wav")]),
    "video": ("vision", ["--video", "a.mp4", "--fps", "4"], lambda clips: [part("video", clips / "a.mp4", fps=4.0)]),
    "both": ("omni", ["--video", "a.mp4", "--audio", "a.wav"],
             lambda clips: [part("audio", clips / "a.wav"), part("video", clips / "a.mp4")]),
    "sounded": ("omni", ["--video", "a.mp4", "--use-audio"],
                lambda clips: [part("video", clips / "a.mp4", use_audio=True)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_streamed_is_the_text_of_generate(models, monkeypatch, capsys, case):
    kind, argv, parts = CASES[case]
    argv = [models["clips"] / arg if arg.startswith("a.") else arg for arg in argv]
    model, processor = minixmd.load(models[kind])
    content = [*parts(models["clips"]), {"type": "text", "text": "What is it?"}]
    texts = set()
    for temperature, seed in ((0.0, 0), (1.0, 0), (1.0, 1)):
        [[expected]] = minixmd.generate(model, processor, [[{"role": "user", "content": content}]], max_new_tokens=30,
                                        temperature=temperature, seed=seed)
        status, out, err = run(monkeypatch, capsys, models[kind], "What is it?", *argv, "--max-new-tokens", 30,
                               "--temperature", temperature, "--seed", seed)
        assert (status, "".join(out)) == (0, expected.text + "\n")
        assert len([chunk for chunk in out if chunk]) > 3  # in pieces
        assert f"loading {models[kind]} in float32 on " in err and "parameters, loaded in" in err
        assert ("cut after 30 tokens" in err) == (not expected.finished)
        texts.add(expected.text)
    assert len(texts) == 3


def test_no_character_is_halved_and_each_is_written_with_its_last_byte(models, monkeypatch, capsys):
    processor = minixmd.load(models["audio"])[1]
    ids = [*processor.encode(MULTIBYTE), processor.end_id]
    assert len(ids) > len(MULTIBYTE.encode()) // 2  # most characters beyond ASCII are several tokens
    scripted(monkeypatch, ids)
    status, out, err = run(monkeypatch, capsys, models["audio"], "Hm?", "--max-new-tokens", 200)
    assert (status, "".join(out)) == (0, MULTIBYTE + "\n") and "cut" not in err
    assert not any("\ufffd" in chunk for chunk in out)
    for i in range(1, len(ids)):  # nothing whole is held back
        whole = b"".join(bytes_of(processor, token) for token in ids[:i]).decode(errors="ignore")
        assert "".join(out[:i]) == whole


def bytes_of(processor, token):
    """A token's bytes, by the byte-level alphabet: printable bytes stand for themselves, the others from U+0100 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    table |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    return bytes(table[c] for c in processor.tokenizer.id_to_token(token))


def test_bytes_that_never_become_a_character_are_written_in_the_end(models, monkeypatch, capsys):
    processor = minixmd.load(models["audio"])[1]
    for text, cut in (("ab€", 1), ("🦉x", 2), ("ab🦉", 3)):
        ids = processor.encode(text)[:-cut] if text[-1] != "x" else processor.encode(text)[1:]
        scripted(monkeypatch, [*ids, processor.end_id])
        status, out, _ = run(monkeypatch, capsys, models["audio"], "Hm?")
        assert (status, "".join(out)) == (0, processor.decode(ids) + "\n") and "\ufffd" in "".join(out)


def test_on_token_sees_every_token_of_every_row_and_changes_nothing(models):
    model, processor = minixmd.load(models["audio"])
    seen, conversations = {}, [[{"role": "user", "content": text}] for text in ("One?", "And two?")]

    def keep(row, ids):
        assert ids[:-1] == seen.get(row, ())
        seen[row] = ids

    options = dict(num_samples=2, max_new_tokens=9, temperature=1.0, seed=3)
    heard = minixmd.generate(model, processor, conversations, **options, on_token=keep)
    assert heard == minixmd.generate(model, processor, conversations, **options)
    assert [seen[row] for row in range(4)] == [c.ids for completions in heard for c in completions]


def test_ctrl_c_keeps_what_was_written_and_gives_the_shells_status(models, monkeypatch, capsys):
    def interrupted(model, processor, conversations, *, on_token, **options):
        on_token(0, tuple(processor.encode("half an ans")))
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "generate", interrupted)
    status, out, err = run(monkeypatch, capsys, models["audio"], "Hm?")
    assert (status, "".join(out)) == (130, "half an ans") and "cut after" not in err


ERRORS = {
    "no such clip": ("audio", ["--audio", "no.wav"], "no.wav: no such file"),
    "no such model": ("nowhere", [], "nowhere"),
    "no clip": ("audio", ["--audio", TOOL], "ask.py: "),
    "a model that cannot see": ("audio", ["--video", "a.mp4"], "qwen2_audio model cannot take a part of type 'video'"),
    "a model that cannot hear": ("vision", ["--audio", "a.wav"], "a qwen2_vl model cannot take a part of type 'audio'"),
    "no sound with the picture": ("vision", ["--video", "a.mp4", "--use-audio"], "cannot take a video with its sound"),
    "sound of no video": ("omni", ["--audio", "a.wav", "--use-audio"], "there is no --video"),
    "no rate": ("vision", ["--video", "a.mp4", "--fps", "0"], "--fps must be above 0, got 0.0"),
    "cold": ("audio", ["--temperature", "-1"], "--temperature must be 0 (the likeliest token) or above, got -1.0"),
    "nothing to say": ("audio", ["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    "too long": ("audio", ["--max-new-tokens", "5000"], "over the model's limit of 4096"),
    "no gpu": ("audio", ["--device", "cuda"], "torch sees no GPU"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_status_1(models, monkeypatch, capsys, tmp_path, case):
    kind, argv, said = ERRORS[case]
    if case == "no gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = [models["clips"] / arg if str(arg).startswith("a.") else arg for arg in argv]
    status, out, err = run(monkeypatch, capsys, models.get(kind, tmp_path / kind), "Hm?", *argv)
    lines = [line for line in err.splitlines() if not line.startswith("loading ") and ", loaded in " not in line]
    assert status == 1 and out == [] and len(lines) == 1 and lines[0].startswith("ask: ") and said in lines[0], err


@pytest.mark.slow
def test_the_command_runs_from_anywhere_without_being_installed(models, tmp_path):
    done = subprocess.run([sys.executable, TOOL, models["audio"], "Hm?", "--max-new-tokens", "3"], cwd=tmp_path,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith(b"\n") and b"Traceback" not in done.stderr, done.stderr
