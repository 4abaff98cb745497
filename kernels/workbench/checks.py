"""Calls a student's function on many convolutions, and says what is wrong with the first wrong result.

A few cases with a name come first, from easy to hard, so that the first failure is the easiest to understand;
then hypothesis draws cases, and shrinks one that fails.
"""

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kernels.base.arguments import Array
from kernels.workbench import diagnosis
from kernels.workbench.cases import Arrays, Case, arrays, call, convolutions, right, takes, wrong


class Failure(Exception):  # noqa: N818 - it is a verdict, not an error of the program
    """What is wrong with a kernel, in a few lines."""


def check(
    function: Callable[..., Any], name: str = "forward", examples: int = 60, kernels: Any = None
) -> None:
    """Compare a function with the definition in float64; Failure says what is wrong.

    Parameters
    ----------
    function : callable
        A pass of a convolution, with the arguments of `kernels.ladder.shapes.Rung`; ``bias``, ``stride`` and
        ``padding`` are tried if the function has such arguments.
    name : {"forward", "backward_data", "backward_weights"}
    examples : int
        Cases that hypothesis draws, beside the named ones.
    kernels : strategy, optional
        Kernel sizes that the function is made for: 1 to 3 along each axis if not given.
    """
    fresh = np.random.SeedSequence().generate_state(1)[0].item()  # no result of an earlier check is right
    sizes = st.sampled_from([1, 2, 3]) if kernels is None else kernels
    for case in _named(sizes, fresh):
        _check_case(function, name, case)
        if "bias" in takes(function):
            _check_case(function, name, case._replace(bias=True))

    @settings(
        max_examples=examples,
        deadline=None,  # the first call compiles
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(convolutions(frozenset(takes(function)), sizes))
    def drawn(case: Case) -> None:
        _check_case(function, name, case._replace(seed=case.seed ^ fresh))

    drawn()


def _named(sizes: Any, seed: int) -> Iterator[Case]:
    """Yield cases from easy to hard, of kernels that the function is made for."""
    K = 3 if _draws(sizes, 3) else 1
    shapes = (
        ((1, 4, 4, 4, 1), 1),  # one channel
        ((1, 5, 5, 5, 16), 16),  # one block
        ((1, 3, 4, 6, 16), 32),  # unequal sizes
        ((2, 4, 3, 5, 16), 16),  # two images
        ((1, 4, 4, 4, 20), 5),  # tails
        ((1, 1, 1, 1, 3), 2),  # one voxel
    )
    for number, (src_shape, OC) in enumerate(shapes):
        yield Case(src_shape, (OC, src_shape[-1], K, K, K), seed=seed + number)


def _draws(sizes: Any, value: int) -> bool:
    elements = getattr(sizes, "elements", None)
    return elements is None or value in elements


def _check_case(function: Callable[..., Any], name: str, case: Case) -> None:
    """Raise Failure if the function is wrong on a case."""
    inputs = arrays(case)
    expected = right(name, case, inputs)
    found = _result(function, name, case, inputs, expected)
    again = arrays(case._replace(seed=case.seed + 1))
    for kind, given_arrays in (("other data", again), ("normal numbers", arrays(case, "normal"))):
        if not wrong(found, expected).any():
            inputs, expected = given_arrays, right(name, case, given_arrays)
            found = _result(function, name, case, inputs, expected)
            if wrong(found, expected).any() and kind == "other data":
                first = right(name, case, arrays(case))
                if not wrong(found, first).any():
                    raise Failure(
                        f"{name}: a second call with other data returns the result of the first call; "
                        "every call must compute"
                    )
    if wrong(found, expected).any():
        raise Failure(_words(function, name, case, inputs, found, expected))


def _result(function: Callable[..., Any], name: str, case: Case, inputs: Arrays, expected: Array) -> Array:
    """Call the function; Failure if it raises, changes its inputs, or returns no such array."""
    before = [None if array is None else array.copy() for array in inputs]
    try:
        result = call(function, name, case, inputs)
    except Failure:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}, line {place.lineno}"
        text = " ".join(str(error).split())[:300]
        raise Failure(f"{name}: raises {type(error).__name__} ({where}): {text}\n  on {case}") from None
    for given_name, now, then in zip(inputs._fields, inputs, before, strict=True):
        if now is not None and then is not None and not np.array_equal(now, then):
            raise Failure(
                f"{name}: changes its input {given_name}; write to an array of your own\n  on {case}"
            )
    if name == "backward_weights" and isinstance(result, tuple):
        result = result[0]
    if result is None:
        raise Failure(f"{name}: returns nothing; is the return statement missing?")
    if not isinstance(result, np.ndarray):
        raise Failure(f"{name}: returns {type(result).__name__}; expected an array of shape {expected.shape}")
    if result.shape != expected.shape:
        raise Failure(f"{name}: returns shape {result.shape}; expected {expected.shape}\n  on {case}")
    if result.dtype != np.float32:
        raise Failure(f"{name}: returns {result.dtype}; expected float32, as its inputs are")
    return result.copy()


def _words(
    function: Callable[..., Any], name: str, case: Case, inputs: Arrays, found: Array, expected: Array
) -> str:
    """Say where a result is wrong, what the voxel reads, and the likely mistake."""
    bad = wrong(found, expected)
    at = tuple(np.argwhere(bad)[0].tolist())
    made = {"forward": "dst", "backward_data": "diff_src", "backward_weights": "diff_weights"}[name]
    lines = [
        f"{name}: wrong on {case}",
        f"  first wrong number: {made}{list(at)} is {found[at]:g}, expected {expected[at]:g}; "
        f"{bad.sum()} of {bad.size} are wrong",
    ]
    if name != "backward_weights":
        lines.append(f"  {diagnosis.reads(name, case, at)}")

    def run(other: Case, given_arrays: Arrays) -> Array:
        return _result(function, name, other, given_arrays, right(name, other, given_arrays))

    lines.append(f"  likely: {diagnosis.likely(name, case, inputs, found, expected, run)}")
    return "\n".join(lines)
