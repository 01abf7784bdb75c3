"""Dataclasses that check what they are given: `@stage`, and the checks that a stage's __post_init__ calls.

Every message is one line that names the field and the value.
"""
import math
import operator
import re
import string
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import wraps
from types import UnionType
from typing import get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

_NAMES = {int: "an int", float: "a float", str: "a str", bool: "true or false"}
_PROMPT = {"question": "Which?", "options": "A. dog\nB. cat", "first": "A", "last": "B"}  # the placeholders, an example
_TRACE = {"trace": "<think>It barks.</think><answer>A</answer>"}  # where a prompt may show one
_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


class ConfigError(ValueError):
    """A config that cannot be used."""


def stage(cls):
    """A frozen dataclass, built by keywords only, that answers an unknown field with the nearest one it has."""
    cls = dataclass(frozen=True, kw_only=True)(cls)
    made = cls.__init__
    needed = {field.name: field.default is field.default_factory is MISSING for field in fields(cls)}

    @wraps(made)
    def __init__(self, **given):
        title = f"{kind(cls)} {given['name']!r}" if "name" in given else kind(cls)
        for name in given:
            if name not in needed:
                raise ConfigError(f"config: {title} has no field {name!r}{nearest(name, needed)}")
        missing = [name for name in needed if needed[name] and name not in given]
        if missing:
            raise ConfigError(f"config: {title} needs {' and '.join(map(repr, missing))}")
        made(self, **given)

    cls.__init__ = __init__
    return cls


def kind(cls):
    return cls.__name__.lower()


def nearest(name, known):
    """'; did you mean ...?' for a misspelt name, or nothing if no known name is like it."""
    match = get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_types(item):
    """Holds every field to its annotation; an int given for a float becomes one, a list for a tuple likewise."""
    for name, annotation in get_type_hints(type(item)).items():
        value = getattr(item, name)
        try:
            object.__setattr__(item, name, _convert(annotation, value))  # frozen: only here, while it is being made
        except ValueError:
            raise ConfigError(f"config: {name} must be {_describe(annotation)}, got {value!r}") from None
        if value == "":
            raise ConfigError(f"config: {name} is empty")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", item.name):  # it names a directory and is written "@name/file"
        raise ConfigError(f"config: name must be letters, digits, '_' and '-', got {item.name!r}")


def parse_field(item, name, text):
    """The value that `text`, from an override, has for field `name` of a stage."""
    annotation = get_type_hints(type(item))[name]
    try:
        return _parse(annotation, text)
    except (ValueError, KeyError):
        raise ConfigError(f"config: {name} must be {_describe(annotation)}, got {text!r}") from None


def one_of(item, name, *choices):
    if getattr(item, name) not in choices:
        *most, last = map(repr, choices)
        raise ConfigError(f"config: {name} must be {', '.join(most)} or {last}, got {getattr(item, name)!r}")


def require(item, *rules):
    """Rules such as "lr > 0"; a field that is None passes."""
    for rule in rules:
        name, sign, bound = rule.split()
        value = getattr(item, name)
        if value is not None and not _COMPARE[sign](value, float(bound)):
            raise ConfigError(f"config: {name} must be {sign} {bound}, got {value!r}")


def check_prompt(prompt, needs=("options",)):
    """A format string over the placeholders, which holds those of `needs`; {trace} may stand where it is needed."""
    known = _PROMPT | (_TRACE if "trace" in needs else {})
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


def check_url(endpoint):
    try:
        url = urlsplit(endpoint)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # a port that is no number, a bracket left open
        good = False
    if not good:  # without a scheme the client would take it for a model on the hub
        raise ConfigError(f"config: endpoint {endpoint!r} is no URL such as http://localhost:8000/v1")


def check_asking(item, needs=("options",)):
    """The fields that every stage which asks a model has in common."""
    one_of(item, "media", "audio", "video", "both", "sounded")
    one_of(item, "device", "auto", "cpu", "cuda")
    one_of(item, "backend", "auto", "triton", "torch")
    one_of(item, "dtype", "float32", "bfloat16", "float16")
    require(item, "fps > 0", "min_pixels >= 1", "nframes >= 2", "max_bad >= 0", "max_bad <= 1", "seed >= 0")
    if item.min_pixels > item.max_pixels:
        raise ConfigError(f"config: min_pixels {item.min_pixels} is more than max_pixels {item.max_pixels}")
    check_prompt(item.prompt, needs)


def _convert(annotation, value):
    """`value` as the annotated type; ValueError if it is of another."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is UnionType:  # X | None
        return None if value is None else _convert(inner[0], value)
    if origin is tuple and isinstance(value, (tuple, list)):
        inner = inner[:1] * len(value) if inner[-1] is ... else inner
        return tuple(_convert(each, part) for each, part in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {_convert(inner[0], key): _convert(inner[1], part) for key, part in value.items()}
    if annotation is float and type(value) is int:
        value = float(value)
    if origin or not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise ValueError
    if annotation is float and not math.isfinite(value):
        raise ValueError
    return value


def _parse(annotation, text):
    """The value of a command-line text; ValueError or KeyError if it has none of that type."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is UnionType:
        return None if text == "none" else _parse(inner[0], text)
    if origin is tuple:
        parts = [part.strip() for part in text.split(",")] if text else []
        inner = inner[:1] * len(parts) if inner[-1] is ... else inner
        return tuple(_parse(each, part) for each, part in zip(inner, parts, strict=True))
    if origin is dict:
        raise ValueError
    return {"true": True, "false": False}[text] if annotation is bool else annotation(text)


def _describe(annotation):
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is UnionType:
        return f"{_describe(inner[0])} or None"
    if origin is tuple:
        return f"a tuple of {inner[0].__name__}" if inner[-1] is ... else f"{len(inner)} {inner[0].__name__}s"
    if origin is dict:
        return "a dict of dicts of str"
    return _NAMES[annotation]
