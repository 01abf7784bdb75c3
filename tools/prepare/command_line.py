"""The command line of the prepare_* tools."""
import argparse
import os
import sys
from pathlib import Path

from minixmd.toy.world import OPTIONS
from prepare.option_sampling import MAX_OPTIONS


def csv_parser(tool, doc, csv_help):
    """Arguments of a tool that reads a folder of csv files and draws options."""
    parser = _parser(tool, doc)
    parser.add_argument("csv", metavar="CSV", type=Path, help=csv_help)
    _add_common(parser)
    parser.add_argument("--options", type=int, default=OPTIONS, help=f"a question has; {OPTIONS} when absent")
    parser.add_argument("--seed", type=int, default=0, help="of the options and of whatever else is drawn")
    return parser


def questions_parser(tool, doc, questions_help):
    """Arguments of a tool that reads files of ready questions."""
    parser = _parser(tool, doc)
    parser.add_argument("questions", metavar="QUESTIONS", type=Path, nargs="+", help=questions_help)
    _add_common(parser)
    return parser


def _parser(tool, doc):
    return argparse.ArgumentParser(prog=tool, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def _add_common(parser):
    parser.add_argument("clips", metavar="CLIPS", type=Path, help="folder of the clips, as they were downloaded")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to")
    parser.add_argument("--extract-audio", action="store_true",
                        help="write every clip's sound to OUT/audio, 16 kHz mono FLAC, and list that")
    parser.add_argument("--extract", action="store_true",
                        help="keep every clip's sound and, at the default fps and pixels, its frames in OUT/cache, for "
                        "the stages' field cache")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N",
                        help="processes that open clips; one a core when absent")
    parser.add_argument("--time-limit", type=float, default=60, metavar="S",
                        help="seconds that opening one clip may take; 60 when absent")
    parser.add_argument("--no-open", action="store_true",
                        help="list every clip under its official name, whether it is there or not")


def run_tool(tool, prepare, parser, argv):
    """Parses argv and calls prepare(args). Returns the exit status; bad input is one line on stderr."""
    args = parser.parse_args(argv)
    try:
        _check_arguments(args)
        args.out.mkdir(parents=True, exist_ok=True)
        prepare(args)
    except (ValueError, OSError) as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _check_arguments(args):
    """Raises ValueError for a number out of range or a folder that is not there."""
    if "options" in args:
        _check_range("options", args.options, 2, MAX_OPTIONS)
        _check_range("seed", args.seed, 0)
    _check_range("workers", args.workers, 1)
    _check_range("time-limit", args.time_limit, 1, 86_400)
    if "csv" in args and not args.csv.is_dir():
        raise ValueError(f"{args.csv}: no such folder of csv files")
    if not args.no_open and not args.clips.is_dir():
        raise ValueError(f"{args.clips}: no such folder of clips")


def _check_range(option, value, low, high=None):
    wanted = f"{low} or more" if high is None else f"{low} to {high}"
    if not value >= low or high is not None and value > high:
        raise ValueError(f"--{option} must be {wanted}, got {value}")
