"""AVQA's json files and a folder of clips to manifests, a manifest a file.

    python tools/prepare_avqa.py AVQA/train_qa.json AVQA/val_qa.json clips data/avqa --extract-audio

Stopped and started again, it goes on where it was. The question is the audio-text variant, as in R1-AQA: "video"
becomes "audio"; meta.video_question is AVQA's own wording, for a model that sees the clip. A file may also be JSON
lines in R1-AQA's form, AVQA's records with an `audio_path` below CLIPS. Options that are numbers become text, those
that are missing are left out and repeated ones merged; a record without its right option is dropped.
"""
import re
import sys
from pathlib import PurePosixPath
from reprlib import repr as shortly

from prepare.command_line import questions_parser, run_tool
from prepare.official_files import YOUTUBE_ID
from prepare.questions import (
    Question,
    UnusableRecord,
    as_text,
    check_file_name,
    id_field,
    options_field,
    prepare_questions,
    text_field,
)

KEYS = ("question_text", "multi_choice", "answer")
META = {"relation": "question_relation", "type": "question_type"}
VIDEO_NAME = re.compile(rf"({YOUTUBE_ID})_(\d{{1,6}})", re.ASCII)


def read_question(record, path):
    texts, oddities = options_field(record, "multi_choice")
    options = {}  # lower-cased text -> text: the first of repeated ones
    for text in filter(None, texts):
        options.setdefault(text.casefold(), text)
    right = record.get("answer")
    if type(right) is not int or not 0 <= right < len(texts):
        raise UnusableRecord("no answer", f"{shortly(right)} of {len(texts)}")
    if texts[right] is None:
        raise UnusableRecord("right option missing", f"{right} of {len(texts)}")
    answer = list(options).index(texts[right].casefold())
    question = text_field(record, "question_text")
    clip, file_names = clip_and_files(record)
    return Question(f"avqa_{id_field(record, 'id')}", clip, file_names, question.replace("video", "audio"),
                    list(options.values()), answer, meta_of(record, question, clip), oddities)


def meta_of(record, question, clip):
    meta = {"video_question": question}
    for name, key in META.items():
        text = as_text(record.get(key))
        if text:
            meta[name] = text
    if "type" in meta:
        meta["group"] = meta["type"]
    match = VIDEO_NAME.fullmatch(clip)
    if match:
        meta |= {"youtube": match[1], "start_s": int(match[2])}
    return meta


def clip_and_files(record):
    """(name of the record's clip, names that its file may have), videos before sounds."""
    sound = PurePosixPath()
    if record.get("audio_path") is not None:
        sound = PurePosixPath(text_field(record, "audio_path"))
    clip = check_file_name(sound.stem if record.get("video_name") is None else text_field(record, "video_name"))
    stems = [clip]
    match = VIDEO_NAME.fullmatch(clip)
    if match:
        youtube, start_s = match[1], int(match[2])
        stems += [f"{youtube}_{start_s * 1000}_{start_s * 1000 + 10_000}", f"{youtube}_{start_s}"]
    names = [stem + suffix for suffix in (".mp4", ".wav", ".flac") for stem in stems]
    parts = [check_file_name(part) for part in sound.parts if part != "/"]
    if parts:
        names += ["/".join(parts), parts[-1]]
    return clip, tuple(dict.fromkeys(names))


def prepare(args):
    prepare_questions(args, "avqa", KEYS, read_question)


def main(argv=None):
    parser = questions_parser("prepare_avqa", __doc__, "train_qa.json, val_qa.json, or JSON lines in R1-AQA's form")
    return run_tool("prepare_avqa", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
