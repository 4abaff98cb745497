"""The likely mistake behind a wrong convolution.

Each test asks whether a wrong result is what a known mistake gives, from sure signs (NaN) to vague ones.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kernels.base.arguments import Array
from kernels.workbench.trials import Arrays, Trial, arrays, right, wrong


class Wrong(NamedTuple):
    """A trial whose result is wrong."""

    trial: Trial
    given: Arrays
    found: Array
    expected: Array
    run: Callable[[Trial, Arrays], Array]  # calls the student's function


def reads(trial: Trial, at: tuple[int, ...]) -> str:
    """Say which voxels a voxel of the result reads, and how many taps lie outside."""
    g = trial.geometry
    if trial.name == "backward_data":
        size, before, stride, source = g.out, g.adjoint_before, (1, 1, 1), "diff_dst"
    else:
        size, before, stride, source = g.src_shape[1:4], g.before, g.stride, "src"
    first = [a * s - b for a, s, b in zip(at[1:4], stride, before, strict=True)]
    inside = [sum(0 <= f + k < n for k in range(K)) for f, K, n in zip(first, g.kernel, size, strict=True)]
    ranges = ", ".join(f"{f}:{f + k}" for f, k in zip(first, g.kernel, strict=True))
    outside = g.taps - int(np.prod(inside))
    halo = f", of which {outside} of {g.taps} taps lie outside and count 0" if outside else ", all inside"
    return f"it reads {source}[{at[0]}, {ranges}, :]{halo}"


def likely(w: Wrong) -> str:
    """Return the likely mistake in words."""
    tests: tuple[Callable[[Wrong], str], ...] = (
        lambda w: not_finite(w.found),
        lambda w: unsure(w.found, lambda: w.run(w.trial, w.given)),
        *(_tail, _no_bias),
        lambda w: nothing(w.found),
        lambda w: scaled(w.found, w.expected),
        *(_other_convolution, _shifted, _some_images, _some_channels, _border, _equal_elements),
        lambda w: small(w.found, w.expected),
    )
    for test in tests:
        if words := test(w):
            return words
    return "no known mistake looks like this; try one voxel, one channel and a kernel of 1 first"


def not_finite(found: Array) -> str:
    """Say that a result has NaN or infinity, if it has."""
    if np.isfinite(found).all():
        return ""
    return "NaN or infinite: memory of np.empty that was never written, or a sum that began with it"


def unsure(found: Array, again: Callable[[], Array]) -> str:
    """Say that the same call gives another result, if it does."""
    if np.array_equal(again(), found):
        return ""
    return "the same call gives another result: it depends on what was in dst (or in memory) before"


def nothing(found: Array) -> str:
    """Say that a result is all zero, if it is."""
    return "" if found.any() else "all zero: is the loop entered, and the sum stored?"


def scaled(found: Array, expected: Array) -> str:
    """Say by which factor all numbers are wrong, if they are."""
    factor = float(np.vdot(found, expected) / (np.vdot(expected, expected) or 1.0))
    if expected.size > 1 and factor and abs(factor - 1) > 1e-5 and same(found, factor * expected):
        return f"every number is {factor:.6g} times what it should be: something is counted twice, or scaled"
    return ""


def small(found: Array, expected: Array) -> str:
    """Say how large the error is, if it is small."""
    error = np.abs(found - expected).max() / np.abs(expected).max()
    words = f"the largest error is {error:.1e} of the largest number"
    return f"{words}, too much for rounding in float32 (1e-6)" if error < 0.02 else ""


def same(found: Array, value: Array) -> bool:
    """Return whether two results are equal up to rounding."""
    return value.shape == found.shape and not wrong(found, value).any()


def _equal_elements(w: Wrong) -> str:
    equal = arrays(w.trial, "equal")
    if same(w.run(w.trial, equal), right(w.trial, equal)):
        return "right only where all elements of an array are equal: an index is wrong"
    return ""


def _other_convolution(w: Wrong) -> str:
    """Compare with the convolutions of changed weights."""
    if w.trial.name == "backward_weights":
        made = {"kernel reversed": w.expected[:, :, ::-1, ::-1, ::-1]}
        made |= {f"axes of the kernel in the order {order}": value for order, value in _orders(w.expected)}
        return next((words for words, value in made.items() if same(w.found, value)), "")
    for words, weights in _changed(w.given.weights, w.trial.name):
        if weights.shape == w.given.weights.shape:
            value = right(w.trial, w.given._replace(weights=np.ascontiguousarray(weights)))
            if same(w.found, value):
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
    last = np.zeros_like(weights)
    last[:, :, -1, -1, -1] = weights[:, :, -1, -1, -1]
    yield "only the last tap of the kernel counts: each tap overwrites the sum of those before", last
    for axis, letter in enumerate("DHW"):
        for side, at in (("first", 0), ("last", -1)):
            less = weights.copy()
            np.moveaxis(less, 2 + axis, 0)[at] = 0
            yield f"the {side} tap along {letter} is missing: a loop or a halo ends one too early", less


def _orders(weights: Array) -> Iterator[tuple[str, Array]]:
    for order in itertools.permutations(range(3)):
        if order != (0, 1, 2):
            yield ", ".join("DHW"[axis] for axis in order), weights.transpose(0, 1, *(2 + a for a in order))


def _shifted(w: Wrong) -> str:
    """Compare the inside with the result one voxel further along one axis or more."""
    first = 2 if w.trial.name == "backward_weights" else 1
    steps = sorted(itertools.product((0, 1, -1), repeat=3), key=np.count_nonzero)[1:]
    for step in steps:
        moved = np.roll(w.expected, step, (first, first + 1, first + 2))
        cut = [slice(1, -1) if by else slice(None) for by in step]
        inside = (*(slice(None),) * first, *cut)
        if moved[inside].any() and same(w.found[inside], moved[inside]):
            along = ", ".join(letter for letter, by in zip("DHW", step, strict=True) if by)
            return (
                f"shifted by one voxel along {along}: the halo (zeros before the first voxel) is off by one"
            )
    return ""


def _no_bias(w: Wrong) -> str:
    bias = w.given.bias
    if bias is None or w.trial.name != "forward":
        return ""
    if same(w.found, w.expected - bias):
        return "the bias is missing"
    return "the bias is added more than once" if same(w.found, w.expected + bias) else ""


def _some_images(w: Wrong) -> str:
    if w.trial.name == "backward_weights" or len(w.expected) == 1:
        return ""
    right_images = [n for n, (a, b) in enumerate(zip(w.found, w.expected, strict=True)) if same(a, b)]
    if right_images:
        return f"right for image {right_images[0]} only: the other images of the batch are not reached"
    return ""


def _some_channels(w: Wrong) -> str:
    if w.trial.name == "backward_weights":
        return ""
    bad = wrong(w.found, w.expected).any((0, 1, 2, 3))
    if bad.all():
        return ""
    which, plural = ", ".join(map(str, np.flatnonzero(bad))), "s" * int(bad.sum() > 1)
    return f"wrong only in channel{plural} {which} of the result, right in all others"


def _tail(w: Wrong) -> str:
    """Ask whether whole blocks of channels are right."""
    OC, IC, *kernel = w.trial.weights_shape
    for lanes in (16, 8, 4):
        ic, oc = (-(-c // lanes) * lanes for c in (IC, OC))
        if (ic, oc) == (IC, OC):
            continue
        whole = w.trial._replace(src_shape=(*w.trial.src_shape[:4], ic), weights_shape=(oc, ic, *kernel))
        inputs = arrays(whole)
        try:
            if same(w.run(whole, inputs), right(whole, inputs)):
                return f"right where channels are a multiple of {lanes}, wrong here: the tail"
        except Exception:  # a Failure on other shapes says nothing of a tail
            continue
    return ""


def _border(w: Wrong) -> str:
    """Ask whether all wrong voxels of a forward pass have taps outside."""
    if w.trial.name != "forward":
        return ""
    g, bad = w.trial.geometry, wrong(w.found, w.expected)
    inside = np.ones(g.out, bool)
    for axis in range(3):
        first = np.arange(g.out[axis]) * g.stride[axis] - g.before[axis]
        fits = (first >= 0) & (first + g.kernel[axis] <= g.src_shape[1 + axis])
        inside &= fits.reshape([-1 if a == axis else 1 for a in range(3)])
    if inside.any() and not bad[:, inside].any():
        return "wrong only at borders: the halo is not zero, or taps outside the volume are read"
    return ""
