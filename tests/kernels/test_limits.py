"""Cores and memory of a container, from folders like Linux's; and that kernels keep to the cores."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.base import limits

# ID, parent, device, root, mount point, options - type, source, options of the file system.
V1 = "33 31 0:29 {} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "36 31 0:32 {} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2 = "31 23 0:28 {} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
OTHERS = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n34 31 0:30 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids"


def machine_with(folder: Path, groups: str, mounts: list[str], files: dict[str, str]) -> Path:
    """Write what Linux shows of a process' groups; ``files`` are below /sys/fs/cgroup."""
    all_files = {"proc/self/cgroup": groups, "proc/self/mountinfo": "\n".join([OTHERS, *mounts])}
    all_files |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in all_files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def v1_quota(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    path = f"cpu,cpuacct/{folder}/cpu.cfs"
    return {f"{path}_quota_us": str(quota), f"{path}_period_us": str(period)}


DEEP_V1 = "5:pids:/\n4:cpu,cpuacct:/docker/a/b\n1:name=systemd:/x\n0::/system"
QUOTAS = {
    "version 1, none": ("4:cpu,cpuacct:/", [V1.format("/")], v1_quota("", -1), math.inf),
    "version 1": ("4:cpu,cpuacct:/", [V1.format("/")], v1_quota("", 150_000), 1.5),
    "version 1, nested": (
        DEEP_V1,
        [V1.format("/")],
        v1_quota("docker/a/b", 400_000) | v1_quota("docker/a", 50_000, 25_000) | v1_quota("", -1),
        2.0,
    ),
    # A container without a namespace of groups is told its name on the machine, and sees itself as the top.
    "version 1, own group on top": (
        DEEP_V1,
        [V1.format("/docker/a")],
        v1_quota("b", -1) | v1_quota("", 300_000) | v1_quota("docker/a/b", 1),
        3.0,
    ),
    "version 1, another group on top": (DEEP_V1, [V1.format("/kubepods/c")], v1_quota("", 200_000), 2.0),
    "version 2, none": ("0::/", [V2.format("/")], {"cpu.max": "max 100000"}, math.inf),
    "version 2": ("0::/", [V2.format("/")], {"cpu.max": "250000 100000"}, 2.5),
    "version 2, less than a core": ("0::/", [V2.format("/")], {"cpu.max": "1000 100000"}, 0.01),
    "version 2, nested, the parent's is tighter": (
        "0::/job/step/task",
        [V2.format("/")],
        {
            "job/step/task/cpu.max": "max 100000",
            "job/step/cpu.max": "800000 100000",
            "job/cpu.max": "600000 200000",
        },
        3.0,
    ),
    "version 2, nested, its own is tighter": (
        "0::/job/step",
        [V2.format("/")],
        {"job/step/cpu.max": "100000 100000", "job/cpu.max": "600000 200000"},
        1.0,
    ),
    "version 2, outside of the namespace": (
        "0::/../other",
        [V2.format("/")],
        {"cpu.max": "700000 100000"},
        7.0,
    ),
    "both versions": (
        "2:cpu,cpuacct:/a\n0::/b",
        [V1.format("/"), V2.format("/").replace("cgroup rw,nosuid", "cgroup/unified rw")],
        v1_quota("a", 500_000) | {"unified/b/cpu.max": "400000 100000"},
        4.0,
    ),
    "two mounts of one tree": (
        "0::/a",
        [V2.format("/"), V2.format("/elsewhere").replace("/sys/fs/cgroup", "/mnt")],
        {"a/cpu.max": "200000 100000"},
        2.0,
    ),
    "no file": ("0::/a/b", [V2.format("/")], {}, math.inf),
    "no mount": ("0::/", [], {"cpu.max": "250000 100000"}, math.inf),
    "not numbers": ("0::/", [V2.format("/")], {"cpu.max": "many"}, math.inf),
    "a period of 0": ("0::/", [V2.format("/")], {"cpu.max": "5 0"}, math.inf),
    "lines of another form": ("nothing\n::\n", ["a - b", "- cgroup2", ""], {}, math.inf),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_the_tightest_quota_of_a_process_counts(kind, tmp_path):
    groups, mounts, files, expected = QUOTAS[kind]
    assert limits.cpu_quota(machine_with(tmp_path, groups, mounts, files)) == expected


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert limits.cpu_quota(tmp_path) == limits.memory_limit(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("quota", "expected"),
    [(0.01, 1), (1.0, 1), (1.01, 2), (2.0, 2), (2.5, 3), (3.0, 3), (64.0, 3), (math.inf, 3)],
)
def test_cores_are_those_of_the_mask_or_the_quota_rounded_up(quota, expected, monkeypatch):
    monkeypatch.setattr(limits, "affinity", lambda: frozenset({0, 5, 6}))
    monkeypatch.setattr(limits, "cpu_quota", lambda: quota)
    assert limits.cores() == expected


MEMORY = {
    "version 1": (V1_MEMORY, {"memory/a/memory.limit_in_bytes": "8000"}, 8000),
    "version 1, nested": (
        V1_MEMORY,
        {"memory/a/memory.limit_in_bytes": "8000", "memory/memory.limit_in_bytes": "900"},
        900,
    ),
    "version 2": (V2, {"a/memory.max": "8000", "memory.max": "max"}, 8000),
    "version 2, nested": (V2, {"a/memory.max": "max", "memory.max": "700"}, 700),
    "version 2, none": (V2, {"a/memory.max": "max"}, math.inf),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_the_tightest_memory_limit_counts(kind, tmp_path):
    mount, files, expected = MEMORY[kind]
    root = machine_with(tmp_path, "3:memory:/a\n0::/a", [mount.format("/")], files)
    assert limits.memory_limit(root) == expected


# `limits` with another quota, in the place of the module that the package would load.
THREADS = """
import importlib.util, json, os, sys, threading

def load(quota):
    spec = importlib.util.find_spec("kernels")
    path = os.path.join(spec.submodule_search_locations[0], "base", "limits.py")
    spec = importlib.util.spec_from_file_location("kernels.base.limits", path)
    sys.modules["kernels.base.limits"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.cpu_quota = lambda: quota
    module.affinity = lambda: {0, 1, 2}

load(float(sys.argv[1]))
if "numba first" in sys.argv:
    import numba
if "threads first" in sys.argv:
    import numba
    numba.set_num_threads(2)
if "another version" in sys.argv:
    import numba.np.ufunc.parallel
    del numba.np.ufunc.parallel.gen_snt_check
import numpy as np
from kernels.base import arrays, machine

arrays.copy_vectors(np.zeros(64, np.float32), np.zeros(64, np.float32))
found = [machine.cores(), machine.most_threads(), machine.threads()]
thread = threading.Thread(target=lambda: found.append(machine.threads()))
thread.start(), thread.join()
try:
    machine.set_threads(2)
except ValueError as error:
    found.append(str(error))
# Numba reads its variables again.
os.environ["NUMBA_DEBUG_CACHE"] = "0"
numba = sys.modules["numba"]
numba.njit(lambda: 0)()
print(json.dumps(found))
"""


def threads_found(quota: float, *how: str, **variables: str) -> list[object]:
    environment = {n: v for n, v in os.environ.items() if n != "NUMBA_NUM_THREADS"} | variables
    command = [sys.executable, "-c", THREADS, str(quota), *how]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return list(json.loads(run.stdout))


needs_two_cores = pytest.mark.skipif(len(limits.affinity()) < 2, reason="one core")
TOO_MANY = "threads is 2; this process can use 1 to 1"


@needs_two_cores
@pytest.mark.parametrize("how", [(), ("numba first",)])
def test_numba_starts_no_more_threads_than_the_quota(how):
    assert threads_found(0.5, *how) == [1, 1, 1, 1, TOO_MANY]


@needs_two_cores
@pytest.mark.parametrize("how", ["threads first", "another version"])
def test_where_the_number_of_threads_is_fixed_fewer_are_used_here(how):
    """Threads that run already, or a version of Numba that counts them otherwise."""
    assert threads_found(1, how)[:3] == [1, 1, 1]


@needs_two_cores
def test_as_many_threads_as_the_environment_says():
    assert threads_found(1, NUMBA_NUM_THREADS="2") == [1, 1, 2, 2]


@needs_two_cores
def test_without_a_quota_nothing_changes():
    everything = len(limits.affinity())
    assert threads_found(math.inf)[2:4] == [everything, everything]


@needs_two_cores
def test_a_real_group_of_this_machine():
    own = [group for version, group in limits._groups("cpu", Path("/")) if version == 1]
    group = Path(own[0] if own else "/proc", f"tinyunet-{os.getpid()}")
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("60000")
    except OSError:
        pytest.skip("groups cannot be made here")
    join = f"open('{group}/cgroup.procs', 'w').write(str(__import__('os').getpid()));"
    program = join + "from kernels.base import machine; print(machine.cores(), machine.threads())"
    try:
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    finally:
        group.rmdir()
    assert run.stdout == "1 1\n", run.stderr
