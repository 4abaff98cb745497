"""Compiles kernels before the first step: the first start on a machine has to wait for that.

Numba compiles on one core. So a second process, this module run as a program, works through the same graphs
from their other ends; this process finds on disk what the helper has compiled::

    this process    first layer -> ...                    ... <- last layer    helper

While both are busy nothing can be timed. So each convolution is compiled for all algorithms that may be the
fastest, and they are timed once the helper has ended.
"""

import gc
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np

from kernels.base import machine
from kernels.base.layout import blocks
from kernels.base.simd import LANES
from tinyunet.compiler import compile, measure
from tinyunet.compiler.passes.choose_algorithm import Direction, only_compiling
from tinyunet.losses import dice_cross_entropy, of_levels
from tinyunet.optim import Adam
from tinyunet.segmentation.sliding_window import patch_for, predictor, segment
from tinyunet.training.progress import Job, on_compilation
from tinyunet.training.samples import Batch, half_the_memory
from tinyunet.training.settings import Settings
from tinyunet.training.step import compiled_gradients, eager_gradients
from tinyunet.unet import UNet

_TENSORS = 24  # of the first level that the arena of a training step has room for, about


class Task(NamedTuple):
    """A list of the kernels to compile, in types that JSON has."""

    config: Mapping[str, Any]  # arguments of the model
    options: Mapping[str, Any]  # of tinyunet.compile
    batch_shapes: Sequence[Sequence[int]]  # [MB, D, H, W] of the training, or [MB, D, H]
    patch_size: Sequence[int]  # [D, H, W] of a volume to predict
    threads: int


def compile_kernels(job: Job, config: Mapping[str, Any], batch_shapes: Sequence[tuple[int, ...]]) -> None:
    """Run a training step and an inference on one rank of each node, with a model thrown away.

    The first start on a machine compiles the kernels and measures which algorithms are fastest, and
    keeps both on disk; later starts load them. If all ranks compiled at once, each would do the whole work,
    on shared cores. So they wait, and load what they need in their first step. Nodes need not share a disk:
    one rank of each compiles. ``config`` holds the arguments of the model, ``batch_shapes`` all that the
    training will have.
    """
    settings, communicator, progress = job
    what = "loading kernels (the first start compiles them, which takes about a minute)"
    with progress.kernels(what) as compiled, communicator.together():
        if communicator.local_rank == 0:
            options = settings.compile_options
            task = Task(config, options, batch_shapes, settings.patch, machine.threads())
            model, is_helped = UNet(**config), not settings.eager and _has_room_for_two(task)
            try:
                with on_compilation(_refuse_to_compile) if is_helped else nullcontext():
                    _steps(model, settings, batch_shapes)
            except _MissingKernelError:
                _compile_from_both_ends(task)
                _steps(model, settings, batch_shapes)
            if compiled:  # else inference finds its kernels on disk, too, when it comes
                image = np.zeros((*settings.patch, config["in_channels"]), np.float32)
                segment(model, image, predict=predictor(model, settings.eager, **options))
    # By a message: the folder of the cache may be read-only, or another one on each node.
    measured = measure.remembered()
    measured.update(communicator.broadcast_object(measured))


def _steps(model: UNet, settings: Settings, batch_shapes: Sequence[tuple[int, ...]]) -> None:
    optimizer = Adam(model.parameters())
    for shape in batch_shapes:
        images = np.zeros((*shape, model.config["in_channels"]), np.float32)
        if settings.eager:
            gradients = eager_gradients(model, optimizer)
        else:
            gradients = compiled_gradients(model, optimizer, images.shape, **settings.compile_options)
        gradients(Batch(images, np.zeros(shape, np.uint8)), None)
    optimizer.step()


class _MissingKernelError(Exception):
    """A kernel is not on disk."""


def _refuse_to_compile() -> None:
    raise _MissingKernelError


def _has_room_for_two(task: Task) -> bool:
    """Whether there is a core for a helper, and memory for its arena beside ours."""
    voxels = max(math.prod(shape) for shape in [*task.batch_shapes, task.patch_size])
    arena = _TENSORS * 4 * voxels * blocks(task.config["filters"]) * LANES
    return machine.cores() > 1 and 2 * arena < half_the_memory(1)


def _compile_from_both_ends(task: Task) -> None:
    """Compile all kernels of a task, with a second process, whose failure would only cost its help."""
    command = [sys.executable, "-m", __name__, json.dumps(task)]
    quiet = subprocess.DEVNULL
    helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
    try:
        compile_task(task, "forwards")
        helper.wait()
    finally:
        helper.kill()
        helper.wait()


def compile_task(task: Task, direction: Direction) -> None:
    """Compile the kernels of training and then of prediction, each from its first node or its last."""
    model = UNet(**task.config)
    optimizer, channels = Adam(model.parameters()), model.config["in_channels"]
    with only_compiling(direction), ExitStack() as after:
        # Python looks for unused cycles seldom: among Numba's objects that takes a tenth of the time.
        after.callback(gc.set_threshold, *gc.get_threshold())
        gc.set_threshold(50_000, 20, 1000)
        # Training first from either end: its first layers and its last have least in common.
        for batch_shape in task.batch_shapes:
            shape = (*batch_shape, channels)
            loss = of_levels(dice_cross_entropy, model)
            step = compile(model, loss, optimizer, shape, **task.options)
            step.program(shape).compile(direction)
        # Another model: a step run backwards leaves nonsense in the statistics of batch norm.
        dim = model.config["dim"]
        shape = (1, *patch_for(model.config["depth"], task.patch_size, dim)[:dim], channels)
        compile(UNet(**task.config), shape, **task.options).program(shape).compile(direction)
        optimizer.step()


def _end_with_parent() -> None:
    """End this process when its parent ends in any way: nobody holds the other end of its input then."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    given = Task(*json.loads(sys.argv[1]))
    machine.set_threads(given.threads)
    compile_task(given, "backwards")
