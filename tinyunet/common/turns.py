"""Python threads take turns: one at a time runs a compiled program, or the eager model on a whole batch.

A compiled program has one arena, and an optimizer's step changes parameters that a prediction reads. So each
call holds the lock `one_at_a_time` from its start until its result is copied: every caller gets its own
result, of the parameters before a step or after it.

Why a lock, and not an arena for each thread: kernels already use all cores (two predictions of 48^3 on two
cores: 65 ms each in turn, 69 at once, 70 with one core each). Why one lock for all models: models share
parts; with two locks, two threads may hold one each and wait for the other. A thread that holds this lock may
take it again.

An operator that runs by itself (``model(images)``) takes a turn only where it changes what other threads
read: running statistics, random generators, gradients. A thread that calls ``model(images)`` while another
thread trains the model must hold the lock, or it reads some parameters before a step and some after it.
"""

import os
import threading

one_at_a_time = threading.RLock()

if hasattr(os, "register_at_fork"):
    # A forked process has no other threads: none would end a turn that it had begun before the fork.
    os.register_at_fork(
        before=one_at_a_time.acquire,
        after_in_parent=one_at_a_time.release,
        after_in_child=one_at_a_time.release,
    )
