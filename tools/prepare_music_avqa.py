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

from prepare.command_line import questions_parser, run_tool
from prepare.official_files import read_json_records
from prepare.option_sampling import MAX_OPTIONS
from prepare.questions import Question, UnusableRecord, check_file_name, id_field, prepare_questions, text_field

from minixmd.tasks.benchmarks import TYPES

KEYS = ("question_content", "templ_values", "anser")  # the last is spelled so
MODALITIES = ("Audio", "Visual", "Audio-Visual")
PLACEHOLDER = re.compile(r"<\w+>")  # such as <Object>
YES_NO_QUESTION = re.compile(r"(?:Is|Are|Does|Do)\b")


def strings_field(record, name):
    """The list of strings in a field that holds it as JSON text."""
    text = text_field(record, name)
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise UnusableRecord(f"no {name}", text[:60])
    return found


def kind_of(record):
    """(modality, type) of a question."""
    kind = strings_field(record, "type")
    if len(kind) != 2 or kind[0] not in MODALITIES or kind[1] not in TYPES:
        raise UnusableRecord("no type", str(kind)[:60])
    return tuple(kind)


def fill_template(template, values):
    """The template with its placeholders replaced in order, and an ASCII question mark for a full-width one."""
    if len(PLACEHOLDER.findall(template)) != len(values):
        raise UnusableRecord("values do not fit the template", f"{template[:60]} {values!r:.60}")
    remaining = iter(values)
    return PLACEHOLDER.sub(lambda _: next(remaining), template).replace("\uff1f", "?")


def read_answers(path):
    """{(modality, type): Counter of answers} of the training file; records without them are skipped."""
    answers = defaultdict(Counter)
    for record, _ in read_json_records(path):
        try:
            if isinstance(record, dict) and not record.get("question_deleted"):
                answers[kind_of(record)][text_field(record, "anser")] += 1
        except UnusableRecord:
            continue
    if not answers:
        raise ValueError(f"{path}: no record has type, anser; is it MUSIC-AVQA's training file?")
    return answers


def choose_options(answers, template):
    """The options of a question, in alphabetical order. answers: Counter of its type's answers."""
    if len(answers) > MAX_OPTIONS:
        yes_or_no = bool(YES_NO_QUESTION.match(template))
        answers = Counter({answer: n for answer, n in answers.items() if (answer in ("yes", "no")) == yes_or_no})
    return sorted(answer for answer, _ in answers.most_common(MAX_OPTIONS))


def read_question(record, answers):
    """The Question of a record. answers: of read_answers."""
    if record.get("question_deleted"):
        raise UnusableRecord("deleted")
    kind, template = kind_of(record), text_field(record, "question_content")
    right = text_field(record, "anser")
    options = choose_options(answers.get(kind, Counter()), template)
    if right not in options:
        raise UnusableRecord("answer not in the training file", right[:60])
    clip = check_file_name(text_field(record, "video_id"))
    question = fill_template(template, strings_field(record, "templ_values"))
    question = text_field({"question": question}, "question")
    modality, type_name = kind
    meta = {"modality": modality, "type": type_name, "group": f"{modality} {type_name}", "clip": clip}
    return Question(f"music_avqa_{id_field(record, 'question_id')}", clip,
                    tuple(clip + suffix for suffix in (".mp4", ".wav", ".flac")), question, options,
                    options.index(right), meta)


def prepare(args):
    answers = read_answers(args.train)
    by_kind = {" ".join(kind): sorted(counts) for kind, counts in sorted(answers.items())}
    for kind, found in by_kind.items():
        print(f"{kind}: {len(found)} answers in {args.train.name}")
    prepare_questions(args, "music_avqa", KEYS, lambda record, path: read_question(record, answers), max_seconds=inf,
                      inputs=[args.train], answers=by_kind)


def main(argv=None):
    parser = questions_parser("prepare_music_avqa", __doc__, "avqa-train.json, avqa-val.json, avqa-test.json")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="avqa-train.json, for the options")
    return run_tool("prepare_music_avqa", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
