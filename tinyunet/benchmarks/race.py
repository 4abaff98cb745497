"""Systems timed in turn, round after round, so that what slows the machine down slows all alike.

Nothing is timed before it has been checked: each system starts from the same weights, and its losses
of the first steps, or its probabilities, must be those of the first system that ran, which is our
eager engine.

All processes stay in memory between their turns if they fit; if not, some are started anew, checked
again and warmed up for each of their turns.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
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


@dataclass
class Result:
    """A job, and what was measured of it.

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
    failure : str
        Why it is out of the race; else empty.
    process : Process or None
        Its process, between start and end.
    """

    job: Job
    version: str = ""
    rounds: list[list[float]] = field(default_factory=list)
    built_gb: float | None = None
    peak_gb: float | None = None
    error: float = 0.0
    settings: str = ""
    failure: str = ""
    process: Process | None = None

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

    def take_turn(self, seconds: float, folder: Path) -> None:
        """Start if need be, and time runs; what fails puts it out of the race."""
        try:
            process = self.process or self._start(folder)
            time.sleep(_PAUSE_SECONDS)
            self.rounds.append(process.ask("turn", seconds=seconds)["ms"])
            peak = process.ask("memory")["peak_gb"]
            self.peak_gb = max(peak or 0.0, self.peak_gb or 0.0) or None
        except WorkerError as failure:
            self.failure = str(failure)
            self.end()

    def _start(self, folder: Path) -> Process:
        job, system, output = self.job, self.job.system, folder / "output.npy"
        self.process = process = Process(job.threads)
        about = process.ask(
            "start",
            peer=system.peer,
            case=job.case,
            threads=job.threads,
            options=system.options | job.options,
            problem_file=str(folder / "problem.npz"),
        )
        self.version, self.settings = about["version"], about["settings"]
        self.built_gb = process.ask("memory")["now_gb"]
        answer = process.ask("check", output=str(output))
        found = np.array(answer["losses"]) if "losses" in answer else np.load(output)
        self.error = difference(found, folder / f"{job.case}.npy", system.tolerance)
        return process

    def end(self) -> None:
        """End its process."""
        if self.process is not None:
            self.process.end()
            self.process = None


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
    everybody = [Result(job) for job in jobs]
    with tempfile.TemporaryDirectory(prefix="tinyunet-bench-") as name:
        problem.save(Path(name) / "problem.npz")
        try:
            with tqdm(everybody * rounds, unit="turn", leave=False) as bar:
                for result in bar:
                    bar.set_description(result.job.name + ": starting" * (result.process is None))
                    if not result.failure:
                        result.take_turn(seconds, Path(name))
                    # Another fits if what the largest has needed, and half as much again, is still free.
                    largest = max(other.peak_gb or 0.0 for other in everybody)
                    if not together or machine_memory()[1] <= 1.5 * largest:
                        result.end()
        finally:
            for result in everybody:
                result.end()
    return Outcome(
        [result for result in everybody if not result.failure],
        [f"{r.job.name}, {count(r.job.threads, 'thread')}: {r.failure}" for r in everybody if r.failure],
    )


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
