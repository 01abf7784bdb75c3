"""The charts of stage Report's page: SVG by hand, 340 units wide, so that a phone shows their text at full size.

Every string from the data goes through `esc`. A model is told by place and shape as well as by colour: the teacher's
bar is filled orange, the student's is blue, hollow before and filled after.
"""
from html import escape
from math import floor, log10

ROLES = ("teacher", "before", "after")
NAMES = {"teacher": "teacher", "before": "student before", "after": "student after"}


def esc(text):
    return escape(str(text), quote=True)


def pct(share):
    return f"{100 * share:.1f}"


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


def roc_chart(points, title):
    """SVG of an ROC curve, [[false positive rate, true positive rate], …], over the line of a coin's toss."""
    def at(x, y):
        return f"{50 + 260 * x:.1f},{284 - 260 * y:.1f}"

    text = "".join(f'<line class="rule" x1="50" x2="310" y1="{284 - 2.6 * share}" y2="{284 - 2.6 * share}"/>'
                   f'<text class="dim" x="46" y="{288 - 2.6 * share}" text-anchor="end">{share}</text>'
                   f'<text class="dim" x="{50 + 2.6 * share}" y="298" text-anchor="middle">{share}</text>'
                   for share in (0, 50, 100))
    text += f'<polyline class="line l4" points="{at(0, 0)} {at(1, 1)}"/>'
    text += f'<polyline class="line" points="{" ".join(at(x, y) for x, y in points)}"/>'
    text += ('<text x="2" y="10">% accepted of what the checker accepts</text>'
             '<text x="310" y="314" text-anchor="end">% accepted of what the checker rejects</text>')
    return f'<svg class="chart" viewBox="0 0 340 320" role="img"><title>{esc(title)}</title>{text}</svg>'
