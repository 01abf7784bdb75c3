"""What a completion is worth in GRPO: functions in REWARDS (text, Example, right index, asked for a letter?) -> float.
SightSound-R1 rewards a right answer with 1 and the right form with 1, each on its own: 0, 1 or 2 in all. The form is
`<think>…</think><answer>…</answer>`, with newlines anywhere and nothing but white space around; no tag stands twice."""
import re

from minixmd.tasks.answers import INSIDE, parse_answer

FORMAT = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*")


def accuracy_reward(completion, example, right, letters):
    return float(parse_answer(completion, example.options, letters) == right)


def format_reward(completion, example, right, letters):
    return float(FORMAT.fullmatch(completion) is not None)


REWARDS = {"accuracy": accuracy_reward, "format": format_reward}  # the reward is their sum
