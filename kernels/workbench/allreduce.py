"""A student's allreduce on one to five simulated ranks: the sum, the bytes that each rank sends, the time.

    def allreduce(array, ranks): ...

replaces the numbers of ``array`` by their sum over all ranks, or returns the sum. ``ranks`` is a
`kernels.workbench.ranks_of_threads.Rank`, with the methods of mpi4py.

Bytes are counted. Time is modelled, because threads of one machine have no network. No algorithm sends fewer
than 2 (N - 1) / N times the array's bytes from the busiest of N ranks: N - 1 of N parts for the sum, and
again for the result.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kernels.base.arguments import Array
from kernels.workbench.ranks_of_threads import Rank, Sent, run
from kernels.workbench.trials import BOUND
from kernels.workbench.verdict import Failure

Allreduce = Callable[[Array, Any], Any]
_TABLE_RANKS = (2, 3, 4, 5)
_MANY, _LATENCY, _BANDWIDTH = 16, 1e-5, 1e10
_SIZES = {"1 kB": 1e3, "1 MB": 1e6, "100 MB": 1e8}
_PARTS = 240  # numbers that stand for an array of any size


class Trial(NamedTuple):
    """An allreduce: ranks, numbers of each, their type and seed."""

    ranks: int
    length: int
    dtype: str = "float32"
    seed: int = 0

    def __str__(self) -> str:
        plural = "s" * (self.ranks > 1)
        return f"{self.ranks} rank{plural}, {self.length} numbers of {self.dtype} each"

    def arrays(self, kind: str) -> list[Array]:
        """Return an array for each rank: whole numbers, which add exactly, or normal numbers."""
        random = np.random.default_rng(self.seed)
        shape = self.ranks, self.length
        drawn = random.integers(1, 5, shape) * random.choice((-1, 1), shape)
        normal = random.standard_normal(shape)
        return list((normal if kind == "normal" else drawn).astype(self.dtype))


# ---- the rungs ---------------------------------------------------------------------------------------------


def root(array: Array, ranks: Rank) -> None:
    """Rank 0 receives all arrays one after the other, adds them, and sends the sum to each rank."""
    others = range(1, ranks.size)
    if ranks.rank:
        ranks.Send(array, 0)
        ranks.Recv(array, 0)
        return
    for other in others:
        array += ranks.recv(source=other)
    for request in [ranks.Isend(array, other) for other in others]:
        request.wait()


def tree(array: Array, ranks: Rank) -> None:
    """Each rank sends its sum one level up, whole; the result comes down the same way."""
    distance = 1
    while distance < ranks.size and ranks.rank % (2 * distance) == 0:
        if ranks.rank + distance < ranks.size:
            array += ranks.recv(source=ranks.rank + distance)
        distance *= 2
    if ranks.rank:
        ranks.Send(array, ranks.rank - distance)
        ranks.Recv(array, ranks.rank - distance)
    while distance > 1:
        distance //= 2
        if ranks.rank + distance < ranks.size:
            ranks.Send(array, ranks.rank + distance)


def ring(array: Array, ranks: Rank) -> None:
    """Every rank sends an N-th to its right and receives one from its left, 2 (N - 1) times."""
    rank, size = ranks.rank, ranks.size
    right, left, parts = (rank + 1) % size, (rank - 1) % size, np.array_split(array, size)
    for step in range(size - 1):
        parts[(rank - step - 1) % size][...] += ranks.sendrecv(
            parts[(rank - step) % size], right, source=left
        )
    for step in range(size - 1):
        parts[(rank - step) % size][...] = ranks.sendrecv(parts[(rank + 1 - step) % size], right, source=left)


#: The slowest for long arrays first; what each does that the one before does not.
RUNGS: dict[str, Allreduce] = {"root": root, "tree": tree, "ring": ring}
LESSONS = {
    "root": "sends every array to rank 0, which adds them all and sends the sum back.",
    "tree": "lets pairs of ranks add at the same time, so that ceil(log2 N) levels take the place of N - 1 "
    "messages to rank 0.",
    "ring": "cuts the array into N parts, so that all ranks send and add at the same time and no rank sends "
    "more than 2 (N - 1) / N of it.",
}


# ---- the check ---------------------------------------------------------------------------------------------


def check(functions: Allreduce | Sequence[Allreduce], examples: int = 25) -> str:
    """Compare a function with the sum, on 1 to 5 ranks; Failure says what is wrong.

    Return a remark, if ranks differ by rounding, or nothing.

    Parameters
    ----------
    functions : callable, or one for each of five ranks
        ``allreduce(array, ranks)``. A file that is loaded for each rank anew gives one for each.
    examples : int
        Trials that hypothesis draws, beside the first few.
    """
    each = list(functions) if isinstance(functions, Sequence) else [functions] * 5
    fresh = np.random.SeedSequence().generate_state(1)[0].item()
    earlier, differ = list[Array](), list[Trial]()
    shapes = ((2, 16), (3, 12), (3, 12), (4, 7), (5, 3), (2, 1), (1, 4))
    for seed, (ranks, length) in enumerate(shapes):
        _check_trial(each, Trial(ranks, length, "float32", seed + fresh), earlier, differ)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(
        st.integers(1, 5), st.integers(1, 40), st.sampled_from(["float32", "float64"]), st.integers(0, 2**32)
    )
    def drawn(ranks: int, length: int, dtype: str, seed: int) -> None:
        _check_trial(each, Trial(ranks, length, dtype, seed ^ fresh), earlier, differ)

    drawn()
    if not differ:
        return ""
    return (
        f"but ranks differ by rounding, for example with {differ[0]}: each adds in an order of its own. "
        "Models that are trained so drift apart. Let one rank add a number, and the others copy the sum."
    )


def _check_trial(
    functions: Sequence[Allreduce], trial: Trial, earlier: list[Array], differ: list[Trial]
) -> None:
    for kind in ("normal", "integers"):  # of the first, no two mistakes give the same sum
        arrays = trial.arrays(kind)
        expected = _sum(arrays)
        try:
            results, sent = _results(functions, arrays)
        except Failure as failure:
            raise Failure(f"allreduce: {failure}\n  on {trial}") from None
        reason = next((words for rank in range(trial.ranks) if (words := _shape(rank, results, trial))), "")
        if not reason and any(_wrong(result, expected) for result in results):
            reason = _words(functions, trial, arrays, results, earlier)
        if not reason:
            reason = _too_few(sent, trial, arrays[0].nbytes)
        if reason:
            raise Failure(f"allreduce: {reason}\n  on {trial}")
        earlier.append(expected)
        differ += [trial] * any(not np.array_equal(result, results[0]) for result in results)


def _results(functions: Sequence[Allreduce], arrays: list[Array]) -> tuple[list[Any], Sent]:
    copies = [array.copy() for array in arrays]

    def on(rank: int) -> Callable[[Rank], Any]:
        def call(ranks: Rank) -> Any:
            found = functions[rank](copies[rank], ranks)
            return copies[rank] if found is None else found

        return call

    return run([on(rank) for rank in range(len(arrays))])


def _shape(rank: int, results: list[Any], trial: Trial) -> str:
    found = results[rank]
    if not isinstance(found, np.ndarray):
        return f"rank {rank} returns {type(found).__name__}; expected an array of {trial.length} numbers"
    if found.shape != (trial.length,):
        return f"rank {rank} returns shape {found.shape}; expected {(trial.length,)}"
    return f"rank {rank} returns {found.dtype}; expected {trial.dtype}" * (found.dtype != trial.dtype)


def _sum(arrays: list[Array]) -> Array:
    return np.asarray(np.sum(arrays, axis=0, dtype=np.float64))


def _wrong(found: Array, expected: Array) -> bool:
    return bool((~(np.abs(found - expected) <= BOUND * max(np.abs(expected).max(initial=0), 1.0))).any())


def _too_few(sent: Sent, trial: Trial, nbytes: int) -> str:
    least = 2 * (trial.ranks - 1) * nbytes
    if sum(sent.nbytes) >= least:
        return ""
    return (
        f"the sum is right, but the ranks send {sum(sent.nbytes)} bytes; no allreduce sends fewer than "
        f"{least}: numbers may reach another rank in messages only"
    )


def _words(
    functions: Sequence[Allreduce],
    trial: Trial,
    arrays: list[Array],
    results: list[Array],
    earlier: list[Array],
) -> str:
    """Say what is wrong first, and the likely mistake."""
    expected = _sum(arrays)
    rank, at = _first_wrong(arrays, results)
    line = f"rank {rank}: number {at} is {results[rank][at]:g}, expected {expected[at]:g}"
    words = likely(arrays, results, earlier)
    if not words and trial.length % trial.ranks and _right_where_it_divides(functions, trial):
        words = "right where the ranks divide the length, wrong here: the last parts are shorter"
    return f"{line}\n  likely: {words or which_ranks(arrays, results)}"


def _first_wrong(arrays: list[Array], results: list[Array]) -> tuple[int, int]:
    expected = _sum(arrays)
    rank = next(r for r, result in enumerate(results) if _wrong(result, expected))
    error = np.abs(results[rank] - expected)
    return rank, int((~(error <= BOUND * max(np.abs(expected).max(), 1.0))).argmax())


def likely(arrays: list[Array], results: list[Array], earlier: Sequence[Array] = ()) -> str:
    """Return the likely mistake behind wrong sums, in words, or nothing.

    ``arrays`` and ``results`` have one array a rank; ``earlier`` are the sums of calls before this one.
    """
    expected, (rank, _) = _sum(arrays), _first_wrong(arrays, results)
    found = results[rank]
    if not np.isfinite(found).all():
        return "NaN or infinite: memory of np.empty that was never written"
    if all(np.array_equal(result, array) for result, array in zip(results, arrays, strict=True)):
        return "each rank keeps its own array: nothing is added, or the sum is not returned"
    if any(old.shape == found.shape and not _wrong(found, old) for old in earlier):
        return "the result of an earlier call is kept and returned again; every call must compute"
    if not _wrong(results[0], expected) and all(_wrong(result, expected) for result in results[1:]):
        return "right on rank 0 only: the sum does not reach the other ranks"
    factor = float(np.vdot(found, expected) / np.vdot(expected, expected))
    if found.size > 1 and abs(factor - 1) > 1e-5 and factor and not _wrong(found, factor * expected):
        mean = abs(factor * len(arrays) - 1) < 1e-4
        return "the mean; expected the sum" if mean else f"every number is {factor:.6g} times the sum"
    if not _wrong(found, np.max(arrays, axis=0)):
        return "the maximum; expected the sum"
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    words = f"the largest error is {error:.1e} of the largest number"
    return f"{words}: numbers are sent or added with too few digits" if error < 5e-3 else ""


def _right_where_it_divides(functions: Sequence[Allreduce], trial: Trial) -> bool:
    arrays = trial._replace(length=-(-trial.length // trial.ranks) * trial.ranks).arrays("normal")
    try:
        results, _ = _results(functions, arrays)
        return not any(_wrong(np.asarray(result), _sum(arrays)) for result in results)
    except (Failure, ValueError, TypeError):
        return False


def which_ranks(arrays: list[Array], results: list[Array]) -> str:
    """Say of which ranks' numbers the first wrong number is the sum."""
    rank, at = _first_wrong(arrays, results)
    own = np.array([array[at] for array in arrays], np.float64)
    for counts in sorted(itertools.product((0, 1, 2), repeat=len(arrays)), key=lambda c: (max(c), -sum(c))):
        if abs(np.dot(counts, own) - results[rank][at]) <= BOUND * np.abs(own).max():
            missing = [str(r) for r, count in enumerate(counts) if count == 0]
            twice = [str(r) for r, count in enumerate(counts) if count == 2]
            words = [f"the numbers of rank {', '.join(missing)} are missing"] if missing else []
            words += [f"those of rank {', '.join(twice)} are counted twice"] if twice else []
            return "in this number " + " and ".join(words or ["a number of another place is added"])
    return "this number is no sum of the ranks' numbers: parts of the array are mixed up"


# ---- bytes and modelled time -------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Bytes and modelled time of each algorithm: what one rank sends, of the array's bytes; seconds."""

    shares: dict[str, dict[int, float]]  # by name and number of ranks
    seconds: dict[str, dict[str, float]]  # by name and size of the array
    mine: str

    def text(self) -> str:
        """Return both tables, and what the next algorithm does."""
        width = max(len("least possible"), *map(len, self.shares))
        head = "".join(f"{f'{ranks} ranks':>10s}" for ranks in _TABLE_RANKS)
        lines = ["sent by the busiest rank, in times the bytes of the array", "", f"{'':{width}s}{head}"]
        least = {ranks: 2 * (ranks - 1) / ranks for ranks in _TABLE_RANKS}
        for name, share in {**self.shares, "least possible": least}.items():
            cells = "".join(f"{share[ranks]:10.2f}" for ranks in _TABLE_RANKS)
            lines.append(f"{name:{width}s}{cells}{'   <- yours' * (name == self.mine)}")
        model = f"{_MANY} ranks, {1e6 * _LATENCY:.0f} us a message, {_BANDWIDTH / 1e9:.0f} GB/s: "
        lines += ["", model + "modelled ms", "", f"{'':{width}s}{''.join(f'{size:>10s}' for size in _SIZES)}"]
        for name, times in self.seconds.items():
            cells = "".join(f"{1e3 * times[size]:10.3g}" for size in _SIZES)
            lines.append(f"{name:{width}s}{cells}{'   <- yours' * (name == self.mine)}")
        return "\n".join([*lines, "", *wrap(self._next(), 100)])

    def _next(self) -> str:
        largest = [*_SIZES][-1]
        mine = self.seconds[self.mine][largest]
        faster = [name for name in RUNGS if self.seconds[name][largest] < 0.95 * mine]
        if not faster:
            return "No rung is faster for long arrays; a tree has fewer messages, and wins for short ones."
        gain = mine / self.seconds[faster[0]][largest]
        return f"{faster[0]} is {gain:.3g} times as fast for {largest}: it {LESSONS[faster[0]]}"


def measure(functions: Allreduce | Sequence[Allreduce], label: str = "yours") -> Measured:
    """Count the bytes of an allreduce, and model its time, beside the rungs'.

    One function runs on all ranks; of several, each runs on one rank (16 at least).
    """
    algorithms: dict[str, Any] = {**RUNGS, label: functions}
    shares = {name: {ranks: _share(f, ranks) for ranks in _TABLE_RANKS} for name, f in algorithms.items()}
    seconds = {name: dict(_modelled(function)) for name, function in algorithms.items()}
    return Measured(shares, seconds, label)


def _numbers(ranks: int) -> list[Array]:
    return [np.random.default_rng().standard_normal(_PARTS).astype(np.float32) for _ in range(ranks)]


def _share(functions: Any, ranks: int) -> float:
    arrays = _numbers(ranks)
    _, sent = _results(_each(functions, ranks), arrays)
    return max(sent.nbytes) / arrays[0].nbytes


def _modelled(functions: Any) -> Iterator[tuple[str, float]]:
    for name, nbytes in _SIZES.items():
        arrays, each = _numbers(_MANY), _each(functions, _MANY)
        scaled = nbytes / arrays[0].nbytes / _BANDWIDTH
        calls = [lambda ranks, f=f, a=a: f(a, ranks) for f, a in zip(each, arrays, strict=True)]
        yield name, run(calls, _LATENCY, scaled)[1].seconds


def _each(functions: Any, ranks: int) -> Sequence[Allreduce]:
    return functions[:ranks] if isinstance(functions, Sequence) else [functions] * ranks
