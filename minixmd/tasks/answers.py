"""Reading a written answer: which option does a text mean?

`extract` is the lenient reader of evaluations. It looks at what the text says in the end (final_answer) and takes the
first of these that tells:

letter   The text states one letter and no other, and an option has it. A letter is stated by a capital that stands
         alone where neither an article ("A dog") nor a pronoun ("I hear") can stand: at the end of a line, before
         punctuation or a dash, or before "and", "or", "is", "because" or "since". As the very first thing in the text a
         small letter counts too, where a dot, a colon or a bracket follows, or nothing.
option   The words of exactly one option stand in the text, in a row. Those of an option that is part of a longer one
         there do not count: "dog barking" does not name "dog".
similar  One option is more like the text than all others: the largest difflib ratio between the option and any run
         of as many words of the text is at least CUTOFF.

`parse_answer` is the strict reader of rewards and traces: the option in the only <answer>…</answer>, or nothing.

Words are runs of letters and digits, compared without case and apostrophes.
"""
import re
import unicodedata
from difflib import SequenceMatcher
from string import ascii_lowercase

WAYS = ("letter", "option", "similar", "none")
CUTOFF = 0.7  # at difflib's own 0.6, one refusal to answer in nine is "like" one of ten VGGSound labels; here, 1 in 300
STATED = re.compile(
    r"""(?<![\w./-])(?!I,)[A-Z](?=\s*$|[.:;,!?)\]}"'”’*]+(?:\s|$)|</|\s?[-–—]\s|\s+(?:and|or|is|because|since)\b)""",
    re.MULTILINE)  # fmt: skip
INSIDE = r"(?:(?!</?(?:think|answer)>).)*"  # text without any of the four tags
THOUGHTS = re.compile(rf"<think>({INSIDE})</think>", re.DOTALL)
ANSWER = re.compile(rf"<answer>({INSIDE})</answer>", re.DOTALL)
FIRST = re.compile(r"\A\W*[a-z](?=[.:)\]]|\W*$)")


def words_of(text):
    text = re.sub("['’]", "", unicodedata.normalize("NFKC", text))
    return re.findall(r"[^\W_]+", text.casefold())


def thoughts(text):
    """What stands between a trace's <think> and </think>; the whole text if nothing does."""
    match = THOUGHTS.search(text)
    if match and match[1].strip():
        return match[1].strip()
    return text


def final_answer(text):
    """What stands in a completion's only <answer> after the thinking or, without that tag, all that follows it. None
    for thinking that has no end and no whole <answer>, several answers, or no words."""
    said = (text or "").rpartition("</think>")[2]
    before, opened, inside = said.partition("<answer>")
    answer, closed, _ = inside.partition("</answer>")
    if "<answer>" in inside or ("<think>" in before and not closed):
        return None
    if opened:
        said = answer
    return said if words_of(said) else None


def parse_answer(completion, options):
    """Index of the option in the completion's only <answer>…</answer>, or None. The answer is an option's letter, its
    words, or both, as in "B. dog". Nothing similar counts, and several answers are none."""
    answers = ANSWER.findall(completion)
    if len(answers) != 1 or completion.count("<answer>") != 1:
        return None
    said = words_of(answers[0])
    letters = list(ascii_lowercase[:len(options)])
    if len(said) == 1 and said[0] in letters:
        return letters.index(said[0])
    named = []
    for i, option in enumerate(options):
        words = words_of(option)
        if words and said in (words, [letters[i], *words]):
            named.append(i)
    return named[0] if len(named) == 1 else None


def extract(text, options):
    """(index of the option that a completion means or None, one of WAYS). text: None is no answer."""
    text = final_answer(text)
    if text is None:
        return None, "none"
    letter = _stated_letter(text, len(options))
    if letter is not None:
        return letter, "letter"
    said, choices = words_of(text), [words_of(option) for option in options]
    named = _named_options(said, choices)
    if len(named) == 1:
        return named[0], "option"
    similarity = [_similarity(said, choice) for choice in choices]
    best = max(similarity)
    if best >= CUTOFF and similarity.count(best) == 1:  # options that are named tie, at 1
        return similarity.index(best), "similar"
    return None, "none"


def _stated_letter(text, num_options):
    """Index of the only letter that a text states, or None."""
    text = unicodedata.normalize("NFKC", text)
    text = FIRST.sub(lambda match: match[0].upper(), text)
    letters = set(STATED.findall(text))
    if len(letters) != 1:
        return None
    index = ord(letters.pop()) - ord("A")
    return index if index < num_options else None


def _named_options(said, choices):
    """Indices of the options whose words stand in the text, without those inside a longer one that does."""
    named = [i for i, choice in enumerate(choices) if _holds(said, choice)]
    longest = []
    for i in named:
        inside_another = any(choices[j] != choices[i] and _holds(choices[j], choices[i]) for j in named)
        if not inside_another:
            longest.append(i)
    return longest


def _holds(words, part):
    return bool(part) and f" {' '.join(part)} " in f" {' '.join(words)} "


def _similarity(words, part):
    """The largest ratio between `part` and a run of as many of the words (of all of them, where they are fewer)."""
    if not part:
        return 0.0
    ratios = []
    for start in range(max(1, len(words) - len(part) + 1)):
        run = " ".join(words[start:start + len(part)])
        ratios.append(SequenceMatcher(None, run, " ".join(part), autojunk=False).ratio())
    return max(ratios)
