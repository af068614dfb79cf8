"""
Rules for the values of arguments, in which an error names the argument and says what it must be.

    rules = rules_of(MyConfig, rank=integer(0, 4096))   # in `__post_init__`: other fields by their annotation
    check_fields(config, rules)

A check is strict about types, since a wrong one may work in silence: "no" is true, and True is 1. Numbers and switches
of NumPy count as Python's, and become such.
"""

import dataclasses
import difflib
import enum
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import numpy as np


LARGEST_INTEGER = 2**31 - 1
"""Of an argument without a closer limit: what a C int holds, since many end up in one."""
LARGEST_NUMBER = float(np.finfo(np.float32).max)


class Rule(NamedTuple):
    """What a value must be: in words that follow "must be", and as a test."""

    legal: str
    holds: Callable[[Any], bool]


ANYTHING = Rule("anything", lambda value: True)
NOTHING = Rule("None", lambda value: value is None)
SWITCH = Rule("True or False", lambda value: isinstance(value, bool))
TEXT = Rule("a string", lambda value: isinstance(value, str))
PATH = Rule("a path", lambda value: isinstance(value, (str, os.PathLike)) and bool(os.fspath(value)))
MAPPING = Rule("a dict, or JSON of one", lambda value: isinstance(value, dict) or _is_json_dict(value))
FILE = Rule("a file", lambda value: isinstance(value, str) and os.path.isfile(value))


def integer(low: int = -LARGEST_INTEGER, high: int = LARGEST_INTEGER) -> Rule:
    """An integer in `[low, high]`. The message leaves out the default of `high`, which is nobody's concern."""
    bounds = f"of {low} or more" if high == LARGEST_INTEGER else f"in [{low}, {high}]"
    return Rule(f"an integer {bounds}", lambda value: _is_integer(value) and low <= value <= high)


def number(low: float = -LARGEST_NUMBER, high: float = LARGEST_NUMBER, above: bool = False) -> Rule:
    """A number in `[low, high]`, or in `(low, high]` if it must be `above` the low end."""
    opening = "(" if above else "["
    return Rule(
        f"a number in {opening}{low:.4g}, {high:.4g}]",
        lambda value: _is_number(value) and low <= value <= high and not (above and value == low),
    )


def choice(values: Iterable[str]) -> Rule:
    """One of some strings."""
    values = tuple(values)
    listed = ", ".join(map(repr, values))
    legal = f"one of {listed}" if len(values) > 1 else listed
    return Rule(legal, lambda value: isinstance(value, str) and value in values)


def only(allowed: Any, why: str = "") -> Rule:
    """A single value, and why."""
    return Rule(
        f"{allowed!r}, since {why}" if why else f"{allowed!r}",
        lambda value: type(value) is type(allowed) and value == allowed,
    )


def list_of(rule: Rule) -> Rule:
    """A list or tuple of values for which `rule` holds."""
    return Rule(
        f"a list whose items are each {rule.legal}",
        lambda value: isinstance(value, (list, tuple)) and all(rule.holds(_plain(item)) for item in value),
    )


def any_of(*rules: Rule) -> Rule:
    """A value for which one of the rules holds."""
    return Rule(", or ".join(rule.legal for rule in rules), lambda value: any(rule.holds(value) for rule in rules))


def optional(rule: Rule) -> Rule:
    """`None`, or a value for which `rule` holds."""
    return any_of(rule, NOTHING)


def rule_of(annotation: Any) -> Rule:
    """The rule that a type annotation stands for."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        has_enum = any(isinstance(part, type) and issubclass(part, enum.Enum) for part in arguments)
        # `IntervalStrategy | str` is the name of a strategy, not any string.
        return any_of(*(rule_of(part) for part in arguments if not (has_enum and part is str)))
    if origin is typing.Literal:
        return any_of(*(only(value) for value in arguments))
    if origin in (list, tuple) and arguments:
        return list_of(rule_of(arguments[0]))
    simple = {types.NoneType: NOTHING, bool: SWITCH, int: integer(), float: number(), str: TEXT}
    if annotation in simple:
        return simple[annotation]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return choice(member.value for member in annotation)
    kind = origin if isinstance(origin, type) else annotation
    if isinstance(kind, type) and kind is not typing.Any and kind is not Callable:
        return Rule(f"a {kind.__name__}", lambda value: isinstance(value, kind))
    return ANYTHING


def rules_of(cls: type, **rules: Rule) -> dict[str, Rule]:
    """A rule for each field of a dataclass: the one that is given, or that of its annotation."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    check_names(rules, fields, f"a field of {cls.__name__}")
    return {name: rules[name] if name in rules else rule_of(hints[name]) for name in fields}


def check(name: str, value: Any, rule: Rule, fix: str = "") -> Any:
    """
    The value as a Python number, if it is one.

    Raises:
        `ValueError`: If the rule does not hold.
    """
    plain = _plain(value)
    if not rule.holds(plain):
        raise ValueError(f"`{name}` must be {rule.legal}, got {shown(value)}.{' ' if fix else ''}{fix}")
    return plain


def check_fields(config: Any, rules: dict[str, Rule]) -> None:
    """
    Check the fields of a dataclass, and turn NumPy's numbers into Python's.

    Raises:
        `ValueError`: For the first field whose rule does not hold.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, rule in rules.items():
        default = defaults[name]
        fix = "" if default is dataclasses.MISSING else f"Leave it out for the default, {default!r}."
        setattr(config, name, check(name, getattr(config, name), rule, fix))


def check_names(names: Iterable[str], known: Collection[str], what: str) -> None:
    """
    Check that names are known.

    Raises:
        `ValueError`: For the first name that is not, with the nearest one that is.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=1)
            fix = f"Did you mean `{near[0]}`?" if near else "Remove it."
            raise ValueError(f"`{name}` must be {what}, got an unknown name. {fix}")


def shown(value: Any) -> str:
    """The `repr` of a value, short and without fail."""
    try:
        text = repr(value)
    except Exception:  # of an integer of 5,000 digits, or of an object with a fault
        text = f"an object of {type(value).__name__}"
    return text if len(text) <= 500 else f"{text[:500]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    # Such as a fraction. One that is no legal number stays as it is, for the message.
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(_float(value))


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_json_dict(value: object) -> bool:
    if not isinstance(value, str) or not value.startswith("{"):
        return False
    try:
        return isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False
