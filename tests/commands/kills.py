"""Kill a training again and again, resume it each time, and compare with one that was left alone.

    PYTHONPATH=tests python tests/commands/kills.py --kills 20 --ranks 2

A rank, any of them, gets SIGKILL at a time that is drawn anew each time: in the middle of a step, of a
validation, of writing a checkpoint. The weights in the end must have the same bits.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from launcher import MPIRUN

from tinyunet.data import phantom
from tinyunet.segmentation import checkpoint

OPTIONS = (
    *("--filters", "4", "--depth", "2", "--patch-size", "16"),
    *("--batch-size", "4", "--epochs", "3", "--checkpoint-every", "3"),
)


def start(dataset: Path, output: Path, ranks: int, steps: int) -> "subprocess.Popen[str]":
    """Begin a training of so many steps an epoch, or go on with the one that is there."""
    launcher = [str(MPIRUN), "-n", str(ranks)] if ranks > 1 else []
    options = [*OPTIONS, "--patches-per-case", str(steps), "--data-path", str(dataset)]
    where = ["--output", str(output), "--resume"]
    return subprocess.Popen(
        [*launcher, sys.executable, "-m", "tinyunet.train", *options, *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """Return the processes of the ranks: below the launcher, the Python programs."""
    found, below = list[int](), [process.pid]
    while below:
        pid = below.pop()
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if command[0] == os.fsencode(sys.executable):
                found.append(pid)
            below += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:  # it has ended meanwhile
            continue
    return found


def kill_once(process: "subprocess.Popen[str]", dice: random.Random) -> tuple[int, float]:
    """Kill a rank some time after the first step; return the code and the seconds until the end.

    A training that ends before is left alone.
    """
    assert process.stdout is not None
    text = ""
    while "epoch" not in text and (character := process.stdout.read(1)):
        text += character
    time.sleep(dice.uniform(0.0, 0.6))
    ranks = ranks_of(process)
    killed = time.monotonic()
    if ranks:
        os.kill(dice.choice(ranks), signal.SIGKILL)
    process.communicate(timeout=60)
    return process.returncode, time.monotonic() - killed


def compare(kills: int, ranks: int, seed: int, steps: int = 120) -> int:
    """Run both trainings; return how often one was killed.

    Raises
    ------
    AssertionError
        If they end differently.
    """
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        dataset = phantom.make_dataset(Path(folder) / "data", cases=6, shape=(20, 24, 17))
        outputs = Path(folder) / "undisturbed", Path(folder) / "killed"
        _, error = start(dataset, outputs[0], ranks, steps).communicate(timeout=120)
        assert not error, error
        done, code = 0, 1
        while code:
            process = start(dataset, outputs[1], ranks, steps)
            if done < kills:
                code, seconds = kill_once(process, dice)
                done += code != 0
                print(f"kill {done}: ended after {seconds:.2f} s with code {code}", flush=True)
                assert seconds < 20
            else:
                _, error = process.communicate(timeout=120)
                code = process.returncode
                assert not code, error
        expected, found = (checkpoint.load(next(output.glob("*/latest.npz"))) for output in outputs)
    assert found.state["history"][-1]["loss"] == expected.state["history"][-1]["loss"]
    for name, array in expected.model.items():
        np.testing.assert_array_equal(found.model[name], array, err_msg=name)
    for name, array in expected.optimizer.items():
        np.testing.assert_array_equal(found.optimizer[name], array, err_msg=name)
    return done


def main() -> None:
    """Read the options, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120, help="of an epoch; there are three")
    options = parser.parse_args()
    done = compare(options.kills, options.ranks, options.seed, options.steps)
    print(f"killed {done} times, resumed {done} times: every weight has the same bits")


if __name__ == "__main__":
    main()
