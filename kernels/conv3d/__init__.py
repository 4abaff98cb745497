"""3-D convolution: a ladder of rungs with one signature, and `plan`, which picks one.

``naive`` loops, the definition; ``im2col`` one matrix product; ``blocked`` channels in blocks of 16;
``direct`` sums in registers; ``winograd`` fewer multiplications. Each has ``forward``, ``backward_data`` and
``backward_weights``. Use the three functions exported here, which take the rung that fits.

What the rungs are made of:

``shapes``          sizes, and the checks that all share
``bias``            its gradient
``bricks``          how a blocked convolution is cut; ``slab`` packs a brick's source, ``epilogue`` finishes
                    and writes it, ``ahead`` fetches what comes next
``direct_bricks``   direct convolution of bricks, for the compiled graph
``cook_toom``       Winograd's matrices; ``transform`` compiles them
"""

from kernels.conv3d.dispatch import backward_data, backward_weights, forward

__all__ = ["backward_data", "backward_weights", "forward"]
