"""An epoch of data-parallel training: each rank its patches, one mean of all gradients a step."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.errors import AgreedError
from tinyunet.losses import dice_cross_entropy
from tinyunet.nn import BatchNorm
from tinyunet.optim import Adam
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.progress import Progress
from tinyunet.training.samples import Batch, Inspector, Loader
from tinyunet.unet import UNet

# Share of batch norm's running statistics that stays at each step. Keras' 0.99 remembers a hundred
# steps, by when the weights of a short training have become others; this remembers ten.
BATCH_NORM_MOMENTUM = 0.9


class EpochResult(NamedTuple):
    """Means over the patches of an epoch: the loss, and Dice of whatever is not background."""

    loss: float
    dice: float


class Trainer:
    """Runs epochs.

    After the construction and after each epoch, model and optimizer are the same on every rank.

    Parameters
    ----------
    model : UNet
        Is trained in place. Rank 0's parameters count.
    optimizer : Adam
        Of the model's parameters.
    loader : Loader
        This rank's patches.
    inspector : Inspector
        Whatever it has found ends the training.
    schedule : callable
        Learning rate of each step, counted from 0.
    communicator : Communicator
    progress : Progress
    """

    def __init__(
        self,
        model: UNet,
        optimizer: Adam,
        loader: Loader,
        inspector: Inspector,
        schedule: Callable[[int], float],
        communicator: Communicator,
        progress: Progress,
    ) -> None:
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self._inspector = inspector
        self._schedule, self._communicator, self._progress = schedule, communicator, progress
        for _, module in model.named_modules():
            if isinstance(module, BatchNorm):
                module.momentum = BATCH_NORM_MOMENTUM
        communicator.broadcast(optimizer.flat_parameters)

    def epoch(self, number: int) -> EpochResult:
        """Train on every patch of an epoch.

        Raises
        ------
        AgreedError
            On every rank: a file of any rank cannot be used, or the loss is no number any more.
        """
        self.model.train()
        batches = self.loader.epoch(number)
        total = np.zeros(4)
        for step in range(1, self.loader.steps + 1):
            with self._communicator.together():
                self._inspector.check()
                sums = self._gradients(next(batches))
            self._communicator.allreduce_sum(sums)
            self._communicator.allreduce_mean(self.optimizer.flat_gradients)
            if not np.isfinite(sums[0]):
                raise AgreedError(
                    f"the loss is {sums[0]} in epoch {number}, step {step}; try a smaller --lr"
                )
            self.optimizer.lr = self._schedule(self.optimizer.steps)
            self.optimizer.step()
            total += sums
            result = EpochResult(total[0] / (step * self._communicator.size), _dice(total[1:]))
            self._progress.step(self.loader.batch_size, loss=result.loss, Dice=result.dice)
        average_buffers(self.model, self._communicator)
        return result

    def _gradients(self, batch: Batch) -> NDArray[np.float64]:
        """Fill the flat gradients; return loss, and voxels of prediction and truth, both, each."""
        self.optimizer.zero_grad()
        logits = self.model.logits(batch.images)
        loss = dice_cross_entropy(logits, batch.labels, from_logits=True)
        loss.backward()
        predicted, true = logits.data.argmax(axis=-1) > 0, batch.labels > 0
        return np.array([loss.item(), (predicted & true).sum(), predicted.sum(), true.sum()])


def _dice(sums: NDArray[np.float64]) -> float:
    """Dice from the voxels of prediction and truth: in both, in the one, in the other."""
    both, predicted, true = sums.tolist()
    return 2 * both / (predicted + true) if predicted + true else 1.0


def average_buffers(model: UNet, communicator: Communicator) -> None:
    """Give each rank the mean of all ranks' running statistics of batch norm."""
    buffers = model.buffers()
    flat = np.concatenate([buffer.ravel() for buffer in buffers])
    communicator.allreduce_mean(flat)
    ends = np.cumsum([buffer.size for buffer in buffers])
    for buffer, part in zip(buffers, np.split(flat, ends[:-1]), strict=True):
        buffer[...] = part.reshape(buffer.shape)
