"""Conversations to Prompts: the published chat templates, targets, media rows, positions, and what is refused."""
import json

import numpy as np
import pytest
import torch
from media_files import write_mp4, write_wav
from mini import AUDIO, COMMON, OMNI, VISION, write_tokenizer
from tiny import positions, published_config

from minixmd import Processor
from minixmd.inputs.audio import log_mel
from minixmd.inputs.examples import Example, build_conversation, read_manifest
from minixmd.inputs.media import MediaError
from minixmd.models.families import read_config

# chat_template of Qwen/Qwen2-Audio-7B-Instruct, of Qwen/Qwen2-VL-7B-Instruct and of Qwen/Qwen2.5-Omni-7B, as published
TEMPLATES = {
    "audio": (
        "{% set audio_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and "
        "message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif "
        "%}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] "
        "}}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if 'audio' in content or 'audio_url' in "
        "content or message['type'] == 'audio' or content['type'] == 'audio' %}{% set audio_count.value = "
        "audio_count.value + 1 %}Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n{% elif "
        "'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if "
        "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "vision": (
        "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in "
        "messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
        "assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string "
        "%}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if "
        "content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = "
        "image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif "
        "%}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content "
        "%}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: "
        "{% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% "
        "endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt "
        "%}<|im_start|>assistant\n{% endif %}"
    ),
    "omni": (
        "{% set audio_count = namespace(value=0) %}{% set image_count = namespace(value=0) %}{% set "
        "video_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and "
        "message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif "
        "%}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] "
        "}}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or "
        "'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 "
        "%}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif "
        "%}<|vision_bos|><|IMAGE|><|vision_eos|>{% elif content['type'] == 'audio' or 'audio' in content or "
        "'audio_url' in content %}{% set audio_count.value = audio_count.value + 1 %}{% if add_audio_id "
        "%}Audio {{ audio_count.value }}: {% endif %}<|audio_bos|><|AUDIO|><|audio_eos|>{% elif "
        "content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 "
        "%}{% if add_vision_id %}Video {{ video_count.value }}: {% endif "
        "%}<|vision_bos|><|VIDEO|><|vision_eos|>{% elif 'text' in content %}{{ content['text'] }}{% endif "
        "%}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt "
        "%}<|im_start|>assistant\n{% endif %}"
    ),
}
KINDS = ("audio", "vision", "windowed", "omni hears", "omni sees")
SPECIAL = {"audio": AUDIO, "vision": VISION, "windowed": VISION, "omni hears": OMNI, "omni sees": OMNI}
FAMILY = {"audio": "qwen2_audio", "vision": "qwen2_vl"}
MEDIUM = {"audio": "audio", "vision": "video", "windowed": "video", "omni hears": "audio", "omni sees": "video"}
PLACEHOLDER = {"audio": "<|AUDIO|>", "vision": "<|video_pad|>", "windowed": "<|video_pad|>", "omni hears": "<|AUDIO|>",
               "omni sees": "<|VIDEO|>"}  # fmt: skip
TEXTS = ["Which sound is it?\n\nA. dog\nB. cat", "\n\n", "\n\n\n", ":\n\n", "assistant\n\n", "it's a dog.\n", "  two"]


def processor_of(folder, kind, *, vocab_size=400, max_positions=4096):
    raw = published_config(kind.split()[0])
    part = raw.get("thinker_config", raw)
    text = part.get("text_config", part)
    text["vocab_size"], text["max_position_embeddings"] = vocab_size, max_positions
    return Processor(folder, read_config(raw))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"audio", "vision": a folder with tokenizer.json}"""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        write_tokenizer(folder, SPECIAL[kind], TEXTS)
    return folders


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def processor(kind, folders):
    return processor_of(folders[kind], kind)


def media(kind, size=1, seed=0):
    """A part whose clip takes `size` tokens."""
    g = torch.Generator().manual_seed(seed)
    if MEDIUM[kind] == "audio":
        return {"type": "audio", "audio": 0.1 * torch.randn(640 * size, generator=g)}
    frames_TCHW = torch.randint(0, 256, (2, 3, 28, 28 * size), generator=g, dtype=torch.uint8)
    return {"type": "video", "video": frames_TCHW, "min_pixels": 784, "max_pixels": 784 * size}


def text(string):
    return {"type": "text", "text": string}


def turn(role, *content):
    return {"role": role, "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)}


# ---- the published templates ----

CONVERSATIONS = {  # m(size) is a clip of so many tokens
    "one clip": lambda m: [turn("user", m(5), text("Which sound is it?\n\nA. dog\nB. cat"))],
    "text only, as a string": lambda m: [turn("user", "Which  sound is it, naïve 音?\n")],
    "a system turn of its own": lambda m: [turn("system", "You hear.\n"), turn("user", m(2), text("Well?"))],
    "a system turn of parts": lambda m: [turn("system", text("You "), text("hear.")), turn("user", m(2), text("\nHm"))],
    "several clips": lambda m: [turn("user", m(3), m(1), text("Same?"), m(7))],
    "text on both sides": lambda m: [turn("user", text("Here:\n"), text("\n"), m(2), text("\n"), text("\nNow?"))],
    "an answer to learn": lambda m: [turn("user", m(4), text("Which?")), turn("assistant", "A")],
    "earlier answers": lambda m: [turn("user", m(4), text("Which?")), turn("assistant", text("A."), text(" dog")),
                                  turn("user", m(2), text("And this?")), turn("assistant", "it's a cat.\n"),
                                  turn("user", "Sure?")],
    "earlier answers and one to learn": lambda m: [turn("system", "Listen."), turn("user", m(1)),
                                                   turn("assistant", "A"), turn("user", m(2)),
                                                   turn("assistant", text("B"), text(" dog\n"))],
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_ids_equal_the_published_template_tokenised_by_transformers(kind, processor, folders, case):
    jinja2, transformers = pytest.importorskip("jinja2"), pytest.importorskip("transformers")
    conversation = CONVERSATIONS[case](lambda size: media(kind, size))
    template = "vision" if kind == "windowed" else kind.split()[0]
    string = jinja2.Environment().from_string(TEMPLATES[template]).render(
        messages=conversation, add_generation_prompt=conversation[-1]["role"] != "assistant")
    prompt = processor(conversation)
    head, *pieces = string.split(PLACEHOLDER[kind])
    assert len(pieces) == len(prompt.media)
    string = head + "".join(PLACEHOLDER[kind] * len(m.rows_P) + p for m, p in zip(prompt.media, pieces, strict=True))
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders[kind] / "tokenizer.json"))
    assert prompt.ids_N.tolist() == reference(string, add_special_tokens=False)["input_ids"]


def test_the_two_templates_by_eye(folders):
    for kind, middle in (("audio", "Audio 1: <|audio_bos|><|AUDIO|><|AUDIO|><|audio_eos|>\nWell?"),
                         ("vision", "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>Well?")):
        processor = processor_of(folders[kind], kind)
        prompt = processor([turn("user", media(kind, 2), text("Well?"))])
        assert processor.tokenizer.decode(prompt.ids_N.tolist(), skip_special_tokens=False) == (
            f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{middle}<|im_end|>\n"
            "<|im_start|>assistant\n")


# ---- targets ----


@pytest.mark.parametrize("content", ["A", "it's a dog.\n", "\n\nA", "", [text("A."), text(" dog")]])
def test_targets_are_the_last_answer_and_its_end_but_not_the_newline_after_it(kind, processor, content):
    asked = [turn("user", media(kind, 3), text("Which?")), turn("assistant", "B"), turn("user", "Sure?")]
    prompt = processor([*asked, {"role": "assistant", "content": content}])
    string = content if isinstance(content, str) else "".join(part["text"] for part in content)
    learnt = prompt.ids_N[prompt.target_N].tolist()
    assert processor.tokenizer.decode(learnt, skip_special_tokens=False) == string + "<|im_end|>"
    assert prompt.target_N[-len(learnt) - 1:].tolist() == [True] * len(learnt) + [False]  # one run, then the newline
    assert processor.decode(prompt.ids_N[-1:].tolist()) == "\n"
    assert len(processor.encode("\n\n")) == 1  # "assistant\n" and an answer of "\nA" would share this token
    start = processor(asked)
    assert not start.target_N.any()
    assert torch.equal(prompt.ids_N[: len(start)], start.ids_N)  # learnt from where generation starts
    assert len(start) + len(learnt) + 1 == len(prompt)


# ---- media ----


def test_media_know_their_rows_and_hold_the_features_of_their_clip(kind, processor):
    parts = [media(kind, 3, seed=1), media(kind, 1, seed=2), media(kind, 6, seed=3)]
    prompt = processor([turn("user", parts[0], text("and"), parts[1], parts[2], text("Which?"))])
    placeholder = processor.tokenizer.token_to_id(PLACEHOLDER[kind])
    rows = [row for m in prompt.media for row in m.rows_P.tolist()]
    assert (prompt.ids_N == placeholder).nonzero().squeeze(1).tolist() == rows and len(rows) == 10
    for part, m in zip(parts, prompt.media, strict=True):
        assert m.kind == MEDIUM[kind]
        if MEDIUM[kind] == "audio":
            assert torch.equal(m.features, log_mel(part["audio"])) and m.frames == 4 * len(m.rows_P)
        else:
            assert m.grid_thw == (1, 2, 2 * len(m.rows_P)) and m.patches().shape == (4 * len(m.rows_P), 1176)
    alone = processor([turn("user", parts[2])])
    assert torch.equal(alone.media[0].features, prompt.media[2].features)


def test_a_file_gives_the_prompt_of_its_samples(folders, tmp_path):
    wave_S = media("audio", 9)["audio"].numpy()
    write_wav(tmp_path / "clip.wav", wave_S)
    processor = processor_of(folders["audio"], "audio")
    file, tensor = (processor([turn("user", {"type": "audio", "audio": source})])
                    for source in (str(tmp_path / "clip.wav"), torch.from_numpy(wave_S)))
    assert torch.equal(file.ids_N, tensor.ids_N)
    assert torch.allclose(file.media[0].features, tensor.media[0].features, atol=0.05)  # 16-bit samples


# ---- sounded video ----


@pytest.fixture(scope="module")
def sounded(tmp_path_factory):
    """A 4 s clip: a picture at 5 frames a second, and its sound."""
    time_S = np.arange(64000) / 16000
    frames = np.random.default_rng(0).integers(0, 255, (20, 56, 84, 3), dtype=np.uint8)
    wave_S = (0.2 * np.sin(2000 * time_S)).astype(np.float32)
    return write_mp4(tmp_path_factory.mktemp("clip") / "s.mp4", frames, wave_S, fps=5)


def test_the_sound_of_a_video_is_heard_in_turns_with_its_picture_only_when_asked(folders, sounded):
    processor = processor_of(folders["omni sees"], "omni sees")
    part = {"type": "video", "video": str(sounded), "fps": 1.0, "min_pixels": 784, "max_pixels": 4704}
    silent = processor([turn("user", part, text("What?"))])
    assert [m.kind for m in silent.media] == ["video"]
    heard = processor([turn("user", {**part, "use_audio": True}, text("What?"))])
    assert [m.kind for m in heard.media] == ["video", "audio"]
    video, audio = heard.media
    assert torch.equal(video.features, silent.media[0].features)
    assert 95 <= len(audio.rows_P) <= 103  # 25 tokens a second
    signs = {processor.tokenizer.token_to_id("<|VIDEO|>"): "V", processor.tokenizer.token_to_id("<|AUDIO|>"): "A"}
    kinds = "".join(signs.get(i, ".") for i in heard.ids_N.tolist()).strip(".")
    # this config's chunk is 20 ids, which is 20 audio tokens; a frame pair stands every 40 ids
    pair = len(video.rows_P) // 2
    assert kinds == "V" * pair + "A" * 20 + "V" + "A" * 20 + "V" * (pair - 1) + "A" * (len(audio.rows_P) - 40)
    for m, token in ((video, "<|VIDEO|>"), (audio, "<|AUDIO|>")):
        assert set(heard.ids_N[m.rows_P].tolist()) == {processor.tokenizer.token_to_id(token)}
    string = processor.tokenizer.decode(heard.ids_N.tolist(), skip_special_tokens=False)
    assert "user\n<|vision_bos|><|audio_bos|><|VIDEO|>" in string
    assert "<|AUDIO|><|audio_eos|><|vision_eos|>What?" in string
    begin, end = int(video.rows_P[0]), int(audio.rows_P[-1])
    assert heard.positions_3N[0, begin - 2:begin + 1].tolist() == [begin - 2, begin - 2, begin - 1]  # two signs, one id
    assert heard.positions_3N[0, end + 1] == heard.positions_3N[0, end + 2] == heard.positions_3N[:, :end + 1].max() + 1


def test_a_sounded_video_needs_a_model_that_takes_one_and_a_file_that_has_one(folders, sounded, tmp_path):
    part = {"type": "video", "video": str(sounded), "use_audio": True}
    with pytest.raises(ValueError, match="a qwen2_vl model cannot take a video with its sound"):
        processor_of(folders["vision"], "vision")([turn("user", part)])
    processor = processor_of(folders["omni sees"], "omni sees")
    silent = write_mp4(tmp_path / "silent.mp4", np.zeros((8, 56, 56, 3), np.uint8))
    with pytest.raises(MediaError, match="no audio track"):
        processor([turn("user", {**part, "video": str(silent)})])
    with pytest.raises(ValueError, match="frames have no sound"):
        processor([turn("user", {**part, "video": torch.zeros(2, 3, 56, 56, dtype=torch.uint8)})])


def test_time_is_that_of_the_sampled_frames_for_qwen_and_of_the_rate_asked_for_in_omni(folders, tmp_path):
    clip = write_mp4(tmp_path / "c.mp4", np.zeros((55, 28, 28, 3), np.uint8), fps=5)  # 11 s: 10 frames
    part = {"type": "video", "video": str(clip), "fps": 1.0, "min_pixels": 784, "max_pixels": 784}
    times = {}
    for kind in ("windowed", "omni sees"):
        prompt = processor_of(folders[kind], kind)([turn("user", part)])
        rows = prompt.media[0].rows_P
        times[kind] = (prompt.positions_3N[0, rows] - prompt.positions_3N[0, rows[0]]).tolist()
    assert times == {"windowed": [0, 6, 13, 19, 26], "omni sees": [0, 40, 80, 120, 160]}  # 3 a second at 10/11, 20 at 1


@pytest.mark.parametrize("media, parts", [
    ("audio", [{"type": "audio", "audio": "c.wav"}]),
    ("video", [{"type": "video", "video": "c.mp4", "fps": 2.0}]),
    ("both", [{"type": "video", "video": "c.mp4", "fps": 2.0}, {"type": "audio", "audio": "c.wav"}]),
    ("sounded", [{"type": "video", "video": "c.mp4", "fps": 2.0, "use_audio": True}]),
])  # fmt: skip
def test_a_stages_media_say_which_parts_an_example_is_shown_as(media, parts):
    example = Example("x", "c.wav", "c.mp4", "Which?", ("dog", "cat"))
    (shown,) = build_conversation(example, media=media, prompt="{question} {first}-{last}", video_options={"fps": 2.0})
    assert shown["content"] == [*parts, {"type": "text", "text": "Which? A-B"}]


@pytest.mark.parametrize("media, asked", [
    ("audio", "In the audio?"), ("video", "In the video?"), ("both", "In the audio?"), ("sounded", "In the audio?")])
def test_a_video_that_is_shown_alone_and_silent_may_have_a_wording_of_its_own(media, asked):
    example = Example("x", "c.wav", "c.mp4", "In the audio?", ("dog", "cat"), meta={"video_question": "In the video?"})
    (shown,) = build_conversation(example, media=media, prompt="{question}")
    assert shown["content"][-1]["text"] == asked


@pytest.mark.parametrize("meta, said", [
    (None, "needs 'meta', an object, got None"), ([], r"needs 'meta', an object, got \[\]"),
    ({"video_question": None}, "field 'meta' needs 'video_question', a str, got None"),
    ({"video_question": 3}, "field 'meta' needs 'video_question', a str, got 3"),
    ({"video_question": ""}, "field 'video_question' is empty"),
])
def test_a_manifest_whose_wording_for_the_video_is_none_is_refused(tmp_path, meta, said):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"id": "x", "question": "Which?", "options": ["dog", "cat"], "meta": meta}))
    with pytest.raises(ValueError, match=f"m.jsonl:1: {said}"):
        read_manifest(path)


# ---- positions ----


def test_a_prompts_positions_are_those_of_its_media(kind, processor):
    prompt = processor([turn("user", text("Here"), media(kind, 5), text("which?"))])
    assert torch.equal(prompt.positions_3N, positions(len(prompt), prompt.media))
    assert prompt.positions_3N.amax() == len(prompt) - 1  # 5 tokens in a row of 5 columns: as long as text


# ---- letters, suppressed ids ----


def test_letters_are_the_tokens_that_an_answer_starts_with(kind, processor):
    ids = processor.letter_ids(26)
    assert len(set(ids)) == 26 and processor.decode(ids) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    prompt = processor([turn("user", "Which?"), turn("assistant", "C")])
    assert prompt.ids_N[prompt.target_N].tolist() == [ids[2], processor.end_id]


def test_banned_are_the_rows_without_a_string_and_every_special_token_but_the_end_of_turn(kind, processor):
    rows = len(processor.tokenizer.get_vocab())
    special = {processor.tokenizer.token_to_id(token) for token in COMMON + SPECIAL[kind]} - {processor.end_id}
    assert processor.suppressed_ids == sorted(special | set(range(rows, 400)))
    assert not set(processor.suppressed_ids) & {*processor.letter_ids(26), processor.end_id}


# ---- what is refused ----

BAD = {
    "a placeholder in a part": ("audio", [turn("user", text("<|AUDIO|>"))], "must not hold the placeholder <.AUDIO.>"),
    "a placeholder in a system turn": ("vision", [turn("system", "a <|video_pad|>"), turn("user", "b")],
                                       "must not hold the placeholder <.video_pad.>"),
    "a placeholder in an answer": ("audio", [turn("user", "a"), turn("assistant", "<|AUDIO|>")], "must not hold"),
    "no turn": ("audio", [], "non-empty list"),
    "a turn without content": ("audio", [{"role": "user"}], "non-empty list"),
    "a turn that is a string": ("audio", ["Which?"], "non-empty list"),
    "an unknown role": ("audio", [turn("user", "a"), turn("tool", "b")], "turn 1: role must be .*, got 'tool'"),
    "a part of another type": ("vision", [turn("user", {"type": "image", "image": "a.png"})], "turn 0: .*'image'"),
    "a part without a type": ("vision", [turn("user", {"video": "a.mp4"})], "turn 0: .*None"),
    "a part that is a string": ("audio", [turn("user", "a", "b")], "turn 0: content must be"),
    "content that is a number": ("audio", [{"role": "user", "content": 3}], "turn 0: content must be"),
    "content that is null": ("audio", [{"role": "user", "content": None}], "turn 0: content must be"),
    "a text part without text": ("audio", [turn("user", {"type": "text"})], "turn 0: .*'text'"),
    "a text that is a number": ("audio", [turn("user", {"type": "text", "text": 3})], "turn 0: .*string, got 3"),
    "a misspelt key": ("vision", [turn("user", {**media("vision"), "fsp": 1})], "turn 0: .*unknown key 'fsp'"),
    "a video's key on an audio": ("audio", [turn("user", {**media("audio"), "fps": 1})], "turn 0: .*key 'fps'"),
    "a media part without its clip": ("audio", [turn("user", {"type": "audio"})], "turn 0: .*no key 'audio'"),
    "a video for an audio model": ("audio", [turn("user", media("vision"))], "qwen2_audio model cannot .*'video'"),
    "a clip in the answer": ("audio", [turn("user", "a"), turn("assistant", media("audio"))], "turn 1: .* be text"),
    "an audio for a vision model": ("vision", [turn("user", media("audio"))], "qwen2_vl model cannot .*'audio'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_conversation_is_one_line_that_says_where(folders, case):
    kind, conversation, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        processor_of(folders[kind], kind)(conversation)
    assert "\n" not in str(caught.value)


def test_a_prompt_at_the_limit_is_taken_whole_and_one_over_it_is_an_error(kind, folders):
    conversation = [turn("user", media(kind, 10), text("Which?"))]
    length = len(processor_of(folders[kind], kind)(conversation))
    assert len(processor_of(folders[kind], kind, max_positions=length)(conversation)) == length
    with pytest.raises(ValueError, match=f"{length} tokens, over the model's limit of {length - 1}"):
        processor_of(folders[kind], kind, max_positions=length - 1)(conversation)
    processor = processor_of(folders[kind], kind, max_positions=length + 40)
    assert len(processor(conversation, max_new_tokens=40)) == length  # an answer of 40 tokens just fits
    said = f"too long .the prompt has {length} tokens and max_new_tokens is 41, over the model's limit of {length + 40}"
    with pytest.raises(MediaError, match=said):
        processor(conversation, max_new_tokens=41)


def test_audio_of_320_samples_is_too_short_and_of_321_is_one_token(folders, tmp_path):
    processor = processor_of(folders["audio"], "audio")
    prompt = processor([turn("user", {"type": "audio", "audio": torch.zeros(321)})])
    assert [len(m.rows_P) for m in prompt.media] == [1]
    write_wav(tmp_path / "short.wav", torch.zeros(320).numpy())
    for source, name in ((torch.zeros(320), "audio"), (str(tmp_path / "short.wav"), "short.wav")):
        with pytest.raises(MediaError, match=f"{name}.*320 samples") as caught:
            processor([turn("user", {"type": "audio", "audio": source})])
        assert caught.value.reason == "too short"


def test_frames_of_an_impossible_shape_are_a_bad_clip(folders):
    processor = processor_of(folders["vision"], "vision")
    with pytest.raises(MediaError, match="200") as caught:
        processor([turn("user", {"type": "video", "video": torch.zeros(2, 3, 1, 300, dtype=torch.uint8)})])
    assert caught.value.reason == "bad shape"


def test_a_letter_that_is_not_one_token_is_an_error(folders, tmp_path):
    record = json.loads((folders["audio"] / "tokenizer.json").read_text())
    record["normalizer"] = {"type": "Replace", "pattern": {"String": "C"}, "content": "CC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    processor = processor_of(tmp_path, "audio")
    assert len(processor.letter_ids(2)) == 2
    with pytest.raises(ValueError, match="tokenizer.json: letter C is 2 tokens, not one"):
        processor.letter_ids(3)


def test_a_missing_or_broken_tokenizer_or_one_of_another_model_is_an_error(folders, tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        processor_of(tmp_path, "audio")
    for damage in ("", "{}", (folders["audio"] / "tokenizer.json").read_text()[:500]):
        (tmp_path / "tokenizer.json").write_text(damage)
        with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
            processor_of(tmp_path, "audio")
    for kind, other in (("audio", "vision"), ("vision", "audio")):
        with pytest.raises(ValueError, match=f"not a {FAMILY[kind]} tokenizer"):
            processor_of(folders[other], kind)
        rows = len(processor_of(folders[kind], kind).tokenizer.get_vocab())
        with pytest.raises(ValueError, match=f"highest id {rows - 1}, but the model has {rows - 1} rows"):
            processor_of(folders[kind], kind, vocab_size=rows - 1)
