"""What GRPO learns from a rollout: advantages, which completions count, and the weight of every token."""
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minixmd.inputs.batch import Group, send
from minixmd.inputs.prompts import cut_by_tokens
from minixmd.learning.rollout import Completion
from minixmd.runs.distributed import gather, total
from minixmd.tasks.answers import parse_answer
from minixmd.tasks.rewards import REWARDS

EPS = 1e-4  # keeps the advantage finite where all rewards are equal


@dataclass
class Rollout:
    """A step's completions as the update reads them: T tokens, in the order in which `pack` makes them targets."""

    micro_batches: list[list[Group]]  # without what the switches leave out; a Group may hold a part of a prompt's
    learned: int  # groups that are in it and in those of the other processes
    tokens: int  # of all processes
    own_tokens: int  # of this one; those of fillers come after them
    advantage_T: torch.Tensor
    weight_T: torch.Tensor
    sampled_T: torch.Tensor  # the log-probabilities with which the tokens were drawn
    pieces: tuple[tuple[int, list[int]], ...] = ()  # of each Group: the number of its prompt, and of its completions
    ref_T: torch.Tensor | None = None  # log-probabilities under the reference
    old_T: torch.Tensor | None = None  # those under the policy before the rollout's first update
    teacher_TE: torch.Tensor | None = None  # hidden states of the teacher that reads them
    teacher_weight_T: torch.Tensor | None = None  # of its KL; 0 where it is silent
    taught_tokens: int = 0  # tokens of all processes that it read

    def send(self, device):
        """Puts its vectors on a device, where they stay."""
        vectors = [self.advantage_T, self.weight_T, self.sampled_T]
        self.advantage_T, self.weight_T, self.sampled_T = send(vectors, device)

    def fill_up(self, prompt, end_id):
        """Adds micro-batches of weight 0 until all processes have as many. end_id: one that can be sampled."""
        filler = [Group(prompt, (torch.tensor([end_id]),))]
        missing = max(gather(len(self.micro_batches))) - len(self.micro_batches)
        self.micro_batches += [filler] * missing
        vectors_3T = torch.stack([self.advantage_T, self.weight_T, self.sampled_T])
        self.advantage_T, self.weight_T, self.sampled_T = F.pad(vectors_3T, (0, missing))


def score_completions(completions, items, letters):
    """{name of a reward: (P, G)} of P prompts' completions, and "reward", their sum. letters: as REWARDS take it."""
    rewards = {}
    for name, reward in REWARDS.items():
        rows = []
        for group, item in zip(completions, items, strict=True):
            rows.append([reward(completion.text, item.example, item.target, letters) for completion in group])
        rewards[name] = torch.tensor(rows)
    rewards["reward"] = sum(rewards.values())
    return rewards


def given_completions(texts, processor, max_new_tokens):
    """Texts as Completions, as if they had been sampled here; of a longer one its beginning."""
    completions = []
    for text in texts:
        ids = (*processor.encode(text), processor.end_id)[:max_new_tokens]
        completions.append(Completion(text, ids, logprobs=(0.0,) * len(ids), finished=ids[-1] == processor.end_id))
    return completions


def advantages(reward_G, scale):
    """(reward - mean) / (std + 1e-4) of one prompt's completions, with the unbiased std: (G,) fp32, G > 1. scale:
    "std"; "none" leaves the divisor out (Dr. GRPO)."""
    centred_G = reward_G - reward_G.mean()
    return centred_G / (reward_G.std() + EPS) if scale == "std" else centred_G


def no_variance(reward_G):
    """Whether all rewards of a group are equal: nothing in it is better than the rest."""
    return bool(torch.all(reward_G == reward_G[0]))


def token_weights(lengths, aggregation, constant=None):
    """The weights (T,) of a policy loss, for this process's completions of `lengths` tokens, in an optimizer step. Its
    denominators are those of all processes, so that the gradient does not depend on who has which completion, nor on
    the micro-batch size. A completion that is masked counts as one of length 0.

    aggregation: "sequence", the mean over completions of each one's mean (GRPO); "token", the mean over all tokens;
    "constant", the sum over `constant` tokens a completion (Dr. GRPO: the longest that is allowed).
    """
    length_C = torch.tensor(lengths, dtype=torch.int64)
    completions, tokens = total(len(lengths), sum(lengths))
    if aggregation == "sequence":
        weight_C = 1 / (completions * length_C)
    elif aggregation == "token":
        weight_C = torch.full((len(lengths),), 1 / max(tokens, 1))
    else:
        weight_C = torch.full((len(lengths),), 1 / (max(completions, 1) * constant))
    return weight_C.repeat_interleave(length_C)


def make_rollout(stage, prompts, completions, reward_PG, teacher_prompts=None):
    """This process's Rollout of a step, by the switches of a GRPO stage, maybe an empty one. All processes call it
    together.

    A masked completion (truncated="mask") counts in the denominators, as one without tokens. A skipped group
    (zero_variance="skip") does not: it is as if its prompt had not been drawn. A group that is longer than
    micro_batch_tokens is cut into several with the same prompt; also where it is longer with the teacher's.

    prompts: P Prompts. completions: P lists of G Completions. reward_PG: (P, G) fp32. teacher_prompts: P Prompts, None
        where the teacher is silent; of OnPolicy, whose reward_weight multiplies the advantages.
    """
    if teacher_prompts is None:
        teacher_prompts = [None] * len(prompts)
    sampled, advantage, lengths = [], [], []  # of each completion that counts
    first_of = {}  # prompt -> the number of its first completion
    pieces = []  # the number of a prompt, and those of as many of its completions as fit a micro-batch
    learned = 0
    for p, (group, reward_G) in enumerate(zip(completions, reward_PG, strict=True)):
        if stage.zero_variance == "skip" and no_variance(reward_G):
            continue
        first_of[p], kept = len(lengths), []
        for completion in group:
            keep = completion.finished or stage.truncated == "keep"
            if keep:
                kept.append(len(lengths))
            lengths.append(len(completion.ids) if keep else 0)
        sampled += group
        if stage.reward_weight:
            advantage_G = stage.reward_weight * advantages(reward_G, stage.scale_rewards)
        else:  # maybe of one completion, which has no advantage
            advantage_G = torch.zeros_like(reward_G)
        advantage += advantage_G.tolist()
        longest = max(len(prompts[p]), len(teacher_prompts[p] or ()))
        for cut in cut_by_tokens([lengths[i] for i in kept], stage.micro_batch_tokens - longest):
            pieces.append((p, [kept[i] for i in cut]))
        learned += bool(kept)

    order, micro_batches, taken = [], [], []
    tokens = []
    for p, numbers in pieces:
        tokens.append(len(prompts[p]) + sum(lengths[i] for i in numbers))
    for cut in cut_by_tokens(tokens, stage.micro_batch_tokens):
        groups = []
        for p, numbers in (pieces[i] for i in cut):
            order += numbers
            taken.append((p, [i - first_of[p] for i in numbers]))
            ids = [torch.tensor(sampled[i].ids) for i in numbers]
            groups.append(Group(prompts[p], tuple(ids)))
        micro_batches.append(groups)
    weights = token_weights(lengths, stage.aggregation, stage.max_new_tokens).split(lengths)
    advantage_of_token, weight_of_token, logprob_of_token = [], [], []
    for i in order:
        advantage_of_token += [advantage[i]] * lengths[i]
        weight_of_token += weights[i].tolist()
        logprob_of_token += sampled[i].logprobs
    return Rollout(
        micro_batches,
        *total(learned, len(weight_of_token)),
        len(weight_of_token),
        advantage_T=torch.tensor(advantage_of_token),
        weight_T=torch.tensor(weight_of_token),
        sampled_T=torch.tensor(logprob_of_token),
        pieces=tuple(taken),
    )


def rollout_metrics(examples, completions, rewards, letters):
    """What a step's P x G completions are like, for the log. rewards, letters: of score_completions."""
    metrics = {name: part_PG.mean().item() for name, part_PG in rewards.items()}
    unparsed = tokens = 0
    truncated = count = 0
    for example, group in zip(examples, completions, strict=True):
        for completion in group:
            unparsed += parse_answer(completion.text, example.options, letters) is None
            tokens += len(completion.ids)
            truncated += not completion.finished
            count += 1
    equal = sum(no_variance(reward_G) for reward_G in rewards["reward"])
    return {
        **metrics,
        "unparsed": unparsed / count,  # shares, but for the tokens
        "zero_variance": equal / len(examples),
        "completion_tokens": tokens / count,
        "truncated": truncated / count,
    }


def mean_metrics(num_prompts, metrics):
    """The rollout_metrics of all processes together, of this one's, which are {} of no prompts."""
    shares = gather((num_prompts, metrics))
    if len(shares) == 1:
        return metrics
    prompts = sum(count for count, _ in shares)
    means = Counter()
    for count, metrics in shares:
        for name, value in metrics.items():
            means[name] += value * count / prompts
    return dict(means)
