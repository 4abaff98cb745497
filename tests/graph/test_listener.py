"""Whoever listens to backward is told each parameter once, when its gradient is complete."""

import numpy as np
import pytest

import tinyunet
from tinyunet import losses
from tinyunet.autograd import Tensor
from tinyunet.nn import Conv3d, Module, Parameter
from tinyunet.optim import SGD

SHAPE = (1, 4, 4, 4, 4)


class Shared(Module):
    """A convolution that is used twice, and a parameter that is not used."""

    def __init__(self) -> None:
        self.first = Conv3d(4, 4)
        self.shared = Conv3d(4, 4)
        self.unused = Parameter(np.ones(3, np.float32))

    def forward(self, src):
        return self.shared(self.shared(self.first(src)))


def run(way, model, optimizer, weight, listener=None):
    generator = np.random.default_rng(0)
    images = generator.standard_normal(SHAPE).astype(np.float32)
    labels = generator.integers(0, 4, SHAPE[:-1])
    optimizer.zero_grad()
    if way == "eager":
        losses.cross_entropy(model(images), labels, from_logits=True).backward(weight, listener)
        return
    loss = {
        "compiled": lambda p, y: losses.cross_entropy(p, y, from_logits=True),
        # On probabilities the labels are computed with beside the operators: it stays one node.
        "a loss of one node": lambda p, y: losses.cross_entropy(p * p + 1, y),
    }[way]
    tinyunet.compile(model, loss, optimizer, SHAPE).gradients(images, labels, weight, listener)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_every_parameter_is_told_once_and_not_too_early(way):
    model = Shared()
    optimizer = SGD(model.parameters(), 0.1)
    told = {}

    def listener(operator, complete):
        assert operator
        for parameter in complete:
            assert id(parameter) not in told
            told[id(parameter)] = parameter.grad.copy()

    run(way, model, optimizer, 1.0, listener)
    for name, parameter in model.named_parameters():
        if name != "unused" or way == "compiled":
            np.testing.assert_array_equal(told.pop(id(parameter)), parameter.grad)
    assert not told


@pytest.mark.parametrize("way", ["eager", "compiled", "a loss of one node"])
def test_the_weight_multiplies_every_gradient(way):
    model = Shared()
    optimizer = SGD(model.parameters(), 0.1)
    run(way, model, optimizer, 1.0)
    whole = optimizer.flat_gradients.copy()
    assert np.abs(whole).max() > 0
    run(way, model, optimizer, 0.25)
    np.testing.assert_array_equal(optimizer.flat_gradients, 0.25 * whole)
    run(way, model, optimizer, 0.0)
    np.testing.assert_array_equal(optimizer.flat_gradients, 0.0)


def test_a_leaf_in_one_operator_twice_is_told_once():
    x, told = Tensor([2.0], requires_grad=True), []
    (x * x + x).backward(listener=lambda _, complete: told.append(list(complete)))
    assert told == [[], [x]]
    np.testing.assert_array_equal(x.grad, [5.0])
