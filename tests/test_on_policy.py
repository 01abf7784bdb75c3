"""On-policy distillation: a teacher that sees the clip scores what the student wrote, against an oracle."""
import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini import AUDIO, VISION, write_clips, write_config, write_model, write_tokenizer
from test_grpo import assert_same_run, lines_of, lowercase, run

import minixmd
import minixmd.train as training
from minixmd.config import ConfigError, OnPolicy
from minixmd.inputs.examples import read_manifest
from minixmd.inputs.prompts import build_prompt
from minixmd.learning import policy
from minixmd.learning.policy import make_rollout
from minixmd.learning.rollout import Completion
from minixmd.learning.targets import resolve_targets
from minixmd.learning.teacher import Teacher
from minixmd.runner import main
from minixmd.runs.records import write_jsonl
from minixmd.stages import shown_completions
from minixmd.train import Trainer

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = [[3, 1, 5, 2], [2, 4, 1, 3], [6, 2, 3, 1]]
REWARDS = torch.tensor([[2.0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 2, 1]])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "ears", "audio")
    write_model(folder / "eyes", "vision", seed=1, rows=352)  # more rows of the head than the student
    write_clips(folder / "clips", count=6)
    decisions = [{"id": f"clip{i}", "p_teacher": 0.9 if i != 1 else 0.1} for i in range(6)]
    write_jsonl(folder / "switch.jsonl", decisions)
    traces = [{"id": f"clip{i}", "text": f"<think>dog {i} {j}</think><answer>A</answer>"} for i in range(5)
              for j in range(1 + i % 3)]
    write_jsonl(folder / "traces.jsonl", traces)
    return folder


@pytest.fixture
def earns(monkeypatch):
    monkeypatch.setattr(policy, "REWARDS", {"letters": lowercase})


def fields_of(world, **more):
    fields = dict(name="o", allow_outside=True, model=f"{world}/ears", manifest=f"{world}/clips/manifest.jsonl",
                  teacher_model=f"{world}/eyes", teacher_prompt="{options} Look: {question}", batch_size=3,
                  group_size=4, max_new_tokens=6, lr=1e-2,
                  device="cpu", temperature=0.8, min_pixels=3136, max_pixels=3136)
    return fields | more


def train(world, **more):
    return f"OnPolicy({', '.join(f'{key}={value!r}' for key, value in fields_of(world, **more).items())})"


# ---- the loss ----


def problem(world, **more):
    """(Trainer, [(Prompt, Item)], completions) of three clips, with completions of random text."""
    stage = OnPolicy(**fields_of(world, trainable="full", beta=0.1, **more))
    items, _ = resolve_targets(stage, read_manifest(stage.manifest))
    trainer = Trainer(stage, len(items))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainer.reference.frozen_model().parameters():
            p.add_(0.02 * torch.randn(p.shape))
    samples = [trainer.build_sample(item, minixmd.inputs.clips.load_clip) for item in items[:3]]
    completions = []
    for lengths in LENGTHS:
        ids = [tuple(torch.randint(5, 250, (n,)).tolist()) for n in lengths]
        completions.append([Completion("", i, (-1.0,) * len(i), True) for i in ids])
    return trainer, samples, completions


def ours(trainer, samples, completions):
    prompts = [prompt for prompt, _ in samples]
    teacher_prompts = [item.teacher_prompt for _, item in samples]
    rollout = make_rollout(trainer.stage, prompts, completions, REWARDS, teacher_prompts)
    rollout.ref_T = training.logprobs.reference_logprobs(trainer.reference.frozen_model(), rollout.micro_batches,
                                                         trainer.vocabulary)  # fmt: skip
    trainer.read_by_teacher(rollout, teacher_prompts, trainer.teacher.frozen_model())
    loss, columns = trainer.policy_gradient(rollout)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return loss, gradients, columns, rollout


def rows_of(model, prompt, ids, temperature):
    """(T, V) fp64 logits over the temperature, of one sequence that is not packed with another."""
    whole = replace(prompt, target_N=None)
    [batch] = [minixmd.pack([minixmd.Group(whole, (torch.tensor(ids),))])]
    return model(batch)[batch.target_row_T].double() @ model.lm_head.weight.double().T / temperature


def oracle(world, trainer, completions, silent=()):
    """The loss by its definition, a completion at a time; the teacher is loaded and asked anew."""
    stage, losses = trainer.stage, []
    eyes, sees = minixmd.load(world / "eyes")
    ears, hears = minixmd.load(world / "ears")
    suppressed = torch.tensor(hears.suppressed_ids)
    common = hears.tokenizer.token_to_id("<|im_end|>") + 1
    kept = torch.tensor([i for i in range(common) if i not in hears.suppressed_ids])
    for number, (example, group) in enumerate(zip(read_manifest(stage.manifest)[:3], completions, strict=True)):
        heard = build_prompt(hears, example, stage.prompt_format)
        seen = build_prompt(sees, example, stage.teacher_format)
        advantages = (REWARDS[number] - REWARDS[number].mean()) / (REWARDS[number].std() + 1e-4)
        for completion, advantage in zip(group, advantages, strict=True):
            ids_T1 = torch.tensor(completion.ids)[:, None]
            z_TV = rows_of(trainer.model, heard, completion.ids, stage.temperature)
            logp_TV = z_TV.index_fill(1, suppressed, -torch.inf).log_softmax(-1)
            logp_T = logp_TV.gather(1, ids_T1)[:, 0]
            ratio_T = (logp_T - logp_T.detach()).exp()
            with torch.no_grad():
                reference = trainer.reference.frozen_model()
                ref_TV = rows_of(reference, heard, completion.ids, stage.temperature)
                ref_T = ref_TV.index_fill(1, suppressed, -torch.inf).log_softmax(-1).gather(1, ids_T1)[:, 0]
                q_TK = rows_of(eyes, seen, completion.ids, stage.temperature)[:, kept].log_softmax(-1)
            d_T = ref_T - logp_T
            loss_T = -stage.reward_weight * ratio_T * advantage + stage.beta * (d_T.exp() - d_T - 1)
            p_TK = z_TV[:, kept].log_softmax(-1)
            forward_T = (q_TK.exp() * (q_TK - p_TK)).sum(-1)
            reverse_T = (p_TK.exp() * (p_TK - q_TK)).sum(-1)
            kl_T = stage.temperature**2 * (forward_T if stage.teacher_kl == "forward" else reverse_T)
            if number not in silent:
                loss_T = loss_T + stage.teacher_weight * kl_T
            losses.append(loss_T.mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return loss, gradients


def assert_close(a, b, rtol=1e-5):
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        assert (a[name] - b[name]).norm() <= rtol * b[name].norm() + 1e-9, name


@pytest.mark.parametrize("switches", [
    {}, {"teacher_kl": "reverse", "teacher_weight": 0.3}, {"reward_weight": 0.0}, {"reward_weight": 0.5},
    {"micro_batch_tokens": 195}, {"gate": "learned"}])
def test_loss_and_gradients_are_the_oracles(world, switches):
    silent = ()
    if "gate" in switches:
        switches, silent = switches | {"switch": f"{world}/switch.jsonl"}, (1,)
    trainer, samples, completions = problem(world, **switches)
    loss, gradients, columns, rollout = ours(trainer, samples, completions)
    if "micro_batch_tokens" in switches:
        assert len(rollout.micro_batches) > 1
    expected, by_definition = oracle(world, trainer, completions, silent)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients, by_definition)


def test_triton_kernels_give_what_pytorch_gives(world):
    trainer, samples, completions = problem(world)
    loss, gradients, columns, _ = ours(trainer, samples, completions)
    minixmd.set_backend(trainer.model, "triton")
    loss_of_triton, gradients_of_triton, columns_of_triton, _ = ours(trainer, samples, completions)
    assert loss_of_triton.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_close(gradients_of_triton, gradients, rtol=1e-4)
    torch.testing.assert_close(columns_of_triton["teacher_kl"], columns["teacher_kl"], atol=1e-5, rtol=1e-4)


def test_neither_the_cut_nor_the_order_of_clips_changes_anything(world):
    trainer, samples, completions = problem(world)
    loss, gradients, _, _ = ours(trainer, samples, completions)
    cut, *_ = problem(world, micro_batch_tokens=195)
    of_pieces, gradients_of_pieces, _, rollout = ours(cut, samples, completions)
    assert len(rollout.micro_batches) > 3
    assert of_pieces.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_close(gradients_of_pieces, gradients, rtol=5e-6)
    apart = Teacher.read(trainer.teacher, trainer.teacher.model, rollout, [item.teacher_prompt for _, item in samples])
    trainer.teacher.stage = replace(trainer.stage, micro_batch_tokens=10**6)  # of one pass
    together = trainer.teacher.read(trainer.teacher.model, rollout, [item.teacher_prompt for _, item in samples])
    torch.testing.assert_close(apart[0], together[0], atol=1e-5, rtol=1e-5)
    assert apart[1].all() and together[1].all()


def test_no_pass_of_the_teacher_takes_more_than_the_budget_where_its_prompt_is_the_longer_one(world, monkeypatch):
    trainer, samples, completions = problem(world, teacher_prompt="{options} Look: {question} " + "well " * 30)
    heard, seen = samples[0][0], samples[0][1].teacher_prompt
    assert len(seen) > len(heard) + 20
    stage = replace(trainer.stage, micro_batch_tokens=len(seen) + 8)
    rollout = make_rollout(stage, [heard], completions[2:], REWARDS[2:], [seen])
    passes, packed = [], minixmd.pack
    monkeypatch.setattr("minixmd.learning.teacher.pack", lambda groups: passes.append(sum(map(len, groups)))
                        or packed(groups))  # fmt: skip
    trainer.teacher.stage = stage
    trainer.teacher.read(trainer.teacher.model, rollout, [seen])
    assert len(passes) > 1 and max(passes) <= stage.micro_batch_tokens


def test_a_teacher_on_the_host_reads_the_same_and_is_gone_after_that(world):
    trainer, samples, completions = problem(world)
    loss, *_ = ours(trainer, samples, completions)
    elsewhere, *_ = problem(world, teacher_place="host")
    teacher = elsewhere.teacher
    assert teacher.values.keys() == {name for name, _ in trainer.teacher.model.named_parameters()}
    read = teacher.frozen_model()
    assert read is not teacher.model and trainer.teacher.frozen_model() is trainer.teacher.model
    alive = weakref.ref(read)
    del read
    assert alive() is None and ours(elsewhere, samples, completions)[0] == loss


@pytest.mark.parametrize("changes, finished, shown", [
    ({"micro_batch_tokens": 195}, [True] * 4, 2), ({"truncated": "mask"}, [False, True, False, True], 2),
    ({}, [True] * 4, 4)])  # fmt: skip
def test_what_the_teacher_says_stands_beside_the_completion_it_is_about(world, tmp_path, changes, finished, shown):
    trainer, samples, completions = problem(world, **changes)
    completions = [[replace(c, finished=f) for c, f in zip(group, finished, strict=True)] for group in completions]
    *_, rollout = ours(trainer, samples, completions)
    rewards = {"reward": REWARDS}
    items = [item for _, item in samples]
    shown_completions.show_completions(tmp_path, 1, rollout, completions, items, rewards, trainer.teacher)
    p = rollout.pieces[0][0]
    lines = lines_of(tmp_path, "completions.jsonl")
    assert [line["reward"] for line in lines] == REWARDS[p].tolist()
    told = {i: line["teacher"] for i, line in enumerate(lines) if "teacher" in line}
    assert len(told) == shown or "micro_batch_tokens" in changes and 0 < len(told) < 4
    for i, rows in told.items():
        ids = completions[p][i].ids
        tokens = [trainer.processor.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        assert [row[0] for row in rows] == tokens


def test_the_teachers_words_are_cut_at_max_new_tokens(world):
    processor = minixmd.load(world / "ears")[1]
    [whole] = policy.given_completions(["dog and cat"], processor, 100)
    [cut] = policy.given_completions(["dog and cat"], processor, 2)
    assert whole.finished and whole.ids[-1] == processor.end_id and cut.ids == whole.ids[:2] and not cut.finished


def test_the_teacher_is_silent_after_an_id_that_it_does_not_know(world):
    trainer, samples, completions = problem(world)
    trainer.teacher.common_vocab = 200
    completions[0][0] = replace(completions[0][0], ids=(10, 250, 11))
    completions[0][1] = replace(completions[0][1], ids=(240,))
    completions[0][2] = replace(completions[0][2], ids=(10, 11, 12, 13, 199))
    prompts = [prompt for prompt, _ in samples]
    rollout = make_rollout(trainer.stage, prompts, completions, REWARDS, prompts)
    _, read_T = trainer.teacher.read(trainer.teacher.model, rollout, [samples[0][1].teacher_prompt, None, None])
    assert rollout.pieces == ((0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0, 1, 2, 3]))
    assert read_T[:9].tolist() == [True, False, False, False, True, True, True, True, True]
    assert not read_T[11:].any()


# ---- what is learnt from ----


def resolved(world, **more):
    stage = OnPolicy(**fields_of(world, **more))
    return resolve_targets(stage, read_manifest(stage.manifest))


def test_the_gate_says_on_which_clips_the_teacher_speaks(world):
    items, counts = resolved(world)
    assert all(item.shown == item.example for item in items) and counts == {"manifest": 6, "with a teacher": 6}
    items, counts = resolved(world, gate="learned", switch=f"{world}/switch.jsonl")
    assert [item.shown is None for item in items] == [False, True, False, False, False, False]
    assert counts["without a teacher"] == 1


def test_shuffled_shows_every_clip_the_video_of_another(world):
    items, _ = resolved(world, teacher_media="shuffled")
    own = [item.example.video for item in items]
    shown = [item.shown.video for item in items]
    assert sorted(own) == sorted(shown) and not any(a == b for a, b in zip(own, shown, strict=True))
    assert all(item.shown.question == item.example.question for item in items)
    assert [item.shown.video for item in resolved(world, teacher_media="shuffled", seed=1)[0]] != shown
    record = lines_of(world / "clips", "manifest.jsonl")[0]
    path = world / "clips" / "one.jsonl"
    path.write_text("".join(json.dumps(record | {"id": name}) + "\n" for name in "ab"))
    with pytest.raises(ValueError, match="o: teacher_media 'shuffled' needs two videos at least, got 1"):
        resolved(world, teacher_media="shuffled", manifest=str(path))


def test_the_teachers_own_words_stand_in_place_of_a_rollout(world, tmp_path, earns):
    fields = dict(samples="teacher", traces=f"{world}/traces.jsonl", reward_weight=0.0, group_size=2)
    items, counts = resolved(world, **fields)
    assert [len(item.texts) for item in items] == [2] * 5 and counts["left out: no trace"] == 1
    assert items[0].texts == ("<think>dog 0 0</think><answer>A</answer>",) * 2
    assert items[1].texts[0] != items[1].texts[1]
    assert run(tmp_path, train(world, **fields, max_steps=2)) == 0
    lines = lines_of(tmp_path / "run/o")[1:]
    assert all(line["teacher_kl"] > 0 and "logp_gap_max" not in line and "prefill_s" not in line for line in lines)


@pytest.mark.parametrize("more, message", [
    (dict(reward_weight=0.0, teacher_weight=0.0), "both 0.0: nothing would be learnt"),
    (dict(group_size=1), "group_size 1 has no advantage"),
    (dict(gate="learned"), "gate 'learned' with switch None"),
    (dict(samples="teacher", reward_weight=0.0), "samples 'teacher' with traces None"),
    (dict(samples="teacher", traces="t"), "samples 'teacher' needs reward_weight 0"),
    (dict(teacher_weight=0.0, teacher_kl="reverse", teacher_prompt=None), "does not use teacher_kl"),
    (dict(teacher_weight=0.0), "teacher_weight 0.0 does not use teacher_prompt"),
    (dict(reward_weight=0.0, clip_low=0.1), "reward_weight 0.0 does not use clip_low"),
    (dict(zero_variance="skip"), "does not use zero_variance"),
    (dict(teacher_prompt="{quest}"), "prompt has no placeholder 'quest'"),
    (dict(teacher_model="m", model="m", teacher_media="audio"), "is the student, and both perceive 'audio'")])
def test_what_makes_no_sense_is_refused(world, more, message):
    with pytest.raises(ConfigError, match=message):
        OnPolicy(**fields_of(world, **more))


def test_a_teacher_of_another_vocabulary_is_refused(world, tmp_path, capsys, earns):
    write_model(tmp_path / "eyes", "vision")
    write_tokenizer(tmp_path / "eyes", VISION, ["another text altogether, of other words"])
    assert run(tmp_path, train(world, teacher_model=str(tmp_path / "eyes"))) == 1
    assert "ids that the student can write" in capsys.readouterr().err
    assert AUDIO != VISION  # which no student writes


def test_a_prompt_of_the_teacher_that_does_not_fit_makes_a_bad_clip(world, tmp_path, capsys, earns):
    long = "{options} " + "Look! " * 300
    assert run(tmp_path, train(world, teacher_prompt=long, micro_batch_tokens=400)) == 1
    assert "too long (the teacher's prompt has" in capsys.readouterr().err


# ---- a run ----


def test_what_is_logged_and_shown(world, tmp_path, earns, capsys, monkeypatch):
    written, comments = [], shown_completions.comments

    def noted(teacher, rollout):
        written.extend(ids_T.tolist() for ids_T in rollout.micro_batches[0][0].completions)
        return comments(teacher, rollout)

    monkeypatch.setattr(shown_completions, "comments", noted)
    assert run(tmp_path, train(world, max_steps=2, completions_every=1, gate="learned",
                               switch=f"{world}/switch.jsonl")) == 0
    assert "the teacher shares 303 of the 340 ids" in capsys.readouterr().out
    lines = lines_of(tmp_path / "run/o")
    assert lines[0]["learns_from"] == {"manifest": 6, "with a teacher": 5, "without a teacher": 1}
    for line in lines[1:]:
        assert line["teacher_kl"] > 0 and 0 <= line["teacher_dropped"] <= 1 and line["teacher_s"] >= 0
        assert line["kl"] <= 1e-6 or line["step"] == 2
    shown = lines_of(tmp_path / "run/o", "completions.jsonl")
    told = [line for line in shown if "teacher" in line]
    assert told and all(len(row) == 5 for line in told for row in line["teacher"])
    model, processor = minixmd.load(world / "eyes")
    _, hears = minixmd.load(world / "ears")
    examples = {example.id: example for example in read_manifest(world / "clips/manifest.jsonl")}
    for line, ids in zip(told, written, strict=True):
        seen = build_prompt(processor, examples[line["id"]], OnPolicy(**fields_of(world)).teacher_format)
        tokens = [hears.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        assert [row[0] for row in line["teacher"]] == tokens
        logits_TV = rows_of(model, seen, ids, 0.8)[:, :303].detach()
        logits_TV[:, [i for i in hears.suppressed_ids if i < 303]] = -torch.inf
        logp_TV = logits_TV.log_softmax(-1)
        expected_T = logp_TV.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert [row[2] for row in line["teacher"]] == pytest.approx(expected_T.tolist(), abs=1e-5)
        assert [row[4] for row in line["teacher"]] == pytest.approx(logp_TV.max(-1).values.tolist(), abs=1e-5)


def test_a_report_shows_what_the_teacher_said(world, tmp_path, earns):
    stages = train(world, max_steps=3, epochs=2, completions_every=1, val_manifest=f"{world}/clips/manifest.jsonl")
    report = "Report(tables={}, scored={'a run': '@o/completions.jsonl'}, curves={'c': {'o': '@o/log.jsonl'}})"
    assert run(tmp_path, f"{stages}, {report}") == 0
    found = json.loads((tmp_path / "run/report/report.json").read_text())
    shown = lines_of(tmp_path / "run/o", "completions.jsonl")
    scored = found["scored"]["a run"]
    assert [one["step"] for one in scored] == [1, 1, 3, 3] and all(one in shown for one in scored)
    panels = [panel["what"] for panel in found["curves"]["c"]]
    assert {"KL to the teacher, mean over the tokens it scores", "validation accuracy, %"} <= set(panels)


def test_a_run_stopped_in_the_teachers_pass_ends_as_the_uninterrupted_one(world, tmp_path, earns, monkeypatch):
    stages = train(world, epochs=2, max_steps=4, save_every=2, completions_every=1, num_iterations=2)
    assert run(tmp_path / "whole", stages) == 0
    calls, read = [], Teacher.read

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(Teacher, "read", interrupted)
    assert [run(tmp_path / "resumed", stages) for _ in range(2)] == [130, 0]
    assert_same_run(tmp_path / "whole/run/o", tmp_path / "resumed/run/o", steps=4)


CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from minixmd.learning import policy
from minixmd.learning.teacher import Teacher
from minixmd.runner import main
from test_grpo import lowercase
policy.REWARDS = {"letters": lowercase}
calls = []
def count(module, inputs):
    if module is calls[0].model.model.layers[1] and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
read = Teacher.read
def killed(self, *args):
    calls.append(self)
    torch.nn.modules.module.register_module_forward_pre_hook(count)
    return read(self, *args)
Teacher.read = killed
sys.exit(main())
"""


@pytest.mark.slow
def test_a_run_killed_in_the_teachers_pass_ends_as_the_uninterrupted_one(world, tmp_path, earns):
    stages = train(world, epochs=3, save_every=3, completions_every=1, trainable="decoder", dtype="bfloat16")
    config = write_config(tmp_path / "config.py", f"[{stages}]")
    whole, killed = tmp_path / "whole/o", tmp_path / "killed/o"
    assert main([str(config), f"run_dir={whole.parent}"]) == 0
    done = subprocess.run([sys.executable, "-c", CHILD, str(config), f"run_dir={killed.parent}"], capture_output=True,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert lines_of(killed)[-1]["step"] == 3
    assert main([str(config), f"run_dir={killed.parent}"]) == 0
    assert_same_run(whole, killed, steps=6)


def test_the_teachers_pass_costs_little_more_than_scoring_once(world):
    """FLOPs, against one pass over each prompt and all its completions."""
    from torch.utils.flop_counter import FlopCounterMode

    trainer, samples, completions = problem(world, micro_batch_tokens=220)
    prompts = [prompt for prompt, _ in samples]
    teacher_prompts = [item.teacher_prompt for _, item in samples]
    rollout = make_rollout(trainer.stage, prompts, completions, REWARDS, teacher_prompts)
    with FlopCounterMode(display=False) as spent:
        trainer.teacher.read(trainer.teacher.model, rollout, teacher_prompts)
    with FlopCounterMode(display=False) as once, torch.no_grad():
        for prompt, group in zip(teacher_prompts, completions, strict=True):
            ids = tuple(torch.tensor(completion.ids) for completion in group)
            trainer.teacher.model(minixmd.pack([minixmd.Group(prompt, ids)]))
    assert spent.get_total_flops() <= 1.15 * once.get_total_flops()
