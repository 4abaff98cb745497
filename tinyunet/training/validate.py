"""Whole volumes scored, the cases shared among the ranks, and an epoch's scores as a row of a table."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.terminal import printable
from tinyunet.data.cases import Case, Dataset
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation.scores import Scores, confusion, score_counts
from tinyunet.segmentation.sliding_window import Predict, segment
from tinyunet.training.loop import EpochResult
from tinyunet.training.samples import Volumes
from tinyunet.unet import UNet

OVERLAP = 0.25  # a quarter is enough for a score: half costs twice to three times the time


class CaseResult(NamedTuple):
    """Name and scores of a case, and its segmentation, shape=(D, H, W) uint8, if it was kept."""

    name: str
    scores: Scores
    counts: NDArray[np.int64]  # of voxels by label and prediction
    prediction: NDArray[np.uint8] | None


def score_cases(
    model: UNet,
    cases: Sequence[Case],
    volumes: Volumes,
    dataset: Dataset,
    communicator: Communicator,
    keep: int = 0,
    predict: Predict | None = None,
    asked_to_end: Callable[[], bool] = lambda: False,
) -> list[CaseResult]:
    """Segment cases, each on one rank, and return all scores, in the order of the cases, on every rank.

    The model is the same on every rank; ``predict`` runs it, as in
    :func:`tinyunet.segmentation.sliding_window.segment`. ``volumes`` are where this rank gets its cases from,
    ``dataset`` names classes and regions. Scores count on the image's own voxels, whatever the network sees.
    The first ``keep`` cases come with their segmentation. When ``asked_to_end`` returns True, the other cases
    are left out. UserError on one rank alone, if its case cannot be used: that ends the others, which may
    have many cases left.
    """
    mine = []
    for index in range(communicator.rank, len(cases), communicator.size):
        if asked_to_end():
            break
        image, _ = volumes[cases[index]]
        truth = volumes.truth(cases[index])
        prediction = segment(model, image, OVERLAP, predict=predict, shape=truth.shape)
        counts = confusion(prediction, truth, len(dataset.labels))
        scores = score_counts(counts, dataset.labels, dataset.regions)
        mine.append(CaseResult(cases[index].name, scores, counts, prediction if index < keep else None))
    return communicator.broadcast_object(communicator.gather_in_turns(mine))


def dice_table(scores: Scores) -> list[list[str]]:
    """Return a table of Dice for the page, a row for each class and region."""
    rows = [(name, dice) for group in scores.values() for name, dice in group.items()]
    return [["", "Dice"], *([name, f"{dice:.3f}"] for name, dice in rows)]


def epoch_heads(scores: Scores) -> str:
    """Return the heads of the columns that :func:`epoch_row` fills."""
    names = map(printable, scores["regions"] or scores["classes"])
    return "epoch   loss   Dice   validation:" + "".join(f"  {name:>{_width(name)}}" for name in names)


def epoch_row(epoch: int, result: EpochResult, scores: Scores, best: bool) -> str:
    """Return loss, Dice and validation of an epoch in one line."""
    dice = scores["regions"] or scores["classes"]
    columns = "".join(f"  {value:>{_width(name)}.3f}" for name, value in dice.items())
    start = f"{epoch:>5}  {result.loss:5.3f}  {result.dice:5.3f}              "
    return start + columns + ("  best" if best else "")


def _width(name: str) -> int:
    return max(len(printable(name)), 5)
