"""Where the gradients of a step come from: the compiled graph, or the eager model and its tape."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.ops.softmax_dice import dice_forward
from tinyunet.autograd import listening
from tinyunet.compiler import compile
from tinyunet.compiler.trace import trace
from tinyunet.engine.context import Listener
from tinyunet.losses import dice_cross_entropy
from tinyunet.nn import Parameter
from tinyunet.optim import Optimizer
from tinyunet.training.samples import Batch
from tinyunet.unet import UNet


class Result(NamedTuple):
    """What a batch came to, besides the gradients: the loss, and the sums of its Dice.

    Attributes
    ----------
    loss : float
    dice_sums : ndarray, shape=(3, MB, classes), float64
        Intersection, prediction and target of probabilities, as in :mod:`tinyunet.losses`.
    """

    loss: float
    dice_sums: NDArray[np.float64]


#: Fills the optimizer's flat gradients from a batch, times its weight; who listens is told meanwhile.
Gradients = Callable[[Batch, Listener | None], Result]


def compiled_gradients(
    model: UNet,
    optimizer: Optimizer,
    batch_shape: tuple[int, ...],
    accuracy: str = "fast",
    deterministic: bool = False,
) -> Gradients:
    """Compile the step for batches of a shape, (MB, D, H, W, C); see :func:`tinyunet.compile`."""
    how: dict[str, Any] = {"accuracy": accuracy, "deterministic": deterministic}
    step = compile(model, dice_cross_entropy, optimizer, batch_shape, **how)

    def gradients(batch: Batch, listener: Listener | None = None) -> Result:
        loss = step.gradients(batch.images, batch.labels, batch.weight, listener)
        assert step.dice_sums is not None  # this loss has them
        return Result(loss, step.dice_sums)

    return gradients


def eager_gradients(model: UNet, optimizer: Optimizer) -> Gradients:
    """Run the model's operators one after the other: the reference, to read and to compare with."""

    def gradients(batch: Batch, listener: Listener | None = None) -> Result:
        optimizer.zero_grad()
        with listening(listener) if listener else nullcontext():
            logits = model.logits(batch.images)
            loss = dice_cross_entropy(logits, batch.labels, from_logits=True)
        loss.backward(batch.weight, listener)
        sums = np.stack(dice_forward(logits.data, batch.labels))
        return Result(loss.item(), sums)

    return gradients


def cancelled_biases(model: UNet, batch_shape: tuple[int, ...]) -> list[Parameter]:
    """Return the biases that the batch norm behind them takes away again.

    Their gradient is zero, but for rounding; and where all is rounding Adam, which divides by the
    size of a gradient, makes whole steps of it. So whoever wants ranks to agree sets it to zero.

    Parameters
    ----------
    model : UNet
        In training.
    batch_shape : (MB, D, H, W, C)
    """
    graph, parameters = trace(model, batch_shape), dict(model.named_parameters())
    found = []
    for node in graph.nodes:
        readers = {reader.op for reader in graph.consumers(node.outputs["dst"])}
        if "bias" in node.inputs and readers == {"batch_norm_training"}:
            found.append(parameters[node.inputs["bias"]])
    return found


def foreground(dice_sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return intersection and size (prediction plus target) of all that is not background.

    Sums of a batch are added up before the ratio is taken, so that a class which a patch lacks
    does not count as found.

    Parameters
    ----------
    dice_sums : ndarray, shape=(3, MB, classes)
        A single class is no background.
    """
    first = 0 if dice_sums.shape[-1] == 1 else 1
    intersection, prediction, target = dice_sums[:, :, first:].sum(axis=(1, 2))
    return np.array([intersection, prediction + target])
