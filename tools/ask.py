"""Ask a model about a clip and watch it answer: python tools/ask.py MODEL --audio dog.wav "What is this sound?"

The answer goes to stdout as it is generated, everything else to stderr.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from minixmd import generate, load  # noqa: E402


class Streamer:
    """generate's on_token: writes the text of a growing list of ids, never half a character.

    A token of a byte-level BPE may end inside a character. That end decodes to U+FFFD and waits for the next token.
    """

    def __init__(self, decode, out):
        self.decode, self.out, self.written = decode, out, 0

    def __call__(self, row, ids):
        self.write(self.decode(ids).rstrip("\ufffd"))

    def write(self, text):
        """Writes what is new in the text so far."""
        self.out.write(text[self.written:])
        self.out.flush()
        self.written = max(self.written, len(text))


def conversation_of(args):
    """A user turn with the clips and the question, as the processor takes it."""
    content = []
    for path in args.audio:
        content.append({"type": "audio", "audio": path})
    for path in args.video:
        part = {"type": "video", "video": path}
        if args.fps is not None:
            part["fps"] = args.fps
        if args.use_audio:
            part["use_audio"] = True
        content.append(part)
    content.append({"type": "text", "text": args.question})
    return [{"role": "user", "content": content}]


def check_arguments(args):
    """Raises ValueError for what can be known before a large model is read."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU")
    if args.fps is not None and not 0 < args.fps < float("inf"):
        raise ValueError(f"--fps must be above 0, got {args.fps}")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 (the likeliest token) or above, got {args.temperature}")
    if not args.video and (args.use_audio or args.fps is not None):
        raise ValueError("--use-audio and --fps are about a video, and there is no --video")
    for path in args.audio + args.video:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")


def load_model(args):
    """(model, processor), with a line on stderr before and after."""
    device, dtype, hardware = args.device, args.dtype, f"cpu, {torch.get_num_threads()} threads"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    print(f"loading {args.model} in {dtype} on {hardware}", file=sys.stderr, flush=True)
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions would multiply with 10 bits
    start = time.monotonic()
    model, processor = load(args.model, device=device, dtype=getattr(torch, dtype))
    count = sum(p.numel() for p in model.parameters())
    print(f"{processor.family.model_type}, {count:,} parameters, loaded in {time.monotonic() - start:.1f} s",
          file=sys.stderr, flush=True)
    return model, processor


def ask(args):
    """Prints the model's answer. Raises ValueError and OSError for what is wrong with the input."""
    check_arguments(args)
    model, processor = load_model(args)
    stream = Streamer(processor.decode, sys.stdout)
    [[answer]] = generate(model, processor, [conversation_of(args)], max_new_tokens=args.max_new_tokens,
                          temperature=args.temperature, seed=args.seed, on_token=stream)
    stream.write(answer.text)  # with bytes that never became a character
    print(flush=True)
    if not answer.finished:
        print(f"cut after {args.max_new_tokens} tokens; --max-new-tokens allows more", file=sys.stderr)


def main(argv=None):
    """Returns the exit status; what is wrong with the input is one line on stderr."""
    parser = argparse.ArgumentParser(prog="ask.py", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what minixmd.load takes: a model's folder or an adapter's")
    parser.add_argument("question")
    parser.add_argument("--audio", action="append", default=[], metavar="FILE", help="a clip to hear; repeatable")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="a clip to see; repeatable")
    parser.add_argument("--use-audio", action="store_true", help="hear the videos' own sound too (Omni)")
    parser.add_argument("--fps", type=float, help="frames a second that are looked at; 1 when absent")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws at a temperature above 0")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                        help="auto: bfloat16 on a GPU, float32 on the CPU")
    args = parser.parse_args(argv)
    try:
        ask(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"ask: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
