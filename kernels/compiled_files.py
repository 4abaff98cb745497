"""Compiled kernels on disk: when one is out of date, and who may write.

Numba keeps machine code beside its source, and compiles anew when that file changes. But code from the
modules that it imports is inside, too: a kernel would go on calling a function with the arguments of last
week. So here a file's stamp is of all of its package that it imports, directly or not::

    stamp(convolution.py) = SHA-256 of convolution.py, slab.py, transform.py, simd.py, ...
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core import caching

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

_ROOT = Path(__file__).resolve().parent
_IMPORT = r"^(?:from|import) ({}[\w.]*)(?: import (\([^)]*\)|.*))?"


@functools.cache
def stamp(file: Path, package: Path) -> bytes:
    """Hash of a source file and of the modules of a package that it imports, directly or not.

    Parameters
    ----------
    file : Path
    package : Path
        Folder of the package. Its modules are imported by their full names, at the start of a line.
    """
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += _read(one, package)[1]
    digests = sorted(_read(one, package)[0] for one in found)
    return hashlib.sha256(b"".join(digests)).digest()


@functools.cache
def _read(file: Path, package: Path) -> tuple[bytes, tuple[Path, ...]]:
    """Hash of a file, and the modules of the package that it names."""
    text = file.read_bytes()
    names: set[str] = set()
    imports = re.finditer(_IMPORT.format(package.name), text.decode(), re.MULTILINE)
    for module, imported in (match.groups() for match in imports):
        names |= {module, *(f"{module}.{name}" for name in re.findall(r"\w+", imported or ""))}
    paths = [package.parent.joinpath(*name.split(".")) for name in names]
    candidates = [c for path in paths for c in (path.with_suffix(".py"), path / "__init__.py")]
    return hashlib.sha256(text).digest(), tuple(c for c in candidates if c.exists())


def _source_stamp(locator: Any) -> bytes:
    return stamp(Path(locator._py_file).resolve(), _ROOT)


def _one_at_a_time(save: Callable[..., None]) -> Callable[..., None]:
    """Let one process at a time add to a folder of compiled kernels.

    Numba gives a new kernel the next free number of its source file. Two processes that look at once find
    the same, and one would later load what the other has compiled.

    A disk that is full raises without a name: an error gets the folder's.
    """

    @functools.wraps(save)
    def locked(cache_file: Any, key: Any, data: Any) -> None:
        folder = cache_file._cache_path
        try:
            with open(os.path.join(folder, "kernels.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                save(cache_file, key, data)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), folder) from error

    return locked


def patch_numba() -> None:
    """Make Numba use both: `stamp`, and one writer at a time."""
    caching._SourceFileBackedLocatorMixin.get_source_stamp = _source_stamp
    if fcntl:
        caching.IndexDataCacheFile.save = _one_at_a_time(caching.IndexDataCacheFile.save)
