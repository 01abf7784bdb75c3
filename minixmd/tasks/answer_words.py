"""Patterns of how answers are written, for answers.py; answer_words.json has the words, in Qwen's users' languages."""
import json
import re
from pathlib import Path

WORDS = json.loads(Path(__file__).with_name("answer_words.json").read_text(encoding="utf-8"))


def any_of(name):
    """A pattern of any word of a list in answer_words.json: "spaced" ones in any case, "joined" without boundaries."""
    spaced, joined = WORDS[name]["spaced"], WORDS[name]["joined"]
    return "(?:" + "|".join([rf"(?i:\b(?:{'|'.join(spaced)})\b)", *joined]) + ")"


SIGNS = str.maketrans({"。": ". ", "،": ", ", "、": ", ", "’": "'", "‘": "'", "−": "-", "♯": "#", "♭": "b"})
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts whose words stand beside a letter without a space
WORD = rf"[^\W{CJK}]"  # a letter or digit of any other
OPEN = r"""["'“(\[{<「【《]{0,4}"""
CLOSE = r"""[.:;,!?)\]}"'”>」】》]"""
BRACKET = r"""[)\]}"'”>」】》]"""
# what a letter is part of: a word ("Bach", "B:maj"), a note or a key, two answers, several
OF_WORD = rf"{WORD}|[#+%/]|[':.,]{WORD}"
OF_KEY = r"[- ]?(?i:flat|sharp|major|minor|dur|moll)\b|\s?[大小]?调|和弦"
OF_TWO = r"\)?,?\s*(?:\b(?i:or|and|oder|und)\b|或者?|和|还是)\s*\(?[A-Z]\b"
OF_SEVERAL = r"\)?\s*[,;&|]\s*\(?[A-HJ-Z](?![\w'])(?!\s+[a-z])"
ALONE = rf"(?!{OF_WORD}|{OF_KEY}|{OF_TWO}|{OF_SEVERAL})"
LETTER = (rf"{OPEN}((?![AI])[A-Z]{ALONE}"  # one that could be an article or a pronoun, or is small, only at an end
          rf"|[A-Za-z]{ALONE}(?={CLOSE}|\s*$|\s*\n|[{CJK}]|\s+(?i:because|since|weil|da)\b))")
STATED = re.compile(
    rf"(?<!{WORD})(?<![./-])(?!I,)([A-Z])(?=\s*$|{CLOSE}+(?:\s|$)|</|\s?[-–—]\s|\s?[&|;]|(?:选项|項|项|번)"
    r"|\s+(?:and|or|is|because|since|und|oder|ist|weil)\b|\s*[或和])",
    re.MULTILINE)  # fmt: skip
FIRST = re.compile(r"\A\W*(?:(?i:option|choice)\W+)?[a-z](?=[.:)\]]|\W*$)")
LINK = rf"""(?:[\s:=,>"】」\]]|-(?!\d)|{any_of("between")})*"""
AFTER_ANSWER = any_of("answer") + LINK
IS_RIGHT = (rf"(?<!{WORD}){LETTER}{CLOSE}?\s*(?:选项|项)?\s*(?:is|ist|是)?\s*(?:the |die |der )?"
            r"(?:\b(?i:correct|right|richtige?)\b|正确|对(?!于)|答案)")
AFTER_CHOICE = any_of("choice") + LINK + LETTER
RULED_OUT = re.compile(
    rf"{any_of('not')}\s*(?:{any_of('filler')}\s*){{0,4}}{OPEN}[A-Z](?!{WORD}){CLOSE}?"
    rf"|(?<!{WORD}){OPEN}[A-Z](?!{WORD})(?:\?\s*(?i:no)\b|{BRACKET}?\s*(?:选项|项)?\s*"
    rf"(?:(?:is|are|was|can|could|does|ist|wäre|kann|是)\s*)?{any_of('wrong')})")
DENIAL = rf"(?:{any_of('not')}|\b(?i:no)\b)\s*(?:{any_of('filler')}\s*){{0,4}}"  # before an option's words
NOR = rf"\s*(?:,|\b(?i:or|nor|oder|noch)\b|或|也不是)\s*(?:{any_of('filler')}\s*){{0,4}}"  # between two that are denied
THING = re.compile(rf"{any_of('thing')}\s+[A-Z](?!\w)")  # "vitamin C" is no letter
BUT = re.compile(any_of("but"))
REFUSAL = re.compile(any_of("refusal"))
OR = re.compile(r"(?:\b(?i:or|oder|whether|if|ob)\s+(?i:the |die )?|或者?)\Z")
DENIED = re.compile(r"(?i:n't|\bnot|\bnever|\bcannot)\s+(?:\w+\s+){0,3}\Z")  # "I don't think that the", before "answer"
SENTENCE_END = re.compile(r"[.!?;\n](?:\s|$)|" + any_of("end"))
