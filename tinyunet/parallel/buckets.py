"""Gradients summed over ranks while backward goes on.

The optimizer's flat buffer is laid out in the order in which backward completes the gradients
(:func:`backward_order`), and cut into buckets. As soon as the last gradient of a bucket is complete,
its sum over the ranks starts; it is waited for just before the optimizer's step::

    backward   |head|dec 3   |dec 2|..|enc 4 |enc 3 |enc 2  |enc 1   |enc 0    |   step
    bucket 0              |-------|
    bucket 1                           |-------|
    bucket 2                                  |----|
    last one                                                              |-|

Nothing can hide the last bucket. So the buckets become small towards the end: none is larger than
what comes after it. (A parameter may lie in several.)

Ranks of a node add a bucket in memory that they share, and have MPI sum it between nodes
(:mod:`~tinyunet.parallel.shared_sum`); with another algorithm than MPI's, or where memory cannot be shared,
all ranks send messages.

MPI goes on with a message only while a rank is inside a call of MPI. So a rank looks after its
messages between any two kernels: :meth:`GradientSum.complete`. A thread that would do this
meanwhile would take a core from the kernels.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from tinyunet.compiler.trace import trace
from tinyunet.engine.context import Leaf
from tinyunet.nn import Module, Parameter
from tinyunet.optim import Optimizer
from tinyunet.parallel.algorithms import ALGORITHMS, Array, Messages, Operation
from tinyunet.parallel.communicator import Communicator
from tinyunet.parallel.compression import CompressedSum
from tinyunet.parallel.options import Exchange
from tinyunet.parallel.shared_sum import shared_sum

_USUAL = Exchange()
# Below this a bucket costs its messages, not its bytes.
_LEAST_BYTES = 1 << 16
# Each bucket has a communicator of its own, of which MPI has some thousands.
_MOST_BUCKETS = 256


def backward_order(model: Module, input_shape: tuple[int, ...]) -> list[Parameter]:
    """Return a model's parameters in the order in which backward completes their gradients.

    That is the reverse of their use. What the model does not use comes last.
    """
    known = dict(model.named_parameters())
    used = [value for node in trace(model, input_shape).nodes for value in node.inputs.values()]
    order = dict.fromkeys([name for name in reversed(used) if name in known] + list(known))
    return [known[name] for name in order]


def cut(size: int, most: int) -> list[slice]:
    """Cut a flat buffer into buckets: none larger than ``most``, nor than half of what is left.

    Parameters
    ----------
    size : int
        Items of the buffer, of 4 bytes.
    most : int
        Bytes.
    """
    buckets, start = list[slice](), 0
    while start < size:
        length = min(most, max(2 * (size - start), _LEAST_BYTES)) // 4
        buckets.append(slice(start, min(start + length, size)))
        start += length
    return buckets


class GradientSum:
    """Sums an optimizer's gradients over ranks, and over several batches of one step.

    Parameters
    ----------
    optimizer : Optimizer
        Whose ``flat_gradients`` are replaced by their sum. All ranks have the same.
    communicator : Communicator
    exchange : Exchange
        Size of the buckets (of which there are some 256 at most), algorithm, compression.

    Attributes
    ----------
    buckets : list of slice
        Of the flat buffer.
    sent : int
        How many of them are on their way or have arrived.
    counts : bool
        Whether this rank's patches belong to the batch, as in :mod:`tinyunet.parallel.synchronized_norm`.
    """

    def __init__(self, optimizer: Optimizer, communicator: Communicator, exchange: Exchange = _USUAL) -> None:
        self._gradients, self._communicator = optimizer.flat_gradients, communicator
        self._parameters = optimizer.parameters
        nbytes = self._gradients.nbytes
        most = min(max(1e6 * exchange.bucket_mb, nbytes / _MOST_BUCKETS, 4.0), nbytes)
        self.buckets = cut(self._gradients.size, int(most))
        self._sums = self._choose_sums(optimizer, exchange)
        self._before = np.zeros(0, np.float32)  # gradients of earlier batches of this step
        self._has_before = False
        self.counts = True
        self.start()

    @property
    def residuals(self) -> list[Array]:
        """What compression has still to send: a further step depends on it."""
        compressed = [each.func for each in self._sums if isinstance(each.func, CompressedSum)]
        return [array for each in compressed for array in (each.residual, each.residual_of_sum)]

    def _choose_sums(self, optimizer: Optimizer, exchange: Exchange) -> list[partial[Messages]]:
        """Return what starts the sum of each bucket."""
        ranks, buckets = self._communicator, self.buckets
        as_usual = exchange.allreduce == "mpi" and exchange.compression == "none"
        if as_usual and optimizer.crew is ranks.crew and (levels := ranks.levels(len(buckets))):
            shared = [[each[bucket] for each in optimizer.crew_gradients] for bucket in buckets]
            pairs = zip(levels, shared, strict=True)
            return [partial(shared_sum, *level, ranks.crew, arrays) for level, arrays in pairs]
        arrays = [self._gradients[bucket] for bucket in buckets]
        sums: list[Callable[[Any, Array], Messages]]
        if exchange.compression == "bf16":
            sums = [CompressedSum(array.size, ranks.size) for array in arrays]
        else:
            sums = [ALGORITHMS[exchange.allreduce] for _ in arrays]
        each_on = zip(sums, ranks.duplicates(len(arrays)), arrays, strict=True)
        return [partial(add, channel, array) for add, channel, array in each_on]

    def start(self) -> None:
        """Wait for new gradients: before the backward pass of a step's last batch."""
        self._complete: set[int] = set()
        # So many parameters, from the first on, are complete, and so many items of the buffer.
        self._parameters_complete, self._items_complete = 0, 0
        self.sent = 0
        self._on_the_way: dict[int, tuple[Operation, float]] = {}

    def keep(self) -> None:
        """Add the gradients to those of earlier batches, all to be sent with the step's last batch."""
        if not self.counts:
            self._gradients.fill(0)
        if not self._has_before:
            self._before = np.zeros_like(self._gradients) if not self._before.size else self._before
            self._before[:] = self._gradients
        else:
            self._before += self._gradients
        self._has_before = True

    def complete(self, parameters: Sequence[Leaf]) -> None:
        """Note whose gradients are complete, send the buckets that are, and look after the others."""
        self._complete.update(map(id, parameters))
        # In their order, which is the same on every rank, whatever completes first.
        for parameter in self._parameters[self._parameters_complete :]:
            if id(parameter) not in self._complete:
                break
            self._parameters_complete += 1
            self._items_complete += parameter.data.size
        while self.sent < len(self.buckets) and self.buckets[self.sent].stop <= self._items_complete:
            self._send()
        self.advance()

    def finish(self) -> None:
        """Wait until ``flat_gradients`` holds the sums."""
        while self.sent < len(self.buckets):  # the gradient of a parameter that was not used
            self._send()
        self._communicator.wait(self.advance, "wait for gradients")
        self._has_before = False

    def _note(self, number: int, start: float) -> None:
        part, name = self.buckets[number], f"bucket {number}"
        nbytes = 4 * (part.stop - part.start)
        assert self._communicator.timeline is not None
        self._communicator.timeline.span(name, name, start, time.perf_counter(), bytes=nbytes)

    def _send(self) -> None:
        number, part = self.sent, self.buckets[self.sent]
        self.sent += 1
        gradients = self._gradients[part]
        if not self.counts:
            gradients.fill(0)
        if self._has_before:
            gradients += self._before[part]
        if self._communicator.size > 1:
            operation = Operation(self._sums[number]())
            self._on_the_way[number] = operation, time.perf_counter()

    def advance(self) -> bool:
        """Look after the buckets on their way, and return whether all have arrived."""
        done = [number for number, (sent, _) in self._on_the_way.items() if sent.advance()]
        for number in done:
            _, start = self._on_the_way.pop(number)
            if self._communicator.timeline:
                self._note(number, start)
        return not self._on_the_way
