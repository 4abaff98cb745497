"""Running a benchmark's ranks under mpirun, as they are or held to a bandwidth.

``throttled`` gives each of two ranks a network namespace of its own, joined by a pair of virtual
Ethernet devices that ``tc`` holds to a bandwidth in each direction (a token bucket, so that messages
queue as on a wire). A variable makes MPI take the ranks for different nodes, and send over TCP.
It needs root, Linux, and MPICH with UCX.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinyunet.common.errors import AgreedError, one_line

# Bytes that a throttled link lets pass at once: what TCP hands over in one piece must fit in. An array
# that is no larger passes unhindered, because the bucket fills again while ranks wait for each other.
BUCKET_BYTES = 256_000
_LONGEST_SECONDS = 600
_SPACES, _DEVICES = ("tinyunet0", "tinyunet1"), ("tinyveth0", "tinyveth1")
_TCP = {"UCX_TLS": "tcp,self", "MPIR_CVAR_NOLOCAL": "1"}
_IN_ITS_SPACE = """#!/bin/sh
exec ip netns exec tinyunet$PMI_RANK env UCX_NET_DEVICES=tinyveth$PMI_RANK "$@"
"""


def mpirun() -> str | None:
    """Return the mpirun in this Python's folder, or the one on the path; None if there is neither."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def run(ranks: int, task: dict[str, Any], wrapper: Sequence[str] = ()) -> Any:
    """Run a task of :mod:`tinyunet.benchmarks.ranks`, return rank 0's results; one rank needs no mpirun.

    A wrapper stands before the command of each rank, and ranks then send over TCP. AgreedError if there is no
    mpirun, or the ranks end with an error or do not end.
    """
    command = [sys.executable, "-m", "tinyunet.benchmarks.ranks", json.dumps(task)]
    if ranks > 1:
        launcher = mpirun()
        if launcher is None:
            raise AgreedError("--ranks: there is no mpirun; pip install 'tinyunet[mpi]'")
        command = [launcher, "-n", str(ranks), *wrapper, *command]
    try:
        environment = os.environ | (_TCP if wrapper else {})
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise AgreedError(f"the ranks had not ended after {_LONGEST_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("Abort(")] or ["no message"]
        raise AgreedError(f"the ranks ended with code {done.returncode}: {one_line(said[-1])[:200]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def throttled(gbit_per_s: float) -> Iterator[Sequence[str]]:
    """Make two network namespaces joined at a bandwidth; give the wrapper that puts ranks in them.

    AgreedError without root, or without the programs ``ip`` and ``tc``.
    """
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder) / "in_its_space.sh"
        wrapper.write_text(_IN_ITS_SPACE)
        wrapper.chmod(0o755)
        try:
            _join(gbit_per_s)
            yield [str(wrapper)]
        finally:
            for space in _SPACES:
                subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _join(gbit_per_s: float) -> None:
    first, second = _SPACES
    for space in _SPACES:
        _do("ip", "netns", "add", space)
    pair = ("veth", "peer", "name", _DEVICES[1], "netns", second)
    _do("ip", "link", "add", _DEVICES[0], "netns", first, "type", *pair)
    for number, (space, device) in enumerate(zip(_SPACES, _DEVICES, strict=True)):
        _do("ip", "-n", space, "addr", "add", f"10.77.0.{number + 1}/24", "dev", device)
        _do("ip", "-n", space, "link", "set", device, "up")
        _do("ip", "-n", space, "link", "set", "lo", "up")
        bucket = ("rate", f"{gbit_per_s}gbit", "burst", f"{BUCKET_BYTES}b", "latency", "100ms")
        _do("tc", "-n", space, "qdisc", "add", "dev", device, "root", "tbf", *bucket)
    time.sleep(2)  # until both ends have seen each other


def _do(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise AgreedError(f"--throttle: there is no program {command[0]!r}") from None
    if done.returncode:
        said = one_line(done.stderr) or f"code {done.returncode}"
        raise AgreedError(f"--throttle: {' '.join(command[:4])}: {said} (it takes root)")
