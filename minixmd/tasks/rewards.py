"""What a completion is worth: pure functions (completion, example) -> float; and what GRPO learns of it.

SightSound-R1 rewards a right answer with 1 and the right form with 1, each on its own: 0, 1 or 2 in all. The form is
`<think>…</think><answer>…</answer>`, with newlines anywhere and nothing but white space around; no tag stands twice.
"""
import re
from dataclasses import dataclass
from string import ascii_lowercase

import torch

from minixmd.inputs.batch import Group
from minixmd.models.head import token_weights
from minixmd.tasks.answers import ANSWER, INSIDE, words_of

EPS = 1e-4  # keeps the advantage finite where all rewards are equal
FORMAT = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*", re.DOTALL)


def format_reward(completion, example):
    """1.0 where the whole completion has the form, else 0.0."""
    return float(FORMAT.fullmatch(completion) is not None)


def accuracy_reward(completion, example):
    """1.0 where the completion's answer is the example's, else 0.0; the form around it does not matter."""
    index = parse_answer(completion, example.options)
    return float(index is not None and index == example.answer)


REWARDS = {"accuracy": accuracy_reward, "format": format_reward}  # the reward is their sum


def parse_answer(completion, options):
    """Index of the option that stands in the completion's only <answer>…</answer>: its letter, its words, or both, as
    in "B. dog". None where that cannot be told: there is no likeness to fall back on, and several answers are none.

    Words are runs of letters and digits, compared without case and apostrophes.
    """
    found = ANSWER.findall(completion)
    if len(found) != 1 or completion.count("<answer>") != 1:
        return None
    said, letters = words_of(found[0]), list(ascii_lowercase[:len(options)])
    if len(said) == 1 and said[0] in letters:
        return letters.index(said[0])
    choices = [(letter, words_of(option)) for letter, option in zip(letters, options, strict=True)]
    meant = [i for i, (letter, words) in enumerate(choices) if words and said in (words, [letter, *words])]
    return meant[0] if len(meant) == 1 else None


def advantages(reward_G, scale):
    """(reward - mean) / (std + 1e-4) of one prompt's completions, with the unbiased std.

    Args:
        reward_G: (G,) fp32, G > 1. scale: "std"; "none" leaves the divisor out (Dr. GRPO).
    Returns:
        (G,) fp32; all 0 where the rewards are equal.
    """
    centred_G = reward_G - reward_G.mean()
    return centred_G / (reward_G.std() + EPS) if scale == "std" else centred_G


def no_variance(reward_G):
    """Whether all rewards of a group are equal: nothing in it is better than the rest."""
    return bool(torch.all(reward_G == reward_G[0]))


def summary(pairs, parts):
    """What a rollout is like, for the log, of (Completion, example)s prompt by prompt and of what they earned."""
    flat = sum(pairs, [])
    return {**{name: part_PG.mean().item() for name, part_PG in parts.items()},
            "unparsed": sum(parse_answer(c.text, e.options) is None for c, e in flat) / len(flat),
            "zero_variance": sum(map(no_variance, parts["reward"])) / len(pairs),  # share of the groups
            "completion_tokens": sum(len(c.ids) for c, _ in flat) / len(flat),
            "truncated": sum(not c.finished for c, _ in flat) / len(flat)}


@dataclass
class Rollout:
    """A step's completions as the update reads them: T tokens, in the order in which `pack` makes them targets."""

    groups: list[Group]  # without what the switches leave out
    advantage_T: torch.Tensor
    weight_T: torch.Tensor
    sampled_T: torch.Tensor  # the log-probabilities with which the tokens were drawn
    ref_T: torch.Tensor | None = None  # those under the reference
    old_T: torch.Tensor | None = None  # those under the policy before the rollout's first update


def learnable(stage, prompts, answers, reward_PG):
    """The Rollout of a step, by the switches of the stage; None where nothing is left to learn.

    A masked completion (truncated) counts in the denominators, as one without tokens. A skipped group (zero_variance)
    does not: it is as if its prompt had not been drawn.

    Args:
        prompts: P Prompts. answers: P lists of G Completions. reward_PG: (P, G) fp32.
    """
    groups, lengths, advantage, sampled = [], [], [], []
    for prompt, group, reward_G in zip(prompts, answers, reward_PG, strict=True):
        if stage.zero_variance == "skip" and no_variance(reward_G):
            continue
        kept = [c.finished or stage.truncated == "keep" for c in group]
        lengths += [len(c.ids) * keep for c, keep in zip(group, kept, strict=True)]
        advantage += advantages(reward_G, stage.scale_rewards).tolist()
        learnt = [c for c, keep in zip(group, kept, strict=True) if keep]
        sampled += [logp for c in learnt for logp in c.logprobs]
        if learnt:
            groups.append(Group(prompt, tuple(torch.tensor(c.ids) for c in learnt)))
    if not groups:
        return None
    advantage_T = torch.tensor(advantage).repeat_interleave(torch.tensor(lengths))
    weight_T = token_weights(lengths, stage.aggregation, stage.max_new_tokens)
    return Rollout(groups, advantage_T, weight_T, torch.tensor(sampled))
