"""AVQA's json files and a folder of clips to manifests, a manifest a file.

    python tools/prepare_avqa.py AVQA/train_qa.json AVQA/val_qa.json clips data/avqa --extract-audio

Stopped and started again, it goes on where it was. The question is the audio-text variant, as in R1-AQA: "video"
becomes "audio"; meta.video_question is AVQA's own wording, for a model that sees the clip. A file may also be JSON
lines in R1-AQA's form, AVQA's records with an `audio_path` below CLIPS. Options that are numbers become text, those
that are missing are left out and repeated ones merged; a record without its right option is dropped.
"""
import re
import sys
from pathlib import Path, PurePosixPath
from reprlib import repr as shortly

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from prepare import YOUTUBE_ID, run_tool  # noqa: E402
from questions import (  # noqa: E402
    Question,
    Unusable,
    clip_of,
    id_of,
    options_of,
    prepare_questions,
    questions_parser,
    text_in,
    text_of,
)

KEYS = ("question_text", "multi_choice", "answer")
META = {"relation": "question_relation", "type": "question_type"}
VIDEO_NAME = re.compile(rf"({YOUTUBE_ID})_(\d{{1,6}})", re.ASCII)


def read(record, path):
    texts, odd = options_of(record, "multi_choice")
    options = {}  # by their text without case: the first of repeated ones
    for text in filter(None, texts):
        options.setdefault(text.casefold(), text)
    right = record.get("answer")
    if type(right) is not int or not 0 <= right < len(texts):
        raise Unusable("no answer", f"{shortly(right)} of {len(texts)}")
    if texts[right] is None:
        raise Unusable("right option missing", f"{right} of {len(texts)}")
    answer = list(options).index(texts[right].casefold())
    asked = text_of(record, "question_text")
    meta = {"video_question": asked}
    for name, key in META.items():
        if text := text_in(record.get(key)):
            meta[name] = text
    if "type" in meta:
        meta["group"] = meta["type"]
    clip, files = clip_and_files(record)
    if match := VIDEO_NAME.fullmatch(clip):
        meta |= {"youtube": match[1], "start_s": int(match[2])}
    return Question(f"avqa_{id_of(record, 'id')}", clip, files, asked.replace("video", "audio"),
                    list(options.values()), answer, meta, odd)


def clip_and_files(record):
    """(name of the record's clip, names that its file may have), a video before a sound."""
    sound = text_of(record, "audio_path") if record.get("audio_path") is not None else ""
    clip = clip_of(text_of(record, "video_name") if record.get("video_name") is not None else PurePosixPath(sound).stem)
    stems = [clip]
    if match := VIDEO_NAME.fullmatch(clip):
        start_s = int(match[2])
        stems += [f"{match[1]}_{start_s * 1000}_{start_s * 1000 + 10_000}", f"{match[1]}_{start_s}"]
    files = [stem + end for end in (".mp4", ".wav", ".flac") for stem in stems]
    if sound:
        parts = [clip_of(part) for part in PurePosixPath(sound).parts if part != "/"]
        files += ["/".join(parts), parts[-1]] if parts else []
    return clip, tuple(dict.fromkeys(files))


def prepare(args):
    prepare_questions(args, "avqa", KEYS, read)


def main(argv=None):
    parser = questions_parser("prepare_avqa", __doc__, "train_qa.json, val_qa.json, or JSON lines in R1-AQA's form")
    return run_tool("prepare_avqa", prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
