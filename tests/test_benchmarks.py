"""learning/benchmarks.py: how a written answer is scored on AVQA, MMAU and MUSIC-AVQA."""
import json
from pathlib import Path
from string import ascii_uppercase

import pytest

from minixmd.learning.benchmarks import (
    final_answer,
    mmau_rule,
    mmau_table,
    music_table,
    score_mmau,
    score_option,
)

MMAU = json.loads((Path(__file__).parent / "data" / "mmau-test-mini.json").read_text())  # ten real records
ANIMALS = ("cat", "dog", "dog barking", "sea lion")


@pytest.mark.parametrize("text, said", [
    ("B", "B"),
    ("  it is a dog\n", "it is a dog"),
    ("<think>A. no, C</think>\n<answer> B </answer>", "B"),
    ("<think>a <answer> is due</think><answer>B</answer>", "B"),  # the tag in the thinking is no answer
    ("<think>A</think> the dog", "the dog"),
    ("<answer>B", "B"),  # the end of turn came before the end of the tag
    ("<think>hm <answer>B</answer>", "B"),
    ("<answer>B</answer> or <answer>C</answer>", None),
    ("<answer>B</answer> and so <answer>B</answer>", None),
    ("<think>it is certainly A, as", None),  # cut off
    ("<think>A</think>", None),
    ("<answer> ... </answer>", None),
    ("", None),
    (" \n", None),
    (None, None),
])
def test_the_final_answer_is_what_the_thinking_ends_in(text, said):
    assert final_answer(text) == said


@pytest.mark.parametrize("text, right, how", [
    ("B", True, "letter"),
    ("<think>A? C?</think><answer>B</answer>", True, "letter"),
    ("C. dog barking", False, "letter"),
    ("I hear a dog", True, "option"),
    ("a dog barking", False, "option"),
    ("see lion", False, "similar"),
    ("dogg", True, "similar"),
    ("I cannot tell", False, "none"),
    ("<think>B, B, B", False, "none"),
    (None, False, "none"),
])
def test_an_option_is_meant_by_its_letter_else_its_words_else_by_likeness(text, right, how):
    assert score_option(text, ANIMALS, 1) == (right, how)


def test_an_option_that_stands_twice_is_right_under_both_letters():
    assert score_option("C", ("thirteen", "twenty", "thirteen"), 0) == (True, "letter")
    assert score_mmau("C", ("thirteen", "twenty", "thirteen"), 0) == (True, "letter")


@pytest.mark.parametrize("text, options, right, expected", [
    ("Man", ("Man", "Woman"), "Man", True),
    ("a MAN, speaking", ("Man", "Woman"), "Man", True),  # words beside are allowed unless another option has them
    ("Man or Woman", ("Man", "Woman"), "Man", False),
    ("(A) Man", ("Man", "A woman"), "Man", False),  # "a" is a word of the other option only
    ("(A) Man", ("Man", "Woman"), "Man", True),
    ("two men", ("two men", "two women"), "two men", True),  # "two" is a word of both
    ("men", ("two men", "two women"), "two men", False),
    ("dog, cat", ("cat, dog", "dog, cat"), "cat, dog", True),  # order does not count
    ("manly", ("Man", "Woman"), "Man", False),
    ("boiling_water", ("boiling_water", "water"), "boiling_water", True),  # \w has the underscore
    ("boiling water", ("boiling_water", "water"), "boiling_water", False),
    ("", ("Man", "Woman"), "Man", False),
    ("A", ("Man", "Woman"), "Man", False),  # it knows no letters
])
def test_mmau_rule_by_hand(text, options, right, expected):
    assert mmau_rule(text, options, right) is expected


def ask(record, form):
    """score_mmau on a completion in which {letter} and {text} are the right option's."""
    index = record["choices"].index(record["answer"])
    text = form.format(letter=ascii_uppercase[index], text=record["answer"])
    return score_mmau(text, record["choices"], index)


@pytest.mark.parametrize("form", ["{text}", "{letter}", "({letter})", "{letter}.", "({letter}) {text}",
                                  "{letter}. {text}", "The answer is {letter}.", "<answer>{letter}: {text}</answer>"])
def test_mmau_letters_stand_for_their_option(form):
    assert all(ask(record, form)[0] for record in MMAU)


def test_mmau_text_that_no_letter_explains_goes_to_the_official_rule_as_it_is():
    for record in MMAU:
        sentence = f"The answer is {record['answer']}."
        assert ask(record, "The answer is {text}.")[0] == mmau_rule(sentence, record["choices"], record["answer"])
    wrong = [i for i, record in enumerate(MMAU) if not ask(record, "The answer is {text}.")[0]]
    assert wrong == [1, 3]  # "the" and "is" are words of their other options


@pytest.mark.parametrize("text, options, answer, expected", [
    ("D", ("G", "A#", "D", "E"), 2, (True, "text")),  # an option's own text, not the letter of E
    ("C", ("G", "A#", "D", "E"), 2, (True, "letter")),
    ("a dog", ("dog", "a dog"), 1, (True, "text")),  # not A, "dog"
    ("d) E", ("G", "A#", "D", "E"), 3, (True, "letter")),
    ("The answer is Lyndon B. Johnson.", ("John F. Kennedy", "Richard Nixon", "Lyndon B. Johnson"), 1, (False, "text")),
    ("B. It was Nixon.", ("John F. Kennedy", "Richard Nixon", "Lyndon B. Johnson"), 1, (True, "letter")),
    ("C", ANIMALS, 1, (False, "letter")),
    ("E", ANIMALS, 1, (False, "text")),  # no option has this letter
    (None, ANIMALS, 1, (False, "none")),
    ("<think>so it is B", ANIMALS, 1, (False, "none")),
])
def test_mmau_letters_and_missing_answers(text, options, answer, expected):
    assert score_mmau(text, options, answer) == expected


def test_mmau_accuracies_are_by_task_difficulty_and_sub_category():
    metas = [{"task": task, "difficulty": difficulty, "sub_category": "x"}
             for task, difficulty in (("sound", "easy"), ("music", "easy"), ("sound", "hard"))]
    assert mmau_table(metas, [True, False, False]) == {
        "all": [True, False, False], "task": {"music": [False], "sound": [True, False]},
        "difficulty": {"easy": [True, False], "hard": [False]}, "sub_category": {"x": [True, False, False]}}
    with pytest.raises(ValueError):
        mmau_table(metas, [True])


def test_music_accuracies_are_by_type_over_what_is_heard_and_over_all():
    kinds = [("Audio", "Counting"), ("Visual", "Counting"), ("Audio-Visual", "Temporal"), ("Audio-Visual", "Counting"),
             ("Visual", "Location")]
    metas = [{"modality": modality, "type": type, "group": f"{modality} {type}"} for modality, type in kinds]
    table = music_table(metas, [True, False, True, False, True])
    assert table["audio"] == {"Temporal": [True], "Comparative": [], "Counting": [True, False], "Existential": [],
                              "Location": [], "all": [True, True, False]}
    assert table["every"] == {"Temporal": [True], "Comparative": [], "Counting": [True, False, False],
                              "Existential": [], "Location": [True], "all": [True, False, True, False, True]}
    assert table["pair"] == {"Audio Counting": [True], "Audio-Visual Counting": [False],
                             "Audio-Visual Temporal": [True], "Visual Counting": [False], "Visual Location": [True]}
