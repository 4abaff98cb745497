"""How an operator runs that is the user's own: the graph knows only what it did while it was traced.

It gets a :class:`Context` at each run, as on the tape, and what its ``backward`` returns is checked as
there. But what it saves is kept where the graph says: as an input, the result, or a workspace. All other
memory is used again, by other arrays of the same step. An operator that keeps an array elsewhere (as an
attribute of ``ctx``, in a list, in a function made for backward) would read what has replaced it. So arrays
are lent, and who keeps one is refused.
"""

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyunet.autograd import Tensor
from tinyunet.compiler.binder import Call
from tinyunet.compiler.ir import Node
from tinyunet.engine.context import Context

Array = npt.NDArray[Any]


class Loans:
    """Arrays in the hands of somebody's code, which must not keep them."""

    def __init__(self) -> None:
        self._lent: list[weakref.ref[Array]] = []

    def lend(self, array: Array) -> Array:
        """Return another array object on the same memory. Whoever keeps a view of it keeps it, too."""
        # By way of a memoryview: the view of a view would keep only what both are views of.
        lent = np.asarray(memoryview(array))  # type: ignore[arg-type]
        self._lent.append(weakref.ref(lent))
        return lent

    def check(self, name: str, error: type[Exception] = RuntimeError) -> None:
        """Raise an error if an array is kept, with the name of the code that it was lent to."""
        if any(array() is not None for array in self._lent):
            gc.collect()  # what only forgotten objects refer to is not kept
            if any(array() is not None for array in self._lent):
                raise error(
                    f"compile: {name} keeps an array that it was given, whose memory is used again; keep"
                    " it by ctx.save(array), or keep a copy"
                )


def forward(
    node: Node, inputs: Mapping[str, Array], outputs: Mapping[str, Array], calls: dict[str, Context]
) -> Call:
    """Return a function without arguments that runs ``forward``, and leaves the context in ``calls``."""
    function, needs = node.attributes["function"], node.attributes["needs_gradient"]
    arguments, lent = node.attributes["arguments"], node.attributes["lent"]
    parents = tuple(inputs[role] if need else None for (role, _), need in zip(arguments, needs, strict=True))

    def run() -> None:
        ctx, loans = Context(function, parents), Loans()  # type: ignore[arg-type]
        given = {role: loans.lend(array) if role in lent else array for role, array in inputs.items()}
        returned = function.forward(ctx, *(given.get(role, value) for role, value in arguments))
        _store(node, ctx, given | {"dst": returned}, outputs)
        calls[node.name] = ctx
        del returned
        given.clear()
        loans.check(f"{function.__name__}.forward")

    return run


def _store(node: Node, ctx: Context, given: Mapping[str, Any], outputs: Mapping[str, Array]) -> None:
    """Copy result and workspaces to where the graph has them, and let the context forget its own."""
    dst, saves = Tensor(given["dst"]).data, node.attributes["saves"]
    ctx.shape, ctx.dtype = dst.shape, dst.dtype
    copied, same = {"dst": dst}, not ctx.recording or len(ctx.saved) == len(saves)
    for name, array in zip(saves, ctx.saved, strict=False):
        if name in outputs and name != "dst":
            copied[name] = array
        else:
            same = same and array is (given[name] if name else None)
    ctx.save()
    for name, array in copied.items():
        target = outputs[name]
        same = same and (np.shape(array), getattr(array, "dtype", 0)) == (target.shape, target.dtype)
        if not same:
            break
        np.copyto(target, array)
    if not same:
        raise RuntimeError(
            f"compile: {ctx.function.__name__}.forward returns or saves other arrays than when it was"
            " compiled: which these are, and their shapes, must not depend on the data; use the eager model"
        )


def backward(
    node: Node, inputs: Mapping[str, Array], outputs: Mapping[str, Array], calls: dict[str, Context]
) -> Call:
    """Return a function without arguments that runs ``backward`` on what ``forward`` has left."""
    function, arguments = node.attributes["function"], node.attributes["arguments"]

    def run() -> None:
        ctx, loans = calls.pop(node.attributes["of"]), Loans()
        saved = [f"saved.{name}" if name else None for name in node.attributes["saves"]]
        ctx.save(*(loans.lend(inputs[name]) if name else None for name in saved))
        found = ctx.checked(function.backward(ctx, loans.lend(inputs["gradient"])))
        for (role, _), gradient in zip(arguments, found, strict=True):
            if f"diff_{role}" in outputs and gradient is not None:
                np.copyto(outputs[f"diff_{role}"], gradient)
        del ctx, found, gradient
        loans.check(f"{function.__name__}.backward")

    return run
