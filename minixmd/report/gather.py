"""Stage Report: every figure of a run in one dict, report.json, from which alone report.html and report.md are made."""
from dataclasses import replace
from pathlib import Path

from minixmd.config.references import stage_of
from minixmd.inputs.examples import read_manifest
from minixmd.report import sections
from minixmd.report.clips import ROLE_KINDS, Media, answered_clips, gallery_kinds, read_judged_traces, show
from minixmd.report.render import ROLES, markdown, page
from minixmd.report.sections import PAPERS, cells_of, published_rows
from minixmd.runs.files import read_json, write_json, write_text
from minixmd.runs.records import answers_beside, read_jsonl
from minixmd.runs.value_checks import check_fields
from minixmd.tasks.benchmarks import FIELDS, NAMES
from minixmd.tasks.statistics import SUMMARY, compare, pairs

RESULTS = SUMMARY | {"groups": dict[str, SUMMARY], "classes": dict[str, SUMMARY], "letters?": SUMMARY,
                     "disagreement?": float, "benchmark?": dict | None}
LEARNT = {  # field that names other stages' answers -> what is learnt from them
    "teacher": "the classes that the switch learns",
    "student": "the classes that the switch learns",
    "teacher_labels": "labels",
    "student_labels": "labels",
}
ANSWERED = {"letters": "the letters' logits", "generate": "what it wrote"}  # Evaluate's and Label's `answer`


def run(stage, folder, log):
    report, media = gather(stage, folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", page(report, media))
    if report["classes"]:  # for tools/listening_test.py --classes
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in report["classes"]["chosen"]))
    log({row: {column: cell["accuracy"] for column, cell in cells.items()}
         for row, cells in report["tables"].items()})
    for which in ("tables", "ablation"):
        if report[which]:
            print("\n" + markdown(report, "accuracy.md.j2", which=which), flush=True)
    print(f"(in brackets the 95 % interval; written to {folder / 'report.html'}, .json and .md)", flush=True)


def without(stage, failed):
    """The Report without what failed stages should have made, of which its `notes` tell. failed: {name: why}. Raises
    ValueError: no row is left."""
    notes = dict(stage.notes or {})

    def left(value, *titles):
        """A path, or dicts of them by title, of what was made; None for nothing."""
        if isinstance(value, dict):
            parts = {key: left(part, *titles, key) for key, part in value.items()}
            return {key: part for key, part in parts.items() if part}
        if why := failed.get(stage_of(value)):
            notes[", ".join(titles)] = why
            return None
        return value

    changes = {}
    for field in ("tables", "ablation", "senses", "funnel", "curves", "scored"):
        changes[field] = left(getattr(stage, field) or {})
    if not changes["tables"]:
        raise ValueError(f"{stage.name}: no row could be made")
    for field in ("clips", "traces", "verdicts", "switch"):
        changes[field] = left(getattr(stage, field) or "", field) or None
    rows = changes["ablation"] | changes["tables"]
    changes["gallery"] = tuple(row for row in stage.gallery if stage.clips_of in rows.get(row, {}))
    pairs = (stage.differences or {}).items()
    changes["differences"] = {title: pair for title, pair in pairs if set(pair) <= rows.keys()}
    changes["roles"] = stage.roles
    columns = {stage.gap, *stage.bars, stage.clips_of}
    for row in stage.roles or ():
        if not columns <= changes["tables"].get(row, {}).keys():
            notes["class by class"] = "a row of its roles is not whole"
            changes["roles"] = None
    if not changes["roles"] or not changes["senses"]:
        changes["senses"] = None
    if not changes["gallery"]:
        changes["traces"] = None
        if not changes["roles"]:
            changes["clips"] = None
    if not changes["traces"]:
        changes["verdicts"] = None
    return replace(stage, notes=notes, **changes)


def gather(stage, folder):
    """(report.json, {path: data URI} of the media in the page). ValueError: a wrong file, or two on other questions."""
    paper = PAPERS.get(stage.published, {})
    beside, benchmarks = published_rows(paper, "beside"), published_rows(paper, "benchmarks")
    results = read_results(stage, benchmarks)
    tables = accuracies(results["tables"], beside.get("tables", {}))
    if not any("paper" in cell for _, _, cell in cells_of(tables)):
        beside = {}  # other models or data than the paper's, so its ablation is of other ones, too
    report = {
        "tables": tables,
        "ablation": accuracies(results["ablation"], beside.get("ablation", {})),
        "differences": differences(stage),
        "benchmarks": {which: sections.breakdowns(rows, benchmarks) for which, rows in results.items()},
        **dict.fromkeys(("roles", "classes", "senses", "switch", "funnel", "scored", "curves", "clips", "gallery")),
        "notes": dict(stage.notes or {}),
        "paper": paper or None,
    }
    media = Media(folder, stage.embed_mib)
    if stage.roles:
        report["roles"] = dict(zip(ROLES, stage.roles, strict=True))
        paths = {role: stage.tables[row] for role, row in report["roles"].items()}
        by_role = {role: results["tables"][row] for role, row in report["roles"].items()}
        report["classes"] = sections.classes(by_role, stage.gap, stage.bars, paper.get("classes"))
        if stage.senses:
            figures = beside.get("senses", {})
            report["senses"] = sections.senses(stage.senses, by_role, stage.gap, figures, paper.get("people"))
    if stage.switch:
        report["notes"] |= answer_sources(stage.switch)
        report["switch"] = sections.switch(Path(stage.switch), paper.get("switch", {}))
    if stage.gallery:
        rows = stage.tables | (stage.ablation or {})
        report["gallery"] = clips(stage, {row: rows[row] for row in stage.gallery}, media)
    elif stage.clips:
        report["clips"] = clips(stage, paths, media)
    if stage.funnel:
        report["funnel"] = {title: sections.funnel(paths) for title, paths in stage.funnel.items()}
    if stage.scored:
        report["scored"] = {title: sections.scored(path) for title, path in stage.scored.items()}
    if stage.curves:
        report["curves"] = {title: sections.curves(logs) for title, logs in stage.curves.items()}
    for logs in (stage.curves or {}).values():
        for title, path in logs.items():
            report["notes"] |= answer_sources(path)
            for line in read_jsonl(path):
                if "nothing_to_learn" in line:
                    report["notes"][title] = line["nothing_to_learn"]
    return report, media.data_uris


def answer_sources(path):
    """{stage: whose answers, and how they were given} of the stages from whose answers the one that wrote the file
    `path` learnt: a Switch its classes, a training stage its labels. Empty for a file that no stage wrote."""
    folder = Path(path).parent
    config = read_config(folder)
    notes = {}
    for field, what in LEARNT.items():
        name = stage_of(config.get(field) or "")
        source = read_config(folder.parent / name) if name else {}
        if "answer" in source:
            model = source["model"] or source["served"]
            notes[name] = f"{what} are by {model}, from {ANSWERED[source['answer']]}"
    return notes


def read_config(folder):
    """A stage's resolved fields; {} where there is none."""
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def read_results(stage, benchmarks):
    """{"tables" | "ablation": {row: {column: results.json}}}. ValueError: a column's rows had other questions."""
    results, first = {}, {}  # first: column -> the row that has it first, its answers, and what they are on
    for which, table in (("tables", stage.tables), ("ablation", stage.ablation or {})):
        results[which] = {row: {} for row in table}
        for row, column, path in cells_of(table):
            results[which][row][column] = result = read_json(path)
            check_fields(result, RESULTS, f"{path}: not the results of an Evaluate stage: it")
            benchmark = result.get("benchmark") or {}
            if column in benchmarks and benchmark.get("name") != column:
                needed = ", ".join(FIELDS[column])
                raise ValueError(f"{stage.name}: {row!r} on {column!r}: its results.json has no 'benchmark' of "
                                 f"{NAMES[column]}: every clip's meta must have {needed}")
            title = sections.benchmark_title(benchmark)
            answers = answers_beside(path)
            first_row, first_answers, first_title = first.setdefault(column, (row, answers, title))
            both = f"{stage.name}: {first_row!r} and {row!r} on {column!r}"
            try:
                pairs(first_answers, answers)
            except ValueError as error:
                raise ValueError(f"{both}: {error}") from None
            if title != first_title:
                raise ValueError(f"{both}: {first_title} and {title}: their accuracies do not compare")
    return results


def accuracies(results, published):
    """What a table shows of {row: {column: results.json}}; with the paper's figure where it has that row and column."""
    table = {row: {} for row in results}
    for row, column, result in cells_of(results):
        table[row][column] = cell = sections.summary_of(result)
        cell["groups"] = result["groups"]
        if "letters" in result:
            cell["letters"] = sections.summary_of(result["letters"])
            cell["disagreement"] = result["disagreement"]
        if column in published.get(row, {}):
            cell["paper"] = published[row][column]
    return table


def differences(stage):
    """[{"title", "column", "row", "less", what compare says}] of pairs of rows on every column that both have: those of
    Report.differences, and the student after and each of the others."""
    rows, pairs = {**stage.tables, **(stage.ablation or {})}, dict(stage.differences or {})
    if stage.roles:
        teacher, before, after = stage.roles
        pairs |= {"the student after, less before": (after, before),
                  "the student after, less the teacher": (after, teacher)}
    found = []
    for title, (row, less) in pairs.items():
        for column in rows[row]:
            if column in rows[less]:
                both = (answers_beside(rows[name][column]) for name in (row, less))
                found.append({"title": title, "column": column, "row": row, "less": less, **compare(*both)})
    return found


def clips(stage, rows, media):
    """Clips to show. rows: {role or gallery's row: {column: results.json}}. media: Media, to which files are added."""
    answers = {name: answers_beside(paths[stage.clips_of]) for name, paths in rows.items()}
    examples = read_manifest(stage.clips, stage.allow_outside)
    traces = {} if stage.gallery else None
    if stage.traces:
        traces = read_judged_traces(stage.traces, stage.verdicts)
        if not any(example.id in traces for example in examples):
            raise ValueError(f"{stage.name}: {stage.traces} holds no trace of a clip in {stage.clips}")
    answered = answered_clips(examples, answers, traces, stage.clips, stage.clips_of)
    kinds = ROLE_KINDS
    if stage.gallery:
        kinds = gallery_kinds(stage.gallery[0], stage.gallery[-1], judged=stage.verdicts is not None)
    return {"column": stage.clips_of, "of": len(examples), "kinds": show(kinds, answered, media),
            "embed_mib": stage.embed_mib}
