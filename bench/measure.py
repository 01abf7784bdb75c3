"""What the benches of the kernels share: parity, time, peak memory, counted bytes and FLOPs, machine code, the JSON.

A side is one implementation of an operation: a function without arguments that returns a tuple of tensors. A script has
its sides as {name: side}.

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
WARMUP, REPEATS = 5, 30  # calls before the timed ones, and timed calls
FLUSH = 1 << 29  # fp32 values that are read before each timed call
SHOWN = {"ms": "{:9.3f} ms", "p20_ms": "({:.3f} to", "p80_ms": "{:.3f})", "gb_per_s": "{:6.0f} GB/s",
         "tflop_per_s": "{:6.1f} TFLOP/s", "percent": "{:4.0f} %", "bytes": "{:16,} B", "flop": "{:20,} FLOP",
         "peak_bytes": "  peak {:14,} B", "over": "{:7.2f} times", "failed": "{}"}  # fmt: skip
OTHERS = "trl", "liger-kernel", "peft"  # packages that are compared with where they are installed

if {"cpu", "--device=cpu"} & set(sys.argv) or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # counts when Triton is first imported, as minixmd and flops() do

from minixmd.runs.files import write_json  # noqa: E402  after the line above


def installed(module):
    return importlib.util.find_spec(module) is not None


def env():
    """Commit, versions, hardware and date."""
    from minixmd.runs.stage_directory import versions

    found = {**versions(), "cuda": torch.version.cuda, "fp32_products": torch.get_float32_matmul_precision(),
             "date": datetime.now(timezone.utc).date().isoformat()}
    for name in OTHERS:
        found[name] = version(name) if installed(name.replace("-", "_")) else None
    return found


# ---- time and memory ----


def report(result, path):
    """Writes a bench's result to `path`, if it is not None, and prints it as the last line. Returns the exit status, by
    its "ok"."""
    if path:
        write_json(path, result)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def quantiles(values):
    """{"median", "p20", "p80"}."""
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def timing(side):
    """Milliseconds of a call on the GPU: {"ms": median, "p20_ms", "p80_ms"}."""
    flush = torch.zeros(FLUSH, device="cuda")
    for _ in range(WARMUP):
        side()
    events = []
    for _ in range(REPEATS):
        events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
    for start, end in events:
        flush.sum()  # read, not written: lines to be written back would slow down what follows
        start.record()
        side()
        end.record()
    torch.cuda.synchronize()
    found = quantiles([start.elapsed_time(end) for start, end in events])
    return {"ms": found["median"], "p20_ms": found["p20"], "p80_ms": found["p80"]}


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
    allocations = [event for event in events if event["name"] == "[memory]"]
    live = most = 0
    for event in sorted(allocations, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most


# ---- counted bytes and FLOPs ----


class Traffic(TorchDispatchMode):
    """Adds up in `bytes` what every operator reads and writes: each input and result once, views nothing."""

    GATHERS = {"gather", "index", "index_select"}  # read only as many values as come out
    SCATTERS = {"scatter_add_", "index_put_", "index_fill_", "copy_"}  # write only as many as are given
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        read, written = _tensors((args, kwargs)), _tensors(out)
        if not func._schema.is_mutable:
            storages = {t.untyped_storage()._cdata for t in read}
            written = [t for t in written if t.untyped_storage()._cdata not in storages]  # no views
        if name in self.GATHERS:
            read = _tensors(args[1:]) + written
        elif name in self.SCATTERS:
            read = written = _tensors(args[1:])
        elif name in ("fill_", "zero_") or name.startswith("new_") or name.endswith("_like"):
            read = []
        if written and "empty" not in name:
            for t in (*read, *written):
                self.bytes += min(t.nbytes, t.untyped_storage().nbytes())  # an expanded tensor is as small as it is
        return out


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def flops(side):
    """FLOPs of the matrix products of a call."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    addmm = {torch.ops.aten.addmm_: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=addmm) as counter:
        side()
    return counter.get_total_flops()


def addmm_flops(y_shape, a_shape, b_shape, *_, **__):
    """FLOPs of torch's addmm_, which its FlopCounterMode does not know."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


class _Unlaunched:
    def __getitem__(self, grid):
        return lambda *args, **options: None


def unlaunched(module):
    """Within it the module's kernels do nothing: what is left is memory and traffic of the code around the launches."""
    return mock.patch.multiple(module, **{name: _Unlaunched() for name in vars(module) if name.endswith("_kernel")})


# ---- machine code ----


def kernel_resources(path, archs=(80, 90)):
    """The rows of tools/kernel_report.py for a kernel file. RuntimeError: it found a bad one."""
    command = [sys.executable, ROOT / "tools" / "kernel_report.py", path, "--arch", *map(str, archs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    words = "kernel", "pointers", "constants"
    counts = "warps", "stages", "sm", "registers", "spill", "shared", "mma", "wgmma"
    pattern = re.compile(r"(\S+) +(\S.*?) {2,}(\S.*?) {2,}" + r"(\d+) +" * len(counts) + r" (.+)")
    rows = []
    for line in done.stdout.splitlines():
        match = pattern.fullmatch(line)
        if match is None:
            continue
        *cells, verdict = match.groups()
        row = dict(zip(words, cells[:3], strict=True))
        row |= zip(counts, map(int, cells[3:]), strict=True)
        rows.append(row | {"verdict": verdict})
    return rows


# ---- parity ----


def check(sides, truth, pick, floor=None):
    """Raises ValueError unless the kernel, "triton", and its twin, "torch", are about as good as "ref" against fp64.

    The largest error may be twice ref's, and `floor` times the largest value, and 3e-5, since fp32 values up to 30
    cancel. The mean error may be twice ref's, and half an epsilon and 1e-5 of the mean value: in a row of gradients, of
    which one is near 1 and 150,000 are near 0, the largest error says little.

    Args:
        truth: () -> what pick(side()) should be, in fp64. pick: chooses what is compared of a side's results.
        floor: None = the result's epsilon.
    """
    names = [name for name in ("triton", "torch") if name in sides]
    found = [pick(sides[name]()) for name in names]  # first: no memory that ref has written may come to their help
    eager, exact = pick(sides["ref"]()), truth()
    for name, results in zip(names, found, strict=True):
        for i, (ours, theirs, true) in enumerate(zip(results, eager, exact, strict=True)):
            eps = torch.finfo(ours.dtype).eps
            allowed = {"largest": (eps if floor is None else floor) * true.abs().max() + 3e-5,
                       "mean": (eps / 2 + 1e-5) * true.abs().mean()}
            error, base = _errors(ours, true), _errors(theirs, true)
            for kind in allowed:
                if not error[kind] <= 2 * base[kind] + allowed[kind]:
                    raise ValueError(f"parity: the {kind} error of {name}'s result {i} is {error[kind]:.2e}, ref's "
                                     f"{base[kind]:.2e}; nothing is timed")


def _errors(x, true):
    off = x.double().sub(true).abs()
    return {"largest": off.max(), "mean": off.mean()}


def farthest(results, exact):
    """The largest error of any result over its largest value; ValueError above a tenth. Fewer results may be given."""
    errors = []
    for x, true in zip(results, exact, strict=False):
        errors.append((_errors(x, true)["largest"] / true.abs().max()).item())
    worst = max(errors)
    if not worst <= 0.1:
        raise ValueError(f"differs from fp64 by {worst:.2f} of the largest value")
    return worst


# ---- a script's run ----


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
        others = others or {}
        unit = "ms" if self.device == "cuda" else "bytes"
        exact = truth() if truth and others else None
        print(", ".join(f"{key} {value}" for key, value in case.items()))
        measured = {}
        for name, side in {**sides, **others}.items():
            row = {**case, "side": name}
            try:
                if name in others:
                    results = side()  # the first call imports, builds and compiles
                    if exact:
                        row["error"] = farthest(pick(results), exact)
                    del results
                if self.device == "cuda":
                    row |= self.on_cuda(side, moved, flop)
                elif measured:
                    row |= self.on_cpu(side)
                else:
                    row |= self.on_cpu(side, moved or 0, flop, module)
                measured[name] = row
                first = next(iter(measured.values()))
                row["over"] = row[unit] / first[unit]
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
                is_meta = side()[0].is_meta
            row = {"bytes": moved + counter.bytes}
            flop = flop or flops(side)
            if flop:
                row["flop"] = flop
            if not is_meta:
                row["peak_bytes"] = peak(side, "cpu")
            return row

    def write(self):
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.result) + "\n")

    def end(self, *kernels):
        """Prints the JSON. kernels: names of files in kernels/ whose machine code is added, on a CPU."""
        if self.device == "cuda":
            self.result["ceilings_at_end"] = ceilings()
        elif not self.small:
            for name in kernels:
                self.add_resources(name)
        self.write()
        print(json.dumps(self.result))

    def add_resources(self, name):
        rows = kernel_resources(ROOT / "kernels" / f"{name}.py")
        self.result["resources"] += rows
        for row in rows:
            print(" ", *(f"{key} {value}" if isinstance(value, int) else value for key, value in row.items()))
