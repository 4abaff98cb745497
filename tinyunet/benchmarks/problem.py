"""The input of every system: the same image, labels and first weights.

A system runs in its own process, which loads NumPy and nothing of this project's engine, and brings the
arrays into its own layout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CHANNELS = CLASSES = 4
DEPTH = 5

# As Keras has them, but for the momentum, as this project has it; PyTorch's and ONNX's own differ.
LEARNING_RATE = 1e-3
ADAM_EPSILON = 1e-7
NORM_EPSILON = 1e-3
NORM_MOMENTUM = 0.9
DICE_SMOOTHING = 1.0


class Problem(NamedTuple):
    """One input and the weights to start from.

    Weights have this project's names (``encoder.0.conv0.weights``) and layouts: ``OIdhw`` for a convolution,
    (IC, OC, KD, KH, KW) for a transposed one.
    """

    image: NDArray[np.float32]  # (MB, D, H, W, CHANNELS)
    labels: NDArray[np.uint8]  # (MB, D, H, W)
    weights: dict[str, NDArray[np.float32]]

    @property
    def filters(self) -> int:
        """Channels of the first level."""
        return len(self.weights["encoder.0.conv0.bias"])

    def one_hot(self) -> NDArray[np.float32]:
        """Return labels as most losses want them, shape = (MB, D, H, W, CLASSES)."""
        return np.eye(CLASSES, dtype=np.float32)[self.labels]


def make(size: int, batch: int, filters: int) -> Problem:
    """Return images of balls in noise, ``size`` voxels along each axis, and a U-Net's first weights.

    Arrays of ones or zeros in a new net (batch norm, biases) get a random part, so that a system that
    mixes two of them up gets a wrong result.
    """
    # Here, because a process that runs another system must not load Numba, too.
    from tinyunet.unet import UNet

    generator = np.random.default_rng(0)
    state = UNet(in_channels=CHANNELS, classes=CLASSES, filters=filters, depth=DEPTH).state_dict()
    weights = {
        name: array if array.ndim == 5 else array + generator.uniform(0, 0.2, array.shape)
        for name, array in state.items()
    }
    labels = np.stack([_balls(size, generator) for _ in range(batch)])
    contrast = generator.uniform(-1, 1, (CLASSES, CHANNELS)).astype(np.float32)
    noise = generator.standard_normal((*labels.shape, CHANNELS), np.float32)
    float32 = {name: array.astype(np.float32) for name, array in weights.items()}
    return Problem(contrast[labels] + 0.3 * noise, labels, float32)


def convolution_arrays(
    src_shape: Sequence[int], weights_shape: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return ``src``, ``weights`` and ``diff_dst`` of a convolution of stride 1, padding "same".

    Shapes are (MB, D, H, W, IC) and (OC, IC, KD, KH, KW).
    """
    generator = np.random.default_rng(0)
    src, weights = (generator.standard_normal(shape, np.float32) for shape in (src_shape, weights_shape))
    return src, weights, generator.standard_normal((*src_shape[:-1], weights_shape[0]), np.float32)


def _balls(size: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Labels of one image: a ball of each class but the background."""
    labels = np.zeros((size,) * 3, np.uint8)
    axes = np.ogrid[:size, :size, :size]
    for label in range(1, CLASSES):
        centre = generator.uniform(0.3, 0.7, 3) * size
        distance = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
        labels[distance < (size / 5) ** 2] = label
    return labels
