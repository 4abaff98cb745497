"""One NIfTI file: reading it whole with its damage named, a common orientation and back, writing."""

import contextlib
import gzip
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.imageglobals import logger as nibabel_logger
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from tinyunet.common.errors import one_line, said
from tinyunet.common.files import atomic
from tinyunet.data import mark
from tinyunet.data.affine import affine_of
from tinyunet.data.geometry import Geometry
from tinyunet.data.stream import DataError, Stream, memory_for

__all__ = [
    "CONVERT_PAIR",
    "DataError",
    "Geometry",
    "check_label_values",
    "label_numbers",
    "read_extensions",
    "read_header",
    "read_labels",
    "read_shape",
    "read_volume",
    "save_labels",
    "stem",
]

# Where a NIfTI header keeps the position of its voxels in space, in both versions of the format.
_POSITION_FIELDS = (
    "xyzt_units",
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip

#: What to do with a volume that is kept in two files.
CONVERT_PAIR = "nib-convert FILE.hdr FILE.nii.gz makes one file of the two"

# Files of voxels without a header, and the format before NIfTI: its header begins with its size.
_IMG = re.compile(r"\.img(\.gz)?$", re.IGNORECASE)
_ANALYZE_BYTES = 348
_ANALYZE = {_ANALYZE_BYTES.to_bytes(4, "little"), _ANALYZE_BYTES.to_bytes(4, "big")}
# Enough of a file for a comment in its header.
_EXTENDED_BYTES = 65536
# Behind so many bytes of extensions no file has its voxels.
_LAST_BEGIN = 2**28
# Bytes behind the voxels that are counted before they are told.
_COUNTED = 2**20
_EXPECTED = "a .nii or .nii.gz file"
_WHOLE = "expected a whole NIfTI file"


class _Header(NamedTuple):
    """What a header says, checked: nibabel's fields, the size without axes of one, and the rest."""

    fields: Any
    shape: tuple[int, ...]
    geometry: Geometry
    dtype: np.dtype[Any]
    offset: int


def read_volume(path: str | Path) -> tuple[NDArray[Any], Geometry]:
    """Read a ``.nii`` or ``.nii.gz`` file whole and bring it into the common frame.

    Parameters
    ----------
    path
        The file; whether it is compressed is seen from its content, not from its name.

    Returns
    -------
    voxels
        shape=(D, H, W) or (D, H, W, C), of the file's own type, or float64 if the file asks for
        scaling (``scl_slope``, ``scl_inter``), which is applied. Every value is finite.
    geometry
        The file's position and orientation.

    Raises
    ------
    DataError
        The file is missing, is not NIfTI, is cut or damaged anywhere (the checksum of a compressed
        file is verified), has no three-dimensional volume in it, or holds NaN or infinity.
    """
    path = Path(path)
    with Stream(path, _EXPECTED) as stream, memory_for(path):
        header = _read_header(path, stream)
        stored = _read_stored(path, stream, header)
        with _damage_named(path):
            voxels = _scaled(stored, header.fields)
        bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if bad:
        raise DataError(f"{path}: {bad} voxels are NaN or infinite; expected finite numbers")
    return header.geometry.to_canonical(voxels), header.geometry


def _read_stored(path: Path, stream: Stream, header: _Header) -> NDArray[Any]:
    """Return the numbers that the file holds: as many as the header promises, and none may be left."""
    nbytes = math.prod(header.shape) * header.dtype.itemsize
    before, whole = header.offset, header.offset + nbytes
    # The size of the file first: what it cannot hold is not even asked for.
    if whole > stream.most:
        held = max(stream.most - before, 0)
        most = "at most " if stream.compressed else ""
        raise DataError(f"{path}: truncated, {most}{held} of {nbytes} bytes of voxels; {_WHOLE}")
    if whole < stream.least:
        raise _left_over(path, stream.least - whole, "or more " if stream.compressed else "", nbytes)
    stream.skip(before - stream.position)
    content = np.empty(nbytes, np.uint8)
    found = stream.fill(content)
    if found < nbytes:
        raise DataError(f"{path}: truncated, {found} of {nbytes} bytes of voxels; {_WHOLE}")
    # Behind the last byte a compressed file has its checksum, which is verified here.
    left = stream.skip(_COUNTED)
    if left:
        raise _left_over(path, left, "or more " if left == _COUNTED else "", nbytes)
    return content.view(header.dtype).reshape(header.shape, order="F")


def _left_over(path: Path, left: int, more: str, nbytes: int) -> DataError:
    return DataError(
        f"{path}: {left} bytes {more}behind the {nbytes} of its voxels; "
        "expected a file whose header tells its size and type"
    )


def _scaled(stored: NDArray[Any], fields: Any) -> NDArray[Any]:
    """Return what the numbers of a file mean."""
    slope, inter = fields.get_slope_inter()
    slope, inter = 1.0 if slope is None else slope, 0.0 if inter is None else inter
    with np.errstate(all="ignore"):  # what becomes infinite is told
        voxels = apply_read_scaling(stored, slope, inter)
        if voxels.dtype.itemsize > 8:  # of 16 bytes: computed with in 8
            voxels = voxels.astype(np.float64)
        # Without an offset 0 is a number of the file's own.
        if stored.dtype.kind in "iu" and inter != 0:
            voxels = _exact_zeros(voxels, slope)
    return voxels


def _exact_zeros(voxels: NDArray[Any], slope: float) -> NDArray[Any]:
    """Set to 0 what 0 becomes by scaling to integers: background, which must not count as brain.

    ``slope`` is what an integer stands for: zeros are off by half of it at most.
    """
    return np.where(np.abs(voxels) <= abs(slope) / 2, voxels.dtype.type(0), voxels)


def read_shape(path: str | Path) -> tuple[int, ...]:
    """Return the size of a volume in the common frame, from the first bytes of its file.

    Nothing is said of the voxels: they may be cut off or damaged.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    shape
        (D, H, W) or (D, H, W, C), as :func:`read_volume` would return voxels of.

    Raises
    ------
    DataError
        The file is missing, is not NIfTI, or has no three-dimensional volume in it.
    """
    return read_header(path)[0]


def read_header(path: str | Path) -> tuple[tuple[int, ...], Geometry]:
    """Return what :func:`read_shape` does, and the file's position and orientation."""
    path = Path(path)
    with Stream(path, _EXPECTED) as stream:
        header = _read_header(path, stream)
    return (*header.geometry.canonical_shape, *header.shape[3:]), header.geometry


def read_extensions(path: str | Path) -> list[Any]:
    """Return what a file's header has been extended by, if that is short; nothing if it is damaged.

    Raises
    ------
    DataError
        The file is missing or is not NIfTI.
    """
    path = Path(path)
    with Stream(path, _EXPECTED) as stream:
        raw = stream.read(_EXTENDED_BYTES)
        header_class = _image_class(path, raw, stream).header_class
    with _quiet_nibabel(), contextlib.suppress(Exception):  # nibabel raises nearly any type
        return list(header_class.from_fileobj(io.BytesIO(raw)).extensions)
    return []


def read_labels(path: str | Path, label_values: Sequence[int]) -> tuple[NDArray[np.uint8], Geometry]:
    """Read a volume of labels and return the class of each voxel.

    Parameters
    ----------
    path
        The file. Numbers within 0.01 of an integer count as it: scaling rounds.
    label_values
        ``label_values[i]`` is the number that stands for class ``i`` in the file.

    Returns
    -------
    labels
        shape=(D, H, W), uint8, C-contiguous, in the common frame.
    geometry
        The file's position and orientation.

    Raises
    ------
    DataError
        As :func:`read_volume`; also if the volume has more than three axes, or holds a number that
        is not an integer or not among ``label_values``.
    """
    voxels, geometry = read_volume(path)
    if voxels.ndim != 3:
        raise DataError(f"{path}: {voxels.shape[3]} label volumes; expected one")
    with memory_for(path):
        return _classes(path, voxels, label_values), geometry


def _classes(path: str | Path, voxels: NDArray[Any], label_values: Sequence[int]) -> NDArray[np.uint8]:
    """Return the class of each voxel."""
    allowed = "labels " + ", ".join(map(str, sorted(label_values)))
    integers = np.rint(voxels)
    between = np.abs(voxels - integers) > 0.01
    if between.any():
        example = voxels[between][0]
        raise DataError(f"{path}: label {example:.6g} is not an integer; expected {allowed}")
    labels = np.zeros(voxels.shape, np.uint8)
    known = np.zeros(voxels.shape, np.bool_)
    for index, value in enumerate(label_values):
        here = integers == value
        labels[here] = index
        known |= here
    if not known.all():
        strangers = ", ".join(f"{value:.0f}" for value in np.unique(integers[~known])[:5])
        raise DataError(
            f"{path}: holds label {strangers}; expected {allowed} (where they mean something else: --labels)"
        )
    return labels


def label_numbers(path: str | Path) -> set[int]:
    """Return the numbers that a label file holds, each rounded to an integer.

    Raises
    ------
    DataError
        As :func:`read_volume`.
    """
    return {round(number) for number in np.unique(read_volume(path)[0]).tolist()}


def save_labels(
    path: str | Path,
    labels: NDArray[np.integer[Any]],
    geometry: Geometry,
    label_values: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write labels as uint8 NIfTI that lies exactly over the file the geometry came from.

    Shape, orientation, affine and units are the input's own. The file appears whole or not at all.

    Parameters
    ----------
    path
        ``*.nii`` or ``*.nii.gz``; folders that are missing are made.
    labels
        Class of each voxel in the common frame. shape=geometry.canonical_shape, 0 to 255.
    geometry
        Of the image that was segmented.
    label_values
        ``label_values[i]`` is written for class ``i``; the class itself if not given.
    names
        Of the classes, the background first: the file is then marked with what its numbers mean,
        see :mod:`tinyunet.data.mark`.

    Raises
    ------
    ValueError
        The shape is not the geometry's, a label does not fit, or ``label_values`` are none of uint8.
    DataError
        The file cannot be written: full disk, no permission, ...
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"path: {path} is no name of a NIfTI file; expected *.nii or *.nii.gz")
    if labels.shape != geometry.canonical_shape:
        raise ValueError(
            f"labels: shape {labels.shape}; expected the image's own, {geometry.canonical_shape}"
        )
    values = np.arange(256)
    if label_values is not None:
        check_label_values(label_values)
        values = np.asarray(label_values)
    if labels.min() < 0 or labels.max() >= len(values):
        raise ValueError(f"labels: {labels.min()} to {labels.max()}; expected 0 to {len(values) - 1}")
    stored = values.astype(np.uint8)[geometry.from_canonical(labels)]
    version_2 = geometry.header["sizeof_hdr"] == 540
    image_class: Any = nibabel.Nifti2Image if version_2 else nibabel.Nifti1Image
    image = image_class(stored, None)
    for field in _POSITION_FIELDS:
        image.header[field] = geometry.header[field]
    image.header["pixdim"][:4] = geometry.header["pixdim"][:4]
    if names is not None:
        meaning = dict(zip(values.tolist(), names, strict=False))
        image.header.extensions.append(mark.extension(stored, meaning))
    content = image.to_bytes()
    # No time stamp: equal labels give equal files.
    raw = gzip.compress(content, 6, mtime=0) if path.suffix == ".gz" else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(raw)
    except OSError as error:
        reason = one_line(error.strerror or str(error))
        raise DataError(f"{path}: cannot be written ({reason}); nothing was left behind") from error


def check_label_values(values: Sequence[Any]) -> None:
    """Check the numbers that stand for classes in a file that is written.

    Raises
    ------
    ValueError
        They are not different whole numbers from 0 to 255, of which the first is 0, the background.
    """
    whole = all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values)
    if not (whole and len({*values}) == len(values) and all(0 <= value <= 255 for value in values)):
        raise ValueError(f"label_values: {list(values)[:10]}; expected different whole numbers from 0 to 255")
    if not len(values) or values[0] != 0:
        raise ValueError(f"label_values: {list(values)[:10]}; expected 0 first, for the background")


def stem(path: Path) -> str:
    """Return the name of a file without ``.nii`` or ``.nii.gz``."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _image_class(path: Path, raw: bytes, stream: Stream) -> Any:
    """Return nibabel's class for the version of the format, after checking that it is one."""
    if raw[4:8] == b"n+2\0":
        return nibabel.Nifti2Image
    if raw[344:348] == b"n+1\0":
        return nibabel.Nifti1Image
    analyze = raw[:4] in _ANALYZE and stream.most == _ANALYZE_BYTES
    if raw[344:348] == b"ni1\0" or raw[4:8] == b"ni2\0" or analyze or _IMG.search(path.name):
        raise DataError(f"{path}: one of a pair of files (.hdr, .img); expected {_EXPECTED} ({CONVERT_PAIR})")
    raise DataError(f"{path}: not a NIfTI file; expected {_EXPECTED}")


def _read_header(path: Path, stream: Stream) -> _Header:
    """Read the fixed part of a header, and check all that it says."""
    raw = stream.read(nibabel.Nifti1Header.template_dtype.itemsize)
    if not raw and not stream.compressed:
        raise DataError(f"{path}: empty file; expected {_EXPECTED}")
    header_class = _image_class(path, raw, stream).header_class
    # Without extensions, which nothing here needs.
    fixed = raw + stream.read(header_class.template_dtype.itemsize - len(raw))
    with _damage_named(path):
        fields = header_class.from_fileobj(io.BytesIO(fixed))
        shape = _check_shape(path, fields.get_data_shape())
        dtype = fields.get_data_dtype()
        if dtype.kind not in "iuf":
            raise DataError(f"{path}: voxels of type {dtype}; expected real numbers")
        offset = int(fields.get_data_offset())
        affine = affine_of(path, fields)
    if not len(fixed) <= offset <= _LAST_BEGIN:
        raise DataError(
            f"{path}: its voxels begin at byte {offset}; expected them behind the header of "
            f"{len(fixed)} bytes, and not after {_LAST_BEGIN}"
        )
    return _Header(fields, shape, Geometry(affine, (shape[0], shape[1], shape[2]), fields), dtype, offset)


def _check_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape without further axes of size one; check that three or four axes are left."""
    stripped = shape[:3] + tuple(size for size in shape[3:] if size != 1)
    if len(stripped) not in (3, 4) or min(stripped) < 1:
        size = " x ".join(map(str, shape))
        raise DataError(f"{path}: {size} voxels; expected a volume, or a volume for each sequence")
    return stripped


@contextlib.contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """Keep nibabel from printing what it corrects in a header: an error is one line, and ours."""
    before = nibabel_logger.disabled
    nibabel_logger.disabled = True
    try:
        yield
    finally:
        nibabel_logger.disabled = before


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Keep nibabel silent, and name the file in what it raises: nearly any type, on damaged bytes."""
    try:
        with _quiet_nibabel():
            yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: damaged NIfTI file ({said(error)})") from error
