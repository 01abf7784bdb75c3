"""Distillation: which clip learns what, and the loss of every teacher_loss against plain PyTorch."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import distill_kl, distill_topk
from mini import AUDIO, VISION, write_clips, write_config, write_model, write_tokenizer
from tiny import prompt, tiny_model, trainer_of
from tokenizers import Tokenizer

from minixmd import pack
from minixmd.config import Distill
from minixmd.inputs.examples import Example
from minixmd.inputs.tokenizer import common_vocab_size
from minixmd.learning.steps import count
from minixmd.learning.targets import Item, resolve_targets, stored_rows
from minixmd.runner import main
from minixmd.train import Trainer

COMMON, SUPPRESSED = 80, torch.tensor([4, 33, 85])


def kept(logits):
    """log-softmax over the common_vocab ids that are not suppressed; -inf elsewhere."""
    ids = [v for v in range(COMMON) if v not in SUPPRESSED.tolist()]
    return torch.full_like(logits, -torch.inf).index_copy(-1, torch.tensor(ids), logits[..., ids].log_softmax(-1))


def top_of(logits_V, k, temperature, suppressed_ids=()):
    """What stage Label stores of a row of the teacher's logits."""
    logits_V = logits_V.index_fill(0, torch.tensor(suppressed_ids, dtype=torch.long), -torch.inf)
    best = logits_V.topk(k)
    return {"ids": best.indices.tolist(), "logits": best.values.tolist(), "temperature": temperature,
            "logsumexp": (logits_V / temperature).logsumexp(0).item()}  # fmt: skip


# ---- what the teacher stored ----


def test_all_ids_stored_give_the_whole_distribution_over_the_common_ones():
    logits_V = 3 * torch.randn(100)
    [id_J], [logq_J], [tail], [dropped] = stored_rows([top_of(logits_V, 100, 2.0)], COMMON, SUPPRESSED)
    truth_V = kept(logits_V / 2)
    inside = id_J >= 0
    assert sorted(id_J[inside].tolist()) == [v for v in range(COMMON) if v not in SUPPRESSED.tolist()]
    torch.testing.assert_close(logq_J[inside], truth_V[id_J[inside].long()])
    outside = (logits_V / 2).softmax(-1)[[*range(COMMON, 100), 4, 33]].sum()
    assert dropped.item() == pytest.approx(outside.item(), rel=1e-5) and abs(tail.item()) < 1e-5


def test_few_ids_stored_leave_the_rest_in_the_tail_and_bound_the_full_kl_from_below():
    for seed in range(20):
        torch.manual_seed(seed)
        teacher_V, student_V = 4 * torch.randn(80), 4 * torch.randn(80)
        teacher_V[[4, 33]] = -torch.inf
        rows = stored_rows([top_of(teacher_V, 20, 2.0)], COMMON, SUPPRESSED)
        assert rows[1].exp().sum() + rows[2] == pytest.approx(1, abs=1e-5)
        stored = distill_topk(student_V[None], *rows[:3], COMMON, SUPPRESSED, 2.0, "torch")[0]
        full = distill_kl(student_V[None], teacher_V[None], COMMON, SUPPRESSED, 2.0, "torch")[0]
        assert 0.5 * full < stored <= full * (1 + 1e-5)


def test_common_ids_end_where_the_tables_first_differ(tmp_path):
    audio = write_tokenizer(tmp_path / "a", AUDIO)
    vision = write_tokenizer(tmp_path / "b", VISION)
    ours = SimpleNamespace(tokenizer=audio)
    count = common_vocab_size(ours, tmp_path / "b")
    assert count == audio.token_to_id("<|im_end|>") + 1 == audio.token_to_id("<|AUDIO|>") < audio.get_vocab_size()
    assert count < vision.get_vocab_size()
    assert common_vocab_size(ours, tmp_path / "a") == audio.get_vocab_size()


# ---- the loss ----


def problem(teacher_loss, micro_batch_tokens=8192):
    """A Trainer, and five prompts of two targets; the second, fourth and fifth are the teacher's, with stored rows."""
    samples = []
    torch.manual_seed(1)
    for i in range(5):
        topk = top_of(3 * torch.randn(97), 6, 2.0, suppressed_ids=[4]) if i in (1, 3, 4) else None
        item = Item(EXAMPLES[0], 0, "student" if topk is None else "teacher", topk)
        samples.append((prompt([3 + i], seed=i, targets=2), item))
    stage = Distill(name="s", model="m", manifest="d", teacher_labels="t", trainable="full", device="cpu",
                    batch_size=10, micro_batch_tokens=micro_batch_tokens)
    trainer = trainer_of(stage, tiny_model("audio"))
    trainer.stage = replace(stage, teacher_loss=teacher_loss)  # only now: it would read the teacher's tokenizer
    trainer.common_vocab, trainer.suppressed_Z, trainer.suppressed_ids = COMMON, SUPPRESSED, SUPPRESSED
    return trainer, samples


def plain(model, samples, teacher_loss):
    """The loss by its definition, a clip at a time, from all logits."""
    total, loss = sum(int(p.target_N.sum()) for p, _ in samples), 0
    for p, item in samples:
        top = item.teacher_topk
        batch = pack([p])
        logp_TV = model.logits(model(batch)[batch.target_row_T]).log_softmax(-1)
        nll_T = -logp_TV.gather(1, batch.target_id_T[:, None]).squeeze(1)
        if top is None or teacher_loss == "kl+ce":
            loss = loss + nll_T.sum() / total
        if top is not None:
            p_V = kept(model.logits(model(batch)[batch.target_row_T[:1]])[0] / 2).exp()
            at = [i for i, v in enumerate(top["ids"]) if v < COMMON and v not in SUPPRESSED.tolist()]
            ids = torch.tensor([top["ids"][i] for i in at])
            all_J = (torch.tensor(top["logits"]) / 2 - top["logsumexp"]).exp()
            q_J, rest = all_J[at] / (all_J[at].sum() + 1 - all_J.sum()), (1 - all_J.sum())
            tail = rest / (all_J[at].sum() + rest)
            kl = (q_J * (q_J / p_V[ids]).log()).sum() + tail * (tail / (p_V.sum() - p_V[ids].sum())).log()
            loss = loss + 4 * kl / len(samples)
    return loss


def values(metrics):
    return {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize("tokens", [1, 12, 8192])
@pytest.mark.parametrize("teacher_loss", ["kl", "kl+ce"])
def test_the_loss_and_its_gradients_are_as_defined_however_the_step_is_cut(teacher_loss, tokens):
    trainer, samples = problem(teacher_loss, tokens)
    micro_batches = trainer.micro_batches(samples)
    assert len(micro_batches) == {1: 5, 12: 3, 8192: 1}[tokens]
    model, metrics = trainer.model, values(trainer.distill_gradients(micro_batches, count(micro_batches)))
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    truth = plain(model, samples, teacher_loss)
    truth.backward()
    assert metrics["loss"] == pytest.approx(truth.item(), rel=1e-5) and metrics["kl"] > 0
    assert 0 < metrics["teacher_dropped"] < 1 and 0 < metrics["student_dropped"] < 1
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())


def test_a_step_of_stored_rows_alone_trains_without_cross_entropy():
    trainer, samples = problem("kl")
    micro_batches = trainer.micro_batches([samples[1], samples[3]])
    metrics = values(trainer.distill_gradients(micro_batches, count(micro_batches)))
    assert metrics["loss"] == pytest.approx(metrics["kl"])


@pytest.mark.parametrize("teacher_loss", ["ce", "kl", "kl+ce"])
def test_a_step_says_how_many_of_its_clips_follow_the_teacher(teacher_loss):
    trainer, samples = problem(teacher_loss)
    if teacher_loss == "ce":
        samples = [(p, replace(item, teacher_topk=None)) for p, item in samples]
    metrics = trainer.distill_step(trainer.micro_batches(samples))
    assert metrics["to_teacher"] == 3 and metrics["tokens"] == sum(len(p) for p, _ in samples)
    assert {"loss", "lr", "grad_norm"} <= metrics.keys() and ("kl" in metrics) == (teacher_loss != "ce")


# ---- which clip learns what ----

OPTIONS = ("dog", "cat")


def labels(path, **answers):
    path.write_text("".join(json.dumps({"id": name, **answer}) + "\n" for name, answer in answers.items()))
    return str(path)


@pytest.fixture
def given(tmp_path):
    """Three clips. The teacher says dog, dog, dog, the student cat, cat, cat; both stored their logits, as in XMD."""
    top = {"ids": [1], "logits": [0.0], "logsumexp": 0.0, "temperature": 2.0}
    return dict(
        name="s", model="m", manifest="d",
        teacher_labels=labels(tmp_path / "t", **{name: {"option": "dog", "top": top} for name in "abc"}),
        student_labels=labels(tmp_path / "s", **{name: {"option": "cat", "top": top} for name in "abc"}),
        switch=labels(tmp_path / "w", a={"p_teacher": 0.5, "oracle": 0.0}, b={"p_teacher": 0.4, "oracle": 1.0},
                      c={"bad": "no sound"}))


EXAMPLES = [Example(id=name, audio="x.wav", video=None, question="?", options=OPTIONS, answer=None) for name in "abc"]


@pytest.mark.parametrize("gate, left_out, expected", [
    ("always", ("student_labels", "switch"), "dog dog dog"),
    ("never", ("switch",), "cat cat cat"),
    ("learned", (), "dog cat cat"),
    ("oracle", (), "cat dog cat"),
    ("learned", ("student_labels",), "dog"),
    ("oracle", ("student_labels",), "dog"),
])
@pytest.mark.parametrize("teacher_loss", ["ce", "kl"])
def test_a_gate_decides_who_is_followed(given, gate, left_out, expected, teacher_loss):
    fields = {key: value for key, value in given.items() if key not in left_out}
    fields |= dict(teacher_labels=None) if gate == "never" else dict(teacher_loss=teacher_loss)
    items, counts = resolve_targets(Distill(**fields, gate=gate), EXAMPLES)
    assert " ".join(OPTIONS[item.target] for item in items) == expected
    assert [item.source for item in items] == [{"dog": "teacher", "cat": "student"}[word] for word in expected.split()]
    assert [item.teacher_topk is not None for item in items] == [
        teacher_loss == "kl" and item.source == "teacher" for item in items]
    assert sum(counts.values()) == 3 and counts.get("left out: switch open", 0) == 3 - len(items)


@pytest.mark.parametrize("change", [dict(temperature=1.0), dict(teacher_labels=None)])
def test_labels_without_logits_at_that_temperature_are_refused(given, tmp_path, change):
    fields = {**given, **change, "gate": "learned", "teacher_loss": "kl"}
    if fields["teacher_labels"] is None:
        fields["teacher_labels"] = labels(tmp_path / "plain", **{name: {"option": "dog"} for name in "abc"})
    with pytest.raises(ValueError, match="needs labels made with top_k, at that temperature"):
        resolve_targets(Distill(**fields), EXAMPLES)


def test_an_oracle_without_true_classes_is_refused(given, tmp_path):
    given["switch"] = labels(tmp_path / "w", **{name: {"p_teacher": 1.0} for name in "abc"})
    with pytest.raises(ValueError, match="no clip has the 'oracle' that gate 'oracle' goes by"):
        resolve_targets(Distill(**given, gate="oracle"), EXAMPLES)


# ---- end to end ----


def test_an_inverted_gate_changes_the_targets_and_the_loss(tmp_path):
    """Each clip's other label is learnt then: the losses differ, and as many clips follow the teacher as did not."""
    write_model(tmp_path / "ears", "audio")
    write_clips(tmp_path / "clips", count=6, answers=False)
    ids = [f"clip{i}" for i in range(6)]
    labels(tmp_path / "t", **{name: {"option": "dog"} for name in ids})
    labels(tmp_path / "s", **{name: {"option": "owl"} for name in ids})
    logs = []
    for side, decide in (("gate", lambda i: i in (0, 4)), ("inverted", lambda i: i not in (0, 4))):
        labels(tmp_path / "w", **{name: {"p_teacher": float(decide(i))} for i, name in enumerate(ids)})
        config = write_config(tmp_path / "config.py", f"""[
            Distill(name='student', model='{tmp_path}/ears', manifest='{tmp_path}/clips/manifest.jsonl', gate='learned',
                    teacher_labels='{tmp_path}/t', student_labels='{tmp_path}/s', switch='{tmp_path}/w', batch_size=3,
                    epochs=2)]""")
        assert main([str(config), f"run_dir={tmp_path / side}"]) == 0
        logs.append([json.loads(line) for line in (tmp_path / side / "student/log.jsonl").read_text().splitlines()])
    (start, *steps), (start_inverted, *inverted) = logs
    assert start["learns_from"] == {"teacher": 2, "student": 4} and start_inverted["learns_from"] == {
        "teacher": 4, "student": 2}
    assert len(steps) == 4 and all(a["to_teacher"] + b["to_teacher"] == 3 for a, b in zip(steps, inverted, strict=True))
    assert sum(line["to_teacher"] for line in steps) == 2 * 2
    assert all(abs(a["loss"] - b["loss"]) > 1e-3 for a, b in zip(steps, inverted, strict=True))


def test_a_vision_model_teaches_an_audio_model_by_its_logits(tmp_path):
    frames = "media='video', min_pixels=3136, max_pixels=3136"
    write_model(tmp_path / "ears", "audio")
    write_model(tmp_path / "eyes", "vision")
    write_clips(tmp_path / "clips", answers=False)
    manifest = f"{tmp_path}/clips/manifest.jsonl"
    config = write_config(tmp_path / "config.py", f"""[
        Label(name='taught', model='{tmp_path}/eyes', manifest='{manifest}', {frames}, top_k=20),
        Distill(name='student', model='{tmp_path}/ears', manifest='{manifest}', teacher_loss='kl',
                teacher_labels='@taught', batch_size=4, epochs=4, lr=1e-2)]""")
    assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 0
    log = [json.loads(line) for line in (tmp_path / "run/student/log.jsonl").read_text().splitlines()][1:]
    assert len(log) == 12 and log[-1]["kl"] < 0.5 * log[0]["kl"] and log[0]["kl"] == pytest.approx(log[0]["loss"])
    assert all(0 <= line[part] < 1 for line in log for part in ("teacher_dropped", "student_dropped"))
    assert all(line["to_teacher"] == 4 for line in log)
    stage = Distill(name="again", model=f"{tmp_path}/ears", manifest=manifest, teacher_loss="kl",
                    teacher_labels=f"{tmp_path}/run/taught/labels.jsonl", gate="always")
    eyes, ears = (Tokenizer.from_file(str(path)) for path in (tmp_path / "run/taught/tokenizer.json",
                                                              tmp_path / "ears/tokenizer.json"))
    common_vocab = Trainer(stage, num_items=1).common_vocab
    assert common_vocab == ears.token_to_id("<|im_end|>") + 1  # as many columns as both have would be more
    assert common_vocab < min(eyes.get_vocab_size(), ears.get_vocab_size())
