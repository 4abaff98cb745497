"""``python -m examples.exercises``: list, start, hint and check."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.exercises.catalogue import EXERCISES
from examples.exercises.frame import Exercise, Progress, stub
from kernels.workbench import roofline
from kernels.workbench.verdict import Failure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code: 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.exercises", description="Exercises with a checker that says what is wrong."
    )
    parser.add_argument("action", nargs="?", choices=("list", "start", "hint", "check"), default="list")
    parser.add_argument("name", nargs="?", choices=[*EXERCISES], help="of an exercise")
    parser.add_argument("file", nargs="?", type=Path, help="to check (default: FOLDER/NAME.py)")
    parser.add_argument("--folder", type=Path, default=Path("my_kernels"), help="yours (default: my_kernels)")
    options = parser.parse_args(arguments)
    if options.action != "list" and options.name is None:
        parser.error(f"{options.action}: expected the name of an exercise: {', '.join(EXERCISES)}")
    if options.file and options.action != "check":
        parser.error(f"{options.action} takes no file; only check does")
    try:
        progress = Progress(options.folder)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    if options.action == "list":
        print(listed(progress))
        return 0
    exercise = EXERCISES[options.name]
    if options.action == "check":
        return check(exercise, options.file or options.folder / f"{exercise.name}.py", progress)
    return {"start": start, "hint": hint}[options.action](exercise, options.folder, progress)


def listed(progress: Progress) -> str:
    """Return a line for each exercise."""
    lines = []
    for name, exercise in EXERCISES.items():
        done = progress.content.get(name, {}).get("solved", "")
        lines.append(f"{'x' if done else ' '} {name:<14}{exercise.title}")
    roofs = progress.content.get("machine", {})
    for when, roof in roofs.items():
        lines.append(
            f"  your machine {when}: {roof['gflops']:.0f} GFLOP/s, {roof['gbytes']:.1f} GB/s of one core"
        )
    return "\n".join(lines)


def start(exercise: Exercise, folder: Path, progress: Progress) -> int:
    """Put the stub into the student's folder, unless a file is there."""
    path = folder / f"{exercise.name}.py"
    if path.exists():
        print(f"{path} is there already; remove it to start anew", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(stub(exercise.solution))
    if "before" not in progress.content.get("machine", {}):
        progress.note("machine", before=_machine())
    print(f"{path}: {exercise.title}\nread first: {exercise.read}")
    return 0


def hint(exercise: Exercise, folder: Path, progress: Progress) -> int:
    """Open the next hint, and show those that are open."""
    opened = min(progress.hints(exercise.name) + 1, len(exercise.hints))
    folder.mkdir(parents=True, exist_ok=True)
    progress.note(exercise.name, hints=opened)
    for number, text in enumerate(exercise.hints[:opened], 1):
        print(f"hint {number} of {len(exercise.hints)}: {text}")
    return 0


def check(exercise: Exercise, path: Path, progress: Progress) -> int:
    """Check the student's file, then time it; keep what was reached."""
    try:
        with exercise.opened(path) as module:
            exercise.check(module)
            print(f"{path}: right")
            race = exercise.compete(module)
    except Failure as failure:
        print(f"{exercise.name}: {failure}", file=sys.stderr)
        return 1
    print(race.text())
    progress.note(exercise.name, solved=time.strftime("%Y-%m-%d"), ratio=round(race.ratio, 3), goal=race.goal)
    progress.note("machine", now=_machine())
    return 0


def _machine() -> dict[str, float]:
    return {"gflops": round(roofline.peak_gflops(), 1), "gbytes": round(roofline.copy_bandwidth(), 1)}


if __name__ == "__main__":
    # Read when NumPy is loaded: its BLAS, too, is to run on one core, as the kernels here do.
    one = {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "MKL", "OMP")}
    if not one.keys() <= os.environ.keys():
        os.execve(
            sys.executable, [sys.executable, "-m", "examples.exercises", *sys.argv[1:]], os.environ | one
        )
    sys.exit(main())
