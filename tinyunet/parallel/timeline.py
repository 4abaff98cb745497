"""When each kernel ran, each bucket was under way and each rank waited: a trace for a viewer.

The format is Chrome's trace of events, which https://ui.perfetto.dev opens: an event is a name, a row
(a "thread" of a "process", which is a rank), a start and a duration in microseconds.

Source: "Trace Event Format", Google (2016).
"""

from pathlib import Path
from typing import Any

from tinyunet.common.files import signed, write_json

KERNELS, WAITS = "kernels", "waits"
# Events that are kept; at 150 kernels a step that is a hundred steps, and 5 MB. The last event says so.
_MOST_EVENTS = 20_000


class Timeline:
    """The events of one rank, with their times.

    Zero of the trace is ``clock_start``, the value of ``time.perf_counter`` at a moment that all ranks share.
    """

    def __init__(self, rank: int, clock_start: float) -> None:
        self._rank, self._zero = rank, clock_start
        self._rows: dict[str, int] = {KERNELS: 0, WAITS: 1}
        self._spans: list[dict[str, Any]] = []
        self._lost = 0

    def span(self, row: str, name: str, start: float, end: float, **details: Any) -> None:
        """Record that something lasted from ``start`` to ``end``, of ``time.perf_counter``."""
        if len(self._spans) >= _MOST_EVENTS:
            self._lost += 1
            return
        where = {"pid": self._rank, "tid": self._rows.setdefault(row, len(self._rows))}
        when = {"ts": (start - self._zero) * 1e6, "dur": (end - start) * 1e6}
        self._spans.append({"ph": "X", "name": name, "cat": row, **where, **when, "args": details})

    def save(self, path: Path | str) -> None:
        """Write the trace, or raise OSError."""
        common = {"ph": "M", "pid": self._rank, "tid": 0, "ts": 0}
        events = [common | {"name": "process_name", "args": {"name": f"rank {self._rank}"}}]
        for row, number in self._rows.items():
            events.append(common | {"name": "thread_name", "tid": number, "args": {"name": row}})
        events += self._spans
        if self._lost:
            end = self._spans[-1]["ts"] + self._spans[-1]["dur"]
            name = f"full: {self._lost} later events are left out"
            events.append(common | {"ph": "i", "name": name, "ts": end, "s": "p"})
        trace = signed({"traceEvents": events, "displayTimeUnit": "ms"})
        write_json(path, trace, follow_links=True)


def file_of_rank(path: Path | str, rank: int, ranks: int) -> Path:
    """Return the path itself for a rank alone, else ``name.rank0.json`` for ``name.json``."""
    path = Path(path)
    return path if ranks == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
