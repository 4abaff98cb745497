"""``TINYUNET_VERBOSE=1``: a line for each kernel that the compiled graph and the optimizer run."""

import os


def wanted() -> bool:
    """Whether the environment asks for the lines, now."""
    return os.environ.get("TINYUNET_VERBOSE") == "1"


def line(
    operator: str,
    shape: tuple[int, ...],
    layout: str,
    algorithm: str,
    fused: str,
    seconds: float,
    flops: float,
    nbytes: float,
    name: str,
) -> str:
    """Return the line of a kernel that has just run.

    Parameters
    ----------
    operator : str
    shape : tuple of int
        Of the largest array that it wrote.
    layout : str
    algorithm : str
        "eager" if the operator ran alone, fused with nothing.
    fused : str
        What the kernel did beside its operator: prologue and epilogue.
    seconds : float
        How long it took.
    flops, nbytes : float
        What the operator needs at least, by its definition and the sizes of its arrays.
    name : str
        Where in the model.
    """
    size = "x".join(map(str, shape)) or "1"
    return (
        f"tinyunet: {operator:36} {size:18} {layout:9} {algorithm:14} {fused or '-':56}"
        f" {seconds * 1e3:8.3f} ms {flops / seconds / 1e9:8.1f} GFLOP/s"
        f" {nbytes / seconds / 1e9:6.1f} GB/s  {name}"
    )
