"""What bench.toy_sightsound claims is read from finished runs."""
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import toy_sightsound  # noqa: E402

CHECKED = {"clips": 9, "calibrated_on": 9, "traces": 9, "true": 5, "auc": 0.9, "auc_shuffled": 0.5, "checker_auc": 1.0}
RIGHT = dict(before=90, truth=140, labels=140, grpo_labels=100, first=90, checked_first=95, sft=100, continued=110,
             grpo=150, grpo_traced=120, cot=60, alone=30, test_time=80, teacher=120, teacher_cot=120)
GOOD = dict(right={}, rewards=[1.4, 1.6] + [1.8] * 8, false=(60, 4), verifier={})


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def finished_run(folder, right, rewards, false):
    """Of 200 clips each row has so many right, in the form; so many first traces of 200 are false, of the sampled and
    of the accepted ones; GRPO's reward every 20 steps."""
    for split in ("test", "train_truth"):
        write(folder / "toy" / f"{split}.jsonl", [
            dict(id=str(i), question="?", options=["x", "y"], answer=0, label="bell") for i in range(200)])
    for name, count in (RIGHT | right).items():
        stage = name if name in ("cot", "test_time", "teacher", "teacher_cot") else f"{name}_test"
        write(folder / stage / "answers.jsonl", [
            dict(id=str(i), question="q", right=i < count, text=f"<think>.</think><answer>{'BA'[i < count]}</answer>")
            for i in range(200)])
    for stage, wrong in zip(("traces", "checked"), false, strict=True):
        texts = ["<think>Hm.</think>", "<think>I hear drum.</think>"] * 100
        write(folder / stage / "traces.jsonl", [
            dict(id=str(i), sample=sample, unanimous=i % 2 == 0,
                 text=texts[i] if i < wrong else "<think>I hear bell.</think>")
            for i in range(200) for sample in range(2)])
        write(folder / stage / "results.json", [{"traces": 400}])
    write(folder / "grpo" / "log.jsonl", [dict.fromkeys(toy_sightsound.CURVE, reward)
                                          for reward in rewards for _ in range(toy_sightsound.WINDOW)])
    return str(folder)


@pytest.mark.parametrize("change, fails", [
    ({}, []),
    (dict(right=dict(continued=149)), [0, 1]),
    (dict(right=dict(sft=150)), [0, 1]),
    (dict(rewards=[1.4] * 9 + [1.3]), [2]),
    (dict(rewards=[1.4, math.inf] + [1.8] * 8), [3]),
    (dict(rewards=[1.4, 1.1] + [1.8] * 8), [4]),
    (dict(rewards=[1.4, 1.6] + [1.8] * 7), [4]),  # 180 steps
    (dict(false=(60, 55)), [5]),
    (dict(verifier=dict(auc=0.79)), [6]),
    (dict(verifier=dict(auc_shuffled=0.61)), [7]),
])
def test_what_is_claimed_is_read_from_the_runs(tmp_path, capsys, monkeypatch, change, fails):
    case = GOOD | change
    monkeypatch.setattr(toy_sightsound, "judge_verifier", lambda run: CHECKED | case["verifier"])
    runs = [finished_run(tmp_path / name, case["right"], case["rewards"], case["false"]) for name in ("one", "two")]
    status = toy_sightsound.main([*runs, "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [i for i, holds in enumerate(found["claims"].values()) if not holds] == fails and status == bool(fails)
    row = found["rows"]["TTS + AGFV + SFT + GRPO"]
    assert (row["count"], row["correct"], row["reward"]) == (400, 300, 1.75)
    assert found["modes"]["student, zero-shot CoT"]["correct"] == 120
    assert found["false traces"]["sampled, first of a clip"]["correct"] == 2 * case["false"][0]
    assert "| TTS + AGFV + SFT + GRPO | 75.0 (" in capsys.readouterr().out
