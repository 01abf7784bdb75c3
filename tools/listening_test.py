"""A listening and watching test for people: the questions of a manifest as one page that needs no server or network.

    python tools/listening_test.py data/vggsound/test.jsonl OUT

OUT/index.html and OUT/media are for the participants; OUT/manifest.jsonl, for Evaluate and Answers, and
OUT/summary.json are not. XMD's section 3.2 had 30 classes of 50 clips, each heard ("ears"), seen without sound ("eyes")
and both: 4,500 trials, 45 a participant. Every clip is given once in every condition, and never twice to one
participant. A participant enters a number on the first page, or gets a link to index.html?participant=7.

In the end the page gives a file to send back; a test that was stopped gives one with "finished": null.

    {"listening_test": 1, "test": 16 hex digits of the questions, their options and who gets which, "participant": 7,
     "started": ISO time, "finished": ISO time or null, "user_agent": text, "trials": [{"id", "condition": "ears",
     "eyes" or "both", "question": minixmd.tasks.statistics.digest, "answer": the option's index, "ms": from the first
     start of the clip to the choice, "replays": int}, ...], "checksum": 8 hex digits}

The checksum is FNV-1a, 32 bits, of json.dumps(file, separators=(",", ":"), ensure_ascii=False) without it, in UTF-8. It
notices a file that was cut or edited by hand, no more. The page has no right answers, but it has the clips' ids and
digests of the questions: who knows this program could work the answers out.
"""
import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import replace
from hashlib import blake2b
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import av
from prepare.official_files import read_list

from minixmd.config.field_checks import nearest
from minixmd.inputs.examples import check_answers, manifest_text, read_manifest
from minixmd.report.clips import MIME_TYPES
from minixmd.runs.files import write_json, write_text
from minixmd.runs.seeds import hash_seed
from minixmd.tasks.statistics import digest

PAGE = Path(__file__).with_name("listening_test.html")
STREAMS = {"ears": ["audio"], "eyes": ["video"], "both": ["video", "audio"]}  # of each condition's files
CODECS = ["h264", "vp8", "vp9", "av1", "aac", "mp3", "opus", "vorbis", "flac", "pcm_u8", "pcm_s16le", "pcm_s24le",
          "pcm_f32le"]  # that Chromium and Firefox play


def check_numbers(args):
    """Raises ValueError for numbers that do not fit one another."""
    conditions, clips = args.conditions, len(args.classes or range(args.num_classes)) * args.clips
    if min(args.num_classes, args.clips, args.trials) < 1:
        raise ValueError("--num-classes, --clips and --trials must be 1 or more")
    if not set(conditions) <= STREAMS.keys() or len(set(conditions)) < len(conditions):
        raise ValueError(f"--conditions must be some of {','.join(STREAMS)}, got {','.join(conditions)}")
    if args.trials % len(conditions):
        raise ValueError(f"--trials {args.trials} is no multiple of the {len(conditions)} conditions")
    if args.trials > clips:
        raise ValueError(f"--trials {args.trials} is more than the {clips} clips: somebody would get one twice")
    if clips * len(conditions) % args.trials:
        raise ValueError(f"{clips} clips in {len(conditions)} conditions are {clips * len(conditions)} trials, no "
                         f"multiple of --trials {args.trials}: some would be left over")


def choose_clips(examples, args):
    """Examples of the test, from class after class in turn, so that any stretch of them is even over the classes."""
    by_class = defaultdict(list)
    for example in examples:
        if example.label is not None:
            by_class[example.label].append(example)
    names = args.classes
    if names is None:
        enough = [name for name in by_class if len(by_class[name]) >= args.clips]
        names = sorted(enough, key=lambda name: hash_seed(args.seed, "class", name))[:args.num_classes]
        if len(names) < args.num_classes:
            raise ValueError(f"{args.manifest}: only {len(names)} classes have {args.clips} clips, --num-classes wants "
                             f"{args.num_classes}; lower that or --clips")
    drawn = {}
    for name in names:
        clips = by_class.get(name, [])
        if name in drawn:
            raise ValueError(f"--classes: {name!r} stands twice")
        if len(clips) < args.clips:
            raise ValueError(f"{args.manifest}: class {name!r} has {len(clips)} clips, and --clips is {args.clips}"
                             f"{'' if clips else nearest(name, by_class)}")
        drawn[name] = sorted(clips, key=lambda example: hash_seed(args.seed, "clip", example.id))
    chosen, first_with = [], {None: None}
    for number in range(args.clips):
        chosen += [drawn[name][number] for name in names]
    for example in chosen:
        for path in {example.audio, example.video} - {None}:
            if path in first_with:
                raise ValueError(f"{args.manifest}: {first_with[path]!r} and {example.id!r} are both of {path}, which "
                                 "somebody would get twice; leave one of them out")
            first_with[path] = example.id
    return chosen


def deal(num_clips, conditions, trials, seed):
    """[(clip, condition), ...] of every participant, in the order of the test. Each takes `trials` clips in a row, a
    block for each condition; the next participant begins one block later. So every clip comes once in every condition.
    Every order of the conditions comes as often as any other, or once more."""
    block_size = trials // len(conditions)
    orders, dealt = list(permutations(conditions)), {}
    participants = range(num_clips // block_size)
    for rank, participant in enumerate(sorted(participants, key=lambda p: hash_seed(seed, "order", p))):
        dealt[participant] = []
        for condition in orders[rank % len(orders)]:
            first = (participant + conditions.index(condition)) * block_size
            keys = {i % num_clips: hash_seed(seed, "trial", participant, i) for i in range(first, first + block_size)}
            dealt[participant] += [(clip, condition) for clip in sorted(keys, key=keys.get)]
    return [dealt[participant] for participant in participants]


def write_media(example, condition, stem):
    """Writes what a condition plays, as stem + the source's suffix, and returns the path. Streams are copied as they
    are, without others and without tags such as a title. Raises ValueError if a browser could not play them."""
    kinds = STREAMS[condition]
    source = getattr(example, kinds[0])
    if source is None:
        raise ValueError(f"example {example.id!r} has no {kinds[0]} for {condition!r}; see --conditions and --classes")
    target = Path(f"{stem}{Path(source).suffix.lower()}")
    if target.suffix not in MIME_TYPES:
        raise ValueError(f"{source}: no browser plays it; convert it to one of {' '.join(MIME_TYPES)}")
    try:
        with av.open(source) as clip, av.open(str(target), "w") as out:
            copies = {}
            for kind in kinds:
                stream = clip.streams.best(kind)
                if stream is None:
                    raise ValueError(f"{source}: has no {kind} stream, which {condition!r} needs; see --conditions")
                codec = stream.codec_context.codec.canonical_name if stream.codec_context else "an unknown codec"
                if codec not in CODECS:
                    raise ValueError(f"{source}: not every browser plays {codec}; use one of {' '.join(CODECS)}")
                copies[stream] = out.add_stream_from_template(stream)
                copies[stream].metadata.clear()
            for packet in clip.demux(list(copies)):
                if packet.dts is not None:  # it is at the end
                    packet.stream = copies[packet.stream]
                    out.mux(packet)
    except av.FFmpegError as error:
        raise ValueError(f"{source}: cannot be copied: {error.strerror}") from None
    return target


def write_test(chosen, args, folder):
    """Writes everything to an empty folder; returns the summary."""
    conditions = [condition for condition in STREAMS if condition in args.conditions]
    clips, names, shown = {}, [], []
    Path(folder, "media").mkdir(parents=True)
    for example in chosen:
        name, files = f"{hash_seed(args.seed, 'name', example.id):016x}", {}
        for condition in conditions:
            path = write_media(example, condition, Path(folder, "media", f"{name}-{condition}"))
            files[condition] = f"media/{path.name}"
        clips[name] = {"id": example.id, "digest": digest(example), "question": example.question,
                       "video_question": example.meta.get("video_question", example.question),
                       "options": example.options, "files": files}
        shown.append(replace(example, audio=files.get("ears"), video=files.get("both", files.get("eyes"))))
        names.append(name)
    participants = []
    for own in deal(len(chosen), conditions, args.trials, args.seed):
        participants.append([{"clip": names[clip], "condition": condition} for clip, condition in own])
    test = {"clips": dict(sorted(clips.items())), "conditions": conditions, "participants": participants}
    test["test"] = blake2b(json.dumps(test).encode(), digest_size=8).hexdigest()
    summary = {"listening_test": 1, "test": test["test"], "participants": len(participants), "trials": args.trials,
               "conditions": conditions, "classes": sorted({example.label for example in chosen}),
               "clips": len(chosen), "seed": args.seed}
    write_text(folder / "manifest.jsonl", manifest_text(shown))
    write_json(folder / "summary.json", summary)
    in_page = json.dumps(test, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    write_text(folder / "index.html", PAGE.read_text().replace("{{ test }}", in_page))
    return summary


def make_test(args):
    """Writes all of OUT or nothing. Raises ValueError and OSError for what is wrong with the input."""
    if args.classes and len(args.classes) == 1 and Path(args.classes[0]).is_file():
        [path] = args.classes
        args.classes = [name for _, name in read_list(path)]
        if not args.classes:
            raise ValueError(f"{path}: names no class")
    check_numbers(args)
    if args.out.exists():
        raise ValueError(f"{args.out}: is there already; remove it or name another folder")
    chosen = choose_clips(read_manifest(args.manifest, args.allow_outside), args)
    check_answers(chosen, args.manifest, "hold people's answers to")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.out.parent) as folder:
        summary = write_test(chosen, args, Path(folder, "test"))
        os.rename(Path(folder, "test"), args.out)
    print(f"{args.out}: test {summary['test']}, {summary['clips']} clips, {summary['participants']} participants. "
          "Give them index.html and media; manifest.jsonl and summary.json have the right answers.")


def main(argv=None):
    """Returns the exit status; what is wrong with the input is one line on stderr."""
    parser = argparse.ArgumentParser(prog="listening_test.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--classes", nargs="+", metavar="CLASS", help="labels, or a file with one a line")
    which.add_argument("--num-classes", type=int, default=30, help="drawn from those with enough clips; 30")
    parser.add_argument("--clips", type=int, default=50, help="of each class; 50")
    parser.add_argument("--trials", type=int, default=45, help="of each participant; 45")
    parser.add_argument("--conditions", type=lambda text: text.split(","), default=list(STREAMS), metavar="LIST",
                        help="ears,eyes,both or some of them")
    parser.add_argument("--seed", type=int, default=0, help="of the classes, the clips and who gets which")
    parser.add_argument("--allow-outside", action="store_true", help="media may lie outside of the manifest's folder")
    args = parser.parse_args(argv)
    try:
        make_test(args)
    except (ValueError, OSError) as error:
        print(f"listening_test: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
