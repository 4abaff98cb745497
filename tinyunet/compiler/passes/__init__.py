"""Passes over the graph, in order; each is one file and can be switched off by name.

At the end, ``finish`` adds the nodes that every graph needs before it can run.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from tinyunet.compiler.ir import Graph, Options
from tinyunet.compiler.passes import (
    choose_algorithm,
    defer_normalization,
    eliminate_concat,
    fold_batch_norm,
    fuse_backward,
    fuse_epilogue,
    fuse_gradients,
    propagate_layout,
)
from tinyunet.compiler.passes.finish import finish

__all__ = ["NAMES", "PASSES", "Options", "Stage", "chosen", "stages"]

#: Name and function, in the order in which they run. ``plan_memory`` is the program's, and last.
PASSES: dict[str, Callable[[Graph, Options], Graph]] = {
    "fold_batch_norm": fold_batch_norm.fold_batch_norm,
    "fuse_epilogue": fuse_epilogue.fuse_epilogue,
    "defer_normalization": defer_normalization.defer_normalization,
    "fuse_backward": fuse_backward.fuse_backward,
    "eliminate_concat": eliminate_concat.eliminate_concat,
    "propagate_layout": propagate_layout.propagate_layout,
    "fuse_gradients": fuse_gradients.fuse_gradients,
    "choose_algorithm": choose_algorithm.choose_algorithm,
}

NAMES = (*PASSES, "plan_memory")


class Stage(NamedTuple):
    """A graph after a pass; ``reuse`` as in :func:`tinyunet.compiler.memory.plan`."""

    name: str
    graph: Graph
    reuse: bool = False


def stages(graph: Graph, options: Options) -> list[Stage]:
    """Return a graph as traced, after each pass, and as it is run."""
    found = [Stage("traced", graph)]
    for name in options.passes:
        if name in PASSES:
            graph = PASSES[name](graph, options).check()
            found.append(Stage(name, graph))
    found.append(Stage("finish", finish(graph)))
    return [*found, Stage("plan_memory", found[-1].graph, True)] if "plan_memory" in options.passes else found


def chosen(enable: Collection[str] | None, disable: Collection[str]) -> tuple[str, ...]:
    """Return the names of the passes to run, in order: of ``enable`` (None: of all), without ``disable``.

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
