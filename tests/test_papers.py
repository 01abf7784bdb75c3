"""Every figure that the two papers publish, cell by cell: the recipe and the stage that make it, and the cell of that
recipe's report in which it stands beside the paper's. The stages' answers are made up; all else is the recipe's."""
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest

from minixmd.config import Answers, Evaluate, Report
from minixmd.config.load import load_config
from minixmd.inputs.examples import Example
from minixmd.report.gather import gather
from minixmd.report.render import ROLES, markdown
from minixmd.report.sections import PAPERS
from minixmd.runner import with_paths
from minixmd.runs.files import write_json
from minixmd.runs.records import write_jsonl
from minixmd.stages import evaluate
from minixmd.tasks.yes_no import tally

# ---- typed from the papers, with what makes each row ----

VGGSOUND = ("analysis", "test", "audioset")
XMD_TABLE_1 = {  # row -> recipe, its stages' name before "_" and the column, figures (the last one: section 4.3)
    "Qwen2-Audio-7B-Instruct": ("xmd_audio", "audio", 71.9, 69.0, 60.0),
    "Qwen2-Audio-7B-Instruct distilled from Qwen2-VL-7B-Instruct": ("xmd_audio", "distilled", 92.6, 89.4, 72.3),
    "Qwen-Audio-Chat (7B)": ("xmd_models", "qwen_audio_chat", 63.2, 60.4),
    "Kimi-Audio-7B-Instruct": ("xmd_models", "kimi_audio", 70.6, 66.7),
    "Qwen2-VL-7B-Instruct": ("xmd_audio", "video", 88.5, 80.8),
    "Qwen2-VL-7B-Instruct distilled from Qwen2-Audio-7B-Instruct": ("xmd_video", "video_distilled", 91.4, 83.9),
    "Qwen2.5-VL-7B-Instruct": ("xmd_models", "qwen25_vl", 88.8, 81.0),
    "VideoLLaMA 3": ("xmd_models", "videollama3", 83.4, 76.4),
    "Qwen2.5-Omni": ("xmd_models", "omni", 92.6, 89.7),
}
XMD_TABLE_2 = {  # row -> the same
    "KL on teacher's logits": ("xmd_ablation", "kl", 92.1, 88.7),
    "KL on teacher's logits + labels": ("xmd_ablation", "kl_ce", 92.3, 88.9),
    "Ground-truth labels (upper bound)": ("xmd_ablation", "truth", 96.4, 92.8),
    "Teacher's labels (default)": ("xmd_ablation", "distilled", 92.6, 89.4),
    "Teacher's labels without anti-forgetting loss": ("xmd_ablation", "forgetting", 92.5, 89.1),
}
XMD_FIGURE_1 = {  # bar -> stage, average of its caption
    "Qwen2.5-Omni": ("omni_analysis", 94.4),
    "Human ears and eyes": ("people_both", 84.2),
    "Qwen2-VL": ("video_analysis", 83.9),
    "Human eyes": ("people_eyes", 74.1),
    "Qwen2-Audio": ("audio_analysis", 72.5),
    "Human ears": ("people_ears", 71.9),
}
SIGHTSOUND_TABLE_1 = {  # row -> stage, figure on AVQA
    "Qwen2.5-Omni-3B (audio), direct": ("omni3b_audio", 73.6),
    "Qwen2.5-Omni-7B (audio), direct": ("omni7b_audio", 74.7),
    "Qwen2-Audio-7B-Instruct, direct": ("before_avqa", 67.1),
    "Qwen2-Audio-7B-Instruct, zero-shot CoT": ("cot", 57.7),
    "Qwen2-Audio-7B-Instruct, test-time CoT distillation": ("test_time", 82.7),
    "Qwen2-Audio-7B-Instruct, SFT (ground truth)": ("truth_avqa", 86.5),
    "Qwen2.5-Omni-3B (video), direct": ("omni3b_video", 86.5),
    "Qwen2.5-Omni-7B (video), direct": ("omni7b_video", 87.4),
    "Qwen2.5-VL-7B-Instruct, direct": ("vl7b", 85.7),
    "Qwen2.5-VL-32B-Instruct, direct": ("teacher", 85.8),
    "Qwen2.5-VL-32B-Instruct, zero-shot CoT": ("teacher_cot", 84.6),
    "Qwen2.5-VL-32B-Instruct, zero-shot audio CoT": ("teacher_audio_cot", 85.5),
    "Qwen2.5-Omni-3B, direct": ("omni3b", 88.5),
    "Qwen2.5-Omni-7B, direct": ("omni7b", 89.5),
}
MMAU_PARTS = ("Sound", "Speech", "Music", "Average")
MUSIC_PARTS = ("Temporal", "Comparative", "Counting", "Existential", "Average")
SIGHTSOUND_TABLE_2 = {  # row -> its stages' name before "_" and the column, figures on MMAU_PARTS, on MUSIC_PARTS
    "Direct inference": ("before", (64.3, 52.6, 61.7, 59.5), (57.2, 57.8, 55.7, 55.1, 55.6)),
    "SFT (ground-truth labels)": ("truth", (66.7, 50.8, 61.1, 59.5), (60.4, 62.7, 61.1, 60.7, 61.1)),
    "SFT (distilled labels)": ("labels", (64.3, 52.3, 60.5, 59.0), (59.5, 61.4, 59.1, 60.2, 58.8)),
    "GRPO (distilled labels)": ("grpo_labels", (62.5, 49.8, 59.3, 57.2), (59.3, 60.8, 59.1, 60.3, 58.8)),
    # quoted by the paper from a third one, trained on thoughts made from true answers: no stage makes these two
    "Audio-Thinker, SFT (ground-truth CoT)": (None, (63.4, 56.3, 54.4, 57.8), ()),
    "Audio-Thinker, GRPO (ground-truth CoT)": (None, (70.3, 61.6, 63.2, 65.0), ()),
    "SFT": ("first", (61.3, 47.1, 48.5, 52.3), (56.7, 57.7, 56.5, 54.3, 55.1)),
    "AGFV + SFT": ("checked_first", (63.1, 47.7, 51.5, 54.1), (58.2, 59.4, 56.9, 56.5, 56.5)),
    "TTS + AGFV + SFT": ("sft", (61.6, 48.3, 50.6, 53.5), (60.6, 59.0, 59.1, 57.5, 58.2)),
    "TTS + AGFV + SFT + GRPO": ("grpo", (66.1, 49.8, 52.7, 56.2), (62.7, 63.3, 60.1, 59.7, 59.5)),
}


@dataclass(frozen=True)
class Cell:
    """A figure of a paper, and where a report has ours."""
    figure: float  # %
    recipe: str
    table: str  # of report.json
    row: str
    column: str
    stage: str  # that makes it
    part: str = ""  # of a benchmark; "" = all of it


def list_cells():
    cells = []
    for table, rows in (("tables", XMD_TABLE_1), ("ablation", XMD_TABLE_2)):
        for row, (recipe, name, *figures) in rows.items():
            for column, figure in zip(VGGSOUND, figures, strict=False):
                cells.append(Cell(figure, recipe, table, row, column, f"{name}_{column}"))
    for bar, (stage, figure) in XMD_FIGURE_1.items():
        cells.append(Cell(figure, "xmd_models", "senses", bar, "analysis", stage))
    for row, (stage, figure) in SIGHTSOUND_TABLE_1.items():
        cells.append(Cell(figure, "sightsound", "tables", row, "avqa", stage))
    for row, (name, mmau, music) in SIGHTSOUND_TABLE_2.items():
        for column, parts, figures in (("mmau", MMAU_PARTS, mmau), ("music_avqa", MUSIC_PARTS, music)):
            for part, figure in zip(parts, figures, strict=False):
                if name is not None:
                    cells.append(Cell(figure, "sightsound", "ablation", row, column, f"{name}_{column}", part))
    return cells


CELLS = list_cells()

# ---- the recipes' reports, of made-up answers ----

CLASSES = [f"class {i:02}" for i in range(60)]
METAS = {  # folder of a manifest -> what its clips' meta holds
    "mmau": [dict(task=task, difficulty="easy", sub_category="x", version="v05.15.25", sha256="0" * 64)
             for task in ("sound", "speech", "music")],
    "mmar": [dict(modality="sound", category="Signal Layer", sub_category="x", version="v1", sha256="0" * 64)],
    "music_avqa": [dict(modality="Audio", type=kind)
                   for kind in ("Temporal", "Comparative", "Counting", "Existential", "Location")],
}  # fmt: skip


def examples_of(manifest):
    """Three clips of each class, and of each meta of a benchmark."""
    path = Path(manifest)
    metas = METAS.get(path.parent.name, [{}])
    prefix = "unseen " if path.stem == "unseen" else ""
    examples = []
    for i in range(3 * len(CLASSES)):
        label = prefix + CLASSES[i % len(CLASSES)]
        meta = metas[i % len(metas)]
        examples.append(Example(f"clip{i}", None, None, "Which?", ("a", "b"), 0, label, meta=meta))
    return examples


def write_results(stage, folder):
    """What an Evaluate or Answers stage leaves that answers by chance."""
    examples = examples_of(stage.manifest)
    chance = Random(stage.name)
    records = []
    for example in examples:
        answer = chance.randrange(2)
        records.append({"id": example.id, "answer": answer, "option": example.options[answer]})
    asked = {"condition": stage.condition} if getattr(stage, "condition", None) else {}
    evaluate.collect(stage, folder, lambda line: None, examples, records, asked,
                     evaluate.describe_benchmark(stage, examples))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{recipe: (its stages by name, its Report, its report.json, without clips, traces and curves)}"""
    found = {}
    for recipe in sorted({cell.recipe for cell in CELLS}):
        run_dir = tmp_path_factory.mktemp(recipe)
        config = replace(load_config(recipe), run_dir=run_dir)
        for stage in config.stages:
            folder = run_dir / stage.name
            folder.mkdir()
            write_json(folder / "config.json", vars(stage))
            if isinstance(stage, Evaluate | Answers):
                write_results(stage, folder)
            elif stage.name.endswith("switch"):
                write_jsonl(folder / "switch.jsonl", [{"id": "clip0", "p_teacher": 0.9}])
                decided = tally([0.9, 0.2], [1, 1])
                write_json(folder / "results.json", {"clips": 1, "clips_to_teacher": 1, "validation": decided,
                                                    "training": decided})
            (folder / "log.jsonl").touch()
        (report,) = [stage for stage in config.stages if isinstance(stage, Report)]
        tables = replace(report, clips=None, gallery=(), traces=None, verdicts=None, funnel=None)
        found[recipe] = {stage.name: stage for stage in config.stages}, report, gather(
            with_paths(tables, config), run_dir)[0]
    return found


def test_the_list_holds_all_that_the_library_knows_of_the_papers():
    listed = [(cell.row, cell.figure) for cell in CELLS]
    for row, (name, mmau, _) in SIGHTSOUND_TABLE_2.items():
        if name is None:
            listed += [(row, figure) for figure in mmau]
    known = []
    for paper in PAPERS.values():
        for rows in paper["tables"].values():
            for row, figures in rows.items():
                known += [(row, figure) for figure in figures.values()]
    assert sorted(known) == sorted(listed) and len(CELLS) == 20 + 10 + 6 + 14 + 8 * 9


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.row}: {cell.stage} {cell.part}")
def test_a_stage_makes_the_cell_and_the_papers_figure_stands_beside_it(cell, reports):
    stages, report, made = reports[cell.recipe]
    if cell.table == "senses":
        path = report.senses[cell.column][cell.row]
        ours = made["senses"][cell.column]["averages"][cell.row]
    else:
        path = getattr(report, cell.table)[cell.row][cell.column]
        ours = made[cell.table][cell.row][cell.column]
        if cell.part:
            ours = made["benchmarks"][cell.table][cell.column]["rows"][cell.row][cell.part]
    assert path == f"@{cell.stage}" and isinstance(stages[cell.stage], Evaluate | Answers)
    assert 0 < ours["accuracy"] < 1 and ours["paper"] == cell.figure


def test_figure_1_has_thirty_classes_in_three_conditions_and_the_papers_counts(reports):
    """Section 3.2: 226 of 286 classes; 8 of 10, 10 of 10 and 9 of 10 in which people are as the models are."""
    _, report, made = reports["xmd_models"]
    assert report.gap == "analysis"
    for column, bars in (("analysis", list(XMD_FIGURE_1)), ("test", ["Qwen2.5-Omni", "Qwen2-VL", "Qwen2-Audio"])):
        section = made["senses"][column]
        assert [len(classes) for classes in section["groups"].values()] == [10, 10, 10]
        assert all(cells.keys() == set(bars) for classes in section["groups"].values() for cells in classes.values())
    said = made["senses"]["analysis"]["words"]
    assert all(f"(the paper: {count} of 10)" in said for count in (8, 10, 9)) and "(the paper: 94.4 %)" in said
    assert "paper" not in made["senses"]["test"]["words"]  # of other clips
    assert "(in the paper, on VGGSound: better in 226 of 286)" in made["classes"]["words"]


def test_figure_3_has_classes_of_test_and_unseen_ones_before_and_after(reports):
    _, report, made = reports["xmd_audio"]
    assert report.roles == ("Qwen2-VL-7B-Instruct", "Qwen2-Audio-7B-Instruct",
                            "Qwen2-Audio-7B-Instruct distilled from Qwen2-VL-7B-Instruct")  # fmt: skip
    for column, chosen_on in (("test", "analysis"), ("unseen", "unseen")):
        bars = made["classes"]["bars"][column]
        assert bars["chosen_on"] == chosen_on and list(map(len, bars["groups"].values())) == [10, 10, 10]
        assert all(cells.keys() == ROLES.keys() for cells in bars["classes"].values())


@pytest.mark.parametrize("recipe", ["xmd_audio", "xmd_video", "xmd_models", "xmd_ablation"])
def test_the_switchs_figures_stand_beside_the_papers(recipe, reports):
    """Section 4.2."""
    _, _, made = reports[recipe]
    for part, figure in (("validation", 88.8), ("training", 89.1)):
        assert f"the paper's, on VGGSound: {figure} %" in made["switch"]["words"][part]


def test_a_report_says_how_its_labels_and_its_switchs_classes_were_answered(reports):
    _, _, made = reports["xmd_audio"]
    audio, video = "Qwen/Qwen2-Audio-7B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"
    assert made["notes"] == {
        "video_analysis": f"the classes that the switch learns are by {video}, from what it wrote",
        "audio_analysis": f"the classes that the switch learns are by {audio}, from what it wrote",
        "video_labels": f"labels are by {video}, from what it wrote",
        "audio_labels": f"labels are by {audio}, from what it wrote",
    }
    assert f"video_labels: labels are by {video}, from what it wrote." in markdown(made)
    assert list(reports["sightsound"][2]["notes"]) == ["teacher_labels"]
