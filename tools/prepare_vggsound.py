"""VGGSound's csv files and a folder of clips to train, analysis and test manifests.

    python tools/prepare_vggsound.py VGGSound/data clips data/vggsound --extract-audio

Stopped and started again, it goes on where it was. A clip is found under its official name, `{id}_{start:06d}.mp4`,
or with both times in milliseconds, `{id}_{start}_{end}.mp4`. `analysis` is drawn from the clips of the train split that
can be used. Options are drawn by how often a class occurs in stat.csv.
"""
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from heapq import heappush, heappushpop
from pathlib import Path

from prepare.clip_checks import Row, check_clips, dropped
from prepare.command_line import csv_parser, run_tool
from prepare.manifests import ManifestWriter
from prepare.official_files import DATA, YOUTUBE_ID, RepeatedIds, read_csv, read_list
from prepare.option_sampling import OptionSampler, uniforms

from minixmd.config.field_checks import nearest

PAPER = {"train": 149_460, "analysis": 14_300, "test": 14_202}  # clips of the paper's splits
CLIP_NAME = re.compile(rf"({YOUTUBE_ID})_(\d{{6}})(?:\.mp4)?", re.ASCII)
LISTED_NAME = re.compile(rf"({YOUTUBE_ID})_(\d+)(_\d+)?(?:\.\w+)?", re.ASCII)  # start in seconds, or both times in ms


@dataclass
class Segment:
    """One row of VGGSound's csv files: ten seconds of a YouTube video and their class."""

    where: str  # "file:line"
    split: str  # "train" | "test"
    youtube: str
    start_s: int
    label: str

    @property
    def id(self):
        return example_id(self.youtube, self.start_s)


def example_id(youtube, start_s):
    return f"{youtube}_{start_s:06d}"


# ---- official files ----


def read_stat(path):
    """{class: (clips, group)} of stat.csv."""
    stat = {}
    for where, (label, clips, group) in read_csv(path, 3):
        if not clips.isascii() or not clips.isdigit() or label in stat:
            raise ValueError(f"{where}: a class, its number of clips and its group are expected, each class once; "
                             f"got {label!r}, {clips!r}")
        stat[label] = int(clips), group
    return stat


def read_classes(path, stat):
    """The classes that a list names."""
    classes = set()
    for where, label in read_list(path):
        if label not in stat:
            raise ValueError(f"{where}: class {label!r} is not in stat.csv{nearest(label, stat)}")
        if label in classes:
            raise ValueError(f"{where}: class {label!r} stands here twice")
        classes.add(label)
    return classes


def read_bad(paths):
    """{(YouTube id, start in seconds): name of the list} of clips that are known to be bad."""
    bad = {}
    for path in paths:
        for where, line in read_list(path):
            match = LISTED_NAME.fullmatch(line)
            if not match:
                raise ValueError(f"{where}: not a clip's name, with or without its ending: {line!r}")
            youtube, start, end = match.groups()
            start_s = int(start) if end is None else int(start) // 1000
            bad[youtube, start_s] = Path(path).name
    return bad


def csv_files(folder):
    """{split: the csv file that lists it}, test first; a split that no file lists is absent."""
    found = {}
    for split in ("test", "train"):
        for path in (folder / f"{split}.csv", folder / "vggsound.csv"):
            if path.exists():
                found[split] = path
                break
    if not found:
        raise ValueError(f"{folder}: holds none of train.csv, test.csv, vggsound.csv; the folder 'data' of VGGSound's "
                         "repository has them")
    return found


def official_segments(folder):
    """Yields the Segments of the csv files, test rows first."""
    for split, path in csv_files(folder).items():
        if path.name == "vggsound.csv":
            for segment in _segments_of_both_splits(path):
                if segment.split == split:
                    yield segment
            continue
        for where, (name, label) in read_csv(path, 2):
            match = CLIP_NAME.fullmatch(name)
            if not match:
                raise ValueError(f"{where}: not a clip's name: {name!r}")
            yield Segment(where, split, match[1], int(match[2]), label)


def _segments_of_both_splits(path):
    for where, fields in read_csv(path, 4):
        youtube, start, label, split = fields
        if not re.fullmatch(YOUTUBE_ID, youtube) or not re.fullmatch("[0-9]{1,6}", start) or split not in PAPER:
            raise ValueError(f"{where}: id, start in seconds, class and split are expected, got {','.join(fields)!r}")
        yield Segment(where, split, youtube, int(start), label)


def check_segments(folder, stat):
    """(number of rows by split, their RepeatedIds).

    Raises:
        ValueError: a class that is not in stat.csv, or more rows of a class than it says.
    """
    splits, labels, repeats = Counter(), Counter(), RepeatedIds()
    unknown = set()  # classes that are not in stat.csv
    for segment in official_segments(folder):
        label = segment.label
        repeats.add(segment.id)
        splits[segment.split] += 1
        labels[label] += 1
        if label not in stat:
            unknown.add(label)
            if len(unknown) > 1 or "vggsound.csv:" not in segment.where:  # which has one class more, in 291 rows
                raise ValueError(f"{segment.where}: class {label!r} is not in stat.csv{nearest(label, stat)}")
        elif labels[label] > stat[label][0]:
            raise ValueError(f"{segment.where}: row {labels[label]} of class {label!r}, of which stat.csv has "
                             f"{stat[label][0]}")
    if not splits:
        raise ValueError(f"{folder}: its csv files hold no row")
    expected = sum(clips for clips, _ in stat.values())
    counted = splits.total() - sum(labels[label] for label in unknown)
    if len(splits) == 2 and counted != expected:
        print(f"note: the csv files have {counted:,} rows and stat.csv counts {expected:,}: some were taken out")
    return splits, repeats


# ---- rows and the analysis split ----


def rows_of(folder, stat, classes, bad, repeats):
    """Yields the Row of every segment."""
    repeats.start_pass()
    for segment in official_segments(folder):
        youtube, start_s, label = segment.youtube, segment.start_s, segment.label
        drop = None
        if label not in stat:
            drop = dropped("class not in stat.csv")
        elif repeats.is_repeat(segment.id):
            drop = dropped("repeated row")
        elif label not in classes:
            drop = dropped("class left out")
        elif (youtube, start_s) in bad:
            drop = dropped("listed as bad", bad[youtube, start_s])
        names = f"{segment.id}.mp4", f"{youtube}_{start_s * 1000}_{start_s * 1000 + 10_000}.mp4"
        facts = {"youtube": youtube, "start_s": start_s, "label": label}
        yield Row(segment.id, segment.split, names, facts, drop)


def choose_analysis(verdicts, per_class, seed):
    """Ids of `per_class` random usable train clips of every class; a class that has fewer gives all.

    verdicts: iterable of (Row, verdict).
    """
    chosen = defaultdict(list)  # class -> heap of (-random number, id): the ids of the smallest numbers so far
    for row, verdict in verdicts:
        if row.split != "train" or "reason" in verdict:
            continue
        heap, item = chosen[row.facts["label"]], (-next(uniforms(seed, "analysis", row.id)), row.id)
        if len(heap) < per_class:
            heappush(heap, item)
        else:
            heappushpop(heap, item)
    short = [label for label, heap in chosen.items() if len(heap) < per_class]
    if short:
        print(f"note: {len(short)} classes have fewer than {per_class} train clips; analysis takes them all "
              f"({short[0]!r}: {len(chosen[short[0]])})")
    return {id for heap in chosen.values() for _, id in heap}


def prepare(args):
    if args.analysis < 0:
        raise ValueError(f"--analysis must be 0 or more, got {args.analysis}")
    stat_csv = args.csv / "stat.csv"
    if not stat_csv.exists():
        raise ValueError(f"{args.csv}: holds no stat.csv; the folder 'data' of VGGSound's repository has it")
    stat = read_stat(stat_csv)
    classes = set(stat) if args.all_classes else read_classes(args.classes, stat)
    frequency = {label: clips for label, (clips, _) in stat.items() if label in classes}
    options = OptionSampler(frequency, args.options, args.seed)
    bad = read_bad(args.bad)
    splits, repeats = check_segments(args.csv, stat)
    listed = ", ".join(f"{split} {number:,}" for split, number in splits.items())
    print(f"{splits.total():,} rows ({listed}), {len(classes)} of {len(stat)} classes")

    def verdicts(title):
        return check_clips(rows_of(args.csv, stat, classes, bad, repeats), args, splits.total(), title)

    analysis, title = frozenset(), "opening clips"
    if "train" in splits and args.analysis:
        analysis = choose_analysis(verdicts(title), args.analysis, args.seed)
        if analysis:
            title = "writing manifests"  # the clips have been opened
    with ManifestWriter(args, "vggsound", PAPER) as writer:
        for row, verdict in verdicts(title):
            if "reason" in verdict:
                writer.drop(row, verdict)
                continue
            label = row.facts["label"]
            drawn, answer = options.draw(row.id, label)
            _, group = stat[label]
            writer.keep_class("analysis" if row.id in analysis else row.split, row, verdict, label=label, options=drawn,
                              answer=answer, group=group)
    print_beside_paper(writer.kept, splits)
    inputs = [stat_csv, *csv_files(args.csv).values(), *args.bad]
    if not args.all_classes:
        inputs.append(args.classes)
    writer.summarise(inputs, classes=len(classes), paper=PAPER)


def print_beside_paper(kept, splits):
    """The number of clips of each split beside the paper's."""
    print(f"{'split':10}{'ours':>9}{'the paper':>12}{'difference':>12}")
    for split, ours in kept.items():
        if split in splits or (split == "analysis" and "train" in splits):
            print(f"{split:10}{ours:>9,}{PAPER[split]:>12,}{ours - PAPER[split]:>+12,}")


def main(argv=None):
    parser = csv_parser("prepare_vggsound", __doc__, "folder of stat.csv and of train.csv, test.csv or vggsound.csv")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--classes", type=Path, default=DATA / "vggsound_286.txt", metavar="FILE",
                        help="one class a line; when absent tools/data/vggsound_286.txt, our reading of the paper")
    choice.add_argument("--all-classes", action="store_true", help="all classes of stat.csv")
    parser.add_argument("--bad", type=Path, nargs="+", default=[], metavar="FILE",
                        help="lists of clips to leave out, one name a line in either form")
    parser.add_argument("--analysis", type=int, default=50, metavar="N", help="clips of a class in analysis; 50")
    return run_tool("prepare_vggsound", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
