"""tools/prepare_*.py: official csv files and a folder of clips to manifests, whatever the files are like."""
import contextlib
import csv
import io
import json
import os
import resource
import shutil
import sys
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import soundfile
from media_files import grey_frames, sine, write_mp4, write_wav

from minixmd.inputs.clips import Cache, load_clip
from minixmd.inputs.examples import manifest_text, read_manifest
from minixmd.inputs.media import read_audio
from minixmd.inputs.tokenizer import VIDEO_DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import prepare_audioset  # noqa: E402
import prepare_vggsound  # noqa: E402
from prepare import clip_checks  # noqa: E402
from prepare.option_sampling import OptionSampler, uniforms  # noqa: E402

STAT = ("dog barking,60,animals\r\nrapping,30,music\r\n\"bee, wasp, etc. buzzing\",20,animals\r\n"
        "air horn,10,vehicle\r\nthunder,15,nature")  # as published: CRLF, and no end to the last line
TEST = ("-ab_defghij_000030.mp4,dog barking\r\nbbbbbbbbbbb_000000.mp4,rapping\r\n"
        "ccccccccccc_000007.mp4,\"bee, wasp, etc. buzzing\"\r\nddddddddddd_000310.mp4,air horn\r\n")


def youtube(i):
    return f"-{i:08d}_z"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The bytes of 1 s: 4 frames and a tone."""
    return write_mp4(tmp_path_factory.mktemp("clip") / "a.mp4", grey_frames(4, 32, 48), sine(440, 1), 4).read_bytes()


@pytest.fixture
def vgg(tmp_path):
    """Folders csv, clips and out; csv holds small official files."""
    (tmp_path / "csv").mkdir()
    (tmp_path / "clips").mkdir()
    (tmp_path / "csv" / "stat.csv").write_bytes(STAT.encode())
    (tmp_path / "csv" / "test.csv").write_bytes(TEST.encode())
    train = [(f"{youtube(i)}_{i:06d}.mp4", ("dog barking", "rapping", "thunder")[i % 3]) for i in range(30)]
    (tmp_path / "csv" / "train.csv").write_text("".join(f"{name},{label}\n" for name, label in train))
    return tmp_path


def vggsound(folder, *more, options=3):
    return prepare_vggsound.main([*(str(folder / name) for name in ("csv", "clips", "out")), "--options", str(options),
                                  "--workers", "2", *(more if "--classes" in more else ("--all-classes", *more))])


def drops(folder):
    """{id: reason}."""
    lines = (folder / "out" / "drops.jsonl").read_text().splitlines()
    return {(line := json.loads(text))["id"]: line["reason"] for text in lines}


def manifest(folder, name):
    return read_manifest(folder / "out" / f"{name}.jsonl")


def contents(folder):
    return {p.name: p.read_bytes() for p in (folder / "out").glob("*.json*")}


def test_official_rows_become_three_manifests_that_read_back(vgg, capsys):
    assert vggsound(vgg, "--no-open", "--analysis", "4") == 0
    splits = {name: manifest(vgg, name) for name in ("train", "analysis", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 18, "analysis": 12, "test": 4}
    assert set(Counter(e.label for e in splits["analysis"]).values()) == {4}  # so many of every class of train
    assert len({e.id for split in splits.values() for e in split}) == 34
    first, _, bee, _ = splits["test"]
    assert (first.id, first.label, first.source) == ("-ab_defghij_000030", "dog barking", "vggsound/test")
    assert first.meta == {"group": "animals", "youtube": "-ab_defghij", "start_s": 30}
    assert first.audio == first.video and Path(first.video).resolve() == vgg / "clips" / "-ab_defghij_000030.mp4"
    assert bee.label == "bee, wasp, etc. buzzing" and bee.options[bee.answer] == bee.label
    assert all(e.source == "vggsound/train" for e in splits["analysis"])  # drawn from it
    text = (vgg / "out" / "test.jsonl").read_text()
    paths = [json.loads(line)["audio"] for line in text.splitlines()]
    near = [type(e)(**{**vars(e), "audio": path, "video": path}) for e, path in zip(splits["test"], paths, strict=True)]
    assert text == manifest_text(near)
    out = capsys.readouterr().out
    assert "34 rows (test 4, train 30), 5 of 5 classes" in out
    table = [line.split() for line in out.splitlines() if line.startswith(("train", "analysis", "test"))]
    assert table == [["train", "18", "149,460", "-149,442"], ["analysis", "12", "14,300", "-14,288"],
                     ["test", "4", "14,202", "-14,198"]]


def test_classes_and_bad_clips_are_left_out_by_lists_and_counted(vgg, capsys):
    (vgg / "classes.txt").write_bytes(b"# ours\r\nrapping\r\ndog barking\r\nthunder\r\n")
    (vgg / "short.txt").write_text(f"-ab_defghij_30000_40000\n{youtube(3)}_000003.mp4\n{youtube(0)}_0_10000.mp4\n")
    with (vgg / "csv" / "train.csv").open("a") as file:
        file.write(f"{youtube(1)}_000001.mp4,rapping\nbbbbbbbbbbb_000000.mp4,rapping\n")
    assert vggsound(vgg, "--no-open", "--analysis", "1") == 0
    assert vggsound(vgg, "--no-open", "--analysis", "0", "--classes", str(vgg / "classes.txt"), "--bad",
                    str(vgg / "short.txt")) == 0
    assert drops(vgg) == {
        "-ab_defghij_000030": "listed as bad", f"{youtube(3)}_000003": "listed as bad",
        f"{youtube(0)}_000000": "listed as bad", "ccccccccccc_000007": "class left out",
        "ddddddddddd_000310": "class left out", f"{youtube(1)}_000001": "repeated row",
        "bbbbbbbbbbb_000000": "repeated row"}  # the last is a test clip, and stays one
    assert [e.id for e in manifest(vgg, "test")] == ["bbbbbbbbbbb_000000"] and len(manifest(vgg, "train")) == 28
    assert not (vgg / "out" / "analysis.jsonl").exists()  # an earlier run's clips of it are back in train
    summary = json.loads((vgg / "out" / "summary.json").read_text())
    assert summary["dropped"] == {"listed as bad": {"test": 1, "train": 2}, "class left out": {"test": 2},
                                  "repeated row": {"train": 2}}
    assert "listed as bad                   3   test 1, train 2" in capsys.readouterr().out


def test_the_first_real_rows_with_the_official_counts(tmp_path, capsys):
    """44 rows of vggsound.csv; of the 309 classes of stat.csv 286 have no comma in their names."""
    csvs, out = ROOT / "tests" / "data" / "vggsound", tmp_path / "out"
    assert prepare_vggsound.main([str(csvs), str(tmp_path), str(out), "--no-open", "--analysis", "1"]) == 0
    said = capsys.readouterr().out
    assert "44 rows (test 2, train 42), 286 of 309 classes" in said and "stat.csv counts 199,176" in said
    assert {name: len(manifest(tmp_path, name)) for name in ("train", "analysis", "test")} == {
        "train": 5, "analysis": 32, "test": 2}
    assert sorted(drops(tmp_path)) == ["--9O4XZOge4_000030", "--HuBNHXu9I_000030", "--Lj4Y_96f0_000120",
                                       "--PlJNEnf-s_000288", "--byNAHo7tQ_000000"]
    first = manifest(tmp_path, "test")[0]
    assert (first.id, first.label, len(first.options)) == ("---g-f_I2yQ_000001", "people marching", 10)


def test_one_csv_with_both_splits_and_one_class_too_many_gives_the_same(vgg):
    assert vggsound(vgg, "--no-open", "--analysis", "4") == 0
    expected = contents(vgg)
    with (vgg / "csv" / "vggsound.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        for split in ("train", "test"):
            with (vgg / "csv" / f"{split}.csv").open(newline="") as file:
                for name, label in csv.reader(file):
                    writer.writerow((name[:11], int(name[12:18]), label, split))
            (vgg / "csv" / f"{split}.csv").unlink()
        writer.writerow(("eeeeeeeeeee", 5, "the 310th", "train"))
    assert vggsound(vgg, "--no-open", "--analysis", "4") == 0
    found = contents(vgg)
    assert all(found[name] == expected[name] for name in ("train.jsonl", "analysis.jsonl", "test.jsonl"))
    assert drops(vgg) == {"eeeeeeeeeee_000005": "class not in stat.csv"}


def test_options_follow_frequency_and_depend_on_seed_and_id_alone():
    frequency = {"rare": 1, "common": 8, "right": 3, "mid": 4, "barred": 50, "never": 0}
    options = OptionSampler(frequency, 3, 0)
    drawn = [options.draw(f"clip{i}", "right", frozenset({"barred"})) for i in range(3000)]
    assert all(len(set(o)) == 3 and o[answer] == "right" for o, answer in drawn)
    assert max(abs(n / 1000 - 1) for n in Counter(answer for _, answer in drawn).values()) < 0.12
    wrong = Counter(name for o, _ in drawn for name in o if name != "right")
    assert set(wrong) == {"rare", "common", "mid"}
    # without repeats: P(rare) = 1/13 + 8/13 * 1/5 + 4/13 * 1/9
    assert wrong["rare"] / 3000 == pytest.approx(1 / 13 + 8 / 65 + 4 / 117, abs=0.03)
    assert OptionSampler(frequency, 3, 0).draw("clip7", "right", frozenset({"barred"})) == drawn[7]
    assert [OptionSampler(frequency, 3, 1).draw(f"clip{i}", "right") for i in range(9)] != drawn[:9]
    with pytest.raises(ValueError, match="4 options are wanted, and of the 5 classes 3 cannot be a wrong answer"):
        OptionSampler(frequency, 4, 0).draw("a", "right", frozenset({"barred", "mid"}))


def test_numbers_are_the_same_on_every_machine():
    numbers = uniforms(0, "glLQrEijrKg_000300")
    assert [round(next(numbers), 6) for _ in range(9)] == [
        0.779994, 0.835422, 0.998698, 0.214656, 0.326989, 0.596476, 0.531979, 0.386444, 0.522568]


def test_both_name_conventions_are_found_and_hostile_clips_dropped_with_their_reason(vgg, clip, capsys):
    names = [f"{youtube(i)}_{i:06d}" for i in range(30)]
    hostile = {1: ("empty file", b""), 2: ("unreadable", b"no media\n" * 9), 3: ("truncated", clip[: len(clip) // 2]),
               4: ("unreadable", np.random.default_rng(0).bytes(4096))}
    for i, name in enumerate(names[:12]):
        (vgg / "clips" / f"{name}.mp4").write_bytes(hostile[i][1] if i in hostile else clip)
    make = vgg / "clips"
    write_mp4(make / f"{names[5]}.mp4", grey_frames(4, 32, 48), None, 4)
    write_mp4(make / f"{names[6]}.mp4", None, sine(440, 1))
    write_mp4(vgg / "wide.mkv", grey_frames(4, 1, 300), sine(440, 1), 4, codec="ffv1", pix_fmt="bgr0")
    (vgg / "wide.mkv").rename(make / f"{names[7]}.mp4")
    write_wav(vgg / "nan.wav", np.full(16000, np.nan, np.float32), subtype="FLOAT").rename(make / f"{names[8]}.mp4")
    write_mp4(make / f"{names[9]}.mp4", grey_frames(2, 32, 48), sine(440, 0.1), 20)
    write_mp4(make / f"{names[10]}.mp4", grey_frames(2, 32, 48), sine(440, 16), 4)
    os.unlink(make / f"{names[11]}.mp4")
    os.mkdir(make / f"{names[11]}.mp4")
    for start, id in ((30, "-ab_defghij"), (0, "bbbbbbbbbbb")):  # the other convention
        (make / f"{id}_{start * 1000}_{start * 1000 + 10000}.mp4").write_bytes(clip)
    write_mp4(make / "ddddddddddd_000310.mp4", grey_frames(4, 32, 48), 0 * sine(440, 1), 4)
    assert vggsound(vgg, "--analysis", "0") == 0
    reasons = drops(vgg)
    assert [reasons.get(name) for name in names[:12]] == [
        None, "empty file", "unreadable", "truncated", "unreadable", "no audio track", "no video track", "bad shape",
        "not finite", "too short", "too long", "not a file"]
    assert set(reasons[name] for name in names[12:]) == {"missing"} and len(reasons) == 30
    test = manifest(vgg, "test")
    assert [(Path(e.video).name, e.meta.get("silent")) for e in test] == [
        ("-ab_defghij_30000_40000.mp4", None), ("bbbbbbbbbbb_0_10000.mp4", None), ("ddddddddddd_000310.mp4", True)]
    assert reasons["ccccccccccc_000007"] == "missing" and len(manifest(vgg, "train")) == 1
    assert "silent and kept: 1" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_gives_the_same_bytes(vgg, clip, monkeypatch):
    monkeypatch.setattr(clip_checks, "CHUNK", 4)
    files = [vgg / "clips" / f"{youtube(i)}_{i:06d}.mp4" for i in range(15)]
    for file in files:
        file.write_bytes(clip)
    files[6].write_bytes(clip[: len(clip) // 2])
    assert vggsound(vgg, "--analysis", "2") == 0
    expected = contents(vgg)
    assert Counter(e.label for e in manifest(vgg, "analysis")) == {"dog barking": 2, "rapping": 2, "thunder": 2}
    ledger = vgg / "out" / "opened"
    assert len(list(ledger.iterdir())) == 4  # chunks of 4 rows; the first, of test, has no clip
    for path in [*sorted(ledger.iterdir())[2:], *(vgg / "out").glob("*.json*")]:
        path.unlink()  # as a run that was killed in its fourth chunk leaves it
    for file in files[:8]:  # what has been opened is not opened again: the same names and sizes, and no clips any more
        file.write_bytes(bytes(file.stat().st_size))
    assert vggsound(vgg, "--analysis", "2") == 0
    assert contents(vgg) == expected
    files[6].write_bytes(clip)  # another size: this one is
    (vgg / "clips" / f"{youtube(20)}_000020.mp4").write_bytes(clip)  # and one that was missing
    assert vggsound(vgg, "--analysis", "2") == 0
    assert len(drops(vgg)) == expected["drops.jsonl"].count(b"\n") - 2
    (ledger / "00001.jsonl").write_text('{"id": 3')
    assert vggsound(vgg, "--analysis", "2") == 1


def test_a_wrong_folder_of_clips_leaves_an_earlier_runs_manifests_alone(vgg, clip, capsys):
    (vgg / "empty").mkdir()
    (vgg / "clips" / "-ab_defghij_000030.mp4").write_bytes(clip)
    (vgg / "clips").rename(vgg / "right")
    (vgg / "empty").rename(vgg / "clips")
    assert vggsound(vgg) == 1 and len(drops(vgg)) == 34  # nothing to lose yet: the reasons are listed
    assert sorted(contents(vgg)) == ["drops.jsonl"] and "is " + str(vgg / "clips") in capsys.readouterr().err
    (vgg / "clips").rename(vgg / "empty")
    (vgg / "right").rename(vgg / "clips")
    assert vggsound(vgg) == 0
    expected = contents(vgg)
    assert sorted(expected) == ["drops.jsonl", "summary.json", "test.jsonl"]
    (vgg / "clips").rename(vgg / "right")
    (vgg / "empty").rename(vgg / "clips")
    assert vggsound(vgg) == 1 and "no clip is left; is" in (err := capsys.readouterr().err) and "(missing 34)" in err
    assert contents(vgg) == expected and not list((vgg / "out").glob(".*"))


def test_sound_is_extracted_once_as_the_reader_hears_it(vgg, clip, capsys):
    path = vgg / "clips" / "-ab_defghij_000030.mp4"
    write_mp4(path, grey_frames(4, 32, 48), 3 * sine(440, 1, 44100), 4, rate=44100)  # beyond full scale
    (vgg / "clips" / "bbbbbbbbbbb_000000.mp4").write_bytes(clip)
    (vgg / "csv" / "train.csv").unlink()
    assert vggsound(vgg, "--extract-audio") == 0
    loud, _ = manifest(vgg, "test")
    wave, rate = soundfile.read(loud.audio, dtype="float32")
    assert Path(loud.audio) == vgg / "out" / "audio" / "-ab_defghij_000030.flac" and rate == 16000
    assert np.abs(wave - read_audio(path).numpy().clip(-1, 1)).max() <= 2.0**-15 and Path(loud.video).samefile(path)
    expected, before = contents(vgg), os.stat(loud.audio).st_mtime_ns
    assert vggsound(vgg, "--extract-audio") == 0 and os.stat(loud.audio).st_mtime_ns == before
    Path(loud.audio).write_bytes(b"cut")
    assert vggsound(vgg, "--extract-audio") == 0 and contents(vgg) == expected
    assert soundfile.info(loud.audio).frames == len(wave)
    assert [p.name for p in (vgg / "out" / "audio").iterdir() if p.suffix != ".flac"] == []
    shutil.rmtree(vgg / "out")
    assert vggsound(vgg, "--extract", "--extract-audio") == 0
    cached = Cache(str(vgg / "out" / "cache"), 1.0)
    kept = sorted(file.name for file in (vgg / "out" / "cache").rglob("*") if file.is_file())
    assert len(kept) == 4 and cached.place(str(path), "sound").name in kept
    frames, _ = load_clip(str(path), "video", VIDEO_DEFAULTS, cached)
    assert np.array_equal(frames, load_clip(str(path), "video", VIDEO_DEFAULTS)[0])
    assert sorted(file.name for file in (vgg / "out" / "cache").rglob("*") if file.is_file()) == kept
    capsys.readouterr()
    (vgg / "taken").write_text("")
    (vgg / "out" / "audio").rename(vgg / "elsewhere")
    (vgg / "out" / "audio").symlink_to(vgg / "taken")
    assert vggsound(vgg, "--extract-audio") == 1  # what cannot be written is no fault of the clip
    assert "cannot write" in capsys.readouterr().err


def peak_of(folder, pipe):
    """Peak resident kB after a run of 2,000 rows and after one of 200,000."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name in ("small", "large"):
            assert vggsound(folder / name, "--no-open", "--analysis", "50", options=2) == 0
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    labels = [f"class {i}" for i in range(100)]
    for name, count in (("small", 2_000), ("large", 200_000)):
        (tmp_path / name / "csv").mkdir(parents=True)
        (tmp_path / name / "csv" / "stat.csv").write_text("".join(f"{label},{count // 100},x\n" for label in labels))
        with open(tmp_path / name / "csv" / "train.csv", "w") as file:
            file.writelines(f"{youtube(i)}_000030.mp4,{labels[i % 100]}\n" for i in range(count))
    context = get_context("forkserver")
    pipe, end = context.Pipe()
    child = context.Process(target=peak_of, args=(tmp_path, end))
    child.start()
    end.close()
    small, large = pipe.recv(), pipe.recv()
    child.join()
    with open(tmp_path / "large" / "out" / "train.jsonl") as file:
        assert sum(1 for _ in file) == 195_000
    assert large - small < 24 << 10, f"{small >> 10} MiB for 2,000 rows, {large >> 10} MiB for 200,000"


def unchanged(folder):
    pass


def edit(path, old, new, where="csv"):
    def change(folder):
        file = folder / where / path
        data = file.read_bytes()
        assert old.encode() in data
        file.write_bytes(data.replace(old.encode(), new.encode(), 1))
    return change


def write(path, data):
    return lambda folder: (folder / path).write_bytes(data if isinstance(data, bytes) else data.encode())


VGGSOUND_REFUSALS = [  # what is done to the folder, further arguments, what stderr says
    (lambda folder: (folder / "csv" / "stat.csv").unlink(), (), "csv: holds no stat.csv"),
    (lambda folder: [(folder / "csv" / f"{s}.csv").unlink() for s in ("train", "test")], (), "holds none of train.csv"),
    (lambda folder: (folder / "clips").rmdir(), (), "clips: no such folder of clips"),
    (unchanged, (), "no clip is left; is"),
    (edit("test.csv", "-ab_defghij_000030.mp4", "#NAME?"), (), "test.csv:1: not a clip's name: '#NAME?'"),
    (edit("test.csv", "bbbbbbbbbbb_000000", "bbbbbbbbbbb_0"), (), "test.csv:2: not a clip's name"),
    (edit("test.csv", ",rapping", ";rapping"), (), "test.csv:2: 2 columns are expected, got 1"),
    (edit("test.csv", "rapping", "raping"), (), "test.csv:2: class 'raping' is not in stat.csv; did you mean"),
    (edit("test.csv", '"bee', "bee"), (), "test.csv:3: 2 columns are expected, got 4"),
    (edit("test.csv", 'etc. buzzing"', "etc. buzzing"), (), "test.csv:4: unexpected end of data"),
    (edit("train.csv", "mp4,rapping\n", "mp4,rapping,train\n"), (), "train.csv:2: 2 columns are expected, got 3"),
    (edit("stat.csv", "rapping,30", "rapping,many"), (), "stat.csv:2: a class, its number of clips and its group"),
    (edit("stat.csv", "thunder,15", "rapping,15"), (), "stat.csv:5: a class, its number"),
    (edit("stat.csv", "rapping,30", "rapping,9"), (), "row 10 of class 'rapping', of which stat.csv has 9"),
    (write("csv/test.csv", "rapping".encode("utf-16")), (), "test.csv:0: 'utf-8' codec can't decode"),
    (write("list.txt", "rapping\nthunder\nraping\n"), ("--classes", "list.txt"), "txt:3: class 'raping' is not"),
    (write("list.txt", "rapping\nrapping\n"), ("--classes", "list.txt"), "txt:2: class 'rapping' stands here twice"),
    (write("list.txt", "rapping\nthunder\n"), ("--classes", "list.txt"), "3 options need as many classes, got 2"),
    (write("list.txt", "not a clip\n"), ("--bad", "list.txt"), "list.txt:1: not a clip's name, with or without"),
    (unchanged, ("--bad", "none.txt"), "No such file or directory: 'none.txt'"),
    (unchanged, ("--options", "27"), "--options must be 2 to 26, got 27"),
    (unchanged, ("--workers", "0"), "--workers must be 1 or more, got 0"),
    (unchanged, ("--time-limit", "nan"), "--time-limit must be 1 to 86400, got nan"),
    (write("out", ""), (), "File exists: "),
]


@pytest.mark.parametrize("change, more, said", VGGSOUND_REFUSALS)
def test_bad_input_is_one_line_that_says_what_and_where(vgg, monkeypatch, capsys, change, more, said):
    monkeypatch.chdir(vgg)
    change(vgg)
    assert vggsound(vgg, "--analysis", "1", *more) == 1
    err = capsys.readouterr().err.split("\r")[-1].strip().split("\n")[-1]
    assert err.startswith("prepare_vggsound: ") and said in err


ONTOLOGY = {"Things": ["Vehicle", "Bell", "Clock"], "Vehicle": ["Car", "Ship"], "Car": ["Toot"], "Clock": ["Tick"],
            "Animal": ["Dog", "Cat"], "Dog": ["Bark", "Yip"], "Music": ["Techno"], "Clicking": ["Tick"],
            "Source-ambiguous sounds": ["Clicking", "Bang"]}
NAMES = sorted({*ONTOLOGY, *(child for children in ONTOLOGY.values() for child in children)})
SEEN = "audioset,vggsound\nCar,car passing by\nBark,dog barking\n"  # and so Vehicle, Dog, Toot and Animal


def mid(name):
    return f"/m/{NAMES.index(name):02d}"


@pytest.fixture
def audioset(vgg):
    labels = [("Ship", "Vehicle"), ("Music", "Techno"), ("Dog", "Bark"), ("Bang", "Toot"), ("Cat", "Animal"),
              ("Clock", "Tick"), ("Music",), ("Ship", "Bell", "Car")]
    nodes = [{"id": mid(name), "name": name, "child_ids": [mid(child) for child in ONTOLOGY.get(name, ())]}
             for name in NAMES]
    (vgg / "csv" / "ontology.json").write_text(json.dumps(nodes))
    (vgg / "csv" / "class_labels_indices.csv").write_text(
        "index,mid,display_name\n" + "".join(f'{i},{mid(name)},"{name}"\n' for i, name in enumerate(NAMES)))
    ids = ["-ab_defghij", youtube(2), *(youtube(100 + i) for i in range(62))]  # the first two: in VGGSound
    rows = [(id, 30 * i, [mid(name) for name in labels[i % 8]]) for i, id in enumerate(ids)]
    (vgg / "csv" / "eval_segments.csv").write_text(
        "# made on a day\n# num_ytids=64, num_segs=64, num_unique_labels=9\n# YTID, start_seconds, end_seconds\n"
        + "".join(f'{id}, {start}.000, {start + 10}.000, "{",".join(ids)}"\n' for id, start, ids in rows))
    (vgg / "rewritten.csv").write_text("# YTID, start_seconds, end_seconds, labels\n" + "".join(
        f"{id},{start},{start + 10}," + (f'"{",".join(ids)}"' if len(ids) > 1 else ids[0]) + "\n"
        for id, start, ids in rows))
    (vgg / "seen.csv").write_text(SEEN)
    return vgg


def run_audioset(folder, *more):
    return prepare_audioset.main([*(str(folder / name) for name in ("csv", "clips", "out")), "--options", "4", "--seen",
                                  str(folder / "seen.csv"), "--vggsound", str(folder / "csv"), *more])


def test_audioset_asks_for_unseen_classes_of_videos_that_vggsound_has_not(audioset, capsys):
    assert run_audioset(audioset, "--no-open") == 0
    examples, reasons = manifest(audioset, "unseen"), drops(audioset)
    assert reasons.pop("-ab_defghij_000000") == reasons.pop(f"{youtube(2)}_000030") == "video in VGGSound"
    assert set(reasons.values()) == {"no unseen class"} and len(reasons) == 16 and len(examples) == 46
    right = {tuple(e.meta["labels"]): set() for e in examples}
    for e in examples:
        labels = tuple(e.meta["labels"])
        right[labels].add(e.label)
        assert e.options[e.answer] == e.label and len(set(e.options)) == 4 and e.source == "audioset/eval"
        assert not {"Bang", "Clicking", "Animal" if "Cat" in labels else "", *labels} & set(e.options) - {e.label}
    # the most specific unseen ones; Tick is unseen too, Clock is broader; Music alone is itself
    assert right == {("Ship", "Vehicle"): {"Ship"}, ("Music", "Techno"): {"Techno"}, ("Cat", "Animal"): {"Cat"},
                     ("Clock", "Tick"): {"Tick"}, ("Music",): {"Music"}, ("Ship", "Bell", "Car"): {"Ship", "Bell"}}
    for label, true in (("Car", {"Vehicle", "Car", "Toot"}), ("Techno", {"Music"})):
        assert not any(true & set(e.options) for e in examples if label in e.meta["labels"])
    alone = [e for e in examples if e.meta["labels"] == ["Music"]]
    assert alone and not any("Techno" in e.options for e in alone)  # narrower, so that it may be true
    assert {e.meta["group"] for e in examples} == {"Things", "Animal", "Music"}
    assert "video in VGGSound               2   eval 1, unseen 1" in capsys.readouterr().out


def test_audiosets_whole_set_is_asked_too_but_for_videos_that_vggsound_trains_on(audioset, capsys):
    assert run_audioset(audioset, "--no-open") == 0
    examples, lines = manifest(audioset, "evaluation"), (audioset / "out" / "drops.jsonl").read_text().splitlines()
    assert [(d["id"], d["reason"], d["detail"]) for d in map(json.loads, lines) if d["split"] == "eval"] == [
        (f"{youtube(2)}_000030", "video in VGGSound", "train")]
    assert len(examples) == 63 and {e.id for e in manifest(audioset, "unseen")} < {e.id for e in examples}
    assert {e.id: e.meta["vggsound"] for e in examples if e.meta["vggsound"]} == {"-ab_defghij_000000": "test"}
    right = {tuple(e.meta["labels"]): set() for e in examples}
    offered = set()
    for e in examples:
        right[tuple(e.meta["labels"])].add(e.label)
        wrong = {*e.options} - {e.label}
        offered |= wrong
        true = {*e.meta["labels"]}
        for name, children in ONTOLOGY.items():  # broader ones, then those above them
            true |= {name} if true & {*children} else set()
        true |= {"Things"} if true & {"Vehicle", "Clock"} else set()
        assert e.options[e.answer] == e.label and len(wrong) == 3 and not wrong & true and e.source == "audioset/eval"
    # the most specific of all the clip's classes, seen ones and those of no sounding object included
    assert right == {("Ship", "Vehicle"): {"Ship"}, ("Music", "Techno"): {"Techno"}, ("Dog", "Bark"): {"Bark"},
                     ("Bang", "Toot"): {"Bang", "Toot"}, ("Cat", "Animal"): {"Cat"}, ("Clock", "Tick"): {"Tick"},
                     ("Music",): {"Music"}, ("Ship", "Bell", "Car"): {"Ship", "Bell", "Car"}}
    assert offered == {name for labels in right for name in labels}
    assert not any("Techno" in e.options for e in examples if e.meta["labels"] == ["Music"])  # may be true
    assert not any("Toot" in e.options for e in examples if "Car" in e.meta["labels"])
    assert {e.meta["group"] for e in examples if e.label == "Bang"} == {"Source-ambiguous sounds"}
    summary = json.loads((audioset / "out" / "summary.json").read_text())
    assert summary["kept"] == {"unseen": 46, "evaluation": 63}
    assert summary["dropped"]["video in VGGSound"] == {"eval": 1, "unseen": 1}
    assert "evaluation: 63 clips, 1 of them in videos of VGGSound's test split" in capsys.readouterr().out


def test_audioset_clips_are_opened_once_for_both_manifests(audioset):
    for i in (100, 101, 102):  # Dog and Bark, which are seen; Bang and Toot too; Cat is not
        write_wav(audioset / "clips" / f"Y{youtube(i)}.wav", sine(440, 1))
    (audioset / "clips" / f"Y{youtube(101)}.wav").write_bytes(b"no media\n" * 9)
    assert run_audioset(audioset) == 0
    both = {name: [e.meta["youtube"] for e in manifest(audioset, name)] for name in ("unseen", "evaluation")}
    assert both == {"unseen": [youtube(102)], "evaluation": [youtube(100), youtube(102)]}
    opened = (audioset / "out" / "opened" / "00000.jsonl").read_text().splitlines()
    ids = [f"{youtube(100)}_000060", f"{youtube(101)}_000090", f"{youtube(102)}_000120"]
    assert sorted(json.loads(line)["id"] for line in opened) == ids
    before = contents(audioset)
    for i in (100, 102):
        path = audioset / "clips" / f"Y{youtube(i)}.wav"
        path.write_bytes(bytes(path.stat().st_size))  # opened, it would be no clip
    assert run_audioset(audioset) == 0 and contents(audioset) == before


def test_audioset_rewritten_without_blanks_and_quotes_is_the_same(audioset):
    assert run_audioset(audioset, "--no-open") == 0
    expected = contents(audioset)
    (audioset / "rewritten.csv").rename(audioset / "csv" / "eval_segments.csv")
    assert run_audioset(audioset, "--no-open") == 0
    assert all(contents(audioset)[name] == expected[name] for name in ("unseen.jsonl", "drops.jsonl"))


def test_audioset_takes_sound_alone_and_says_when_train_is_not_known(audioset, capsys):
    for i in (2, 102):
        write_wav(audioset / "clips" / f"Y{youtube(i)}.wav", sine(440, 1))
    (audioset / "csv" / "train.csv").unlink()
    assert run_audioset(audioset) == 0
    found = [(e.meta["youtube"], e.video, Path(e.audio).name) for e in manifest(audioset, "unseen")]
    assert found == [(youtube(2), None, f"Y{youtube(2)}.wav"), (youtube(102), None, f"Y{youtube(102)}.wav")]
    assert "lists no train split" in capsys.readouterr().out


AUDIOSET_REFUSALS = [
    (lambda folder: (folder / "csv" / "ontology.json").unlink(), "holds no ontology.json; it must hold eval_segments"),
    (write("csv/ontology.json", "[1]"), "ontology.json: not AudioSet's ontology"),
    (edit("class_labels_indices.csv", "index,mid", "mid,index"), "must begin with index,mid,display_name"),
    (edit("class_labels_indices.csv", "/m/03", "/m/99"), "class '/m/99' is not in the ontology"),
    (edit("eval_segments.csv", "num_segs=64", "num_segs=65"), "holds 64 rows, and its head announces 65"),
    (edit("eval_segments.csv", "30.000, 40.000", "0:30, 0:40"), "eval_segments.csv:5: id, start, end and classes"),
    (edit("eval_segments.csv", '"/m/', '"/x/'), "eval_segments.csv:4: class '/x/"),
    (edit("eval_segments.csv", '"', ""), "eval_segments.csv:4: 4 columns are expected, got 5"),
    (write("csv/eval_segments.csv", f"aaaaaaaaaaa,0,10,{mid('Ship')}\n"), "4 options need as many classes, got 1"),
    (edit("seen.csv", "Bark", "Barck", "."), "seen.csv:3: AudioSet has no class 'Barck'; did you mean 'Bark'?"),
]


@pytest.mark.parametrize("change, said", AUDIOSET_REFUSALS)
def test_bad_audioset_files_are_one_line_that_says_what_and_where(audioset, capsys, change, said):
    change(audioset)
    assert run_audioset(audioset, "--no-open") == 1
    err = capsys.readouterr().err.strip().split("\r")[-1].strip().split("\n")[-1]
    assert err.startswith("prepare_audioset: ") and said in err


def test_the_lists_that_ship_are_whole():
    classes = [line for _, line in prepare_vggsound.read_list(prepare_vggsound.DATA / "vggsound_286.txt")]
    assert len(set(classes)) == len(classes) == 286 and not any("," in label for label in classes)
    header, *pairs = [fields for _, fields in prepare_audioset.read_csv(prepare_vggsound.DATA / "audioset_seen.csv", 2)]
    assert header == ["audioset", "vggsound"] and len({name for name, _ in pairs}) == len(pairs) == 217
    assert all(label in classes or "," in label for _, label in pairs)

