"""One NIfTI file: its header or all of it, with any damage named.

nibabel reads the header fields and applies the scaling. This module adds limits: it refuses a
stranger's file where nibabel would read garbled voxels without a warning, or take too much memory.
"""

import contextlib
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.imageglobals import logger as nibabel_logger
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from tinyunet.common.errors import DataError, UserError, said
from tinyunet.data.geometry import Geometry, affine_of
from tinyunet.data.stream import Stream, open_stream

#: How to make one file of a volume that is kept in two files.
CONVERT_PAIR = "nib-convert FILE.hdr FILE.nii.gz makes one file of the two"

# Files of voxels without a header, and the format before NIfTI: its header begins with its size.
_IMG = re.compile(r"\.img(\.gz)?$", re.IGNORECASE)
_ANALYZE_BYTES = 348
_ANALYZE = {_ANALYZE_BYTES.to_bytes(4, "little"), _ANALYZE_BYTES.to_bytes(4, "big")}
_EXTENDED_BYTES = 65536  # the first bytes of a file hold any comment in its header
_LAST_BEGIN = 2**28  # no header is longer, in bytes
_COUNTED = 2**20  # bytes behind the voxels are counted up to here
_EXPECTED = "a .nii or .nii.gz file"
_ENDINGS = (".nii", ".nii.gz")


class _Header(NamedTuple):
    """Checked content of a header: nibabel's fields, the shape without axes of size one, and the rest."""

    fields: Any
    shape: tuple[int, ...]
    geometry: Geometry
    dtype: np.dtype[Any]
    offset: int


def read_volume(path: str | Path) -> tuple[NDArray[Any], Geometry]:
    """Read a ``.nii`` or ``.nii.gz`` file whole; return voxels in the common frame, and the file's geometry.

    Voxels have shape=(D, H, W) or (D, H, W, C) and the file's own type, or float64 if the file asks for
    scaling (``scl_slope``, ``scl_inter``), which is applied. Every value is finite. DataError if the file is
    missing, is not NIfTI, is cut or damaged anywhere (the checksum of a compressed file is verified), has no
    three-dimensional volume in it, or holds NaN or infinity.
    """
    path = Path(path)
    with open_stream(path, _EXPECTED) as stream:
        header = _read_header(path, stream)
        stored = _read_stored(path, stream, header)
        with _damage_named(path):
            voxels = _scaled(stored, header.fields)
        bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if bad:
        raise DataError(f"{path}: {bad} voxels are NaN or infinite; expected finite numbers")
    return header.geometry.to_canonical(voxels), header.geometry


def read_header(path: str | Path) -> tuple[tuple[int, ...], Geometry]:
    """Return the shape of the voxels that :func:`read_volume` would return, and the geometry.

    Only the first bytes are read: the voxels may be damaged. Other damage raises DataError.
    """
    path = Path(path)
    with open_stream(path, _EXPECTED) as stream:
        header = _read_header(path, stream)
    return (*header.geometry.canonical_shape, *header.shape[3:]), header.geometry


def check_length(path: str | Path) -> None:
    """Raise DataError if a file's length shows that it was cut, or holds more than its header says.

    Voxels are not read: a compressed file ends in the length of its content, modulo 2^32 (RFC 1952, section
    2.3.1). A smaller number there says nothing: it may be that of the last of several parts.
    """
    path = Path(path)
    with open_stream(path, _EXPECTED) as stream:
        header, compressed, held = _read_header(path, stream), stream.compressed, stream.most
    wanted = header.offset + math.prod(header.shape) * header.dtype.itemsize
    if compressed:
        with open(path, "rb") as file:
            file.seek(-4, io.SEEK_END)
            held = max(int.from_bytes(file.read(), "little"), wanted)
    if held != wanted:
        reason = f"its end tells of {held} bytes" if compressed else f"{held} bytes"
        raise DataError(f"{path}: {reason}; expected {wanted}, as its header says (was it cut?)")


def read_extensions(path: str | Path) -> list[Any]:
    """Return the extensions of a NIfTI file's header, if they are short; none if the header is damaged."""
    path = Path(path)
    with open_stream(path, _EXPECTED) as stream:
        raw = stream.read(_EXTENDED_BYTES)
        header_class = _image_class(path, raw, stream).header_class
    with contextlib.suppress(DataError, MemoryError), _damage_named(path):
        return list(header_class.from_fileobj(io.BytesIO(raw)).extensions)
    return []


def files_by_name(path: Path) -> dict[str, Path]:
    """Return the NIfTI files of a folder, sorted, by their names without ending; a file is all of its own.

    Hidden files do not count. UserError if two files have one name.
    """
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.name.lower().endswith(_ENDINGS) or file.name.startswith("."):
            continue
        other = found.setdefault(stem(file), file)
        if other != file:
            raise UserError(f"{path}: both {other.name} and {file.name}; expected one of them")
    return found


def stem(path: Path) -> str:
    """Return the name of a file without ``.nii`` or ``.nii.gz``."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _image_class(path: Path, raw: bytes, stream: Stream) -> Any:
    """Return nibabel's class for the version of the format."""
    if raw[4:8] == b"n+2\0":
        return nibabel.Nifti2Image
    if raw[344:348] == b"n+1\0":
        return nibabel.Nifti1Image
    analyze = raw[:4] in _ANALYZE and stream.most == _ANALYZE_BYTES
    if raw[344:348] == b"ni1\0" or raw[4:8] == b"ni2\0" or analyze or _IMG.search(path.name):
        raise DataError(f"{path}: one of a pair of files (.hdr, .img); expected {_EXPECTED} ({CONVERT_PAIR})")
    raise DataError(f"{path}: not a NIfTI file; expected {_EXPECTED}")


def _read_header(path: Path, stream: Stream) -> _Header:
    """Read the fixed part of a header, and check each entry that is used."""
    raw = stream.read(nibabel.Nifti1Header.template_dtype.itemsize)
    if not raw and not stream.compressed:
        raise DataError(f"{path}: empty file; expected {_EXPECTED}")
    header_class = _image_class(path, raw, stream).header_class
    fixed = raw + stream.read(header_class.template_dtype.itemsize - len(raw))
    with _damage_named(path):
        fields = header_class.from_fileobj(io.BytesIO(fixed))
        size = fields.get_data_shape()
        # Axes of size one behind the third are dropped.
        shape = size[:3] + tuple(length for length in size[3:] if length != 1)
        if len(shape) not in (3, 4) or min(shape) < 1:
            shown = " x ".join(map(str, size))
            raise DataError(f"{path}: {shown} voxels; expected a volume, or a volume for each sequence")
        dtype = fields.get_data_dtype()
        if dtype.kind not in "iuf":
            raise DataError(f"{path}: voxels of type {dtype}; expected real numbers")
        offset = int(fields.get_data_offset())
        affine = affine_of(path, fields)
    if not len(fixed) <= offset <= _LAST_BEGIN:
        expected = f"expected them behind the header of {len(fixed)} bytes, and not after {_LAST_BEGIN}"
        raise DataError(f"{path}: its voxels begin at byte {offset}; {expected}")
    return _Header(fields, shape, Geometry(affine, (shape[0], shape[1], shape[2]), fields), dtype, offset)


def _read_stored(path: Path, stream: Stream, header: _Header) -> NDArray[Any]:
    """Return the stored numbers: as many as the header promises, and the file must end behind them."""
    nbytes = math.prod(header.shape) * header.dtype.itemsize

    def check(held: int, left: int, at_most: str = "", or_more: str = "") -> None:
        """Raise DataError unless the file holds all bytes of the voxels, and none behind them."""
        if held < nbytes:
            reason = f"truncated, {at_most}{max(held, 0)} of {nbytes} bytes of voxels"
            raise DataError(f"{path}: {reason}; expected a whole NIfTI file")
        if left > 0:
            reason = f"{left} bytes {or_more}behind the {nbytes} of its voxels"
            raise DataError(f"{path}: {reason}; expected a file whose header tells its size and type")

    # The size of the file first: no memory is taken for bytes that the file cannot hold.
    words = ("at most ", "or more ") if stream.compressed else ()
    check(stream.most - header.offset, stream.least - header.offset - nbytes, *words)
    stream.skip(header.offset - stream.position)
    content = np.empty(nbytes, np.uint8)
    found = stream.fill(content)
    # Reading on verifies the checksum behind the last byte of a compressed file.
    left = stream.skip(_COUNTED) if found == nbytes else 0
    check(found, left, or_more="or more " if left == _COUNTED else "")
    return content.view(header.dtype).reshape(header.shape, order="F")


def _scaled(stored: NDArray[Any], fields: Any) -> NDArray[Any]:
    """Return the values that the stored numbers stand for."""
    slope, inter = fields.get_slope_inter()
    slope, inter = 1.0 if slope is None else slope, 0.0 if inter is None else inter
    with np.errstate(all="ignore"):  # the caller reports what becomes infinite
        voxels = apply_read_scaling(stored, slope, inter)
        if voxels.dtype.itemsize > 8:  # long double
            voxels = voxels.astype(np.float64)
        # Scaling to integers with an offset moves 0 by half a slope at most. Zeros are background, which
        # must not count as brain. (Without an offset, 0 is stored exactly.)
        if stored.dtype.kind in "iu" and inter != 0:
            voxels = np.where(np.abs(voxels) <= abs(slope) / 2, voxels.dtype.type(0), voxels)
    return voxels


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Name the file in nibabel's errors: damaged bytes raise nearly any type. Our error is the only line."""
    before = nibabel_logger.disabled
    nibabel_logger.disabled = True  # it prints how it corrects a header
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: damaged NIfTI file ({said(error)})") from error
    finally:
        nibabel_logger.disabled = before
