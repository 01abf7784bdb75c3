"""Holds values of configs and JSON files to annotations: Literal, Annotated[float, "> 0"], X | None, tuples, dicts."""
import math
import operator
import reprlib
from types import GenericAlias, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

TYPE_NAMES = {int: "an int", float: "a float", str: "a str", bool: "true or false", dict: "an object"}
COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def check_fields(record, fields, where):
    """Raises ValueError for an object of a JSON file that has other fields. fields: {name: annotation}; one whose
    name ends in "?" may be missing, and an annotation may be such a dict itself. where: how the message begins."""
    for name, annotation in fields.items():
        needed, name = name[-1] != "?", name.rstrip("?")
        if name not in record:
            if needed:
                raise ValueError(f"{where} needs {name!r}, {describe(annotation)}")
            continue
        value = record[name]
        if isinstance(annotation, dict) and isinstance(value, dict):
            check_fields(value, annotation, f"{where} field {name!r}")
        elif not is_plain(annotation, value):
            try:
                check_value(annotation, value)
            except ValueError as error:
                raise ValueError(f"{where} needs {name!r}, {error}, got {reprlib.repr(value)}") from None


def is_plain(annotation, value):
    """Whether a value is surely right, in little time: of a file's many lines most are."""
    kind = type(value)
    if type(annotation) is GenericAlias and kind is list:
        inner, *more = annotation.__args__
        if inner in (str, int, float) and more == [...] and set(map(type, value)) == {inner}:
            return inner is not float or math.isfinite(sum(value))
    if kind is float:
        return annotation is float and math.isfinite(value)
    return kind in annotation.__args__ if type(annotation) is UnionType else kind is annotation


def check_value(annotation, value):
    """The value as its annotation has it, an int given for a float as one; ValueError, saying what it must be."""
    plain, others, bounds = take_apart(annotation)
    if value in others:
        return value
    try:
        value = _convert(plain, value)
    except (ValueError, OverflowError):  # an int beyond all floats
        raise ValueError(describe(annotation)) from None
    for bound in bounds:
        sign, limit = bound.split()
        if not COMPARE[sign](value, float(limit)):
            raise ValueError(bound)
    return value


def take_apart(annotation):
    """(type, values that it may have beside, bounds) of a field's annotation."""
    others, bounds = (), ()
    if get_origin(annotation) in (Union, UnionType):  # only ever X | None and X | Literal
        annotation, other = get_args(annotation)
        others = get_args(other) or (None,)
    if get_origin(annotation) is Annotated:
        annotation, *bounds = get_args(annotation)
    return annotation, others, bounds


def _convert(annotation, value):
    """`value` as the annotated type; ValueError if it is of another."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        if isinstance(value, bool) or value not in inner:
            raise ValueError
        return value
    if origin is tuple and isinstance(value, (tuple, list)):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        return tuple(check_value(each, part) for each, part in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {check_value(inner[0], key): check_value(inner[1], part) for key, part in value.items()}
    if isinstance(annotation, dict) and isinstance(value, dict):
        check_fields(value, annotation, "")
        return value
    if annotation is float and type(value) is int:
        value = float(value)
    if origin or isinstance(annotation, dict) or not isinstance(value, annotation):
        raise ValueError
    if isinstance(value, bool) and annotation is not bool or annotation is float and not math.isfinite(value):
        raise ValueError
    return value


def describe(annotation):
    annotation, others, _ = take_apart(annotation)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        *most, last = map(repr, inner)
        text = f"{', '.join(most)} or {last}"
    elif origin is tuple:
        kind = take_apart(inner[0])[0].__name__
        text = f"a list of {kind}" if inner[-1] is ... else f"{len(inner)} {kind}s"
    elif isinstance(annotation, dict):
        text = f"an object of {', '.join(name for name in annotation if not name.endswith('?'))}"
    elif inner:
        values = {dict: "dicts of str", tuple: "lists of str"}.get(get_origin(inner[1]))
        text = f"a dict of {values or ('str' if inner[1] is str else 'objects')}"
    else:
        text = TYPE_NAMES[annotation]
    return " or ".join([text, *map(repr, others)])
