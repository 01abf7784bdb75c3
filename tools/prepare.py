"""What the prepare_* tools share: reading official files, drawing options, writing manifests, the command line."""
import argparse
import csv
import json
import os
import sys
from array import array
from bisect import bisect
from collections import Counter
from hashlib import blake2b, sha256
from itertools import accumulate, count
from pathlib import Path
from struct import unpack

import numpy as np
from clips import SOUND_ONLY

from minixmd.inputs.examples import Example
from minixmd.runs.files import write_json
from minixmd.toy.world import OPTIONS, QUESTION

DATA = Path(__file__).resolve().parent / "data"
ENCODE = json.JSONEncoder(ensure_ascii=False).encode
YOUTUBE_ID = r"[A-Za-z0-9_-]{11}"
LETTERS = 26  # options that a question can have


def read_csv(path, columns):
    """Yield (where, fields) of a csv file's rows; lines that begin with "# " and empty ones are left out.

    Raises:
        ValueError: not so many columns, broken quotes, or no text; `where` ("file:line") stands in front.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:  # newline="": the csv module takes CRLF for what it is
        rows = csv.reader(file, skipinitialspace=True, strict=True)
        try:
            for fields in rows:
                if not fields or fields[0].startswith("# "):  # a spreadsheet writes #NAME? for an id that begins with -
                    continue
                if len(fields) != columns:
                    got = ",".join(fields)[:60]
                    raise ValueError(f"{columns} columns are expected, got {len(fields)}: {got!r}")
                yield f"{path}:{rows.line_num}", fields
        except (csv.Error, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"{path}:{rows.line_num}: {error}") from None


def read_list(path):
    """Yield (where, line) of a text file with one thing a line; lines that begin with # and empty ones are left out."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if (line := line.strip()) and not line.startswith("#"):
                    yield f"{path}:{number}", line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: no text: {error}") from None


def uniforms(*key):
    """Yield numbers of [0, 1) that depend on the key alone, the same on every machine and with every library."""
    for block in count():
        for number in unpack(">8Q", blake2b(repr((*key, block)).encode()).digest()):
            yield (number >> 11) / 2**53


class Options:
    """Draws the options of questions: by frequency, without repeats, the right one at a random place."""

    def __init__(self, frequency, number, seed):
        """frequency: {option: how often it occurs}; one that never does is not drawn."""
        self.names = [name for name in frequency if frequency[name]]
        if len(self.names) < number:
            raise ValueError(f"{number} options need as many classes, got {len(self.names)}")
        self.sums = list(accumulate(frequency[name] for name in self.names))
        self.number, self.seed = number, seed

    def draw(self, id, right, barred=frozenset()):
        """(options, index of `right`) for the clip of this id; none of the wrong ones is in `barred`.

        Raises:
            ValueError: there are not so many options.
        """
        if len(self.names) - len(barred | {right}) < self.number - 1:
            raise ValueError(f"{self.number} options are wanted, and of the {len(self.names)} classes "
                             f"{len(barred | {right})} cannot be a wrong answer for {id}")
        numbers, wrong, total = uniforms(self.seed, id), [], self.sums[-1]
        while len(wrong) < self.number - 1:
            name = self.names[bisect(self.sums, next(numbers) * total)]
            if name != right and name not in wrong and name not in barred:
                wrong.append(name)
        answer = int(next(numbers) * self.number)
        return (*wrong[:answer], right, *wrong[answer:]), answer


class Manifests:
    """Writes OUT/<split>.jsonl, drops.jsonl and summary.json; they appear when the block ends well, and not before."""

    def __init__(self, args, source, splits):
        self.args, self.source = args, source
        self.kept, self.dropped, self.silent = Counter({split: 0 for split in splits}), Counter(), 0
        # resolved: ".." of a folder that is a link leads elsewhere
        self.clips = os.path.relpath(os.path.realpath(args.clips), os.path.realpath(args.out))

    def __enter__(self):
        self.files = {name: open(self._path(name, ".tmp"), "w", encoding="utf-8") for name in (*self.kept, "drops")}
        return self

    def _path(self, name, end=""):
        return Path(self.args.out, f"{'.' * bool(end)}{name}.jsonl{end}")

    def keep(self, split, row, verdict, *, label, options, answer, **meta):
        """A question about a row's class."""
        meta |= {"youtube": row.facts["youtube"], "start_s": row.facts["start_s"]}
        self.write(split, row.id, verdict, id=row.id, question=QUESTION, options=options, answer=answer, label=label,
                   source=f"{self.source}/{row.split}", meta=meta)

    def write(self, split, name, verdict, *, meta, **fields):
        """A question about the clip of this name: the line that examples.manifest_text gives, five times faster."""
        clip = f"{self.clips}/{verdict['file']}"
        if verdict.get("silent"):
            meta["silent"] = True
            self.silent += 1
        example = Example(
            audio=f"audio/{name}.flac" if self.args.extract_audio and not self.args.no_open else clip,
            video=None if clip.lower().endswith(SOUND_ONLY) else clip, meta=meta, **fields)
        self.files[split].write(ENCODE(vars(example)) + "\n")
        self.kept[split] += 1

    def drop(self, row, verdict):
        self.dropped[verdict["reason"], row.split] += 1
        line = {"id": row.id, "split": row.split, "reason": verdict["reason"], "detail": verdict["detail"], **row.facts}
        self.files["drops"].write(json.dumps(line) + "\n")

    def __exit__(self, kind, error, trace):
        """Raises ValueError if nothing is left; manifests of an earlier run, and its drops.jsonl, then stay."""
        left, earlier = any(self.kept.values()), any(self._path(split).exists() for split in self.kept)
        for name, file in self.files.items():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
            if kind is None and (self.kept[name] or name == "drops" and (left or not earlier)):
                os.replace(self._path(name, ".tmp"), self._path(name))
            else:
                os.unlink(self._path(name, ".tmp"))
                if kind is None and left:
                    self._path(name).unlink(missing_ok=True)  # an empty manifest is none, nor is an earlier run's left
        if kind is None and not left:
            reasons = self._reasons()
            where = f"; is {self.args.clips} the folder of the clips?" if reasons["missing"] else ""
            raise ValueError(f"no clip is left{where} "
                             f"({', '.join(f'{reason} {number:,}' for reason, number in reasons.most_common())})")

    def _reasons(self):
        reasons = Counter()
        for (reason, _), number in self.dropped.items():
            reasons[reason] += number
        return reasons

    def tell(self, inputs, **more):
        """Write summary.json and print what was dropped."""
        args, reasons = self.args, self._reasons()
        dropped = {reason: {split: number for (why, split), number in sorted(self.dropped.items()) if why == reason}
                   for reason, _ in reasons.most_common()}
        sums = {Path(path).name: sha256(Path(path).read_bytes()).hexdigest() for path in inputs}
        write_json(Path(args.out, "summary.json"), {
            "kept": self.kept, "dropped": dropped, "silent": self.silent,
            **{name: value for name, value in vars(args).items() if name in ("seed", "options")},
            "opened": not args.no_open, **more, "sha256": sums})
        print(f"dropped: {sum(reasons.values()):,}, listed with their reasons in {Path(args.out, 'drops.jsonl')}")
        for reason, by_split in dropped.items():
            parts = ", ".join(f"{split} {number:,}" for split, number in by_split.items())
            print(f"  {reason:24}{reasons[reason]:>9,}   {parts}")
        if self.silent:
            print(f"silent and kept: {self.silent:,}, marked in their meta")


class Repeats:
    """Knows an id that comes a second time, in 8 bytes an id: `note` all of them, then ask `again`, in order."""

    def __init__(self):
        self.hashes, self.met = array("q"), set()

    def note(self, id):
        self.hashes.append(hash(id))

    def start(self):
        """Before each pass of questions."""
        hashes = np.sort(np.frombuffer(self.hashes, np.int64))
        self.suspects, self.met = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()), set()

    def again(self, id):
        if hash(id) not in self.suspects:
            return False
        known = id in self.met
        self.met.add(id)
        return known


def parser_of(tool, doc, csv_help):
    parser = base_parser(tool, doc, "csv", metavar="CSV", help=csv_help)
    parser.add_argument("--options", type=int, default=OPTIONS, help=f"a question has; {OPTIONS} when absent")
    parser.add_argument("--seed", type=int, default=0, help="of the options and of whatever else is drawn")
    return parser


def base_parser(tool, doc, first, **of_first):
    parser = argparse.ArgumentParser(prog=tool, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(first, type=Path, **of_first)
    parser.add_argument("clips", metavar="CLIPS", type=Path, help="folder of the clips, as they were downloaded")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to")
    parser.add_argument("--extract-audio", action="store_true",
                        help="write every clip's sound to OUT/audio, 16 kHz mono FLAC, and list that")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N",
                        help="processes that open clips; one a core when absent")
    parser.add_argument("--time-limit", type=float, default=60, metavar="S",
                        help="seconds that opening one clip may take; 60 when absent")
    parser.add_argument("--no-open", action="store_true",
                        help="list every clip under its official name, whether it is there or not")
    return parser


def run_tool(tool, prepare, parser, argv):
    """Returns the exit status; what is wrong with the input is one line on stderr."""
    args = parser.parse_args(argv)
    try:
        for name, low, high in (("options", 2, LETTERS), ("seed", 0, None), ("workers", 1, None),
                                ("time_limit", 1, 86_400)):
            value = getattr(args, name, low)
            if not low <= value <= (high or value):
                raise ValueError(f"--{name.replace('_', '-')} must be {low} {f'to {high}' if high else 'or more'}, "
                                 f"got {value}")
        for folder, what in (*([(args.csv, "csv files")] if "csv" in args else []),
                             *([] if args.no_open else [(args.clips, "clips")])):
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such folder of {what}")
        args.out.mkdir(parents=True, exist_ok=True)
        prepare(args)
    except (ValueError, OSError) as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
