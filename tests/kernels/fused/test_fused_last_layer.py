"""The fused last layer against the plain operators in float64, one after the other."""

import numpy as np
import pytest
from checkers import assert_close, assert_exact, normal, unchanged
from deferred import (
    CHANNELS,
    SIZES,
    SLOPES,
    THREADS,
    blocked,
    blocked_shape,
    deferred,
    poisoned,
    totals,
    unblocked,
)
from hypothesis import example, given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.ops import activation, label_losses, last_layer, softmax

# One class is a sigmoid, four are the brain's, sixteen the most.
CLASSES = st.sampled_from([1, 2, 4, 16])
CASES = {
    "size": SIZES,
    "IC": CHANNELS,
    "classes": CLASSES,
    "slope": SLOPES,
    "ignored": st.sampled_from([None, None, 0, 255]),
    "seed": st.integers(0, 99),
    "threads": THREADS,
}
# As many classes as a byte has numbers.
MOST = {
    "size": (1, 3, 4, 5),
    "IC": 16,
    "classes": 256,
    "slope": 0.0,
    "ignored": None,
    "seed": 0,
    "threads": 1,
}
# Logits are sums of up to 40 products, and p changes by at most a quarter of what they do: errors of
# 40 roundings at worst, of numbers of the order of 10.
BOUND = 40 * 10 / 4 * 2**-24


class Problem:
    """A layer, its float64 logits, and weights of its loss."""

    def __init__(self, size, IC, classes, slope, seed, ignored=None):
        generator = np.random.default_rng(seed)
        whole = deferred(generator, (*size, IC), slope)
        x = normal(generator, *size, IC)
        self.data = whole._replace(x=x)
        self.weights = normal(generator, classes, IC, 1, 1, 1) / np.float32(np.sqrt(IC))
        self.bias = normal(generator, classes)
        self.labels = generator.integers(0, max(classes, 2), size).astype(np.uint8)
        self.rule = None, None
        if ignored is not None:  # and weights
            self.labels[generator.random(size) < 0.3] = ignored
            self.rule = generator.uniform(0.2, 2, max(classes, 2)), ignored
        self.diff_dice = normal(generator, 2, size[0], classes, dtype=np.float64)
        self.diff_cross_entropy = 0.3 * self.labels.size
        self.matrix = self.weights.reshape(classes, IC).astype(np.float64)
        self.logits = self.data.value() @ self.matrix.T + self.bias

    @property
    def layer(self):
        rule = label_losses.weighting(self.bias.size, *self.rule)
        return last_layer.Layer(self.data.source, self.weights, self.bias, self.labels, rule)

    def unchanged(self):
        source, *others, _ = self.layer
        return unchanged(*source[:3], *others, self.diff_dice)

    def diff_logits(self):
        dice = label_losses.dice_backward(self.logits, self.labels, *self.diff_dice, self.rule[1])
        share = self.diff_cross_entropy
        return dice + label_losses.cross_entropy_backward(self.logits, self.labels, share, *self.rule)


def run_forward(layer, MB, classes):
    dice = poisoned(3, MB, classes, dtype=np.float64)
    cross_entropy = poisoned(1, dtype=np.float64)
    last_layer.forward(layer, dice, cross_entropy)
    return dice, cross_entropy


@given(**CASES)
@example(**MOST)
def test_forward(size, IC, classes, slope, ignored, seed, threads):
    machine.set_threads(threads)
    problem = Problem(size, IC, classes, slope, seed, ignored)
    with problem.unchanged():
        dice, cross_entropy = run_forward(problem.layer, size[0], classes)
    wanted = label_losses.dice_forward(problem.logits, problem.labels, ignored)
    voxels = problem.labels[0].size
    for name, got, exact in zip(("I", "P", "T"), dice, wanted, strict=True):
        assert np.abs(got - exact).max() <= BOUND * voxels, name
    assert_exact(dice[2], wanted[2])
    exact = label_losses.cross_entropy_forward(problem.logits, problem.labels, *problem.rule)
    assert abs(cross_entropy[0] - exact) <= 4 * BOUND


@given(**CASES)
def test_infer(size, IC, classes, slope, ignored, seed, threads):
    machine.set_threads(threads)
    problem = Problem(size, IC, classes, slope, seed, ignored)
    probabilities = poisoned(*size, classes)
    with problem.unchanged():
        last_layer.infer(*problem.layer[:3], probabilities)
    logits = problem.logits
    if classes == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=-1)
    wanted = softmax.forward(logits)[..., -classes:]
    assert np.abs(probabilities - wanted).max() <= BOUND


@given(**CASES, accumulate=st.booleans(), masked=st.booleans())
@example(**MOST, accumulate=False, masked=False)
def test_backward(size, IC, classes, slope, ignored, seed, threads, accumulate, masked):
    machine.set_threads(threads)
    problem = Problem(size, IC, classes, slope, seed, ignored)
    before = normal(np.random.default_rng(seed), *size, IC)
    dst = blocked(before) if accumulate else poisoned(*blocked_shape(before.shape))
    mask = problem.data.mask if masked else None
    diff_weights, diff_bias = poisoned(*problem.weights.shape), poisoned(classes)
    with problem.unchanged():
        last_layer.backward(
            problem.layer,
            problem.diff_dice,
            problem.diff_cross_entropy,
            dst,
            diff_weights,
            diff_bias,
            accumulate,
            mask,
        )
    diff_logits = problem.diff_logits()
    # Of Dice's and of the cross-entropy's derivative.
    bound = BOUND * (4 * np.abs(problem.diff_dice).max() + 1)
    wanted = diff_logits @ problem.matrix + (before if accumulate else 0.0)
    value, voxels = problem.data.value(), problem.labels.size
    outer = np.einsum("ndhwc,ndhwi->ci", diff_logits, value)
    error = np.abs(diff_weights.reshape(outer.shape) - outer).max()
    assert error <= bound * np.abs(value).max() * voxels
    assert np.abs(diff_bias - diff_logits.sum(axis=(0, 1, 2, 3))).max() <= bound * voxels
    bound *= np.abs(problem.matrix).sum(axis=0).max()
    if mask:
        wanted, *wanted_sums = problem.data.masked(wanted)
        deviation = np.abs(problem.data.x - problem.data.mean).max()
        for got, exact, factor in zip(totals(mask, IC), wanted_sums, (1.0, deviation), strict=True):
            assert np.abs(got - exact).max() <= bound * factor * voxels
    assert np.abs(unblocked(dst, IC) - wanted).max() <= bound


def test_large_logits():
    """Nothing overflows, and the cross-entropy is as large as the logits that caused it."""
    problem = Problem((1, 1, 1, 3), 16, 3, 1.0, 0)
    problem.weights[:], problem.bias[:] = 0.0, (300.0, -300.0, 0.0)
    problem.labels[:] = 1
    dice, cross_entropy = run_forward(problem.layer, 1, 3)
    assert cross_entropy[0] == pytest.approx(600.0)
    assert_exact(dice[:, 0], np.array([[0.0, 0, 0], [3, 0, 0], [0, 3, 0]]))


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_logits_that_are_wrong_by_far_or_infinite(classes):
    """As the operators in float64: gradients do not vanish, and -inf is a probability of 0."""
    for margin in (10.0, 17.0, 80.0, 104.0, 1000.0, np.inf):
        for sign, label in ((1, 0), (-1, max(classes - 1, 1)), (1, max(classes - 1, 1))):
            if np.isinf(margin) and sign > 0 and classes > 1:
                continue  # NaN, as everywhere
            problem = Problem((1, 1, 2, 5), 16, classes, 1.0, 0)
            problem.weights[:], problem.bias[:] = 0.0, 0.0
            problem.bias[-1], problem.labels[:] = sign * margin, label
            logits = np.broadcast_to(problem.bias.astype(np.float64), (1, 1, 2, 5, classes))
            dice, cross_entropy = run_forward(problem.layer, 1, classes)
            exact = label_losses.dice_forward(logits, problem.labels)
            np.testing.assert_allclose(dice, exact, rtol=2e-6, atol=1e-6)
            exact = label_losses.cross_entropy_forward(logits, problem.labels)
            assert cross_entropy[0] == pytest.approx(exact, rel=1e-6, abs=2e-7)
            diffs = poisoned(*problem.weights.shape), poisoned(classes)
            dst = poisoned(*blocked_shape((1, 1, 2, 5, 16)))
            last_layer.backward(problem.layer, 0 * problem.diff_dice, 1.0, dst, *diffs)
            exact = label_losses.cross_entropy_backward(logits, problem.labels)
            np.testing.assert_allclose(diffs[1], exact.sum(axis=(0, 1, 2, 3)), atol=1e-6)
            found = poisoned(*logits.shape)
            last_layer.infer(*problem.layer[:3], found)
            sigmoid = activation.forward(logits, activation.SIGMOID)
            wanted = sigmoid if classes == 1 else softmax.forward(logits)
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-37)


def test_repeats_bit_for_bit_whatever_the_threads():
    problem = Problem((2, 3, 50, 60), 16, 4, 0.0, 0)
    results = []
    for threads in (1, machine.cores()):
        machine.set_threads(threads)
        mask, dst = problem.data.mask, poisoned(*blocked_shape(problem.data.x.shape))
        diffs = poisoned(*problem.weights.shape), poisoned(4)
        sums = run_forward(problem.layer, 2, 4)
        last_layer.backward(problem.layer, problem.diff_dice, 1.0, dst, *diffs, mask=mask)
        results.append([*sums, dst, *diffs, mask.sums])
    for first, second in zip(*results, strict=True):
        assert np.isfinite(first).all()
        assert_exact(second, first)


def test_error():
    """On a volume: sums to 1e-6 of themselves, gradients to 1e-6 of the largest."""
    problem = Problem((1, 4, 50, 60), 16, 4, 0.0, 0)
    dice, cross_entropy = run_forward(problem.layer, 1, 4)
    for got, exact in zip(dice, label_losses.dice_forward(problem.logits, problem.labels), strict=True):
        assert_close(got, exact, 1e-6)
    exact = label_losses.cross_entropy_forward(problem.logits, problem.labels)
    assert_close(cross_entropy, np.array([exact]), 1e-6)
    dst = poisoned(*blocked_shape(problem.data.x.shape))
    diffs = poisoned(*problem.weights.shape), poisoned(4)
    last_layer.backward(problem.layer, problem.diff_dice, problem.diff_cross_entropy, dst, *diffs)
    diff_logits = problem.diff_logits()
    assert_close(unblocked(dst, 16), diff_logits @ problem.matrix, 1e-6)
    outer = np.einsum("ndhwc,ndhwi->ci", diff_logits, problem.data.value())
    assert_close(diffs[0].reshape(4, 16), outer, 1e-6)
    assert_close(diffs[1], diff_logits.sum(axis=(0, 1, 2, 3)), 1e-6)
