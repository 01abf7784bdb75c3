"""The page of stage Report: HTML, CSS and SVG by hand, no script, nothing fetched from elsewhere.

Every string from the data goes through `esc`. Its charts are report_charts.py's, its clips report_cards.py's.
"""
from minixmd.report.cards import card, clips, thought
from minixmd.report.charts import NAMES, ROLES, bar_chart, esc, line_chart, pct, roc_chart

WHO = ("the teacher is not better", "the teacher is better")
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2128; --dim: #59636e; --rule: #d1d9e0; --box: #f6f8fa;
  --teacher: #c75000; --student: #0072b2; --c2: #00795c; --c3: #a3427b; --c4: #59636e; --c5: #8a6d00 }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e6e9ed; --dim: #9aa4af; --rule: #373e47;
  --box: #1d2229; --teacher: #f0a020; --student: #56b4e9; --c2: #2fc79e; --c3: #e08fc0; --c4: #9aa4af; --c5: #f0e442 } }
* { box-sizing: border-box } a { color: inherit } summary { cursor: pointer }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, h3, h4 { line-height: 1.25; margin: 0 0 .5rem } h2 { margin-top: 3rem } h3 { margin-top: 1.5rem }
h3, h4 { font-size: 1rem } p, ul { margin: 0 0 .75rem; max-width: 46rem } ul { padding-left: 1.2rem }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem } td small { display: block }
small, .dim { color: var(--dim); font-size: .8rem; font-weight: normal }
.scroll { overflow-x: auto; margin: 0 0 1rem } .scroll:focus-visible { outline: 2px solid var(--student) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td.paper { font-style: italic }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top }
td, th[scope=colgroup] { white-space: nowrap } th[scope=col] { overflow-wrap: normal; vertical-align: bottom }
th[scope=colgroup], td.all { border-left: 1px solid var(--rule) } th[scope=colgroup] { text-align: left }
th:first-child, td.said { text-align: left; white-space: normal; padding-left: 0 }
.scroll th:first-child { position: sticky; left: 0; min-width: 7rem; background: var(--page) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem 2rem }
.grid > * { min-width: 0 } .small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1rem }
svg.chart { display: block; width: 100%; max-width: 30rem; height: auto; font: 11px system-ui, sans-serif }
svg text { fill: var(--ink) } svg .dim { fill: var(--dim); font-size: 10px } .rule { stroke: var(--rule) }
.teacher { fill: var(--teacher) } .after { fill: var(--student) } .whisker { stroke: var(--ink) }
.before { fill: var(--page); stroke: var(--student); stroke-width: 1.5 }
.key { display: inline-flex; align-items: center; gap: .35rem; margin-right: 1rem } .key svg { flex: none }
.line { fill: none; stroke-width: 1.8; stroke: var(--student) } .l1 { stroke: var(--teacher); stroke-dasharray: 6 3 }
.l2 { stroke: var(--c2); stroke-dasharray: 2 2 } .l3 { stroke: var(--c3); stroke-dasharray: 9 3 2 3 }
.l4 { stroke: var(--c4); stroke-dasharray: 12 4 } .l5 { stroke: var(--c5); stroke-dasharray: 4 4 }
.clip { border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem; background: var(--box) }
.clip video, .clip audio { display: block; width: 100%; max-height: 12rem; margin: 0 0 .5rem }
.funnel th:last-child, .funnel td:last-child { text-align: left; white-space: normal; min-width: 14rem }
.clip table { margin: 0 0 .5rem; font-size: .875rem } .clip th { white-space: nowrap }
.clip .long th { white-space: normal } pre { white-space: pre-wrap }
"""


def columns_of(rows):
    return list(dict.fromkeys(column for cells in rows.values() for column in cells))


def heads(table):
    """[(column, what, heading)] of a table of accuracies, and of the table of its groups, which may be empty.

    what: "all", "paper", "letters", "disagreement"; in the second "group".
    """
    first, second = [], []
    for column in columns_of(table):
        here = [cells[column] for cells in table.values() if column in cells]
        first += [(column, "all", "all" if any("groups" in cell for cell in here) else "ours")]
        first += [(column, what, heading) for what, heading in (
            ("paper", "paper"), ("letters", "by letters"), ("disagreement", "they differ"))
            if any(what in cell for cell in here)]  # fmt: skip
        groups = sorted({group for cell in here for group in cell.get("groups", ())})
        second += [(column, "group", group) for group in groups if len(groups) > 1]
    return first, second


def value(cells, head):
    """What stands in a row under one of `heads`: a summary, a figure, or None."""
    column, what, heading = head
    cell = cells.get(column)
    if cell is None or what == "all":
        return cell
    return cell["groups"].get(heading) if what == "group" else cell.get(what)


def page(found, embedded):
    """The whole page. found: report.json. embedded: {path: bytes} of the clips that it holds."""
    sections = [("Accuracy", accuracy(found)), ("Ablation", found["ablation"] and table(found, "ablation"))]
    if found["roles"]:
        sections += [(f"Classes: {column}", bars(found, column)) for column in found["classes"]["bars"]]
    sections += [("The switch", found["switch"] and switch(found["switch"])),
                 ("The teacher's traces", found["funnel"] and "".join(funnel(*one) for one in found["funnel"].items())),
                 ("Curves", found["curves"] and "".join(curves(*item) for item in found["curves"].items())),
                 ("Clips", found["clips"] and clips(found["clips"], embedded, card)),
                 ("Gallery", found["gallery"] and clips(found["gallery"], embedded, thought,
                                                      ", and clips that stand above only when no others are left")),
                 ("The paper's own figures", found["paper"] and paper(found["paper"])),
                 ("Other published figures", found["paper"] and others(found["paper"]))]
    sections = [(f"s{i}", esc(title), text) for i, (title, text) in enumerate(sections) if text]
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{text}</section>\n' for name, title, text in sections)
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            'content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>minixmd report</title><style>{STYLE}</style></head>\n<body><h1>minixmd report</h1>\n"
            f'<nav aria-label="Sections">{links}</nav>\n{body}</body></html>\n')


def grid(name, head, rows, top="", corner=""):
    """A table that scrolls inside its own box, by keyboard too. rows: {title: HTML of its cells}."""
    head = "".join(f'<th scope="col">{esc(title)}</th>' for title in head)
    body = "".join(f'<tr><th scope="row">{esc(title)}</th>{"".join(cells)}</tr>' for title, cells in rows.items())
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(name)}"><table><thead>{top}<tr>'
            f"<th>{corner}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def cell(part, what="all"):
    """An accuracy in % over its interval, the share of letters that differ, or the paper's figure."""
    if part is None or (isinstance(part, dict) and not part["count"]):
        text = "-"
    elif what in ("paper", "disagreement"):
        text = figure(part) if what == "paper" else pct(part)
    else:
        text = f"{pct(part['accuracy'])}<small>{'–'.join(map(pct, part['interval']))}</small>"
    return f'<td class="{what}">{text}</td>'


def figure(published):
    """As it was published, with one or two decimals."""
    return f"{published:.{1 if round(published, 1) == published else 2}f}"


def table(found, which):
    """The accuracies of "tables" or "ablation", their groups and benchmarks, and whether the paper's figures may stand
    beside them."""
    rows, benchmarks = found[which], found["benchmarks"][which]
    text = grids(rows) + "".join(f"<p>{esc(words)}</p>" for words in remarks(found, which))
    for column, one in benchmarks.items():
        text += f"<h3>{esc(column)}: {esc(one['name'])}</h3>" + grids(one["rows"], f" on {column}")
        text += f"<p>{esc(one['words'])}</p>" if one["words"] else ""
    text += "<p class=dim>Small figures: 95 % intervals.</p>"
    if found["paper"]:
        text += ("<p>In italics: the paper's figures, where row and column are the paper's.</p>"
                 if any(what == "paper" for each in (rows, *(one["rows"] for one in benchmarks.values()))
                        for _, what, _ in heads(each)[0]) else
                 "<p>No row here is an experiment of the paper's: other models or other data. The paper's own figures "
                 "stand at the end and are not to be compared with these.</p>")  # fmt: skip
    return text


def remarks(found, which):
    """What is to be said of columns in "tables" or "ablation"."""
    known = (found["paper"] or {}).get("columns", {})
    return [words for column, words in known.items() if column in columns_of(found[which])]


def grids(rows, on=""):
    """A table of accuracies, and one of their groups."""
    text = ""
    for title, columns in zip(("accuracy", "accuracy by group"), heads(rows), strict=True):
        tops = "<th></th>"
        for column in dict.fromkeys(column for column, _, _ in columns):
            count = max(cells[column]["count"] for cells in rows.values() if column in cells)
            tops += (f'<th scope="colgroup" colspan="{sum(column == head[0] for head in columns)}">{esc(column)} '
                     f"<small>{count:,} clips</small></th>")
        text += grid(title + on, [heading for _, _, heading in columns],
                     {row: [cell(value(cells, head), head[1]) for head in columns] for row, cells in rows.items()},
                     f"<tr>{tops}</tr>", f"{title}, %") if columns else ""
    return text


def accuracy(found):
    """The first table, and what the student gained."""
    text = table(found, "tables")
    if not found["roles"]:
        return text
    rows = {column: [f"<td>{100 * one['difference']:+.1f}<small>"
                     f"{' to '.join(f'{100 * x:+.1f}' for x in one['interval'])}</small></td><td>{one['only_a']:,}</td>"
                     f"<td>{one['only_b']:,}</td>" for one in (gain["before"], gain["teacher"])]
            for column, gain in found["gains"].items() if gain["before"]["count"] and gain["teacher"]["count"]}
    return text + "<h3>The student after, less the others on the same questions</h3>" + grid(
        "gains", ["less before, points", "only after right", "only before right", "less the teacher, points",
                  "only after right", "only teacher right"], rows)


def paper(figures):
    notes = "".join(f"<p>{esc(note)}</p>" for note in (figures["source"], *figures.get("notes", ())))
    return notes + "".join(published(*item) for item in figures["tables"].items())


def others(figures):
    return "".join(published(*item) for item in figures.get("others", {}).items())


def published(name, rows):
    return f"<h3>{esc(name)}</h3>" + grid(name, columns_of(rows), {
        row: [cell(cells.get(column), "paper") for column in columns_of(rows)] for row, cells in rows.items()})


def bars(found, column):
    """Groups of classes, three bars a class, and all classes as a table."""
    every, one, roles = found["classes"], found["classes"]["bars"][column], found["roles"]
    text = "".join(f'<span class="key"><svg width="14" height="10" aria-hidden="true"><rect class="{role}" x="1" y="1" '
                   f'width="12" height="8"/></svg>{"" if NAMES[role] in roles[role] else NAMES[role] + ": "}'
                   f"{esc(roles[role])}</span>" for role in ROLES)
    text = (f"<p>{text}</p><p>Accuracy in % on {esc(column)}, with 95 % intervals. The classes were chosen by the "
            f"teacher's lead over the student before on {esc(one['chosen_on'])}")
    text += (f", where {esc(every['words'])}" if one["chosen_on"] == every["chosen_on"] else
             f" itself: {esc(every['chosen_on'])} has none of them")
    text += '.</p><div class="grid">' + "".join(
        f"<div><h3>{esc(title)}</h3>{bar_chart(title, {name: one['classes'][name] for name in names})}</div>"
        for title, names in one["groups"].items() if names) + "</div>"
    rows = {name: [cell(parts[role]) for role in ROLES] for name, parts in one["classes"].items()}
    return text + f"<details><summary>All {len(rows)} classes</summary>" + grid(
        f"classes of {column}", NAMES.values(), rows) + "</details>"


def switch(one):
    """Where the clips went, and the learned switch against the classes' table."""
    return f"<p>{one['to_teacher']:,} of {one['clips']:,} clips go to the teacher.</p>" + "".join(
        f"<h3>On {part} clips</h3><p>{esc(one['words'][part])}</p>"
        + grid(f"confusion, {part}", ["switch: to itself", "switch: to the teacher"], {
            f"{who}, by the class": [f"<td>{count:,}</td>" for count in row]
            for who, row in zip(WHO, tally["confusion"], strict=True)})
        for part, tally in one["tallies"].items())


def steps(funnel):
    """The rows of a funnel's table, as texts: [step, how many, of how many, what was left out]."""
    return [[one["step"], f"{one['count']:,}",
             f"{pct(one['count'] / one['of'])} % of {one['of']:,}" if one["of"] else "-",
             ", ".join(f"{count:,} {reason}" for reason, count in one["left_out"].items()) or "-"]
            for one in funnel["steps"]]


def funnel(title, one):
    """What was left of a teacher's samples, step by step, and the small verifier's ROC curve."""
    text = f'<h3>{esc(title)}</h3><div class="funnel">' + grid(title, ["kept", "share", "left out"], {
        step: [f"<td>{esc(text)}</td>" for text in texts] for step, *texts in steps(one)}) + "</div>"
    if one["verifier"]:
        text += (f"<p>{esc(one['verifier']['words'])}</p>"
                 + roc_chart(one["verifier"]["roc"], "The verifier against the checker on held-out verdicts"))
    return text


def curves(title, panels):
    """A figure: a panel for each quantity, a line for each log."""
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    key = "".join(f'<span class="key"><svg width="28" height="6" aria-hidden="true"><line class="line l{i % 6}" x1="0" '
                  f'x2="28" y1="3" y2="3"/></svg>{esc(name)}</span>' for i, name in enumerate(names))
    return f'<h3>{esc(title)}</h3><p>{key or "The logs hold nothing to draw."}</p><div class="grid">' + "".join(
        f"<div>{line_chart(panel, names)}</div>" for panel in panels) + "</div>"
