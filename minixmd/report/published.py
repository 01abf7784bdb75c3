"""Figures that the papers published, in %, from published.json. One stands beside an accuracy of this run only where
row and column have the paper's titles, as recipe_parts/ gives them; all stand on their own at the end of the report."""
from pathlib import Path

from minixmd.runs.files import read_json

PAPERS = read_json(Path(__file__).with_name("published.json"))  # Report.published -> "source", "tables", … of a paper
BESIDE = {None: {}}  # Report.published -> "tables" | "ablation" -> the paper's rows for that table of the report
BENCHMARKS = {None: {}}  # Report.published -> column -> the paper's rows for the breakdown of that benchmark
for name, paper in PAPERS.items():
    for key, rows_for in (("beside", BESIDE), ("benchmarks", BENCHMARKS)):
        rows_for[name] = {place: paper["tables"][title] for place, title in paper.pop(key).items()}
MMAU_VERSION = PAPERS["sightsound"].pop("mmau_version")
