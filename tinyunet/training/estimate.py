"""How much memory a training takes, and how long an epoch lasts, before it begins.

Memory is a sum. Most of it is exact: the compiler plans each temporary array of a step before anything runs
(:mod:`tinyunet.compiler.memory`), and a cache of volumes has a limit. Two numbers were measured: what Python,
Numba, compiled kernels and pictures take, and how many copies of the parameters there are.

Time is that of a step and of a patch of validation, run a few times, times their numbers. Meanwhile the
loader makes patches, as in a training: it shares the cores with the step. If the volumes do not fit into half
of the memory, most patches wait for a file: one case is read, to time that, too.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from kernels.base import machine
from kernels.base.limits import memory_limit
from tinyunet.common.errors import UserError
from tinyunet.common.terminal import in_bytes
from tinyunet.compiler.compiled import Compiled, Inference, TrainingStep
from tinyunet.compiler.ir import Options
from tinyunet.compiler.memory import plan
from tinyunet.compiler.passes import NAMES
from tinyunet.data.cases import Case, load_case
from tinyunet.data.sequences import kind_of
from tinyunet.data.spacing import Spacing
from tinyunet.losses import dice_cross_entropy, of_levels
from tinyunet.optim import Adam
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation.scores import score
from tinyunet.segmentation.sliding_window import count_patches, patch_for, predictor, segment
from tinyunet.training.samples import Loader, Volumes, half_the_memory
from tinyunet.training.settings import Settings
from tinyunet.training.step import compiled_gradients, eager_gradients
from tinyunet.training.validate import OVERLAP
from tinyunet.unet import UNet

#: Bytes of Python, its packages, Numba's compiled kernels and the pictures at the end, on a machine whose
#: kernels are on disk. (Compiling them takes about 300 MB more for a minute, twice.)
PROGRAMS = 410e6
#: Parameters, gradients, Adam's two averages; the best weights so far; checkpoints on their way to disk.
_COPIES = 7
_KEEPING = 0.05, 2e-8  # seconds of an epoch for its files, and for each byte of the parameters in them
_FORWARD = 0.3  # of a step's time is its share of a voxel in a prediction, about
_BATCHES = 4  # one is trained on, one waits, one is being made from single patches
_PICTURED = 3  # test cases, read again for the pictures at the end
_STEPS, _SECONDS = (8, 30), 3.0  # runs that are timed, at least and at most, and after how long it is enough
_BRAIN = (155.0, 175.0, 140.0)  # mm from left to right, back to front, bottom to top, of a large one
_AROUND = 16  # voxels that a prediction takes with the brain

Shape3 = tuple[int, int, int]


class Workload(NamedTuple):
    """What a training does: its model, its batches, and its volumes as the network sees them."""

    settings: Settings
    config: Mapping[str, Any]  # arguments of the model
    batch_shape: tuple[int, ...]  # of a rank: (MB, D, H, W) or (MB, D, H)
    volumes: Sequence[Shape3]  # of all cases
    validation: Sequence[Shape3]  # of what is predicted of the cases to validate on
    ranks_here: int = 1


def memory_at_hand() -> int:
    """Return the bytes of the machine, or of the container that this process is in."""
    return int(min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), memory_limit()))


def predicted_shape(shape: Shape3, spacing: Spacing | None, modalities: Sequence[str]) -> Shape3:
    """Return the shape of a volume's part that a prediction computes: of a head, the box around the brain.

    Headers do not tell where the brain is: a large one is assumed. ``spacing`` is that of the volume.
    """
    if spacing is None or not any(map(kind_of, modalities)):
        return shape
    sides = zip(shape, _BRAIN, spacing, strict=True)
    d, h, w = (min(size, round(brain / voxel) + _AROUND) for size, brain, voxel in sides)
    return d, h, w


def memory(work: Workload) -> dict[str, int]:
    """Return the bytes that a rank takes at its peak, by what takes them."""
    model = UNet(**work.config)
    optimizer = Adam(model.parameters(), ema=work.settings.ema)
    channels, classes = model.config["in_channels"], model.config["classes"]
    options = Options(NAMES, "fast", deterministic=True)  # chooses algorithms without running them
    step = TrainingStep(model, of_levels(dice_cross_entropy, model), optimizer, options)
    voxels = [int(np.prod(shape)) for shape in work.volumes]
    largest = work.volumes[int(np.argmax(voxels))]
    dim, depth = model.config["dim"], model.config["depth"]
    patch = patch_for(depth, largest, dim)
    slices = (patch[2], *patch[:2]) if dim == 2 else (1, *patch)
    a_volume = 4 * channels + 1
    kept = min(sum(voxels) * a_volume, memory_at_hand() // 2 // work.ranks_here)
    return {
        "programs": int(PROGRAMS),
        "weights": _COPIES * optimizer.flat_parameters.nbytes,
        "a step": _arena(step, (*work.batch_shape, channels)),
        "batches": _BATCHES * int(np.prod(work.batch_shape)) * a_volume,
        "volumes": max(kept, max(voxels) * a_volume),
        "validation": _arena(Inference(model, options), (*slices, channels)),
        "probabilities": max(voxels) * 4 * (classes + 1 + 2 * channels),
        "pictures": _PICTURED * max(voxels) * a_volume,
    }


def _arena(compiled: Compiled, shape: tuple[int, ...]) -> int:
    """Return the bytes of the temporary arrays of a program, without making it."""
    stage = compiled.stages(shape)[-1]
    return plan(stage.graph, stage.reuse).nbytes


def fits(parts: Mapping[str, int], ranks_here: int) -> bool:
    """Return whether a training fits into the memory of the machine or of the container."""
    return sum(parts.values()) * ranks_here <= memory_at_hand()


def check_memory(parts: Mapping[str, int], ranks_here: int) -> None:
    """Raise UserError if a training cannot fit into the memory of the machine or of the container."""
    if not fits(parts, ranks_here):
        has, takes = in_bytes(memory_at_hand(), sum(parts.values()) * ranks_here)
        largest = max(parts, key=lambda part: parts[part] if part != "programs" else 0)
        reason = f"the training takes about {takes}, and there are {has}; most of it is for {largest}"
        expected = "expected a smaller --patch-size, --batch-size or --filters, or fewer ranks"
        raise UserError(f"memory: {reason}; {expected}")


class Seconds(NamedTuple):
    """Measured times on this machine."""

    step: float  # of a batch
    patch: float  # of validation
    files: float = 0.0  # of an epoch
    reading: float = 0.0  # of a case, if not all stay in memory

    def of_epoch(self, work: Workload, steps: int, ranks: int = 1) -> float:
        """Return the seconds of an epoch of so many batches, with its validation."""
        shapes, dim, depth = work.validation, work.config["dim"], work.config["depth"]
        largest = int(np.prod(patch_for(depth, max(shapes, key=np.prod), dim)))
        seconds = 0.0
        for shape in shapes:
            part = np.prod(patch_for(depth, shape, dim)) / largest
            seconds += count_patches(depth, shape, OVERLAP, dim) * self.patch * float(part)
        missed = missing_share(work)
        # The loader reads on one core while the step computes on what is left of all.
        load = work.batch_shape[0] * missed * self.reading
        step = max(load, self.step + work.ranks_here * load / machine.cores())
        seconds += len(shapes) * self.reading if missed else 0.0
        return steps * step + seconds / min(ranks, len(shapes)) + self.files


def missing_share(work: Workload) -> float:
    """Return the share of the patches whose case is not in memory; 0 if all cases stay there."""
    needed = sum(int(np.prod(shape)) for shape in work.volumes) * (4 * work.config["in_channels"] + 1)
    return max(0.0, 1 - half_the_memory(work.ranks_here) / needed)


def reading_seconds(case: Case, spacing: Spacing | None) -> float:
    """Read a case as a training does, and return the seconds that it took; DataError if it is bad."""
    start = time.perf_counter()
    load_case(case, None, spacing)
    return time.perf_counter() - start


def from_steps(work: Workload, step: float, weights: int) -> Seconds:
    """Return the times of a training whose steps last so long, and whose parameters have so many bytes."""
    patch = patch_for(work.config["depth"], max(work.validation, key=np.prod), work.config["dim"])
    forward = _FORWARD * step * float(np.prod(patch)) / float(np.prod(work.batch_shape))
    return Seconds(step, forward, _files(weights))


def _files(weights: int) -> float:
    return _KEEPING[0] + _KEEPING[1] * weights


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def measure_seconds(work: Workload, communicator: Communicator) -> Seconds:
    """Run some steps, with their loader, and a patch of validation of a model that is thrown away.

    All ranks call this: they sum their gradients in each step, and the slowest decides how long it takes.
    """
    model, settings, channels = UNet(**work.config), work.settings, work.config["in_channels"]
    optimizer, shape = Adam(model.parameters(), ema=settings.ema), (*work.batch_shape, channels)
    if settings.eager:
        gradients = eager_gradients(model, optimizer)
    else:
        gradients = compiled_gradients(model, optimizer, shape, **settings.compile_options)
    batches = _loader(work).epoch(1)

    def step() -> None:
        gradients(next(batches), None)
        communicator.allreduce_sum(optimizer.flat_gradients)
        optimizer.step()

    # Ranks must agree on the number of steps.
    in_a_step = _seconds(step, _SECONDS if communicator.size == 1 else 0.0)
    patch = patch_for(work.config["depth"], max(work.validation, key=np.prod), work.config["dim"])
    image, truth = _volume(patch, work)
    predict = predictor(model, settings.eager, **settings.compile_options)
    names = [str(number) for number in range(work.config["classes"])]

    def validate() -> None:
        score(segment(model, image, OVERLAP, predict=predict), truth, names)

    return Seconds(in_a_step, _seconds(validate), _files(optimizer.flat_parameters.nbytes))


def _loader(work: Workload) -> Loader:
    """Return a loader of batches, enough for all that is timed, from a volume of noise."""
    batch = work.batch_shape[0]
    patches = batch * (_STEPS[1] + 2)
    settings = replace(work.settings, batch_size=batch, patches_per_case=patches, accumulate=1)
    case = Case("noise", (Path("noise"),), Path("noise"), work.config["in_channels"], ())
    usual = sorted(work.volumes, key=np.prod)[len(work.volumes) // 2]
    return Loader([case], cast(Volumes, {case: _volume(usual, work)}), settings)


def _volume(shape: Shape3, work: Workload) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return an image of noise, and labels of which a hundredth is no background."""
    random, classes = np.random.default_rng(0), work.config["classes"]
    image = random.standard_normal((*shape, work.config["in_channels"]), np.float32)
    return image, np.where(random.random(shape) < 0.01, max(classes - 1, 1), 0).astype(np.uint8)


def _seconds(run: Any, enough: float = _SECONDS) -> float:
    """Return the median of some runs, after one that loads kernels."""
    run()
    times: list[float] = []
    while len(times) < _STEPS[0] or (len(times) < _STEPS[1] and sum(times) < enough):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
