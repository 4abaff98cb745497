"""Allreduce on a ring: each rank sends to the next one only, and 2 (N - 1) / N of the array in all.

First every chunk goes round the ring, and each rank adds its part (reduce-scatter); then the complete chunks
go round once more (allgather). A tree sends the whole array, but fewer messages.
"""

import numpy as np


def ring(arrays, send):
    """Return for each rank the sum of all arrays.

    ``arrays`` has one array a rank, all of one length. ``send(source, target, chunk)`` returns what arrives
    at the target: the only way in which a number of one rank may reach another one.
    """
    # <answer>
    N = len(arrays)
    chunks = [np.array_split(array.copy(), N) for array in arrays]
    for step in range(N - 1):
        sent = [(rank, (rank - step) % N) for rank in range(N)]
        arrived = [send(rank, (rank + 1) % N, chunks[rank][c]) for rank, c in sent]
        for (rank, c), chunk in zip(sent, arrived, strict=True):
            chunks[(rank + 1) % N][c] = chunks[(rank + 1) % N][c] + chunk
    for step in range(N - 1):
        sent = [(rank, (rank + 1 - step) % N) for rank in range(N)]
        arrived = [send(rank, (rank + 1) % N, chunks[rank][c]) for rank, c in sent]
        for (rank, c), chunk in zip(sent, arrived, strict=True):
            chunks[(rank + 1) % N][c] = chunk
    return [np.concatenate(own) for own in chunks]
    # </answer>


def tree_wins(ranks, nbytes, latency, seconds_per_byte):
    """Whether a tree is faster: up and down ceil(log2 N) levels, each with the whole array in one message.

    A message takes ``latency + its bytes * seconds_per_byte``; the ring has 2 (N - 1) messages of a N-th.
    """
    # <answer>
    levels = int(np.ceil(np.log2(ranks)))
    tree = 2 * levels * (latency + nbytes * seconds_per_byte)
    return tree < 2 * (ranks - 1) * (latency + nbytes / ranks * seconds_per_byte)
    # </answer>
