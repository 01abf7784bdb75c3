"""Sections of a report: benchmarks, classes, the switch, the teacher's traces, curves, as report.json holds them."""
from collections import Counter
from math import ceil
from pathlib import Path

from minixmd.report.render import ROLES, words
from minixmd.runs.files import read_json
from minixmd.runs.records import SCORED, read_records
from minixmd.runs.value_checks import check_fields
from minixmd.tasks.benchmarks import NAMES, TYPES, VERSIONED
from minixmd.tasks.statistics import SUMMARY, groups, leads

# Figures that the papers published, in %. One stands beside an accuracy of this run only where row and column have the
# paper's titles, as recipe_parts/ gives them; all stand on their own at the end of the report.
PAPERS = read_json(Path(__file__).with_name("published.json"))  # Report.published -> "source", "tables", … of a paper
MMAU_VERSION = PAPERS["sightsound"]["mmau_version"]
PARTS = {  # of a benchmark that is broken down by fields: the two that are shown, and the order of their values
    "mmau": {"task": ("sound", "speech", "music"), "difficulty": ("easy", "medium", "hard")},
    "mmar": {"modality": ("sound", "music", "speech", "mix-sound-music", "mix-sound-speech", "mix-music-speech"),
             "category": ("Signal Layer", "Perception Layer", "Semantic Layer", "Cultural Layer")},
}
FUNNEL_SOURCES = {  # key of Report.funnel -> what only that stage's results.json holds, and the stage's name
    "traces": ("traces_of_unanimous", "a Traces"),
    "checked": ("clips_with_accepted", "a FactCheck"),
    "verifier": ("calibration", "a FactCheck, with checker 'verifier',"),
}
SCORED_COMPLETIONS = 2  # of a step, at most
LINE_POINTS = 150  # at most, of a line in a figure
PANELS = {  # key of a log.jsonl -> title of the panel that draws it
    "reward": "mean reward",
    "completion_tokens": "completion length, tokens",
    "loss": "training loss",
    "kl": "KL to the teacher, in GRPO to the policy before",
    "teacher_kl": "KL to the teacher, mean over the tokens it scores",
    "teacher_dropped": "teacher's probability outside that KL, %",
    "student_dropped": "student's probability outside that KL, %",
    "val_accuracy": "validation accuracy, %",
    "train_accuracy": "training accuracy, %",
}
LOG_LINE = {f"{name}?": float for name in (*PANELS, "step", "epoch")}


def published_rows(paper, key):
    """{part of the report, or benchmark's column: the paper's rows for it}. key: "beside" | "benchmarks"."""
    found = {}
    for place, title in paper.get(key, {}).items():
        found[place] = paper["tables"][title]
    return found


def cells_of(table):
    """(row, column, cell) of {row: {column: cell}}."""
    for row, cells in table.items():
        for column, cell in cells.items():
            yield row, column, cell


def summary_of(results):
    """What a table shows of a results.json, or of a part of it."""
    return {name: results[name] for name in SUMMARY}


def benchmark_title(benchmark):
    """What an accuracy is on: a benchmark, MMAU and MMAR with version and hash. benchmark: of results.json, {} for
    none."""
    if not benchmark:
        return "no benchmark"
    title = NAMES[benchmark["name"]]
    if benchmark["name"] in VERSIONED:
        title += f" {benchmark['version']} (sha256 {benchmark['sha256'][:12]}…)"
    return title


def breakdowns(results, figures):
    """{column: {"name", "version", "words", "rows": {row: {part: summary}}}} of the benchmarks in {row: {column:
    results.json}}. version: "" for a benchmark that has none. figures: the paper's, {column: {row: {part: figure}}};
    "paper" in a summary where the version may be theirs."""
    found = {}
    for row, column, result in cells_of(results):
        benchmark = result.get("benchmark")
        if not benchmark:
            continue
        published = figures.get(column, {})
        same = benchmark["name"] != "mmau" or f"{benchmark['version']} ".startswith(f"{MMAU_VERSION} ")
        if column not in found:
            remark = words("benchmark", benchmark["name"], bool(published), same, MMAU_VERSION)
            version = f"{NAMES[benchmark['name']]} {benchmark['version']}" if "version" in benchmark else ""
            found[column] = {"name": benchmark_title(benchmark), "version": version, "words": remark, "rows": {}}
        found[column]["rows"][row] = parts = {}
        for part, summary in parts_of(benchmark).items():
            parts[part] = summary_of(summary)
            if same and part in published.get(row, {}):
                parts[part]["paper"] = published[row][part]
    return found


def parts_of(benchmark):
    """{title: summary} of a "benchmark" of results.json, in the order of its paper's table."""
    if benchmark["name"] == "music_avqa":
        heard = benchmark["audio"]
        return {kind: heard[kind] for kind in TYPES} | {"Average": heard["all"], "All": benchmark["every"]["all"]}
    parts = {}
    for field, order in PARTS[benchmark["name"]].items():
        for name in (*order, *benchmark[field]):
            if name in benchmark[field]:
                title = name if "Average" in parts else name.removeprefix("mix-").title()
                parts[title] = benchmark[field][name]
        parts.setdefault("Average", benchmark["all"])
    return parts


def classes(by_role, gap, bars, published):
    """Who wins how many classes of column `gap`; of each of `bars` its classes, grouped by the lead on `gap` or, if
    they share none, on itself. by_role: {role: {column: results.json}}. published: {"won", "of"} or None."""
    lead = leads(by_role["teacher"][gap]["classes"], by_role["before"][gap]["classes"])
    signs = Counter((x > 0) - (x < 0) for x in lead.values())
    chosen = sum(groups(lead).values(), [])  # of Figure 1
    section = {"chosen_on": gap, "chosen": chosen, "won": signs[1], "tied": signs[0], "lost": signs[-1], "bars": {}}
    section["words"] = words("classes", section, published)
    for column in bars:
        of_role = {role: by_role[role][column]["classes"] for role in ROLES}
        shared = [name for name in of_role["teacher"] if name in of_role["before"] and name in of_role["after"]]
        chosen_on, chosen_by = gap, lead
        if lead.keys().isdisjoint(shared):
            chosen_on, chosen_by = column, leads(of_role["teacher"], of_role["before"])
        section["bars"][column] = {
            "chosen_on": chosen_on,
            "groups": groups({name: chosen_by[name] for name in shared if name in chosen_by}),
            "classes": {name: {role: of_role[role][name] for role in ROLES} for name in shared},
        }
    return section


def senses(paths, by_role, gap, figures, published):
    """XMD's Figure 1: {column: {"groups": {title: {class: {bar: summary}}}, "averages": {bar: {"accuracy": mean over
    these classes, "paper"}}, "words"}}. paths: {column: {bar: results.json}}. The groups of classes are chosen by the
    lead on `gap`, by models alone. figures: the paper's averages, {bar: {column: figure}}. published: the paper's
    counts of classes in which people agree, or None."""
    student = by_role["before"][gap]["classes"]
    chosen = groups(leads(by_role["teacher"][gap]["classes"], student))
    section = {}
    for column, bars in paths.items():
        by_bar, people = {}, {}
        for bar, path in bars.items():
            result = read_json(path)
            check_fields(result, {"classes": dict[str, SUMMARY], "condition?": str}, f"{path}: no results: it")
            by_bar[bar] = result["classes"]
            if "condition" in result:
                people[result["condition"]] = result["classes"]
        shown, left_out, averages = {}, [], {}
        for title, names in chosen.items():
            shown[title] = {}
            for name in names:
                if all(name in classes for classes in by_bar.values()):
                    shown[title][name] = {bar: classes[name] for bar, classes in by_bar.items()}
                else:
                    left_out.append(name)
        for bar in bars:
            accuracies = []
            for classes in shown.values():
                accuracies += [cells[bar]["accuracy"] for cells in classes.values()]
            averages[bar] = {"accuracy": sum(accuracies) / len(accuracies) if accuracies else None}
            if column in figures.get(bar, {}):
                averages[bar]["paper"] = figures[bar][column]
        agree = {}
        if {"ears", "eyes"} <= people.keys():
            agree = agreements(shown, people["ears"], people["eyes"], student)
        section[column] = {
            "chosen_on": gap,
            "groups": shown,
            "averages": averages,
            "words": words("senses", averages, agree, published or {}, left_out),
        }
    return section


def agreements(shown, ears, eyes, student):
    """In how many classes, and of how many, people's ears and eyes differ as the models do; keys as in published.json.
    ears, eyes, student: {class: summary}."""
    ahead, behind, _ = shown.values()  # for the teacher
    return {
        "ahead": count_better(eyes, ears, ahead),
        "behind": count_better(ears, eyes, behind),
        "short": count_better(ears, student, ahead),
    }


def count_better(better, worse, names):
    return [sum(better[name]["accuracy"] > worse[name]["accuracy"] for name in names), len(names)]


def switch(path, published):
    """Where the clips of a switch.jsonl went, and tallies of its decisions against the table of classes, from the
    results.json beside it. published: {"validation" | "training": the paper's accuracy in %}. ValueError: no Switch
    stage's."""
    results = read_json(path.with_name("results.json"))
    check_fields(results, {"clips": int, "clips_to_teacher": int}, f"{path}: not a Switch stage's: its results.json")
    tallies = {part: results[part] for part in ("validation", "training") if part in results}
    return {
        "clips": results["clips"],
        "to_teacher": results["clips_to_teacher"],
        "tallies": tallies,
        "words": {part: words("switch", tallies[part], published.get(part)) for part in tallies},
    }


def funnel(paths):
    """{"steps", "verifier"} from clips to accepted traces. paths: {"traces" | "checked" | "verifier": a results.json}.
    A step is {"step", "count", "of", "left_out": {reason: count}}; `of` is None where it starts from nothing before it.
    "verifier": its "calibration", and "words". ValueError: another stage's file, or stages on other traces."""
    results = dict.fromkeys(FUNNEL_SOURCES)
    for source, path in paths.items():
        results[source] = read_json(path)
        key, stage = FUNNEL_SOURCES[source]
        if key not in results[source]:
            raise ValueError(f"{path}: not the results of {stage} stage: it holds no {key!r}")
    traces, checked, verifier = results.values()
    steps = sampling_steps(traces) if traces else []
    for source, judge in (("checked", "checker"), ("verifier", "verifier")):
        judged = results[source]
        if judged and traces and judged["unanimous"]["judged"] != traces["traces_of_unanimous"]:
            raise ValueError(f"{paths[source]}: of another stage's traces than {paths['traces']}: it judged "
                             f"{judged['unanimous']['judged']} of unanimous clips, and there are "
                             f"{traces['traces_of_unanimous']}")
        if judged:
            steps += judging_steps(judged, judge)
    if checked and verifier and checked["traces"] != verifier["traces"]:
        raise ValueError(f"{paths['verifier']}: judged {verifier['traces']} traces, and {paths['checked']} "
                         f"{checked['traces']}: not the same ones")
    if verifier:
        verifier = {**verifier["calibration"], "words": words("verifier", verifier)}
    return {"steps": steps, "verifier": verifier}


def sampling_steps(traces):
    """From clips to traces of clips on which all samples agree. traces: results.json of stage Traces."""
    clips_read = traces["clips"] - sum(traces["bad"].values())
    clips_by = dict(traces["clips_by"])  # what became of a clip's samples -> clips
    unanimous = clips_by.pop("unanimous", 0)
    return [
        step("clips read", clips_read, traces["clips"], traces["bad"]),
        step("unanimous clips", unanimous, clips_read, clips_by),
        step("samples", traces["samples"], None, {}),
        step("usable samples: traces", traces["usable"], traces["samples"], traces["unusable"]),
        step("traces of unanimous clips", traces["traces_of_unanimous"], traces["usable"], "not unanimous"),
    ]


def judging_steps(judged, judge):
    """judged: results.json of stage FactCheck. judge: what to call it."""
    left_out = {"rejected": judged["rejected"]} if judged["rejected"] else {}
    reason = "rejected or could not be judged" if judged["bad"] else "rejected"
    first, unanimous = judged["first"], judged["unanimous"]
    return [
        step(f"accepted by the {judge}", judged["accepted"], judged["traces"], left_out | judged["bad"]),
        step(f"{judge}: of first traces", first["accepted"], first["judged"], reason),
        step(f"{judge}: of those of unanimous clips", unanimous["accepted"], unanimous["judged"], reason),
        step(f"{judge}: clips with one", judged["clips_with_accepted"], judged["clips"], "without one"),
    ]


def step(title, kept, total, left_out):
    """left_out: {reason: count}, or the one reason why the others were left out."""
    if isinstance(left_out, str):
        left_out = {left_out: total - kept} if total > kept else {}
    return {"step": title, "count": kept, "of": total, "left_out": left_out}


def scored(path):
    """SCORED records of a completions.jsonl: of the first and the last step that have what the teacher says."""
    lines = [line for line in read_records(path, SCORED) if line.get("teacher")]
    steps = [line["step"] for line in lines]
    found = []
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        found += [line for line in lines if line["step"] == step][:SCORED_COMPLETIONS]
    return found


def curves(logs):
    """[{"what", "x": "step" | "epoch", "lines": {line title: [[x, y], …]}}]: a panel for each of PANELS that a log has.
    Over LINE_POINTS values a line becomes the means of runs of as many, each at its last x. logs: {title: path}."""
    records = {title: list(read_records(path, LOG_LINE, bad=LOG_LINE)) for title, path in logs.items()}
    panels = []
    for key, what in PANELS.items():
        has_steps = any(key in line and "step" in line for log in records.values() for line in log)
        axis, lines = "step" if has_steps else "epoch", {}
        for title, log in records.items():
            points = [(line[axis], line[key]) for line in log if key in line and axis in line]
            length = ceil(len(points) / LINE_POINTS)
            while points:
                run, points = points[:length], points[length:]
                mean = sum(y for _, y in run) / len(run)
                lines.setdefault(title, []).append([run[-1][0], mean])
        if lines:
            panels.append({"what": what, "x": axis, "lines": lines})
    return panels
