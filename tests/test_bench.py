"""The benches: what they count, that they refuse to time wrong code, and how bench/gpu.sh runs those of the kernels."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    bench_adamw,
    bench_decode,
    bench_distill,
    bench_grpo,
    bench_logprob,
    bench_lora,
    bench_passes,
    bench_slots,
    measure,
)
from minixmd.learning import decoder, kv_cache  # noqa: E402

SCRIPTS = {"logprob": bench_logprob, "grpo": bench_grpo, "distill": bench_distill, "lora": bench_lora,
           "decode": bench_decode, "passes": bench_passes, "adamw": bench_adamw}
KERNEL = '''
import triton
import triton.language as tl


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N), mask=i < N)


CONFIGS = [(_copy_kernel, "*fp32:16 *bf16:16 i32", {"BLOCK": 1024}, 4, 3, "row")]
'''


EACH = """
import runpy, sys
for name in {names}:
    sys.argv = ["bench", "--small", "--device", "{device}", "--out", f"{folder}/new/{{name}}.json"]
    runpy.run_module(f"bench.bench_{{name}}", run_name="__main__")
"""


def run(device, folder):
    """Every script as `python -m` runs it, but in one process, for importing takes most of the time. {name: result}"""
    code = EACH.format(names=list(SCRIPTS), device=device, folder=folder)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=500,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: json.loads((folder / "new" / f"{name}.json").read_text()) for name in SCRIPTS}
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert printed == list(found.values()) and done.stdout.splitlines()[-1].startswith("{")
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return run("cpu", tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_counts_on_a_cpu_and_ends_with_json(name, counted):
    result = counted[name]
    assert result["bench"] == f"bench_{name}" and result["device"] == "cpu" and result["ceilings"] is None
    assert {"torch", "triton", "commit", "dirty", "gpu", "date", "trl", "liger-kernel", "peft"} <= set(result["env"])
    rows = {(row["of"], row["side"]): row for row in result["rows"]}
    assert {side for _, side in rows} >= {"triton", "torch", "ref"}
    for (of, _), row in rows.items():
        assert row["bytes"] > 0 and row["over"] == row["bytes"] / rows[of, "triton"]["bytes"]
        assert not {"ms", "gb_per_s", "tflop_per_s", "percent", "failed"} & set(row)  # a CPU says nothing about time
    if name == "logprob":
        N, V = (rows["value", "triton"][key] for key in "NV")
        assert rows["value", "triton"]["bytes"] == N * V * 4 + N * 24
        assert rows["gradient", "triton"]["bytes"] == N * V * (4 + 4 + 2) + N * 44
        assert rows["gradient", "triton"]["peak_bytes"] == N * V * 2 + N * 16
    if name == "lora":
        flops = {side: row["flop"] for (of, side), row in rows.items() if of == "whole"}
        assert flops["triton"] == flops["torch"] == flops["ref"] > flops["bare"]  # by formula, and counted
        if result["env"]["peft"]:  # without what building it takes: it casts the adapter once, our ref every time
            assert 0 < rows["forward", "peft"]["bytes"] < rows["forward", "ref"]["bytes"]
    if name == "adamw":
        N = rows["update, moments 8bit", "triton"]["size"]
        assert rows["update, moments float32", "triton"]["bytes"] == 26 * N
        blocks = -(-N // 256)
        assert rows["update, moments 8bit", "triton"]["bytes"] == 10 * N + 2 * 2 * (256 + 4) * blocks
        assert rows["update, moments float32", "ref"]["bytes"] == 98 * N
    if name == "decode":
        lengths, parts = 276 + 1 + 10 + 20, 3 * 2  # of 4 heads, 2 of them with keys, of 32; 276 rows are 2 splits
        slots = 3 * (8 + 8 + 8) + 8 * 2 * parts  # lengths and prompts of 3 decode slots, and who continues a prompt
        moved = 4 * (2 * 2 * 32 * lengths + 2 * 3 * 4 * 32 + 2 * 4 * 33 * parts) + slots
        assert rows["step", "triton"]["bytes"] == moved
        whole, products = rows["whole step", "triton"], 2 * (4 * 32 * 32 + 3 * 32 * 48) + 300 * 32
        assert whole["weight_bytes"] == 4 * (products + 2 * (3 * 32 + 2 * 32) + 32)  # with biases and gains
        assert whole["flop"] == 2 * 2 * products and whole["kv_bytes"] == 4 * 2 * 2 * 32 * (5 + 2 * 6)
        assert whole["bytes"] > whole["weight_bytes"] + whole["kv_bytes"] and "capture_s" not in whole
        assert 0 < whole["logp_gap_mean"] < whole["logp_gap_max"] < 1e-4


@pytest.mark.gpu
def test_the_scripts_time_on_a_gpu(tmp_path):
    for result in run("cuda", tmp_path).values():
        assert result["ceilings"]["gb_per_s"] > 0 and result["ceilings"]["tflop_per_s"] > 0
        for row in result["rows"]:
            assert "failed" in row or row["ms"] > 0 and row["peak_bytes"] >= 0 and row["over"] > 0, row


# ---- parity first ----


def scaled(function, at):
    """The function with one result off by 2 % where it is called for Triton."""
    def wrong(*args, **options):
        results = list(function(*args, **options))
        results[at] = results[at] * 1.02
        return tuple(results)

    return wrong


def spoilt(function):
    """The function with what it writes to its `out`, its only (N, V) bf16 tensor, off by 2 %, for Triton."""
    def wrong(*args, **options):
        results = function(*args, **options)
        if "triton" in (*args, *options.values()):
            for x in (*args, *options.values()):
                if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16:
                    x.mul_(1.02)
        return results

    return wrong


def spoilt_update(function):
    """The update with its weights off by 2 %, for Triton with 8-bit moments."""
    def wrong(p, grad, state, t, **options):
        function(p, grad, state, t, **options)
        if options["backend"] == "triton" and "exp_avg_scale" in state:
            p.mul_(1.02)

    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("name, module, function, spoil", [
    ("logprob", bench_logprob, "logits_grad", spoilt), ("logprob", bench_logprob, "row_stats", lambda f: scaled(f, 1)),
    ("grpo", bench_grpo, "grpo_rows", spoilt), ("grpo", bench_grpo, "grpo_rows", lambda f: scaled(f, 0)),
    ("distill", bench_distill.distill, "distill_kl_grad", spoilt),
    ("distill", bench_distill.distill_topk, "distill_topk_grad", spoilt),
    ("lora", bench_lora.lora_triton, "dy_pass", lambda f: scaled(f, 0)),
    ("lora", bench_lora.lora_triton, "lora_forward", lambda f: lambda *args: f(*args) * 1.02),
    ("decode", bench_decode, "decode_attention", lambda f: lambda *args: f(*args) * 1.02),
    ("passes", bench_passes, "rms_norm", lambda f: lambda *args: tuple(x * 1.02 for x in f(*args))),
    ("passes", bench_passes, "rotate", lambda f: lambda *args: tuple(x * 1.02 for x in f(*args))),
    ("passes", bench_passes.swiglu, "swiglu", lambda f: lambda *args: f(*args) * 1.02),
    ("adamw", bench_adamw, "adamw_update", spoilt_update),
])  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's tensors need the interpreter")
def test_wrong_code_is_not_measured(name, module, function, spoil, monkeypatch):
    measured = []
    monkeypatch.setattr(measure.Bench, "rows", lambda self, case, *_, **__: measured.append(case["of"]) or {})
    SCRIPTS[name].main(["--small", "--device", "cpu"])
    right, wrong = measured.copy(), getattr(module, function)
    measured.clear()
    monkeypatch.setattr(module, function, spoil(wrong))
    with pytest.raises(ValueError, match="parity: .* error of triton's result .* nothing is timed"):
        SCRIPTS[name].main(["--small", "--device", "cpu"])
    assert right and measured == right[:len(measured)] and len(measured) < len(right)  # what is right comes first


@pytest.mark.parametrize("name, ours, verdict", [
    ("as good as ref", [1.0, 1.0001e-6, 2.0001e-6], None),
    ("the small ones are off, which the largest error does not see", [1.0, 2e-6, 4e-6], "mean"),
    ("and no more than that", [1.0, 1.00011e-6, 2.00022e-6], "mean"),
    ("the large one is off", [1.1, 1e-6, 2e-6], "largest"), ("not a number", [1.0, float("nan"), 2e-6], "largest"),
])  # fmt: skip
@pytest.mark.parametrize("which", ["triton", "torch"])
def test_large_and_small_errors_are_seen(name, ours, verdict, which):
    truth = torch.tensor([1.0, *[1e-6, 2e-6] * 50_000], dtype=torch.float64)
    ours = torch.tensor([ours[0], *ours[1:] * 50_000])
    sides = {"triton": lambda: (truth.float(),), "torch": lambda: (truth.float(),), "ref": lambda: (truth.float(),)}
    sides[which] = lambda: (ours,)
    if verdict is None:
        measure.check(sides, lambda: (truth,), list)
    else:
        with pytest.raises(ValueError, match=f"parity: the {verdict} error of {which}'s result 0"):
            measure.check(sides, lambda: (truth,), list)


# ---- the whole step of bench_decode ----


@pytest.fixture
def whole_step(monkeypatch):
    """bench_decode.whole_step of sizes, with the attention in PyTorch: the interpreter is slow."""
    attend = bench_decode.decode.decode_attention_ref
    monkeypatch.setattr(kv_cache, "decode_attention", lambda *args: attend(*args[:-1]))
    bench = measure.Bench("bench_x: y.", ["--device", "cpu", "--small"])
    model = bench_decode.random_model("cpu", torch.float32, bench_decode.SMALL_TEXT)
    return lambda *sizes: bench_decode.whole_step(bench, model, "small", *sizes)


@pytest.mark.parametrize("owner, name, wrong", [
    (kv_cache, "decode_attention", lambda right: lambda *args: right(*args) * 1.02),
    (bench_decode, "reference_logprobs", lambda right: lambda model, parts, *more: right(model, parts[::-1], *more)),
    (decoder, "sample", lambda right: lambda z, u, temperature, suppressed_ids: right(z, u, 1.02, suppressed_ids)),
])  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's tensors need the interpreter")
def test_a_wrong_decode_step_is_not_timed(whole_step, owner, name, wrong, monkeypatch):
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    with pytest.raises(ValueError, match="parity: log-probs of sampling and training differ .*; nothing is timed"):
        whole_step(2, 2, 5, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's tensors need the interpreter")
def test_a_captured_step_is_the_same_each_time_and_its_cost_is_beside_the_pools(whole_step, monkeypatch):
    made, init, found = [], decoder.Decoder.__init__, {}

    def captured(self, *args, **options):
        init(self, *args, **options)
        self.captured = True  # as on a GPU, but for the graph
        made.append(self)

    def rows(self, case, sides, moved, module):
        found.update(case, moved=moved, sides=list(sides))
        for side in sides.values():
            for _ in range(decoder.STEPS_PER_SYNC + 1):
                side()
                assert made[0].cache.length_B.tolist() == [6 // 2 + 1] * 2

    pools = 4 * 2 * 2 * 32 * (3 + 2 * 5)
    free = iter((2**30, 2**30 - pools - 3 * 2**20))
    monkeypatch.setattr(decoder.Decoder, "__init__", captured)
    monkeypatch.setattr(measure.Bench, "rows", rows)
    monkeypatch.setattr(bench_decode, "free_bytes", lambda device: next(free))
    whole_step(1, 2, 3, 6)
    assert found["sides"] == ["triton", "eager"] and found["moved"] == found["weight_bytes"] + found["kv_bytes"]
    assert found["capture_mib"] == 3 and found["capture_s"] > 0


# ---- bench_slots ----


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("completions, least", bench_slots.TARGETS.items())
def test_decode_slots_stay_busy(completions, least, captured, monkeypatch):
    lengths = sum((bench_slots.drawn_lengths(completions, seed) for seed in range(2)), [])[:completions]
    found = bench_slots.write(lengths, bench_slots.SLOTS, bench_slots.SAMPLES, captured)
    assert found["use"] >= least - 0.03 and found["prefilled"] == completions // 8 * bench_slots.PROMPT
    before = bench_slots.by_prompts(lengths, bench_slots.SLOTS, bench_slots.SAMPLES, 1)
    assert before["rows"] > (1.3 if completions > 192 else 1.0) * found["rows"]
    monkeypatch.setattr(bench_slots, "prompt_slots_for", lambda slots, n, prompts: slots // n)  # as before
    if captured:
        fewer = bench_slots.write(lengths, bench_slots.SLOTS, bench_slots.SAMPLES, captured)
        assert fewer["use"] < found["use"] - 0.1


# ---- bench_grpo_step ----


@pytest.fixture
def load_bench():
    """Imports a bench that compares with transformers."""
    pytest.importorskip("transformers"), pytest.importorskip("peft")
    threads = torch.get_num_threads()
    yield lambda name: importlib.import_module(f"bench.bench_{name}")
    torch.set_num_threads(threads)


@pytest.fixture
def grpo_step_bench(load_bench):
    return load_bench("grpo_step")


@pytest.mark.slow
def test_a_grpo_step_is_counted_and_ends_with_json(grpo_step_bench, tmp_path, capsys, monkeypatch):
    config = json.loads(grpo_step_bench.SEVEN_B.read_text())
    config["text_config"]["num_hidden_layers"] = 1  # of 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(grpo_step_bench, "SEVEN_B", tmp_path / "config.json")
    grpo_step_bench.main(["--small", "--rounds", "2", "--out", str(tmp_path / "x.json")])
    result = json.loads((tmp_path / "x.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    *sharing, memory, encoders, step, pool = result["rows"]
    P, n, C = result["prompt_tokens"], 3, 6
    sizes = (5000, 32, 48, 2, 2), (156_032, 4096, 11_008, 1, 0)  # in the last place: layers whose q kᵀ is made again
    for row, (V, D, F, layers, again) in zip(sharing, sizes, strict=True):
        for name, rows, seen in (("shared", P + n * C, P**2 + n * C * (P + C)), ("apart", n * (P + C), n * (P + C)**2)):
            head = n * C * V * D
            forward = layers * (rows * (4 * D * D + 3 * D * F) + 2 * seen * D) + head
            assert row["flop"][name] == {"scoring": 2 * forward, "update": 2 * (3 * forward + again * seen * D + head)}
        assert row["share"]["both"] == sum(row["flop"]["shared"].values()) / sum(row["flop"]["apart"].values())
    assert encoders["clips"] == {"minixmd": 1, "transformers": 9}  # one a completion and pass
    assert memory["peak_bytes"]["log_softmax"] > 4 * 70 * 500 * 4 and pool["bytes"] <= pool["target"]
    assert set(step["ratio"]) == {"rollout", "update", "whole", "wall"} and min(step["ratio"].values()) > 0
    with pytest.raises(SystemExit):
        grpo_step_bench.main(["--small", "--device", "cuda"])


@pytest.mark.slow
@pytest.mark.parametrize("side, name, wrong", [
    ("apart", "groups_of",
     lambda right: lambda prompt, ids_GC, shared: right(prompt, ids_GC.roll(int(shared)), shared)),
    ("transformers", "Rollout",
     lambda right: lambda *counts, advantage_T, **named: right(*counts, advantage_T=1.001 * advantage_T, **named)),
])  # fmt: skip
def test_a_wrong_grpo_step_is_not_timed(grpo_step_bench, side, name, wrong, monkeypatch):
    monkeypatch.setattr(grpo_step_bench, name, wrong(getattr(grpo_step_bench, name)))
    with pytest.raises(ValueError, match=f"parity: .* against {side} differ .*; nothing is timed"):
        grpo_step_bench.main(["--small"])


# ---- the other benches against transformers, and bench_head ----

# PEFT asks transformers for an attribute by its old name
PEFT_WARNING = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.slow
@PEFT_WARNING
@pytest.mark.parametrize("name, argv, rows", [
    ("train", ["--rounds", "1", "--threads", "1"], ["equal lengths", "mixed lengths", "memory"]),
    ("label", ["--rounds", "1", "--threads", "1"], ["equal lengths", "mixed lengths"]),
    ("load", ["--rounds", "1", "--threads", "1"], ["minixmd", "transformers"] * 2),
    ("head", ["--device", "cpu"], ["triton", "torch", "grpo", "ref"]),
])  # fmt: skip
def test_a_bench_tries_itself_on_tiny_sizes_and_ends_with_json(load_bench, tmp_path, capsys, name, argv, rows):
    load_bench(name).main(["--small", "--out", str(tmp_path / "x.json"), *argv])
    result = json.loads((tmp_path / "x.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["bench"] == f"bench_{name}" and result["small"]
    titles = [row.get("what") or row["side"] for row in result["rows"]]
    assert [title for title in titles if title not in ("trl", "liger")] == rows


@pytest.mark.slow
def test_bench_prepare_counts_clips_and_rows(load_bench, tmp_path):
    load_bench("prepare").main(["--small", "--rounds", "1", "--clips", "2", "--out", str(tmp_path / "x.json")])
    result = json.loads((tmp_path / "x.json").read_text())
    assert [row["rows"] for row in result["memory"]] == [500, 1500] and result["ratio"]["1"] == [1.0]


@pytest.mark.slow
@PEFT_WARNING
def test_a_wrong_distillation_step_is_not_timed(load_bench, monkeypatch):
    bench, right = load_bench("train"), load_bench("train").Trainer.cross_entropy
    monkeypatch.setattr(bench.Trainer, "cross_entropy", lambda *args: 1.001 * right(*args))
    with pytest.raises(ValueError, match="parity: needed rows has loss .*; nothing is timed"):
        bench.main(["--small", "--rounds", "1"])


# ---- several processes ----


@pytest.mark.slow
def test_bench_processes_counts_what_is_sent_and_held(load_bench, tmp_path):
    load_bench("processes").main(["--small", "--rounds", "1", "--out", str(tmp_path / "x.json")])
    result = json.loads((tmp_path / "x.json").read_text())  # times and peaks of tiny sizes may miss their targets
    assert len(result["work"]) == 7 and all(row["ratio"]["median"] > 0 for row in result["work"])
    assert len(result["bytes"]) == 6 and all(abs(row["ratio"] - 1) < 1e-3 for row in result["bytes"])
    assert all(0 < row["objects"] < 10_000 for row in result["bytes"])
    one, *two = result["memory"]
    for name in ("trained", "gradients", "optimizer", "reference"):
        assert all(row["tensors"][name] / one["tensors"][name] == pytest.approx(0.5, rel=1e-3) for row in two)
    assert all(row["tensors"]["frozen"] == one["tensors"]["frozen"] for row in two)


def test_bytes_that_a_process_sends_can_be_counted_by_hand(load_bench):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist, bench = torch.distributed, load_bench("processes")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        with bench.Collectives() as counter:
            dist.all_reduce(torch.ones(100))
            dist.all_gather_single(torch.empty(400), torch.ones(100))
            dist.reduce_scatter_single(torch.empty(100), torch.ones(400))
            dist.broadcast(torch.ones(100), src=0)  # another sends it
            dist.all_gather_object([None] * 4, "word")
            sent = dict(counter.sent)
            with pytest.raises(KeyError):
                dist.all_to_all_single(torch.empty(100), torch.ones(100))
    finally:
        dist.destroy_process_group()
    objects = sent.pop("objects")
    assert sent == {"all-reduce": 600, "all-gather": 1200, "reduce-scatter": 1200, "broadcast": 0} and objects > 24


# ---- what is measured ----

ONE_N1 = torch.zeros(100, 1, dtype=torch.long)  # 800 bytes


@pytest.mark.parametrize("name, side, wanted", [  # x is (100, 50) fp32: 20,000 bytes
    ("an input and a result", lambda x: x * 2, 40_000),
    ("a product", lambda x: x @ x.T, 2 * 20_000 + 40_000),
    ("views are free", lambda x: x.T[3:].detach().view(1, 47, 100), 0),
    ("what is only allocated too", torch.empty_like, 0),
    ("in place is read and written", lambda x: x.mul_(1), 40_000),
    ("a fill is not read", lambda x: x[:2].fill_(1.0), 400),
    ("a copy's target is not read", lambda x: torch.zeros(100, 50).copy_(x), 20_000 + 40_000),
    ("a gather reads what comes out", lambda x: x.gather(1, ONE_N1), 800 + 2 * 400),
    ("rows that are picked", lambda x: x[ONE_N1[:2, 0]], 16 + 2 * 400),
    ("a scatter writes what is given", lambda x: x.scatter_add_(1, ONE_N1, x[:, :1]), 2 * (800 + 400)),
    ("an expanded number is one", lambda x: torch.zeros(1).expand(100, 50) + x, 4 + 4 + 40_000),
])  # fmt: skip
def test_bytes_of_operators_can_be_counted_by_hand(name, side, wanted):
    x = torch.ones(100, 50)
    with measure.Traffic() as counter:
        side(x)
    assert counter.bytes == wanted


def test_peak_memory_and_flops_can_be_counted_by_hand():
    a, b = torch.ones(100, 200), torch.ones(200, 300)

    def side():
        first = torch.ones(1000)  # 4,000 bytes, gone before the product
        del first
        return (a @ b).addmm_(a, b)

    assert measure.peak(side, "cpu") == 100 * 300 * 4
    assert measure.flops(side) == 2 * 2 * 100 * 200 * 300
    assert measure.peak(lambda: torch.ones(100) + torch.ones(100), "cpu") == 3 * 400


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's tensors need the interpreter")
def test_a_kernel_does_nothing_while_its_launches_are_left_out():
    logits_NV, index_N = torch.randn(2, 9), torch.tensor([1, 3])
    right = bench_logprob.row_stats(logits_NV, index_N)[0]
    with measure.unlaunched(bench_logprob.logprob):
        assert bench_logprob.row_stats(logits_NV, index_N)[0].isnan().all()  # conftest's torch.empty
    assert torch.equal(bench_logprob.row_stats(logits_NV, index_N)[0], right)


@pytest.mark.slow
def test_resources_of_a_kernel_are_read_from_the_report(tmp_path):
    (tmp_path / "copy.py").write_text(KERNEL)
    (row,) = measure.kernel_resources(tmp_path / "copy.py", archs=[90])
    assert row["kernel"] == "copy.copy" and row["pointers"] == "fp32 bf16" and row["constants"] == "1024"
    assert (row["warps"], row["stages"], row["sm"], row["spill"], row["verdict"]) == (4, 3, 90, 0, "ok")
    assert row["registers"] > 0 and row["mma"] == row["wgmma"] == 0


def test_a_bad_kernel_ends_the_bench(monkeypatch):
    bad = subprocess.CompletedProcess([], 1, stdout="copy.copy ... spills", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: bad)
    with pytest.raises(RuntimeError, match="spills"):
        measure.kernel_resources("copy.py")


class Event:
    """A CUDA event without CUDA: the n-th pair is n milliseconds apart."""

    made, calls = 0, []

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made += 1
        self.number = Event.made

    def record(self):
        Event.calls.append(self.number)

    def elapsed_time(self, end):
        assert end.number == self.number + 1
        return end.number / 2


@pytest.fixture
def card(monkeypatch):
    """As if there were a GPU of 4,000 GB/s and 800 TFLOP/s, on which a side sleeps for as long as it says."""
    monkeypatch.setattr(measure, "ceilings", lambda: {"gb_per_s": 4000.0, "tflop_per_s": 800.0})
    monkeypatch.setattr(measure, "timing", lambda side: dict.fromkeys(("ms", "p20_ms", "p80_ms"), side()[0].item()))
    monkeypatch.setattr(measure, "peak", lambda side, device: 5)


def test_times_are_of_the_events_around_each_call(monkeypatch):
    zeros, wanted = torch.zeros, ["side"] * measure.WARMUP
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(8))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: Event.calls.append("synchronize"))
    found = measure.timing(lambda: Event.calls.append("side"))
    for i in range(measure.REPEATS):
        wanted += [2 * i + 1, "side", 2 * i + 2]
    assert Event.calls == [*wanted, "synchronize"] and measure.REPEATS == 30
    assert found == pytest.approx({"ms": 15.5, "p20_ms": 6.8, "p80_ms": 24.2})  # of 1 to 30


def test_ceilings_are_of_bytes_read_and_written_and_of_two_flops_a_product(monkeypatch):
    randn, sizes = torch.randn, []
    monkeypatch.setattr(torch, "randn", lambda *size, device, dtype=None: sizes.append(size) or randn(2, 8, 8))
    monkeypatch.setattr(measure, "timing", lambda side: side() is None or {"ms": 2.0})
    found = measure.ceilings()
    assert sizes == [(2, 1 << 28), (2, 8192, 8192)]
    assert found == {"gb_per_s": 2 * 8 * 8 * 4 / 2e-3 / 1e9, "tflop_per_s": 2 * 8192**3 / 2e-3 / 1e12}


def test_rates_and_ratios_on_a_gpu(card, tmp_path, capsys):
    def side(*values):
        return lambda: (torch.tensor(values),)

    def broken():
        raise ImportError("no such name")

    bench = measure.Bench("bench_x: y.", ["--device", "cuda", "--out", str(tmp_path / "x.json")])
    how = {"truth": lambda: (torch.tensor([2.0]),), "pick": list}
    others = {"right": side(2.1), "wrong": side(2.3), "nan": side(float("nan")), "broken": broken}
    found = bench.rows({"of": "bytes"}, {"triton": side(2.0), "torch": side(4.0)}, others, moved=4e9, **how)
    assert list(found) == ["triton", "torch", "right"]
    assert found["triton"]["gb_per_s"] == 2000 and found["triton"]["percent"] == 50 and found["triton"]["over"] == 1
    assert found["torch"]["over"] == 2 and found["torch"]["percent"] == 25 and found["torch"]["peak_bytes"] == 5
    assert found["right"]["over"] == pytest.approx(1.05) and found["right"]["error"] == pytest.approx(0.05)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]  # there before the end
    failed = {row["side"]: row["failed"] for row in rows if "failed" in row}
    assert set(failed) == {"wrong", "nan", "broken"} and "differs from fp64 by 0.15" in failed["wrong"]
    assert failed["broken"] == "ImportError: no such name"
    found = bench.rows({"of": "flop"}, {"triton": side(2.0)}, moved=1, flop=8e11)
    assert found["triton"]["tflop_per_s"] == 400 and found["triton"]["percent"] == 50
    with pytest.raises(ImportError):  # ours must not fail in silence
        bench.rows({"of": "ours"}, {"triton": broken})
    bench.end("logprob")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ceilings_at_end"]["gb_per_s"] == 4000


# ---- bench/gpu.sh ----


def test_gpu_sh_names_every_bench_and_ends_in_time():
    text = (ROOT / "bench" / "gpu.sh").read_text()
    runs = re.findall(r"^run (\d+) (\w+)$", text, re.M)
    grace = int(re.search(r"--kill-after=(\d+)", text)[1])
    assert sum(int(seconds) + grace for seconds, _ in runs) < 540
    left_out = re.findall(r"bench_\w+", re.search(r"^# Not here: (.*): on a CPU", text, re.M | re.S)[1])
    for path in (ROOT / "bench").glob("bench_*.py"):
        named = path.stem.removeprefix("bench_") in [name for _, name in runs]
        assert named != (path.stem in left_out), f"{path.name} must be run, or said not to be"


def test_gpu_sh_goes_on_after_a_failure_and_reports_it(tmp_path):
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$2" != "$FAIL" ] && echo new > "$6"\n')
    fake.chmod(0o755)
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "lora_gpu.json").write_text("of another run")
    for fail, status in (("bench.bench_lora", 1), ("none", 0)):
        log.unlink(missing_ok=True)
        done = subprocess.run([ROOT / "bench" / "gpu.sh", "results"], cwd=tmp_path, timeout=60, capture_output=True,
                              env={**os.environ, "PYTHON": str(fake), "FAIL": fail}, text=True)  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        assert ("bench_lora failed" in done.stdout) == bool(status)
        names = ["head", "lora", "logprob", "grpo", "distill", "decode", "passes", "adamw"]  # most important first
        assert log.read_text().splitlines() == [
            f"-m bench.bench_{name} --device cuda --out {folder}/{name}_gpu.json" for name in names]  # fmt: skip
        written = [f"{name}_gpu.json" for name in names if f"bench.bench_{name}" != fail]
        assert sorted(path.name for path in folder.iterdir()) == sorted(written)


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def ablation_run(ablation, folder, right, switch):
    """A finished run's files: each row has the first so many of 300 clips right, which are of three groups by turns."""
    for split in ("analysis", "test", "unseen"):
        write(folder / "toy" / f"{split}.jsonl", [
            dict(id=str(i), question="?", options=["x", "y"], answer=0, meta={"group": ("ear", "eye", "both")[i % 3]})
            for i in range(300)])
        for name in ablation.ROWS.values():
            write(folder / f"{name}_{split}" / "answers.jsonl",
                  [dict(id=str(i), question="q", right=i < right.get(name, 250)) for i in range(300)])
    for which in ("switch", "video_switch"):
        write(folder / which / "results.json", [{part: {"accuracy": switch} for part in ("validation", "training")}])
    return str(folder)


@pytest.mark.parametrize("right, switch, fails", [
    (dict(truth=290, distilled=200, always=280, never=180), 0.9, [1, 2, 5]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (dict(truth=290, distilled=280, always=250, never=200), 0.9, []),
        (dict(truth=290, distilled=280, always=250, never=200, kl=291), 0.9, [0]),
        (dict(truth=290, distilled=280, always=250, never=270), 0.9, [3]),
        (dict(truth=290, distilled=280, always=250, never=200), 0.79, [4]),
        (dict(truth=290, distilled=280, always=250, never=200, video=36), 0.9, [6]))),
])  # fmt: skip
def test_what_the_ablation_claims_is_read_from_its_runs(tmp_path, monkeypatch, capsys, right, switch, fails):
    ablation = importlib.import_module("bench.ablation")
    runs = [ablation_run(ablation, tmp_path / name, right, switch) for name in ("one", "two")]
    monkeypatch.setattr(sys, "argv", ["ablation", *runs, "--out", str(tmp_path / "found.json")])
    assert ablation.main() == bool(fails)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [i for i, holds in enumerate(found["claims"].values()) if not holds] == fails
    assert found["rows"]["Ground-truth labels (upper bound)"]["test"]["correct"] == 2 * 290
    gain = (right["distilled"] - right["never"]) / 3
    assert f"learned less never, test: {gain:+.1f} points" in capsys.readouterr().out
