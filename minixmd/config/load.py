"""load_config: a file that defines `stages = […]` and, if it likes, `run_dir`, to the stages of a run, all checked."""
import runpy
import traceback
from dataclasses import dataclass, fields, replace
from pathlib import Path

from minixmd.config import STAGES
from minixmd.config.field_checks import ConfigError, hint, kind, nearest, parse_field
from minixmd.config.references import check_references


@dataclass(frozen=True)
class Config:
    run_dir: Path  # holds one directory a stage
    stages: tuple  # in the order they run; names are unique
    source: Path  # the config file


def load_config(source, overrides=()):
    """Runs a config file, applies the overrides in order (the last wins) and checks the whole. source: path of a Python
    file, or the bare name of a bundled recipe. overrides: "stage.field=value", "field=value" (every stage that has the
    field) or "run_dir=path"; the default is `runs/<file stem>`. Raises ConfigError for anything wrong in them."""
    source = _find(source)
    given = _run(source)
    run_dir, stages = given.get("run_dir", Path("runs") / source.stem), given.get("stages")
    if not isinstance(stages, (list, tuple)) or not stages:
        raise ConfigError(f"config: {source} defines no list of stages named 'stages'")
    for i, item in enumerate(stages):
        if not isinstance(item, STAGES):
            raise ConfigError(f"config: {source}: stages[{i}] must be a stage, got {item!r}")
        if item.name in [earlier.name for earlier in stages[:i]]:
            raise ConfigError(f"config: two stages are named {item.name!r}")
    changes = {item.name: {} for item in stages}
    for override in overrides:
        target, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"config: override {override!r} must read stage.field=value, field=value or run_dir=path")
        if target == "run_dir":
            run_dir = text
            continue
        for item, name in _targets(stages, target):
            changes[item.name][name] = parse_field(item, name, text)
    if not isinstance(run_dir, (str, Path)) or not str(run_dir):
        raise ConfigError(f"config: run_dir must be a path, got {run_dir!r}")
    # all of a stage's overrides at once: a pair such as min_pixels and max_pixels may only fit together
    stages = tuple(replace(item, **changes[item.name]) for item in stages)
    check_references(stages)
    return Config(Path(run_dir), stages, source)


def _find(source):
    path, folder = Path(source), Path(__file__).parents[1] / "recipes"
    if path.suffix == ".py" or path.name != str(source):
        if not path.is_file():
            raise ConfigError(f"config: no file {source}")
        return path
    names = sorted(recipe.stem for recipe in folder.glob("[!_]*.py"))
    if path.name not in names:
        raise ConfigError(f"config: no recipe {path.name!r}{nearest(path.name, names)} (available: {', '.join(names)})")
    return folder / f"{path.name}.py"


def _run(path):
    """The names that a config file defines. Whatever goes wrong in it becomes one line with the file and line."""
    try:
        return runpy.run_path(str(path))
    except SyntaxError as error:
        raise ConfigError(f"config: {error.filename or path}:{error.lineno or 1}: {error.msg}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = ":".join(map(str, [path, *lines[-1:]]))
        if isinstance(error, ConfigError):
            raise ConfigError(f"{error} ({where})") from error
        raise ConfigError(f"config: {where}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _targets(stages, target):
    """(stage, field) of every field that the left side of an override names."""
    name, dot, field = target.rpartition(".")
    chosen = [item for item in stages if not dot or item.name == name]
    if not chosen:
        raise ConfigError(f"config: no stage {name!r}{nearest(name, [item.name for item in stages])}")
    known = {known.name: None for item in chosen for known in fields(item)}
    if field not in known:
        who = f"{kind(type(chosen[0]))} {name!r} has no field" if dot else "no stage has a field"
        raise ConfigError(f"config: {who} {field!r}{hint(field, known)}")
    if field == "name":
        raise ConfigError(f"config: a stage's name is set in the config file only, got override {target!r}")
    return [(item, field) for item in chosen if hasattr(item, field)]
