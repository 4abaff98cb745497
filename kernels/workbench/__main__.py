"""``python -m kernels.workbench FILE``: check what a student has written, time it, list its hot loop."""

import argparse
import ast
import contextlib
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from kernels.workbench import allreduce, assembly, operator_timing, operator_verdict, student
from kernels.workbench.definitions import parameters
from kernels.workbench.timing import measure
from kernels.workbench.trials import Trial, arrays, call
from kernels.workbench.verdict import Failure, check

_SIZE = 32
_RANKS = 16  # each has a copy of the file's globals, as processes have
# Read when NumPy is loaded: its BLAS, too, is to run on one core.
_ONE = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "MKL", "OMP")}
_EPILOG = """the file defines one of
  forward, backward_data, backward_weights   a convolution: forward(src, weights)
  operator = "elu", forward, backward        an operator: forward(src), backward(diff_dst, src)
  allreduce(array, ranks)                    a sum over ranks, with the methods of mpi4py
  rewrite(graph, options)                    a pass of the compiler (python -m tinyunet.workbench)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code: 0 if all is right, 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.workbench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check a kernel, an operator, an allreduce or a pass of the compiler against its\n"
        "definition, on data drawn anew each time; say what is wrong first and why; then time it.",
        epilog=_EPILOG,
    )
    parser.add_argument("file", type=Path, help="your Python file")
    parser.add_argument("--check", action="store_true", help="check only, do not time")
    parser.add_argument("--asm", action="store_true", help="list the hot loop in assembly, marked")
    options = parser.parse_args(arguments)
    names = _defined(options.file)
    try:
        if "rewrite" in names:
            return _of_compiler(options.file, options.check)
        judge = _operator if "operator" in names else _allreduce if "allreduce" in names else _convolution
        judge(options.file, options)
    except (Failure, RuntimeError) as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def _defined(path: Path) -> set[str]:
    """Return the names that a file defines, without running it; none if it cannot be read."""
    names = set[str]()
    with contextlib.suppress(OSError, ValueError, SyntaxError):
        for node in ast.parse(path.read_text()).body:
            names |= {node.name} if isinstance(node, ast.FunctionDef) else set()
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _of_compiler(path: Path, only_check: bool) -> int:
    """Hand a file over to the workbench of the compiler, which kernels know nothing of: by its command."""
    before, sys.argv = sys.argv, ["tinyunet.workbench", str(path), *["--check"] * only_check]
    try:
        runpy.run_module("tinyunet.workbench", run_name="__main__")
    except SystemExit as end:
        return int(bool(end.code))
    finally:
        sys.argv = before
    return 0


def _convolution(path: Path, options: argparse.Namespace) -> None:
    with student.guarded():
        for name, function in student.passes(student.load(path)).items():
            check(function, name)
            print(f"{name}: right on every case", flush=True)
            if not options.check:
                print(f"\n{measure(function, name, path.stem, _SIZE).text()}\n", flush=True)
            _list_loop(path, name, options)


def _operator(path: Path, options: argparse.Namespace) -> None:
    operator = operator_verdict.operator_of(student.load_own(path))
    operator_verdict.check(operator)
    names = ["forward"] + ["backward"] * (operator.backward is not None)
    for name in names:
        print(f"{name} of {operator.name}: right on every case", flush=True)
        if not options.check:
            print(f"\n{operator_timing.measure(operator, name, path.stem).text()}\n", flush=True)
        _list_loop(path, name, options)
    if operator.backward is None:
        print("There is no backward; backward(diff_dst, src, ...) would be checked by finite differences.")


def _allreduce(path: Path, options: argparse.Namespace) -> None:
    functions: list[Any] = [student.load_own(path).allreduce for _ in range(_RANKS)]
    remark = allreduce.check(functions)
    print("\n".join(wrap(f"allreduce: right on every case{', ' * bool(remark)}{remark}", 100)), flush=True)
    if not options.check:
        print(f"\n{allreduce.measure(functions, path.stem).text()}")


def _list_loop(path: Path, name: str, options: argparse.Namespace) -> None:
    """List the hot loop if asked; count its instructions whenever it is timed."""
    if options.check and not options.asm:
        return
    printed = assembly.assembly_of("kernels.workbench", [str(path.resolve()), name])
    if options.asm:
        print(f"{assembly.report(path.stem, printed)}\n", flush=True)
    elif loop := assembly.hot_loop(printed):
        print(f"The hot loop (--asm lists it): {loop.summary()}\n", flush=True)


def run_once(path: str, name: str) -> None:
    """Call a function once: the process that prints the assembly."""
    module = student.load(path)
    if hasattr(module, "operator"):
        operator = operator_verdict.operator_of(module)
        vectors = len(parameters(operator.definition)) - 1
        inputs, diff_dst = operator_verdict.Trial((1, 8, _SIZE, _SIZE, 16)).arrays(vectors)
        getattr(module, name)(*([diff_dst] * (name == "backward")), *inputs)
        return
    trial = Trial((1, 8, _SIZE, _SIZE, 16), (16, 16, 3, 3, 3), name=name)
    call(student.passes(module)[name], trial, arrays(trial))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("["):
        run_once(*json.loads(sys.argv[1]))
    elif not _ONE.keys() <= os.environ.keys():
        os.execve(
            sys.executable, [sys.executable, "-m", "kernels.workbench", *sys.argv[1:]], os.environ | _ONE
        )
    else:
        sys.exit(main())
