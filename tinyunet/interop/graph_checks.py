"""Checks that readers of graphs share: what a layer of the U-Net may be."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyunet.interop.recognition import Layer

Array = NDArray[Any]


def demand(name: str, is_right: bool, found: object, expected: str) -> None:
    """Raise ValueError unless a layer is as the U-Net has it."""
    if not is_right:
        raise ValueError(f"{name[:60]!a}: {str(found)[:80]}; expected {expected}")


def volume(name: str, weights: Array) -> Array:
    """Return a kernel with a depth: (OC, IC, KH, KW) -> (OC, IC, 1, KH, KW)."""
    demand(name, weights.ndim in (4, 5), f"a kernel of shape {weights.shape}", "two or three dimensions")
    return weights if weights.ndim == 5 else weights[:, :, np.newaxis]


def convolution(name: str, source: str, weights: Array, bias: Array | None, up: bool = False) -> Layer:
    """Return a convolution or, from kernels (IC, OC, ...), a transposed one."""
    sides = set(weights.shape[2:])
    demand(
        name,
        sides in (({2},) if up else ({1}, {3})),
        f"a kernel of {weights.shape[2:]}",
        "2" if up else "3 or 1",
    )
    channels = weights.shape[1 if up else 0]
    if bias is None:
        bias = np.zeros(channels, np.float32)
    demand(name, bias.shape == (channels,), f"a bias of shape {bias.shape}", f"({channels},)")
    return Layer("up" if up else "conv", (source,), {"weights": volume(name, weights), "bias": bias})


def all_equal(values: Sequence[Any] | None, wanted: int) -> bool:
    """Whether all entries, if there are any, are one number."""
    return all(value == wanted for value in values or ())


def type_of_groups(name: str, groups: int, channels: int) -> str:
    """Return the norm of so many groups: "instance", "group", or "either" if these are the same here."""
    usual = math.gcd(8, channels)
    if groups in (-1, channels):
        return "either" if channels == usual else "instance"
    demand(name, groups == usual, f"{groups} groups", f"{usual}, or one a channel")
    return "group"
