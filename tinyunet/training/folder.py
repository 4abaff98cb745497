"""The folder of a run: made when there is something to put in it, and never an old one."""

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Self

from tinyunet.common.errors import UserError
from tinyunet.common.terminal import in_bytes

# Checkpoints: the last one, the one before, the best so far, and one that was refused.
LATEST, PREVIOUS, BEST, DAMAGED = "latest.npz", "previous.npz", "best.npz", "damaged.npz"


class RunFolder:
    """``OUTPUT/TIME/`` for the files of one run; made when the path of a file is first asked for.

    At the end of its ``with`` block other processes may train in it.

    Parameters
    ----------
    output : Path or str
        Where the folder will be, unless the run goes on in one: :meth:`go_on`.
    """

    def __init__(self, output: Path | str) -> None:
        self._output = Path(output)
        self._path: Path | None = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def go_on(self, path: Path) -> None:
        """Be the folder of a run that goes on."""
        self._path = path

    def check(self, needed_bytes: int) -> None:
        """See whether a run will fit into its folder, or a new one into ``output``, which is made.

        It is better to hear so at the start than when the first checkpoint is written.

        Parameters
        ----------
        needed_bytes : int
            What the run will take at least.

        Raises
        ------
        OSError
            If ``output`` cannot be made.
        UserError
            If it cannot be written to, or has too little space, or another process trains in it.
        """
        if self._path is None:
            self._output.mkdir(parents=True, exist_ok=True)
        self.hold()
        # A run that goes on may lie elsewhere than where it began, on another disk.
        place = self._path or self._output
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{place}: cannot be written to; expected a folder of your own")
        free = shutil.disk_usage(place).free
        if free < needed_bytes:
            left, taken = in_bytes(free, needed_bytes)
            raise UserError(f"{place}: {left} left on this disk; a run takes {taken}")

    def hold(self) -> None:
        """Keep other processes from training in the folder, until :meth:`release` or the end.

        Raises
        ------
        UserError
            If another process trains in it.
        """
        if self._path is None or self._lock is not None:
            return
        self._lock = os.open(self._path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(f"{self._path}: another process trains here; wait until it has ended") from None
        except OSError:  # a file system without locks
            pass

    def release(self) -> None:
        """Let other processes train in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def tidy(self) -> None:
        """Remove what a run that was killed left half written, and the folder if it is empty."""
        if self._path is not None and self._path.is_dir():
            for unfinished in self._path.glob(".[0-9]*-*"):
                with contextlib.suppress(OSError):  # a folder, which is not ours
                    unfinished.unlink()
            if not any(self._path.iterdir()):
                self._path.rmdir()

    @property
    def begun(self) -> bool:
        """Whether the folder has been made."""
        return self._path is not None

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file in the folder."""
        if self._path is None:
            self._path = _make(self._output, time.strftime("%Y-%m-%d_%H-%M-%S"))
            self.hold()
        return self._path / name

    def __str__(self) -> str:
        return str(self._path or self._output)


def _make(output: Path, name: str) -> Path:
    """Make a new folder: of two runs that begin in one second, each gets its own."""
    path, number = output / name, 1
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            path = output / f"{name}-{number}"
        else:
            return path
