"""The folder of a run: made with its first file; a new run never takes an old folder."""

import contextlib
import fcntl
import itertools
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

    For a run that goes on, :meth:`go_on` names its folder. After the ``with`` block other processes may train
    in the folder.
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
        """Use the folder of a run that goes on."""
        self._path = path

    def check(self, needed_bytes: int) -> None:
        """Check at the start, not with the first checkpoint, whether the run will fit; make ``output``.

        OSError if ``output`` cannot be made; UserError if the folder cannot be written to, or has too little
        space, or another process trains in it.
        """
        if self._path is None:
            self._output.mkdir(parents=True, exist_ok=True)
        self.hold()
        # A run that goes on may lie on another disk than ``output``.
        place = self._path or self._output
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{place}: cannot be written to; expected a folder of your own")
        free = shutil.disk_usage(place).free
        if free < needed_bytes:
            left, taken = in_bytes(free, needed_bytes)
            raise UserError(f"{place}: {left} left on this disk; a run takes {taken}")

    def hold(self) -> None:
        """Lock the folder until :meth:`release`, or raise UserError if another process trains in it."""
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
        """Remove files that a killed run left half written, and the folder if it is empty."""
        if self._path is not None and self._path.is_dir():
            for unfinished in self._path.glob(".[0-9]*-*"):
                with contextlib.suppress(OSError):  # a folder, which is not ours
                    unfinished.unlink()
            if not any(self._path.iterdir()):
                self._path.rmdir()

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file in the folder."""
        if self._path is None:
            now = time.strftime("%Y-%m-%d_%H-%M-%S")
            # Of two runs that begin in the same second, each gets its own folder.
            for number in itertools.count(1):
                path = self._output / (now if number == 1 else f"{now}-{number}")
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    self._path = path
                    break
            self.hold()
        assert self._path is not None
        return self._path / name

    def __str__(self) -> str:
        return str(self._path or self._output)
