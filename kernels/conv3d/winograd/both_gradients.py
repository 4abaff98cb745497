"""Both gradients of a convolution in one pass: what they both need is read and transformed once.

    g            the gradient of the convolution's result
    diff_src     = A^T [ sum over oc of (G reversed weights G^T) * (B^T g tile B) ] A
    diff_weights = reversed G^T [ sum over tiles of (B^T g tile B) * (A src tile A^T) ] G

Idea       `convolution` finds diff_src from ``g`` and a halo around it; `weight_gradient` finds diff_weights
           from ``src`` and a halo. But ``diff_weights[k] = sum over i of src[i + k] g[i]`` is as well the
           ``sum over j of g[j - k] src[j]``: the weight gradient of a convolution *from* ``g``, with its
           taps reversed. Now the halo is around ``g`` in both, and so both multiply the same tiles
Loop nest  chunks of bricks | slabs | planes of points | blocks: transform in along w | points along w:
           products with weights, products with src | blocks: transform out along w || blocks: epilogue
Memory     ``g``, itself often formed of two tensors, is read once for twice. So is ``src``, which the
           epilogue's mask asks for, too::

               slab of g    --w-->  V --* weights-->  M --w-->  in src's place in its slab --> diff_src
               slab of src  --w-->  E --* V-------->  sums of each point ------------------> diff_weights

Where      channels are few and tiles many: slabs, weights and sums share the second-level cache
Numerics   float32, as `weight_gradient`
"""

import functools
from collections.abc import Callable

from kernels.base.arguments import Floats, Triple
from kernels.base.buffers import scratchpad
from kernels.base.jit import call_worker, parallel_kernel, prange, run_workers, signed, worker_kernel
from kernels.base.machine import threads
from kernels.base.prefetch import NOTHING, part_of, upcoming
from kernels.base.simd import LANES, address, fence
from kernels.conv3d.bricks import Cut, count_bricks, next_brick, share, source_tensors
from kernels.conv3d.read import Inputs
from kernels.conv3d.winograd.cutting import gemm_tile, points, slab_planes, tile_count
from kernels.conv3d.winograd.stages import accumulate, multiply, slot_size, transform_in, transform_out
from kernels.conv3d.winograd.sums import brick_chunks, register_tile, transform_back
from kernels.conv3d.winograd.weight_gradient import pack_both, packed_size
from kernels.conv3d.write import Outputs, Staged, finish_block, finish_size
from kernels.ladder.cook_toom import DIFF_DST, INPUT, sizes

# Sums and weights of a pair of blocks pass through the cache once a brick. With more of them than this for
# each value of its tiles, the two gradients are found sooner one after the other.
_SUMS_PER_TILE = 0.4


def pays(cut: Cut, tile: Triple, ICB: int, OCB: int) -> bool:
    """Whether to find both gradients in one pass."""
    tiles = cut.bricks * tile_count(cut, tile)
    return ICB * OCB * LANES * LANES <= _SUMS_PER_TILE * tiles * (ICB + OCB) * LANES


def backward(
    gradient: Inputs,
    size: Triple,
    before: Triple,
    weights: Floats,
    source: Inputs,
    epilogue: Outputs,
    cut: Cut,
    tile: Triple,
    diff_weights: Floats,
) -> None:
    """Gradients of source and weights of a stride-1 convolution of blocked tensors, "same" padding.

    Parameters
    ----------
    gradient, source : Inputs
        Of the convolution's result, and what it read.
    size : (D, H, W)
        Of both.
    before : (d, h, w)
        Zeros before the first voxel.
    weights : ndarray, `convolution.packed_shape`
        Adjoint.
    epilogue : Outputs
        Takes the gradient of the source.
    cut : Cut
        `weight_gradient.cut_output`.
    tile : (md, mh, mw)
    diff_weights : ndarray, shape=(OC, IC, KD * KH * KW), float32, C-contiguous
        Filled.
    """
    ICB, OCB = source.blocks, gradient.blocks
    rows, _ = gemm_tile(tile_count(cut, tile), ICB)
    cols = weights.shape[-1] // LANES
    inputs, lanes = register_tile(ICB)
    workers, scratch_size = threads(), _scratch_size(cut, tile, ICB, OCB)
    chunks = brick_chunks(cut)
    sums = scratchpad("winograd sums", chunks, points(tile) * OCB * LANES * ICB * LANES)
    scratch = scratchpad("winograd", workers, scratch_size)
    run_workers(
        _share_chunks,
        _make_backward(*tile, rows, cols, inputs, lanes),
        gradient,
        size,
        before,
        weights.reshape(-1),
        source,
        epilogue,
        cut,
        chunks,
        sums.reshape(-1),
        scratch,
    )
    # The sums are of a convolution from the gradient to the source.
    transform_back(tile, sums, diff_weights, LANES, lanes * LANES, adjoint=True)


@functools.cache
def _scratch_size(cut: Cut, tile: Triple, ICB: int, OCB: int) -> int:
    """Floats of one worker's scratchpad: slabs; V, M and E, or a strip; epilogue; sums of blocks."""
    T, PW = tile_count(cut, tile), sizes(INPUT, tile[2])[1]
    slots = (PW + 1) * slot_size(max(ICB, OCB), T) + PW * slot_size(ICB, T)
    packed = packed_size(cut, tile, OCB, ICB, slots)
    return packed + finish_size(*tile[:2]) + (ICB + 1) * LANES


@parallel_kernel
def _share_chunks(
    address: int,
    gradient: Inputs,
    size: Triple,
    before: Triple,
    weights: Floats,
    source: Inputs,
    epilogue: Outputs,
    cut: Cut,
    chunks: int,
    sums: Floats,
    scratch: Floats,
) -> None:
    """Driver: each worker its chunks, with a row of ``scratch`` for itself."""
    for index in prange(scratch.shape[0]):
        worker = signed(index)
        call_worker(
            address, worker, gradient, size, before, weights, source, epilogue, cut, chunks, sums, scratch
        )


@functools.cache
def _make_backward(
    md: int, mh: int, mw: int, rows: int, cols: int, inputs: int, lanes: int
) -> Callable[..., None]:
    planes, PW = slab_planes((md, mh, mw)), sizes(INPUT, mw)[1]
    finishing = finish_size(md, mh)

    @worker_kernel
    def backward_chunks(
        worker: int,
        gradient: Inputs,
        size: Triple,
        before: Triple,
        weights: Floats,
        source: Inputs,
        epilogue: Outputs,
        cut: Cut,
        chunks: int,
        sums: Floats,
        scratch: Floats,
    ) -> None:
        ICB, OCB, groups = source.blocks, gradient.blocks, source.blocks // lanes
        block = LANES * lanes * LANES
        g, x = source_tensors(gradient), source_tensors(source)
        rows_here, tiles = cut.planes // md * (cut.lines // mh), -(-cut.OW // mw)
        T = rows_here * tiles
        slot, slot_e = slot_size(max(ICB, OCB), T), slot_size(ICB, T)
        own = scratch[worker]
        S = own.size - (ICB + 1) * LANES  # where `pack_both` leaves sums of src, which nobody needs
        for chunk in range(worker, chunks, scratch.shape[0]):
            begin, end = share(count_bricks(cut), chunk, chunks)
            first = chunk * planes * PW * groups * OCB * block
            for brick in range(begin, end):
                extent, inner, apart, src_apart = pack_both(
                    gradient, size, before, source, cut, brick, own, S, md, mh, mw
                )
                SRC = planes * apart
                M = SRC + planes * src_apart
                V = M + slot
                E = V + PW * slot
                following = next_brick(cut, brick, before, size, md > 1, mh > 1)
                inside = next_brick(cut, brick, (0, 0, 0), size, 0, 0)
                for plane in range(planes):
                    near_g = upcoming(g, following, NOTHING, inside, plane, planes)
                    near_x = upcoming(x, inside, NOTHING, inside, plane, planes)
                    src = SRC + plane * src_apart
                    transform_in(own, plane * apart, extent, OCB, own, V, slot, T, 1, INPUT, mw)
                    transform_in(own, src, inner, ICB, own, E, slot_e, T, lanes, DIFF_DST, mw)
                    for point in range(PW):
                        v, m, e = V + point * slot, M + point * slot, E + point * slot_e
                        w = (plane * PW + point) * OCB * ICB * LANES * LANES
                        next_weights = address(weights, w + OCB * ICB * LANES * LANES)
                        soon = part_of(near_g, point, PW, next_weights)
                        multiply(own, v, m, OCB, T, 0, ICB, weights, w, soon, rows, cols)
                        for i in range(groups * OCB):
                            group, ocb = i // OCB, i % OCB
                            part = point * groups * OCB + i
                            at = first + (plane * PW * groups * OCB + part) * block
                            next_sums = address(sums, at + block)
                            soon = part_of(near_x, part, PW * groups * OCB, next_sums)
                            accumulate(
                                own,
                                v + ocb * T * LANES,
                                own,
                                e + group * T * lanes * LANES,
                                T,
                                sums,
                                at,
                                brick == begin,
                                soon,
                                inputs,
                                lanes,
                            )
                    for icb in range(ICB):
                        transform_out(own, M, slot, own, src, rows_here, tiles, icb, mw)
                for icb in range(ICB):
                    at = SRC + icb * T * mw * LANES
                    result = Staged(at, src_apart, inner, S - finishing)
                    finish_block(epilogue, cut, brick, icb, own, result, md, mh)
        fence()

    return backward_chunks
