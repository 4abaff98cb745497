"""The register tile: a convolution, in the words of the workbench."""

from types import ModuleType

from examples.exercises.frame import NAIVE, Race, function_of, race, random
from kernels.workbench import verdict


def check(module: ModuleType) -> None:
    """Check the convolution as the workbench does."""
    verdict.check(function_of(module, "forward"), "forward", examples=15)


def compete(module: ModuleType) -> Race:
    """Compare with seven loops."""
    fresh = lambda: (random(1, 8, 16, 16, 16), random(16, 16, 3, 3, 3))  # noqa: E731
    return race("faster than seven loops", module.forward, NAIVE, fresh, 6)
