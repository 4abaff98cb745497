"""The workbench: checks a student's convolution, names the likely mistake, and times it among the rungs.

    python -m kernels.workbench my_kernel.py

The file defines one or more of ``forward``, ``backward_data`` and ``backward_weights``, with the arguments of
`kernels.ladder.shapes.Rung`. In a notebook call `check` and `measure` on functions.

``trials``     shapes that hypothesis draws, their arrays, the reference in float64
``verdict``    calls a function on trials, and says what is wrong first
``diagnosis``  the likely mistake: what a wrong result has in common with a known one
``student``    the student's file, and the guard against calls of the library's own kernels
``timing``     time among the rungs, with fresh inputs
``lessons``    the rungs: what each does new, and the bytes it moves
``roofline``   peak and bandwidth of this machine
``assembly``   the hot loop
"""

from kernels.workbench.timing import measure as measure
from kernels.workbench.verdict import Failure as Failure
from kernels.workbench.verdict import check as check
