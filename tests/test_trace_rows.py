"""Chains of thought distilled by rows: what Traces stores of each token, how it is read, and SFT's KL to it."""
import json
from dataclasses import replace

import pytest
import torch
from mini import VISION, write_clips, write_config, write_model, write_tokenizer
from tiny import prompt, tiny_model, trainer_of

import minixmd
from minixmd import pack
from minixmd.config import SFT, Traces
from minixmd.config.field_checks import ConfigError
from minixmd.inputs.batch import Group, Prompt
from minixmd.inputs.examples import Example, read_manifest
from minixmd.inputs.media import MediaError
from minixmd.inputs.prompts import build_prompt
from minixmd.learning.rollout import Completion
from minixmd.learning.steps import append_trace, count
from minixmd.learning.targets import Item, resolve_targets
from minixmd.runner import main
from minixmd.runs.records import compact, read_jsonl, read_traces
from minixmd.stages import traces
from minixmd.train import Trainer

FRAMES = dict(min_pixels=3136, max_pixels=3136)
COMMON, SUPPRESSED = 80, torch.tensor([4, 33, 85])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_model(folder / "eyes", "vision")
    write_model(folder / "ears", "audio", seed=1)
    write_clips(folder / "clips", count=6)
    return folder


@pytest.fixture
def puppet(monkeypatch):
    """A model that says two thoughts of each clip, the first of them with " " before it, and a third without an end."""
    def write(model, questions, writing, **options):
        for example, _ in questions.prompts():
            i = int(example.id.removeprefix("clip"))
            own = []
            for sample in range(3):
                text = f"{' ' * (sample == 0)}<think>It is{' very' * (i + sample)}.</think><answer>A</answer>"
                ids = (*questions.processor.encode(text), questions.processor.end_id)
                own.append(Completion(text, ids, (0.0,) * len(ids), sample < 2))
            yield example, own

    monkeypatch.setattr(traces, "write", write)


def stage_of(world, **more):
    given = dict(name="traces", allow_outside=True, model=str(world / "eyes"), num_samples=3, top_k=5, temperature=0.7,
                 manifest=str(world / "clips" / "manifest.jsonl"), **FRAMES)
    return Traces(**given | more)


def run(stage, folder):
    folder.mkdir(exist_ok=True)
    traces.run(stage, folder, lambda line: None)
    return list(read_traces(folder / "traces.jsonl"))


# ---- what Traces stores ----


@pytest.mark.parametrize("batch_tokens", [8192, 200, 1])
def test_stored_rows_are_those_of_a_scoring_in_fp64_however_passes_are_cut(world, tmp_path, puppet, monkeypatch,
                                                                           batch_tokens):
    monkeypatch.setattr(traces, "BATCH_TOKENS", batch_tokens)
    found = run(stage_of(world), tmp_path / "run")
    samples = [(trace["id"], trace["sample"]) for trace in found]
    assert samples == [(f"clip{i // 2}", i % 2) for i in range(12)]
    model, processor = minixmd.load(world / "eyes")
    model.double()
    examples = {example.id: example for example in read_manifest(world / "clips" / "manifest.jsonl")}
    for trace in found:
        assert trace["ids"][-1] == processor.end_id and processor.decode(trace["ids"]).strip() == trace["text"]
        asked = build_prompt(processor, examples[trace["id"]], stage_of(world).prompt_format)
        ids_T = torch.tensor(trace["ids"])
        first = int(asked.positions_3N.max()) + 1
        position_3T = torch.arange(first, first + len(ids_T)).expand(3, -1)
        whole = Prompt(torch.cat([asked.ids_N, ids_T]), torch.cat([asked.positions_3N, position_3T], 1), asked.media)
        with torch.no_grad():
            hidden_ND = model(pack([whole]))
        logits_TV = hidden_ND[len(asked) - 1:-1] @ model.lm_head.weight.T / 0.7
        logits_TV[:, processor.suppressed_ids] = -torch.inf
        logp_TV = logits_TV.log_softmax(-1)
        id_TJ, logp_TJ = (torch.tensor(trace["top"][name]).double().view(-1, 5) for name in ("ids", "logprobs"))
        torch.testing.assert_close(logp_TJ, logp_TV.gather(1, id_TJ.long()), rtol=0, atol=1e-5)
        torch.testing.assert_close(logp_TJ, logp_TV.topk(5).values, rtol=0, atol=1e-5)


def test_samples_are_stored_as_without_rows_and_the_tokenizer_lies_beside(world, tmp_path, puppet):
    run(stage_of(world), tmp_path / "rows")
    run(stage_of(world, top_k=0), tmp_path / "plain")
    for name in ("samples", "labels"):
        assert (tmp_path / "rows" / f"{name}.jsonl").read_text() == (tmp_path / "plain" / f"{name}.jsonl").read_text()
    rows, plain = (read_jsonl(tmp_path / name / "traces.jsonl") for name in ("rows", "plain"))
    assert [{**trace, "ids": 0, "top": 0} for trace in plain] == [{**trace, "ids": 0, "top": 0} for trace in rows]
    assert (tmp_path / "rows/tokenizer.json").read_bytes() == (world / "eyes/tokenizer.json").read_bytes()
    assert not (tmp_path / "plain/tokenizer.json").exists()
    longest = max(len(line) for line in (tmp_path / "rows" / "traces.jsonl").read_text().split("\n"))
    tokens = max(len(trace["ids"]) for trace in rows)
    assert longest < 25 * 5 * tokens  # bytes of a row's entries


# ---- how it is read ----


def line_of(ids=(7, 8), width=2, **top):
    size = width * len(ids)
    return {"id": "a", "text": "hm", "ids": list(ids), "top": {"ids": [3] * size, "logprobs": [-1.5] * size} | top}


@pytest.mark.parametrize("second, says", [
    (line_of(ids=[7, -1]), "'a' must hold ids from 0 to 2\\*\\*31 - 1, and logprobs up to 0"),
    (line_of(ids=[7, 2**31]), "must hold ids from 0"),
    (line_of() | {"top": {"ids": [3, 3, 3, -1], "logprobs": [-1.5] * 4}}, "must hold ids from 0"),
    (line_of(logprobs=[-1.5, 0.1, -1.5, -1.5]), "logprobs up to 0"),
    (line_of(logprobs=[-1.5] * 3), "1 to 64 ids and logprobs for each of its 2 'ids', as in other lines, got 4 and 3"),
    (line_of(width=3), "for each of its 2 'ids', as in other lines, got 6 and 6"),
    (line_of(width=0), "got 0 and 0"),
    (line_of(ids=()), "for each of its 0 'ids', as in other lines, got 0 and 0"),
    ({k: v for k, v in line_of().items() if k != "ids"}, "for each of its 0 'ids', as in other lines, got 4 and 4"),
    (line_of(logprobs=[-1.5, None, -1.5, -1.5]), "t.jsonl:2: field 'top' needs 'logprobs', a list of float"),
    (line_of() | {"ids": ["a", "b"]}, "t.jsonl:2: needs 'ids', a list of int"),
    (line_of() | {"top": None}, "t.jsonl:2: needs 'top', an object of ids, logprobs"),
    ({"id": "a", "text": "hm"}, "trace 2 has no 'top', which teacher_loss 'kl' needs: make traces with top_k"),
])
def test_a_line_with_wrong_rows_is_one_line_of_error(tmp_path, second, says):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(line_of()) + "\n" + json.dumps(second) + "\n")
    stage = SFT(name="s", model="m", manifest="m", traces=str(path), teacher_loss="kl")
    with pytest.raises(ValueError, match=says) as error:
        resolve_targets(stage, [Example("a", "a.wav", None, "?", ("dog", "cat"))])
    assert "\n" not in str(error.value)


def test_the_first_line_alone_may_not_be_too_wide(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(line_of(width=65)) + "\n")
    with pytest.raises(ValueError, match="must hold 1 to 64 ids"):
        list(read_traces(path))


def test_rows_are_passed_over_by_those_who_do_not_use_them(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(line_of()) + "\n" + json.dumps({"id": "a", "text": "so"}) + "\n")
    example = Example("a", "a.wav", None, "?", ("dog", "cat"))
    items, _ = resolve_targets(SFT(name="s", model="m", manifest="m", traces=str(path)), [example])
    assert items == [Item(example, "hm", "trace"), Item(example, "so", "trace")]


@pytest.mark.parametrize("make, says", [
    (lambda: SFT(name="s", model="m", manifest="m", teacher_loss="kl"), "sft without traces does not use teacher_loss"),
    (lambda: Traces(name="t", endpoint="http://x", served="m", manifest="m", top_k=4), "endpoint does not use top_k"),
    (lambda: Traces(name="t", model="m", manifest="m", top_k=65), "top_k must be <= 64"),
])
def test_a_config_that_cannot_be_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


# ---- the loss ----


def problem(micro_batch_tokens=8192, backwards=False):
    """A Trainer, and five prompts with a trace of 2 to 6 tokens and rows of 6 of 97 ids behind each."""
    samples = []
    generator = torch.Generator().manual_seed(1)
    for i in range(5):
        ids = torch.randint(0, COMMON, (2 + i,), generator=generator).tolist()
        best = (3 * torch.randn(2 + i, 97, generator=generator)).log_softmax(-1).topk(6)
        topk = {"ids": best.indices.flatten().tolist(), "logprobs": best.values.flatten().tolist()}
        topk = compact({"top": topk})["top"]
        item = Item(Example("a", "x", None, "?", ("dog", "cat")), "text", "trace", topk, ids)
        samples.append((Group(prompt([3 + i], seed=i), (torch.tensor(ids),)), item))
    stage = SFT(name="s", model="m", manifest="d", traces="t", trainable="full", device="cpu", batch_size=10,
                micro_batch_tokens=micro_batch_tokens)
    trainer = trainer_of(stage, tiny_model("audio"))
    trainer.stage = replace(stage, teacher_loss="kl")  # only now: it would read the teacher's tokenizer
    trainer.common_vocab, trainer.suppressed_Z, trainer.suppressed_ids = COMMON, SUPPRESSED, SUPPRESSED
    return trainer, samples[::-1] if backwards else samples


def plain(model, samples):
    """The loss by its definition, a token at a time, of each prompt and trace as one sequence."""
    kept = torch.ones(97, dtype=torch.bool)
    kept[COMMON:] = False
    kept[SUPPRESSED] = False
    loss, tokens = 0, sum(len(item.ids) for _, item in samples)
    for group, item in samples:
        ids_T = torch.tensor(item.ids)
        start = len(group.prompt)
        position_3N = torch.arange(start + len(ids_T)).expand(3, -1)
        logits_NV = model.logits(model(pack([Prompt(torch.cat([group.prompt.ids_N, ids_T]), position_3N)])))
        for t in range(len(ids_T)):
            p_V = logits_NV[start + t - 1].masked_fill(~kept, -torch.inf).softmax(-1)
            q, others = {}, p_V.sum()
            for j in range(6 * t, 6 * t + 6):
                v = item.teacher_topk["ids"][j]
                if kept[v]:
                    q[v] = torch.tensor(item.teacher_topk["logprobs"][j]).exp()
                    others = others - p_V[v]
            tail = 1 - torch.tensor(item.teacher_topk["logprobs"][6 * t:6 * t + 6]).exp().sum()
            mass = sum(q.values()) + tail
            for v, share in q.items():
                loss = loss + share / mass * (share / mass / p_V[v]).log() / tokens
            loss = loss + tail / mass * (tail / mass / others).log() / tokens
    return loss


def gradients(trainer):
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("tokens", [1, 20, 8192])
def test_the_loss_and_its_gradients_are_as_defined_however_the_step_is_cut(tokens, backwards):
    trainer, samples = problem(tokens, backwards)
    micro_batches = trainer.micro_batches(samples)
    assert len(micro_batches) == {1: 5, 20: 3, 8192: 1}[tokens]
    metrics = trainer.sft_gradients(micro_batches, count(micro_batches))
    ours = gradients(trainer)
    truth = plain(trainer.model, samples)
    truth.backward()
    theirs = gradients(trainer)
    assert metrics["loss"].item() == pytest.approx(truth.item(), rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(truth.item(), rel=1e-5)
    assert 0 < metrics["teacher_dropped"] < 1 and 0 < metrics["student_dropped"] < 1
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())


def test_a_row_of_which_the_student_knows_nothing_is_no_nan():
    trainer, samples = problem()
    group, item = samples[0]
    topk = {"ids": [COMMON] * 2, "logprobs": [0.0] * 2}  # one id a token, which has all the mass
    samples[0] = group, replace(item, teacher_topk=topk)
    micro_batches = trainer.micro_batches(samples[:1])
    metrics = trainer.sft_gradients(micro_batches, count(micro_batches))
    assert metrics["loss"].isfinite() and metrics["teacher_dropped"] == 1
    assert all(grad.isfinite().all() for grad in gradients(trainer).values())


# ---- end to end ----


def test_traces_are_made_checked_and_learnt_by_rows(world, tmp_path, puppet):
    manifest = f"{world}/clips/manifest.jsonl"
    config = write_config(tmp_path / "config.py", f"""[
        Traces(name='traces', model='{world}/eyes', manifest='{manifest}', top_k=9, num_samples=3, min_pixels=3136,
               max_pixels=3136),
        FactCheck(name='checked', traces='@traces', manifest='{manifest}', model='{world}/ears', threshold=-1e9,
                  trace_filter='all'),
        SFT(name='sft', model='{world}/ears', manifest='{manifest}', traces='@checked', teacher_loss='kl',
            max_new_tokens=512, batch_size=4, epochs=4, lr=1e-2)]""")
    assert main([str(config), "--dry-run", f"run_dir={tmp_path / 'run'}"]) == 0
    assert main([str(config), f"run_dir={tmp_path / 'run'}"]) == 0
    made, checked = (read_jsonl(tmp_path / "run" / name / "traces.jsonl") for name in ("traces", "checked"))
    assert len(made) == 12 and all(len(trace["top"]["ids"]) == 9 * len(trace["ids"]) for trace in made)
    for trace in checked:
        del trace["score"]
    assert checked == made
    assert (tmp_path / "run/checked/tokenizer.json").read_bytes() == (world / "eyes/tokenizer.json").read_bytes()
    start, *log = read_jsonl(tmp_path / "run/sft/log.jsonl")
    assert start["learns_from"] == {"traces": 12} and len(log) == 12
    assert log[-1]["kl"] < 0.5 * log[0]["kl"]
    for line in log:
        assert line["kl"] == pytest.approx(line["loss"])
        assert all(0 <= line[name] < 1 for name in ("teacher_dropped", "student_dropped"))


def test_a_trace_with_a_token_of_another_vocabulary_is_a_bad_clip(world, tmp_path):
    stage = SFT(name="s", model=f"{world}/ears", manifest="m", traces=str(tmp_path / "t.jsonl"), teacher_loss="kl")
    with pytest.raises(ValueError, match="tokenizer.json: no such file; it says what the ids"):
        Trainer(stage, num_items=1)
    write_tokenizer(tmp_path, VISION)
    trainer = Trainer(stage, num_items=1)
    example = read_manifest(world / "clips" / "manifest.jsonl")[0]
    end, audio = trainer.processor.end_id, trainer.processor.tokenizer.token_to_id("<|AUDIO|>")
    group, _ = trainer.build_sample(Item(example, "text", "trace", {}, [5, end]), minixmd.inputs.clips.load_clip)
    assert group.completions[0].tolist() == [5, end] and audio == end + 1 == trainer.common_vocab
    asked = build_prompt(trainer.processor, example, stage.prompt_format)
    assert torch.equal(group.prompt.ids_N, asked.ids_N)  # without the text
    for ids in ([5, audio, end], [5, end - 1, end]):  # not common; a special one
        with pytest.raises(MediaError, match="other ids"):
            trainer.build_sample(Item(example, "text", "trace", {}, ids), minixmd.inputs.clips.load_clip)
    asked = prompt([3], seed=1)
    assert append_trace(asked, Item(example, "text", "trace", {}, [79]), COMMON, SUPPRESSED).prompt is asked
    for token in (COMMON, 33):
        with pytest.raises(MediaError, match="other ids"):
            append_trace(asked, Item(example, "text", "trace", {}, [token]), COMMON, SUPPRESSED)
