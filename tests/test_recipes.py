"""The bundled recipes load, say how they are run, and ask for the paper's experiments."""
import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

import minixmd.recipes
from minixmd.config import Evaluate, FactCheck, Label, Report, Switch, Traces, Train
from minixmd.config.load import load_config
from minixmd.papers.sightsound import LADDER, avqa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from prepare.questions import split_name  # noqa: E402

RECIPES = sorted(path.stem for path in Path(minixmd.recipes.__file__).parent.glob("[!_]*.py"))


def stages_of(recipe, *kinds):
    return {stage.name: stage for stage in load_config(recipe).stages if isinstance(stage, kinds)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_loads_and_opens_with_its_command_and_machine(recipe):
    config = load_config(recipe)
    told = ast.get_docstring(ast.parse(config.source.read_text()))
    assert f"python -m minixmd.train {recipe}" in told and ("CPU" in told or "GPU" in told)
    if recipe.startswith("xmd"):
        assert "Not measured by anybody yet" in told
    assert config.run_dir == Path("runs") / recipe


def test_the_ablation_is_the_papers_table_2_and_four_gates():
    trained = stages_of("xmd_ablation", Train)
    found = {name: (s.objective, s.gate, s.teacher_loss, s.student_labels is not None, s.teacher_labels is not None)
             for name, s in trained.items()}
    assert found == {
        "kl": ("distill", "learned", "kl", True, True), "kl_ce": ("distill", "learned", "kl+ce", True, True),
        "truth": ("sft", "always", "ce", False, False), "distilled": ("distill", "learned", "ce", True, True),
        "forgetting": ("distill", "learned", "ce", False, True), "oracle": ("distill", "oracle", "ce", True, True),
        "always": ("distill", "always", "ce", False, True), "never": ("distill", "never", "ce", True, False),
    }  # fmt: skip
    assert all(s.media == "audio" and s.temperature in (None, 2.0) for s in trained.values())
    report = stages_of("xmd_ablation", Report)["ablation_report"]
    assert set(report.ablation) >= {"KL on teacher's logits", "KL on teacher's logits + labels",
                                    "Ground-truth labels (upper bound)", "Teacher's labels (default)",
                                    "Teacher's labels without anti-forgetting loss"}


def test_only_the_upper_bound_sees_the_toys_true_labels():
    trained = stages_of("toy_ablation", Train)
    assert [name for name, s in trained.items() if s.manifest == "@toy/train_truth.jsonl"] == ["truth"]
    assert all(s.manifest == "@toy/train.jsonl" for name, s in trained.items() if name != "truth")
    assert all(s.val_manifest is None for s in [*trained.values(), *stages_of("toy", Train).values()])


def test_the_other_models_are_shown_what_the_paper_shows_them():
    asked = stages_of("xmd_models", Evaluate)
    assert {s.media for name, s in asked.items() if name.startswith("qwen25_vl_")} == {"video"}
    assert {s.media for name, s in asked.items() if name.startswith("omni_")} == {"sounded"}
    (report,) = stages_of("xmd_models", Report).values()
    assert {"Qwen2.5-VL-7B-Instruct", "Qwen2.5-Omni"} <= report.tables.keys() and report.name == "models_report"


@pytest.mark.parametrize("recipe, learner, teacher, name, switch", [
    ("xmd_audio", "audio", "video", "distilled", "switch"),
    ("xmd_video", "video", "audio", "video_distilled", "video_switch"),
])
def test_the_directions_differ_by_who_learns(recipe, learner, teacher, name, switch):
    stages = {stage.name: stage for stage in load_config(recipe).stages}
    train = stages[name]
    assert (train.media, train.gate, train.switch) == (learner, "learned", f"@{switch}")
    assert (train.teacher_labels, train.student_labels) == (f"@{teacher}_labels", f"@{learner}_labels")
    assert stages[train.teacher_labels[1:]].media == teacher and stages[train.student_labels[1:]].media == learner
    decides = stages[switch]
    assert (decides.teacher, decides.student) == (f"@{teacher}_analysis", f"@{learner}_analysis")
    assert (train.epochs, train.batch_size, train.lr, train.warmup_ratio, train.lora_rank) == (1, 8, 1e-4, 0.1, 16)
    assert (decides.epochs, decides.batch_size, decides.lr, decides.warmup_ratio, decides.width) == (30, 32, 1e-4, 0.1, 1.0)
    evaluated = [stage for stage in stages.values() if isinstance(stage, Evaluate)]
    assert len(evaluated) == 9 and all(stage.answer == "generate" for stage in evaluated)
    assert all(stage.top_k == 64 for stage in stages.values() if isinstance(stage, Label))
    assert len([stage for stage in stages.values() if isinstance(stage, Switch)]) == 1


def test_the_three_share_their_stages_so_that_one_run_directory_serves_them():
    audio, video, ablation = ({s.name: s for s in load_config(name).stages} for name in (
        "xmd_audio", "xmd_video", "xmd_ablation"))
    models = {s.name: s for s in load_config("xmd_models").stages}
    for one, other in ((audio, video), (audio, ablation), (audio, models)):
        shared = one.keys() & other.keys()
        assert len(shared) >= 8 and all(one[name] == other[name] for name in shared)


def test_sightsound_reads_the_manifests_that_readmes_commands_write():
    written = set()
    for command in re.findall(r"^python (tools/prepare_(?:avqa|mmau|music_avqa)\.py .*)$",
                              (ROOT / "README.md").read_text(), re.MULTILINE):
        _, *given = shlex.split(command.partition(" --")[0])
        *files, _, out = given
        written |= {f"{out}/{split_name(Path(file))}.jsonl" for file in files}
    for recipe in ("sightsound", "sightsound_endpoint"):
        stages = load_config(recipe).stages
        read = {value for stage in stages for name in ("manifest", "val_manifest", "clips")
                if (value := getattr(stage, name, None)) is not None}
        assert read == written and len(written) == 4


def test_sightsound_trains_the_rows_of_the_papers_table_2():
    """Section 4.1: LoRA of rank 8 and alpha 16 at 5e-5 for 2000 steps of 8 GPUs x 8; then all weights at 1e-6 for 1000
    steps of 192 completions, 8 of each prompt."""
    student, clips = "Qwen/Qwen2-Audio-7B-Instruct", "data/avqa/train.jsonl"
    sft = dict(lr=5e-5, max_steps=2000, batch_size=64, trainable="lora", lora_rank=8, lora_alpha=16.0)
    grpo = dict(lr=1e-6, max_steps=1000, batch_size=24, trainable="decoder", group_size=8, beta=0.04, temperature=1.0)
    rows = {
        "SFT (ground-truth labels)": dict(objective="sft", traces=None, teacher_labels=None, **sft),
        "SFT (distilled labels)": dict(objective="distill", traces=None, teacher_labels="@teacher_labels", **sft),
        "GRPO (distilled labels)": dict(objective="grpo", traces=None, teacher_labels="@teacher_labels", **grpo),
        "SFT": dict(objective="sft", traces="@traces", trace_filter="first", teacher_labels=None, **sft),
        "AGFV + SFT": dict(objective="sft", traces="@checked", trace_filter="first", teacher_labels=None, **sft),
        "TTS + AGFV + SFT": dict(objective="sft", traces="@checked", trace_filter="unanimous", teacher_labels=None, **sft),
        "TTS + AGFV + SFT + GRPO": dict(objective="grpo", model="@sft", traces=None,
                                        teacher_labels="@traces/labels.jsonl", **grpo),
    }
    trained = stages_of("sightsound", Train)
    assert list(LADDER) == ["Direct inference", *rows] and list(trained) == [LADDER[row] for row in rows]
    for row, wanted in rows.items():
        wanted = dict(model=student, manifest=clips, val_manifest="data/avqa/val.jsonl", media="audio") | wanted
        assert {name: getattr(trained[LADDER[row]], name) for name in wanted} == wanted, row
    for name, stage in stages_of("sightsound_endpoint", Train).items():
        assert stage == trained[name]


def test_a_served_teacher_is_told_nothing_of_frames_and_has_a_key_of_its_own():
    frames = dict(fps=2.0, nframes=None, min_pixels=3136, max_pixels=3136)
    local, _ = avqa(seeing=frames).traces()
    assert {name: getattr(local, name) for name in frames} == frames and local.media == "video"
    served, _ = avqa(seeing=frames, serving=dict(endpoint="http://localhost/v1", served="m"),
                     sampling={}).traces()
    assert served.media == "video" and served.fps == 1.0 and served.endpoint == "http://localhost/v1"
    keys = [{stage.api_key_env for stage in stages_of("sightsound_endpoint", kind).values()}
            for kind in (Traces, FactCheck)]
    assert keys == [{"TEACHER_API_KEY"}, {"OPENAI_API_KEY"}]
