"""A glance at a model sees what is replaced in it; what compiled steps do then is in test_what_trace_sees."""

import functools

import numpy as np
import pytest

import tinyunet
from tinyunet.autograd import Tensor
from tinyunet.compiler.glance import Glance
from tinyunet.losses import dice_cross_entropy
from tinyunet.nn import BatchNorm, Conv3d, Module, Parameter, Sequential
from tinyunet.optim import Adam
from tinyunet.unet import UNet


class Net(Module):
    """Attributes of all kinds."""

    def __init__(self):
        self.body = Sequential(Conv3d(2, 3, 3), BatchNorm(3))
        self.beside = [Conv3d(3, 3, 1), {"slope": 0.1}]
        self.settings = {"sizes": [1, 2], "deep": ({"a": 1},)}
        self.whole = self.beside  # twice
        self.me = [self]


def replace(net, name, value):
    setattr(net, name, value)


CHANGES = {
    "attribute": lambda net: replace(net, "settings", {"sizes": [1, 2], "deep": ({"a": 1},)}),
    "new attribute": lambda net: replace(net, "more", None),
    "attribute taken away": lambda net: delattr(net, "whole"),
    "attribute of another name": lambda net: replace(net, "you", vars(net).pop("me")),
    "attribute of a part": lambda net: replace(net.body[1], "momentum", 0.5),
    "another part": lambda net: replace(net.body, "0", Conv3d(2, 3, 3)),
    "one more part": lambda net: net.body.append(BatchNorm(3)),
    "item of a list": lambda net: net.settings["sizes"].__setitem__(1, 3),
    "one more item": lambda net: net.settings["sizes"].append(3),
    "item of a dict": lambda net: net.settings.__setitem__("sizes", [1, 2]),
    "deep in a tuple": lambda net: net.settings["deep"][0].__setitem__("a", 2),
    "attribute of a part in a list": lambda net: replace(net.beside[0], "stride", (2, 2, 2)),
    "dict in a list": lambda net: net.beside[1].__setitem__("slope", 0.2),
    "class": lambda net: replace(net.body[1], "__class__", Module),
    "class of a part in a list": lambda net: replace(net.beside[0], "__class__", Module),
    "data": lambda net: replace(net.body[0].weights, "data", net.body[0].weights.data.copy()),
    "what is learnt": lambda net: replace(net.body[0].weights, "requires_grad", False),
    "parameter": lambda net: replace(net.body[0], "weights", Parameter(net.body[0].weights.data)),
    "buffer": lambda net: replace(net.body[1], "running_mean", np.ones(3, np.float32)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_replaced_is_seen(change):
    net = Net()
    glance = Glance(net, ())
    assert glance.is_same()
    change(net)
    assert not glance.is_same()
    assert Glance(net, ()).is_same()


def test_what_is_changed_in_place_is_not_looked_at():
    net = Net()
    glance = Glance(net, ())
    net.body[0].weights.data += 1
    net.body[1].running_mean[:] = 2
    assert glance.is_same()


def test_the_data_of_a_tensor_that_is_no_parameter():
    net = Net()
    net.settings["scale"] = Tensor(np.ones(3))
    glance = Glance(net, ())
    assert glance.is_same()
    net.settings["scale"].data = np.ones(3)
    assert not glance.is_same()


@pytest.mark.parametrize("training", [False, True])
def test_gradients_matter_to_a_step_alone(training):
    net = Net()
    glance = Glance(net, (), training)
    net.body[0].weights.grad = np.zeros(1)
    assert glance.is_same() is not training


@pytest.mark.parametrize("training", [False, True])
def test_a_part_in_inference_while_the_model_trains_matters_to_a_step_alone(training):
    net = Net()
    glance = Glance(net, (), training)
    net.eval()
    assert glance.is_same()
    net.train()
    net.body[1].eval()
    for _ in range(2):
        assert glance.is_same() is not training
    net.train()
    assert glance.is_same()


def test_numbers_and_text_that_are_equal_are_the_same():
    net = Net()
    net.rate, net.name = 0.5, "a net"
    glance = Glance(net, ())
    net.rate, net.name = float("0.5"), "a " + "".join(["n", "et"])
    assert glance.is_same()
    net.rate = 0.25
    assert not glance.is_same()


def test_objects_beside_the_model_are_seen():
    others = [{"weight": 1.0}, [1, 2]]
    for change in (lambda: others[0].update(weight=2.0), lambda: others[1].pop()):
        glance = Glance(Net(), others)
        assert glance.is_same()
        change()
        assert not glance.is_same()


IMAGES = np.ones((1, 8, 8, 8, 4), np.float32)
LABELS = np.zeros(IMAGES.shape[:-1], np.int64)


def compiled(loss):
    model = UNet(in_channels=4, classes=3, filters=4, depth=2)
    return model, tinyunet.compile(model, loss, Adam(model.parameters()), IMAGES.shape)


def weighted(logits, labels, weight=1.0):
    return dice_cross_entropy(logits, labels) * weight


@pytest.mark.parametrize("loss", [dice_cross_entropy, functools.partial(weighted, weight=2.0)])
def test_a_step_looks_at_the_model_once_and_when_something_is_replaced(loss, monkeypatch):
    model, step = compiled(loss)
    look, looks = step._look, []
    monkeypatch.setattr(step, "_look", lambda: looks.append(look()))
    for _ in range(4):
        step(IMAGES, LABELS)
    assert len(looks) <= 1
    model.encoder[0].norm0.epsilon = 1e-2
    before = len(looks)
    for _ in range(3):
        step(IMAGES, LABELS)
    assert len(looks) == before + 1


def test_what_a_look_refuses_is_refused_again():
    model, step = compiled(dice_cross_entropy)
    step(IMAGES, LABELS)
    held, model.encoder[0].conv0.weights = (
        model.encoder[0].conv0.weights,
        Parameter(model.encoder[0].conv0.weights.data),
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=r"does not hold the model's parameter"):
            step(IMAGES, LABELS)
    model.encoder[0].conv0.weights = held
    step(IMAGES, LABELS)
