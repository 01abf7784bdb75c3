"""What every kernel's tests share: a result no worse than eager's against fp64, and the compile-only check."""
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


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
