"""Which option a written answer means: what it says in the end (final_answer), by the first of these that tells; what
none tells is no answer:

letter   The text states one letter and no other, and an option has it. A letter is stated by a capital that stands
         alone where neither an article ("A dog") nor a pronoun ("I hear") can stand: at the end of a line, before
         punctuation or a dash, or before "and", "or", "is", "because" or "since". As the very first thing in the text a
         small letter counts too, where a dot, a colon or a bracket follows, or nothing.
option   The words of exactly one option stand in the text, in a row. Those of an option that is part of a longer one
         there do not count: "dog barking" does not name "dog".
similar  One option is more like the text than all others: the largest difflib ratio between the option and any run
         of as many words of the text is at least CUTOFF.

Words are runs of letters and digits, compared without case and apostrophes.
"""
import re
import unicodedata
from difflib import SequenceMatcher

WAYS = ("letter", "option", "similar", "none")
CUTOFF = 0.7  # at difflib's own 0.6, one refusal to answer in nine is "like" one of ten VGGSound labels; here, 1 in 300
STATED = re.compile(
    r"""(?<![\w./-])(?!I,)[A-Z](?=\s*$|[.:;,!?)\]}"'”’*]+(?:\s|$)|</|\s?[-–—]\s|\s+(?:and|or|is|because|since)\b)""",
    re.MULTILINE)  # fmt: skip
INSIDE = r"(?:(?!</?(?:think|answer)>).)*"  # text without any of the four tags
THOUGHTS = re.compile(rf"<think>({INSIDE})</think>", re.DOTALL)
ANSWER = re.compile(rf"<answer>({INSIDE})</answer>", re.DOTALL)
FIRST = re.compile(r"\A\W*[a-z](?=[.:)\]]|\W*$)")


def thoughts(text):
    """What stands between a trace's <think> and </think>; all of a text in which nothing does."""
    found = THOUGHTS.search(text)
    return found[1].strip() if found and found[1].strip() else text


def final_answer(text):
    """What a completion gives as its answer, or None: what stands in its only <answer> after the thinking, or, without
    that tag, all that follows the thinking. Thinking that has no end and no whole <answer>, several answers, and no
    words are no answer."""
    said = (text or "").rpartition("</think>")[2]
    before, opened, inside = said.partition("<answer>")
    answer, closed, _ = inside.partition("</answer>")
    if "<answer>" in inside or ("<think>" in before and not closed):
        return None
    said = answer if opened else said
    return said if words_of(said) else None


def extract(text, options):
    """(index of the option that the completion `text`, or None for none, means or None, one of WAYS)."""
    text = final_answer(text)
    if text is None:
        return None, "none"
    text = FIRST.sub(lambda found: found[0].upper(), unicodedata.normalize("NFKC", text))
    letters = set(STATED.findall(text))
    if len(letters) == 1 and (index := ord(letters.pop()) - ord("A")) < len(options):
        return index, "letter"
    said, choices = words_of(text), [words_of(option) for option in options]
    named = [i for i, choice in enumerate(choices) if _holds(said, choice)]
    named = [i for i in named if not any(choices[j] != choices[i] and _holds(choices[j], choices[i]) for j in named)]
    if len(named) == 1:
        return named[0], "option"
    alike = [_likeness(said, choice) for choice in choices]
    best = max(alike)
    if best >= CUTOFF and alike.count(best) == 1:  # options that are named tie, at 1
        return alike.index(best), "similar"
    return None, "none"


def words_of(text):
    """Runs of letters and digits, without case and apostrophes."""
    text = re.sub("['’]", "", unicodedata.normalize("NFKC", text))
    return re.findall(r"[^\W_]+", text.casefold())


def _holds(words, part):
    return bool(part) and f" {' '.join(part)} " in f" {' '.join(words)} "


def _likeness(words, part):
    """The largest ratio between `part` and a run of as many of the words (of all of them, where they are fewer)."""
    runs = [words[i:i + len(part)] for i in range(max(1, len(words) - len(part) + 1))]
    ratios = (SequenceMatcher(None, " ".join(run), " ".join(part), autojunk=False).ratio() for run in runs)
    return max(ratios) if part else 0.0
