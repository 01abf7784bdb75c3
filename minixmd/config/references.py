"""What a field that names a file stands for: "@name", the output of an earlier stage; "@name/file", another of its
files; a path; or, for a model, "owner/name" or "owner/name@revision" on the hub where there is no such folder."""
from dataclasses import fields
from pathlib import Path

from minixmd.config.field_checks import ConfigError, kind, nearest
from minixmd.runs.hub_names import parse_hub_name

# what a bare "@name" means; of factcheck the traces that were accepted
OUTPUTS = {"distill": "best", "sft": "best", "grpo": "best", "onpolicy": "best", "label": "labels.jsonl",
           "switch": "switch.jsonl", "evaluate": "results.json", "answers": "results.json", "traces": "traces.jsonl",
           "factcheck": "traces.jsonl"}
MODELS = ("model", "teacher_model")  # fields that may name a model on the hub
INPUTS = {  # the fields that name a file or folder, and the kinds of stage that a bare "@name" in them may be
    **dict.fromkeys(MODELS, "distill sft grpo onpolicy"), "traces": "traces factcheck", "switch": "switch",
    **dict.fromkeys(("teacher_labels", "student_labels"), "label"),
    **dict.fromkeys(("teacher", "student", "tables", "ablation", "senses"), "evaluate answers"),
    **dict.fromkeys(("manifest", "val_manifest", "train_manifest", "clips", "weights", "verdicts", "curves", "funnel",
                     "scored", "file")),
}  # fmt: skip


def resolve(value, run_dir, stages):
    """The path that a field's value stands for: the output of the stage it refers to, or itself."""
    if not value.startswith("@"):
        return Path(value)
    name, _, file = value[1:].partition("/")
    kinds = {item.name: kind(type(item)) for item in stages}
    return Path(run_dir) / name / (file or OUTPUTS[kinds[name]])


def input_paths(item, run_dir, stages):
    """Field -> path of every file or folder that a stage reads; a table's field reads "tables.row.column"."""
    return {field: resolve(value, run_dir, stages) for field, value, _ in _inputs(item)}


def absent_files(stages):
    """Yields (stage, field, value, whether it may be a name on the hub) of what the user must bring and has not."""
    for item in stages:
        for field, value, _ in _inputs(item):
            if not (value.startswith("@") or Path(value).exists()):
                yield item, field, value, field in MODELS and parse_hub_name(value) is not None


def check_files(stages):
    """Raises ConfigError for a file or folder that the user must bring and has not. Called before any work starts."""
    for item, field, value, on_hub in absent_files(stages):
        if not on_hub:  # else the stage's fingerprint asks the hub for its commit
            moved = "" if "." in field else f"; if it moved, add {item.name}.{field}=PATH to the command"
            raise ConfigError(f"config: {kind(type(item))} {item.name!r} {field} {value!r} does not exist{moved}")


def stage_of(value):
    """The name of the stage that a field's value refers to; None for a path of the user's."""
    name, _, _ = value[1:].partition("/")
    return name if value.startswith("@") else None


def dependencies(item):
    """Names of the stages that a stage reads."""
    return {stage_of(value) for _, value, _ in _inputs(item)} - {None}


def select(stages, names):
    """The stages of these names and all that they need, in order. Raises ConfigError for an unknown name."""
    known = [item.name for item in stages]
    for name in names:
        if name not in known:
            raise ConfigError(f"config: --only {name}: no stage has that name{nearest(name, known)}")
    wanted = set(names)
    for item in reversed(stages):
        if item.name in wanted:
            wanted |= dependencies(item)
    return tuple(item for item in stages if item.name in wanted)


def check_references(stages):
    """Raises ConfigError for a reference that no earlier stage answers, or one of another kind."""
    before = {}  # name -> kind of the stages that have run
    for item in stages:
        for field, value, needs in _inputs(item):
            where = f"config: {kind(type(item))} {item.name!r} {field} {value!r}"
            name, _, file = value[1:].partition("/")
            if not value.startswith("@"):
                continue
            if name not in before and name in [other.name for other in stages]:
                raise ConfigError(f"{where} names a stage that does not run before it")
            if name not in before:
                raise ConfigError(f"{where} names no stage{nearest('@' + name, ['@' + known for known in before])}")
            if not file and before[name] not in OUTPUTS:
                raise ConfigError(f"{where} names no file; write '@{name}/FILE'")
            if not file and before[name] not in (needs or "").split():
                wanted = "a manifest" if "manifest" in field else f"a file of it; write '@{name}/FILE'"
                if needs:
                    wanted = f"the output of a {needs.replace(' ', ' or ')} stage"
                raise ConfigError(f"{where} is the output of a {before[name]} stage, not {wanted}")
        before[item.name] = kind(type(item))


def _inputs(item):
    """(field, value, kind of stage that a bare "@name" must be) of every field that names a file and is set."""
    for field in fields(item):
        value, needs = getattr(item, field.name), INPUTS.get(field.name)
        if field.name not in INPUTS or value is None:
            continue
        if isinstance(value, dict):
            for row, cells in value.items():
                if isinstance(cells, str):
                    yield f"{field.name}.{row}", cells, needs
                else:
                    yield from ((f"{field.name}.{row}.{column}", cell, needs) for column, cell in cells.items())
        else:
            yield field.name, value, needs
