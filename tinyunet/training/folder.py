"""The folder of a run: made when there is something to put in it, and never an old one."""

import os
import shutil
import time
from pathlib import Path

from tinyunet.errors import UserError


class RunFolder:
    """``OUTPUT/TIME/`` for the files of one run.

    Parameters
    ----------
    output : Path or str
        Is made if it is not there.
    most_bytes : int
        What the run will keep at least; it is better to hear at the start that this does not fit.

    Raises
    ------
    OSError
        If ``output`` cannot be made.
    UserError
        If it cannot be written to, or has too little space.
    """

    def __init__(self, output: Path | str, most_bytes: int) -> None:
        self._output = Path(output)
        self._output.mkdir(parents=True, exist_ok=True)
        if not os.access(self._output, os.W_OK | os.X_OK):
            raise UserError(f"{output}: cannot be written to; expected a folder of your own")
        free = shutil.disk_usage(self._output).free
        if free < most_bytes:
            raise UserError(
                f"{output}: {free / 1e6:.0f} MB free on this disk; "
                f"a run takes {most_bytes / 1e6:.0f} MB"
            )
        self._path: Path | None = None

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file in the folder, which is made now if it was not before."""
        return self.path / name

    @property
    def begun(self) -> bool:
        """Whether the folder has been made."""
        return self._path is not None

    @property
    def path(self) -> Path:
        """The folder, made when first asked for: of two runs of one second, each gets its own."""
        if self._path is None:
            name = time.strftime("%Y-%m-%d_%H-%M-%S")
            self._path = _make(self._output, name)
        return self._path


def _make(output: Path, name: str) -> Path:
    suffix, count = "", 1
    while True:
        path = output / (name + suffix)
        try:
            path.mkdir()
        except FileExistsError:
            count += 1
            suffix = f"-{count}"
        else:
            return path
