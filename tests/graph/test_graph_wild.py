"""Random nets far beyond those that anybody builds, in a process of their own: see `wild_nets`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(1800)
def test_wild_nets(tmp_path):
    """The nets of four seeds, in one process: what their kernels share is compiled once."""
    script = Path(__file__).with_name("wild_nets.py")
    command = [sys.executable, str(script), "--nets", "75", "--seed", *"0123", "--threads", *"1112"]
    with (tmp_path / "log").open("w+") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        log.seek(0)
        lines = log.readlines()
    tail = "".join(lines[-20:])
    assert done.returncode == 0, f"exit status {done.returncode}; the last lines:\n{tail}"
    assert lines.count("75 nets agree\n") == 4, tail
