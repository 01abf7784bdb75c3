"""The toy world and its models before training: what is made is the same every time, and no answer leaks."""
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from minixmd.inputs.examples import build_conversation, read_manifest
from minixmd.inputs.media import MediaError, read_audio, read_frames
from minixmd.inputs.tokenizer import Processor
from minixmd.models.weights import load_model, save_model
from minixmd.tasks.answers import thoughts
from minixmd.tasks.rewards import accuracy_reward, format_reward
from minixmd.toy import checker as toy_checker
from minixmd.toy import lessons as toy_lessons
from minixmd.toy import pretrain as toy
from minixmd.toy import world
from minixmd.toy.models import BASE, SPECIAL, make_model, write_processor

SMALL = {"base": 2, "train": 2, "analysis": 1, "test": 1, "unseen": 2}
SEEN = [kind for kind in world.KINDS if kind.seen]


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
    for name in toy.FAMILY:
        folder = tmp_path_factory.mktemp(name)
        model, processor = toy.new_model(folder, name, 100)
        save_model(model, processor.folder, folder)
        made[name] = model, processor
    return made


def test_groups():
    """Confusable clips share what they are confused by and differ by the faint cue; nothing else shares anything."""
    assert Counter(kind.group for kind in SEEN) == {"both": 6, "eye": 12, "ear": 6}
    for group, shown, cue in (("eye", "sound", "tone"), ("ear", "look", "weave")):
        others = [getattr(kind, shown) for kind in world.KINDS if kind.group != group]
        cluster = [(getattr(kind, shown), getattr(kind, cue)) for kind in world.KINDS if kind.group == group]
        assert len(set(others)) == len(others) and not set(others) & {main for main, _ in cluster}
        assert len(set(cluster)) == len(cluster)
    assert len({kind.name for kind in world.KINDS}) == len(world.KINDS) > world.OPTIONS


def test_a_clip_is_a_pure_function_of_seed_split_class_and_number():
    kind = SEEN[8]
    first, again = (world.make_wave(kind, world.clip_rng(100, "test", kind, 3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for other in (world.clip_rng(101, "test", kind, 3), world.clip_rng(100, "base", kind, 3),
                  world.clip_rng(100, "test", kind, 4), world.clip_rng(100, "test", SEEN[9], 3)):
        assert not np.array_equal(first, world.make_wave(kind, other))
    frames = world.make_frames(kind, world.clip_rng(100, "test", kind, 3))
    np.testing.assert_array_equal(frames, world.make_frames(kind, world.clip_rng(100, "test", kind, 3)))
    assert frames.shape == (world.FRAMES, world.SIDE, world.SIDE, 3) and np.abs(first).max() <= 1


def test_an_interrupted_world_ends_as_the_uninterrupted_one(small, tmp_path, monkeypatch):
    made, write = [], world.mp4_bytes

    def stop_after_60(*args):
        made.append(1)
        if len(made) > 60:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(world, "mp4_bytes", stop_after_60)
    with pytest.raises(KeyboardInterrupt):
        world.make_world(tmp_path, 100, SMALL)
    assert 60 <= len(list(tmp_path.rglob("*.mp4"))) < len(list(small.rglob("*.mp4")))
    made.clear()
    monkeypatch.setattr(world, "mp4_bytes", lambda *args: made.append(1) or write(*args))
    world.make_world(tmp_path, 100, SMALL)
    assert len(made) == len(list(small.rglob("*.mp4"))) - 60, "clips that were there were made again"
    assert digests(tmp_path) == digests(small)


def test_splits(small):
    clips, ids = set(), set()
    for split, count in SMALL.items():
        examples = read_manifest(small / f"{split}.jsonl")
        kinds = [kind for kind in world.KINDS if kind.seen == (split != "unseen")]
        assert len(examples) == count * len(kinds)
        clips |= {Path(file).read_bytes() for example in examples for file in (example.audio, example.video)}
        ids |= {example.id for example in examples}
        for example in examples:
            assert len(set(example.options)) == world.OPTIONS == len(example.options)
            if split != "train":
                assert example.options[example.answer] == example.label
                assert example.meta["group"] == next(kind.group for kind in kinds if kind.name == example.label)
        if split != "train":
            assert Counter(example.label for example in examples) == {kind.name: count for kind in kinds}
            assert len({example.answer for example in examples}) > 5, "the right answer stands at a random place"
        if split != "unseen":
            held_out = {kind.name for kind in world.KINDS if not kind.seen}
            assert not any(held_out & set(example.options) for example in examples)
    total = sum(len(read_manifest(small / f"{split}.jsonl")) for split in SMALL)
    assert len(ids) == total and len(clips) == 2 * total, "the splits are disjoint and no clip is there twice"


def test_the_train_split_tells_nothing_but_holds_the_right_option(small):
    """Which class a clip is, only the order of making says; neither the manifest nor the file names do."""
    examples, truth = (read_manifest(small / name) for name in ("train.jsonl", "train_truth.jsonl"))
    assert all(e.answer is None and e.label is None and e.meta == {} for e in examples)
    assert [replace(e, answer=None, label=None, meta={}) for e in truth] == examples
    assert all(e.options[e.answer] == e.label for e in truth)
    todo = [(kind, number) for kind in SEEN for number in range(SMALL["train"])]
    order = np.random.default_rng([100, list(world.SPLITS).index("train")]).permutation(len(todo))
    assert not np.array_equal(order, np.arange(len(todo)))
    for example, (kind, number) in zip(examples, (todo[i] for i in order), strict=True):
        assert kind.name in example.options
        rng = world.clip_rng(100, "train", kind, number)
        world.draw_options(kind.name, {other.name: 1 for other in SEEN}, world.OPTIONS, rng)
        np.testing.assert_allclose(read_audio(example.audio).numpy(), world.make_wave(kind, rng), atol=1 / 32768)
    assert all(re.fullmatch(r"train_\d{4}", e.id) and re.fullmatch(r"\d{4}", Path(e.audio).stem) for e in examples)


def test_options_follow_the_label_frequency():
    frequency = {"often": 90, "rare": 1, "right": 5, "other": 90}
    rng = np.random.default_rng(0)
    drawn = [world.draw_options("right", frequency, 3, rng) for _ in range(300)]
    assert all(options[answer] == "right" and len(set(options)) == 3 for options, answer in drawn)
    assert sum("rare" in options for options, _ in drawn) < 30
    assert {answer for _, answer in drawn} == {0, 1, 2}


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
    kind = next(kind for kind in SEEN if kind.name == example.label)
    silent = tmp_path / "silent.mp4"
    with av.open(silent, "w") as out, av.open(example.video) as container:
        source = container.streams.video[0]
        stream = out.add_stream_from_template(source)
        for packet in container.demux(source):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    assert torch.equal(read_frames(silent)[0], frames_TCHW), f"the picture of a {kind.name} does not need its sound"
    with pytest.raises(MediaError, match="no audio track"):
        read_audio(silent)


def test_tokenizers_agree_on_the_common_base_and_differ_after(untrained):
    student, teacher = (untrained[name][1].tokenizer for name in ("student", "teacher"))
    base = student.token_to_id("<|endoftext|>")
    for i in range(base + len(BASE)):
        assert student.id_to_token(i) == teacher.id_to_token(i)
    assert [student.id_to_token(base + i) for i in range(len(BASE))] == list(BASE)
    for i in range(base + len(BASE), base + len(SPECIAL["qwen2_audio"])):
        assert student.id_to_token(i) != teacher.id_to_token(i)
    rows = {name: len(untrained[name][0].model.embed_tokens.weight) for name in untrained}
    assert rows["student"] != rows["teacher"]
    for name, (_, processor) in untrained.items():
        assert rows[name] > max(processor.tokenizer.get_vocab(with_added_tokens=True).values())


def test_names_and_letters_are_single_tokens(untrained):
    processor = untrained["student"][1]
    assert all(len(processor.encode(" " + kind.name)) == 1 for kind in world.KINDS)
    letters = processor.letter_ids(world.OPTIONS)
    assert processor.encode("<|im_start|>assistant\nA<|im_end|>")[-2] == letters[0]
    assert len(set(letters)) == world.OPTIONS
    sentence = "Anything else, even ünïcode and\ttabs, survives: 12 + 30 = 42."
    assert processor.decode(processor.encode(sentence)) == sentence


@pytest.mark.parametrize("form, told", [(toy.DIRECT, None), (toy.THINKING, None), (toy.THINKING, "gong")])
def test_a_lesson_is_the_prompt_that_a_stage_asks(untrained, small, form, told):
    """Lessons are put together from pieces; token for token they must be what Evaluate and Train will show."""
    example = read_manifest(small / "base.jsonl")[0]
    for name, (_, processor) in untrained.items():
        media = toy.FAMILY[name][1]
        options = dict(media=media, prompt=form.prompt, video_options=toy_lessons.PIXELS if media == "video" else None)
        answer = form.answer.format(name=example.label, told=told or example.label, letter="ABCDEFGHIJ"[example.answer])
        asked = processor(build_conversation(example, answer=answer, **options))
        question = processor.encode(world.QUESTION + "\n")
        ids = asked.ids_N.tolist()
        at = next(i for i in range(len(ids)) if ids[i:i + len(question)] == question)
        made, hints, back = toy.lesson(processor, ids[:at], asked.media, example.answer, example.options, "ABCDEFGHIJ",
                                       form, told)
        assert made.ids_N.tolist() == ids[:len(made)]
        assert torch.equal(made.positions_3N, asked.positions_3N[:, :len(made)])
        target = asked.ids_N[asked.target_N].tolist()
        assert made.ids_N[made.target_N].tolist() == target[:int(made.target_N.sum())]
        letter = processor.letter_ids(world.OPTIONS)[example.answer]
        assert processor.decode([made.ids_N[-back]]).strip() == (
            "ABCDEFGHIJ"[example.answer] if form == toy.DIRECT else example.label)
        answer = processor.decode(made.ids_N[made.target_N])
        assert form == toy.DIRECT or (accuracy_reward(answer, example), format_reward(answer, example)) == (1, 1)
        assert ("gong" in answer) == bool(told)
        assert [token == letter for _, token in hints] == [option == example.label for option in example.options]
        assert [processor.decode([ids[row]]).strip() for row, _ in hints] == list(example.options)


def test_text_is_thought_about_as_clips_are(untrained):
    """What stands where the clip will be is the right name, and thought and answer are that name."""
    processor, rng = untrained["student"][1], np.random.default_rng(0)
    for _ in range(5):
        prompt, hints, back = toy.text_lesson(processor, rng, world.OPTIONS, 4, toy.THINKING)
        text, answer = processor.decode(prompt.ids_N), processor.decode(prompt.ids_N[prompt.target_N])
        [[told, name]] = re.findall(r"I hear (\w+)\.</think><answer> (\w+)</answer>", answer)
        assert told == name == processor.decode([prompt.ids_N[-back]]).strip()
        assert re.search(rf"user\n(?: {name}){{4}}{world.QUESTION}", text) and len(hints) == world.OPTIONS


def test_the_checker_is_shown_thoughts_as_it_will_be_asked_about_them(untrained, small):
    """Token for token what stage FactCheck asks."""
    processor, example = untrained["student"][1], read_manifest(small / "base.jsonl")[0]
    thought = toy.THOUGHT.format(told="bell")
    assert thoughts(toy.THINKING.answer.format(told="bell", name="drum")) == thought
    asked = processor(build_conversation(example, media="audio", prompt=world.CHECK_PROMPT, trace=thought,
                                         answer="yes"))
    [(before, clip)] = toy.show(processor, [example], "checker", "audio")
    made = toy_checker.check_lesson(processor, before, clip, world.CHECK_PROMPT.format(trace=thought), True)
    assert made.ids_N.tolist() == asked.ids_N.tolist()[:len(made)] and len(asked) - len(made) <= 1
    assert made.ids_N[made.target_N].tolist() == asked.ids_N[asked.target_N].tolist()
    no = toy_checker.check_lesson(processor, before, clip, world.CHECK_PROMPT.format(trace=thought), False)
    assert processor.decode(no.ids_N[no.target_N]) == "no"


def test_two_families_share_one_language_model(untrained):
    student, teacher = (dict(untrained[name][0].named_parameters()) for name in ("student", "teacher"))
    common = untrained["student"][1].end_id + 1
    language = {name: (p[:common] if "embed" in name or "lm_head" in name else p).clone()
                for name, p in toy.decoder_parameters(untrained["student"][0]).items()}
    toy.adopt(untrained["teacher"][0], language)
    for name in language:
        assert torch.equal(teacher[name][:len(language[name])], student[name][:len(language[name])]), name


def test_models_are_made_from_their_seed_and_load_from_disk(untrained, tmp_path):
    for name, (model, processor) in untrained.items():
        write_processor(tmp_path / name, toy.FAMILY[name][0])
        torch.manual_seed(1)  # nothing may depend on the global generator
        again = make_model(tmp_path / name, toy.FAMILY[name][0], toy.hash_seed(100, "weights"))
        other = make_model(tmp_path / name, toy.FAMILY[name][0], toy.hash_seed(101, "weights"))
        saved = load_model(processor.folder)
        if name == "student":  # the teacher has adopted the student's decoder above
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))
        assert {n: p.shape for n, p in saved.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
        assert isinstance(processor, Processor)


def test_other_programs_read_the_tokenizers(untrained):
    transformers = pytest.importorskip("transformers")
    for _, processor in untrained.values():
        theirs = transformers.AutoTokenizer.from_pretrained(processor.folder)
        text = f"<|im_start|>user\n{world.QUESTION}\nA. bell<|im_end|>\n"
        assert theirs.encode(text) == processor.encode(text)
        assert theirs.eos_token_id == processor.end_id
        config = json.loads((processor.folder / "config.json").read_text())
        assert transformers.AutoConfig.from_pretrained(processor.folder).model_type == config["model_type"]


def test_batches_are_permutations_one_after_the_other():
    endless = toy.batches(10, 4, np.random.default_rng(0))
    drawn = [i for _ in range(7) for i in next(endless)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10)) and drawn[:10] != drawn[10:20]


def test_from_afar_the_faint_tone_drowns_and_nothing_else_changes():
    kind = next(kind for kind in SEEN if kind.group == "eye")
    near, far = (world.make_wave(kind, world.clip_rng(100, "base", kind, 0), far) for far in (False, True))
    spectrum = np.abs(np.fft.rfft(near - far))
    peak_hz = np.fft.rfftfreq(world.SAMPLES, 1 / world.RATE)[spectrum.argmax()]
    assert abs(peak_hz / world.CUE_HZ[kind.tone] - 1) < 0.04
    assert np.sort(spectrum)[-20] < spectrum.max() / 10, "the two differ by more than one tone"
