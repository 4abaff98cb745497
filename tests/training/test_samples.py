"""Which patches a rank gets, and how they are kept and inspected."""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet.common.errors import DataError
from tinyunet.data import phantom
from tinyunet.data.decathlon import read_dataset
from tinyunet.training import samples
from tinyunet.training.samples import Inspector, Loader, Volumes, epoch_samples
from tinyunet.training.settings import Settings

PATCH = (16, 16, 16)


def make_loader(cases, volumes, patches_per_case, batch, seed=0, rank=0, ranks=1, **options):
    given = {"patch_size": PATCH, "patches_per_case": patches_per_case, "batch_size": batch} | options
    return Loader(cases, volumes, Settings(random_seed=seed, **given), rank, ranks)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    path = phantom.make_dataset(tmp_path_factory.mktemp("data") / "p", cases=3, shape=(18, 20, 16))
    return list(read_dataset(path).cases)


@pytest.fixture
def loads(monkeypatch):
    """The names of the cases that have been read from files, in order."""
    names, load = [], samples.load_case

    def counting(case, *how):
        names.append(case.name)
        return load(case, *how)

    monkeypatch.setattr(samples, "load_case", counting)
    return names


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 8), st.integers(0, 3), st.integers(1, 3))
def test_each_patch_of_an_epoch_is_trained_on(cases, per_case, batch, seed, epoch):
    order = epoch_samples(cases, per_case, batch, seed, epoch)
    *full, last = map(len, order)
    assert set(full) <= {batch}
    assert 0 < last <= batch
    assert sorted(np.concatenate(order)) == list(range(cases * per_case))
    again = epoch_samples(cases, per_case, batch, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(order, again, strict=True))


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = [
        tuple(np.concatenate(epoch_samples(8, 4, 4, seed, epoch))) for seed in (0, 1) for epoch in (1, 2)
    ]
    assert len(set(orders)) == 4


@pytest.mark.parametrize(("ranks", "dropout"), [(2, 0.0), (3, 0.5), (4, 0.0)])
def test_ranks_together_get_what_one_rank_gets(cases, ranks, dropout):
    volumes, how = Volumes(10**9), {"sequence_dropout": dropout}
    alone = list(make_loader(cases, volumes, 3, 4, 7, **how).epoch(2))
    of_ranks = [make_loader(cases, volumes, 3, 4, 7, rank, ranks, **how).epoch(2) for rank in range(ranks)]
    without = {(~image.any((0, 1, 2))).sum() for batch in alone for image in batch.images}
    assert without == {0} if not dropout else len(without) > 1
    for number, (whole, *shares) in enumerate(zip(alone, *of_ranks, strict=True)):
        assert sum(share.weight for share in shares) == pytest.approx(1.0)
        shares = [share for share in shares if share.patches]
        assert sum(share.patches for share in shares) == whole.patches == (1 if number == 2 else 4)
        np.testing.assert_array_equal(np.concatenate([s.images for s in shares]), whole.images)
        np.testing.assert_array_equal(np.concatenate([s.labels for s in shares]), whole.labels)
        assert whole.images.shape == (whole.patches, *PATCH, 4)
        assert whole.images.dtype == np.float32
        assert whole.labels.shape == (whole.patches, *PATCH)
        assert whole.labels.dtype == np.uint8


def test_steps_and_volumes_of_an_epoch(cases):
    loader = make_loader(cases, Volumes(10**9), 3, 4, 0, 1, 2)
    assert (loader.steps, loader.volumes, loader.batch_size) == (3, 9, 4)
    assert len(list(loader.epoch(1))) == 3
    # Two patches a rank, and one that is left: the other rank computes it, too, but for nothing.
    assert loader.batch_shapes() == [(2, *PATCH), (1, *PATCH)]


def test_several_batches_make_a_step(cases):
    loader = make_loader(cases, Volumes(10**9), 3, 2, 0, 1, 2, accumulate=3)
    batches = list(loader.epoch(1))
    assert loader.steps == 2
    assert [batch.ends_step for batch in batches] == [False, False, True, False, True]
    weights = [batch.weight for batch in batches]
    assert weights == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 3, 0])
    assert [batch.patches for batch in batches] == [1, 1, 1, 1, 0]


def test_an_epoch_of_less_than_a_batch(cases):
    loader = make_loader(cases, Volumes(10**9), 1, 8, 0, 0, 4)
    assert loader.batch_shapes() == [(1, *PATCH)]
    assert [batch.patches for batch in loader.epoch(1)] == [1]


def test_volumes_are_read_once(cases, loads):
    volumes = Volumes(10**9)
    first = volumes[cases[0]]
    assert volumes[cases[0]][0] is first[0]
    assert loads == [cases[0].name]


def test_the_volumes_used_last_are_kept(cases, loads):
    image, labels = Volumes(0)[cases[0]]
    volumes = Volumes(2 * (image.nbytes + labels.nbytes))
    loads.clear()
    for number in (0, 1, 0, 2, 0, 1):  # 1 makes place for 2, and 2 for 1
        volumes[cases[number]]
    assert loads == [cases[number].name for number in (0, 1, 2, 1)]


def test_one_volume_is_kept_however_large(cases, loads):
    volumes = Volumes(0)
    assert volumes[cases[0]] is not None
    volumes[cases[0]]
    assert len(loads) == 1


def test_the_memory_of_a_container_counts(monkeypatch):
    monkeypatch.setattr(samples, "memory_limit", lambda: math.inf)
    whole = samples.half_the_memory(1)
    assert 10**8 < whole < 10**15
    for limit, half in ((9223372036854771712, whole), (8000, 4000)):
        monkeypatch.setattr(samples, "memory_limit", lambda limit=limit: limit)
        assert samples.half_the_memory(1) == half
    assert samples.half_the_memory(4) == 1000


def test_a_patch_is_not_a_view_of_the_kept_volume(cases):
    volumes = Volumes(10**9)
    before = volumes[cases[0]][0].copy()
    for batch in make_loader(cases[:1], volumes, 4, 2, 0).epoch(1):
        batch.images[...] = np.nan
        batch.labels[...] = 9
    np.testing.assert_array_equal(volumes[cases[0]][0], before)


def test_the_loader_raises_what_its_thread_met(cases):
    loader = make_loader(cases, Volumes(10**9), 1, 1, patch_size=(16, 21, 16))
    with pytest.raises(DataError, match="larger than the volume"):
        list(loader.epoch(1))


def test_the_inspector_reads_everything_and_tells_later(cases, loads):
    inspector = Inspector(cases, Volumes(10**9))
    inspector.check(wait=60)
    assert loads == [case.name for case in cases]
    bad = dataclasses.replace(cases[0], name="bad", label_path=Path("absent.nii"))
    inspector = Inspector([*cases, bad], Volumes(10**9))
    with pytest.raises(DataError, match="no such file"):
        inspector.check(wait=60)
    with pytest.raises(DataError, match="no such file"):
        inspector.check()


def test_the_next_batch_is_made_while_one_is_used(cases):
    batches = make_loader(cases, Volumes(10**9), 2, 2, 0).epoch(1)
    next(batches)
    time.sleep(0.3)
    start = time.perf_counter()
    next(batches)
    assert time.perf_counter() - start < 0.05
