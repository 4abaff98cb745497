"""Passes over the graph, in order; each is one file and can be switched off by name."""

from collections.abc import Callable, Collection

from tinyunet.compiler.ir import Graph
from tinyunet.compiler.passes.choose_algorithm import choose_algorithm
from tinyunet.compiler.passes.defer_normalization import defer_normalization
from tinyunet.compiler.passes.eliminate_concat import eliminate_concat
from tinyunet.compiler.passes.fold_batch_norm import fold_batch_norm
from tinyunet.compiler.passes.fuse_backward import fuse_backward
from tinyunet.compiler.passes.fuse_epilogue import fuse_epilogue
from tinyunet.compiler.passes.fuse_gradients import fuse_gradients
from tinyunet.compiler.passes.propagate_layout import propagate_layout
from tinyunet.compiler.passes.switches import Options

__all__ = ["NAMES", "PASSES", "Options", "chosen"]

Pass = Callable[[Graph, Options], Graph]

#: Name and function, in the order in which they run. ``plan_memory`` is the executor's, and last.
PASSES: dict[str, Pass] = {
    "fold_batch_norm": fold_batch_norm,
    "fuse_epilogue": fuse_epilogue,
    "defer_normalization": defer_normalization,
    "fuse_backward": fuse_backward,
    "eliminate_concat": eliminate_concat,
    "propagate_layout": propagate_layout,
    "fuse_gradients": fuse_gradients,
    "choose_algorithm": choose_algorithm,
}

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
