"""Reading a written answer: which option does a text mean?

`extract` is the lenient reader of evaluations. It looks at what the text says after its thinking (final_answer),
without what that rules out ("not A", "B is wrong"), and takes the first of these that tells:

stated   What stands in the last \\boxed{…}, else after the last "answer" or a like word, else after the last "so" or
         "I think": a letter or, in the first two, the words of one option in the same sentence.
text     The whole text is an option, with its signs: "C#" is not "C".
letter   The text has one letter and no other that stands alone where neither an article ("A dog") nor a pronoun
         ("I hear") can stand: at the end of a line, before punctuation or a dash, or before "and", "or", "is",
         "because" or "since". As the very first thing a small letter counts too.
option   The text names exactly one option, with its signs or by its words in a row. What is part of a longer option
         there does not count: "dog barking" does not name "dog".
similar  One option is more like the text than all others: the largest difflib ratio between the option and any run
         of as many words of the text is at least CUTOFF.

Of a refusal ("I can't hear it") the last two read only what follows a "but". Where options are letters themselves, as
notes are, the prompt decides: asked for a letter, a letter is meant."""
import re
import unicodedata
from difflib import SequenceMatcher
from string import ascii_uppercase

from minixmd.tasks import answer_words as patterns

WAYS = ("letter", "option", "similar", "none")
CUTOFF = 0.7  # at difflib's own 0.6, one refusal to answer in nine is "like" one of ten VGGSound labels; here, 1 in 300
INSIDE = r"(?s:(?!</?(?:think|answer)>).)*"  # text without any of the four tags
THOUGHTS = re.compile(rf"<think>({INSIDE})</think>")
ANSWER = re.compile(rf"<answer>({INSIDE})</answer>")
STATEMENTS, STATEMENT_CHARS = 20, 1000  # read after words such as "answer": the last so many, so far


def words_of(text):
    """Runs of letters and digits without case and apostrophes, or single characters of a script without spaces."""
    text = re.sub("['’]", "", unicodedata.normalize("NFKC", text))
    return re.findall(rf"[{patterns.CJK}]|[^\W_{patterns.CJK}]+", text.casefold())


def signed_words_of(text):
    """words_of with the signs that tell one from another: C# and C, -5 and 5, $5, 5%, C++."""
    text = re.sub(r"\s+%", "%", _clean(text).replace("'", ""))
    return re.findall(rf"[{patterns.CJK}]|(?:(?<!\w)-(?=\d)|[$€£])?[^\W_{patterns.CJK}]+[#+%*]*", text.casefold())


def thoughts(text):
    """What stands between a trace's <think> and </think>; the whole text if nothing does."""
    match = THOUGHTS.search(text)
    return match and match[1].strip() or text


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


def parse_answer(completion, options, letters=True):
    """The strict reader of rewards and traces: index of the option in a completion's only <answer>…</answer>, or None.
    It is an option's letter, text or words, or letter and words ("B. dog"); nothing similar. letters: as in extract."""
    answers = ANSWER.findall(completion)
    if len(answers) != 1 or completion.count("<answer>") != 1:
        return None
    return _exact_answer(_clean(answers[0]), options, letters)


def _exact_answer(said, options, letters):
    """Index of the option of which a text is the letter, the text or words, or both, and nothing more; or None."""
    letter = re.match(rf"\W*([A-Za-z]){patterns.CLOSE}*(?:\s+|\Z)(?s:(.*))", said)  # and what follows it
    if letter and not letter[2]:
        index = _option_of(letter[1], options, letters)
        if index is not None:
            return index
    found = _equal_options(said, options)
    if letter and not found:
        i = _option_of(letter[1], options, letters=True)
        if i is None or not _equal_options(letter[2], options[i:i + 1]):
            return None
        return i
    return found[0] if len(found) == 1 else None


def extract(text, options, letters=True):
    """(index of the option that a completion means or None, one of WAYS). text: None is no answer. letters: whether the
    prompt asked for a letter, which decides where options are letters themselves."""
    text = final_answer(text)
    if text is None:
        return None, "none"
    said = _clean(text)
    exact = [_exact_answer(line, options, letters) for line in said.splitlines() if len(words_of(line)) > 1]
    if len(exact) > 1 and exact[0] is not None and set(exact[1:]) == {None}:  # "B. dog", and then why
        return exact[0], "letter"
    said = _without_denied(patterns.RULED_OUT.sub(" ", said), options)
    index, how = _stated(said, options, letters)
    if index is not None:
        return index, how
    equal = _equal_options(said, options)
    if len(equal) == 1 and not re.fullmatch(r"\W*[A-Za-z]\W*", said):
        return equal[0], "option"
    refused = False
    while (refusal := patterns.REFUSAL.search(said)) and not refused:
        but = patterns.BUT.search(said, refusal.end())
        refused = but is None
        said = said[:refusal.start()] if refused else said[but.end():]
    index = _only_letter(said, options, letters)
    if index is not None:
        return index, "letter"
    if refused:
        return None, "none"
    named = _named_options(said, options)
    if len(named) == 1:
        return named[0], "option"
    words = signed_words_of(said)
    similarity = [_similarity(words, signed_words_of(option)) for option in options]
    best = max(similarity)
    if best >= CUTOFF and similarity.count(best) == 1:  # options that are named tie, at 1
        return similarity.index(best), "similar"
    return None, "none"


def _clean(text):
    r"""Text without Markdown, LaTeX's text commands and wide signs; \boxed{…} stays."""
    text = unicodedata.normalize("NFKC", text).translate(patterns.SIGNS)
    text = re.sub(r"(\*+|_{2,}|\$+)([^*$]*)\1|[`]|\\[()]", r" \2 ", text)
    return re.sub(r"\\(?:text|mathrm|mathbf|textbf|mathit)\s*{([^{}]*)}", r"\1", text)


def _option_of(letter, options, letters):
    if not letters:
        equal = [i for i, option in enumerate(options) if option.strip().casefold() == letter.casefold()]
        if len(equal) == 1:
            return equal[0]
    index = ascii_uppercase.index(letter.upper())
    return index if index < len(options) else None


def _without_denied(said, options):
    """The text without options that it denies, as in "not a dog"; all of it where options are denials themselves."""
    if not any(re.search(patterns.DENIAL, f"{option} ") for option in options):
        texts = sorted(map(_plain, options), key=len, reverse=True)
        option = rf"(?i:{'|'.join(map(re.escape, texts))})(?!{patterns.WORD})"
        said = re.sub(rf"{patterns.DENIAL}{option}(?:{patterns.NOR}{option})*", " ", said)
    return said


def _stated(said, options, letters):
    """(index, "letter" or "option") of what the text states as its answer, or (None, "none")."""
    boxed = re.findall(r"\\boxed\s*{([^{}]*)}", said)
    if re.search(r"\\boxed\s*{[^{}]*}\s*(?:,|or|and|oder|und|或)\s*\\boxed", said):
        return None, "none"
    if boxed:
        return _read_statement(boxed[-1], options, letters)
    # where a statement's words begin, and where what is stated does
    found = [match.span() for match in re.finditer(patterns.AFTER_ANSWER, said)]
    found += [(match.start(), match.start()) for match in re.finditer(patterns.IS_RIGHT, said)]
    for start, end in sorted(found, reverse=True)[:STATEMENTS]:
        before = said[max(0, start - 40):start]
        if patterns.OR.search(before):
            return None, "none"
        if patterns.DENIED.search(before):
            continue
        index, how = _read_statement(said[end:end + STATEMENT_CHARS], options, letters)
        if index is not None:
            return index, how
    choices = re.findall(patterns.AFTER_CHOICE, said)
    if choices:
        return _option_of(choices[-1], options, letters), "letter"
    return None, "none"


def _read_statement(text, options, letters):
    """A letter at the beginning of the text, or the one option that its first sentence names."""
    letter = re.match(patterns.LETTER, text)
    if letter:
        return _option_of(letter[1], options, letters), "letter"
    sentence = patterns.SENTENCE_END.split(text, maxsplit=1)[0]
    named = [] if patterns.REFUSAL.search(sentence) else _named_options(sentence, options)
    return (named[0], "option") if len(named) == 1 else (None, "none")


def _only_letter(said, options, letters):
    """Index of the only letter that a text has by itself, or None."""
    said = patterns.THING.sub(" ", patterns.FIRST.sub(lambda match: match[0].upper(), said))
    for option in options:
        if re.search(r"\W[A-Z]\Z|\A[A-Z]\W", option.strip()):
            said = said.replace(option.strip(), " ")  # the letter in "Plan B" is the option's own
    found = set(re.findall(r"(?m)^\W*(?!I,)([A-Z])(?![#+%])\W*$", said)) or set(patterns.STATED.findall(said))
    return _option_of(found.pop(), options, letters) if len(found) == 1 else None


def _plain(text):
    return " ".join(_clean(text).casefold().split()).strip(" .\"'")


def _equal_options(said, options):
    """Indices of the options that are the text, with their signs or, if none is, by their words."""
    plain, words = _plain(said), signed_words_of(said)
    equal = [i for i, option in enumerate(options) if plain and _plain(option) == plain]
    return equal or [i for i, option in enumerate(options) if words and signed_words_of(option) == words]


def _named_options(said, options):
    """Indices of the options that a text names, by signs or, if none is, by words; none that is inside a longer one."""
    plain, named = _plain(said), []
    for i, option in enumerate(options):
        text = _plain(option)
        if len(text) == 1:  # a note or a grade, in its own case: an article is none
            found = re.search(rf"(?<![\w$-]){re.escape(option.strip())}(?![\w#+%])", said)
        else:
            found = text and re.search(rf"(?<![\w#+/$-]){re.escape(text)}(?![\w#+/%])", plain)
        if found:
            named.append(i)
    choices = [signed_words_of(option) for option in options]
    if not named:
        words = signed_words_of(said)
        named = [i for i, choice in enumerate(choices) if _holds(words, choice)]
    longest = []
    for i in named:
        if not any(choices[j] != choices[i] and _holds(choices[j], choices[i]) for j in named):
            longest.append(i)
    return longest


def _holds(words, part):
    return bool(part) and f" {' '.join(part)} " in f" {' '.join(words)} "


def _similarity(words, part):
    """The largest ratio between `part` and a run of as many of the words (of all of them, where they are fewer)."""
    if not part or any(word.strip("-$€£%+").isdigit() for word in part):  # no number is like another
        return 0.0
    ratios = []
    for start in range(max(1, len(words) - len(part) + 1)):
        run = " ".join(words[start:start + len(part)])
        ratios.append(SequenceMatcher(None, run, " ".join(part), autojunk=False).ratio())
    return max(ratios)
