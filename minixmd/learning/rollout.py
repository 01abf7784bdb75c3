"""generate: n completions of each prompt. A prompt's keys and values are computed and stored once for all of them.

Prompts take prompt_slots, and their completions decode_slots: place g has decode_slots n g ... n g + n - 1. When all completions of a place
are over, the next prompt gets it. A step moves every slot by one token; it is tensor code without a look at a value, so
on a GPU it is captured once and replayed. Slots that are over go on meanwhile, unread. Randomness is a pure function of
(seed, step, key, sample, position), and who decodes beside whom follows from the list of prompts alone.
"""
import hashlib
import math
from collections import deque
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from minixmd.inputs.batch import Prompt, pack
from minixmd.kernels.decode import decode_attention
from minixmd.models.attention import attend

SYNC = 8  # captured steps between two looks at what they sampled
TEMPERATURES = 1e-6, 1e6  # well inside fp32, where 1e-39 would make logits inf and 1e39 a suppressed id's -inf NaN


@dataclass(frozen=True)
class Completion:
    text: str
    ids: tuple[int, ...]  # the end of turn included when it was sampled
    logprobs: tuple[float, ...]  # of each id, at the sampling temperature and over the ids that are not suppressed
    finished: bool  # False: cut by max_new_tokens


# ---- randomness ----


def prompt_key(prompt):
    """A digest of a Prompt's ids and media: the same question about the same clip draws the same randomness."""
    digest = hashlib.blake2b(prompt.ids_N.cpu().numpy().tobytes(), digest_size=16)
    for m in prompt.media:
        digest.update(m.features.contiguous().cpu().view(torch.uint8).numpy().tobytes())  # numpy has no bf16
    return digest.hexdigest()


def uniforms(seed, step, key, sample, count):
    """(count,) fp64 in [0, 1): number t depends on (seed, step, key, sample, t) alone. It is bytes 8 t ... 8 t + 7 of
    what SHAKE-128 makes of the rest, shifted to 53 bits; asking for more of them changes none."""
    stream = hashlib.shake_128(repr((seed, step, key, sample)).encode()).digest(8 * count)
    return torch.from_numpy((np.frombuffer(stream, ">u8") >> 11) / 2**53)


def sample(logits_BV, uniform_B, temperature, suppressed_ids):
    """Inverse-CDF draw from softmax(logits / temperature) without the suppressed ids; temperature 0 takes the largest.

    Args:
        logits_BV: (B, V) fp32. uniform_B: (B,) fp64 in [0, 1), not read at temperature 0. suppressed_ids: (X,) int64.
    Returns:
        ids (B,) int64 and their log-probabilities (B,) fp32 (at temperature 1 when temperature is 0).
    """
    logits_BV = logits_BV.index_fill(1, suppressed_ids, -torch.inf)
    logp_BV = F.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids_B = logits_BV.argmax(-1)
    else:
        cdf_BV = logp_BV.double().exp().cumsum(-1)  # fp64: 150,000 fp32 terms drift by more than a rare token's mass
        total_B = cdf_BV[:, -1]
        u_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))  # below the top
        ids_B = torch.searchsorted(cdf_BV, u_B[:, None], right=True).squeeze(1)
        ids_B = ids_B.clamp(max=cdf_BV.shape[1] - 1)  # NaN logits would point beyond; decode refuses them
    return ids_B, logp_BV.gather(1, ids_B[:, None]).squeeze(1)


# ---- keys and values ----


def pool_shapes(text, prompt_slots, longest, decode_slots, max_new_tokens):
    """The shapes of the two pools of keys and values, (2, layers, ., kv heads, rows, K) each: of prompts of up to
    `longest` tokens, and of completions, whose last token needs no row."""
    K = text.hidden_size // text.num_attention_heads
    return tuple((2, text.num_hidden_layers, count, text.num_key_value_heads, rows, K)
                 for count, rows in ((prompt_slots, longest), (decode_slots, max(max_new_tokens - 1, 1))))


def pool_bytes(text, prompt_slots, longest, decode_slots, max_new_tokens, dtype):
    """Bytes of both pools: what a Cache of these sizes allocates."""
    return sum(map(math.prod, pool_shapes(text, prompt_slots, longest, decode_slots, max_new_tokens))) * dtype.itemsize


class Cache:
    """Keys and values of prompts, once each, and of their completions; slot b's prompt is in place b // n.

    k, v: (layers, decode_slots, J, C, K), of which `length_B` rows a slot are real. prompt_k, prompt_v: (layers, prompt_slots, J, P,
    K), of which `prompt_length_G`.
    """

    def __init__(self, text, prompt_slots, longest, decode_slots, max_new_tokens, device, dtype, backend):
        self.pools = [torch.empty(shape, device=device, dtype=dtype)
                      for shape in pool_shapes(text, prompt_slots, longest, decode_slots, max_new_tokens)]
        (self.prompt_k, self.prompt_v), (self.k, self.v) = self.pools
        self.prompt_length_G = torch.ones(prompt_slots, dtype=torch.int64, device=device)
        self.length_B = torch.zeros(decode_slots, dtype=torch.int64, device=device)
        self.backend, self.used = backend, self.k.shape[3]  # used: rows of C beyond which no slot that counts has any

    def clear(self, place_G, slot_B):
        """Zeros where the last tenants' rows are: a weight of 0 hides a stale value, but not a NaN."""
        for pool, at in zip(self.pools, (place_G, slot_B), strict=True):
            pool[:, :, at] = 0
        self.length_B[slot_B] = 0

    def prefill(self, segments, place_N, row_N, layer, q_NHK, k_NJK, v_NJK):
        """attend over packed prompts, keeping row n's key and value as row row_N[n] of place place_N[n]."""
        self.prompt_k[layer][place_N, :, row_N] = k_NJK
        self.prompt_v[layer][place_N, :, row_N] = v_NJK
        return attend(q_NHK, k_NJK, v_NJK, segments)

    def decode(self, layer, q_BHK, k_BJK, v_BJK):
        """One new row a slot: its key and value take the next place, and it sees its prompt and all its own."""
        slot_B = torch.arange(len(q_BHK), device=q_BHK.device)
        self.k[layer][slot_B, :, self.length_B] = k_BJK
        self.v[layer][slot_B, :, self.length_B] = v_BJK
        return decode_attention(q_BHK, self.prompt_k[layer], self.prompt_v[layer], self.prompt_length_G,
                                self.k[layer, :, :, :self.used], self.v[layer, :, :, :self.used], self.length_B + 1,
                                self.backend)


# ---- the device's side ----


class Decoder:
    """The state of `prompt_slots` prompts and n completions of each, as tensors that keep their memory, and what moves it."""

    def __init__(self, model, prompt_slots, longest, n, *, max_new_tokens, temperature, suppressed_ids, end_id, backend):
        self.model, self.n, self.temperature, self.end_id = model, n, temperature, end_id
        self.device, dtype, B = model.lm_head.weight.device, model.lm_head.weight.dtype, prompt_slots * n
        self.cache = Cache(model.config.text, prompt_slots, longest, B, max_new_tokens, self.device, dtype, backend)
        self.suppressed_ids = torch.as_tensor(suppressed_ids, dtype=torch.int64, device=self.device)
        self.token_B, self.start_B = torch.zeros(2, B, dtype=torch.int64, device=self.device)  # last id; first position
        self.uniform_BT = torch.zeros(B, self.cache.k.shape[3] + 1, dtype=torch.float64, device=self.device)
        self.ids_SB = torch.zeros(SYNC, B, dtype=torch.int64, device=self.device)
        self.logp_SB = torch.zeros(SYNC, B, device=self.device)
        self.at_1 = torch.zeros(1, dtype=torch.int64, device=self.device)  # row of these that a step writes
        self.captured = backend == "triton" and self.device.type == "cuda"
        self.replay = capture(self.step) if self.captured else None  # not self.step: a cycle would keep the pools alive

    def fill(self, prompts, prompt_slots, uniform_BT):
        """Put prompts into prompt_slots and draw the first token of their completions, whose uniforms are given in order.

        Returns the logits after each prompt, (G, V), and ids and log-probs of the n G tokens."""
        device, n = self.device, self.n
        batch, lengths_G = pack(prompts).to(device), torch.tensor([len(prompt) for prompt in prompts], device=device)
        place_G = torch.tensor(prompt_slots, device=device)
        slot_B = (n * place_G[:, None] + torch.arange(n, device=device)).flatten()
        row_N = torch.cat([torch.arange(len(prompt), device=device) for prompt in prompts])
        self.cache.clear(place_G, slot_B)
        hidden_ND = self.model.model(self.model.embed(batch), batch.positions_3N, partial(
            self.cache.prefill, batch.segments, place_G.repeat_interleave(lengths_G, output_size=len(row_N)), row_N))
        last_G = torch.tensor([end - 1 for _, end in batch.spans], device=device)
        logits_GV = self.model.logits(hidden_ND[last_G])
        self.cache.prompt_length_G[place_G] = lengths_G
        self.start_B[slot_B] = (batch.positions_3N[:, last_G].amax(0) + 1).repeat_interleave(n)
        self.uniform_BT[slot_B, :uniform_BT.shape[1]] = uniform_BT.to(device)
        ids_B, logp_B = sample(logits_GV.repeat_interleave(n, 0), self.uniform_BT[slot_B, 0], self.temperature,
                               self.suppressed_ids)
        self.token_B[slot_B] = ids_B
        return logits_GV, ids_B.tolist(), logp_B.tolist()

    def step(self):
        """One token further in every slot. A slot whose token ends the turn, or fills the pool, starts over at row 0:
        from then on nobody reads it, and its rows cost little."""
        length_B = self.cache.length_B
        hidden_BD = self.model.model(self.model.model.embed_tokens(self.token_B),
                                     (self.start_B + length_B).expand(3, -1), self.cache.decode)
        uniform_B = self.uniform_BT.gather(1, length_B[:, None] + 1).squeeze(1)
        ids_B, logp_B = sample(self.model.logits(hidden_BD), uniform_B, self.temperature, self.suppressed_ids)
        self.ids_SB.index_copy_(0, self.at_1, ids_B[None])
        self.logp_SB.index_copy_(0, self.at_1, logp_B[None])
        self.at_1.add_(1)
        self.token_B.copy_(ids_B)
        self.cache.length_B.copy_(((length_B + 1) % self.cache.k.shape[3]).where(ids_B != self.end_id, 0))

    def run(self, steps):
        """`steps` <= SYNC steps: ids and log-probs of every slot, (steps, decode_slots) as lists."""
        self.at_1.zero_()
        for _ in range(steps):
            (self.replay or self.step)()
        return self.ids_SB[:steps].tolist(), self.logp_SB[:steps].tolist()


def capture(step):
    """A CUDA graph of step(), as a function that replays it. It is run once before, on the empty state: kernels are
    compiled then, and libraries take their work space."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# ---- the host's side ----


def _stopped(decode, ids, stop):
    """Whether one of the strings ends with the last id: it lies in as many ids as it has bytes, for each has one."""
    return any(string in decode(ids[-len(string.encode()):]) for string in stop)


@torch.inference_mode()
def decode(model, processor, prompts, uniform_BT, *, n=1, max_new_tokens, temperature, suppressed_ids, stop=(), decode_slots=None,
           backend="torch", on_token=None, on_prompts=None):
    """n Completions of each Prompt, in order, in one list; arguments as generate, and

        uniform_BT: (n prompts, max_new_tokens) fp64, the numbers that choose the tokens; None at temperature 0.
        suppressed_ids: ids that are never sampled, a list or an int64 tensor.
        on_prompts: called as on_prompts(logits_GV) with the logits that follow the next G prompts.
    """
    rows, prompt_slots = n * len(prompts), len(prompts) if decode_slots is None else min(decode_slots // n, len(prompts))
    d = Decoder(model, prompt_slots, max(map(len, prompts)), n, max_new_tokens=max_new_tokens, temperature=temperature,
                suppressed_ids=suppressed_ids, end_id=processor.end_id, backend=backend)
    if uniform_BT is None:
        uniform_BT = torch.zeros(rows, max_new_tokens, dtype=torch.float64)
    ids, logprobs, finished = [[] for _ in range(rows)], [[] for _ in range(rows)], [False] * rows
    row_at = [None] * (prompt_slots * n)  # which of the rows a slot's tokens belong to; None: to none any more
    waiting = deque(range(len(prompts)))

    def accept(slot, token, logp):
        row = row_at[slot]
        if row is None:
            return
        if math.isnan(logp):
            raise ValueError("the model's logits are not finite: its weights are broken, or too large for "
                             f"{model.lm_head.weight.dtype}")
        ids[row].append(token)
        logprobs[row].append(logp)
        if on_token is not None:
            on_token(row, tuple(ids[row]))
        finished[row] = token == processor.end_id or _stopped(processor.decode, ids[row], stop)
        if finished[row] or len(ids[row]) == max_new_tokens:
            row_at[slot] = None

    while True:
        free = [g for g in range(prompt_slots) if row_at[n * g:n * g + n] == [None] * n]
        if free and waiting:
            free, new = zip(*[(g, waiting.popleft()) for g in free[:len(waiting)]], strict=True)
            of = [n * i + j for i in new for j in range(n)]
            logits_GV, *drawn = d.fill([prompts[i] for i in new], free, uniform_BT[of])
            if on_prompts is not None:
                on_prompts(logits_GV)
            at = [n * g + j for g in free for j in range(n)]
            for slot, row in zip(at, of, strict=True):
                row_at[slot] = row
            for slot, token, logp in zip(at, *drawn, strict=True):
                accept(slot, token, logp)
        elif len(free) == prompt_slots:
            break
        else:
            lengths = [len(ids[row]) for row in row_at if row is not None]
            if not d.captured:
                d.cache.used = max(lengths)
            for drawn in zip(*d.run(min(SYNC, max_new_tokens - min(lengths)) if d.captured else 1), strict=True):
                for slot, (token, logp) in enumerate(zip(*drawn, strict=True)):
                    accept(slot, token, logp)
    return [Completion(processor.decode(i), tuple(i), tuple(p), f)
            for i, p, f in zip(ids, logprobs, finished, strict=True)]


def generate(model, processor, conversations, *, n=1, max_new_tokens, temperature, seed, stop=(), step=0, keys=None,
             on_token=None, decode_slots=None, backend="torch"):
    """n continuations of each conversation.

    Args:
        conversations: as Processor takes them, or Prompts that it made of them.
        temperature: 0 = greedy. stop: strings that end a completion (they stay in it).
        seed, step, keys: what the randomness depends on, beside the sample's number and the position; a key defaults to
            a digest of the prompt's ids and media.
        on_token: called as on_token(row, ids so far) after every new token; row = n * conversation + sample.
        decode_slots: how many completions are decoded at once, at least n; None = all. Memory: pool_bytes.
        backend: "triton" | "torch", of the decoding attention; on a GPU "triton" also captures the step as a CUDA graph,
            which runs no hooks of the model's modules.
    Returns:
        A list of n Completions for each conversation.
    Raises:
        ValueError: no conversation, or one that the processor refuses; n or max_new_tokens < 1, a prompt past the
            model's limit, a temperature that is neither 0 nor within TEMPERATURES, a stop that is one string or holds
            an empty one, fewer decode_slots than n, not as many keys as conversations, or logits that are not finite.
    """
    low, high = TEMPERATURES
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature != 0 and not low <= temperature <= high:
        raise ValueError(f"temperature must be 0 (greedy) or from {low:g} to {high:g}, got {temperature}")
    if isinstance(stop, str) or not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"stop must be a list of strings, none of them empty, got {stop!r}")
    if decode_slots is not None and decode_slots < n:
        raise ValueError(f"decode_slots must be at least n = {n}, the completions of a prompt, got {decode_slots}")
    prompts = [c if isinstance(c, Prompt) else processor(c) for c in conversations]
    if not prompts:
        raise ValueError("generate needs at least one conversation, got none")
    if keys is not None and len(keys) != len(prompts):
        raise ValueError(f"keys must be one for each of the {len(prompts)} conversations, got {len(keys)}")
    if (longest := max(map(len, prompts)) + max_new_tokens) > processor.max_positions:
        raise ValueError(f"prompt and max_new_tokens make {longest} tokens, over the model's limit of "
                         f"{processor.max_positions}")
    keys = [prompt_key(prompt) for prompt in prompts] if keys is None else keys
    uniform_BT = torch.stack([uniforms(seed, step, key, i, max_new_tokens) for key in keys for i in range(n)])
    flat = decode(model, processor, prompts, uniform_BT, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                  suppressed_ids=processor.suppressed_ids, stop=stop, decode_slots=decode_slots, backend=backend, on_token=on_token)
    return [flat[n * i:n * i + n] for i in range(len(prompts))]
