"""The student's file: how it is loaded, and the guard that it calls no kernel of the library.

The guard replaces the passes of every rung, and of the product's convolution, before the file is loaded: a
name that the file imports is then the guard's. `kernels.base` (vectors, tiles, layouts) may be used.
"""

import ast
import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from kernels import conv3d
from kernels.conv3d import operator
from kernels.workbench.lessons import RUNGS
from kernels.workbench.trials import PASSES
from kernels.workbench.verdict import Failure

_GUARDED = (*RUNGS.values(), conv3d, operator)
#: What a file may define.
EXPECTED = f"{', '.join(PASSES)}, operator, allreduce, rewrite"
_OURS = ("kernels", "tinyunet", "examples", "importlib", "runpy")  # and what would import them unseen
_EXPECTED_LOOPS = "expected loops of your own, NumPy or Numba"
_LIBRARIES = ("torch", "tensorflow", "jax", "scipy", "onnxruntime", "openvino", "tinyunet")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Let each pass of the library raise Failure inside the block."""
    with contextlib.ExitStack() as stack:
        for module in _GUARDED:
            for name in PASSES:
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, _refuse(f"{module.__name__}.{name}")))
        yield


def _refuse(name: str) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        raise Failure(f"your file calls {name}; write the loops yourself (kernels.base may be used)")

    return refused


def load_own(path: Path) -> ModuleType:
    """Load a file; Failure if it imports ours (`kernels.base.simd` may be), also inside a function."""
    for line, name in _imports(path):
        if name.split(".")[0] in _OURS and not name.startswith("kernels.base.simd"):
            raise Failure(f"{path}, line {line}: uses {name}; {_EXPECTED_LOOPS}")
    return load(path)


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of what a file imports; nothing if it cannot be read, which `load` reports."""
    with contextlib.suppress(OSError, ValueError, SyntaxError):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def load(path: Path | str, refused: tuple[str, ...] = _LIBRARIES) -> ModuleType:
    """Run a file as a module; Failure, of one line, if it cannot be, or uses one of the refused libraries."""
    path = Path(path)
    if not path.is_file():
        raise Failure(f"{path}: no such file; expected a Python file that defines {EXPECTED}")
    spec = importlib.util.spec_from_file_location("student_" + path.stem, path)
    if spec is None or spec.loader is None:
        raise Failure(f"{path}: is no Python file; expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Numba's cache asks for it
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Failure(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise Failure(f"{path}, line {place.lineno}: {type(error).__name__}: {error}") from None
    for line, name in _imports(path):
        if (library := name.partition(".")[0]) in refused:
            raise Failure(f"{path}, line {line}: uses {library}; {_EXPECTED_LOOPS}")
    return module


def passes(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the passes that a file defines; Failure if there is none."""
    found = {name: getattr(module, name) for name in PASSES if callable(getattr(module, name, None))}
    if not found:
        raise Failure(f"{module.__file__}: defines none of {EXPECTED}")
    return found
