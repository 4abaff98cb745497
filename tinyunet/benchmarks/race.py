"""Systems timed in turn, round after round: a machine that becomes slower slows all of them alike.

Nothing is timed before it has been checked: each system starts from the same weights, and its losses
of the first steps, or its probabilities, must be those of the first system that ran, which is our
eager engine.

All processes stay in memory between their turns if they fit; if not, some are started anew, checked
again and warmed up for each of their turns.
"""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray
from tqdm import tqdm

from tinyunet.benchmarks.problem import Problem
from tinyunet.benchmarks.process import Process, WorkerError, difference, machine_memory
from tinyunet.benchmarks.systems import Job
from tinyunet.common.terminal import count

# So long after its turn the threads of a system may still spin.
_PAUSE_SECONDS = 0.3


@dataclass
class Result:
    """A job and its measurements."""

    job: Job
    version: str = ""
    rounds: list[list[float]] = field(default_factory=list)  # milliseconds of each run, in each round
    built_gb: float | None = None  # memory of the process before the first run
    peak_gb: float | None = None
    error: float = 0.0  # largest difference from the first system's losses or probabilities
    settings: str = ""  # what its peer chose for speed
    failure: str = ""  # why it is out of the race; else empty
    process: Process | None = None  # between start and end

    @property
    def ms(self) -> list[float]:
        """All runs of all rounds."""
        return [run for turn in self.rounds for run in turn]

    @property
    def median(self) -> float:
        """Milliseconds of a run."""
        return statistics.median(self.ms)

    def speedup(self, other: "Result") -> float:
        """Return how many times faster than ``other`` this is.

        It is the median of the rounds' ratios, which a drift of the machine's speed does not touch.
        """
        return statistics.median(self._ratios(other))

    def is_noise(self, other: "Result") -> bool:
        """Whether this is faster than ``other`` in some rounds only, or there is one round."""
        ratios = self._ratios(other)
        return self is not other and (len(ratios) < 2 or min(ratios) <= 1 <= max(ratios))

    def _ratios(self, other: "Result") -> list[float]:
        pairs = zip(other.rounds, self.rounds, strict=False)  # one may have a turn more when it is stopped
        return [statistics.median(a) / statistics.median(b) for a, b in pairs]

    def take_turn(self, seconds: float, problem: Problem, references: dict[str, NDArray[Any]]) -> None:
        """Start if need be, and time runs; an error puts the job out of the race."""
        try:
            process = self.process or self._start(problem, references)
            time.sleep(_PAUSE_SECONDS)
            self.rounds.append(process.ask("time", seconds)[self.job.case])
            _, peak = process.ask("memory")
            self.peak_gb = max(peak or 0.0, self.peak_gb or 0.0) or None
        except WorkerError as failure:
            self.failure = str(failure)
            self.end()

    def _start(self, problem: Problem, references: dict[str, NDArray[Any]]) -> Process:
        """Build the net and check it; the first results of a case become its reference."""
        system, case = self.job.system, self.job.case
        self.process = process = Process(system.peer, self.job.threads)
        self.version = process.version
        self.settings = process.ask("build", case, system.options | self.job.options, problem)
        self.built_gb, _ = process.ask("memory")
        found = process.ask("check")[case]
        if not (found.min() >= 0 and found.max() <= 1 + 1e-5):  # NaN fails, too
            raise WorkerError(f"wrong: results from {found.min():.3g} to {found.max():.3g}, not 0 to 1")
        self.error = difference(found, references.setdefault(case, found), system.tolerance)
        return process

    def end(self) -> None:
        """End its process."""
        if self.process is not None:
            self.process.end()
            self.process = None


class Outcome(NamedTuple):
    """Results in the order of the jobs, a line for each job that failed, and what stopped the race early."""

    results: list[Result]
    failures: list[str]
    stopped: KeyboardInterrupt | None = None


def race(
    jobs: list[Job], problem: Problem, rounds: int, seconds: float = 1.5, together: bool = True
) -> Outcome:
    """Time jobs in turn, with a progress bar; the first that runs is the reference of the others.

    A turn takes about ``seconds``, two runs at least. If not ``together``, no process stays in memory until
    its next turn. Ctrl-C stops the race, and the results so far are returned.
    """
    everybody, stopped = [Result(job) for job in jobs], None
    references: dict[str, NDArray[Any]] = {}
    try:
        with tqdm(everybody * rounds, unit="turn", leave=False) as bar:
            for result in bar:
                bar.set_description(result.job.name + ": starting" * (result.process is None))
                if not result.failure:
                    result.take_turn(seconds, problem, references)
                # Another fits if what the largest has needed, and half as much again, is still free.
                largest = max(other.peak_gb or 0.0 for other in everybody)
                if not together or machine_memory()[1] <= 1.5 * largest:
                    result.end()
    except KeyboardInterrupt as interrupt:
        stopped = interrupt
    finally:
        for result in everybody:
            result.end()
    return Outcome(
        [result for result in everybody if result.rounds and not result.failure],
        [f"{r.job.name}, {count(r.job.threads, 'thread')}: {r.failure}" for r in everybody if r.failure],
        stopped,
    )
