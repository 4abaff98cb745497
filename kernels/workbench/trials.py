"""Convolutions to check with: shapes that hypothesis draws, arrays for them, and the right results.

Arrays hold whole numbers from -4 to 4, which float32 adds and multiplies exactly, or normal numbers. A result
is right if it is within `BOUND` of the same sums in float64.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from kernels.base.arguments import Array, Triple
from kernels.ladder import im2col
from kernels.ladder.shapes import Geometry, geometry

#: Largest error of a float32 kernel, of the largest number expected: Winograd's F(4, 4, 4) has 8e-6.
BOUND = 3e-5
PASSES = ("forward", "backward_data", "backward_weights")
# Taken now: while the student's kernel runs, the guard replaces the functions of the module.
_RIGHT: dict[str, Callable[..., Any]] = {name: getattr(im2col, name) for name in PASSES}


class Trial(NamedTuple):
    """One pass of one convolution."""

    src_shape: tuple[int, ...]  # MB, D, H, W, IC
    weights_shape: tuple[int, ...]  # OC, IC, KD, KH, KW
    bias: bool = False
    stride: int | Triple = 1
    padding: str = "same"
    seed: int = 0
    name: str = "forward"  # of the pass, one of PASSES

    @property
    def geometry(self) -> Geometry:
        """All sizes."""
        return geometry(self.src_shape, self.weights_shape, self.stride, self.padding)

    @property
    def result(self) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the array that the pass makes."""
        return {
            "forward": ("dst", self.geometry.dst_shape),
            "backward_data": ("diff_src", self.src_shape),
            "backward_weights": ("diff_weights", self.weights_shape),
        }[self.name]

    def __str__(self) -> str:
        MB, *size, IC = self.src_shape
        OC, _, *kernel = self.weights_shape
        words = f"{MB} image{'s' * (MB > 1)} of {_by(size)} voxels, {IC} -> {OC} channels, "
        words += f"kernel {_by(kernel)}" + f", stride {self.stride}" * (self.stride != 1)
        return words + ", padding valid" * (self.padding == "valid") + ", with a bias" * self.bias


class Arrays(NamedTuple):
    """The inputs of a trial."""

    src: Array
    weights: Array
    bias: Array | None
    diff_dst: Array

    def astype(self, dtype: Any) -> "Arrays":
        """Return copies of another type."""
        return Arrays(*(None if array is None else array.astype(dtype) for array in self))  # type: ignore[arg-type]


def _by(sizes: Any) -> str:
    return " x ".join(map(str, sizes))


def arrays(trial: Trial, kind: str = "integers") -> Arrays:
    """Return fresh float32 inputs: "integers" from -4 to 4, "normal" numbers, or all "equal" in an array.

    No integer is 0: a product with 0 would be right whatever the index.
    """
    random = np.random.default_rng(trial.seed)

    def one(*shape: int) -> Array:
        if kind == "normal":
            return random.standard_normal(shape, np.float32)
        size = () if kind == "equal" else shape
        drawn = random.integers(1, 5, size) * random.choice((-1, 1), size)
        return np.broadcast_to(drawn, shape).astype(np.float32)

    bias = one(trial.weights_shape[0]) if trial.bias else None
    return Arrays(one(*trial.src_shape), one(*trial.weights_shape), bias, one(*trial.geometry.dst_shape))


def right(trial: Trial, given: Arrays) -> Array:
    """Return the result of a pass in float64: dst, diff_src or diff_weights."""
    return np.asarray(first_array(call(_RIGHT[trial.name], trial, given.astype(np.float64))))


def first_array(result: Any) -> Any:
    """Return what a pass makes, without the gradient of the bias behind it."""
    return result[0] if isinstance(result, tuple) else result


def call(function: Callable[..., Any], trial: Trial, given: Arrays) -> Any:
    """Call a pass with the arguments that it takes; ``bias``, ``stride`` and ``padding`` are optional."""
    required = {
        "forward": (given.src, given.weights),
        "backward_data": (given.diff_dst, given.weights, trial.src_shape),
        "backward_weights": (given.src, given.diff_dst, trial.weights_shape[2:]),
    }[trial.name]
    optional = {"bias": given.bias, "stride": trial.stride, "padding": trial.padding}
    known = takes(function)
    return function(*required, **{key: value for key, value in optional.items() if key in known})


def wrong(found: Array, expected: Array) -> Array:
    """Return where a result is wrong: beyond the bound, or NaN."""
    return ~(np.abs(found - expected) <= BOUND * max(np.abs(expected).max(initial=0), 1e-3))


def takes(function: Callable[..., Any]) -> set[str]:
    """Return which of the optional arguments a function has."""
    try:
        names = inspect.signature(getattr(function, "py_func", function)).parameters
    except (TypeError, ValueError):
        return set()
    return {"bias", "stride", "padding"} & set(names)


_CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 15, 16, 17, 20, 31, 32, 33])


@st.composite
def convolutions(
    draw: Any,
    optional: frozenset[str] = frozenset(),
    kernels: Sequence[int] = (1, 2, 3),
    most: int = 7,
    name: str = "forward",
) -> Trial:
    """Draw a convolution: odd sizes, one voxel, tails of channels, a batch; ``most`` voxels along an axis.

    ``optional`` are the arguments of the function beside the arrays: "bias", "stride", "padding".
    ``kernels`` are the sizes along each axis, ``name`` is the pass.
    """
    sizes = [draw(st.integers(1, most)) for _ in range(3)]
    kernel = [draw(st.sampled_from(kernels)) for _ in range(3)]
    MB, IC, OC = draw(st.integers(1, 2)), draw(_CHANNELS), draw(_CHANNELS)
    stride = tuple(draw(st.integers(1, 2)) for _ in range(3)) if "stride" in optional else 1
    fits = all(k <= size for k, size in zip(kernel, sizes, strict=True))
    padding = draw(st.sampled_from(["same", "valid"])) if "padding" in optional and fits else "same"
    bias = "bias" in optional and draw(st.booleans())
    seed = draw(st.integers(0, 2**32 - 1))
    return Trial((MB, *sizes, IC), (OC, IC, *kernel), bias, stride, padding, seed, name)
