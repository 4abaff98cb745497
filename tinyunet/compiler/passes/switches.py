"""What a pass may want to know beside the graph."""

from typing import NamedTuple


class Options(NamedTuple):
    """Settings of a compilation.

    Attributes
    ----------
    passes : tuple of str
        All that run.
    accuracy : {"fast", "strict"}
        What convolutions may lose.
    deterministic : bool
        Choose algorithms by the model of their work alone, not by the clock.
    """

    passes: tuple[str, ...]
    accuracy: str
    deterministic: bool = False
