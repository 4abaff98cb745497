"""The likely mistake behind a wrong convolution.

Each test asks whether a wrong result is what a known mistake gives, from sure signs (NaN) to vague ones.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from kernels.base.arguments import Array
from kernels.workbench.cases import Arrays, Case, arrays, right, wrong

Run = Callable[[Case, Arrays], Array]


def reads(name: str, case: Case, at: tuple[int, ...]) -> str:
    """Say which voxels a voxel of the result reads, and how many taps lie outside."""
    g = case.geometry
    if name == "backward_data":
        size, before, stride, source = g.out, g.adjoint_before, (1, 1, 1), "diff_dst"
    else:
        size, before, stride, source = g.src_shape[1:4], g.before, g.stride, "src"
    first = [a * s - b for a, s, b in zip(at[1:4], stride, before, strict=True)]
    inside = [sum(0 <= f + k < n for k in range(K)) for f, K, n in zip(first, g.kernel, size, strict=True)]
    ranges = ", ".join(f"{f}:{f + k}" for f, k in zip(first, g.kernel, strict=True))
    outside = g.taps - int(np.prod(inside))
    halo = f", of which {outside} of {g.taps} taps lie outside and count 0" if outside else ", all inside"
    return f"it reads {source}[{at[0]}, {ranges}, :]{halo}"


def likely(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    """Return the likely mistake in words."""
    bad = wrong(found, expected)
    tests = (
        *(_not_finite, _unsure, _tail, _no_bias, _nothing),
        *(_scaled, _other_convolution, _shifted, _some_images),
    )
    for test in tests:
        if words := test(name, case, given, found, expected, run):
            return words
    equal = arrays(case, "equal")
    if name == "forward" and (words := _border(case, bad)):
        return words
    if not wrong(run(case, equal), right(name, case, equal)).any():
        return "right only where all elements of an array are equal: an index is wrong"
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if error < 0.02:
        return (
            f"the largest error is {error:.1e} of the largest number, too much for rounding in float32 (1e-6)"
        )
    return "no known mistake looks like this; try one voxel, one channel and a kernel of 1 first"


def _not_finite(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    if np.isfinite(found).all():
        return ""
    return "NaN or infinite: memory of np.empty that was never written, or a sum that began with it"


def _unsure(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    if np.array_equal(run(case, given), found):
        return ""
    return "the same call gives another result: it depends on what was in dst (or in memory) before"


def _nothing(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    return "" if found.any() else "all zero: is the loop entered, and the sum stored?"


def _scaled(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    factor = float(np.vdot(found, expected) / (np.vdot(expected, expected) or 1.0))
    if expected.size > 1 and factor and abs(factor - 1) > 1e-5 and not wrong(found, factor * expected).any():
        return f"every number is {factor:.6g} times what it should be: something is counted twice, or scaled"
    return ""


def _other_convolution(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    """Compare with the convolutions of changed weights."""
    if name == "backward_weights":
        made = {"kernel reversed": expected[:, :, ::-1, ::-1, ::-1]}
        made |= {f"axes of the kernel in the order {order}": value for order, value in _orders(expected)}
        return next((words for words, value in made.items() if _same(found, value)), "")
    for words, weights in _changed(given.weights, name):
        if weights.shape == given.weights.shape:
            value = right(name, case, given._replace(weights=np.ascontiguousarray(weights)))
            if _same(found, value):
                return words
    return ""


def _changed(weights: Array, name: str) -> Iterator[tuple[str, Array]]:
    words = "kernel not reversed" if name == "backward_data" else "kernel reversed"
    yield f"{words}: tap k meets voxel o + k - before in forward", weights[:, :, ::-1, ::-1, ::-1]
    for axis, letter in enumerate("DHW"):
        yield f"kernel reversed along {letter}", np.flip(weights, 2 + axis)
    for order, value in _orders(weights):
        yield f"axes of the kernel mixed up: they are taken in the order {order}", value
    if weights.shape[0] == weights.shape[1]:
        yield "input and output channels of the weights are exchanged", weights.swapaxes(0, 1)
    middle = np.zeros_like(weights)
    kernel = tuple(k // 2 for k in weights.shape[2:])
    middle[:, :, *kernel] = weights[:, :, *kernel]
    yield "only the middle tap of the kernel counts", middle
    for axis, letter in enumerate("DHW"):
        for side, at in (("first", 0), ("last", -1)):
            less = weights.copy()
            np.moveaxis(less, 2 + axis, 0)[at] = 0
            yield f"the {side} tap along {letter} is missing: a loop or a halo ends one too early", less


def _orders(weights: Array) -> Iterator[tuple[str, Array]]:
    for order in itertools.permutations(range(3)):
        if order != (0, 1, 2):
            yield ", ".join("DHW"[axis] for axis in order), weights.transpose(0, 1, *(2 + a for a in order))


def _same(found: Array, value: Array) -> bool:
    return value.shape == found.shape and not wrong(found, value).any()


def _shifted(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    """Compare the inside with the result one voxel further along one axis or more."""
    first = 2 if name == "backward_weights" else 1
    steps = sorted(itertools.product((0, 1, -1), repeat=3), key=np.count_nonzero)[1:]
    for step in steps:
        moved = np.roll(expected, step, (first, first + 1, first + 2))
        cut = [slice(1, -1) if by else slice(None) for by in step]
        inside = (*(slice(None),) * first, *cut)
        if moved[inside].any() and _same(found[inside], moved[inside]):
            letters = ", ".join(letter for letter, by in zip("DHW", step, strict=True) if by)
            return (
                f"shifted by one voxel along {letters}: the halo (zeros before the first voxel) is off by one"
            )
    return ""


def _no_bias(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    if given.bias is None or name != "forward":
        return ""
    if _same(found, expected - given.bias):
        return "the bias is missing"
    return "the bias is added more than once" if _same(found, expected + given.bias) else ""


def _some_images(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    if name == "backward_weights" or len(expected) == 1:
        return ""
    right_images = [n for n in range(len(expected)) if not wrong(found[n], expected[n]).any()]
    if right_images:
        return f"right for image {right_images[0]} only: the other images of the batch are not reached"
    return ""


def _tail(name: str, case: Case, given: Arrays, found: Array, expected: Array, run: Run) -> str:
    """Ask whether whole blocks of channels are right."""
    OC, IC, *kernel = case.weights_shape
    if IC % 16 == OC % 16 == 0:
        return ""
    for lanes in (16, 8, 4):
        ic, oc = (-(-c // lanes) * lanes for c in (IC, OC))
        if (ic, oc) == (IC, OC):
            continue
        whole = case._replace(src_shape=(*case.src_shape[:4], ic), weights_shape=(oc, ic, *kernel))
        inputs = arrays(whole)
        try:
            if _same(run(whole, inputs), right(name, whole, inputs)):
                return f"right where channels are a multiple of {lanes}, wrong here: the tail"
        except Exception:  # a Failure on other shapes says nothing of a tail
            continue
    return ""


def _border(case: Case, bad: Array) -> str:
    """Ask whether all wrong voxels have taps outside."""
    g = case.geometry
    inside = np.ones(bad.shape[1:4], bool)
    for axis in range(3):
        first = np.arange(g.out[axis]) * g.stride[axis] - g.before[axis]
        fits = (first >= 0) & (first + g.kernel[axis] <= g.src_shape[1 + axis])
        inside &= fits.reshape([-1 if a == axis else 1 for a in range(3)])
    if inside.any() and not bad[:, inside].any():
        return "wrong only at borders: the halo is not zero, or taps outside the volume are read"
    return ""
