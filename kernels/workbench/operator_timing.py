"""A student's operator beside a copy of as many bytes: time on fresh numbers, and what would be faster."""

import time
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np

from kernels.base import machine
from kernels.base.arguments import Array
from kernels.workbench import roofline
from kernels.workbench.definitions import parameters
from kernels.workbench.operator_verdict import Operator, Trial, wrong
from kernels.workbench.verdict import Failure

_TIMED = (1, 64, 64, 64, 16)
_RUNS = 7


class Measured(NamedTuple):
    """Milliseconds of a function of an operator, of its definition, and of a copy of the same bytes."""

    name: str
    ms: dict[str, float]
    nbytes: int
    mine: str

    def text(self) -> str:
        """Return the table, the roofline, and what would be faster."""
        width = max(map(len, self.ms))
        shape = f"{_TIMED[0]} image of {' x '.join(map(str, _TIMED[1:4]))} voxels, {_TIMED[4]} channels"
        lines = [f"{self.name}, {shape}, one core", "", f"{'':{width}s}         ms      GB/s   of a copy"]
        copy = self.ms["a copy"]
        for name, ms in sorted(self.ms.items(), key=lambda pair: -pair[1]):
            mark = "   <- yours" * (name == self.mine)
            lines.append(f"{name:{width}s} {ms:10.3g} {self.nbytes / ms / 1e6:9.3g} {copy / ms:11.0%}{mark}")
        ms, elements = self.ms[self.mine], int(np.prod(_TIMED))
        intensity, bandwidth = elements / self.nbytes, self.nbytes / copy / 1e6
        drawn = self.mine, intensity, elements / ms / 1e6, roofline.peak_gflops(), bandwidth
        words = (
            f"Memory limits such an operator: it does about one operation for {self.nbytes // elements} "
            f"bytes. Yours takes as long as {ms / copy:.1f} passes over its tensors."
        )
        if ms > 1.5 * copy:
            words += (
                " Each expression of NumPy reads and writes whole tensors; a loop of Numba does all in one "
                "pass. A loop that is slower than a copy computes too long: does it use vectors (--asm)?"
            )
        else:
            words += " What is faster still is no pass at all: fused into the kernel before or after it."
        return "\n".join([*lines, "", roofline.picture(*drawn), "", *wrap(words, 100)])


def measure(operator: Operator, name: str = "forward", label: str = "yours") -> Measured:
    """Time forward or backward of an operator on fresh numbers in each run, beside a copy of the same bytes.

    Failure if the last result is wrong, or the time is less than half of the copy's.
    """
    names = parameters(operator.definition)
    function = operator.forward if name == "forward" else operator.backward
    if function is None:
        raise Failure(f"{operator.name}: there is no {name} to time")
    random = np.random.default_rng()
    arrays = [random.uniform(0.5, 1.5, _TIMED[-1]).astype(np.float32) for _ in names[1:]]
    volumes = [np.empty(_TIMED, np.float32) for _ in range(1 if name == "forward" else 2)]
    inputs = [*volumes, *arrays]
    nbytes = (len(volumes) + 1) * volumes[0].nbytes
    source = np.ones(nbytes // 8, np.float32)
    target, times = np.empty_like(source), dict[str, list[float]]()
    result, threads = None, machine.threads()
    machine.set_threads(1)
    try:
        for _ in range(_RUNS):
            for volume in volumes:
                random.standard_normal(out=volume, dtype=np.float32)
            times.setdefault("a copy", []).append(_seconds(lambda: np.copyto(target, source))[0])
            if name == "forward":
                times.setdefault("its definition in NumPy", []).append(
                    _seconds(lambda: operator.definition(*inputs))[0]
                )
            seconds, result = _seconds(lambda: function(*inputs))
            times.setdefault(label, []).append(seconds)
    finally:
        machine.set_threads(threads)
    ms = {key: 1e3 * min(values[1:]) for key, values in times.items()}  # the first call compiles
    _check_last(operator, name, inputs, result)
    if ms[label] < 0.5 * ms["a copy"]:
        raise Failure(
            f"{name} of {operator.name}: {ms[label]:.3g} ms cannot be: a copy of as many bytes takes "
            f"{ms['a copy']:.3g} ms; is the work done at all?"
        )
    return Measured(f"{name} of {operator.name}", ms, nbytes, label)


def _seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _check_last(operator: Operator, name: str, inputs: Sequence[Array], result: Any) -> None:
    """Check what the last timed run returned: of backward by a difference along one direction."""
    *_, diff_dst = inputs[:1]
    exact = [array.astype(np.float64) for array in (inputs if name == "forward" else inputs[1:])]
    if name == "forward":
        right = not wrong(np.asarray(result), operator.definition(*exact), Trial(_TIMED)).any()
    else:
        first = result[0] if isinstance(result, tuple | list) else result
        direction = np.random.default_rng().standard_normal(_TIMED)
        step = 5e-6
        ends = [operator.definition(exact[0] + h * direction, *exact[1:]) for h in (step, -step)]
        slope = float(np.vdot(diff_dst, ends[0] - ends[1])) / (2 * step)
        scale = float(np.linalg.norm(np.asarray(first))) or 1.0
        right = abs(slope - float(np.vdot(first, direction))) < 1e-2 * scale
    if not right:
        raise Failure(
            f"{name} of {operator.name}: the last result of the timed runs is wrong; every call must compute"
        )
