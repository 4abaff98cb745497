"""Rules for data from a file: a rule is a function of a value and of the value's place in the file.

Rules are made of rules, and raise :class:`ValueError` of one line for a value that they do not allow::

    rule = record({"epoch": whole(0), "labels": each(text)})
    rule({"epoch": -1, "labels": []}, "state")  # ValueError: state.epoch: -1; expected a whole number ...
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any, str], None]


def _fail(value: Any, where: str, expected: str) -> None:
    raise ValueError(f"{where}: {shown(value)}; expected {expected}")


def shown(value: Any) -> str:
    """Return a few words for a value; a list or object from a stranger may be nested deeply."""
    if isinstance(value, Mapping | list | tuple):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    shown = ascii(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _allow(is_allowed: Callable[[Any], bool], expected: str) -> Rule:
    """Return a rule for values without parts."""

    def check(value: Any, where: str) -> None:
        if not is_allowed(value):
            _fail(value, where, expected)

    return check


#: Rules for text, and for true and false.
text: Rule = _allow(lambda value: isinstance(value, str), "text")
boolean: Rule = _allow(lambda value: isinstance(value, bool), "true or false")


def whole(least: int = 0, most: int = 10**9) -> Rule:
    """Allow whole numbers between two bounds, both included."""
    expected = f"a whole number from {least} to {most}"
    return _allow(lambda value: type(value) is int and least <= value <= most, expected)


def number(least: float = -math.inf, most: float = math.inf) -> Rule:
    """Allow finite numbers between two bounds, both included."""
    bounds = "" if least == -math.inf else f" from {least:g} on"
    bounds = bounds if most == math.inf else f" from {least:g} to {most:g}"

    def is_allowed(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= most and abs(value) < math.inf

    return _allow(is_allowed, f"a finite number{bounds}")


def one_of(*choices: Any) -> Rule:
    """Allow some values, each of the choice's type too: True equals 1."""
    expected = f"one of {', '.join(map(str, choices))}"
    return _allow(lambda value: any(type(value) is type(c) and value == c for c in choices), expected)


def optional(rule: Rule) -> Rule:
    """Allow None and what another rule allows."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            rule(value, where)

    return check


def each(rule: Rule, least: int = 0, most: int | None = None) -> Rule:
    """Allow lists of ``least`` to ``most`` items, each of which a rule allows."""
    count = f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"

    def check(value: Any, where: str) -> None:
        longest = math.inf if most is None else most
        if not isinstance(value, list | tuple) or not least <= len(value) <= longest:
            _fail(value, where, f"a list of {count}")
        for index, item in enumerate(value):
            rule(item, f"{where}[{index}]")

    return check


def by_name(rule: Rule) -> Rule:
    """Allow objects with any names, whose values a rule allows."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            _fail(value, where, "an object")
        for name, item in value.items():
            rule(item, f"{where}.{ascii(str(name)[:40])[1:-1]}")

    return check


def record(needed: Mapping[str, Rule], known: Mapping[str, Rule] | None = None) -> Rule:
    """Allow objects that have all needed entries and perhaps known ones; a rule checks each of these."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            _fail(value, where, "an object")
        for name, rule in {**needed, **(known or {})}.items():
            if name in value:
                rule(value[name], f"{where}.{name}")
            elif name in needed:
                raise ValueError(f"{where}: no {name}")

    return check
