"""tools/prepare_{avqa,mmar,mmau,music_avqa}.py: files of questions and clips to manifests, whatever is in them."""
import itertools
import json
import random
import shutil
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import soundfile
from media_files import grey_frames, sine, write_mp4, write_wav

from minixmd.inputs.examples import read_manifest
from minixmd.tasks.benchmarks import benchmark_of

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"  # real records
sys.path.insert(0, str(ROOT / "tools"))

import prepare_avqa  # noqa: E402
import prepare_mmar  # noqa: E402
import prepare_mmau  # noqa: E402
import prepare_music_avqa  # noqa: E402
from prepare.questions import MAX_TEXT  # noqa: E402

TOOLS = {"avqa": prepare_avqa, "mmar": prepare_mmar, "mmau": prepare_mmau, "music_avqa": prepare_music_avqa}
FILES = {"avqa": "train_qa.json", "mmar": "MMAR-meta.json", "mmau": "mmau-test-mini.json",
         "music_avqa": "avqa-test.json"}
SPLITS = {"avqa": "train", "mmar": "test", "mmau": "test-mini", "music_avqa": "test"}
REAL = {name: json.loads((DATA / file).read_text()) for name, file in FILES.items()}


def put(folder, name, records, file=None):
    """Write the file that a tool reads; its path."""
    path = folder / (file or FILES[name])
    path.write_text(json.dumps(records))
    return path


def run(folder, name, *more, files=None, train=None):
    """The tool on files of the folder; clips are not looked for unless the folder has some."""
    opened = folder / "clips"
    if not opened.exists():
        more = *more, "--no-open"
    files = files or [folder / FILES[name]]
    if name == "music_avqa":
        more = (*more, "--train", str(train or files[0]))
    return TOOLS[name].main([*map(str, files), str(opened), str(folder / "out"), "--workers", "2", *more])


def manifest(folder, name):
    return read_manifest(folder / "out" / f"{SPLITS[name]}.jsonl")


def drops(folder):
    """[(record number, reason)]."""
    lines = (folder / "out" / "drops.jsonl").read_text().splitlines()
    return [(line["record"], line["reason"]) for line in map(json.loads, lines)]


def summary(folder):
    return json.loads((folder / "out" / "summary.json").read_text())


def test_avqa_asks_about_the_audio_and_keeps_the_wording_for_the_video(tmp_path):
    put(tmp_path, "avqa", REAL["avqa"])
    assert run(tmp_path, "avqa") == 0
    happened, many, why = manifest(tmp_path, "avqa")
    assert (happened.id, happened.question, happened.source) == (
        "avqa_183", "What happened in the audio?", "avqa/train")
    assert happened.options == ("motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car")
    assert (happened.answer, many.options, many.answer, why.answer) == (1, ("3", "One", "4", "2"), 3, 0)
    assert why.question == "Why do the people in the audio scream?"
    assert why.meta == {"video_question": "Why do the people in the video scream?", "relation": "Both", "type": "Why",
                        "group": "Why", "youtube": "0AEJTlHIhz0", "start_s": 358}
    assert happened.video == happened.audio == str(tmp_path / "clips/-HG3Omg_89c_000030.mp4")
    assert drops(tmp_path) == [] and summary(tmp_path)["groups"] == {"train": {"Happening": 1, "Which": 1, "Why": 1}}


def test_avqa_reads_r1_aqa_lines_and_counts_those_that_are_none(tmp_path):
    lines = [json.dumps({**record, "dataset_name": "AVQA", "audio_path": f"wavs/{record['video_name']}.wav"})
             for record in REAL["avqa"]]
    own = {"id": "mine-1", "audio_path": "own/dog.flac", "question_text": "Who?", "multi_choice": ["a", "b"],
           "answer": 0}
    other = {**own, "id": 2, "audio_path": "other/dog.flac"}
    (tmp_path / "train.jsonl").write_text("\n".join(  # as some editors write it: with a byte order mark
        ["\ufeff" + lines[0], lines[1], lines[2][:40], "", json.dumps(own), "[1]", json.dumps(other)]))
    for sound in ("clips/wavs/-HG3Omg_89c_000030.wav", "clips/06GyG4-wONQ_6.wav", "clips/own/dog.flac"):
        (tmp_path / sound).parent.mkdir(parents=True, exist_ok=True)
        write_wav(tmp_path / sound, sine(440, 1))
    assert run(tmp_path, "avqa", files=[tmp_path / "train.jsonl"]) == 0
    found = [(e.id, e.video, Path(e.audio).relative_to(tmp_path / "clips")) for e in
             manifest(tmp_path, "avqa")]
    assert found == [("avqa_183", None, Path("wavs/-HG3Omg_89c_000030.wav")),
                     ("avqa_1139", None, Path("06GyG4-wONQ_6.wav")), ("avqa_mine-1", None, Path("own/dog.flac"))]
    assert sorted(drops(tmp_path)) == [(3, "not JSON"), (5, "not an object"), (6, "another clip has its name")]


AVQA_OPTIONS = [  # multi_choice, answer, (options, answer) as kept or the reason of a drop, oddities
    (["a", "b", "c", "d"], 2, (("a", "b", "c", "d"), 2), []),
    (["a", None, "c"], 2, (("a", "c"), 1), ["option missing"]),
    ([3, "One", 4.5, True], 0, (("3", "One", "4.5", "True"), 0), ["option not a string"]),
    (["honk ", "honk", " b  c "], 1, (("honk", "b c"), 0), ["option repeated"]),
    (["Rowing", "x", "rowing"], 2, (("Rowing", "x"), 0), ["option repeated"]),
    (["x", "", {"a": 1}, ["b"], "y", float("nan")], 4, (("x", "y"), 1), ["option missing"]),
    (["b", "b", None, 4], 3, (("b", "4"), 1), ["option missing", "option not a string", "option repeated"]),
    ([str(i) for i in range(12)], 11, (tuple(str(i) for i in range(12)), 11), []),
    (["a", "a"], 0, "too few options", []),
    (["a", None], 0, "too few options", []),
    ([str(i) for i in range(27)], 0, "too many options", []),
    ([None, "b", "c"], 0, "right option missing", []),
    ([], 0, "no options", []),
    (None, 0, "no options", []),
    ("abcd", 0, "no options", []),
    ({"0": "a", "1": "b"}, 0, "no options", []),
    (["a", "b"], 2, "no answer", []),
    (["a", "b"], -1, "no answer", []),
    (["a", "b"], True, "no answer", []),
    (["a", "b"], "a", "no answer", []),
    (["a", "b"], None, "no answer", []),
    (["a", "b" * MAX_TEXT], 0, "too long to ask", []),
]


def test_avqa_options_are_mended_where_that_can_be_done(tmp_path):
    records, kept, reasons, oddities = [], {}, [], Counter()
    for number, (choices, answer, result, odd) in enumerate(AVQA_OPTIONS, 1):
        records.append({**REAL["avqa"][0], "id": number, "multi_choice": choices, "answer": answer})
        oddities.update(odd)
        if isinstance(result, str):
            reasons.append((number, result))
        else:
            kept[f"avqa_{number}"] = result
    put(tmp_path, "avqa", records)
    assert run(tmp_path, "avqa") == 0
    assert {e.id: (e.options, e.answer) for e in manifest(tmp_path, "avqa")} == kept
    assert drops(tmp_path) == reasons and summary(tmp_path)["odd"] == oddities


def test_mmau_keeps_what_scoring_needs_and_the_hash_of_the_file(tmp_path, capsys):
    path = put(tmp_path, "mmau", REAL["mmau"])
    assert run(tmp_path, "mmau") == 0
    sha, examples = sha256(path.read_bytes()).hexdigest(), manifest(tmp_path, "mmau")
    assert [e.options[e.answer] for e in examples] == [" ".join(r["answer"].split()) for r in REAL["mmau"]]
    assert [e.id for e in examples] == [r["id"] for r in REAL["mmau"]]
    assert examples[0].meta == {
        "task": "sound", "difficulty": "medium", "sub_category": "Acoustic Source Inference", "dataset": "AudioSet",
        "category": "Reasoning", "version": f"sha256 {sha[:12]}", "sha256": sha, "group": "sound"}
    assert REAL["mmau"][1]["category"] == ["Reasoning"] and examples[1].meta["category"] == "Reasoning"
    assert examples[4].options == ("thirteen", "twenty", "thirteen", "five")  # as published, with the repeated one
    assert all(e.video is None and e.source == "mmau/test-mini" for e in examples)
    assert examples[0].audio.endswith(f"clips/test-mini-audios/{examples[0].id}.wav")
    assert summary(tmp_path)["sha256"] == {"mmau-test-mini.json": sha}
    assert "not a version that we know" in capsys.readouterr().out


def test_mmau_knows_a_version_by_its_hash(tmp_path, monkeypatch):
    sha = sha256(put(tmp_path, "mmau", REAL["mmau"]).read_bytes()).hexdigest()
    monkeypatch.setitem(prepare_mmau.KNOWN_VERSIONS, sha, "v of a day")
    assert run(tmp_path, "mmau") == 0
    assert {e.meta["version"] for e in manifest(tmp_path, "mmau")} == {"v of a day"}


MMAU_REFUSALS = [
    ({"answer": "no such option"}, "answer not among the options"),
    ({"answer": 0}, "no answer"),
    ({"choices": None}, "no options"),
    ({"choices": ["a"], "answer": "a"}, "too few options"),
    ({"question": " "}, "no question"),
    ({"id": True}, "no id"),
    ({"task": None}, "no task"),
    ({"category": ["Reasoning", "Perception"]}, "no category"),
    ({"audio_id": None}, "no audio_id"),
    ({"audio_id": "../../secret.wav"}, "no name of a file"),
    ({"audio_id": "/etc/passwd"}, "no name of a file"),
]


def test_mmau_records_that_cannot_be_asked_are_counted(tmp_path):
    good = REAL["mmau"]
    put(tmp_path, "mmau", [*({**good[0], **change} for change, _ in MMAU_REFUSALS), *good])
    assert run(tmp_path, "mmau") == 0
    assert drops(tmp_path) == [(number, reason) for number, (_, reason) in enumerate(MMAU_REFUSALS, 1)]
    assert len(manifest(tmp_path, "mmau")) == len(good)


def test_mmar_keeps_what_scoring_needs_and_the_hash_of_the_file(tmp_path, capsys):
    path = put(tmp_path, "mmar", [{**record, "thinking": "secret", "rubric": ["secret"]} for record in REAL["mmar"]])
    sha = sha256(path.read_bytes()).hexdigest()
    assert run(tmp_path, "mmar") == 0
    examples = manifest(tmp_path, "mmar")
    assert [e.id for e in examples] == [r["id"] for r in REAL["mmar"]] and drops(tmp_path) == []
    assert [(e.question, list(e.options), e.options[e.answer]) for e in examples] == [
        (r["question"], r["choices"], r["answer"]) for r in REAL["mmar"]]
    assert examples[1].meta == {
        "modality": "music", "category": "Cultural Layer", "sub_category": "Professional Knowledge and Reasoning",
        "language": None, "source": "youtube", "url": REAL["mmar"][1]["url"], "timestamp": "00:01:32,00:02:02",
        "version": f"sha256 {sha[:12]}", "sha256": sha, "group": "music"}
    assert [e.meta["language"] for e in examples[7:9]] == ["en|ko", "zh"]
    named = examples[8]  # not by its id
    assert named.id == "BV1kx411m7UN_2-45_3-15" and named.audio.endswith("/audio/BV1kx411m7UN_00-02-45_00-03-15.wav")
    assert all(e.video is None and e.label is None and e.source == "mmar/test" for e in examples)
    assert "secret" not in (tmp_path / "out" / "test.jsonl").read_text(), "the reasoning is not for training"
    assert benchmark_of(examples) == "mmar"
    assert f"sha256 {sha}; accuracies compare on the same file only" in capsys.readouterr().out
    assert summary(tmp_path)["sha256"] == {"MMAR-meta.json": sha}
    lines = tmp_path / "MMAR-meta.jsonl"  # as it was published later
    lines.write_text("".join(json.dumps(record) + "\n" for record in REAL["mmar"]))
    assert run(tmp_path, "mmar", files=[lines]) == 0
    assert [(e.id, e.options, e.answer) for e in manifest(tmp_path, "mmar")] == [
        (e.id, e.options, e.answer) for e in examples]


MMAR_REFUSALS = [
    ({"answer": "no such option"}, "answer not among the options"),
    ({"answer": None}, "no answer"),
    ({"choices": []}, "no options"),
    ({"choices": ["a"], "answer": "a"}, "too few options"),
    ({"question": None}, "no question"),
    ({"id": ""}, "no id"),
    ({"modality": ["music"]}, "no modality"),
    ({"category": None}, "no category"),
    ({"sub-category": " "}, "no sub-category"),
    ({"audio_path": None}, "no audio_path"),
    ({"audio_path": "../../secret.wav"}, "no name of a file"),
]


def test_mmar_records_that_cannot_be_asked_are_counted(tmp_path):
    good = REAL["mmar"]
    put(tmp_path, "mmar", [*({**good[0], **change} for change, _ in MMAR_REFUSALS), *good])
    assert run(tmp_path, "mmar") == 0
    assert drops(tmp_path) == [(number, reason) for number, (_, reason) in enumerate(MMAR_REFUSALS, 1)]
    assert len(manifest(tmp_path, "mmar")) == len(good)


def test_mmars_sounds_are_opened_in_the_folder_audio_or_beside_and_may_be_long(tmp_path):
    one, two, three = REAL["mmar"][:3]
    (tmp_path / "clips" / "audio").mkdir(parents=True)
    write_wav(tmp_path / "clips" / "audio" / Path(one["audio_path"]).name, sine(440, 31))
    write_wav(tmp_path / "clips" / Path(two["audio_path"]).name, sine(440, 1))
    put(tmp_path, "mmar", [one, two, three])
    assert run(tmp_path, "mmar") == 0
    assert [Path(e.audio).relative_to(tmp_path / "clips") for e in manifest(tmp_path, "mmar")] == [
        Path(one["audio_path"]), Path(Path(two["audio_path"]).name)]
    assert drops(tmp_path) == [(3, "missing")] and summary(tmp_path)["longer_than_30_s"] == 1


def with_others(records):
    """MUSIC-AVQA's records, and each once more with another answer: types with one answer alone have no question."""
    return [record | {"anser": answer} for record in records for answer in (record["anser"], "other")]


def music(id, kind, question, answer, values=()):
    return {"video_id": f"{id:08d}", "question_id": id, "type": json.dumps(kind), "question_content": question,
            "templ_values": json.dumps(values), "question_deleted": 0, "anser": answer}


def test_music_templates_are_filled_from_left_to_right(tmp_path):
    train = put(tmp_path, "music_avqa", with_others(REAL["music_avqa"]), "train.json")
    put(tmp_path, "music_avqa", REAL["music_avqa"])
    assert run(tmp_path, "music_avqa", train=train) == 0
    asked = {e.id: e for e in manifest(tmp_path, "music_avqa")}
    assert len(asked) == 12 and drops(tmp_path) == []
    assert {id: asked[f"music_avqa_{id}"].question for id in (12, 35, 95, 160, 2945, 4829)} == {
        12: "How many musical instruments were heard throughout the video?",
        35: "How many sounding violin in the video?",  # published with a full-width question mark
        95: "Is the instrument on the right more rhythmic than the instrument on the left?",
        160: "Is the acoustic_guitar in the video always playing?",
        2945: "Is the clarinet louder than the acoustic_guitar?",
        4829: "What kind of instrument is the rightest instrument?"}  # with a trailing blank
    ten = asked["music_avqa_383"]
    assert ten.options[ten.answer] == "more than ten" and ten.options == ("more than ten", "other", "three")
    assert ten.meta == {"modality": "Audio-Visual", "type": "Counting", "group": "Audio-Visual Counting",
                        "clip": "00000900"}
    assert ten.video.endswith("clips/00000900.mp4") and ten.source == "music_avqa/test"


def test_music_options_are_the_training_files_answers_to_the_type(tmp_path):
    counting, location = ("Audio", "Counting"), ("Audio-Visual", "Location")
    names = [f"instrument {i:02d}" for i in range(25)]
    train = [music(1, counting, "How many?", "two"), music(2, counting, "Is there a sound?", "no"),
             *(music(3, location, "What is it?", name) for name in names), music(4, location, "Is it?", "no"),
             music(5, location, "Is it?", "yes"), {**music(6, counting, "How many?", "nine"), "question_deleted": 1},
             music(7, ("Visual", "Counting"), "How many?", "ten"), {"anser": 3}, "x"]
    test = [music(1, counting, "How many?", "two"), music(2, location, "What is it?", names[3]),
            music(3, location, "Is it?", "no"), music(4, counting, "How many?", "ten"),
            music(5, ("Visual", "Counting"), "How many?", "ten"), music(1, counting, "How many?", "no")]
    put(tmp_path, "music_avqa", test)
    assert run(tmp_path, "music_avqa", train=put(tmp_path, "music_avqa", train, "train.json")) == 0
    count, what, polar = manifest(tmp_path, "music_avqa")
    assert (count.options, count.answer) == (("no", "two"), 1)  # also no, though this one asks how many
    assert (what.options, what.answer) == (tuple(names), 3)  # 27 in all: more than there are letters
    assert (polar.options, polar.answer) == (("no", "yes"), 0)
    assert sorted(drops(tmp_path)) == [(4, "answer not in the training file"), (5, "too few options"),
                                       (6, "repeated id")]
    assert summary(tmp_path)["answers"]["Audio Counting"] == ["no", "two"]


def test_music_offers_the_most_frequent_answers_where_there_are_too_many():
    answers = Counter({f"{i:02d}": 40 - i for i in range(30)})
    assert prepare_music_avqa.choose_options(answers, "What?") == [f"{i:02d}" for i in range(26)]


MUSIC_REFUSALS = [
    ({"templ_values": '["violin", "left"]'}, "values do not fit the template"),
    ({"templ_values": "[]"}, "values do not fit the template"),
    ({"templ_values": "[1]"}, "no templ_values"),
    ({"templ_values": "violin"}, "no templ_values"),
    ({"templ_values": ["violin"]}, "no templ_values"),
    ({"type": '["Audio"]'}, "no type"),
    ({"type": '["Smell", "Counting"]'}, "no type"),
    ({"type": '["Audio", "Colour"]'}, "no type"),
    ({"type": "Audio Counting"}, "no type"),
    ({"question_deleted": 1}, "deleted"),
    ({"anser": None}, "no anser"),
    ({"question_id": None}, "no question_id"),
    ({"question_id": True}, "no question_id"),
    ({"question_id": "9" * 65}, "no question_id"),
    ({"video_id": "../../secret"}, "no name of a file"),
    ({"video_id": "a\u0000b"}, "no name of a file"),
    ({"video_id": "\u00e4" * 101}, "no name of a file"),
    ({"video_id": ".."}, "no name of a file"),
    ({"video_id": "a\ud800b"}, "no video_id"),
]


def test_music_records_that_cannot_be_asked_are_counted(tmp_path):
    good = REAL["music_avqa"][2]
    others = [music(i, ("Audio-Visual", "Counting"), "How many?", answer) for i, answer in enumerate(("two", "three"))]
    put(tmp_path, "music_avqa", [*({**good, **change} for change, _ in MUSIC_REFUSALS), *others])
    assert run(tmp_path, "music_avqa", train=put(tmp_path, "music_avqa", others, "train.json")) == 0
    assert drops(tmp_path) == [(number, reason) for number, (_, reason) in enumerate(MUSIC_REFUSALS, 1)]
    assert len(manifest(tmp_path, "music_avqa")) == 2


def test_questions_share_their_clip_which_is_opened_once_and_may_last_a_minute(tmp_path, monkeypatch, capsys):
    (tmp_path / "clips").mkdir()
    write_mp4(tmp_path / "clips" / "00000001.mp4", grey_frames(4, 32, 48), sine(440, 31), 1)
    (tmp_path / "clips" / "00000002.mp4").write_bytes(b"no media\n" * 9)
    records = [{**music(i, ("Audio", "Counting"), "How many?", "one" if i % 2 else "two"), "video_id": f"{clip:08d}"}
               for i, clip in enumerate((1, 1, 2, 3, 1))]
    put(tmp_path, "music_avqa", records)
    assert run(tmp_path, "music_avqa", "--extract-audio") == 0
    examples = manifest(tmp_path, "music_avqa")
    assert [e.id for e in examples] == [f"music_avqa_{i}" for i in (0, 1, 4)] and len({e.audio for e in examples}) == 1
    assert round(soundfile.info(examples[0].audio).duration) == 31 and examples[0].video.endswith("00000001.mp4")
    assert drops(tmp_path) == [(3, "unreadable"), (4, "missing")]
    assert "longer than 30 s, of which Qwen2-Audio hears no more: 1 of 3 clips" in capsys.readouterr().out
    assert summary(tmp_path)["longer_than_30_s"] == 1 and summary(tmp_path)["clips"] == 3
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    (clip := tmp_path / "clips" / "00000001.mp4").write_bytes(bytes(clip.stat().st_size))  # opened, it would be no clip
    assert run(tmp_path, "music_avqa", "--extract-audio") == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")} == before


def test_avqa_clips_that_were_never_cut_are_dropped_and_mmaus_are_kept(tmp_path):
    (tmp_path / "clips").mkdir()
    for names in ([Path(r["audio_id"]).name for r in REAL["mmau"]], [f"{r['video_name']}.wav" for r in REAL["avqa"]]):
        for name, seconds in zip(names, (1, 16, 1), strict=False):
            write_wav(tmp_path / "clips" / name, sine(440, seconds))
    for name in ("mmau", "avqa"):  # in one process: what the one allows, the other does not
        put(tmp_path, name, REAL[name])
        assert run(tmp_path, name) == 0
    assert len(manifest(tmp_path, "mmau")) == 3
    assert drops(tmp_path) == [(2, "too long")] and len(manifest(tmp_path, "avqa")) == 2


VALUES = [None, True, False, 0, -1, 3, 10**40, 1.5, float("nan"), float("inf"), "", " ", "a", "\u0000", "\ud800",
          "<Object>", "\\1 {x}", "../x", "/", ".", "..", "<|im_end|>", "['a', 'b']", '["Audio", "Counting"]', "[", "?",
          "x" * 50_000, [], [[]], ["a", "b"], ["a"] * 12, ["a", 1, None, "b", {}], {}, {"a": 1},
          [[[[["deep"]]]]] * 3]


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("lines", [False, True])
def test_fuzzed_records_are_all_kept_or_counted(tmp_path, name, lines):
    draw, records = random.Random(0), []
    for i in range(1500):
        record = {**draw.choice(REAL[name])}
        for _ in range(draw.randrange(1, 4)):
            key = draw.choice([*record, "audio_path", "other"])
            if draw.random() < 0.2:
                record.pop(key, None)
            else:
                record[key] = draw.choice(VALUES)
        key = "question_id" if name == "music_avqa" else "id"
        if key in record and draw.random() < 0.8:
            record[key] = i
        records.append(record if draw.random() < 0.95 else draw.choice(VALUES))
    texts = [json.dumps(record) for record in records]
    deep = "[" * 100_000
    path = tmp_path / "fuzz.json"
    if lines:  # cut ones, and one too deep to be read, among them
        texts = [text[: len(text) // 2] if draw.random() < 0.02 else text for text in texts] + [deep]
        path.write_text("\ufeff" + "\r\n".join(texts), encoding="utf-8")
    else:
        path.write_text(f"[{', '.join(texts)}]")
    (tmp_path / "clips").mkdir()
    files = set()
    for record in REAL[name]:
        sound = record.get("audio_id") or record.get("audio_path")
        files.add(Path(sound or f"{record.get('video_name') or record.get('video_id')}.wav").name)
    shutil.copy(write_wav(tmp_path / "a.wav", sine(440, 1)), tmp_path / "clips" / "b.wav")
    for file in files:
        shutil.copy(tmp_path / "a.wav", tmp_path / "clips" / file)
    train = put(tmp_path, "music_avqa", with_others(REAL["music_avqa"]), "train.json")
    assert run(tmp_path, name, files=[path], train=train) == 0
    examples, dropped = read_manifest(tmp_path / "out" / "fuzz.jsonl"), drops(tmp_path)
    assert len(examples) + len(dropped) == len(texts) and len({number for number, _ in dropped}) == len(dropped)
    assert len(examples) > 100 and len(set(reason for _, reason in dropped)) > 8
    told = summary(tmp_path)["dropped"]
    assert Counter(reason for _, reason in dropped) == {reason: sum(told[reason].values()) for reason in told}
    assert all(e.options[e.answer] and e.question.strip() for e in examples)


FILE_REFUSALS = [  # what the file of questions holds, what stderr says
    (b"", "0 records, and none has"),
    (b"[]", "0 records, and none has"),
    (b"[{]", "not JSON: Expecting property name"),
    (b"[" * 100_000, "not JSON: "),
    (b'[{"question": "a"}, 3]', "2 records, and none has"),
    (b'{"a": 1}', "1 records, and none has"),
    (b"id,question\n1,what\n", "2 records, and none has"),
    ("[]".encode("utf-16"), "not JSON: 'utf-8' codec can't decode"),
    ("a folder", "Is a directory"),
    (None, "No such file or directory"),
]


@pytest.mark.parametrize("name", TOOLS)
def test_wrong_files_are_one_clear_line(tmp_path, capsys, name):
    for i, (content, said) in enumerate(FILE_REFUSALS):
        folder = tmp_path / str(i)
        folder.mkdir()
        if isinstance(content, bytes):
            (folder / FILES[name]).write_bytes(content)
        elif content is not None:
            (folder / FILES[name]).mkdir()
        assert run(folder, name, train=DATA / FILES["music_avqa"]) == 1
        err = capsys.readouterr().err.strip()
        assert err.startswith(f"prepare_{name}: ") and said in err and "\n" not in err, err
        assert not (folder / "out" / f"{SPLITS[name]}.jsonl").exists()


def test_another_data_sets_file_is_said_to_be_one(tmp_path, capsys):
    for name, other in itertools.permutations(TOOLS, 2):
        path = put(tmp_path, name, REAL[other])
        assert run(tmp_path, name, files=[path], train=DATA / FILES["music_avqa"]) == 1
        assert f"{path}: {len(REAL[other])} records, and none has" in capsys.readouterr().err


def test_nothing_is_written_over_and_nothing_left_is_an_error(tmp_path, capsys):
    one, two = put(tmp_path, "avqa", REAL["avqa"]), put(tmp_path, "avqa", REAL["avqa"], "train.json")
    assert run(tmp_path, "avqa", files=[one, two]) == 1  # both would be train.jsonl
    (tmp_path / "out").mkdir(exist_ok=True)
    inside = put(tmp_path / "out", "avqa", REAL["avqa"], "mine.jsonl")
    assert run(tmp_path, "avqa", files=[inside]) == 1 and json.loads(inside.read_text()) == REAL["avqa"]
    assert run(tmp_path, "avqa", files=[put(tmp_path, "avqa", REAL["avqa"], "drops.json")]) == 1
    assert capsys.readouterr().err.count("its manifest, would be written over something else") == 3
    (tmp_path / "clips").mkdir()
    assert run(tmp_path, "avqa") == 1
    assert "no clip is left; is" in capsys.readouterr().err and Counter(drops(tmp_path)).total() == 3
    (tmp_path / "train.json").write_text("[{}]")
    assert run(tmp_path, "music_avqa", files=[DATA / FILES["music_avqa"]], train=tmp_path / "train.json") == 1
    assert "train.json: no record has type, anser; is it MUSIC-AVQA's training file?" in capsys.readouterr().err
