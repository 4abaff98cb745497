"""The model of ranks on paper: formulas at sizes that can be worked out by hand, and its limits."""

import pytest

from tinyunet.benchmarks.scaling_model import (
    ALGORITHMS,
    Network,
    Step,
    allreduce_seconds,
    efficiency,
    fit,
    network_of,
    step_seconds,
)

NETWORK = Network(1e-3, 1e-6)


@pytest.mark.parametrize(
    ("algorithm", "ranks", "expected"),
    [
        # Messages of 1 ms, and seconds for 1,000 bytes of 1 us.
        ("ring", 2, 2e-3 + 1e-3),
        ("ring", 4, 6e-3 + 1.5e-3),
        ("recursive-halving", 4, 4e-3 + 1.5e-3),
        ("recursive-halving", 5, 6e-3 + 1.6e-3),
        ("tree", 4, 4e-3 + 4e-3),
    ],
)
def test_an_allreduce_by_hand(algorithm, ranks, expected):
    assert allreduce_seconds(algorithm, ranks, 1000, NETWORK) == pytest.approx(expected)


def test_figures_of_a_maker():
    alpha, beta = network_of(10.0, 20.0)
    assert alpha == pytest.approx(20e-6)
    assert 1e9 * beta == pytest.approx(0.8)  # 10 Gbit/s are 1.25 GB/s


def test_only_what_comes_after_backward_costs_time():
    # On 2 ranks the buckets take 3 ms and 2.1 ms.
    step = Step(0.1, 0.08, [(0.02, 1000), (0.08, 100)])
    assert step_seconds(step, "ring", 2, NETWORK) == pytest.approx(0.1 + 2.1e-3)
    assert step_seconds(step, "ring", 2, NETWORK, overlap=False) == pytest.approx(0.1 + 5.1e-3)
    # A bucket waits for the one before it.
    late = Step(0.1, 0.08, [(0.079, 1000), (0.08, 100)])
    assert step_seconds(late, "ring", 2, NETWORK) == pytest.approx(0.1 + 4.1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("overlap", [True, False])
def test_efficiency_falls_with_ranks_and_grows_with_bandwidth(algorithm, overlap):
    step = Step(0.1, 0.08, [(0.02, 4_000_000), (0.05, 4_000_000), (0.08, 60_000)])
    slow, fast = network_of(1.0, 50.0), network_of(100.0, 2.0)
    shares = [efficiency(step, algorithm, ranks, slow, overlap) for ranks in (2, 8, 64, 1024)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0] < 1
    assert efficiency(step, algorithm, 64, fast, overlap) > shares[2]


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_a_network_is_found_again_from_its_allreduces(ranks):
    sizes = [1 << 10, 1 << 16, 1 << 22]
    seconds = [allreduce_seconds("recursive-halving", ranks, n, NETWORK) for n in sizes]
    assert fit(ranks, sizes, seconds) == pytest.approx(NETWORK)
