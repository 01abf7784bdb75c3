"""generate: several completions of each prompt, whose keys and values are computed and stored once for all of them.

A decode slot whose completion is finished takes the next one at once, of whatever prompt; prompts are computed as their
completions come up. Randomness is a pure function of (seed, step, key, sample, position), and which completions share a
step follows from the list of prompts alone.
"""
import hashlib
import math
import time
from collections import Counter, deque
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from minixmd.inputs.batch import Prompt
from minixmd.learning.decoder import STEPS_PER_SYNC, Decoder

TEMPERATURES = 1e-6, 1e6  # well inside fp32: 1e-39 would make logits inf, and 1e39 a suppressed id's -inf NaN
PREFILL_TOKENS = 8192  # of prompts that are computed at once


@dataclass(frozen=True)
class Completion:
    text: str
    ids: tuple[int, ...]  # the end of turn included when it was sampled
    logprobs: tuple[float, ...]  # of each id, at the sampling temperature and over the ids that are not suppressed
    finished: bool  # False: cut by max_new_tokens


@dataclass
class Usage:
    """Where the time of generate went. Calls add to it."""

    data_s: float = 0.0  # in which prompts were waited for
    prefill_s: float = 0.0
    decode_s: float = 0.0
    rows: int = 0  # tokens that steps computed, in all slots
    tokens: int = 0  # of them those of completions

    @property
    def slot_use(self):
        return self.tokens / max(self.rows, 1)

    def write_to(self, log):
        """log: function that takes a dict. Nothing is written where no completion had a second token."""
        if self.rows:
            log({
                "data_s": round(self.data_s, 3),
                "prefill_s": round(self.prefill_s, 3),
                "decode_s": round(self.decode_s, 3),
                "slot_use": round(self.slot_use, 3),
            })


def prompt_key(prompt):
    """A digest of a Prompt's ids and media: the same question about the same clip draws the same randomness."""
    digest = hashlib.blake2b(prompt.ids_N.cpu().numpy(), digest_size=16)
    for m in prompt.media:
        as_bytes = m.features.cpu().flatten().view(torch.uint8)  # numpy has no bf16
        digest.update(as_bytes.numpy())
    return digest.hexdigest()


def uniforms(seed, step, key, sample, count):
    """(count,) fp64 in [0, 1): number t depends on (seed, step, key, sample, t) alone. It is bytes 8 t ... 8 t + 7 of
    what SHAKE-128 makes of the other four, shifted to 53 bits."""
    source = repr((seed, step, key, sample)).encode()
    stream = hashlib.shake_128(source).digest(8 * count)
    integers = np.frombuffer(stream, ">u8")
    return torch.from_numpy((integers >> 11) / 2**53)


def ends_turn(ids, processor, stop):
    """Whether the last id ends the turn or a stop string, which lies in at most as many ids as it has bytes."""
    if ids[-1] == processor.end_id:
        return True
    for string in stop:
        tail = ids[-len(string.encode()):]
        if string in processor.decode(tail):
            return True
    return False


class Schedule:
    """Which completion is written in which decode slot. Completion n p + j is sample j of prompt p.

    Args:
        prompts: iterator over Prompts; one is read when its completions come up.
        draw: function(number of a completion) -> (max_new_tokens,) fp64, the numbers that choose its tokens.
        usage: Usage. The others: as of decode.
    """

    def __init__(self, decoder, processor, prompts, draw, usage, *, max_new_tokens, stop, prefill_tokens, on_token,
                 on_prompts):
        self.decoder = decoder
        self.processor = processor
        self.prompts = prompts
        self.draw = draw
        self.usage = usage
        self.max_new_tokens = max_new_tokens
        self.stop = stop
        self.prefill_tokens = prefill_tokens
        self.on_token = on_token
        self.on_prompts = on_prompts
        self.ids = []  # of every completion so far
        self.logprobs = []
        self.ready = deque()  # completions whose prompt is computed, with a first token, but without a decode slot
        self.writing = [None] * len(decoder.prompt_of)  # the completion in each decode slot
        self.prompt_slot = {}  # of each prompt that has unfinished completions
        self.unfinished = Counter()  # completions of each prompt
        self.next_prompt = None  # read, and not yet computed

    def read_prompt(self):
        """Reads the next prompt, if there is one and none is waiting. Returns whether one is."""
        began = time.perf_counter()
        if self.next_prompt is None:
            self.next_prompt = next(self.prompts, None)
        self.usage.data_s += time.perf_counter() - began
        return self.next_prompt is not None

    def fill(self):
        """Gives free decode slots the next completions. Returns whether any slot is in use."""
        n = self.decoder.num_samples
        free = [slot for slot, i in enumerate(self.writing) if i is None]
        while len(self.ready) < len(free):
            missing = len(free) - len(self.ready)
            if not self.prefill(math.ceil(missing / n)):
                break
        slots = free[:len(self.ready)]
        if slots:
            completions = [self.ready.popleft() for _ in slots]
            tokens = [self.ids[i][-1] for i in completions]
            prompt_slots = [self.prompt_slot[i // n] for i in completions]
            uniform_ST = torch.stack([self.draw(i) for i in completions])
            self.decoder.place(slots, tokens, prompt_slots, uniform_ST)
            for slot, i in zip(slots, completions, strict=True):
                self.writing[slot] = i
        return any(i is not None for i in self.writing)

    def prefill(self, most):
        """Computes the next prompts, at most so many, of at most prefill_tokens but for one. Returns whether there were
        any, and slots for them."""
        taken = set(self.prompt_slot.values())
        free = [slot for slot in range(len(self.decoder.position_after)) if slot not in taken][:most]
        prompts, tokens = [], 0
        while len(prompts) < len(free) and self.read_prompt():
            tokens += len(self.next_prompt)
            if prompts and tokens > self.prefill_tokens:
                break
            prompts.append(self.next_prompt)
            self.next_prompt = None
        if not prompts:
            return False
        n, first = self.decoder.num_samples, len(self.ids)
        slots = free[:len(prompts)]
        completions = range(first, first + n * len(prompts))
        uniform_B = torch.stack([self.draw(i)[0] for i in completions])
        logits_GV, tokens, logprobs = self.decoder.prefill(prompts, slots, uniform_B)
        if self.on_prompts is not None:
            self.on_prompts(first // n, logits_GV)
        for p, slot in enumerate(slots, first // n):
            self.prompt_slot[p] = slot
            self.unfinished[p] = n
        for i, token, logprob in zip(completions, tokens, logprobs, strict=True):
            self.ids.append([])
            self.logprobs.append([])
            if not self.accept(i, token, logprob):
                self.ready.append(i)
        return True

    def accept(self, i, token, logprob):
        """Adds a token to completion i. Returns whether it is finished."""
        if math.isnan(logprob):
            raise ValueError("the model's logits are not finite: its weights are broken, or too large for its dtype")
        written = self.ids[i]
        written.append(token)
        self.logprobs[i].append(logprob)
        if self.on_token is not None:
            self.on_token(i, tuple(written))
        if not ends_turn(written, self.processor, self.stop) and len(written) < self.max_new_tokens:
            return False
        p = i // self.decoder.num_samples
        self.unfinished[p] -= 1
        if not self.unfinished[p]:
            del self.prompt_slot[p]
        return True

    def run(self):
        """Decodes a token in every slot, or several where steps are captured."""
        decoder = self.decoder
        lengths = [len(self.ids[i]) for i in self.writing if i is not None]
        steps = 1
        if decoder.captured:
            steps = min(STEPS_PER_SYNC, self.max_new_tokens - min(lengths))
        else:
            self.close_gaps()
            decoder.cache.rows_in_use = max(lengths)
        for step in zip(*decoder.run(steps), strict=True):
            for slot, (token, logprob) in enumerate(zip(*step, strict=True)):
                i = self.writing[slot]
                if i is None:
                    continue
                self.usage.tokens += 1
                if self.accept(i, token, logprob):
                    self.writing[slot] = None
                    decoder.prompt_of[slot] = -1
        self.usage.rows += steps * decoder.slots_in_use

    def close_gaps(self):
        """Moves the last completions to the first slots, which stand idle: a step then computes no others."""
        used = [slot for slot, i in enumerate(self.writing) if i is not None]
        others = [slot for slot in range(len(used)) if self.writing[slot] is None]
        slots = used[len(used) - len(others):]
        if others:
            self.decoder.move(slots, others)
            for slot, other in zip(slots, others, strict=True):
                self.writing[other], self.writing[slot] = self.writing[slot], None
        self.decoder.slots_in_use = len(used)

    def completions(self):
        found = []
        for ids, logprobs in zip(self.ids, self.logprobs, strict=True):
            finished = ends_turn(ids, self.processor, self.stop)
            found.append(Completion(self.processor.decode(ids), tuple(ids), tuple(logprobs), finished))
        return found


def prompt_slots_for(decode_slots, num_samples, num_prompts):
    """Prompts whose keys and values are kept at once: twice as many as fill the decode slots, for each stays until its
    slowest completion is finished."""
    filling = math.ceil(decode_slots / num_samples)
    return min(num_prompts, filling if num_samples == 1 else 2 * filling)


@torch.inference_mode()
def decode(model, processor, prompts, num_prompts, draw, *, num_samples=1, max_new_tokens, temperature, stop=(),
           decode_slots=None, longest_prompt=0, prefill_tokens=PREFILL_TOKENS, backend=None, captured=True,
           on_token=None, on_prompts=None, kept=None, usage=None):
    """num_samples Completions of each Prompt, in order, in one list; arguments as generate, and

    prompts: an iterable of at most num_prompts; one is read when its completions come up.
    draw: function(number of a completion) -> (max_new_tokens,) fp64, the numbers that choose its tokens.
    longest_prompt: tokens for which room is made at once, if it is more than the first prompt's; more is made when it
        is needed.
    prefill_tokens: of prompts that are computed at once. on_prompts: function(first, logits_GV) that takes the
        logits that follow G prompts, from number `first` on.
    kept: a dict in which the Decoder, with its memory and captured step, stays for further calls that differ in the
        prompts alone; at first empty."""
    usage = Usage() if usage is None else usage
    slots = min(decode_slots or num_samples * num_prompts, num_samples * num_prompts)
    prompt_slots = prompt_slots_for(slots, num_samples, num_prompts)
    prompts = iter(prompts)
    first = next(prompts, None)
    if first is None:
        return []
    kept = {} if kept is None else kept
    if not kept or len(kept["decoder"].prompt_of) < slots:
        kept.clear()  # before another takes memory; one with more slots than are needed stays
        kept["decoder"] = Decoder(
            model, prompt_slots, max(longest_prompt, len(first)), slots, num_samples, max_new_tokens=max_new_tokens,
            temperature=temperature, suppressed_ids=processor.suppressed_ids, end_id=processor.end_id,
            backend=backend or model.backend, captured=captured)
    decoder = kept["decoder"]
    decoder.slots_in_use, decoder.empty = len(decoder.prompt_of), True
    schedule = Schedule(
        decoder, processor, chain([first], prompts), draw, usage, max_new_tokens=max_new_tokens, stop=stop,
        prefill_tokens=prefill_tokens, on_token=on_token, on_prompts=on_prompts)
    while True:
        began, waited = time.perf_counter(), usage.data_s
        in_use = schedule.fill()
        filled = time.perf_counter()
        usage.prefill_s += filled - began - (usage.data_s - waited)
        if not in_use:
            return schedule.completions()
        schedule.run()
        usage.decode_s += time.perf_counter() - filled


def generate(model, processor, conversations, *, num_samples=1, max_new_tokens, temperature, seed, stop=(), step=0,
             keys=None, on_token=None, decode_slots=None, backend=None, captured=True, usage=None):
    """num_samples continuations of each conversation.

    Args:
        conversations: as Processor takes them, or Prompts that it made of them.
        temperature: 0 = greedy. stop: strings that end a completion (they stay in it).
        seed, step, keys: what the randomness depends on, beside the sample's number and the position; a key defaults to
            a digest of the prompt's ids and media.
        on_token: called as on_token(row, ids so far) after every new token; row = num_samples * conversation + sample.
        decode_slots: completions decoded at once; None = all. Memory: kv_cache.pool_bytes.
        backend: "triton" | "torch", of the decoding attention; None = the model's.
        captured: on a GPU "triton" also captures the step as a CUDA graph, which runs no hooks of the model's modules;
            False = each step launches its kernels.
        usage: a Usage, to which the call's times and slots are added.
    Returns a list of num_samples Completions for each conversation. Raises ValueError: an argument out of its range, a
    conversation that the processor refuses, a prompt past the model's limit, or logits that are not finite."""
    low, high = TEMPERATURES
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature != 0 and not low <= temperature <= high:
        raise ValueError(f"temperature must be 0 (greedy) or from {low:g} to {high:g}, got {temperature}")
    if isinstance(stop, str) or not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"stop must be a list of strings, none of them empty, got {stop!r}")
    if decode_slots is not None and decode_slots < 1:
        raise ValueError(f"decode_slots must be at least 1, got {decode_slots}")
    prompts = [c if isinstance(c, Prompt) else processor(c) for c in conversations]
    if not prompts:
        raise ValueError("generate needs at least one conversation, got none")
    if keys is not None and len(keys) != len(prompts):
        raise ValueError(f"keys must be one for each of the {len(prompts)} conversations, got {len(keys)}")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > processor.max_positions:
        raise ValueError(f"prompt and max_new_tokens make {longest + max_new_tokens} tokens, over the model's limit of "
                         f"{processor.max_positions}")
    if keys is None:
        keys = [prompt_key(prompt) for prompt in prompts]

    def draw(i):
        return uniforms(seed, step, keys[i // num_samples], i % num_samples, max_new_tokens)

    completions = decode(
        model, processor, prompts, len(prompts), draw, num_samples=num_samples,
        max_new_tokens=max_new_tokens, temperature=temperature, stop=stop, decode_slots=decode_slots,
        longest_prompt=longest, backend=backend, captured=captured, on_token=on_token, usage=usage)
    return [completions[start:start + num_samples] for start in range(0, len(completions), num_samples)]
