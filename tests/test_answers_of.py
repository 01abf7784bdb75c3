"""tools/answers_of.py: other models are asked as by a plain script, and the file of answers is kept whole."""
import hashlib
import importlib
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from media_files import write_mp4, write_wav
from mini import CLASSES, VISION, write_tokenizer
from safetensors.torch import load_file, save_file
from tiny import randomise, text_config


def import_torchvision():
    """Imports what transformers' video processors need; returns why they cannot be used, or None. PyPI's torchvision is
    built for CUDA: beside a CPU build of torch its operators do not load, and then nothing of transformers does. The
    processors need no operator; that torchvision can be imported takes the names of two."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        return str(error)
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        importlib.import_module("torchvision")


NO_VIDEO = import_torchvision()
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import answers_of  # noqa: E402

TURN = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}{{ MEDIA[part.type] }}{% endif %}\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SHOWN = {  # what stands for a medium in the family's prompt
    "flamingo": {"audio": "<sound>"},
    "llama": {"video": "<|video_pad|>\n"},
    "qwen": {"video": "<|vision_start|><|video_pad|><|vision_end|>"},
    "omni": {"video": "<|vision_start|><|VIDEO|><|vision_end|>", "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>"},
}  # fmt: skip
OMNI = {"image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}  # fmt: skip
TOKENS = {"flamingo": ["<sound>"], "llama": VISION, "qwen": VISION, "omni": list(OMNI.values())}
ENDS = [302, *range(0, 300, 13)]  # one in thirteen tokens ends an answer, so that some end and some are cut
TEXT = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, **text_config(2, 340)}
MROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
SEES = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}  # fmt: skip
BOLD = 2.5  # what weights are multiplied by: at their usual size all clips would have one answer
LIMIT = 12
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", LIMIT)


def write_family(folder, family):
    """A random model in the shape of a published config, with its processor and chat template. Returns the folder."""
    names = OMNI if family == "omni" else {}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=write_tokenizer(folder, TOKENS[family]), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=names)  # fmt: skip
    template = TURN
    for kind, shown in SHOWN[family].items():
        template = f"{{% set {kind} = {shown!r} %}}" + template
    template = template.replace("MEDIA[part.type]", "audio if part.type == 'audio' else video")
    model, processor = FAMILIES[family](tokenizer, template)
    with torch.no_grad():
        for parameter in randomise(model.eval()).parameters():
            if parameter.ndim > 1:
                parameter *= BOLD
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def flamingo(tokenizer, template):
    config = transformers.AudioFlamingo3Config(
        text_config={"model_type": "qwen2", **TEXT}, audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"),
        audio_config={"num_mel_bins": 128, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 44,
                      "hidden_size": 36, "max_source_positions": 1500})  # fmt: skip
    hears = transformers.WhisperFeatureExtractor(feature_size=128)
    return (transformers.AudioFlamingo3ForConditionalGeneration(config),
            transformers.AudioFlamingo3Processor(hears, tokenizer, chat_template=template))


def llama(tokenizer, template):
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.VideoLlama3Config(
        text_config={"model_type": "qwen2", **TEXT}, image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "patch_size": 14})  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 84}
    return (transformers.VideoLlama3ForConditionalGeneration(config),
            transformers.VideoLlama3Processor(transformers.VideoLlama3ImageProcessor(size=size), tokenizer,
                                              transformers.VideoLlama3VideoProcessor(size=size),
                                              chat_template=template))  # fmt: skip


def qwen(tokenizer, template):
    ids = tokenizer.convert_tokens_to_ids
    text = {"head_dim": 12, "rope_parameters": MROPE, **text_config(2, 340)}
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=SEES, image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"))  # fmt: skip
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 96 * 4}
    return (transformers.Qwen3VLForConditionalGeneration(config),
            transformers.Qwen3VLProcessor(transformers.Qwen2VLImageProcessor(size=size), tokenizer,
                                          transformers.Qwen3VLVideoProcessor(size=size),
                                          chat_template=template))  # fmt: skip


def omni(tokenizer, template):
    ids = tokenizer.convert_tokens_to_ids
    text = {"head_dim": 12, "rope_parameters": MROPE, "moe_intermediate_size": 24, "num_experts": 4,
            "num_experts_per_tok": 2, **text_config(2, 340)}  # fmt: skip
    hears = {"num_mel_bins": 128, "encoder_layers": 2, "encoder_attention_heads": 3, "encoder_ffn_dim": 44,
             "d_model": 36, "output_dim": 48, "downsample_hidden_size": 8}  # fmt: skip
    thinker = {"text_config": text, "vision_config": SEES, "audio_config": hears, "audio_token_id": ids("<|AUDIO|>"),
               "image_token_id": ids("<|IMAGE|>"), "video_token_id": ids("<|VIDEO|>"),
               "audio_start_token_id": ids("<|audio_bos|>"), "vision_start_token_id": ids("<|vision_start|>"),
               "vision_end_token_id": ids("<|vision_end|>")}  # fmt: skip
    config = transformers.Qwen3OmniMoeConfig(enable_audio_output=False, thinker_config=thinker)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 96 * 4}
    return (transformers.Qwen3OmniMoeForConditionalGeneration(config),
            transformers.Qwen3OmniMoeProcessor(transformers.Qwen2VLImageProcessor(size=size),
                                               transformers.Qwen2VLVideoProcessor(size=size, patch_size=16),
                                               transformers.WhisperFeatureExtractor(feature_size=128), tokenizer,
                                               chat_template=template))  # fmt: skip


FAMILIES = {"flamingo": flamingo, "llama": llama, "qwen": qwen, "omni": omni}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The manifest of four clips of 2 s, each with sound and 8 frames; all differ."""
    folder, lines = tmp_path_factory.mktemp("clips"), []
    for i in range(4):
        rng = np.random.default_rng(i)
        wave = (0.3 * np.sin(np.arange(32000) / (3 + 5 * i)) + 0.02 * rng.standard_normal(32000)).astype(np.float32)
        frames = np.repeat(np.repeat(rng.integers(0, 255, (8, 8, 12, 3), dtype=np.uint8), 8, 1), 8, 2)
        write_wav(folder / f"{i}.wav", wave)
        write_mp4(folder / f"{i}.mp4", frames, wave, fps=4)
        lines.append({"id": f"clip{i}", "audio": f"{i}.wav", "video": f"{i}.mp4", "question": "Which is heard?",
                      "options": CLASSES, "meta": {"video_question": "Which is seen?"}})  # fmt: skip
    return put_manifest(folder, lines)


def put_manifest(folder, lines):
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def flamingo_folder(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("flamingo"), "flamingo")


def run(*argv):
    return answers_of.main([str(arg) for arg in (*argv[:3], *OPTIONS, *argv[3:])])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain_inputs(processor, family, media, clip):
    """What a script of its own would give the model: the prompt written out, the clip read with other libraries."""
    shown, given = "", {}
    if media != "audio":
        with av.open(str(clip.with_suffix(".mp4"))) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        shown += SHOWN[family]["video"]
        picked = [0, 2, 5, 7]  # at least four, from the first to the last
        given["videos"] = [np.stack([frames[i] for i in picked])]
        given["video_metadata"] = [{"total_num_frames": 8, "fps": 4.0, "duration": 2.0, "frames_indices": picked}]
        given |= {"do_sample_frames": False, "fps": 2.0}  # four frames of 2 s
    if media != "video":
        shown += SHOWN[family]["audio"]
        given["audio"] = [soundfile.read(clip.with_suffix(".wav"), dtype="float32")[0]]
    question = "Which is seen?" if media == "video" else "Which is heard?"
    options = "A. dog\nB. cat\nC. owl\nRespond only with a single letter from A to C."
    text = f"<|im_start|>user\n{shown}{question}\n{options}<|im_end|>\n<|im_start|>assistant\n"
    return processor(text=[text], return_tensors="pt", **given)


PLAIN = {  # family -> model class, processor class, how it is told to be greedy
    "flamingo": ("AudioFlamingo3ForConditionalGeneration", "AudioFlamingo3Processor", ""),
    "llama": ("VideoLlama3ForConditionalGeneration", "VideoLlama3Processor", ""),
    "qwen": ("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", ""),
    "omni": ("Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeProcessor", "thinker_"),
}  # fmt: skip


def plain_answers(folder, family, media, manifest):
    """The records that a plain script makes with the family's own classes."""
    model_class, processor_class, prefix = PLAIN[family]
    model = getattr(transformers, model_class).from_pretrained(folder, dtype=torch.float32).eval()
    processor = getattr(transformers, processor_class).from_pretrained(folder)
    ends = [302] if prefix else ENDS
    options = {f"{prefix}do_sample": False, f"{prefix}max_new_tokens": LIMIT, f"{prefix}eos_token_id": ends}
    if prefix:
        options["generation_mode"] = "text"
    records = []
    for i in range(4):
        inputs = plain_inputs(processor, family, media, manifest.parent / f"{i}.x")
        with torch.no_grad():
            ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1]:].tolist()
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        records.append({"id": f"clip{i}", "text": text, "finished": bool(set(ids) & set(ends))})
    return records


def check_family(tmp_path, clips, family, media, folder=None):
    folder = folder or write_family(tmp_path / "model", family)
    out = tmp_path / "out.jsonl"
    assert run(folder, clips, out, "--media", media) == 0
    records = read(out)
    assert records == plain_answers(folder, family, media, clips)
    assert len({record["text"] for record in records}) >= 3
    return records


def test_audio_flamingo_3_answers_as_in_a_plain_script(tmp_path, clips, flamingo_folder):
    records = check_family(tmp_path, clips, "flamingo", "audio", flamingo_folder)
    assert {record["finished"] for record in records} == {True, False}


@pytest.mark.slow
@pytest.mark.skipif(NO_VIDEO is not None, reason=f"transformers' video processors: {NO_VIDEO}")
@pytest.mark.parametrize(("family", "media"), [("llama", "video"), ("qwen", "video"), ("omni", "audio"),
                                               ("omni", "video"), ("omni", "both")])  # fmt: skip
def test_video_and_omni_models_answer_as_in_a_plain_script(tmp_path, clips, family, media):
    check_family(tmp_path, clips, family, media)


class Echo:
    """A caller that keeps what it was asked; a clip whose loudest sample is below 0.01 is refused, as processors do."""

    sample_rate = 8000
    asked = []

    def __init__(self, args, name, revision):
        Echo.made_of = name, revision

    def answer(self, content, clips):
        sound = clips[-1]
        if sound.abs().max() < 0.01:
            raise ValueError("too quiet\nto be heard")
        self.asked.append(content)
        return f"{content[-1]['text'][:5]} {len(sound)} \u00fc", len(self.asked) % 2 == 0


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.setitem(answers_of.CALLERS, "auto", Echo)
    monkeypatch.setattr(Echo, "asked", [])
    return Echo


def test_stopped_at_any_line_it_goes_on_where_it_was(tmp_path, clips, echo, capsys):
    out = tmp_path / "new" / "out.jsonl"
    assert run(tmp_path, clips, out) == 0
    whole = out.read_bytes()
    assert len(echo.asked) == 4 and f"{out}: 4 answers, 0 bad clips" in capsys.readouterr().out
    lines = whole.splitlines(keepends=True)
    for count in range(5):
        out.write_bytes(b"".join(lines[:count]) + (lines[count][:20] if count < 4 else b""))
        echo.asked.clear()
        assert run(tmp_path, clips, out) == 0
        assert len(echo.asked) == 4 - count and out.read_bytes().splitlines()[:count] == whole.splitlines()[:count]
        assert [record["id"] for record in read(out)] == ["clip0", "clip1", "clip2", "clip3"]
        assert ("dropped the last line, cut short after 20 bytes; it is asked again" in capsys.readouterr().err) == (
            count < 4)


def test_a_limit_may_grow_and_an_interrupt_keeps_what_is_written(tmp_path, clips, echo, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    assert run(tmp_path, clips, out, "--limit", 1) == 0 and len(read(out)) == 1
    answer = echo.answer

    def interrupted(self, content, clips):
        if len(self.asked) == 3:
            raise KeyboardInterrupt
        return answer(self, content, clips)

    monkeypatch.setattr(echo, "answer", interrupted)
    assert run(tmp_path, clips, out) == 130 and len(read(out)) == 3
    assert "stopped; the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(echo, "answer", answer)
    assert run(tmp_path, clips, out) == 0 and len(read(out)) == 4 and len(echo.asked) == 4


def test_what_made_the_answers_is_written_beside_them(tmp_path, clips, echo):
    out = tmp_path / "out.jsonl"
    assert run(tmp_path, clips, out, "--prompt", "{options} {question}", "--media", "both", "--fps", 2) == 0
    made_by = json.loads(out.with_suffix(".json").read_text())
    assert made_by == {
        "model": str(tmp_path), "revision": None, "caller": "auto", "media": "both", "prompt": "{options} {question}",
        "fps": 2.0, "max_new_tokens": LIMIT, "dtype": "float32", "manifest": str(clips),
        "manifest_sha256": hashlib.sha256(clips.read_bytes()).hexdigest(), "transformers": transformers.__version__,
        "torch": version("torch"), "minixmd": made_by["minixmd"]}  # fmt: skip


def test_of_a_model_on_the_hub_the_commit_is_asked_and_written(tmp_path, clips, echo, monkeypatch):
    given = []

    def pinned(name):
        given.append(name)
        return "owner/name@0123abc"

    monkeypatch.setattr(answers_of, "pinned", pinned)
    assert run("owner/name", clips, tmp_path / "out.jsonl", "--revision", "v1") == 0
    assert given == ["owner/name@v1"] and echo.made_of == ("owner/name", "0123abc")
    made_by = json.loads((tmp_path / "out.json").read_text())
    assert (made_by["model"], made_by["revision"]) == echo.made_of


OTHERS = {  # field -> arguments of a second run that differs in it
    "media": ["--media", "both"],
    "prompt": ["--prompt", "{options}"],
    "fps": ["--fps", "2"],
    "max_new_tokens": ["--max-new-tokens", "9"],
    "dtype": ["--dtype", "bfloat16"],
    "model": [],
    "manifest_sha256": [],
    "transformers": [],
    "caller": [],
}


@pytest.mark.parametrize("field", OTHERS)
def test_going_on_with_other_settings_is_refused(tmp_path, clips, echo, capsys, monkeypatch, field):
    manifest, model, out = tmp_path / "manifest.jsonl", tmp_path / "model", tmp_path / "out.jsonl"
    model.mkdir()
    for name in ("0.wav", "0.mp4"):
        shutil.copy(clips.parent / name, tmp_path / name)
    manifest.write_text(clips.read_text().splitlines()[0] + "\n")
    assert run(model, manifest, out) == 0
    before = out.read_bytes(), out.with_suffix(".json").read_bytes()
    if field == "manifest_sha256":
        manifest.write_text(manifest.read_text().replace("Which", "What"))
    if field == "transformers":
        monkeypatch.setattr(answers_of, "version", lambda name: "4.31.0" if name == field else version(name))
    if field == "caller":  # OUT.json is gone
        before = before[0], None
        out.with_suffix(".json").unlink()
        field = "model"
    capsys.readouterr()
    assert run(tmp_path if field == "model" else model, manifest, out, *OTHERS[field]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"answers_of: {out}: was made with {field} ") and "delete that file" in line
    assert out.read_bytes() == before[0]
    assert before[1] is None or out.with_suffix(".json").read_bytes() == before[1]


def test_clips_that_cannot_be_read_or_taken_are_lines_with_a_reason(tmp_path, clips, echo, capsys):
    lines = read(clips)[:3]
    for name in ("0.wav", "2.wav"):
        shutil.copy(clips.parent / name, tmp_path / name)
    (tmp_path / "1.wav").write_bytes((tmp_path / "0.wav").read_bytes()[:5000])
    write_wav(tmp_path / "quiet.wav", np.zeros(9000, np.float32))
    lines.append({**lines[0], "id": "quiet", "audio": "quiet.wav"})
    lines.append({**lines[0], "id": "gone", "audio": "gone.wav"})
    out = tmp_path / "out.jsonl"
    assert run(tmp_path, put_manifest(tmp_path, lines), out) == 0
    found = {record["id"]: record for record in read(out)}
    assert list(found) == ["clip0", "clip1", "clip2", "quiet", "gone"]
    assert found["clip0"] == {"id": "clip0", "text": "Which 16000 \u00fc", "finished": False}
    assert found["clip1"]["bad"] == "truncated" and str(tmp_path / "1.wav") in found["clip1"]["detail"]
    assert found["quiet"] == {"id": "quiet", "bad": "refused", "detail": "by the model: too quiet"}
    assert found["gone"]["bad"] == "missing" and capsys.readouterr().out.endswith("2 answers, 3 bad clips\n")


def test_a_run_without_one_answer_ends_with_an_error(tmp_path, clips, echo, capsys):
    lines = [{**read(clips)[0], "audio": "gone.wav"}, {**read(clips)[1], "audio": "quiet.wav"}]
    write_wav(tmp_path / "quiet.wav", np.zeros(9000, np.float32))
    manifest, out = put_manifest(tmp_path, lines), tmp_path / "out.jsonl"
    assert run(tmp_path, manifest, out, "--limit", 1) == 1
    assert "no clip can be used; the first: " in capsys.readouterr().err.splitlines()[-1]
    assert run(tmp_path, manifest, out) == 1  # refused at once, not for hours
    assert capsys.readouterr().err.splitlines()[-1] == f"answers_of: {tmp_path}: example 'clip1': too quiet"


ARGUMENTS = {  # what is wrong -> arguments, what stderr says
    "no gpu": (["--device", "cuda"], "torch sees no GPU; --device cpu"),
    "no length": (["--max-new-tokens", "0"], "--max-new-tokens and --limit must be 1 or more"),
    "no question": (["--limit", "0"], "--max-new-tokens and --limit must be 1 or more"),
    "no rate": (["--fps", "nan"], "--fps above 0"),
    "prompt": (["--prompt", "{option}"], "prompt has no placeholder 'option'; did you mean 'options'?"),
    "no trust": (["--caller", "qwen-audio-chat"], "needs --trust-remote-code"),
    "deaf": (["--caller", "qwen-audio-chat", "--trust-remote-code", "--media", "video"], "--media audio"),
    "kimi": (["--caller", "kimi-audio", "--trust-remote-code"], "--device cuda and --dtype bfloat16 alone"),
    "no such revision": (["--revision", "v1"], "no such model folder"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments_are_one_line(tmp_path, clips, echo, capsys, monkeypatch, case):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    more, said = ARGUMENTS[case]
    assert run(tmp_path, clips, tmp_path / "out.jsonl", *more) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("answers_of: ") and said in line and not list(tmp_path.iterdir())


def test_wrong_files_are_one_line(tmp_path, clips, echo, capsys):
    out = tmp_path / "out.jsonl"
    blind = put_manifest(tmp_path, [{**read(clips)[0], "video": None}])
    outside = tmp_path / "outside.jsonl"
    outside.write_text(json.dumps({**read(clips)[0], "audio": str(clips.parent / "0.wav"), "video": None}))
    for argv, said in [
        ((tmp_path / "gone", clips, out), f"{tmp_path / 'gone'}: no such model folder"),
        ((tmp_path, tmp_path / "gone.jsonl", out), "gone.jsonl"),
        ((tmp_path, blind, out, "--media", "video"), f"--media video: {blind}: example 'clip0' has no video"),
        ((tmp_path, outside, out), f"{outside}:1: field 'audio'"),
        ((tmp_path, clips, tmp_path / "out.json"), f"{tmp_path / 'out.json'}: must end in .jsonl"),
    ]:
        assert run(*argv) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("answers_of: ") and said in line and not out.exists()
    assert run(tmp_path, outside, out, "--allow-outside") == 0
    out.write_text('{"id": "clip0", "text": "A"}\n')
    assert run(tmp_path, outside, out, "--allow-outside") == 1
    assert f"{out}:1: needs 'finished'" in capsys.readouterr().err


def break_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def lose_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


MODELS = {  # what is wrong -> function(folder) that makes it so, arguments, what stderr says
    "unknown type": (lambda f: break_config(f, model_type="nonesuch"), [], "`nonesuch`"),
    "text alone": (lambda f: break_config(f, model_type="qwen2"), [], "no multimodal model of its type, 'qwen2'"),
    "no config": (lambda f: (f / "config.json").unlink(), [], "config.json"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), [], "AudioFlamingo3Processor has no chat template"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), [], "model.safetensors"),
    "a weight is lost": (lose_weights, [], "1 weights are not in its files as its config says, such as "),
    "blind": (lambda f: None, ["--media", "video"], "AudioFlamingo3Processor takes no video; choose another --media"),
    "both": (lambda f: None, ["--media", "both"], "takes no video"),
    "own code": (lambda f: break_config(f, auto_map={"AutoModel": "x.X"}), [], "adds --trust-remote-code"),
    "not kimi": (lambda f: None, ["--caller", "kimi-audio", "--trust-remote-code", "--device", "cuda", "--dtype",
                                  "bfloat16"], "No module named 'kimia_infer'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_asked_is_one_line(tmp_path, clips, flamingo_folder, capsys, monkeypatch, case):
    spoil, more, said = MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(flamingo_folder, folder)
    spoil(folder)
    if case == "not kimi":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    assert run(folder, clips, tmp_path / "out.jsonl", *more) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"answers_of: {folder}: cannot be used: ") and said in line, line


@pytest.mark.parametrize("body", ["{{ raise_exception('no roles\\nhere') }}", "{{ messages[0].content + '' }}"])
def test_a_template_that_refuses_the_question_is_one_line(tmp_path, clips, flamingo_folder, capsys, body):
    folder = tmp_path / "model"
    shutil.copytree(flamingo_folder, folder)
    (folder / "chat_template.jinja").write_text(body)
    assert run(folder, clips, tmp_path / "out.jsonl") == 1
    line = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert line.startswith(f"answers_of: {folder}: example 'clip0': ") and not (tmp_path / "out.jsonl").exists()


def test_transformers_that_is_not_installed_is_one_line(tmp_path, clips, echo, capsys, monkeypatch):
    monkeypatch.setattr(answers_of, "find_spec", lambda name: None)
    assert run(tmp_path, clips, tmp_path / "out.jsonl") == 1
    assert capsys.readouterr().err == "answers_of: transformers is not installed; pip install transformers\n"


QWEN = {  # a repository in Qwen-Audio-Chat's form, whose code writes down what it gets
    "config.json": json.dumps({"model_type": "qwen_standin", "architectures": ["QWenLMHeadModel"], "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}}),
    "generation_config.json": json.dumps({"do_sample": True, "top_p": 0.5, "max_new_tokens": 512}),
    "tokenizer_config.json": json.dumps({"tokenizer_class": "QWenTokenizer", "auto_map": {
        "AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}),
    "configuration_qwen.py": """
from transformers import PretrainedConfig

class QWenConfig(PretrainedConfig):
    model_type = "qwen_standin"
""",
    "modeling_qwen.py": """
import json
import soundfile
import torch
from transformers import GenerationMixin, PreTrainedModel
from .configuration_qwen import QWenConfig

class QWenLMHeadModel(PreTrainedModel, GenerationMixin):
    config_class = QWenConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(2, 2)
        self.post_init()

    def chat(self, *args, **kwargs):
        [tokenizer] = args
        path = kwargs["query"].split("<audio>")[1].split("</audio>")[0]
        sound = soundfile.info(path)
        used = self.generation_config
        record = {**kwargs, "tokenizer": type(tokenizer).__name__, "path": path, "greedy": not used.do_sample,
                  "sound": [sound.samplerate, sound.frames], "limit": used.max_new_tokens,
                  "dtype": str(self.head.weight.dtype)}
        with open(self.config._name_or_path + "/calls.jsonl", "a") as file:
            print(json.dumps(record), file=file)
        return "A dog." if sound.frames % 2 else "A very long answer.", [(kwargs["query"], "A dog.")]
""",
    "tokenization_qwen.py": """
import json
from transformers import PreTrainedTokenizer

class QWenTokenizer(PreTrainedTokenizer):
    vocab_size = 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def from_list_format(self, list_format):
        with open(self.name_or_path + "/lists.jsonl", "a") as file:
            print(json.dumps(list_format), file=file)
        [sound, question] = list_format
        return f"Audio 1:<audio>{sound['audio']}</audio>\\n{question['text']}"
""",
}  # fmt: skip
ASKED = "Which is heard?\nA. dog\nB. cat\nC. owl\nRespond only with a single letter from A to C."


@pytest.fixture
def sound_and_film(tmp_path, clips):
    """A manifest of two clips: a wav of 31,999 samples, and a video whose sound is asked about."""
    write_wav(tmp_path / "0.wav", soundfile.read(clips.parent / "0.wav", dtype="float32")[0][:31999])
    shutil.copy(clips.parent / "1.mp4", tmp_path / "1.mp4")
    first, second, *_ = read(clips)
    return put_manifest(tmp_path, [first, {**second, "audio": "1.mp4"}])


def test_qwen_audio_chat_is_called_as_its_publisher_writes(tmp_path, sound_and_film, monkeypatch):
    folder, out = tmp_path / "Qwen-Audio-Chat", tmp_path / "out.jsonl"
    folder.mkdir()
    for name, text in QWEN.items():
        (folder / name).write_text(text)
    save_file({"head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    argv = ["--caller", "qwen-audio-chat", "--trust-remote-code", "--dtype", "bfloat16"]
    assert run(folder, sound_and_film, out, *argv) == 0
    wav, film = read(folder / "calls.jsonl")
    assert read(folder / "lists.jsonl") == [[{"audio": call["path"]}, {"text": ASKED}] for call in (wav, film)]
    for call in (wav, film):
        assert call["query"] == f"Audio 1:<audio>{call['path']}</audio>\n{ASKED}" and call["history"] is None
        assert (call["greedy"], call["limit"], call["dtype"]) == (True, LIMIT, "torch.bfloat16")
        assert (call["tokenizer"], len(call)) == ("QWenTokenizer", 8)
    assert (wav["path"], wav["sound"]) == (str(tmp_path / "0.wav"), [16000, 31999])
    assert film["path"].endswith(".wav") and film["sound"] == [16000, 32768]  # AAC's are whole blocks
    assert not Path(film["path"]).exists()
    assert read(out) == [{"id": "clip0", "text": "A dog.", "finished": True},
                         {"id": "clip1", "text": "A very long answer.", "finished": False}]


KIMI = """
CALLS = []

class Tokenizer:
    def encode(self, text, bos=False, eos=False):
        return list(text)

class KimiAudio:
    def __init__(self, model_path, load_detokenizer=True):
        CALLS.append((model_path, load_detokenizer))
        self.prompt_manager = type("Manager", (), {"text_tokenizer": Tokenizer()})()

    def generate(self, chats, output_type="text", audio_temperature=0.8, audio_top_k=5, text_temperature=0.8,
                 text_top_k=5, audio_repetition_penalty=1.0, audio_repetition_window_size=64,
                 text_repetition_penalty=1.0, text_repetition_window_size=16, max_new_tokens=-1):
        with open(chats[1]["content"], "rb") as file:
            CALLS.append((chats, output_type, audio_temperature, text_temperature, max_new_tokens, file.read(4)))
        return None, "A dog."
"""


def test_kimi_audio_is_called_as_its_publisher_writes(tmp_path, sound_and_film, monkeypatch):
    package, folder, out = tmp_path / "site" / "kimia_infer" / "api", tmp_path / "Kimi-Audio", tmp_path / "out.jsonl"
    package.mkdir(parents=True)
    folder.mkdir()
    (package / "kimia.py").write_text(KIMI)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    argv = ["--caller", "kimi-audio", "--trust-remote-code", "--device", "cuda", "--dtype", "bfloat16"]
    try:
        assert run(folder, sound_and_film, out, *argv) == 0
        made, *asked = sys.modules["kimia_infer.api.kimia"].CALLS
    finally:
        for name in ("kimia_infer.api.kimia", "kimia_infer.api", "kimia_infer"):
            sys.modules.pop(name, None)
    assert made == (str(folder), False) and len(asked) == 2
    paths = []
    for chats, *rest in asked:
        path = chats[1]["content"]
        assert chats == [{"role": "user", "message_type": "text", "content": ASKED},
                         {"role": "user", "message_type": "audio", "content": path}]  # fmt: skip
        assert rest == ["text", 0.0, 0.0, LIMIT, b"RIFF"]
        paths.append(path)
    assert paths[0] == str(tmp_path / "0.wav") and not Path(paths[1]).exists()
    assert read(out) == [{"id": f"clip{i}", "text": "A dog.", "finished": True} for i in range(2)]
