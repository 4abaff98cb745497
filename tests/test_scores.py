"""Scores of cases: names, means, and the table."""

import numpy as np
import pytest

from tinyunet.segmentation.scores import confusion, mean, overall, score, score_counts, summary, table

BRAIN = ("background", "edema", "non-enhancing tumor", "enhancing tumour")


def test_classes_and_regions_have_their_own_dice():
    truth = np.array([0, 1, 1, 2, 3, 3], np.uint8).reshape(1, 2, 3)
    prediction = np.array([0, 1, 2, 2, 2, 3], np.uint8).reshape(1, 2, 3)
    scores = score(prediction, truth, BRAIN)
    assert scores["classes"] == pytest.approx(
        {"edema": 2 / 3, "non-enhancing tumor": 1 / 2, "enhancing tumour": 2 / 3}
    )
    assert scores["regions"] == pytest.approx({"whole tumour": 1.0, "tumour core": 6 / 7, "enhancing": 2 / 3})
    assert overall(scores) == pytest.approx((1 + 6 / 7 + 2 / 3) / 3)


def test_regions_follow_the_names():
    """BraTS from 2023 on: 1 is necrosis, 2 edema."""
    truth = np.array([0, 1, 1, 2, 3, 3], np.uint8).reshape(1, 2, 3)
    without_necrosis = np.where(truth == 1, 0, truth).astype(np.uint8)
    scores = score(without_necrosis, truth, ("background", "Necrotic core", "Oedema", "enhancing"))
    assert scores["regions"] == pytest.approx(
        {"whole tumour": 2 * 3 / 8, "tumour core": 2 * 2 / 6, "enhancing": 1.0}
    )


def test_other_labels_have_no_regions():
    labels = np.array([0, 1, 2], np.uint8).reshape(1, 1, 3)
    scores = score(labels, labels, ("background", "liver", "vessel"))
    assert scores == {"classes": {"liver": 1.0, "vessel": 1.0}, "regions": {}}
    assert overall(scores) == 1


@pytest.mark.parametrize(
    "names",
    [
        ("label_1", "label_2", "label_3"),
        ("edema", "non-enhancing core", "enhancing core"),
        ("necrosis", "edema", "something"),
    ],
)
def test_names_that_tell_nothing_have_no_regions(names):
    truth = np.array([0, 1, 2, 3], np.uint8).reshape(1, 1, 4)
    scores = score(np.array([0, 1, 3, 0], np.uint8).reshape(1, 1, 4), truth, ("background", *names))
    assert scores["regions"] == {}
    assert overall(scores) == pytest.approx(1 / 3)


def test_regions_of_five_classes():
    """Of the paediatric BraTS, and of BraTS 2024, whose cavity is no tumour."""
    truth = np.array([0, 1, 2, 3, 4], np.uint8).reshape(1, 1, 5)
    wrong = np.array([0, 1, 2, 3, 0], np.uint8).reshape(1, 1, 5)
    children = ("background", "edema", "non-enhancing", "enhancing", "cystic component")
    assert score(wrong, truth, children)["regions"] == pytest.approx(
        {"whole tumour": 6 / 7, "tumour core": 4 / 5, "enhancing": 1}
    )
    treated = (*children[:4], "resection cavity")
    assert set(score(wrong, truth, treated)["regions"].values()) == {1}


def case(dice):
    return {"classes": {"edema": dice}, "regions": {"whole tumour": dice / 2}}


def test_means_are_over_cases():
    assert mean([case(0.2), case(0.4)]) == {
        "classes": {"edema": pytest.approx(0.3)},
        "regions": {"whole tumour": pytest.approx(0.15)},
    }
    content = summary([("a", case(0.2)), ("b", case(0.4))])
    assert content["classes"]["edema"] == pytest.approx(0.3)
    assert list(content["cases"]) == ["a", "b"]


def test_the_table_has_a_row_a_case_and_the_mean():
    assert table([("a", case(0.25)), ("longer", case(0.75))]).splitlines() == [
        "         classes   ─ regions ──",
        "case        edema  whole tumour",
        "───────────────────────────────",
        "a           0.250         0.125",
        "longer      0.750         0.375",
        "───────────────────────────────",
        "mean        0.500         0.250",
    ]
    assert "mean" not in table([("a", case(0.25))])


def test_counts_of_several_cases_score_as_one():
    generator = np.random.default_rng(3)
    truth, found = generator.integers(0, 4, (2, 3, 5, 6, 7)).astype(np.uint8)
    cases = [*zip(found, truth, strict=True)]
    assert score_counts(np.sum([confusion(*pair, 4) for pair in cases], axis=0), BRAIN) == score(
        found, truth, BRAIN
    )


def test_a_lone_voxel_where_a_region_is_empty_weighs_little():
    truth = np.zeros((2, 8, 8, 8), np.uint8)
    truth[0, :4] = 3
    found = truth.copy()
    found[1, 0, 0, 0] = 3
    cases = [*zip(found, truth, strict=True)]
    as_one = score_counts(np.sum([confusion(*pair, 4) for pair in cases], axis=0), BRAIN)
    assert as_one["regions"]["enhancing"] == pytest.approx(2 * 256 / (256 + 257))
    assert mean([score(*pair, BRAIN) for pair in cases])["regions"]["enhancing"] == 0.5
