"""The tables of the whole net: who takes part in each, and what is shown of the results.

``step`` and ``infer`` are a race of everybody; ``passes`` of the compiled step with each pass of the
graph switched off in turn; ``scaling`` of the step on 1, 2, 4, ... threads. For ``memory`` each
process is alone, and does a few steps.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinyunet.benchmarks.columns import gigabytes, milliseconds
from tinyunet.benchmarks.problem import make
from tinyunet.benchmarks.race import Outcome, Result, race
from tinyunet.benchmarks.systems import COMPILED, EAGER, OURS, TENSORFLOW, Job, choose
from tinyunet.common.terminal import aligned, count

USUAL_FILTERS = 16


class Settings(NamedTuple):
    """What is measured, and how.

    Attributes
    ----------
    table : str
        "step", "infer", "memory", "passes" or "scaling".
    against : sequence of str
        Keys of the peers.
    threads : int
        Of every system; for ``scaling`` the most.
    """

    table: str
    size: int
    batch: int
    filters: int
    threads: int
    rounds: int
    against: Sequence[str]

    @property
    def case(self) -> str:
        """What is run."""
        return "infer" if self.table == "infer" else "step"

    def label(self, job: Job) -> str:
        """What is run, with everything that is not usual."""
        parts = [f"{'memory' if self.table == 'memory' else job.case} {job.variant}".rstrip()]
        parts += [f"batch {self.batch}"] if self.batch != 1 else []
        parts += [f"{self.filters} filters"] if self.filters != USUAL_FILTERS else []
        return ", ".join(parts)

    def title(self) -> str:
        """What stands above the table."""
        names = {
            "step": "training step",
            "infer": "inference",
            "memory": "memory of training",
            "passes": "training step without each pass of the graph in turn",
            "scaling": "training step on more and more threads",
        }
        on = "" if self.table == "scaling" else f", {count(self.threads, 'thread')}"
        return f"{names[self.table]}: {self.size}^3 voxels, batch {self.batch}, {self.filters} filters{on}"


def entrants(settings: Settings) -> tuple[list[Job], list[str]]:
    """Return who takes part, and a line for each system that is not here."""
    systems, skipped = choose(settings.case, settings.against)
    if settings.table == "scaling":
        counts = thread_counts(settings.threads)
        return [Job(s, settings.case, n) for n in counts for s in systems], skipped
    jobs = [Job(system, settings.case, settings.threads) for system in systems]
    if settings.table == "passes" and COMPILED in systems:
        jobs += [
            Job(COMPILED, settings.case, settings.threads, variant, options)
            for variant, options in variants()
        ]
    return jobs, skipped


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Ways to compile: without each pass, without all, with accuracy alone in mind, without the clock."""
    from tinyunet.compiler.passes import NAMES

    single = [(f"without {name}", {"disable": [name]}) for name in NAMES]
    return [
        *single,
        ("without any pass", {"enable": []}),
        ("strict", {"accuracy": "strict"}),
        ("deterministic", {"deterministic": True}),
    ]


def measure(settings: Settings, jobs: list[Job]) -> Outcome:
    """Have them race."""
    problem = make(settings.size, settings.batch, settings.filters)
    if settings.table == "memory":
        return race(jobs, problem, rounds=1, seconds=0, together=False)
    return race(jobs, problem, settings.rounds)


def rows(settings: Settings, results: list[Result]) -> list[dict[str, Any]]:
    """Return the figures for a file: one row a result."""
    return [
        {
            "system": result.job.system.name,
            "case": settings.label(result.job),
            "size": settings.size,
            "threads": result.job.threads,
            "median_ms": result.median,
            "min_ms": min(result.ms),
            "max_ms": max(result.ms),
            "peak_gb": result.peak_gb,
        }
        for result in results
    ]


def draw(settings: Settings, results: list[Result], path: Path) -> None:
    """Draw the figures: lines over the threads for ``scaling``, else a bar a result."""
    # Here, because matplotlib takes a second to load and pictures are seldom wanted.
    from tinyunet.benchmarks.plot import Bar, draw_bars, draw_scaling

    if settings.table == "scaling":
        lines: dict[str, dict[int, float]] = {}
        for result in results:
            one = next(r for r in results if r.job.name == result.job.name)
            lines.setdefault(result.job.name, {})[result.job.threads] = result.speedup(one)
        draw_scaling(path, settings.title(), lines)
        return
    bars = []
    for result in results:
        if settings.table == "memory":
            least = middle = most = result.peak_gb or 0.0
            note = gigabytes(result.peak_gb)
        else:
            least, middle, most = min(result.ms), result.median, max(result.ms)
            note = f"{milliseconds(middle)}  {_cost(result, results) or _faster(result, results)}"
        label = result.job.variant or result.job.name
        bars.append(Bar(label, middle, least, most, note, result.job.system in OURS))
    unit = "GB, peak of the process" if settings.table == "memory" else "ms: median, least to most"
    draw_bars(path, settings.title(), unit, bars)


def table(settings: Settings, results: list[Result]) -> str:
    """Return the table and what its columns mean, as text."""
    makers = {"memory": _memory, "passes": _passes, "scaling": _scaling}
    return makers.get(settings.table, _times)(results)


def _times(results: list[Result]) -> str:
    base = _base(results)
    head = ("", "version", "median ms", "min", "max", "faster", "GB", "difference", "settings")
    body = [
        (
            result.job.name,
            result.version,
            *_spread(result),
            _faster(result, results),
            gigabytes(result.peak_gb),
            f"{result.error:.0e}",
            result.settings,
        )
        for result in results
    ]
    return (
        f"{aligned(head, body)}\n"
        f"faster: than {base.job.name}, median over the rounds; GB: peak of the process;\n"
        f"difference: of losses or probabilities from those of {results[0].job.name}, at most"
    )


def _memory(results: list[Result]) -> str:
    base = _base(results)
    head = ("", "version", "peak GB", "of them before", "share", "step ms", "settings")
    body = [
        (
            result.job.name,
            result.version,
            gigabytes(result.peak_gb),
            gigabytes(result.built_gb),
            f"{result.peak_gb / base.peak_gb:.0%}" if result.peak_gb and base.peak_gb else "-",
            milliseconds(result.median),
            result.settings,
        )
        for result in results
    ]
    return (
        f"{aligned(head, body)}\n"
        f"before: once all is loaded and built, before the first step; share: of {base.job.name}'s"
    )


def _passes(results: list[Result]) -> str:
    base = _all_passes(results)
    head = ("", "median ms", "min", "max", "costs", "GB", "difference")
    body = [
        (
            result.job.variant or result.job.name,
            *_spread(result),
            _cost(result, results),
            gigabytes(result.peak_gb),
            f"{result.error:.0e}",
        )
        for result in results
    ]
    return (
        f"{aligned(head, body)}\n"
        f"costs: more time than {base.job.name}, with all passes, median over the rounds;\n"
        f"difference: of losses from those of {results[0].job.name}, at most"
    )


def _scaling(results: list[Result]) -> str:
    names = list(dict.fromkeys(result.job.name for result in results))
    counts = sorted({result.job.threads for result in results})
    found = {(result.job.name, result.job.threads): result for result in results}
    head = ["ms on threads:", str(counts[0])]
    head += [cell for count in counts[1:] for cell in (str(count), "x")]
    body = []
    for name in names:
        line = [name]
        for threads in counts:
            result, one = found.get((name, threads)), found.get((name, counts[0]))
            line.append(milliseconds(result.median) if result else "-")
            if threads != counts[0]:
                line.append(f"{result.speedup(one):.2f}" if result and one else "-")
        body.append(line)
    chosen = {r.job.name: r.settings for r in results if r.settings}
    return "\n".join(
        [
            aligned(head, body),
            "x: times faster than on one thread, median over the rounds",
            *(f"{name}: {settings}" for name, settings in chosen.items()),
        ]
    )


def _faster(result: Result, results: list[Result]) -> str:
    return f"{result.speedup(_base(results)):.2f} x"


def _cost(result: Result, results: list[Result]) -> str:
    """How much longer than with all passes; nothing where no pass was switched off."""
    if not any(r.job.variant for r in results):
        return ""
    return f"{1 / result.speedup(_all_passes(results)) - 1:+.0%}"


def _all_passes(results: list[Result]) -> Result:
    compiled = (r for r in results if r.job.system == COMPILED and not r.job.variant)
    return next(compiled, results[0])


def _spread(result: Result) -> tuple[str, str, str]:
    ms = result.ms
    return milliseconds(statistics.median(ms)), milliseconds(min(ms)), milliseconds(max(ms))


def _base(results: list[Result]) -> Result:
    """What the others are compared with: TensorFlow, or our eager engine where it is missing."""
    for system in (TENSORFLOW, EAGER):
        for result in results:
            if result.job.system == system:
                return result
    return results[0]
