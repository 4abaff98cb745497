"""What data from a file must look like: rules made of rules, each broken one told in one line.

A rule is a function of a value and of where it stands. It raises :class:`ValueError` where the value is
none that is allowed::

    rule = record({"epoch": whole(0), "labels": each(text)})
    rule({"epoch": -1, "labels": []}, "state")  # ValueError: state.epoch: -1; expected a whole number ...
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any, str], None]


def fail(value: Any, where: str, expected: str) -> None:
    """Raise what is wrong with a value."""
    raise ValueError(f"{where}: {shown(value)}; expected {expected}")


def shown(value: Any) -> str:
    """Return a value as text of a few words: a list or object of a stranger's may be nested deeply."""
    if isinstance(value, Mapping | list | tuple):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    shown = ascii(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def anything(value: Any, where: str) -> None:
    """Allow all."""


def whole(least: int = 0, most: int = 10**9) -> Rule:
    """Allow whole numbers between two bounds, both included."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            fail(value, where, f"a whole number from {least} to {most}")

    return check


def number(least: float = -math.inf, most: float = math.inf) -> Rule:
    """Allow finite numbers between two bounds, both included."""

    def check(value: Any, where: str) -> None:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not least <= value <= most or abs(value) == math.inf:
            bounds = "" if least == -math.inf else f" from {least:g} on"
            bounds = bounds if most == math.inf else f" from {least:g} to {most:g}"
            fail(value, where, f"a finite number{bounds}")

    return check


def text(value: Any, where: str) -> None:
    """Allow text."""
    if not isinstance(value, str):
        fail(value, where, "text")


def boolean(value: Any, where: str) -> None:
    """Allow True and False."""
    if not isinstance(value, bool):
        fail(value, where, "true or false")


def one_of(*choices: Any) -> Rule:
    """Allow some values."""

    def check(value: Any, where: str) -> None:
        # By type, too: True equals 1.
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            fail(value, where, f"one of {', '.join(map(str, choices))}")

    return check


def optional(rule: Rule) -> Rule:
    """Allow None and what another rule allows."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            rule(value, where)

    return check


def each(rule: Rule, least: int = 0, most: int | None = None) -> Rule:
    """Allow lists, of so many items at least and at most, each of which a rule allows."""

    def check(value: Any, where: str) -> None:
        longest = math.inf if most is None else most
        if not isinstance(value, list | tuple) or not least <= len(value) <= longest:
            count = f"{least} or more" if most is None else f"{least} to {most}"
            fail(value, where, f"a list of {least if least == most else count}")
        for index, item in enumerate(value):
            rule(item, f"{where}[{index}]")

    return check


def by_name(rule: Rule) -> Rule:
    """Allow objects whose values a rule allows, whatever their names."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            fail(value, where, "an object")
        for name, item in value.items():
            rule(item, f"{where}.{_name(name)}")

    return check


def record(needed: Mapping[str, Rule], known: Mapping[str, Rule] | None = None) -> Rule:
    """Allow objects with needed entries and perhaps known ones; others are not looked at."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            fail(value, where, "an object")
        for name, rule in {**needed, **(known or {})}.items():
            if name in value:
                rule(value[name], f"{where}.{name}")
            elif name in needed:
                raise ValueError(f"{where}: no {name}")

    return check


def _name(name: Any) -> str:
    """Return a name from a file as part of a line."""
    return ascii(str(name)[:40])[1:-1]
