"""The workbench: checks what a student has written, names the likely mistake, and times it among the rungs.

    python -m kernels.workbench my_kernel.py

The file defines one of

- ``forward``, ``backward_data``, ``backward_weights`` of a convolution, with the arguments of
  `kernels.ladder.shapes.Rung`;
- ``operator = "elu"`` (a name of `definitions`, or a definition in float64), ``forward`` and ``backward``;
- ``allreduce(array, ranks)``, where ``ranks`` has the methods of mpi4py;
- ``rewrite(graph, options)``, a pass of the compiler, which `tinyunet.workbench` judges.

In a notebook call `check` and `measure` on functions of a convolution, and those of
`operator_verdict`, `operator_timing` and `allreduce` on the others.

``trials``     shapes that hypothesis draws, their arrays, the reference in float64
``verdict``    calls a function on trials, and says what is wrong first
``diagnosis``  the likely mistake: what a wrong result has in common with a known one
``student``    the student's file, and the guard against calls of the library's own kernels
``timing``     time among the rungs, with fresh inputs
``lessons``    the rungs: what each does new, and the bytes it moves
``roofline``   peak and bandwidth of this machine
``assembly``   the hot loop
``definitions``       whole operators in float64, and their gradients by finite differences
``operator_verdict``  checks an operator
``operator_timing``   times it beside a copy
``allreduce``         checks a sum over ranks, counts its bytes, models its time
``ranks_of_threads``  ranks without MPI
"""

from kernels.workbench.timing import measure as measure
from kernels.workbench.verdict import Failure as Failure
from kernels.workbench.verdict import check as check
