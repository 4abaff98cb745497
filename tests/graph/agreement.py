"""Whether a compiled model does what the eager one does: loss, gradients, statistics, prediction."""

from collections.abc import Callable
from typing import Any

import numpy as np

import tinyunet
from tinyunet import Adam, Module, losses, no_grad
from tinyunet.nn import Conv3d

#: Allowed errors of float32, of the largest element of an array. A gradient may be 1e-3 off where a
#: voxel before a ReLU is within rounding of zero (see tests/engine); the volumes here are so small
#: that none was seen above 5e-5, but for the "fast" convolutions.
EXACT, ROUNDING = 0.0, 2e-4


#: Of small labels, and of images of four channels.
SHAPE = (1, 6, 8, 8)
INPUT = (*SHAPE, 4)


def conv(inputs: int, outputs: int, kernel: int = 3, seed: int = 1) -> Conv3d:
    """A convolution of a cube, the same weights at each call."""
    return Conv3d(inputs, outputs, (kernel,) * 3, generator=np.random.default_rng(seed))


def numbers(*shape: int) -> Any:
    """The same random numbers at each call."""
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def batch(shape: tuple[int, ...], channels: int, classes: int, seed: int) -> tuple[Any, Any]:
    """Random images and labels."""
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((*shape, channels)).astype(np.float32)
    return images, generator.integers(0, max(classes, 2), shape)


def assert_agree(
    make: Callable[[], Module],
    shape: tuple[int, ...],
    bound: float,
    *,
    classes: int = 4,
    channels: int = 4,
    loss: Any = losses.dice_cross_entropy,
    steps: int = 2,
    eager_dtype: Any = np.float32,
    **options: Any,
) -> None:
    """Train two models side by side; every number must agree within ``bound`` at the first step.

    Later steps start from parameters that differ by rounding, and Adam divides by the size of a
    gradient, so there only the loss is compared, within ten times the bound.
    """
    __tracebackhide__ = True
    eager, compiled = make().train().astype(eager_dtype), make().train()
    optimizers = Adam(eager.parameters()), Adam(compiled.parameters())
    input_shape = (*shape, channels)
    step = tinyunet.compile(
        compiled, loss, optimizers[1], input_shape, debug=True, accuracy="strict", **options
    )
    for number in range(steps):
        images, labels = batch(shape, channels, classes, number)
        before = images.copy(), labels.copy()
        optimizers[0].zero_grad()
        expected = eager_loss(eager, loss, images, labels)
        expected.backward()
        actual = step.gradients(images, labels)
        assert abs(actual - expected.item()) <= 10 * bound * abs(expected.item()), "loss"
        if number == 0 or bound == EXACT:
            assert_same_gradients(eager, compiled, bound)
            for (name, a), (_, b) in zip(compiled.named_buffers(), eager.named_buffers(), strict=True):
                assert_within(a, b, bound, name)
        for optimizer in optimizers:
            optimizer.step()
        np.testing.assert_array_equal(images, before[0])
        np.testing.assert_array_equal(labels, before[1])
    compiled.load_state_dict(eager.state_dict())
    predict = tinyunet.compile(compiled, input_shape, debug=True, accuracy="strict", **options)
    with no_grad():
        assert_within(predict(images), eager.eval()(images).data, bound, "prediction")


def eager_loss(model: Module, loss: Any, images: Any, labels: Any) -> Any:
    """The loss as the compiled step takes it: from logits, if model and loss can."""
    if hasattr(model, "logits") and not hasattr(loss, "takes_probabilities"):
        return loss(model.logits(images), labels, from_logits=True)
    return loss(model(images), labels)


def assert_same_gradients(eager: Module, compiled: Module, bound: float) -> None:
    """Each parameter's, of its own largest element, or of a hundredth of the largest of all.

    The gradient of what a batch norm cancels (a bias before it, say) is zero but for rounding.
    """
    __tracebackhide__ = True
    pairs = list(zip(compiled.named_parameters(), eager.named_parameters(), strict=True))
    least = max(float(np.abs(b.grad).max()) for _, (_, b) in pairs) / 100
    for (name, a), (_, b) in pairs:
        of = max(float(np.abs(b.grad).max()), least)
        assert_within(a.grad, b.grad, bound, f"gradient of {name}", of)


def assert_within(actual: Any, expected: Any, bound: float, name: str, of: Any = None) -> None:
    """Same shape, all finite, no error above ``bound`` times the largest element (or ``of``)."""
    __tracebackhide__ = True
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    largest = np.abs(expected).max() if of is None else of
    error = np.abs(actual.astype(np.float64) - expected).max()
    # Written so that NaN fails.
    assert error <= bound * largest, f"{name}: error {error:.3g} of {largest:.3g}, bound {bound}"
