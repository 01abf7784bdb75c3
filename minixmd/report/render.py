"""Renders a report by the templates of this folder: page.html.j2, report.md.j2, and words.j2, sentences on figures."""
import re
from collections import Counter
from math import exp, floor, log10
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minixmd.tasks.statistics import wilson

DOUBTS = (0.5, 0.1, 0.01, 0.001)  # probabilities; a token is drawn stronger below each, and doubted below the second
ROLES = {"teacher": "teacher", "before": "student before", "after": "student after"}  # role -> what it is called


def page(report, media):
    """report.html. report: report.json. media: {path: data URI} of the files that the page itself holds."""
    return TEMPLATES.get_template("page.html.j2").render(report=report, media=media)


def markdown(report, template="report.md.j2", **variables):
    """report.md, or what another Markdown template makes of report.json."""
    text = PLAIN_TEXT.get_template(template).render(report=report, **variables)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def words(macro, *arguments):
    """The sentences that a macro of words.j2 makes, on one line."""
    return one_line(getattr(PLAIN_TEXT.get_template("words.j2").module, macro)(*arguments))


def one_line(text):
    return " ".join(text.split())


def columns_of(table):
    """Column titles of {row: {column: …}}, in the order of their first appearance."""
    return list(dict.fromkeys(column for cells in table.values() for column in cells))


def ticks(low, high):
    """Two to six round values that enclose low to high."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** floor(log10(span / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if span <= 5 * factor * step)
    first, last = floor(low / step + 1e-9), -floor(1e-9 - high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    extensions=["jinja2.ext.do"],
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals.update(roles=ROLES, ticks=ticks, wilson=wilson, doubts=DOUBTS)
TEMPLATES.filters.update(
    columns_of=columns_of,
    commas="{:,}".format,
    count_each=Counter,
    exp=exp,
    line=one_line,
    pct=lambda share: f"{100 * share:.1f}",
    visible=lambda token: re.sub(r"\s", "␣", token.replace("\n", "↵")),
)
PLAIN_TEXT = TEMPLATES.overlay(autoescape=False)
