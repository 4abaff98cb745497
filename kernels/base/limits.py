"""How many cores and how much memory this process may use: of a container or a job, not of the machine.

Linux holds a container to its share by control groups (cgroups), in folders of two kinds. Each process is in
one group of each folder tree, and every group above holds it, too; the tightest counts::

                     version 1                                   version 2
    cores            cpu.cfs_quota_us / cpu.cfs_period_us, or -1 cpu.max: "quota period", or "max period"
    bytes            memory.limit_in_bytes                       memory.max: a number, or "max"

Source: man 7 cgroups; "Control Group v2" and "CFS Bandwidth Control" in the Linux kernel's documentation.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")


class _Mount(NamedTuple):
    """Folder ``point`` that shows a tree of groups; ``root`` is the machine's group at its top."""

    version: int
    controllers: frozenset[str]
    root: str
    point: str


def affinity() -> frozenset[int]:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cores() -> int:
    """Return how many threads can run at once: the cores of the affinity mask, or fewer by the quota."""
    return math.ceil(min(len(affinity()), cpu_quota()))


def cpu_quota(root: Path = _ROOT) -> float:
    """Return the cores' worth of time that the groups of this process get; infinite without a quota.

    Parameters
    ----------
    root : Path
        Where ``proc`` and the folders of the groups are.
    """
    return min(_limits("cpu", _quota, root), default=math.inf)


def memory_limit(root: Path = _ROOT) -> float:
    """Return the bytes that the groups of this process may take; infinite without a limit."""
    return min(_limits("memory", _memory, root), default=math.inf)


def _quota(version: int, group: Path) -> float:
    if version == 2:
        quota, period = (group / "cpu.max").read_text().split()
    else:
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return int(quota) / int(period)


def _memory(version: int, group: Path) -> float:
    return int((group / ("memory.max" if version == 2 else "memory.limit_in_bytes")).read_text())


def _limits(controller: str, read: Callable[[int, Path], float], root: Path) -> Iterator[float]:
    """Limits of all groups that this process is in; "max" and what is below 0 are none."""
    for version, group in _groups(controller, root):
        limit = -1.0
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            limit = read(version, group)
        if limit > 0:
            yield limit


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of the groups that hold this process, from its own up to the top."""
    own: dict[str, str] = {}  # by controller; "" is that of version 2
    mounts: list[_Mount] = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(errors="replace").splitlines():
            _, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            own |= dict.fromkeys(names.split(","), path)
        text = (root / "proc/self/mountinfo").read_text(errors="replace")
        mounts = [mount for line in text.splitlines() for mount in _mount(line)]
    for mount in mounts:
        name = "" if mount.version == 2 else controller
        if name in own and (mount.version == 2 or controller in mount.controllers):
            top = Path(root, mount.point.lstrip("/"))
            below = _below(own[name], mount.root)
            yield from ((mount.version, top / folder) for folder in (below, *below.parents))


def _mount(line: str) -> Iterator[_Mount]:
    """Read a line of ``mountinfo``: ID, parent, device, root, mount point, ... - type, source, options."""
    before, _, after = line.partition(" - ")
    fields, kind = before.split(), after.split()
    version = {"cgroup": 1, "cgroup2": 2}.get(kind[0] if kind else "")
    if version and len(fields) > 4:
        root, point = (field.replace("\\040", " ") for field in fields[3:5])
        yield _Mount(version, frozenset(kind[-1].split(",")), root, point)


def _below(group: str, root: str) -> Path:
    """Path of a group from the top of the mounted tree; the top itself for a group outside that tree.

    A container may see its own group as the top, and yet read the group's name on the machine.
    """
    path = os.path.relpath(group, root)
    return Path() if ".." in path.split("/") else Path(path)
