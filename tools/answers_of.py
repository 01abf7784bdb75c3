"""Ask any other multimodal model the questions of a manifest: python tools/answers_of.py MODEL MANIFEST OUT.jsonl

MODEL, a folder or "owner/name" on the hub, is of any kind that transformers loads (tested with 5.24). Answers are
greedy, but for what its generation_config adds, such as a repetition penalty. A line of OUT.jsonl is {"id", "text",
"finished"} or, of a clip that cannot be used, {"id", "bad", "detail"}; OUT.json says what made it. Stopped and started
again, it goes on.
"""
import argparse
import sys
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from jinja2 import TemplateError
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from model_callers import KimiAudio, QwenAudioChat, TransformersModel  # noqa: E402

from minixmd.config.field_checks import check_prompt  # noqa: E402
from minixmd.config.prompts import PROMPT  # noqa: E402
from minixmd.inputs.contained import Contained  # noqa: E402
from minixmd.inputs.examples import build_conversation, check_media, read_manifest  # noqa: E402
from minixmd.inputs.media import MediaError, read_audio, read_frames  # noqa: E402
from minixmd.models.hub import pinned  # noqa: E402
from minixmd.runs.files import read_json, write_json  # noqa: E402
from minixmd.runs.records import append_jsonl, bad_record, drop_torn_line, read_records  # noqa: E402
from minixmd.runs.stage_directory import versions  # noqa: E402

ANSWER = {"id": str, "text": str, "finished": bool}
CALLERS = {"auto": TransformersModel, "qwen-audio-chat": QwenAudioChat, "kimi-audio": KimiAudio}


def check_arguments(args):
    """Raises ValueError for what can be known before a file is read."""
    check_prompt(args.prompt)
    if find_spec("transformers") is None:
        raise ValueError("transformers is not installed; pip install transformers")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU; --device cpu does without")
    if args.max_new_tokens < 1 or args.limit is not None and args.limit < 1 or not 0 < args.fps < float("inf"):
        raise ValueError("--max-new-tokens and --limit must be 1 or more, and --fps above 0")
    if args.out.suffix != ".jsonl":
        raise ValueError(f"{args.out}: must end in .jsonl; what made it is written beside it as .json")
    if args.caller != "auto" and (args.media != "audio" or not args.trust_remote_code):
        raise ValueError(f"--caller {args.caller} is a publisher's code that hears: it needs --trust-remote-code and "
                         "--media audio")
    if args.caller == "kimi-audio" and (args.device, args.dtype) != ("cuda", "bfloat16"):
        raise ValueError("--caller kimi-audio takes --device cuda and --dtype bfloat16 alone")


def answered_before(args, name, revision):
    """Records that OUT holds; ValueError if they were made otherwise. OUT.json then says what makes them."""
    made_by = {"model": name, "revision": revision}
    for field in ("caller", "media", "prompt", "fps", "max_new_tokens", "dtype"):
        made_by[field] = getattr(args, field)
    made_by["manifest"] = str(args.manifest.resolve())
    made_by["manifest_sha256"] = sha256(args.manifest.read_bytes()).hexdigest()
    made_by |= {"transformers": version("transformers"), "torch": version("torch"), "minixmd": versions()["minixmd"]}
    settings = args.out.with_suffix(".json")
    if args.out.exists():
        before = read_json(settings) if settings.exists() else {}
        for field, value in made_by.items():
            if before.get(field) != value:
                raise ValueError(f"{args.out}: was made with {field} {before.get(field)!r}, now it is {value!r}; "
                                 "delete that file or name another one")
    write_json(settings, made_by)
    drop_torn_line(args.out, "; it is asked again")
    return list(read_records(args.out, ANSWER, key="id")) if args.out.exists() else []


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def ask(args):
    """Writes the answers that OUT lacks. Raises ValueError and OSError for what is wrong with the input."""
    check_arguments(args)
    name, revision = pinned(f"{args.model}@{args.revision}" if args.revision else args.model), None
    if not Path(name).is_dir():
        name, revision = name.rsplit("@", 1)
    examples = read_manifest(args.manifest, args.allow_outside)[:args.limit]
    check_media(f"--media {args.media}", args.manifest, args.media, examples)
    records = answered_before(args, name, revision)
    done = {record["id"] for record in records}
    left = [example for example in examples if example.id not in done]
    if left:
        try:
            caller = CALLERS[args.caller](args, name, revision)
        except Exception as error:  # whatever the files and the code of a model raise
            raise ValueError(f"{args.model}: cannot be used: {first_line(error)}") from error
        answer_all(args, caller, left, records)
    bad = [record for record in records if "bad" in record]
    if len(bad) == len(records):
        raise ValueError(f"{args.out}: no clip can be used; the first: {bad[0]['detail']}")
    print(f"{args.out}: {len(records) - len(bad)} answers, {len(bad)} bad clips")


def answer_all(args, caller, examples, records):
    """Appends each example's record to `records` and to OUT."""
    readers = {"audio": Contained(partial(read_audio, sample_rate=caller.sample_rate), workers=1),
               "video": Contained(partial(read_frames, fps=args.fps), workers=1)}
    try:
        for example in tqdm(examples):
            [turn] = build_conversation(example, media=args.media, prompt=args.prompt)
            try:
                clips = []
                for part in turn["content"][:-1]:
                    clips.append(readers[part["type"]](part[part["type"]]))
                text, finished = caller.answer(turn["content"], clips)
                record = {"id": example.id, "text": text, "finished": finished}
            except MediaError as error:
                record = bad_record(example, error)
            except (ValueError, TypeError, TemplateError) as error:  # of the processor, to this clip or to every one
                record = {"id": example.id, "bad": "refused", "detail": f"by the model: {first_line(error)}"}
                if not any("text" in earlier for earlier in records):
                    raise ValueError(f"{args.model}: example {example.id!r}: {first_line(error)}") from error
            append_jsonl(args.out, record)
            records.append(record)
    finally:
        for reader in readers.values():
            reader.stop()


def main(argv=None):
    """Returns the exit status; what is wrong with the input is one line on stderr."""
    parser = argparse.ArgumentParser(prog="answers_of", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("manifest", metavar="MANIFEST", type=Path)
    parser.add_argument("out", metavar="OUT.jsonl", type=Path)
    parser.add_argument("--media", choices=["audio", "video", "both"], default="audio", help="what of a clip is shown")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer, the end of turn included")
    parser.add_argument("--prompt", default=PROMPT, help="format string over {question} {options} {first} {last}")
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second that are shown of a video")
    parser.add_argument("--limit", type=int, help="ask only the first so many questions")
    parser.add_argument("--revision", help="of a model on the hub; its main when absent")
    parser.add_argument("--allow-outside", action="store_true", help="clips may lie outside of the manifest's folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--caller", choices=CALLERS, default="auto", help="auto: transformers' own interface")
    args = parser.parse_args(argv)
    try:
        ask(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"answers_of: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
