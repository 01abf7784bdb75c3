"""AudioSet's evaluation csv and a folder of clips to two manifests: the whole set, and classes that VGGSound lacks.

    python tools/prepare_audioset.py AudioSet clips data/audioset --vggsound VGGSound/data --extract-audio

Stopped and started again, it goes on where it was. Each clip is opened once, for both.

evaluation.jsonl  all clips but those in videos of VGGSound's train split, on which a model may have learnt; meta tells
                  which are in videos of its test split. All classes are asked for and offered.
unseen.jsonl      clips in no video of VGGSound, of an unseen class: neither it nor a broader or narrower one stands in
                  tools/data/audioset_seen.csv. The branches "Source-ambiguous sounds" and "Channel, environment and
                  background" name no sounding object and are neither asked for nor offered.

The right option is one of the most specific of the clip's classes that are asked for; a wrong one is drawn by how often
a class occurs in the csv, and is none of the clip's classes, none that is broader, and none that is narrower than its
most specific ones. In drops.jsonl a clip with split "eval" is in neither, one with "unseen" in evaluation.jsonl alone.
"""
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from prepare.clip_checks import Row, check_clips, dropped
from prepare.command_line import csv_parser, run_tool
from prepare.manifests import ManifestWriter
from prepare.official_files import DATA, YOUTUBE_ID, RepeatedIds, read_csv
from prepare.option_sampling import OptionSampler, uniforms
from prepare_vggsound import csv_files, example_id, official_segments

from minixmd.config.field_checks import nearest

SEGMENTS_CSV, CLASSES_CSV, ONTOLOGY_JSON = "eval_segments.csv", "class_labels_indices.csv", "ontology.json"
FILES = SEGMENTS_CSV, CLASSES_CSV, ONTOLOGY_JSON
NO_OBJECT = {"Source-ambiguous sounds", "Channel, environment and background"}  # branches of the ontology
TIME = r"\d{1,6}(?:\.\d+)?"


@dataclass
class Segment:
    """One row of AudioSet's csv file."""

    youtube: str
    start_s: float
    end_s: float
    labels: list[str]  # ids of its classes

    @property
    def id(self):
        return example_id(self.youtube, int(self.start_s))

    def file_names(self):
        """Names in use for the segment's file."""
        start_ms, end_ms = f"{self.start_s * 1000:.0f}", f"{self.end_s * 1000:.0f}"
        stems = (self.id, f"{self.youtube}_{self.start_s:.3f}", f"{self.youtube}_{start_ms}_{end_ms}", self.youtube,
                 f"Y{self.youtube}")
        return tuple(stem + suffix for suffix in (".mp4", ".wav", ".flac") for stem in stems)


class Ontology:
    """Which classes are narrower and which are broader than a class, over ids such as /m/09x0r."""

    def __init__(self, path):
        try:
            nodes = json.loads(path.read_text(encoding="utf-8"))
            self.names = {node["id"]: node["name"] for node in nodes}
            children = {node["id"]: node["child_ids"] for node in nodes}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not AudioSet's ontology: {error!r}") from None
        self.narrower = {id: _descendants(id, children) for id in children}
        self.broader = {id: set() for id in children}
        for id, narrower in self.narrower.items():
            for other in narrower & children.keys():
                self.broader[other].add(id)

    def roots(self, id):
        """Names of the top-level classes above a class, or its own."""
        return {self.names[other] for other in self.broader[id] | {id} if not self.broader[other]}


def _descendants(id, children):
    found, waiting = set(), [id]
    while waiting:
        new = set(children.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


# ---- official files ----


def read_classes(path, ontology):
    """{id: name} of the classes that AudioSet's segments are labelled with."""
    rows = read_csv(path, 3)
    _, header = next(rows, ("", []))
    if header != ["index", "mid", "display_name"]:
        raise ValueError(f"{path}: must begin with index,mid,display_name")
    classes = {}
    for where, (_, id, name) in rows:
        if id not in ontology.names:
            raise ValueError(f"{where}: class {id!r} is not in the ontology")
        classes[id] = name
    return classes


def read_seen(path, ids):
    """Ids of the classes in the first column of a csv file. ids: {name: id}."""
    rows, seen = read_csv(path, 2), set()
    next(rows, None)  # the header
    for where, (name, _) in rows:
        if name not in ids:
            raise ValueError(f"{where}: AudioSet has no class {name!r}{nearest(name, ids)}")
        seen.add(ids[name])
    return seen


def audioset_segments(path, classes):
    """Yields the Segments of a csv file, in any of its published forms."""
    announced, num_rows = _announced_rows(path), 0
    for where, (youtube, start, end, labels) in read_csv(path, 4):
        if not re.fullmatch(YOUTUBE_ID, youtube) or not re.fullmatch(TIME, start) or not re.fullmatch(TIME, end):
            got = f"{youtube},{start},{end}"
            raise ValueError(f"{where}: id, start, end and classes are expected, got {got!r}")
        labels = labels.split(",")
        for label in labels:
            if label not in classes:
                raise ValueError(f"{where}: class {label!r} is not in {CLASSES_CSV}")
        num_rows += 1
        yield Segment(youtube, float(start), float(end), labels)
    if announced not in (None, num_rows):
        raise ValueError(f"{path}: holds {num_rows} rows, and its head announces {announced}")
    if not num_rows:
        raise ValueError(f"{path}: holds 0 rows")


def _announced_rows(path):
    """The number of rows that a file's comment lines announce, or None."""
    announced = None
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                break
            match = re.search(r"num_segs=(\d+)", line)
            if match:
                announced = int(match[1])
    return announced


# ---- rows and questions ----


def rows_of(path, classes, in_vggsound, repeats):
    """Yields the Row of every segment. in_vggsound: {YouTube id: split}."""
    repeats.start_pass()
    for segment in audioset_segments(path, classes):
        drop = None
        if in_vggsound.get(segment.youtube) == "train":
            drop = dropped("video in VGGSound", "train")
        elif repeats.is_repeat(segment.id):
            drop = dropped("repeated row")
        facts = {"youtube": segment.youtube, "start_s": segment.start_s,
                 "labels": [classes[label] for label in segment.labels]}
        yield Row(segment.id, "eval", segment.file_names(), facts, drop)


def build_question(row, ids, asked, ontology, sampler):
    """{"label", "options", "answer", "group"} for a clip with one of the classes `asked` for. ids: {name: id}."""
    names = {id: name for name, id in ids.items()}
    labels = {ids[name] for name in row.facts["labels"]}
    candidates = sorted(_most_specific(labels & asked, ontology))
    right = candidates[int(next(uniforms(sampler.seed, "class", row.id)) * len(candidates))]
    true = set(labels)  # all classes that are or may be heard in the clip
    for id in labels:
        true |= ontology.broader[id]
    for id in _most_specific(labels, ontology):
        true |= ontology.narrower[id]
    excluded = frozenset(names[id] for id in true if id in names)
    options, answer = sampler.draw(row.id, names[right], excluded)
    roots = ontology.roots(right)
    return {"label": names[right], "options": options, "answer": answer, "group": min(roots - NO_OBJECT or roots)}


def _most_specific(ids, ontology):
    """Those of some classes below which none of the others stands."""
    return {id for id in ids if not ontology.narrower[id] & ids}


def prepare(args):
    segments_csv, classes_csv, ontology_json = (args.csv / name for name in FILES)
    for path in (segments_csv, classes_csv, ontology_json):
        if not path.exists():
            raise ValueError(f"{args.csv}: holds no {path.name}; it must hold {', '.join(FILES)}")
    ontology = Ontology(ontology_json)
    classes = read_classes(classes_csv, ontology)
    ids = {name: id for id, name in classes.items()}
    objects = {id: name for id, name in classes.items() if not ontology.roots(id) <= NO_OBJECT}
    seen = read_seen(args.seen, ids)
    for id in tuple(seen):
        seen |= ontology.broader[id] | ontology.narrower[id]
    unseen = objects.keys() - seen
    in_vggsound = {segment.youtube: segment.split for segment in official_segments(args.vggsound)}
    if "train" not in in_vggsound.values():
        print(f"note: {args.vggsound} lists no train split, so that videos of VGGSound's train split are not left out")
    frequency, repeats = Counter({name: 0 for name in ids}), RepeatedIds()
    num_rows = 0
    for segment in audioset_segments(segments_csv, classes):
        frequency.update(classes[label] for label in segment.labels)
        repeats.add(segment.id)
        num_rows += 1
    of_objects = OptionSampler({name: frequency[name] for name in objects.values()}, args.options, args.seed)
    of_all = OptionSampler(frequency, args.options, args.seed)
    print(f"{num_rows:,} rows; {len(unseen)} of {len(classes)} classes are unseen in VGGSound; "
          f"{len(of_objects.names)} are drawn from, for evaluation.jsonl {len(of_all.names)}")
    rows = rows_of(segments_csv, classes, in_vggsound, repeats)
    with ManifestWriter(args, "audioset", ["unseen", "evaluation"]) as writer:
        for row, verdict in check_clips(rows, args, num_rows, "opening clips"):
            if "reason" in verdict:
                writer.drop(row, verdict)
                continue
            labels, split = row.facts["labels"], in_vggsound.get(row.facts["youtube"])
            question = build_question(row, ids, set(classes), ontology, of_all)
            writer.keep_class("evaluation", row, verdict, **question, labels=labels, vggsound=split)
            if split:
                writer.drop(replace(row, split="unseen"), dropped("video in VGGSound", split))
            elif unseen.isdisjoint(ids[name] for name in labels):
                writer.drop(replace(row, split="unseen"), dropped("no unseen class"))
            else:
                question = build_question(row, ids, unseen, ontology, of_objects)
                writer.keep_class("unseen", row, verdict, **question, labels=labels)
    in_test = writer.dropped["video in VGGSound", "unseen"]
    print(f"unseen: {writer.kept['unseen']:,} clips")
    print(f"evaluation: {writer.kept['evaluation']:,} clips, {in_test:,} of them in videos of VGGSound's test split")
    inputs = [segments_csv, classes_csv, ontology_json, args.seen, *csv_files(args.vggsound).values()]
    writer.summarise(inputs, unseen=sorted(classes[id] for id in unseen))


def main(argv=None):
    parser = csv_parser("prepare_audioset", __doc__, f"folder of {', '.join(FILES)}")
    parser.add_argument("--vggsound", type=Path, required=True, metavar="FOLDER",
                        help="of VGGSound's train.csv and test.csv, or vggsound.csv")
    parser.add_argument("--seen", type=Path, default=DATA / "audioset_seen.csv", metavar="FILE",
                        help="csv of AudioSet's and VGGSound's names of the same classes; when absent, ours")
    return run_tool("prepare_audioset", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
