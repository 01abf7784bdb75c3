"""Rewards: what earns and what does not, by hand; that nothing a model can write stops them; and advantages by hand."""
import random
from dataclasses import replace

import pytest
import torch

from minixmd.inputs.examples import Example
from minixmd.learning.policy import advantages, no_variance
from minixmd.tasks.answers import parse_answer
from minixmd.tasks.rewards import REWARDS, accuracy_reward, format_reward

OPTIONS = ("dog barking", "cat", "playing the violin, fiddle", "C#", "+", "cat food", "Church bell", "B")
RIGHT = 1  # index of the right option
EXAMPLE = Example("a", "a.wav", None, "?", OPTIONS)


@pytest.mark.parametrize("text, right", [
    ("<think>It meows.</think><answer>B</answer>", True),
    ("<think>\nIt\n\nmeows.\n</think>\n\n<answer>\nB\n</answer>\n", True),
    ("  <think></think> <answer></answer>  ", True),
    ("<think>a < b > c, <b>and</b> <thinking></think><answer>x</answer>", True),
    ("", False),
    ("B", False),
    ("<answer>B</answer>", False),
    ("<think>x</think>", False),
    ("<think>x</think>B", False),
    ("<answer>B</answer><think>x</think>", False),
    ("Well. <think>x</think><answer>B</answer>", False),
    ("<think>x</think><answer>B</answer> I am sure.", False),
    ("<think>x</think> so <answer>B</answer>", False),
    ("<think>x</think><think>y</think><answer>B</answer>", False),
    ("<think>x</think><answer>B</answer><answer>C</answer>", False),
    ("<think>x<answer>B</answer></think><answer>C</answer>", False),
    ("<think>x <answer> y</think><answer>B</answer>", False),
    ("<think>x<think>y</think></think><answer>B</answer>", False),
    ("<think>x</think><answer>B", False),
    ("<think>x<answer>B</answer>", False),
    ("<THINK>x</THINK><ANSWER>B</ANSWER>", False),
])
def test_the_form_is_one_think_then_one_answer_and_nothing_else(text, right):
    assert format_reward(text, EXAMPLE, RIGHT, True) == float(right)


@pytest.mark.parametrize("answer, index", [
    ("B", 1), ("b", 1), (" B. ", 1), ("(B)", 1), ("**B**", 1), ("Ｂ", 1), ("\nB\n", 1),  # before option H
    ("cat", 1), ("Cat.", 1), ("dog  BARKING", 0), ("dog-barking", 0), ("playing the violin fiddle", 2),
    ("B. cat", 1), ("b) Cat", 1), ("G: church bell", 6), ("cat food", 5),
    ("C", 2), ("D", 3), ("H", 7), ("D. C#", 3), ("E. +", 4), ("h. b", 7),
    ("I", None), ("Z", None), ("", None), (" \n ", None), ("+", 4), ("?", None),
    ("A. cat", None), ("B or C", None), ("A B", None), ("AB", None), ("BCD", None), ("the cat", None), ("cats", None),
    ("dog", None), ("dog barkin", None), ("The answer is B", None), ("not B", None), ("None", None),
])  # fmt: skip
def test_the_answer_is_a_letter_or_an_options_words_and_nothing_like_it(answer, index):
    assert parse_answer(f"<think>D</think><answer>{answer}</answer>", OPTIONS) == index


def test_several_answers_and_none_are_no_answer():
    for text in ("B", "cat", "<answer>B", "B</answer>", "<answer>B</answer><answer>B</answer>",
                 "<answer>A</answer><answer>B</answer>", "<answer><answer>B</answer>", "<answer>B<think></answer>",
                 "<think>or <answer>A</answer></think><answer>B</answer>"):
        assert parse_answer(text, OPTIONS) is None and accuracy_reward(text, EXAMPLE, RIGHT, True) == 0


def test_options_of_the_same_words_are_told_apart_by_their_signs_or_by_letter():
    options = ("Dog", "dog!", "cat")
    assert parse_answer("<answer>dog</answer>", options) == 0 and parse_answer("<answer>dog!</answer>", options) == 1
    assert parse_answer("<answer>dog?</answer>", options) is None
    assert parse_answer("<answer>b</answer>", options) == 1 and parse_answer("<answer>B. dog</answer>", options) == 1


def test_the_two_rewards_are_independent_and_sum_to_0_1_or_2():
    think = "<think>x</think>"
    cases = {f"{think}<answer>B</answer>": 2, f"{think}<answer>A</answer>": 1, "So <answer>cat</answer>.": 1,
             "It is a cat": 0, f"{think}<answer></answer>": 1}
    assert {text: sum(reward(text, EXAMPLE, RIGHT, True) for reward in REWARDS.values()) for text in cases} == cases


def test_nothing_that_a_model_writes_stops_them():
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "B", "cat", "\n", " ", "<", ">", "/", "\x00", "\ud800",
              "é", "😀", "\u2028", "İ", "ß", "ﬁ", "½", "B" * 50, "<answer", "answer>", "[", "(?", "\\", "'", "’", "%s"]
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        options = tuple("".join(rng.choices(pieces, k=rng.randrange(4))) for _ in range(rng.randrange(2, 27)))
        for case in (text, f"<think>{text}</think><answer>{text}</answer>"):
            for reward in REWARDS.values():
                assert reward(case, replace(EXAMPLE, options=options), rng.randrange(len(options)), True) in (0.0, 1.0)
            assert parse_answer(case, options) in (None, *range(len(options)))


@pytest.mark.parametrize("piece", ["<think>", "<answer>", "</answer>", "a", "<", "<answer>B</answer>", "\n"])
def test_a_text_of_a_million_letters_takes_no_time(piece):
    text = piece * (1_000_000 // len(piece))
    for case in (text, "<think>" + text, f"<answer>{text}"):
        assert sum(reward(case, EXAMPLE, RIGHT, True) for reward in REWARDS.values()) == 0


def test_advantages_by_hand():
    r = torch.tensor([0.0, 1.0, 2.0, 1.0])  # mean 1, unbiased variance 2 / 3
    std = (2 / 3) ** 0.5 + 1e-4
    assert advantages(r, "std").tolist() == pytest.approx([-1 / std, 0, 1 / std, 0])
    assert advantages(r, "none").tolist() == [-1, 0, 1, 0]
    for value in (0.0, 1.0, 2.0):
        same = torch.full((7,), value)
        assert no_variance(same) and (advantages(same, "std") == 0).all() and (advantages(same, "none") == 0).all()
    assert not no_variance(r)
