"""tools/kernel_report.py sees every fault it promises to, in kernels that have it."""
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import kernel_configs  # noqa: E402
from kernel_report import SHARED_LIMIT, faults  # noqa: E402

FINE = {"registers": 64, "spill": 0, "shared": 1024, "mma": 0, "wgmma": 0, "warnings": []}
FAULTY = '''
import triton
import triton.language as tl


@triton.jit
def _row_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    tl.store(y_ptr + i, x - tl.max(x, 0), mask=i < N)


@triton.jit
def _product_kernel(x_ptr, w_ptr, y_ptr, D, BLOCK: tl.constexpr):
    n, d = tl.arange(0, BLOCK), tl.arange(0, 64)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, D, 64):
        x = tl.load(x_ptr + n[:, None] * D + (start + d)[None, :])
        w = tl.load(w_ptr + n[None, :] * D + (start + d)[:, None])
        acc = tl.dot(x, w, acc, input_precision="ieee")
    tl.store(y_ptr + n[:, None] * BLOCK + n[None, :], acc)


HALF, SINGLE = "*bf16:16 *bf16:16 *bf16:16 i32:16", "*fp32:16 *fp32:16 *fp32:16 i32:16"
CONFIGS = [
    (_row_kernel, "*fp32:16 *fp32:16 i32", {"BLOCK": 1024}, 4, 3, "row"),
    (_product_kernel, HALF, {"BLOCK": 128}, 4, 3, "gemm"),
    (_product_kernel, SINGLE, {"BLOCK": 32}, 4, 3, "gemm"),
    (_product_kernel, HALF, {"BLOCK": 32}, 4, 3, "dot"),
    (_product_kernel, HALF, {"BLOCK": 32}, 4, 3, "gemm"),
    (_product_kernel, HALF, {"BLOCK": 256}, 8, 5, "gemm"),
    (_row_kernel, "*fp32:16 *fp32:16 i32", {"BLOCK": 16384}, 1, 3, "row"),
    (_product_kernel, "*bf16:16 i32", {"BLOCK": 128}, 4, 3, "gemm"),
    (_product_kernel, "*bf16:16 *fp16:16 *bf16:16 i32:16", {"BLOCK": 128}, 4, 3, "gemm"),
]
'''


def report(*args):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tools" / "kernel_report.py", *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("found, kind, arch, wrong", [
    ({}, "row", 90, []),
    ({"spill": 4}, "row", 90, ["spills"]),
    ({"shared": SHARED_LIMIT[80] + 1}, "row", 80, ["shared memory over 166912"]),
    ({"shared": SHARED_LIMIT[80] + 1}, "row", 90, []),
    ({"shared": SHARED_LIMIT[90] + 1, "wgmma": 1}, "gemm", 90, ["shared memory over 232448"]),
    ({}, "gemm", 80, ["no tensor-core instruction"]),
    ({"mma": 9}, "gemm", 80, []),
    ({"mma": 9}, "gemm", 90, ["no wgmma"]),
    ({"wgmma": 9}, "gemm", 90, []),
    ({}, "dot", 90, ["no tensor-core instruction"]),
    ({"mma": 9}, "dot", 90, []),
    ({"wgmma": 9, "warnings": ["C7515"]}, "gemm", 90, ["wgmma serialised"]),
    ({"wgmma": 9, "warnings": ["C7510"]}, "gemm", 90, ["wgmma serialised"]),
    ({"wgmma": 9, "warnings": ["C7508"]}, "gemm", 90, []),
])  # fmt: skip
def test_each_fault_is_named(found, kind, arch, wrong):
    assert faults(FINE | found, kind, arch) == wrong


@pytest.mark.slow
def test_faulty_kernels_are_found_by_compiling_them(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "silent.py").write_text("x = 1\n")
    done = report(tmp_path / "faulty.py", tmp_path / "silent.py", "--arch", 90)
    rows = [line for line in done.stdout.splitlines() if line.startswith("faulty.")]
    expected = ["ok", "ok", "no wgmma", "ok", "no wgmma", "shared memory over 232448", "spills",
                "product_kernel has runtime arguments ['x_ptr', 'w_ptr', 'y_ptr', 'D'] and constants ['BLOCK'], got 2",
                "Both operands must be same dtype|must be the same|same type"]
    assert len(rows) == len(expected), done.stdout + done.stderr
    for row, verdict in zip(rows, expected, strict=True):
        assert re.search(rf"  .*({re.escape(verdict) if '|' not in verdict else verdict})", row), (row, verdict)
    assert done.returncode == 1 and "silent.py: no configurations" in done.stdout
    assert done.stdout.splitlines()[-1] == "6 bad"


def test_a_file_without_configurations_fails_nothing(tmp_path):
    (tmp_path / "silent.py").write_text("x = 1\n")
    done = report(tmp_path / "silent.py")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all good")


def test_every_kernel_is_listed_with_its_shipped_configurations():
    """The other kernels' own tests compile them; this one only asks that none is forgotten."""
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        for kernel in re.findall(r"^def (_\w+_kernel)\(", text, re.M):
            assert f"module.{kernel}" in inspect.getsource(getattr(kernel_configs, path.stem)), f"{path.name}: {kernel}"
