"""What shares a call changes no number (fp32): packing, order, micro-batches, shared prompts, the key-value cache."""
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from absent_device import varlen_attn
from mini import AUDIO, OMNI, VISION, write_tokenizer
from tiny import Largest, audio_media, cross_entropy, processor_of, prompt, tiny_model, trainer_of, video_media

from minixmd import Group, Prompt, generate, pack
from minixmd.config import SFT
from minixmd.inputs.batch import Segments
from minixmd.learning.steps import count
from minixmd.models.attention import attend_at_once, packed_attention

KINDS = ("audio", "vision", "windowed", "omni")  # an Omni prompt mixes both media


def clip(kind, size, seed):
    """An audio clip whose frames grow with `size`, or a video of `size` frame pairs of 4 x 6 patches."""
    if kind == "audio" or (kind == "omni" and seed % 2):
        return audio_media((37 if kind == "omni" else 7) * size + 1, 0, seed)[0]  # Omni's chunks here are 50 frames
    return video_media((size, 4, 6), 0, seed)


def prompts_of(kind):
    """Six prompts with 1 to 9 targets: two text-only neighbours of equal length, one and two clips, another order."""
    return [
        prompt([5, clip(kind, 2, 1), 4], seed=1, targets=2),
        prompt([6], seed=2, targets=3),
        prompt([6], seed=3, targets=1),
        prompt([3, clip(kind, 1, 2), 2, clip(kind, 5, 3), 12], seed=4, targets=9),
        prompt([1, clip(kind, 3, 4), 5], seed=5, targets=4),
        prompt([1, clip(kind, 3, 5), 5], seed=6, targets=1),
    ]


def assert_close(ours, theirs, bound=5e-6):
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert ours.shape == theirs.shape and error <= bound * scale, f"max error {error:.2e} of {scale:.2e}"


def assert_same_gradients(ours, theirs, bound=5e-6):
    assert ours.keys() == theirs.keys() and ours
    for name, grad in theirs.items():
        error, norm = (ours[name] - grad).norm().item(), grad.norm().item()
        assert 0 < norm and error <= bound * norm, f"{name}: error {error:.1e} of {norm:.1e}"


def gradients(model, loss):
    """{name: gradient} of the parameters that `loss()` reaches, and its value."""
    model.zero_grad(set_to_none=True)
    value = loss()
    if value.requires_grad:
        value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, value.detach()


# ---- packing, order, micro-batches ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (3, 2, 5, 0, 4, 1)], ids=["in order", "shuffled"])
def test_a_prompt_in_a_pack_gets_the_hidden_states_logits_and_loss_that_it_gets_alone(kind, order):
    model, prompts = tiny_model(kind), prompts_of(kind)
    batch = pack([prompts[i] for i in order])
    with torch.no_grad():
        hidden_ND = model(batch)
        nll_T, at = cross_entropy(hidden_ND, model.lm_head.weight, batch)[1], 0
        for i, (start, end) in zip(order, batch.spans, strict=True):
            alone = pack([prompts[i]])
            alone_ND = model(alone)
            assert_close(hidden_ND[start:end], alone_ND)
            assert_close(model.logits(hidden_ND[start:end]), model.logits(alone_ND))
            alone_T = cross_entropy(alone_ND, model.lm_head.weight, alone)[1]
            assert_close(nll_T[at:at + len(alone_T)], alone_T)
            at += len(alone_T)
    assert at == len(nll_T)


def check_micro_batches(kind, sft_gradients):
    """Raises AssertionError unless a step's gradient is the same, to 5e-6 of its norm, however it is cut."""
    model, samples = tiny_model(kind), [(prompt, None) for prompt in prompts_of(kind)]
    found = {}
    for tokens in (8192, 1, 20, 40):
        model.zero_grad(set_to_none=True)
        stage = SFT(name="s", model="m", manifest="d", trainable="full", device="cpu", batch_size=24,
                    micro_batch_tokens=tokens)
        trainer = trainer_of(stage, model)
        micro_batches = trainer.micro_batches(samples)
        loss = sft_gradients(trainer, micro_batches)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        never_trained = kind in ("audio", "omni")  # a position table, and vectors that nothing reads
        assert len(grads) == len(list(model.parameters())) - never_trained
        found[len(micro_batches)] = grads, loss
    assert len(found) > 2 and min(found) == 1 and max(found) == len(samples)
    for grads, loss in found.values():
        assert_same_gradients(grads, found[1][0])
        assert_close(loss, found[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_budget_changes_no_gradient(kind):
    def loss_of(trainer, micro_batches):
        return trainer.sft_gradients(micro_batches, count(micro_batches))["loss"]

    check_micro_batches(kind, loss_of)


def test_dividing_by_the_number_of_micro_batches_would_be_caught():
    def mean_of_means(trainer, micro_batches):
        parts = [[micro_batch] for micro_batch in micro_batches]
        loss = sum(trainer.sft_gradients(part, count(part))["loss"] for part in parts) / len(parts)
        for p in trainer.parameters.values():
            p.grad /= len(parts)
        return loss

    with pytest.raises(AssertionError, match="error"):
        check_micro_batches("audio", mean_of_means)


# ---- a prompt shared by its completions ----


def completions_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 89, (length,), generator=generator) for length in lengths)


def joined(prompt, completion_T):
    """The Prompt of one completion by itself: all of the completion is to be learnt."""
    ids_N = torch.cat([prompt.ids_N, completion_T])
    after_T = prompt.positions_3N.max() + 1 + torch.arange(len(completion_T))
    positions_3N = torch.cat([prompt.positions_3N, after_T.expand(3, -1)], dim=1)
    return Prompt(ids_N, positions_3N, prompt.media, torch.arange(len(ids_N)) >= len(prompt))


SHARED = {
    "text": ("audio", lambda: prompt([9], seed=1)),
    "audio": ("audio", lambda: prompt([4, clip("audio", 5, 1), 2, clip("audio", 1, 2), 3], seed=1)),
    "video": ("vision", lambda: prompt([4, clip("vision", 5, 1), 3], seed=1)),  # longer in time than in height or width
    "windows": ("windowed", lambda: prompt([4, clip("windowed", 5, 1), 3], seed=1)),
    "omni": ("omni", lambda: prompt([4, clip("omni", 3, 1), 2, clip("omni", 4, 2), 1], seed=1)),
    "text and video": ("vision", lambda: prompt([4, clip("vision", 1, 1), 2, clip("vision", 4, 2), 1], seed=1)),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_shared_prompt_gives_the_values_and_gradients_of_separate_sequences(case):
    kind, make = SHARED[case]
    model, shared, other = tiny_model(kind), make(), prompt([8], seed=7, targets=2)
    completions = completions_of((3, 3, 1, 7, 7, 7, 2))
    weight_T = torch.randn(32, generator=torch.Generator().manual_seed(1))  # apart, so that no two targets can swap
    nll = {}

    def loss(name, batch):
        hidden_ND = model(batch)
        value, nll[name] = cross_entropy(hidden_ND, model.lm_head.weight, replace(batch, target_weight_T=weight_T))
        return value

    together = pack([other, Group(shared, completions)])
    apart = pack([other, *(joined(shared, completion_T) for completion_T in completions)])
    assert len(together.media) == len(shared.media)  # each clip is encoded once
    assert len(together.ids_N) == len(other) + len(shared) + 30 < len(apart.ids_N)
    assert torch.equal(together.target_id_T, apart.target_id_T)
    ours, ours_loss = gradients(model, lambda: loss("together", together))
    theirs, theirs_loss = gradients(model, lambda: loss("apart", apart))
    assert_close(nll["together"], nll["apart"])
    assert_close(ours_loss, theirs_loss)
    assert_same_gradients(ours, theirs)


def dense_attention(q_NHK, k_NJK, v_NJK, segments, causal=True):
    """The attention that minixmd must not use: one call under one N x N mask. It is also the plainest statement of what
    segments mean."""
    owner_N = torch.cat([torch.full((s.length,), i) for i, s in enumerate(segments)])
    parent_N = torch.cat([torch.full((s.length,), s.parent) for s in segments])
    row_N = torch.arange(len(owner_N))
    own_NN = (owner_N[:, None] == owner_N) & ((row_N[:, None] >= row_N) | (not causal))
    q, k, v = (x.transpose(0, 1) for x in (q_NHK, k_NJK, v_NJK))
    mask_NN = own_NN | (parent_N[:, None] == owner_N)
    o_1HNK = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask_NN, enable_gqa=True)
    return o_1HNK[0].transpose(0, 1)


def largest_tensor(kind, media, completions=100):
    """Of one step over a Group: the largest tensor's element count, N² and the gradients."""
    model = tiny_model(kind)
    batch = pack([Group(prompt([6, *media, 4], seed=1), completions_of([6, 6, 6, 5, 5] * (completions // 5)))])
    with Largest() as largest:
        grads, _ = gradients(model, lambda: cross_entropy(model(batch), model.lm_head.weight, batch)[0])
    return largest.numel, len(batch.ids_N) ** 2, grads


@pytest.mark.parametrize("case", ["text", "audio", "video"])
def test_no_tensor_has_as_many_elements_as_rows_squared(case):
    kind = "vision" if case == "video" else "audio"
    largest, square, _ = largest_tensor(kind, [] if case == "text" else [clip(kind, 2, 1)])
    assert largest < square / 2


@pytest.mark.parametrize("kind", KINDS)
def test_attention_under_a_dense_mask_gives_the_same_gradients_and_would_be_caught(kind, monkeypatch):
    _, _, ours = largest_tensor(kind, [])
    monkeypatch.setattr("minixmd.models.multimodal.packed_attention", dense_attention)
    largest, square, dense = largest_tensor(kind, [])
    assert largest >= square
    assert_same_gradients(ours, dense)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("J", [1, 2, 6])
def test_packed_attention_equals_one_masked_call_for_any_mix_of_segments(J, causal):
    lengths = [(3, -1), (3, -1), (1, -1), (5, -1)] + ([(2, 3), (2, 3), (4, 3), (2, 0), (1, 0)] if causal else [])
    batch = pack([prompt([length]) for length, _ in lengths])
    segments = Segments(replace(s, parent=parent) for s, (_, parent) in zip(batch.segments, lengths, strict=True))
    N = len(batch.ids_N)
    qkv = [torch.randn(N, heads, 8, requires_grad=True) for heads in (6, J, J)]
    upstream = torch.randn(N, 6, 8)
    o_NHK = dense_attention(*qkv, segments, causal)
    truth = o_NHK, *torch.autograd.grad(o_NHK, qkv, upstream)
    for attend in (packed_attention, partial(attend_at_once, attend=varlen_attn)):
        o_NHK = attend(*qkv, segments, causal)
        for ours, theirs in zip((o_NHK, *torch.autograd.grad(o_NHK, qkv, upstream)), truth, strict=True):
            assert_close(ours, theirs, 1e-6)


# ---- the key-value cache ----


SPEAKERS = [("audio", 2), ("vision", 2), ("vision", 1), ("windowed", 2), ("omni", 2)]


@pytest.fixture(scope="module", params=SPEAKERS, ids=lambda p: f"{p[0]}-{p[1]}kv")
def speaker(request, tmp_path_factory):
    """A model with peaked predictions, its Processor, and conversations of unlike lengths."""
    kind, kv = request.param
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, {"audio": AUDIO, "omni": OMNI}.get(kind, VISION))
    model = tiny_model(kind, kv, vocab=340).requires_grad_(False)
    processor = processor_of(folder, model.config)
    model.lm_head.weight.mul_(3)
    generator = torch.Generator().manual_seed(0)

    def media(size):
        if kind == "audio" or (kind == "omni" and size % 2):
            return {"type": "audio", "audio": 0.1 * torch.randn(1600 * size, generator=generator)}
        frames_TCHW = torch.randint(0, 256, (2 * size, 3, 56, 84), generator=generator, dtype=torch.uint8)
        return {"type": "video", "video": frames_TCHW, "min_pixels": 56 * 84}

    text = {"type": "text", "text": "Which sound is it?"}
    return model, processor, [
        [{"role": "user", "content": [media(3), text]}],
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": [text, media(5), media(2)]}],
    ]  # fmt: skip


def test_log_probabilities_while_generating_equal_those_of_scoring_the_whole_sequence(speaker):
    model, processor, conversations = speaker
    answers = generate(model, processor, conversations, num_samples=2, max_new_tokens=70, temperature=0.7, seed=3)
    suppressed_ids = torch.tensor(processor.suppressed_ids)
    lengths = []
    for conversation, completions in zip(conversations, answers, strict=True):
        start = processor(conversation)
        assert completions[0].ids != completions[1].ids
        for completion in completions:
            ids_T = torch.tensor(completion.ids)
            hidden_ND = model(pack([joined(start, ids_T)]))[len(start) - 1:-1]
            logits_TV = model.logits(hidden_ND).index_fill(1, suppressed_ids, -torch.inf) / 0.7
            logp_T = logits_TV.log_softmax(-1).gather(1, ids_T[:, None]).squeeze(1)
            assert (torch.tensor(completion.logprobs) - logp_T).abs().max() < 2e-5
            assert not set(completion.ids) & set(processor.suppressed_ids)
            lengths.append(len(ids_T))
        batch = pack([Group(start, tuple(torch.tensor(completion.ids) for completion in completions))])
        logits_TV = model.logits(model(batch)[batch.target_row_T]).index_fill(1, suppressed_ids, -torch.inf) / 0.7
        logp_T = logits_TV.log_softmax(-1).gather(1, batch.target_id_T[:, None]).squeeze(1)
        assert (torch.tensor([x for c in completions for x in c.logprobs]) - logp_T).abs().max() < 2e-5
    assert max(lengths) == 70  # the cache grew twice
