"""Names, tapes and settings that a user's model may have: compiled equals eager, or one line says why not."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from agreement import INPUT, ROUNDING, SHAPE, assert_agree, assert_within, batch, conv, numbers

import tinyunet
from tinyunet import SGD, Function, Module, Parameter, Tensor, losses, no_grad
from tinyunet import functional as F
from tinyunet.nn import BatchNorm


class Net(Module):
    """What is tried, and a 1^3 convolution to 4 classes."""

    def __init__(self, middle: Callable[["Net", Any], Any], **parts: Any) -> None:
        self.head = conv(16, 4, 1)
        for name, part in parts.items():
            setattr(self, name, part)
        self._middle = middle

    def forward(self, images: Tensor) -> Tensor:
        return F.softmax(self.head(self._middle(self, images)))


class Relu(Function):
    """Not the one that passes know: it is clipped."""

    @staticmethod
    def forward(ctx: Any, src: Any) -> Any:
        ctx.save(src)
        return np.clip(src, 0, 0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (src,) = ctx.saved
        return (gradient * ((src > 0) & (src < 0.5)),)


class Scaled(Function):
    """Its settings are called as passes call theirs."""

    @staticmethod
    def forward(ctx: Any, src: Any, of: float, tile: int) -> Any:
        ctx.factor = of * tile
        return src * np.float32(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return (gradient * np.float32(ctx.factor),)


class OwnNorm(Module):
    """A batch norm as somebody writes it who has read `functional.batch_norm`."""

    def __init__(self) -> None:
        self.scale, self.shift = Parameter(np.ones(16, "f4")), Parameter(np.ones(16, "f4"))
        self.mean, self.variance = np.zeros(16, "f4"), np.ones(16, "f4")
        self.moments = conv(16, 16, seed=3)

    def forward(self, x: Any) -> Any:
        parts = self.scale, self.shift, self.mean, self.variance
        return F.relu(self.moments(F.batch_norm(x, *parts, self.training)))


class Product(Module):
    """Multiplies by a parameter whose name is that of a result."""

    def __init__(self) -> None:
        self.weights, self.dst = Parameter(numbers(16, 4, 3, 3, 3)), Parameter(numbers(16))

    def forward(self, x: Any) -> Any:
        return F.relu(F.conv3d(x, self.weights) * self.dst)


def partly_frozen(net: Any, x: Tensor) -> Tensor:
    with no_grad():
        y = F.relu(net.backbone(x))
    return F.relu(net.second(y))


NETS: dict[str, Callable[[], Net]] = {
    "no_grad inside": lambda: Net(partly_frozen, backbone=conv(4, 16), second=conv(16, 16)),
    "an operator called Relu": lambda: Net(
        lambda net, x: Relu.apply(net.norm(net.first(x))), first=conv(4, 16), norm=BatchNorm(16)
    ),
    "settings called of and tile": lambda: Net(
        lambda net, x: Scaled.apply(net.first(x), 2.0, 3), first=conv(4, 16)
    ),
    "an own batch norm": lambda: Net(
        lambda net, x: net.norm(net.first(x)), first=conv(4, 16), norm=OwnNorm()
    ),
    "a parameter called dst": lambda: Net(lambda net, x: net.product(x), product=Product()),
    "a layer called loss": lambda: Net(lambda net, x: F.relu(net.loss(x)), loss=conv(4, 16)),
}


def clamped(prediction: Tensor, labels: Any) -> Tensor:
    """Stays eager, and counts down from the labels."""
    with no_grad():
        weights = (1.0 - prediction) ** 2.0
    below = (labels - 1).astype(np.float32)
    return (weights.data.sum(axis=-1) * prediction[..., 0] * below).mean() + 1.0


@pytest.mark.parametrize("name", NETS)
def test_compiled_equals_eager(name):
    loss = clamped if name == "a layer called loss" else losses.cross_entropy
    assert_agree(NETS[name], SHAPE, ROUNDING, steps=1, loss=loss)


def test_names_of_inputs_are_taken():
    model = Net(lambda net, x: net.first(x + net.images), first=conv(4, 16), images=numbers(*INPUT))
    with pytest.raises(ValueError, match="buffer 'images', as the graph calls its input"):
        tinyunet.compile(model, INPUT)


def test_a_parameter_is_no_prediction():
    class Constant(Module):
        def __init__(self) -> None:
            self.w = Parameter(numbers(4))

        def forward(self, images: Tensor) -> Tensor:
            return self.w

    with pytest.raises(TypeError, match="must return one Tensor made by"):
        tinyunet.compile(Constant(), INPUT)


@pytest.mark.parametrize(
    "middle",
    [
        lambda net, x: F.leaky_relu(net.first(x), np.abs(x.data).mean() + np.float32(0.1)),
        lambda net, x: net.first(x)[np.argmax(x.data[0, :, 0, 0, 0]) % 1 : 1 + (x.data.max() > 0)],
    ],
)
def test_settings_that_depend_on_the_data_are_refused(middle):
    with pytest.raises(ValueError, match="depends on the data"):
        tinyunet.compile(Net(middle, first=conv(4, 16)), INPUT)


class Annealed:
    """A loss with a factor that changes."""

    def __init__(self) -> None:
        self.factor = 1.0

    def compute(self, prediction: Tensor, labels: Any) -> Tensor:
        return (prediction * prediction).mean() * self.factor


@pytest.mark.parametrize("partial", [False, True])
def test_the_object_whose_method_a_loss_is(partial):
    images, labels = batch(SHAPE, 4, 4, 0)
    model, annealed = Net(lambda net, x: net.first(x), first=conv(4, 16)), Annealed()
    loss = functools.partial(annealed.compute) if partial else annealed.compute
    step = tinyunet.compile(model, loss, SGD(model.parameters(), 0.0), INPUT)
    before = step(images, labels)
    annealed.factor = 10.0
    assert step(images, labels) == pytest.approx(10 * before)


def test_what_forward_makes_once_is_a_setting():
    def middle(net: Any, x: Tensor) -> Tensor:
        if net.factor is None:
            net.factor = 1.0
        return net.first(x) * net.factor

    model = Net(middle, first=conv(4, 16), factor=None)
    predict, images = tinyunet.compile(model, INPUT), numbers(*INPUT)
    program = predict.program(INPUT)
    assert predict.program(INPUT) is program
    model.factor = 5.0
    with no_grad():
        assert_within(predict(images), model(images).data, ROUNDING, "prediction")
