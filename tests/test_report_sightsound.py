"""SightSound-R1's report: the benchmarks beside the paper's figures, the funnel, the verifier's price, the gallery. The
files it reads are written by the stages themselves; only what models would say is made up."""
import json
import re
from pathlib import Path

import pytest
from test_papers import MMAU_PARTS, MUSIC_PARTS, SIGHTSOUND_TABLE_1, SIGHTSOUND_TABLE_2
from test_report import Page, check_escaping, data_uris, evaluated, manifest, pct, plain, shown, write_lines

from minixmd.config import Evaluate, FactCheck, Report, Traces
from minixmd.config.field_checks import ConfigError
from minixmd.inputs.examples import read_manifest
from minixmd.recipe_parts.sightsound import LADDER, MODES
from minixmd.report import clips as report_clips
from minixmd.report import gather as report
from minixmd.report.render import page
from minixmd.report.sections import PAPERS
from minixmd.runner import main
from minixmd.stages import evaluate, factcheck, multiple_choice, traces
from minixmd.tasks.benchmarks import TYPES
from minixmd.tasks.statistics import wilson
from minixmd.tasks.yes_no import agreement

ODD = "</script><i>'\"&|"
MMAU_META = {"version": "v05.15.25 of 2025-08-09", "sha256": "9f18fda99f8d0000"}
PAIRS = [("Audio", "Counting"), ("Audio", "Comparative"), ("Audio-Visual", "Counting"), ("Audio-Visual", "Temporal"),
         ("Audio-Visual", "Comparative"), ("Audio-Visual", "Existential"), ("Audio-Visual", "Location"),
         ("Visual", "Counting"), ("Visual", "Location")]
GALLERY = {"Direct inference": lambda i: i % 3 == 0, "TTS + AGFV + SFT": lambda i: i % 2 == 0,
           "TTS + AGFV + SFT + GRPO": lambda i: i % 3 == 1}  # which clips a row has right
HELD = [0.9] * 20 + [-0.9] * 4 + [0.8] * 3 + [-0.8] * 13  # scores of held-out traces; the checker accepts the first 24


@pytest.fixture(autouse=True, scope="module")
def _everything_decodes():
    """The media files of these worlds are a few letters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_clips.Media, "_decodes", lambda self, file, kind: True)
        yield


def asked(folder, name, metas, source=None):
    """A manifest with a question for each meta; the right one of three options turns."""
    return write_lines(folder / f"{name}.jsonl", [
        dict(id=f"{name}{i}", audio="test 0#.wav", video=None, question=f"What is {i}?", options=["a", "b", ODD],
             answer=i % 3, source=source, meta=meta) for i, meta in enumerate(metas)])


def answered(patch, folder, path, right, **fields):
    """Stage Evaluate on a manifest; right(i) says whether the model's words are the right option."""
    examples = read_manifest(path)
    records = []
    for i, e in enumerate(examples):
        answer = e.answer if right(i) else (e.answer + 1) % 3
        text = f"<think>I hear {ODD}.</think><answer>{'ABC'[answer]}</answer>"
        records.append({"id": e.id, "answer": answer, "option": e.options[answer], "logits": [0.0] * 3,
                        "by_letters": 0, "how": "letter", "text": text, "finished": True})
    patch.setattr(multiple_choice, "compute_shards", lambda *_, **__: records)
    folder.mkdir()
    evaluate.run(Evaluate(name=folder.name, model="m", manifest=str(path), answer="generate", **fields), folder,
                 lambda line: None)
    return str(folder / "results.json")


def thought(example, index, i):
    return {"text": f"<think>{ODD} {example.id} {i}</think><answer>{'ABC'[index]}</answer>", "finished": True}


def sampled(patch, folder, path):
    """Stage Traces, four samples a clip: clip 0 cannot be read, of 1 a sample is too long, of 2 one has no form, on 3
    they differ, on the others all agree, on 4 and 5 in a wrong answer."""
    examples = read_manifest(path)
    records = []
    for c, e in enumerate(examples):
        right = (e.answer + (c in (4, 5))) % 3
        samples = [thought(e, right, i) for i in range(4)]
        if c == 1:
            samples[0]["finished"] = False
        elif c == 2:
            samples[3]["text"] = "It is A."
        elif c == 3:
            samples[1] = thought(e, (right + 1) % 3, 1)
        records.append({"id": e.id, "samples": samples} if c else {"id": e.id, "bad": "empty", "detail": "no frames"})
    patch.setattr(traces, "sample_locally", lambda *_: records)
    folder.mkdir()
    stage = Traces(name="t", model="m", manifest=str(path), media="audio", num_samples=4, max_bad=1.0)
    traces.run(stage, folder, lambda line: None)


def checked(patch, folder, path, decide, verifier=False):
    """Stage FactCheck on `sampled`; decide(clip, sample): the score, or None where it could not be judged. The verifier
    has judged HELD, of which the checker had accepted the first 24."""
    given = folder.with_suffix(".given")
    write_lines(given, [
        {"id": t["id"], "sample": t["sample"], "bad": "no <b>prompt", "detail": "too long"} if score is None else
        {"id": t["id"], "sample": t["sample"], "score": score, "accepted": score > 0}
        for t in map(json.loads, (folder.parent / "traces/traces.jsonl").read_text().splitlines())
        for score in [decide(int(t["id"].removeprefix("test")), t["sample"])]])
    fields = dict(checker="verifier", model="m") if verifier else dict(checker="verdicts")
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        def judge(stage, folder, traces, log):
            calibration = {"verdicts": 200, **agreement(HELD, [i < 24 for i in range(40)])}
            return factcheck.look_up_verdicts(stage, traces), calibration

        patch.setattr(factcheck, "judge_by_verifier", judge)
        factcheck.run(FactCheck(name="f", traces=str(folder.parent / "traces/traces.jsonl"), manifest=str(path),
                                verdicts=str(given), max_bad=1.0, **fields), folder, lambda line: None)


def decide(clip, sample):
    """Rejected: every second sample of clips 6 to 8; clip 7's first could not be judged."""
    return None if (clip, sample) == (7, 0) else -1.5 if clip in (6, 7, 8) and sample % 2 else 2.25


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with AVQA, MMAU and MUSIC-AVQA, what LADDER's rows and some of MODES' answered, traces and verdicts."""
    folder = tmp_path_factory.mktemp("world")
    manifest(folder, "test", ["a", "b", ODD], 8)  # 24 clips, with media; clip i is of class i % 3
    paths = {"avqa": folder / "test.jsonl",
             "mmau": asked(folder, "mmau", [dict(task=("sound", "music", "speech")[i % 3], difficulty="medium",
                                                 sub_category="x", **MMAU_META) for i in range(12)], "MMAU test-mini"),
             "music_avqa": asked(folder, "music", [dict(modality=m, type=t) for m, t in PAIRS for _ in range(3)])}
    with pytest.MonkeyPatch.context() as patch:
        for number, row in enumerate(LADDER):
            for column, path in paths.items():
                right = GALLERY.get(row, lambda i: i % 4 > 0) if column == "avqa" else lambda i, n=number: i % 9 < n + 1
                answered(patch, folder / f"{number}_{column}", path, right,
                         rule="mmau" if column == "mmau" else "option")
        sampled(patch, folder / "traces", paths["avqa"])
        checked(patch, folder / "checked", paths["avqa"], decide)
        checked(patch, folder / "verifier", paths["avqa"], lambda clip, sample: -1.0 if clip % 2 else 1.0, True)
    write_lines(folder / "grpo.jsonl", [{"step": s, "reward": s / 10, "completion_tokens": 90 - s, "kl": s / 1e3,
                                         "loss": 0.0} for s in range(1, 11)])
    return folder


def fields(world, **more):
    """Of a Report like the one that recipe sightsound makes."""
    modes = ["Qwen2-Audio-7B-Instruct, direct", "Qwen2.5-VL-32B-Instruct, zero-shot audio CoT", "mine"]
    return dict(
        published="sightsound",
        tables={title: {"avqa": f"{world}/{n}_avqa/results.json"} for n, title in enumerate(modes)},
        ablation={row: {column: f"{world}/{n}_{column}/results.json" for column in ("avqa", "mmau", "music_avqa")}
                  for n, row in enumerate(LADDER)},
        clips=f"{world}/test.jsonl", clips_of="avqa", gallery=tuple(GALLERY), traces=f"{world}/traces/traces.jsonl",
        verdicts=f"{world}/checked/verdicts.jsonl", curves={"GRPO": {"grpo": f"{world}/grpo.jsonl"}},
        funnel={"of the train split": {"traces": f"{world}/traces/results.json",
                                       "checked": f"{world}/checked/results.json",
                                       "verifier": f"{world}/verifier/results.json"}}) | more


def made(folder, given):
    """(report.json, the page, report.md)"""
    folder.mkdir(exist_ok=True)
    report.run(Report(**given), folder, lambda record: None)
    return (json.loads((folder / "report.json").read_text()), Page((folder / "report.html").read_text()),
            (folder / "report.md").read_text())


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, *made(folder, fields(world))


# ---- benchmarks and the paper's figures ----


def test_benchmarks_are_broken_down_as_in_the_results(world, whole):
    _, found, _, _ = whole
    rows = found["benchmarks"]["ablation"]
    for n, row in enumerate(LADDER):
        mmau, music = (json.loads((world / f"{n}_{column}/results.json").read_text())["benchmark"]
                       for column in ("mmau", "music_avqa"))
        for column, parts in (("mmau", {"Sound": mmau["task"]["sound"], "Speech": mmau["task"]["speech"],
                                        "Music": mmau["task"]["music"], "Average": mmau["all"],
                                        "medium": mmau["difficulty"]["medium"]}),
                              ("music_avqa", {**{name: music["audio"][name] for name in TYPES},
                                              "Average": music["audio"]["all"], "All": music["every"]["all"]})):
            cells = rows[column]["rows"][row]
            assert list(cells) == list(parts)
            assert {name: {**cell, "paper": 0} for name, cell in cells.items()} == {
                name: {**part, "paper": 0} for name, part in parts.items()}
    cells = rows["music_avqa"]["rows"]["SFT (ground-truth labels)"]  # 21 questions of sound, 6 on pictures alone
    assert [cells[name]["count"] for name in (*TYPES, "Average", "All")] == [3, 6, 6, 3, 3, 21, 27]
    assert (cells["Average"]["correct"], cells["All"]["correct"]) == (6, 6)  # i % 9 < 2


def test_every_figure_of_a_benchmark_stands_in_page_and_markdown(whole):
    _, found, html, marked = whole
    tables = [t for t in html.tables if [row[0] for row in t][2:] == list(LADDER)]
    assert [t[1][0] for t in tables] == ["accuracy, %", "accuracy by group, %", "accuracy, %", "accuracy, %"]
    for table, column in zip(tables[2:], ("mmau", "music_avqa"), strict=True):
        one = found["benchmarks"]["ablation"][column]
        for line, (row, cells) in zip(table[2:], one["rows"].items(), strict=True):
            expected, text = [], []
            for cell in cells.values():
                beside = [f"{cell['paper']:.1f}"] if "paper" in cell else []
                expected += [shown(cell), *beside]
                text += [shown(cell, " (") + ")", *beside]
            assert line == [row, *expected]
            assert re.search(r"\| " + r" +\| ".join(map(re.escape, [row, *text])) + r" +\|", marked)
        assert f"{column}: {one['name']}" in html.text and f"### {column}: {one['name']}" in marked
    assert tables[2][0] == ["", "Sound 4 clips", "Speech 4 clips", "Music 4 clips", "Average 12 clips",
                            "medium 12 clips"]
    assert tables[2][1][1:] == ["ours", "paper"] * 4 + ["ours"]
    assert tables[3][1][1:] == ["ours", "paper"] * 4 + ["ours"] + ["ours", "paper"] + ["ours"], "no figure of Location"


def test_the_papers_figures_are_the_papers_and_the_recipes_titles_find_them(whole):
    _, _, html, marked = whole
    def line(row, figures):
        return [row, *(f"{figure:.1f}" for figure in figures)]

    one = [line(row, figures) for row, (_, *figures) in SIGHTSOUND_TABLE_1.items()]
    mmau = [line(row, figures) for row, (_, figures, _) in SIGHTSOUND_TABLE_2.items()]
    music = [line(row, figures) for row, (_, _, figures) in SIGHTSOUND_TABLE_2.items() if figures]
    names = dict(student="Qwen2-Audio-7B-Instruct", teacher="Qwen2.5-VL-32B-Instruct")
    titles = [title.format(**names) for title, row in MODES.items() if row.name != "alone_avqa"]
    assert titles == [row[0] for row in one] and list(LADDER) == [row[0] for row in music]
    for rows, head in ((one, ["avqa"]), (mmau, MMAU_PARTS), (music, MUSIC_PARTS)):
        assert [["", *head], *rows] in html.tables
        for row in rows:
            assert re.search(r"\| " + r" +\| ".join(map(re.escape, row)) + r" +\|", marked)


def test_other_published_figures_say_their_version_and_source(whole):
    _, found, html, marked = whole
    others = found["paper"]["others"]
    versions = [bool(re.match(r"MMAU test-mini (before )?v05\.15\.25", title)) for title in others]
    assert versions == [True, True, False, False]
    assert all(re.search(r"\(.*(homepage|of the same|README).*\)", title) for title in others)
    new, old, mmar, _ = others.values()
    assert new["Qwen2-Audio-Instruct"] == {"Sound": 67.27, "Speech": 55.26, "Music": 56.29, "Average": 59.6,
                                           "average of the test set": 57.4}
    assert old["Qwen2-Audio-Instruct"]["Average"] == 49.2 and old["R1-AQA, its paper"]["Music"] == 66.77
    sizes = {"Sound": 165, "Music": 206, "Speech": 294, "Sound-Music": 11, "Sound-Speech": 218, "Music-Speech": 82,
             "Sound-Music-Speech": 24}  # of MMAR's modalities
    for cells in mmar.values():
        mean = sum(cells[name] * size for name, size in sizes.items()) / 1000
        assert list(cells) == [*sizes, "Average"] and abs(mean - cells["Average"]) < 0.15
    assert mmar["Qwen2-Audio-Instruct"]["Average"] == 30.0
    assert any("67.27" in row for table in html.tables for row in table) and "67.27" in marked
    ours = json.dumps([found["tables"], found["ablation"], found["benchmarks"]])
    assert "67.27" not in ours and "49.2" not in ours


def test_what_is_our_reading_is_said(whole):
    _, found, html, marked = whole
    said = [*found["paper"]["notes"], *found["paper"]["columns"].values()]
    for words in ("n = 8", "epsilon 0.2", "512 new tokens", "weight decay 0", "LoRA on every", "6,707",
                  "by which the best weights of SFT and GRPO are chosen"):
        assert any(words in line for line in said), words
    text = html.text
    assert all(line in text and line in marked for line in said)
    assert "average are over audio and audio-visual questions, our reading of the paper's 7k" in text + marked


def test_figures_stand_beside_the_papers_rows_and_columns_only(world, whole, tmp_path):
    _, found, _, _ = whole
    assert [cells["avqa"].get("paper") for cells in found["tables"].values()] == [67.1, 85.5, None]
    assert all("paper" not in cells["avqa"] for cells in found["ablation"].values())
    path = {column: f"{world}/0_{column}/results.json" for column in ("mmau", "music_avqa", "avqa")}
    rows = {"Direct inference": {"test": path["mmau"], "other": path["music_avqa"]}, "mine": {"mmau": path["mmau"]},
            "Qwen2.5-Omni-3B, direct": {"val": path["avqa"]}}
    found, html, _ = made(tmp_path, dict(published="sightsound", tables=rows))
    assert '"paper": ' not in json.dumps([found["tables"], found["benchmarks"]])
    assert "No row here is an experiment of the paper's" in html.text
    assert list(found["benchmarks"]["tables"]) == ["test", "other", "mmau"], "but all are broken down"
    found, _, _ = made(tmp_path, dict(tables={"Direct inference": {"mmau": path["mmau"]}}))  # nothing is published
    assert '"paper": ' not in json.dumps(found["benchmarks"])


@pytest.mark.parametrize("version, beside", [
    ("v05.15.25", True), ("v05.15.25 of 2025-08-09", True), ("sha256 1234567890ab", False), ("v05.15.250", False),
    ("", False), ("March 2025", False)])
def test_a_figure_of_mmau_stands_beside_the_papers_version_only(version, beside, tmp_path, monkeypatch):
    meta = dict(task="sound", difficulty="easy", sub_category="x", version=version, sha256="12" * 32)
    path = asked(tmp_path, "mmau", [meta] * 4, "MMAU test-mini")
    results = answered(monkeypatch, tmp_path / "e", path, lambda i: i > 0, rule="mmau")
    found, html, marked = made(tmp_path / "r", dict(published="sightsound", tables={"SFT": {"mmau": results}}))
    one = found["benchmarks"]["tables"]["mmau"]
    assert [one["rows"]["SFT"][part].get("paper") for part in ("Sound", "Average", "easy")] == (
        [61.3, 52.3, None] if beside else [None] * 3)
    text = html.text
    for said in (one["words"], plain(f"MMAU {version} (sha256 121212121212…)")):
        assert said in text and said in marked
    assert ("of other questions, stand at the end alone" in text) != beside
    assert ("No row here is an experiment of the paper's" in text) != beside


def test_mmaus_version_stands_in_every_table_with_an_accuracy_on_it(world, whole, tmp_path, capsys):
    _, found, html, marked = whole
    version = "MMAU v05.15.25 of 2025-08-09"
    assert found["benchmarks"]["ablation"]["mmau"]["version"] == version
    assert found["benchmarks"]["ablation"]["music_avqa"]["version"] == ""
    headings = [heading for table in html.tables for heading in table[0]]
    assert [heading for heading in headings if "mmau" in heading] == [f"mmau {version}, 12 clips"]
    assert "music_avqa 27 clips" in headings
    assert re.findall(r"\| (mmau[^|:]*?) *\|", marked) == [f"mmau ({version})"] and "| music_avqa " in marked

    three = {"a": 0, "b": 1, "c": 2}
    rows = {row: {column: f"{world}/{n}_{column}/results.json" for column in ("mmau", "music_avqa")}
            for row, n in three.items()}
    capsys.readouterr()
    found, html, marked = made(tmp_path / "r", dict(tables=rows, roles=tuple(three), gap="mmau", bars=()))
    assert [row[0].partition(": ")[2] for row in html.tables[-1]] == ["", *[f"mmau ({version})", "music_avqa"] * 2]
    assert marked.count(f": mmau ({version}) ") == 2
    assert f"| mmau ({version})" in capsys.readouterr().out


def test_mmar_is_broken_down_as_in_its_own_table(tmp_path, monkeypatch):
    modalities = ("mix-sound-music-speech", "mix-sound-speech", "speech", "music", "sound", "mix-music-speech",
                  "mix-sound-music")
    metas = [dict(modality=modalities[i % 7], category=f"{layer} Layer", sub_category="x", language=None,
                  version="sha256 121212121212", sha256="12" * 32)
             for i, layer in enumerate(("Cultural", "Semantic", "Signal", "Perception") * 7)]
    results = answered(monkeypatch, tmp_path / "e", asked(tmp_path, "mmar", metas, "mmar/test"), lambda i: i % 3 > 0,
                       rule="mmau")
    rows = {"Direct inference": {"mmar": results}}
    found, html, marked = made(tmp_path / "r", dict(published="sightsound", tables=rows))
    one, benchmark = found["benchmarks"]["tables"]["mmar"], json.loads(Path(results).read_text())["benchmark"]
    parts = {"Sound": benchmark["modality"]["sound"], "Music": benchmark["modality"]["music"],
             "Speech": benchmark["modality"]["speech"], "Sound-Music": benchmark["modality"]["mix-sound-music"],
             "Sound-Speech": benchmark["modality"]["mix-sound-speech"],
             "Music-Speech": benchmark["modality"]["mix-music-speech"],
             "Sound-Music-Speech": benchmark["modality"]["mix-sound-music-speech"], "Average": benchmark["all"],
             **{f"{layer} Layer": benchmark["category"][f"{layer} Layer"]
                for layer in ("Signal", "Perception", "Semantic", "Cultural")}}
    assert one["rows"]["Direct inference"] == parts and list(one["rows"]["Direct inference"]) == list(parts)
    assert one["words"] == "" and one["version"] == "MMAR sha256 121212121212"
    published = found["paper"]["others"]
    [leaderboard] = [cells for title, cells in published.items() if title.startswith("MMAR")]
    assert list(leaderboard["R1-AQA"]) == list(parts)[:8], "the same columns in the same order"
    title = "mmar: MMAR sha256 121212121212 (sha256 121212121212…)"
    assert title in html.text and title in marked
    assert "mmar MMAR sha256 121212121212, 28 clips" in [heading for table in html.tables for heading in table[0]]


def test_two_versions_of_mmar_do_not_stand_in_one_column(tmp_path, monkeypatch):
    rows = {}
    for name in ("old", "new"):
        meta = dict(modality="sound", category="Signal Layer", sub_category="x", version=name, sha256=name * 20)
        (tmp_path / name).mkdir()
        path = asked(tmp_path / name, "mmar", [meta] * 4, "mmar/test")
        rows[name] = {"mmar": answered(monkeypatch, tmp_path / name / "e", path, lambda i: i > 0, rule="mmau")}
    with pytest.raises(ValueError, match="'old' and 'new' on 'mmar': MMAR old .* and MMAR new .* do not compare"):
        made(tmp_path / "r", dict(tables=rows))


# ---- the funnel and the verifier ----


def test_the_funnel_adds_up(whole):
    _, found, html, marked = whole
    one = found["funnel"]["of the train split"]
    steps = {step["step"]: (step["count"], step["of"], step["left_out"]) for step in one["steps"]}
    # 24 clips: 0 bad, 1 too long, 2 without form, on 3 they differ; 20 agree. 92 samples, of which two are no traces;
    # of the others 3 + 3 + 4 are of clips that are not unanimous. First samples: all but those of 0 and 1
    assert list(steps.items())[:5] == [
        ("clips read", (23, 24, {"empty": 1})),
        ("unanimous clips", (20, 23, {"too long": 1, "unparsable": 1, "not unanimous": 1})),
        ("samples", (92, None, {})),
        ("usable samples: traces", (90, 92, {"too long": 1, "unparsable": 1})),
        ("traces of unanimous clips", (80, 90, {"not unanimous": 10}))]
    # judged: 80 unanimous ones, and the first samples of 2 and 3; six are rejected and one could not be judged
    assert list(steps.items())[5:9] == [
        ("accepted by the checker", (75, 82, {"rejected": 6, "no <b>prompt": 1})),
        ("checker: of first traces", (21, 22, {"rejected or could not be judged": 1})),
        ("checker: of those of unanimous clips", (73, 80, {"rejected or could not be judged": 7})),
        ("checker: clips with one", (22, 22, {}))]
    assert steps["verifier: of first traces"] == (11, 22, {"rejected": 11})
    for count, of, left in steps.values():
        assert of is None or count + sum(left.values()) == of
    rows = html.table(list(steps))[1:]
    for row, (name, (count, of, left)) in zip(rows, steps.items(), strict=True):
        texts = [name, str(count), f"{pct(count / of)} % of {of}" if of else "-",
                 ", ".join(f"{n} {reason}" for reason, n in left.items()) or "-"]
        assert row == texts and re.search(r"\| " + r" +\| ".join(map(re.escape, texts)) + r" +\|", marked)


def test_the_verifiers_price_is_told_in_hundreds(whole):
    _, found, html, marked = whole
    one = found["funnel"]["of the train split"]["verifier"]
    assert one["confusion"] == [[13, 3], [4, 20]] and one["count"] == 40

    def interval(part, count):
        return "–".join(f"{100 * x:.0f}" for x in wilson(part, count))

    words = ("On 40 held-out verdicts the verifier agrees with the checker in 82.5 % (95 % interval "
             f"{'–'.join(map(pct, wilson(33, 40)))}); area under ROC {one['auc']:.3f}. In the checker's place and at "
             f"threshold 0, of 100 traces that the checker accepts it would lose 17 (95 % interval {interval(4, 24)}), "
             f"of 100 that it accepts itself the checker would reject 13 (95 % interval {interval(3, 23)}), and the "
             "checker would be asked for 200 verdicts, to train it, instead of 82.")
    assert one["words"] == words and words in html.text and words in marked
    [chart] = [svg for svg in html.svgs if any("held-out" in str(data) for _, data in svg)]
    chance, line = [attrs["points"].split() for tag, attrs in chart if tag == "polyline"]
    assert chance == ["50.0,284.0", "310.0,24.0"]
    assert line == [f"{50 + 260 * x:.1f},{284 - 260 * y:.1f}" for x, y in one["roc"]]
    assert line[0] == chance[0] and line[-1] == chance[1] and len(line) == len(one["roc"]) == 6


def test_a_verifier_that_accepts_nothing_is_told_too(world, tmp_path):
    results = json.loads((world / "verifier/results.json").read_text())
    results["calibration"] |= agreement([-1.0] * 5, [True, True, False, True, False])
    (tmp_path / "results.json").write_text(json.dumps(results))
    given = fields(world, funnel={"f": {"verifier": f"{tmp_path}/results.json"}})
    words = made(tmp_path / "r", given)[0]["funnel"]["f"]["verifier"]["words"]
    assert "it would lose 100 (95 % interval 44–100), it would accept none, and the checker" in words


def test_reward_length_and_kl_are_drawn(whole):
    _, found, html, _ = whole
    panels = {panel["what"]: panel["lines"]["grpo"] for panel in found["curves"]["GRPO"]}
    assert list(panels) == ["mean reward", "completion length, tokens", "training loss",
                            "KL to the teacher, in GRPO to the policy before"]
    assert panels["completion length, tokens"] == [[step, 90 - step] for step in range(1, 11)]
    assert all(any(("title", what) in svg for svg in html.svgs) for what in panels)


# ---- the gallery ----


def test_kinds_of_the_gallery_are_told_from_answers_and_verdicts(whole):
    _, found, html, marked = whole
    learnt, lost, rejected, wrong = found["gallery"]["kinds"]
    before, after = list(GALLERY)[0], list(GALLERY)[-1]
    assert learnt["title"] == f"Learnt: {before} is wrong, {after} is right"
    assert lost["title"] == f"Lost: {before} is right, {after} is wrong"
    # clip i is of class i % 3, so a kind's clips are of one class here, in the manifest's order
    assert [clip["id"] for clip in learnt["clips"]] == ["test1", "test4", "test7", "test10"] and learnt["count"] == 8
    assert [clip["id"] for clip in lost["clips"]] == ["test0", "test3", "test6", "test9"] and lost["count"] == 8
    assert [clip["id"] for clip in rejected["clips"]] == ["test8", "test6", "test7"], "those shown before come last"
    assert [clip["id"] for clip in wrong["clips"]] == ["test5", "test4"] and wrong["count"] == 2
    for kind in found["gallery"]["kinds"]:
        assert f"{kind['title']} ({len(kind['clips'])} of {kind['count']} shown)" in html.text
        assert re.search(rf"\| {re.escape(kind['title'])} +\| {kind['count']} +\|", marked)


def test_a_card_holds_question_traces_verdicts_and_thoughts(whole):
    folder, found, html, _ = whole
    clip = next(clip for clip in found["gallery"]["kinds"][2]["clips"] if clip["id"] == "test7")
    assert [(trace["sample"], trace["verdict"], trace.get("score"), trace["right"]) for trace in clip["traces"]] == [
        (0, "could not be judged: no <b>prompt", None, True), (1, "rejected", -1.5, True), (2, "accepted", 2.25, True),
        (3, "rejected", -1.5, True)]
    assert clip["traces"][1]["text"] == f"<think>{ODD} test7 1</think><answer>B</answer>"
    assert {row: answer["right"] for row, answer in clip["answers"].items()} == dict(
        zip(GALLERY, (False, False, True), strict=True))
    text = html.text
    for said in ("The teacher's traces: 1 could not be judged: no <b>prompt, 2 rejected, 1 accepted",
                 f"Sample 1, rejected, score -1.50; ✓ right: b<think>{ODD} test7 1</think><answer>B</answer>",
                 f"TTS + AGFV + SFT wrote:<think>I hear {ODD}.</think><answer>"):
        assert said in text
    cards = [table for table in html.tables if [row[0] for row in table] == list(GALLERY)]
    clips = [clip for kind in found["gallery"]["kinds"] for clip in kind["clips"]]
    marks = {True: "✓ right", False: "✗ wrong"}
    assert [[row[1] for row in card] for card in cards] == [
        [f"{marks[answer['right']]}: {answer['option']}" for answer in clip["answers"].values()] for clip in clips]
    assert [t["verdict"] for t in next(c for c in clips if c["id"] == "test3")["traces"]] == [
        "accepted", *["not judged"] * 3], "FactCheck judges first traces and unanimous ones"
    assert sum(tag in ("audio", "video") for tag, _ in html.tags) == 2 * len(clips)
    assert all(link.startswith(("data:", "#")) for link in html.links)


def test_traces_without_verdicts_or_from_elsewhere_are_shown(world, tmp_path):
    lines = [{"id": f"test{i}", "text": "It rings."} for i in (1, 1, 4)]
    given = fields(world, traces=str(write_lines(tmp_path / "t.jsonl", lines)), verdicts=None)
    found, html, _ = made(tmp_path / "r", given)
    assert len(found["gallery"]["kinds"]) == 2
    clip = found["gallery"]["kinds"][0]["clips"][0]
    assert [(t["sample"], t["verdict"], t["right"]) for t in clip["traces"]] == [(0, "not judged", None),
                                                                               (1, "not judged", None)]
    assert "The teacher's traces: 2 not judged" in html.text
    verdicts = [dict(id="test1", sample=1, score=-1.0, accepted=False), dict(id="test4", sample=0, score=1.0,
                                                                             accepted=True)]
    given |= dict(verdicts=str(write_lines(tmp_path / "v.jsonl", verdicts)))
    kinds = made(tmp_path / "r", given)[0]["gallery"]["kinds"]
    assert [kind["count"] for kind in kinds] == [8, 8, 1, 0], "an answer that is not known is not a wrong one"


# ---- the page, and inputs that do not belong together ----


def test_the_page_is_made_from_report_json_alone(whole):
    folder, found, html, _ = whole
    assert page(found, data_uris(folder, found["gallery"])) == (folder / "report.html").read_text()
    assert [tag for tag, _ in html.tags].count("section") == 7


def test_every_string_of_the_report_is_escaped(whole):
    check_escaping(whole[1], in_page=621, in_markdown=237)


def test_inputs_that_are_not_what_they_should_be_are_one_clear_line(world, tmp_path, capsys):
    numbers = iter(range(99))

    def said(**more):
        config, run_dir = tmp_path / "config.py", tmp_path / f"run{next(numbers)}"
        config.write_text(f"from minixmd.config import Report\nstages = [Report(**{fields(world, **more)!r})]\n")
        assert main([str(config), f"run_dir={run_dir}"]) == 1
        error = capsys.readouterr().err.strip()
        assert "\n" not in error, "one line"
        return error

    def changed(name, source, **values):
        path = tmp_path / name / "results.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**json.loads((world / source / "results.json").read_text()), **values}))
        if (answers := world / source / "answers.jsonl").exists():
            (path.parent / "answers.jsonl").write_bytes(answers.read_bytes())
        return str(path)

    parts = fields(world)["funnel"]["of the train split"]
    for kind, source, what in (("traces", "checked", "a Traces stage: it holds no 'traces_of_unanimous'"),
                               ("checked", "traces", "a FactCheck stage: it holds no 'clips_with_accepted'"),
                               ("verifier", "checked", "a FactCheck, with checker 'verifier', stage: it holds no 'c")):
        path = f"{world}/{source}/results.json"
        assert f"{path}: not the results of {what}" in said(funnel={"f": parts | {kind: path}})
    other = changed("other", "checked", unanimous={"judged": 7, "accepted": 7})
    assert (f"{other}: of another stage's traces than {parts['traces']}: it judged 7 of unanimous clips, and there are "
            "80") in said(funnel={"f": parts | {"checked": other}})
    fewer = changed("fewer", "verifier", traces=81)
    assert f"{fewer}: judged 81 traces, and {parts['checked']} 82" in said(funnel={"f": parts | {"verifier": fewer}})

    alone = dict(ablation=None, clips=None, gallery=(), traces=None, verdicts=None)
    plain = changed("plain", "1_mmau", benchmark=None)
    for benchmark in (None, {"name": "music_avqa"}):
        changed("plain", "1_mmau", benchmark=benchmark)
        assert ("report: 'SFT' on 'mmau': its results.json has no 'benchmark' of MMAU: every clip's meta must have "
                "task, difficulty, sub_category") in said(tables={"SFT": {"mmau": plain}}, **alone)
    benchmark = json.loads((world / "1_mmau/results.json").read_text())["benchmark"]
    newer = changed("newer", "1_mmau", benchmark=benchmark | {"version": "v06", "sha256": "ab" * 32})
    rows = {"SFT": {"mmau": f"{world}/0_mmau/results.json"}, "mine": {"mmau": newer}}
    assert ("report: 'SFT' and 'mine' on 'mmau': MMAU v05.15.25 of 2025-08-09 (sha256 9f18fda99f8d…) and MMAU v06 "
            "(sha256 abababababab…): their accuracies do not compare") in said(tables=rows, **alone)

    lines = (world / "traces/traces.jsonl").read_text().splitlines()
    few = write_lines(tmp_path / "few.jsonl", [json.loads(line) for line in lines[:20]])
    assert re.search(r"verdicts\.jsonl: judges sample \d of 'test\d+', which is not in .*few\.jsonl",
                     said(traces=str(few)))
    again = write_lines(tmp_path / "again.jsonl", [
        trace | {"text": trace["text"] + "!" * (trace["id"] == "test9")} for trace in map(json.loads, lines)])
    assert re.search(r"verdicts\.jsonl: sample 0 of 'test9' was judged with other words than it has in .*again\.jsonl",
                     said(traces=str(again)))
    for other in ("0_avqa/answers.jsonl", "traces/labels.jsonl", "grpo.jsonl"):
        refused = rf"{world}/{other}:1: needs '(id|sample)', "
        assert re.search(refused, said(verdicts=f"{world}/{other}"))
    assert f"{world}/grpo.jsonl:1: needs 'id', a str" in said(traces=f"{world}/grpo.jsonl")
    strange = write_lines(tmp_path / "strange.jsonl", [{"id": "x", "text": "y"}])
    assert "report: " in (error := said(traces=str(strange), verdicts=None)) and "holds no trace of a clip in" in error


def test_a_row_of_the_gallery_must_have_been_asked_the_same(world, tmp_path):
    clips = write_lines(tmp_path / "test.jsonl", [dict(line, question="Why?") for line in map(
        json.loads, (world / "test.jsonl").read_text().splitlines())])
    with pytest.raises(ValueError, match="test.jsonl: clip 'test0' was not asked so in column 'avqa'"):
        made(tmp_path / "r", fields(world, clips=str(clips)))
    with pytest.raises(ConfigError, match="config: traces 't.jsonl' needs gallery, got none"):
        Report(tables={}, roles=("a", "b", "c"), clips="c.jsonl", traces="t.jsonl")


def test_a_clip_that_a_row_could_not_read_is_left_out(world, tmp_path):
    examples = read_manifest(world / "test.jsonl")
    rows = {"a": {"avqa": evaluated(tmp_path / "a", examples, lambda i: None if i == 1 else False)},
            "b": {"avqa": evaluated(tmp_path / "b", examples, lambda i: True)}}
    found, _, _ = made(tmp_path / "r", fields(world, tables=rows, ablation=None, gallery=("a", "b")))
    learnt, lost, *_ = found["gallery"]["kinds"]
    assert (learnt["count"], lost["count"]) == (23, 0)
    assert [clip["id"] for clip in learnt["clips"]] == ["test0", "test2", "test4", "test3"], "one of each class, again"
    assert "test1" not in json.dumps([kind["clips"][0]["id"] for kind in found["gallery"]["kinds"] if kind["clips"]])
    assert set(PAPERS) == {"xmd", "sightsound"}
