"""Examples for clusters: as far as they can be checked without one."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tinyunet.train import make_parser

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SLURM = EXAMPLES / "slurm.sh"
MPI_JOB = EXAMPLES / "kubernetes-mpijob.yaml"
# What keeps caches off a shared file system.
CACHES = ("NUMBA_CACHE_DIR", "TINYUNET_CACHE")


def options_of(words: list[str]) -> list[str]:
    """What follows the name of the program in a command."""
    return words[words.index("tinyunet.train") + 1 :]


def test_the_slurm_script_is_one():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    text = SLURM.read_text()
    for cache in CACHES:
        assert f"export {cache}=$LOCAL/" in text
    assert text.index("export SRUN_CPUS_PER_TASK=") < text.index("\nsrun ")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_the_slurm_script_has_no_traps():
    subprocess.run(["shellcheck", str(SLURM)], check=True)


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (143, True), (9, False)])
def test_the_slurm_script_runs(tmp_path, ended, requeued):
    """With commands of Slurm that write down how they were called."""
    data, local, log = tmp_path / "data", tmp_path / "local", tmp_path / "log"
    data.mkdir()
    local.mkdir()
    (data / "dataset.json").write_text("{}")
    srun = tmp_path / "srun"
    srun.write_text(
        f'#!/bin/bash\necho "srun $@" >> {log}\n'
        f'case "$*" in *tinyunet.train*) ls "$TMPDIR"/*/data >> {log}; exit {ended};; esac\n'
        'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'
    )
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "scontrol $@" >> {log}\n')
    for command in (srun, scontrol):
        command.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DATA": str(data),
        "PROGRAM": "/program",
        "RUNS": "/runs",
        "TMPDIR": str(local),
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
    }
    done = subprocess.run(["bash", str(SLURM)], env=environment, capture_output=True, text=True)
    assert done.returncode == ended, done.stderr
    called = log.read_text()
    (training,) = re.findall("^srun .*tinyunet.train.*$", called, re.MULTILINE)
    options = make_parser().parse_args(options_of(training.split()))
    assert options.data_path == f"{local}/tinyunet-7/data"
    assert options.output == "/runs/7"
    assert "dataset.json" in called
    assert ("scontrol requeue 7" in called) == requeued
    assert not any(local.iterdir())


def test_the_manifest_describes_a_job():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(MPI_JOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    launcher, worker = (job["spec"]["mpiReplicaSpecs"][role] for role in ("Launcher", "Worker"))
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    command = launcher["template"]["spec"]["containers"][0]["command"]
    assert all(isinstance(word, str) for word in command)

    # As many ranks as slots, and as many cores as they are bound to.
    slots, ranks = job["spec"]["slotsPerWorker"], int(command[command.index("-n") + 1])
    assert ranks == slots * worker["replicas"]
    cores = int(command[command.index("-bind-to") + 1].removeprefix("core:"))
    resources = container["resources"]
    assert int(resources["limits"]["cpu"]) == cores * slots
    assert resources["requests"] == resources["limits"]
    options = make_parser().parse_args(options_of(command))
    assert options.batch_size % ranks == 0

    # Every volume mounted is there, and caches lie on the local one.
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for each in (container, *pod["initContainers"]):
        assert {mount["name"] for mount in each["volumeMounts"]} <= set(volumes)
    assert "emptyDir" in volumes["local"]
    (local,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "local"]
    # Ranks get the environment of mpirun, not of the container that they run in.
    (launching,) = launcher["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in launching["env"]}
    for cache in CACHES:
        assert environment[cache].startswith(f"{local}/")
    assert options.data_path.startswith(f"{local}/")
