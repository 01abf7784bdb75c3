"""Compile every kernel as it is shipped, for Ampere and Hopper, and judge the machine code. Needs Triton, but no GPU.

    python tools/kernel_report.py [--arch 80 90] [kernels/lora_triton.py ...]

kernel_configs.py says in which configurations kernels/ ships them; any other file says so in a list at its end:

    CONFIGS = [  # (kernel, types, constants, num_warps, num_stages, kind)
        (_fwd_kernel, "*fp32:16 *i64:16 *fp32:16 i32:16 i32 fp32", {"BLOCK_V": 2048}, 8, 3, "row"),
    ]

`types` are those of the arguments that are not tl.constexpr, in their order; ":16" marks a pointer or an integer that
is a multiple of 16, as the launch will find it (not for arguments in do_not_specialize). `kind` is what the code must
use: "gemm" the tensor cores at full rate (wgmma on sm_90, mma.sync on sm_80), "dot" any tensor-core instruction, "row"
none. num_warps and num_stages are those of the launch, so name them by constants.

Exit status 1 if any kernel does not compile, spills registers, needs more shared memory than a block can have, lacks
its tensor-core instruction, or gets one of ptxas' warnings that wgmma is serialised (C7510, C7515). A file without
configurations is listed, and fails nothing.
"""
import argparse
import contextlib
import importlib.util
import io
import os
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from types import ModuleType

import kernel_configs

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes one block can have: CUDA programming guide, 163 and 227 KiB
COLUMNS = "{:<32} {:<32} {:<20} {:>5} {:>6} {:>3} {:>5} {:>6} {:>7} {:>4} {:>5}  {}"


def load(path):
    """A kernel file as a module. Where it imports minixmd.kernels, it finds our kernels/ without the rest of minixmd,
    which would need much more than Triton."""
    for name in ("minixmd", "minixmd.kernels"):
        package = ModuleType(name)
        package.__path__ = [str(KERNELS)]
        sys.modules.setdefault(name, package)
    spec = importlib.util.spec_from_file_location(f"kernel_report_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source(kernel, types, constants):
    """What triton.compile takes, from one entry of CONFIGS.

    Raises:
        ValueError: the entry does not fit the kernel's arguments.
    """
    from triton.compiler import ASTSource

    types = types.split()
    runtime = [param.name for param in kernel.params if not param.is_constexpr]
    constexprs = sorted(param.name for param in kernel.params if param.is_constexpr)
    if len(types) != len(runtime) or sorted(constants) != constexprs:
        raise ValueError(f"{kernel.__name__} has runtime arguments {runtime} and constants {constexprs}, got "
                         f"{len(types)} types and constants {sorted(constants)}")
    type_of = dict(zip(runtime, types, strict=True))
    signature, values, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(i,)] = constants[name]
            continue
        signature[name] = type_of[name].split(":")[0]
        if type_of[name].endswith(":16"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, values, attrs)


def measure(kernel, types, constants, num_warps, num_stages, arch):
    """Registers, spilled bytes, shared bytes, counts of mma.sync and wgmma, and ptxas' serialisation warnings."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": num_warps, "num_stages": num_stages}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # the log of the very ptxas run that makes the code: main() asks for it
        made = triton.compile(source(kernel, types, constants), target=GPUTarget("cuda", arch, 32), options=options)
    log, ptx = log.getvalue(), made.asm["ptx"]
    used = re.search(r"Used (\d+) registers", log)
    if used is None:
        raise RuntimeError(f"no register count in what ptxas printed: {log!r}")
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return {"registers": int(used[1]), "spill": spills, "shared": made.metadata.shared,
            "mma": len(re.findall(r"\bmma\.sync", ptx)), "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
            "warnings": sorted(set(re.findall(r"C75\d\d", log)))}  # fmt: skip


def faults(found, kind, arch):
    """What is wrong with one compiled kernel, as a list of words; empty if nothing."""
    wrong = []
    if found["spill"]:
        wrong.append("spills")
    if found["shared"] > SHARED_LIMIT[arch]:
        wrong.append(f"shared memory over {SHARED_LIMIT[arch]}")
    if kind == "gemm" and arch >= 90:
        if not found["wgmma"]:
            wrong.append("no wgmma")
    elif kind in ("gemm", "dot") and not found["mma"] + found["wgmma"]:
        wrong.append("no tensor-core instruction")
    if {"C7510", "C7515"} & set(found["warnings"]):
        wrong.append("wgmma serialised")
    return wrong


def pointer_types(types):
    """"*fp32:16 *fp32 i32 *bf16" -> "fp32x2 bf16"."""
    pointers = [t[1:].split(":")[0] for t in types.split() if t.startswith("*")]
    runs = []
    for name, run in groupby(pointers):
        length = len(list(run))
        runs.append(name if length == 1 else f"{name}x{length}")
    return " ".join(runs)


def report(path, archs):
    """Prints the rows of one kernel file. Returns the number of bad ones."""
    shipped = getattr(kernel_configs, path.stem, None) if path.resolve().parent == KERNELS else None
    if shipped is None and "\nCONFIGS = " not in path.read_text(encoding="utf-8"):
        print(f"{path.name}: no configurations")
        return 0
    module = load(path)
    bad = 0
    for kernel, types, constants, num_warps, num_stages, kind in shipped(module) if shipped else module.CONFIGS:
        if kind not in ("gemm", "dot", "row"):
            raise ValueError(f"{path.name}: kind must be gemm, dot or row, got {kind!r}")
        name = f"{path.stem}.{kernel.__name__.strip('_').removesuffix('_kernel')}"
        blocks = " ".join(str(v) for v in constants.values())
        for arch in archs:
            row = name, pointer_types(types), blocks, num_warps, num_stages, arch
            try:
                found = measure(kernel, types, constants, num_warps, num_stages, arch)
            except Exception as error:  # whatever the compiler raises is this row's result
                print(COLUMNS.format(*row, *"-----", (str(error) or repr(error)).splitlines()[-1]))
                bad += 1
                continue
            wrong = faults(found, kind, arch)
            bad += bool(wrong)
            verdict = " ".join(["; ".join(wrong) or "ok", *found.pop("warnings")])
            print(COLUMNS.format(*row, *found.values(), verdict), flush=True)
    return bad


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="kernel files; all of kernels/ if none is given")
    parser.add_argument("--arch", nargs="+", type=int, choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.6 does; 3.9 warns that 3.10 will not
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # code found in a cache comes without ptxas' log
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        import triton

        print(f"triton {triton.__version__}; shared memory limit " +
              ", ".join(f"{SHARED_LIMIT[arch]} B on sm_{arch}" for arch in args.arch))
        print(COLUMNS.format("kernel", "pointers", "constants", "warps", "stages", "sm", "regs", "spill", "shared",
                             "mma", "wgmma", "verdict"))
        bad = sum(report(path, args.arch) for path in args.files or sorted(KERNELS.glob("*.py")))
    print(f"{bad} bad" if bad else "all good")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
