"""A ring allreduce, whose messages are counted, and where a tree wins."""

from types import ModuleType
from typing import Any

import numpy as np

from examples.exercises.frame import Case, Race, call, function_of, judge
from kernels.workbench import allreduce
from kernels.workbench.verdict import Failure


class _Wire:
    """Messages between ranks, counted."""

    def __init__(self, ranks: int) -> None:
        self.sent = np.zeros(ranks)

    def send(self, source: int, target: int, chunk: Any) -> Any:
        ranks = len(self.sent)
        if target != (source + 1) % ranks:
            raise Failure(
                f"rank {source} sends to rank {target}; expected its neighbour {(source + 1) % ranks}"
            )
        self.sent[source] += np.size(chunk)
        return np.array(chunk)


def check(module: ModuleType) -> None:
    """Check the sum and the numbers sent, then where a tree wins."""
    function = function_of(module, "ring")
    cases = []
    for ranks, size in ((2, 16), (3, 12), (3, 12), (4, 7), (5, 3), (1, 4)):
        arrays = [np.random.default_rng().standard_normal(size) for _ in range(ranks)]
        answer = np.tile(np.sum(arrays, axis=0), (ranks, 1))
        cases.append(Case(f"{ranks} ranks, {size} numbers each", (arrays,), answer, 1e-9))
    earlier: list[Any] = []

    def run(arrays: Any) -> Any:
        wire, size = _Wire(len(arrays)), len(arrays[0])
        before = [array.copy() for array in arrays]
        found = function(arrays, wire.send)
        most = 2 * (len(arrays) - 1) * -(-size // len(arrays))
        if found is not None and len(arrays) > 1 and not wire.sent.any():
            raise Failure("nothing was sent: a number reaches another rank by send alone")
        if wire.sent.max(initial=0) > most:
            sent = f"a rank sends {wire.sent.max():.0f} numbers of {size}"
            raise Failure(f"{sent}; expected {most} at most, 2 (N - 1) / N")
        if any(not np.array_equal(a, b) for a, b in zip(arrays, before, strict=True)):
            raise Failure("the arrays that were given are changed; expected new ones")
        _explain(arrays, found, earlier)
        earlier.append(np.sum(arrays, axis=0))
        return found

    judge(run, cases)
    tree = function_of(module, "tree_wins")
    random = np.random.default_rng()
    drawn = [(int(random.integers(2, 2000)), float(10 ** random.uniform(0, 9)), 1e-6) for _ in range(40)]
    for ranks, nbytes, latency in ((1024, 4.0, 1e-6), (4, 1e8, 1e-6), (1024, 1e9, 1e-6), *drawn):
        by_tree = 2 * int(np.ceil(np.log2(ranks))) * (latency + nbytes * 1e-10)
        by_ring = 2 * (ranks - 1) * (latency + nbytes / ranks * 1e-10)
        if abs(by_tree - by_ring) < 1e-3 * by_ring:
            continue  # so near that the order of the sums decides
        answer = by_tree < by_ring
        label = f"tree_wins for {ranks} ranks and {nbytes:g} bytes"
        found = call(tree, Case(label, (ranks, nbytes, latency, 1e-10), answer, 0.0))
        if bool(found) is not answer:
            raise Failure(f"{label}: {found}; expected {answer}")


def _explain(arrays: Any, found: Any, earlier: list[Any]) -> None:
    """Raise Failure with the words of the workbench, if sums of the right shape are wrong."""
    right = np.sum(arrays, axis=0)
    if found is None or np.shape(found) != np.shape(arrays):
        return
    results = [np.asarray(result, np.float64) for result in found]
    if any(not np.allclose(result, right, rtol=1e-4, atol=1e-6) for result in results):
        words = allreduce.likely(arrays, results, earlier) or allreduce.which_ranks(arrays, results)
        raise Failure(f"{len(arrays)} ranks, {right.size} numbers each: wrong\n  likely: {words}")


def compete(module: ModuleType) -> Race:
    """Compare what a rank sends with the least."""
    wire = _Wire(8)
    module.ring([np.ones(800) for _ in range(8)], wire.send)
    return Race("of the least that a rank must send", 2 * 7 / 8 * 800 / float(wire.sent.max()), 1)
