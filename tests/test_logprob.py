"""Token log-probabilities: both backends against fp64 autograd, on sizes and rows where kernels go wrong."""
import pytest
import torch
from kernel_checks import BACKENDS, DTYPES, assert_as_good_as, assert_compiles, grid

from minixmd.kernels.logit_rows import BLOCK_V
from minixmd.kernels.logprob import logits_grad, row_stats, split_suppressed, token_logprob_ref

SIZES = [(0, 5), (1, 1), (3, BLOCK_V), (2, BLOCK_V + 1), (70, 123), (2, 3 * BLOCK_V + 17)]


def run(backend, logits_NV, index_N, coef_N, *options):
    """Log-probs, entropies and the gradient of the logits."""
    stats = row_stats(logits_NV, index_N, *options, backend)
    return *stats[:2], logits_grad(logits_NV, index_N, stats, coef_N, *options, backend)


def run_ref(logits_NV, index_N, coef_N, *options):
    """The same from the PyTorch twin and autograd."""
    x_NV = logits_NV.detach().requires_grad_()  # no clone, which would pack the rows
    logp_N, entropy_N = token_logprob_ref(x_NV, index_N, *options)
    logp_N.backward(coef_N.to(logp_N.dtype))
    return logp_N.detach(), entropy_N, x_NV.grad


def check(backend, logits_NV, index_N, temperature=1.0, suppressed_Z=None, vocab_limit=None):
    """The backend is as good as eager: value, entropy, gradient."""
    args = index_N, torch.randn(len(logits_NV), device=logits_NV.device), temperature, suppressed_Z, vocab_limit
    before_NV = logits_NV.clone()
    runs = run(backend, logits_NV, *args), run_ref(logits_NV, *args), run_ref(logits_NV.double(), *args)
    assert torch.equal(logits_NV, before_NV)
    for ours, eager, truth in zip(*runs, strict=True):
        assert_as_good_as(ours, eager, truth)
    return runs[0]


@pytest.mark.parametrize("size, temperature, dtype, backend", grid(SIZES, [1.0, 0.7], DTYPES, BACKENDS))
def test_value_entropy_and_gradient_at_sizes_around_a_block(size, temperature, dtype, backend, device):
    N, V = size
    logits_NV = (5 * torch.randn(N, V, device=device)).to(dtype)  # quantised once: all three see the same numbers
    check(backend, logits_NV, torch.randint(0, V, (N,), device=device), temperature)


@pytest.mark.parametrize("dtype, backend", grid(DTYPES, BACKENDS))
def test_rows_that_break_an_online_softmax(dtype, backend, device):
    V = 2 * BLOCK_V + 5
    ramp_V, sign_V = torch.linspace(-1e4, 1e4, V), torch.where(torch.arange(V) % 2 == 0, 1e4, -1e4)
    alone_V, late_V = torch.full((V,), -torch.inf), 3 * torch.randn(V)
    alone_V[V - 2] = -7.0
    late_V[:BLOCK_V + 3] = -torch.inf
    rows = {"rising": (ramp_V, V - 2), "falling": (ramp_V.flip(0), V - 1), "alternating": (sign_V, 1),
            "all but one -inf": (alone_V, V - 2), "first block -inf": (late_V, V - 1), "equal": (torch.ones(V) * 9, 3),
            "equal and huge": (torch.full((V,), -3e4), 3), "peak in the middle": (late_V.roll(BLOCK_V), BLOCK_V),
            "peak at the end": (torch.cat([torch.zeros(V - 1), torch.tensor([1e4])]), V - 1)}  # fmt: skip
    logits_NV = torch.stack([row for row, _ in rows.values()]).to(device, dtype)
    index_N = torch.tensor([index for _, index in rows.values()], device=device)
    logp_N, entropy_N, _ = check(backend, logits_NV, index_N)
    check(backend, logits_NV, index_N, 0.7)
    names = list(rows)
    assert logp_N[names.index("all but one -inf")] == 0 and entropy_N[names.index("all but one -inf")] == 0
    assert abs(entropy_N[names.index("equal and huge")] - torch.tensor(V).log()) < 1e-5


SUPPRESSED = {"tail": (None, BLOCK_V + 7), "tail of whole blocks": (None, BLOCK_V), "first": ([0], None),
              "block's edges": ([BLOCK_V - 1, BLOCK_V], None), "list and tail": ([2, BLOCK_V + 1], 2 * BLOCK_V + 3),
              "ends apart": ([1, 2 * BLOCK_V + 8], None), "one left": (list(range(40)), 41)}  # fmt: skip


@pytest.mark.parametrize("suppressed, dtype, backend", grid(SUPPRESSED, DTYPES, BACKENDS))
def test_suppressed_ids_count_for_nothing_whatever_they_hold(suppressed, backend, dtype, device):
    listed, vocab_limit = suppressed
    N, V = 3, 2 * BLOCK_V + 9
    suppressed_Z = None if listed is None else torch.tensor(listed, device=device).repeat_interleave(2)[::2]  # apart
    out = (listed or []) + list(range(V if vocab_limit is None else vocab_limit, V))
    kept = torch.tensor(sorted(set(range(V)) - set(out)), device=device)
    logits_NV = (3 * torch.randn(N, V, device=device)).to(dtype)
    logits_NV[:, out] = 1e4  # one of them in the sum would drown all others
    index_N = kept[torch.randint(0, len(kept), (N,), device=device)]
    logp_N, entropy_N, grad_NV = check(backend, logits_NV, index_N, 0.7, suppressed_Z, vocab_limit)
    coef_N = torch.randn(N, device=device)
    for filler in (torch.nan, torch.inf, -torch.inf):
        logits_NV[:, out] = filler
        again = run(backend, logits_NV, index_N, coef_N, 0.7, suppressed_Z, vocab_limit)
        assert torch.equal(again[0], logp_N) and torch.equal(again[1], entropy_N)
        assert again[2].isfinite().all() and (again[2][:, out] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_suppressed_or_impossible_index_has_log_probability_minus_infinity(backend, device):
    logits_NV = torch.randn(5, 9, device=device)
    index_N, suppressed_Z = torch.tensor([-1, 9, 2, 7, 3], device=device), torch.tensor([2, 4], device=device)
    stats = row_stats(logits_NV, index_N, 0.5, suppressed_Z, 7, backend)
    assert (stats[0][:4] == -torch.inf).all() and stats[0][4].isfinite()
    p_NV = torch.softmax(logits_NV.index_fill(1, torch.tensor([2, 4, 7, 8], device=device), -torch.inf) / 0.5, -1)
    grad_NV = logits_grad(logits_NV, index_N, stats, torch.ones(5, device=device), 0.5, suppressed_Z, 7, backend)
    torch.testing.assert_close(grad_NV[:4], -p_NV[:4] / 0.5, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype, backend", grid(DTYPES, BACKENDS))
def test_rows_may_lie_apart_in_memory_and_vectors_too(backend, dtype, device):
    V = BLOCK_V + 3
    wide = torch.full((4, V + 13), torch.nan, device=device, dtype=dtype)
    wide[:, :V] = torch.randn(4, V, device=device)
    index_N = torch.randint(0, V, (8,), device=device)[::2]
    check(backend, wide[:, :V], index_N)
    check(backend, wide[::2, :V], index_N[1::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [pytest.param(152_064, marks=pytest.mark.slow), 156_032])
def test_the_real_vocabularies(V, backend, device):
    logits_NV = 4 * torch.randn(2, V, device=device)
    suppressed_Z = torch.tensor([151_643, 151_644, *range(151_646, 151_657)], device=device)
    check(backend, logits_NV, torch.tensor([151_645, 17], device=device), 0.9, suppressed_Z, 151_665)


@pytest.mark.parametrize("dtype, backend", grid(DTYPES, BACKENDS))
def test_the_gradient_is_written_to_the_given_tensor(backend, dtype, device):
    N, V = 3, BLOCK_V + 9
    logits_NV = (2 * torch.randn(N, V, device=device)).to(dtype)
    index_N, coef_N = torch.tensor([5, V - 1, 8], device=device), torch.tensor([1.0, -2.0, 0.5], device=device)
    options = 0.8, torch.tensor([3, BLOCK_V], device=device), V - 2, backend
    stats = row_stats(logits_NV, index_N, *options)
    fresh_NV = logits_grad(logits_NV, index_N, stats, coef_N, *options)
    exact_NV = torch.full((N, 2 * V), torch.nan, device=device)[:, :V]  # fp32, rows apart
    assert logits_grad(logits_NV, index_N, stats, coef_N, *options, out=exact_NV) is exact_NV
    assert torch.equal(exact_NV.to(dtype), fresh_NV) and fresh_NV.dtype == dtype
    assert torch.equal(exact_NV, logits_grad(logits_NV.float(), index_N, stats, coef_N, *options))  # never rounded
    half_NV = logits_grad(logits_NV, index_N, stats, coef_N, *options, out=torch.empty(N, V, device=device).half())
    assert torch.equal(exact_NV.half(), half_NV)
    own_NV = logits_NV.clone()
    assert logits_grad(own_NV, index_N, stats, coef_N, *options, out=own_NV) is own_NV
    assert torch.equal(own_NV, fresh_NV)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_a_coefficient_gets_zeros_and_a_nan_is_never_hidden(backend, device):
    logits_NV = torch.randn(3, BLOCK_V + 1, device=device)
    logits_NV[:2, 7] = torch.nan
    index_N = torch.zeros(3, dtype=torch.long, device=device)
    stats = row_stats(logits_NV, index_N, backend=backend)
    assert stats[0].isnan().tolist() == [True, True, False]
    grad_NV = logits_grad(logits_NV, index_N, stats, torch.tensor([0.0, 1.0, 1.0], device=device), backend=backend)
    assert (grad_NV[0] == 0).all() and grad_NV[1].isnan().all() and grad_NV[2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_equal_logits_halve_the_mass(backend, device):  # small enough to check by hand
    logits_NV, index_N = torch.tensor([[2.0, 2.0, 9.0]], device=device), torch.tensor([0], device=device)
    logp_N, entropy_N, grad_NV = run(backend, logits_NV, index_N, torch.ones(1, device=device), 0.5, None, 2)
    torch.testing.assert_close(logp_N.cpu(), torch.tensor([0.5]).log())
    torch.testing.assert_close(entropy_N.cpu(), torch.tensor([2.0]).log())
    torch.testing.assert_close(grad_NV.cpu(), torch.tensor([[1.0, -1.0, 0.0]]))


def test_split_suppressed_takes_the_tail_off_a_sorted_list():
    assert split_suppressed([1, 3, 6, 7], 8) == (6, [1, 3])
    assert split_suppressed([1, 3, 6], 8) == (8, [1, 3, 6])
    assert split_suppressed([], 8) == (8, [])
    assert split_suppressed((6, 7), 8) == (6, [])


@pytest.mark.parametrize("change, message", [
    ({"logits_NV": torch.ones(8, 4).T}, "unit stride"), ({"logits_NV": torch.ones(4)}, "unit stride"),
    ({"index_N": torch.ones(3, dtype=torch.long)}, r"\(3,\)"), ({"temperature": 0.0}, "got 0.0"),
    ({"vocab_limit": 0}, "vocab_limit or common_vocab in"), ({"vocab_limit": 9}, r"\[1, 8\]"),
    ({"backend": "cuda"}, "'cuda'"),
])  # fmt: skip
def test_bad_input_is_refused(change, message):
    good = {"logits_NV": torch.ones(4, 8), "index_N": torch.ones(4, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        row_stats(**good | change)


def test_an_out_of_another_shape_is_refused():
    logits_NV, index_N = torch.ones(4, 8), torch.ones(4, dtype=torch.long)
    stats = row_stats(logits_NV, index_N, backend="torch")
    with pytest.raises(ValueError, match=r"out must be \(4, 8\)"):
        logits_grad(logits_NV, index_N, stats, torch.ones(4), backend="torch", out=torch.ones(4, 9))
    with pytest.raises(ValueError, match="vectors of 4"):
        logits_grad(logits_NV, index_N, stats, torch.ones(4, 1), backend="torch")


@pytest.mark.slow
def test_the_kernels_compile_as_shipped_without_a_spill():
    assert_compiles("logprob")
