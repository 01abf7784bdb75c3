"""What the benches of the kernels share: parity, time, peak memory, counted bytes and FLOPs, machine code, the JSON.

A side is a function of no arguments that returns a tuple of tensors; a script has them as {name: side}.

    bench = Bench(__doc__)            reads the arguments; on CUDA measures the card's ceilings, now
    check(sides, truth, pick)         raises unless ours are right: before anything is measured
    bench.rows(case, sides, ...)      a row a side, printed; --out is written anew after each
    bench.end("logprob")              how kernels/logprob.py compiles (CPU only); the last line of stdout is JSON

On CUDA a row is the median, 20 % and 80 % quantile of CUDA-event times, the rate of useful bytes or FLOPs, its share of
the ceiling, and peak memory; "over" is a side's time over the first side's. 2 GB are read before each call: L2, 50 MB
on an H200, then holds nothing of the last one, and the CPU has half a millisecond to run ahead, so that launches are
timed only where they take longer. On a CPU no time is claimed: a row is the bytes that a GPU would move (of the kernels
by formula; of other code every operator's inputs and results once, as without a cache) with "over" as their ratio, the
FLOPs of the products, and the peak that torch's allocator hands out, from the profiler's record.
"""
import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
WARMUP, REPEATS, FLUSH = 5, 30, 1 << 29  # FLUSH: fp32 values
SHOWN = {"ms": "{:9.3f} ms", "p20_ms": "({:.3f} to", "p80_ms": "{:.3f})", "gb_per_s": "{:6.0f} GB/s",
         "tflop_per_s": "{:6.1f} TFLOP/s", "percent": "{:4.0f} %", "bytes": "{:16,} B", "flop": "{:20,} FLOP",
         "peak_bytes": "  peak {:14,} B", "over": "{:7.2f} times", "failed": "{}"}  # fmt: skip
OTHERS = "trl", "liger-kernel", "peft"

if {"cpu", "--device=cpu"} & set(sys.argv) or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # counts when Triton is first imported, as minixmd and flops() do


def installed(module):
    return importlib.util.find_spec(module) is not None


def env():
    """Commit, versions, hardware and date."""
    from minixmd.runs.directory import versions

    return {**versions(), "cuda": torch.version.cuda, "fp32_products": torch.get_float32_matmul_precision(),
            "date": datetime.now(timezone.utc).date().isoformat(),
            **{name: version(name) if installed(name.replace("-", "_")) else None for name in OTHERS}}


def timing(side):
    """Milliseconds of a call on the GPU: {"ms": median, "p20_ms", "p80_ms"}."""
    flush = torch.zeros(FLUSH, device="cuda")
    for _ in range(WARMUP):
        side()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in pairs:
        flush.sum()  # read, not written: lines to be written back would slow down what follows
        start.record()
        side()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in pairs], dtype=torch.float64)
    p20, ms, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"ms": ms, "p20_ms": p20, "p80_ms": p80}


def ceilings():
    """What the card reaches now: GB/s of a copy of 1 GiB (read and written), TFLOP/s of a bf16 product of 8192^3."""
    x, y = torch.randn(2, 1 << 28, device="cuda")
    copy = timing(lambda: y.copy_(x))
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = timing(lambda: a @ b)
    return {"gb_per_s": 2 * x.nbytes / copy["ms"] / 1e6, "tflop_per_s": 2 * 8192**3 / product["ms"] / 1e9}


def peak(side, device):
    """Most bytes alive at once during a call, above those alive when it began; its results count."""
    if device == "cuda":
        side()  # the vendor's libraries take their work space in the first call
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        side()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    live = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most


class Traffic(TorchDispatchMode):
    """Adds up in `bytes` what every operator reads and writes: each input and result once, views nothing."""

    TAKE = {"gather", "index", "index_select"}  # read only as many values as come out
    PUT = {"scatter_add_", "index_put_", "index_fill_", "copy_"}  # write only as many as are given
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        read, given, made = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
                             for x in ((args, kwargs), args[1:], out))
        if not func._schema.is_mutable:
            storages = {t.untyped_storage()._cdata for t in read}
            made = [t for t in made if t.untyped_storage()._cdata not in storages]
        if name in self.TAKE:
            read = given + made
        elif name in self.PUT:
            read = made = given
        elif name in ("fill_", "zero_") or name.startswith("new_") or name.endswith("_like"):
            read = []
        if made and "empty" not in name:  # an expanded tensor is as large as what is there
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read, *made))
        return out


def flops(side):
    """FLOPs of the matrix products of a call."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    addmm = {torch.ops.aten.addmm_: lambda y, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}  # unknown to it
    with FlopCounterMode(display=False, custom_mapping=addmm) as counter:
        side()
    return counter.get_total_flops()


class _Unlaunched:
    def __getitem__(self, grid):
        return lambda *args, **options: None


def unlaunched(module):
    """Within it the module's kernels do nothing: what is left is memory and traffic of the code around the launches."""
    return mock.patch.multiple(module, **{name: _Unlaunched() for name in vars(module) if name.endswith("_kernel")})


def kernel_resources(path, archs=(80, 90)):
    """The rows of tools/kernel_report.py for a kernel file. RuntimeError: it found a bad one."""
    command = [sys.executable, ROOT / "tools" / "kernel_report.py", path, "--arch", *map(str, archs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    row = re.compile(r"(\S+) +(\S.*?) {2,}(\S.*?) {2,}" + r"(\d+) +" * 8 + r" (.+)")
    counts = "warps", "stages", "sm", "registers", "spill", "shared", "mma", "wgmma"
    cells = [m.groups() for m in map(row.fullmatch, done.stdout.splitlines()) if m]
    return [{**dict(zip(("kernel", "pointers", "constants"), c, strict=False)),
             **dict(zip(counts, map(int, c[3:11]), strict=True)), "verdict": c[11]} for c in cells]


def check(sides, truth, pick, floor=None):
    """Raises ValueError unless the kernel, "triton", and its twin, "torch", are about as good as "ref" against fp64.

    truth: () -> what pick(side()) should be, in fp64. The largest error may be twice ref's, and `floor` (None = the
    result's epsilon) times the largest value, and 3e-5, for fp32 values up to 30 cancel. The mean error may
    be twice ref's, and half an epsilon and 1e-5 of the mean value: in a row of gradients, of which one is near 1 and
    150,000 are near 0, the largest error says little.
    """
    names = [name for name in ("triton", "torch") if name in sides]
    found = [pick(sides[name]()) for name in names]  # first: no memory that ref has written may come to their help
    eager, exact = pick(sides["ref"]()), truth()
    for name, results in zip(names, found, strict=True):
        for i, (ours, theirs, true) in enumerate(zip(results, eager, exact, strict=True)):
            eps = torch.finfo(ours.dtype).eps
            high = (eps if floor is None else floor) * true.abs().max() + 3e-5
            more = {"largest": high, "mean": (eps / 2 + 1e-5) * true.abs().mean()}
            error, base = ({"largest": off.max(), "mean": off.mean()}
                           for off in (x.double().sub(true).abs() for x in (ours, theirs)))
            for what in more:
                if not error[what] <= 2 * base[what] + more[what]:
                    raise ValueError(f"parity: the {what} error of {name}'s result {i} is {error[what]:.2e}, ref's "
                                     f"{base[what]:.2e}; nothing is timed")


def farthest(results, exact):
    """The largest error of any result over its largest value; ValueError above a tenth. Fewer results may be given."""
    off = max((x.double().sub(true).abs().max() / true.abs().max()).item()
              for x, true in zip(results, exact, strict=False))
    if not off <= 0.1:
        raise ValueError(f"differs from fp64 by {off:.2f} of the largest value")
    return off


class Bench:
    """One run of a script: arguments, ceilings (None on a CPU), rows; `result` becomes the JSON."""

    def __init__(self, doc, argv=None):
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--small", action="store_true", help="tiny sizes: tries the script, measures nothing")
        parser.add_argument("--out", type=Path, help="file to write the JSON to as well")
        args = parser.parse_args(argv)
        torch.manual_seed(0)
        self.device, self.small, self.out = args.device, args.small, args.out
        self.ceilings = ceilings() if self.device == "cuda" else None
        self.result = {"bench": doc.partition(":")[0], "device": self.device, "small": self.small, "env": env(),
                       "ceilings": self.ceilings, "rows": [], "resources": []}  # fmt: skip
        print(doc.splitlines()[0])
        for name in OTHERS:
            if self.result["env"][name] is None:
                print(f"{name}: not installed")

    def rows(self, case, sides, others=None, moved=None, flop=None, module=None, truth=None, pick=None):
        """Measures every side; returns {name: row}, without those that failed.

        Args:
            case: what stands at the start of each row: words and sizes.
            sides: ours, the kernel's first. others: those of other people, after ours: one that raises, or is off from
                truth by more than a tenth of its largest value, gets a row that says so.
            moved, flop: bytes the kernels must move, FLOPs of the operation. On CUDA the rate is of flop if given, else
                of moved. On a CPU the first side's bytes are moved and what the code around its launches moves.
            module: whose kernels the first side launches. truth, pick: as for check.
        """
        measured, exact = {}, truth() if truth and others else None
        print(", ".join(f"{key} {value}" for key, value in case.items()))
        for name, side in {**sides, **(others or {})}.items():
            row = {**case, "side": name}
            try:
                if name not in sides:
                    results = side()  # the first call imports, builds and compiles
                    if exact:
                        row["error"] = farthest(pick(results), exact)
                    del results
                if self.device == "cuda":
                    row |= self.on_cuda(side, moved, flop)
                else:
                    row |= self.on_cpu(side) if measured else self.on_cpu(side, moved or 0, flop, module)
                measured[name], unit = row, "ms" if self.device == "cuda" else "bytes"
                row["over"] = row[unit] / next(iter(measured.values()))[unit]
            except Exception as error:
                if name in sides:
                    raise
                row["failed"] = f"{type(error).__name__}: {error}"[:300]  # another's code: the run goes on
            self.result["rows"].append(row)
            print(f"  {name:20}", *(form.format(row[key]) for key, form in SHOWN.items() if key in row), flush=True)
            self.write()
        return measured

    def on_cuda(self, side, moved, flop):
        row = timing(side)
        if flop:
            row |= {"useful_flop": flop, "tflop_per_s": flop / row["ms"] / 1e9}
            row["percent"] = 100 * row["tflop_per_s"] / self.ceilings["tflop_per_s"]
        elif moved:
            row |= {"useful_bytes": moved, "gb_per_s": moved / row["ms"] / 1e6}
            row["percent"] = 100 * row["gb_per_s"] / self.ceilings["gb_per_s"]
        return row | {"peak_bytes": peak(side, "cuda")}

    def on_cpu(self, side, moved=0, flop=None, module=None):
        with unlaunched(module) if module else nullcontext():
            with Traffic() as counter:
                without_storage = side()[0].is_meta
            row = {"bytes": moved + counter.bytes}
            if flop := flop or flops(side):
                row["flop"] = flop
            return row if without_storage else row | {"peak_bytes": peak(side, "cpu")}

    def write(self):
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.result) + "\n")

    def end(self, *kernels):
        if self.device == "cuda":
            self.result["ceilings_at_end"] = ceilings()
        for name in kernels if self.device == "cpu" and not self.small else ():
            found = kernel_resources(ROOT / "kernels" / f"{name}.py")
            self.result["resources"] += found
            for row in found:
                print(" ", *(f"{key} {value}" if isinstance(value, int) else value for key, value in row.items()))
        self.write()
        print(json.dumps(self.result))
