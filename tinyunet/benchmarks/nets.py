"""The tables of the whole net: the systems that take part in each, and how their results are shown.

``step`` and ``infer`` are a race of everybody; ``passes`` of the compiled step with each pass of the
graph switched off in turn; ``scaling`` of the step on 1, 2, 4, ... threads. For ``memory`` each
process is alone, and does a few steps.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinyunet.benchmarks.problem import make
from tinyunet.benchmarks.race import Outcome, Result, race
from tinyunet.benchmarks.systems import COMPILED, EAGER, OURS, TENSORFLOW, Job, choose
from tinyunet.common.terminal import aligned, count

USUAL_FILTERS = 16


class Settings(NamedTuple):
    """Settings of a measurement."""

    table: str  # one of TABLES
    size: int
    batch: int
    filters: int
    threads: int  # of every system; for scaling the most
    rounds: int
    against: Sequence[str]  # keys of the peers

    @property
    def case(self) -> str:
        """The case that is run: ``step`` or ``infer``."""
        return "infer" if self.table == "infer" else "step"

    def label(self, job: Job) -> str:
        """Return the case and all settings that are not usual."""
        parts = [f"{'memory' if self.table == 'memory' else job.case} {job.variant}".rstrip()]
        parts += [f"batch {self.batch}"] if self.batch != 1 else []
        parts += [f"{self.filters} filters"] if self.filters != USUAL_FILTERS else []
        return ", ".join(parts)

    def title(self) -> str:
        """Return the line above the table."""
        on = "" if self.table == "scaling" else f", {count(self.threads, 'thread')}"
        net = f"{self.size}^3 voxels, batch {self.batch}, {self.filters} filters"
        return f"{TABLES[self.table].title}: {net}{on}"


# ---- systems and jobs ------------------------------------------------------------------------------


def entrants(settings: Settings) -> tuple[list[Job], list[str]]:
    """Return who takes part, and a line for each system that is not installed."""
    systems, skipped = choose(settings.case, settings.against)
    counts = thread_counts(settings.threads) if settings.table == "scaling" else [settings.threads]
    jobs = [Job(system, settings.case, threads) for threads in counts for system in systems]
    if settings.table == "passes" and COMPILED in systems:
        jobs += [Job(COMPILED, settings.case, settings.threads, *variant) for variant in variants()]
    return jobs, skipped


def thread_counts(most: int) -> list[int]:
    """Return 1, 2, 4, ... and the most."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Return ways to compile: without each pass, without all, strict, and deterministic."""
    from tinyunet.compiler.passes import NAMES

    return [
        *((f"without {name}", {"disable": [name]}) for name in NAMES),
        ("without any pass", {"enable": []}),
        ("strict", {"accuracy": "strict"}),
        ("deterministic", {"deterministic": True}),
    ]


def measure(settings: Settings, jobs: list[Job]) -> Outcome:
    """Time the jobs."""
    problem = make(settings.size, settings.batch, settings.filters)
    if settings.table == "memory":
        return race(jobs, problem, rounds=1, seconds=0, together=False)
    return race(jobs, problem, settings.rounds)


# ---- tables, files, pictures -----------------------------------------------------------------------


def milliseconds(ms: float) -> str:
    """Return four digits or so."""
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def gigabytes(gb: float | None) -> str:
    """Return two decimals; a dash where it is not known."""
    return "-" if gb is None else f"{gb:.2f}"


def _share(result: Result, base: Result) -> str:
    return f"{result.peak_gb / base.peak_gb:.0%}" if result.peak_gb and base.peak_gb else "-"


def _noise(result: Result, base: Result) -> str:
    return "~" if result.is_noise(base) else ""


#: Cells of a result by the head of their column; the second argument is the result to compare with.
_COLUMNS: dict[str, Callable[[Result, Result], str]] = {
    "version": lambda r, _: r.version,
    "median ms": lambda r, _: milliseconds(r.median),
    "step ms": lambda r, _: milliseconds(r.median),
    "min": lambda r, _: milliseconds(min(r.ms)),
    "max": lambda r, _: milliseconds(max(r.ms)),
    "faster": lambda r, base: f"{_noise(r, base)}{r.speedup(base):.2f} x",
    "costs": lambda r, base: f"{_noise(r, base)}{1 / r.speedup(base) - 1:+.0%}",
    "GB": lambda r, _: gigabytes(r.peak_gb),
    "peak GB": lambda r, _: gigabytes(r.peak_gb),
    "of them before": lambda r, _: gigabytes(r.built_gb),
    "share": _share,
    "difference": lambda r, _: f"{r.error:.0e}",
    "settings": lambda r, _: r.settings,
}


class Table(NamedTuple):
    """A title, columns of ``_COLUMNS`` (none for a table of threads), and what the columns mean.

    ``notes`` name the ``{base}`` that results are compared with and the ``{first}`` result.
    """

    title: str
    columns: tuple[str, ...] = ()
    notes: str = ""


_TIMES = ("version", "median ms", "min", "max", "faster", "GB", "difference", "settings")
_TIME_NOTES = """\
median ms, min, max: milliseconds of a run, over all rounds"""
_NOISE = "~: within the noise: faster in some rounds, slower in others"
_TIMES_NOTES = f"""\
{_TIME_NOTES}
faster: how many times faster than {{base}}, median over the rounds
{_NOISE}
GB: peak memory of the process
difference: of losses or probabilities from those of {{first}}, at most"""
TABLES = {
    "step": Table("training step", _TIMES, _TIMES_NOTES),
    "infer": Table("inference", _TIMES, _TIMES_NOTES),
    "memory": Table(
        "memory of training",
        ("version", "peak GB", "of them before", "share", "step ms", "settings"),
        "peak GB: peak memory of the process\n"
        "of them before: once all is loaded and built, before the first step\n"
        "share: of {base}'s peak\n"
        "step ms: milliseconds of a step, median",
    ),
    "passes": Table(
        "training step without each pass of the graph in turn",
        ("median ms", "min", "max", "costs", "GB", "difference"),
        f"{_TIME_NOTES}\n"
        "costs: more time than {base}, with all passes, median over the rounds\n"
        f"{_NOISE}\n"
        "GB: peak memory of the process\n"
        "difference: of losses from those of {first}, at most",
    ),
    "scaling": Table("training step on more and more threads"),
}


def table(settings: Settings, results: list[Result]) -> str:
    """Return the table and what its columns mean, as text."""
    if settings.table == "scaling":
        return _thread_table(results)
    base, (_, columns, notes) = _base(settings, results), TABLES[settings.table]
    body = [(r.job.variant or r.job.name, *(_COLUMNS[name](r, base) for name in columns)) for r in results]
    notes = notes.format(base=base.job.name, first=results[0].job.name)
    return f"{aligned(('', *columns), body)}\n{notes}"


def _thread_table(results: list[Result]) -> str:
    first, *others = sorted({result.job.threads for result in results})
    head = ["ms on threads:", str(first), *(cell for threads in others for cell in (str(threads), "x"))]
    body = []
    for name, line in _by_name(results).items():
        one = line.get(first)
        cells = [name, milliseconds(one.median) if one else "-"]
        for threads in others:
            many = line.get(threads)
            cells.append(milliseconds(many.median) if many else "-")
            cells.append(f"{_noise(many, one)}{many.speedup(one):.2f}" if many and one else "-")
        body.append(cells)
    lines = [aligned(head, body), f"x: times faster than on one thread, median over the rounds\n{_NOISE}"]
    chosen = {result.job.name: result.settings for result in results if result.settings}
    return "\n".join(lines + [f"{name}: {what}" for name, what in chosen.items()])


def _by_name(results: list[Result]) -> dict[str, dict[int, Result]]:
    """Return each system's results by the number of threads."""
    found: dict[str, dict[int, Result]] = {}
    for result in results:
        found.setdefault(result.job.name, {})[result.job.threads] = result
    return found


def _base(settings: Settings, results: list[Result]) -> Result:
    """The result that the others are compared with: TensorFlow's, or our eager engine's without it."""
    wanted = (COMPILED,) if settings.table == "passes" else (TENSORFLOW, EAGER)
    found = [r for system in wanted for r in results if r.job.system == system and not r.job.variant]
    return [*found, results[0]][0]


def rows(settings: Settings, results: list[Result]) -> list[dict[str, Any]]:
    """Return the figures for a file: one row a result."""
    return [
        {"system": r.job.system.name, "case": settings.label(r.job), "size": settings.size}
        | figures(r.job.threads, r.ms, r.peak_gb)
        for r in results
    ]


def figures(threads: int, ms: list[float], peak_gb: float | None = None) -> dict[str, Any]:
    """Return the figures of a row in a file, from the milliseconds of all runs."""
    times = {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms)}
    return {"threads": threads, **times, "peak_gb": peak_gb}


def draw(settings: Settings, results: list[Result], path: Path) -> None:
    """Draw the figures: lines over the threads for ``scaling``, else a bar a result, ours in colour."""
    # Here, because matplotlib takes a second to load and pictures are seldom wanted.
    from tinyunet.viz.figure import panels, write

    threads = settings.table == "scaling"
    figure, ((axes,),) = panels(6, 4) if threads else panels(8, 1.3 + 0.36 * len(results), grid="x")
    (_draw_threads if threads else _draw_bars)(axes, settings, results)
    axes.set_title(settings.title(), wrap=True)
    write(figure, path)


def _draw_bars(axes: Any, settings: Settings, results: list[Result]) -> None:
    from tinyunet.viz.figure import GREY, line_colour

    base, in_memory = _base(settings, results), settings.table == "memory"
    behind = "costs" if settings.table == "passes" else "faster"
    longest = 0.0
    for row, result in enumerate(results):
        if in_memory:
            low = middle = high = result.peak_gb or 0.0
            note = gigabytes(result.peak_gb)
        else:
            low, middle, high = min(result.ms), result.median, max(result.ms)
            note = f"{milliseconds(middle)}  {_COLUMNS[behind](result, base)}"
        colour = line_colour(0) if result.job.system in OURS else GREY
        whisker = {"ecolor": "0.25", "elinewidth": 1, "capsize": 2}
        axes.barh(row, middle, 0.66, xerr=[[middle - low], [high - middle]], color=colour, error_kw=whisker)
        axes.annotate(note, (high, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
        longest = max(longest, high)
    axes.set_yticks(range(len(results)), [r.job.variant or r.job.name for r in results])
    axes.invert_yaxis()
    label = "GB, peak of the process" if in_memory else "ms: median, least to most"
    axes.set(xlim=(0, 1.22 * longest), xlabel=label)


def _draw_threads(axes: Any, _: Settings, results: list[Result]) -> None:
    from tinyunet.viz.figure import BOUND, draw_lines

    counts, bound = sorted({result.job.threads for result in results}), "linear scaling"
    lines: dict[str, Sequence[float]] = {}
    for name, line in _by_name(results).items():
        one = next(iter(line.values()))
        lines[name] = [line[n].speedup(one) if n in line else math.nan for n in counts]
    draw_lines(axes, counts, lines | {bound: counts}, {bound: BOUND}, xlabel="threads")
    axes.set(ylabel="times faster than on one", xticks=counts, xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False, fontsize=9, loc="upper left")
