"""`@stage`, dataclasses that check what they are given: each field by its annotation (runs/value_checks.py), then, in
the class's `check`, what concerns two fields. Every message is one line that names the field and the value."""
import re
import string
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import wraps
from typing import Literal, get_args, get_origin, get_type_hints

from minixmd.runs.value_checks import check_value, describe, take_apart

PROMPT_EXAMPLE = {"question": "Which?", "options": "A. dog\nB. cat", "first": "A", "last": "B"}
TRACE_EXAMPLE = {"trace": "<think>It barks.</think><answer>A</answer>"}  # allowed only where a prompt shows a trace
_owners = {}  # field -> names of the stage classes that have it, for the hint in an error


class ConfigError(ValueError):
    """A config that cannot be used."""


def stage(cls):
    """A frozen dataclass, built by keywords only, that answers an unknown field with the nearest one it has."""
    cls = dataclass(frozen=True, kw_only=True)(cls)
    generated_init = cls.__init__
    required = [field.name for field in fields(cls) if field.default is field.default_factory is MISSING]
    known = [field.name for field in fields(cls)]
    if not cls.__name__.startswith("_"):
        for name in known:
            _owners.setdefault(name, []).append(cls.__name__)

    @wraps(generated_init)
    def __init__(self, **given):
        title = f"{kind(cls)} {given['name']!r}" if "name" in given else kind(cls)
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(f"config: {title} has no field {unknown[0]!r}{hint(unknown[0], known)}")
        if missing := [name for name in required if name not in given]:
            raise ConfigError(f"config: {title} needs {' and '.join(map(repr, missing))}")
        generated_init(self, **given)
        check_types(self)
        if hasattr(self, "check"):
            self.check()

    cls.__init__ = __init__
    return cls


def kind(cls):
    """A stage class's name as messages and config.json write it."""
    return cls.__name__.lower()


def hint(name, known):
    """What an unknown field was probably meant to be; empty if nothing is like it."""
    if name in _owners:
        return f"; it is a field of {', '.join(_owners[name])}"
    return nearest(name, known)


def nearest(name, known):
    """'; did you mean ...?' for a misspelt name, or nothing if no known name is like it."""
    match = get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_types(item):
    """Holds every field to its annotation; an int given for a float becomes one, a list for a tuple likewise."""
    for name, annotation in get_type_hints(type(item), include_extras=True).items():
        value = getattr(item, name)
        try:
            object.__setattr__(item, name, check_value(annotation, value))  # frozen: only here, while it is being made
        except ValueError as error:
            raise ConfigError(f"config: {name} must be {error}, got {value!r}") from None
        if value == "":
            raise ConfigError(f"config: {name} is empty")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", item.name):  # it names a directory and is written "@name/file"
        raise ConfigError(f"config: name must be letters, digits, '_' and '-', got {item.name!r}")


def parse_field(item, name, text):
    """The value that `text`, from an override, has for field `name` of a stage."""
    annotation = get_type_hints(type(item), include_extras=True)[name]
    plain, others, _ = take_apart(annotation)
    for value in others:
        if text == str(value).lower():
            return value
    try:
        return _parse(plain, text)
    except (ValueError, KeyError):
        raise ConfigError(f"config: {name} must be {describe(annotation)}, got {text!r}") from None


def check_unused(item, because, names):
    """Raises ConfigError for one of the fields in `names`, all without effect, that is not at its default."""
    for name in names.split():
        if getattr(item, name) != item.__dataclass_fields__[name].default:
            raise ConfigError(f"config: {because} does not use {name}, got {getattr(item, name)!r}")


def check_prompt(prompt, needs=("options",)):
    """A format string over the placeholders, which holds those of `needs`; {trace} may stand where it is needed."""
    known = PROMPT_EXAMPLE | (TRACE_EXAMPLE if "trace" in needs else {})
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
        unknown = [name for name in names if name not in known]
        if not unknown:
            prompt.format(**known)  # a format specification may still be wrong
    except (ValueError, LookupError) as error:
        raise ConfigError(f"config: prompt {prompt!r} is no format string: {error}") from None
    if unknown:
        raise ConfigError(f"config: prompt has no placeholder {unknown[0]!r}{nearest(unknown[0], known)}")
    if missing := [name for name in needs if name not in names]:
        raise ConfigError(f"config: prompt {prompt!r} must hold the placeholder {missing[0]!r}")


def _parse(annotation, text):
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return text
    if origin is tuple:
        parts = [part.strip() for part in text.split(",")] if text else []
        kinds = inner[:1] * len(parts) if inner[-1] is ... else inner
        return tuple(_parse(each, part) for each, part in zip(kinds, parts, strict=True))
    if origin is dict:
        raise ValueError
    return {"true": True, "false": False}[text] if annotation is bool else annotation(text)
