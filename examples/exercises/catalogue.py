"""All exercises, in the order in which to solve them; `checkers` judge them. Start with :data:`EXERCISES`."""

from types import ModuleType

from examples.exercises.checkers import (
    blocking,
    fuse,
    im2col,
    norm_backward,
    ring,
    tape,
    tile,
    traffic,
    winograd,
)
from examples.exercises.frame import Exercise


def _exercise(checker: ModuleType, title: str, read: str, *hints: str) -> Exercise:
    name = checker.__name__.rpartition(".")[2]
    return Exercise(name, title, read, hints, checker.check, checker.compete, checker is fuse)


_LIST = (
    _exercise(
        tape,
        "A tape in thirty lines",
        "docs/book/tape.md",
        "A value may be used twice: its gradient is a sum.",
        "A value may pass its gradient on only when all of it has arrived: visit children before parents.",
        "A depth-first walk that appends a value after its parents gives the order; then go backwards.",
    ),
    _exercise(
        im2col,
        "Convolution as one product of matrices",
        "docs/book/im2col.md",
        "Pad the volume by K // 2 zeros on each side first.",
        "For each place of the kernel, all voxels at once are one slice of the padded volume.",
        "Write into an array (D, H, W, K, K, K, C), and reshape it at the end.",
    ),
    _exercise(
        blocking,
        "Channels in blocks of 16",
        "docs/book/blocks.md",
        "How many blocks are there? Round up.",
        "Zeros first, then copy a block at a time.",
        "The last block may be narrower than 16.",
    ),
    _exercise(
        tile,
        "The register tile",
        "docs/book/register-tile.md",
        "Put the output channel last in the weights: 16 of them are one vector.",
        "A tile of four voxels: four local variables hold the sums over all taps and channels in. A load "
        "of weights then serves four multiply-adds.",
        "Pad the input once, so that the inner loops have no test; pad W to a multiple of 4, too.",
        "For a voxel and kd, kh the numbers of all kw and channels in lie one after the other: one loop.",
    ),
    _exercise(
        winograd,
        "Winograd by hand: F(2, 3), then F(4, 3), and their errors",
        "docs/book/winograd.md",
        "F(2, 3): the products are (d0 - d2) g0, (d1 + d2)(g0 + g1 + g2) / 2, ...",
        "Polynomials of degree 3 are known from their values at 0, 1, -1 and at infinity.",
        "F(4, 3) adds the points 2 and -2; docs/fast-convolution.md has the matrices.",
        "rounding: run the function twice, on float64 and on .astype(np.float32).",
        "growth: absolute values, sums along rows, then the product of both sums for each point.",
    ),
    _exercise(
        traffic,
        "Predict and measure the bytes of each pass",
        "docs/book/roofline.md, docs/book/fusion.md",
        "Three passes: which tensors does each read, which does it write?",
        "Between the passes the result of the convolution goes to memory and comes back twice.",
        "measure: storage_shape counts padding lanes; dtype.itemsize is the bytes of a number.",
        "node.views maps the role of an output to that of an input: leave out both.",
    ),
    _exercise(
        norm_backward,
        "Backward of batch norm",
        "docs/book/tape.md; kernels/ops/norms.py, its docstring",
        "Write x = (src - mean) rstd first; diff_scale and diff_shift are sums over rows.",
        "The mean passes -mean(diff_dst), the variance -x mean(diff_dst x).",
    ),
    _exercise(
        fuse,
        "Fuse ELU so that no reorder is left around it",
        "docs/book/fusion.md, docs/book/blocks.md; tinyunet/compiler/ir.py, its docstring",
        "exp of a large number is infinite, and infinity times 0 is NaN: choose by np.where.",
        "ELU and a reorder may change places: let ELU read what the reorder reads, and reorder its result.",
        "A reorder of a reorder is what was there before the two: let its readers read that.",
        "A reorder that nobody reads can go: graph.rewrite({node.name: []}).",
    ),
    _exercise(
        ring,
        "A ring allreduce, and where a tree wins",
        "docs/data-parallel.md",
        "Cut each array into N chunks. In step s rank r sends chunk r - s.",
        "All ranks send at once: collect what is sent before you add anything.",
        "After N - 1 steps rank r has the complete chunk r + 1: send it round once more.",
    ),
)
#: By name.
EXERCISES = {exercise.name: exercise for exercise in _LIST}
