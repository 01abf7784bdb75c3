"""Stage Report: one table of accuracies for each column of results, overall and by group, printed and written."""
from minixmd.files import read_json, write_json, write_text


def _cell(part):
    return "-" if part is None or not part["count"] else f"{100 * part['accuracy']:.1f} ± {_half(part):.1f}"


def _half(part):
    low, high = part["interval"]
    return 50 * (high - low)


def render(tables):
    """Markdown: a row a model, a column a split and group.

    Args:
        tables: {row: {column: results.json as a dict}}.
    """
    columns = list(dict.fromkeys(column for row in tables.values() for column in row))
    heads = []
    for column in columns:
        groups = {g for row in tables.values() for g in row.get(column, {}).get("groups", {})}
        heads += [(column, None)] + ([(column, g) for g in sorted(groups)] if len(groups) > 1 else [])
    rows = [["accuracy, %"] + [column if group is None else f"{column}: {group}" for column, group in heads]]
    for title, row in tables.items():
        cells = [(row.get(c) if g is None else row.get(c, {}).get("groups", {}).get(g)) for c, g in heads]
        rows.append([title] + [_cell(cell) for cell in cells])
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, width, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def run(stage, folder, log):
    """Writes report.json and report.md; prints the table. ± is half the 95 % Wilson interval."""
    tables = {row: {column: read_json(path) for column, path in cells.items()} for row, cells in stage.tables.items()}
    text = render(tables)
    write_json(folder / "report.json", tables)
    write_text(folder / "report.md", text + "\n")
    log({row: {column: results["accuracy"] for column, results in cells.items()} for row, cells in tables.items()})
    print(f"\n{text}\n(± half the 95 % interval; written to {folder / 'report.md'})", flush=True)
