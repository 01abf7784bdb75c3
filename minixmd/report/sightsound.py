"""What stage Report says of SightSound-R1 alone: MMAU and MUSIC-AVQA as they break an accuracy down, the funnel from
clips to accepted traces, and what the small verifier would cost in the checker's place.
"""
from minixmd.report.charts import pct
from minixmd.report.published import BENCHMARKS, MMAU_VERSION
from minixmd.runs.files import read_json
from minixmd.tasks.benchmarks import FIELDS, TYPES
from minixmd.tasks.statistics import wilson

TITLES = {"mmau": "MMAU", "music_avqa": "MUSIC-AVQA"}
SHOWN = ("count", "correct", "accuracy", "interval")

# ---- benchmarks ----


def breakdowns(stage, tables):
    """{table: {column: {"name", "words", "rows": {row: {part: summary, with the paper's figure if it may stand}}}}} of
    the columns that are a benchmark.

    Args:
        tables: {table: {row: {column: results.json}}}.
    Raises:
        ValueError: a column of a benchmark's name without the breakdown, or rows of a column on several versions.
    """
    found, first = {}, {}
    for table, rows in tables.items():
        columns = found[table] = {}
        for row, cells in rows.items():
            for column, one in cells.items():
                benchmark = one.get("benchmark") or {}
                if stage.published == "sightsound" and column in BENCHMARKS and benchmark.get("name") != column:
                    raise ValueError(f"{stage.name}: {row!r} on {column!r}: its results.json has no 'benchmark' of "
                                     f"{TITLES[column]}: every clip's meta must have {', '.join(FIELDS[column])}")
                what = named(benchmark) if benchmark else "no benchmark"
                other, theirs = first.setdefault(column, (row, what))
                if what != theirs:
                    raise ValueError(f"{stage.name}: {other!r} and {row!r} on {column!r}: {theirs} and {what}: their "
                                     "accuracies do not compare")
                if benchmark:
                    columns.setdefault(column, {})[row] = benchmark
    return {table: {column: breakdown(stage, column, rows) for column, rows in columns.items()}
            for table, columns in found.items()}


def breakdown(stage, column, rows):
    """One column of `breakdowns`, of {row: a results.json's "benchmark"}."""
    one = next(iter(rows.values()))
    figures = BENCHMARKS[column] if stage.published == "sightsound" and column == one["name"] else {}
    words = ""
    if one["name"] == "music_avqa":
        words = ("The types and their average are over audio and audio-visual questions"
                 + ", our reading of the paper's 7k, with which its figures are compared" * bool(figures)
                 + "; All counts those on pictures alone, too.")
    elif figures and f"{one['version']} ".startswith(f"{MMAU_VERSION} "):
        words = f"The paper had {MMAU_VERSION} too; which of the files that bore that number it does not say."
    elif figures:
        figures = {}
        words = f"The paper had {MMAU_VERSION}: its figures, of other questions, stand at the end alone."
    return {"name": named(one), "words": words, "rows": {
        row: {part: {**{key: total[key] for key in SHOWN},
                     **({"paper": figures[row][part]} if part in figures.get(row, {}) else {})}
              for part, total in parts(benchmark).items()} for row, benchmark in rows.items()}}


def named(benchmark):
    """Its name, and of MMAU the version with its file's hash."""
    if benchmark["name"] == "mmau":
        return f"MMAU {benchmark['version']} (sha256 {benchmark['sha256'][:12]}…)"
    return TITLES[benchmark["name"]]


def parts(benchmark):
    """{title: summary}, in the order of the paper's Table 2."""
    if benchmark["name"] == "mmau":
        tasks, hard = benchmark["task"], benchmark["difficulty"]
        return {**{task.capitalize(): tasks[task] for task in dict.fromkeys(("sound", "speech", "music", *tasks))
                   if task in tasks}, "Average": benchmark["all"],
                **{name: hard[name] for name in dict.fromkeys(("easy", "medium", "hard", *hard)) if name in hard}}
    heard = benchmark["audio"]
    return {kind: heard[kind] for kind in TYPES} | {"Average": heard["all"], "All": benchmark["every"]["all"]}


# ---- the teacher's traces ----


def funnel(paths):
    """{"steps", "verifier"} of the results.json that `paths` names: {"traces" | "checked" | "verifier": path}.

    A step is {"step", "count", "of", "left_out": {reason: count}}: of `of` (None: no step's rest) `count` are kept, and
    the reasons add up to the others.
    """
    found = {kind: _read(path, kind) for kind, path in paths.items()}
    traces, checked, small = (found.get(kind) for kind in ("traces", "checked", "verifier"))
    steps = sampled(traces) if traces else []
    for kind, who in (("checked", "checker"), ("verifier", "verifier")):
        if kind not in found:
            continue
        one = found[kind]
        if traces and one["unanimous"]["judged"] != traces["traces_of_unanimous"]:
            raise ValueError(f"{paths[kind]}: of another stage's traces than {paths['traces']}: it judged "
                             f"{one['unanimous']['judged']} of unanimous clips, and there are "
                             f"{traces['traces_of_unanimous']}")
        steps += accepted(one, who)
    if checked and small and checked["traces"] != small["traces"]:
        raise ValueError(f"{paths['verifier']}: judged {small['traces']} traces, and {paths['checked']} "
                         f"{checked['traces']}: not the same ones")
    return {"steps": steps, "verifier": small and replaced(small)}


def _read(path, kind):
    key, what = {"traces": ("traces_of_unanimous", "a Traces"), "checked": ("clips_with_accepted", "a FactCheck"),
                 "verifier": ("calibration", "a FactCheck, with checker 'verifier',")}[kind]
    results = read_json(path)
    if key not in results:
        raise ValueError(f"{path}: not the results of {what} stage: it holds no {key!r}")
    return results


def sampled(one):
    """From clips to traces of clips on which all samples agree."""
    read, clips = one["clips"] - sum(one["bad"].values()), dict(one["clips_by"])
    unanimous = clips.pop("unanimous", 0)
    other = one["usable"] - one["traces_of_unanimous"]
    return [_step("clips read", read, one["clips"], one["bad"]),
            _step("unanimous clips", unanimous, read, clips),
            _step("samples", one["samples"], None, {}),
            _step("usable samples: traces", one["usable"], one["samples"], one["unusable"]),
            _step("traces of unanimous clips", one["traces_of_unanimous"], one["usable"],
                  {"not unanimous": other} if other else {})]


def accepted(one, who):
    """What came of the traces that were judged: all, the first of each clip, those of unanimous clips."""
    lost = {"rejected": one["rejected"]} if one["rejected"] else {}
    steps = [_step(f"accepted by the {who}", one["accepted"], one["traces"], lost | one["bad"])]
    for name, what in (("first", "first traces"), ("unanimous", "those of unanimous clips")):
        judged, kept = one[name]["judged"], one[name]["accepted"]
        lost = {"rejected or could not be judged" if one["bad"] else "rejected": judged - kept} if judged > kept else {}
        steps.append(_step(f"{who}: of {what}", kept, judged, lost))
    missing = one["clips"] - one["clips_with_accepted"]
    return [*steps, _step(f"{who}: clips with one", one["clips_with_accepted"], one["clips"],
                          {"without one": missing} if missing else {})]


def _step(title, count, of, left_out):
    return {"step": title, "count": count, "of": of, "left_out": left_out}


def replaced(one):
    """The verifier's "calibration", with "words": how well it agrees, and its price in the checker's place."""
    held = one["calibration"]
    (no_no, no_yes), (yes_no, yes_yes) = held["confusion"]

    def of_hundred(part, count):
        return f"{100 * part / count:.0f} (95 % interval {'–'.join(f'{100 * x:.0f}' for x in wilson(part, count))})"

    agreed = wilson(no_no + yes_yes, held["count"])
    words = (f"On {held['count']:,} held-out verdicts the verifier agrees with the checker in {pct(held['agreement'])} "
             f"% (95 % interval {'–'.join(map(pct, agreed))}); area under ROC {held['auc']:.3f}. In the checker's "
             f"place and at threshold 0, of 100 traces that the checker accepts it would lose "
             f"{of_hundred(yes_no, yes_no + yes_yes)}, ")
    words += (f"of 100 that it accepts itself the checker would reject {of_hundred(no_yes, no_yes + yes_yes)}, "
              if no_yes + yes_yes else "it would accept none, ")
    return {**held, "words": words + f"and the checker would be asked for {held['verdicts']:,} verdicts, to "
                                     f"train it, instead of {one['traces']:,}."}
