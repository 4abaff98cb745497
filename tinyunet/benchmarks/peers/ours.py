"""Our own engine: eager, and compiled into a graph of fused kernels."""

from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tinyunet
from kernels.base import machine
from tinyunet import losses
from tinyunet.benchmarks import problem as common
from tinyunet.benchmarks.problem import Problem

VERSION = metadata.version("tinyunet")


def use_threads(threads: int) -> None:
    """Set the threads inside a kernel."""
    machine.set_threads(threads)


def unet(problem: Problem) -> tinyunet.UNet:
    """Build the model and give it the problem's weights."""
    sizes: dict[str, Any] = {"in_channels": common.CHANNELS, "classes": common.CLASSES, "depth": common.DEPTH}
    model = tinyunet.UNet(filters=problem.filters, **sizes)
    model.load_state_dict(problem.weights)
    return model


def step(problem: Problem, compiled: bool = False, **settings: Any) -> Callable[[], float]:
    """Return a training step; ``settings`` are those of ``tinyunet.compile``."""
    model = unet(problem)
    optimizer = tinyunet.Adam(model.parameters(), common.LEARNING_RATE, epsilon=common.ADAM_EPSILON)
    if compiled:
        # The loss at its default smoothing, which is the problem's.
        run = tinyunet.compile(model, losses.soft_dice, optimizer, problem.image.shape, **settings)
        return lambda: run(problem.image, problem.labels)

    def train() -> float:
        optimizer.zero_grad()
        logits = model.logits(problem.image)
        loss = losses.soft_dice(logits, problem.labels, smoothing=common.DICE_SMOOTHING, from_logits=True)
        loss.backward()
        optimizer.step()
        return float(loss.data)

    return train


def infer(problem: Problem, compiled: bool = False, **settings: Any) -> Callable[[], Any]:
    """Return a prediction; ``settings`` are those of ``tinyunet.compile``."""
    model = unet(problem).eval()
    if compiled:
        run = tinyunet.compile(model, problem.image.shape, **settings)
        return lambda: run(problem.image)

    def predict() -> Any:
        with tinyunet.no_grad():
            return model(problem.image).data

    return predict


def to_array(probabilities: Any) -> NDArray[np.float32]:
    """Return a prediction as it is: NDHWC."""
    return np.asarray(probabilities)
