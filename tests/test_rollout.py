"""Sampling: what the draws depend on, and where a completion ends. Log-probabilities: tests/test_invariance.py."""
import pytest
import torch
from mini import AUDIO, write_tokenizer
from tiny import positions, processor_of, tiny_model

from minixmd import Prompt, generate, pack
from minixmd.learning.rollout import prompt_key, sample, uniform

LENGTH = 12


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, AUDIO)
    model = tiny_model("audio", vocab=340).requires_grad_(False)
    model.lm_head.weight.mul_(3)  # peaked predictions
    return model, processor_of(folder, model.config)


def say(speaker, conversations, **options):
    options = dict(max_new_tokens=LENGTH, temperature=1.0, seed=0) | options
    return generate(*speaker, conversations, **options)


def ask(text, seed=None):
    """A conversation; `seed` makes the clip it is about."""
    content = [{"type": "text", "text": text}]
    if seed is not None:
        content.insert(0, {"type": "audio", "audio": torch.randn(4000, generator=torch.Generator().manual_seed(seed))})
    return [{"role": "user", "content": content}]


def ids_of(answers):
    return [[completion.ids for completion in completions] for completions in answers]


# ---- what the randomness depends on ----


def test_a_rollout_does_not_depend_on_the_other_rows_of_the_call(speaker):
    a, b, c = ask("What is this?", 1), ask("Is it a dog, a cat or an owl that we hear in this?"), ask("Hm", 2)
    together = say(speaker, [a, b, c], n=3)
    for conversation, answers in zip((a, b, c), together, strict=True):
        alone = say(speaker, [conversation], n=3)[0]
        assert [x.ids for x in alone] == [x.ids for x in answers]
        assert torch.allclose(*(torch.tensor(sum((x.logprobs for x in xs), ())) for xs in (alone, answers)), atol=2e-5)
    assert ids_of([together[2], together[0]]) == ids_of(say(speaker, [c, a], n=3))
    assert ids_of(say(speaker, [b], n=1))[0] == ids_of(together)[1][:1]  # sample 0 is the same whatever n is


def test_the_same_seed_gives_the_same_tokens_and_another_seed_step_key_or_sample_others(speaker):
    conversation = ask("What is this?", 1)
    first, again, seed, step, key = (
        ids_of(say(speaker, [conversation], n=2, **options))[0]
        for options in ({}, {}, {"seed": 1}, {"step": 1}, {"keys": ["another"]})
    )
    assert first == again
    drawn = [ids for run in (first, seed, step, key) for ids in run]
    assert len(set(drawn)) == 8


def test_a_key_names_the_randomness_and_defaults_to_the_prompts_ids_and_media(speaker):
    heard = [ask("What is this?", 1), ask("What is this?", 1), ask("What is this?", 2), ask("What is that?", 1)]
    keys = [prompt_key(speaker[1](conversation)) for conversation in heard]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    one, two = (ids_of(say(speaker, [heard[0]], keys=[key]))[0] for key in ("x", keys[0]))
    assert ids_of(say(speaker, [heard[3], heard[0], heard[0]], keys=["y", "x", keys[1]]))[1:] == [one, two]


def test_uniform_lies_in_0_to_1_and_is_spread_evenly():
    draws = torch.tensor([uniform(0, 0, "key", i, j) for i in range(50) for j in range(200)], dtype=torch.float64)
    assert 0 <= draws.min() and draws.max() < 1 and len(draws.unique()) == 10_000
    counts = torch.histc(draws.float(), 10, 0, 1)
    assert ((counts - 1000).abs() < 150).all()  # 5 standard deviations of 30


# ---- one draw ----


def test_draws_have_the_models_probabilities_without_the_banned_ids():
    logits_V, banned = torch.tensor([1.0, -2.0, 3.0, 0.5, 2.0, -torch.inf, 9.0]), torch.tensor([0, 6])
    allowed = logits_V.index_fill(0, banned, -torch.inf)
    u_B = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (1.0, 0.7):
        ids_B, logp_B = sample(logits_V.expand(len(u_B), -1), u_B, temperature, banned)
        logp_V = (allowed / temperature).log_softmax(-1)
        shares_V = torch.bincount(ids_B, minlength=7) / len(u_B)
        assert torch.allclose(shares_V, logp_V.exp(), atol=1e-4)
        assert torch.equal(logp_B, logp_V[ids_B])


@pytest.mark.parametrize("u, expected", [(0.0, 1), (1 - 2**-53, 2)])
def test_the_ends_of_the_unit_interval_never_draw_a_banned_or_impossible_id(u, expected):
    logits_BV = torch.tensor([[5.0, 0.0, 0.0, -200.0, 5.0]])
    ids_B, _ = sample(logits_BV, torch.tensor([u], dtype=torch.float64), 1.0, torch.tensor([0, 4]))
    assert ids_B.item() == expected


def test_tokens_of_probability_1e_8_beside_a_likely_one_are_drawn_in_their_place():
    logits_1V = torch.full((1, 101), 1e-8).log()
    logits_1V[0, 0] = 0.0
    for k in (0, 1, 57, 99):  # an fp32 running sum steps by 6e-8 here
        u_B = torch.tensor([(1 + (k + 0.5) * 1e-8) / (1 + 100e-8)], dtype=torch.float64)
        assert sample(logits_1V, u_B, 1.0, torch.tensor([], dtype=torch.long))[0].item() == 1 + k


def test_a_uniform_number_over_a_real_vocabulary_lands_on_its_share():
    for u in (0.25, 0.5, 0.999999):
        u_B = torch.tensor([u], dtype=torch.float64)
        ids_B, _ = sample(torch.zeros(1, 152_064), u_B, 1.0, torch.tensor([], dtype=torch.long))
        assert abs(ids_B.item() - int(u * 152_064)) <= 1


def test_temperature_0_takes_the_largest_allowed_logit_at_every_position(speaker):
    model, processor = speaker
    conversations = [ask("What is this?", 1), ask("Hm")]
    answers, others = (say(speaker, conversations, temperature=0, seed=seed) for seed in (0, 1))
    assert answers == others and answers[0][0].ids != answers[1][0].ids
    for conversation, (answer,) in zip(conversations, answers, strict=True):
        start = processor(conversation)
        ids_N = torch.cat([start.ids_N, torch.tensor(answer.ids)])
        hidden_ND = model(pack([Prompt(ids_N, positions(len(ids_N), start.media), start.media)]))
        logits_TV = model.logits(hidden_ND[len(start) - 1:-1]).index_fill(1, torch.tensor(processor.banned), -torch.inf)
        assert logits_TV.argmax(-1).tolist() == list(answer.ids)
        logp_TV = logits_TV.log_softmax(-1)  # at temperature 1
        assert torch.allclose(torch.tensor(answer.logprobs), logp_TV.amax(-1), atol=2e-5)


# ---- where it ends ----


def test_a_completion_ends_with_the_end_of_turn_or_at_max_new_tokens_and_says_which(speaker):
    processor = speaker[1]
    answers = sum(say(speaker, [ask("What is this?"), ask("Hm", 1)], n=40), [])
    for completion in answers:
        assert processor.end_id not in completion.ids[:-1]
        assert completion.finished == (completion.ids[-1] == processor.end_id)
        assert len(completion.ids) == len(completion.logprobs) <= LENGTH
        assert len(completion.ids) == LENGTH or completion.finished
        assert completion.text == processor.decode(completion.ids)  # the end of turn is no text
    assert {completion.finished for completion in answers} == {True, False}


def test_a_stop_string_ends_a_completion_and_leaves_the_others_and_what_came_before_alone(speaker):
    decode = speaker[1].decode
    conversations = [ask("What is this?"), ask("Hm", 1)]
    free, ended = sum(say(speaker, conversations, n=5), []), 0
    pairs = [decode(c.ids[i:i + 2]) for c in free for i in range(2, len(c.ids) - 3)]
    pairs = [pair for pair in pairs if pair.isascii() and pair.isprintable() and len(pair) == 2]  # of two tokens each
    stop = (pairs[0], pairs[-1], "no such text")
    for before, after in zip(free, sum(say(speaker, conversations, n=5, stop=stop), []), strict=True):
        cut = next((i for i in range(1, len(before.ids)) if any(s in decode(before.ids[:i]) for s in stop)), None)
        assert after.ids == before.ids[:cut]
        assert after.logprobs == pytest.approx(before.logprobs[:cut], abs=2e-5)
        assert after.finished == (before.finished or cut is not None)
        assert cut is None or any(s in after.text for s in stop)
        ended += cut is not None
    assert 2 <= ended < 10


def test_one_new_token_is_enough_and_fewer_is_an_error(speaker):
    (completion,) = say(speaker, [ask("Hm")], max_new_tokens=1)[0]
    assert len(completion.ids) == 1
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        say(speaker, [ask("Hm")], max_new_tokens=0)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_an_error(speaker, temperature):
    with pytest.raises(ValueError, match="temperature must be 0"):
        say(speaker, [ask("Hm")], temperature=temperature)


def test_an_empty_stop_string_and_a_length_over_the_models_limit_are_errors(speaker):
    with pytest.raises(ValueError, match="stop string must not be empty"):
        say(speaker, [ask("Hm")], max_new_tokens=2, stop=("x", ""))
    with pytest.raises(ValueError, match="over the model's limit of"):
        say(speaker, [ask("Hm")], max_new_tokens=10**6)
