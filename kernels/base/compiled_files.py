"""Compiled kernels on disk: when one is out of date or damaged, and who may write.

Numba keeps machine code beside its source, and compiles anew when that file changes. But code from the
modules that it imports is inside, too: a kernel would go on calling a function with the arguments of last
week. So here a file's stamp is of all of its package that it imports, directly or not::

    stamp(winograd_bricks.py) = SHA-256 of winograd_bricks.py, read.py, transform.py, simd.py, ...

This changes private parts of Numba, so `patch_numba` does it in tested versions only. In others Numba caches
as ever: after a change of an imported module, ``make clean-cache``.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import IO, Any

import numba

try:
    from numba.core import caching
except ImportError:  # another version of Numba
    caching = None
try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

#: First and last version of Numba that the tests have run with.
TESTED = (0, 61), (0, 68)

_DIGEST = hashlib.sha256().digest_size
_ROOT = Path(__file__).resolve().parents[1]
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


class CheckedFile(getattr(caching, "IndexDataCacheFile", object)):  # type: ignore[misc]
    """Compiled code of one kernel on disk, and its index, as Numba keeps them; each ends with a digest.

    A file that is not as it was written (the disk was full, the machine went down, another program wrote
    it) is a miss: the kernel is compiled again and the file replaced. Numba alone would end every later start
    with the error of unpickling, and run damaged machine code.

    Each file of code names its kernel, because Numba writes the index first and numbers the files of each
    new source from 1: a process that is killed in between leaves an index that names last week's code.
    """

    def load(self, key: Any) -> Any:
        """Return the code saved for a key, or None."""
        name = self._load_index().get(key)
        match name and _read_checked(self._data_path(name)):
            case stamp, of, code if (stamp, of) == (self._source_stamp, key):
                return code
        return None

    def save(self, key: Any, data: Any) -> None:
        """Add code for a key, or replace it: one process at a time in a folder.

        Numba gives a new kernel the next free number of its source file. Two processes that look at once
        would find the same, and one would later load what the other has compiled.

        Raises
        ------
        OSError
            With the name of the folder: a disk that is full raises without a name.
        """
        folder = self._cache_path
        try:
            with _open_lock(os.path.join(folder, "kernels.lock")) as lock:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                super().save(key, (self._source_stamp, key, data))
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), folder) from error

    def _load_index(self) -> dict[Any, str]:
        match _read_checked(self._index_path):
            case version, stamp, dict(names) if stamp == self._source_stamp:
                return names if version == self._version else {}
        return {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._save_data(self._index_name, (self._version, self._source_stamp, overloads))

    def _dump(self, obj: Any) -> bytes:
        content: bytes = super()._dump(obj)
        return content + hashlib.sha256(content).digest()


def _open_lock(path: str) -> IO[str]:
    try:
        return open(path, "a")
    except PermissionError:  # as damaged as another file; where the folder is ours, it can go
        os.unlink(path)
        return open(path, "a")


def _read_checked(path: str) -> Any:
    """Return what a file holds, or None if it cannot be read or is not as it was written."""
    # Any exception: what another version of Numba has pickled may name anything.
    with contextlib.suppress(Exception):
        content = Path(path).read_bytes()
        content, digest = content[:-_DIGEST], content[-_DIGEST:]
        if hashlib.sha256(content).digest() == digest:
            return pickle.loads(content)
    return None


def patch_numba() -> None:
    """Make Numba use `stamp` and `CheckedFile`, if this is a tested version and has what they stand on."""
    version = tuple(map(int, re.findall(r"\d+", numba.__version__)[:2]))
    locators: Any = getattr(caching, "_SourceFileBackedLocatorMixin", None)
    needed = "_load_index", "_save_index", "_save_data", "_data_path", "_dump"
    has_all = all(hasattr(CheckedFile.__base__, name) for name in needed)
    if TESTED[0] <= version <= TESTED[1] and has_all and hasattr(locators, "get_source_stamp"):
        locators.get_source_stamp = _source_stamp
        caching.IndexDataCacheFile = CheckedFile
