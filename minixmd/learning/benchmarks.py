"""How the benchmarks of SightSound-R1 score a written answer, and what their accuracies are broken down by.

Every score is (right, how): whether the answer is the right option, and how it was read. No answer is a wrong one, with
how "none", so that it can be counted.

AVQA, MUSIC-AVQA   The option that the words mean by answers.extract: its letter, else its words, else the option that
                   is most similar to them. MUSIC-AVQA has no official rule for text; this is ours.
MMAU               The official rule, over the option's text where the answer is a letter: "letter" or "text".
"""
import re
from string import ascii_lowercase

from minixmd.learning.answers import extract

TYPES = ("Temporal", "Comparative", "Counting", "Existential", "Location")  # of MUSIC-AVQA; the paper's table has four


def final_answer(text):
    """What a completion gives as its answer, or None: what stands in its only <answer> after the thinking, or, without
    that tag, all that follows the thinking. Thinking that has no end, several answers and no words are no answer."""
    thought, closed, said = (text or "").rpartition("</think>")
    _, opened, inside = said.partition("<answer>")
    if "<answer>" in inside or (not opened and not closed and "<think>" in said):
        return None
    said = inside.partition("</answer>")[0] if opened else said
    return said.strip() if re.search(r"\w", said) else None


def score_option(text, options, answer):
    """(right, how) with how one of answers.WAYS; the rule of AVQA and MUSIC-AVQA.

    Args:
        text: a completion, or None for none. answer: index of the right option.
    """
    said = final_answer(text)
    index, how = (None, "none") if said is None else extract(said, options)
    return index is not None and options[index] == options[answer], how


def score_mmau(text, options, answer):
    """(right, how) with how "letter", "text" or "none".

    An option's own text wins over a letter ("D" where the options are chords, "a dog" where A is "dog"). A letter
    stands for its option, with that option's text behind it or alone, unless the answer also has the words of another
    one ("Lyndon B. Johnson").
    """
    said = final_answer(text)
    if said is None:
        return False, "none"
    index, how = _option_meant(said, options), "letter"
    if index is None:
        how = "text"
    return mmau_rule(said if index is None else options[index], options, options[answer]), how


def _option_meant(said, options):
    """Index of the option for which a letter stands in `said`, or None where there is no letter to replace."""
    plain, texts = _plain(said), [_plain(option) for option in options]
    if plain in texts:
        return None
    for i, (letter, text) in enumerate(zip(ascii_lowercase, texts, strict=False)):
        if re.fullmatch(rf"\(?{letter}[).:]*\s{re.escape(text)}", plain):
            return i
    index, how = extract(said, options)
    if how != "letter":
        return None
    others = (_tokens(option) for option in options if _tokens(option) != _tokens(options[index]))
    return None if any(other and other <= _tokens(said) for other in others) else index


def _plain(text):
    return " ".join(text.casefold().split()).rstrip(".")


def _tokens(text):
    return set(re.findall(r"\b\w+\b", text.lower()))


def mmau_rule(text, options, right):
    """MMAU's own rule: every word of the right option's text is said, and none that only other options have.

    Order and number of the words do not count. Source: evaluation.py of Sakshi113/MMAU, re-implemented; it does not
    know letters, and leaves a question without an answer out of the count.
    """
    said, words = _tokens(text), _tokens(right)
    return words <= said and not said & (set().union(*map(_tokens, options)) - words)


def mmau_table(metas, rights):
    """{"all": rights, "task" | "difficulty" | "sub_category": {name: rights}}: the right and wrong answers of each.

    Args:
        metas: the Examples' meta. rights: a boolean each.
    """
    return {"all": list(rights), **{field: _by(field, metas, rights)
                                    for field in ("task", "difficulty", "sub_category")}}


def music_table(metas, rights):
    """The right and wrong answers of MUSIC-AVQA: {"audio": {type: rights, "all": rights}, "every": the same over all
    modalities, "pair": {"Audio Counting": rights, ...}}.

    "audio" is over audio and audio-visual questions: the test split's 6,707 of 9,129, our reading of the paper's "7k".
    """
    pairs = list(zip(metas, rights, strict=True))
    heard = [(meta, right) for meta, right in pairs if meta["modality"] != "Visual"]
    return {name: {**{kind: [right for meta, right in part if meta["type"] == kind] for kind in TYPES},
                   "all": [right for _, right in part]}
            for name, part in (("audio", heard), ("every", pairs))} | {
        "pair": _by("group", metas, rights)}


def _by(field, metas, rights):
    found = {name: [] for name in sorted({meta[field] for meta in metas})}
    for meta, right in zip(metas, rights, strict=True):
        found[meta[field]].append(right)
    return found
