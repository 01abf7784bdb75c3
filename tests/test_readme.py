"""README stays true: its configs load, its manifest line is one, and every path of its layout exists."""
import re
from pathlib import Path

import pytest

from minixmd.config.load import load_config
from minixmd.inputs.examples import read_manifest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    """The fenced blocks of one language ("" for none)."""
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M) if name == language]


def test_the_example_configs_load(tmp_path):
    configs = [block for block in blocks("python") if "stages = " in block]
    for config, stages in zip(configs, (8, 25, 5), strict=True):
        (tmp_path / "mine.py").write_text(config)
        assert len(load_config(tmp_path / "mine.py").stages) == stages


def test_the_example_manifest_line_is_an_example(tmp_path):
    (line,) = blocks("json")
    (tmp_path / "m.jsonl").write_text(line)
    assert read_manifest(tmp_path / "m.jsonl")[0].options == ("dog barking", "cat purring")


def test_it_is_at_most_300_lines():
    assert len(README.splitlines()) <= 300


def test_the_layout_names_every_file_and_no_others():
    (layout,) = [block for block in blocks("") if "minixmd/\n" in block]
    layout = layout.partition("minixmd/\n")[2].partition("tools/ ")[0]
    there = {path.name for path in (ROOT / "minixmd").rglob("*.py") if path.parent.name != "recipes"}
    assert set(re.findall(r"\w+\.py", layout)) == there - {"__init__.py", "kernels.py"}


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "minixmd" / "recipes").glob("[!_]*.py")))
def test_every_bundled_recipe_loads(name):
    assert load_config(name).stages
