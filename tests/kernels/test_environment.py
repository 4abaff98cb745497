"""Variables that Numba cannot run with, and how its threads wait."""

import importlib.util
import os
import re
import subprocess
import sys

import numba
import pytest
from launcher import launch, needs_mpi

from kernels.base.limits import affinity
from tinyunet.parallel.communicator import _LAUNCHERS

WRONG = {
    "NUMBA_NUM_THREADS=0": "a whole number from 1 to 4096",
    "NUMBA_NUM_THREADS=-3": "a whole number from 1 to 4096",
    "NUMBA_NUM_THREADS=": "a whole number from 1 to 4096",
    "NUMBA_NUM_THREADS=two": "a whole number from 1 to 4096",
    "NUMBA_NUM_THREADS=1.5": "a whole number from 1 to 4096",
    "NUMBA_NUM_THREADS=99999999999": "a whole number from 1 to 4096",
    "NUMBA_THREADING_LAYER=foo": "one of default, omp, tbb, workqueue, safe, threadsafe, forksafe",
    "NUMBA_THREADING_LAYER=": "one of default, omp, tbb, workqueue, safe, threadsafe, forksafe",
    "NUMBA_OPT=9": "0, 1, 2, 3 or max",
    "NUMBA_DISABLE_JIT=yes": "a whole number",
    "NUMBA_BOUNDSCHECK=on": "a whole number",
    "NUMBA_CPU_NAME=i1186": "what LLVM knows; it has no processor 'i1186'",
    "NUMBA_CPU_FEATURES=avx2": "features with + or - before each, as +avx2,-fma",
    "NUMBA_CPU_FEATURES=+avx2,+foo": "what LLVM knows; it has no feature '+foo'",
}
if hasattr(numba.config, "CACHE_LOCATOR_CLASSES"):  # from Numba 0.62 on
    WRONG["NUMBA_CACHE_LOCATOR_CLASSES=foo"] = "names of Numba's cache locators"


def python(program: str, *variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program with variables of the form name=value; those of a launcher are not passed on."""
    removed = (*_LAUNCHERS, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {n: v for n, v in os.environ.items() if n not in removed}
    environment |= dict(variable.split("=", 1) for variable in variables)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def refusal(variable: str) -> str:
    name, value = variable.split("=", 1)
    return f"{name} is {value!r}; expected {WRONG[variable]}"


@pytest.mark.parametrize("variable", WRONG)
def test_a_wrong_variable_is_named_in_a_line(variable):
    run = python("import tinyunet; tinyunet.UNet", variable)
    assert run.returncode == 1
    assert run.stderr == f"EnvironmentVariableError: {refusal(variable)}\n"


def test_a_wrong_variable_can_be_caught_and_put_right():
    program = """
import os
try:
    import kernels
except OSError as error:
    print(error)
    os.environ["NUMBA_NUM_THREADS"] = "1"
from kernels.base import machine
print(machine.threads())
raise KeyError("others are shown as ever")
"""
    run = python(program, "NUMBA_NUM_THREADS=0")
    assert run.stdout == refusal("NUMBA_NUM_THREADS=0") + "\n1\n"
    assert run.stderr.startswith("Traceback")


COMMANDS = {"train": "", "predict": "no.npz no.nii -o nowhere", "bench": "step --size 16"}
IN_COMMANDS = ["NUMBA_NUM_THREADS=0", "NUMBA_THREADING_LAYER=foo", "NUMBA_OPT=9"]


@pytest.mark.parametrize("variable", IN_COMMANDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_it_in_a_line(command, variable):
    program = f"""
import runpy, sys
sys.argv[1:] = {COMMANDS[command].split()}
runpy.run_module("tinyunet.{command}", run_name="__main__")
"""
    run = python(program, variable)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"tinyunet.{command}: {refusal(variable)}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_need_compiled_kernels(command):
    program = f"""
import runpy, sys
sys.argv[1:] = {COMMANDS[command].split()}
runpy.run_module("tinyunet.{command}", run_name="__main__")
"""
    run = python(program, "NUMBA_DISABLE_JIT=1")
    expected = "NUMBA_DISABLE_JIT is '1'; expected 0: most kernels run only compiled"
    assert run.stderr == f"tinyunet.{command}: {expected}\n"


def test_help_needs_no_right_variable():
    program = "from tinyunet.train import make_parser; make_parser().parse_args(['--help'])"
    assert python(program, "NUMBA_NUM_THREADS=0").stdout.startswith("usage:")


@needs_mpi
def test_of_several_ranks_one_says_it():
    done = launch(["-m", "tinyunet.train"], 3, NUMBA_NUM_THREADS="0")
    assert done.returncode == 2
    assert done.stderr.count("NUMBA_NUM_THREADS is '0'") == 1
    assert "Traceback" not in done.stderr


# ---- how threads wait ------------------------------------------------------------------------------

needs_openmp = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("numba.np.ufunc.omppool") is None,
    reason="Numba has no GNU OpenMP here",
)
# A loop on all threads, which OpenMP must be loaded for.
LOOP = """
import numpy as np
from kernels.base.arrays import copy_vectors
copy_vectors(np.zeros(64, np.float32), np.zeros(64, np.float32))
"""
WAYS_IN = {
    "a kernel": "import kernels.base.arrays",
    "the package of kernels": "import kernels",
    "Numba first": "import numba; import kernels",
    "a model": "import tinyunet; tinyunet.UNet(filters=4, depth=2)",
    "a compiled model": "from tinyunet import compile",
    "a command": "from tinyunet.commandline import load_machine; load_machine()",
    "a benchmark's worker": "import tinyunet.benchmarks.peers.ours",
    "a benchmark's ranks": "import tinyunet.benchmarks.ranks",
    "a training": "import tinyunet.training.run",
}


def spins(run: subprocess.CompletedProcess[str]) -> list[str]:
    """How often a thread looks before it sleeps, as OpenMP says when it is loaded."""
    assert run.returncode == 0, run.stderr
    return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)


@needs_openmp
@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in_has_threads_that_sleep(way):
    run = python(WAYS_IN[way] + LOOP, "OMP_DISPLAY_ENV=verbose")
    assert spins(run) == ["3000"]


@needs_openmp
@pytest.mark.parametrize(
    ("variable", "expected"), [("GOMP_SPINCOUNT=77", "77"), ("OMP_WAIT_POLICY=passive", "0")]
)
def test_what_the_environment_says_counts(variable, expected):
    assert spins(python("import kernels" + LOOP, "OMP_DISPLAY_ENV=verbose", variable)) == [expected]


@needs_openmp
def test_other_programs_and_libraries_do_not_inherit_it():
    program = "import os, subprocess, kernels; subprocess.run(['env']); print(*os.environ)"
    assert "GOMP_SPINCOUNT" not in python(program).stdout


@needs_openmp
def test_openmp_that_is_loaded_already_is_told():
    program = "import ctypes; ctypes.CDLL('libgomp.so.1')\nimport kernels"
    for variables, warned in (([], 1), (["GOMP_SPINCOUNT=5"], 0)):
        run = python(program, *variables)
        if "OSError" in run.stderr:
            pytest.skip("no libgomp.so.1 where the system looks")
        assert run.stderr.count("import tinyunet first, or set GOMP_SPINCOUNT=3000") == warned


# 60 loops on two threads, each followed by a pause: the processor's time in the pauses is that of threads
# which wait for the next loop.
PAUSES = """
import time
import numpy as np
from kernels.base import arrays, machine

machine.set_threads(2)
src = np.zeros(1 << 15, np.float32)
arrays.copy_vectors(src, src.copy())
waiting = 0.0
for _ in range(60):
    arrays.copy_vectors(src, src.copy())
    start = time.process_time()
    time.sleep(0.005)
    waiting += time.process_time() - start
print(waiting)
"""


@needs_openmp
@pytest.mark.skipif(len(affinity()) < 2, reason="one core")
def test_waiting_threads_take_no_time_of_the_processor():
    """Against threads that spin through all pauses: beside busy programs these would be in the way."""
    asleep, spinning = (
        float(python(PAUSES, *given).stdout) for given in ((), ("GOMP_SPINCOUNT=10000000000",))
    )
    assert 3 * asleep < spinning
