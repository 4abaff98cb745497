"""The tape: a context for each call of an operator, and the walk back over them; or a tracer in its place.

A context holds the origins of the call's inputs, and the arrays that the operator keeps. It points to
its parent *contexts*, not to its input tensors, so an activation lives only while some ``ctx.save`` (or the
caller) needs it. Its backward empties a context; going back through it again is an error.

While a model is traced (:mod:`tinyunet.compiler.trace`), a tracer gets the calls, and tensors hold
:class:`Absent` arrays.
"""

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tinyunet.common import verbose

Array: TypeAlias = NDArray[np.floating[Any]]
Gradients: TypeAlias = tuple[Array | None, ...]

_SAMPLES = 1024  # elements of a saved array that are remembered, to notice a change in place
_serial_numbers = itertools.count()


class Leaf(Protocol):
    """The end of a gradient's way: a tensor that no operator computed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    @property
    def dtype(self) -> np.dtype[np.floating[Any]]:
        """Type of the numbers."""

    def accumulate(self, gradient: Array) -> None:
        """Add to the gradient found so far."""


#: Called during backward with the operator that has just run, and the leaves whose gradient is now complete.
Listener: TypeAlias = Callable[[str, Sequence[Leaf]], None]

#: Called with an operator and its arguments; returns the tensor that the operator would.
Tracer: TypeAlias = Callable[[type[Any], tuple[Any, ...]], Any]


class Context:
    """One call. An operator may put plain attributes on it: ``ctx.stride = stride``.

    Operators of tinyunet keep arrays only by :meth:`save`, because the compiled graph uses the memory of
    all others again.

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
        """The arrays given to :meth:`save`; RuntimeError if a saved array no longer holds the same numbers.

        Arrays of fewer than 2048 elements are compared whole. Of larger ones, some 180 to 1500 elements are,
        spread evenly: a change of a channel, a slice or the whole array is noticed, a change of a few voxels
        may not be. (Read-only arrays would not do: an optimizer writes through another view, and to Numba a
        read-only array is another type, for which it would compile every kernel a second time.)
        """
        for array, sample in self._saved:
            if array is not None and _sample(array) != sample:
                raise RuntimeError(
                    f"{self.function.__name__}: an array of shape {array.shape} that backward needs"
                    " was changed in place after the forward pass; change a copy instead"
                )
        return tuple(array for array, _ in self._saved)

    def forward(self, *arguments: Any) -> Array:
        """Return the result of the operator, which may keep something here."""
        start = time.perf_counter()
        result: Array = self.function.forward(self, *arguments)
        if verbose.wanted():
            self._print("", time.perf_counter() - start, (result,), arguments)
        return result

    def backward(self, gradient: Array) -> Gradients:
        """Return gradients for :attr:`parents`, checked, and drop everything that was kept."""
        if not self.recording:
            raise RuntimeError(
                f"{self.function.__name__}: backward has already run here and freed this part of"
                " the graph; run the forward pass again"
            )
        start = time.perf_counter()
        gradients = self.checked(self.function.backward(self, gradient))
        if verbose.wanted():
            self._print("d ", time.perf_counter() - start, gradients, (gradient,))
        self.parents, self._saved, self.recording = (), (), False
        return gradients

    def checked(self, gradients: Any) -> Gradients:
        """Return the results of the operator's ``backward``, one gradient for each of :attr:`parents`.

        Raises
        ------
        RuntimeError
            The result is no tuple, or too long, or a needed gradient is missing or has another shape.
        """
        most = len(self.parents)
        if not isinstance(gradients, tuple) or len(gradients) > most:
            given = len(gradients) if isinstance(gradients, tuple) else type(gradients).__name__
            raise self._wrong(f"a tuple of at most {most} gradients, one for each argument of forward", given)
        gradients += (None,) * (most - len(gradients))
        return tuple(map(self._checked_one, gradients, self.parents))

    def _checked_one(self, diff: Array | None, parent: "Context | Leaf | None") -> Array | None:
        if parent is None:
            return None
        if diff is None or np.shape(diff) != parent.shape:
            raise self._wrong(f"a gradient of shape {parent.shape}", None if diff is None else np.shape(diff))
        # Kernels want contiguous memory; a gradient has the precision of its tensor.
        if np.asarray(diff).dtype.kind not in "biuf":
            raise self._wrong("gradients of real numbers", np.asarray(diff).dtype)
        return np.asarray(diff, dtype=parent.dtype, order="C")

    def _wrong(self, expected: str, given: object) -> RuntimeError:
        return RuntimeError(f"{self.function.__name__}.backward must return {expected}, not {given}")

    def _print(self, direction: str, seconds: float, written: Gradients, read: Sequence[Any]) -> None:
        """Print a line of what has just run; arrays that the context keeps or has kept were moved, too."""
        arrays = (*written, *read, *(array for array, _ in self._saved))
        moved = {id(array): array for array in arrays if isinstance(array, np.ndarray)}
        shape = max((np.shape(a) for a in written if a is not None), key=math.prod, default=())
        operator = operator_name(self.function) + ("_backward" if direction else "")
        what = operator, shape, "ndhwc" if len(shape) == 5 else "plain", "eager", ""
        work = None, sum(array.nbytes for array in moved.values())
        verbose.say(verbose.Ran(*what, seconds, *work, direction + self.function.__name__).line())


def go_back(newest: Context, gradient: Array, listener: Listener | None) -> None:
    """Visit contexts from the newest to the oldest; leaves accumulate the gradients that reach them."""
    gradients, ours = {newest: gradient}, set[Context]()  # ours: sums that the tape may add to in place
    uses = uses_of_leaves(newest) if listener else Counter[Leaf]()
    while gradients:
        ctx = max(gradients, key=lambda each: each.serial_number)  # no gradient can still reach the newest
        parents = ctx.parents
        for parent, diff in zip(parents, ctx.backward(gradients.pop(ctx)), strict=True):
            if parent is None or diff is None:
                continue
            if not isinstance(parent, Context):
                parent.accumulate(diff)
            elif parent in ours:
                gradients[parent] += diff
            elif parent in gradients:  # which another tensor may hold too; nobody else holds the sum
                gradients[parent] = np.asarray(gradients[parent] + diff)
                ours.add(parent)
            else:
                gradients[parent] = diff
                ours |= {parent} if ctx.function.gives_away else set()
        if listener is not None:
            leaves = [p for p in parents if p is not None and not isinstance(p, Context)]
            uses.subtract(leaves)
            listener(f"d {ctx.function.__name__}", [p for p in set(leaves) if not uses[p]])


def uses_of_leaves(newest: Context) -> Counter[Leaf]:
    """Return how often each leaf is an argument on the tape that ends here."""
    uses, seen, waiting = Counter[Leaf](), {newest}, [newest]
    while waiting:
        for parent in waiting.pop().parents:
            if not isinstance(parent, Context):
                uses.update([] if parent is None else [parent])
            elif parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return uses


class _Recording(threading.local):
    """Whether operators go on the tape, and the tracer that takes them instead; each thread has its own."""

    on = True
    tracer: Tracer | None = None


recording = _Recording()


@contextmanager
def no_grad() -> Iterator[None]:
    """Put nothing on the tape: ``with no_grad():``, or ``@no_grad()`` over a function."""
    before, recording.on = recording.on, False
    try:
        yield
    finally:
        recording.on = before


def is_recording() -> bool:
    """Return whether operators go on the tape: not inside :func:`no_grad`."""
    return recording.on


@contextmanager
def intercept(tracer: Tracer | None) -> Iterator[None]:
    """Call ``tracer(function, arguments)`` instead of each ``function.apply(*arguments)`` inside.

    Pass None to run operators normally inside an outer `intercept`.
    """
    before, recording.tracer = recording.tracer, tracer
    try:
        yield
    finally:
        recording.tracer = before


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener(name, ())`` after each operator that runs forward inside."""

    def run(function: type[Any], arguments: tuple[Any, ...]) -> Any:
        with intercept(None):
            dst = function.apply(*arguments)
        listener(function.__name__, ())
        return dst

    with intercept(run):
        yield


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


# ---- while a model is traced -----------------------------------------------------------------------------


class NeedsNumbersError(RuntimeError):
    """A program asked the absent array ``name`` for its numbers."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is being traced: it has a shape, but no numbers")
        self.name = name


class Absent(np.lib.mixins.NDArrayOperatorsMixin):
    """Has the shape and the type of an array, but no numbers: a tensor holds it while a model is traced.

    A trace computes nothing. An ``if``, an index or a function of NumPy that needs numbers is refused here:
    so a value that depends on the data never becomes a constant of a graph.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.name, self.shape, self.dtype = name, shape, np.dtype(dtype)
        self.ndim, self.size = len(shape), math.prod(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NeedsNumbersError(self.name)

    __array__ = __array_ufunc__ = __array_function__ = _refuse
    __getitem__ = __setitem__ = __iter__ = __contains__ = _refuse
    __bool__ = __float__ = __int__ = __index__ = __complex__ = _refuse

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # copy, pickle and NumPy ask for names that need not be there
            raise AttributeError(attribute)
        raise NeedsNumbersError(self.name)
