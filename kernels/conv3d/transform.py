"""Winograd transforms of tiles of vectors, compiled from the matrices of `cook_toom`.

A transform multiplies a tile by a small constant matrix along each axis: an entry of 0 costs nothing, 1 or -1
an addition, any other a fused multiply-add. The points come in pairs a, -a, whose rows differ only in the
signs of the odd powers, so each pair shares its sums::

    row(a)  = even + c odd          (or, where pairs are columns, x_a + x_-a serves all even rows
    row(-a) = even - c odd           and x_a - x_-a all odd ones)

with c such that ``odd`` has a factor of 1.

In 3-D, planes are transformed along w and h in registers, then along d::

    n planes of n x n  --w, h-->  n planes of m x m  (scratch)  --d-->  m x m lines of m
"""

import itertools
import math
from typing import Any, NamedTuple

from llvmlite import ir

from kernels.base.arguments import Floats, Triple
from kernels.base.jit import specialised
from kernels.base.simd import LANES, VECTOR, Tile, fma, instruction
from kernels.base.tiles import tile_load, tile_store
from kernels.ladder.cook_toom import Matrix, matrix, sizes, transpose


def _constant(value: Any) -> Any:
    return ir.Constant(VECTOR, [float(value)] * LANES)


def _linear(builder: Any, coefficients: Any, vectors: Any) -> Any:
    """Sum of coefficient * vector over the terms that are not zero; None where there is none."""
    terms = [(c, v) for c, v in zip(coefficients, vectors, strict=True) if c != 0]
    # A term with factor 1 first: it starts the sum at no cost.
    terms.sort(key=lambda term: (term[0] != 1, abs(term[0]) == 1))
    total = None
    for c, v in terms:
        if total is None:
            total = v if c == 1 else builder.fmul(_constant(c), v)
        elif c == 1:
            total = builder.fadd(total, v)
        elif c == -1:
            total = builder.fsub(total, v)
        else:
            total = fma.write(builder, _constant(c), v, total)
    return total


def _partner(rows: Matrix, i: int) -> int | None:
    """Index of the later row that is row ``i`` with its odd entries negated."""
    mirrored = tuple(-c if k % 2 else c for k, c in enumerate(rows[i]))
    if mirrored == rows[i]:
        return None
    return next((j for j in range(i + 1, len(rows)) if rows[j] == mirrored), None)


def _apply(builder: Any, rows: Matrix, vectors: list[Any]) -> list[Any]:
    """Rows times vectors, sharing the sums of paired rows or the pairs of paired columns."""
    columns = transpose(rows)
    pairs = {i: j for i in range(len(columns)) if (j := _partner(columns, i)) is not None}
    if pairs and len(rows) < len(columns):
        return _apply_columns(builder, rows, vectors, pairs)
    results: list[Any] = [None] * len(rows)
    for i, row in enumerate(rows):
        if results[i] is not None:
            continue
        j = _partner(rows, i)
        if j is None:
            results[i] = _linear(builder, row, vectors)
            continue
        c = next(c for c in reversed(row[1::2]) if c != 0)
        even = _linear(builder, row[0::2], vectors[0::2])
        odd = _linear(builder, [entry / c for entry in row[1::2]], vectors[1::2])
        results[i], results[j] = (_linear(builder, (1, s * c), (even, odd)) for s in (1, -1))
    return results


def _apply_columns(builder: Any, rows: Matrix, vectors: list[Any], pairs: dict[int, int]) -> list[Any]:
    sums = {i: builder.fadd(vectors[i], vectors[j]) for i, j in pairs.items()}
    differences = {i: builder.fsub(vectors[i], vectors[j]) for i, j in pairs.items()}
    seconds = set(pairs.values())
    results = []
    for r, row in enumerate(rows):
        shared = differences if r % 2 else sums
        kept = [i for i in range(len(row)) if i not in seconds]
        operands = [shared.get(i, vectors[i]) for i in kept]
        results.append(_linear(builder, [row[i] for i in kept], operands))
    return results


def _transformed(tile: Tile, kind: Any, m: Any, axis: Any) -> Tile:
    shape = list(tile.shape)
    shape[axis.literal_value] = len(matrix(kind.literal_value, m.literal_value))
    return Tile(*shape)


@instruction(_transformed, None, None, None, None, literal=True)
def transform_axis(builder: Any, tile: Any, kind: int, m: int, axis: int) -> Any:
    """Transform a tile along its axis 0 or 1."""
    rows, after = matrix(kind, m), math.prod(tile.shape[axis + 1 :])
    size = tile.shape[axis] * after
    results: list[Any] = []
    for first in range(0, len(tile), size):
        lines = (tile[first + i : first + size : after] for i in range(after))
        results += itertools.chain(*zip(*(_apply(builder, rows, line) for line in lines), strict=True))
    return results


@specialised
def transform_columns(
    src: Any, at: int, stride: int, dst: Any, to: int, to_stride: int, columns: int, kind: int, m: int
) -> None:
    """Transform neighbouring columns along an axis.

    The strides along the axis are ``stride`` floats in ``src[at:]`` and ``to_stride`` in ``dst[to:]``, which
    may be the same memory. ``kind`` and ``m``, outputs at a time, are compile-time constants.
    """
    for w in range(columns):
        line = tile_load(src, at + w * LANES, stride, 0, 0, sizes(kind, m)[0], 1, 1)
        tile_store(transform_axis(line, kind, m, 0), dst, to + w * LANES, to_stride, 0, 0)


class Grid(NamedTuple):
    """A tile's vectors in memory: vector (d, h, w) is at ``at`` plus d, h and w times the three strides."""

    data: Floats
    at: int
    strides: Triple


def scratch_vectors(kind: int, md: int, mh: int, mw: int) -> int:
    """Vectors of scratch that `transform_tile` needs."""
    return sizes(kind, md)[0] * sizes(kind, mh)[1] * sizes(kind, mw)[1]


@specialised
def transform_tile(
    src: Any, dst: Any, scratch: Any, scratch_at: int, kind: int, md: int, mh: int, mw: int
) -> None:
    """Transform one tile along all three axes.

    Parameters
    ----------
    src, dst : Grid
    scratch, scratch_at : flat float32 array, int
        `scratch_vectors` vectors from this offset on.
    kind : int
        One of `cook_toom`'s kinds.
    md, mh, mw : int
        Outputs at a time along each axis, compile-time constants.
    """
    in_d, (in_h, out_h), (in_w, out_w) = sizes(kind, md)[0], sizes(kind, mh), sizes(kind, mw)
    (from_d, from_h, from_w), (to_d, to_h, to_w), points = src.strides, dst.strides, out_h * out_w
    for d in range(in_d):
        plane = tile_load(src.data, src.at + d * from_d, from_h, from_w, 0, in_h, in_w, 1)
        plane = transform_axis(transform_axis(plane, kind, mw, 1), kind, mh, 0)
        tile_store(plane, scratch, scratch_at + d * points * LANES, out_w * LANES, LANES, 0)
    for point in range(points):
        line = tile_load(scratch, scratch_at + point * LANES, points * LANES, 0, 0, in_d, 1, 1)
        to = dst.at + point // out_w * to_h + point % out_w * to_w
        tile_store(transform_axis(line, kind, md, 0), dst.data, to, to_d, 0, 0)
