"""N ranks train together, and then one rank alone on all patches: ``python equality.py`` under mpirun.

Prints for eager and compiled, with synchronised batch norm and without: the losses' largest difference
over 20 steps, and the weights'; and how far apart the weights of the one rank come if all its images are
a rounding error larger or smaller. Some steps have a number of patches that the ranks cannot share
equally, one has a patch less than there are ranks.
"""

import json
from typing import Any

import numpy as np

import tinyunet
from kernels.base import machine
from tinyunet.losses import dice_cross_entropy
from tinyunet.optim import SGD, Adam
from tinyunet.parallel.algorithms import Exchange
from tinyunet.parallel.buckets import GradientSum, backward_order
from tinyunet.parallel.communicator import Communicator, world
from tinyunet.parallel.synchronized_norm import Synchronized
from tinyunet.unet import UNet

SIDE, STEPS = (16, 16, 16), 20
# One to eight units of float32's last place, up and down: what sums of thousands of numbers are off by.
ROUNDED = (1 + 2**-23, 1 - 2**-23, 1 + 2**-21, 1 - 2**-21, 1 + 2**-20, 1 - 2**-20)
#: A model's arrays by name; how it is trained, by which optimizer, its images times a factor.
State, Run = dict[str, np.ndarray], tuple[str, str, float]
OPTIMIZERS = {
    "sgd": lambda parameters, local: SGD(parameters, 0.02, momentum=0.9, local=local),
    "adam": lambda parameters, local: Adam(parameters, 1e-3, local=local),
}


def patches(step: int, ranks: int) -> tuple[Any, Any]:
    """The same on every rank: all patches of a step, 2 a rank, or an uneven number."""
    count = {5: 2 * ranks - 1, 10: ranks + 1, 15: ranks - 1}.get(step, 2 * ranks)
    generator = np.random.default_rng(step)
    images = generator.standard_normal((count, *SIDE, 4)).astype(np.float32)
    return images, (images[..., 0] > 0).astype(np.uint8) + (images[..., 1] > 1)


def train(
    ranks: Communicator, parts: int, way: str, optimizer_name: str, synchronized: bool, factor: float = 1.0
) -> tuple[State, np.ndarray]:
    """Train on this rank's part of every batch, times a factor; return the model's state and mean losses."""
    model = UNet(filters=4, depth=2, norm="instance" if "instance" in way else "batch").train()
    shape = (1, *SIDE, 4)
    optimizer = OPTIMIZERS[optimizer_name](backward_order(model, shape), ranks.local)
    together = Synchronized(model, ranks) if synchronized else None
    sums = GradientSum(optimizer, ranks, Exchange(bucket_mb=0.01))
    step = None
    if way.startswith("compiled"):
        # Deterministic: each rank takes the same algorithms, whatever its clock says.
        options: dict[str, Any] = {"accuracy": "strict", "deterministic": True}
        step = tinyunet.compile(model, dice_cross_entropy, optimizer, shape, **options)
    losses = np.zeros(STEPS)
    for number in range(STEPS):
        images, labels = patches(number, parts)
        images *= np.float32(factor)
        mine = np.array_split(np.arange(len(images)), ranks.size)[ranks.rank]
        weight, ranks.local.alike = len(mine) / len(images), len(images) % ranks.size == 0
        sums.counts = len(mine) > 0
        if together:
            together.counts = sums.counts
        x, y = (images[mine], labels[mine]) if len(mine) else (images[:1], labels[:1])
        optimizer.zero_grad()
        sums.start()
        listener = lambda _, complete: sums.complete(complete)  # noqa: E731
        if step:
            losses[number] = weight * step.gradients(x, y, weight, listener)
        else:
            loss = dice_cross_entropy(model.logits(x), y, from_logits=True)
            loss.backward(weight, listener)
            losses[number] = weight * loss.item()
        sums.finish()
        optimizer.step()
    ranks.allreduce_sum(losses)
    return {name: array.copy() for name, array in model.state_dict().items()}, losses


def distance(state: State, other: State) -> float:
    """Largest difference of a weight, a bias or a statistic."""
    return max(float(np.abs(array - other[name]).max()) for name, array in state.items())


def trainings_alone(ranks: Communicator) -> dict[Run, tuple[State, np.ndarray]]:
    """Return, at rank 0, what one rank alone makes of each run: each rank trains its share of the runs."""
    runs = [(way, "sgd", factor) for way in ("eager", "compiled") for factor in (1.0, *ROUNDED)]
    runs += [("compiled", "adam", 1.0), ("compiled instance", "sgd", 1.0)]
    mine = [
        train(Communicator(), ranks.size, *run[:2], False, run[2]) for run in runs[ranks.rank :: ranks.size]
    ]
    of_ranks = [
        dict(zip(runs[r :: ranks.size], done, strict=True)) for r, done in enumerate(ranks.gather(mine))
    ]
    return {run: result for done in of_ranks for run, result in done.items()}


def main() -> None:
    """Compare, and print at rank 0."""
    machine.set_threads(1)
    ranks = world()
    kinds = (
        ("eager", "sgd", True),
        ("compiled", "sgd", True),
        ("compiled", "adam", True),
        ("compiled", "sgd", False),
        ("compiled instance", "sgd", False),  # whose norm has nothing to synchronise
    )
    together = {kind: train(ranks, ranks.size, *kind) for kind in kinds}
    alone = trainings_alone(ranks)
    if ranks.rank == 0:
        found: dict[str, Any] = {}
        for (way, optimizer, synchronized), (state, losses) in together.items():
            whole, expected = alone[way, optimizer, 1.0]
            loss = float(np.abs(losses - expected).max())
            found[f"{way} {optimizer} {synchronized}"] = loss, distance(state, whole)
        rounded = [(way, factor) for way in ("eager", "compiled") for factor in ROUNDED]
        found["rounding"] = max(
            distance(alone[way, "sgd", factor][0], alone[way, "sgd", 1.0][0]) for way, factor in rounded
        )
        print(json.dumps(found))


if __name__ == "__main__":
    main()
