"""The other end of a worker: starts it, asks it, ends it, and says in one line why it died."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tinyunet.common.errors import one_line

# Compiling for a large machine can take minutes; nothing takes this long.
_LONGEST_SECONDS = 1800
_LEAST_FREE_SHARE = 0.02


class WorkerError(Exception):
    """A system cannot go on; the message is one line."""


class Process:
    """A worker, held to as many cores as it has threads.

    Parameters
    ----------
    threads : int
    """

    def __init__(self, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "tinyunet.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | _thread_variables(threads),
            # Ctrl-C is for us; and what the worker starts ends with it.
            start_new_session=True,
        )
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))[:threads]
            os.sched_setaffinity(self._worker.pid, cores)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises
        ------
        WorkerError
            The worker reports an error, has died, takes too long, or would take the last memory.
        """
        assert self._worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._worker.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._worker.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise WorkerError(one_line(answer["error"]))
        return answer

    def _line(self) -> bytes:
        """Wait for a line, and meanwhile watch the machine's memory."""
        assert self._worker.stdout is not None
        end = time.monotonic() + _LONGEST_SECONDS
        answered = False
        while not answered:
            if time.monotonic() > end:
                raise WorkerError(f"no answer in {_LONGEST_SECONDS // 60} minutes")
            total, free = machine_memory()
            if free < _LEAST_FREE_SHARE * total:
                self.end()
                raise WorkerError(f"stopped, because the machine's {total:.0f} GB of memory were used up")
            answered = bool(select.select([self._worker.stdout], [], [], 0.1)[0])
        line = self._worker.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        return line

    def _last_words(self) -> str:
        """Why a worker has died: the signal, or the last line it wrote."""
        code = self._worker.wait()
        if code == -signal.SIGKILL:
            return "killed by the system, most likely for want of memory"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}: {one_line(last)[:200]}"

    def end(self) -> None:
        """End the worker and all it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._worker.pid, signal.SIGKILL)
        self._worker.wait()
        for stream in (self._worker.stdin, self._worker.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def machine_memory() -> tuple[float, float]:
    """GB of this machine in all, and of them free for processes; endless where it is not told."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) * 1024 / 1e9
    return found.get("MemTotal", float("inf")), found.get("MemAvailable", float("inf"))


def _thread_variables(threads: int) -> dict[str, str]:
    """Environment that limits the libraries which read it when they are loaded."""
    names = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA")
    return {f"{name}_NUM_THREADS": str(threads) for name in names}
