"""One file a system: how it builds the U-Net, trains it, predicts with it.

Each is written as a careful user of that system would write it, and has

    VERSION                  of the system
    settings(case, ...)      the settings chosen for speed, as the table shows them; ours has none
    use_threads(threads)     called first
    step(problem, ...)       returns a function that does one training step and returns the loss
    infer(problem, ...)      returns a function that returns probabilities, as the system has them
    to_array(probabilities)  makes them an array, NDHWC
    convolution(src, weights, diff_dst, ...)    see ``Convolution``; stride 1, padding "same"

as far as the system can. Input, labels and weights are brought into the system's own layout
beforehand, which does not count.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: For each direction a function to time, and one that makes its result an array in our layout.
Convolution: TypeAlias = dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]


def channels_second(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """NDHWC -> NCDHW."""
    return np.ascontiguousarray(array.transpose(0, 4, 1, 2, 3))


def channels_last(array: Any) -> NDArray[np.float32]:
    """NCDHW -> NDHWC."""
    return np.ascontiguousarray(np.asarray(array).transpose(0, 2, 3, 4, 1))
