"""Checks a whole operator: forward against its definition, backward against finite differences, in float64.

A file names the operator, ``operator = "elu"``, or defines it: a function ``operator(src, ...)`` of float64
arrays, see `kernels.workbench.definitions`. It defines ``forward(src, ...)``, and may define
``backward(diff_dst, src, ...)``, which returns the gradient of each input, as a tuple if there are several.
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kernels.base.arguments import Array
from kernels.workbench import diagnosis
from kernels.workbench.definitions import (
    DEFINITIONS,
    Definition,
    gradients,
    parameters,
    usual_mistakes,
    usual_results,
)
from kernels.workbench.trials import BOUND
from kernels.workbench.verdict import Failure, array_of, called

_MOST = 160  # numbers of a drawn volume: each is moved for the differences
_NEAR = 0.05  # no number of a volume is nearer to 0, where many operators have a kink
_LARGE, _OFFSET = 90.0, 300.0
_OFFSET_BOUND = 3e-4  # float32 has 3e-5 of 300 left
_CHANNELS = st.sampled_from([1, 2, 3, 5, 15, 16, 17, 33])


class Operator(NamedTuple):
    """A student's operator and its definition."""

    name: str
    definition: Definition
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None


class Trial(NamedTuple):
    """A volume for an operator."""

    shape: tuple[int, ...]  # MB, D, H, W, C
    kind: str = "normal"  # or "large", "offset", "equal"
    seed: int = 0

    def __str__(self) -> str:
        MB, D, H, W, C = self.shape
        words = {"normal": "", "large": ", numbers near -90 and 90", "offset": ", numbers near 300"}
        plural = "s" * (MB > 1)
        return f"{MB} image{plural} of {D} x {H} x {W} voxels, {C} channels{words.get(self.kind, '')}"

    def arrays(self, vectors: int) -> tuple[list[Array], Array]:
        """Return the inputs, a volume and vectors, and the gradient of the result: float32."""
        random = np.random.default_rng(self.seed)
        if self.kind == "equal":
            one = random.standard_normal() + 2
            return self._filled(one, vectors), np.full(self.shape, one, np.float32)
        src = random.standard_normal(self.shape)
        src += np.copysign(_LARGE if self.kind == "large" else _NEAR, src)
        src += _OFFSET * (self.kind == "offset")
        each = [random.uniform(0.5, 1.5, self.shape[-1]).astype(np.float32) for _ in range(vectors)]
        return [src.astype(np.float32), *each], random.standard_normal(self.shape).astype(np.float32)

    def _filled(self, number: float, vectors: int) -> list[Array]:
        return [
            np.full(self.shape, number, np.float32),
            *[np.ones(self.shape[-1], np.float32) for _ in range(vectors)],
        ]


def operator_of(module: ModuleType) -> Operator:
    """Return the operator of a student's file; Failure if it names none that is known, or has no forward."""
    named = module.operator
    if isinstance(named, str) and named not in DEFINITIONS:
        known = ", ".join(DEFINITIONS)
        raise Failure(
            f"{module.__file__}: operator = {named!r} is not known; expected {known}, "
            "or a function of float64 arrays"
        )
    definition = DEFINITIONS[named] if isinstance(named, str) else named
    if not callable(definition):
        raise Failure(f"{module.__file__}: operator is {type(named).__name__}; expected a name or a function")
    forward, backward = getattr(module, "forward", None), getattr(module, "backward", None)
    if not callable(forward):
        raise Failure(f"{module.__file__}: defines no forward; expected forward({_list(definition)})")
    name = "your operator" if definition is named else definition.__name__
    return Operator(name, definition, forward, backward if callable(backward) else None)


def _list(definition: Definition) -> str:
    return ", ".join(parameters(definition))


def check(operator: Operator, examples: int = 25) -> None:
    """Compare an operator with its definition, on fresh data; Failure says what is wrong."""
    fresh = np.random.SeedSequence().generate_state(1)[0].item()
    earlier: list[Array] = []
    shapes = (
        (1, 2, 2, 2, 3),  # a few channels
        (1, 2, 1, 3, 16),  # one block
        (1, 2, 1, 3, 16),  # other numbers of the same shape
        (2, 1, 2, 2, 16),  # two images
        (1, 1, 2, 3, 20),  # a tail
        (1, 1, 1, 1, 3),  # one voxel
    )
    for seed, shape in enumerate(shapes):
        _check_trial(operator, Trial(shape, "normal", seed + fresh), earlier)
    for kind in ("large", "offset"):
        _check_trial(operator, Trial((2, 2, 2, 2, 5), kind, fresh), earlier)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data())
    def drawn(data: Any) -> None:
        MB, C = data.draw(st.integers(1, 2)), data.draw(_CHANNELS)
        sizes = [data.draw(st.integers(1, 4)) for _ in range(3)]
        while MB * np.prod(sizes) * C > _MOST and max(sizes) > 1:
            sizes[int(np.argmax(sizes))] -= 1
        seed = data.draw(st.integers(0, 2**32)) ^ fresh
        _check_trial(operator, Trial((MB, *sizes, C), "normal", seed), earlier)

    drawn()


class _Results(NamedTuple):
    """What a function is to return, and how it is called."""

    name: str  # "forward" or "backward"
    inputs: dict[str, Array]
    expected: dict[str, Array]  # by what it is: dst, or the gradient of each input

    def run(self, function: Callable[..., Any], on: str) -> dict[str, Array]:
        """Call the function; Failure if it returns no such arrays."""
        found = called(self.name, lambda: function(*self.inputs.values()), self.inputs, on)
        if len(self.expected) == 1:
            found = found[0] if isinstance(found, tuple | list) and len(found) == 1 else found
            (role,) = self.expected
            return {role: array_of(self.name, found, self.expected[role].shape, on)}
        if not isinstance(found, tuple | list) or len(found) != len(self.expected):
            returned = "nothing" if found is None else type(found).__name__
            raise Failure(f"{self.name}: returns {returned}; expected {', '.join(self.expected)}{on}")
        return {
            role: array_of(f"{self.name}, {role}", array, self.expected[role].shape, on)
            for role, array in zip(self.expected, found, strict=True)
        }


def _wanted(operator: Operator, trial: Trial) -> Iterator[tuple[Callable[..., Any], _Results]]:
    """Yield forward, then backward, with what each is to return."""
    names = parameters(operator.definition)
    arrays, diff_dst = trial.arrays(len(names) - 1)
    exact = [array.astype(np.float64) for array in arrays]
    given = dict(zip(names, arrays, strict=True))
    yield operator.forward, _Results("forward", given, {"dst": operator.definition(*exact)})
    if operator.backward is not None:
        found = gradients(operator.definition, exact, diff_dst.astype(np.float64))
        wanted = {f"diff_{name}": gradient for name, gradient in zip(names, found, strict=True)}
        yield operator.backward, _Results("backward", {"diff_dst": diff_dst, **given}, wanted)


def _check_trial(operator: Operator, trial: Trial, earlier: list[Array]) -> None:
    on = f"\n  on {trial}"
    for function, results in _wanted(operator, trial):
        found = results.run(function, on)
        for role, expected in reversed(results.expected.items()):  # src last: it needs the others
            bad = wrong(found[role], expected, trial)
            if bad.any():
                at = tuple(np.argwhere(bad)[0].tolist())
                likely = _likely(operator, trial, function, results, role, found[role], earlier)
                raise Failure(
                    f"{results.name} of {operator.name}: wrong on {trial}\n  first wrong number: "
                    f"{role}{list(at)} is {found[role][at]:g}, expected {expected[at]:g}; {bad.sum()} of "
                    f"{bad.size} are wrong{_source(results, at)}\n  likely: {likely}"
                )
        earlier += results.expected.values()


def _source(results: _Results, at: tuple[int, ...]) -> str:
    src = next(array for role, array in results.inputs.items() if role != "diff_dst")
    return f", where src is {src[at]:g}" if len(at) == src.ndim else ""


def wrong(found: Array, expected: Array, trial: Trial) -> Array:
    """Return where a result is wrong."""
    bound = _OFFSET_BOUND if trial.kind == "offset" else BOUND
    return ~(np.abs(found - expected) <= bound * max(np.abs(expected).max(initial=0), 1.0))


# ---- the likely mistake ------------------------------------------------------------------------------------


def _likely(
    operator: Operator,
    trial: Trial,
    function: Callable[..., Any],
    results: _Results,
    role: str,
    found: Array,
    earlier: Sequence[Array],
) -> str:
    expected = results.expected[role]
    if not np.isfinite(found).all() and trial.kind == "large":
        return "exp of a large number is infinite; infinity times 0, or divided by itself, is NaN"
    tests: tuple[Callable[[], str], ...] = (
        lambda: diagnosis.not_finite(found),
        lambda: diagnosis.unsure(found, lambda: results.run(function, "")[role]),
        lambda: _kept(found, earlier),
        lambda: _of_large_numbers(trial),
        lambda: _tail(operator, trial, results.name),
        lambda: _usual(operator, results, role, found),
        lambda: diagnosis.nothing(found) if expected.any() else "",
        lambda: diagnosis.scaled(found, expected),
        lambda: _another(operator, results, found),
        lambda: _side(results, found, expected),
        lambda: _one_image(found, expected),
        lambda: diagnosis.small(found, expected),
        lambda: _equal(operator, trial, results.name),
    )
    unknown = "no known mistake looks like this; try one voxel and one channel first"
    return next((words for test in tests if (words := test())), unknown)


def _kept(found: Array, earlier: Sequence[Array]) -> str:
    if any(old.any() and diagnosis.same(found, old) for old in earlier):
        return "the result of an earlier call is kept and returned again; every call must compute"
    return ""


def _of_large_numbers(trial: Trial) -> str:
    if trial.kind != "offset":
        return ""
    return (
        "digits are lost where numbers are large: mean(x^2) - mean^2 is a small difference of large numbers"
    )


def _usual(operator: Operator, results: _Results, role: str, found: Array) -> str:
    """Compare a result or a gradient with those that usual mistakes give."""
    if results.name == "forward":
        arrays = [array.astype(np.float64) for array in results.inputs.values()]
        with np.errstate(all="ignore"):
            usual = usual_results(operator.name, arrays)
        alike = {words: value for words, value in usual.items() if diagnosis.same(found, value)}
        return min(alike, key=lambda words: float(np.abs(found - alike[words]).max()), default="")
    diff_dst, *arrays = (array.astype(np.float64) for array in results.inputs.values())
    place = [*results.expected].index(role)
    made = usual_mistakes(operator.name, arrays, diff_dst)
    ones = gradients(operator.definition, arrays, np.ones_like(diff_dst))
    made |= {"diff_dst is not multiplied in: this is the derivative alone": ones}
    made |= {"diff_dst is passed on as it came": [diff_dst if place == 0 else None] * len(arrays)}
    for words, values in made.items():
        if values[place] is not None and diagnosis.same(found, values[place]):
            return words
    return ""


def _another(operator: Operator, results: _Results, found: Array) -> str:
    """Compare with the results of other operators."""
    arrays = [a.astype(np.float64) for role, a in results.inputs.items() if role != "diff_dst"]
    for name, definition in DEFINITIONS.items():
        if name == operator.name or len(parameters(definition)) != len(arrays):
            continue
        if results.name == "forward":
            value = definition(*arrays)
        else:
            value = gradients(definition, arrays, results.inputs["diff_dst"].astype(np.float64))[0]
        if diagnosis.same(found, value):
            return f"this is {results.name} of {name}"
    return ""


def _right_elsewhere(operator: Operator, trial: Trial, name: str) -> bool:
    try:
        for function, results in _wanted(operator, trial):
            if results.name == name:
                found = results.run(function, "")
                return not any(wrong(found[r], e, trial).any() for r, e in results.expected.items())
    except Exception:  # a Failure on other shapes says nothing of this one
        return False
    return False


def _tail(operator: Operator, trial: Trial, name: str) -> str:
    *size, C = trial.shape
    for lanes in (16, 8, 4):
        whole = trial._replace(shape=(*size, -(-C // lanes) * lanes))
        if C % lanes and _right_elsewhere(operator, whole, name):
            return f"right where channels are a multiple of {lanes}, wrong here: the tail"
    return ""


def _equal(operator: Operator, trial: Trial, name: str) -> str:
    if _right_elsewhere(operator, trial._replace(kind="equal"), name):
        return "right only where all elements are equal: numbers come in the wrong order"
    return ""


def _side(results: _Results, found: Array, expected: Array) -> str:
    src = results.inputs.get("src", next(iter(results.inputs.values())))
    if src.shape != found.shape:
        return ""
    bad = ~np.isclose(found, expected, rtol=1e-4, atol=1e-5)
    for words, side in (("negative", src < 0), ("positive", src > 0)):
        if bad.any() and side.any() and not side.all() and not bad[~side].any():
            return f"wrong only where src is {words}"
    return ""


def _one_image(found: Array, expected: Array) -> str:
    if found.ndim != 5 or len(found) == 1:
        return ""
    right = [n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if diagnosis.same(a, b)]
    return f"right for image {right[0]} only: the other images are not reached" if right else ""
