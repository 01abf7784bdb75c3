"""Stage FactCheck: which traces are judged, what a verdict is, the thresholds, and the small trained verifier."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini import CLASSES, OMNI, write_clips, write_model, write_tokenizer
from tiny import TOKENS, published_config, randomise
from torch.utils.flop_counter import FlopCounterMode

import minixmd
from minixmd.config import CHECK_PROMPT, FactCheck
from minixmd.inputs.batch import Group, Media, Prompt, pack
from minixmd.inputs.clips import load_clip
from minixmd.inputs.examples import read_manifest
from minixmd.inputs.positions import positions_of
from minixmd.models.families import read_config
from minixmd.models.multimodal import MultimodalLM
from minixmd.models.weights import save_model
from minixmd.models.whisper import Whisper
from minixmd.runs.records import read_jsonl
from minixmd.stages import factcheck
from minixmd.stages import verifier as verifiers
from minixmd.stages.cnn14_training import load_logmel
from minixmd.tasks.answers import thoughts
from minixmd.tasks.yes_no import agreement, auc

PROMPT = "{trace}\nIs that true?"
THRESHOLD = -0.2335  # about half of the untrained model's scores are above it


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An audio model, clips, and three traces of each, the second of which names another class."""
    folder = tmp_path_factory.mktemp("factcheck")
    write_model(folder / "ears", "audio")
    write_clips(folder / "clips", count=48)
    write_traces(folder / "traces.jsonl")
    return folder


def write_traces(path, clips=48):
    lines = []
    for i in range(clips):
        for sample in range(3):
            name = CLASSES[(i + (sample == 1) * (1 + i // 3 % 2)) % 3]
            lines.append({"id": f"clip{i}", "sample": sample, "answer": i % 3, "option": CLASSES[i % 3],
                          "text": f"<think>I hear {name}.</think><answer>A</answer>", "unanimous": i % 4 != 0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def stage_of(world, **more):
    given = dict(name="check", allow_outside=True, traces=str(world / "traces.jsonl"),
                 manifest=str(world / "clips" / "manifest.jsonl"),
                 model=str(world / "ears"), prompt=PROMPT, threshold=THRESHOLD)
    return FactCheck(**given | more)


def run(stage, folder):
    folder.mkdir(exist_ok=True)
    factcheck.run(stage, folder, lambda line: None)
    return {name: read_jsonl(folder / f"{name}.jsonl") for name in ("verdicts", "traces")} | {
        "results": json.loads((folder / "results.json").read_text())}


def keys(records):
    return [(record["id"], record["sample"]) for record in records]


@pytest.fixture(scope="module")
def judged(world, tmp_path_factory):
    return run(stage_of(world, trace_filter="all"), tmp_path_factory.mktemp("judged") / "check")


def test_a_score_is_the_log_odds_of_yes_where_the_answer_starts(world, judged):
    """Each trace alone, through the plain forward pass, and the tokens looked up by hand."""
    model, processor = minixmd.load(world / "ears")
    assert [processor.encode(word)[0] for word in (" yes", " no")] == processor.encode(" ") * 2  # which tells nothing
    yes, no = (sorted({processor.encode(word)[0] for word in words}) for words in (("yes", "Yes"), ("no", "No")))
    examples = {e.id: e for e in read_manifest(world / "clips" / "manifest.jsonl")}
    traces = read_jsonl(world / "traces.jsonl")
    assert keys(judged["verdicts"]) == keys(traces)
    for trace, verdict in list(zip(traces, judged["verdicts"], strict=True))[::13]:
        prompt = processor([{"role": "user", "content": [
            {"type": "audio", "audio": examples[trace["id"]].audio},
            {"type": "text", "text": trace["text"].split("<answer>")[0][len("<think>"):-len("</think>")]
             + "\nIs that true?"}]}])
        with torch.no_grad():
            p_V = model.logits(model(pack([prompt]))[-1:])[0].softmax(-1)
        assert verdict["score"] == pytest.approx((p_V[yes].sum() / p_V[no].sum()).log().item(), abs=2e-4)
        assert verdict["accepted"] == (verdict["score"] > THRESHOLD)
    assert len({verdict["score"] for verdict in judged["verdicts"]}) > 90


def test_a_trace_and_its_clip_both_matter(judged):
    by_key = {(v["id"], v["sample"]): v["score"] for v in judged["verdicts"]}
    assert all(by_key[f"clip{i}", 0] == by_key[f"clip{i}", 2] for i in range(48))  # the same words
    assert all(by_key[f"clip{i}", 0] != by_key[f"clip{i}", 1] for i in range(48))  # another name
    assert by_key["clip0", 0] != by_key["clip3", 0]  # the same name, other noise


def test_the_answer_is_not_judged(world, judged, tmp_path):
    """It may give a false thought away, which would need no ears."""
    lines = [line | {"text": line["text"].replace(">A<", f">{line['option']}<")}
             for line in read_jsonl(world / "traces.jsonl")]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = run(stage_of(world, traces=str(tmp_path / "other.jsonl"), trace_filter="all"), tmp_path / "run")
    assert found["verdicts"] == judged["verdicts"]


def test_accepted_traces_stand_as_they_were_with_their_score(world, judged):
    traces = {(t["id"], t["sample"]): t for t in read_jsonl(world / "traces.jsonl")}
    scores = {(v["id"], v["sample"]): v["score"] for v in judged["verdicts"] if v["accepted"]}
    assert 0 < len(scores) < 144 and keys(judged["traces"]) == [key for key in traces if key in scores]
    assert all(trace == traces[trace["id"], trace["sample"]] | {"score": scores[trace["id"], trace["sample"]]}
               for trace in judged["traces"])
    results = judged["results"]
    first = [key for key in scores if key[1] == 0]
    assert (results["traces"], results["accepted"], results["rejected"]) == (144, len(scores), 144 - len(scores))
    assert results["first"] == {"judged": 48, "accepted": len(first)}
    assert results["unanimous"]["judged"] == 108
    assert results["clips"] == 48 and results["clips_with_accepted"] == len({name for name, _ in scores})


def test_a_verdict_depends_on_no_other_trace(world, judged, tmp_path):
    scores = {(v["id"], v["sample"]): v["score"] for v in judged["verdicts"]}
    lines = read_jsonl(world / "traces.jsonl")[::-5]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = stage_of(world, traces=str(tmp_path / "some.jsonl"), trace_filter="all", batch_tokens=60)
    found = run(stage, tmp_path / "run")
    assert keys(found["verdicts"]) == keys(lines)
    assert all(v["score"] == pytest.approx(scores[v["id"], v["sample"]], abs=2e-4) for v in found["verdicts"])


def test_a_clip_is_read_once_and_the_tower_hears_it_once(world, tmp_path, monkeypatch):
    read, heard, real = [], [], Whisper.forward
    monkeypatch.setattr(Whisper, "forward", lambda self, media: heard.append(len(media)) or real(self, media))

    def counted(path, *arguments):
        read.append(path)
        return load_clip(path, *arguments)

    monkeypatch.setattr(factcheck, "prefetch", lambda build, runs, lose, reading: [build(run, counted) for run in runs])
    run(stage_of(world, trace_filter="all"), tmp_path / "run")
    assert sum(heard) == 48 and len(read) == 48 == len(set(read))


# ---- a clip's traces behind one prompt ----


@pytest.fixture(scope="module", params=["qwen2_audio", "qwen2_5_omni"])
def hearing(request, world, tmp_path_factory):
    """A folder with the clips, a tiny model of a family, and one to five different traces of each of nine clips."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "clips").symlink_to(world / "clips")
    if request.param == "qwen2_audio":
        write_model(folder / "ears", "audio")
    else:
        tokenizer, raw = write_tokenizer(folder / "ears", OMNI), published_config("omni", vocab=340)
        part = raw["thinker_config"]
        for field, token in TOKENS[request.param].items():
            if field in part:
                part[field] = tokenizer.token_to_id(token)
        save_model(randomise(MultimodalLM(read_config(raw))), folder / "ears", folder / "ears")
    lines = []
    for i in range(9):
        for sample in range(1 + i % 5):
            text = " ".join(CLASSES[(i + sample * k) % 3] for k in range(1 + (3 * i + 5 * sample) % 11))
            lines.append({"id": f"clip{i}", "sample": sample, "text": f"<think>I hear {text}.</think>"})
    lines[4]["text"] = lines[3]["text"]  # the same words
    lines[8]["text"] = lines[7]["text"].replace(".</", ". And more</")  # one goes on where the other ends
    (folder / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def one_by_one(pairs, batch_tokens):
    """In share_prefix's place: every trace's whole prompt."""
    return [([trace], replace(prompt, media=pairs[0][1].media)) for trace, prompt in pairs]


@pytest.mark.parametrize("batch_tokens", [8192, 640, 1])
def test_scores_are_those_of_whole_prompts_however_a_clips_traces_are_cut(hearing, tmp_path, monkeypatch, batch_tokens):
    batches, real = [], factcheck.next_token_logits

    def spy(model, items):
        logits_BV = real(model, items)
        batches.append((items, logits_BV))
        return logits_BV

    monkeypatch.setattr(factcheck, "next_token_logits", spy)
    stage = stage_of(hearing, trace_filter="all", threshold=-1e6, prompt=CHECK_PROMPT, batch_tokens=batch_tokens)
    found = run(stage, tmp_path / "shared")
    groups = []
    for items, _ in batches:
        groups += [item for item in items if isinstance(item, Group)]
    for items, logits_BV in batches:
        assert len(logits_BV) == 1 or sum(map(len, items)) <= batch_tokens
    sizes = {8192: {2, 3, 4, 5}, 640: {1, 2, 3}, 1: {1}}[batch_tokens]
    assert {len(group.completions) for group in groups} == sizes
    found_BV = torch.cat([logits_BV for _, logits_BV in batches])
    batches.clear()
    monkeypatch.setattr(factcheck, "share_prefix", one_by_one)
    whole = run(stage, tmp_path / "whole")
    assert len(found["verdicts"]) == 25 and keys(found["verdicts"]) == keys(whole["verdicts"])
    wanted_BV = torch.cat([logits_BV for _, logits_BV in batches])
    torch.testing.assert_close(found_BV, wanted_BV, rtol=0, atol=1e-5 * wanted_BV.abs().max().item())
    for ours, theirs in zip(found["verdicts"], whole["verdicts"], strict=True):
        assert ours.keys() == theirs.keys() and ours["score"] == pytest.approx(theirs["score"], abs=2e-5)  # rounded


def test_ids_and_positions_of_a_group_are_those_of_the_whole_prompts(hearing):
    processor = minixmd.load(hearing / "ears")[1]
    example = read_manifest(hearing / "clips" / "manifest.jsonl")[0]
    pairs = []
    for i, line in enumerate(read_jsonl(hearing / "traces.jsonl")):
        pairs.append((i, processor(factcheck.conversation(CHECK_PROMPT, example, line["text"]))))
    longest = max(len(prompt) for _, prompt in pairs)
    found = []
    for numbers, group in factcheck.share_prefix(pairs, longest + 100):
        batch = pack([group])
        parent, *children = batch.segments
        assert len(group) == len(batch.ids_N) <= longest + 100
        assert torch.equal(batch.media[0].rows_P, pairs[0][1].media[0].rows_P)
        for number, child in zip(numbers, children, strict=True):
            whole = pairs[number][1]
            rows = [*range(parent.length), *range(child.start, child.start + child.length)]
            assert torch.equal(batch.ids_N[rows], whole.ids_N)
            assert torch.equal(batch.positions_3N[:, rows], whole.positions_3N)
            found.append(number)
    assert found == list(range(25))
    alike = [(i, pairs[3][1]) for i in range(2)]
    [(_, group)] = factcheck.share_prefix(alike, 8192)
    assert [len(rest_T) for rest_T in group.completions] == [1, 1]


def test_eight_traces_of_a_clip_take_less_than_half_the_operations():
    """At the 7B's sizes: 30 s of sound, a question of 60 tokens, traces of 200, and what stands after them."""
    raw = json.loads((Path(__file__).parent / "configs" / "Qwen2-Audio-7B-Instruct.json").read_text())
    with torch.device("meta"):
        model = MultimodalLM(read_config(raw)).to("meta")
    clip = Media("audio", torch.empty(128, 3000), 10 + torch.arange(750), frames=3000)
    pairs = []
    for i in range(8):
        ids_N = torch.cat([torch.zeros(820, dtype=torch.int64), torch.full((196 + i,), i), torch.zeros(45).long()])
        pairs.append((i, Prompt(ids_N, positions_of(len(ids_N), []), (clip,))))

    def operations(share):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pairs[0] = 0, model.encode_media(pairs[0][1])
            for _, item in share(pairs, 8192):
                model.logits(model(pack([item]).to("meta"))[-8:])
        return counter.get_total_flops()

    before = operations(one_by_one)
    pairs[0] = 0, replace(pairs[0][1], media=(clip,))
    after = operations(factcheck.share_prefix)
    print(f"{before / 1e12:.1f} and {after / 1e12:.1f} TFLOP")
    assert 2.5 * after < before


def test_which_traces_are_judged(world, tmp_path):
    traces = read_jsonl(world / "traces.jsonl")
    used = run(stage_of(world), tmp_path / "used")
    assert keys(used["verdicts"]) == [key for key, t in zip(keys(traces), traces, strict=True)
                                      if t["sample"] == 0 or t["unanimous"]]
    some = run(stage_of(world, trace_filter="calibration", limit=10), tmp_path / "some")
    assert len(some["verdicts"]) == 10 == len({v["id"] for v in some["verdicts"]})
    assert set(keys(some["verdicts"])) <= set(keys(used["verdicts"]))
    more = run(stage_of(world, trace_filter="calibration", limit=40), tmp_path / "more")
    assert set(keys(some["verdicts"])) < set(keys(more["verdicts"])) and len({v["id"] for v in more["verdicts"]}) == 40
    other = run(stage_of(world, trace_filter="calibration", limit=10, seed=1), tmp_path / "other")
    assert set(keys(other["verdicts"])) != set(keys(some["verdicts"]))


def test_a_threshold_is_moved_without_asking_again(world, judged, tmp_path, monkeypatch):
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(v) + "\n" for v in judged["verdicts"]))
    monkeypatch.setattr(factcheck, "model_of", None)  # nobody is asked
    scores = sorted(v["score"] for v in judged["verdicts"])
    stage = stage_of(world, trace_filter="all", model=None, checker="verdicts", threshold=scores[100],
                     verdicts=str(tmp_path / "verdicts.jsonl"))
    found = run(stage, tmp_path / "run")
    assert len(found["traces"]) == sum(score > scores[100] for score in scores)
    assert [v["score"] for v in found["verdicts"]] == [v["score"] for v in judged["verdicts"]]
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(v) + "\n" for v in judged["verdicts"][1:]))
    with pytest.raises(ValueError, match="no verdict on sample 0 of 'clip0'"):
        run(stage, tmp_path / "other")


@pytest.mark.parametrize("checker", ["verdicts", "verifier"])
@pytest.mark.parametrize("change, says", [
    (dict(sample=None), "needs 'sample'"),
    (dict(sample=[1]), r"needs 'sample', an int, got \[1\]"),
    (dict(id=7), "needs 'id', a str, got 7"),
    (dict(score=None), "needs 'score'"),
    (dict(score="yes"), "needs 'score', a float, got 'yes'"),
    (dict(bad="missing"), "needs 'detail'"),
    (7, "must be a JSON object, got int"),
    ([], "must be a JSON object, got list"),
])
def test_what_is_no_verdict_is_one_line(world, judged, tmp_path, monkeypatch, checker, change, says):
    monkeypatch.setattr(factcheck, "model_of", None)  # before any model is loaded
    lines = [dict(v) for v in judged["verdicts"]]
    lines[1] = lines[1] | change if isinstance(change, dict) else change
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = dict(model=None, checker="verdicts") if checker == "verdicts" else SMALL
    stage = stage_of(world, trace_filter="all", verdicts=str(tmp_path / "v.jsonl"), **more)
    with pytest.raises(ValueError, match="v.jsonl:2: .*" + says):
        run(stage, tmp_path / "run")


def test_a_verifier_needs_to_know_what_was_accepted_other_thresholds_do_not(world, judged, tmp_path):
    lines = [{name: v[name] for name in ("id", "sample", "score")} for v in judged["verdicts"]]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    same = dict(trace_filter="all", verdicts=str(tmp_path / "v.jsonl"))
    assert run(stage_of(world, **same, model=None, checker="verdicts"), tmp_path / "run")["traces"] == judged["traces"]
    with pytest.raises(ValueError, match="has no 'accepted'"):
        run(stage_of(world, **same, **SMALL), tmp_path / "other")


def test_nothing_accepted_is_an_error_that_keeps_the_verdicts(world, tmp_path):
    with pytest.raises(ValueError, match=r"check: no trace was accepted: see the scores in .*verdicts.jsonl"):
        run(stage_of(world, threshold=1e6), tmp_path / "run")
    assert len(read_jsonl(tmp_path / "run" / "verdicts.jsonl")) == 120


def test_clips_and_traces_that_cannot_be_judged_are_counted(world, tmp_path):
    lines = [json.loads(line) for line in (world / "clips" / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        line["audio"] = f"{world}/clips/{line['audio']}"
    lines[5]["audio"] = "gone.wav"
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    traces = read_jsonl(world / "traces.jsonl")
    traces[0]["text"] = "<think>I hear <|AUDIO|>.</think><answer>A</answer>"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in traces))
    found = run(stage_of(world, manifest=str(tmp_path / "m.jsonl"), traces=str(tmp_path / "t.jsonl"), max_bad=0.1),
                tmp_path / "run")
    bad = {(v["id"], v["sample"]): v["bad"] for v in found["verdicts"] if "bad" in v}
    assert set(bad) == {("clip0", 0), ("clip5", 0), ("clip5", 1), ("clip5", 2)} and bad["clip0", 0] == "no prompt"
    assert sum(found["results"]["bad"].values()) == 4
    assert not set(keys(found["traces"])) & set(bad)


@pytest.mark.parametrize("change, says", [
    (lambda t: t[3].pop("text"), "t.jsonl:4: needs 'text', a str"),
    (lambda t: t[3].update(id="nobody"), "trace 4 is of 'nobody', which is not in"),
    (lambda t: t[4].update(sample=0), "sample 0 of 'clip1' stands twice"),
    (lambda t: t[4].update(sample=[1]), r"t.jsonl:5: needs 'sample', an int, got \[1\]"),
    (lambda t: t.clear(), "holds no trace to judge"),
])
def test_wrong_traces_are_refused(world, tmp_path, change, says):
    traces = read_jsonl(world / "traces.jsonl")
    change(traces)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in traces))
    with pytest.raises(ValueError, match=says):
        run(stage_of(world, traces=str(tmp_path / "t.jsonl")), tmp_path / "run")


def test_traces_of_another_make_are_judged_too(world, tmp_path):
    lines = [{"id": f"clip{i // 2}", "text": f"I hear {CLASSES[i % 3]}."} for i in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = run(stage_of(world, traces=str(tmp_path / "t.jsonl"), threshold=-1e6), tmp_path / "run")
    assert keys(found["traces"]) == [(f"clip{i // 2}", i % 2) for i in range(20)]


# ---- the trained verifier ----

SMALL = dict(checker="verifier", width=1 / 16, clip_s=0.5, epochs=16, batch_size=16, lr=3e-3)


def truth(trace):
    return CLASSES[int(trace["id"].removeprefix("clip")) % 3] in trace["text"]


def trained_on_the_truth(world, folder, **more):
    """(stage, folder, outputs) of a verifier trained on the truth about 3 traces of each of clips 0 to 35."""
    lines = [{"id": t["id"], "sample": t["sample"], "score": 1.0 if truth(t) else -1.0, "accepted": truth(t)}
             for t in read_jsonl(world / "traces.jsonl") if int(t["id"].removeprefix("clip")) < 36]
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = stage_of(world, verdicts=str(folder / "verdicts.jsonl"), trace_filter="all", **SMALL | more)
    return stage, folder, run(stage, folder / "run")


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    return trained_on_the_truth(world, tmp_path_factory.mktemp("verifier"))


@pytest.fixture(scope="module")
def briefly_trained(world, tmp_path_factory):
    """The same after an epoch, when all scores are much alike; this calibration spreads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifiers, "platt", lambda score_B, truth_B: (1000.0, 0.25))
        return trained_on_the_truth(world, tmp_path_factory.mktemp("verifier"), epochs=1)


@pytest.mark.slow
def test_the_verifier_learns_to_hear_what_a_trace_says_of_other_clips(world, trained):
    _, folder, found = trained
    unheard = [(v, t) for v, t in zip(found["verdicts"], read_jsonl(world / "traces.jsonl"), strict=True)
               if int(t["id"].removeprefix("clip")) >= 36]
    scores, truths = [v["score"] for v, _ in unheard], [truth(t) for _, t in unheard]
    assert auc(scores, truths) > 0.9
    told = found["results"]["calibration"]
    assert told["count"] == 108 // 5 and told["auc"] > 0.8 and sum(map(sum, told["confusion"])) == told["count"]


@pytest.mark.slow
def test_the_words_alone_tell_the_verifier_nothing(world, trained):
    """Of other clips' sound: every trace with the clip after the next, which is of the third class."""
    stage, folder, _ = trained
    model, processor = minixmd.load(world / "ears")
    verifier = verifiers.load_verifier(folder / "run" / "verifier.safetensors", stage.width)
    traces, examples = read_jsonl(world / "traces.jsonl"), read_manifest(stage.manifest)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(48, generator=generator).tolist()
    audio = [examples[order[int(t["id"].removeprefix("clip"))]].audio for t in traces]
    text_BD = verifiers.trace_vectors(model, processor, [thoughts(t["text"]) for t in traces], 8192)
    pairs = [verifiers.Pair(torch.from_numpy(load_logmel(path, stage.clip_s)), text_D, "")
             for path, text_D in zip(audio, text_BD, strict=True)]
    found = verifiers.score_pairs(verifier, pairs, 16)
    assert auc(found, [truth(t) for t in traces]) < 0.65


def test_a_score_of_the_verifier_is_that_of_the_traces_own_clip_and_thoughts(world, briefly_trained):
    stage, folder, found = briefly_trained
    model, processor = minixmd.load(world / "ears")
    verifier = verifiers.load_verifier(folder / "run" / "verifier.safetensors", stage.width).eval()
    assert (verifier.scale, verifier.offset) == (1000, 0.25)
    examples = {e.id: e for e in read_manifest(stage.manifest)}
    traces = read_jsonl(world / "traces.jsonl")
    assert keys(found["verdicts"]) == keys(traces)
    for trace, verdict in list(zip(traces, found["verdicts"], strict=True))[::7]:
        logmel_AM = torch.from_numpy(load_logmel(examples[trace["id"]].audio, stage.clip_s))
        text_BD = verifiers.trace_vectors(model, processor, [thoughts(trace["text"])], 8192)
        with torch.no_grad():
            assert verdict["score"] == pytest.approx(verifier(logmel_AM[None], text_BD).item(), abs=1e-3)
    assert len({verdict["score"] for verdict in found["verdicts"]}) > 90


def test_a_verifier_that_is_trained_is_not_trained_again(briefly_trained, tmp_path, monkeypatch):
    stage, folder, found = briefly_trained
    for shard in (folder / "run" / "shards").iterdir():
        shard.unlink()
    monkeypatch.setattr(factcheck, "fit_verifier", None)
    assert run(stage, folder / "run") == found


def test_the_same_seed_trains_the_same_verifier(briefly_trained, tmp_path, monkeypatch):
    stage, _, found = briefly_trained
    monkeypatch.setattr(verifiers, "platt", lambda score_B, truth_B: (1000.0, 0.25))
    assert run(stage, tmp_path / "run")["verdicts"] == found["verdicts"]


def test_a_verifier_needs_verdicts_of_both_kinds_on_its_traces(world, briefly_trained, tmp_path):
    stage, folder, _ = briefly_trained
    lines = read_jsonl(folder / "verdicts.jsonl")
    for change, says in ((lambda v: v | {"accepted": True}, "are all the same"),
                         (lambda v: v | {"id": f"other {v['id']}"}, "judges none of the traces")):
        path = tmp_path / f"{says[:3]}.jsonl"
        path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))
        with pytest.raises(ValueError, match=says):
            run(stage_of(world, verdicts=str(path), trace_filter="all", **SMALL), tmp_path / "run")


@pytest.mark.parametrize("options, mismatches", [("ddcd", [2, 2, 3, 2]), ("abcd", [1, 2, 3, 0]), ("dddd", [])])
def test_the_loss_sets_each_clip_beside_the_next_trace_with_another_answer_as_false(monkeypatch, options, mismatches):
    monkeypatch.setattr(verifiers, "spec_augment", lambda x_B1AM, noise: x_B1AM)
    cnn = torch.nn.Module()  # whose output is the frames
    cnn.normalise, cnn.embed, cnn.fc_audioset = (lambda x: x[:, None]), (lambda x, noise: x.flatten(1)), lambda x: x
    verifier = verifiers.Verifier(cnn, 5).eval()
    verifier.std_D.fill_(2.0)
    pairs = [verifiers.Pair(torch.randn(2, verifiers.WIDTH // 2), torch.randn(5), option, accepted)
             for option, accepted in zip(options, (True, False, False, True), strict=True)]

    def score(i, j):
        return verifier.match(verifier.centre(pairs[i].logmel_AM.flatten()[None]), pairs[j].text_D[None])[0]

    terms = [score(i, i).sigmoid() if pairs[i].accepted else 1 - score(i, i).sigmoid() for i in range(4)]
    terms += [1 - score(i, j).sigmoid() for i, j in enumerate(mismatches)]
    loss = verifiers.batch_loss(verifier, pairs, torch.Generator())
    assert loss.item() == pytest.approx(-torch.stack(terms).log().mean().item(), rel=1e-5)


def test_a_text_is_read_as_the_mean_of_its_hidden_states(world):
    model, processor = minixmd.load(world / "ears")
    texts = ["I hear dog.", "owl", "I hear dog.", "cat cat cat"]
    text_BD = verifiers.trace_vectors(model, processor, texts, 5)
    assert torch.equal(text_BD[0], text_BD[2]) and text_BD.shape == (4, 32)
    ids = torch.tensor(processor.encode(texts[3]))
    prompt = minixmd.Prompt(ids, torch.arange(len(ids)).expand(3, -1))
    with torch.no_grad():
        assert torch.allclose(text_BD[3], model(pack([prompt])).mean(0), atol=1e-5)
    assert verifiers.trace_vectors(model, processor, [], 5).shape == (0, 32)  # every clip of a shard may be bad
    with pytest.raises(ValueError, match="a trace of 0 tokens"):
        verifiers.trace_vectors(model, processor, [""], 5)


def test_the_area_under_roc_by_hand():
    assert auc([3, 2, 1], [True, True, False]) == 1.0
    assert auc([1, 2, 3], [True, True, False]) == 0.0
    assert auc([1, 3, 2, 4], [True, True, False, False]) == 0.25
    assert auc([1, 1, 1, 1], [True, False, True, False]) == 0.5
    assert auc([2, 1, 1, 0], [True, True, False, False]) == pytest.approx(3.5 / 4)
    assert auc([1, 2], [True, True]) is None
    told = agreement([2.0, -1.0, 1.0, -3.0], [True, True, False, False])
    assert told["confusion"] == [[1, 1], [1, 1]] and told["agreement"] == 0.5 and told["auc"] == 0.75
    assert told["roc"] == [[0.0, 0.0], [0.0, 0.5], [0.5, 0.5], [0.5, 1.0], [1.0, 1.0], [1.0, 1.0]]


def test_platt_scaling_makes_scores_the_log_odds_of_the_truth():
    generator = torch.Generator().manual_seed(0)
    score_B = 3 * torch.randn(20_000, generator=generator)
    truth_B = (torch.rand(20_000, generator=generator) < torch.sigmoid(0.5 * score_B - 1)).float()
    scale, offset = verifiers.platt(score_B, truth_B)
    assert scale == pytest.approx(0.5, abs=0.02) and offset == pytest.approx(-1, abs=0.05)
