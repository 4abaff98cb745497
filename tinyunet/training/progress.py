"""What a person sees of a training: lines that stay, and one bar that moves."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

_COLUMNS = 110
# Kernels that a first start compiles, about: a bar needs an end. With more of them it is moved.
_KERNELS = 210
# Volumes a second, also when they are fewer than one.
_BAR = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
)
_COMPILATION = "{desc} {percentage:3.0f}%|{bar}| {n_fmt} [{elapsed}<{remaining}]"


class Progress:
    """Lines and one bar on the screen, or nothing at all on the ranks that keep quiet.

    Used as ``with Progress(...) as progress:`` so that the bar is closed whatever happens.

    Parameters
    ----------
    shown : bool
        False on all ranks but one.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.finish()

    def line(self, text: str = "") -> None:
        """Print a line, above the bar if there is one."""
        if self._shown:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def task(self, text: str) -> Iterator[None]:
        """Print what is being done, and behind it how long that took."""
        start = time.perf_counter()
        if self._shown:
            print(f"{text} ...", end=" ", flush=True)
        try:
            yield
        except BaseException:
            if self._shown:
                print(flush=True)
            raise
        if self._shown:
            print(f"{time.perf_counter() - start:.1f} s", flush=True)

    @contextmanager
    def kernels(self, text: str) -> Iterator[Callable[[], int]]:
        """As :meth:`task`, with a bar as soon as a kernel has to be compiled.

        What it gives returns how many were compiled so far.
        """
        # Imported here: --help need not wait for Numba.
        from numba.core.event import Listener, install_listener

        count = 0

        class Compiled(Listener):  # type: ignore[misc]
            """Told by Numba of each kernel that it compiles, but not of those found on disk."""

            def on_start(_, event: Any) -> None:  # noqa: N805
                if self._bar is None:
                    self._bar = self._compilation_bar()

            def on_end(_, event: Any) -> None:  # noqa: N805
                nonlocal count
                count += 1
                assert self._bar is not None
                self._bar.total = max(self._bar.total or 0, self._bar.n + 1)
                self._bar.update()

        with self.task(text), install_listener("numba:compile", Compiled()):
            try:
                yield lambda: count
            finally:
                if self._bar is not None:
                    self._bar.total = self._bar.n  # there were fewer than in a first start
                    self._bar.refresh()
                self.finish()

    def _compilation_bar(self) -> "tqdm[None]":
        if self._shown:
            print(flush=True)
        return tqdm(
            desc="compiling kernels",
            total=_KERNELS,
            bar_format=_COMPILATION,
            ncols=_columns(),
            file=sys.stdout,
            mininterval=0.1 if sys.stdout.isatty() else 10.0,
            disable=not self._shown,
        )

    def start(self, volumes: int, done: int = 0) -> None:
        """Show a bar for the patches that all ranks will train on, some of which may be done."""
        self._bar = tqdm(
            total=volumes,
            initial=done,
            unit="vol",
            bar_format=_BAR,
            ncols=_columns(),
            # Where the lines go, too: mpirun would mix two streams in any order.
            file=sys.stdout,
            # Under mpirun, or into a file, every change of the bar is kept.
            mininterval=0.1 if sys.stdout.isatty() else 1.0,
            # The mean from the start: validation takes its share of the time left, too.
            smoothing=0,
            disable=not self._shown,
        )

    def epoch(self, number: int, count: int) -> None:
        """Show which epoch of how many has begun."""
        if self._bar is not None:
            # In a file each change of the bar is a line: with the next step.
            self._bar.set_postfix_str("", refresh=False)
            self._bar.set_description_str(f"epoch {number}/{count}", refresh=sys.stdout.isatty())

    def step(self, volumes: int, **figures: float) -> None:
        """Move the bar, and show figures behind it."""
        if self._bar is not None:
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(volumes)

    def finish(self) -> None:
        """Close the bar; what it showed last stays on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _columns() -> int:
    """Return the width of the terminal, which mpirun hides behind a pipe."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.get_terminal_size(terminal.fileno()).columns or _COLUMNS
    except OSError:
        return _COLUMNS
