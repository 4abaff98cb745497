"""Tools to test operators and kernels of your own with, from any folder.

`check_gradients` compares backward with finite differences. `volumes` and `convolutions` are strategies of
hypothesis that draw shapes. The first call of a kernel compiles it, which takes longer than the 0.2 s that
hypothesis allows a test: put `without_deadline` above ``given``::

    from hypothesis import given
    from tinyunet import functional, testing

    @testing.without_deadline
    @given(testing.volumes())
    def test_elu(shape):
        x = testing.distinct(shape, np.random.default_rng(0))
        testing.check_gradients(functional.elu, x)
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st

from kernels.workbench.trials import convolutions as convolutions
from tinyunet.autograd import Tensor

#: Settings for a test that may compile kernels.
without_deadline = settings(deadline=None)
_STEPS = 1e-5, 1e-6, 1e-7
_CHANNELS = st.sampled_from([1, 2, 3, 5, 15, 16, 17, 20, 32, 33])


@st.composite
def volumes(draw: Any, most: int = 7, channels: Any = _CHANNELS) -> tuple[int, int, int, int, int]:
    """Draw a shape (MB, D, H, W, C): 1 to 2 images, 1 to ``most`` voxels along each axis, tails of channels.

    ``channels`` is a strategy for C.
    """
    D, H, W = (draw(st.integers(1, most)) for _ in range(3))
    return draw(st.integers(1, 2)), D, H, W, draw(channels)


def check_gradients(
    function: Callable[..., Tensor],
    *arrays: npt.NDArray[np.float64],
    seed: int = 0,
    directions: int = 2,
    tolerance: float = 2e-5,
) -> None:
    """Compare the derivatives of a function with central differences, in float64.

    The result is weighted with a random cotangent w to a number s = <function(x), w>. Along a random
    direction v, s(x + h v) - s(x - h v) = 2 h <gradient, v> + O(h^3). Each array is moved alone, so that a
    small gradient cannot hide behind a large one.

    A gradient g that is wrong by a factor 1.001 gives a difference of ``0.001 |<g, v>|``, about
    ``0.001 |g|``; allowed is ``tolerance * |g|``, and rounding / h on top. If that fails, a shorter step is
    tried: it passes a kink (of a ReLU in the middle of a net, say) that lies within the longer step; a wrong
    gradient is wrong for all of them. Also checked: neither the arrays nor the cotangent are changed.

    Parameters
    ----------
    function : callable
        Takes a Tensor for each array, returns a Tensor of float64.
    *arrays : float64 arrays
        The point at which to check, away from kinks: see `distinct`.
    seed : int
        Of cotangent and directions.
    directions : int
        How many directions are tried for each array.
    tolerance : float

    Raises
    ------
    AssertionError
        A gradient is missing, has another shape or is wrong, or backward changes what it is given.
    """
    generator = np.random.default_rng(seed)
    originals = [array.copy() for array in arrays]
    tensors = [Tensor(array, requires_grad=True) for array in arrays]
    result = function(*tensors)
    if result.dtype != np.float64:
        raise AssertionError(f"the result is {result.dtype}; expected float64, as the arrays are")
    cotangent = generator.standard_normal(result.shape)
    before = cotangent.copy()
    result.backward(cotangent)
    np.testing.assert_array_equal(cotangent, before, "backward changed the gradient that it was given")

    def weighted(index: int, moved: npt.NDArray[np.float64]) -> float:
        inputs = [Tensor(moved if i == index else array) for i, array in enumerate(arrays)]
        return float(np.sum(function(*inputs).data * before))

    rounding = 1e-14 * np.sum(np.abs(result.data * before))
    for index, (tensor, array) in enumerate(zip(tensors, arrays, strict=True)):
        if tensor.grad is None or tensor.grad.shape != array.shape:
            found = "no gradient" if tensor.grad is None else f"a gradient of shape {tensor.grad.shape}"
            raise AssertionError(f"input {index}: {found}; expected one of shape {array.shape}")
        norm = np.linalg.norm(tensor.grad)
        for _ in range(directions):
            v = generator.standard_normal(array.shape)
            slope, tried = np.sum(tensor.grad * v), []
            for h in _STEPS:
                change = weighted(index, array + h * v) - weighted(index, array - h * v)
                tried.append(change / (2 * h))
                if abs(slope - tried[-1]) <= tolerance * norm + rounding / h:  # False for NaN
                    break
            else:
                raise AssertionError(f"input {index}: backward gives {slope}, differences {tried}")
    for index, (array, original) in enumerate(zip(arrays, originals, strict=True)):
        np.testing.assert_array_equal(array, original, f"input {index} was changed")


def distinct(shape: tuple[int, ...], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return numbers of -1 to 1 at least 1 / size away from each other and from 0: far from kinks."""
    size = int(np.prod(shape))
    values = (np.arange(size) - size // 2 + 0.5) * (2 / size)
    return generator.permutation(values).reshape(shape)
