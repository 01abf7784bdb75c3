"""Rollouts: what the draws depend on, where a completion ends, the slots, the captured step, agreement with training.

The same for models of every family: tests/test_invariance.py."""
import copy
import gc
import hashlib
import json
import math
import re
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from mini import AUDIO, VISION, write_tokenizer
from tiny import positions, processor_of, tiny_model

from minixmd import Group, Prompt, generate, pack
from minixmd.kernels.logprob import row_stats
from minixmd.learning import decoder, kv_cache
from minixmd.learning.decoder import Decoder, sample
from minixmd.learning.kv_cache import KVCache, pool_bytes, pool_shapes
from minixmd.learning.rollout import TEMPERATURES, Usage, decode, prompt_key, uniforms
from minixmd.models.families import read_config

LENGTH = 12
QWEN2_AUDIO = Path(__file__).parent / "configs" / "Qwen2-Audio-7B-Instruct.json"


def build(folder, kind, sharp):
    """A random model, whose predictions are the more peaked the larger `sharp`, and its Processor."""
    write_tokenizer(folder, AUDIO if kind == "audio" else VISION)
    model = tiny_model(kind, vocab=340).requires_grad_(False)
    model.lm_head.weight.mul_(sharp)
    return model, processor_of(folder, model.config)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sharp"), "audio", 3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Its processor knows no end of turn: every completion has max_new_tokens."""
    model, processor = build(tmp_path_factory.mktemp("plain"), "audio", 1)
    processor.end_id = -1
    return model, processor


def say(speaker, conversations, **options):
    options = dict(max_new_tokens=LENGTH, temperature=1.0, seed=0) | options
    return generate(*speaker, conversations, **options)


def ask(text, seed=None):
    """A conversation; `seed` makes the clip it is about."""
    content = [{"type": "text", "text": text}]
    if seed is not None:
        content.insert(0, {"type": "audio", "audio": torch.randn(4000, generator=torch.Generator().manual_seed(seed))})
    return [{"role": "user", "content": content}]


def heard(number):
    """A conversation about clip `number`; odd ones are longer."""
    wave_S = torch.randn(4000 + 2000 * (number % 3), generator=torch.Generator().manual_seed(number))
    text = "What is this?" + " Hm." * (4 * (number % 2))
    return [{"role": "user", "content": [{"type": "audio", "audio": 0.1 * wave_S}, {"type": "text", "text": text}]}]


def flat(speaker, conversations, **options):
    return sum(say(speaker, conversations, **options), [])


def no_draw(i):
    """Greedy decoding reads no numbers."""
    return torch.full((LENGTH,), torch.nan, dtype=torch.float64)


def ids_of(answers):
    return [[completion.ids for completion in completions] for completions in answers]


def assert_same(ours, theirs, bound=2e-5):
    assert [(c.ids, c.text, c.finished) for c in ours] == [(c.ids, c.text, c.finished) for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=bound)


def counted(monkeypatch, name, counter, key):
    """Decoder.`name`, which also adds key(arguments) to the counter."""
    inner = getattr(Decoder, name)

    def outer(self, *args):
        counter[name] += key(*args)
        return inner(self, *args)

    monkeypatch.setattr(Decoder, name, outer)


# ---- what the randomness depends on ----


def test_a_rollout_does_not_depend_on_the_other_rows_of_the_call(speaker):
    a, b, c = ask("What is this?", 1), ask("Is it a dog, a cat or an owl that we hear in this?"), ask("Hm", 2)
    together = say(speaker, [a, b, c], num_samples=3)
    for conversation, answers in zip((a, b, c), together, strict=True):
        alone = say(speaker, [conversation], num_samples=3)[0]
        assert [x.ids for x in alone] == [x.ids for x in answers]
        assert torch.allclose(*(torch.tensor(sum((x.logprobs for x in xs), ())) for xs in (alone, answers)), atol=2e-5)
    assert ids_of([together[2], together[0]]) == ids_of(say(speaker, [c, a], num_samples=3))
    (alone,) = ids_of(say(speaker, [b], num_samples=1))
    assert alone == ids_of(together)[1][:1]  # sample 0 does not depend on num_samples


def test_the_same_seed_gives_the_same_tokens_and_another_seed_step_key_or_sample_others(speaker):
    conversation = ask("What is this?", 1)
    first, again, seed, step, key = (
        ids_of(say(speaker, [conversation], num_samples=2, **options))[0]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_whose_clips_are_encoded_has_a_key_too(speaker, dtype):
    model, processor = copy.deepcopy(speaker[0]).to(dtype), speaker[1]
    one, again, other = (model.encode_media(processor(ask("What is this?", clip))) for clip in (1, 1, 2))
    assert one.media[0].features.dtype == dtype and prompt_key(one) == prompt_key(again) != prompt_key(other)


def test_uniforms_lie_in_0_to_1_are_spread_evenly_and_do_not_depend_on_how_many_are_asked_for():
    draws = torch.stack([uniforms(0, 0, "key", i, 200) for i in range(50)])
    assert draws.dtype == torch.float64 and 0 <= draws.min() and draws.max() < 1 and len(draws.unique()) == 10_000
    counts = torch.histc(draws.float(), 10, 0, 1)
    assert ((counts - 1000).abs() < 150).all()  # 5 standard deviations of 30
    assert torch.equal(uniforms(0, 0, "key", 7, 3), draws[7, :3])
    assert uniforms(0, 0, "a", 0, 1).item() == (int.from_bytes(hashlib.shake_128(b"(0, 0, 'a', 0)").digest(8), "big")
                                                 >> 11) / 2**53  # fmt: skip


# ---- one draw ----


def test_draws_have_the_models_probabilities_without_the_suppressed_ids():
    logits_V, suppressed_ids = torch.tensor([1.0, -2.0, 3.0, 0.5, 2.0, -torch.inf, 9.0]), torch.tensor([0, 6])
    allowed = logits_V.index_fill(0, suppressed_ids, -torch.inf)
    u_B = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (1.0, 0.7):
        ids_B, logp_B = sample(logits_V.expand(len(u_B), -1), u_B, temperature, suppressed_ids)
        logp_V = (allowed / temperature).log_softmax(-1)
        shares_V = torch.bincount(ids_B, minlength=7) / len(u_B)
        assert torch.allclose(shares_V, logp_V.exp(), atol=1e-4)
        assert torch.equal(logp_B, logp_V[ids_B])


@pytest.mark.parametrize("u, expected", [(0.0, 1), (1 - 2**-53, 2)])
def test_the_ends_of_the_unit_interval_never_draw_a_suppressed_or_impossible_id(u, expected):
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
        logits_TV = model.logits(hidden_ND[len(start) - 1:-1])
        logits_TV = logits_TV.index_fill(1, torch.tensor(processor.suppressed_ids), -torch.inf)
        assert logits_TV.argmax(-1).tolist() == list(answer.ids)
        logp_TV = logits_TV.log_softmax(-1)  # at temperature 1
        assert torch.allclose(torch.tensor(answer.logprobs), logp_TV.amax(-1), atol=2e-5)


# ---- where it ends ----


def test_a_completion_ends_with_the_end_of_turn_or_at_max_new_tokens_and_says_which(speaker):
    processor = speaker[1]
    answers = sum(say(speaker, [ask("What is this?"), ask("Hm", 1)], num_samples=40), [])
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
    free, ended = sum(say(speaker, conversations, num_samples=5), []), 0
    pairs = [decode(c.ids[i:i + 2]) for c in free for i in range(2, len(c.ids) - 3)]
    pairs = [pair for pair in pairs if pair.isascii() and pair.isprintable() and len(pair) == 2]  # of two tokens each
    stop = (pairs[0], pairs[-1], "no such text")
    for before, after in zip(free, sum(say(speaker, conversations, num_samples=5, stop=stop), []), strict=True):
        cut = next((i for i in range(1, len(before.ids)) if any(s in decode(before.ids[:i]) for s in stop)), None)
        assert after.ids == before.ids[:cut]
        assert after.logprobs == pytest.approx(before.logprobs[:cut], abs=2e-5)
        assert after.finished == (before.finished or cut is not None)
        assert cut is None or any(s in after.text for s in stop)
        ended += cut is not None
    assert 2 <= ended < 10


def test_one_new_token_is_enough(speaker):
    (completion,) = say(speaker, [ask("Hm")], max_new_tokens=1)[0]
    assert len(completion.ids) == 1


# ---- slots and refills ----


@pytest.mark.parametrize("decode_slots", [2, 4, 7, 10])
def test_completions_that_share_slots_in_turn_are_those_of_all_at_once(speaker, decode_slots, monkeypatch):
    conversations, count = [heard(i) for i in range(6)], Counter()
    options = dict(num_samples=3, max_new_tokens=30, stop=("e", "o"))  # most end early, at different times
    at_once = flat(speaker, conversations, **options)
    counted(monkeypatch, "prefill", count, lambda prompts, *_: len(prompts))
    counted(monkeypatch, "step", count, lambda: 1)
    usage = Usage()
    in_turn = flat(speaker, conversations, decode_slots=decode_slots, usage=usage, **options)
    assert_same(in_turn, at_once)
    lengths = [len(c.ids) for c in at_once]
    assert len(set(lengths)) > 6 and {c.finished for c in at_once} == {True, False} or max(lengths) < 30
    assert count["prefill"] == 6
    busy = naive_schedule([length - 1 for length in lengths], decode_slots)
    assert count["step"] == len(busy) and usage.tokens == sum(busy) == sum(lengths) - 18
    assert usage.rows == sum(rows_of(busy, decode_slots)) and 0.9 < usage.slot_use <= 1


def naive_schedule(lengths, slots):
    """How many slots write in each step, where a free slot takes the next completion that has a token left."""
    waiting, left, busy = [length for length in lengths if length], [], []
    while waiting or left:
        while waiting and len(left) < slots:
            left.append(waiting.pop(0))
        busy.append(len(left))
        left = [length - 1 for length in left if length > 1]
    return busy


def rows_of(busy, slots):
    """Rows that steps compute: all slots, until no completion is left to come; then those in use."""
    last = max(i for i, count in enumerate(busy) if count == min(slots, max(busy)))
    return [slots if i < last else count for i, count in enumerate(busy)]


def test_a_completion_takes_a_free_slot_while_others_of_its_prompt_wait_or_write(speaker, monkeypatch):
    """Slots fewer than a prompt's completions, and two prompts in the cache."""
    seen = []
    link = Decoder.link
    monkeypatch.setattr(Decoder, "link", lambda self: seen.append(list(self.prompt_of)) or link(self))
    flat(speaker, [heard(i) for i in range(4)], num_samples=5, decode_slots=4, max_new_tokens=20, stop=("e",))
    assert any(len({slot for slot in owners if slot >= 0}) == 2 for owners in seen)
    assert max(max(owners) for owners in seen) < 4


def test_a_longer_prompt_that_comes_late_gets_room(speaker):
    conversations = [ask("Hm"), ask("What is this?"), ask("Is it a dog, a cat or an owl?" * 3), ask("Hm", 1)]
    model, processor = speaker
    prompts = [processor(conversation) for conversation in conversations]
    options = dict(max_new_tokens=LENGTH, temperature=0)
    late = decode(model, processor, iter(prompts), 4, no_draw, decode_slots=1, longest_prompt=1, **options)
    assert_same(late, sum(generate(*speaker, conversations, seed=0, **options), []))


def test_prompts_are_read_as_their_completions_come_up(speaker):
    model, processor = speaker
    read = []

    def prompts():
        for i in range(6):
            read.append(i)
            yield processor(heard(i))

    ahead = []
    decode(model, processor, prompts(), 6, no_draw, max_new_tokens=LENGTH, temperature=0, decode_slots=2,
           on_prompts=lambda first, logits_GV: ahead.append(len(read)))
    assert read == [*range(6)] and ahead[0] == 2  # those that are computed


def test_a_decoder_that_is_kept_gives_what_a_new_one_does(speaker, monkeypatch):
    model, processor = speaker
    made, init = [], Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *args, **more: made.append(1) or init(self, *args, **more))
    kept, options = {}, dict(max_new_tokens=LENGTH, temperature=0, decode_slots=2, stop=("e",))
    for first in (0, 3):
        prompts = [processor(heard(i)) for i in range(first, first + 3)]
        with_kept = decode(model, processor, prompts, 3, no_draw, kept=kept, **options)
        assert_same(with_kept, decode(model, processor, prompts, 3, no_draw, **options))
    assert len(made) == 3 and len(kept) == 1
    fewer = decode(model, processor, [processor(heard(7))], 1, no_draw, kept=kept, **options)  # 1 slot is enough
    assert_same(fewer, decode(model, processor, [processor(heard(7))], 1, no_draw, **options))
    assert len(made) == 4 and len(kept["decoder"].prompt_of) == 2
    assert decode(model, processor, [], 0, no_draw, kept={}, **options) == [] and len(made) == 4


@pytest.mark.parametrize("mid_run", [False, True])
def test_a_captured_decoder_grows_and_is_captured_again(speaker, monkeypatch, mid_run):
    """Between two calls of a kept one, or while completions of shorter prompts are under way."""
    as_if_captured(monkeypatch)
    captures = []
    monkeypatch.setattr(decoder, "capture", lambda step: captures.append(step()) or step)
    monkeypatch.setattr(decoder, "PROMPT_ROWS", 8)
    model, processor = speaker
    texts = ["Hm", "Hm?", "Is it a dog, a cat or an owl that we hear in this?" * 4, "What is this?"]
    prompts = [processor(ask(text)) for text in texts]
    options = dict(max_new_tokens=LENGTH, temperature=0, decode_slots=2)
    if mid_run:
        found = decode(model, processor, prompts, 4, no_draw, **options)
    else:
        kept = {}
        found = decode(model, processor, prompts[:2], 2, no_draw, kept=kept, **options)
        found += decode(model, processor, prompts[2:], 2, no_draw, kept=kept, **options)
    assert captures
    assert_same(found, sum(generate(*speaker, list(map(ask, texts)), seed=0, max_new_tokens=LENGTH, temperature=0), []))


def test_a_shard_gives_the_same_bits_again(speaker):
    runs = [flat(speaker, [heard(i) for i in range(5)], num_samples=2, decode_slots=4, stop=("a",)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_row_gives_the_same_tokens_alone_and_in_any_batch(speaker):
    """At least 99 of 100 rows: rounding may turn a draw that falls on an edge. Which, is said."""
    conversations = [heard(i) for i in range(20)]
    together = flat(speaker, conversations, num_samples=5, max_new_tokens=16)
    back = flat(speaker, conversations[::-1], num_samples=5, max_new_tokens=16, decode_slots=15)
    back = [c for i in range(20) for c in back[5 * (19 - i):5 * (20 - i)]]
    alone = [c for conversation in conversations
             for c in flat(speaker, [conversation], num_samples=5, max_new_tokens=16)]
    for name, others in (("alone", alone), ("backwards, in 15 decode_slots", back)):
        flipped = [i for i, (a, b) in enumerate(zip(together, others, strict=True)) if a.ids != b.ids]
        print(f"rows with other tokens {name}: {flipped}")
        assert len(flipped) <= 1
    assert len({c.ids for c in together}) > 90


@pytest.mark.parametrize("kind", ["audio", "vision"])
def test_a_clip_is_encoded_once_however_many_completions_and_steps_follow(kind, tmp_path, monkeypatch):
    model, processor = build(tmp_path, kind, 3)
    clips = [torch.randn(4000) if kind == "audio" else torch.randint(0, 256, (2, 3, 56, 56)).byte() for _ in range(3)]
    part = "audio" if kind == "audio" else "video"
    conversations = [[{"role": "user", "content": [{"type": part, part: clip}]}] for clip in clips]
    seen, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda kind, media: seen.extend(media) or encode(kind, media))
    generate(model, processor, conversations, num_samples=4, max_new_tokens=5, temperature=1.0, seed=0, decode_slots=4)
    assert len(seen) == 3 == len({m.features.data_ptr() for m in seen})


def test_prompts_pass_the_decoder_once_and_completions_a_token_at_a_time(plain):
    model, processor = plain
    widths, hook = [], model.model.register_forward_hook(lambda module, inputs, out: widths.append(len(out)))
    prompts = [processor(heard(i)) for i in range(3)]
    try:
        flat(plain, [heard(i) for i in range(3)], num_samples=4, max_new_tokens=6)
    finally:
        hook.remove()
    assert widths == [sum(map(len, prompts))] + [12] * 5


# ---- memory ----


def test_64_rollouts_of_850_and_512_tokens_of_qwen2_audio_take_at_most_20_gib():
    sizes = read_config(json.loads(QWEN2_AUDIO.read_text())).text, 8, 850, 64, 512
    cache = KVCache(pool_shapes(*sizes), 8, device="meta", dtype=torch.bfloat16, backend="torch")
    pools = cache.prompt_pool, cache.pool
    assert sum(pool.nbytes for pool in pools) == pool_bytes(*sizes, torch.bfloat16) <= 20 * 2**30
    assert pool_bytes(*sizes, torch.bfloat16) == (8 * 850 + 64 * 511) * 2 * 32 * 32 * 128 * 2  # by hand
    assert [pool.shape for pool in pools] == list(pool_shapes(*sizes))


def test_a_rollouts_pools_hold_a_prompt_once_and_no_more_slots_than_asked(speaker, monkeypatch):
    made, Whole = [], KVCache
    monkeypatch.setattr(decoder, "KVCache", lambda *args: made.append(Whole(*args)) or made[-1])
    longest = max(len(speaker[1](heard(i))) for i in range(4))
    flat(speaker, [heard(i) for i in range(4)], num_samples=3, decode_slots=7)
    assert len(made) == 1
    assert made[0].prompt_pool.shape[2:] == (4, 2, longest, 12) and made[0].pool.shape[2:] == (7, 2, LENGTH - 1, 12)


# ---- the step that is captured ----


def test_the_pools_are_freed_with_the_call(speaker, monkeypatch):
    made, init = [], KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *args: made.append(weakref.ref(self)) or init(self, *args))
    gc.disable()  # it would free a cycle only now and then
    try:
        say(speaker, [ask("Hm")], max_new_tokens=2)
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


def test_a_step_looks_at_no_value(speaker):
    """On the meta device there is none: item(), tolist(), a boolean index or a branch on a tensor raises."""
    model = copy.deepcopy(speaker[0]).to("meta")
    d = Decoder(model, 2, 30, 6, 3, max_new_tokens=8, temperature=0.7, suppressed_ids=[1, 2], end_id=3,
                backend="torch")
    d.step()
    with pytest.raises(RuntimeError):
        d.run(1)  # it reads what was sampled


def test_a_step_keeps_every_tensor_where_it_is(speaker):
    model, processor = speaker
    prompts = [processor(heard(i)) for i in range(2)]
    d = Decoder(model, 2, max(map(len, prompts)), 6, 3, max_new_tokens=8, temperature=0.7,
                suppressed_ids=processor.suppressed_ids, end_id=processor.end_id, backend="torch")
    uniform_BT = torch.rand(6, 8, dtype=torch.float64)
    with torch.inference_mode():
        _, tokens, _ = d.prefill(prompts, [1, 0], uniform_BT[:, 0])
        d.place([5, 4, 3], tokens[:3], [1, 1, 1], uniform_BT[:3])
        before = {f"{type(o).__name__}.{name}": (x, x.data_ptr()) for o in (d, d.cache) for name, x in vars(o).items()
                  if isinstance(x, torch.Tensor)}  # fmt: skip
        d.run(4)
    after = {f"{type(o).__name__}.{name}": x for o in (d, d.cache) for name, x in vars(o).items()
             if isinstance(x, torch.Tensor)}  # fmt: skip
    assert len(before) == 13 and before.keys() == after.keys()
    for name, (x, at) in before.items():
        assert after[name] is x and x.data_ptr() == at, name


@pytest.mark.parametrize("length", [1, 2, 8])
def test_a_step_can_be_taken_before_there_is_a_prompt(plain, length):
    """As capture does, with whatever the pools' memory holds."""
    d = Decoder(plain[0], 2, 30, 6, 3, max_new_tokens=length, temperature=0.7, suppressed_ids=[1], end_id=-1,
                backend="torch")
    with torch.inference_mode():
        d.step()


def as_if_captured(monkeypatch):
    """Steps in runs of STEPS_PER_SYNC, over whole pools, as when a graph is replayed."""
    inner = Decoder.__init__

    def outer(self, *args, **options):
        inner(self, *args, **options)
        self.captured = True

    monkeypatch.setattr(Decoder, "__init__", outer)


@pytest.mark.parametrize("length", [1, 2, 9, 30])
def test_looking_every_few_steps_changes_nothing(speaker, length, monkeypatch):
    conversations = [heard(i) for i in range(5)]
    options = dict(num_samples=2, max_new_tokens=length, stop=("e",), decode_slots=4)
    wanted = flat(speaker, conversations, **options)
    as_if_captured(monkeypatch)
    assert_same(flat(speaker, conversations, **options), wanted)


@pytest.mark.parametrize("kind", ["audio", "vision"])
def test_the_kernel_gives_the_tokens_of_its_twin(kind, tmp_path):
    speaker, conversations = build(tmp_path, kind, 3), [heard(1), heard(2)] if kind == "audio" else [
        [{"role": "user", "content": text}] for text in ("Hm", "What is it that we see here?")]  # fmt: skip
    options = dict(num_samples=2, max_new_tokens=4, decode_slots=2)
    assert_same(flat(speaker, conversations, backend="triton", **options), flat(speaker, conversations, **options))


def test_the_backend_is_the_models_unless_another_is_named(speaker, monkeypatch):
    used, attention = [], kv_cache.decode_attention
    monkeypatch.setattr(kv_cache, "decode_attention", lambda *args: used.append(args[-1]) or attention(*args))
    monkeypatch.setattr(speaker[0], "backend", "triton")
    for options, backend in (({}, "triton"), (dict(backend="torch"), "torch")):
        say(speaker, [ask("Hm")], max_new_tokens=2, **options)
        assert set(used) == {backend}
        used.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_captured_steps_give_what_eager_ones_do(speaker, temperature):
    model, processor = copy.deepcopy(speaker[0]).cuda(), speaker[1]
    conversations = [heard(i) for i in range(6)]
    options = dict(num_samples=2, max_new_tokens=30, stop=("e",), decode_slots=4, temperature=temperature)
    assert_same(flat((model, processor), conversations, backend="triton", **options),
                flat((model, processor), conversations, backend="torch", **options))


# ---- agreement with training ----


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_64_rollouts_of_64_tokens_have_the_log_probabilities_that_training_computes(plain, temperature):
    model, processor = plain
    conversations = [heard(i) for i in range(8)]
    options = dict(max_new_tokens=64, temperature=temperature, seed=5, decode_slots=24)
    answers = generate(model, processor, conversations, num_samples=8, **options)
    suppressed_Z = torch.tensor(processor.suppressed_ids)
    for conversation, completions in zip(conversations, answers, strict=True):
        batch = pack([Group(processor(conversation), tuple(torch.tensor(c.ids) for c in completions))])
        logits_TV = model.logits(model(batch)[batch.target_row_T])
        logp_T = row_stats(logits_TV, batch.target_id_T, temperature, suppressed_Z, backend="torch")[0]
        sampled_T = torch.tensor([x for c in completions for x in c.logprobs])
        assert len(sampled_T) == 512 and (sampled_T - logp_T).abs().max() <= 1e-5
        assert not set(batch.target_id_T.tolist()) & set(processor.suppressed_ids)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_frequencies_are_the_softmax(speaker, temperature):
    """Chi-square of the first token, and of the second after the most frequent first, at a fixed seed."""
    model, processor = speaker[0], copy.copy(speaker[1])
    processor.end_id, start = -1, processor(heard(1))
    options = dict(num_samples=4000, max_new_tokens=2, temperature=temperature)
    said = [c.ids for c in flat((model, processor), [heard(1)], **options)]
    common = Counter(a for a, _ in said).most_common(1)[0][0]
    for drawn, more in (([a for a, _ in said], []), ([b for a, b in said if a == common], [common])):
        positions_3N = torch.cat([start.positions_3N, start.positions_3N[:, -1:] + 1], 1)[:, :len(start) + len(more)]
        batch = pack([Prompt(torch.cat([start.ids_N, torch.tensor(more).long()]), positions_3N, start.media)])
        z_V = model.logits(model(batch)[-1:])[0].index_fill(0, torch.tensor(processor.suppressed_ids), -torch.inf)
        expected_V = len(drawn) * (z_V / temperature).double().softmax(0)
        found_V = torch.bincount(torch.tensor(drawn), minlength=340)
        often = expected_V >= 5  # the others count as one
        expected, found = (torch.cat([x[often], x[~often].sum()[None]]) for x in (expected_V, found_V))
        freedom, chi2 = len(expected) - 1, ((found - expected) ** 2 / expected).sum().item()
        assert len(drawn) > 300 and freedom > 5
        assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5, f"{chi2:.1f} for {freedom}"


# ---- what it refuses ----


@pytest.mark.parametrize("options, message", [
    (dict(num_samples=0), "num_samples must be at least 1, got 0"),
    (dict(num_samples=-1), "num_samples must be at least 1, got -1"),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
    *((dict(temperature=t), f"temperature must be 0 (greedy) or from 1e-06 to 1e+06, got {t}")
      for t in (-1.0, 1e-39, 1e39, float("nan"), float("inf"))),
    (dict(stop="</answer>"), "stop must be a list of strings, none of them empty, got '</answer>'"),
    (dict(stop=("x", "")), "stop must be a list of strings, none of them empty, got ('x', '')"),
    (dict(stop=[7]), "stop must be a list of strings, none of them empty, got [7]"),
    (dict(decode_slots=0), "decode_slots must be at least 1, got 0"),
    (dict(keys=["a"]), "keys must be one for each of the 2 conversations, got 1"),
    (dict(keys=["a", "b", "c"]), "keys must be one for each of the 2 conversations, got 3"),
    (dict(conversations=[]), "generate needs at least one conversation, got none"),
    (dict(conversations=[], keys=[]), "generate needs at least one conversation, got none"),
    (dict(max_new_tokens=5000), "over the model's limit of 4096"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_was_expected_and_what_came(speaker, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        say(speaker, **{"conversations": [ask("Hm"), ask("What is this?")], **options})


def test_the_ends_of_the_temperatures_that_are_taken_give_finite_log_probabilities(speaker):
    for temperature in TEMPERATURES:
        assert all(math.isfinite(x) for c in flat(speaker, [ask("Hm")], temperature=temperature) for x in c.logprobs)


@pytest.mark.parametrize("late", [False, True])
def test_logits_that_are_not_finite_raise(plain, late):
    """NaN in the embeddings of the prompt, or of a token that is drawn third."""
    model, processor, said = copy.deepcopy(plain[0]), plain[1], []
    token = processor(heard(1)).ids_N[0].item()
    if late:
        token = flat(plain, [heard(1)])[0].ids[2]
        assert token not in processor(heard(1)).ids_N and token not in flat(plain, [heard(1)])[0].ids[:2]
    model.model.embed_tokens.weight[token] = torch.nan
    with pytest.raises(ValueError, match="the model's logits are not finite: its weights are broken, or too large for"):
        flat((model, processor), [heard(1)], on_token=lambda row, ids: said.append(ids[-1]))
    assert len(said) == 3 * late and (not late or said[-1] == token)


def test_decode_hands_out_the_logits_after_each_prompt_in_order(speaker):
    model, processor = speaker
    prompts, seen = [processor(heard(i)) for i in range(5)], []
    decode(model, processor, prompts, 5, lambda i: uniforms(0, 0, str(i), 0, 6), max_new_tokens=6,
           temperature=1.0, decode_slots=2, on_prompts=lambda first, logits_GV: seen.append(logits_GV))
    batch = pack(prompts)
    wanted_BV = model.logits(model(batch)[[end - 1 for _, end in batch.spans]])
    torch.testing.assert_close(torch.cat(seen), wanted_BV, atol=2e-5, rtol=0)
    assert len(seen) > 1
