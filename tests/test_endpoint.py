"""Asking an endpoint: what fails is tried again, what was answered is never lost or asked twice."""
import base64
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from fake_endpoint import FAULTS, FakeEndpoint, closed_url, first_attempts
from media_files import grey_frames, sine, write_mp4, write_wav
from tqdm import tqdm

from minixmd.config import Traces
from minixmd.inputs.media import MediaError, read_audio, read_frames
from minixmd.runs.records import append_jsonl
from minixmd.stages import endpoint as module
from minixmd.stages.endpoint import Request, ask_endpoint, audio_part, key_from, silent_video_part
from minixmd.tasks.yes_no import log_odds, yes_no

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-0123456789"
AT_ONCE = {name: reason for name, reason in FAULTS.items() if name != "time out"}  # what fails without a wait


def stage(url, **fields):
    return Traces(name="traces", manifest="m.jsonl", endpoint=url, served="teacher",
                  **{"retry_backoff_s": 0.01, "timeout_s": 10.0, "attempts": 3, "max_bad": 1.0, **fields})


def messages(i, load=None):
    return [{"role": "user", "content": [{"type": "text", "text": f"question {i}"}]}]


def asked(count):
    return [Request(f"clip {i}", partial(messages, i), 1000 + i) for i in range(count)]


def replies(said, seed):
    """Every third answer is cut short; none is plain ASCII on one line."""
    text = f"<think>{said[-1]['content'][0]['text']}: naïve…\n\u2028é</think><answer>{seed % 4}</answer>"
    return {"text": text, "finish_reason": "length" if seed % 3 == 0 else "stop"}


def expected(count):
    found = {}
    for i in range(count):
        said = replies(messages(i), 1000 + i)
        found[f"clip {i}"] = {"key": f"clip {i}", "text": said["text"], "finished": said["finish_reason"] == "stop"}
    return found


def ask(url, path, count=0, requests=None, api_key=KEY, logprobs=False, is_usable=bool, **fields):
    """{key: record} of `count` requests, or of the given ones. Failures alone raise nothing unless max_bad is given."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OPENAI_API_KEY", api_key or "")
        records = ask_endpoint(stage(url, **fields), asked(count) if requests is None else requests, Path(path), "clip",
                               max_tokens=512, temperature=0.7, logprobs=logprobs, is_usable=is_usable)
    return {record["key"]: record for record in records}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def by_key(records):
    return sorted(records, key=lambda record: record["key"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "endpoint.jsonl"


def test_what_is_asked_and_what_is_kept(path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def close(self):
            bars.append((self.initial, self.n, self.total))
            super().close()

    monkeypatch.setattr(module, "tqdm", Bar)
    with FakeEndpoint(replies) as endpoint:
        found = ask(endpoint.base_url, path, 10, concurrency=4)
        assert list(found.items()) == list(expected(10).items())
        assert by_key(lines(path)) == by_key(found.values()) and bars[-1] == (0, 10, 10)
        body, key = next((r.body, r.key) for r in endpoint.requests if r.body["seed"] == 1003)
        assert key == KEY
        assert body == {"messages": messages(3), "model": "teacher", "seed": 1003, "max_tokens": 512,
                        "temperature": 0.7, "stream": False}
        before = path.read_bytes()
        assert ask(endpoint.base_url, path, 10) == found
        assert len(endpoint.requests) == 10 and path.read_bytes() == before  # what is known is not asked
        assert list(ask(endpoint.base_url, path, 12)) == [f"clip {i}" for i in range(12)]
        assert len(endpoint.requests) == 12 and len(lines(path)) == 12 and bars[-1] == (10, 12, 12)


def test_no_more_requests_at_a_time_than_the_stage_says(path):
    together = threading.Barrier(3)

    def slow(said, seed):
        together.wait(60)
        time.sleep(0.02)
        return "yes"

    with FakeEndpoint(slow) as endpoint:
        ask(endpoint.base_url, path, 12, concurrency=3)
        assert endpoint.most == 3


def test_with_every_fault_the_answers_are_those_without(path):
    count = 2 * len(AT_ONCE)
    with FakeEndpoint(replies, first_attempts(AT_ONCE)) as endpoint:
        found = ask(endpoint.base_url, path, count, concurrency=8)
        assert {request.fault for request in endpoint.requests} == {*AT_ONCE, None}
        assert len(endpoint.requests) == 2 * count
    assert found == expected(count)
    assert by_key(lines(path)) == by_key(found.values())


def test_an_endpoint_that_takes_too_long_is_asked_again(path):
    with FakeEndpoint(replies, first_attempts(["time out"])) as endpoint:
        assert ask(endpoint.base_url, path, 2, timeout_s=0.5, attempts=20) == expected(2)
        assert sum(request.fault == "time out" for request in endpoint.requests) == 2
        endpoint.faults = lambda n, body: "time out"
        start = time.monotonic()
        assert ask(endpoint.base_url, path, 3, timeout_s=0.5, attempts=1)["clip 2"]["bad"] == "timed out"
        assert time.monotonic() - start < 10


def test_a_request_that_keeps_failing_is_counted_and_asked_again_next_time(path):
    names = list(AT_ONCE)

    def faults(n, body):
        return names[body["seed"] - 1000]

    with FakeEndpoint(replies, faults) as endpoint:
        found = ask(endpoint.base_url, path, len(names), attempts=2, concurrency=len(names))
        assert len(endpoint.requests) == 2 * len(names)
        endpoint.faults = lambda n, body: None
        assert {name: record["bad"] for name, record in zip(names, found.values(), strict=True)} == AT_ONCE
        assert all(set(record) == {"key", "bad", "detail"} and "\n" not in record["detail"]
                   for record in found.values())
        assert KEY not in str(found) and "HTTP 429: " in found[f"clip {names.index('429')}"]["detail"]
        assert not path.exists()
        assert ask(endpoint.base_url, path, len(names)) == expected(len(names))


def test_a_rejected_request_is_not_tried_again_and_stops_nothing_once_there_was_an_answer(path):
    def faults(n, body):
        return None if n == 0 else ("400", "413", "422")[n % 3]

    with FakeEndpoint(replies, faults) as endpoint:
        found = ask(endpoint.base_url, path, 20, concurrency=1)
        assert len(endpoint.requests) == 20
        assert [record.get("bad") for record in found.values()] == [None] + ["rejected"] * 19
        again = ask(endpoint.base_url, path, 20, concurrency=1)  # nor does what was answered last time count for less
        assert again == {**found, **{key: again[key] for key in list(found)[1:]}} and len(endpoint.requests) == 39


@pytest.mark.parametrize("fault", ["400", "html", "500", "close"])
def test_an_endpoint_that_never_answers_stops_the_stage(path, fault):
    with FakeEndpoint(replies, lambda n, body: fault) as endpoint:
        with pytest.raises(ValueError, match="failed 6 requests in a row.* the same command goes on") as caught:
            ask(endpoint.base_url, path, 1000, concurrency=2)
        assert endpoint.base_url in str(caught.value) and "\n" not in str(caught.value)
        assert 6 * (1 if fault == "400" else 3) <= len(endpoint.requests) < 100


@pytest.mark.parametrize("fault", ["500", "close", "429"])
def test_an_endpoint_that_goes_down_stops_the_stage(path, fault):
    with FakeEndpoint(replies, lambda n, body: fault if n >= 10 else None) as endpoint:
        with pytest.raises(ValueError, match=r"failed 6 requests .* keeps its 10 answers"):
            ask(endpoint.base_url, path, 1000, concurrency=2, attempts=2)
        endpoint.faults = lambda n, body: None
        assert len(lines(path)) == 10 and ask(endpoint.base_url, path, 40) == expected(40)


def test_failures_between_answers_stop_nothing(path):
    with FakeEndpoint(replies, lambda n, body: "500" if body["seed"] % 3 else None) as endpoint:
        found = ask(endpoint.base_url, path, 30, concurrency=1, attempts=1)
        assert sum("bad" in record for record in found.values()) == 20 and len(endpoint.requests) == 30


def test_nobody_listening_stops_the_stage(path):
    with pytest.raises(ValueError, match="no connection"):
        ask(closed_url(), path, 1000, concurrency=2)
    few = ask(closed_url(), path, 5, concurrency=2)
    assert [record["bad"] for record in few.values()] == ["no connection"] * 5


@pytest.mark.parametrize("status", ["401", "403", "404", "405"])
def test_a_refusal_stops_at_once_and_does_not_show_the_key(path, status):
    with FakeEndpoint(replies, lambda n, body: status if n >= 5 else None) as endpoint:
        with pytest.raises(ValueError) as caught:
            ask(endpoint.base_url, path, 100, concurrency=1)
        line = str(caught.value)
        assert len(endpoint.requests) == 6 and len(lines(path)) == 5
        assert KEY not in line and "no, not with ***" in line and "\n" not in line
        for part in (f"HTTP {status}: ", endpoint.base_url, "'teacher'", "the key in environment variable OPENAI_"):
            assert part in line
        assert endpoint.requests[-1].key == KEY
        with pytest.raises(ValueError, match="no key in environment variable"):
            ask(endpoint.base_url, path, 100, concurrency=1, api_key=None)


def test_a_refusal_of_many_requests_at_a_time_is_one_error(path):
    with FakeEndpoint(replies, lambda n, body: "404") as endpoint:
        for _ in range(20):
            with pytest.raises(ValueError, match="refuses model 'teacher'"):
                ask(endpoint.base_url, path, 100, concurrency=8)
        assert len(endpoint.requests) < 20 * 30


def test_without_a_key_the_token_for_the_hub_is_not_sent(path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with FakeEndpoint(replies) as endpoint:
        ask(endpoint.base_url, path, 1, api_key=None)
        assert endpoint.requests[0].key == "EMPTY"


def test_the_key_comes_from_the_variable_that_the_stage_names(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    assert key_from("MINE", "s") == ""
    for value, key in ((f" {KEY}\n", KEY), ("", "")):
        monkeypatch.setenv("MINE", value)
        assert key_from("MINE", "s") == key
    for bad in (f"{KEY}\n{KEY}", f"“{KEY}”"):
        monkeypatch.setenv("MINE", bad)
        with pytest.raises(ValueError, match="MINE") as caught:
            key_from("MINE", "s")
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "owner/name", "http://", "http://[::1", "http://a:b/v1",
                                 "file:///etc"])
def test_what_is_no_url_is_refused(path, url):
    with pytest.raises(ValueError, match="config: endpoint .* is no URL"):
        ask(url, path, 1)


def test_back_off_doubles_and_retry_after_is_honoured_up_to_a_cap(path, monkeypatch):
    def gaps(faults, **fields):
        path.unlink(missing_ok=True)
        with FakeEndpoint(replies, lambda n, body: dict(enumerate(faults)).get(n)) as endpoint:
            assert ask(endpoint.base_url, path, 1, **fields) == expected(1)
            times = [request.time_s for request in endpoint.requests]
            return [b - a for a, b in zip(times, times[1:], strict=False)]

    first, second, third = gaps(["500", "500", "503"], attempts=4, retry_backoff_s=0.05)
    assert 0.05 <= first and 0.1 <= second and 0.2 <= third
    assert gaps(["429 after 1"])[0] >= 1
    gaps(["503 after Wed, 21 Oct 2015 07:28:00 GMT"])  # which is not read: the stage's own wait
    monkeypatch.setattr(module, "MAX_RETRY_AFTER_S", 0.3)
    assert gaps(["429 after 86400"])[0] >= 0.3


def test_a_clip_that_cannot_be_used_is_counted_and_not_asked(path):
    def broken(load):
        raise MediaError("clip.mp4", "missing")

    requests = [Request(f"broken {i}", broken) for i in range(9)] + asked(3)
    with FakeEndpoint(replies) as endpoint:
        found = ask(endpoint.base_url, path, requests=requests, concurrency=1)
        assert found["broken 0"] == {"key": "broken 0", "bad": "missing", "detail": "clip.mp4: missing"}
        assert len(endpoint.requests) == 3 and len(lines(path)) == 3 and len(found) == 12


def test_an_error_in_making_a_request_is_raised(path):
    def wrong(load):
        raise ValueError("example 'a' has no video")

    with FakeEndpoint(replies) as endpoint, pytest.raises(ValueError, match="has no video"):
        ask(endpoint.base_url, path, requests=[*asked(2), Request("a", wrong)])


def test_an_answer_of_no_use_is_nonsense(path):
    def says(said, seed):
        return "maybe" if seed in (1001, 1003) else "Yes."

    with FakeEndpoint(says) as endpoint:
        found = ask(endpoint.base_url, path, 4, concurrency=1, is_usable=lambda text: yes_no(text) is not None)
        assert [record.get("bad") for record in found.values()] == [None, "nonsense", None, "nonsense"]
        assert "'maybe'" in found["clip 1"]["detail"] and len(lines(path)) == 2 and len(endpoint.requests) == 2 + 2 * 3


def test_log_probs_of_the_first_token(path):
    top = {"Yes": -0.25, "No": -1.6, " yes": -9999.0}
    with FakeEndpoint(lambda said, seed: {"text": "Yes.", "top": top}) as endpoint:
        found = ask(endpoint.base_url, path, 2, logprobs=True)
        assert found["clip 1"] == {"key": "clip 1", "text": "Yes.", "finished": True, "top": top}
        assert endpoint.requests[0].body["logprobs"] is True and endpoint.requests[0].body["top_logprobs"] == 20
        assert ask(endpoint.base_url, path, 2, logprobs=True) == found and len(endpoint.requests) == 2
        assert "top" not in ask(endpoint.base_url, path.with_name("2"), 1)["clip 0"]
        assert "logprobs" not in endpoint.requests[-1].body
        endpoint.replies = lambda said, seed: "Yes."  # an endpoint without
        assert "top" not in ask(endpoint.base_url, path.with_name("3"), 1, logprobs=True)["clip 0"]
        for wrong in (math.nan, -math.inf, 2.0, None, "-1"):
            endpoint.replies = lambda said, seed, wrong=wrong: {"text": "Yes.", "top": {"Yes": wrong}}
            found = ask(endpoint.base_url, path.with_name("4"), 1, logprobs=True, attempts=1)
            assert found["clip 0"]["bad"] == "nonsense"


def test_a_torn_last_line_is_dropped_and_asked_again(path, capsys):
    with FakeEndpoint(replies) as endpoint:
        found = ask(endpoint.base_url, path, 3, concurrency=1)
        whole = path.read_bytes()
        last = whole.rstrip(b"\n").rfind(b"\n") + 1
        for cut in (last + 1, last + 20, len(whole) - 2, len(whole) - 1):  # the last: all but the line's end
            path.write_bytes(whole[:cut])
            before = len(endpoint.requests)
            capsys.readouterr()
            assert ask(endpoint.base_url, path, 3) == found
            assert len(endpoint.requests) == before + 1 and path.read_bytes() == whole
            assert f"{path}: dropped the last line, cut short after {cut - last} bytes" in capsys.readouterr().err
        ask(endpoint.base_url, path, 3)
        assert "dropped" not in capsys.readouterr().err


@pytest.mark.parametrize("line", [
    b"{", b"7", b"[]", b'{"key": "x", "text": "y"}', b'{"key": "x", "text": null, "finished": true}',
    b'{"key": 7, "text": "y", "finished": true}', b'{"key": "x", "text": "y", "finished": 1}',
    b'{"key": "\xff", "text": "y", "finished": true}', b'{"key": "clip 0", "text": "y", "finished": true}'])
def test_a_malformed_line_is_an_error_and_stays(path, line):
    good = json.dumps({"key": "clip 0", "text": "yes", "finished": True}).encode()
    data = good + b"\n" + line + b"\n" + good.replace(b"clip 0", b"clip 2") + b"\n"
    path.write_bytes(data + b'{"key')
    with pytest.raises(ValueError, match=r"endpoint\.jsonl:2: "):
        ask(closed_url(), path, 3)
    assert path.read_bytes() == data


def test_a_full_disk_is_an_error_that_names_the_file():
    with pytest.raises(OSError, match="cannot write.*'/dev/full'"):
        append_jsonl("/dev/full", {"key": "x"}, sync=True)


KILLED = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from test_endpoint import Path, ask
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
url, holding_url, path, held = *sys.argv[2:4], *map(Path, sys.argv[4:6])

def child(run):
    if (pid := os.fork()) == 0:
        run()
        os._exit(7)
    return pid

for size in map(int, sys.argv[6:]):
    pid = child(lambda: ask(url, path, 60, concurrency=4))
    while not path.exists() or path.stat().st_size < size:
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    print(os.waitpid(pid, 0)[1], path.stat().st_size)
pid = child(lambda: ask(holding_url, path, 60, concurrency=4, timeout_s=60.0))
while not held.exists():
    time.sleep(0.01)
os.kill(pid, signal.SIGINT)
start = time.monotonic()
print(os.waitpid(pid, 0)[1], time.monotonic() - start)
"""


@pytest.mark.slow
def test_killed_and_started_again_it_neither_loses_nor_repeats_an_answer_and_an_interrupt_ends_it(path):
    def slowly(said, seed):
        time.sleep(0.003)
        return replies(said, seed)

    def hold(n, body):
        path.with_name("held").touch()
        return "time out"

    sizes = sorted(np.random.default_rng(0).integers(1, 6000, 4).tolist())  # of about 8,500 bytes
    with FakeEndpoint(slowly, first_attempts([None, None, "500", "close"])) as endpoint, \
            FakeEndpoint(replies, hold) as holding:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(ROOT / "tests"), endpoint.base_url, holding.base_url, str(path),
             str(path.with_name("held")), *map(str, sizes)],
            capture_output=True, text=True, timeout=300, cwd=ROOT, check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])})
        *kills, (status, seconds) = (line.split() for line in done.stdout.splitlines())
        assert [status for status, _ in kills] == [str(int(signal.SIGKILL))] * 4
        assert float(seconds) < 30 and "KeyboardInterrupt" in done.stderr
        known = [record["key"] for record in lines(path)]
        assert len(set(known)) == len(known) < 60
        before = len(endpoint.requests)
        assert ask(endpoint.base_url, path, 60) == expected(60)
        assert by_key(lines(path)) == by_key(expected(60).values())
        again = {request.body["seed"] - 1000 for request in endpoint.requests[before:]}
        assert again == set(range(60)) - {int(key.split()[1]) for key in known}
        assert len(lines(path)) == 60


@pytest.mark.parametrize("text, answer", [
    ("yes", True), ("Yes.", True), (" **YES**, it does", True), ("\n\"Yes\"", True), ("no", False), ("NO!", False),
    ("No: a dog", False), ("_no_", False), ("maybe", None), ("", None), ("...", None), ("Nope", None),
    ("yesterday", None), ("It is: yes", None), ("not really", None)])  # fmt: skip
def test_yes_or_no(text, answer):
    assert yes_no(text) is answer


def test_log_odds():
    top = {"Yes": math.log(0.5), " yes": math.log(0.1), "No": math.log(0.2), '"no': math.log(0.1), "Maybe": -3.0}
    assert log_odds(top) == pytest.approx(math.log(0.6 / 0.3))
    assert log_odds({"Yes": -0.1, "no": -9999.0}) == pytest.approx(9998.9)
    assert log_odds({}) is None and log_odds({"Maybe": -0.1, "yesterday": -3.0}) is None
    # one is missing: as likely as the least likely one listed, or as what the listed ones leave
    many = {"Yes": math.log(0.5), "Y": math.log(0.3), "It": math.log(0.01)}
    assert log_odds(many) == pytest.approx(math.log(0.5 / 0.01))
    assert log_odds({"no": math.log(0.9)}) == pytest.approx(-math.log(0.9 / 0.1))
    assert log_odds({"no": 0.0}) == pytest.approx(-math.log(1e6))


def decoded(part):
    kind, _, data = part["video_url"]["url"].partition(";base64,")
    assert part["type"] == "video_url" and kind == "data:video/mp4"
    return base64.b64decode(data, validate=True)


def test_a_silent_video_has_the_same_frames_and_nothing_else(tmp_path):
    wave = sine(440, 2)
    clips = [write_mp4(tmp_path / "a b.mp4", grey_frames(20), wave),
             write_mp4(tmp_path / "late.mp4", grey_frames(20), wave, late_s=0.5),
             write_mp4(tmp_path / "hidden.mp4", grey_frames(20), wave, hidden=5),
             write_mp4(tmp_path / "silent.mp4", grey_frames(1)),
             write_mp4(tmp_path / "-h264.mkv", grey_frames(20), wave)]
    for clip in clips:
        copy = tmp_path / "copy.mp4"
        copy.write_bytes(decoded(silent_video_part(clip)))
        with av.open(str(copy)) as container:
            assert [stream.type for stream in container.streams] == ["video"]
            assert container.format.name.startswith("mov,mp4")
        frames, rate = read_frames(clip)
        again, again_rate = read_frames(copy)
        assert (frames == again).all() and rate == pytest.approx(again_rate, rel=1e-3)
        with pytest.raises(MediaError, match="no audio track"):
            read_audio(copy)


def test_a_video_that_cannot_be_shown_says_why(tmp_path):
    clip = write_mp4(tmp_path / "a.mp4", grey_frames(20), sine(440, 2))
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:-2000])
    damaged = bytearray(clip.read_bytes())
    at = damaged.index(b"mdat") + 4
    damaged[at:at + 3000] = b"\xff" * 3000
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    write_mp4(tmp_path / "sound.mp4", None, sine(440, 2))
    write_mp4(tmp_path / "vp8.webm", grey_frames(4), codec="libvpx")
    for name, reason in (("none.mp4", "missing"), ("cut.mp4", "truncated"), ("damaged.mp4", "unreadable"),
                         ("sound.mp4", "no video track"), ("vp8.webm", "unreadable")):
        with pytest.raises(MediaError) as caught:
            silent_video_part(tmp_path / name)
        assert caught.value.reason == reason, name


def test_audio_is_a_16_khz_mono_wav(tmp_path):
    wave = np.stack([sine(440, 1, rate=44100), sine(880, 1, rate=44100)], 1) * 3  # beyond full scale
    clip = write_wav(tmp_path / "a.wav", wave, rate=44100, subtype="FLOAT")
    part = audio_part(clip)
    assert part["type"] == "input_audio" and part["input_audio"]["format"] == "wav"
    with soundfile.SoundFile(io.BytesIO(base64.b64decode(part["input_audio"]["data"], validate=True))) as file:
        assert (file.format, file.subtype, file.samplerate, file.channels) == ("WAV", "PCM_16", 16000, 1)
        heard = file.read(dtype="float32")
    truth = read_audio(clip).clamp(-1, 1).numpy()
    assert abs(truth).max() == 1 and len(heard) == len(truth) and abs(heard - truth).max() < 1e-4
    with pytest.raises(MediaError, match="missing"):
        audio_part(tmp_path / "none.wav")
