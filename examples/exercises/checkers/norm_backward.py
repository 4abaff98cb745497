"""Backward of batch norm."""

from types import ModuleType
from typing import Any

import numpy as np

from examples.exercises.frame import Case, Race, function_of, judge, race, random
from kernels.workbench.verdict import Failure

_FIRST_ROWS = 8


def _norm_gradients(diff: Any, src: Any, scale: Any, epsilon: float) -> tuple[Any, Any, Any, dict[str, Any]]:
    diff, src, scale = (np.asarray(a, np.float64) for a in (diff, src, scale))
    rstd = 1 / np.sqrt(src.var(0) + epsilon)
    x = (src - src.mean(0)) * rstd
    of_mean, of_variance = diff.mean(0), x * (diff * x).mean(0)
    mistakes = {
        "mean and variance pass no gradient": scale * rstd * diff,
        "the mean passes no gradient": scale * rstd * (diff - of_variance),
        "the variance passes no gradient": scale * rstd * (diff - of_mean),
        "the scale is missing": rstd * (diff - of_mean - of_variance),
        "N is the number of rows: it differs from call to call": scale
        * rstd
        * (diff - (of_mean + of_variance) * len(src) / _FIRST_ROWS),
    }
    return scale * rstd * (diff - of_mean - of_variance), (diff * x).sum(0), diff.sum(0), mistakes


def _with_ddof(diff: Any, src: Any, _: Any, epsilon: float) -> Any:
    with np.errstate(all="ignore"):
        variance = src.var(0) * len(src) / np.float64(len(src) - 1)
    return (diff * (src - src.mean(0)) / np.sqrt(variance + epsilon)).sum(0)


def check(module: ModuleType) -> None:
    """Check the three gradients, the simplest first."""
    function = function_of(module, "backward")
    parts = ("diff_src", "diff_scale", "diff_shift")
    cases: list[list[Case]] = [[], [], []]
    for N, C in ((_FIRST_ROWS, 16), (_FIRST_ROWS, 16), (5, 3), (1, 2), (64, 1)):
        arguments = random(N, C), 2 * random(N, C) + 3, random(C), 1e-2
        *answers, mistakes = _norm_gradients(*arguments)
        for part, answer in enumerate(answers):
            label = f"{parts[part]}, {N} rows of {C} channels"
            bound = 1e-4 * (1 + float(np.abs(answer).max()))
            known = mistakes if part == 0 else {"gradients are added over rows, not averaged": answer / N}
            if part == 1:
                known["the unscaled src is taken, not x"] = (arguments[0] * arguments[1]).sum(0)
                known["the variance divides by N, not by N - 1"] = _with_ddof(*arguments)
            cases[part].append(Case(label, arguments, answer, bound, known))
    for part in (2, 1, 0):

        def run(*arguments: Any, part: int = part) -> Any:
            found = function(*arguments)
            if found is None:
                return None
            if not isinstance(found, tuple | list) or len(found) != 3:
                raise Failure(f"returns {type(found).__name__}; expected diff_src, diff_scale and diff_shift")
            return found[part]

        judge(run, cases[part])


def compete(module: ModuleType) -> Race:
    """Compare with the checker, which computes in float64."""
    fresh = lambda: (random(20000, 16), random(20000, 16), random(16), 1e-3)  # noqa: E731
    theirs = lambda *arguments: _norm_gradients(*arguments)[:3]  # noqa: E731
    return race("of the speed of the checker, in float64", module.backward, theirs, fresh, 1)
