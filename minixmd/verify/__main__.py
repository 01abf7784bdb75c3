"""Prove a checkpoint on this machine: python -m minixmd.verify MODEL prints what was checked, measured and allowed.

The exit status is 0 when none failed, 1 when one did, and 2 for bad input, such as a checkpoint that does not load."""
import argparse
import importlib.util
import sys
import time
from collections import Counter

import torch

from minixmd import load
from minixmd.runs.device import prepare_backends, resolve_device
from minixmd.verify import against_transformers, files, invariances
from minixmd.verify.subject import Outcome, Subject, choose_clips

CHECKS = {  # functions of a Subject that return an Outcome
    "every tensor, and no other": files.tensors,
    "packed = one at a time": invariances.packed,
    "cached decoding = full forward": invariances.cached,
    "log-probs generated = scored": invariances.logprobs,
    "captured decoding = step by step": invariances.captured,
    "only another clip changes the answer": invariances.another_clip,
    "logits = transformers'": against_transformers.same_logits,
}


@torch.no_grad()
def run_check(name, subject):
    try:
        return CHECKS[name](subject)
    except Exception as error:  # a failure: a broken checkpoint may break anywhere
        return Outcome(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "no error", False)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m minixmd.verify", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what minixmd.load takes: a model's folder or an adapter's")
    parser.add_argument("--against", choices=["transformers"], help="compare logits with it, whatever the size; "
                        "otherwise only a model below 1e9 parameters is compared, if it is installed")
    for name in ("--audio", "--video"):
        parser.add_argument(name, action="append", default=[], metavar="FILE", help="a clip to check with; repeatable")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args(argv)
    start = time.monotonic()
    try:
        subject = load_subject(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"minixmd: {error}", file=sys.stderr)
        return 2
    print(f"{args.model}: {subject.family.model_type}, {args.dtype} on {subject.device}, kernels in "
          f"{subject.model.backend}, torch {torch.__version__}\n")
    print(f"{'check':<40}{'measured':<36}bound")
    verdicts = Counter()
    for name in CHECKS:
        outcome = run_check(name, subject)
        verdicts[outcome.verdict] += 1
        print(f"{name:<40}{outcome.measured:<35} {outcome.bound:<25} {outcome.verdict}", flush=True)
    print(f"\n{verdicts['PASS']} passed, {verdicts['FAIL']} failed, {verdicts['SKIP']} skipped, "
          f"{time.monotonic() - start:.0f} s")
    return int(verdicts["FAIL"] > 0)


def load_subject(args):
    device = resolve_device("verify", args.device)
    if args.against and importlib.util.find_spec("transformers") is None:
        raise ValueError("--against transformers needs transformers: pip install transformers")
    prepare_backends()
    backend = "triton" if device == "cuda" else "torch"  # as stages choose it
    model, processor = load(args.model, device=device, dtype=getattr(torch, args.dtype), backend=backend)
    clips = choose_clips(model.config.family, args.audio, args.video)
    return Subject(model, processor, args.dtype, clips, args.against is not None)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
