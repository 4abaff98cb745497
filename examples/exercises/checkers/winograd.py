"""Winograd by hand: products are counted, and errors measured."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from examples.exercises.frame import Case, Race, bound_of, function_of, judge, random
from kernels.ladder import cook_toom
from kernels.workbench.verdict import Failure


class _Number:
    """A number that counts products of data and taps."""

    products = 0

    def __init__(self, value: float, made_of: frozenset[str]) -> None:
        self.value, self.made_of = value, made_of

    def _with(self, other: Any, value: float) -> "_Number":
        return _Number(value, self.made_of | (other.made_of if isinstance(other, _Number) else frozenset()))

    def __mul__(self, other: Any) -> "_Number":
        if isinstance(other, _Number):
            _Number.products += 1
        return self._with(other, self.value * _value(other))

    def __add__(self, other: Any) -> "_Number":
        return self._with(other, self.value + _value(other))

    def __sub__(self, other: Any) -> "_Number":
        return self._with(other, self.value - _value(other))

    def __rsub__(self, other: Any) -> "_Number":
        return self._with(other, _value(other) - self.value)

    def __truediv__(self, other: Any) -> "_Number":
        return self * (1 / _value(other))

    def __neg__(self) -> "_Number":
        return self * -1.0

    __rmul__, __radd__ = __mul__, __add__


def _value(number: Any) -> float:
    return float(number.value if isinstance(number, _Number) else number)


def _numbers(values: Any, kind: str) -> list[_Number]:
    return [_Number(float(value), frozenset({kind})) for value in values]


def _counted(function: Callable[..., Any], outputs: int, most: int) -> Callable[..., Any]:
    def run(src: Any, taps: Any) -> Any:
        _Number.products = 0
        found = function(_numbers(src, "src"), _numbers(taps, "taps"))
        if _Number.products > most:
            raise Failure(f"{_Number.products} products of data and taps; expected {most} at most")
        if found is None:
            return None
        return [_value(number) for number in found]

    return run


def check(module: ModuleType) -> None:
    """Check both filters and their products, then the two measures of rounding."""
    for name, outputs, most in (("f23", 2, 4), ("f43", 4, 6)):
        cases = []
        equal = ("all elements equal", np.ones(outputs + 2), np.ones(3))
        fresh = [(f"{name}, random numbers", random(outputs + 2), random(3)) for _ in range(3)]
        for label, src, taps in (equal, *fresh):
            src, taps = src.astype(np.float64), taps.astype(np.float64)
            mistakes = {"the taps are reversed": np.convolve(src, taps, "valid")}
            answer = np.correlate(src, taps, "valid")
            cases.append(Case(label, (src, taps), answer, bound_of(src, taps, terms=3) * 1e-3, mistakes))
        judge(_counted(function_of(module, name), outputs, most), cases)
    judge(function_of(module, "rounding"), [*_rounding_cases()])
    judge(function_of(module, "growth"), [*_growth_cases()])


def _definition(src: Any, taps: Any) -> list[Any]:
    return [sum(src[i + k] * taps[k] for k in range(3)) for i in range(len(src) - 2)]


def _off_by(error: float) -> Callable[..., Any]:
    """Return a filter of which some results are wrong in float32."""

    def run(src: Any, taps: Any) -> list[Any]:
        first, second, *rest = _definition(src, taps)
        if np.asarray(src).dtype == np.float32:
            second = second + np.float32(error) * (second > 0)
        return [first, second, *rest]

    return run


def _rounding_cases() -> Iterator[Case]:
    for label, function in (
        ("rounding, a filter with wrong results", _off_by(0.5)),
        ("rounding, the definition", _definition),
        ("rounding, other wrong results", _off_by(0.25)),
    ):
        src, taps = random(6, 40).astype(np.float64), random(3, 40).astype(np.float64)
        exact = np.array(function(src, taps))
        found = np.array(function(src.astype(np.float32), taps.astype(np.float32)), np.float64)
        error, size = np.abs(found - exact), np.abs(exact).max()
        mistakes = {
            "both runs are in float64: there is no rounding": 0.0,
            "the largest error counts, not the mean": error.mean() / size,
            "errors are not divided by the largest result": error.max(),
            "each error is divided by its own result": (error / np.abs(exact)).max(),
        }
        yield Case(label, (function, src, taps), error.max() / size, 1e-6 * error.max() / size, mistakes)


def _growth_cases() -> Iterator[Case]:
    kinds = cook_toom.INPUT, cook_toom.WEIGHTS, cook_toom.OUTPUT
    drawn = np.random.default_rng()  # first: of these no two mistakes give the same number
    matrices = {"drawn matrices": [drawn.standard_normal(shape) for shape in ((5, 5), (5, 3), (3, 5))]}
    matrices["three taps, by the definition"] = [np.eye(3), np.eye(3), np.ones((1, 3))]
    for m in (2, 4):
        matrices[f"F({m}, 3)"] = [np.array(cook_toom.matrix(kind, m), np.float64) for kind in kinds]
    for label, (inputs, weights, outputs) in matrices.items():
        d, g = np.abs(inputs).sum(1), np.abs(weights).sum(1)
        answer = (np.abs(outputs) @ (d * g)).max()
        mistakes = {
            "signs are kept: rounding errors do not cancel": (np.abs(outputs) @ (inputs.sum(1) * g)).max(),
            "signs of taps are kept: rounding errors do not cancel": (
                np.abs(outputs) @ (d * weights.sum(1))
            ).max(),
            "signs of results are kept: rounding errors do not cancel": (outputs @ (d * g)).max(),
            "the worst result counts, not the sum of all": (np.abs(outputs) @ (d * g)).sum(),
            "the transform of the taps is missing": (np.abs(outputs) @ d).max(),
            "the transform of the data is missing": (np.abs(outputs) @ g).max(),
            "the transform back is missing": (d * g).max(),
        }
        yield Case(f"growth, {label}", (inputs, weights, outputs), answer, 1e-9 * answer, mistakes)


def compete(module: ModuleType) -> Race:
    """Count the products of F(4, 3), and say what it costs in exactness."""
    _Number.products = 0
    module.f43(_numbers(random(6), "src"), _numbers(random(3), "taps"))
    taps = random(3, 1000).astype(np.float64)
    small, large = (
        module.rounding(function, random(n, 1000).astype(np.float64), taps)
        for function, n in ((module.f23, 4), (module.f43, 6))
    )
    what = (
        f"fewer products than the definition in F(4, 3), whose error is {large / small:.2g} times F(2, 3)'s"
    )
    return Race(what, 12 / max(_Number.products, 1), 2)
