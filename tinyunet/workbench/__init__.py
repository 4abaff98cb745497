"""``python -m tinyunet.workbench FILE``: check a pass of the compiler, and list what it changes.

The file defines ``rewrite(graph, options)``, which takes a graph (`tinyunet.compiler.ir`) and returns one.
It may say where the pass runs, ``after = "propagate_layout"``: after this pass of the compiler (default:
``"traced"``, before all of them). And it may bring the net to try it on: a function ``model()``, and the
``shape`` of its input.

Each net is compiled with and without the pass, for prediction and for training. Both run on the same fresh
numbers, while NaN fills all memory in which nothing lives. Then the parameters change, and both run again.
"""

from tinyunet.workbench.rewriting import check as check
from tinyunet.workbench.rewriting import judge as judge
from tinyunet.workbench.rewriting import report as report
from tinyunet.workbench.rewriting import time_it as time_it
