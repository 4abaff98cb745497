"""Figures as text."""


def milliseconds(ms: float) -> str:
    """Four digits or so."""
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def gigabytes(gb: float | None) -> str:
    """Two decimals; a dash where it is not known."""
    return "-" if gb is None else f"{gb:.2f}"
