"""A compiled model says once that it is not fused, which nodes, why, and what would be fused."""

import warnings

import numpy as np
import pytest

import tinyunet
from tinyunet import UNet, nn
from tinyunet.compiler.explain import UnfusedWarning
from tinyunet.losses import soft_dice
from tinyunet.optim import SGD

SHAPE = (1, 4, 4, 4, 4)


class Net(tinyunet.Module):
    """Two convolutions of which no fused kernel exists, and one."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.strided = nn.Conv3d(4, 16, 3, stride=2, generator=generator)
        self.even = nn.Conv3d(16, 16, 2, generator=generator)
        self.usual = nn.Conv3d(16, 4, 3, generator=generator)

    def forward(self, src):
        return self.usual(self.even(self.strided(src)))


def test_reasons_are_given_and_the_warning_comes_once():
    with pytest.warns(UnfusedWarning, match=r"2 nodes .* run unfused \(convolution\): explain") as found:
        predict = tinyunet.compile(Net(), SHAPE)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(np.zeros((2, *SHAPE[1:]), np.float32))
    lines = predict.explain(SHAPE).splitlines()
    assert lines[0].startswith("2 of ")
    (strided,) = (line for line in lines if line.startswith("strided "))
    assert "no kernel for kernel (3, 3, 3), stride (2, 2, 2), padding same" in strided
    assert "kernel sizes of 1, 3 or 5, stride 1, padding same" in strided
    assert sum(line.startswith("even ") for line in lines) == 1
    assert not any(line.startswith("usual ") for line in lines)
    assert "reorder" in lines[0]


def test_the_usual_net_is_fused():
    model = UNet(in_channels=4, classes=4, filters=4, depth=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = tinyunet.compile(model, soft_dice, SGD(model.parameters(), lr=0.1), SHAPE)
    assert "every one on volumes is fused; 0 reorders" in step.explain()


def test_float64_and_operators_without_a_kernel():
    model = UNet(in_channels=4, classes=4, filters=4, depth=2, use_upsampling=True)
    with pytest.warns(UnfusedWarning, match="upsampling"):
        predict = tinyunet.compile(model, SHAPE)
    assert "upsampling has no kernel on blocked tensors" in predict.explain()
    with pytest.warns(UnfusedWarning):
        predict = tinyunet.compile(UNet(filters=2, depth=1).astype("float64"), SHAPE)
    assert 'float64 runs the reference  model.astype("float32")' in predict.explain()


def test_a_pass_that_is_off_is_named():
    model = UNet(in_channels=4, classes=4, filters=2, depth=1)
    with pytest.warns(UnfusedWarning):
        predict = tinyunet.compile(model, SHAPE, disable=["propagate_layout"])
    assert "propagate_layout is off" in predict.explain()
