"""Compiled kernels on disk, and what is only linked into them."""

import contextlib
import hashlib
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest
from numba.core import caching

from kernels.base import jit as compiler
from kernels.base.compiled_files import stamp

MODULE = """
from kernels.base.jit import kernel

def make(addend):
    @kernel
    def add(x):
        return x + addend
    return add
"""
COMPILE = "import sys, many; [many.make(i)(1) for i in range(int(sys.argv[1]), 40, 2)]"
LOAD = """
import many
for i in range(40):
    add = many.make(i)
    assert add(1) == 1 + i
    assert sum(add.stats.cache_hits.values()) == 1, i
"""


def test_two_processes_share_a_cache(tmp_path):
    (tmp_path / "many.py").write_text(MODULE)

    def run(program, *arguments):
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    for process in [run(COMPILE, "0"), run(COMPILE, "1")]:
        assert process.wait() == 0, process.stderr.read()
    process = run(LOAD)
    assert process.wait() == 0, process.stderr.read()


THREADS = """
import threading, numba, numpy as np
from kernels.base import arrays
from kernels.ops import activation
src, right, together = np.arange(-4096, 4096, dtype=np.float32), [], threading.Barrier(4)

def run():
    together.wait()
    for _ in range(200):
        copied = np.empty_like(src)
        arrays.copy(src, copied)
        right.append((activation.forward(copied, activation.RELU) == np.maximum(src, 0)).all())

threads = [threading.Thread(target=run) for _ in range(4)]
for each in threads: each.start()
for each in threads: each.join()
print(numba.threading_layer(), sum(right))
"""


def test_threads_may_run_kernels_at_once_also_on_workqueue():
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue"}
    command = [sys.executable, "-c", THREADS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.stdout == "workqueue 800\n", run.stderr


def test_where_no_cache_can_be_written_one_line_says_so(monkeypatch):
    def no_cache(**flags):
        def decorate(function):
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")

        return decorate

    monkeypatch.setattr(compiler.numba, "njit", no_cache)
    with pytest.raises(PermissionError, match=r"set NUMBA_CACHE_DIR to a folder") as caught:
        compiler.kernel(stamp_of_one)
    assert caught.value.filename == __file__


SOURCES = {
    "kernels/one.py": "import math\nfrom kernels.two import (\n    a,\n    b,\n)\n",
    "kernels/two.py": "from kernels.deep import three\n",
    "kernels/deep/__init__.py": "",
    "kernels/deep/three.py": "import kernels.one\n",
    "kernels/other.py": "from kernels import one\n",
}


def stamp_of_one(folder: Path, changed: str | None) -> bytes:
    """Stamp of ``kernels/one.py`` where one of the sources is another."""
    for name, text in SOURCES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "# changed\n" * (name == changed))
    return stamp(folder / "kernels/one.py", folder / "kernels")


@pytest.mark.parametrize("changed", SOURCES)
def test_a_stamp_is_of_all_that_a_file_imports(changed, tmp_path):
    before = stamp_of_one(tmp_path / "before", None)
    assert stamp_of_one(tmp_path / "again", None) == before
    after = stamp_of_one(tmp_path / "after", changed)
    assert (after == before) == (changed == "kernels/other.py")


def test_a_kernel_is_compiled_anew_when_an_imported_function_changes(tmp_path):
    """A copy of the package, in which a function that a kernel of another module calls returns another."""
    root = Path(__file__).parents[2] / "kernels"
    package = tmp_path / "kernels"
    shutil.copytree(root / "base", package / "base", ignore=shutil.ignore_patterns("*.nb?", "__pycache__"))
    shutil.copy(root / "__init__.py", package)
    (package / "caller.py").write_text(
        "from kernels.callee import value\nfrom kernels.base.jit import kernel\n\n"
        "@kernel\ndef call():\n    return value()\n"
    )
    callee = "from kernels.base.jit import kernel\n\n@kernel\ndef value():\n    return {}\n"
    program = "from kernels.caller import call; print(call(), sum(call.stats.cache_hits.values()))"
    for number, expected in ((1, "1 0"), (1, "1 1"), (2, "2 0")):
        (package / "callee.py").write_text(callee.format(number))
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == expected


def make_add(addend):
    def add(x):
        return x + addend

    return add


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for compiled kernels."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def add_in_new_process(addend: int) -> tuple[int, bool]:
    """1 + addend, and whether the kernel was found on disk: nothing that was loaded before is used."""
    add = compiler.kernel(make_add(addend))
    return add(1), sum(add.stats.cache_hits.values()) == 1


def the_file(folder: Path, suffix: str) -> Path:
    (found,) = folder.rglob(f"*{suffix}")
    return found


DAMAGES = {
    "missing": lambda path, content: path.unlink(),
    "empty": lambda path, content: path.write_bytes(b""),
    "one byte": lambda path, content: path.write_bytes(content[:1]),
    "half": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "one byte less": lambda path, content: path.write_bytes(content[:-1]),
    "one byte more": lambda path, content: path.write_bytes(content + b"0"),
    "zeros": lambda path, content: path.write_bytes(bytes(len(content))),
    "random": lambda path, content: path.write_bytes(random.Random(0).randbytes(len(content))),
    "text": lambda path, content: path.write_text("no such thing\n"),
    "pickled None": lambda path, content: path.write_bytes(pickle.dumps(None)),
    "pickled dict": lambda path, content: path.write_bytes(pickle.dumps({"a": 1})),
    "an index of Numba's": lambda path, content: path.write_bytes(
        pickle.dumps(numba.__version__) + pickle.dumps(("stamp", {}))
    ),
    "pickled, unknown module": lambda path, content: path.write_bytes(checked(b"cno\nmodule\n.")),
    "checked, not a tuple": lambda path, content: path.write_bytes(checked(pickle.dumps(3))),
    "checked, of another length": lambda path, content: path.write_bytes(checked(pickle.dumps((1,)))),
    "a link to nothing": lambda path, content: (path.unlink(), path.symlink_to("nowhere")),
    "a link to itself": lambda path, content: (path.unlink(), path.symlink_to(path.name)),
}


def checked(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_compiled_again_and_replaced(kind, suffix, cache):
    assert add_in_new_process(2) == (3, False)
    assert add_in_new_process(2) == (3, True)
    path = the_file(cache, suffix)
    DAMAGES[kind](path, path.read_bytes())
    assert add_in_new_process(2) == (3, False)
    assert add_in_new_process(2) == (3, True)
    assert the_file(cache, suffix).is_file()


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_no_changed_byte_is_run(suffix, cache):
    add_in_new_process(2)
    generator = random.Random(1)
    for _ in range(25):
        path = the_file(cache, suffix)
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        assert add_in_new_process(2) == (3, False)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc", ".lock"])
def test_a_file_without_permission_is_replaced(suffix, monkeypatch):
    with tempfile.TemporaryDirectory() as folder, ordinary_user(folder):
        monkeypatch.setattr(numba.config, "CACHE_DIR", folder)
        assert add_in_new_process(2) == (3, False)
        the_file(Path(folder), suffix).chmod(0)
        assert add_in_new_process(2) == (3, suffix == ".lock")
        assert add_in_new_process(4) == (5, False)
        assert add_in_new_process(2) == (3, True)


@contextlib.contextmanager
def ordinary_user(folder: str) -> Iterator[None]:
    """Root may read everything: be somebody else meanwhile, who owns the folder."""
    me = os.geteuid()
    if me == 0:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


def test_code_of_another_kernel_is_not_run(cache):
    """As when a process is killed after it has written the index, and the file of code is an older one."""
    assert add_in_new_process(2) == (3, False)
    assert add_in_new_process(3) == (4, False)
    first, second = sorted(cache.rglob("*.nbc"))
    second.write_bytes(first.read_bytes())
    assert add_in_new_process(3) == (4, False)
    assert add_in_new_process(2) == (3, True)


OTHER_VERSION = """
import sys
import numba
from numba.core import caching

usual, version, part = caching.IndexDataCacheFile, *sys.argv[1:]
numba.__version__ = version
if part:
    delattr(caching, part)

from many import make

add = make(2)
print(add(1), caching.IndexDataCacheFile is usual, sum(add.stats.cache_hits.values()))
"""


@pytest.mark.parametrize(
    ("version", "missing", "is_usual"),
    [
        (numba.__version__, "", False),
        ("0.61.0", "", False),
        ("0.60.2", "", True),
        ("0.99.0dev0+12.g1", "", True),
        (numba.__version__, "_SourceFileBackedLocatorMixin", True),
    ],
)
def test_another_version_of_numba_caches_as_it_does(version, missing, is_usual, tmp_path):
    """As it comes, or with the private part missing: no error, and what is compiled is found again."""
    (tmp_path / "many.py").write_text(MODULE)
    command = [sys.executable, "-c", OTHER_VERSION, version, missing]
    for hits in (0, 1):
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.stdout == f"3 {is_usual} {hits}\n", run.stderr


def test_a_folder_of_kernels_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_index", full)
    file = caching.IndexDataCacheFile(str(tmp_path), "some", b"stamp")
    with pytest.raises(OSError, match="No space left on device") as raised:
        file.save("key", b"code")
    assert raised.value.filename == str(tmp_path)


SPECIALISED = """
import sys

from kernels.base.jit import compile_time, kernel, specialised

@compile_time
def literal(number):  # constants only
    return number

@specialised
def scaled(x, factor):
    return x * literal(factor)

@specialised
def shifted(x, factor):
    return scaled(x, factor) + 1

@kernel
def call(x):
    return shifted(x, 2), shifted(x, 3), scaled(x, 2)

assert call(5) == (11, 16, 10)
assert call(0.5) == (2.0, 2.5, 1.0)
assert sum(getattr(call.stats, sys.argv[1]).values()) == 2
"""


def test_a_specialised_function_has_code_for_each_type_and_constant(tmp_path):
    """In a process that compiles its caller, and in one that finds it on disk."""
    (tmp_path / "parts.py").write_text(SPECIALISED)
    for counted in ("cache_misses", "cache_hits"):
        command = [sys.executable, "-c", "import parts", counted]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


CONSTANTS = """
import sys

from kernels.base.jit import compile_time, kernel, specialised

@compile_time
def sizes(shape, by):
    high, wide = shape
    return (high * by, wide), high + wide

@compile_time
def literal(number):  # constants only
    return number

@specialised
def repeated(x, count, high):
    (rows, _), total = sizes((high, 3), count)
    more = total
    return scaled(x, rows) + scaled(x, more)

@specialised
def scaled(x, factor):
    return x * literal(factor)

def make(high):
    @kernel
    def call(x, count):
        return repeated(x, 2, high)
    return call

assert sizes((2, 3), 4) == ((8, 3), 5)
assert make(2)(10, 3) == 40 + 50
assert make(3)(10, 3) == 60 + 60
assert make(3)(0.5, 3) == 3.0 + 3.0
"""


def test_constants_pass_through_specialised_functions_and_those_of_compile_time(tmp_path):
    (tmp_path / "constants.py").write_text(CONSTANTS)
    for _ in range(2):  # compiled, and found on disk
        command = [sys.executable, "-c", "import constants"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


NO_CONSTANT = """
from kernels.base.jit import compile_time, kernel, specialised

@compile_time
def double(count):
    return 2 * count

@specialised
def twice(x, count):
    return x * double(count)

@kernel
def call(x, count):
    return twice(x, count)

call(1, 2)
"""


def test_what_is_no_constant_is_refused_when_a_kernel_is_compiled(tmp_path):
    (tmp_path / "no_constant.py").write_text(NO_CONSTANT)
    command = [sys.executable, "-c", "import no_constant"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "TypingError" in run.stderr
    assert "double" in run.stderr
