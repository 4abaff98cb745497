"""Starting the program's own processes, with or without mpirun, as a person would."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

_BESIDE_PYTHON = Path(sys.executable).parent / "mpirun"
MPIRUN = str(_BESIDE_PYTHON) if _BESIDE_PYTHON.exists() else shutil.which("mpirun")

needs_mpi = pytest.mark.skipif(MPIRUN is None, reason="no mpirun here")


def launch(
    arguments: Sequence[object],
    ranks: int = 1,
    folder: Path | None = None,
    seconds: float = 120,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``python arguments...`` to its end, on ``ranks`` ranks if they are more than one.

    Several ranks on few cores compute with one thread each; a rank alone is held to two. A
    process that is not done after ``seconds`` fails the test: a rank that waits for one that has
    left would wait for ever.
    """
    command = [sys.executable, *map(str, arguments)]
    if ranks > 1:
        command = [str(MPIRUN), "-n", str(ranks), *command]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
