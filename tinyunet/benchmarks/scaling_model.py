"""A model of a training step's time on N ranks: alpha-beta networks, trees and rings, overlap.

A message of n bytes takes ``alpha + beta n`` seconds, whatever others send (Hockney 1994). From that,
an allreduce among N ranks takes::

    ring                2 (N - 1) alpha          + 2 (N - 1) / N n beta
    recursive-halving   2 ceil(log2 N) alpha     + 2 (N - 1) / N n beta
    tree                2 ceil(log2 N) (alpha    +               n beta)      reduce, then broadcast

Without overlap a step is the computation and the allreduces of all buckets, one after the other. With
overlap a bucket starts when it is complete and the bucket before has arrived; a step is longer only by
the time from the end of backward to the last arrival.

The model leaves out three things: ranks are not equally fast, messages share links, and a rank that
computes progresses its messages only between kernels.

Source: Hockney, "The communication challenge for MPP" (1994); Thakur, Rabenseifner and Gropp,
"Optimization of collective communication operations in MPICH" (2005).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Network(NamedTuple):
    """Seconds a message, and seconds a byte."""

    alpha: float
    beta: float


class Step(NamedTuple):
    """A training step of one rank alone; times are in seconds from its start."""

    seconds: float  # forward, backward and optimizer
    backward_end: float  # when the last gradient was complete
    buckets: Sequence[tuple[float, int]]  # when each bucket was complete, and its bytes


ALGORITHMS = ("ring", "recursive-halving", "tree")


def network_of(gbit_per_s: float, latency_us: float) -> Network:
    """Return a network from its maker's bandwidth and latency."""
    return Network(latency_us * 1e-6, 8e-9 / gbit_per_s)


def allreduce_seconds(algorithm: str, ranks: int, nbytes: float, network: Network) -> float:
    """Return the seconds of an allreduce of so many bytes; the algorithm is one of ``ALGORITHMS``."""
    rounds = 2 * (ranks - 1) if algorithm == "ring" else 2 * math.ceil(math.log2(ranks))
    moved = rounds * nbytes if algorithm == "tree" else 2 * (ranks - 1) / ranks * nbytes
    return rounds * network.alpha + moved * network.beta


def step_seconds(step: Step, algorithm: str, ranks: int, network: Network, overlap: bool = True) -> float:
    """Return the seconds of a step on some ranks, each with the work of the measured rank."""
    arrived = 0.0 if overlap else step.backward_end
    for ready, nbytes in step.buckets:
        seconds = allreduce_seconds(algorithm, ranks, nbytes, network)
        arrived = max(arrived, ready) + seconds
    return step.seconds + max(0.0, arrived - step.backward_end)


def efficiency(step: Step, algorithm: str, ranks: int, network: Network, overlap: bool = True) -> float:
    """Return the share of the ranks' work that is not waiting: weak scaling, 1 at best."""
    return step.seconds / step_seconds(step, algorithm, ranks, network, overlap)


def fit(ranks: int, sizes: Sequence[int], seconds: Sequence[float]) -> Network:
    """Return the network on which recursive halving would have taken these times.

    ``seconds`` are of an allreduce of each size in bytes. Relative errors are made least, so that small
    messages count as much as large ones.
    """
    times, units = np.asarray(seconds), (Network(1.0, 0.0), Network(0.0, 1.0))
    costs = [[allreduce_seconds("recursive-halving", ranks, n, unit) for unit in units] for n in sizes]
    (alpha, beta), *_ = np.linalg.lstsq(np.array(costs) / times[:, None], np.ones(len(times)))
    return Network(max(float(alpha), 0.0), max(float(beta), 0.0))
