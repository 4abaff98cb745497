"""``python -m kernels.workbench FILE``: check a student's kernel, time it, list its hot loop."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kernels.workbench import assembly, student
from kernels.workbench.timing import measure
from kernels.workbench.trials import PASSES, Trial, arrays, call
from kernels.workbench.verdict import Failure, check

_SIZE = 32
# Read when NumPy is loaded: its BLAS, too, is to run on one core.
_ONE = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "MKL", "OMP")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code: 0 if all is right, 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.workbench",
        description="Check a convolution against its definition in float64, on shapes drawn anew each time; "
        "say what is wrong first and why; time it among the rungs of the ladder.",
    )
    parser.add_argument(
        "file", type=Path, help=f"a Python file that defines one or more of {', '.join(PASSES)}"
    )
    parser.add_argument("--check", action="store_true", help="check only, do not time")
    parser.add_argument("--asm", action="store_true", help="list the hot loop in assembly, marked")
    options = parser.parse_args(arguments)
    try:
        with student.guarded():
            for name, function in student.passes(student.load(options.file)).items():
                check(function, name)
                print(f"{name}: right on every case", flush=True)
                if not options.check:
                    print(f"\n{measure(function, name, options.file.stem, _SIZE).text()}\n", flush=True)
                if options.asm:
                    printed = assembly.assembly_of("kernels.workbench", [str(options.file.resolve()), name])
                    print(f"{assembly.report(options.file.stem, printed)}\n")
    except (Failure, RuntimeError) as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def run_once(path: str, name: str) -> None:
    """Call a pass once: the process that prints the assembly."""
    trial = Trial((1, 8, _SIZE, _SIZE, 16), (16, 16, 3, 3, 3), name=name)
    call(student.passes(student.load(path))[name], trial, arrays(trial))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("["):
        run_once(*json.loads(sys.argv[1]))
    elif not _ONE.keys() <= os.environ.keys():
        os.execve(
            sys.executable, [sys.executable, "-m", "kernels.workbench", *sys.argv[1:]], os.environ | _ONE
        )
    else:
        sys.exit(main())
