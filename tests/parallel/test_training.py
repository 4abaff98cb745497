"""Two and four ranks train as one process would that plays all of them in turn."""

from pathlib import Path

import numpy as np
import pytest
import training
from launcher import launch, needs_mpi

from kernels.base import machine
from tinyunet.data import phantom
from tinyunet.data.decathlon import read_dataset
from tinyunet.parallel.communicator import Communicator

pytestmark = needs_mpi


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "phantoms"
    return phantom.make_dataset(path, cases=3, shape=(20, 18, 16))


@pytest.fixture(autouse=True)
def one_thread_and_algorithm(monkeypatch):
    """As the ranks have: sums over threads would be rounded differently."""
    training.take_direct_convolutions(monkeypatch.setattr)
    before = machine.threads()
    machine.set_threads(1)
    yield
    machine.set_threads(before)


def results(scenario, dataset, output, ranks):
    done = launch([training.__file__, scenario, dataset, output], ranks, seconds=100)
    assert done.returncode == 0, done.stderr
    found = []
    for rank in range(ranks):
        with np.load(output / f"{rank}.npz") as archive:
            found.append({name: archive[name] for name in archive.files})
    return found


def cases_of(dataset):
    return list(read_dataset(dataset).cases)


@pytest.mark.parametrize("ranks", [2, 4])
def test_after_two_epochs_all_ranks_hold_the_same(dataset, tmp_path, ranks):
    first, *others = results("epochs", dataset, tmp_path, ranks)
    start = training.make_model().state_dict()
    for name, array in start.items():
        assert np.isfinite(first[name]).all()
        # Batch norm takes the bias before it away again: it has no gradient.
        is_cancelled = name.endswith(("conv0.bias", "conv1.bias"))
        assert np.array_equal(first[name], array) == is_cancelled, name
    for other in others:
        for name, array in first.items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def test_two_ranks_are_bit_for_bit_two_models_in_turn(dataset, tmp_path):
    found = results("epochs", dataset, tmp_path, 2)[0]
    expected = training.epochs_in_turn(2, cases_of(dataset))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_four_ranks_follow_four_models_in_turn(dataset, tmp_path):
    # A sum of four is rounded by its order, and Adam makes a whole step of a rounded zero: the
    # loss is what can be compared.
    found = results("epochs", dataset, tmp_path, 4)[0]
    expected = training.epochs_in_turn(4, cases_of(dataset))
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-3)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mean_gradient_is_that_of_the_whole_batch(dataset, tmp_path, ranks):
    # With given statistics in batch norm, sharing a batch changes nothing but the rounding.
    whole = training.fixed_statistics(Communicator(), cases_of(dataset))["gradients"]
    for rank in results("fixed_statistics", dataset, tmp_path, ranks):
        error = np.abs(rank["gradients"] - whole).max() / np.abs(whole).max()
        assert error < 1e-5
