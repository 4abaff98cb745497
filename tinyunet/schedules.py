"""Learning rates of step 0, 1, 2, ...: ``optimizer.lr = schedule(step)``."""

from collections.abc import Callable
from typing import TypeAlias

from tinyunet.common.checks import at_least_zero, positive

Schedule: TypeAlias = Callable[[int], float]


def constant(lr: float) -> Schedule:
    """Return a schedule that is always ``lr``."""
    at_least_zero("lr", lr)
    return lambda step: lr


def polynomial(lr: float, steps: int, power: float = 0.9, end: float = 0.0) -> Schedule:
    """Return ``end + (lr - end) * (1 - step / steps) ** power``, and ``end`` from ``steps`` on."""
    at_least_zero("lr", lr)
    at_least_zero("power", power)
    at_least_zero("end", end)
    positive("steps", steps)
    # 0 ** 0 is one: the formula does not hold at the end.
    return lambda step: end + (lr - end) * (1 - step / steps) ** power if step < steps else end


def warm_up(schedule: Schedule, steps: int) -> Schedule:
    """Return ``schedule``, scaled by 1 / steps, 2 / steps, ... during the first ``steps`` steps."""
    positive("steps", steps)
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)
