"""extract: which option a written answer means, by which way, and what does not fool it."""
import json
import time
from pathlib import Path

import pytest

from minixmd.config.prompts import PROMPT, PromptFormat
from minixmd.tasks.answers import WAYS, extract, final_answer, parse_answer, thoughts
from minixmd.tasks.benchmarks import vote

OPTIONS = ("dog barking", "cat meowing", "police car (siren)", "dog", "playing bass drum", "ice cream van",
           "woman's singing", "parrot talking", "skidding", "toilet flushing")  # fmt: skip


def ways(cases, options=OPTIONS):
    return {text: extract(text, options) for text in cases}


@pytest.mark.parametrize("text", [
    "B", "B.", " B\n", "(B)", "[B]", "B)", "**B**", '"B"', "‘B’", "Ｂ", "b", "b.", "(b)", "b) cat", "B. cat meowing",
    "B: cat meowing", "B, cat meowing", "B - a cat", "B — a cat", "B\nIt meows.", "B. dog barking", "B is right",
    "B because it meows", "The answer is B", "The answer is B.", "The answer is: (B) cat", "Answer: B", "It's B!",
    "cat meowing (B)", "option B, I think", "<answer>B</answer>", r"\boxed{B}", "B. A cat is meowing", "B. I am sure.",
    "A cat is what I hear: B", "B, B and B.",
])  # fmt: skip
def test_a_stated_letter_is_the_answer_whatever_words_follow(text):
    assert extract(text, OPTIONS) == (1, "letter")


def test_the_letter_a_counts_where_no_article_can_stand():
    for text in ("A", "A.", "a", "a.", "(A) dog", "A: dog", "A\ndog", "The answer is A", "A is the answer", "A, a dog"):
        assert extract(text, OPTIONS) == (0, "letter"), text


def test_articles_pronouns_and_initials_are_no_letters():
    assert ways(["A dog", "A cat meowing.", "THE ANSWER IS A DOG", "It is a dog, I guess", "I hear a dog",
                 "The sound is a dog", "B dog", "A police car's siren", "A-flat dog", "U.S.A. dog", "A/B dog"]) == {
        "A dog": (3, "option"), "A cat meowing.": (1, "option"), "THE ANSWER IS A DOG": (3, "option"),
        "It is a dog, I guess": (3, "option"), "I hear a dog": (3, "option"), "The sound is a dog": (3, "option"),
        "B dog": (3, "option"), "A police car's siren": (2, "similar"), "A-flat dog": (3, "option"),
        "U.S.A. dog": (3, "option"), "A/B dog": (3, "option")}  # fmt: skip
    for text in ("I", "I, as an AI model,", "I'm sorry", "I cannot hear it.", "It is a", "J. S. Bach", "Is it a or b?"):
        assert extract(text, OPTIONS) == ((8, "letter") if text == "I" else (None, "none")), text


def test_more_than_one_letter_is_no_letter():
    for text in ("A or B", "A and B", "A, B or C", "A. B.", "The options are A. x B. y C. z", "B. No, C."):
        assert extract(text, OPTIONS) == (None, "none"), text
    assert extract("A or B: toilet flushing", OPTIONS) == (9, "option")


def test_the_only_answer_tag_is_read_alone():
    assert extract("<think>It is B. dog, not A.</think>\n<answer>C</answer>", OPTIONS) == (2, "letter")
    assert extract("<think>dog</think><answer>toilet\nflushing</answer> B.", OPTIONS) == (9, "option")
    assert extract("<answer></answer> B.", OPTIONS) == (None, "none")
    assert extract("<answer>C</answer><answer>C</answer>", OPTIONS) == (None, "none")
    assert extract("<answer>B", OPTIONS) == (1, "letter")


@pytest.mark.parametrize("text, said", [
    ("B", "B"),
    ("  it is a dog\n", "it is a dog"),
    ("<think>A. no, C</think>\n<answer> B </answer>", "B"),
    ("<think>a <answer> is due</think><answer>B</answer>", "B"),  # the tag in the thinking is no answer
    ("<think>A</think> the dog", "the dog"),
    ("<answer>B", "B"),  # the end of turn came before the end of the tag
    ("<think>hm <answer>B</answer>", "B"),
    ("<think>the <answer> will be B", None),  # cut off in its thinking
    ("<think>A</think><think>B, or", None),
    ("<answer>B</answer> or <answer>C</answer>", None),
    ("<answer>B</answer> and so <answer>B</answer>", None),
    ("<think>it is certainly A, as", None),  # cut off
    ("<think>A</think>", None),
    ("<answer> ... </answer>", None),
    ("___", None),
    ("Ⓑ", "Ⓑ"),
    ("", None),
    (" \n", None),
    (None, None),
])
def test_the_final_answer_is_what_the_thinking_ends_in(text, said):
    found = final_answer(text)
    assert (found and found.strip()) == said


@pytest.mark.parametrize("text, thought", [
    ("<think>\nA bell.\nTwice. </think>\n<answer>B</answer>", "A bell.\nTwice."),
    ("so: <think>A bell.</think>", "A bell."),
    ("A bell, so B.", "A bell, so B."),
    ("<think> </think><answer>B</answer>", "<think> </think><answer>B</answer>"),
    ("<think>A bell", "<think>A bell"),
])
def test_the_thoughts_are_what_stands_before_the_answer(text, thought):
    assert thoughts(text) == thought


def test_thinking_is_not_read_and_without_an_end_is_no_answer():
    for thought in ("<think>B, so B. cat meowing", "<think>B", "<think>\nIt is a dog.\n", "<think>A</think> <think>B."):
        assert extract(thought, OPTIONS) == (None, "none"), thought
    for said, found in (("B", (1, "letter")), ("a dog", (3, "option")), ("parot talkin", (7, "similar"))):
        assert extract(said, OPTIONS) == extract(f"<think>skidding, E.</think>{said}", OPTIONS) == found
        assert extract(f"<think>skidding, E.</think>\n<answer>{said}</answer>", OPTIONS) == found
    assert extract(None, OPTIONS) == (None, "none")


def test_a_letter_that_no_option_has_is_none():
    assert extract("K", OPTIONS) == extract("E.", OPTIONS[:4]) == extract("Z. fox", OPTIONS) == (None, "none")
    assert extract("J", OPTIONS) == (9, "letter") and extract("J", OPTIONS[:9]) == (None, "none")
    assert extract("Z", ["x"] * 26) == (25, "letter")
    assert extract("K. dog barking", OPTIONS) == (0, "option")


def test_the_words_of_one_option_name_it_and_a_longer_one_hides_those_within():
    assert ways(["dog", "Dog Barking", "the sound of dog barking outside", "POLICE CAR SIREN", "police car: siren?",
                 "womans singing", "woman’s singing", "ice_cream_van", "toilet\nflushing"]) == {
        "dog": (3, "option"), "Dog Barking": (0, "option"), "the sound of dog barking outside": (0, "option"),
        "POLICE CAR SIREN": (2, "option"), "police car: siren?": (2, "option"), "womans singing": (6, "option"),
        "woman’s singing": (6, "option"), "ice_cream_van": (5, "option"), "toilet\nflushing": (9, "option")}
    assert extract("hotdog", ("dog", "cat")) == extract("category", ("dog", "cat")) == (None, "none")


def test_two_options_named_are_none():
    assert extract("skidding or parrot talking", OPTIONS) == (None, "none")
    assert extract("a dog and a cat", ("dog", "cat", "dot")) == (None, "none")
    assert extract("dog", ("dog", "Dog", "cat")) == (None, "none")  # the same words twice


def test_the_most_similar_option_stands_in_when_none_is_named():
    assert ways(["dogs barking", "a loud cat meow", "the toilet flushed", "it is a police siren", "parot talkin"]) == {
        "dogs barking": (0, "similar"), "a loud cat meow": (1, "similar"), "the toilet flushed": (9, "similar"),
        "it is a police siren": (2, "similar"), "parot talkin": (7, "similar")}  # fmt: skip


def test_the_ratio_is_difflibs_over_runs_of_the_options_length_and_0_7_is_enough():
    assert extract("abcdefgxyz", ("abcdefg123",)) == (0, "similar")  # 2 * 7 / 20
    assert extract("abcdefwxyz", ("abcdefg123",)) == (None, "none")  # 2 * 6 / 20
    noise = "words that say nothing at all about it "
    assert extract(noise + "abcdefgxyz" + noise, ("abcdefg123",)) == (None, "none")  # "abcdefgxyzwords"
    assert extract(noise + "abcdefgxyz " + noise, ("abcdefg123",)) == (0, "similar")


def test_equally_similar_options_are_none():
    assert extract("cab", ("cat", "car", "dog")) == (None, "none")
    assert extract("cats", ("cat", "cat")) == (None, "none")


def test_refusals_silence_and_odd_options_are_none():
    for text in ("", " \n", "...", "???", "I cannot determine the sound.", "none of the above", "狗在叫", "\ufffd\x00"):
        assert extract(text, OPTIONS) == (None, "none"), text
    assert extract("", ("?", "!")) == extract("hm", ("", "?")) == (None, "none")  # options without a word
    assert extract("B", ("?", "!")) == (1, "letter")
    assert WAYS == ("letter", "option", "similar", "none")


def test_options_that_are_numbers_or_single_letters_are_read_as_words_after_the_letters():
    assert extract("4", ("3", "One", "4", "2")) == extract("It is 4", ("3", "One", "4", "2")) == (2, "option")
    assert extract("B", ("C", "A", "B")) == (1, "letter")  # the question asks for a letter
    assert extract("in B minor", ("A minor", "B minor")) == (1, "option")


ROWS = [json.loads(line) for line in (Path(__file__).parent / "data" / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("source", sorted({row["source"] for row in ROWS}))
def test_the_table_of_written_answers(source):
    """English, Chinese, German and others, written without a look at the reader but for "ours"."""
    rows = [row for row in ROWS if row["source"] == source]
    wrong = []
    for row in rows:
        index, _ = extract(row["text"], row["options"], row["asked_for"] == "letter")
        if index != row["expected"]:
            wrong.append((row["text"], row["options"], index))
    assert not wrong and len(rows) >= 100


def test_a_letter_is_the_option_that_the_prompt_makes_it():
    notes = ("C", "C#", "G", "A")
    for text in ("<answer>C</answer>", "C", "The answer is C."):
        assert extract(text, notes)[0] == 2 and extract(text, notes, letters=False)[0] == 0
    assert parse_answer("<answer>C</answer>", notes) == 2 and parse_answer("<answer>C</answer>", notes, False) == 0
    for letters in (True, False):
        assert extract("<answer>C#</answer>", notes, letters) == (1, "option")
        assert parse_answer("<answer>C#</answer>", notes, letters) == 1
    assert vote(["C", "G", "C"], notes, "option", letters=False)[1] == 0
    assert PromptFormat("audio", PROMPT).asks_for_letter and not PromptFormat("audio", "{options}").asks_for_letter


def test_an_options_text_that_is_no_letter_of_the_question_is_an_option():
    assert parse_answer("<answer>F</answer>", ("C", "D", "E", "F")) == 3
    assert parse_answer("<answer>I</answer>", ("I", "IV", "V")) == 0


def test_long_texts_are_read_in_little_time():
    start = time.monotonic()
    for piece in ("the answer is ", "A or B, ", "so not A, ", "答案是", "I can't, but ", "\\boxed{", "B is right "):
        extract(piece * 1_000, OPTIONS)
    assert time.monotonic() - start < 20
