"""MUSIC-AVQA's json files and a folder of its videos to manifests, a manifest a file.

    python tools/prepare_music_avqa.py json_update/avqa-test.json videos data/music --train json_update/avqa-train.json

Stopped and started again, it goes on where it was. Take the files of `json_update`: those of `json` ask 82 questions
twice, with different answers. The question is the official one, "video" included, its placeholders filled from left to
right. Its options are our choice, as there are none in the files: all answers that the training file has for questions
of the same modality and type, in alphabetical order. Where these are more than 26 letters can name (audio-visual
location has 27), yes and no are the options of questions that begin with Is, Are, Does or Do, and all others those of
the rest; of what is still too many, the most frequent. Videos last 60 s, of which Qwen2-Audio hears the first 30.
"""
import json
import re
import sys
from collections import Counter, defaultdict
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from prepare import LETTERS, run_tool  # noqa: E402
from questions import (  # noqa: E402
    Question,
    Unusable,
    clip_of,
    id_of,
    prepare_questions,
    questions_parser,
    read_records,
    text_of,
)

from minixmd.tasks.benchmarks import TYPES  # noqa: E402

KEYS = ("question_content", "templ_values", "anser")  # the last is spelled so
MODALITIES = ("Audio", "Visual", "Audio-Visual")
POLAR = re.compile(r"(?:Is|Are|Does|Do)\b")


def strings_of(record, name):
    """The list of strings that a JSON string of this name holds."""
    try:
        found = json.loads(text_of(record, name))
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise Unusable(f"no {name}", text_of(record, name)[:60])
    return found


def kind_of(record):
    """(modality, type) of a question."""
    kind = strings_of(record, "type")
    if len(kind) != 2 or kind[0] not in MODALITIES or kind[1] not in TYPES:
        raise Unusable("no type", str(kind)[:60])
    return tuple(kind)


def filled(template, values):
    """The template with its placeholders, such as <Object>, replaced in order; a full-width question mark is one."""
    if len(re.findall(r"<\w+>", template)) != len(values):
        raise Unusable("values do not fit the template", f"{template[:60]} {values!r:.60}")
    rest = iter(values)
    return re.sub(r"<\w+>", lambda _: next(rest), template).replace("\uff1f", "?")


def read_answers(path):
    """{(modality, type): Counter of answers} of the training file; records without them are left out."""
    answers = defaultdict(Counter)
    for record in read_records(path):
        try:
            if isinstance(record, dict) and not record.get("question_deleted"):
                answers[kind_of(record)][text_of(record, "anser")] += 1
        except Unusable:
            continue
    if not answers:
        raise ValueError(f"{path}: no record has type, anser; is it MUSIC-AVQA's training file?")
    return answers


def offered(answers, template):
    """The options of a question, from the Counter of its type's answers."""
    if len(answers) > LETTERS:
        polar = bool(POLAR.match(template))
        answers = Counter({answer: n for answer, n in answers.items() if (answer in ("yes", "no")) == polar})
    return sorted(answer for answer, _ in answers.most_common(LETTERS))


def reader(answers):
    def read(record, path):
        if record.get("question_deleted"):
            raise Unusable("deleted", "")
        kind, template, right = kind_of(record), text_of(record, "question_content"), text_of(record, "anser")
        options = offered(answers.get(kind, Counter()), template)
        if right not in options:
            raise Unusable("answer not in the training file", right[:60])
        clip = clip_of(text_of(record, "video_id"))
        asked = text_of({"question": filled(template, strings_of(record, "templ_values"))}, "question")
        return Question(f"music_avqa_{id_of(record, 'question_id')}", clip,
                        tuple(clip + end for end in (".mp4", ".wav", ".flac")), asked, options, options.index(right),
                        {"modality": kind[0], "type": kind[1], "group": " ".join(kind), "clip": clip})

    return read


def prepare(args):
    answers = read_answers(args.train)
    for kind, counts in sorted(answers.items()):
        print(f"{' '.join(kind)}: {len(counts)} answers in {args.train.name}")
    prepare_questions(args, "music_avqa", KEYS, reader(answers), max_seconds=inf, inputs=[args.train],
                      answers={" ".join(kind): sorted(counts) for kind, counts in sorted(answers.items())})


def main(argv=None):
    parser = questions_parser("prepare_music_avqa", __doc__, "avqa-train.json, avqa-val.json, avqa-test.json")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="avqa-train.json, for the options")
    return run_tool("prepare_music_avqa", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
