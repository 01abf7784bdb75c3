"""What a completion is worth in GRPO: functions (completion text, options, right index) -> float. Add yours to REWARDS.

SightSound-R1 rewards a right answer with 1 and the right form with 1, each on its own: 0, 1 or 2 in all. The form is
`<think>…</think><answer>…</answer>`, with newlines anywhere and nothing but white space around; no tag stands twice.
"""
import re
from string import ascii_lowercase

from minixmd.tasks.answers import ANSWER, INSIDE, words_of

FORMAT = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*", re.DOTALL)


def accuracy_reward(completion, options, right):
    """1.0 where the completion's answer is the right option, else 0.0; the form around it does not matter."""
    index = parse_answer(completion, options)
    return float(index is not None and index == right)


def format_reward(completion, options, right):
    """1.0 where the whole completion has the form, else 0.0."""
    return float(FORMAT.fullmatch(completion) is not None)


REWARDS = {"accuracy": accuracy_reward, "format": format_reward}  # the reward is their sum


def parse_answer(completion, options):
    """Index of the option in the completion's only <answer>…</answer>, or None.

    The answer is an option's letter, its words, or both, as in "B. dog". There is no similarity to fall back on, and
    several answers are none. Words are runs of letters and digits, compared without case and apostrophes.
    """
    answers = ANSWER.findall(completion)
    if len(answers) != 1 or completion.count("<answer>") != 1:
        return None
    said = words_of(answers[0])
    letters = list(ascii_lowercase[:len(options)])
    if len(said) == 1 and said[0] in letters:
        return letters.index(said[0])
    named = []
    for i, (letter, option) in enumerate(zip(letters, options, strict=True)):
        words = words_of(option)
        if words and said in (words, [letter, *words]):
            named.append(i)
    return named[0] if len(named) == 1 else None
