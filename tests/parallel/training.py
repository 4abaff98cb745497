"""Training as ranks do it, and the same by one process that plays every rank in turn.

Under mpirun: ``python training.py SCENARIO DATASET OUTPUT`` writes ``OUTPUT/RANK.npz``.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kernels.base import machine
from tinyunet.compiler.passes import choose_algorithm
from tinyunet.data.cases import Case
from tinyunet.data.decathlon import read_dataset
from tinyunet.losses import dice_cross_entropy
from tinyunet.nn import BatchNorm
from tinyunet.optim import Adam
from tinyunet.parallel.communicator import Communicator, world
from tinyunet.schedules import constant
from tinyunet.training.loop import BATCH_NORM_MOMENTUM, Trainer
from tinyunet.training.progress import Job, Progress
from tinyunet.training.samples import Batch, Inspector, Loader, Volumes
from tinyunet.training.settings import Settings
from tinyunet.training.step import cancelled_biases, compiled_gradients
from tinyunet.unet import UNet

PATCH, SEED, LR, EPOCHS = (16, 16, 16), 3, 0.01, 2
SETTINGS = Settings(  # of a run on several ranks, which do not synchronise batch norm
    patch_size=PATCH, patches_per_case=2, batch_size=4, random_seed=SEED, sync_batch_norm=False, ranks=2
)


def take_direct_convolutions(replace: Callable[..., None] = setattr) -> None:
    """Let no process find by the clock what is fastest: others may find otherwise, and round otherwise.

    The main job has the ranks agree before it trains.
    """
    replace(choose_algorithm, "_SMALL", np.inf)


def make_model(seed: int = SEED) -> UNet:
    return UNet(filters=4, depth=3, seed=seed)


def make_loader(cases: list[Case], rank: int, ranks: int) -> Loader:
    inspector = Inspector(cases, Volumes(10**9))
    return Loader(cases, Volumes(10**9), SETTINGS, rank, ranks, inspector)


def state_of(model: UNet) -> dict[str, np.ndarray]:
    return model.state_dict()


def epochs(communicator: Communicator, cases: list[Case]) -> dict[str, np.ndarray]:
    """Train as the main job does; every rank begins with other weights."""
    model = make_model(SEED + communicator.rank)
    loader = make_loader(cases, communicator.rank, communicator.size)
    optimizer = Adam(model.parameters(), local=communicator.local)
    job = Job(SETTINGS, communicator, Progress(shown=False))
    trainer = Trainer(job, model, optimizer, loader, schedule=constant(LR))
    losses = [trainer.epoch(epoch).loss for epoch in range(1, EPOCHS + 1)]
    return state_of(model) | {"losses": np.array(losses)}


def epochs_in_turn(ranks: int, cases: list[Case]) -> dict[str, np.ndarray]:
    """What :func:`epochs` should give: one process, a model a rank, the sums by hand."""
    models = [make_model() for _ in range(ranks)]
    optimizers = [Adam(model.parameters(), LR) for model in models]
    loaders = [make_loader(cases, rank, ranks) for rank in range(ranks)]
    for model in models:
        for _, module in model.named_modules():
            if isinstance(module, BatchNorm):
                module.momentum = BATCH_NORM_MOMENTUM
    steps = [
        compiled_gradients(model, optimizer, (*loader.batch_shapes()[0], 4))
        for model, optimizer, loader in zip(models, optimizers, loaders, strict=True)
    ]
    losses = []
    for epoch in range(1, EPOCHS + 1):
        total, patches = 0.0, 0
        for batches in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            of_ranks = [step(batch).loss for step, batch in zip(steps, batches, strict=True)]
            total += sum(batch.patches * x for batch, x in zip(batches, of_ranks, strict=True))
            patches += sum(batch.patches for batch in batches)
            for model, batch in zip(models, batches, strict=True):
                for bias in cancelled_biases(model.train(), batch.images.shape):
                    bias.grad.fill(0)
            gradient = sum(
                o.flat_gradients for o, batch in zip(optimizers, batches, strict=True) if batch.patches
            )
            for optimizer in optimizers:
                optimizer.flat_gradients[:] = gradient
                optimizer.step()
        losses.append(total / patches)
        for buffers in zip(*(model.buffers() for model in models), strict=True):
            mean = sum(buffers) * np.float32(1 / ranks)
            for buffer in buffers:
                buffer[:] = mean
    return state_of(models[0]) | {"losses": np.array(losses)}


def gradients(model: UNet, optimizer: Adam, batch: Batch) -> float:
    optimizer.zero_grad()
    loss = dice_cross_entropy(model.logits(batch.images), batch.labels, from_logits=True)
    loss.backward()
    return loss.item()


def fixed_statistics(communicator: Communicator, cases: list[Case]) -> dict[str, np.ndarray]:
    """Mean gradient of a step whose batch norm does not depend on who shares the batch."""
    model = make_model().eval()
    optimizer = Adam(model.parameters())
    loader = make_loader(cases, communicator.rank, communicator.size)
    gradients(model, optimizer, next(loader.epoch(1)))
    communicator.allreduce_mean(optimizer.flat_gradients)
    return {"gradients": optimizer.flat_gradients}


def main() -> None:
    """Run the scenario named on this rank."""
    scenario, dataset, output = sys.argv[1:]
    machine.set_threads(1)
    take_direct_convolutions()
    communicator = world()
    cases = list(read_dataset(dataset).cases)
    found = globals()[scenario](communicator, cases)
    np.savez(Path(output) / f"{communicator.rank}.npz", **found)


if __name__ == "__main__":
    main()
