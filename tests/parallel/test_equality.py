"""N ranks with batch b are one rank with batch N b, if batch norm is synchronised, or there is none."""

import json
from pathlib import Path

import equality
import pytest
from launcher import launch, needs_mpi


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_synchronised_ranks_train_as_one_would(ranks):
    done = launch([Path(equality.__file__)], ranks, seconds=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for way in ("eager sgd True", "compiled sgd True", "compiled instance sgd False"):
        loss, weights = found[way]
        # Losses are about 1.5, rounded to 1e-7; other orders of sums grow apart over twenty steps.
        assert loss < 1e-5
        # A voxel within rounding of zero may take the other side of a ReLU: then weights jump apart, as
        # they do in one rank whose images are rounded otherwise. That is the measure.
        assert weights < 4 * found["rounding"]
    # Adam divides by the size of a gradient: where it is all rounding, so is the step (of 1e-3).
    loss, weights = found["compiled adam True"]
    assert loss < 1e-4
    assert weights < 0.02
    # And without synchronisation it is another training, far away.
    loss, weights = found["compiled sgd False"]
    assert loss > 1e-4
    assert weights > 4 * found["rounding"]
