"""What all exercises share: cases with an answer, a verdict in words, stubs made from solutions, progress."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from kernels.ladder import naive
from kernels.workbench import student
from kernels.workbench.verdict import Failure, place_of

SOLUTIONS = Path(__file__).parent / "solutions"
_BEGIN, _END = "# <answer>", "# </answer>"
NAIVE = naive.forward  # taken now: the guard replaces it while the student's file runs
_RACE_SECONDS, _RACE_ROUNDS = 0.2, 4


class Exercise(NamedTuple):
    """An exercise: what it asks, what to read first, hints that open one by one, and how it is judged."""

    name: str
    title: str
    read: str  # what to know
    hints: tuple[str, ...]
    check: Callable[[ModuleType], None]  # raises Failure
    compete: Callable[[ModuleType], "Race"]  # times a right answer
    runs_nets: bool = False  # whether the checker itself runs the library's convolutions

    @property
    def solution(self) -> Path:
        """The file that the stub is made of."""
        return SOLUTIONS / f"{self.name}.py"

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[ModuleType]:
        """Load a student's file; inside the block, the library's convolutions refuse to run."""
        with contextlib.nullcontext() if self.runs_nets else student.guarded():
            yield student.load_own(path)


class Race(NamedTuple):
    """A ratio on this machine, and the ratio to reach: larger is better."""

    what: str
    ratio: float
    goal: float

    def text(self) -> str:
        """Return the result in words."""
        end = "reached" if self.ratio >= self.goal else "not yet reached"
        return f"{self.what}: {self.ratio:.3g} times; {self.goal:g} to reach: {end}"


def stub(solution: Path) -> str:
    """Return a solution without its answers: each becomes ``raise NotImplementedError``.

    Functions of the answer's own, which are not indented, leave nothing behind.
    """
    lines, kept, inside = [], solution.read_text().splitlines(), False
    for line in kept:
        if line.strip() == _BEGIN:
            indent = line[: len(line) - len(line.lstrip())]
            if indent:
                lines.append(f'{indent}raise NotImplementedError("your turn")')
            inside = True
        elif line.strip() == _END:
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


class Case(NamedTuple):
    """A call and its answer.

    ``mistakes`` are wrong answers that the usual errors give, by what is then said.
    """

    label: str
    arguments: tuple[Any, ...]
    answer: Any
    bound: float  # absolute error, from float64
    mistakes: Mapping[str, Any] = {}


def function_of(module: ModuleType, name: str) -> Callable[..., Any]:
    """Return a function of the student's file; Failure if it is not there."""
    found = getattr(module, name, None)
    if not callable(found):
        raise Failure(f"{module.__file__}: defines no {name}; expected the function of the stub")
    return found


def judge(function: Callable[..., Any], cases: Sequence[Case]) -> None:
    """Call a function on all cases; Failure says what is wrong with the first wrong answer, and why."""
    right: list[Case] = []
    for case in cases:
        found = call(function, case)
        if reason := _wrong(found, case):
            raise Failure(f"{case.label}: {reason}{_why(found, case, right)}")
        right.append(case)


def call(function: Callable[..., Any], case: Case) -> Any:
    """Call the student's function on copies, so that it cannot change the case; Failure for its errors."""
    copies = [np.array(a) if isinstance(a, np.ndarray) else a for a in case.arguments]
    try:
        with np.errstate(all="ignore"):  # what is wrong is said in words
            return function(*copies)
    except Failure:
        raise
    except NotImplementedError:
        raise Failure("the stub is still empty: replace the line that raises NotImplementedError") from None
    except Exception as error:
        words = f"{type(error).__name__} in {place_of(error)}: {error}"
        raise Failure(f"{case.label}: {words}") from None


def _wrong(found: Any, case: Case) -> str:
    """Return what is wrong with an answer, or nothing."""
    if found is None:
        return "returns None; expected an answer"
    try:
        array, answer = np.asarray(found, np.float64), np.asarray(case.answer, np.float64)
    except (TypeError, ValueError):
        return f"returns a {type(found).__name__}; expected numbers of shape {np.shape(case.answer)}"
    if array.shape != answer.shape:
        return f"returns shape {array.shape}; expected {answer.shape}"
    if not np.isfinite(array).all():
        return "returns NaN or infinity"
    error = np.abs(array - answer)
    if error.max(initial=0) <= case.bound:
        return ""
    at = tuple(int(i) for i in np.unravel_index(int((error > case.bound).argmax()), error.shape))
    place = f"[{', '.join(map(str, at))}]" if at else "the answer"
    return f"{place} is {array[at]:.6g}; expected {answer[at]:.6g}"


def _why(found: Any, case: Case, right: Sequence[Case]) -> str:
    """Return the likely mistake in words, as well as it can be told."""
    try:
        array = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        return ""
    answer = np.asarray(case.answer, np.float64)
    for words, value in case.mistakes.items():
        if array.shape == np.shape(value) and np.allclose(array, value, atol=case.bound):
            return f". Likely: {words}"
    if any(array.shape == np.shape(r.answer) and np.allclose(array, r.answer, atol=r.bound) for r in right):
        return ". Likely: the answer to an earlier call is kept and returned again"
    if array.shape == answer.shape and np.isfinite(array).all():
        factor = float((array * answer).sum() / max((answer**2).sum(), 1e-300))
        if 0.5 < abs(factor) < 2 and factor != 1 and np.allclose(array, factor * answer, atol=2 * case.bound):
            return f". Likely: a factor is wrong, all numbers are {factor:.5g} times what they should be"
    if right and all("equal" in r.label for r in right):
        return ". Likely: it is right only where all elements are equal: they come in the wrong order"
    if right and "multiple" in right[-1].label and "multiple" not in case.label:
        return ". Likely: it is right only for multiples of 16: mind the rest"
    return ""


def race(
    what: str,
    mine: Callable[..., Any],
    theirs: Callable[..., Any],
    fresh: Callable[[], tuple[Any, ...]],
    goal: float,
    answer: Callable[..., Any] | None = None,
) -> Race:
    """Time two functions in turn, each round on fresh arguments; the ratio is theirs / mine, of the fastest.

    ``answer`` says what ``mine`` must return (as ``theirs`` if None). Failure if a timed result is wrong, so
    that nothing kept from an earlier call helps. The first round compiles, and does not count.
    """
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + _RACE_SECONDS
    while len(times[0]) < _RACE_ROUNDS or (time.perf_counter() < end and len(times[0]) < 100):
        arguments = fresh()
        results = []
        for function, found in zip((theirs, mine), times, strict=True):
            start = time.perf_counter()
            results.append(function(*arguments))
            found.append(time.perf_counter() - start)
        expected = results[0] if answer is None else answer(*arguments)
        if not _agree(results[1], expected):
            raise Failure("the result of a timed run is wrong; every call must compute")
    return Race(what, min(times[0][1:]) / min(times[1][1:]), goal)


def _agree(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple | list):
        alike = isinstance(found, tuple | list) and len(found) == len(expected)
        return alike and all(map(_agree, found, expected))
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    bound = 1e-4 * max(np.abs(expected).max(initial=0), 1e-30)
    return found.shape == expected.shape and bool((np.abs(found - expected) <= bound).all())


def random(*shape: int) -> Any:
    """Return fresh normal numbers in float32."""
    return np.random.default_rng().standard_normal(shape).astype(np.float32)


def bound_of(*arrays: Any, terms: int = 1) -> float:
    """Return the error that float32 may make in a sum of so many products of these arrays."""
    size = math.prod(float(np.abs(a).max(initial=1e-30)) for a in arrays)
    return 8 * 2.0**-24 * size * max(1, terms)


class Progress:
    """What a student has solved, in one file of the student's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.json"
        try:
            self.content: dict[str, Any] = json.loads(self.path.read_text())
        except FileNotFoundError:
            self.content = {}
        except (OSError, ValueError) as error:
            raise Failure(f"{self.path}: cannot be read ({error}); mend it, or move it away") from None

    def note(self, key: str, **entries: Any) -> None:
        """Keep entries, and write the file whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.content.setdefault(key, {}).update(entries)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=2) + "\n")
        os.replace(new, self.path)

    def hints(self, name: str) -> int:
        """Return how many hints have been opened."""
        return int(self.content.get(name, {}).get("hints", 0))
