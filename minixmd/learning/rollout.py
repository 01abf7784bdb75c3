"""generate: sampling with a key-value cache; randomness is a pure function of (seed, step, key, sample, position)."""
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minixmd.inputs.batch import pack
from minixmd.models.attention import attend


@dataclass(frozen=True)
class Completion:
    text: str
    ids: tuple[int, ...]  # the end of turn included when it was sampled
    logprobs: tuple[float, ...]  # of each id, at the sampling temperature and over the ids that are not banned
    finished: bool  # False: cut by max_new_tokens


def prompt_key(prompt):
    """A digest of a Prompt's ids and media: the same question about the same clip draws the same randomness."""
    digest = hashlib.blake2b(prompt.ids_N.numpy().tobytes(), digest_size=16)
    for m in prompt.media:
        digest.update(m.features.contiguous().numpy().tobytes())
    return digest.hexdigest()


def uniform(seed, step, key, sample, position):
    """A number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.blake2b(repr((seed, step, key, sample, position)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def sample(logits_BV, uniform_B, temperature, banned):
    """Inverse-CDF draw from softmax(logits / temperature) without the banned ids; temperature 0 takes the largest.

    Args:
        logits_BV: (B, V) fp32. uniform_B: (B,) fp64 in [0, 1), not read at temperature 0. banned: (X,) int64.
    Returns:
        ids (B,) int64 and their log-probabilities (B,) fp32 (at temperature 1 when temperature is 0).
    """
    logits_BV = logits_BV.index_fill(1, banned, -torch.inf)
    logp_BV = F.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids_B = logits_BV.argmax(-1)
    else:
        cdf_BV = logp_BV.double().exp().cumsum(-1)  # fp64: 150,000 fp32 terms drift by more than a rare token's mass
        total_B = cdf_BV[:, -1]
        u_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))  # below the top
        ids_B = torch.searchsorted(cdf_BV, u_B[:, None], right=True).squeeze(1)
        ids_B = ids_B.clamp(max=cdf_BV.shape[1] - 1)  # NaN logits would point beyond; generate refuses them
    return ids_B, logp_BV.gather(1, ids_B[:, None]).squeeze(1)


class Cache:
    """Keys and values of B sequences, (B, J, S, K) a layer, filled from the left; `length_B` rows of each are real."""

    def __init__(self, layers):
        self.k, self.v, self.length_B, self.segments = [None] * layers, [None] * layers, None, None

    def prefill(self, layer, q_NHK, k_NJK, v_NJK):
        """attend over a packed batch, keeping its keys and values."""
        size = max(s.length for s in self.segments)
        self.k[layer], self.v[layer] = (
            torch.stack([F.pad(x[s.start:s.start + s.length].transpose(0, 1), (0, 0, 0, size - s.length))
                         for s in self.segments]) for x in (k_NJK, v_NJK))
        return attend(q_NHK, k_NJK, v_NJK, self.segments)

    def decode(self, layer, q_BHK, k_BJK, v_BJK):
        """One new row a sequence: its key and value take the next place, and it sees all that is real."""
        rows_B = torch.arange(len(q_BHK), device=q_BHK.device)
        if self.length_B.max() == self.k[layer].shape[2]:
            self.k[layer], self.v[layer] = (F.pad(x, (0, 0, 0, 64)) for x in (self.k[layer], self.v[layer]))
        self.k[layer][rows_B, :, self.length_B] = k_BJK
        self.v[layer][rows_B, :, self.length_B] = v_BJK
        seen_BS = torch.arange(self.k[layer].shape[2], device=q_BHK.device) <= self.length_B[:, None]
        o = F.scaled_dot_product_attention(q_BHK[:, :, None], self.k[layer], self.v[layer],
                                           attn_mask=seen_BS[:, None, None],
                                           enable_gqa=q_BHK.shape[1] != k_BJK.shape[1])
        return o.squeeze(2)

    def repeat(self, n):
        """Every sequence n times, neighbours first."""
        self.k, self.v = ([x.repeat_interleave(n, 0) for x in xs] for xs in (self.k, self.v))
        self.length_B = self.length_B.repeat_interleave(n)


def _stopped(text, stop):
    return any(string in text for string in stop)


@torch.inference_mode()
def prefill(model, prompts):
    """Run Prompts in one pass: each one's last hidden state hidden_BD, that row's position_B, and the filled Cache."""
    device = model.lm_head.weight.device
    batch = pack(prompts).to(device)
    cache = Cache(model.config.text.num_hidden_layers)
    cache.segments = batch.segments
    hidden_ND = model.model(model.embed(batch), batch.positions_3N, cache.prefill)
    last_B = torch.tensor([end - 1 for _, end in batch.spans], device=device)
    cache.length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return hidden_ND[last_B], batch.positions_3N[:, last_B].amax(0), cache


@torch.inference_mode()
def decode(model, processor, hidden_BD, position_B, cache, draw, *, max_new_tokens, stop=(), on_token=None):
    """The Completion of each of B sequences, from what prefill returned; draw(logits_BV, t) chooses their tokens
    number t, as `sample` returns them."""
    B = len(hidden_BD)
    ids, logprobs, done = [[] for _ in range(B)], [[] for _ in range(B)], [False] * B
    for t in range(max_new_tokens):
        ids_B, logp_B = draw(model.logits(hidden_BD), t)
        for b, (token, logp) in enumerate(zip(ids_B.tolist(), logp_B.tolist(), strict=True)):
            if not done[b]:
                if math.isnan(logp):
                    raise ValueError("the model's logits are not finite: its weights are broken, or too large for "
                                     f"{model.lm_head.weight.dtype}")
                ids[b].append(token)
                logprobs[b].append(logp)
                if on_token is not None:
                    on_token(b, tuple(ids[b]))
                done[b] = token == processor.end_id or (bool(stop) and _stopped(processor.decode(ids[b]), stop))
        if all(done) or t == max_new_tokens - 1:
            break
        position_B = position_B + 1
        x_BD = model.model.embed_tokens(ids_B)
        hidden_BD = model.model(x_BD, position_B.expand(3, -1), cache.decode)
        cache.length_B = cache.length_B + 1
    return [Completion(processor.decode(i), tuple(i), tuple(p), d) for i, p, d in zip(ids, logprobs, done, strict=True)]


@torch.inference_mode()
def generate(model, processor, conversations, *, n=1, max_new_tokens, temperature, seed, stop=(), step=0, keys=None,
             on_token=None):
    """n continuations of each conversation.

    Args:
        conversations: as Processor takes them; all are decoded together.
        temperature: 0 = greedy. stop: strings that end a completion (they stay in it).
        seed, step, keys: what the randomness depends on, beside the sample's number and the position; a key defaults to
            a digest of the prompt's ids and media.
        on_token: called as on_token(row, ids so far) after every new token; row = n * conversation + sample.
    Returns:
        A list of n Completions for each conversation.
    Raises:
        ValueError: a conversation that the processor refuses, max_new_tokens < 1 or past the model's limit, a negative
            temperature, an empty stop string, or logits that are not finite.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}")
    if "" in stop:
        raise ValueError("a stop string must not be empty")
    prompts = [processor(conversation) for conversation in conversations]
    if (longest := max(map(len, prompts)) + max_new_tokens) > processor.max_positions:
        raise ValueError(f"prompt and max_new_tokens make {longest} tokens, over the model's limit of "
                         f"{processor.max_positions}")
    keys = [prompt_key(prompt) for prompt in prompts] if keys is None else keys
    hidden_BD, position_B, cache = prefill(model, prompts)
    cache.repeat(n)
    banned = torch.tensor(processor.banned, device=hidden_BD.device)

    def draw(logits_BV, t):
        u_B = torch.tensor([uniform(seed, step, keys[b // n], b % n, t) for b in range(len(logits_BV))],
                           dtype=torch.float64)
        return sample(logits_BV, u_B.to(logits_BV.device), temperature, banned)

    flat = decode(model, processor, hidden_BD.repeat_interleave(n, 0), position_B.repeat_interleave(n), cache, draw,
                  max_new_tokens=max_new_tokens, stop=stop, on_token=on_token)
    return [flat[i * n:(i + 1) * n] for i in range(len(prompts))]
