"""Prove a checkpoint on this machine: python -m minixmd.verify MODEL prints what was checked, measured and allowed.

The first checks are about the files, the next (invariances.py) need no other program, and the last compares with
transformers. Every check is one function that gives (figure, bound, passed), or the reason why it is skipped. The exit
status is 0 when none failed, 1 when one did, and 2 for bad input, a checkpoint that does not load included.
"""
import argparse
import copy
import importlib.util
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open

from minixmd import generate, load, pack
from minixmd.verify import invariances
from minixmd.verify.invariances import QUESTION, TEMPERATURE, bare, close

PUBLISHED = {  # family, decoder layers, width, vocabulary -> its parameters as published; a tied head counts once
    ("qwen2_audio", 32, 4096, 156032): ("Qwen2-Audio-7B", 8_397_094_912),
    ("qwen2_vl", 28, 3584, 152064): ("Qwen2-VL-7B", 8_291_375_616),
    ("qwen2_vl", 28, 1536, 151936): ("Qwen2-VL-2B", 2_208_985_600),
    ("qwen2_5_vl", 28, 3584, 152064): ("Qwen2.5-VL-7B", 8_292_166_656),
    ("qwen2_5_vl", 64, 5120, 152064): ("Qwen2.5-VL-32B", 33_452_718_336),
    ("qwen2_5_omni", 28, 3584, 152064): ("Qwen2.5-Omni-7B thinker", 8_931_813_888),
}
ROWS = 8  # last rows of a prompt whose logits are compared: (N, V) of a long one would not fit
TOKENS = 12  # decoded for each completion
TWICE = 1e9  # parameters from which a second copy of the model is made only when asked for


@dataclass
class Subject:
    """What the checks look at."""

    model: torch.nn.Module
    processor: object
    dtype: str
    clips: dict  # kind -> at least two media parts
    sizes: dict  # kind -> media parts of many lengths and shapes, for counting
    against: bool = False  # transformers is wanted even for a large model

    def __post_init__(self):
        self.family, self.device = self.model.config.family, self.model.lm_head.weight.device
        question, kinds = {"type": "text", "text": QUESTION}, list(self.clips)
        one, other = self.clips[kinds[0]][0], self.clips[kinds[-1]][1]
        contents = [[part, question] for parts in self.clips.values() for part in parts] + [[question, other, one]]
        self.conversations = [[{"role": "user", "content": content}] for content in [*contents, "Hello"]]
        self.prompts = [self.processor(conversation) for conversation in self.conversations]

    def media(self, kind):
        """The prompts' clips of a kind, on the model's device."""
        return [m for m in pack(self.prompts).to(self.device).media if m.kind == kind]

    def logits(self, prompts=None):
        """(ROWS, V) of each prompt's last rows, from one packed batch."""
        batch = pack(prompts or self.prompts).to(self.device)
        hidden_ND = self.model(batch)
        return [self.model.logits(hidden_ND[max(start, end - ROWS):end]) for start, end in batch.spans]

    @cached_property
    def spoken(self):
        """Two completions of every conversation, each step's hidden states, and the ids that are never sampled."""
        processor, hidden = copy.copy(self.processor), []
        processor.end_id = -1  # nothing ends the turn, so that every completion has TOKENS tokens
        hook = self.model.model.register_forward_hook(lambda module, inputs, out: hidden.append(out))
        try:
            answers = generate(self.model, processor, self.conversations, n=2, max_new_tokens=TOKENS,
                               temperature=TEMPERATURE, seed=0)
        finally:
            hook.remove()
        return answers, hidden, torch.tensor(processor.suppressed_ids, device=self.device)


# ---- what the files hold ----


def tensors(s):
    """Every tensor of the files is accounted for, and the first row of each is the one in memory."""
    wanted = {s.family.checkpoint_name(name): p for name, p in s.model.named_parameters() if "lora_" not in name}
    head = s.family.checkpoint_name("lm_head.weight")
    seen, skipped, faults = set(), Counter(), []

    def part(name):  # of the checkpoint that is not built
        return next((part for prefix, part in s.family.skipped.items() if name.startswith(prefix)), None)

    for path, names in files_of(s.processor.folder).items():
        if names and all(part(name) for name in names):  # the file need not be there
            skipped.update(map(part, names))
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if part(name):
                    skipped[part(name)] += 1
                elif name in wanted:
                    seen.add(name)
                    p, found = wanted[name], file.get_slice(name)
                    if found.get_shape() != list(p.shape) or not torch.equal(found[:1].to(p.device, p.dtype), p[:1]):
                        faults.append(f"differs: {name}")
                elif name != head or not s.model.config.tie_word_embeddings:
                    faults.append(f"unexpected: {name}")
    faults += [f"missing: {name}" for name in wanted if name not in seen]
    figure = f"{len(seen)} of {len(wanted)}" + "".join(f"; {part}'s {n} skipped" for part, n in skipped.items())
    return figure + "".join(f"; {fault}" for fault in faults[:3]), "all, none besides", not faults


def files_of(folder):
    """{path: the names that the index says it holds; none without an index}."""
    index, files = folder / "model.safetensors.index.json", {}
    if not index.is_file():
        return {folder / "model.safetensors": []}
    for name, file in json.loads(index.read_text())["weight_map"].items():
        files.setdefault(folder / file, []).append(name)
    return files


def dtypes(s):
    weights = {name: p for name, p in s.model.named_parameters() if "lora_" not in name}
    found = sorted({str(p.dtype).removeprefix("torch.") for p in weights.values()})
    bad = [name for name, p in weights.items() if not p.isfinite().all()]
    figure = ", ".join(found) + (f"; not finite: {bad[0]}" if bad else "; all finite")
    return figure, f"{s.dtype}, finite", found == [s.dtype] and not bad


def parameters(s):
    text = s.model.config.text
    family = s.family.model_type.removesuffix("_thinker")
    key = (family, text.num_hidden_layers, text.hidden_size, text.vocab_size)
    count = sum(p.numel() for name, p in s.model.named_parameters() if "lora_" not in name)
    if key not in PUBLISHED:
        return f"{count:,}", "no published size", True
    name, published = PUBLISHED[key]
    return f"{count:,}", f"{published:,} ({name})", count == published


# ---- against transformers ----


def reference(s):
    """Logits of transformers' model on our ids, positions and features."""
    count = sum(p.numel() for p in s.model.parameters())
    if not s.against and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if not s.against and count >= TWICE:
        return f"it takes a second copy of {count / 1e9:.1f}e9 parameters; --against transformers does it"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    whole = transformers.AutoModelForMultimodalLM
    kind = transformers.Qwen2_5OmniThinkerForConditionalGeneration if s.family.section else whole
    theirs = kind.from_pretrained(s.processor.folder, dtype=getattr(torch, s.dtype), attn_implementation="sdpa")
    theirs = theirs.eval().to(s.device)
    theirs.lm_head.register_forward_pre_hook(lambda module, inputs: inputs[0][:, -ROWS:])  # as ours: never (N, V)
    logits = [theirs(**inputs_of(s, prompt)).logits[0].float() for prompt in s.prompts]
    del theirs
    if s.device.type == "cuda":
        torch.cuda.empty_cache()
    with bare(s.model):  # an adapter is not in the base's files
        ours = [s.logits([prompt])[0] for prompt in s.prompts]
    figure, bound, passed = close(s, ours, logits)
    if s.dtype == "float32":
        return figure, bound, passed
    # how far below its best token the reference sees ours, in units of its largest logit: 0 when they agree
    gap = max(((b[-1].max() - b[-1, a[-1].argmax()]) / b[-1].abs().max()).item()
              for a, b in zip(ours, logits, strict=True))
    return f"{figure}, best token {gap:.2%} off", f"{bound}, <= 2 %", passed and gap <= 0.02


def inputs_of(s, prompt):
    """A Prompt in transformers' terms, on the model's device."""
    dtype, positions_3N = s.model.lm_head.weight.dtype, prompt.positions_3N
    inputs = dict(input_ids=prompt.ids_N[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                  position_ids=positions_3N[:, None] if s.family.video else positions_3N[:1])
    audios, videos = ([m for m in prompt.media if m.kind == kind] for kind in ("audio", "video"))
    if audios:  # padded to a common length, which Qwen2-Audio wants to be 30 s
        size = max(3000, *(m.features.shape[1] for m in audios))
        inputs["input_features"] = torch.stack([torch.nn.functional.pad(
            m.features, (0, size - m.features.shape[1]), value=-1.5) for m in audios]).to(dtype)
        inputs["feature_attention_mask"] = (torch.arange(size) < torch.tensor([[m.frames] for m in audios])).long()
    if videos:
        inputs["pixel_values_videos"] = torch.cat([m.features for m in videos]).to(dtype)
        inputs["video_grid_thw"] = torch.tensor([m.grid_thw for m in videos])
    return {name: value.to(s.device) for name, value in inputs.items()}


CHECKS = {
    "every tensor, and no other": tensors,
    "dtype": dtypes,
    "parameters": parameters,
    "placeholders = features": invariances.placeholders,
    "clips encoded together = alone, plainly": invariances.towers,
    "packed = one at a time": invariances.packed,
    "cached decoding = full forward": invariances.cached,
    "log-probs generated = scored": invariances.logprobs,
    "another clip changes the answer": invariances.another_clip,
    "the same clip does not": invariances.same_clip,
    "adapter off = base model": invariances.adapter_off,
    "adapter exported = re-read": invariances.adapter_export,
    "logits = transformers'": reference,
}


# ---- the command ----


def sound(seconds, seed):
    """A media part: a rising tone in noise, 16 kHz."""
    t_S = torch.arange(round(seconds * 16000)) / 16000
    noise_S = torch.randn(len(t_S), generator=torch.Generator().manual_seed(seed))
    return {"type": "audio", "audio": 0.3 * torch.sin((1500 + 2500 * seed) * t_S * (1 + t_S / 9)) + 0.03 * noise_S}


def film(frames, height, width, seed):
    """A media part: waves of colour that move, uint8 (frames, 3, height, width)."""
    t, c, y, x = torch.meshgrid(*(torch.arange(n).float() for n in (frames, 3, height, width)), indexing="ij")
    wave = torch.sin((1 + c) * x / (9 + 5 * seed) + y / 17 + (2 * seed - 1) * t)
    return {"type": "video", "video": (127.5 + 127.5 * wave).to(torch.uint8), "min_pixels": 28 * 28}


def subject(model, processor, dtype, audios=(), videos=(), against=False):
    """A loaded model with the clips that are given, made up to two of each kind that it takes.

    Raises:
        ValueError: a clip that cannot be used, or of a kind that the model does not take.
    """
    clips, sizes = {}, {}
    for kind, given, made, more in (
        ("audio", audios, (sound(1.337, 0), sound(2.71, 1)), (sound(x, 0) for x in (0.021, 0.1, 0.99, 4.57, 31))),
        ("video", videos, (film(5, 150, 170, 0), film(4, 100, 64, 1)),
         (film(*shape, 0) for shape in ((1, 28, 28), (3, 60, 90), (5, 200, 130)))),
    ):  # fmt: skip
        if getattr(model.config.family, kind) is None and given:
            raise ValueError(f"a {model.config.family.model_type} model cannot take {kind}, got {given[0]}")
        if getattr(model.config.family, kind) is not None:
            parts = [{"type": kind, kind: path} for path in dict.fromkeys(given)]
            clips[kind], sizes[kind] = [*parts, *made[len(parts):]], list(more)
    return Subject(model, processor, dtype, clips, sizes, against)


@torch.no_grad()
def run(name, s):
    """One check: (figure, bound, "PASS" | "FAIL" | "SKIP"). What a check raises is its figure: a broken checkpoint may
    fail anywhere."""
    try:
        outcome = CHECKS[name](s)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "no error", "FAIL"
    return (outcome, "", "SKIP") if isinstance(outcome, str) else (*outcome[:2], "PASS" if outcome[2] else "FAIL")


def main(argv=None):
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m minixmd.verify", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what minixmd.load takes: a model's folder or an adapter's")
    parser.add_argument("--against", choices=["transformers"], help="compare logits with it, whatever the size; "
                        "otherwise only a model below 1e9 parameters is compared, if it is installed")
    parser.add_argument("--audio", action="append", default=[], metavar="FILE", help="a clip to check with; repeatable")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="the same for video")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=list(invariances.FLOOR))
    args = parser.parse_args(argv)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    start = time.monotonic()
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but torch sees no GPU")
        if args.against and importlib.util.find_spec("transformers") is None:
            raise ValueError("--against transformers needs transformers: pip install transformers")
        if missing := [path for path in args.audio + args.video if not Path(path).is_file()]:
            raise ValueError(f"{missing[0]}: no such file")
        torch.backends.cudnn.allow_tf32 = False  # else float32 convolutions multiply with 10 bits on a GPU
        model, processor = load(args.model, device=device, dtype=getattr(torch, args.dtype))
        s = subject(model, processor, args.dtype, args.audio, args.video, bool(args.against))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"minixmd: {error}", file=sys.stderr)
        return 2
    print(f"{args.model}: {s.family.model_type}, {args.dtype} on {device}, torch {torch.__version__}\n")
    print(f"{'check':<40}{'measured':<36}bound")
    results = Counter()
    for name in CHECKS:
        figure, bound, result = run(name, s)
        results[result] += 1
        print(f"{name:<40}{figure:<35} {bound:<25} {result}", flush=True)
    print(f"\n{results['PASS']} passed, {results['FAIL']} failed, {results['SKIP']} skipped, "
          f"{time.monotonic() - start:.0f} s")
    return int(results["FAIL"] > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
