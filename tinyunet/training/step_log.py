"""The figures of each step and each epoch: ``metrics.jsonl``, a JSON object a line, and TensorBoard's file.

A line of a step has ``step`` (from 1 on, over all epochs), ``epoch``, ``loss``, ``dice``, ``lr``, ``wait``
(seconds for which rank 0 waited for its patches) and ``gradient_norm`` (with ``--clip-norm``). A line of an
epoch follows its last step: ``step``, and an entry of ``history.json``, with ``validation``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyunet.common.files import atomic, open_file


class Metrics:
    """Collects figures, and writes them with each checkpoint; TensorBoard's file needs its package."""

    def __init__(self, tensorboard: bool) -> None:
        self._lines: list[dict[str, Any]] = []
        self._tensorboard = tensorboard
        self._board: Any = None

    def add(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add the figures of a step, or of the epoch that ended with it."""
        known = {name: value for name, value in figures.items() if value is not None}
        self._lines.append({"step": step, **known})

    def write(self, folder: Path) -> None:
        """Add the new lines to the folder's, in place of lines of steps that have been repeated."""
        if not self._lines:
            return
        path, first = folder / "metrics.jsonl", _place(self._lines[0])
        old = [line for line in _read(path) if _place(line) < first]
        with atomic(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in [*old, *self._lines]).encode())
        if self._tensorboard:
            self._write_board(folder)
        self._lines.clear()

    def close(self) -> None:
        """Close TensorBoard's file: its thread writes what is left."""
        if self._board is not None:
            self._board.close()

    def _write_board(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        if self._board is None:
            purge = {"purge_step": self._lines[0]["step"]}
            self._board = SummaryWriter(str(folder / "tensorboard"), flush_secs=10, **purge)
        for line in self._lines:
            kind = "epoch" if _place(line)[1] else "step"
            for name, value in _numbers(line):
                if name not in ("step", "epoch"):
                    self._board.add_scalar(f"{kind}/{name}", value, line["step"])


def _place(line: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the step of a line, and whether it is the line of an epoch."""
    return line["step"], "validation" in line


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that are ours."""
    try:
        with open_file(path) as file:
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            found.append(entry)
    return found


def _numbers(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return all numbers of an object of objects, by their names joined with a slash."""
    found: list[tuple[str, float]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        else:
            found.append((f"{prefix}{name}", float(value)))
    return found
