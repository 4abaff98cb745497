"""Kernels that two processes compile at once are both found on disk."""

import subprocess
import sys

MODULE = """
from kernels.compiler import kernel

def make(addend):
    @kernel
    def add(x):
        return x + addend
    return add
"""
COMPILE = "import sys, many; [many.make(i)(1) for i in range(int(sys.argv[1]), 40, 2)]"
LOAD = """
import many
for i in range(40):
    add = many.make(i)
    assert add(1) == 1 + i
    assert sum(add.stats.cache_hits.values()) == 1, i
"""


def test_two_processes_share_a_cache(tmp_path):
    (tmp_path / "many.py").write_text(MODULE)

    def run(program, *arguments):
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    for process in [run(COMPILE, "0"), run(COMPILE, "1")]:
        assert process.wait() == 0, process.stderr.read()
    process = run(LOAD)
    assert process.wait() == 0, process.stderr.read()
