"""Stage Report: what a run found, as one page that opens anywhere (report.html), as report.json and as report.md.

`gather` brings every figure into one dict, which is report.json; the page and the Markdown are made from that dict
alone, so the three cannot differ.
"""
from pathlib import Path

from minixmd.report.charts import NAMES, ROLES, pct
from minixmd.report.clips import clips, gallery
from minixmd.report.page import WHO, columns_of, figure, heads, page, remarks, steps, value
from minixmd.report.published import BESIDE, PAPERS
from minixmd.report.sightsound import breakdowns, funnel
from minixmd.runs.files import read_json, write_json, write_text
from minixmd.runs.records import answers_beside, read_jsonl
from minixmd.stages.switch import tally
from minixmd.tasks.statistics import compare, groups, leads, pairs

POINTS = 150  # of a line in a figure
DRAWN = {"reward": "mean reward", "completion_tokens": "completion length, tokens", "loss": "training loss",
         "kl": "KL to the teacher, in GRPO to the policy before", "val_accuracy": "validation accuracy, %",
         "train_accuracy": "training accuracy, %"}  # keys of a log.jsonl


def run(stage, folder, log):
    """Writes report.html, report.json and report.md; prints the tables."""
    found, embedded = gather(stage, folder)
    write_json(folder / "report.json", found)
    write_text(folder / "report.md", markdown(found))
    write_text(folder / "report.html", page(found, embedded))
    log({row: {column: cell["accuracy"] for column, cell in cells.items()}
         for row, cells in found["tables"].items()})
    for which in ("tables", "ablation"):
        print(f"\n{accuracies(found, which)}" if found[which] else "", flush=True)
    print(f"(in brackets the 95 % interval; written to {folder / 'report.html'}, .json and .md)", flush=True)


def gather(stage, folder):
    """(every figure of the report, {path: bytes} of the clips that the page itself will hold)."""
    results = {row: {column: _results(path) for column, path in cells.items()} for row, cells in stage.tables.items()}
    ablation = {row: {column: _results(path) for column, path in cells.items()}
                for row, cells in (stage.ablation or {}).items()}
    _check_questions(stage)
    beside, below = BESIDE[stage.published]
    tables = _table(results, beside)
    comparable = any("paper" in cell for cells in tables.values() for cell in cells.values())
    found = {"tables": tables, "ablation": _table(ablation, below if comparable else {}),
             "benchmarks": breakdowns(stage, {"tables": results, "ablation": ablation}), "roles": None, "switch": None,
             "funnel": None, "curves": None, "clips": None, "gallery": None, "paper": PAPERS.get(stage.published)}
    embedded = {}
    if stage.roles:
        found["roles"] = roles = dict(zip(ROLES, stage.roles, strict=True))
        shared = [column for column in stage.tables[stage.roles[0]]
                  if all(column in stage.tables[row] for row in stage.roles)]
        answers = {column: {role: answers_beside(stage.tables[row][column]) for role, row in roles.items()}
                   for column in shared}
        found["gains"] = {column: {role: compare(each["after"], each[role]) for role in ("before", "teacher")}
                          for column, each in answers.items()}
        found["classes"] = classes(stage, {role: results[row] for role, row in roles.items()}, found["paper"])
        if stage.clips and not stage.gallery:
            found["clips"], embedded = clips(stage, folder, answers[stage.clips_of])
    if stage.switch:
        found["switch"] = switch(Path(stage.switch), found["paper"])
    if stage.gallery:
        found["gallery"], embedded = gallery(stage, folder)
    if stage.funnel:
        found["funnel"] = {title: funnel(paths) for title, paths in stage.funnel.items()}
    if stage.curves:
        found["curves"] = {title: panels(logs) for title, logs in stage.curves.items()}
    return found, embedded


def _results(path):
    results = read_json(path)
    if "accuracy" not in results:
        raise ValueError(f"{path}: not the results of an Evaluate stage: it holds no 'accuracy'")
    return results


def _check_questions(stage):
    """Raises ValueError, naming both rows, if two rows of a column were asked different questions."""
    first = {}  # column -> the row that has it first, and its answers
    for table in (stage.tables, stage.ablation or {}):
        for row, cells in table.items():
            for column, path in cells.items():
                answers = answers_beside(path)
                other, theirs = first.setdefault(column, (row, answers))
                try:
                    pairs(theirs, answers)
                except ValueError as error:
                    raise ValueError(f"{stage.name}: {other!r} and {row!r} on {column!r}: {error}") from None


def _table(results, published):
    """{row: {column: cell}}: what a table shows of each results.json, and the paper's figure where it has that cell."""
    table = {}
    for row, cells in results.items():
        table[row] = {}
        for column, one in cells.items():
            cell = table[row][column] = {name: one[name] for name in ("count", "correct", "accuracy", "interval")}
            cell["groups"] = one["groups"]
            if "letters" in one:
                cell["letters"] = {name: one["letters"][name] for name in ("count", "correct", "accuracy", "interval")}
                cell["disagreement"] = one["disagreement"]
            if column in published.get(row, {}):
                cell["paper"] = published[row][column]
    return table


def classes(stage, results, paper):
    """Who wins how many classes of the column `gap`; for each column of `bars` its classes and groups of them.

    A column that shares no class with `gap` (unseen ones) is grouped by the leads on that column itself.
    """
    def lead_on(column):
        return leads(*(results[role][column]["classes"] for role in ("teacher", "before")))

    lead = lead_on(stage.gap)
    found = {"chosen_on": stage.gap, "won": sum(x > 0 for x in lead.values()),
             "tied": sum(x == 0 for x in lead.values()), "lost": sum(x < 0 for x in lead.values()), "bars": {}}
    found["words"] = "the teacher is better in {won}, equal in {tied} and worse in {lost}".format(**found)
    if paper and "classes" in paper:
        found["words"] += " (in the paper, on VGGSound: better in {won} of {of})".format(**paper["classes"])
    for column in stage.bars:
        parts = {role: results[role][column]["classes"] for role in ROLES}
        here = {name: {role: parts[role][name] for role in ROLES} for name in parts["teacher"]
                if all(name in parts[role] for role in ROLES)}
        known = {name: lead[name] for name in here if name in lead}
        own = {name: x for name, x in lead_on(column).items() if name in here}
        found["bars"][column] = {"chosen_on": stage.gap if known else column, "groups": groups(known or own),
                                 "classes": here}
    return found


def switch(path, paper):
    """Where the clips went, and tallies of the learned switch against the classes' table: those that the stage Switch
    left in results.json, and for clips whose true class it knew ("oracle") this one."""
    decided = [record for record in read_jsonl(path) if "p_teacher" in record]
    if not decided:
        raise ValueError(f"{path}: not the decisions of a Switch stage: no record has 'p_teacher'")
    left = read_json(path.parent / "results.json") if (path.parent / "results.json").exists() else {}
    tallies = {part: left[part] for part in ("validation", "training") if part in left}
    known = [record for record in decided if "oracle" in record]
    if known and "training" not in tallies:
        tallies["training"] = tally([record["p_teacher"] for record in known], [record["oracle"] for record in known])
    theirs = (paper or {}).get("switch", {})
    words = {part: f"Right by the table of classes for {pct(one['accuracy'])} % of {one['count']:,} (95 % interval "
                   f"{'–'.join(map(pct, one['interval']))}); always the commoner one: {pct(one['majority'])} %"
                   + (f"; the paper's, on VGGSound: {theirs[part]} %" if theirs else "") + "."
             for part, one in tallies.items()}
    return {"clips": len(decided), "to_teacher": sum(record["p_teacher"] >= 0.5 for record in decided),
            "tallies": tallies, "words": words}


def panels(logs):
    """[{"what", "x", "lines": {title: [[x, y], …]}}]: a panel for each of DRAWN that some log.jsonl has.

    A line of more than POINTS values becomes the means of runs of as many, each drawn at its last step.
    """
    records = {title: read_jsonl(Path(path)) for title, path in logs.items()}
    found = []
    for key, what in DRAWN.items():
        drawn = {title: [line for line in log if key in line] for title, log in records.items()}
        axis, lines = "step" if any("step" in line for log in drawn.values() for line in log) else "epoch", {}
        for title, log in drawn.items():
            points = [(line[axis], line[key]) for line in log if axis in line]
            every = -(-len(points) // POINTS) or 1
            runs = [points[i:i + every] for i in range(0, len(points), every)]
            if runs:
                lines[title] = [[run[-1][0], sum(y for _, y in run) / len(run)] for run in runs]
        if lines:
            found.append({"what": what, "x": axis, "lines": lines})
    return found


def markdown(found):
    """The tables of the page, and its figures that stand in none."""
    parts = ["# minixmd report", accuracies(found, "tables"), found["ablation"] and "## Ablation",
             found["ablation"] and accuracies(found, "ablation")]
    if found["roles"]:
        parts += [f"Of the classes of {found['classes']['chosen_on']}, {found['classes']['words']}.",
                  "## The student after, less the others on the same questions", _grid(
            [["points", "less before", "less the teacher"]]
            + [[column] + [_points(gain[role]) for role in ("before", "teacher")]
               for column, gain in found["gains"].items()])]
        for column, one in found["classes"]["bars"].items():
            parts += [f"## Classes: {column}, chosen on {one['chosen_on']}", _grid(
                [["class", "group", *NAMES.values()]]
                + [[name, title, *(_text(one["classes"][name][role], "all") for role in ROLES)]
                   for title, names in one["groups"].items() for name in names])]
    if found["switch"]:
        parts += ["## The switch", "{to_teacher:,} of {clips:,} clips go to the teacher.".format(**found["switch"])]
        for part, one in found["switch"]["tallies"].items():
            parts += [f"### On {part} clips", found["switch"]["words"][part], _grid(
                [["by the class", "switch: to itself", "switch: to the teacher"]]
                + [[who, *map(str, row)] for who, row in zip(WHO, one["confusion"], strict=True)])]
    if found["funnel"]:
        parts += ["## The teacher's traces"]
        for title, one in found["funnel"].items():
            parts += [f"### {title}", _grid([["", "kept", "share", "left out"], *steps(one)]),
                      one["verifier"] and one["verifier"]["words"]]
    if found["gallery"]:
        parts += ["## Gallery", _grid([["clips", f"of {found['gallery']['of']:,}"]] + [
            [kind["title"], f"{kind['count']:,}"] for kind in found["gallery"]["kinds"]])]
    if found["paper"]:
        parts += ["## The paper's own figures", found["paper"]["source"], *found["paper"].get("notes", ())]
        parts += _published(found["paper"]["tables"])
        others = found["paper"].get("others")
        parts += ["## Other published figures", *_published(others)] if others else []
    return "\n\n".join(part for part in parts if part) + "\n"


def accuracies(found, which):
    """Markdown of "tables" or "ablation" and of the benchmarks in it."""
    parts = [render(found[which]), *remarks(found, which)]
    for column, one in found["benchmarks"][which].items():
        parts += [f"### {column}: {one['name']}", render(one["rows"]), one["words"]]
    return "\n\n".join(part for part in parts if part)


def _published(tables):
    for name, rows in tables.items():
        yield f"### {name}"
        yield _grid([["", *columns_of(rows)]] + [
            [row, *(_text(cells.get(column), "paper") for column in columns_of(rows))] for row, cells in rows.items()])


def render(table):
    """Markdown tables: a row a model, a column a split, the paper's figure and the letters'; below it one of groups."""
    return "\n\n".join(_grid(
        [["accuracy, %"] + [column if what == "all" else f"{column}: {title}" for column, what, title in columns]]
        + [[title] + [_text(value(cells, head), head[1]) for head in columns] for title, cells in table.items()])
        for columns in heads(table) if columns)


def _text(part, what):
    if part is None or (isinstance(part, dict) and not part["count"]):
        return "-"
    if what in ("paper", "disagreement"):
        return figure(part) if what == "paper" else pct(part)
    return f"{pct(part['accuracy'])} ({'–'.join(map(pct, part['interval']))})"


def _points(gain):
    low, high = gain["interval"]
    return f"{100 * gain['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" if gain["count"] else "-"


def _grid(rows):
    rows = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows]
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, width, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])
