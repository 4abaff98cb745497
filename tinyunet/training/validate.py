"""Scoring whole volumes, the cases shared among the ranks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.data.cases import Case
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation.scores import Scores, score
from tinyunet.segmentation.sliding_window import Predict, segment
from tinyunet.training.samples import Volumes
from tinyunet.unet import UNet

# A quarter is enough for a score: half costs twice to three times the time.
OVERLAP = 0.25


class CaseResult(NamedTuple):
    """Name and scores of a case, and its segmentation, shape=(D, H, W) uint8, if it was kept."""

    name: str
    scores: Scores
    prediction: NDArray[np.uint8] | None


def score_cases(
    model: UNet,
    cases: Sequence[Case],
    volumes: Volumes,
    names: Sequence[str],
    communicator: Communicator,
    keep: int = 0,
    predict: Predict | None = None,
    asked_to_end: Callable[[], bool] = lambda: False,
) -> list[CaseResult]:
    """Segment cases, each on one rank, and return all scores on every rank.

    Parameters
    ----------
    model : UNet
        The same on every rank.
    cases : sequence of Case
    volumes : Volumes
        Where this rank gets them from.
    names : sequence of str
        Name of each class.
    communicator : Communicator
    keep : int
        So many cases, from the first on, come with their segmentation.
    predict : callable, optional
        How to run the model: see :func:`tinyunet.segmentation.sliding_window.segment`.
    asked_to_end : callable
        Whether to leave the other cases out.

    Returns
    -------
    results : list of CaseResult
        In the order of the cases.

    Raises
    ------
    UserError
        If a case cannot be used. On its rank alone, which ends the others: they may have many cases left.
    """
    mine = []
    for index in range(communicator.rank, len(cases), communicator.size):
        if asked_to_end():
            break
        image, labels = volumes[cases[index]]
        prediction = segment(model, image, OVERLAP, predict=predict)
        scores = score(prediction, labels, names)
        kept = prediction if index < keep else None
        mine.append((index, CaseResult(cases[index].name, scores, kept)))
    everyones = [result for results in communicator.gather(mine) for result in results]
    in_order = [result for _, result in sorted(everyones, key=lambda indexed: indexed[0])]
    return communicator.broadcast_object(in_order)
