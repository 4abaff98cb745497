"""Calls a student's function on many convolutions, and says what is wrong with the first wrong result.

A few trials come first, from easy to hard, so that the first failure is the easiest to understand; then
hypothesis draws trials, and shrinks one that fails.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from kernels.base.arguments import Array
from kernels.workbench import diagnosis
from kernels.workbench.trials import (
    Arrays,
    Trial,
    arrays,
    call,
    convolutions,
    first_array,
    right,
    takes,
    wrong,
)

Pass = Callable[..., Any]


class Failure(Exception):  # noqa: N818 - it is a verdict, not an error of the program
    """What is wrong with a kernel, in a few lines."""


def check(
    function: Pass, name: str = "forward", examples: int = 60, kernels: Sequence[int] = (1, 2, 3)
) -> None:
    """Compare a function with the definition in float64; Failure says what is wrong.

    Parameters
    ----------
    function : callable
        A pass of a convolution, with the arguments of `kernels.ladder.shapes.Rung`; ``bias``, ``stride`` and
        ``padding`` are tried if the function has such arguments.
    name : {"forward", "backward_data", "backward_weights"}
    examples : int
        Trials that hypothesis draws, beside the first few.
    kernels : sequence of int
        Sizes of a kernel along an axis that the function is made for.
    """
    fresh = np.random.SeedSequence().generate_state(1)[0].item()  # no result of an earlier check is right
    optional = frozenset(takes(function))
    for trial in _first_trials(3 if 3 in kernels else kernels[0]):
        trial = trial._replace(seed=trial.seed + fresh, name=name)
        _check_trial(function, trial)
        if "bias" in optional:
            _check_trial(function, trial._replace(bias=True))

    @settings(
        max_examples=examples,
        deadline=None,  # the first call compiles
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(convolutions(optional, kernels, name=name))
    def drawn(trial: Trial) -> None:
        _check_trial(function, trial._replace(seed=trial.seed ^ fresh))

    drawn()


def _first_trials(K: int) -> Iterator[Trial]:
    """Yield trials from easy to hard."""
    shapes = (
        ((1, 4, 4, 4, 1), 1),  # one channel
        ((1, 5, 5, 5, 16), 16),  # one block
        ((1, 3, 4, 6, 16), 32),  # unequal sizes
        ((2, 4, 3, 5, 16), 16),  # two images
        ((1, 4, 4, 4, 20), 5),  # tails
        ((1, 1, 1, 1, 3), 2),  # one voxel
    )
    for seed, (src_shape, OC) in enumerate(shapes):
        yield Trial(src_shape, (OC, src_shape[-1], K, K, K), seed=seed)


def _check_trial(function: Pass, trial: Trial) -> None:
    """Raise Failure if the function is wrong: on whole numbers, on others, on normal numbers."""
    first = None
    other = trial._replace(seed=trial.seed + 1)
    for inputs in (arrays(trial), arrays(other), arrays(trial, "normal")):
        expected, found = right(trial, inputs), _result(function, trial, inputs)
        if wrong(found, expected).any():
            if first is not None and not wrong(found, first).any():
                text = "a second call with other data returns the result of the first call"
                raise Failure(f"{trial.name}: {text}; every call must compute")
            raise Failure(_words(function, trial, inputs, found, expected))
        first = expected if first is None else first


def _result(function: Pass, trial: Trial, inputs: Arrays) -> Array:
    """Call the function; Failure if it raises, changes its inputs, or returns no such array."""
    run = partial(call, function, trial, inputs)
    result = called(trial.name, run, inputs._asdict(), f"\n  on {trial}")
    if trial.name == "backward_weights":
        result = first_array(result)
    return array_of(trial.name, result, trial.result[1], f"\n  on {trial}")


def place_of(error: BaseException) -> str:
    """Return the file and line that raised an error; "in the call" if it is ours, which calls a function."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    if Path(place.filename).parent.name == "workbench":
        return "in the call"
    return f"{Path(place.filename).name}, line {place.lineno}"


def called(name: str, run: Callable[[], Any], inputs: Mapping[str, Array | None], on: str = "") -> Any:
    """Call a student's function; Failure if it raises, or changes its inputs. ``on`` ends the message."""
    before = {role: None if array is None else array.copy() for role, array in inputs.items()}
    try:
        with np.errstate(all="ignore"):  # what is wrong is said below, in words
            result = run()
    except Failure:
        raise
    except NotImplementedError:
        raise Failure("the stub is still empty: replace the line that raises NotImplementedError") from None
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise Failure(f"{name}: raises {type(error).__name__} ({place_of(error)}): {text}{on}") from None
    for role, then in before.items():
        if then is not None and not np.array_equal(np.asarray(inputs[role]), then):
            raise Failure(f"{name}: changes its input {role}; write to an array of your own{on}")
    return result


def array_of(name: str, result: Any, shape: tuple[int, ...], on: str = "") -> Array:
    """Return a copy of what a student's function has returned; Failure if it is no float32 of a shape."""
    if result is None:
        raise Failure(f"{name}: returns nothing; is the return statement missing?")
    if not isinstance(result, np.ndarray):
        raise Failure(f"{name}: returns {type(result).__name__}; expected an array of shape {shape}")
    if result.shape != shape:
        raise Failure(f"{name}: returns shape {result.shape}; expected {shape}{on}")
    if result.dtype != np.float32:
        raise Failure(f"{name}: returns {result.dtype}; expected float32, as its inputs are")
    return result.copy()


def _words(function: Pass, trial: Trial, inputs: Arrays, found: Array, expected: Array) -> str:
    """Say where a result is wrong, what the voxel reads, and the likely mistake."""
    bad, made = wrong(found, expected), trial.result[0]
    at = tuple(np.argwhere(bad)[0].tolist())
    lines = [
        f"{trial.name}: wrong on {trial}",
        f"  first wrong number: {made}{list(at)} is {found[at]:g}, expected {expected[at]:g}; "
        f"{bad.sum()} of {bad.size} are wrong",
    ]
    if trial.name != "backward_weights":
        lines.append(f"  {diagnosis.reads(trial, at)}")

    def run(trial: Trial, given: Arrays) -> Array:
        return _result(function, trial, given)

    lines.append(f"  likely: {diagnosis.likely(diagnosis.Wrong(trial, inputs, found, expected, run))}")
    return "\n".join(lines)
