"""Decode attention: both backends against one softmax over prompt and suffix in fp64."""
import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as, assert_compiles, grid

from minixmd.kernels.decode import BLOCK_S, FP32_BLOCK_S, FP32_MOST_R, SPLIT, decode_attention

NAMES = ("q_BHK", "prompt_k_GJPK", "prompt_v_GJPK", "prompt_length_G", "members_GM", "prompt_B", "k_BJCK", "v_BJCK",
         "length_B")  # fmt: skip


def tables(prompt_of, num_prompts):
    """members_GM and prompt_B of decode slots that continue these prompts; None for none."""
    members = [[b for b, own in enumerate(prompt_of) if own == g] for g in range(num_prompts)]
    widest = max(1, *map(len, members))
    members_GM = torch.tensor([slots + [-1] * (widest - len(slots)) for slots in members])
    return members_GM, torch.tensor([-1 if g is None else g for g in prompt_of])


def problem(prompts, lengths, H, J, K, device="cpu", dtype=torch.float32, room=3, prompt_of=None):
    """Queries, and pools with `room` rows more than are used, in which NaN stands: values are 0 there, as generate
    leaves them. prompt_of: the prompt slot of each decode slot, or None; without it as many a prompt, in turn."""
    if prompt_of is None:
        prompt_of = [b * len(prompts) // len(lengths) for b in range(len(lengths))]
    G, B = len(prompts), len(lengths)
    prompt_2 = torch.randn(2, G, J, max(prompts) + room, K)
    own_2 = torch.randn(2, B, J, max(lengths) + room, K)
    for pool_2, used in ((prompt_2, prompts), (own_2, lengths)):
        for i, length in enumerate(used):
            pool_2[0, i, :, length:], pool_2[1, i, :, length:] = torch.nan, 0
    tensors = (torch.randn(B, H, K), *prompt_2, torch.tensor(prompts), *tables(prompt_of, G), *own_2,
               torch.tensor(lengths))  # fmt: skip
    return dict(zip(NAMES, (x.to(device, dtype if x.is_floating_point() else None) for x in tensors), strict=True))


def whole(p, dtype):
    """One softmax for every slot and head, over a copy of its keys and values."""
    H, J = p["q_BHK"].shape[1], p["k_BJCK"].shape[1]
    out_BHK = torch.empty_like(p["q_BHK"], dtype=dtype)
    for b, c in enumerate(p["length_B"].tolist()):
        g = p["prompt_B"][b]
        length = p["prompt_length_G"][g] if g >= 0 else 0
        k_JSK, v_JSK = (torch.cat([p[f"prompt_{x}_GJPK"][g, :, :length], p[f"{x}_BJCK"][b, :, :c]], 1).to(dtype)
                        for x in "kv")
        for h in range(H):
            k_SK, v_SK = k_JSK[h // (H // J)], v_JSK[h // (H // J)]
            w_S = (k_SK @ p["q_BHK"][b, h].to(dtype) / k_SK.shape[1] ** 0.5).softmax(0)
            out_BHK[b, h] = w_S @ v_SK
    return out_BHK


def check(p, backend):
    before = {name: x.clone() for name, x in p.items()}
    ours_BHK = decode_attention(**p, backend=backend)
    assert_as_good_as(ours_BHK, whole(p, p["q_BHK"].dtype), whole(p, torch.float64))
    assert all(torch.equal(x, before[name]) or x.isnan().any() for name, x in p.items())
    return ours_BHK


# prompts' lengths, completions a prompt, their lengths, query and kv heads, head size
SHAPES = {
    "a token after a token": ([1], [1], 1, 1, 16),
    "around a block": ([BLOCK_S, BLOCK_S + 1], [FP32_BLOCK_S, BLOCK_S - 1, 1, BLOCK_S + 1], 2, 2, 16),
    "around a split": ([SPLIT, SPLIT + 1, 3], [1, 2, 3], 2, 1, 32),
    "an odd head size": ([7, 19], [5, 1, 9, 2, 3, 17], 6, 2, 12),
    "seven heads a kv head": ([33], [2, 30, 1], 14, 2, 16),
    "more queries than a program takes": ([21, 5], [*range(1, 2 * FP32_MOST_R + 3)], 3, 1, 16),
    "several splits": ([2 * SPLIT + 40, 9], [3, 70], 2, 2, 16),
}  # fmt: skip


@pytest.mark.parametrize("shape, dtype, backend", grid(SHAPES, DTYPES, BACKENDS))
def test_prompt_and_suffix_are_one_softmax(shape, dtype, backend, device):
    check(problem(*shape, device, dtype), backend)


@pytest.mark.parametrize("prompt_of", [[1, 0, 1, 2, 0, 1], [2, None, 2, 0, None, 2], [0] * 6], ids=str)
@pytest.mark.parametrize("dtype, backend", grid(DTYPES, BACKENDS))
def test_completions_of_any_prompt_may_stand_in_any_slot(prompt_of, dtype, backend, device):
    p = problem([SPLIT + 9, 40, 7], [3, 20, 1, 9, 7, 2], 4, 2, 16, device, dtype, prompt_of=prompt_of)
    ours_BHK = check(p, backend)
    order_B = torch.tensor([4, 2, 0, 5, 1, 3])  # the same completions in other slots
    moved = {name: x[order_B] if name.endswith(("BHK", "BJCK", "_B")) else x for name, x in p.items()}
    moved["members_GM"], _ = tables([prompt_of[b] for b in order_B], 3)
    moved_BHK = decode_attention(**moved, backend=backend)
    if backend == "triton":
        assert torch.equal(moved_BHK, ours_BHK[order_B])
    else:
        torch.testing.assert_close(moved_BHK, ours_BHK[order_B])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["prompt", "suffix"])
def test_a_part_that_outweighs_the_other_by_e_200_is_the_result(part, backend, device):
    p = problem([SPLIT + 5], [4, 9], 2, 1, 16, device)
    mine, other = ("prompt_k_GJPK", "k_BJCK") if part == "prompt" else ("k_BJCK", "prompt_k_GJPK")
    p["q_BHK"][:] = 8.0
    p[mine][..., -1 - 3 if part == "prompt" else 0, :] = 7.0
    p[other][...] = torch.where(p[other].isnan(), torch.nan, -1.0)
    check(p, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_without_rows_of_its_own_sees_the_prompt_alone(backend, device):
    check(problem([5, 3], [0, 2, 0, 0], 4, 2, 16, device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_and_pools_may_lie_apart_in_memory(backend, device):
    p = problem([9, 4], [3, 5, 1, 2], 4, 2, 16, device)
    wide_BHK = torch.full((4, 8, 16), torch.nan, device=device)
    wide_BHK[:, ::2] = p["q_BHK"]
    views = dict(p, q_BHK=wide_BHK[:, ::2])
    for name in (name for name, x in p.items() if x.ndim == 4):
        wide = torch.full((2 * len(p[name]), 3, p[name].shape[2] + 2, 16), torch.nan, device=device)
        views[name] = wide[::2, 1:, 1:-1]
        views[name][:] = p[name]
    assert torch.equal(decode_attention(**views, backend=backend), check(p, backend))


def test_the_kernel_reads_nothing_past_a_length(device):
    p = problem([70, 5], [3, 20, 1, 9], 4, 2, 16, device)
    wanted_BHK = decode_attention(**p)
    for name in ("prompt_v_GJPK", "v_BJCK"):
        used = p[f"{name.partition('v_')[0]}length_{'G' if 'G' in name else 'B'}"]
        for i, length in enumerate(used.tolist()):
            p[name][i, :, length:] = torch.nan
    assert torch.equal(decode_attention(**p), wanted_BHK)


def test_a_slots_bits_depend_on_its_own_rows_alone(device):
    """In the kernel; PyTorch's products may sum in another order in another shape."""
    p = problem([SPLIT + 9, 40, 1], [3, 20, 1, 90, 7, 2], 4, 2, 16, device)
    together_BHK = decode_attention(**p)
    for g in range(3):
        decode_slots = slice(2 * g, 2 * g + 2)
        alone = {name: x[decode_slots] if "B" in name else x[g:g + 1] for name, x in p.items()}
        alone["members_GM"], alone["prompt_B"] = tables([0, 0], 1)
        for name in ("prompt_k_GJPK", "prompt_v_GJPK"):
            alone[name] = alone[name][:, :, :alone["prompt_length_G"].item()].contiguous()  # a smaller pool
        assert torch.equal(decode_attention(**alone), together_BHK[decode_slots])


def test_two_equal_keys_share_the_weight():  # small enough to check by hand
    one, length, slots = torch.ones(1, 1, 1, 16), torch.tensor([1]), tables([0], 1)
    for backend in BACKENDS:
        out_BHK = decode_attention(torch.ones(1, 1, 16), one, 2 * one, length, *slots, one, 6 * one, length, backend)
        torch.testing.assert_close(out_BHK, torch.full((1, 1, 16), 4.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_is_never_hidden(backend, device):
    for name, at in (("k_BJCK", (1, 0, 2)), ("v_BJCK", (1, 1, 0)), ("prompt_k_GJPK", (0, 0, 3))):
        p = problem([4], [3, 3], 2, 2, 16, device, room=0)
        p[name][at] = torch.nan
        hit_B = decode_attention(**p, backend=backend).isnan().flatten(1).any(1)
        assert hit_B.tolist() == [name.startswith("prompt"), True]


@pytest.mark.parametrize("change, message", [
    ({"q_BHK": torch.ones(3, 4, 16)}, "pools"), ({"q_BHK": torch.ones(4, 3, 16)}, "J dividing H"),
    ({"members_GM": torch.ones(3, 2).long()}, "slots"), ({"prompt_B": torch.ones(2).long()}, "slots"),
    ({"v_BJCK": torch.ones(4, 2, 6, 16)}, r"\(4, 2, 6, 16\)"), ({"length_B": torch.ones(2).long()}, "a length"),
    ({"backend": "cuda"}, "'cuda'"), ({"k_BJCK": torch.ones(4, 2, 16, 5).mT}, "equal strides"),
])  # fmt: skip
def test_bad_input_is_refused(change, message):
    good = problem([3, 4], [2, 1, 2, 2], 4, 2, 16)
    with pytest.raises(ValueError, match=message):
        decode_attention(**good | change)


@pytest.mark.slow
def test_the_kernels_compile_as_shipped_without_a_spill():
    assert_compiles("decode")
