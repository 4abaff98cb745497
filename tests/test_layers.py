"""Imports point down: read from the syntax trees, so that imports inside functions count too."""

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from kernels.base import compiled_files

ROOT = Path(__file__).parents[1]

# A line may import what stands above it, and parts of its own package; not what stands beside it.
# The name of a package alone is its __init__.
KERNELS = """
    base
    kernels
    ladder
    deferred
    conv3d
    ops
    workbench
"""
TINYUNET = """
    common
    local_ranks schedules tape
    autograd
    functional testing
    module
    nn
    unet
    losses
    flat_buffers
    optim
    compiler
    tinyunet
    data
    parallel
    segmentation
    viz interop
    commandline
    training
    benchmarks
    bench evaluate graph export plan predict train view workbench
"""
LAYERS = {"kernels": KERNELS, "tinyunet": TINYUNET}


def sources() -> dict[str, str]:
    """Dotted name and text of every module of both packages."""
    found = {}
    for package in LAYERS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text()
    return found


def file_of(module: str) -> Path:
    """Where a module is."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if (path / "__init__.py").exists() else path.with_suffix(".py")


def imported(source: str, modules: Iterable[str]) -> Iterator[str]:
    """Names of what a module imports: ``from a.b import c`` is a.b.c if that is a module, else a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full: from tinyunet.nn import ..."
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else str(node.module)


def when_run(source: str) -> str:
    """Source without the imports that only a type checker sees."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return ast.unparse(tree)


def layer_of(module: str) -> int:
    """Line of a module in its package's list; a ``__main__`` is a command line, on top of all."""
    package, _, rest = module.partition(".")
    part = rest.split(".")[0] or package
    lines = LAYERS[package].strip().splitlines()
    if module.endswith(".__main__"):
        return len(lines)
    for number, line in enumerate(lines):
        if part in line.split():
            return number
    raise AssertionError(f"{module} has no place in the layers of {Path(__file__).name}")


def violations(name: str, source: str, modules: Iterable[str]) -> list[str]:
    """Imports of a module that do not point down."""
    found = []
    package, place = name.split(".")[0], name.split(".")[:2]
    for target in imported(source, modules):
        target_package, target_place = target.split(".")[0], target.split(".")[:2]
        if target_package not in LAYERS or (target_place == place and "__main__" not in target):
            continue
        not_below = package == target_package and layer_of(target) >= layer_of(name)
        if not_below or (package == "kernels" and target_package == "tinyunet"):
            found.append(f"{name} imports {target}")
    return found


def test_every_module_has_a_place():
    for name in sources():
        layer_of(name)


def test_imports_point_down():
    modules = sources()
    found = [line for name, source in modules.items() for line in violations(name, source, modules)]
    assert found == []


def test_stamps_of_compiled_kernels_miss_no_import():
    """`compiled_files` reads imports by a pattern, once at each start; Python's own parser is slow."""
    modules = sources()
    for name, source in modules.items():
        if name.startswith("kernels."):
            followed = compiled_files._read(file_of(name), ROOT / "kernels")[1]
            targets = [t for t in imported(when_run(source), modules) if t.startswith("kernels.")]
            assert {file_of(target) for target in targets} <= set(followed), name


def test_no_module_imports_itself_through_others():
    modules = sources()
    graph = {
        name: {target for target in imported(source, modules) if target in modules}
        for name, source in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_kernels_need_numpy_and_numba_only():
    usual = {"kernels", "numpy", "numba", "llvmlite", *sys.stdlib_module_names}
    modules = sources()
    for name, source in modules.items():
        if name.split(".")[0] == "kernels":
            # The workbench draws shapes with hypothesis; no other module imports it.
            allowed = usual | ({"hypothesis"} if name.startswith("kernels.workbench") else set())
            needed = {target.split(".")[0] for target in imported(source, modules)}
            assert needed <= allowed, f"{name} imports {needed - allowed}"


def evaluated(source: str) -> list[str]:
    """Uses of exec and eval, also under another name; ``model.eval()`` is something else."""
    return [
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and node.id in {"exec", "eval"}
    ]


def test_nothing_is_executed_from_text():
    for name, source in sources().items():
        assert evaluated(source) == [], name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.base.layout", "from tinyunet.nn import Module"),
        ("kernels.base.simd", "from kernels.conv3d import direct"),
        ("kernels.conv3d.read", "import kernels.ops.concat"),
        ("tinyunet.autograd", "def late():\n    from tinyunet import functional"),
        ("tinyunet.nn", "import tinyunet.unet"),
        ("tinyunet.losses", "from tinyunet import UNet"),
        ("tinyunet.train", "from tinyunet.bench import main"),
        ("tinyunet.training.loop", "from tinyunet.train import main"),
        ("tinyunet.compiler.ir", "from tinyunet.graph import main"),
    ],
)
def test_the_check_finds_an_arrow_up(module, source):
    assert len(violations(module, source, sources())) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.conv3d.operator", "from kernels.ladder import direct"),
        ("tinyunet.unet", "import kernels.conv3d\nfrom tinyunet.nn import Module"),
        ("tinyunet.train", "from tinyunet.training.run import train\nimport numpy.typing as npt"),
    ],
)
def test_the_check_lets_an_arrow_down_pass(module, source):
    assert violations(module, source, sources()) == []


def test_the_check_finds_exec():
    assert set(evaluated("exec('1'); f = eval; model.eval()")) == {"exec", "eval"}
