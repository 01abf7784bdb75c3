"""How the benchmarks of SightSound-R1, and MMAR, read a written answer, and what their accuracies are broken down by.

A rule says which option an answer means, and how it was read. No answer is a wrong one, read as "none".

option   AVQA, MUSIC-AVQA: answers.extract. MUSIC-AVQA has no official rule for text; this is ours.
mmau     The official rule, over the option's text where the answer is a letter: "letter" or "text". MMAR's derives from
         it."""
import re
from collections import Counter
from string import ascii_lowercase

from minixmd.tasks import answers

WAYS = {"option": answers.WAYS, "mmau": ("letter", "text", "none")}
TYPES = ("Temporal", "Comparative", "Counting", "Existential", "Location")  # of MUSIC-AVQA; the paper's table has four
NAMES = {"mmau": "MMAU", "mmar": "MMAR", "music_avqa": "MUSIC-AVQA"}
FIELDS = {"mmau": ("task", "difficulty", "sub_category"), "mmar": ("modality", "category", "sub_category"),
          "music_avqa": ("modality", "type")}  # of the Examples' meta
VERSIONED = ("mmau", "mmar")  # read by rule "mmau"; a manifest's meta has the version of the official file


def meant(text, options, rule, letters=True):
    """(index of the option that a completion means, or None; how, one of WAYS[rule]). text: None is no completion. By
    MMAU's rule an option's own text wins over a letter ("D" where the options are chords, "a dog" where A is "dog"). A
    letter stands for its option, with that option's text behind it or alone, unless the answer also has the words of
    another one ("Lyndon B. Johnson"). Of options with the same words in another order, the first is meant."""
    if rule == "option":
        return answers.extract(text, options, letters)
    said = answers.final_answer(text)
    if said is None:
        return None, "none"
    letter = _mmau_letter(said, options)
    if letter is not None:
        return letter, "letter"
    fits = [i for i, option in enumerate(options) if mmau_rule(said, options, option)]
    exact = [i for i in fits if _plain(options[i]) == _plain(said)]
    return next(iter(exact or fits), None), "text"


def same(options, i, j, rule):
    """Whether two indices mean one answer: options of the same text or, by MMAU's rule, words. None is like nothing."""
    if i is None or j is None:
        return False
    if rule == "option":
        return options[i] == options[j]
    return mmau_rule(options[i], options, options[j])


def vote(texts, options, rule, letters=True):
    """What most of a question's completions mean: (number of the first text that means the winner, or 0; its index and
    how, as `meant`; {option: votes}). A tie goes to the option said first. Options that are the same share votes."""
    read = [meant(text, options, rule, letters) for text in texts]
    voted = []
    for index, _ in read:
        voted.append(next((option for i, option in enumerate(options) if same(options, i, index, rule)), None))
    votes = Counter(option for option in voted if option is not None)
    winner = voted.index(votes.most_common(1)[0][0]) if votes else 0  # of equals, the one that was counted first
    return winner, *read[winner], dict(votes)


def mmau_rule(text, options, right):
    """MMAU's own rule: every word of the right option is said, in any order and number, and none that only others have.
    Source: evaluation.py of Sakshi113/MMAU, re-implemented; it knows no letters, and counts no unanswered question."""
    said, words = _tokens(text), _tokens(right)
    others = set().union(*map(_tokens, options)) - words
    return words <= said and not said & others


def _mmau_letter(said, options):
    """Index of the option for which a letter stands in `said`, or None where there is no letter to replace."""
    plain, texts = _plain(said), list(map(_plain, options))
    if plain in texts:
        return None
    for i, (letter, text) in enumerate(zip(ascii_lowercase, texts, strict=False)):
        if re.fullmatch(rf"\(?{letter}[).:]*\s{re.escape(text)}", plain):
            return i
    index, how = answers.extract(said, options)
    if how != "letter":
        return None
    chosen_words = _tokens(options[index])
    for option in options:
        words = _tokens(option)
        if words and words != chosen_words and words <= _tokens(said):
            return None
    return index


def _plain(text):
    return " ".join(text.casefold().split()).rstrip(".")


def _tokens(text):
    return set(re.findall(r"\b\w+\b", text.lower()))


def benchmark_of(examples):
    """A key of FIELDS, where the meta of all Examples has what its accuracies are broken down by; else None."""
    for name, fields in FIELDS.items():
        if all(isinstance(example.meta.get(field), str) for example in examples for field in fields):
            return name
    return None
