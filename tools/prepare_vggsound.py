"""VGGSound's csv files and a folder of clips to train, analysis and test manifests.

    python tools/prepare_vggsound.py VGGSound/data clips data/vggsound --extract-audio

Stopped and started again, it goes on where it was. A clip is found under its official name, `{id}_{start:06d}.mp4`,
or with both times in milliseconds, `{id}_{start}_{end}.mp4`. `analysis` is drawn from the clips of the train split that
can be used. Options are drawn by how often a class occurs in stat.csv.
"""
import re
import sys
from collections import Counter, defaultdict
from heapq import heappush, heappushpop
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from clips import Row, judge  # noqa: E402
from prepare import (  # noqa: E402
    DATA,
    YOUTUBE_ID,
    Manifests,
    Options,
    Repeats,
    parser_of,
    read_csv,
    read_list,
    run_tool,
    uniforms,
)

from minixmd.config.schema import nearest  # noqa: E402

PAPER = {"train": 149_460, "analysis": 14_300, "test": 14_202}
CLIP_NAME = re.compile(rf"({YOUTUBE_ID})_(\d{{6}})(?:\.mp4)?", re.ASCII)
LISTED_NAME = re.compile(rf"({YOUTUBE_ID})_(\d+)(_\d+)?(?:\.\w+)?", re.ASCII)  # seconds, or ms_ms


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
    """The classes of a filter file."""
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
            if not (match := LISTED_NAME.fullmatch(line)):
                raise ValueError(f"{where}: not a clip's name, with or without its ending: {line!r}")
            bad[match[1], int(match[2]) // (1000 if match[3] else 1)] = Path(path).name
    return bad


def csv_files(folder):
    """{split: the file that lists it}, test first, of the splits that are listed at all."""
    both = folder / "vggsound.csv"
    found = {split: path for split in ("test", "train")
             if (path := folder / f"{split}.csv").exists() or (path := both).exists()}
    if not found:
        raise ValueError(f"{folder}: holds none of train.csv, test.csv, vggsound.csv; the folder 'data' of VGGSound's "
                         "repository has them")
    return found


def official_rows(folder):
    """Yield (where, split, YouTube id, start in seconds, class), test rows first."""
    for split, path in csv_files(folder).items():
        if path.stem == split:
            for where, (name, label) in read_csv(path, 2):
                if not (match := CLIP_NAME.fullmatch(name)):
                    raise ValueError(f"{where}: not a clip's name: {name!r}")
                yield where, split, match[1], int(match[2]), label
        else:
            for where, (id, start, label, of) in read_csv(path, 4):
                if not re.fullmatch(YOUTUBE_ID, id) or not re.fullmatch("[0-9]{1,6}", start) or of not in PAPER:
                    raise ValueError(f"{where}: id, start in seconds, class and split are expected, got "
                                     f"{','.join((id, start, label, of))!r}")
                if of == split:
                    yield where, split, id, int(start), label


def example_id(youtube, start_s):
    return f"{youtube}_{start_s:06d}"


def check_rows(folder, stat):
    """(number of rows by split, Repeats of their ids); ValueError for classes, or numbers of them, not in stat.csv."""
    splits, labels, unknown, repeats = Counter(), Counter(), {}, Repeats()
    for where, split, youtube, start_s, label in official_rows(folder):
        repeats.note(example_id(youtube, start_s))
        splits[split] += 1
        labels[label] += 1
        if label not in stat:
            unknown.setdefault(label, where)
            if len(unknown) > 1 or "vggsound.csv:" not in where:  # which has one class more, in 291 rows
                raise ValueError(f"{where}: class {label!r} is not in stat.csv{nearest(label, stat)}")
        elif labels[label] > stat[label][0]:
            raise ValueError(f"{where}: row {labels[label]} of class {label!r}, of which stat.csv has {stat[label][0]}")
    if not splits:
        raise ValueError(f"{folder}: its csv files hold no row")
    expected = sum(clips for clips, _ in stat.values())
    if len(splits) == 2 and (got := sum(splits.values()) - sum(labels[label] for label in unknown)) != expected:
        print(f"note: the csv files have {got:,} rows and stat.csv counts {expected:,}: some were taken out")
    return splits, repeats


def rows_of(folder, stat, classes, bad, repeats):
    """Yield the Row of every row."""
    repeats.start()
    for _, split, youtube, start_s, label in official_rows(folder):
        id, drop = example_id(youtube, start_s), None
        if label not in stat:
            drop = "class not in stat.csv", ""
        elif repeats.again(id):
            drop = "repeated row", ""
        elif label not in classes:
            drop = "class left out", ""
        elif (youtube, start_s) in bad:
            drop = "listed as bad", bad[youtube, start_s]
        names = f"{id}.mp4", f"{youtube}_{start_s * 1000}_{start_s * 1000 + 10_000}.mp4"
        yield Row(id, split, names, {"youtube": youtube, "start_s": start_s, "label": label}, drop)


def choose_analysis(judged, number, seed):
    """Ids of so many usable train clips of every class, by chance; a class that has fewer gives all."""
    first = defaultdict(list)  # per class, the ids of lowest rank as a heap of (-rank, id)
    for row, verdict in judged:
        if row.split == "train" and "reason" not in verdict:
            heap, item = first[row.facts["label"]], (-next(uniforms(seed, "analysis", row.id)), row.id)
            heappush(heap, item) if len(heap) < number else heappushpop(heap, item)
    if short := [label for label, heap in first.items() if len(heap) < number]:
        print(f"note: {len(short)} classes have fewer than {number} train clips; analysis takes them all "
              f"({short[0]!r}: {len(first[short[0]])})")
    return {id for heap in first.values() for _, id in heap}


def prepare(args):
    if args.analysis < 0:
        raise ValueError(f"--analysis must be 0 or more, got {args.analysis}")
    if not (args.csv / "stat.csv").exists():
        raise ValueError(f"{args.csv}: holds no stat.csv; the folder 'data' of VGGSound's repository has it")
    stat = read_stat(args.csv / "stat.csv")
    classes = set(stat) if args.all_classes else read_classes(args.classes, stat)
    options = Options({label: stat[label][0] for label in stat if label in classes}, args.options, args.seed)
    bad, (splits, repeats) = read_bad(args.bad), check_rows(args.csv, stat)
    print(f"{sum(splits.values()):,} rows ({', '.join(f'{split} {n:,}' for split, n in splits.items())}), "
          f"{len(classes)} of {len(stat)} classes")

    def judged(title):
        return judge(rows_of(args.csv, stat, classes, bad, repeats), args, sum(splits.values()), title)

    analysis = frozenset()
    if "train" in splits and args.analysis:
        analysis = choose_analysis(judged("opening clips"), args.analysis, args.seed)
    with Manifests(args, "vggsound", PAPER) as manifests:
        for row, verdict in judged("writing manifests" if analysis else "opening clips"):
            if "reason" in verdict:
                manifests.drop(row, verdict)
                continue
            label = row.facts["label"]
            drawn, answer = options.draw(row.id, label)
            manifests.keep("analysis" if row.id in analysis else row.split, row, verdict, label=label, options=drawn,
                           answer=answer, group=stat[label][1])
    print(f"{'split':10}{'ours':>9}{'the paper':>12}{'difference':>12}")
    for split, ours in manifests.kept.items():
        if split in splits or (split == "analysis" and "train" in splits):
            print(f"{split:10}{ours:>9,}{PAPER[split]:>12,}{ours - PAPER[split]:>+12,}")
    lists = [*args.bad, *([] if args.all_classes else [args.classes])]
    manifests.tell([args.csv / "stat.csv", *csv_files(args.csv).values(), *lists], classes=len(classes), paper=PAPER)


def main(argv=None):
    parser = parser_of("prepare_vggsound", __doc__, "folder of stat.csv and of train.csv, test.csv or vggsound.csv")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--classes", type=Path, default=DATA / "vggsound_286.txt", metavar="FILE",
                       help="one class a line; when absent tools/data/vggsound_286.txt, our reading of the paper's 286")
    which.add_argument("--all-classes", action="store_true", help="all classes of stat.csv")
    parser.add_argument("--bad", type=Path, nargs="+", default=[], metavar="FILE",
                        help="lists of clips to leave out, one name a line in either form")
    parser.add_argument("--analysis", type=int, default=50, metavar="N", help="clips of a class in analysis; 50")
    return run_tool("prepare_vggsound", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
