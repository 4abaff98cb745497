"""What a pass may want to know beside the graph."""

from typing import NamedTuple


class Options(NamedTuple):
    """Settings of a compilation: all passes that run, and what convolutions may lose."""

    passes: tuple[str, ...]
    accuracy: str
