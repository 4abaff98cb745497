"""Hypothesis profiles: ``dev`` while writing, ``ci`` (the default) for every change, ``intense`` at night."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# In the background of a script Ctrl-C is ignored; the programs that tests send it to are not to inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Look for dead cycles more rarely: Numba makes objects by the million, of which few die in cycles."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="session")
def _hang_ups() -> None:
    """Where ``nohup`` runs the tests, hang-ups stay ignored, but not in the programs that tests start."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A command that was asked to end ignores what comes after; the tests after it do not."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.getsignal(number)) for number in numbers]
    yield
    for number, handler in before:
        signal.signal(number, handler)


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
