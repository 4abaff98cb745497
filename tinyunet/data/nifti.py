"""One NIfTI file: reading it whole with its damage named, a common orientation and back, writing."""

import contextlib
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.imageglobals import logger as nibabel_logger
from numpy.typing import NDArray

from tinyunet.data import mark
from tinyunet.errors import UserError, one_line
from tinyunet.files import atomic

# nibabel has type hints in some places only; what is without is named here once.
_orientations: Any = nibabel.orientations

# Where a NIfTI header keeps the position of its voxels in space, in both versions of the format.
_POSITION_FIELDS = (
    "xyzt_units",
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip

#: What to do with a volume that is kept in two files.
CONVERT_PAIR = "nib-convert FILE.hdr FILE.nii.gz makes one file of the two"

_GZIP_MAGIC = b"\x1f\x8b"
# Files of voxels without a header, and the format before NIfTI: its header begins with its size.
_IMG = re.compile(r"\.img(\.gz)?$", re.IGNORECASE)
_ANALYZE_BYTES = 348
_ANALYZE = {_ANALYZE_BYTES.to_bytes(4, "little"), _ANALYZE_BYTES.to_bytes(4, "big")}
# Enough of a file, also of a compressed one, for its header; version 2 has one of 540 bytes.
_HEADER_BYTES = 4096
# And for a comment in it.
_EXTENDED_BYTES = 65536


class DataError(UserError):
    """Data of the user's that cannot be used. The message is one line and names the file."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels of a file lie in space, and how to bring them into the common frame and back.

    The common frame is nibabel's closest canonical one: axes are permuted and flipped, never
    resampled, until they run most nearly to the right, to the front and up ("RAS"). An oblique
    volume thus stays oblique, and the way back is exact.

    Attributes
    ----------
    affine
        From voxel indices as stored in the file to millimetres. shape=(4, 4), float64.
    shape
        Size of the volume as stored in the file, without the sequences.
    header
        The file's header; its position fields are written again by :func:`save_labels`.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    header: Any

    @property
    def orientation(self) -> NDArray[np.float64]:
        """For each stored axis: the canonical axis it becomes; 1, or -1 if flipped. shape=(3, 2)."""
        orientation: NDArray[np.float64] = _orientations.io_orientation(self.affine)
        return orientation

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """From voxel indices in the common frame to millimetres. shape=(4, 4), float64."""
        affine: NDArray[np.float64] = self.affine @ _orientations.inv_ornt_aff(
            self.orientation, self.shape
        )
        return affine

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """Size of the volume in the common frame."""
        d, h, w = (self.shape[axis] for axis in np.argsort(self.orientation[:, 0]))
        return d, h, w

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a voxel in millimetres along the axes of the common frame."""
        d, h, w = np.linalg.norm(self.canonical_affine[:3, :3], axis=0).tolist()
        return d, h, w

    def to_canonical(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array as stored, ``self.shape + (...)``, in the common frame."""
        view: NDArray[Any] = _orientations.apply_orientation(voxels, self.orientation)
        return view

    def from_canonical(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array of the common frame as it would be stored in the file."""
        back = _orientations.ornt_transform(_orientations.axcodes2ornt("RAS"), self.orientation)
        view: NDArray[Any] = _orientations.apply_orientation(voxels, back)
        return view

    def distance(self, other: "Geometry") -> float:
        """Return how far apart the corners of two volumes of one shape lie at most, in voxels."""
        return _farthest(self.canonical_affine, other.canonical_affine, self.canonical_shape)

    def stored_distance(self, other: "Geometry") -> float:
        """Return the same for the volumes as they are stored in their files."""
        return _farthest(self.affine, other.affine, self.shape)


def _farthest(
    affine: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, int, int]
) -> float:
    """Return how far another affine moves the corners of a volume at most, in voxels of the first."""
    d, h, w = shape
    corners = np.stack(np.meshgrid([0, d], [0, h], [0, w], [1])).reshape(4, -1)
    millimetres = ((other - affine) @ corners)[:3]
    return float(np.linalg.norm(np.linalg.solve(affine[:3, :3], millimetres), axis=0).max())


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
    raw = _read_bytes(path)
    image_class = _image_class(path, raw)
    try:
        with _quiet_nibabel():
            image = image_class.from_bytes(raw)
            shape = _check_shape(path, image.shape)
            # Looked at first, so that a damaged size is never allocated.
            promised = math.prod(image.shape) * image.get_data_dtype().itemsize
            offset = int(image.dataobj.offset)
            if offset < image.header["sizeof_hdr"]:
                raise DataError(
                    f"{path}: its voxels begin at byte {offset}, inside the header; "
                    "expected a whole NIfTI file"
                )
            stored = max(len(raw) - offset, 0)
            if stored < promised:
                raise DataError(
                    f"{path}: truncated, {stored} of {promised} bytes of voxels; "
                    "expected a whole NIfTI file"
                )
            affine = image.affine.astype(np.float64)
            if not np.isfinite(affine).all():
                raise DataError(f"{path}: the affine holds NaN or infinity; expected millimetres")
            geometry = Geometry(affine, (shape[0], shape[1], shape[2]), image.header)
            if not np.isfinite(geometry.orientation).all():
                raise DataError(f"{path}: the affine is singular; expected three spatial axes")
            voxels = np.asanyarray(image.dataobj).reshape(shape)
            # Without an offset 0 is a number of the file's own.
            if image.get_data_dtype().kind in "iu" and image.dataobj.inter != 0:
                voxels = _exact_zeros(voxels, image.dataobj.slope)
    except DataError:
        raise
    except Exception as error:  # nibabel raises nearly any type on damaged bytes
        raise DataError(f"{path}: damaged NIfTI file ({_said(error)})") from error
    if voxels.dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {voxels.dtype}; expected real numbers")
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if bad:
        raise DataError(f"{path}: {bad} voxels are NaN or infinite; expected finite numbers")
    return geometry.to_canonical(voxels), geometry


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
    raw = _read_bytes(path, _HEADER_BYTES)
    header_class = _image_class(path, raw).header_class
    try:
        with _quiet_nibabel():
            # Without extensions, which may be longer than what was read.
            fixed = raw[: header_class.template_dtype.itemsize]
            header = header_class.from_fileobj(io.BytesIO(fixed))
            shape = _check_shape(path, header.get_data_shape())
            affine = np.asarray(header.get_best_affine(), np.float64)
            geometry = Geometry(affine, (shape[0], shape[1], shape[2]), header)
            return (*geometry.canonical_shape, *shape[3:]), geometry
    except DataError:
        raise
    except Exception as error:  # nibabel raises nearly any type on damaged bytes
        raise DataError(f"{path}: damaged NIfTI file ({_said(error)})") from error


def read_extensions(path: str | Path) -> list[Any]:
    """Return what a file's header has been extended by, if that is short; nothing if it is damaged.

    Raises
    ------
    DataError
        The file is missing or is not NIfTI.
    """
    path = Path(path)
    raw = _read_bytes(path, _EXTENDED_BYTES)
    header_class = _image_class(path, raw).header_class
    with _quiet_nibabel(), contextlib.suppress(Exception):  # nibabel raises nearly any type
        return list(header_class.from_fileobj(io.BytesIO(raw)).extensions)
    return []


def read_labels(
    path: str | Path, label_values: Sequence[int]
) -> tuple[NDArray[np.uint8], Geometry]:
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
            f"{path}: holds label {strangers}; expected {allowed} "
            "(where they mean something else: --labels)"
        )
    return labels, geometry


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
        The shape is not the geometry's, or a label does not fit.
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
    values = np.arange(256) if label_values is None else np.asarray(label_values)
    if labels.min() < 0 or labels.max() >= len(values):
        raise ValueError(
            f"labels: {labels.min()} to {labels.max()}; expected 0 to {len(values) - 1}"
        )
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


def stem(path: Path) -> str:
    """Return the name of a file without ``.nii`` or ``.nii.gz``."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _image_class(path: Path, raw: bytes) -> Any:
    """Return nibabel's class for the version of the format, after checking that it is one."""
    if raw[4:8] == b"n+2\0":
        return nibabel.Nifti2Image
    if raw[344:348] == b"n+1\0":
        return nibabel.Nifti1Image
    analyze = raw[:4] in _ANALYZE and len(raw) == _ANALYZE_BYTES
    if raw[344:348] == b"ni1\0" or raw[4:8] == b"ni2\0" or analyze or _IMG.search(path.name):
        raise DataError(
            f"{path}: one of a pair of files (.hdr, .img); expected a .nii or .nii.gz file "
            f"({CONVERT_PAIR})"
        )
    raise DataError(f"{path}: not a NIfTI file; expected a .nii or .nii.gz file")


def _read_bytes(path: Path, most: int | None = None) -> bytes:
    """Return the first bytes of a file, or all, uncompressed; or say why that is not possible."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected a .nii or .nii.gz file")
    try:
        with path.open("rb") as file:
            compressed = file.peek(2).startswith(_GZIP_MAGIC)
            stream = gzip.GzipFile(fileobj=file) if compressed else file
            raw = _first_bytes(stream, most) if most else stream.read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a .nii or .nii.gz file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: truncated or damaged ({_said(error)}); expected a whole .nii.gz file"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not raw and not compressed:
        raise DataError(f"{path}: empty file; expected a .nii or .nii.gz file")
    return raw


def _first_bytes(stream: gzip.GzipFile | io.BufferedReader, most: int) -> bytes:
    """Return as many bytes as there are, up to a number: the file may be cut off behind them."""
    found = b""
    with contextlib.suppress(EOFError):
        while len(found) < most and (part := stream.read1(most - len(found))):
            found += part
    return found


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


def _said(error: BaseException) -> str:
    """Return what an exception says, or its name if it says nothing."""
    return one_line(str(error)) or type(error).__name__
