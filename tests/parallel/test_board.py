"""Boards: what ranks of a node show each other. Here they are threads; test_communicator has processes."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet.parallel import board
from tinyunet.parallel.board import MOST, Board


def wait(is_done, name):
    end = time.monotonic() + 20
    while not is_done():
        assert time.monotonic() < end, "some other thread has failed"
        time.sleep(0)


def numbers(shown, rank, size):
    return np.random.default_rng([shown, rank]).standard_normal(size)


def show_all(own, rank, ranks, sizes, delays):
    """Show numbers of some sizes, and check what is seen, at once and right before the next round."""
    for shown, size in enumerate(sizes):
        seen = own.show(numbers(shown, rank, size), "test")
        expected = np.stack([numbers(shown, other, size) for other in range(ranks)])
        np.testing.assert_array_equal(seen, expected)
        time.sleep(delays[(shown + rank) % len(delays)])
        np.testing.assert_array_equal(seen, expected)


@given(
    st.integers(1, 4),
    st.lists(st.sampled_from([0, 1, 2, 17, MOST]) | st.integers(0, 300), max_size=20),
    st.lists(st.sampled_from([0, 0, 1e-4]), min_size=1, max_size=7),
)
def test_each_sees_the_numbers_of_all_until_it_shows_others(ranks, sizes, delays):
    memory = np.zeros(board.nbytes(ranks), np.uint8)
    boards = [Board(memory, rank, ranks, wait) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        done = [pool.submit(show_all, own, rank, ranks, sizes, delays) for rank, own in enumerate(boards)]
        for each in done:
            each.result(timeout=30)


def test_a_rank_that_is_a_round_ahead_leaves_what_another_still_reads():
    memory = np.zeros(board.nbytes(2), np.uint8)
    ahead, behind = (Board(memory, rank, 2, lambda is_done, name: None) for rank in range(2))
    ahead.show(np.array([1.0]), "test")
    seen = behind.show(np.array([2.0]), "test")
    ahead.show(np.array([3.0]), "test")
    np.testing.assert_array_equal(seen, [[1.0], [2.0]])


def test_more_numbers_than_there_is_room_for_are_refused():
    alone = Board(np.zeros(board.nbytes(1), np.uint8), 0, 1, wait)
    with pytest.raises(ValueError, match="broadcast"):
        alone.show(np.zeros(MOST + 1), "test")


def test_there_is_no_board_where_writes_may_be_seen_in_another_order(monkeypatch):
    monkeypatch.setattr(board, "_IN_ORDER", False)
    assert board.nbytes(2) == 0
