"""--only and --keep-going: which stages of a config run, and what a run that lost one of them still makes."""
import json

import pytest
from mini import write_clips, write_config, write_model

from minixmd.config import Evaluate, Report
from minixmd.config.field_checks import ConfigError
from minixmd.config.references import select
from minixmd.report.gather import without
from minixmd.runner import main

STAGES = """[
    Evaluate(name="ears", model={audio!r}, manifest={manifest!r}, media="audio"),
    Label(name="labels", model={audio!r}, manifest={manifest!r}, media="audio"),
    Evaluate(name="eyes", model={vision!r}, manifest={shown!r}, media="video"),
    Distill(name="taught", model={audio!r}, manifest={manifest!r}, teacher_labels="@labels", max_steps=1),
    Distill(name="lost", model={audio!r}, manifest={manifest!r}, teacher_labels={labels!r}, max_steps=1),
    Evaluate(name="after", model="@taught", manifest={manifest!r}, media="audio"),
    Evaluate(name="gone", model="@lost", manifest={manifest!r}, media="audio"),
    Report(tables={{"ears": {{"test": "@ears"}}, "eyes": {{"test": "@eyes"}}, "gone": {{"test": "@gone"}},
                   "after": {{"test": "@after"}}}}),
]"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keep_going")
    manifest = str(write_clips(folder / "clips"))
    return dict(audio=str(write_model(folder / "audio", "audio")), vision=str(write_model(folder / "vision", "vision")),
                manifest=manifest, shown=manifest)  # fmt: skip


def made(run):
    return {path.parent.name for path in run.glob("*/done.json")}


def test_stages_and_what_they_need_are_chosen_in_order(world, tmp_path, capsys):
    config = write_config(tmp_path / "config.py", STAGES.format(labels="@labels", **world))
    assert main([str(config), f"run_dir={tmp_path / 'run'}", "--only", "after", "eyes"]) == 0
    assert made(tmp_path / "run") == {"labels", "eyes", "taught", "after"}
    capsys.readouterr()
    assert main([str(config), f"run_dir={tmp_path / 'run'}", "--only", "afte"]) == 1
    assert capsys.readouterr().err == ("minixmd: config: --only afte: no stage has that name; did you mean 'after'?\n")


def test_what_needs_a_failed_stage_alone_is_missing_and_later_made_alone(world, tmp_path, capsys):
    wrong = tmp_path / "labels.jsonl"
    wrong.write_text('{"id": "clip0", "option": "dog"}\n')  # of one clip of twelve
    config = write_config(tmp_path / "config.py", STAGES.format(labels=str(wrong), **world))
    run = tmp_path / "run"
    command = [str(config), f"run_dir={run}"]
    assert main(command) == 1 and made(run) == set()  # without the flag it ends before the first stage
    assert main([*command, "--keep-going"]) == 1
    assert made(run) == {"ears", "labels", "eyes", "taught", "after"}
    error = capsys.readouterr().err
    assert error.count("no label for example 'clip1'") == 2
    assert "minixmd: gone: not run, since it needs lost\n" in error
    assert error.endswith("minixmd: not made: lost, gone, report; the same command makes what is missing\n")
    partial = json.loads((run / "report-partial" / "report.json").read_text())
    assert list(partial["tables"]) == ["ears", "eyes", "after"]
    assert partial["notes"] == {"gone, test": "gone: not run, since it needs lost"}
    for name in ("report.html", "report.md"):
        assert "not run, since it needs lost" in (run / "report-partial" / name).read_text()
    times = {path: path.stat().st_mtime_ns for path in run.glob("*/done.json")}
    wrong.write_text((run / "labels" / "labels.jsonl").read_text())
    assert main([*command, "--keep-going"]) == 0
    assert made(run) == {*(path.parent.name for path in times), "lost", "gone", "report"}
    assert not (run / "report-partial").exists()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_stage_that_fails_while_it_runs_costs_only_its_own(world, tmp_path, capsys):
    shown = write_clips(tmp_path / "clips")
    for path in sorted(shown.parent.glob("*.mp4"))[1:]:
        path.write_bytes(b"no film")
    config = write_config(tmp_path / "config.py", STAGES.format(labels="@labels", **world | {"shown": str(shown)}))
    run = tmp_path / "run"
    assert main([str(config), f"run_dir={run}", "--keep-going"]) == 1
    assert made(run) == {"ears", "labels", "taught", "lost", "after", "gone"}
    assert capsys.readouterr().err.endswith("not made: eyes, report; the same command makes what is missing\n")


def test_a_report_keeps_all_that_does_not_need_the_failed():
    cells = {row: {"test": f"@{row}", "more": f"@{row}_more"} for row in "abc"}
    report = Report(tables=cells, roles=("a", "b", "c"), gap="test", clips="clips.jsonl", gallery=("a", "b"),
                    traces="@traces", verdicts="@checked/verdicts.jsonl", switch="@switch", notes={"first": "said"},
                    senses={"test": {"x": "@a", "y": "@c"}}, scored={s: f"@{s}/completions.jsonl" for s in "bc"},
                    differences={"b, a": ("b", "a"), "c, a": ("c", "a")},
                    curves={"x": {"a": "@a/log.jsonl", "c": "@c/log.jsonl"}, "y": {"c": "@c/log.jsonl"}})  # fmt: skip
    kept = without(report, {"c": "it burnt", "a_more": "lost", "traces": "empty"})
    assert kept.tables == {"a": {"test": "@a"}, "b": cells["b"], "c": {"more": "@c_more"}}
    assert kept.curves == {"x": {"a": "@a/log.jsonl"}} and kept.switch == "@switch"
    assert (kept.roles, kept.senses, kept.clips, kept.gallery) == (None, None, "clips.jsonl", ("a", "b"))
    assert (kept.traces, kept.verdicts) == (None, None) and kept.scored == {"b": "@b/completions.jsonl"}
    assert kept.differences == report.differences
    assert kept.notes == {"first": "said", "c, test": "it burnt", "a, more": "lost", "test, y": "it burnt",
                          "x, c": "it burnt", "y, c": "it burnt", "c": "it burnt", "traces": "empty",
                          "class by class": "a row of its roles is not whole"}  # fmt: skip
    whole = without(report, {"a_more": "lost", "switch": "lost too"})
    assert (whole.roles, whole.switch) == (report.roles, None) and whole.senses == report.senses
    assert without(report, {"c": "x", "c_more": "y"}).differences == {"b, a": ("b", "a")}
    assert without(report, {"a": "x", "b": "y"}).clips is None  # nobody is left to show
    with pytest.raises(ValueError, match="report: no row could be made"):
        without(report, dict.fromkeys(["a", "a_more", "b", "b_more", "c", "c_more"], "x"))


def test_a_stage_named_like_a_partial_report_stays_and_the_last_override_behind_only_wins(world, tmp_path):
    config = write_config(tmp_path / "config.py", """[
        Evaluate(name="ears-partial", model={audio!r}, manifest={manifest!r}),
        Evaluate(name="ears", model={audio!r}, manifest={manifest!r}),
        Evaluate(name="more", model={audio!r}, manifest={manifest!r})]""".format(**world))
    run = tmp_path / "run"
    overrides = [f"seed={i}" for i in range(9)]
    assert main([str(config), "--only", "ears-partial", "ears", f"run_dir={run}", *overrides]) == 0
    assert made(run) == {"ears-partial", "ears"}
    assert json.loads((run / "ears" / "config.json").read_text())["seed"] == 8


def test_only_names_stages():
    stage = Evaluate(name="a", model="m", manifest="x")
    assert select((stage,), ["a"]) == (stage,)
    with pytest.raises(ConfigError, match="--only b: no stage has that name"):
        select((stage,), ["b"])


def test_a_distillation_with_nothing_to_learn_is_a_row_that_says_so(world, tmp_path):
    decisions = tmp_path / "switch.jsonl"
    decisions.write_text("".join(f'{{"id": "clip{i}", "p_teacher": 0.1}}\n' for i in range(12)))
    config = write_config(tmp_path / "config.py", """[
        Evaluate(name="before", model={audio!r}, manifest={manifest!r}),
        Label(name="labels", model={audio!r}, manifest={manifest!r}),
        Distill(name="taught", model={audio!r}, manifest={manifest!r}, teacher_labels="@labels", gate="learned",
                switch={switch!r}, max_steps=1),
        Evaluate(name="after", model="@taught", manifest={manifest!r}),
        Report(tables={{"before": {{"test": "@before"}}, "after": {{"test": "@after"}}}},
               curves={{"Distillation": {{"after": "@taught/log.jsonl"}}}})]""".format(**world, switch=str(decisions)))
    assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 0
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["notes"] == {
        "labels": f"labels are by {world['audio']}, from the letters' logits",
        "after": "nothing to learn ({'left out: switch open': 12}): its model is the one before"}
    for name in ("report.html", "report.md"):
        assert "its model is the one before" in (tmp_path / "run" / "report" / name).read_text()
    answers = [(tmp_path / "run" / name / "answers.jsonl").read_text() for name in ("before", "after")]
    assert answers[0] == answers[1]
