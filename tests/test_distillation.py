"""Train's distillation: which clip learns what, and the loss of every teacher_loss against plain PyTorch."""
import json
from types import SimpleNamespace

import pytest
import torch
from mini import AUDIO, VISION, write_clips, write_config, write_model, write_tokenizer
from tiny import prompt, tiny_model
from tokenizers import Tokenizer

from minixmd import pack
from minixmd.config import Train
from minixmd.inputs.examples import Example
from minixmd.inputs.tokenizer import common_vocab_size
from minixmd.kernels import distill, distill_topk
from minixmd.learning.targets import sources
from minixmd.train import accumulate, build, main, stored_rows

SHARED, BANNED = 80, torch.tensor([4, 33, 85])


def kept(logits):
    """log-softmax over the common_vocab ids that are not suppressed; -inf elsewhere."""
    ids = [v for v in range(SHARED) if v not in BANNED.tolist()]
    return torch.full_like(logits, -torch.inf).index_copy(-1, torch.tensor(ids), logits[..., ids].log_softmax(-1))


def top_of(logits_V, k, temperature, suppressed_ids=()):
    """What stage Label stores of a row of the teacher's logits."""
    logits_V = logits_V.index_fill(0, torch.tensor(suppressed_ids, dtype=torch.long), -torch.inf)
    best = logits_V.topk(k)
    return {"ids": best.indices.tolist(), "logits": best.values.tolist(), "temperature": temperature,
            "logsumexp": (logits_V / temperature).logsumexp(0).item()}  # fmt: skip


# ---- what the teacher stored ----


def test_all_ids_stored_give_the_whole_distribution_over_the_shared_ones():
    logits_V = 3 * torch.randn(100)
    [id_J], [logq_J], [tail], [dropped] = stored_rows([top_of(logits_V, 100, 2.0)], SHARED, BANNED)
    truth_V = kept(logits_V / 2)
    inside = id_J >= 0
    assert sorted(id_J[inside].tolist()) == [v for v in range(SHARED) if v not in BANNED.tolist()]
    torch.testing.assert_close(logq_J[inside], truth_V[id_J[inside].long()])
    outside = (logits_V / 2).softmax(-1)[[*range(SHARED, 100), 4, 33]].sum()
    assert dropped.item() == pytest.approx(outside.item(), rel=1e-5) and abs(tail.item()) < 1e-5


def test_few_ids_stored_leave_the_rest_in_the_tail_and_bound_the_full_kl_from_below():
    for seed in range(20):
        torch.manual_seed(seed)
        teacher_V, student_V = 4 * torch.randn(80), 4 * torch.randn(80)
        teacher_V[[4, 33]] = -torch.inf
        rows = stored_rows([top_of(teacher_V, 20, 2.0)], SHARED, BANNED)
        assert rows[1].exp().sum() + rows[2] == pytest.approx(1, abs=1e-5)
        stored = distill_topk.distill_topk(student_V[None], *rows[:3], SHARED, BANNED, 2.0, "torch")[0]
        full = distill.distill_kl(student_V[None], teacher_V[None], SHARED, BANNED, 2.0, "torch")[0]
        assert 0.5 * full < stored <= full * (1 + 1e-5)


def test_shared_ids_end_where_the_tables_first_differ(tmp_path):
    audio = write_tokenizer(tmp_path / "a", AUDIO)
    vision = write_tokenizer(tmp_path / "b", VISION)
    count = common_vocab_size(audio, vision)
    assert count == audio.token_to_id("<|im_end|>") + 1 == audio.token_to_id("<|AUDIO|>") < audio.get_vocab_size()
    assert common_vocab_size(audio, audio) == audio.get_vocab_size()


# ---- the loss ----


def problem():
    """Five prompts of two targets; the teacher has stored rows for the second, fourth and fifth."""
    prompts = [prompt([3 + i], seed=i, targets=2) for i in range(5)]
    torch.manual_seed(1)
    tops = [top_of(3 * torch.randn(97), 6, 2.0, suppressed_ids=[4]) if i in (1, 3, 4) else None for i in range(5)]
    return tiny_model("audio"), prompts, tops


def plain(model, prompts, tops, teacher_loss):
    """The loss by its definition, a clip at a time, from all logits."""
    total, loss = sum(int(p.target_N.sum()) for p in prompts), 0
    for p, top in zip(prompts, tops, strict=True):
        batch = pack([p])
        logp_TV = model.logits(model(batch)[batch.target_row_T]).log_softmax(-1)
        nll_T = -logp_TV.gather(1, batch.target_id_T[:, None]).squeeze(1)
        if top is None or teacher_loss == "kl+ce":
            loss = loss + nll_T.sum() / total
        if top is not None:
            p_V = kept(model.logits(model(batch)[batch.target_row_T[:1]])[0] / 2).exp()
            at = [i for i, v in enumerate(top["ids"]) if v < SHARED and v not in BANNED.tolist()]
            ids = torch.tensor([top["ids"][i] for i in at])
            all_J = (torch.tensor(top["logits"]) / 2 - top["logsumexp"]).exp()
            q_J, rest = all_J[at] / (all_J[at].sum() + 1 - all_J.sum()), (1 - all_J.sum())
            tail = rest / (all_J[at].sum() + rest)
            kl = (q_J * (q_J / p_V[ids]).log()).sum() + tail * (tail / (p_V.sum() - p_V[ids].sum())).log()
            loss = loss + 4 * kl / len(prompts)
    return loss


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("teacher_loss", ["kl", "kl+ce"])
def test_the_loss_and_its_gradients_are_as_defined_however_the_step_is_cut(teacher_loss, size):
    model, prompts, tops = problem()
    run = SimpleNamespace(model=model, backend="torch", common_vocab=SHARED, suppressed_Z=BANNED)
    parts = accumulate(run, SimpleNamespace(micro_batch_size=size, teacher_loss=teacher_loss, temperature=2.0), prompts,
                       tops)
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    truth = plain(model, prompts, tops, teacher_loss)
    truth.backward()
    assert parts["loss"] == pytest.approx(truth.item(), rel=1e-5) and parts["kl"] > 0
    assert 0 < parts["teacher_dropped"] < 1 and 0 < parts["student_dropped"] < 1
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())


def test_a_step_of_stored_rows_alone_trains_without_cross_entropy():
    model, prompts, tops = problem()
    run = SimpleNamespace(model=model, backend="torch", common_vocab=SHARED, suppressed_Z=BANNED)
    stage = SimpleNamespace(micro_batch_size=5, teacher_loss="kl", temperature=2.0)
    parts = accumulate(run, stage, [prompts[1], prompts[3]], [tops[1], tops[3]])
    assert parts["loss"] == pytest.approx(parts["kl"])


# ---- which clip learns what ----

OPTIONS = ("dog", "cat")


def labels(path, **answers):
    path.write_text("".join(json.dumps({"id": name, **answer}) + "\n" for name, answer in answers.items()))
    return str(path)


@pytest.fixture
def told(tmp_path):
    """Three clips. The teacher says dog, dog, dog, the student cat, cat, cat; both stored their logits, as in XMD."""
    top = {"ids": [1], "logits": [0.0], "logsumexp": 0.0, "temperature": 2.0}
    return dict(
        name="s", objective="distill", model="m", manifest="d",
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
def test_a_gate_decides_who_is_followed(told, gate, left_out, expected, teacher_loss):
    given = {key: value for key, value in told.items() if key not in left_out}
    given |= dict(teacher_labels=None) if gate == "never" else dict(teacher_loss=teacher_loss)
    chosen, counts = sources(Train(**given, gate=gate), EXAMPLES)
    assert " ".join(OPTIONS[answer] for _, answer, _ in chosen) == expected
    assert [top is not None for _, _, top in chosen] == [teacher_loss == "kl" and OPTIONS[answer] == "dog"
                                                         for _, answer, _ in chosen]
    assert sum(counts.values()) == 3 and counts.get("left out: switch open", 0) == 3 - len(chosen)


@pytest.mark.parametrize("given", [dict(temperature=1.0), dict(teacher_labels=None)])
def test_labels_without_logits_at_that_temperature_are_refused(told, tmp_path, given):
    fields = {**told, **given, "gate": "learned", "teacher_loss": "kl"}
    if fields["teacher_labels"] is None:
        fields["teacher_labels"] = labels(tmp_path / "plain", **{name: {"option": "dog"} for name in "abc"})
    with pytest.raises(ValueError, match="needs labels made with top_k, at that temperature"):
        sources(Train(**fields), EXAMPLES)


def test_an_oracle_that_could_not_be_told_is_refused(told, tmp_path):
    told["switch"] = labels(tmp_path / "w", **{name: {"p_teacher": 1.0} for name in "abc"})
    with pytest.raises(ValueError, match="no clip has the 'oracle' that gate 'oracle' goes by"):
        sources(Train(**told, gate="oracle"), EXAMPLES)


# ---- end to end ----


def test_a_vision_model_teaches_an_audio_model_by_its_logits(tmp_path):
    frames = "media='video', min_pixels=3136, max_pixels=3136"
    write_model(tmp_path / "ears", "audio")
    write_model(tmp_path / "eyes", "vision")
    write_clips(tmp_path / "clips", answers=False)
    manifest = f"{tmp_path}/clips/manifest.jsonl"
    config = write_config(tmp_path / "config.py", f"""[
        Label(name='taught', model='{tmp_path}/eyes', manifest='{manifest}', {frames}, top_k=20),
        Train(name='student', objective='distill', model='{tmp_path}/ears', manifest='{manifest}', teacher_loss='kl',
              teacher_labels='@taught', batch_size=4, micro_batch_size=2, epochs=4, lr=1e-2)]""")
    assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 0
    log = [json.loads(line) for line in (tmp_path / "run/student/log.jsonl").read_text().splitlines()][1:]
    assert len(log) == 12 and log[-1]["kl"] < 0.5 * log[0]["kl"] and log[0]["kl"] == pytest.approx(log[0]["loss"])
    assert all(0 <= line[part] < 1 for line in log for part in ("teacher_dropped", "student_dropped"))
    stage = Train(name="again", objective="distill", model=f"{tmp_path}/ears", manifest=manifest, teacher_loss="kl",
                  teacher_labels=f"{tmp_path}/run/taught/labels.jsonl", gate="always")
    eyes, ears = (Tokenizer.from_file(str(path)) for path in (tmp_path / "run/taught/tokenizer.json",
                                                              tmp_path / "ears/tokenizer.json"))
    run, _ = build(stage, [None])
    assert run.common_vocab == ears.token_to_id("<|im_end|>") + 1  # as many columns as both have would be more
    assert run.common_vocab < min(eyes.get_vocab_size(), ears.get_vocab_size())
