"""Chunk by chunk: each is carried round the ring until it is complete, and then round once more."""

import numpy as np


def ring(arrays, send):
    N = len(arrays)
    bounds = np.linspace(0, len(arrays[0]), N + 1).astype(int)
    results = [np.empty_like(array) for array in arrays]
    for first in range(N):
        part = slice(bounds[first], bounds[first + 1])
        total = arrays[first][part]
        for hop in range(N - 1):
            rank = (first + hop + 1) % N
            total = send((first + hop) % N, rank, total) + arrays[rank][part]
        results[(first + N - 1) % N][part] = total
        for hop in range(N - 1, 2 * N - 2):
            total = send((first + hop) % N, (first + hop + 1) % N, total)
            results[(first + hop + 1) % N][part] = total
    return results


def tree_wins(ranks, nbytes, latency, seconds_per_byte):
    levels = (ranks - 1).bit_length()
    more_messages = 2 * (ranks - 1) - 2 * levels
    more_bytes = 2 * levels * nbytes - 2 * (ranks - 1) * (nbytes / ranks)
    return more_messages * latency > more_bytes * seconds_per_byte
