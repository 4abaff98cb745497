"""Losses: known values, fused against composed, gradients, misuse."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet import Tensor, functional, losses
from tinyunet.testing import check_gradients

SEEDS = st.integers(0, 2**31)
SHAPES = st.tuples(st.integers(1, 3), *[st.integers(1, 6)] * 3)
CLASSES = st.integers(1, 5)


def ruled(loss, weighted=False, **options):
    """A loss with an ignored label, or a weight for each label, however many classes there are."""

    def ruled_loss(prediction, labels, **more):
        weights = np.linspace(0.5, 2, max(prediction.shape[-1], 2)) if weighted else None
        return loss(prediction, labels, class_weights=weights, **options, **more)

    return ruled_loss


LOSSES = {
    "soft_dice": losses.soft_dice,
    "soft_dice, no background": lambda *a, **k: losses.soft_dice(*a, **k, include_background=False),
    "soft_dice, smoothing": lambda *a, **k: losses.soft_dice(*a, **k, smoothing=0.125),
    "log_dice": losses.log_dice,
    "log_dice, no background": lambda *a, **k: losses.log_dice(*a, **k, include_background=False),
    "log_dice, smoothing": lambda *a, **k: losses.log_dice(*a, **k, smoothing=2.0),
    "cross_entropy": losses.cross_entropy,
    "dice_cross_entropy": losses.dice_cross_entropy,
    "dice_binary_cross_entropy": losses.dice_binary_cross_entropy,
    "soft_dice, weights": ruled(losses.soft_dice, True, include_background=False),
    "soft_dice, 0 ignored": ruled(losses.soft_dice, ignore_label=0),
    "log_dice, 1 ignored, weights": ruled(losses.log_dice, True, ignore_label=1),
    "cross_entropy, weights": ruled(losses.cross_entropy, True),
    "dice_cross_entropy, 1 ignored": ruled(losses.dice_cross_entropy, ignore_label=1),
    "dice_cross_entropy, 0 ignored, weights": ruled(losses.dice_cross_entropy, True, ignore_label=0),
    "dice_binary_cross_entropy, 0 ignored, weights": ruled(
        losses.dice_binary_cross_entropy, True, ignore_label=0
    ),
}
# Ignored label, whether there are weights, and what torch 2.13 returns.
PYTORCH = [
    (None, False, 1.5854206947640128),
    (None, True, 1.5397474143555134),
    (0, False, 1.4594982934834329),
    (0, True, 1.5221040608450866),
    (2, False, 1.5858472146983764),
    (2, True, 1.4241297787380722),
]
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def draw(shape: tuple[int, ...], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.standard_normal((*shape, classes))
    return logits, generator.integers(0, max(classes, 2), shape).astype(np.uint8)


def probabilities(logits: Tensor) -> Tensor:
    return functional.sigmoid(logits) if logits.shape[-1] == 1 else functional.softmax(logits)


def value_and_gradient(loss, logits: np.ndarray, labels: np.ndarray, from_logits: bool):
    tensor = Tensor(logits, requires_grad=True)
    result = loss(tensor if from_logits else probabilities(tensor), labels, from_logits=from_logits)
    assert result.shape == ()
    result.backward()
    return result.item(), tensor.grad


@every_loss
@given(shape=SHAPES, classes=CLASSES, seed=SEEDS)
def test_fused_equals_composed_in_float64(loss, shape, classes, seed):
    """Two ways to one number: they differ by rounding."""
    logits, labels = draw(shape, classes, seed)
    fused, composed = (value_and_gradient(loss, logits, labels, way) for way in (True, False))
    assert abs(fused[0] - composed[0]) <= 1e-12 * max(1, abs(composed[0]))
    scale = np.max(np.abs(composed[1])) + 1 / labels.size
    assert np.max(np.abs(fused[1] - composed[1])) <= 1e-12 * scale


@every_loss
@given(shape=SHAPES, classes=CLASSES, seed=SEEDS)
def test_fused_float32_equals_composed_float64(loss, shape, classes, seed):
    """The fast kernels: each voxel is float32 (1e-6), sums are float64.

    Where all voxels are right, gradients are small differences: rounding is held against 1 / n.
    """
    logits, labels = draw(shape, classes, seed)
    single = value_and_gradient(loss, logits.astype(np.float32), labels, True)
    double = value_and_gradient(loss, logits.astype(np.float32).astype(np.float64), labels, False)
    assert single[1].dtype == np.float32
    assert abs(single[0] - double[0]) <= 5e-6 * max(1, abs(double[0]))
    scale = np.max(np.abs(double[1])) + 1 / labels.size
    assert np.max(np.abs(single[1] - double[1])) <= 5e-6 * scale


@every_loss
@given(shape=SHAPES, classes=CLASSES, seed=SEEDS, from_logits=st.booleans())
def test_gradients(loss, shape, classes, seed, from_logits):
    logits, labels = draw(shape, classes, seed)
    check_gradients(
        lambda tensor: loss(
            tensor if from_logits else probabilities(tensor), labels, from_logits=from_logits
        ),
        logits,
        seed=seed,
    )


@every_loss
@pytest.mark.parametrize("from_logits", [False, True])
def test_arguments_are_not_changed_and_images_work_too(loss, from_logits):
    logits, labels = draw((2, 5, 7), 3, 0)
    before = logits.copy(), labels.copy()
    value_and_gradient(loss, logits, labels, from_logits)
    np.testing.assert_array_equal(logits, before[0])
    np.testing.assert_array_equal(labels, before[1])
    flat = value_and_gradient(loss, logits, labels, from_logits)
    deep = value_and_gradient(loss, logits[:, None], labels[:, None], from_logits)
    np.testing.assert_allclose(flat[0], deep[0], rtol=1e-12)


@every_loss
def test_images_of_one_voxel_may_do_without_its_axis(loss):
    logits, labels = draw((4, 1), 3, 0)
    for from_logits in (True, False):
        flat = value_and_gradient(loss, logits[:, 0], labels[:, 0], from_logits)
        voxel = value_and_gradient(loss, logits, labels, from_logits)
        np.testing.assert_allclose(flat[0], voxel[0], rtol=1e-12)
        np.testing.assert_allclose(flat[1], voxel[1][:, 0], rtol=1e-12)


class TestKnownValues:
    """Written out by hand: one image of four voxels, two classes."""

    labels = np.array([[0, 0, 0, 1]])
    prediction = Tensor(np.array([[[1, 0], [1, 0], [0.5, 0.5], [0.25, 0.75]]], np.float64))
    # Class 0: I = 2.5, P = 2.75, T = 3. Class 1: I = 0.75, P = 1.25, T = 1.

    def test_soft_dice(self):
        zero, one = (2 * 2.5 + 1) / (2.75 + 3 + 1), (2 * 0.75 + 1) / (1.25 + 1 + 1)
        assert losses.soft_dice(self.prediction, self.labels).item() == pytest.approx(1 - (zero + one) / 2)
        foreground = losses.soft_dice(self.prediction, self.labels, include_background=False)
        assert foreground.item() == pytest.approx(1 - one)
        plain = losses.soft_dice(self.prediction, self.labels, smoothing=0)
        assert plain.item() == pytest.approx(1 - (5 / 5.75 + 1.5 / 2.25) / 2)

    def test_log_dice_is_that_of_the_reference_code(self):
        intersection, total = np.array([2.5, 0.75]), np.array([5.75, 2.25])
        expected = -np.log(2 * np.mean(intersection + 1e-4)) + np.log(np.mean(total + 1e-4))
        assert losses.log_dice(self.prediction, self.labels).item() == pytest.approx(expected)

    def test_cross_entropy(self):
        expected = -np.mean(np.log([1, 1, 0.5, 0.75]))
        assert losses.cross_entropy(self.prediction, self.labels).item() == pytest.approx(expected)

    def test_dice_and_cross_entropies_are_sums(self):
        dice = losses.soft_dice(self.prediction, self.labels).item()
        categorical = -np.mean(np.log([1, 1, 0.5, 0.75]))
        assert losses.dice_cross_entropy(self.prediction, self.labels).item() == pytest.approx(
            dice + categorical
        )
        # With two classes, both binary questions have the same answer as the one with two answers.
        assert losses.dice_binary_cross_entropy(self.prediction, self.labels).item() == pytest.approx(
            dice + categorical
        )

    def test_one_class_is_the_probability_of_label_1(self):
        prediction = Tensor(np.array([[[0.0], [0], [0.5], [0.75]]]))
        dice = (2 * 0.75 + 1) / (1.25 + 1 + 1)
        for background in (True, False):
            loss = losses.soft_dice(prediction, self.labels, include_background=background)
            assert loss.item() == pytest.approx(1 - dice)
        expected = -np.mean(np.log([1, 1, 0.5, 0.75]))
        assert losses.cross_entropy(prediction, self.labels).item() == pytest.approx(expected)

    def test_images_are_means_in_soft_dice_and_sums_in_log_dice(self):
        logits, labels = draw((2, 3, 4, 5), 3, 0)
        prediction = probabilities(Tensor(logits)).data
        one_hot = np.eye(3)[labels]
        intersection = (prediction * one_hot).sum(axis=(1, 2, 3))
        total = (prediction + one_hot).sum(axis=(1, 2, 3))
        soft = 1 - np.mean((2 * intersection + 1) / (total + 1))
        assert losses.soft_dice(Tensor(prediction), labels).item() == pytest.approx(soft)
        log = np.log(np.mean(total + 1e-4)) - np.log(2 * np.mean(intersection + 1e-4))
        assert losses.log_dice(Tensor(prediction), labels).item() == pytest.approx(log)

    def test_a_right_prediction_costs_nothing(self):
        labels = np.random.default_rng(0).integers(0, 3, (2, 4, 4, 4))
        logits = Tensor(200.0 * np.eye(3)[labels])
        for loss in (losses.soft_dice, losses.cross_entropy, losses.dice_binary_cross_entropy):
            for way, prediction in ((True, logits), (False, probabilities(logits))):
                assert loss(prediction, labels, from_logits=way).item() == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_a_wrong_prediction_costs_what_is_finite(self, dtype):
        labels = np.zeros((1, 2, 2, 2), np.uint8)
        logits = Tensor(np.array([-500, 500], dtype) * np.ones((1, 2, 2, 2, 1), dtype), True)
        assert losses.cross_entropy(logits, labels, from_logits=True).item() == 1000
        loss = losses.dice_binary_cross_entropy(probabilities(logits), labels)
        loss.backward()
        assert np.isfinite(loss.item())
        assert np.isfinite(logits.grad).all()

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("classes", [2, 4])
    @pytest.mark.parametrize("loss", [losses.cross_entropy, losses.dice_binary_cross_entropy])
    def test_from_probabilities_the_gradient_is_seen_as_far_as_is_said(self, loss, classes, dtype):
        for margin in (1, 40, 70, *((680,) if dtype == np.float64 else ())):
            logits = np.zeros((1, 2, 2, 2, classes), dtype)
            logits[..., 1] = margin
            labels = np.zeros((1, 2, 2, 2), np.uint8)
            wanted = value_and_gradient(loss, logits, labels, True)[1]
            found = value_and_gradient(loss, logits, labels, False)[1]
            np.testing.assert_allclose(found, wanted, atol=1e-2 * np.abs(wanted).max())

    def test_a_class_that_is_not_there_and_not_predicted(self):
        labels = np.zeros((1, 4, 4, 4), np.uint8)
        prediction = Tensor(np.array([1.0, 0.0]) * np.ones((1, 4, 4, 4, 1)))
        assert losses.soft_dice(prediction, labels).item() == 0


class TestWeightsAndIgnoredLabels:
    """As PyTorch has them, or by leaving voxels out."""

    def test_cross_entropy_as_in_pytorch(self):
        """``torch.nn.functional.cross_entropy(x, labels, weight=weights, ignore_index=...)``, float64."""
        logits = np.sin(np.arange(24.0)).reshape(2, 4, 3)
        labels, weights = np.array([[0, 1, 2, 2], [1, 1, 0, 2]]), [0.25, 1.0, 3.0]
        for ignored, weighted, expected in PYTORCH:
            found = losses.cross_entropy(Tensor(logits), labels, True, weights if weighted else None, ignored)
            assert found.item() == pytest.approx(expected, rel=1e-12)

    @every_loss
    def test_an_ignored_voxel_might_as_well_not_be_there(self, loss):
        """But for loss and labels that the loss itself has rules for."""
        if loss.__name__ == "ruled_loss":
            pytest.skip("has a rule of its own")
        logits, labels = draw((2, 3, 4), 3, 0)
        more = np.concatenate([logits, 1e3 * logits[:, :1]], axis=1)
        marked = np.concatenate([labels, np.full_like(labels[:, :1], 77)], axis=1)
        for way in (True, False):
            few = value_and_gradient(loss, logits, labels, way)
            all_of_them = value_and_gradient(ruled(loss, ignore_label=77), more, marked, way)
            assert all_of_them[0] == pytest.approx(few[0], rel=1e-12)
            np.testing.assert_allclose(all_of_them[1][:, :3], few[1], atol=1e-15)
            assert not all_of_them[1][:, 3:].any()

    @every_loss
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_an_image_in_which_all_is_ignored(self, loss, from_logits):
        """Its Dice is one. Where a whole batch is ignored, nothing is to be learned."""
        if loss.__name__ == "ruled_loss":
            pytest.skip("has a rule of its own")
        logits, _ = draw((2, 3, 4), 3, 0)
        labels = np.full(logits.shape[:-1], 255)
        found = value_and_gradient(ruled(loss, ignore_label=255), logits, labels, from_logits)
        log_dice = loss in (LOSSES[name] for name in LOSSES if name.startswith("log_dice"))
        assert found[0] == pytest.approx(-np.log(2) if log_dice else 0, abs=1e-12)
        assert not found[1].any()

    def test_weights_of_dice_are_those_of_a_mean_over_classes(self):
        logits, labels = draw((2, 5, 6), 3, 0)
        alone = []
        for c in range(3):
            weights = np.eye(3)[c]
            alone.append(
                losses.soft_dice(Tensor(logits), labels, from_logits=True, class_weights=weights).item()
            )
        found = losses.soft_dice(Tensor(logits), labels, from_logits=True, class_weights=[1, 2, 5]).item()
        assert found == pytest.approx((alone[0] + 2 * alone[1] + 5 * alone[2]) / 8, rel=1e-12)

    @pytest.mark.parametrize("wrong", [[1, 2], [1, 2, -1], [0, 0, 0], [1, np.nan, 1], 2.0])
    def test_weights_that_do_not_fit(self, wrong):
        with pytest.raises(ValueError, match="class_weights must be 3 numbers, one a label, none below 0"):
            losses.cross_entropy(Tensor(np.ones((1, 2, 3))), np.zeros((1, 2), int), class_weights=wrong)

    def test_weights_of_the_background_alone(self):
        with pytest.raises(ValueError, match="class_weights must have one above 0 behind the background's"):
            losses.soft_dice(
                Tensor(np.ones((1, 2, 3))), np.zeros((1, 2), int), False, class_weights=[1, 0, 0]
            )

    @pytest.mark.parametrize("wrong", [-1, 256])
    def test_an_ignored_label_that_is_no_byte(self, wrong):
        with pytest.raises(ValueError, match=f"ignore_label must be from 0 to 255, .* not {wrong}"):
            losses.cross_entropy(Tensor(np.ones((1, 2, 3))), np.zeros((1, 2), int), ignore_label=wrong)


class TestErrors:
    """Labels that do not fit."""

    @pytest.mark.parametrize("from_logits", [False, True])
    @every_loss
    def test_labels(self, loss, from_logits):
        prediction = Tensor(np.full((1, 2, 2, 2, 3), 1 / 3, np.float32))
        labels = np.zeros((1, 2, 2, 2), np.int64)
        for wrong, message in (
            (labels[0], r"labels must have the shape \(1, 2, 2, 2\) of .*, not \(2, 2, 2\)"),
            (labels + 3, "labels must be from 0 to 2, not from 3 to 3"),
            (labels - 1, "labels must be from 0 to 2, not from -1 to -1"),
            (labels + 256, "labels must be from 0 to 2, not from 256 to 256"),
        ):
            with pytest.raises(ValueError, match=message):
                loss(prediction, wrong, from_logits=from_logits)
        with pytest.raises(TypeError, match="labels must be integers, not float64"):
            loss(prediction, labels * 1.0, from_logits=from_logits)

    @every_loss
    def test_more_classes_than_a_byte_and_no_voxel(self, loss):
        many, none = np.ones((1, 2, 2, 2, 300), np.float32), np.ones((0, 2, 2, 2, 3), np.float32)
        with pytest.raises(ValueError, match="prediction has 300 classes; labels are bytes"):
            loss(Tensor(many), np.zeros((1, 2, 2, 2), np.int64))
        with pytest.raises(ValueError, match="labels are empty"):
            loss(Tensor(none), np.zeros((0, 2, 2, 2), np.int64))

    def test_one_class_has_two_labels(self):
        prediction = Tensor(np.full((1, 2, 2, 2, 1), 0.5))
        losses.soft_dice(prediction, np.ones((1, 2, 2, 2), bool))
        with pytest.raises(ValueError, match="from 0 to 1, not from 2 to 2"):
            losses.soft_dice(prediction, np.full((1, 2, 2, 2), 2))


@pytest.mark.parametrize("smoothing", [-1.0, np.nan, np.inf, "1"])
@pytest.mark.parametrize("loss", [losses.soft_dice, losses.log_dice, losses.dice_cross_entropy])
def test_a_smoothing_that_gives_nan_is_refused(loss, smoothing):
    with pytest.raises(ValueError, match=f"smoothing must be 0 or more and finite, not {smoothing}"):
        loss(Tensor(np.ones((1, 2, 2, 2, 3))), np.zeros((1, 2, 2, 2), int), smoothing=smoothing)


def test_every_public_loss_is_tested():
    public = {
        name
        for name, value in vars(losses).items()
        if inspect.isfunction(value) and value.__module__ == losses.__name__
        if "prediction" in inspect.signature(value).parameters
    }
    assert {name for name in public if not name.startswith("_")} <= set(LOSSES)
