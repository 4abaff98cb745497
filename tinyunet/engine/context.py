"""One call on the tape: where its inputs came from, and what it keeps for its gradient.

A context points to its parent *contexts*, not to its input tensors, so that an activation lives
only while some ``ctx.save`` (or the caller) needs it. Each context is emptied once its gradient is
done; going backward through it again is an error.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tinyunet.common import verbose

Array: TypeAlias = NDArray[np.floating[Any]]
Gradients: TypeAlias = tuple[Array | None, ...]

_SAMPLES = 1024  # elements of a saved array that are remembered, to notice a change in place
_serial_numbers = itertools.count()


class Leaf(Protocol):
    """Where a gradient ends: a tensor that nobody computed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    @property
    def dtype(self) -> np.dtype[np.floating[Any]]:
        """Type of the numbers."""

    def accumulate(self, gradient: Array) -> None:
        """Add to the gradient found so far."""


#: Told, while backward goes on, what has just run and which leaves have got their whole gradient.
Listener: TypeAlias = Callable[[str, Sequence[Leaf]], None]


class Context:
    """One call. An operator may put plain attributes on it: ``ctx.stride = stride``.

    Arrays that it was given it keeps by :meth:`save` alone: the compiled graph, which uses their memory
    again, refuses all other ways.

    Attributes
    ----------
    function : the :class:`Function` class that was called.
    parents : one entry an argument: the context of the call that made it, the leaf that wants a
        gradient, or None.
    needs_gradient : tuple of bool, one an argument; work for a False one can be left out.
    shape, dtype : of the result.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, function: type[Any], parents: "tuple[Context | Leaf | None, ...]") -> None:
        self.function = function
        self.serial_number = next(_serial_numbers)
        self.parents = parents
        self.needs_gradient = tuple(parent is not None for parent in parents)
        self.recording = any(self.needs_gradient)
        self._saved: tuple[tuple[NDArray[Any] | None, bytes], ...] = ()

    def save(self, *arrays: NDArray[Any] | None) -> None:
        """Keep arrays (not copies) for backward; does nothing when no backward can come."""
        if self.recording:  # a result without axes may be a scalar of NumPy, which kernels refuse
            kept = [None if array is None else np.asanyarray(array) for array in arrays]
            self._saved = tuple((array, _sample(array)) for array in kept)

    @property
    def saved(self) -> tuple[Any, ...]:
        """What was given to :meth:`save`, after a look whether it still holds the same numbers.

        Arrays of fewer than 2048 elements are compared whole. Of larger ones, some 180 to 1500
        elements are, spread evenly: writing over a channel, a slice or the whole array is noticed,
        changing a few voxels need not be. (Read-only arrays would not do: an optimizer writes
        through another view, and to Numba a read-only array is another type, for which every
        kernel would be compiled a second time.)
        """
        for array, sample in self._saved:
            if array is not None and _sample(array) != sample:
                raise RuntimeError(
                    f"{self.function.__name__}: an array of shape {array.shape} that backward needs"
                    " was changed in place after the forward pass; change a copy instead"
                )
        return tuple(array for array, _ in self._saved)

    def forward(self, *arguments: Any) -> Array:
        """Result of the operator, which may keep something here."""
        start = time.perf_counter()
        result: Array = self.function.forward(self, *arguments)
        if verbose.wanted():
            self._say("", time.perf_counter() - start, (result,), arguments)
        return result

    def backward(self, gradient: Array) -> Gradients:
        """Gradients for :attr:`parents`, checked; then let go of everything that was kept."""
        if not self.recording:
            raise RuntimeError(
                f"{self.function.__name__}: backward has already run here and freed this part of"
                " the graph; run the forward pass again"
            )
        start = time.perf_counter()
        gradients = self.checked(self.function.backward(self, gradient))
        if verbose.wanted():
            self._say("d ", time.perf_counter() - start, gradients, (gradient,))
        self.parents, self._saved, self.recording = (), (), False
        return gradients

    def checked(self, gradients: Any) -> Gradients:
        """Return what the operator's ``backward`` has returned, one gradient for each of :attr:`parents`.

        Raises
        ------
        RuntimeError
            It is no tuple, or too long, or a gradient that is needed is missing or has another shape.
        """
        most = len(self.parents)
        if not isinstance(gradients, tuple) or len(gradients) > most:
            given = len(gradients) if isinstance(gradients, tuple) else type(gradients).__name__
            raise RuntimeError(
                f"{self.function.__name__}.backward must return a tuple of at most {most} gradients, "
                f"one for each argument of forward, not {given}"
            )
        gradients += (None,) * (most - len(gradients))
        return tuple(map(self._check, gradients, self.parents))

    def _say(self, direction: str, seconds: float, written: Gradients, read: Sequence[Any]) -> None:
        """Print a line of what has just run; what it keeps or has kept was moved, too."""
        arrays = (*written, *read, *(array for array, _ in self._saved))
        moved = {id(array): array for array in arrays if isinstance(array, np.ndarray)}
        shape = max((np.shape(a) for a in written if a is not None), key=math.prod, default=())
        operator = operator_name(self.function) + ("_backward" if direction else "")
        told = operator, shape, "ndhwc" if len(shape) == 5 else "plain", "eager", ""
        work = None, sum(array.nbytes for array in moved.values())
        verbose.say(verbose.Ran(*told, seconds, *work, direction + self.function.__name__).line())

    def _check(self, diff: Array | None, parent: "Context | Leaf | None") -> Array | None:
        if parent is None:
            return None
        if diff is None or np.shape(diff) != parent.shape:
            raise RuntimeError(
                f"{self.function.__name__}.backward must return a gradient of shape {parent.shape},"
                f" not {'None' if diff is None else np.shape(diff)}"
            )
        if np.asarray(diff).dtype.kind not in "biuf":
            raise RuntimeError(
                f"{self.function.__name__}.backward must return gradients of real numbers, "
                f"not {np.asarray(diff).dtype}"
            )
        # Kernels want contiguous memory; a gradient has the precision of what it belongs to.
        return np.asarray(diff, dtype=parent.dtype, order="C")


def operator_name(function: type[Any]) -> str:
    """Return "max_pooling" for ``MaxPooling``."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in function.__name__).lstrip("_")


def _sample(array: NDArray[Any] | None) -> bytes:
    if array is None:
        return b""
    step = max(1, array.size // _SAMPLES)
    while math.gcd(step, array.size) > 1:  # coprime: the samples meet every channel, row, slice
        step += 1
    return array.reshape(-1)[::step].tobytes()
