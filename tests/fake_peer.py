"""A system for the benchmarks that needs only NumPy, and fails in every way that one can."""

import os
import signal
import subprocess
import sys
import time

import numpy as np

VERSION = "1.5"
LOSSES = (0.9, 0.8, 0.7)


def settings(case, fault=""):
    if fault == "is slow":
        time.sleep(60)
    return f"as good as can be for {case}"


def use_threads(threads):
    print("chatter on stdout, and of", threads, "threads")


def step(problem, fault=""):
    if fault == "raises":
        raise ValueError("no such operator\nand a second line")
    if fault == "has a child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(os.environ["CHILD_FILE"], "w") as file:
            file.write(str(child.pid))
    calls = iter(range(10**9))

    def train():
        call = next(calls)
        print("more chatter")
        if fault == "dies":
            print("the last line\n", file=sys.stderr, flush=True)
            os._exit(3)
        if fault == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = LOSSES[min(call, 2)]
        if fault == "is NaN later" and call > 2:
            return float("nan")
        if call == 2:
            return {"is NaN": float("nan"), "is zero": 0.0, "is off": 1.001 * loss}.get(fault, loss)
        return loss

    return train


def infer(problem, fault=""):
    shape = (*problem.labels.shape, 4) if fault != "has another shape" else problem.labels.shape
    result = np.full(shape, 0.25, np.float32)
    if fault == "is off":
        result.flat[-1] *= 1.01
    return lambda: result


def to_array(result):
    return result


def convolution(src, weights, diff_dst):
    """Zeros: wrong."""
    zeros = {"forward": diff_dst, "backward_data": src, "backward_weights": weights}
    return {
        name: (lambda array=array: np.zeros_like(array), lambda array: array) for name, array in zeros.items()
    }
