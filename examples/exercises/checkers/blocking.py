"""Blocks of 16 channels, there and back."""

from types import ModuleType
from typing import Any

import numpy as np

from examples.exercises.frame import Case, Race, function_of, judge, race, random


def _blocked(src: Any) -> Any:
    D, H, W, C = src.shape
    padded = np.zeros((D, H, W, -(-C // 16) * 16), src.dtype)
    padded[..., :C] = src
    return np.ascontiguousarray(padded.reshape(D, H, W, -1, 16).transpose(3, 0, 1, 2, 4))


def check(module: ModuleType) -> None:
    """Check both directions."""
    to_blocked, from_blocked = (function_of(module, name) for name in ("to_blocked", "from_blocked"))
    shapes = ((2, 3, 4, 16), (1, 1, 1, 32), (2, 3, 4, 16), (2, 3, 2, 5), (1, 2, 3, 33))
    sources = [random(*shape) for shape in shapes]
    there, back = [], []
    for src in sources:
        answer = _blocked(src)
        interleaved = np.zeros_like(answer)
        blocks, C = len(answer), src.shape[3]
        for c in range(C):
            interleaved[c % blocks, ..., c // blocks] = src[..., c]
        first = answer.copy()
        first[1:] = 0
        mistakes = {
            "neighbouring channels must lie in one block": interleaved,
            "only the first block is filled": first,
        }
        label = f"{C} channels" if C % 16 else f"{C} channels, a multiple of 16"
        there.append(Case(label, (src,), answer, 0.0, mistakes))
        back.append(Case(f"back, {label}", (answer, C), src, 0.0))
    judge(to_blocked, there)
    judge(from_blocked, back)


def compete(module: ModuleType) -> Race:
    """Compare with a copy."""
    fresh = lambda: (random(32, 32, 32, 48),)  # noqa: E731
    return race("of the speed of a copy", module.to_blocked, np.copy, fresh, 0.1, _blocked)
