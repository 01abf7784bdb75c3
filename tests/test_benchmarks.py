"""tasks/benchmarks.py: how a written answer is scored on AVQA, MMAU, MMAR and MUSIC-AVQA."""
import json
from pathlib import Path
from string import ascii_uppercase

import pytest

from minixmd.inputs.examples import Example
from minixmd.tasks.benchmarks import WAYS, benchmark_of, meant, mmau_rule, same, vote
from minixmd.tasks.statistics import breakdown

DATA = Path(__file__).parent / "data"
MMAU = json.loads((DATA / "mmau-test-mini.json").read_text())  # ten real records
MMAR = json.loads((DATA / "MMAR-meta.json").read_text())  # eleven real records
ANIMALS = ("cat", "dog", "dog barking", "sea lion")


def score(rule, text, options, answer):
    """(right, how) of a completion; answer: index of the right option."""
    index, how = meant(text, options, rule)
    assert how in WAYS[rule] and (index is None or 0 <= index < len(options))
    return same(options, index, answer, rule), how


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
    assert score("option", text, ANIMALS, 1) == (right, how)


def test_an_option_that_stands_twice_is_right_under_both_letters():
    assert score("option", "C", ("thirteen", "twenty", "thirteen"), 0) == (True, "letter")
    assert score("mmau", "C", ("thirteen", "twenty", "thirteen"), 0) == (True, "letter")


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
    """A completion by MMAU's rule, in which {letter} and {text} are the right option's."""
    index = record["choices"].index(record["answer"])
    text = form.format(letter=ascii_uppercase[index], text=record["answer"])
    return score("mmau", text, record["choices"], index)


@pytest.mark.parametrize("form", ["{text}", "{letter}", "({letter})", "{letter}.", "({letter}) {text}",
                                  "{letter}. {text}", "The answer is {letter}.", "<answer>{letter}: {text}</answer>"])
def test_mmau_letters_stand_for_their_option(form):
    assert all(ask(record, form)[0] for record in MMAU)


@pytest.mark.parametrize("form", ["{text}", "{letter}", "({letter}) {text}", "<answer>{letter}. {text}</answer>"])
def test_mmaus_rule_finds_the_right_options_of_mmar(form):
    assert all(ask(record, form)[0] for record in MMAR)


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
    assert score("mmau", text, options, answer) == expected


def test_mmau_accepts_the_right_option_alone_whichever_it_is():
    for record in MMAU:
        options = record["choices"]
        for i in range(len(options)):
            index, how = meant(f"({ascii_uppercase[i]}) {options[i]}", options, "mmau")
            for j, option in enumerate(options):
                assert same(options, index, j, "mmau") == mmau_rule(options[i], options, option)
            assert how == "letter" and options[index] == options[i]


def test_options_of_the_same_words_are_one_answer_to_mmau_alone():
    twins = ("cat, dog", "owl", "dog, cat")
    assert [meant(text, twins, "mmau") for text in ("C", "dog, cat", "cat, dog", "a cat and a dog")] == [
        (2, "letter"), (2, "text"), (0, "text"), (0, "text")]
    assert same(twins, 0, 2, "mmau") and not same(twins, 0, 2, "option") and not same(twins, 0, 1, "mmau")
    assert not same(twins, None, 1, "mmau") and not same(twins, None, None, "option")


# ---- votes ----


@pytest.mark.parametrize("texts, at, index, how, votes", [
    (["A", "B", "I hear a dog", "C"], 1, 1, "letter", {"cat": 1, "dog": 2, "dog barking": 1}),
    (["B", "A", "A", "B"], 0, 1, "letter", {"dog": 2, "cat": 2}),  # a tie
    (["hm", "A", "B", "<think>B", "dogg"], 2, 1, "letter", {"cat": 1, "dog": 2}),  # two have no vote
    (["hm", "hm", "hm", "the sea lion"], 3, 3, "option", {"sea lion": 1}),  # one vote is more than none
    (["hm", "<think>A", ""], 0, None, "none", {}),
    (["D"], 0, 3, "letter", {"sea lion": 1}),
])  # fmt: skip
def test_the_option_that_most_mean_counts_and_a_tie_is_the_firsts(texts, at, index, how, votes):
    found = vote(texts, ANIMALS, "option")
    assert found == (at, index, how, votes) and list(found[3]) == list(votes)


def test_votes_for_options_of_one_text_are_counted_together():
    options = ("thirteen", "twenty", "thirteen")
    assert vote(["B", "B", "C", "A", "C"], options, "option") == (2, 2, "letter", {"twenty": 2, "thirteen": 3})
    assert vote(["B", "dog, cat", "C"], ("cat, dog", "owl", "dog, cat"), "mmau") == (
        1, 2, "text", {"owl": 1, "cat, dog": 2})
    assert vote(["E", "B", ""], ANIMALS, "mmau") == (1, 1, "letter", {"dog": 1})
    assert vote(["E", ""], ANIMALS, "mmau") == (0, None, "text", {})


# ---- tables ----


def example(**meta):
    return Example("x", None, None, "Which?", ("a", "b"), 0, meta=meta)


def test_a_manifest_is_a_benchmark_if_all_of_it_has_the_fields():
    mmau, music = dict(task="sound", difficulty="easy", sub_category="x"), dict(modality="Audio", type="Counting")
    assert benchmark_of([example(**mmau), example(**mmau, more=1)]) == "mmau"
    mmar = dict(modality="sound", category="Signal Layer", sub_category="x")
    assert benchmark_of([example(**music)]) == "music_avqa"
    assert benchmark_of([example(**mmar), example(**mmar, language=None)]) == "mmar"
    for examples in ([example()], [example(**mmau), example()], [example(**mmau), example(**music)],
                     [example(**mmar), example(**mmau)], [example(**(mmau | {"task": ["sound"]}))],
                     [example(type="Which", relation="Sound")]):
        assert benchmark_of(examples) is None


def counted(name, metas, rights):
    """breakdown's table with [correct, count] in the place of each summary."""
    def short(part):
        return [part["correct"], part["count"]] if "correct" in part else {key: short(of) for key, of in part.items()}

    return short(breakdown(name, metas, rights))


def test_mmau_accuracies_are_by_task_difficulty_and_sub_category():
    metas = [{"task": task, "difficulty": difficulty, "sub_category": "x"}
             for task, difficulty in (("sound", "easy"), ("music", "easy"), ("sound", "hard"))]
    assert counted("mmau", metas, [True, False, False]) == {
        "all": [1, 3], "task": {"music": [0, 1], "sound": [1, 2]}, "difficulty": {"easy": [1, 2], "hard": [0, 1]},
        "sub_category": {"x": [1, 3]}}
    with pytest.raises(ValueError):
        breakdown("mmau", metas, [True])


def test_mmar_accuracies_are_by_modality_category_and_sub_category():
    metas = [{"modality": modality, "category": category, "sub_category": "x"} for modality, category in
             (("sound", "Signal Layer"), ("mix-sound-speech", "Signal Layer"), ("sound", "Cultural Layer"))]
    assert counted("mmar", metas, [True, False, False]) == {
        "all": [1, 3], "modality": {"mix-sound-speech": [0, 1], "sound": [1, 2]},
        "category": {"Cultural Layer": [0, 1], "Signal Layer": [1, 2]}, "sub_category": {"x": [1, 3]}}


def test_music_accuracies_are_by_type_over_what_is_heard_and_over_all():
    kinds = [("Audio", "Counting"), ("Visual", "Counting"), ("Audio-Visual", "Temporal"), ("Audio-Visual", "Counting"),
             ("Visual", "Location")]
    metas = [{"modality": modality, "type": type, "group": f"{modality} {type}"} for modality, type in kinds]
    table = counted("music_avqa", metas, [True, False, True, False, True])
    assert table["audio"] == {"Temporal": [1, 1], "Comparative": [0, 0], "Counting": [1, 2], "Existential": [0, 0],
                              "Location": [0, 0], "all": [2, 3]}
    assert table["every"] == {"Temporal": [1, 1], "Comparative": [0, 0], "Counting": [1, 3],
                              "Existential": [0, 0], "Location": [1, 1], "all": [3, 5]}
    assert table["pair"] == {"Audio Counting": [1, 1], "Audio-Visual Counting": [0, 1],
                             "Audio-Visual Temporal": [1, 1], "Visual Counting": [0, 1], "Visual Location": [1, 1]}
