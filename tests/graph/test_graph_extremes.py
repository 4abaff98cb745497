"""Compiled is eager also where numbers are infinite, not numbers, or too large to be squared."""

import numpy as np
import pytest
from agreement import SHAPE, assert_same_gradients, batch, conv

import tinyunet
from tinyunet import SGD, Module, UNet, losses, no_grad
from tinyunet import functional as F
from tinyunet.nn import BatchNorm


class Activated(Module):
    """A convolution of single voxels, an activation, which compiled is part of the next, and a head."""

    def __init__(self, slope, norm):
        self.first, self.second, self.head = conv(4, 16, 1), conv(16, 16, seed=2), conv(16, 4, 1)
        self.slope, self.norm = slope, BatchNorm(16) if norm else None

    def forward(self, images):
        src = self.first(images)
        src = self.norm(src) if self.norm else src
        src = F.leaky_relu(src, self.slope) if self.slope else F.relu(src)
        return self.head(self.second(src))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan, 1e30, -1e30])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_prediction(value, slope, norm):
    """Finite where eager is: the others have NaN or infinity at the same voxels."""
    model = Activated(slope, norm).eval()
    # Of each channel's sum one sign: infinity minus infinity would be NaN before the activation.
    model.first.weights.data[:] = np.abs(model.first.weights.data)
    model.first.weights.data[8:] *= -1
    images, _ = batch(SHAPE, 4, 4, 0)
    images[0, 2, 3, 4] = value
    with no_grad():
        expected = model(images).data
    actual = tinyunet.compile(model, images.shape, accuracy="strict")(images)
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    finite = np.isfinite(expected)
    largest = np.abs(expected[finite]).max()
    assert np.abs(actual[finite] - expected[finite]).max() <= 1e-5 * largest


def test_infinity_below_a_relu_is_nothing():
    model = Activated(0.0, False).eval()
    model.first.weights.data[:] = -np.abs(model.first.weights.data)
    images, _ = batch(SHAPE, 4, 4, 0)
    images[0, 2, 3, 4] = np.inf
    assert np.isfinite(tinyunet.compile(model, images.shape)(images)).all()


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("large", [1e19, 1e25, 1e30])
def test_a_step_on_large_images(large, few):
    """Squares of deviations are infinite in float32: the loss was that of images of zeros."""

    def make():
        return UNet(filters=4, depth=2)

    images, labels = batch((1, 8, 8, 8), 4, 4, 0)
    images[0, 3, 3, 3] *= np.float32(large)
    if not few:
        images = (images * np.float32(large / np.abs(images).max())).astype(np.float32)
    eager, compiled = make(), make()
    step = tinyunet.compile(compiled, losses.soft_dice, SGD(compiled.parameters(), 0.1), images.shape)
    SGD(eager.parameters(), 0.1)
    with np.errstate(over="ignore"):  # the running variance is infinite in float32
        expected = losses.soft_dice(eager.logits(images), labels, from_logits=True)
        expected.backward()
        actual = step.gradients(images, labels)
    assert actual == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(compiled, eager, 2e-3)
