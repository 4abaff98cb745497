"""Random nets far beyond those that anybody builds, in processes of their own: see `wild_nets`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("seed", "threads"), [(0, 1), (1, 1), (2, 1), (3, 2)])
def test_wild_nets(seed, threads, tmp_path):
    script = Path(__file__).with_name("wild_nets.py")
    command = [sys.executable, str(script), "--nets", "75", "--seed", str(seed)]
    command += ["--threads", str(threads)]
    with (tmp_path / "log").open("w+") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        log.seek(0)
        tail = "".join(log.readlines()[-20:])
    assert done.returncode == 0, f"exit status {done.returncode}; the last lines:\n{tail}"
    assert tail.endswith("75 nets agree\n")
