"""AudioSet's evaluation csv and a folder of clips to a manifest of classes that VGGSound does not have.

    python tools/prepare_audioset.py AudioSet clips data/audioset --vggsound VGGSound/data --extract-audio

Stopped and started again, it goes on where it was. A clip is left out when VGGSound has its video, in either split, or
when none of its classes is unseen. A class is unseen unless it, a broader or a narrower one stands in
tools/data/audioset_seen.csv; the branches "Source-ambiguous sounds" and "Channel, environment and background" name no
sounding object and are neither asked for nor offered. The right option is one of the clip's most specific unseen
classes; a wrong one is drawn by how often a class occurs in the csv, and is none of the clip's classes, none that is
broader, and none that is narrower than its most specific ones.
"""
import json
import re
import sys
from collections import Counter
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
    run_tool,
    uniforms,
)
from prepare_vggsound import csv_files, example_id, official_rows  # noqa: E402

from minixmd.config.schema import nearest  # noqa: E402

FILES = {"rows": "eval_segments.csv", "classes": "class_labels_indices.csv", "ontology": "ontology.json"}
NO_OBJECT = ("Source-ambiguous sounds", "Channel, environment and background")
TIME = r"\d{1,6}(?:\.\d+)?"


class Ontology:
    """What is narrower and what is broader than a class, over ids such as /m/09x0r."""

    def __init__(self, path):
        try:
            nodes = json.loads(path.read_text(encoding="utf-8"))
            self.names = {node["id"]: node["name"] for node in nodes}
            children = {node["id"]: node["child_ids"] for node in nodes}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not AudioSet's ontology: {error!r}") from None
        self.narrower = {id: _closure(id, children) for id in children}
        self.broader = {id: {other for other in children if id in self.narrower[other]} for id in children}

    def roots(self, id):
        return {self.names[i] for i in self.broader[id] | {id} if not self.broader[i]}


def _closure(id, steps):
    found, todo = set(), [id]
    while todo:
        new = set(steps.get(todo.pop(), ())) - found
        found |= new
        todo += new
    return found


def read_classes(path, ontology):
    """{id: name} of the classes that AudioSet's segments are labelled with."""
    rows = read_csv(path, 3)
    if [*next(rows, ("", ()))[1]] != ["index", "mid", "display_name"]:
        raise ValueError(f"{path}: must begin with index,mid,display_name")
    classes = {}
    for where, (_, id, name) in rows:
        if id not in ontology.names:
            raise ValueError(f"{where}: class {id!r} is not in the ontology")
        classes[id] = name
    return classes


def read_seen(path, classes):
    """Ids of the classes in the first column of a csv file."""
    ids, seen = {name: id for id, name in classes.items()}, set()
    rows = read_csv(path, 2)
    next(rows, None)  # the header
    for where, (name, _) in rows:
        if name not in ids:
            raise ValueError(f"{where}: AudioSet has no class {name!r}{nearest(name, ids)}")
        seen.add(ids[name])
    return seen


def official_segments(path, classes):
    """Yield (YouTube id, start in seconds, end, ids of classes) of a csv of segments, in any of its published forms."""
    rows, announced = 0, None
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                break
            announced = (re.search(r"num_segs=(\d+)", line) or [None, announced])[1]
    for where, (id, start, end, labels) in read_csv(path, 4):
        times = re.fullmatch(TIME, start) and re.fullmatch(TIME, end)
        labels = labels.split(",")
        if not re.fullmatch(YOUTUBE_ID, id) or not times:
            raise ValueError(f"{where}: id, start, end and classes are expected, got {','.join((id, start, end))!r}")
        if unknown := [label for label in labels if label not in classes]:
            raise ValueError(f"{where}: class {unknown[0]!r} is not in {FILES['classes']}")
        rows += 1
        yield id, float(start), float(end), labels
    if not rows or (announced and int(announced) != rows):
        raise ValueError(f"{path}: holds {rows} rows" + f", and its head announces {announced}" * bool(announced))


def names_of(id, start, end):
    """File names in use for a segment."""
    stems = (example_id(id, int(start)), f"{id}_{start:.3f}", f"{id}_{start * 1000:.0f}_{end * 1000:.0f}", id, f"Y{id}")
    return tuple(stem + suffix for suffix in (".mp4", ".wav", ".flac") for stem in stems)


def rows_of(path, classes, unseen, taken, repeats):
    """Yield the Row of every segment."""
    repeats.start()
    for youtube, start_s, end_s, labels in official_segments(path, classes):
        id, drop = example_id(youtube, int(start_s)), None
        if youtube in taken:
            drop = "video in VGGSound", taken[youtube]
        elif repeats.again(id):
            drop = "repeated row", ""
        elif not unseen & set(labels):
            drop = "no unseen class", ""
        facts = {"youtube": youtube, "start_s": start_s, "labels": [classes[label] for label in labels]}
        yield Row(id, "eval", names_of(youtube, start_s, end_s), facts, drop)


def question(row, ids, unseen, ontology, options):
    """(id of the right class, options, index of the right one) for a clip with an unseen class."""
    mine = {ids[name] for name in row.facts["labels"]}
    specific = {id for id in mine if not ontology.narrower[id] & mine}
    choice = sorted(id for id in mine & unseen if not ontology.narrower[id] & mine & unseen)
    right = choice[int(next(uniforms(options.seed, "class", row.id)) * len(choice))]
    true = mine.union(*(ontology.broader[id] for id in mine), *(ontology.narrower[id] for id in specific))
    barred = frozenset(name for name, id in ids.items() if id in true)
    return right, *options.draw(row.id, next(name for name, id in ids.items() if id == right), barred)


def prepare(args):
    rows_csv, classes_csv, ontology_json = (args.csv / name for name in FILES.values())
    for path in (rows_csv, classes_csv, ontology_json):
        if not path.exists():
            raise ValueError(f"{args.csv}: holds no {path.name}; it must hold {', '.join(FILES.values())}")
    ontology = Ontology(ontology_json)
    classes = read_classes(classes_csv, ontology)
    objects = {id: name for id, name in classes.items() if not ontology.roots(id) <= set(NO_OBJECT)}
    seen = read_seen(args.seen, classes)
    seen = seen.union(*(ontology.broader[id] | ontology.narrower[id] for id in seen))
    unseen, ids = objects.keys() - seen, {name: id for id, name in classes.items()}
    taken = {youtube: split for _, split, youtube, _, _ in official_rows(args.vggsound)}
    if "train" not in taken.values():
        print(f"note: {args.vggsound} lists no train split, so that videos of VGGSound's train split are not left out")
    frequency, repeats, total = Counter(), Repeats(), 0
    for youtube, start_s, _, labels in official_segments(rows_csv, classes):
        frequency.update(objects[label] for label in labels if label in objects)
        repeats.note(example_id(youtube, int(start_s)))
        total += 1
    options = Options({name: frequency[name] for name in objects.values()}, args.options, args.seed)
    print(f"{total:,} rows; {len(unseen)} of {len(classes)} classes are unseen in VGGSound; {len(options.names)} are "
          "drawn from")
    with Manifests(args, "audioset", ["unseen"]) as manifests:
        rows = rows_of(rows_csv, classes, unseen, taken, repeats)
        for row, verdict in judge(rows, args, total, "opening clips"):
            if "reason" in verdict:
                manifests.drop(row, verdict)
                continue
            right, drawn, answer = question(row, ids, unseen, ontology, options)
            manifests.keep("unseen", row, verdict, label=classes[right], options=drawn, answer=answer,
                           group=min(ontology.roots(right) - set(NO_OBJECT)), labels=row.facts["labels"])
    print(f"unseen: {manifests.kept['unseen']:,} clips")
    manifests.tell([rows_csv, classes_csv, ontology_json, args.seen, *csv_files(args.vggsound).values()],
                   unseen=sorted(classes[id] for id in unseen))


def main(argv=None):
    parser = parser_of("prepare_audioset", __doc__, f"folder of {', '.join(FILES.values())}")
    parser.add_argument("--vggsound", type=Path, required=True, metavar="FOLDER",
                        help="of VGGSound's train.csv and test.csv, or vggsound.csv")
    parser.add_argument("--seen", type=Path, default=DATA / "audioset_seen.csv", metavar="FILE",
                        help="csv of AudioSet's and VGGSound's names of the same classes; when absent, ours")
    return run_tool("prepare_audioset", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
