"""What the scripts share that pool finished toy runs and judge their claims: the command line and the result."""
import argparse
import json
from pathlib import Path

from minixmd.runs.files import write_json


def judge_runs(argv, doc, gather, check_claims, print_results):
    """Returns the exit status: 1 when a claim does not hold.

    Args:
        argv: arguments, None = the command line's. doc: the script's docstring.
        gather: function(run directories) -> results. check_claims: function(results) -> {claim: whether it holds}.
        print_results: function(results); the claims are printed after it.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    results = gather(args.runs)
    results["claims"] = check_claims(results)
    print_results(results)
    for claim, holds in results["claims"].items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    if args.out:
        write_json(args.out, results)
    print(json.dumps({"claims": results["claims"]}))
    return 0 if all(results["claims"].values()) else 1
