"""What every kernel's tests share: grids of cases, a result no worse than eager's against fp64, compilation alone."""
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minixmd.kernels.distill import distill_kl_grad
from minixmd.kernels.distill_topk import distill_topk_grad

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ["triton", "torch"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def grid(*axes):
    """Every combination of the axes' values, as pytest parameters; most of them are marked slow.

    Those that are not are chosen greedily until every pair of values of any two axes occurs in one of them.

    Args:
        axes: each a list of values, or {name: value}; the names (str(value) in a list) make the test's id.
    """
    named = [axis if isinstance(axis, dict) else {str(value): value for value in axis} for axis in axes]
    cases = list(itertools.product(*named))
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing, fast = set().union(*pairs.values()), set()
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        fast.add(best)
        missing -= pairs[best]
    return [pytest.param(*(axis[name] for axis, name in zip(named, case, strict=True)), id="-".join(case),
                         marks=() if case in fast else pytest.mark.slow) for case in cases]


def assert_as_good_as(out, eager, truth, cond=1.0):
    """The kernel's error against fp64 truth may be twice eager's, plus rounding of the result and of fp32 steps.

    cond: size of the largest fp32 intermediate that cancels. Without it a right kernel fails: logp = a - b errs by the
    rounding of a, however small logp is. Infinities must stand where the truth has them.
    """
    assert out.dtype == eager.dtype and out.shape == truth.shape, (out.dtype, eager.dtype, out.shape, truth.shape)
    inf = truth.isinf()
    assert torch.equal(out[inf].double(), truth[inf]) and out[~inf].isfinite().all()
    if (~inf).any():
        err, base = ((x.double() - truth)[~inf].abs().max() for x in (out, eager))
        atol = truth[~inf].abs().max() * torch.finfo(out.dtype).eps + 4 * cond * torch.finfo(torch.float32).eps
        assert err <= 2 * base + atol, f"kernel err {err:.2e}, eager err {base:.2e}, atol {atol:.2e}"


def assert_compiles(name):
    """kernels/<name>.py compiles as shipped for sm_80 and sm_90 without a spill (tools/kernel_report.py judges).

    In a process of its own: under TRITON_INTERPRET a kernel is an interpreter's object, which cannot be compiled.
    """
    command = [sys.executable, ROOT / "tools" / "kernel_report.py", ROOT / "kernels" / f"{name}.py"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 80 " in done.stdout and " 90 " in done.stdout and done.stdout.endswith("all good\n"), done.stdout


def distill_kl(student_NV, teacher_NW, *options_and_backend):
    """What distill_kl_grad returns, without a gradient."""
    *options, backend = options_and_backend
    return distill_kl_grad(student_NV, teacher_NW, None, *options, None, backend)


def distill_topk(student_NV, id_NJ, logq_NJ, tail_N, *options_and_backend):
    """What distill_topk_grad returns, without a gradient."""
    *options, backend = options_and_backend
    return distill_topk_grad(student_NV, id_NJ, logq_NJ, tail_N, None, *options, None, backend)
