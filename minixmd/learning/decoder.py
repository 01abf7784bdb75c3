"""Decoder: many completions written at once, a token each a step.

Prompts take prompt slots and completions decode slots, of whatever prompt (rollout.py says which). A step decodes one
token in every slot; it is tensor code that never looks at a value, so on a GPU it is captured once as a CUDA graph and
replayed. A slot that nobody owns decodes on, its output is ignored, which keeps the graph static.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from minixmd.inputs.batch import Batch, pack, send
from minixmd.learning.kv_cache import KVCache, pool_shapes
from minixmd.runs.heartbeat import beat

STEPS_PER_SYNC = 4  # captured steps between two looks at what they sampled
# a captured step's prompt slots have a multiple of so many rows, and a quarter to spare, so that they seldom must grow
PROMPT_ROWS, SPARE_ROWS = 256, 1.25


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
        ids_B = ids_B.clamp(max=cdf_BV.shape[1] - 1)  # NaN logits would point beyond; rollout.py refuses them
    return ids_B, logp_BV.gather(1, ids_B[:, None]).squeeze(1)


def prompt_rows(longest_prompt, captured):
    """Rows of a prompt slot for prompts of so many tokens; where steps are captured there is room for longer ones."""
    return math.ceil(SPARE_ROWS * longest_prompt / PROMPT_ROWS) * PROMPT_ROWS if captured else longest_prompt


class Decoder:
    """The state of all slots as tensors that keep their addresses, and what is done to it.

    prefill     puts prompts into prompt slots and draws the first tokens of their completions
    place       puts completions into decode slots, after their first tokens
    run         decodes some tokens in every decode slot
    """

    def __init__(self, model, prompt_slots, longest_prompt, decode_slots, num_samples, *, max_new_tokens, temperature,
                 suppressed_ids, end_id, backend, captured=True):
        self.model = model
        self.num_samples = num_samples
        self.temperature = temperature
        self.end_id = end_id
        self.device = device = model.device
        self.captured = captured and backend == "triton" and device.type == "cuda"
        B = decode_slots
        rows = prompt_rows(longest_prompt, self.captured)
        shapes = pool_shapes(model.config.text, prompt_slots, rows, B, max_new_tokens)
        self.cache = KVCache(shapes, min(num_samples, B), device, model.dtype, backend)
        self.rows = self.cache.pool.shape[4]  # of a decode slot
        integers = dict(dtype=torch.int64, device=device)
        self.suppressed_ids = torch.as_tensor(suppressed_ids, **integers)
        self.token_B = torch.zeros(B, **integers)  # each slot's last id
        self.start_B = torch.zeros(B, **integers)  # the position of its first token
        self.uniform_BT = torch.zeros(B, self.rows + 1, dtype=torch.float64, device=device)
        self.ids_SB = torch.zeros(STEPS_PER_SYNC, B, **integers)
        self.logp_SB = torch.zeros(STEPS_PER_SYNC, B, device=device)
        self.next_row_1 = torch.zeros(1, **integers)  # row of these two that a step writes
        self.slots_in_use = B  # which come first
        self.prompt_of = [-1] * B  # the prompt slot that each decode slot continues; -1: nobody owns it
        self.position_after = [0] * prompt_slots  # each prompt
        self.empty = True  # whether no prompt is needed that was computed
        self.replay = capture(self.step) if self.captured else None  # not self.step: a cycle would keep the pools alive

    def make_room(self, longest_prompt):
        """Lets prompts be so long. Completions under way go on: what a captured step does beside is undone."""
        if longest_prompt <= self.cache.prompt_pool.shape[4]:
            return
        token_B, length_B = self.token_B.clone(), self.cache.length_B.clone()
        self.replay = None
        self.cache.grow(prompt_rows(longest_prompt, self.captured), keep=not self.empty)
        self.next_row_1.zero_()
        self.replay = capture(self.step) if self.captured else None
        self.token_B.copy_(token_B)
        self.cache.length_B.copy_(length_B)

    def prefill(self, prompts, prompt_slots, uniform_B):
        """Computes prompts into prompt slots and draws the first tokens of the num_samples completions of each.

        prompts: G Prompts. prompt_slots: their slots. uniform_B: (G num_samples,) fp64.
        Returns the logits after each prompt (G, V), and lists of the first tokens' ids and log-probabilities."""
        self.make_room(max(map(len, prompts)))
        self.empty = False
        batch = pack(prompts)
        lengths_G = torch.tensor([len(prompt) for prompt in prompts])
        last_G = lengths_G.cumsum(0) - 1
        last_position_G = batch.positions_3N[:, last_G].amax(0)
        for slot, position in zip(prompt_slots, last_position_G.tolist(), strict=True):
            self.position_after[slot] = position + 1
        slot_G = torch.tensor(prompt_slots)
        row_N = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        integers = [lengths_G, slot_G, slot_G.repeat_interleave(lengths_G), row_N, last_G]
        lengths_G, slot_G, slot_N, row_N, last_G = send(integers, self.device)
        batch = batch.to(self.device)
        self.cache.prompt_pool[:, :, slot_G] = 0  # a weight of 0 hides a stale value, but not a NaN
        self.cache.prompt_length_G[slot_G] = lengths_G
        hidden_ND = self.model(batch, partial(self.cache.prefill, batch.segments, slot_N, row_N))
        logits_GV = self.model.logits(hidden_ND[last_G])
        [uniform_B] = send([uniform_B], self.device)
        logits_BV = logits_GV.repeat_interleave(self.num_samples, 0)
        ids_B, logp_B = sample(logits_BV, uniform_B, self.temperature, self.suppressed_ids)
        return logits_GV, ids_B.tolist(), logp_B.tolist()

    def place(self, slots, tokens, prompt_slots, uniform_ST):
        """Puts completions into S decode slots. tokens: their first ids. prompt_slots: whose prompts they continue.
        uniform_ST: (S, max_new_tokens) fp64."""
        for slot, prompt_slot in zip(slots, prompt_slots, strict=True):
            self.prompt_of[slot] = prompt_slot
        start_S = torch.tensor([self.position_after[slot] for slot in prompt_slots])
        integers = [torch.tensor(slots), torch.tensor(tokens), start_S]
        slot_S, token_S, start_S = send(integers, self.device)
        self.cache.pool[:, :, slot_S] = 0
        self.cache.length_B[slot_S] = 0
        self.token_B[slot_S] = token_S
        self.start_B[slot_S] = start_S
        [uniform_ST] = send([uniform_ST], self.device)
        self.uniform_BT[slot_S, :uniform_ST.shape[1]] = uniform_ST

    def move(self, slots, others):
        """Moves the completions of S decode slots to others."""
        slot_S, other_S = send([torch.tensor(slots), torch.tensor(others)], self.device)
        for x in (self.token_B, self.start_B, self.uniform_BT, self.cache.length_B):
            x[other_S] = x[slot_S]
        self.cache.pool[:, :, other_S] = self.cache.pool[:, :, slot_S]
        for slot, other in zip(slots, others, strict=True):
            self.prompt_of[other] = self.prompt_of[slot]
            self.prompt_of[slot] = -1

    def link(self):
        """Tells the device which decode slot continues which prompt."""
        members = [[] for _ in self.position_after]
        for slot, prompt_slot in enumerate(self.prompt_of):
            if prompt_slot >= 0:
                members[prompt_slot].append(slot)
        width = self.cache.members_GM.shape[1]
        members_GM = torch.tensor([slots + [-1] * (width - len(slots)) for slots in members])
        members_GM, prompt_B = send([members_GM, torch.tensor(self.prompt_of)], self.device)
        self.cache.members_GM.copy_(members_GM)
        self.cache.prompt_B.copy_(prompt_B)
        if not self.captured:
            self.cache.prompts_in_use = max(self.prompt_of) + 1

    def step(self):
        """Decodes one token in every slot. One whose token ends the turn, or fills the pool, starts over at row 0: from
        then on its output is ignored, and few rows are read for it."""
        B = self.slots_in_use
        length_B = self.cache.length_B[:B]
        positions_3B = (self.start_B[:B] + length_B).expand(3, -1)
        hidden_BD = self.model(Batch(self.token_B[:B], positions_3B), self.cache.decode)
        logits_BV = self.model.logits(hidden_BD)
        uniform_B = self.uniform_BT[:B].gather(1, length_B[:, None] + 1).squeeze(1)
        ids_B, logp_B = sample(logits_BV, uniform_B, self.temperature, self.suppressed_ids)
        self.ids_SB[:, :B].index_copy_(0, self.next_row_1, ids_B[None])
        self.logp_SB[:, :B].index_copy_(0, self.next_row_1, logp_B[None])
        self.next_row_1.add_(1)
        self.token_B[:B] = ids_B
        next_length_B = (length_B + 1) % self.rows
        length_B.copy_(next_length_B.where(ids_B != self.end_id, 0))

    def run(self, steps):
        """`steps` <= STEPS_PER_SYNC steps: lists of every slot's ids and log-probabilities, (steps, slots in use)."""
        beat()
        self.link()
        self.next_row_1.zero_()
        for _ in range(steps):
            (self.replay or self.step)()
        B = self.slots_in_use
        return self.ids_SB[:steps, :B].tolist(), self.logp_SB[:steps, :B].tolist()


def capture(step):
    """A CUDA graph of step(), as a function that replays it. step() is run once before: kernels are compiled then, and
    libraries take their work space."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
