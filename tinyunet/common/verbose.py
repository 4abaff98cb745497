"""``TINYUNET_VERBOSE=1``: a line on stderr for each operator and kernel that runs.

Stdout is for results, which only one of several ranks prints.
"""

import os
import sys
from typing import NamedTuple

_start = "tinyunet: "


def wanted() -> bool:
    """Whether the environment asks for the lines, now."""
    return os.environ.get("TINYUNET_VERBOSE") == "1"


def name_rank(rank: int, ranks: int) -> None:
    """Begin the lines of this process with its rank, if there are several ranks."""
    global _start
    _start = f"tinyunet: rank {rank:{len(str(ranks - 1))}} " if ranks > 1 else "tinyunet: "


def say(text: str) -> None:
    """Print a line."""
    print(_start + text, file=sys.stderr, flush=True)


class Ran(NamedTuple):
    """A kernel that has just run."""

    operator: str
    shape: tuple[int, ...]  # of the largest array that the kernel wrote
    layout: str
    algorithm: str  # "eager" if the operator ran alone, fused with nothing
    fused: str  # prologue and epilogue of the kernel
    seconds: float
    flops: float | None  # at least needed, by the operator's definition and the sizes of its arrays
    nbytes: float  # likewise
    name: str  # place in the model

    def line(self) -> str:
        """Return the columns of a line; ``fused`` is last, because it may be long."""
        size = "x".join(map(str, self.shape)) or "1"
        rate = "-" if self.flops is None else f"{self.flops / self.seconds / 1e9:.1f}"
        return (
            f"{self.operator:39} {size:18} {self.layout:9} {self.algorithm:17}"
            f" {self.seconds * 1e3:9.3f} ms {rate:>8} GFLOP/s"
            f" {self.nbytes / self.seconds / 1e9:6.1f} GB/s  {self.name:36} {self.fused or '-'}"
        )
