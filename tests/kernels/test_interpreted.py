"""Loops run as plain Python, where NumPy checks every index, give what they give compiled.

Only those of register tiles cannot: they are made of LLVM instructions.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from checkers import assert_close, integers, normal

from kernels.ops import activation, batch_norm, concat, optimizers, pooling, softmax_dice, upsample


def results(dtype):
    """Every operator once, on a volume of odd sizes."""
    generator = np.random.default_rng(0)
    src = integers(generator, 2, 3, 5, 2, 3, dtype=dtype)
    logits = normal(generator, 2, 3, 5, 9, 3, dtype=dtype)
    labels = generator.integers(0, 3, logits.shape[:-1]).astype(np.uint8)
    scale, shift = normal(generator, 2, 3, dtype=dtype)
    pooled, argmax = pooling.max_pool_forward(src)
    normalised, mean, variance = batch_norm.forward_training(src, scale, shift)
    dice = softmax_dice.dice_forward(logits, labels)
    parameters, m = normal(generator, 2, 20, dtype=dtype)
    optimizers.adam_step(parameters, parameters + 1, m, m**2, 1, 0.1)
    optimizers.sgd_step(parameters, parameters + 1, m, 0.1, 0.9, nesterov=True)
    return [
        activation.relu_backward(src, activation.relu_forward(src)),
        activation.leaky_relu_backward(src, activation.leaky_relu_forward(src, 0.1), 0.1),
        activation.sigmoid_backward(src, activation.sigmoid_forward(src)),
        *concat.backward(concat.forward(src, src + 1), 2),
        pooled,
        pooling.max_pool_backward(pooled, argmax, src.shape),
        upsample.backward(upsample.forward(src)),
        normalised,
        *batch_norm.backward(src**2, src, scale, mean, variance),
        batch_norm.forward_inference(src, scale, shift, mean, variance),
        softmax_dice.softmax_backward(logits, softmax_dice.softmax_forward(logits)),
        *dice,
        softmax_dice.dice_backward(logits, labels, dice[0], dice[1]),
        softmax_dice.dice_backward(logits[..., :1], labels % 2, dice[0][:, :1], dice[1][:, :1]),
        np.float64(softmax_dice.cross_entropy_forward(logits, labels)),
        np.float64(softmax_dice.cross_entropy_forward(logits[..., :1], labels % 2)),
        softmax_dice.cross_entropy_backward(logits, labels, 2.0),
        parameters,
        m,
    ]


def test_interpreted_equals_float64():
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    here = os.path.dirname(__file__)
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(here), here])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, timeout=300
    )
    assert run.returncode == 0, run.stderr.decode()


def check():
    for which, (actual, expected) in enumerate(zip(results(np.float32), results(np.float64), strict=True)):
        assert_close(actual, expected, 2e-6, f"result {which}")


def test_compiled_equals_float64():
    check()


@pytest.mark.parametrize("module", [activation, pooling])
def test_is_compiled_here(module):
    """Else the two tests above would be the same."""
    assert "NUMBA_DISABLE_JIT" not in os.environ
    assert hasattr(module._relu_forward if module is activation else module._make_forward(2, 2, 2), "py_func")


if __name__ == "__main__":
    check()
