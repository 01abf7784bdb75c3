"""The report's files say what the results say and no more, and its page is safe, well-formed and complete by itself."""
import base64
import json
import math
import re
from dataclasses import make_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_papers import XMD_FIGURE_1, XMD_TABLE_1, XMD_TABLE_2

from minixmd.config import Report
from minixmd.config.field_checks import ConfigError
from minixmd.config.references import check_references, input_paths
from minixmd.inputs.examples import read_manifest
from minixmd.report import clips as report_clips
from minixmd.report import gather as report
from minixmd.report.render import ROLES, markdown, page, ticks
from minixmd.runner import main
from minixmd.stages.evaluate import how_read
from minixmd.tasks.statistics import digest, groups, paired_interval, tabulate, wilson
from minixmd.tasks.yes_no import tally

ROOT = Path(__file__).parents[1]
ODD = "<b>&\"'|</script>"  # a class, a group, an option, a row and a column of this name
VOID = {"meta", "link", "rect", "line", "circle", "polyline"}
TAGS = VOID | set("html head title style body h1 h2 h3 h4 p ul li nav a small section div table thead tbody tr th td "
                  "svg g text span details summary pre video audio".split())
FILES = ("report.html", "report.json", "report.md")


@pytest.fixture(autouse=True, scope="module")
def _everything_decodes():
    """The media files of these worlds are a few letters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_clips.Media, "_decodes", lambda self, file, kind: True)
        yield


def plain(text):
    return " ".join(text.split())


class Page(HTMLParser):
    """Reads a page into `text`, `tables` (rows of texts), `svgs` (title and elements) and `links`; tags must nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.svgs, self.links, self.text = [], [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = plain(self.text)
        self.tables = [[[plain(cell) for cell in row] for row in table] for table in self.tables]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href", "poster", "srcset", "data", "action")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if "svg" in self.open:
            self.svgs[-1].append((tag, dict(attrs)))
        elif tag == "svg":
            self.svgs.append([])
        if tag not in VOID:
            self.open.append(tag)

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data * (self.open[-1:] != ["style"])
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += " " * ("small" in self.open) + data
        elif "svg" in self.open and data.strip():
            self.svgs[-1].append((self.open[-1], data.strip()))

    def table(self, corner):
        """The table whose first column begins with these cells."""
        return next(t for t in self.tables if [row[0] for row in t][-len(corner):] == corner)


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def evaluated(folder, examples, right, *, generate=False):
    """What stage Evaluate leaves for a model that is right where right(i) is, and otherwise says the next option."""
    records = []
    for i, e in enumerate(examples):
        answer = e.answer if right(i) else (e.answer + 1) % len(e.options)
        records.append({"id": e.id, "answer": answer, "option": e.options[answer], "logits": [0.0] * len(e.options)})
        if generate:
            records[-1] |= {"by_letters": e.answer, "how": "letter", "text": f"It is {ODD}", "finished": True}
        if right(i) is None:
            records[-1] = {"id": e.id, "bad": "empty", "detail": "no frames"}
    results = {"model": "m", "manifest": "x", "media": "audio", "bad": {}, **tabulate(examples, records)}
    results |= how_read(examples, records)
    for e, record in zip(examples, records, strict=True):
        record["question"] = digest(e)
        if "bad" not in record:
            record["right"] = record["answer"] == e.answer
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    write_lines(folder / "answers.jsonl", records)
    return str(folder / "results.json")


def manifest(folder, split, classes, each):
    """`each` clips of every class, in turn; the media are bytes that nobody decodes. Returns the Examples."""
    lines, options = [], list(dict.fromkeys(classes))
    for i in range(each * len(classes)):
        label = i % len(classes)
        for kind, size in (("wav", 300), ("mp4", 500)):
            (folder / f"{split} {i}#.{kind}").write_bytes(bytes([i % 251]) * size)
        lines.append(dict(id=f"{split}{i}", audio=f"{split} {i}#.wav", video=f"{split} {i}#.mp4", question="Which <i>?",
                          options=options, answer=options.index(classes[label]), label=classes[label],
                          meta={"group": ODD if label % 2 else "plain"}))  # fmt: skip
    return read_manifest(write_lines(folder / f"{split}.jsonl", lines))


SEEN = ["dog", "cat", "owl", ODD, "a very long name of a class, far longer than the fifty-two letters that fit", "bee"]
TEACHER = {"analysis": lambda i: i % 6 < 4, "test": lambda i: i % 6 < 4 and i != 6, "unseen": lambda i: i % 2 == 0}
BEFORE = {"analysis": lambda i: i % 6 in (0, 4) or i < 6, "test": lambda i: i % 6 in (0, 4), "unseen": lambda i: False}
AFTER = {"analysis": lambda i: i % 6 < 5, "test": lambda i: None if i == 9 else i % 6 < 4, "unseen": lambda i: i < 3}
ROWS = {"teacher": TEACHER, ODD: BEFORE, "student after": AFTER}


# token, its probability under student and teacher, the teacher's likeliest, its probability; the level it is drawn with
TOLD = [("<think>", 1, 1, "<think>", 1, 0), (" dog\n", .9, .4, " cat", .6, 1), ("s", .9, .5, "s", .5, 0),
        (ODD, .8, .02, f"{ODD}\n", .75, 2), (" a", .7, .09, " a", .09, 2), (".", .6, .005, " \t", .85, 3),
        ("<|im_end|>", .5, 1e-4, " and", .999, 4)]  # fmt: skip
SAID = [[word, math.log(p), math.log(q), likeliest, math.log(most) + 1e-7] for word, p, q, likeliest, most, _ in TOLD]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with three splits, three models' results on each, a switch and two logs."""
    folder = tmp_path_factory.mktemp("world")
    for split, classes, each in (("analysis", SEEN, 5), ("test", SEEN, 4), ("unseen", ["saw", "horn"], 3)):
        examples = manifest(folder, split, classes, each)
        for n, models in enumerate(ROWS.values()):
            evaluated(folder / f"{n}_{split}", examples, models[split], generate=n == 2 and split == "test")
    decisions = [dict(id=str(i), p_teacher=i / 10, oracle=float(i > 2)) for i in range(10)]
    write_lines(folder / "switch/switch.jsonl", decisions)
    decided = tally([line["p_teacher"] for line in decisions], [line["oracle"] for line in decisions])
    (folder / "switch/results.json").write_text(json.dumps(dict(clips=10, clips_to_teacher=5, training=decided)))
    write_lines(folder / "train.jsonl", [{"step": 0, "steps": 400}] + [
        line for step in range(1, 401) for line in ([{"step": step, "loss": 3 / step, "lr": 1}] + [
            {"step": step, "val_accuracy": step / 800}] * (step % 100 == 0))])
    write_lines(folder / "epochs.jsonl", [{"epoch": e, "loss": 0.5 / e, "val_accuracy": 1 - 0.4 / e}
                                          for e in (1, 2, 3)])
    write_lines(folder / "completions.jsonl", [
        {"step": step, "id": f"clip{step}", "reward": i / 3, "text": "", "teacher": SAID}
        for step in (1, 11, 21) for i in range(4)] + [{"step": 31, "id": "untaught", "reward": 1}])
    write_lines(folder / "silent.jsonl", [{"step": 1, "id": "untaught", "reward": 1.0}])
    return folder


def tables(world, splits=("analysis", "test", "unseen")):
    return {row: {split: str(world / f"{n}_{split}/results.json") for split in splits} for n, row in enumerate(ROWS)}


def made(stage, folder):
    folder.mkdir(exist_ok=True)
    report.run(stage, folder, lambda record: None)
    return json.loads((folder / "report.json").read_text()), Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """(folder, report.json, the page) of a report with everything."""
    folder = tmp_path_factory.mktemp("report")
    stage = Report(tables=tables(world), ablation={"KL on teacher's logits": {"test": f"{world}/2_test/results.json"}},
                   differences={f"gained {ODD}": ("student after", ODD),
                                "mine": ("student after", "KL on teacher's logits")},
                   published="xmd", roles=tuple(ROWS), bars=("test", "unseen"), clips=f"{world}/test.jsonl",
                   scored={ODD: f"{world}/completions.jsonl", "silent": f"{world}/silent.jsonl"},
                   switch=f"{world}/switch/switch.jsonl",
                   curves={ODD: {ODD: f"{world}/train.jsonl"}, "Switch": {"switch": f"{world}/epochs.jsonl"}})
    return folder, *made(stage, folder)


def data_uris(folder, section):
    """{path: data URI} of the media of a report's clips."""
    files = [file for kind in section["kinds"] for clip in kind["clips"] for file in clip["media"]]
    return {file["path"]: f"data:{'audio/wav' if file['kind'] == 'audio' else 'video/mp4'};base64,"
            + base64.b64encode((folder / file["path"]).read_bytes()).decode() for file in files}


def pct(share):
    return f"{100 * share:.1f}"


def shown(part, between=" "):
    return f"{pct(part['accuracy'])}{between}{pct(part['interval'][0])}–{pct(part['interval'][1])}"


def test_tables_alone_are_enough(world, tmp_path, capsys):
    found, html = made(Report(tables=tables(world, ["test"])), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert [tag for tag, _ in html.tags].count("section") == 1 and not html.svgs and found["paper"] is None
    out = capsys.readouterr().out
    cell = found["tables"]["teacher"]["test"]
    assert f"| teacher           | {shown(cell, ' (')}) " in out and out.count("| teacher ") == 2  # all, and by group
    assert "".join((tmp_path / "report.md").read_text().split("\n\n", 1)[1]).strip() in out and "±" not in out
    made(Report(tables={}), tmp_path)  # nothing to show is no error


def test_one_group_of_clips_has_no_table_of_its_own(tmp_path):
    results = evaluated(tmp_path / "m", manifest(tmp_path, "test", ["x", "y"], 2)[::2], lambda i: True)
    _, html = made(Report(tables={"m": {"test": results}}), tmp_path / "r")
    assert [table[1][0] for table in html.tables] == ["accuracy, %"]


def test_templates_and_published_figures_are_installed():
    given = re.search(r'"minixmd.report": (\[.*?\])', (ROOT / "setup.py").read_text())[1]
    files = [path for path in (ROOT / "minixmd/report").iterdir() if path.suffix != ".py" and path.is_file()]
    assert files and all(any(path.match(pattern) for pattern in json.loads(given)) for path in files)


def test_the_figures_are_those_of_the_results(world, whole):
    _, found, _ = whole
    for n, row in enumerate(ROWS):
        for split, cell in found["tables"][row].items():
            results = json.loads((world / f"{n}_{split}/results.json").read_text())
            kept = {name: cell[name] for name in ("count", "correct", "accuracy", "interval", "groups")}
            assert kept == {name: results[name] for name in kept}
    correct = sum(map(TEACHER["test"], range(24)))
    assert found["tables"]["teacher"]["test"]["correct"] == correct == 15
    assert found["tables"]["teacher"]["test"]["interval"] == list(wilson(15, 24))


def test_the_page_is_made_from_report_json_alone(whole):
    folder, found, _ = whole
    assert page(found, data_uris(folder, found["clips"])) == (folder / "report.html").read_text()


def test_every_cell_of_the_accuracies_is_that_of_report_json(whole):
    _, found, html = whole
    rows, by_group = html.tables[:2]
    assert rows[0] == by_group[0] == ["", "analysis 30 clips", "test 24 clips", "unseen 6 clips"]
    assert rows[1] == ["accuracy, %", "all", "all", "by letters", "they differ", "all"]
    assert by_group[1] == ["accuracy by group, %", *[ODD, "plain"] * 3]
    for row, parts, cells in zip(rows[2:], by_group[2:], found["tables"].values(), strict=True):
        a, t, u = (cells[split] for split in ("analysis", "test", "unseen"))
        letters = [shown(t["letters"]), pct(t["disagreement"])] if "letters" in t else ["-", "-"]
        assert row[1:] == [shown(a), shown(t), *letters, shown(u)]
        assert parts[1:] == [shown(cell["groups"][group]) for cell in (a, t, u) for group in (ODD, "plain")]
    assert found["tables"]["student after"]["test"]["disagreement"] == 8 / 23  # where its words are wrong


def test_differences_are_paired_and_stand_in_page_and_markdown(world, whole, tmp_path):
    folder, found, html = whole
    titles = [f"gained {ODD}", "the student after, less before", "the student after, less the teacher"]
    differences = {(one["title"], one["column"]): one for one in found["differences"]}
    columns = ("analysis", "test", "unseen")
    expected = [(title, column) for title in titles for column in columns]
    assert list(differences) == [*expected[:3], ("mine", "test"), *expected[3:]]
    for title, counts in zip(titles, [(23, 1, 11, 4, 4)] * 2 + [(23, 1, 1, 0, 14)], strict=True):
        one = differences[title, "test"]
        assert (one["count"], one["left_out"], one["only_a"], one["only_b"], one["both"]) == counts
    assert differences["mine", "test"]["difference"] == 0, "a row of either table"
    rows = html.table([f"{title}: {column}" for title, column in differences])[1:]
    written = (folder / "report.md").read_text()
    for row, one in zip(rows, differences.values(), strict=True):
        low, high = (f"{100 * limit:+.1f}" for limit in one["interval"])
        gain, *counts = f"{100 * one['difference']:+.1f}", str(one["only_a"]), str(one["only_b"]), str(one["count"])
        assert row[1:] == [f"{gain} {low} to {high}", *counts] and f" {gain} ({low} to {high})" in written
    low, high = paired_interval(4, 11, 4, 4)
    assert differences[titles[0], "test"]["interval"] == [low, high]
    assert made(Report(tables=tables(world)), tmp_path)[0]["differences"] == []


def test_groups_by_hand():
    lead = {"a": 0.5, "b": 0.1, "c": -0.2, "d": 0.0, "e": 0.3, "f": -0.2, "g": 0.1}
    assert list(groups(lead).values()) == [["a", "e", "b"], ["c", "f"], ["d", "g"]]  # a third, rounded up
    many = {f"{i:03}": (i - 100) / 286 for i in range(286)}
    ahead, behind, rest = groups(many).values()
    assert ahead == [f"{i}" for i in range(285, 275, -1)] and behind == [f"{i:03}" for i in range(10)]
    assert rest == ["100", "099", "101", "098", "102", "097", "103", "096", "104", "095"]
    assert list(groups({"x": 0.0}).values()) == [[], [], ["x"]]
    # all leads are large, and the third group is named for what it is
    assert groups({"a": 0.9, "b": 0.8, "c": 0.4})["The smallest gaps among the others"] == ["c"]


def test_classes_are_chosen_on_analysis_and_unseen_ones_on_themselves(whole):
    _, found, html = whole
    assert [found["classes"][name] for name in ("won", "tied", "lost")] == [3, 1, 2]
    test, unseen = (found["classes"]["bars"][column] for column in ("test", "unseen"))
    assert test["chosen_on"] == "analysis"
    assert list(test["groups"].values()) == [[ODD, "cat"], [SEEN[4], "bee"], ["dog", "owl"]], "two of six each"
    assert unseen["chosen_on"] == "unseen" and list(unseen["groups"].values()) == [["saw"], [], ["horn"]]
    assert "chosen by the teacher's lead over the student before on analysis, where the teacher is better in 3, " \
           "equal in 1 and worse in 2" in html.text and "on unseen itself: analysis has none of them." in html.text


def test_every_bar_is_as_long_as_its_figure(whole):
    _, found, html = whole
    charts = [svg for svg in html.svgs if any(tag == "rect" and attrs["height"] == "9" for tag, attrs in svg)]
    names = [group for one in found["classes"]["bars"].values() for group in one["groups"].items() if group[1]]
    assert len(charts) == len(names) == 5  # no unseen class has the student ahead
    where = [one for one in found["classes"]["bars"].values() for group in one["groups"].values() if group]
    for svg, (title, classes), one in zip(charts, names, where, strict=True):
        parts = [(role, one["classes"][name][role]) for name in classes for role in ROLES]
        rects = [attrs for tag, attrs in svg if tag == "rect"]
        whiskers = [attrs for tag, attrs in svg if tag == "line" and attrs["class"] == "whisker"]
        figures = [data for tag, data in svg if tag == "text" and isinstance(data, str)]
        assert ("title", title) in svg and [rect["class"] for rect in rects] == [role for role, _ in parts]
        assert [float(rect["width"]) for rect in rects] == [round(285 * p["accuracy"], 1) for _, p in parts]
        for (_, part), whisker in zip(parts, whiskers, strict=True):
            assert [float(whisker[x]) for x in ("x1", "x2")] == pytest.approx([4 + 285 * x for x in part["interval"]],
                                                                              abs=0.06)
        per_class = [figures[3 + 4 * i:7 + 4 * i] for i in range(len(classes))]
        for name, (label, *three) in zip(classes, per_class, strict=True):
            assert label == name or (label[-1] == "…" and name.startswith(label[:-1]) and len(label) == 52)
            assert three == [pct(one["classes"][name][role]["accuracy"]) for role in ROLES]


def test_all_classes_stand_in_a_table(whole):
    _, found, html = whole
    one = found["classes"]["bars"]["test"]["classes"]
    assert html.table(list(one))[1:] == [[name, *(shown(parts[role]) for role in ROLES)]
                                         for name, parts in one.items()]


def test_the_switch_is_tallied_against_the_true_class(world, whole, tmp_path):
    _, found, html = whole
    assert found["switch"]["tallies"]["training"]["confusion"] == [[3, 0], [2, 5]]  # p 0.3 and 0.4, oracle 1: missed
    assert (found["switch"]["clips"], found["switch"]["to_teacher"]) == (10, 5)
    rows = html.table(["the teacher is not better, by the class", "the teacher is better, by the class"])
    assert [row[1:] for row in rows[1:]] == [["3", "0"], ["2", "5"]]
    assert "5 of 10 clips go to the teacher." in html.text and "80.0 % of 10" in html.text
    # without labels there is nothing to hold it against
    counts = {"clips": 2, "clips_to_teacher": 1}
    left = {"validation": {"count": 40, "correct": 31, "accuracy": 31 / 40, "interval": list(wilson(31, 40)),
                           "majority": 0.55, "confusion": [[1111, 4], [5, 6]]}}
    path = write_lines(tmp_path / "s/switch.jsonl", [dict(id="a", p_teacher=0.9), dict(id="b", p_teacher=0.1)])
    stage = Report(tables=tables(world), switch=str(path))
    (path.parent / "results.json").write_text(json.dumps(counts))
    assert made(stage, tmp_path / "r")[0]["switch"] == {"clips": 2, "to_teacher": 1, "tallies": {}, "words": {}}
    (path.parent / "results.json").write_text(json.dumps(counts | left))
    found, html = made(stage, tmp_path / "r")
    assert found["switch"]["tallies"] == left and "77.5 % of 40" in html.text
    assert "always the more frequent answer: 55.0 %" in html.text
    assert html.tables[-1][1:] == [["the teacher is not better, by the class", "1,111", "4"],
                                   ["the teacher is better, by the class", "5", "6"]]
    (path.parent / "results.json").write_text(json.dumps(left))
    with pytest.raises(ValueError, match="switch.jsonl: not a Switch stage's: its results.json needs 'clips'"):
        made(stage, tmp_path / "r")


def test_curves_hold_the_logs_values(whole):
    _, found, html = whole
    loss, accuracy = found["curves"][ODD]
    assert (loss["what"], loss["x"], accuracy["what"]) == ("training loss", "step", "validation accuracy, %")
    line = loss["lines"][ODD]  # 400 values: means of three, the last of one
    assert len(line) == 134 and line[0] == [3, pytest.approx((3 + 3 / 2 + 3 / 3) / 3)] and line[-1] == [400, 3 / 400]
    assert accuracy["lines"][ODD] == [[100, 0.125], [200, 0.25], [300, 0.375], [400, 0.5]]
    assert [panel["x"] for panel in found["curves"]["Switch"]] == ["epoch", "epoch"]
    drawn = [svg for svg in html.svgs if any(tag == "polyline" for tag, _ in svg)]
    for svg, panel in zip(drawn, [p for figure in found["curves"].values() for p in figure], strict=True):
        assert ("title", panel["what"]) in svg and ("text", panel["what"]) in svg
        scale = 100 if panel["what"].endswith("%") else 1
        levels = [(float(attrs["y"]) - 3, float(label)) for (tag, attrs), (_, label) in zip(svg, svg[1:], strict=False)
                  if tag == "text" and "x" in attrs and attrs["x"] == "36"]
        (y0, low), (y1, high) = levels[0], levels[-1]
        points = next(attrs["points"] for tag, attrs in svg if tag == "polyline").split()
        for point, (_, value) in zip(points, next(iter(panel["lines"].values())), strict=True):
            read = low + (float(point.split(",")[1]) - y0) / (y1 - y0) * (high - low)
            assert read == pytest.approx(scale * value, abs=0.002 * (high - low))


def test_the_teacher_scores_every_token_of_an_early_and_the_last_step(whole):
    folder, found, html = whole
    shown = found["scored"][ODD]
    assert [(one["step"], one["id"]) for one in shown] == [(1, "clip1")] * 2 + [(21, "clip21")] * 2
    assert "clip21 step 21, reward 0.333" in html.text and found["scored"]["silent"] == []
    assert "The teacher scored none of the completions that were kept." in html.text
    drawn = [attrs for tag, attrs in html.tags if tag == "span" and "title" in attrs]
    assert len(drawn) == 4 * len(TOLD)
    for attrs, (_, p, q, likeliest, most, level) in zip(drawn, TOLD * 4, strict=True):
        likeliest = re.sub(r"\s", "␣", likeliest.replace("\n", "↵"))
        assert attrs["class"] == f"u{level}"
        assert attrs["title"] == f"student {pct(p)} %, teacher {pct(q)} %; likeliest: “{likeliest}”, {pct(most)} %"
    text = f"<think> dog↵ s{ODD}{ODD}↵ 75 % a.␣␣ 85 %<|im_end|>␣and 100 %"
    assert html.text.count(text) == 4, "the likeliest stands only under a doubted token that is another"
    line = f"“{ODD}” 2.0 → “{ODD}↵” 75.0; “.” 0.5 → “␣␣” 85.0; “<|im_end|>” 0.0 → “␣and” 99.9."
    assert f"{ODD}, step 1, clip clip1, reward 0.333: {line}\n" in (folder / "report.md").read_text()


def test_completions_that_hold_something_else_are_refused(world, tmp_path):
    for told in ([["a", 0.0, -1.0, "b"]], [["a", 0.0, 2.0, "b", -1.0]], [["a", 0.0, -1.0, 3, -1.0]], "text"):
        path = write_lines(tmp_path / "completions.jsonl", [{"step": 1, "id": "x", "reward": 0.0, "teacher": told}])
        with pytest.raises(ValueError, match="completions.jsonl:1: needs 'teacher', a list of tuple, got"):
            made(Report(tables={}, scored={"x": str(path)}), tmp_path / "r")


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.37), (93.3, 98.3), (0, 1e-5), (5, 5), (0, 0), (0.2, 12345.0)])
def test_ticks_enclose_the_values_and_are_few(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and found[0] <= low + 1e-12 and found[-1] >= high - 1e-9 * high


def test_clips_are_chosen_by_the_stated_rule(whole):
    _, found, html = whole
    learnt, forgotten, missed = found["clips"]["kinds"]
    # wrong before, right after, teacher right: classes 1 to 3 (clip 9 could not be read); one of each, then again
    assert [clip["id"] for clip in learnt["clips"]] == ["test1", "test2", "test3", "test7"] and learnt["count"] == 11
    assert [clip["id"] for clip in forgotten["clips"]] == ["test4", "test10", "test16", "test22"]
    assert [clip["id"] for clip in missed["clips"]] == ["test5", "test11", "test17", "test23"]
    answers = learnt["clips"][0]["answers"]
    assert answers["before"] == {"option": "owl", "right": False} and answers["after"]["text"] == f"It is {ODD}"
    cards = [table for table in html.tables if table and table[0][0] == "teacher" and len(table) == 3]
    clips = [clip for kind in found["clips"]["kinds"] for clip in kind["clips"]]
    assert len(cards) == len(clips) == 12
    for card, clip in zip(cards, clips, strict=True):
        assert [row[1] for row in card] == [f"{'✓ right' if a['right'] else '✗ wrong'}: {a['option']}"
                                            for a in clip["answers"].values()]
    assert "(4 of 11 shown)" in html.text


def test_media_are_in_the_page_up_to_the_cap_and_linked_beyond(world, whole, tmp_path):
    folder, found, html = whole
    media = [(tag, attrs) for tag, attrs in html.tags if tag in ("audio", "video")]
    assert len(media) == 24 and all("controls" in attrs and attrs["src"].startswith("data:") for _, attrs in media)
    video, audio = media[0][1]["src"], media[1][1]["src"]
    assert video.startswith("data:video/mp4;base64,") and audio.startswith("data:audio/wav;base64,")
    assert base64.b64decode(audio.partition(",")[2]) == (world / "test 1#.wav").read_bytes()
    assert "muted" in media[0][1] and "muted" not in media[1][1]
    stage = Report(tables=tables(world), roles=tuple(ROWS), clips=f"{world}/test.jsonl", embed_mib=900 / 2**20)
    found, html = made(stage, tmp_path)
    files = [file for kind in found["clips"]["kinds"] for clip in kind["clips"] for file in clip["media"]]
    assert [file["embedded"] for file in files] == [True, True] + [False] * 22  # 500 + 300 bytes; no third fits
    sources = [attrs["src"] for tag, attrs in html.tags if tag in ("audio", "video")]
    assert all((tmp_path / unquote(source)).is_file() for source in sources[2:]), "a link leads to its file"
    assert all(re.fullmatch(r"[\w./%-]+", source) for source in sources[2:])
    assert "2 media files" in html.text and "22 are linked where they lie" in html.text


def test_a_file_that_is_sound_and_picture_is_played_once_and_heard(tmp_path):
    examples = manifest(tmp_path, "test", ["x", "y"], 1)
    text = (tmp_path / "test.jsonl").read_text()
    (tmp_path / "test.jsonl").write_text(text.replace("test 0#.wav", "test 0#.mp4"))
    rows = {role: {"test": evaluated(tmp_path / role, examples, lambda i: False)} for role in ROLES}
    stage = Report(tables=rows, roles=tuple(ROLES), gap="test", clips=f"{tmp_path}/test.jsonl")
    found, html = made(stage, tmp_path / "r")
    assert [[file["kind"] for file in clip["media"]] for clip in found["clips"]["kinds"][2]["clips"]] == [
        ["both"], ["video", "audio"]]  # fmt: skip
    players = [(tag, "muted" in attrs) for tag, attrs in html.tags if tag in ("audio", "video")]
    assert players == [("video", False), ("video", True), ("audio", False)]


def test_a_clip_that_is_gone_or_of_an_unknown_kind_does_not_stop_the_report(tmp_path):
    examples = manifest(tmp_path, "test", ["x", "x", "x", "x", "x", "y"], 1)
    rows = {role: {"test": evaluated(tmp_path / role, examples, lambda i, role=role: role == "teacher")}
            for role in ROLES}
    (tmp_path / "test 0#.wav").unlink()
    (tmp_path / "test.jsonl").write_text((tmp_path / "test.jsonl").read_text().replace("1#.wav", "1#.aiff"))
    (tmp_path / "test 1#.wav").rename(tmp_path / "test 1#.aiff")
    stage = Report(tables=rows, roles=tuple(ROLES), gap="test", clips=f"{tmp_path}/test.jsonl")
    found, html = made(stage, tmp_path / "r")
    assert "test 0#.wav is not there." in html.text
    clips = found["clips"]["kinds"][2]["clips"]
    assert [clip["id"] for clip in clips] == ["test0", "test5", "test1", "test2"], "one of each class first"
    assert [file["embedded"] for file in clips[2]["media"]] == [True, False]


FORM = set("""
    tables ablation benchmarks roles switch funnel curves clips gallery paper gains classes name words rows count
    correct accuracy interval groups letters disagreement before teacher after left_out both only_a only_b neither
    difference chosen_on won tied lost bars to_teacher tallies validation training majority confusion steps step of
    verifier verdicts agreement auc roc what x lines column kinds title embed_mib id question options right media
    kind path bytes embedded answers option text traces sample verdict score source columns notes others version
    senses averages people differences row less scored reward
""".split())  # keys of report.json that are not data
FIXED = ("kind", "what", "x")  # keys whose values come from a short list of ours
HOSTILE = "</script><b onload='x'>&amp;\"|\n\n# |"
ATTRIBUTES = set("""
    aria-hidden aria-label charset class colspan content controls cx cy height href id lang muted name points
    preload r rel role scope src tabindex text-anchor title viewbox width x x1 x2 y y1 y2
""".split())


def made_hostile(value, key=None):
    """report.json with HOSTILE behind every string in it, whether it is a value or a key, so that names still agree."""
    if isinstance(value, dict):
        return {name if name in FORM else name + HOSTILE: made_hostile(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [made_hostile(part, key) for part in value]
    return value + HOSTILE if isinstance(value, str) and key not in FIXED else value


def check_escaping(report, in_page, in_markdown):
    """Text stays text, wherever it stands; in_page, in_markdown: how often HOSTILE must be read there."""
    report = made_hostile(report)
    files = [file for section in (report["clips"], report["gallery"]) if section
             for kind in section["kinds"] for clip in kind["clips"] for file in clip["media"]]
    files[0] |= {"bytes": None, "embedded": False}  # one is not there, one is linked
    files[1]["embedded"] = False
    text = page(report, {file["path"]: "data:x" for file in files})
    html = Page(text)
    assert {tag for tag, _ in html.tags} <= TAGS and "<b " not in text and "</script" not in text
    assert {name for _, attrs in html.tags for name in attrs} <= ATTRIBUTES, "an attribute came out of the data"
    assert html.text.count(plain(HOSTILE)) == in_page, "escaped once, not twice"
    assert unquote(next(attrs["href"] for tag, attrs in html.tags if tag == "a" and attrs["href"][0] != "#")) == (
        files[1]["path"])
    written = markdown(report)
    for block in written.strip().split("\n\n"):
        lines = block.split("\n")
        if len(lines) > 1:  # a table
            assert re.fullmatch(r"[| -]+", lines[1]) and len({len(re.findall(r"(?<!\\)\|", one)) for one in lines}) == 1
        assert len(lines) > 1 or not block.startswith(("|", "# |")), "a line break in a text ended its line"
    assert written.replace("\\|", "|").count(plain(HOSTILE)) == in_markdown


def test_every_string_of_the_report_is_escaped(whole):
    check_escaping(whole[1], in_page=319, in_markdown=108)


def asked_of_people(folder, world, condition, right):
    """Results as stage Answers writes them, of people who are right on every class in `right`."""
    examples = read_manifest(world / "analysis.jsonl")
    path = evaluated(folder, examples, lambda i: examples[i].label in right)
    results = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(results | {"condition": condition}))
    return str(path)


def test_models_and_people_stand_side_by_side_on_classes_that_models_chose(world, whole, tmp_path):
    long = SEEN[4]
    ears = asked_of_people(tmp_path / "ears", world, "ears", {"bee", long})
    eyes = asked_of_people(tmp_path / "eyes", world, "eyes", {"cat", ODD})
    bars = {f"{name} <i>": f"{world}/{n}_{{}}/results.json" for n, name in ((1, "hears"), (0, "sees"))}
    senses = {split: {bar: path.format(split) for bar, path in bars.items()} for split in ("analysis", "test")}
    senses["analysis"] |= {"Human ears": ears, "Human eyes": eyes}
    stage = Report(tables=tables(world), roles=tuple(ROWS), senses=senses, published="xmd", notes={"lost": "<u>"})
    found, html = made(stage, tmp_path / "report")
    section = found["senses"]["analysis"]
    groups = {title: list(classes) for title, classes in section["groups"].items()}
    assert groups == {"The teacher is ahead": [ODD, "cat"], "The student is ahead": [long, "bee"],
                      "The smallest gaps among the others": ["dog", "owl"]}  # fmt: skip
    assert section["averages"]["Human ears"] == section["averages"]["Human eyes"] == {"accuracy": 1 / 3}
    assert section["words"].endswith(
        "Human ears 33.3 %, Human eyes 33.3 %. In 2 of the 2 classes that the teacher leads people's eyes are better "
        "than their ears (the paper: 8 of 10). In 2 of the 2 classes that the student leads people's ears are better "
        "than their eyes (the paper: 10 of 10). In 0 of the 2 classes that the teacher leads the student is worse than "
        "people's ears (the paper: 9 of 10).")
    assert "people" not in found["senses"]["test"]["words"] and list(found["senses"]["test"]["averages"]) == list(bars)
    written = (tmp_path / "report" / "report.md").read_text()
    for text in (html.text, written):
        assert section["words"] in text and "lost" in text
    hostile = made_hostile(found)
    assert {tag for tag, _ in Page(page(hostile, {})).tags} <= TAGS


def test_the_page_needs_no_script_and_nothing_from_elsewhere(whole):
    folder, _, html = whole
    text = (folder / "report.html").read_text()
    ids = {attrs["id"] for _, attrs in html.tags if "id" in attrs}
    for link in html.links:
        assert link.startswith("data:") or link[1:] in ids, link
    assert "url(" not in text and "@import" not in text and "<script" not in text and "http" not in text.lower()
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text
    boxes = [tag for tag, attrs in html.tags if attrs.get("class") == "scroll"]
    assert len(boxes) == len(html.tables) - 12, "every table but the clips' scrolls in a box of its own"
    assert all(svg[0][0] == "title" for svg in html.svgs if any(tag in ("text",) for tag, _ in svg))


def test_the_papers_figures_stand_beside_rows_of_its_titles_only(world, whole, tmp_path):
    _, found, html = whole  # its ablation has a row of the paper's title, by models that are not the paper's
    text = html.text
    assert "paper" not in str(found["tables"]) and "paper" not in str(found["ablation"])
    assert "In italics" not in text and text.count("No row here is an experiment of the paper's") == 2
    path = f"{world}/2_test/results.json"  # with letters of its own
    rows = {"Qwen2-VL-7B-Instruct": {"test": path, "mine": path}, "Qwen2-VL": {"test": path}}
    ours = {"KL on teacher's logits": {"test": path}, "mine": {"test": path}}
    found, html = made(Report(tables=rows, ablation=ours, published="xmd"), tmp_path)
    cells = found["tables"]
    assert cells["Qwen2-VL-7B-Instruct"]["test"]["paper"] == 80.8
    assert "paper" not in cells["Qwen2-VL-7B-Instruct"]["mine"] and "paper" not in cells["Qwen2-VL"]["test"]
    assert [row[2] for row in html.tables[0][1:]] == ["paper", "80.8", "-"], "beside our own figure, before all else"
    assert found["ablation"]["KL on teacher's logits"]["test"]["paper"] == 88.7
    assert [row[2] for row in html.tables[2][1:]] == ["paper", "88.7", "-"]
    assert html.text.count("In italics") == 2 and "No row here" not in html.text
    _, html = made(Report(tables=rows, ablation={"mine": {"test": path}}, published="xmd"), tmp_path)  # table by table
    assert html.text.count("In italics") == html.text.count("No row here") == 1


def test_every_figure_of_the_paper_is_the_papers(whole):
    folder, found, html = whole
    text, marked = html.text, (folder / "report.md").read_text()
    tables = [{row: figures for row, (_, _, *figures) in table.items()} for table in (XMD_TABLE_1, XMD_TABLE_2)]
    tables.append({row: figures for row, (_, *figures) in XMD_FIGURE_1.items()})
    for table, columns in zip(tables, (3, 2, 1), strict=True):
        rows = []
        for row, figures in table.items():
            rows.append([row, *(f"{figure:.1f}" for figure in figures), *["-"] * (columns - len(figures))])
        assert html.table([row[0] for row in rows])[1:] == rows
        assert all(re.search(r"\| " + r" +\| ".join(map(re.escape, row)) + r" +\|", marked) for row in rows)
    for said in ("equal in 1 and worse in 2 (in the paper, on VGGSound: better in 226 of 286)",
                 "Right by the table of classes for 80.0 % of 10 (95 % interval 49.0–94.3); always the more frequent "
                 "answer: 70.0 %; the paper's, on VGGSound: 89.1 %.", "5 of 10 clips go to the teacher.",
                 "Nothing here was measured by this run."):
        assert said in text and said in marked
    assert found["paper"]["switch"] == {"validation": 88.8, "training": 89.1}


@pytest.mark.parametrize("given, said", [
    (dict(published="xdm"), "published must be 'xmd' or 'sightsound' or None, got 'xdm'"),
    (dict(clips="x.jsonl"), "clips 'x.jsonl' needs roles or a gallery, got neither"),
    (dict(embed_mib=-1.0), "embed_mib must be >= 0, got -1.0"),
    (dict(roles=("teacher", "student", "after")), "roles need column 'analysis' in row 'student' of tables"),
    (dict(roles=("teacher", "teacher", "teacher"), bars=("test", "unseen")),
     "roles need column 'unseen' in row 'teacher' of tables"),
    (dict(roles=("teacher",) * 3, bars=(), clips="x", clips_of="val"),
     "roles need column 'val' in row 'teacher' of tables"),
    (dict(differences={"d": ("teacher", "x")}), "difference 'd' needs row 'x' in a table"),
    (dict(differences={"d": ("teacher", "teacher", "x")}),
     "differences must be a dict of lists of str or None, got {'d': ('teacher', 'teacher', 'x')}"),
])
def test_a_report_that_cannot_be_made_is_refused_before_any_work(given, said):
    with pytest.raises(ConfigError) as error:
        Report(**{"tables": {"teacher": {"analysis": "@a", "test": "@t"}}, **given})
    assert str(error.value) == f"config: {said}"


def test_references_in_every_field_are_resolved():
    stage = Report(tables={"t": {"analysis": "@e", "test": "@e"}}, ablation={"a": {"test": "@e"}}, roles=("t",) * 3,
                   clips="@toy/test.jsonl", switch="@s", curves={"c": {"one": "@s/log.jsonl"}},
                   scored={"o": "@s/completions.jsonl"})
    before = [make_dataclass(name, ["name"])(short) for name, short in (
        ("Evaluate", "e"), ("Toy", "toy"), ("Switch", "s"), ("Label", "l"))]  # fmt: skip
    check_references([*before, stage])
    for field, value in (("ablation", {"a": {"test": "@l"}}), ("switch", "@e"), ("clips", "@e"),
                         ("scored", {"o": "@e"})):
        with pytest.raises(ConfigError, match=f"report 'report' {field}.* is the output of a"):
            check_references([*before, replace(stage, **{field: value})])
    assert input_paths(stage, "run", before) == {
        "tables.t.analysis": Path("run/e/results.json"), "tables.t.test": Path("run/e/results.json"),
        "ablation.a.test": Path("run/e/results.json"), "clips": Path("run/toy/test.jsonl"),
        "switch": Path("run/s/switch.jsonl"), "curves.c.one": Path("run/s/log.jsonl"),
        "scored.o": Path("run/s/completions.jsonl")}


def run(tmp_path, world, **fields):
    config, fields = tmp_path / "config.py", dict(tables=tables(world)) | fields
    config.write_text(f"from minixmd.config import Report\nstages = [Report(**{fields!r})]\n")
    return main([str(config), f"run_dir={tmp_path}/run"])


def test_a_config_of_files_alone_makes_the_report(world, tmp_path, capsys):
    full = dict(roles=tuple(ROWS), clips=f"{world}/test.jsonl", switch=f"{world}/switch/switch.jsonl",
                curves={"c": {"l": f"{world}/train.jsonl"}})
    assert run(tmp_path, world, **full) == 0
    assert all((tmp_path / "run/report" / name).is_file() for name in FILES)
    assert run(tmp_path, world, **full) == 0 and "finished before, skipped" in capsys.readouterr().out


def test_inputs_that_do_not_belong_together_are_named(world, tmp_path, capsys):
    def said(name, **fields):
        (tmp_path / name).mkdir()
        assert run(tmp_path / name, world, **fields) == 1
        return capsys.readouterr().err

    roles, rows = dict(roles=tuple(ROWS)), tables(world)
    rows["teacher"] |= {"test": rows["teacher"]["unseen"]}
    assert f"report: 'teacher' and {ODD!r} on 'test': clip 'unseen0': only the first" in said("a", tables=rows, **roles)
    other = {"other": {"test": f"{world}/0_unseen/results.json"}}  # which no role reads, in either table
    for name, fields in (("e", dict(tables=tables(world) | other)), ("f", dict(ablation=other))):
        assert "report: 'teacher' and 'other' on 'test': clip 'test0': only the first of" in said(name, **fields)
    examples = [replace(e, options=e.options[::-1]) for e in read_manifest(world / "test.jsonl")]
    turned = {"turned": {"test": evaluated(tmp_path / "turned", examples, lambda i: True)}}
    assert "'teacher' and 'turned' on 'test': clip 'test0': the two are different questions" in said(
        "g", tables=tables(world) | turned)
    error = said("b", clips=f"{world}/unseen.jsonl", **roles)
    assert "unseen.jsonl: clip 'unseen0' was not asked so in column 'test'" in error
    other = tmp_path / "other.jsonl"
    other.write_text((world / "test.jsonl").read_text().replace("Which", "What"))
    assert "clip 'test0' was not asked so in column 'test'" in said("c", clips=str(other), **roles)
    (tmp_path / "wrong.json").write_text("{}")
    assert "wrong.json: not the results of an Evaluate" in said("d", tables={"a": {"b": f"{tmp_path}/wrong.json"}})
