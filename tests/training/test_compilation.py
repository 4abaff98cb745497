"""Kernels are compiled from both ends of the graph, and a helper that fails costs only its help."""

import importlib
import io
import json
import subprocess
import sys
from contextlib import redirect_stdout

import numba
import pytest
from numba.core.event import RecordingListener, install_listener

from kernels.base import machine
from tinyunet import UNet
from tinyunet.compiler import measure
from tinyunet.parallel.communicator import Communicator
from tinyunet.training import compilation
from tinyunet.training.compilation import Task, compile_kernels, compile_task
from tinyunet.training.progress import Job, Progress
from tinyunet.training.settings import Settings

CONFIG = UNet(dim=3, in_channels=2, classes=3, filters=5, depth=3).config
SHAPES = [[1, 12, 8, 12], [2, 8, 8, 8]]


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYUNET_CACHE", str(tmp_path))
    measure.remembered.cache_clear()
    yield
    measure.remembered.cache_clear()


def test_either_end_leaves_nothing_to_compile():
    task = Task(CONFIG, {"accuracy": "fast"}, SHAPES, SHAPES[0][1:], machine.threads())
    compile_task(task, "backwards")
    with install_listener("numba:compile", RecordingListener()) as compiled:
        compile_task(task, "forwards")
    assert not compiled.buffer
    assert not measure.remembered(), "nothing can be timed meanwhile"


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_helper_compiles_what_will_be_chosen(monkeypatch, deterministic):
    passes = importlib.import_module("tinyunet.compiler.passes.choose_algorithm")
    choose, seen = passes._choose, set()
    monkeypatch.setattr(passes, "_choose", lambda *given: seen.add(given[2].deterministic) or choose(*given))
    commands = []
    monkeypatch.setattr(compilation, "_compile_from_both_ends", commands.append)
    monkeypatch.setattr(compilation, "_has_room_for_two", lambda task: True)
    steps = iter((compilation._MissingKernelError, None))
    monkeypatch.setattr(compilation, "_steps", lambda *_: raised(next(steps)))
    monkeypatch.setattr(compilation, "segment", lambda *_, **__: None)
    settings = Settings(patch_size=(8, 8, 8), deterministic=deterministic)
    with redirect_stdout(io.StringIO()), Progress(shown=False) as progress:
        compile_kernels(Job(settings, Communicator(), progress), CONFIG, [(1, 8, 8, 8)])
    (task,) = commands
    compile_task(Task(*json.loads(json.dumps(task))), "forwards")
    assert seen == {deterministic}


def raised(error):
    if error:
        raise error


def test_a_helper_needs_memory():
    small = Task(CONFIG, {"accuracy": "fast"}, SHAPES, (8, 8, 8), 1)
    huge = small._replace(batch_shapes=[[512, 512, 512, 512]])
    assert not compilation._has_room_for_two(huge)
    assert compilation._has_room_for_two(small) == (machine.cores() > 1)


def test_a_helper_ends_with_its_parent():
    task = Task(CONFIG, {"accuracy": "fast"}, [[1, 96, 96, 96]], (96, 96, 96), 1)
    command = [sys.executable, "-m", compilation.__name__, json.dumps(task)]
    helper = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert helper.poll() is None
    helper.stdin.close()  # as when the parent is killed
    assert helper.wait(timeout=60) == 1


@pytest.mark.parametrize("python", [sys.executable, "/bin/false"])
def test_kernels_are_there_whatever_the_helper_does(monkeypatch, python):
    monkeypatch.setattr(compilation.sys, "executable", python)
    settings = Settings(patch_size=(8, 8, 8))
    shapes = [tuple(shape) for shape in SHAPES]
    with redirect_stdout(io.StringIO()) as said, Progress(shown=True) as progress:
        compile_kernels(Job(settings, Communicator(), progress), CONFIG, shapes)
    assert said.getvalue().startswith("loading kernels")
    with install_listener("numba:compile", RecordingListener()) as compiled:
        compile_task(Task(CONFIG, {"accuracy": "fast"}, SHAPES, (8, 8, 8), machine.threads()), "forwards")
    assert not compiled.buffer


@pytest.mark.parametrize("room", [True, False])
def test_a_kernel_that_is_missing_calls_the_helper_whatever_is_known(monkeypatch, room):
    """As where the kernels of a new clone are missing, but algorithms were measured by another."""
    calls = []

    def steps(*_):
        calls.append("steps")
        numba.njit(lambda x: x + 1)(1)

    measure.remembered()["a convolution"] = None
    monkeypatch.setattr(compilation, "_has_room_for_two", lambda task: room)
    monkeypatch.setattr(compilation, "_steps", steps)
    monkeypatch.setattr(compilation, "_compile_from_both_ends", lambda task: calls.append("helper"))
    monkeypatch.setattr(compilation, "segment", lambda *_, **__: calls.append("segment"))
    with redirect_stdout(io.StringIO()), Progress(shown=False) as progress:
        compile_kernels(Job(Settings(patch_size=(8, 8, 8)), Communicator(), progress), CONFIG, [])
    assert calls == (["steps", "helper"] if room else []) + ["steps", "segment"]
