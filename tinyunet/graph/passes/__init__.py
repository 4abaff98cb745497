"""Passes over the graph, in order; each is one file and can be switched off by name."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from tinyunet.graph.ir import Graph


class Options(NamedTuple):
    """What a pass may want to know beside the graph."""

    training: bool
    accuracy: str


Pass = Callable[[Graph, Options], Graph]

#: Name and function, in the order in which they run. ``plan_memory`` is the executor's, and last.
PASSES: dict[str, Pass] = {}

NAMES = (*PASSES, "plan_memory")


def chosen(enable: Collection[str] | None, disable: Collection[str]) -> tuple[str, ...]:
    """Return the names of the passes to run.

    Parameters
    ----------
    enable : collection of str, optional
        Only these; all if left out.
    disable : collection of str
        Not these.

    Raises
    ------
    ValueError
        A name is not that of a pass.
    """
    wanted = set(NAMES) if enable is None else _known("enable", enable)
    unwanted = _known("disable", disable)
    return tuple(name for name in NAMES if name in wanted - unwanted)


def _known(argument: str, names: Collection[str]) -> set[str]:
    given = {names} if isinstance(names, str) else set(names)
    for name in sorted(given - set(NAMES)):
        raise ValueError(f"{argument}: no pass {name!r}; there are {', '.join(NAMES)}")
    return given
