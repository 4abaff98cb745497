"""Python threads take turns: one at a time runs a compiled program, or the eager model on a whole batch.

A compiled program has one arena, and an optimizer's step changes parameters that a prediction reads. So
each of them holds `one_at_a_time` from its start until its result is copied: every caller gets its own
result, of the parameters before a step or after it.

Why a lock, and not an arena for each thread: kernels already use all cores, so two programs at once end no
sooner (two predictions of 48^3 on two cores: 65 ms each in turn, 69 at once, 70 with one core each). Why
one lock for all models: models share parts, and one may call the compiled prediction of another. Of two
locks, two threads may hold one each and wait for the other. This one is given again to the thread that has
it.

What a thread runs operator by operator (``model(images)``) takes a turn only where it changes what others
see: running statistics, random generators, gradients. A thread that does so while another one trains the
same model holds the lock itself, or reads some parameters before a step and some after it.
"""

import os
import threading

one_at_a_time = threading.RLock()

if hasattr(os, "register_at_fork"):
    # In a forked process no other thread is left, and none would end the turn that it had begun.
    os.register_at_fork(
        before=one_at_a_time.acquire,
        after_in_parent=one_at_a_time.release,
        after_in_child=one_at_a_time.release,
    )
