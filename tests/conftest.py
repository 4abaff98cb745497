"""Hypothesis profiles: ``dev`` while writing, ``ci`` (the default) for every change, ``intense`` at night."""

import os
import signal

from hypothesis import HealthCheck, settings

# In the background of a script Ctrl-C is ignored; the programs that tests send it to are not to inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

for name, examples in (("dev", 10), ("ci", 25), ("intense", 300)):
    settings.register_profile(
        name,
        max_examples=examples,
        # The first example of a shape may compile a kernel.
        deadline=None,
        derandomize=name == "ci",
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
