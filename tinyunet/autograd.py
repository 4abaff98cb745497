# ruff: noqa: D102 - forward and backward of every operator are described once, in Function
"""Define-by-run differentiation: the tape records each operator while the program runs.

Each ``Function.apply`` runs an operator and puts a :class:`Context` on the tape: which operator ran, where
its inputs came from, and the arrays that its gradient will need. :meth:`Tensor.backward` visits the contexts
from the newest to the oldest, and each hands gradients on to its parents::

    x ---> Multiply ---> Sum ---> loss          forward: contexts 1, 2
    x.grad <-- Multiply <-- Sum <-- 1           backward: contexts 2, 1

The order of creation *is* a topological order, since an input exists before its results. So
backward needs no sorting and no recursion.
"""

import numbers
from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from tinyunet.common.turns import one_at_a_time
from tinyunet.tape import Array, Context, Gradients, Listener, go_back, recording
from tinyunet.tape import no_grad as no_grad

Axis: TypeAlias = int | tuple[int, ...] | None
Index: TypeAlias = int | slice | EllipsisType | None


class Function:
    """An operator: subclass it with static ``forward`` and ``backward``, call it by ``apply``."""

    #: ``forward(ctx, *arguments)`` gets arrays for tensors, and everything else as it is.
    forward: Callable[..., Array]
    #: ``backward(ctx, gradient)`` returns one gradient an argument of ``forward``; None where
    #: ``ctx.needs_gradient`` is False, and trailing Nones may be left out. ``gradient`` is
    #: C-contiguous and must not be written to.
    backward: Callable[[Context, Array], Gradients]
    #: Whether ``backward`` returns new memory that nobody else holds, not even another of its
    #: gradients: then the tape adds to it in place.
    gives_away = False

    @classmethod
    def apply(cls, *arguments: Any) -> "Tensor":
        """Run ``forward``; if an argument requires a gradient, the call goes on the tape."""
        if recording.tracer is not None:
            return recording.tracer(cls, arguments)
        ctx = Context(cls, tuple(map(_parent, arguments)))
        dst = Tensor(ctx.forward(*(a.data if isinstance(a, Tensor) else a for a in arguments)))
        if ctx.recording:
            ctx.shape, ctx.dtype = dst.shape, dst.dtype
            dst.requires_grad, dst._context = True, ctx
        return dst


def _parent(argument: Any) -> "Context | Tensor | None":
    if isinstance(argument, Tensor) and argument.requires_grad and recording.on:
        return argument._context or argument
    return None


class Tensor:
    """An array that remembers how it was computed.

    Parameters
    ----------
    data : array_like
        C-contiguous arrays of float32 or float64 are shared, not copied; anything else becomes float32.
    requires_grad : bool
        Whether ``grad`` is wanted.

    Attributes
    ----------
    data : ndarray
    grad : ndarray or None
        On leaves only: the sum of the gradients that every ``backward`` since it was None has found.
    """

    __slots__ = ("__weakref__", "_context", "data", "grad", "requires_grad")
    __array_ufunc__ = None  # array + tensor is left to Tensor.__radd__

    def __init__(self, data: ArrayLike, requires_grad: bool = False) -> None:
        is_array = isinstance(data, np.ndarray | np.generic | Tensor)
        self.data: Array = _floats(data, keep=is_array, otherwise=np.float32)
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._context: Context | None = None

    def backward(self, gradient: ArrayLike | None = None, listener: Listener | None = None) -> None:
        """Add the gradient of this tensor by each leaf it was computed from to the leaf's ``grad``.

        Parameters
        ----------
        gradient : array_like, shape = self.shape
            Gradient to start from. A tensor of one element may leave it out: one.
        listener : callable, optional
            Called after each operator with its name, and the leaves whose ``grad`` is complete.

        Raises
        ------
        RuntimeError
            Nothing was recorded, backward already ran, or a saved array was changed (of a large
            one some elements are compared, so that a change of a few may pass unseen).
        ValueError
            ``gradient`` is missing or has another shape.
        """
        start = self._starting_gradient(gradient)
        if self._context is None:
            self.accumulate(start)
        else:
            go_back(self._context, start, listener)

    def _starting_gradient(self, gradient: ArrayLike | None) -> Array:
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor depends on nothing that requires a gradient")
        if gradient is None and self.data.size != 1:
            raise ValueError(f"backward: a tensor of shape {self.shape} needs a gradient")
        if gradient is None:
            return np.ones_like(self.data)
        start = _floats(gradient, keep=False, otherwise=self.dtype)
        if start.shape != self.shape:
            raise ValueError(f"backward: gradient has shape {start.shape}, tensor {self.shape}")
        return start

    def accumulate(self, gradient: Array) -> None:
        """Add to ``grad`` of a leaf; neither keep nor change an array that a caller may hold."""
        with one_at_a_time:  # or of two threads' gradients one would be lost
            # The sum of arrays without axes is a scalar of NumPy, which fill(0) would not change.
            self.grad = gradient.copy() if self.grad is None else np.asarray(self.grad + gradient)

    def detach(self) -> "Tensor":
        """Return the same array with no history."""
        return Tensor(self.data)

    def numpy(self) -> Array:
        """Return the array itself, not a copy."""
        return self.data

    def item(self) -> float:
        """Return the only element as a Python number."""
        return float(self.data.item())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[np.floating[Any]]:
        """Type of the numbers: float32 or float64."""
        return self.data.dtype

    def __repr__(self) -> str:
        history = f", made by {self._context.function.__name__}" if self._context else ""
        return f"Tensor({self.data}, requires_grad={self.requires_grad}{history})"

    def _operand(self, other: Any) -> "Tensor | Array":
        if isinstance(other, Tensor):
            return other
        # Numbers and integers take this tensor's precision.
        return _floats(other, keep=isinstance(other, np.ndarray), otherwise=self.dtype)

    def __add__(self, other: Any) -> "Tensor":
        return Add.apply(self, self._operand(other))

    def __mul__(self, other: Any) -> "Tensor":
        return Multiply.apply(self, self._operand(other))

    def __pow__(self, exponent: float) -> "Tensor":
        return Power.apply(self, exponent)

    def __neg__(self) -> "Tensor":
        return self * -1

    def __sub__(self, other: Any) -> "Tensor":
        return self + -self._operand(other)

    def __rsub__(self, other: Any) -> "Tensor":
        return -self + other

    def __truediv__(self, other: Any) -> "Tensor":
        return Divide.apply(self, self._operand(other))

    def __rtruediv__(self, other: Any) -> "Tensor":
        return Divide.apply(self._operand(other), self)

    __radd__, __rmul__ = __add__, __mul__

    # Sets and dicts compare tensors by identity, not by their numbers.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        raise TypeError("tensor: compare the arrays, t.data, or use 'is'")

    def __bool__(self) -> bool:
        return bool(self.data)

    def __iter__(self) -> Iterator["Tensor"]:
        if not self.shape:
            raise TypeError("tensor: it is one number, there is nothing to iterate over")
        return (self[i] for i in range(self.shape[0]))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.array(self.data, dtype, copy=copy)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> "Tensor":
        return Slice.apply(self, index)

    def exp(self) -> "Tensor":
        """Return e to the power of each element."""
        return Exp.apply(self)

    def log(self) -> "Tensor":
        """Return the natural logarithm of each element."""
        return Log.apply(self)

    def sum(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """Return the sum over all axes, or over those given."""
        return Sum.apply(self, axis, keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """Return the mean over all axes, or over those given."""
        total = self.sum(axis, keepdims)
        if self.data.size == 0:
            raise ValueError(f"mean: a tensor of shape {self.shape} has none")
        return total * (total.data.size / self.data.size)

    def reshape(self, *shape: int | tuple[int, ...]) -> "Tensor":
        """Return the same elements in another shape, sharing memory; one size may be -1."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        return Reshape.apply(self, sizes)


def _floats(data: ArrayLike | Tensor, *, keep: bool, otherwise: DTypeLike) -> Array:
    """``data`` as a C-contiguous array of float32 or float64 (to keep), or of the type ``otherwise``."""
    array = np.asarray(real_numbers("tensor", data), order="C")
    return array if keep and array.dtype in ("f4", "f8") else array.astype(otherwise, copy=False)


def real_numbers(name: str, data: ArrayLike | Tensor) -> NDArray[Any]:
    """``data`` as an array of real numbers or truth values; TypeError for complex numbers, text and dates."""
    array = np.asarray(data)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected real numbers, not {type(data).__name__} ({array.dtype})")
    return array


def _broadcast(ctx: Context, operation: np.ufunc, a: Array, b: Array) -> Array:
    ctx.shapes = a.shape, b.shape
    try:
        return operation(a, b)
    except ValueError:
        shapes = f"shapes {a.shape} and {b.shape} cannot be broadcast together"
        raise ValueError(f"{operation.__name__}: {shapes}") from None


def _unbroadcast(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient in float64 over the axes along which broadcasting repeated an operand of this shape."""
    if gradient.shape == shape:
        return gradient
    added = gradient.ndim - len(shape)
    repeated = tuple(added + axis for axis, size in enumerate(shape) if size == 1)
    return gradient.sum(axis=tuple(range(added)) + repeated, dtype=np.float64).reshape(shape)


class Add(Function):
    """``a + b``, with broadcasting."""

    @staticmethod
    def forward(ctx: Context, a: Array, b: Array) -> Array:
        return _broadcast(ctx, np.add, a, b)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return tuple(_unbroadcast(gradient, shape) for shape in ctx.shapes)


class Multiply(Function):
    """``a * b``, with broadcasting."""

    @staticmethod
    def forward(ctx: Context, a: Array, b: Array) -> Array:
        ctx.save(b if ctx.needs_gradient[0] else None, a if ctx.needs_gradient[1] else None)
        return _broadcast(ctx, np.multiply, a, b)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return tuple(
            None if factor is None else _unbroadcast(gradient * factor, shape)
            for factor, shape in zip(ctx.saved, ctx.shapes, strict=True)
        )


class Divide(Function):
    """``a / b``, with broadcasting. Saves ``b`` and the result: ``b * b`` may overflow."""

    @staticmethod
    def forward(ctx: Context, a: Array, b: Array) -> Array:
        dst = _broadcast(ctx, np.divide, a, b)
        ctx.save(b, dst if ctx.needs_gradient[1] else None)
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        (b, dst), (shape_a, shape_b) = ctx.saved, ctx.shapes
        diff = gradient / b
        diff_a = _unbroadcast(diff, shape_a) if ctx.needs_gradient[0] else None
        diff_b = None if dst is None else _unbroadcast(-diff * dst, shape_b)
        return diff_a, diff_b


class Power(Function):
    """``a ** exponent``, for a plain number as exponent."""

    @staticmethod
    def forward(ctx: Context, a: Array, exponent: float) -> Array:
        if not isinstance(exponent, numbers.Real):
            raise TypeError(f"power: exponent must be a number, not {type(exponent).__name__}")
        ctx.save(a)
        # Plain: NumPy's float64 would make float64 of float32.
        ctx.exponent = exponent.item() if isinstance(exponent, np.generic) else exponent
        powers: Array = a**ctx.exponent
        return powers

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        (a,) = ctx.saved
        # The exponent 0 has the derivative 0 everywhere, also at a = 0, where a**-1 is not finite.
        return (gradient * (ctx.exponent * a ** (ctx.exponent - 1 if ctx.exponent else 1)),)


class Exp(Function):
    """e to the power of ``a``."""

    @staticmethod
    def forward(ctx: Context, a: Array) -> Array:
        dst = np.exp(a)
        ctx.save(dst)
        return dst

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        (dst,) = ctx.saved
        return (gradient * dst,)


class Log(Function):
    """Natural logarithm of ``a``."""

    @staticmethod
    def forward(ctx: Context, a: Array) -> Array:
        ctx.save(a)
        return np.log(a)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        (a,) = ctx.saved
        return (gradient / a,)


class Sum(Function):
    """Sum in float64 over some axes; backward repeats the gradient along them."""

    @staticmethod
    def forward(ctx: Context, a: Array, axis: Axis, keepdims: bool) -> Array:
        dst = a.sum(axis=axis, keepdims=True, dtype=np.float64).astype(a.dtype)
        ctx.src_shape, ctx.kept_shape = a.shape, dst.shape
        return dst if keepdims else dst.squeeze(axis)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return (np.broadcast_to(gradient.reshape(ctx.kept_shape), ctx.src_shape),)


class Reshape(Function):
    """The same elements in another shape."""

    @staticmethod
    def forward(ctx: Context, a: Array, shape: tuple[int, ...]) -> Array:
        ctx.src_shape = a.shape
        return a.reshape(shape)

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        return (gradient.reshape(ctx.src_shape),)


class Slice(Function):
    """``a[index]`` for integers, slices, ... and None; backward puts zeros around the gradient."""

    @staticmethod
    def forward(ctx: Context, a: Array, index: Any) -> Array:
        for part in index if isinstance(index, tuple) else (index,):
            if not isinstance(part, numbers.Integral | slice | EllipsisType | None):
                raise TypeError(f"index: use integers, slices, ... and None, not {part!r}")
        ctx.src_shape, ctx.index = a.shape, index
        return a[index]

    @staticmethod
    def backward(ctx: Context, gradient: Array) -> Gradients:
        diff = np.zeros(ctx.src_shape, gradient.dtype)
        diff[ctx.index] = gradient
        return (diff,)
