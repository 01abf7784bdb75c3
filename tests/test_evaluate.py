"""Evaluate: written answers beside the letters' logits, shards, the stored top of a row, and two models compared."""
import json
import random
from dataclasses import replace

import pytest
import torch
from mini import CLASSES, OMNI, write_clips, write_model, write_tokenizer
from tiny import TOKENS, published_config, randomise

import minixmd
from minixmd.config import PROMPT, Evaluate, Label
from minixmd.config.field_checks import ConfigError
from minixmd.inputs.batch import pack
from minixmd.inputs.examples import build_conversation, read_manifest
from minixmd.inputs.prompts import build_prompt
from minixmd.models.families import read_config
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import save_model
from minixmd.runs import distributed
from minixmd.runs.records import read_jsonl
from minixmd.stages import evaluate, label, multiple_choice
from minixmd.stages.multiple_choice import Questions, Writing, score_letters, write_answers
from minixmd.tasks.statistics import compare, digest, paired_interval, wilson

FRAMES = dict(min_pixels=3136, max_pixels=3136)
SAID = [  # text, right option, letter with the largest logit (None: that of the text), what is read, how
    ("A", 0, None, 0, "letter"),
    ("B.", 1, None, 1, "letter"),
    ("owl", 2, 2, 2, "option"),
    ("cats", 1, 0, 1, "similar"),
    ("C", 0, None, 2, "letter"),
    ("hm hm hm hm", 0, 0, None, "none"),
    ("dog", None, None, None, None),  # its clip is missing
    ("(B)", 2, 2, 1, "letter"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Random models, one of each kind, and clips."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "ears", "audio")
    write_model(folder / "eyes", "vision")
    tokenizer, raw = write_tokenizer(folder / "omni", OMNI), published_config("omni", vocab=340)
    part = raw["thinker_config"]
    part.update({name: tokenizer.token_to_id(token) for name, token in TOKENS["qwen2_5_omni"].items()
                 if name in part})
    save_model(randomise(MultimodalLM(read_config(raw))), folder / "omni", folder / "omni")
    write_clips(folder / "clips")
    return folder


@pytest.fixture(scope="module")
def puppet(world, tmp_path_factory):
    """A manifest, and an audio model whose greedy answers to it are those of SAID: the head is solved for them."""
    folder = tmp_path_factory.mktemp("puppet")
    model, processor = write_and_load(folder)
    lines = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()]
    for i, (line, (_, right, *_)) in enumerate(zip(lines, SAID, strict=False)):
        line.update(question=f"Which one is number {i * i * 37}?", answer=0 if right is None else right,
                    audio=f"{world}/clips/{i}.wav", video=None, meta={"group": "even" if i % 2 == 0 else "odd"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:len(SAID)]))
    letters, hidden, wanted = processor.letter_ids(3), [], []
    examples = read_manifest(folder / "manifest.jsonl", allow_outside=True)
    for example, (text, _, best, *_) in zip(examples, SAID, strict=True):
        asked = build_conversation(example, media="audio", prompt=PROMPT)
        batch = pack([processor([*asked, {"role": "assistant", "content": text}])])
        logits_TV = torch.zeros(len(batch.target_id_T), model.lm_head.weight.shape[0])
        logits_TV[range(len(logits_TV)), batch.target_id_T] = 10
        if best is not None:
            logits_TV[0, letters[best]] = 5
        hidden.append(model(batch)[batch.target_row_T])
        wanted.append(logits_TV)
    hidden_ND, wanted_NV = torch.cat(hidden).double(), torch.cat(wanted).double()
    model.lm_head.weight.data = (torch.linalg.pinv(hidden_ND) @ wanted_NV).T.float().contiguous()
    assert (model.logits(hidden_ND.float()) - wanted_NV).abs().max() < 1
    save_model(model, folder, folder)
    lines[6]["audio"] = "gone.wav"
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:len(SAID)]))
    return folder


def write_and_load(folder):
    return minixmd.load(write_model(folder, "audio"))


def stage(model, manifest, cls=Evaluate, **more):
    more = dict(device="cpu", max_bad=0.2, allow_outside=True, **FRAMES) | more
    return cls(name="asked", model=str(model), manifest=str(manifest), **more)


def run(folder, module=evaluate, *args, **more):
    """The stage's results or labels, and its log."""
    log = []
    module.run(stage(*args, **more), folder, log.append)
    return log


def results(folder):
    return json.loads((folder / "results.json").read_text()), read_jsonl(folder / "answers.jsonl")


# ---- written answers ----


def test_written_answers_are_read_counted_and_set_beside_the_letters(puppet, tmp_path, capsys):
    log = run(tmp_path, evaluate, puppet, puppet / "manifest.jsonl", answer="generate", max_new_tokens=4)
    found, records = results(tmp_path)
    for record, (text, right, best, read, how) in zip(records, SAID, strict=True):
        if right is None:
            assert record.keys() == {"id", "bad", "detail", "question"} and record["bad"] == "missing"
            continue
        assert (record["answer"], record["how"]) == (read, how) and text.startswith(record["text"])
        assert record["option"] == (None if read is None else CLASSES[read])
        assert record["by_letters"] == (read if best is None else best)
        assert record["right"] == (read == right) and record["finished"] == (record["text"] == text)
    assert found["count"] == 7 and found["correct"] == 4 and found["accuracy"] == 4 / 7
    assert found["how"] == {"letter": 4, "option": 1, "similar": 1, "none": 1} and found["unfinished"] == 1
    assert found["disagreement"] == 3 / 7  # cats, hm, (B)
    assert (found["letters"]["count"], found["letters"]["correct"]) == (7, 5)
    assert found["bad"] == {"missing": 1} and (found["answer"], found["max_new_tokens"]) == ("generate", 4)
    assert {name: (part["correct"], part["count"]) for name, part in found["groups"].items()} == {
        "even": (2, 3), "odd": (2, 4)}  # fmt: skip
    assert found["letters"]["groups"]["odd"]["correct"] == 3 and found["letters"].keys() == {
        "count", "correct", "accuracy", "interval", "groups", "classes"}  # fmt: skip
    assert log[-1]["how"] == found["how"] and log[-1]["disagreement"] == found["disagreement"]


def test_a_label_may_be_what_is_written_and_stores_the_letters_logits_all_the_same(puppet, tmp_path):
    manifest = puppet / "manifest.jsonl"
    for name in ("written", "labels", "letters"):
        (tmp_path / name).mkdir()
    run(tmp_path / "written", evaluate, puppet, manifest, answer="generate", max_bad=1.0)
    run(tmp_path / "labels", label, puppet, manifest, Label, answer="generate", top_k=5, max_bad=1.0)
    run(tmp_path / "letters", label, puppet, manifest, Label, top_k=5, max_bad=1.0)
    _, written = results(tmp_path / "written")
    labels, letters = (read_jsonl(tmp_path / name / "labels.jsonl") for name in ("labels", "letters"))
    ways = set()
    for record, made, by_letter in zip(written, labels, letters, strict=True):
        if "bad" in record:
            assert made == by_letter == {key: value for key, value in record.items() if key != "question"}
        elif record["option"] is None:
            assert made["bad"] == "no option" and repr(record["text"]) in made["detail"]
            ways.add("none")
        else:
            assert (made["option"], made["text"]) == (record["option"], record["text"])
            assert made["top"]["ids"] == by_letter["top"]["ids"]
            ways.add(made["option"] == by_letter["option"])
    assert ways == {"none", True, False}


def test_a_stop_string_ends_a_written_answer(puppet, tmp_path):
    run(tmp_path, evaluate, puppet, puppet / "manifest.jsonl", answer="generate", max_new_tokens=4, stop=("m ",))
    found, records = results(tmp_path)
    assert [record["text"] for record in records if "bad" not in record] == [
        "hm " if text.startswith("hm") else text for text, right, *_ in SAID if right is not None]
    assert found["unfinished"] == 0 and found["stop"] == ["m "]


@pytest.mark.parametrize("kind, media", [("ears", "audio"), ("eyes", "video"), ("omni", "sounded")])
def test_a_written_answer_is_generates_and_the_letters_are_those_without_it(world, kind, media):
    examples = [replace(example, question=f"Which one is number {i}?" + " Take care." * (25 * i % 60))
                for i, example in enumerate(read_manifest(world / "clips" / "manifest.jsonl")[:6])]
    model, processor = minixmd.load(world / kind)
    asked = stage(world / kind, world / "clips" / "manifest.jsonl", media=media).prompt_format
    lengths = [len(build_prompt(processor, example, asked)) for example in examples]
    assert max(lengths) > 2 * min(lengths)
    pairs = max(a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True))  # two or more in a batch
    letters = score_letters(model, Questions(processor, examples, asked), batch_tokens=pairs)
    written = write_answers(model, Questions(processor, examples, asked, 9), Writing(9), batch_tokens=pairs)
    for example, plain, record in zip(examples, letters, written, strict=True):
        shown = build_conversation(example, media=media, prompt=PROMPT, video_options=asked.video_options)
        [[said]] = minixmd.generate(model, processor, [shown], max_new_tokens=9, temperature=0, seed=0)
        assert (record["text"], record["finished"]) == (said.text, said.finished)
        assert (record["by_letters"], record["logits"]) == (plain["answer"], plain["logits"])
        assert record["id"] == plain["id"] == example.id
    assert len({record["text"] for record in written}) > 1


def test_letters_alone_give_the_results_that_they_gave_before(world, tmp_path):
    manifest = world / "clips" / "manifest.jsonl"
    run(tmp_path, evaluate, world / "ears", manifest)
    found, records = results(tmp_path)
    assert list(found) == ["model", "manifest", "media", "bad", "count", "correct", "accuracy", "interval", "groups",
                           "classes"]  # fmt: skip
    shard = read_jsonl(tmp_path / "shards" / "0000000.jsonl")
    for example, record, scored in zip(read_manifest(manifest, True), records, shard, strict=True):
        assert record == scored | {"question": digest(example), "right": record["answer"] == example.answer}
        assert list(scored) == ["id", "answer", "option", "logits"]


def test_a_prompt_that_leaves_no_room_for_the_answer_is_named(puppet, tmp_path):
    model, processor = minixmd.load(puppet)
    examples = read_manifest(puppet / "manifest.jsonl", allow_outside=True)
    asked = stage(puppet, puppet / "manifest.jsonl").prompt_format
    tokens = len(build_prompt(processor, examples[0], asked))
    processor.max_positions = tokens + 3
    assert "bad" not in write_answers(model, Questions(processor, examples[:1], asked, 3), Writing(3))[0]
    [record] = write_answers(model, Questions(processor, examples[:1], asked, 4), Writing(4))
    said = f"has {tokens} tokens and max_new_tokens is 4, over the model's limit of {processor.max_positions}"
    assert record["bad"] == "too long" and said in record["detail"]


def test_wrong_ways_to_answer_are_refused():
    for given, said in ((dict(answer="words"), "answer must be 'letters' or 'generate', got 'words'"),
                        (dict(max_new_tokens=1), "max_new_tokens must be >= 2, got 1"),
                        (dict(stop=("x",)), r"answer 'letters' does not use stop, got \('x',\)"),
                        (dict(answer="generate", stop=("x", "")), "a stop string must not be empty, got ''")):
        with pytest.raises(ConfigError, match=said):
            stage("m", "d", **given)
    with pytest.raises(ConfigError, match="label 'asked' has no field 'stop'"):
        stage("m", "d", Label, stop=("x",))


# ---- shards ----


@pytest.mark.parametrize("answer", ["letters", "generate"])
def test_a_shard_that_is_missing_is_made_again_alone_and_the_same(puppet, tmp_path, monkeypatch, answer):
    asked = []
    monkeypatch.setattr(distributed, "SHARD", 3)
    monkeypatch.setattr(multiple_choice, "build_prompt",
                        lambda *given, **more: asked.append(given[1].id) or build_prompt(*given, **more))
    given = dict(answer=answer, max_new_tokens=4, batch_tokens=500)
    run(tmp_path, evaluate, puppet, puppet / "manifest.jsonl", **given)
    assert sorted(asked) == [f"clip{i}" for i in range(8)]
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.json*")}
    assert {path.name for path in before} == {"answers.jsonl", "results.json", "0000000.jsonl", "0000003.jsonl",
                                              "0000006.jsonl"}  # fmt: skip
    (tmp_path / "shards" / "0000003.jsonl").unlink()
    asked.clear()
    run(tmp_path, evaluate, puppet, puppet / "manifest.jsonl", **given)
    assert sorted(asked) == ["clip3", "clip4", "clip5"]
    assert before == {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.json*")}


# ---- the stored top of a row ----


@pytest.mark.parametrize("top_k, temperature", [(1, 1.0), (5, 2.0), (64, 0.5)])
def test_the_top_is_that_of_a_full_row_without_the_banned_ids(world, tmp_path, top_k, temperature):
    manifest = world / "clips" / "manifest.jsonl"
    run(tmp_path, label, world / "ears", manifest, cls=Label, top_k=top_k, temperature=temperature)
    model, processor = minixmd.load(world / "ears")
    allowed = torch.tensor([i for i in range(340) if i not in processor.suppressed_ids])
    assert len(allowed) < 340
    for example, record in zip(read_manifest(manifest, True), read_jsonl(tmp_path / "labels.jsonl"), strict=True):
        prompt = processor(build_conversation(example, media="audio", prompt=PROMPT))
        row_V = model.logits(model(pack([prompt])))[-1]
        assert record["logits"] == pytest.approx(row_V[processor.letter_ids(3)].tolist(), abs=1e-4)
        top = record["top"]
        order = allowed[row_V[allowed].argsort(descending=True)]
        assert top["ids"] == order[:top_k].tolist() and top["temperature"] == temperature
        assert top["logits"] == pytest.approx(row_V[order[:top_k]].tolist(), abs=1e-4)
        share_K = (row_V[allowed] / temperature).double().softmax(0)[torch.isin(allowed, order[:top_k])].sort()[0]
        stored_K = torch.tensor([z / temperature - top["logsumexp"] for z in top["logits"]]).double().exp().sort()[0]
        assert torch.allclose(stored_K, share_K, rtol=1e-3)


def test_no_top_is_stored_unless_asked_for(world, tmp_path):
    run(tmp_path, label, world / "ears", world / "clips" / "manifest.jsonl", cls=Label)
    assert all(record.keys() == {"id", "answer", "option", "logits"}
               for record in read_jsonl(tmp_path / "labels.jsonl"))


# ---- two models compared ----


def answers(*right, **more):
    """Records of clips "0", "1", …: right or wrong, or None for a bad clip."""
    return [dict(id=str(i), question=f"q{i}") | more | ({"bad": "missing"} if hit is None else {"right": hit})
            for i, hit in enumerate(right)]


def test_the_four_counts_and_the_difference_by_hand():
    a = answers(True, True, True, False, False, True, None, True)
    b = answers(True, False, False, True, False, True, True, None)
    found = compare(a, b[::-1])  # any order
    assert found.pop("interval") == list(paired_interval(2, 2, 1, 1))
    assert found == dict(count=6, left_out=2, both=2, only_a=2, only_b=1, neither=1, difference=1 / 6)
    turned = compare(b, a)
    assert (turned["only_a"], turned["only_b"], turned["difference"]) == (1, 2, -1 / 6)
    assert turned["interval"] == pytest.approx([-x for x in paired_interval(2, 2, 1, 1)][::-1])


@pytest.mark.parametrize("counts, low, high", [  # Newcombe 1998, table III, method 10
    ((36, 12, 2, 0), 0.0569, 0.3404), ((20, 12, 2, 16), 0.0562, 0.3292), ((18, 12, 2, 18), 0.0562, 0.3290),
    ((36, 14, 0, 0), 0.1528, 0.4167), ((35, 14, 0, 1), 0.1461, 0.4175), ((18, 14, 0, 18), 0.1441, 0.3963),
    ((2, 97, 1, 0), 0.8721, 0.9854), ((1, 97, 1, 1), 0.8736, 0.9850), ((0, 30, 0, 0), 0.8395, 1.0),
    ((54, 0, 0, 0), -0.0664, 0.0664), ((30, 0, 0, 24), -0.0358, 0.0358),
    ((59, 6, 16, 80), -0.1186, -0.0046),  # Fagerland, Lydersen, Laake 2017, chapter 8
])  # fmt: skip
def test_the_interval_is_the_published_one(counts, low, high):
    assert paired_interval(*counts) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_at_its_ends():
    assert paired_interval(0, 0, 0, 0) == (-1, 1)
    low, high = paired_interval(0, 50, 0, 0)
    assert 0.85 < low < 0.95 and high == pytest.approx(1)
    assert paired_interval(0, 0, 50, 0) == pytest.approx((-high, -low))
    low, high = paired_interval(500, 0, 0, 500)  # two models that answer alike
    assert -0.01 < low < 0 < high < 0.01
    for counts in ((50, 0, 0, 0), (0, 0, 0, 50), (25, 0, 0, 25), (0, 25, 25, 0)):
        low, high = paired_interval(*counts)
        assert -1 <= low <= 0 <= high <= 1 and low == pytest.approx(-high)
    assert paired_interval(*(100 * x for x in (5, 2, 1, 2)))[1] - 0.1 < (paired_interval(5, 2, 1, 2)[1] - 0.1) / 8


def test_the_interval_covers_a_bootstrap_of_the_clips():
    draw = random.Random(0)
    a, b = [draw.random() < 0.8 for _ in range(600)], [draw.random() < 0.7 for _ in range(600)]
    b = [x if draw.random() < 0.5 else y for x, y in zip(a, b, strict=True)]  # paired
    found = compare(answers(*a), answers(*b))
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    means = sorted(sum(draw.choices(gaps, k=600)) / 600 for _ in range(2000))
    assert found["interval"] == pytest.approx([means[50], means[1949]], abs=0.004)
    alone = [wilson(sum(hits), 600) for hits in (a, b)]
    assert found["interval"][1] - found["interval"][0] < 0.9 * sum(high - low for low, high in alone)


def test_bad_clips_alone_leave_nothing_to_compare():
    found = compare(answers(None, True), answers(True, None))
    assert (found["count"], found["left_out"], found["difference"], found["interval"]) == (0, 2, None, [-1, 1])


@pytest.mark.parametrize("a, b, said", [
    (answers(True, True, True), answers(True, True), "clip '2': only the first of the two has it"),
    (answers(True), answers(True, None, True), "clip '1': only the second of the two has it"),
    (answers(None, question="p"), answers(True, question="q"), "clip '0': the two are different questions"),
    ([dict(id="x", answer=0)], [dict(id="x", answer=0)], "clip 'x': its record does not say what was asked"),
])
def test_records_that_do_not_belong_together_are_refused(a, b, said):
    with pytest.raises(ValueError, match=said):
        compare(a, b)


@pytest.mark.parametrize("change", [
    dict(question="Which one?"), dict(options=["dog", "cat", "fox"]), dict(options=["cat", "dog", "owl"]),
    dict(answer=0), dict(id="other"),
])
def test_models_evaluated_on_different_questions_are_not_compared(world, tmp_path, change):
    lines = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()][:4]
    for line in lines:
        line["audio"] = str(world / "clips" / line["audio"])
    found = {}
    for name in ("first", "second", "again"):
        manifest = tmp_path / f"{name}.jsonl"
        changed = [{**line, **(change if name == "second" and i == 2 else {"source": name})}
                   for i, line in enumerate(lines)]
        manifest.write_text("".join(json.dumps(line) + "\n" for line in changed))
        model = world / "ears" if name == "first" else write_model(tmp_path / name, "audio", seed=5)
        run(tmp_path / name, evaluate, model, manifest)
        found[name] = read_jsonl(tmp_path / name / "answers.jsonl")
    assert compare(found["first"], found["again"])["count"] == 4
    for pair in (("first", "second"), ("second", "again")):
        with pytest.raises(ValueError, match="clip '(clip2|other)': (the two are different questions|only the fi)"):
            compare(*(found[name] for name in pair))
