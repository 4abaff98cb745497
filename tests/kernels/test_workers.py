"""A job of tuples in tuples reaches each worker whole; a job of other types is refused."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from kernels.base.jit import worker_kernel
from kernels.base.workers import run_workers


class Inner(NamedTuple):
    """A tuple in a tuple."""

    array: np.ndarray
    whole: bool
    scale: np.float32


class Job(NamedTuple):
    """What the workers share."""

    inner: Inner
    size: tuple[int, int, int]
    out: np.ndarray


@worker_kernel
def add(worker: int, job: Any) -> None:
    inner = job.inner
    job.out[worker] += job.size[1] + inner.scale * inner.array[worker] + (0.5 if inner.whole else 0.0)


def job(dtype: Any = np.float32) -> Job:
    inner = Inner(np.arange(4, dtype=np.float32), True, np.float32(2.0))
    return Job(inner, (1, 10, 100), np.zeros(4, dtype))


def test_each_worker_is_called_once_with_the_whole_job() -> None:
    given = job()
    run_workers(add, 3, given)
    assert given.out.tolist() == [10.5, 12.5, 14.5, 0.0]


def test_a_job_of_other_types_is_refused() -> None:
    run_workers(add, 1, job())
    with pytest.raises(TypeError):
        run_workers(add, 1, job(np.float64))


@pytest.mark.parametrize("wrap", [lambda array: array, lambda array: Inner(array, True, np.float32(1.0))])
def test_a_read_only_array_is_refused_before_a_worker_is_compiled_for_it(wrap: Any) -> None:
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        run_workers(None, 1, (wrap(array),))
