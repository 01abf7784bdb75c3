"""--trial: the whole path of a recipe on a few clips, here with random models in the place of the toy's."""
import json
import shutil
from pathlib import Path

import pytest
from mini import CLASSES, write_clips, write_config, write_model

from minixmd import runner
from minixmd.config import Toy
from minixmd.toy import trial


def write_world(stage, folder, log):
    """What stage Toy leaves, in miniature."""
    for name, kind in (("student", "audio"), ("checker", "audio"), ("teacher", "vision")):
        write_model(folder / name, kind)
    lines = [json.loads(line) for line in write_clips(folder / "clips", count=30).read_text().splitlines()]
    for line in lines:
        line.update(audio=f"clips/{line['audio']}", video=f"clips/{line['video']}")
    for split in ("train_truth", "analysis", "test", "unseen"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(runner.RUN, Toy, write_world)


@pytest.mark.slow
def test_all_of_xmds_table_1_and_figure_1_come_out_of_nothing(small_world, capsys):
    command = ["xmd_models", "--trial", "audio_labels.answer=letters", "video_labels.answer=letters"]  # random ones
    assert runner.main(command) == 0  # write no answer
    report = json.loads(Path("runs/xmd_models/trial/models_report/report.json").read_text())
    assert len(report["tables"]) == 11 and {len(cells) for cells in report["tables"].values()} == {4, 2, 1}
    assert len(report["senses"]["analysis"]["averages"]) == 6
    assert report["senses"]["analysis"]["words"].count("people's") == 3
    assert "from the letters' logits" in report["notes"]["audio_labels"]
    assert "from what it wrote" in report["notes"]["audio_analysis"]
    note = report["notes"]["No result"]
    assert "Qwen/Qwen2-Audio-7B-Instruct" in note and "data/vggsound/test.jsonl" in note
    for name in ("report.html", "report.md"):
        assert "no figure here means anything" in Path(f"runs/xmd_models/trial/models_report/{name}").read_text()
    capsys.readouterr()
    assert runner.main(command) == 0  # all of it is finished
    assert capsys.readouterr().out.count("finished before, skipped") == 44


def test_what_is_here_is_used_a_few_clips_of_it(small_world, tmp_path):
    here = tmp_path / "here"
    manifest = write_clips(here, count=60)
    shutil.copy(manifest, here / "test.jsonl")
    model = write_model(tmp_path / "model", "audio")
    config = write_config(tmp_path / "own.py", f"""[
    Evaluate(name="own", model={str(model)!r}, manifest={str(here / "test.jsonl")!r}, device="cuda", dtype="bfloat16"),
    SFT(name="sft", model="nowhere/model", manifest="nowhere/train.jsonl", epochs=9, batch_size=64, dtype="bfloat16"),
    Report(tables={{"own": {{"test": "@own"}}}})]""")
    assert runner.main([str(config), "--trial"]) == 0
    run = tmp_path / "runs" / "own" / "trial"
    own, sft = (json.loads((run / name / "config.json").read_text()) for name in ("own", "sft"))
    assert own["model"] == str(model) and own["manifest"].endswith("here/test.jsonl")
    assert len(Path(own["manifest"]).read_text().splitlines()) == len(CLASSES) * trial.REAL_CLIPS
    assert (sft["max_steps"], sft["epochs"], sft["batch_size"]) == (2, 1, 8)
    assert sft["model"].endswith("runs/trial-world/toy/student")
    assert json.loads((run / "report" / "report.json").read_text())["notes"]["No result"].endswith(
        "stand in for: nowhere/model, nowhere/train.jsonl")
