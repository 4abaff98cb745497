"""Softmax, Dice sums and cross-entropy: float32 kernels against NumPy in float64, gradients, extremes."""

import math

import numpy as np
import pytest
from checkers import assert_close, assert_exact, check_gradients, normal, unchanged
from hypothesis import given
from hypothesis import strategies as st

from kernels.base import machine
from kernels.ops import binary_cross_entropy, label_losses, softmax
from kernels.ops.softmax import BLOCK, CHUNK

THREADS = st.sampled_from([1, machine.cores()])
CLASSES = st.sampled_from([1, 2, 3, 4, 7])
# One voxel, and around the ends of blocks and chunks.
VOLUMES = st.sampled_from(
    [(1, 1, 1), (3, 5, 7), (1, 1, BLOCK), (1, BLOCK + 1, 1), (2, CHUNK // 2, 1), (3, 1, CHUNK - 1)]
)

# exp and a division, and products and sums of numbers below 1: about ten roundings of 6e-8.
BOUND = 6e-7


def problem(volume, classes, seed=0, MB=2, dtype=np.float32):
    generator = np.random.default_rng(seed)
    logits = 4 * normal(generator, MB, *volume, classes, dtype=dtype)
    labels = generator.integers(0, max(classes, 2), (MB, *volume)).astype(np.uint8)
    return logits, labels


def one_hot(logits, labels):
    """Definition of `t`, and of `p` for a float64 array."""
    classes = logits.shape[-1]
    if classes == 1:
        return 1 / (1 + np.exp(-logits)), labels[..., None] == 1
    power = np.exp(logits)
    return power / power.sum(axis=-1, keepdims=True), labels[..., None] == np.arange(classes)


@given(volume=VOLUMES, classes=CLASSES, seed=st.integers(0, 99), threads=THREADS)
def test_softmax(volume, classes, seed, threads):
    machine.set_threads(threads)
    logits, _ = problem(volume, classes, seed)
    diff_dst = normal(np.random.default_rng(seed), *logits.shape)
    with unchanged(logits, diff_dst):
        dst = softmax.forward(logits)
        diff_logits = softmax.backward(diff_dst, dst)
    assert dst.dtype == diff_logits.dtype == np.float32
    power = np.exp(logits.astype(np.float64))
    exact = power / power.sum(axis=-1, keepdims=True)
    assert_close(dst, exact, BOUND)
    assert_close(dst.sum(axis=-1), np.ones(logits.shape[:-1]), classes * 6e-8)
    diff = diff_dst.astype(np.float64)
    expected = exact * (diff - (diff * exact).sum(axis=-1, keepdims=True))
    # With one class the gradient is 0, up to what the probability of 1 was rounded.
    error = np.abs(diff_logits - expected).max()
    assert error <= BOUND * np.abs(diff).max()


@given(volume=VOLUMES, classes=CLASSES, seed=st.integers(0, 99), threads=THREADS)
def test_dice_sums(volume, classes, seed, threads):
    machine.set_threads(threads)
    logits, labels = problem(volume, classes, seed)
    with unchanged(logits, labels):
        sums = label_losses.dice_forward(logits, labels)
    p, t = one_hot(logits.astype(np.float64), labels)
    expected = ((p * t).sum(axis=(1, 2, 3)), p.sum(axis=(1, 2, 3)), t.sum(axis=(1, 2, 3)))
    reference = label_losses.dice_forward(logits.astype(np.float64), labels)
    # A probability whose logit is 20 below the largest has a relative error of 20 * 6e-8 from the
    # subtraction; in a sum over few voxels it may be all there is.
    for which, name in enumerate(("intersection", "prediction", "target")):
        assert sums[which].dtype == np.float64
        assert_close(sums[which], expected[which], 1.5e-6, name)
        assert_close(reference[which], expected[which], 1e-14, name)
    assert_exact(sums[2], expected[2])


@given(volume=VOLUMES, classes=CLASSES, seed=st.integers(0, 99), threads=THREADS)
def test_dice_gradient(volume, classes, seed, threads):
    machine.set_threads(threads)
    logits, labels = problem(volume, classes, seed)
    generator = np.random.default_rng(seed)
    diffs = [normal(generator, len(logits), classes, dtype=np.float64) for _ in range(2)]
    with unchanged(logits, labels, *diffs):
        actual = label_losses.dice_backward(logits, labels, *diffs)
    assert actual.dtype == np.float32
    expected = label_losses.dice_backward(logits.astype(np.float64), labels, *diffs)
    error = np.abs(actual - expected).max()
    assert error <= BOUND * max(np.abs(diff).max() for diff in diffs)


@given(volume=VOLUMES, classes=CLASSES, seed=st.integers(0, 99), threads=THREADS)
def test_cross_entropy(volume, classes, seed, threads):
    machine.set_threads(threads)
    logits, labels = problem(volume, classes, seed)
    with unchanged(logits, labels):
        loss = label_losses.cross_entropy_forward(logits, labels)
        diff_logits = label_losses.cross_entropy_backward(logits, labels, 3.0)
    p, t = one_hot(logits.astype(np.float64), labels)
    share = 3.0 / labels.size
    # With one class the other's probability is the sigmoid of -x; 1 - p would cancel.
    signed = np.where(t, logits, -logits).astype(np.float64)
    exact = np.log(1 + np.exp(-signed)).mean() if classes == 1 else -np.log(p[t]).mean()
    assert isinstance(loss, float)
    assert math.isclose(loss, exact, rel_tol=3e-7, abs_tol=3e-7)
    reference = label_losses.cross_entropy_forward(logits.astype(np.float64), labels)
    assert math.isclose(reference, exact, rel_tol=1e-13, abs_tol=1e-14)
    assert diff_logits.dtype == np.float32
    error = np.abs(diff_logits - share * (p - t)).max()
    assert error <= BOUND * share


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_gradients(classes):
    logits, labels = problem((3, 2, 4), classes, dtype=np.float64)
    logits *= 0.3
    if classes > 1:
        dst = softmax.forward(logits)
        check_gradients(softmax.forward, lambda diff: [softmax.backward(diff, dst)], [logits])
    check_gradients(
        lambda logits: np.stack(label_losses.dice_forward(logits, labels)),
        lambda diff: [label_losses.dice_backward(logits, labels, diff[0], diff[1])],
        [logits],
    )
    check_gradients(
        lambda logits: np.float64(label_losses.cross_entropy_forward(logits, labels)),
        lambda diff: [label_losses.cross_entropy_backward(logits, labels, float(diff))],
        [logits],
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits(dtype):
    """Nothing overflows, and a loss is as large as the logit that caused it."""
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [88.0, 89.0, 300.0]], dtype)
    labels = np.array([1, 2, 2], np.uint8)
    dst = softmax.forward(logits)
    assert_close(dst, np.array([[1, 0, 0], [1 / 3] * 3, [0, 0, 1]]), 1e-7)
    loss = label_losses.cross_entropy_forward(logits, labels)
    assert math.isclose(loss, (2e4 + math.log(3)) / 3, rel_tol=1e-7)
    assert np.isfinite(label_losses.cross_entropy_backward(logits, labels, 1.0)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_of_one_class(dtype):
    logits = np.array([[1e4], [-1e4], [30.0], [-30.0]], dtype)
    for labels, expected in (([0, 1, 0, 1], (2e4 + 60) / 4), ([1, 0, 1, 0], math.exp(-30) / 2)):
        loss = label_losses.cross_entropy_forward(logits, np.array(labels, np.uint8))
        assert math.isclose(loss, expected, rel_tol=1e-6)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_is_seen(classes, dtype):
    logits, labels = problem((3, 4, 5), classes, dtype=dtype)
    logits[0, 1, 2, 3, -1] = np.nan
    diffs = np.ones((2, classes)), np.ones((2, classes))
    assert np.isnan(label_losses.dice_forward(logits, labels)[1][0]).all()
    assert np.isfinite(label_losses.dice_forward(logits, labels)[1][1]).all()
    assert math.isnan(label_losses.cross_entropy_forward(logits, labels))
    for diff_logits in (
        label_losses.dice_backward(logits, labels, *diffs),
        label_losses.cross_entropy_backward(logits, labels, 1.0),
    ):
        wrong = np.isnan(diff_logits)
        assert wrong[0, 1, 2, 3].all()
        assert wrong.sum() == classes


def test_repeats_bit_for_bit_whatever_the_threads():
    logits, labels = problem((20, 40, 41), 4)
    results = []
    for threads in (1, machine.cores(), machine.cores()):
        machine.set_threads(threads)
        loss = label_losses.cross_entropy_forward(logits, labels)
        results.append((*label_losses.dice_forward(logits, labels), np.float64(loss)))
    for values in zip(*results, strict=True):
        assert_exact(values[1], values[0])
        assert_exact(values[2], values[0])


def test_errors():
    logits, labels = problem((2, 3, 4), 4)
    diff = np.zeros((2, 4))
    with pytest.raises(ValueError, match="labels must be below 4, the number of classes, got 5"):
        label_losses.dice_forward(logits, np.where(labels == 1, 5, labels).astype(np.uint8))
    with pytest.raises(ValueError, match="labels must be below 2"):
        label_losses.cross_entropy_forward(logits[..., :1], np.full_like(labels, 2))
    with pytest.raises(TypeError, match="labels must be uint8, got int64"):
        label_losses.cross_entropy_backward(logits, labels.astype(np.int64), 1.0)
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 2, 3, 4\)"):
        label_losses.dice_forward(logits, labels[:, :1])
    with pytest.raises(ValueError, match=r"diff_prediction must have shape \(2, 4\), got \(2, 3\)"):
        label_losses.dice_backward(logits, labels, diff, diff[:, :3])
    with pytest.raises(TypeError, match="diff_intersection must be float64, got float32"):
        label_losses.dice_backward(logits, labels, diff.astype(np.float32), diff)
    with pytest.raises(ValueError, match="logits must have at most 256 classes"):
        label_losses.dice_forward(np.zeros((*labels.shape, 257), np.float32), labels)
    with pytest.raises(ValueError, match="logits must have images, voxels and classes"):
        label_losses.dice_forward(logits[0, 0, 0], labels[0, 0, 0])
    with pytest.raises(ValueError, match="diff_dst must have shape"):
        softmax.backward(logits[:1], logits)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_class_that_is_sure(dtype):
    for logit, expected in ((-np.inf, 0.0), (np.inf, np.inf)):
        logits, labels = np.full((1, 1, 1), logit, dtype), np.zeros((1, 1), np.uint8)
        assert label_losses.cross_entropy_forward(logits, labels) == expected


def cross_entropies(classes):
    """Name, forward and backward; the binary one is of two classes at least."""
    yield "cross_entropy", label_losses.cross_entropy_forward, label_losses.cross_entropy_backward
    if classes > 1:
        yield "binary_cross_entropy", binary_cross_entropy.forward, binary_cross_entropy.backward


def wrong_by(margins, classes):
    """Logits of one voxel for each margin, wrong by it, in float64; and labels."""
    logits = np.zeros((1, len(margins), classes))
    logits[0, :, -1] = margins
    # The last class has the highest logit; of one class it is that of label 1.
    return logits, np.zeros((1, len(margins)), np.uint8)


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_cross_entropies_never_saturate(classes, sign):
    """However wrong a voxel is, its gradient is that of float64, and not 0."""
    margins = np.array([0, 1, 10, 17, 40, 69, 80, 88, 104, 300, 1000.0])
    logits, labels = wrong_by(margins, classes)
    if sign < 0:  # the label has the lowest logit, not another class the highest
        logits, labels = -logits, labels + max(classes - 1, 1)
    for name, forward, backward in cross_entropies(classes):
        exact = forward(logits, labels)
        single = logits.astype(np.float32)
        assert forward(single, labels) == pytest.approx(exact, rel=1e-6)
        diff, exact = backward(single, labels), backward(logits, labels)
        assert diff.dtype == np.float32
        np.testing.assert_allclose(diff, exact, atol=1e-6 / logits.size)
        assert (np.abs(diff).max(axis=-1)[0, 1:] > 0.2 / logits.size).all(), name


@given(volume=VOLUMES, classes=st.integers(2, 5), seed=st.integers(0, 99), scale=st.floats(0.1, 2))
def test_binary_cross_entropy(volume, classes, seed, scale):
    logits, labels = problem(volume, classes, seed, dtype=np.float64)
    logits *= scale / 4
    with unchanged(logits, labels):
        loss = binary_cross_entropy.forward(logits, labels)
    p, t = one_hot(logits, labels)
    assert loss == pytest.approx(-np.log(np.where(t, p, 1 - p)).mean(), rel=1e-7)
    single = logits.astype(np.float32)
    assert binary_cross_entropy.forward(single, labels) == pytest.approx(loss, rel=1e-5)
    exact = binary_cross_entropy.backward(logits, labels, 3.0)
    diff = binary_cross_entropy.backward(single, labels, 3.0)
    assert np.abs(diff - exact).max() <= 3 * classes * 1e-6 / diff.size


@pytest.mark.parametrize("classes", [2, 4])
def test_gradient_of_binary_cross_entropy(classes):
    logits, labels = problem((2, 2, 3), classes, dtype=np.float64)
    check_gradients(
        lambda x: np.array(binary_cross_entropy.forward(x, labels)),
        lambda diff: [binary_cross_entropy.backward(logits, labels, float(diff))],
        [logits],
    )
    with pytest.raises(ValueError, match="logits must have two classes at least, got one"):
        binary_cross_entropy.forward(logits[..., :1], labels * 0)


@given(
    volume=VOLUMES,
    classes=CLASSES,
    ignored=st.sampled_from([None, 0, 1, 255]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
    threads=THREADS,
)
def test_weights_and_ignored_voxels(volume, classes, ignored, weighted, seed, threads):
    """The definition leaves out ignored voxels; the kernels meet NaN in them, which must count nowhere."""
    machine.set_threads(threads)
    logits, labels = problem(volume, classes, seed)
    generator = np.random.default_rng(seed)
    if ignored is not None:
        labels[generator.random(labels.shape) < 0.3] = ignored
    counted = labels != (-1 if ignored is None else ignored)
    logits[~counted] = np.nan
    weights = generator.uniform(0.1, 3, max(classes, 2)) if weighted else None
    diffs = [normal(generator, len(logits), classes, dtype=np.float64) for _ in range(2)]
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        for image, shown in enumerate(counted):
            sums = label_losses.dice_forward(logits, labels, ignored)
            if shown.any():
                kept = logits[image][shown][None], labels[image][shown][None]
                for found, exact in zip(sums, label_losses.dice_forward(*kept), strict=True):
                    assert_close(found[image], exact[0], 1e-14)
            else:
                assert not any(found[image].any() for found in sums)
        for name, forward, backward in cross_entropies(classes):
            loss = forward(logits, labels, weights, ignored)
            diff = backward(logits, labels, 3.0, weights, ignored)
            assert loss == pytest.approx(mean_loss(name, logits[counted], labels[counted], weights), rel=1e-7)
            assert not diff[~counted].any()
            single = forward(logits.astype(np.float32), labels, weights, ignored)
            assert single == pytest.approx(loss, rel=1e-5, abs=1e-6)
            error = np.abs(backward(logits.astype(np.float32), labels, 3.0, weights, ignored) - diff)
            assert error.max() <= 3 * classes * 1e-5 / max(counted.sum(), 1)
        exact = label_losses.dice_backward(logits, labels, *diffs, ignored)
        diff = label_losses.dice_backward(logits.astype(np.float32), labels, *diffs, ignored)
    assert not exact[~counted].any()
    assert not diff[~counted].any()
    assert np.abs(diff - exact).max() <= BOUND * max(np.abs(diff).max() for diff in diffs)


def mean_loss(name, logits, labels, weights):
    """Definition, of the voxels that count, in float64; 0 if there are none."""
    if not labels.size:
        return 0.0
    p, t = one_hot(logits, labels)
    classes = logits.shape[-1]
    weights = np.ones(max(classes, 2)) if weights is None else weights
    if name == "binary_cross_entropy":
        losses = -np.log(np.where(t, p, 1 - p))
        return np.average(losses, weights=np.broadcast_to(weights, losses.shape))
    losses = np.log1p(np.exp(np.where(t, -logits, logits)))[..., 0] if classes == 1 else -np.log(p[t])
    return np.average(losses, weights=weights[labels])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_gradients_with_weights_and_an_ignored_label(classes, dtype):
    logits, labels = problem((3, 2, 4), classes, dtype=np.float64)
    logits *= 0.3
    labels[0, 0], weights = 9, np.linspace(0.5, 2, max(classes, 2))
    for _, forward, backward in cross_entropies(classes):
        check_gradients(
            lambda x, forward=forward: np.float64(forward(x, labels, weights, 9)),
            lambda diff, backward=backward: [backward(logits, labels, float(diff), weights, 9)],
            [logits],
        )
        everything = np.full_like(labels, 9)
        assert forward(logits.astype(dtype), everything, weights, 9) == 0
        assert not backward(logits.astype(dtype), everything, 1.0, weights, 9).any()
        with pytest.raises(ValueError, match=f"labels must be below {max(classes, 2)}, .*, got 9"):
            forward(logits.astype(dtype), labels, weights, 8)
        with pytest.raises(ValueError, match=r"class_weights must have shape"):
            forward(logits.astype(dtype), labels, weights[:-1], 9)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_infinite_logits_as_in_float64(classes):
    """-inf is a probability of 0, +inf a NaN (of one class 1): where others overflow, so do we."""
    extremes = np.array([-np.inf, -1e4, 0, 1e4, np.inf])
    grid = np.stack(np.meshgrid(*[extremes] * min(classes, 2)), axis=-1).reshape(1, -1, min(classes, 2))
    logits = np.zeros((*grid.shape[:2], classes))
    logits[..., : grid.shape[-1]] = grid
    for label in range(max(classes, 2)):
        labels = np.full(logits.shape[:-1], label, np.uint8)
        with np.errstate(all="ignore"):
            for name, *found in infinite(logits, labels):
                single, exact = found
                np.testing.assert_allclose(single, exact, rtol=1e-6, atol=1e-37, err_msg=name)


def infinite(logits, labels):
    """Name, and float32's and float64's result, of each voxel by itself."""
    single = logits.astype(np.float32)
    yield "softmax", softmax.forward(single), softmax.forward(logits)
    for name, forward, backward in cross_entropies(logits.shape[-1]):
        for at in range(logits.shape[1]):
            here, label = slice(at, at + 1), labels[:, at : at + 1]
            yield name, forward(single[:, here], label), forward(logits[:, here], label)
            yield name, backward(single[:, here], label), backward(logits[:, here], label)
