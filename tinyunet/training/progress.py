"""Output of a training on the terminal: lines that stay, and one bar that moves."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

from tqdm import tqdm

from tinyunet.parallel.communicator import Communicator
from tinyunet.training.settings import Settings

_COLUMNS = 110
_KERNELS = 210  # that a first start compiles, about: a bar needs an end, which moves if there are more
# Volumes a second, also when they are fewer than one.
_BAR = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
)
_COMPILATION = "{desc} {percentage:3.0f}%|{bar}| {n_fmt} [{elapsed}<{remaining}]"


class Progress:
    """Lines and one bar on the terminal, inside its ``with`` block; ``shown`` by one rank only."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def line(self, text: str = "") -> None:
        """Print a line, above the bar if there is one."""
        if self._shown:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def task(self, text: str) -> Iterator[None]:
        """Print a line for the work of the block, and after it how long the work took."""
        start, end = time.perf_counter(), ""
        self._print(f"{text} ...", end=" ")
        try:
            yield
            end = f"{time.perf_counter() - start:.1f} s"
        finally:
            self._print(end)

    @contextmanager
    def kernels(self, text: str) -> Iterator[list[None]]:
        """As :meth:`task`, with a bar once a kernel has to be compiled; gives an item a kernel."""
        compiled: list[None] = []

        def start() -> None:
            if self._bar is None:
                self._print()
                self._bar = self._make_bar(10.0, _COMPILATION, desc="compiling kernels", total=_KERNELS)

        def end() -> None:
            compiled.append(None)
            assert self._bar is not None
            self._bar.total = max(self._bar.total or 0, self._bar.n + 1)
            self._bar.update()

        with self.task(text), on_compilation(start, end):
            try:
                yield compiled
            finally:
                if self._bar is not None:
                    self._bar.total = self._bar.n  # there were fewer than in a first start
                    self._bar.refresh()
                self.finish()

    def start(self, volumes: int, done: int = 0) -> None:
        """Show a bar for the patches that all ranks will train on, some of which may be done."""
        # smoothing=0 is the mean from the start: validation takes its share of the time left, too.
        self._bar = self._make_bar(1.0, _BAR, total=volumes, initial=done, unit="vol", smoothing=0)

    def epoch(self, number: int, count: int) -> None:
        """Show which epoch of how many has begun."""
        if self._bar is not None:
            # In a file each change of the bar is a line: it comes with the next step.
            self._bar.set_postfix_str("", refresh=False)
            self._bar.set_description_str(f"epoch {number}/{count}", refresh=sys.stdout.isatty())

    def step(self, volumes: int, **figures: float) -> None:
        """Move the bar, and show figures behind it."""
        if self._bar is not None:
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(volumes)

    def finish(self) -> None:
        """Close the bar; its last text stays on the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str = "", end: str = "\n") -> None:
        if self._shown:
            print(text, end=end, flush=True)

    def _make_bar(self, seconds_in_file: float, bar_format: str, **how: Any) -> "tqdm[None]":
        """Make a bar on stdout, where the lines go, too: mpirun would mix two streams in any order."""
        # Under mpirun, or in a file, every change of the bar is a line.
        how |= {"mininterval": 0.1 if sys.stdout.isatty() else seconds_in_file, "ncols": _columns()}
        return tqdm(bar_format=bar_format, file=sys.stdout, disable=not self._shown, **how)


class Job(NamedTuple):
    """Context of every part of a training: settings, ranks, and output."""

    settings: Settings
    communicator: Communicator
    progress: Progress


@contextmanager
def on_compilation(start: Callable[[], None], end: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Call functions inside the block when Numba starts and ends compiling a kernel that is not on disk."""
    # Imported here: --help need not wait for Numba.
    from numba.core.event import Listener, install_listener

    class Compilation(Listener):  # type: ignore[misc]
        def on_start(_, event: Any) -> None:  # noqa: N805
            start()

        def on_end(_, event: Any) -> None:  # noqa: N805
            end()

    with install_listener("numba:compile", Compilation()):
        yield


def _columns() -> int:
    """Return the width of the terminal, which mpirun hides behind a pipe."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.get_terminal_size(terminal.fileno()).columns or _COLUMNS
    except OSError:
        return _COLUMNS
