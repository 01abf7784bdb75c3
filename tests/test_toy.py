"""The toy world and its models before training: what is made is the same every time, and no answer leaks."""
import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minixmd.inputs.examples import build_conversation, read_manifest
from minixmd.inputs.media import MediaError, read_audio, read_frames
from minixmd.inputs.tokenizer import Processor
from minixmd.models.weights import load_model, save_model
from minixmd.recipe_parts import sightsound
from minixmd.runs.seeds import hash_seed
from minixmd.tasks.answers import thoughts
from minixmd.tasks.rewards import accuracy_reward, format_reward
from minixmd.toy import checker, lessons, pretrain, world
from minixmd.toy.lessons import DIRECT, THINKING, thoughts_of
from minixmd.toy.models import family_file, make_model, write_processor

SMALL = {"base": 1, "train": 2, "test": 1, "unseen": 2}
SEEN = [category for category in world.CATEGORIES if category.seen]


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.make_world(folder, 100, SMALL)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """{"student": (model, processor), "teacher": …}, saved in their folders."""
    made = {}
    for name, model_type in pretrain.MODEL_TYPE.items():
        folder = tmp_path_factory.mktemp(name)
        model, processor = pretrain.new_model(folder, model_type, 100)
        save_model(model, processor.folder, folder)
        made[name] = model, processor
    return made


# ---- the world ----


def test_groups():
    """Confusable categories share what they are confused by; no others share anything."""
    assert Counter(category.group for category in SEEN) == {"both": 6, "eye": 12, "ear": 6}
    sounds, looks = {}, {}
    for category in world.CATEGORIES:
        sounds[category.name] = category.source, category.beats_hz, category.pitch_hz
        looks[category.name] = category.shape, *category.colour
    for group, clusters, shared in (("eye", 2, sounds), ("ear", 1, looks)):
        others = [shared[c.name] for c in world.CATEGORIES if c.group != group]
        cluster = {shared[c.name] for c in world.CATEGORIES if c.group == group}
        assert len(set(others)) == len(others) and len(cluster) == clusters and not set(others) & cluster
    assert len(set(world.NAMES)) == len(world.CATEGORIES) > world.OPTIONS


def test_every_part_of_an_unseen_name_is_known_from_seen_ones():
    """Every adjective and noun is in several seen names, and a faint tone is heard with another noun."""
    unseen = [category for category in world.CATEGORIES if not category.seen]
    assert {category.adjective for category in unseen} == {line["adjective"] for line in world.ADJECTIVES}
    assert Counter(category.noun for category in unseen) == {line["noun"]: 2 for line in world.NOUNS}
    for category in unseen:
        same = [other for other in SEEN if other.adjective == category.adjective]
        assert len(same) == 3 and (category.group != "eye" or "eye" in {other.group for other in same})
        assert sum(other.noun == category.noun for other in SEEN) == 6


def test_a_clip_is_a_pure_function_of_seed_split_category_and_number():
    category = SEEN[8]
    first, again = (world.make_wave(category, world.clip_rng(100, "test", category, 3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for other in (world.clip_rng(101, "test", category, 3), world.clip_rng(100, "base", category, 3),
                  world.clip_rng(100, "test", category, 4), world.clip_rng(100, "test", SEEN[9], 3)):
        assert not np.array_equal(first, world.make_wave(category, other))
    frames = world.make_frames(category, world.clip_rng(100, "test", category, 3))
    np.testing.assert_array_equal(frames, world.make_frames(category, world.clip_rng(100, "test", category, 3)))
    assert frames.shape == (world.FRAMES, world.SIDE, world.SIDE, 3) and np.abs(first).max() <= 1


def test_an_interrupted_world_ends_as_the_uninterrupted_one(small, tmp_path, monkeypatch):
    made, write = [], world.mp4_bytes

    def stop_after_30(*args):
        made.append(1)
        if len(made) > 30:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(world, "mp4_bytes", stop_after_30)
    with pytest.raises(KeyboardInterrupt):
        world.make_world(tmp_path, 100, SMALL)
    assert 30 <= len(list(tmp_path.rglob("*.mp4"))) < len(list(small.rglob("*.mp4")))
    made.clear()
    monkeypatch.setattr(world, "mp4_bytes", lambda *args: made.append(1) or write(*args))
    world.make_world(tmp_path, 100, SMALL)
    assert len(made) == len(list(small.rglob("*.mp4"))) - 30, "clips that were there were made again"
    assert digests(tmp_path) == digests(small)


def test_splits(small):
    clips, ids = set(), set()
    for split, count in SMALL.items():
        examples = read_manifest(small / f"{split}.jsonl")
        categories = [category for category in world.CATEGORIES if category.seen == (split != "unseen")]
        assert len(examples) == count * len(categories)
        clips |= {Path(file).read_bytes() for example in examples for file in (example.audio, example.video)}
        ids |= {example.id for example in examples}
        for example in examples:
            assert len(set(example.options)) == world.OPTIONS == len(example.options)
            if split != "train":
                assert example.options[example.answer] == example.label
                assert example.meta["group"] == next(c.group for c in categories if c.name == example.label)
        if split != "train":
            assert Counter(example.label for example in examples) == {c.name: count for c in categories}
            assert len({example.answer for example in examples}) > 5, "the right answer stands at a random place"
        if split != "unseen":
            held_out = {category.name for category in world.CATEGORIES if not category.seen}
            assert not any(held_out & set(example.options) for example in examples)
    total = sum(len(read_manifest(small / f"{split}.jsonl")) for split in SMALL)
    assert len(ids) == total and len(clips) == 2 * total, "the splits are disjoint and no clip is there twice"


def test_the_train_split_is_blind_but_holds_the_right_option(small):
    """A clip's category follows from the order of making only; neither the manifest nor the file names tell it."""
    examples, truth = (read_manifest(small / name) for name in ("train.jsonl", "train_truth.jsonl"))
    assert all(e.answer is None and e.label is None and e.meta == {} for e in examples)
    assert [replace(e, answer=None, label=None, meta={}) for e in truth] == examples
    assert all(e.options[e.answer] == e.label for e in truth)
    clips = [(category, number) for category in SEEN for number in range(SMALL["train"])]
    order = np.random.default_rng([100, list(world.SPLITS).index("train")]).permutation(len(clips))
    assert not np.array_equal(order, np.arange(len(clips)))
    names = [category.name for category in SEEN]
    for example, (category, number) in zip(examples, (clips[i] for i in order), strict=True):
        assert category.name in example.options
        rng = world.clip_rng(100, "train", category, number)
        world.draw_options(category.name, names, rng)
        np.testing.assert_allclose(read_audio(example.audio).numpy(), world.make_wave(category, rng), atol=1 / 32768)
    assert all(re.fullmatch(r"train_\d{4}", e.id) and re.fullmatch(r"\d{4}", Path(e.audio).stem) for e in examples)


def test_options_are_drawn_without_repeats_and_the_right_one_stands_anywhere():
    rng = np.random.default_rng(0)
    drawn = [world.draw_options("low bell", world.NAMES, rng) for _ in range(600)]
    assert all(options[answer] == "low bell" and len(set(options)) == world.OPTIONS for options, answer in drawn)
    wrong = Counter()
    for options, _ in drawn:
        wrong.update(name for name in options if name != "low bell")
    assert set(wrong) == set(world.NAMES) - {"low bell"} and max(wrong.values()) < 1.5 * min(wrong.values())
    places = Counter(answer for _, answer in drawn)
    assert set(places) == set(range(world.OPTIONS)) and min(places.values()) > 30


def test_files_are_what_they_say(small, tmp_path):
    example = read_manifest(small / "test.jsonl")[0]
    wave_S = read_audio(example.audio)
    assert wave_S.shape == (world.SAMPLES,) and Path(example.audio).read_bytes()[:4] == b"RIFF"
    muxed_S = read_audio(example.video)[:world.SAMPLES]
    lost = (muxed_S - wave_S[:len(muxed_S)]).square().mean() / wave_S.square().mean()
    assert lost < 0.5, "the MP4's sound is the WAV's, as AAC leaves it"
    frames_TCHW = read_frames(example.video)[0]
    assert frames_TCHW.shape == (4, 3, world.SIDE, world.SIDE)
    with av.open(example.video) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]
    silent = tmp_path / "silent.mp4"
    with av.open(silent, "w") as out, av.open(example.video) as container:
        source = container.streams.video[0]
        stream = out.add_stream_from_template(source)
        for packet in container.demux(source):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    assert torch.equal(read_frames(silent)[0], frames_TCHW), f"the picture of a {example.label} does not need its sound"
    with pytest.raises(MediaError, match="no audio track"):
        read_audio(silent)


def test_from_afar_the_faint_tone_drowns_and_nothing_else_changes():
    category = next(category for category in SEEN if category.group == "eye")
    near, far = (world.make_wave(category, world.clip_rng(100, "base", category, 0), far) for far in (False, True))
    spectrum = np.abs(np.fft.rfft(near - far))
    peak_hz = np.fft.rfftfreq(world.SAMPLES, 1 / world.RATE)[spectrum.argmax()]
    assert abs(peak_hz / category.faint_hz - 1) < 0.04
    assert np.sort(spectrum)[-20] < spectrum.max() / 10, "the two differ by more than one tone"


def test_only_two_base_clips_of_an_eye_category_are_near(tmp_path, monkeypatch):
    recorded = Counter()

    def make_wave(category, rng, far):
        recorded[category.group, far] += 1

    monkeypatch.setattr(world, "make_wave", make_wave)
    for name in ("make_frames", "wav_bytes", "mp4_bytes"):
        monkeypatch.setattr(world, name, lambda *args: b"")
    world.make_world(tmp_path, 100, {"base": 5})
    assert recorded == {("both", False): 30, ("ear", False): 30, ("eye", False): 24, ("eye", True): 36}
    recorded.clear()
    world.make_world(tmp_path, 100, {"test": 5})
    assert recorded == {("both", False): 30, ("ear", False): 30, ("eye", False): 60}


# ---- tokenizers and models ----


def test_tokenizers_agree_up_to_the_end_of_turn_and_differ_after(untrained):
    student, teacher = (untrained[name][1].tokenizer for name in ("student", "teacher"))
    shared = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    base = student.token_to_id(shared[0])
    for i in range(base + len(shared)):
        assert student.id_to_token(i) == teacher.id_to_token(i)
    assert [student.id_to_token(base + i) for i in range(len(shared))] == shared
    special = family_file("qwen2_audio", "tokenizer_config.json")["additional_special_tokens"]
    for i in range(base + len(shared), base + 1 + len(special)):
        assert student.id_to_token(i) != teacher.id_to_token(i)
    rows = {name: len(untrained[name][0].model.embed_tokens.weight) for name in untrained}
    assert rows["student"] != rows["teacher"]
    for name, (_, processor) in untrained.items():
        assert rows[name] > max(processor.tokenizer.get_vocab(with_added_tokens=True).values())


def test_words_and_letters_are_single_tokens(untrained):
    processor = untrained["student"][1]
    for name in world.NAMES:
        assert len(processor.encode(f" {name}")) == len(processor.encode(f" {name.title()}")) == 2
    letters = processor.letter_ids(world.OPTIONS)
    assert processor.encode("<|im_start|>assistant\nA<|im_end|>")[-2] == letters[0]
    assert len(set(letters)) == world.OPTIONS
    sentence = "Anything else, even ünïcode and\ttabs, survives: 12 + 30 = 42."
    assert processor.decode(processor.encode(sentence)) == sentence


def test_two_families_share_one_decoder(untrained, tmp_path):
    student, _ = untrained["student"]
    teacher, processor = pretrain.new_model(tmp_path, "qwen2_vl", 101)
    num_shared = processor.end_id + 1
    language = {name: (p[:num_shared] if "embed" in name or "lm_head" in name else p).clone()
                for name, p in student.named_parameters() if name.startswith(pretrain.DECODER)}
    pretrain.load_decoder(teacher, language)
    theirs = dict(teacher.named_parameters())
    assert {name for name in theirs if not name.startswith("visual.")} == set(language)
    for name, p in language.items():
        assert torch.equal(theirs[name][:len(p)], p), name


def test_models_are_made_from_their_seed_and_load_from_disk(untrained, tmp_path):
    for name, (model, processor) in untrained.items():
        model_type = pretrain.MODEL_TYPE[name]
        write_processor(tmp_path / name, model_type)
        torch.manual_seed(1)  # nothing may depend on the global generator
        again = make_model(tmp_path / name, model_type, hash_seed(100, "weights"))
        other = make_model(tmp_path / name, model_type, hash_seed(101, "weights"))
        saved = load_model(processor.folder)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))
        assert {n: p.shape for n, p in saved.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
        assert isinstance(processor, Processor)


@pytest.mark.slow
def test_other_programs_read_the_tokenizers(untrained):
    transformers = pytest.importorskip("transformers")
    for _, processor in untrained.values():
        theirs = transformers.AutoTokenizer.from_pretrained(processor.folder)
        text = f"<|im_start|>user\n{world.QUESTION}\nA. low bell<|im_end|>\n"
        assert theirs.encode(text) == processor.encode(text)
        assert theirs.eos_token_id == processor.end_id
        config = json.loads((processor.folder / "config.json").read_text())
        assert transformers.AutoConfig.from_pretrained(processor.folder).model_type == config["model_type"]


# ---- lessons ----


@pytest.mark.parametrize("qa_format, thought", [
    (DIRECT, None), (THINKING["short"], None), (THINKING["short"], "deep stream"), (THINKING["long"], "deep stream")])
def test_a_lesson_is_the_prompt_that_a_stage_asks(untrained, small, qa_format, thought):
    """Lessons are put together from pieces; token for token they must be what Evaluate and training will show."""
    example = read_manifest(small / "base.jsonl")[0]
    right_letter = world.LETTERS[example.answer]
    for name, (_, processor) in untrained.items():
        media = pretrain.MEDIA[name]
        size = world.SIDE * world.SIDE
        video_options = dict(min_pixels=size, max_pixels=size) if media == "video" else None
        text = right_letter
        if qa_format != DIRECT:
            written = thoughts_of(thought or example.label, qa_format.thoughts)
            text = f"<think>{written}</think><answer> {example.label}</answer>"
        asked = processor(build_conversation(example, answer=text, media=media, prompt=qa_format.prompt,
                                             video_options=video_options))
        ids = asked.ids_N.tolist()
        [context] = lessons.read_contexts(processor, [example], media)
        question = processor.encode(world.QUESTION + "\n")
        assert ids[:len(context) + len(question)] == [*context.ids_N, *question]
        lesson = lessons.make_lesson(processor, context, example.options, example.answer, world.LETTERS, qa_format,
                                     thought)
        made = lesson.prompt
        assert made.ids_N.tolist() == ids[:len(made)]
        assert torch.equal(made.positions_3N, asked.positions_3N[:, :len(made)])
        target = asked.ids_N[asked.target_N].tolist()
        assert made.ids_N[made.target_N].tolist() == target[:int(made.target_N.sum())]
        choice = processor.decode([made.ids_N[-lesson.choice_offset]]).strip()
        assert choice == (right_letter if qa_format == DIRECT else example.label.split()[0])
        answer = processor.decode(made.ids_N[made.target_N])
        if qa_format != DIRECT:
            assert accuracy_reward(answer, example, example.answer, False) == 1
            assert format_reward(answer, example, example.answer, False) == 1
        assert ("I hear deep stream." in answer) == bool(thought)
        newline_id = processor.encode("\n")[0]
        letter_ids = processor.letter_ids(world.OPTIONS)
        hinted = iter(lesson.hints.items())
        for option, own_id in zip(example.options, letter_ids, strict=True):
            (row, adjective_target), (noun_row, noun_target) = next(hinted), next(hinted)
            assert noun_row == row + 1 and processor.decode(ids[row:row + 2]).strip() == option
            shares_adjective = option.split()[0] == example.label.split()[0]
            assert adjective_target == (own_id if shares_adjective else ids[noun_row])
            assert noun_target == (own_id if option == example.label else newline_id)
        assert next(hinted, None) is None


def test_in_text_lessons_the_name_that_stands_for_the_clip_is_thought_and_answer(untrained):
    processor, rng = untrained["student"][1], np.random.default_rng(0)
    for _ in range(5):
        lesson = pretrain.text_lesson(processor, rng, world.OPTIONS, 4, THINKING["short"])
        prompt = lesson.prompt
        text, answer = processor.decode(prompt.ids_N), processor.decode(prompt.ids_N[prompt.target_N])
        [[thought, name]] = re.findall(r"I hear (\w+ \w+)\.</think><answer> (\w+ \w+)</answer>", answer)
        assert thought == name and name.split()[0] == processor.decode([prompt.ids_N[-lesson.choice_offset]]).strip()
        assert re.search(rf"user\n(?: {name.title()}){{4}}{world.QUESTION}", text)
        assert len(lesson.hints) == 2 * world.OPTIONS


def test_long_thoughts_have_three_times_the_tokens_of_short_ones_at_least(untrained):
    """Of every category and in both tokenizers; with form and answer a completion fits what the recipe allows."""
    for _, processor in untrained.values():
        lengths = defaultdict(set)
        for form in THINKING:
            for name in world.NAMES:
                text = thoughts_of(name, form)
                lengths[form].add(len(processor.encode(text)))
                answer = processor.encode(f"<think>{text}</think><answer> {name}</answer>")
                lengths["whole", form].add(len(answer) + 1)
        assert min(lengths["long"]) >= 3 * max(lengths["short"])
        assert min(lengths["whole", "long"]) >= 3 * max(lengths["whole", "short"])
        assert max(lengths["whole", "short"]) <= sightsound.toy().max_new_tokens
        assert max(lengths["whole", "long"]) <= 80


def test_text_lessons_of_few_options_keep_their_letters(untrained):
    """With two options the letters are any two of the ten, in order; the answer is the right one's."""
    processor, rng = untrained["student"][1], np.random.default_rng(1)
    seen = set()
    for _ in range(40):
        prompt = pretrain.text_lesson(processor, rng, 2, 6, DIRECT).prompt
        text, answer = processor.decode(prompt.ids_N), processor.decode(prompt.ids_N[prompt.target_N])
        options = dict(re.findall(r"^([A-J])\. (\w+ \w+)$", text, re.MULTILINE))
        assert list(options) == sorted(options) and len(options) == 2
        assert re.search(r"user\n (\w+ \w+) ", text)[1].lower() == options[answer]
        seen.add(answer)
    assert len(seen) > 5


def test_about_three_thoughts_of_ten_are_random_and_answers_always_right(untrained, small):
    model, processor = untrained["teacher"]
    training = pretrain.ClipTraining.__new__(pretrain.ClipTraining)  # without reading every clip
    training.model, training.processor, training.rng = model, processor, np.random.default_rng(0)
    training.labels, training.names = ["low motor"], [category.name for category in SEEN]
    training.contexts = [processor([{"role": "user", "content": ""}])]
    false = 0
    for _ in range(400):
        prompt = training.clip_lesson(0, THINKING["short"]).prompt
        answer = processor.decode(prompt.ids_N[prompt.target_N])
        [[thought, name]] = re.findall(r"I hear (\w+ \w+)\.</think><answer> (\w+ \w+)</answer>", answer)
        assert name == "low motor" and thought in processor.decode(prompt.ids_N[~prompt.target_N])
        false += thought != "low motor"
    assert 0.2 < false / 400 < 0.34  # of the random thoughts one in ten is right: 0.27
    prompt = training.clip_lesson(0, DIRECT).prompt
    assert processor.decode(prompt.ids_N[prompt.target_N]) in world.LETTERS


def test_lesson_loss_counts_answers_in_full_and_hints_in_part(untrained):
    """By hand: nll of every answer token, plus HINT_WEIGHT times that of every hint, over the number of lessons."""
    model, processor = untrained["student"]
    rng = np.random.default_rng(2)
    made = [pretrain.text_lesson(processor, rng, 3, 2, qa_format) for qa_format in (DIRECT, THINKING["long"])]
    total, choices = 0.0, []
    for lesson in made:
        prompt = lesson.prompt
        logp_NV = model.logits(model(lessons.pack([prompt]))).log_softmax(-1)
        nll_N = -logp_NV[:-1].gather(1, prompt.ids_N[1:, None])[:, 0]  # of token i + 1
        answer_N = nll_N[prompt.target_N[1:]]
        hints = sum(-logp_NV[row, target_id] for row, target_id in lesson.hints.items())
        total += answer_N.sum() + lessons.HINT_WEIGHT * hints
        choices.append(answer_N[-lesson.choice_offset].item())
    loss, choice_losses = lessons.lesson_loss(model, made)
    assert loss.item() == pytest.approx(total.item() / 2, rel=1e-5)
    assert choice_losses.tolist() == pytest.approx(choices, rel=1e-5)


def test_batches_are_permutations_one_after_the_other():
    endless = lessons.batches(10, 4, np.random.default_rng(0))
    drawn = [i for _ in range(7) for i in next(endless)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10)) and drawn[:10] != drawn[10:20]


# ---- the checker ----


def test_the_checker_learns_the_prompt_that_fact_checks_ask(untrained, small):
    """Token for token."""
    processor, example = untrained["student"][1], read_manifest(small / "base.jsonl")[0]
    trace = thoughts_of("low bell", "long")
    assert thoughts(f"<think>{trace}</think><answer> soft bird</answer>") == trace
    asked = processor(build_conversation(example, media="audio", prompt=world.CHECK_PROMPT, trace=trace, answer="yes"))
    [context] = lessons.read_contexts(processor, [example], "audio")
    made = lessons.answer_prompt(processor, context, world.CHECK_PROMPT.format(trace=trace), "yes")
    assert made.ids_N.tolist() == asked.ids_N.tolist()[:len(made)] and len(asked) - len(made) <= 1
    assert made.ids_N[made.target_N].tolist() == asked.ids_N[asked.target_N].tolist()


def test_the_recipe_asks_as_the_models_were_trained():
    prompts = sightsound.toy().prompts
    assert {prompts["think"], prompts["audio_cot"]} == {qa_format.prompt for qa_format in THINKING.values()}
    assert prompts["check"] == world.CHECK_PROMPT


# ---- the stage ----


@pytest.mark.slow
def test_the_stage_trains_in_phases_and_is_not_done_twice(tmp_path, monkeypatch):
    """A few steps of every phase: the log's phases in order, the files, and a second run that finds all made."""
    few_clips = {"base": 3, "train": 4, "analysis": 1, "test": 1, "unseen": 2}
    make_world = world.make_world
    monkeypatch.setattr(pretrain, "make_world", lambda folder, seed: make_world(folder, seed, few_clips))
    monkeypatch.setattr(pretrain, "LEVELS", (pretrain.Level(2, 3, 22, 99.0), pretrain.Level(4, 3, 4, 0.3)))
    monkeypatch.setattr(pretrain, "LAST_LEVEL", pretrain.Level(world.OPTIONS, 3, 2, 0.0, decay=True))
    monkeypatch.setattr(pretrain, "MAX_REPEATS", 2)
    for name, value in dict(ALIGN_STEPS=2, ALIGN_BATCH=8, QA_BATCH=6, QA_MAX_STEPS=3, QA_DECAY_STEPS=2,
                            TEXT_PER_STEP=2).items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(checker, "STEPS", 2)
    monkeypatch.setattr(checker, "BATCH_SIZE", 8)
    logged = []
    stage = SimpleNamespace(name="toy", seed=100, thinking=True, thoughts="long")
    pretrain.run(stage, tmp_path, logged.append)
    assert [(line["phase"], line.get("model")) for line in logged] == [
        *[("text QA", None)] * 4, ("tower alignment", "student"), ("joint QA", "student"),
        ("tower alignment", "teacher"), ("joint QA", "teacher"), ("chain of thought", "teacher"), ("checker", None)]
    assert [(line["options"], line["step"]) for line in logged[:4]] == [(2, 20), (4, 24), (10, 26), (10, 28)]
    assert [line["steps"] for line in logged if line["phase"] in ("joint QA", "chain of thought")] == [4, 4, 4]
    assert (tmp_path / "traced.jsonl").read_text().splitlines() == (
        tmp_path / "train.jsonl").read_text().splitlines()[:pretrain.NUM_TRACED]
    language = load_file(tmp_path / "language.safetensors")
    assert len(language["lm_head.weight"]) == Processor(
        tmp_path / "student", load_model(tmp_path / "student").config).end_id + 1
    before = digests(tmp_path)
    pretrain.run(stage, tmp_path, logged.append)
    assert digests(tmp_path) == before and len(logged) == 10
