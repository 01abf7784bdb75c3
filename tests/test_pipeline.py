"""Traces and FactCheck behind an endpoint that fails: the accepted set is that of one that does not, and a kill loses
and repeats nothing."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_endpoint import FAULTS, FakeEndpoint, first_attempts
from mini import CLASSES, write_clips, write_config

from minixmd.config import FactCheck, Traces
from minixmd.config.load import load_config
from minixmd.inputs.examples import read_manifest
from minixmd.runner import main
from minixmd.runs.records import read_jsonl
from minixmd.stages.endpoint import audio_part

ROOT = Path(__file__).resolve().parents[1]
FILES = ("traces/samples.jsonl", "traces/traces.jsonl", "traces/labels.jsonl", "traces/results.json",
         "checked/verdicts.jsonl", "checked/traces.jsonl", "checked/results.json")


def replies(messages, seed):
    """A teacher who errs in one thought of five, a checker that believes two traces in three: by what they are sent."""
    [turn] = messages
    clip, text = turn["content"]
    assert turn["role"] == "user" and text["type"] == "text" and clip["type"] in ("video_url", "input_audio")
    sent = hashlib.blake2b(json.dumps(clip).encode()).digest()[0]
    if clip["type"] == "video_url":
        chosen = "ABC"[(sent + (seed % 5 == 0)) % 3]
        return f"<think>Thought {seed}: a {CLASSES[sent % 3]}.</think><answer>{chosen}</answer>"
    assert "\nThought " in text["text"] and "<answer>" not in text["text"]
    yes = (sent + sum(text["text"].encode())) % 3 > 0
    return {"text": "Yes." if yes else "no", "top": {"Yes" if yes else "no": -0.1, "no" if yes else "yes": -2.5}}


def deaf(messages, seed):
    """A checker that will not say what it thinks of a dog."""
    text = messages[0]["content"][1]["text"]
    return "Maybe." if "input_audio" in json.dumps(messages) and "a dog" in text else replies(messages, seed)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("pipeline") / "clips")


def config(folder, clips, url):
    remote = dict(endpoint=url, timeout_s=0.4, retry_backoff_s=0.001, attempts=3, concurrency=4)
    folder.mkdir(parents=True, exist_ok=True)
    sampled = dict(name="traces", manifest=str(clips), num_samples=4, served="teacher", **remote)
    checked = dict(sampled, name="checked", traces="@traces", checker="endpoint", served="checker")
    del checked["num_samples"]
    write_config(folder / "config.py", f"[Traces(**{sampled!r}), FactCheck(**{checked!r})]")
    return str(folder / "config.py")


def outputs(folder):
    return {name: (folder / "run" / name).read_text() for name in FILES}


@pytest.fixture(scope="module")
def undisturbed_run(clips, tmp_path_factory):
    """(outputs, requests) where the endpoint never fails."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with FakeEndpoint(replies) as endpoint:
        assert main([config(folder, clips, endpoint.base_url), f"run_dir={folder / 'run'}"]) == 0
    return outputs(folder), endpoint.requests


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run):
    return undisturbed_run[0]


def test_every_answer_goes_to_the_trace_that_was_asked_about(undisturbed_run, clips):
    texts, requests = undisturbed_run
    audio = {e.id: audio_part(e.audio) for e in read_manifest(clips)}
    traces = {(t["id"], t["sample"]): t for t in map(json.loads, texts["traces/traces.jsonl"].splitlines())}
    for verdict in map(json.loads, texts["checked/verdicts.jsonl"].splitlines()):
        thought = traces[verdict["id"], verdict["sample"]]["text"].partition(":")[0].removeprefix("<think>")
        [body] = [r.body for r in requests if f"{thought}:" in r.body["messages"][0]["content"][1]["text"]]
        assert body["messages"][0]["content"][0] == audio[verdict["id"]]
        assert verdict["accepted"] == (replies(body["messages"], body["seed"])["text"] == "Yes.")


def test_what_the_endpoint_says_goes_through_both_stages(undisturbed):
    samples = [json.loads(line) for line in undisturbed["traces/samples.jsonl"].splitlines()]
    traces = [json.loads(line) for line in undisturbed["traces/traces.jsonl"].splitlines()]
    verdicts = [json.loads(line) for line in undisturbed["checked/verdicts.jsonl"].splitlines()]
    results = json.loads(undisturbed["traces/results.json"])
    assert len(samples) == 12 and all(len(record["samples"]) == 4 for record in samples)
    assert 0 < results["clips_by"]["unanimous"] < 12 and results["usable"] == len(traces) == 48
    assert len({trace["text"] for trace in traces}) == 48  # a seed each
    used = [trace for trace in traces if trace["sample"] == 0 or trace["unanimous"]]
    assert len(verdicts) == len(used) and {verdict["score"] for verdict in verdicts} == {2.4, -2.4}
    accepted = json.loads(undisturbed["checked/results.json"])["accepted"]
    assert 0 < accepted < len(used) == json.loads(undisturbed["checked/results.json"])["traces"]


def test_faults_change_nothing(undisturbed, clips, tmp_path):
    """Every kind of fault, on the first attempt of every request."""
    with FakeEndpoint(replies, first_attempts(FAULTS)) as endpoint:
        assert main([config(tmp_path, clips, endpoint.base_url), f"run_dir={tmp_path / 'run'}"]) == 0
        assert {request.fault for request in endpoint.requests} == {None, *FAULTS}
    assert outputs(tmp_path) == undisturbed


def test_a_checker_that_will_not_say_yes_or_no_is_asked_again(undisturbed, clips, tmp_path):
    asked = set()

    def evasive(messages, seed):
        which = json.dumps(messages)
        if "input_audio" in which and which not in asked:
            asked.add(which)
            return "Maybe."
        return replies(messages, seed)

    with FakeEndpoint(evasive) as endpoint:
        assert main([config(tmp_path, clips, endpoint.base_url), f"run_dir={tmp_path / 'run'}"]) == 0
    assert outputs(tmp_path) == undisturbed


def test_what_never_comes_is_counted_and_asked_for_again(undisturbed, clips, tmp_path, capsys):
    with FakeEndpoint(deaf) as endpoint:
        source = config(tmp_path, clips, endpoint.base_url)
        assert main([source, f"run_dir={tmp_path / 'run'}"]) == 1
        told = capsys.readouterr().err
        assert "requests came to nothing ({'nonsense':" in told and "asks for those again" in told
        endpoint.replies = replies
        assert main([source, f"run_dir={tmp_path / 'run'}"]) == 0
    assert outputs(tmp_path) == undisturbed


def test_a_stage_that_gave_up_goes_on_elsewhere_with_more_patience_and_keeps_its_answers(clips, tmp_path, capsys):
    folder = tmp_path / "run" / "checked"
    with FakeEndpoint(deaf) as endpoint:
        source = config(tmp_path, clips, endpoint.base_url)
        assert main([source, f"run_dir={tmp_path / 'run'}"]) == 1
        assert "and with a larger max_bad goes on without them" in capsys.readouterr().err
    answered = (folder / "endpoint.jsonl").read_bytes()
    with FakeEndpoint(deaf) as endpoint:
        changed = dict(max_bad=1.0, endpoint=endpoint.base_url, api_key_env="MINE", attempts=2, timeout_s=9.0,
                       retry_backoff_s=0.002, concurrency=3, logprobs=False)
        command = [source, f"run_dir={tmp_path / 'run'}", *(f"checked.{name}={changed[name]}" for name in changed)]
        command = [part.replace("=False", "=false") for part in command]
        assert main(command) == 0
        assert endpoint.requests and all("a dog" in json.dumps(request.body) for request in endpoint.requests)
        count = len(endpoint.requests)
        assert main([source, f"run_dir={tmp_path / 'run'}"]) == 0 and len(endpoint.requests) == count  # finished
    assert (folder / "endpoint.jsonl").read_bytes() == answered and len(lines_of(folder / "endpoint.jsonl")) > 4
    used = json.loads((folder / "config.json").read_text())
    assert {name: used[name] for name in changed} == changed
    assert main([*command, "checked.served=another"]) == 1
    assert 'by another config: served "checker" -> "another"; set' in capsys.readouterr().err


def test_samples_that_never_came_are_counted_under_their_reason(clips, tmp_path):
    def faults(n, body):  # the last sample of every clip, and all of the second clip's
        return "422" if n < 48 and (n % 4 == 3 or n // 4 == 1) else None

    with FakeEndpoint(replies, faults) as endpoint:
        command = [config(tmp_path, clips, endpoint.base_url), f"run_dir={tmp_path / 'run'}", "traces.concurrency=1"]
        assert main([*command, "traces.max_bad=0.4"]) == 0
    folder = tmp_path / "run" / "traces"
    samples, labels = lines_of(folder / "samples.jsonl"), lines_of(folder / "labels.jsonl")
    bad = samples.pop(1)
    assert bad["bad"] == labels.pop(1)["bad"] == "rejected" and "HTTP 422" in bad["detail"]
    for record, label in zip(samples, labels, strict=True):
        assert [sample["use"] for sample in record["samples"]] == ["ok"] * 3 + ["rejected"]
        assert label["bad"] == "rejected"
    results = json.loads((folder / "results.json").read_text())
    assert results["unusable"] == {"rejected": 11} and results["bad"] == {"rejected": 1} and results["usable"] == 33


def test_a_server_that_refuses_log_probs_can_do_without(undisturbed, clips, tmp_path, capsys):
    with FakeEndpoint(replies, lambda n, body: "no log-probs" if body.get("logprobs") else None) as endpoint:
        command = [config(tmp_path, clips, endpoint.base_url), f"run_dir={tmp_path / 'run'}"]
        assert main(command) == 1 and "logprobs" in capsys.readouterr().err  # in the server's words
        assert main([*command, "checked.logprobs=false"]) == 0
    scores = [{**record, "score": max(-1, min(1, record["score"]))}
              for record in map(json.loads, undisturbed["checked/verdicts.jsonl"].splitlines())]
    assert lines_of(tmp_path / "run" / "checked" / "verdicts.jsonl") == scores


def test_each_key_goes_to_its_own_server_and_is_written_nowhere(clips, tmp_path, monkeypatch):
    named = {s.name: s.api_key_env for s in load_config("sightsound_endpoint").stages if hasattr(s, "api_key_env")}
    assert named["test_traces"] == named["traces"] and named["test_traces_checked"] == named["checked"]
    monkeypatch.setenv(named["traces"], "tk-very-secret")
    monkeypatch.setenv(named["checked"], "sk-very-secret")
    with FakeEndpoint(replies) as teacher, FakeEndpoint(replies) as checker:
        assert main([config(tmp_path, clips, teacher.base_url), f"run_dir={tmp_path / 'run'}",
                     f"checked.endpoint={checker.base_url}",
                     *(f"{name}.api_key_env={named[name]}" for name in ("traces", "checked"))]) == 0
        assert {request.key for request in teacher.requests} == {"tk-very-secret"}
        assert {request.key for request in checker.requests} == {"sk-very-secret"}
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if b"very-secret" in path.read_bytes()]


def test_a_wrong_key_is_one_line(clips, tmp_path, capsys):
    with FakeEndpoint(replies, lambda n, body: "401") as endpoint:
        assert main([config(tmp_path, clips, endpoint.base_url), f"run_dir={tmp_path / 'run'}"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("minixmd: traces: ") and "401" in last


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


@pytest.mark.slow
def test_killed_at_any_point_it_neither_loses_nor_repeats_a_sample(undisturbed, clips, tmp_path):
    def slowly(messages, seed):
        time.sleep(0.005)
        return replies(messages, seed)

    logs = [tmp_path / "run" / name / "endpoint.jsonl" for name in ("traces", "checked")]
    with FakeEndpoint(slowly, first_attempts([None, None, "500", "cut"])) as endpoint:
        command = [sys.executable, "-m", "minixmd.train", config(tmp_path, clips, endpoint.base_url),
                   f"run_dir={tmp_path / 'run'}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        for wanted in (9, 60):  # answers on disk: among the samples, among the verdicts
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
            while sum(len(lines_of(log)) for log in logs) < wanted and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            on_disk = [lines_of(log) for log in logs]
            for log, records in zip(logs, on_disk, strict=True):
                if records:  # and a line that the kill cut short
                    with open(log, "ab") as file:
                        file.write(b'{"key": "clip0/9", "te')
            before = len(endpoint.requests)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answered = {record["text"] for record in on_disk[0]}
        again = [replies(request.body["messages"], request.body["seed"]) for request in endpoint.requests[before:]
                 if "video_url" in json.dumps(request.body["messages"])]
        assert len(on_disk[0]) == 48 and not again and answered  # the second kill came after the last sample
        for log in logs:
            keys = [record["key"] for record in lines_of(log)]
            assert len(keys) == len(set(keys))
    assert outputs(tmp_path) == undisturbed


def test_the_stages_fields_say_who_is_asked():
    remote = dict(endpoint="http://localhost/v1", served="m")
    assert Traces(name="t", manifest="m", **remote).model is None
    with pytest.raises(ValueError, match="either model or endpoint must be given"):
        Traces(name="t", manifest="m", model="m", **remote)
    with pytest.raises(ValueError, match="either model or endpoint must be given"):
        Traces(name="t", manifest="m")
    with pytest.raises(ValueError, match="both or neither"):
        Traces(name="t", manifest="m", endpoint="http://localhost/v1")
    for given in (Traces, dict(name="t", manifest="m")), (FactCheck, dict(name="c", traces="t", manifest="m",
                                                                          checker="endpoint")):
        with pytest.raises(ValueError, match="endpoint 'localhost:8000' is no URL such as http://localhost:8000/v1"):
            given[0](**given[1], endpoint="localhost:8000", served="m")
        with pytest.raises(ValueError, match="attempts must be >= 1, got 0"):
            given[0](**given[1], **remote, attempts=0)
    with pytest.raises(ValueError, match="shown 'video' or 'audio', 'both' or 'none', got 'sounded'"):
        Traces(name="t", manifest="m", media="sounded", **remote)
    for name, value in dict(fps=2.0, min_pixels=3136, max_pixels=602_112, nframes=8).items():
        with pytest.raises(ValueError, match=f"an endpoint does not use {name}, got {value}"):
            Traces(name="t", manifest="m", **remote, **{name: value})
        Traces(name="t", manifest="m", model="m", **{name: value})
    with pytest.raises(ValueError, match="checker 'model' does not use logprobs, got False"):
        FactCheck(name="c", traces="t", manifest="m", model="m", logprobs=False)
    with pytest.raises(ValueError, match="checker 'endpoint' needs served, got None"):
        FactCheck(name="c", traces="t", manifest="m", checker="endpoint", endpoint="http://localhost/v1")
    with pytest.raises(ValueError, match="checker 'model' does not use verdicts, got 'v'"):
        FactCheck(name="c", traces="t", manifest="m", model="m", verdicts="v")
    with pytest.raises(ValueError, match="prompt '{options}' must hold the placeholder 'trace'"):
        FactCheck(name="c", traces="t", manifest="m", model="m", prompt="{options}")
    with pytest.raises(ValueError, match="trace_filter 'calibration' with limit None"):
        FactCheck(name="c", traces="t", manifest="m", model="m", trace_filter="calibration")


def test_the_records_of_a_run_can_be_read(undisturbed, tmp_path):
    (tmp_path / "v.jsonl").write_text(undisturbed["checked/verdicts.jsonl"])
    assert all(set(record) == {"id", "sample", "score", "accepted"} for record in read_jsonl(tmp_path / "v.jsonl"))
