"""The page of stage Report: HTML, CSS and SVG by hand, no script, nothing fetched from elsewhere.

Every string from the data goes through `esc`. A model is told by place and shape as well as by colour: the teacher's
bar is filled orange, the student's is blue, hollow before and filled after. Charts are 340 units wide, so that a phone
shows their text at full size.
"""
import base64
from html import escape
from math import floor, log10
from pathlib import PurePath
from urllib.parse import quote

ROLES = ("teacher", "before", "after")
WHO = ("the teacher is not better", "the teacher is better")
NAMES = {"teacher": "teacher", "before": "student before", "after": "student after"}
MIME = {".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg", ".m4a": "audio/mp4",
        ".mp4": "video/mp4", ".webm": "video/webm", ".mkv": "video/webm"}
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
.clip table { margin: 0 0 .5rem; font-size: .875rem } .clip th { white-space: nowrap } pre { white-space: pre-wrap }
"""


def esc(text):
    return escape(str(text), quote=True)


def pct(share):
    return f"{100 * share:.1f}"


def columns_of(rows):
    return list(dict.fromkeys(column for cells in rows.values() for column in cells))


def heads(table):
    """[(column, what, heading)] of a table of accuracies, and of the table of its groups, which may be empty.

    what: "all", "paper", "letters", "disagreement"; in the second "group".
    """
    first, second = [], []
    for column in columns_of(table):
        here = [cells[column] for cells in table.values() if column in cells]
        first += [(column, "all", "all")] + [(column, what, heading) for what, heading in (
            ("paper", "paper"), ("letters", "by letters"), ("disagreement", "they differ"))
            if any(what in cell for cell in here)]  # fmt: skip
        groups = sorted({group for cell in here for group in cell["groups"]})
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
    sections = [("Accuracy", accuracy(found)),
                ("Ablation", found["ablation"] and table(found["ablation"], found["paper"]))]
    if found["roles"]:
        sections += [(f"Classes: {column}", bars(found, column)) for column in found["classes"]["bars"]]
    sections += [("The switch", found["switch"] and switch(found["switch"])),
                 ("Curves", found["curves"] and "".join(curves(*item) for item in found["curves"].items())),
                 ("Clips", found["clips"] and clips(found, embedded)),
                 ("The paper's own figures", found["paper"] and paper(found["paper"]))]
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
        text = f"{part:.1f}" if what == "paper" else pct(part)
    else:
        text = f"{pct(part['accuracy'])}<small>{'–'.join(map(pct, part['interval']))}</small>"
    return f'<td class="{what}">{text}</td>'


def table(rows, paper):
    """A table of accuracies, one of their groups, and whether the paper's figures may stand beside them."""
    text = ""
    for name, columns in zip(("accuracy", "accuracy by group"), heads(rows), strict=True):
        tops = "<th></th>"
        for column in dict.fromkeys(column for column, _, _ in columns):
            count = max(cells[column]["count"] for cells in rows.values() if column in cells)
            tops += (f'<th scope="colgroup" colspan="{sum(column == head[0] for head in columns)}">{esc(column)} '
                     f"<small>{count:,} clips</small></th>")
        text += grid(name, [heading for _, _, heading in columns],
                     {title: [cell(value(cells, head), head[1]) for head in columns] for title, cells in rows.items()},
                     f"<tr>{tops}</tr>", f"{name}, %") if columns else ""
    text += "<p class=dim>Small figures: 95 % intervals.</p>"
    if paper:
        text += ("<p>In italics: the paper's figures, where row and column are the paper's.</p>"
                 if any(what == "paper" for _, what, _ in heads(rows)[0]) else
                 "<p>No row here is an experiment of the paper's: other models or other data. The paper's own figures "
                 "stand at the end and are not to be compared with these.</p>")  # fmt: skip
    return text


def accuracy(found):
    """The first table, and what the student gained."""
    text = table(found["tables"], found["paper"])
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
    return f"<p>{esc(figures['source'])}</p>" + "".join(f"<h3>{name}</h3>" + grid(name, columns_of(rows), {
        row: [cell(cells.get(column), "paper") for column in columns_of(rows)] for row, cells in rows.items()})
        for name, rows in figures["tables"].items())  # fmt: skip


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


def bar_chart(title, classes):
    """SVG; a class's name stands over its three bars, their figures at the right."""
    step, bottom = 58, 4 + 58 * len(classes)
    text = "".join(f'<line class="rule" x1="{x}" x2="{x}" y1="4" y2="{bottom}"/><text class="dim" x="{x}" '
                   f'y="{bottom + 12}" text-anchor="middle">{share}</text>'
                   for x, share in ((4, 0), (146.5, 50), (289, 100)))
    for i, (name, parts) in enumerate(classes.items()):
        text += (f'<text x="4" y="{16 + step * i}"><title>{esc(name)}</title>'
                 f"{esc(name if len(name) <= 52 else name[:51] + '…')}</text>")
        for role, y in zip(ROLES, (26 + step * i, 38 + step * i, 50 + step * i), strict=True):
            part = parts[role]
            low, high = (4 + 285 * x for x in part["interval"])
            text += (f"<g><title>{esc(name)}, {NAMES[role]}: {pct(part['accuracy'])} % of {part['count']}</title>"
                     f'<rect class="{role}" x="4" y="{y - 4.5}" width="{285 * part["accuracy"]:.1f}" height="9"/>'
                     f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
                     f'<text x="338" y="{y + 4}" text-anchor="end">{pct(part["accuracy"])}</text></g>')
    return f'<svg class="chart" viewBox="0 0 340 {bottom + 16}" role="img"><title>{esc(title)}</title>{text}</svg>'


def switch(one):
    """Where the clips went, and the learned switch against the classes' table."""
    return f"<p>{one['to_teacher']:,} of {one['clips']:,} clips go to the teacher.</p>" + "".join(
        f"<h3>On {part} clips</h3><p>{esc(one['words'][part])}</p>"
        + grid(f"confusion, {part}", ["switch: to itself", "switch: to the teacher"], {
            f"{who}, by the class": [f"<td>{count:,}</td>" for count in row]
            for who, row in zip(WHO, tally["confusion"], strict=True)})
        for part, tally in one["tallies"].items())


def curves(title, panels):
    """A figure: a panel for each quantity, a line for each log."""
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    key = "".join(f'<span class="key"><svg width="28" height="6" aria-hidden="true"><line class="line l{i % 6}" x1="0" '
                  f'x2="28" y1="3" y2="3"/></svg>{esc(name)}</span>' for i, name in enumerate(names))
    return f'<h3>{esc(title)}</h3><p>{key or "The logs hold nothing to draw."}</p><div class="grid">' + "".join(
        f"<div>{line_chart(panel, names)}</div>" for panel in panels) + "</div>"


def ticks(low, high):
    """Two to six round values that enclose low to high."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** floor(log10(span / 5))
    step *= next(m for m in (1, 2, 5, 10) if span <= 5 * m * step)
    first = floor(low / step + 1e-9)
    return [step * i for i in range(first, max(-floor(1e-9 - high / step), first + 1) + 1)]


def line_chart(panel, names):
    """SVG; shares are drawn in %, losses from 0."""
    scale, low = (100, 100) if panel["what"].endswith("%") else (1, 0)
    points = [(x, scale * y) for line in panel["lines"].values() for x, y in line]
    ys, last = ticks(min(low, *(y for _, y in points)), max(y for _, y in points)), max(x for x, _ in points) or 1

    def at(x, y):
        return 40 + 285 * x / last, 165 - 140 * (y - ys[0]) / (ys[-1] - ys[0])

    text = f'<text x="2" y="12">{esc(panel["what"])}</text>'
    for y in ys:
        height = at(0, y)[1]
        text += (f'<line class="rule" x1="40" x2="325" y1="{height:.1f}" y2="{height:.1f}"/>'
                 f'<text class="dim" x="36" y="{height + 3:.1f}" text-anchor="end">{y:.10g}</text>')
    text += "".join(f'<text class="dim" x="{at(x, 0)[0]:.1f}" y="180" text-anchor="middle">{x:,}</text>'
                    for x in sorted({0, last // 2, last}))
    text += f'<text class="dim" x="325" y="194" text-anchor="end">{panel["x"]}</text>'
    for i, name in enumerate(names):
        if line := [at(x, scale * y) for x, y in panel["lines"].get(name, [])]:
            x, y = panel["lines"][name][-1]
            text += (f'<g class="line l{i % 6}"><title>{esc(name)}: {scale * y:.3g} at {panel["x"]} {x}</title>'
                     f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>' + "".join(
                         f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in line if len(line) <= 12) + "</g>")
    return f'<svg class="chart" viewBox="0 0 340 200" role="img"><title>{esc(panel["what"])}</title>{text}</svg>'


def clips(found, embedded):
    one, size = found["clips"], sum(map(len, embedded.values())) / 2**20
    linked = sum(not file["embedded"] for kind in one["kinds"] for clip in kind["clips"] for file in clip["media"])
    text = (f"<p>From the {one['of']:,} clips of {esc(one['column'])}; of each kind the first of each class in the "
            f"manifest's order, then the second of each. The page holds {len(embedded)} media files of {size:.1f} MiB")
    text += f" of at most {one['embed_mib']:g}; {linked} are linked where they lie.</p>" if linked else ".</p>"
    for kind in one["kinds"]:
        text += (f"<h3>{kind['title']} ({len(kind['clips'])} of {kind['count']:,} shown)</h3><div class='grid small'>"
                 + "".join(card(clip, embedded) for clip in kind["clips"]) + "</div>")
    return text


def card(clip, embedded):
    rows, written = "", ""
    for role, answer in clip["answers"].items():
        said, right = answer["option"], answer["right"]
        rows += (f'<tr><th scope="row">{NAMES[role]}</th><td class="said">{"✓ right" if right else "✗ wrong"}: '
                 f"{'no answer' if said is None else esc(said)}</td></tr>")
        written += f"<p>{NAMES[role]} wrote:</p><pre>{esc(answer['text'])}</pre>" if "text" in answer else ""
    options = "".join(f"<li>{esc(option)}</li>" for option in clip["options"])
    return (f'<div class="clip"><h4>{esc(clip["right"])} <small>{esc(clip["id"])}</small></h4>'
            f"{''.join(player(file, embedded) for file in clip['media'])}<table>{rows}</table>"
            f"<details><summary>What was asked</summary><p>{esc(clip['question'])}</p><ul>{options}</ul>{written}"
            "</details></div>")


def player(file, embedded):
    """A video, muted, as its model sees it, a sound, or both: from the page itself, or linked where it lies."""
    tag, link = "audio" if file["kind"] == "audio" else "video", quote(file["path"])
    if file["bytes"] is None:
        return f'<p class="dim">The {tag} {esc(file["path"])} is not there.</p>'
    note = f'<p class="dim">Not in this page: <a href="{link}">{esc(file["path"])}</a></p>'
    if file["embedded"]:
        data = base64.b64encode(embedded[file["path"]]).decode()
        link, note = f"data:{MIME[PurePath(file['path']).suffix.lower()]};base64,{data}", ""
    return f'<{tag} controls preload="metadata"{" muted" * (file["kind"] == "video")} src="{link}"></{tag}>{note}'
