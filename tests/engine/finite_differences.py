"""Gradient check: what backward says against what a small step does, in float64."""

from collections.abc import Callable

import numpy as np

from tinyunet import Tensor

STEPS = 1e-5, 1e-6, 1e-7


def check_gradients(
    function: Callable[..., Tensor],
    *arrays: np.ndarray,
    seed: int = 0,
    directions: int = 2,
    tolerance: float = 2e-5,
) -> None:
    """Compare the derivatives of ``function`` with central differences.

    The result is weighted with a random cotangent w to a number s = <function(x), w>. Along a
    random direction v, s(x + h v) - s(x - h v) = 2 h <gradient, v> + O(h^3). Each array is moved
    alone, so that a small gradient cannot hide behind a large one.

    A gradient g that is wrong by a factor 1.001 gives a difference of 0.001 |<g, v>|, about
    0.001 |g|; allowed is ``tolerance * |g|``, and rounding / h on top. If that fails, a shorter step
    is tried: it passes a kink (of a ReLU in the middle of a net, say) that lies within the longer
    one; a wrong gradient is wrong for all of them. Also checked: the arrays are not changed, and
    neither is what backward starts from.
    """
    generator = np.random.default_rng(seed)
    originals = [array.copy() for array in arrays]
    tensors = [Tensor(array, requires_grad=True) for array in arrays]
    result = function(*tensors)
    assert result.dtype == np.float64
    cotangent = generator.standard_normal(result.shape)
    before = cotangent.copy()
    result.backward(cotangent)
    np.testing.assert_array_equal(cotangent, before)

    def weighted(index: int, moved: np.ndarray) -> float:
        inputs = [Tensor(moved if i == index else array) for i, array in enumerate(arrays)]
        return float(np.sum(function(*inputs).data * before))

    rounding = 1e-14 * np.sum(np.abs(result.data * before))
    for index, (tensor, array) in enumerate(zip(tensors, arrays, strict=True)):
        assert tensor.grad is not None
        assert tensor.grad.shape == array.shape
        for _ in range(directions):
            v = generator.standard_normal(array.shape)
            found, tried = np.sum(tensor.grad * v), []
            for h in STEPS:
                change = weighted(index, array + h * v) - weighted(index, array - h * v)
                tried.append(change / (2 * h))
                allowed = tolerance * np.linalg.norm(tensor.grad) + rounding / h
                if abs(found - tried[-1]) <= allowed:  # False for NaN
                    break
            else:
                raise AssertionError(f"input {index}: backward gives {found}, differences {tried}")
    for array, original in zip(arrays, originals, strict=True):
        np.testing.assert_array_equal(array, original)


def distinct(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Numbers at least 1 / size apart from each other and from 0: far from the kinks."""
    size = int(np.prod(shape))
    values = (np.arange(size) - size // 2 + 0.5) * (2 / size)
    return generator.permutation(values).reshape(shape)
