"""``TINYUNET_VERBOSE=1``: a line on stderr for each operator and kernel that runs.

Not on stdout: there are the results, and of several ranks only one writes there.
"""

import os
import sys

_start = "tinyunet: "


def wanted() -> bool:
    """Whether the environment asks for the lines, now."""
    return os.environ.get("TINYUNET_VERBOSE") == "1"


def name_rank(rank: int, ranks: int) -> None:
    """Let the lines of this process begin with its rank, if there are several."""
    global _start
    _start = f"tinyunet: rank {rank:{len(str(ranks - 1))}} " if ranks > 1 else "tinyunet: "


def say(text: str) -> None:
    """Print a line."""
    print(_start + text, file=sys.stderr, flush=True)


def line(
    operator: str,
    shape: tuple[int, ...],
    layout: str,
    algorithm: str,
    fused: str,
    seconds: float,
    flops: float | None,
    nbytes: float,
    name: str,
) -> str:
    """Return what there is to say of a kernel that has just run; columns of all lines lie below each other.

    Parameters
    ----------
    operator : str
    shape : tuple of int
        Of the largest array that it wrote.
    layout : str
    algorithm : str
        "eager" if the operator ran alone, fused with nothing.
    fused : str
        What the kernel did beside its operator: prologue and epilogue. Comes last, for its length.
    seconds : float
        How long it took.
    flops, nbytes : float
        What the operator needs at least, by its definition and the sizes of its arrays. None: the
        operator does not say.
    name : str
        Where in the model.
    """
    size = "x".join(map(str, shape)) or "1"
    rate = "-" if flops is None else f"{flops / seconds / 1e9:.1f}"
    return (
        f"{operator:39} {size:18} {layout:9} {algorithm:17}"
        f" {seconds * 1e3:9.3f} ms {rate:>8} GFLOP/s"
        f" {nbytes / seconds / 1e9:6.1f} GB/s  {name:36} {fused or '-'}"
    )
