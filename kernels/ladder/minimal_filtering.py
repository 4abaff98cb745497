"""Rung ``minimal_filtering``: F(2, 2, 2), 8 outputs of a 3x3x3 kernel in 64 multiplications instead of 216.

    dst tile = A^T [ sum over ic of (G weights G^T) * (B^T src tile B) ] A      along d, h and w alike

Idea       ``direct`` does all multiplications of the definition. A tile of 2^3 outputs needs 4^3 inputs. Tile
           and weights are transformed to 64 *points* each, points are multiplied one by one, and products
           are transformed back: the constant matrices of `cook_toom` turn a convolution into a product.
           Summed over input channels, each point is a matrix product by itself, tiles x IC by IC x OC.
Steps      one after the other, over whole tensors::

               U[point][ic][oc]    = G weights          64 / 27 of the weights
               V[point][tile][ic]  = B^T src            8 times src
               M[point][tile][oc]  = V U                64 matrix products, NumPy's
               dst                 = A^T M              M is 8 times dst

Traffic    V and M are written and read once each, 16 times the bytes of src and dst: where channels are few,
           this traffic takes longer than the saved multiplications. `kernels.conv3d.winograd` keeps a brick
           of V and M in cache.
Gradients  ``backward_data`` is ``forward`` with reversed, transposed weights. With the same matrices,
           ``diff_weights = G^T [ sum over tiles of (B^T src tile) * (A diff_dst tile) ]``: see `cook_toom`
Numerics   float32; the transforms add and subtract before they multiply: errors are about twice direct's
Source     Lavin and Gray, "Fast algorithms for convolutional neural networks" (2016), section 4
"""

import math

import numpy as np

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import empty, scratchpad
from kernels.base.jit import kernel, parallel_kernel, prange, split_index
from kernels.base.layout import blocks, pack_src, reorder_nCdhw16c_to_ndhwc
from kernels.base.simd import LANES, broadcast, fma, load, store
from kernels.ladder.cook_toom import DIFF_DST, DIFF_WEIGHTS, INPUT, OUTPUT, WEIGHTS, matrix
from kernels.ladder.naive import backward_bias
from kernels.ladder.shapes import Geometry, Rung

_OUTPUTS, _POINTS = 2, 4  # of a tile along each axis


def _convolve(src: Floats, weights: Floats, bias: Floats | None, g: Geometry, adjoint: bool) -> Floats:
    _check(g)
    if adjoint:
        reversed_taps = weights.swapaxes(0, 1)[:, :, ::-1, ::-1, ::-1]
        return _filter(src, reversed_taps, g.src_shape, g.adjoint_before)
    dst = _filter(src, weights, g.dst_shape, g.before)
    return dst if bias is None else dst + bias


def _gradients(src: Floats, diff_dst: Floats, g: Geometry) -> tuple[Floats, Floats]:
    _check(g)
    tiles, products = _tiles(g.dst_shape), np.zeros((), np.float32)
    for n in range(len(src)):
        V = _to_points(INPUT, src[n], tiles, g.before)
        E = _to_points(DIFF_DST, diff_dst[n], tiles, (0, 0, 0))
        products = products + V.transpose(0, 2, 1) @ E
    diff_weights = _transform_weights(DIFF_WEIGHTS, products.reshape(*(_POINTS,) * 3, *products.shape[1:]))
    IC, OC = g.channels
    diff_weights = diff_weights[..., :IC, :OC].transpose(4, 3, 0, 1, 2)
    return np.ascontiguousarray(diff_weights), backward_bias(diff_dst)


_rung = Rung(_convolve, _gradients)
forward, backward_data, backward_weights = _rung.forward, _rung.backward_data, _rung.backward_weights


def _check(g: Geometry) -> None:
    if g.kernel != (3, 3, 3) or g.stride != (1, 1, 1):
        raise ValueError(f"kernel is {g.kernel} and stride {g.stride}; minimal_filtering takes 3x3x3 and 1")


def _tiles(dst_shape: tuple[int, ...]) -> Triple:
    """Tiles along each axis; the last may stick out."""
    _, OD, OH, OW, _ = dst_shape
    return -(-OD // _OUTPUTS), -(-OH // _OUTPUTS), -(-OW // _OUTPUTS)


def _odd(tiles: Triple) -> int:
    """Return the number of tiles, made odd: points at a stride of 2^n bytes would share a few cache sets."""
    return math.prod(tiles) | 1


def _matrix(kind: int) -> Floats:
    return np.array(matrix(kind, _OUTPUTS), np.float32)


def _transform_weights(kind: int, array: Floats) -> Floats:
    """Transform weights or their gradients, (d, h, w, ic, oc): few, so NumPy will do."""
    for axis in range(3):
        array = np.moveaxis(np.tensordot(_matrix(kind), array, (1, axis)), 0, axis)
    return np.ascontiguousarray(array)


def _filter(src: Floats, weights: Floats, dst_shape: tuple[int, ...], before: Triple) -> Floats:
    MB, OD, OH, OW, OC = dst_shape
    tiles, OCB = _tiles(dst_shape), blocks(OC)
    filled = np.zeros((3, 3, 3, blocks(src.shape[-1]) * LANES, OCB * LANES), np.float32)
    filled[..., : src.shape[-1], :OC] = weights.transpose(2, 3, 4, 1, 0)
    U = _transform_weights(WEIGHTS, filled).reshape(_POINTS**3, -1, OCB * LANES)
    D, H, W = (_OUTPUTS * count for count in tiles)
    dst = empty((MB, OCB, D, H, W, LANES))
    for n in range(MB):
        V = _to_points(INPUT, src[n], tiles, before)
        M = np.matmul(V, U, out=scratchpad("M", *V.shape[:2], OCB * LANES))
        strides = _point_strides(tiles, OCB), _panel_strides((D, H, W))
        _transform_tiles(M.reshape(-1), dst[n].reshape(-1), strides, tiles, OCB, _matrix(OUTPUT))
    return reorder_nCdhw16c_to_ndhwc(np.ascontiguousarray(dst[:, :, :OD, :OH, :OW]), OC)


def _to_points(kind: int, image: Floats, tiles: Triple, before: Triple) -> Floats:
    """Points ``[point][tile][channel]`` of all tiles of an image: B^T of a source, A of a gradient."""
    rows, CB = _matrix(kind), blocks(image.shape[-1])
    D, H, W = (_OUTPUTS * count + rows.shape[1] - _OUTPUTS for count in tiles)
    panel = scratchpad("src", CB, D, H, W, LANES)
    pack_src(image, panel, before, (1, 1, 1))
    points = scratchpad(f"points {kind}", _POINTS**3, _odd(tiles), CB * LANES)
    points[:, math.prod(tiles) :] = 0.0
    strides = _panel_strides((D, H, W)), _point_strides(tiles, CB)
    _transform_tiles(panel.reshape(-1), points.reshape(-1), strides, tiles, CB, rows)
    return points


#: Floats from a channel block and from a tile to the next, along d, h and w; and inside a tile.
_Strides = tuple[int, int, int, int, int, int, int]
_Pair = tuple[_Strides, _Strides]


def _panel_strides(size: Triple) -> _Strides:
    """Of a panel [block][d][h][w][16], in which tiles start two voxels after each other."""
    D, H, W = size
    d, h, w = H * W * LANES, W * LANES, LANES
    return D * d, _OUTPUTS * d, _OUTPUTS * h, _OUTPUTS * w, d, h, w


def _point_strides(tiles: Triple, CB: int) -> _Strides:
    """Of points [d, h, w of a point][d, h, w of a tile][block][16]."""
    w = CB * LANES
    h, d, point = tiles[2] * w, tiles[1] * tiles[2] * w, _odd(tiles) * w
    return LANES, d, h, w, _POINTS**2 * point, _POINTS * point, point


@parallel_kernel
def _transform_tiles(src: Floats, dst: Floats, strides: _Pair, tiles: Triple, CB: int, rows: Floats) -> None:
    src_strides, dst_strides = strides
    for task in prange(tiles[0] * tiles[1] * CB):
        row, block = split_index(task, CB)
        scratch = np.empty(2 * _POINTS**3 * LANES, np.float32)
        d, h = row // tiles[1], row % tiles[1]
        x = block * src_strides[0] + d * src_strides[1] + h * src_strides[2]
        y = block * dst_strides[0] + d * dst_strides[1] + h * dst_strides[2]
        for _ in range(tiles[2]):
            _transform(src, x, dst, y, (src_strides, dst_strides), rows, scratch)
            x, y = x + src_strides[3], y + dst_strides[3]


@kernel
def _transform(src: Floats, at: int, dst: Floats, to: int, strides: _Pair, rows: Floats, own: Floats) -> None:
    """Multiply a tile of vectors by a matrix along w, then h, then d."""
    (M, N), (src_strides, dst_strides) = rows.shape, strides
    h_done = N * N * M * LANES  # offset of the results along h, behind the results along w
    for i in range(N * N):
        x = at + i // N * src_strides[4] + i % N * src_strides[5]
        _transform_line(src, x, src_strides[6], own, i * M * LANES, LANES, rows)
    for i in range(N * M):
        x, y = (i // M * N * M + i % M) * LANES, h_done + (i // M * M * M + i % M) * LANES
        _transform_line(own, x, M * LANES, own, y, M * LANES, rows)
    for i in range(M * M):
        y = to + i // M * dst_strides[5] + i % M * dst_strides[6]
        _transform_line(own, h_done + i * LANES, M * M * LANES, dst, y, dst_strides[4], rows)


@kernel
def _transform_line(
    src: Floats, at: int, stride: int, dst: Floats, to: int, dst_stride: int, rows: Floats
) -> None:
    for i in range(rows.shape[0]):
        total = broadcast(np.float32(0.0))
        for k in range(rows.shape[1]):
            total = fma(broadcast(rows[i, k]), load(src, at + k * stride), total)
        store(dst, to + i * dst_stride, total)
