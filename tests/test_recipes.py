"""The bundled recipes load, say how they are run, and ask for the paper's experiments."""
import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

import minixmd.recipes
from minixmd.config import GRPO, SFT, TRAINING, Answers, Distill, Evaluate, FactCheck, Label, Report, Switch, Traces
from minixmd.config.load import load_config
from minixmd.recipe_parts.sightsound import LADDER, avqa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from prepare.questions import split_name  # noqa: E402

RECIPES = sorted(path.stem for path in Path(minixmd.recipes.__file__).parent.glob("[!_]*.py"))


def stages_of(recipe, *kinds):
    return {stage.name: stage for stage in load_config(recipe).stages if isinstance(stage, kinds)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_loads_and_opens_with_its_command_and_machine(recipe):
    config = load_config(recipe)
    docstring = ast.get_docstring(ast.parse(config.source.read_text()))
    assert f"python -m minixmd.train {recipe}" in docstring and ("CPU" in docstring or "GPU" in docstring)
    if recipe.startswith("xmd"):
        assert "Not measured by anybody yet" in docstring
    assert config.run_dir == Path("runs") / recipe


def test_the_ablation_is_the_papers_table_2_and_four_gates():
    distilled = stages_of("xmd_ablation", Distill)
    found = {name: (s.gate, s.teacher_loss, s.student_labels is not None, s.teacher_labels is not None)
             for name, s in distilled.items()}
    assert found == {
        "kl": ("learned", "kl", True, True), "kl_ce": ("learned", "kl+ce", True, True),
        "distilled": ("learned", "ce", True, True), "forgetting": ("learned", "ce", False, True),
        "oracle": ("oracle", "ce", True, True), "always": ("always", "ce", False, True),
        "never": ("never", "ce", True, False),
    }  # fmt: skip
    assert all(s.temperature == 2.0 for s in distilled.values())
    trained = stages_of("xmd_ablation", *TRAINING)
    assert trained.keys() - found.keys() == {"truth"} and type(trained["truth"]) is SFT
    assert trained["truth"].traces is None and all(s.media == "audio" for s in trained.values())
    report = stages_of("xmd_ablation", Report)["ablation_report"]
    assert set(report.ablation) >= {"KL on teacher's logits", "KL on teacher's logits + labels",
                                    "Ground-truth labels (upper bound)", "Teacher's labels (default)",
                                    "Teacher's labels without anti-forgetting loss"}


def test_only_the_upper_bound_sees_the_toys_true_labels():
    trained = stages_of("toy_ablation", *TRAINING)
    assert [name for name, s in trained.items() if s.manifest == "@toy/train_truth.jsonl"] == ["truth"]
    assert all(s.manifest == "@toy/train.jsonl" for name, s in trained.items() if name != "truth")
    assert all(s.val_manifest is None for s in [*trained.values(), *stages_of("toy", *TRAINING).values()])


def test_the_other_models_are_shown_what_the_paper_shows_them():
    asked = stages_of("xmd_models", Evaluate)
    assert {s.media for name, s in asked.items() if name.startswith("qwen25_vl_")} == {"video"}
    assert {s.media for name, s in asked.items() if name.startswith("omni_")} == {"sounded"}
    (report,) = stages_of("xmd_models", Report).values()
    assert report.tables.keys() == {
        "Qwen2-VL-7B-Instruct", "Qwen2-Audio-7B-Instruct",
        "Qwen2-Audio-7B-Instruct distilled from Qwen2-VL-7B-Instruct", "Qwen2.5-VL-7B-Instruct", "Qwen2.5-Omni",
        "Qwen2-Audio-7B-Instruct, without options", "Qwen-Audio-Chat (7B)", "Kimi-Audio-7B-Instruct", "VideoLLaMA 3",
        "Qwen2-Audio-7B-Instruct, question alone", "Qwen2-VL-7B-Instruct, question alone"}  # fmt: skip
    assert report.name == "models_report" and "{options}" not in asked["audio_open_analysis"].prompt
    people = [stage.condition for stage in stages_of("xmd_models", Answers).values() if stage.condition]
    assert people == ["ears", "eyes", "both"] and [len(bars) for bars in report.senses.values()] == [6, 3]


@pytest.mark.parametrize("recipe, student, teacher, name, switch", [
    ("xmd_audio", "audio", "video", "distilled", "switch"),
    ("xmd_video", "video", "audio", "video_distilled", "video_switch"),
])
def test_the_directions_differ_by_who_learns(recipe, student, teacher, name, switch):
    stages = {stage.name: stage for stage in load_config(recipe).stages}
    distill = stages[name]
    assert (distill.media, distill.gate, distill.switch) == (student, "learned", f"@{switch}")
    assert (distill.teacher_labels, distill.student_labels) == (f"@{teacher}_labels", f"@{student}_labels")
    assert stages[distill.teacher_labels[1:]].media == teacher and stages[distill.student_labels[1:]].media == student
    decides = stages[switch]
    assert (decides.teacher, decides.student) == (f"@{teacher}_analysis", f"@{student}_analysis")
    assert (distill.epochs, distill.batch_size, distill.lr, distill.warmup_ratio) == (1, 8, 1e-4, 0.1)
    assert distill.lora_rank == 16
    assert (decides.epochs, decides.batch_size, decides.lr, decides.warmup_ratio) == (30, 32, 1e-4, 0.1)
    assert decides.width == 1.0
    evaluated = [stage for stage in stages.values() if isinstance(stage, Evaluate)]
    assert len(evaluated) == 4 * 5 and all(stage.answer == "generate" for stage in evaluated)
    labels = [stage for stage in stages.values() if isinstance(stage, Label)]
    assert all((stage.top_k, stage.answer) == (64, "generate") for stage in labels)
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
    for command in re.findall(r"^python (tools/prepare_(?:avqa|mmau|mmar|music_avqa)\.py .*)$",
                              (ROOT / "README.md").read_text(), re.MULTILINE):
        _, *given = shlex.split(command.partition(" --")[0])
        *files, _, out = given
        written |= {f"{out}/{split_name(Path(file))}.jsonl" for file in files}
    for recipe in ("sightsound", "sightsound_endpoint"):
        stages = load_config(recipe).stages
        read = {value for stage in stages for name in ("manifest", "val_manifest", "clips")
                if (value := getattr(stage, name, None)) is not None}
        assert read == written and len(written) == 5


def test_sightsound_trains_the_rows_of_the_papers_table_2():
    """Section 4.1: LoRA of rank 8 and alpha 16 at 5e-5 for 2000 steps of 8 GPUs x 8; then all weights at 1e-6 for 1000
    steps of 192 completions, 8 of each prompt."""
    student, clips = "Qwen/Qwen2-Audio-7B-Instruct", "data/avqa/train.jsonl"
    sft = dict(lr=5e-5, max_steps=2000, batch_size=64, trainable="lora", lora_rank=8, lora_alpha=16.0)
    grpo = dict(lr=1e-6, max_steps=1000, batch_size=24, trainable="decoder", group_size=8, beta=0.04, temperature=1.0)
    labels, traces = dict(teacher_labels="@teacher_labels"), dict(traces="@traces", trace_filter="first")
    rows = {
        "SFT (ground-truth labels)": (SFT, dict(traces=None, **sft)),
        "SFT (distilled labels)": (Distill, dict(gate="always", **labels, **sft)),
        "GRPO (distilled labels)": (GRPO, dict(**labels, **grpo)),
        "SFT": (SFT, dict(**traces, **sft)),
        "AGFV + SFT": (SFT, dict(traces="@checked", trace_filter="first", **sft)),
        "TTS + AGFV + SFT": (SFT, dict(traces="@checked", trace_filter="unanimous", **sft)),
        "TTS + AGFV + SFT + GRPO": (GRPO, dict(model="@sft", teacher_labels="@traces/labels.jsonl", **grpo)),
    }
    trained = stages_of("sightsound", *TRAINING)
    assert list(LADDER) == ["Direct inference", *rows] and list(trained) == [LADDER[row] for row in rows]
    for row, (kind, wanted) in rows.items():
        stage = trained[LADDER[row]]
        wanted = dict(model=student, manifest=clips, val_manifest="data/avqa/val.jsonl", media="audio") | wanted
        assert type(stage) is kind and {name: getattr(stage, name) for name in wanted} == wanted, row
    for name, stage in stages_of("sightsound_endpoint", *TRAINING).items():
        assert stage == trained[name]


def test_a_served_teacher_chooses_its_frames_and_has_a_key_of_its_own():
    frames = dict(fps=2.0, nframes=None, min_pixels=3136, max_pixels=3136)
    local, _ = avqa(video_fields=frames).traces()
    assert {name: getattr(local, name) for name in frames} == frames and local.media == "video"
    served, _ = avqa(video_fields=frames, server_fields=dict(endpoint="http://localhost/v1", served="m"),
                     traces_fields={}).traces()
    assert served.media == "video" and served.fps == 1.0 and served.endpoint == "http://localhost/v1"
    keys = [{stage.api_key_env for stage in stages_of("sightsound_endpoint", kind).values()}
            for kind in (Traces, FactCheck)]
    assert keys == [{"TEACHER_API_KEY"}, {"OPENAI_API_KEY"}]


# ---- what a report's titles stand for ----


def all_stages(recipe):
    return {stage.name: stage for stage in load_config(recipe).stages}


def trained_for(stages, row):
    """The training stage whose model a row of a report evaluates; None = a model before training."""
    models = {stages[cell.removeprefix("@")].model for cell in row.values()}
    assert len(models) == 1, "a row is one model"
    return stages.get(models.pop().removeprefix("@"))


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "toy_on_policy_ablation"])
def test_a_reports_rows_are_models_and_its_columns_are_manifests(recipe):
    stages = all_stages(recipe)
    (report,) = [stage for stage in stages.values() if isinstance(stage, Report)]
    manifests = {}
    for table in (report.tables, report.ablation or {}):
        results = [cell for row in table.values() for cell in row.values()]
        assert len(set(results)) == len(results), "no result stands twice in a table"
        for row in table.values():
            evaluated = {column: stages[cell.removeprefix("@")] for column, cell in row.items()}
            assert all(isinstance(stage, Evaluate | Answers) for stage in evaluated.values())
            if any(isinstance(stage, Evaluate) for stage in evaluated.values()):
                assert len({(stage.model, stage.media, stage.prompt) for stage in evaluated.values()}) == 1
            for column, stage in evaluated.items():
                assert manifests.setdefault(column, stage.manifest) == stage.manifest
    assert report.clips == manifests[report.clips_of]
    rows = report.tables | (report.ablation or {})
    for title, log in (report.curves or {}).get("Distillation", {}).items():
        name = log.removeprefix("@").removesuffix("/log.jsonl")
        assert isinstance(stages[name], Distill | SFT)
        assert title not in rows or trained_for(stages, rows[title]) is stages[name]
    for kind in ("SFT", "GRPO") if report.published == "sightsound" else ():
        for title, log in report.curves[kind].items():
            stage = trained_for(stages, rows[title])
            assert log == f"@{stage.name}/log.jsonl" and isinstance(stage, GRPO) == (kind == "GRPO")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_switch_compares_results_on_its_manifest_and_a_check_hears_its_traces_clips(recipe):
    stages = all_stages(recipe)
    for stage in stages.values():
        if isinstance(stage, Switch):
            teacher, student = (stages[name.removeprefix("@")] for name in (stage.teacher, stage.student))
            assert teacher.manifest == student.manifest == stage.manifest and teacher.media != student.media
        if isinstance(stage, FactCheck):
            assert stages[stage.traces.removeprefix("@")].manifest == stage.manifest
        if isinstance(stage, Distill) and stage.gate in ("learned", "oracle"):
            switch = stages[stage.switch.removeprefix("@")]
            assert stages[switch.student.removeprefix("@")].model == stage.model


@pytest.mark.parametrize("recipe", ["xmd_ablation", "toy_ablation"])
def test_the_ablations_titles_stand_for_what_they_say(recipe):
    stages = all_stages(recipe)
    report = stages["ablation_report"]
    both = dict(teacher_labels="@video_labels", student_labels="@audio_labels")
    wanted = {
        "KL on teacher's logits": (Distill, dict(teacher_loss="kl", gate="learned", **both)),
        "KL on teacher's logits + labels": (Distill, dict(teacher_loss="kl+ce", gate="learned", **both)),
        "Ground-truth labels (upper bound)": (SFT, dict(traces=None)),
        "Teacher's labels (default)": (Distill, dict(teacher_loss="ce", gate="learned", **both)),
        "Teacher's labels without anti-forgetting loss": (
            Distill, dict(teacher_loss="ce", gate="learned", teacher_labels="@video_labels", student_labels=None)),
        "Switch by the true class (oracle)": (Distill, dict(teacher_loss="ce", gate="oracle", **both)),
        "Always the teacher, no switch": (Distill, dict(gate="always", student_labels=None)),
        "Never the teacher, own answers only": (Distill, dict(gate="never", teacher_labels=None)),
    }
    assert list(report.ablation) == list(wanted)
    for title, (kind, fields) in wanted.items():
        stage = trained_for(stages, report.ablation[title])
        assert type(stage) is kind and {name: getattr(stage, name) for name in fields} == fields, title
    models = [{stages[cell.removeprefix("@")].media for cell in report.tables[title].values()}
              for title in report.roles]
    assert models == [{"video"}, {"audio"}, {"audio"}]
    assert trained_for(stages, report.tables[report.roles[2]]).name == "distilled"


@pytest.mark.parametrize("recipe", ["sightsound", "sightsound_endpoint", "toy_sightsound", "toy_sightsound_ablation"])
def test_the_ladders_titles_stand_for_what_they_say(recipe):
    stages = all_stages(recipe)
    report = stages["report"]
    wanted = {
        "SFT (ground-truth labels)": dict(traces=None),
        "SFT (distilled labels)": dict(teacher_labels="@teacher_labels", gate="always"),
        "GRPO (distilled labels)": dict(teacher_labels="@teacher_labels"),
        "SFT": dict(traces="@traces", trace_filter="first"),
        "AGFV + SFT": dict(traces="@checked", trace_filter="first"),
        "TTS + AGFV + SFT": dict(traces="@checked", trace_filter="unanimous"),
        "TTS + AGFV + SFT + GRPO": dict(model="@sft"),
        "SFT continued": dict(model="@sft", traces="@checked", trace_filter="unanimous"),
        "SFT, then GRPO, on the traces' clips alone": dict(model="@sft", manifest="@toy/traced.jsonl"),
    }
    if recipe == "toy_sightsound":  # two rows, under other titles
        wanted = {"SFT": wanted["TTS + AGFV + SFT"], "SFT, then GRPO": wanted["TTS + AGFV + SFT + GRPO"]}
    ladder = report.ablation or report.tables
    alone, before, *trained = ladder
    assert stages[next(iter(ladder[alone].values()))[1:]].media == "none"
    assert trained_for(stages, ladder[alone]) is trained_for(stages, ladder[before]) is None
    assert set(trained) <= set(wanted) and len(trained) >= 2
    for title in trained:
        stage = trained_for(stages, ladder[title])
        assert {name: getattr(stage, name) for name in wanted[title]} == wanted[title], title
        assert ("Think" in stage.prompt) == (title not in ("SFT (ground-truth labels)", "SFT (distilled labels)"))
    votes = "@traces/labels.jsonl" if recipe.startswith("sightsound") else "@teacher_labels"
    assert stages["grpo"].teacher_labels == votes
    if "SFT continued" in ladder:
        assert stages["continued"].max_steps == stages["grpo"].max_steps


def test_table_1s_titles_name_the_model_and_what_it_is_shown():
    stages = all_stages("sightsound")
    for title, row in stages["report"].tables.items():
        (cell,) = row.values()
        stage = stages[cell.removeprefix("@")]
        name, _, mode = title.partition(", ")
        name, _, shown = name.partition(" (")
        model = "Qwen/Qwen2-Audio-7B-Instruct" if stage.model == "@truth" else stage.model
        assert model == f"Qwen/{name}", title
        if mode == "question alone":
            assert stage.media == "none"
            continue
        media = "video" if "-VL-" in name else "audio" if "Audio" in name else shown.removesuffix(")") or "sounded"
        assert stage.media == media, title
        assert ("Think" in stage.prompt) == ("zero-shot" in mode), title
        assert ("heard" in stage.prompt) == (mode == "zero-shot audio CoT"), title
        assert (stage.traces == "@test_traces") == ("test-time" in mode), title
