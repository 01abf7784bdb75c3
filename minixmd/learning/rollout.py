"""generate: several completions of each prompt, whose keys and values are computed and stored once for all of them.

Prompts take prompt slots and completions decode slots: prompt slot g has the decode slots n g ... n g + n - 1, where n
is the number of samples a prompt. When all completions of a prompt slot are finished, the next prompt gets it. A step
decodes one token in every slot; it is tensor code that never looks at a value, so on a GPU it is captured once as a
CUDA graph and replayed. Finished slots keep decoding until their prompt slot is refilled or the batch drains; their
output is ignored, which keeps the graph static. Randomness is a pure function of (seed, step, key, sample, position),
and which completions share a step follows from the list of prompts alone.
"""
import hashlib
import math
from collections import deque
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from minixmd.inputs.batch import Batch, Prompt, pack, send
from minixmd.learning.kv_cache import KVCache, pool_shapes
from minixmd.runs.heartbeat import beat

STEPS_PER_SYNC = 8  # captured steps between two looks at what they sampled
TEMPERATURES = 1e-6, 1e6  # well inside fp32: 1e-39 would make logits inf, and 1e39 a suppressed id's -inf NaN


@dataclass(frozen=True)
class Completion:
    text: str
    ids: tuple[int, ...]  # the end of turn included when it was sampled
    logprobs: tuple[float, ...]  # of each id, at the sampling temperature and over the ids that are not suppressed
    finished: bool  # False: cut by max_new_tokens


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


def sample(logits_BV, uniform_B, temperature, suppressed_ids):
    """Inverse-CDF draw from softmax(logits / temperature) without the suppressed ids; temperature 0 takes the largest.

    logits_BV: (B, V) fp32. uniform_B: (B,) fp64 in [0, 1), not read at temperature 0. suppressed_ids: (X,) int64.
    Returns ids (B,) int64 and their log-probabilities (B,) fp32 (at temperature 1 when temperature is 0)."""
    logits_BV = logits_BV.index_fill(1, suppressed_ids, -torch.inf)
    logp_BV = F.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids_B = logits_BV.argmax(-1)
    else:
        cdf_BV = logp_BV.double().exp().cumsum(-1)  # fp64: 150,000 fp32 terms drift by more than a rare token's mass
        total_B = cdf_BV[:, -1]
        below_total_B = torch.nextafter(total_B, torch.zeros_like(total_B))
        u_B = torch.minimum(uniform_B * total_B, below_total_B)
        ids_B = torch.searchsorted(cdf_BV, u_B[:, None], right=True).squeeze(1)
        ids_B = ids_B.clamp(max=cdf_BV.shape[1] - 1)  # NaN logits would point beyond; decode refuses them
    return ids_B, logp_BV.gather(1, ids_B[:, None]).squeeze(1)


class Decoder:
    """The state of all slots as tensors that keep their addresses, and the two operations on it: fill and step."""

    def __init__(self, model, prompt_slots, longest_prompt, num_samples, *, max_new_tokens, temperature, suppressed_ids,
                 end_id, backend, captured=True):
        self.model = model
        self.num_samples = num_samples
        self.temperature = temperature
        self.end_id = end_id
        self.device = device = model.device
        B = prompt_slots * num_samples
        shapes = pool_shapes(model.config.text, prompt_slots, longest_prompt, B, max_new_tokens)
        self.cache = KVCache(shapes, device, model.dtype, backend)
        self.rows = self.cache.k.shape[3]  # of a decode slot in the cache
        integers = dict(dtype=torch.int64, device=device)
        self.suppressed_ids = torch.as_tensor(suppressed_ids, **integers)
        self.token_B = torch.zeros(B, **integers)  # each slot's last id
        self.start_B = torch.zeros(B, **integers)  # the position of its first token
        self.uniform_BT = torch.zeros(B, self.rows + 1, dtype=torch.float64, device=device)
        self.ids_SB = torch.zeros(STEPS_PER_SYNC, B, **integers)
        self.logp_SB = torch.zeros(STEPS_PER_SYNC, B, device=device)
        self.next_row_1 = torch.zeros(1, **integers)  # row of these two that a step writes
        self.captured = captured and backend == "triton" and device.type == "cuda"
        self.replay = capture(self.step) if self.captured else None  # not self.step: a cycle would keep the pools alive

    def fill(self, prompts, prompt_slots, uniform_BT):
        """Prefills prompts into prompt slots and draws the first token of their completions.

        prompts: G Prompts. prompt_slots: their slots. uniform_BT: the uniforms of their G num_samples completions.
        Returns the logits after each prompt (G, V), and lists of the first tokens' ids and log-probabilities."""
        n = self.num_samples
        batch = pack(prompts)
        lengths_G = torch.tensor([len(prompt) for prompt in prompts])
        slot_G = torch.tensor(prompt_slots)
        slot_B = (n * slot_G[:, None] + torch.arange(n)).flatten()
        row_N = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        last_G = lengths_G.cumsum(0) - 1
        integers = [lengths_G, slot_G, slot_B, slot_G.repeat_interleave(lengths_G), row_N, last_G]
        lengths_G, slot_G, slot_B, slot_N, row_N, last_G = send(integers, self.device)
        [uniform_BT] = send([uniform_BT], self.device)
        batch = batch.to(self.device)
        self.cache.clear(slot_G, slot_B)
        attend = partial(self.cache.prefill, batch.segments, slot_N, row_N)
        hidden_ND = self.model(batch, attend)
        logits_GV = self.model.logits(hidden_ND[last_G])
        self.cache.prompt_length_G[slot_G] = lengths_G
        next_position_G = batch.positions_3N[:, last_G].amax(0) + 1
        self.start_B[slot_B] = next_position_G.repeat_interleave(n)
        self.uniform_BT[slot_B, :uniform_BT.shape[1]] = uniform_BT
        logits_BV = logits_GV.repeat_interleave(n, 0)
        uniform_B = self.uniform_BT[slot_B, 0]
        ids_B, logp_B = sample(logits_BV, uniform_B, self.temperature, self.suppressed_ids)
        self.token_B[slot_B] = ids_B
        return logits_GV, ids_B.tolist(), logp_B.tolist()

    def step(self):
        """Decodes one token in every slot. One whose token ends the turn, or fills the pool, starts over at row 0: from
        then on its output is ignored, and few rows are read for it."""
        length_B = self.cache.length_B
        positions_3B = (self.start_B + length_B).expand(3, -1)
        hidden_BD = self.model(Batch(self.token_B, positions_3B), self.cache.decode)
        logits_BV = self.model.logits(hidden_BD)
        uniform_B = self.uniform_BT.gather(1, length_B[:, None] + 1).squeeze(1)
        ids_B, logp_B = sample(logits_BV, uniform_B, self.temperature, self.suppressed_ids)
        self.ids_SB.index_copy_(0, self.next_row_1, ids_B[None])
        self.logp_SB.index_copy_(0, self.next_row_1, logp_B[None])
        self.next_row_1.add_(1)
        self.token_B.copy_(ids_B)
        next_length_B = (length_B + 1) % self.rows
        length_B.copy_(next_length_B.where(ids_B != self.end_id, 0))

    def run(self, steps):
        """`steps` <= STEPS_PER_SYNC steps: lists of every slot's ids and log-probabilities, (steps, slots)."""
        beat()
        self.next_row_1.zero_()
        for _ in range(steps):
            (self.replay or self.step)()
        return self.ids_SB[:steps].tolist(), self.logp_SB[:steps].tolist()


def capture(step):
    """A CUDA graph of step(), as a function that replays it. step() is run once before, on the empty state, in which
    kernels are compiled and libraries take their work space."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def ends_turn(ids, processor, stop):
    """Whether the last id ends the turn or a stop string, which lies in at most as many ids as it has bytes."""
    if ids[-1] == processor.end_id:
        return True
    for string in stop:
        tail = ids[-len(string.encode()):]
        if string in processor.decode(tail):
            return True
    return False


@torch.inference_mode()
def decode(model, processor, prompts, uniform_BT, *, num_samples=1, max_new_tokens, temperature, stop=(),
           decode_slots=None, backend=None, captured=True, on_token=None, on_prompts=None):
    """num_samples Completions of each Prompt, in order, in one list; arguments as generate, and

    uniform_BT: (num_samples len(prompts), max_new_tokens) fp64, the numbers that choose the tokens; None at temperature
    0. on_prompts: function(logits_GV) that takes the logits that follow the next G prompts."""
    n = num_samples
    num_completions = n * len(prompts)
    prompt_slots = len(prompts)
    if decode_slots is not None:
        prompt_slots = min(decode_slots // n, len(prompts))
    decoder = Decoder(
        model, prompt_slots, max(map(len, prompts)), n, max_new_tokens=max_new_tokens, temperature=temperature,
        suppressed_ids=processor.suppressed_ids, end_id=processor.end_id, backend=backend or model.backend,
        captured=captured)
    if uniform_BT is None:
        uniform_BT = torch.zeros(num_completions, max_new_tokens, dtype=torch.float64)
    ids = [[] for _ in range(num_completions)]
    logprobs = [[] for _ in range(num_completions)]
    writing = [None] * (prompt_slots * n)  # the completion in each decode slot; None: its output is ignored

    def accept(slot, token, logp):
        i = writing[slot]
        if i is None:
            return
        if math.isnan(logp):
            raise ValueError("the model's logits are not finite: its weights are broken, or too large for its dtype")
        written = ids[i]
        written.append(token)
        logprobs[i].append(logp)
        if on_token is not None:
            on_token(i, tuple(written))
        if ends_turn(written, processor, stop) or len(written) == max_new_tokens:
            writing[slot] = None

    waiting = deque(range(len(prompts)))
    while True:
        free = [g for g in range(prompt_slots) if writing[n * g:n * g + n] == [None] * n]
        if free and waiting:
            free = free[:len(waiting)]
            new = [waiting.popleft() for _ in free]
            completions = [n * i + j for i in new for j in range(n)]
            slots = [n * g + j for g in free for j in range(n)]
            new_prompts = [prompts[i] for i in new]
            logits_GV, *first = decoder.fill(new_prompts, free, uniform_BT[completions])
            if on_prompts is not None:
                on_prompts(logits_GV)
            for slot, i, token, logp in zip(slots, completions, *first, strict=True):
                writing[slot] = i
                accept(slot, token, logp)
        elif len(free) == prompt_slots:
            break
        else:
            lengths = [len(ids[i]) for i in writing if i is not None]
            steps = 1
            if decoder.captured:
                steps = min(STEPS_PER_SYNC, max_new_tokens - min(lengths))
            else:
                decoder.cache.rows_in_use = max(lengths)
            for step in zip(*decoder.run(steps), strict=True):
                for slot, (token, logp) in enumerate(zip(*step, strict=True)):
                    accept(slot, token, logp)
    found = []
    for written, logps in zip(ids, logprobs, strict=True):
        finished = ends_turn(written, processor, stop)
        found.append(Completion(processor.decode(written), tuple(written), tuple(logps), finished))
    return found


def generate(model, processor, conversations, *, num_samples=1, max_new_tokens, temperature, seed, stop=(), step=0,
             keys=None, on_token=None, decode_slots=None, backend=None, captured=True):
    """num_samples continuations of each conversation.

    Args:
        conversations: as Processor takes them, or Prompts that it made of them.
        temperature: 0 = greedy. stop: strings that end a completion (they stay in it).
        seed, step, keys: what the randomness depends on, beside the sample's number and the position; a key defaults to
            a digest of the prompt's ids and media.
        on_token: called as on_token(row, ids so far) after every new token; row = num_samples * conversation + sample.
        decode_slots: completions decoded at once, at least num_samples; None = all. Memory: kv_cache.pool_bytes.
        backend: "triton" | "torch", of the decoding attention; None = the model's.
        captured: on a GPU "triton" also captures the step as a CUDA graph, which runs no hooks of the model's modules;
            False = each step launches its kernels.
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
    if decode_slots is not None and decode_slots < num_samples:
        raise ValueError(f"decode_slots must be at least num_samples = {num_samples}, the completions of a prompt, got "
                         f"{decode_slots}")
    prompts = [c if isinstance(c, Prompt) else processor(c) for c in conversations]
    if not prompts:
        raise ValueError("generate needs at least one conversation, got none")
    if keys is not None and len(keys) != len(prompts):
        raise ValueError(f"keys must be one for each of the {len(prompts)} conversations, got {len(keys)}")
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > processor.max_positions:
        raise ValueError(f"prompt and max_new_tokens make {longest} tokens, over the model's limit of "
                         f"{processor.max_positions}")
    if keys is None:
        keys = [prompt_key(prompt) for prompt in prompts]
    rows = [uniforms(seed, step, key, i, max_new_tokens) for key in keys for i in range(num_samples)]
    completions = decode(
        model, processor, prompts, torch.stack(rows), num_samples=num_samples, max_new_tokens=max_new_tokens,
        temperature=temperature, stop=stop, decode_slots=decode_slots, backend=backend, captured=captured,
        on_token=on_token)
    return [completions[start:start + num_samples] for start in range(0, len(completions), num_samples)]
