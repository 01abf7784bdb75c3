"""tools/listening_test.py: who is given what, what the page holds, and a whole test done in a browser."""
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from urllib.request import Request, urlopen

import av
import numpy as np
import pytest
from media_files import grey_frames, sine, write_mp4, write_wav

from minixmd.inputs.examples import Example, manifest_text, read_manifest
from minixmd.tasks.statistics import digest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import listening_test  # noqa: E402

CLASSES = ["dog", "cat", 'owl <b>"hoots"</script>', "rain", "Käuzchen, leise"]
CONDITIONS = ["ears", "eyes", "both"]
GOLDEN = [  # the deal of 6 clips, 2 conditions, 4 trials, seed 0
    [(3, "eyes"), (2, "eyes"), (0, "ears"), (1, "ears")],
    [(3, "ears"), (2, "ears"), (5, "eyes"), (4, "eyes")],
    [(4, "ears"), (5, "ears"), (0, "eyes"), (1, "eyes")],
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name of a reference to an element in the WebDriver protocol


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with manifest.jsonl: 9 clips of 5 classes, of 0.4 s."""
    folder = tmp_path_factory.mktemp("clips")
    write_wav(folder / "sound.wav", sine(440, 0.4))
    write_mp4(folder / "clip.mp4", grey_frames(4), sine(440, 0.4))
    examples = []
    for label in CLASSES:
        for number in range(9):
            id = f"{label[:3]}_{number:06d}"
            shutil.copy(folder / "sound.wav", folder / f"{id}.wav")
            shutil.copy(folder / "clip.mp4", folder / f"{id}.mp4")
            examples.append(Example(id, f"{id}.wav", f"{id}.mp4", "What do you hear?", tuple(CLASSES),
                                    CLASSES.index(label), label, meta={"video_question": "What do you see?"}))
    (folder / "manifest.jsonl").write_text(manifest_text(examples))
    return folder


def run(*argv):
    return listening_test.main([str(arg) for arg in argv])


def make(manifest, out, *more):
    assert run(manifest, out, "--num-classes", 5, "--clips", 9, "--trials", 9, *more) == 0
    return out


def in_page(out):
    """What index.html knows."""
    text = (out / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="test">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    """The folder of a test of 45 clips for 15 participants."""
    return make(clips / "manifest.jsonl", tmp_path_factory.mktemp("made") / "out")


# ---- who is given what ----

DEALS = [  # clips, classes, conditions, trials
    (1500, 30, CONDITIONS, 45),
    (1500, 30, CONDITIONS, 30),
    (1500, 30, CONDITIONS, 12),
    (45, 5, CONDITIONS, 45),
    (45, 5, CONDITIONS, 9),
    (45, 5, ["eyes"], 9),
    (45, 9, ["ears", "both"], 30),
]


@pytest.mark.parametrize("num_clips, classes, conditions, trials", DEALS)
def test_every_clip_is_given_once_in_every_condition_and_to_each_participant_once(
        num_clips, classes, conditions, trials):
    dealt = listening_test.deal(num_clips, conditions, trials, 0)
    given, orders = Counter(), Counter()
    for own in dealt:
        assert len({clip for clip, _ in own}) == len(own) == trials
        assert set(Counter(condition for _, condition in own).values()) == {trials // len(conditions)}
        blocks = own[::trials // len(conditions)]
        assert own == sorted(own, key=lambda trial: [c for _, c in blocks].index(trial[1]))  # one block a condition
        orders[tuple(condition for _, condition in blocks)] += 1
        of_class = Counter(clip % classes for clip, _ in own)  # clips come from class after class in turn
        assert max(of_class.values()) - min(of_class[i] for i in range(classes)) <= 1
        given.update(own)
    assert len(given) == num_clips * len(conditions) == len(dealt) * trials and set(given.values()) == {1}
    assert max(orders.values()) - min(orders.values()) <= 1


def test_the_deal_and_the_clips_hang_on_the_seed_alone(clips, made, tmp_path):
    again = make(clips / "manifest.jsonl", tmp_path / "again")
    other = make(clips / "manifest.jsonl", tmp_path / "other", "--seed", 1)
    assert (again / "index.html").read_bytes() == (made / "index.html").read_bytes()
    assert in_page(other)["participants"] != in_page(made)["participants"]
    assert in_page(other)["test"] != in_page(made)["test"]
    assert listening_test.deal(6, ["ears", "eyes"], 4, 0) == GOLDEN  # on any machine and Python
    lines = (clips / "manifest.jsonl").read_text().splitlines(keepends=True)
    chosen = []
    for name, text in (("forwards", lines), ("backwards", lines[::-1])):
        (clips / f"{name}.jsonl").write_text("".join(text))
        assert run(clips / f"{name}.jsonl", tmp_path / name, "--num-classes", 2, "--clips", 3, "--trials", 6) == 0
        chosen.append((tmp_path / name / "manifest.jsonl").read_text())
    assert chosen[0] == chosen[1]


def test_classes_are_drawn_or_named_on_the_command_line_or_in_a_file(clips, tmp_path):
    (tmp_path / "classes.txt").write_text("# two\ncat\nKäuzchen, leise\n")
    given = {"named": ["--classes", "cat", "Käuzchen, leise"], "file": ["--classes", tmp_path / "classes.txt"],
             "drawn": ["--num-classes", 2]}
    for name, argv in given.items():
        assert run(clips / "manifest.jsonl", tmp_path / name, "--clips", 4, "--trials", 6, *argv) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["classes"] == ["Käuzchen, leise", "cat"] or name == "drawn" and len(summary["classes"]) == 2
        assert (summary["clips"], summary["participants"], summary["seed"]) == (8, 4, 0)


# ---- what is written ----


def streams(path):
    with av.open(str(path)) as clip:
        return [stream.type for stream in clip.streams]


def decoded(path, kind):
    with av.open(str(path)) as clip:
        return [(frame.time, frame.to_ndarray()) for frame in clip.decode(**{kind: 0})]


def test_what_is_seen_has_no_sound_track_and_no_frame_is_changed(clips, made):
    for clip in in_page(made)["clips"].values():
        files = {condition: made / file for condition, file in clip["files"].items()}
        assert {condition: streams(file) for condition, file in files.items()} == {
            "ears": ["audio"], "eyes": ["video"], "both": ["video", "audio"]}
        for condition, kind, source in (("ears", "audio", ".wav"), ("eyes", "video", ".mp4"),
                                        ("both", "video", ".mp4"), ("both", "audio", ".mp4")):
            before = decoded(clips / f"{clip['id']}{source}", kind)
            after = decoded(files[condition], kind)
            assert [at for at, _ in before] == [at for at, _ in after]
            assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))


def test_the_sound_of_a_video_is_heard_without_its_picture_and_titles_are_left_out(clips, tmp_path):
    with av.open(str(clips / "clip.mp4")) as source, av.open(str(tmp_path / "titled.mp4"), "w") as out:
        out.metadata["title"] = "a dog barks"
        copies = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                out.mux(packet)
    assert b"a dog barks" in (tmp_path / "titled.mp4").read_bytes()
    shutil.copy(tmp_path / "titled.mp4", tmp_path / "other.mp4")
    (tmp_path / "m.jsonl").write_text(manifest_text(
        Example(name, name, name, "What?", ("dog", "cat"), 0, "dog") for name in ("titled.mp4", "other.mp4")))
    assert run(tmp_path / "m.jsonl", tmp_path / "out", "--num-classes", 1, "--clips", 2, "--trials", 2,
               "--conditions", "ears,both") == 0
    for path in (tmp_path / "out" / "media").iterdir():
        assert streams(path) == (["audio"] if "ears" in path.name else ["video", "audio"])
        assert b"a dog barks" not in path.read_bytes()


def test_no_file_name_tells_a_clip_and_the_page_loads_nothing_else(made):
    files = [file for clip in in_page(made)["clips"].values() for file in clip["files"].values()]
    assert sorted(files) == sorted(f"media/{path.name}" for path in (made / "media").iterdir())
    assert all(re.fullmatch(r"media/[0-9a-f]{16}-(ears\.wav|(eyes|both)\.mp4)", file) for file in files)
    page = (made / "index.html").read_text()
    assert page.count("</script>") == 2 and not re.search(r"https?://|src=|href=|@import|url\(", page)


def test_the_page_holds_no_answer(clips, made, tmp_path):
    page = in_page(made)
    assert page.keys() == {"test", "clips", "conditions", "participants"}
    for clip in page["clips"].values():
        assert clip.keys() == {"id", "digest", "question", "video_question", "options", "files"}
    examples = read_manifest(clips / "manifest.jsonl")
    other = [replace(example, answer=(example.answer + 1) % len(CLASSES)) for example in examples]
    (tmp_path / "other.jsonl").write_text(manifest_text(other))
    out = make(tmp_path / "other.jsonl", tmp_path / "out", "--allow-outside")
    for clip in page["clips"].values():
        clip["digest"] = None
    theirs = in_page(out)
    for clip in theirs["clips"].values():
        clip["digest"] = None
    assert page.pop("test") != theirs.pop("test") and page == theirs  # other answers, same page
    assert list(page["clips"]) == sorted(page["clips"])  # not class by class


def test_the_manifest_asks_the_same_questions_about_the_copies(clips, made):
    sources = {example.id: example for example in read_manifest(clips / "manifest.jsonl")}
    examples = read_manifest(made / "manifest.jsonl")
    assert len(examples) == 45
    by_id = {clip["id"]: clip for clip in in_page(made)["clips"].values()}
    for example in examples:
        source, clip = sources[example.id], by_id[example.id]
        assert replace(example, audio=source.audio, video=source.video) == source
        assert clip["digest"] == digest(source) and tuple(clip["options"]) == source.options
        assert example.audio == str(made / clip["files"]["ears"]) and example.video == str(made / clip["files"]["both"])


# ---- errors ----

ERRORS = {
    "no manifest": ([], {}, "no.jsonl"),
    "a class too few": (["--num-classes", 6], {}, "only 5 classes have 9 clips, --num-classes wants 6"),
    "too few clips": (["--classes", "dog", "--clips", 12], {}, "class 'dog' has 9 clips, and --clips is 12"),
    "an unknown class": (["--classes", "dogs"], {}, "class 'dogs' has 0 clips, and --clips is 9; did you mean 'dog'?"),
    "a class twice": (["--classes", "dog", "dog"], {}, "'dog' stands twice"),
    "no trials": (["--trials", 0], {}, "must be 1 or more"),
    "another condition": (["--conditions", "ears,nose"], {}, "must be some of ears,eyes,both, got ears,nose"),
    "no condition": (["--conditions", ""], {}, "--conditions must be some of"),
    "a condition twice": (["--conditions", "ears,ears"], {}, "got ears,ears"),
    "an uneven share": (["--trials", 10], {}, "--trials 10 is no multiple of the 3 conditions"),
    "too few participants": (["--trials", 48], {}, "--trials 48 is more than the 45 clips: somebody would"),
    "a rest": (["--trials", 6 * 6], {}, "45 clips in 3 conditions are 135 trials, no multiple of --trials 36"),
    "no sound": ([], {"audio": None}, "example 'dog_000000' has no audio for 'ears'"),
    "no video": ([], {"video": None}, "example 'dog_000000' has no video for 'eyes'"),
    "no file": ([], {"audio": "gone.wav"}, "gone.wav: cannot be copied: No such file"),
    "no clip": ([], {"video": "text.mp4"}, "text.mp4: cannot be copied: Invalid data"),
    "no browser's kind": ([], {"audio": "sound.aiff"}, "sound.aiff: no browser plays it; convert it to one of .wav"),
    "no browser's codec": ([], {"video": "old.mp4"}, "old.mp4: not every browser plays mpeg4"),
    "a silent video": ([], {"video": "silent.mp4"}, "silent.mp4: has no audio stream, which 'both' needs"),
    "one clip twice": ([], {"video": "dog_000001.mp4"}, "somebody would get twice"),
    "no answer": ([], {"answer": None}, "example 'dog_000000' has no answer"),
    "outside": ([], {"audio": "/etc/hosts.wav"}, "is outside of"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_leaves_nothing_behind(clips, tmp_path, capsys, case):
    argv, fields, said = ERRORS[case]
    (clips / "text.mp4").write_text("not a video")
    write_wav(clips / "sound.aiff", sine(440, 0.1))
    write_mp4(clips / "silent.mp4", grey_frames(2))
    write_mp4(clips / "old.mp4", grey_frames(2), codec="mpeg4")
    lines = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    lines[0] |= fields
    manifest = clips / f"{case}.jsonl"
    if case != "no manifest":
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        manifest = clips / "no.jsonl"
    numbers = ["--clips", 9, "--trials", 9] + ([] if "--classes" in argv else ["--num-classes", 5])
    assert run(manifest, tmp_path / "out", *numbers, *argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("listening_test: ") and err.count("\n") == 1 and said in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_to(clips, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("\n")
    assert run(clips / "manifest.jsonl", tmp_path, "--num-classes", 5, "--clips", 9, "--trials", 9) == 1
    assert "is there already; remove it or name another folder" in capsys.readouterr().err
    assert run(clips / "manifest.jsonl", tmp_path / "out", "--classes", tmp_path / "classes.txt") == 1
    assert "classes.txt: names no class" in capsys.readouterr().err


# ---- in a browser ----


class Browser:
    """Chromium behind chromedriver, spoken to in the WebDriver protocol."""

    def __init__(self, address, downloads):
        self.address = address
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"args": arguments, "prefs": {"download.default_directory": str(downloads)}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self.address += f"/session/{session['sessionId']}"

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(self.address + path, data, method=method), timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address):
        self.call("POST", "/url", {"url": address})

    def script(self, text, *args):
        return self.call("POST", "/execute/sync", {"script": text, "args": args})

    def wait(self, condition, *args):
        """Until a JavaScript expression is true."""
        until = time.monotonic() + 20
        while not (value := self.script(f"return {condition}", *args)):
            assert time.monotonic() < until, (condition, args, self.text("main"))
            time.sleep(0.02)
        return value

    def click(self, selector):
        element = self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]
        self.call("POST", f"/element/{element}/click", {})

    def text(self, selector):
        return self.script("return document.querySelector(arguments[0]).innerText", selector)

    def press(self, keys):
        actions = []
        for key in keys:
            actions += [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def devtools(self, command, **params):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})


@contextmanager
def browser(downloads):
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            port = next(match[1] for line in driver.stdout if (match := re.search(r"successfully on port (\d+)", line)))
            found = Browser(f"http://127.0.0.1:{port}", downloads)
            try:
                yield found
            finally:
                found.call("DELETE", "")
        finally:
            driver.terminate()


ENTER = "\ue007"


def start(page, participant, most):
    assert page.text("#most") == str(most)
    page.script("document.querySelector('#participant').value = arguments[0]", participant)
    page.click("#heard")
    page.click("#intro .main")
    assert page.script("return !document.querySelector('#intro').hidden")  # it wants the tone to be played first
    page.click("#tone")
    page.click("#intro .main")


def fnv(text):
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return f"{value:08x}"


def check_file(text):
    """The object of a result file, without its checksum, which is right."""
    result = json.loads(text)
    checksum = result.pop("checksum")
    assert checksum == fnv(json.dumps(result, separators=(",", ":"), ensure_ascii=False))
    return result


@pytest.mark.slow
def test_a_test_of_45_trials_is_done_by_keys_and_clicks_and_survives_a_reload(clips, tmp_path):
    out, downloads = make(clips / "manifest.jsonl", tmp_path / "out", "--trials", 45), tmp_path / "downloads"
    known = in_page(out)
    expected = []
    with browser(downloads) as page:
        page.open((out / "index.html").as_uri())
        start(page, 2, most=3)
        for number, trial in enumerate(known["participants"][1]):
            clip, replays = known["clips"][trial["clip"]], 0
            page.wait("document.querySelector('#progress').innerText.startsWith(arguments[0])", f"{number + 1} of 45.")
            if number == 10:
                page.press(ENTER)  # no answer yet: it stays
                page.click("#stop")
                half = check_file(page.script("return document.querySelector('#text').value"))
                assert half["finished"] is None and len(half["trials"]) == 10
                page.click("#resume")
            if number == 20:
                page.wait("!document.querySelector('#choice').disabled")
                page.open((out / "index.html").as_uri() + "?participant=2")
                assert page.script("return document.querySelector('#participant').value") == "2"
                start(page, 2, most=3)
                replays += 1
            page.wait("!document.querySelector('#choice').disabled")
            replays += number == 10 and page.script("return state.replays")  # 1 if the clip had begun before the stop
            medium = page.script("const {muted, src, tagName} = document.querySelector('#stage :is(audio, video)');"
                                 "return [muted, src, tagName, document.activeElement.id]")
            assert medium == [trial["condition"] == "eyes", (out / clip["files"][trial["condition"]]).as_uri(),
                              "AUDIO" if trial["condition"] == "ears" else "VIDEO", "question"]
            verb = "see" if trial["condition"] == "eyes" else "hear"
            assert page.text("#question") == f"What do you {verb}?"
            if number == 0:
                assert page.text("#options").split("\n") == [
                    f"{letter}. {text}" for letter, text in zip("ABCDE", CLASSES, strict=True)]
            if number % 5 == 0:
                page.press("  ")
                replays += 2
            answer = number * 7 % 5
            if number % 3 == 0:
                page.press("e" + "abcde"[answer])  # the last one counts
            elif number % 3 == 1:
                page.press("12345"[answer])
            else:
                page.click(f"#options label:nth-child({answer + 1})")
            if number % 2:
                page.press(ENTER)
            else:
                page.click("#trial .main")
            expected.append({"id": clip["id"], "condition": trial["condition"], "question": clip["digest"],
                             "answer": answer, "replays": replays})
        page.wait("!document.querySelector('#end').hidden")
        page.click("#download")
        file = downloads / f"listening_test_{known['test']}_2.json"
        until = time.monotonic() + 20
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert json.loads(file.read_text()) == json.loads(page.script("return document.querySelector('#text').value"))
    result = check_file(file.read_text())
    times = [trial.pop("ms") for trial in result["trials"]]
    assert result["trials"] == expected and all(type(ms) is int and 0 < ms < 60_000 for ms in times)
    started, finished = (datetime.strptime(result[name], "%Y-%m-%dT%H:%M:%S.%fZ") for name in ("started", "finished"))
    assert sum(times) / 1000 < (finished - started).total_seconds() < 300
    assert list(result) == ["listening_test", "test", "participant", "started", "finished", "user_agent", "trials"]
    assert (result["listening_test"], result["test"], result["participant"]) == (1, known["test"], 2)
    assert "Chrome" in result["user_agent"] and list(expected[0]) == list(result["trials"][0])


TOO_SMALL = """return [...document.querySelectorAll("button, label, input[type=number]")].filter(
    element => element.offsetParent && element.getBoundingClientRect().height < 44).map(element => element.outerHTML)"""
TOO_WIDE = "return document.documentElement.scrollWidth - 390"


@pytest.mark.slow
def test_on_a_telephone_nothing_is_too_wide_or_too_small_and_motion_waits_where_that_is_wished(clips, made, tmp_path):
    out = make(clips / "manifest.jsonl", tmp_path / "out", "--conditions", "eyes")
    known = in_page(out)
    trials = known["participants"][4]
    (out / known["clips"][trials[1]["clip"]]["files"]["eyes"]).unlink()
    with browser(tmp_path) as page:
        page.devtools("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
        page.open((made / "index.html").as_uri())  # its first page has the volume check
        assert page.script(TOO_WIDE) <= 0 and page.script(TOO_SMALL) == []
        page.open((out / "index.html").as_uri() + "?participant=6")
        page.click("#intro .main")
        assert page.script("return !document.querySelector('#intro').hidden")  # there are 5 participants
        page.open((out / "index.html").as_uri() + "?participant=5")
        page.click("#intro .main")  # without a volume check: no clip has sound
        time.sleep(0.5)
        assert page.text("#message") == "Press space or this button to play the clip."
        assert page.script("return media.paused && state.begun === null && document.querySelector('#choice').disabled")
        page.press("b" + ENTER)  # nothing to answer yet
        assert page.text("#progress").startswith("1 of 9.") and page.text("#message") == "Choose an answer first."
        page.press(" ")
        page.wait("!document.querySelector('#choice').disabled")
        assert page.script("return state.replays") == 0  # that was the first time
        assert page.script(TOO_WIDE) <= 0 and page.script(TOO_SMALL) == []
        page.press("b" + ENTER + " ")
        page.wait("document.querySelector('#message').innerText.startsWith('This clip cannot be played: media/')")
        page.click("#stop")
        assert page.script(TOO_WIDE) <= 0 and page.script(TOO_SMALL) == []
        assert len(check_file(page.script("return document.querySelector('#text').value"))["trials"]) == 1
