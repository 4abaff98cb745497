"""im2col: the columns of volumes."""

from collections.abc import Iterator
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np

from examples.exercises.frame import NAIVE, Case, Race, function_of, judge, race, random


def _columns(src: Any, K: int, flip: str = "", shift: int = 0, mode: Any = "constant") -> Any:
    before = K // 2
    padded = np.pad(src, [(before + 1, before + 1)] * 3 + [(0, 0)], mode=mode)
    D, H, W, C = src.shape
    orders = [range(K - 1, -1, -1) if axis in flip else range(K) for axis in "DHW"]
    at = [(kd + 1 + shift, kh + 1 + shift, kw + 1 + shift) for kd, kh, kw in product(*orders)]
    parts = [padded[d : d + D, h : h + H, w : w + W] for d, h, w in at]
    return np.stack(parts, axis=3).reshape(D * H * W, K**3 * C)


def _cases() -> Iterator[Case]:
    for label, src, K in (
        ("one voxel", random(1, 1, 1, 2), 1),
        ("a volume of 3 x 4 x 5, 2 channels, K = 3", random(3, 4, 5, 2), 3),
        ("the same shape again", random(3, 4, 5, 2), 3),
        ("K = 5", random(3, 4, 5, 1), 5),
        ("K = 1", random(2, 3, 2, 3), 1),
    ):
        D, H, W, C = src.shape
        right = _columns(src, K)
        mistakes = {
            "the kernel is reversed": _columns(src, K, "DHW"),
            **{f"the kernel is reversed along {axis}": _columns(src, K, axis) for axis in "DHW"},
            "the halo begins one voxel too late": _columns(src, K, shift=1),
            "the halo begins one voxel too early": _columns(src, K, shift=-1),
            "the halo is not zero": _columns(src, K, mode="edge"),
            "rows must be voxels in the order d, h, w": right.reshape(D, H, W, -1)
            .transpose(2, 1, 0, 3)
            .reshape(right.shape),
            "channels come before the places of the kernel": right.reshape(-1, K**3, C)
            .transpose(0, 2, 1)
            .reshape(right.shape),
            "right only where all elements are equal: each place has the voxel itself": np.tile(
                src.reshape(-1, C), K**3
            ),
        }
        yield Case(label, (src, K), right, 0.0, mistakes)


def check(module: ModuleType) -> None:
    """Check columns of several volumes."""
    judge(function_of(module, "im2col"), [*_cases()])


def compete(module: ModuleType) -> Race:
    """Compare a convolution by way of the columns with seven loops."""

    def mine(src: Any, weights: Any) -> Any:
        matrix = weights.transpose(2, 3, 4, 1, 0).reshape(-1, 8)
        return (module.im2col(src[0], 3) @ matrix).reshape(1, 8, 12, 12, 8)

    fresh = lambda: (random(1, 8, 12, 12, 8), random(8, 8, 3, 3, 3))  # noqa: E731
    return race("faster than seven loops", mine, NAIVE, fresh, 2)
