"""Loops run as plain Python, where NumPy checks every index, give what they give compiled.

Only those of vectors and register tiles cannot: they are made of LLVM instructions.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkers import assert_close, integers, normal

from kernels.ops import activation, concat, label_losses, norms, optimizers, pooling, softmax, upsample


def results(dtype):
    """Every operator once, on a volume of odd sizes; those of vectors only where they are compiled."""
    generator = np.random.default_rng(0)
    src = integers(generator, 2, 3, 5, 2, 3, dtype=dtype)
    scale, shift = normal(generator, 2, 3, dtype=dtype)
    normalised, mean, variance = norms.forward(src, scale, shift)
    parameters, m = normal(generator, 2, 20, dtype=dtype)
    optimizers.adam_step(parameters, parameters + 1, m, m**2, 1, 0.1)
    optimizers.sgd_step(parameters, parameters + 1, m, 0.1, 0.9, nesterov=True)
    each = activation.RELU, activation.leaky_relu(0.1), activation.SIGMOID
    return [
        *(activation.backward(src, activation.forward(src, which), which) for which in each),
        *concat.backward(concat.forward(src, src + 1), 2),
        normalised,
        *norms.backward(src**2, src, scale, mean, variance),
        norms.forward_inference(src, scale, shift, mean[0], variance[0]),
        parameters,
        m,
        *([] if "NUMBA_DISABLE_JIT" in os.environ else results_of_vectors(src)),
    ]


def results_of_vectors(src):
    generator = np.random.default_rng(0)
    logits = normal(generator, 2, 3, 5, 9, 3, dtype=src.dtype)
    labels = generator.integers(0, 3, logits.shape[:-1]).astype(np.uint8)
    pooled, argmax = pooling.forward(src)
    dice = label_losses.dice_forward(logits, labels)
    return [
        upsample.backward(upsample.forward(src)),
        pooled,
        pooling.backward(pooled, argmax, src.shape),
        softmax.backward(logits, softmax.forward(logits)),
        *dice,
        label_losses.dice_backward(logits, labels, dice[0], dice[1]),
        label_losses.dice_backward(logits[..., :1], labels % 2, dice[0][:, :1], dice[1][:, :1]),
        np.float64(label_losses.cross_entropy_forward(logits, labels)),
        np.float64(label_losses.cross_entropy_forward(logits[..., :1], labels % 2)),
        label_losses.cross_entropy_backward(logits, labels, 2.0),
    ]


def test_interpreted_equals_float64():
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    kernels, tests, root = (str(folder) for folder in Path(__file__).parents[:3])
    environment["PYTHONPATH"] = os.pathsep.join([root, tests, kernels])
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
    assert hasattr(
        module._make_forward(0) if module is activation else module._make_forward(2, 2, 2), "py_func"
    )


if __name__ == "__main__":
    check()
