"""Batch norm over the batches of all ranks: N ranks with batch b get the results of one rank with N b.

A rank alone normalises with mean and variance of its own few patches: N ranks with one patch each train
another net than one rank with N patches, and a noisier one. Synchronised, the sums behind mean and variance
are added up over the ranks. That takes two small allreduces a layer and step, one forward and one backward:
the gradient of a source depends on the statistics of all ranks.
"""

from kernels.base.arguments import Doubles
from tinyunet.nn import BatchNorm, Module
from tinyunet.parallel.communicator import Communicator


class Synchronized:
    """Adds up the sums of a model's batch norms over ranks. Compile the model afterwards.

    ``counts`` says whether this rank's patches belong to the batch. A rank whose part of an uneven batch is
    empty computes on any patch, to take part in every allreduce; its sums are then replaced by zero.
    """

    def __init__(self, model: Module, communicator: Communicator) -> None:
        self._communicator, self.counts = communicator, True
        for _, module in model.named_modules():
            if isinstance(module, BatchNorm):
                module.combine = self

    def __call__(self, sums: Doubles) -> None:
        """Replace the sums of this rank by the sums over all ranks."""
        if not self.counts:
            sums.fill(0)
        self._communicator.allreduce_sum(sums)
