"""Systems timed in turn, round after round, so that what slows the machine down slows all alike.

Nothing is timed before it has been checked: each system starts from the same weights, and its losses
of the first steps, or its probabilities, must be those of the first system that ran, which is our
eager engine.

All processes stay in memory between their turns if they fit; if not, some are started anew, checked
again and warmed up for each of their turns.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tinyunet.benchmarks.problem import Problem
from tinyunet.benchmarks.process import Process, WorkerError, machine_memory
from tinyunet.benchmarks.systems import Job
from tinyunet.common.terminal import count

# So long after its turn the threads of a system may still spin.
_PAUSE_SECONDS = 0.3


class Result(NamedTuple):
    """What was measured of a job.

    Attributes
    ----------
    rounds : list of list of float
        Milliseconds of each run, in each round.
    built_gb, peak_gb : float or None
        Memory of the process before the first run, and at most.
    error : float
        Largest difference from the first system's losses or probabilities.
    settings : str
        What its peer chose for speed.
    """

    job: Job
    version: str
    rounds: list[list[float]]
    built_gb: float | None
    peak_gb: float | None
    error: float
    settings: str = ""

    @property
    def ms(self) -> list[float]:
        """All runs of all rounds."""
        return [run for turn in self.rounds for run in turn]

    @property
    def median(self) -> float:
        """Milliseconds of a run."""
        return statistics.median(self.ms)

    def speedup(self, other: "Result") -> float:
        """How many times faster than ``other`` this is.

        The median of the rounds' ratios, which a drift of the machine's speed does not touch.
        """
        pairs = zip(other.rounds, self.rounds, strict=True)
        return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


class Outcome(NamedTuple):
    """Results in the order of the jobs, and a line for each job that failed."""

    results: list[Result]
    failures: list[str]


def race(
    jobs: list[Job], problem: Problem, rounds: int, seconds: float = 1.5, together: bool = True
) -> Outcome:
    """Time jobs in turn, with a progress bar.

    Parameters
    ----------
    jobs : list of Job
        The first that runs is what the others are checked against.
    problem : Problem
    rounds : int
    seconds : float
        Of a turn, about; it is two runs at least.
    together : bool
        Whether processes may stay in memory until their next turn.
    """
    with _starting_line(jobs, problem) as contestants:
        turns = [contestant for _ in range(rounds) for contestant in contestants]
        with tqdm(turns, unit="turn", leave=False) as bar:
            for contestant in bar:
                bar.set_description(contestant.job.name + ": starting" * (not contestant.ready))
                contestant.turn(seconds)
                if not together or not _fits_another(contestants):
                    contestant.end()
    return Outcome(
        [contestant.result() for contestant in contestants if not contestant.failure],
        [f"{c.job.name}, {count(c.job.threads, 'thread')}: {c.failure}" for c in contestants if c.failure],
    )


class Contestant:
    """A job and, while it has one, its process.

    Attributes
    ----------
    failure : str
        Why it is out of the race; else empty.
    peak_gb : float
        The most memory it has needed so far.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.failure = ""
        self.peak_gb = 0.0
        self._folder = folder
        self._process: Process | None = None
        self._version, self._settings, self._error = "", "", 0.0
        self._built_gb: float | None = None
        self._rounds: list[list[float]] = []

    @property
    def ready(self) -> bool:
        """Whether its process is there."""
        return self._process is not None

    def turn(self, seconds: float) -> None:
        """Take one turn, unless it is out; start first if need be."""
        if self.failure:
            return
        try:
            process = self._process or self._start()
            time.sleep(_PAUSE_SECONDS)
            self._rounds.append(process.ask("turn", seconds=seconds)["ms"])
            self.peak_gb = max(self.peak_gb, process.ask("memory")["peak_gb"] or 0.0)
        except WorkerError as failure:
            self.failure = str(failure)
            self.end()

    def _start(self) -> Process:
        system = self.job.system
        self._process = process = Process(self.job.threads)
        started = process.ask(
            "start",
            peer=system.peer,
            case=self.job.case,
            threads=self.job.threads,
            options=system.options | self.job.options,
            problem_file=str(self._folder / "problem.npz"),
        )
        self._version, self._settings = started["version"], started["settings"]
        self._built_gb = process.ask("memory")["now_gb"]
        output = self._folder / "output.npy"
        answer = process.ask("check", output=str(output))
        found = np.array(answer["losses"]) if "losses" in answer else np.load(output)
        self._error = difference(found, self._folder / f"{self.job.case}.npy", system.tolerance)
        return process

    def result(self) -> Result:
        """What has been measured."""
        return Result(
            self.job,
            self._version,
            self._rounds,
            self._built_gb,
            self.peak_gb or None,
            self._error,
            self._settings,
        )

    def end(self) -> None:
        """End its process."""
        if self._process is not None:
            self._process.end()
            self._process = None


@contextlib.contextmanager
def _starting_line(jobs: list[Job], problem: Problem) -> Iterator[list[Contestant]]:
    with tempfile.TemporaryDirectory(prefix="tinyunet-bench-") as folder:
        problem.save(Path(folder) / "problem.npz")
        contestants = [Contestant(job, Path(folder)) for job in jobs]
        try:
            yield contestants
        finally:
            for contestant in contestants:
                contestant.end()


def difference(found: NDArray[Any], reference: Path, tolerance: float) -> float:
    """Largest difference from the reference, which the first results become. All lie from 0 to 1.

    Raises
    ------
    WorkerError
        It is so large that the time would mean nothing (NaN included).
    """
    if not (np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1 + 1e-5):
        raise WorkerError(f"wrong: results from {found.min():.3g} to {found.max():.3g}, not 0 to 1")
    if not reference.exists():
        np.save(reference, found)
    expected = np.load(reference)
    if found.shape != expected.shape:
        raise WorkerError(f"wrong: results of shape {found.shape}, not {expected.shape}")
    error = float(np.abs(found - expected).max())
    if not error <= tolerance:
        raise WorkerError(f"wrong: results differ by {error:.1e}, more than {tolerance:g}")
    return error


def _fits_another(contestants: list[Contestant]) -> bool:
    """Whether what the largest has needed, and half as much again, is still free."""
    return machine_memory()[1] > 1.5 * max(contestant.peak_gb for contestant in contestants)
