"""The gradients of a step: from the compiled graph, or from the eager model and its tape."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels import ops
from tinyunet.compiler import compile
from tinyunet.compiler.operators import BY_NAME
from tinyunet.compiler.trace import trace
from tinyunet.losses import dice_cross_entropy, of_levels
from tinyunet.nn import Parameter
from tinyunet.optim import Optimizer
from tinyunet.tape import Listener, listening
from tinyunet.training.samples import Batch
from tinyunet.unet import UNet


class Result(NamedTuple):
    """The loss of a batch, and the sums of its Dice, as in :mod:`tinyunet.losses`."""

    loss: float
    dice_sums: NDArray[np.float64]  # intersection, prediction and target, shape=(3, MB, classes)


#: Fills the optimizer's flat gradients from a batch, times its weight, and calls the listener meanwhile.
Gradients = Callable[[Batch, Listener | None], Result]


def compiled_gradients(
    model: UNet, optimizer: Optimizer, batch_shape: tuple[int, ...], **options: Any
) -> Gradients:
    """Compile the step for batches of shape (MB, D, H, W, C), with options of :func:`tinyunet.compile`."""
    step = compile(model, of_levels(dice_cross_entropy, model), optimizer, batch_shape, **options)

    def gradients(batch: Batch, listener: Listener | None = None) -> Result:
        loss = step.gradients(batch.images, batch.labels, batch.weight, listener)
        assert step.dice_sums is not None  # this loss has them
        return Result(loss, step.dice_sums)

    return gradients


def eager_gradients(model: UNet, optimizer: Optimizer) -> Gradients:
    """Run the model's operators one after the other: the reference, to read and to compare with."""
    loss_of = of_levels(dice_cross_entropy, model)

    def gradients(batch: Batch, listener: Listener | None = None) -> Result:
        optimizer.zero_grad()
        with listening(listener) if listener else nullcontext():
            logits = model.logits(batch.images)
            loss = loss_of(logits, batch.labels, from_logits=True)
        loss.backward(batch.weight, listener)
        sums = np.stack(ops.label_losses.dice_forward(logits.data, batch.labels))
        return Result(loss.item(), sums)

    return gradients


def cancelled_biases(model: UNet, batch_shape: tuple[int, ...]) -> list[Parameter]:
    """Return the biases that the normalisation after them subtracts again, of a model in training.

    Their gradient is zero, but for rounding. Adam divides by the size of a gradient, and so makes whole
    steps of rounding. Ranks that are to agree set this gradient to zero.
    """
    graph, parameters = trace(model, batch_shape), dict(model.named_parameters())
    found = []
    for node in graph.nodes:
        readers = [(BY_NAME.get(reader.op), reader) for reader in graph.consumers(node.outputs["dst"])]
        if "bias" in node.inputs and readers and all(op and op.centres(reader) for op, reader in readers):
            found.append(parameters[node.inputs["bias"]])
    return found


def foreground(dice_sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return intersection and size (prediction plus target) of all classes but the background.

    Sums of a batch, shape=(3, MB, classes), are added up before the ratio is taken, so that a class which a
    patch lacks does not count as found. A single class is no background.
    """
    first = 0 if dice_sums.shape[-1] == 1 else 1
    intersection, prediction, target = dice_sums[:, :, first:].sum(axis=(1, 2))
    return np.array([intersection, prediction + target])
