"""What all exercises share: cases with an answer, a verdict in words, stubs made from solutions, progress."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from kernels.workbench.verdict import Failure, place_of

SOLUTIONS = Path(__file__).parent / "solutions"
_BEGIN, _END = "# <answer>", "# </answer>"


class Exercise(NamedTuple):
    """An exercise: what it asks, what to read first, hints that open one by one, and how it is judged."""

    name: str
    title: str
    read: str  # what to know
    hints: tuple[str, ...]
    check: Callable[[ModuleType], None]  # raises Failure
    race: Callable[[ModuleType], "Race"]

    @property
    def solution(self) -> Path:
        """The file that the stub is made of."""
        return SOLUTIONS / f"{self.name}.py"


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
    """Return a solution without its answers: each becomes ``raise NotImplementedError``."""
    lines, kept, inside = [], solution.read_text().splitlines(), False
    for line in kept:
        if line.strip() == _BEGIN:
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f'{indent}raise NotImplementedError("your turn")')
            inside = True
        elif line.strip() == _END:
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines) + "\n"


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
    if right and "16" in right[-1].label and "16" not in case.label:
        return ". Likely: it is right only for multiples of 16: mind the rest"
    return ""


def seconds(run: Callable[[], object], least: float = 0.1) -> float:
    """Return the fastest of some runs, after one that compiles."""
    run()
    times, end = [], time.perf_counter() + least
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


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


def title_of(text: str) -> str:
    """Return the first sentence of a docstring."""
    return re.split(r"(?<=\.)\s", text.strip(), maxsplit=1)[0]
