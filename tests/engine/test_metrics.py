"""Dice by class and region, the empty cases, and labels that are not classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinyunet.segmentation import scores

VOLUMES = arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3))


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    if not a.any() and not b.any():
        return 1.0
    return 2 * np.sum(a & b) / (a.sum() + b.sum())


@given(VOLUMES, VOLUMES)
def test_against_the_definition(found, truth):
    before = found.copy(), truth.copy()
    expected = [by_definition(found == label, truth == label) for label in range(4)]
    np.testing.assert_array_equal(scores.dice_per_class(found, truth, 4), expected)
    assert scores.region_dice(found, truth) == {
        "whole tumour": by_definition(found > 0, truth > 0),
        "tumour core": by_definition(found > 1, truth > 1),
        "enhancing": by_definition(found == 3, truth == 3),
    }
    np.testing.assert_array_equal(found, before[0])
    np.testing.assert_array_equal(truth, before[1])


@given(VOLUMES, VOLUMES)
def test_symmetric_and_one_for_equals(found, truth):
    np.testing.assert_array_equal(
        scores.dice_per_class(found, truth, 4), scores.dice_per_class(truth, found, 4)
    )
    np.testing.assert_array_equal(scores.dice_per_class(truth, truth, 4), np.ones(4))


def test_empty_prediction_and_empty_truth():
    nothing, tumour = np.zeros((2, 2, 2), np.uint8), np.full((2, 2, 2), 2, np.uint8)
    np.testing.assert_array_equal(scores.dice_per_class(nothing, nothing, 4), [1, 1, 1, 1])
    np.testing.assert_array_equal(scores.dice_per_class(nothing, tumour, 4), [0, 1, 0, 1])
    np.testing.assert_array_equal(scores.dice_per_class(tumour, nothing, 4), [0, 1, 0, 1])
    assert set(scores.region_dice(nothing, nothing).values()) == {1.0}
    assert scores.region_dice(nothing, tumour) == {"whole tumour": 0.0, "tumour core": 0.0, "enhancing": 1.0}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint64])
def test_any_type_of_integer(dtype):
    labels = np.array([0, 1, 2, 3], dtype)
    np.testing.assert_array_equal(scores.dice_per_class(labels, labels[::-1], 4), [0, 0, 0, 0])


@pytest.mark.parametrize(
    "measure", [lambda *a: scores.dice_per_class(*a, 4), scores.region_dice], ids=["class", "region"]
)
def test_errors(measure):
    labels = np.zeros((2, 3), np.int64)
    for found, truth, message in (
        (labels + 4, labels, "prediction_labels must be from 0 to 3, not from 4 to 4"),
        (labels, labels - 1, "^labels must be from 0 to 3, not from -1 to -1"),
        (labels, labels[0], r"must have one shape, not \(2, 3\) and \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(found, truth)
    with pytest.raises(TypeError, match="prediction_labels must be integers, not float64"):
        measure(labels * 1.0, labels)
