"""One case after the other, written as a Medical Segmentation Decathlon task."""

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import DataError, said
from tinyunet.common.files import read_json
from tinyunet.data.phantom.anatomy import WHITE, Head, Outline, fold, outline, tissues
from tinyunet.data.phantom.fields import Array, Grid, RandomFields
from tinyunet.data.phantom.scanner import MODALITIES, scan
from tinyunet.data.phantom.tumour import draw_tumour, grow

LABELS = ("background", "edema", "non-enhancing tumor", "enhancing tumour")

_VERSION = 1  # part of what a folder is recognised by: raised whenever the same seed gives other heads
_SMALLEST = 16


def make_case(
    seed: int, index: int, shape: tuple[int, int, int] = (64, 72, 56)
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]:
    """Make head number ``index`` of the data set of a seed, with a tumour; return image, labels and affine.

    ``shape`` counts voxels from left to right, back to front and bottom to top. They are cubes just large
    enough for a head; ValueError if they are too few. The image, shape=(*shape, 4) int16, has FLAIR, T1w,
    t1gd and T2w, and 0 outside the brain; the labels, shape=shape uint8, 1 edema, 2 necrotic core and 3
    enhancing rim. The affine, shape=(4, 4), leads from voxel indices to millimetres.
    """
    if min(shape) < _SMALLEST:
        raise ValueError(f"shape: {shape}; expected {_SMALLEST} voxels or more along each axis")
    grid = Grid(shape)
    generator = np.random.default_rng([seed, index])
    fields = RandomFields(generator, grid)
    at_rest = _pose(fields)
    tumour = draw_tumour(generator)
    # The skull holds the surface where it is; inside, the tumour displaces tissue.
    everywhere = outline(at_rest)
    voxels = np.flatnonzero(everywhere.brain < 4)
    surfaces = Outline(*(distance[voxels] for distance in everywhere))
    head = Head(fields, voxels, tumour.displace(at_rest[:, voxels]), surfaces)
    folding = fold(head, everywhere.cerebrum)
    shares = tissues(head, folding)
    growth = grow(tumour, head, white=shares[WHITE])

    labels = np.zeros(len(voxels), np.uint8)
    labels[growth.edema > 0.5] = 1
    labels[growth.necrosis + growth.enhancing > 0.5] = 3
    labels[growth.necrosis > 0.5] = 2
    diseased = np.stack(growth)
    shares = np.concatenate([shares * (1 - diseased.sum(0)), diseased])
    # As a skull-stripping program leaves it: the brain with a rim of fluid, not quite even.
    brain = (surfaces.brain < 1.4 - 0.7 * folding.roughness) | (labels > 0)
    image = scan(head, shares, brain)
    volume = np.zeros(grid.positions.shape[1], np.uint8)
    volume[voxels] = labels
    affine = np.diag([grid.spacing] * 3 + [1.0])
    affine[:3, 3] = [-grid.spacing * (size - 1) / 2 for size in shape]
    return image, volume.reshape(shape), affine


def _pose(fields: RandomFields) -> Array:
    """Draw a head's size, position, tilt and shape; return each voxel's point of atlas space."""
    generator, grid = fields.generator, fields.grid
    a, b, c = generator.normal(0, [0.07, 0.05, 0.07])
    nod = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    tilt = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    shake = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    scale = generator.uniform(0.87, 0.95) * generator.uniform(0.96, 1.04, 3)
    linear = np.diag(1 / scale) @ nod @ tilt @ shake
    centre = np.array([0, -17, 10]) + generator.normal(0, 2, 3)
    points = linear.astype(np.float32) @ grid.positions + centre.astype(np.float32)[:, None]
    for axis in points:
        axis += 2.2 * fields.clouds(70)
    return points


def folder_name(cases: int, shape: tuple[int, int, int], seed: int) -> str:
    """Return a name that differs whenever the content of the data set does."""
    size = "x".join(map(str, shape))
    return f"phantom-{cases}-cases-{size}-seed-{seed}-version-{_VERSION}"


def make_dataset(
    directory: str | Path, cases: int = 32, shape: tuple[int, int, int] = (64, 72, 56), seed: int = 0
) -> Path:
    """Make a data set, or find it where it has been made before.

    The files are written to a temporary folder, which is renamed to ``directory`` when all are there: a
    folder of that name is complete. Two programs may make it at once. ``shape`` and ``seed`` are as for
    `make_case`; ValueError if ``cases`` or ``shape`` is too small. DataError, and nothing left behind, if the
    folder holds something else, or cannot be written (full disk, ...).
    """
    directory = Path(directory)
    if cases < 1:
        raise ValueError(f"cases: {cases}; expected 1 or more")
    made_of = {"cases": cases, "shape": list(shape), "seed": seed, "version": _VERSION}
    if _is_there(directory, made_of):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        where = {"prefix": f".{directory.name}.", "dir": str(directory.parent)}
        with tempfile.TemporaryDirectory(**where, ignore_cleanup_errors=True) as temporary:
            os.chmod(temporary, 0o755)
            _write(Path(temporary), made_of)
            try:
                os.rename(temporary, directory)
            except OSError:
                # Another program may have been faster.
                if not _is_there(directory, made_of):
                    raise
    except OSError as error:
        raise DataError(f"{directory}: cannot be written ({said(error)}); nothing was left") from error
    return directory


def _is_there(directory: Path, made_of: dict[str, Any]) -> bool:
    """Say whether a folder holds this data set; refuse one that holds something else."""
    if not directory.exists():
        return False
    try:
        if directory.is_dir() and not any(directory.iterdir()):
            return False
        description = read_json(directory / "dataset.json")
        found = description["phantom"]
        names = [name for entry in description["training"] for name in entry.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        reason = "is there, but is no phantom data set; expected another folder"
        raise DataError(f"{directory}: {reason}") from None
    if found != made_of:
        reason = f"holds a phantom data set of {found}, not of {made_of}"
        raise DataError(f"{directory}: {reason}; expected another folder, or remove this one")
    for name in names:
        if not (directory / name).is_file():
            raise DataError(f"{directory / name}: is missing; remove {directory} to make it again")
    return True


def _write(directory: Path, made_of: dict[str, Any]) -> None:
    (directory / "imagesTr").mkdir()
    (directory / "labelsTr").mkdir()
    training = []
    for index in range(made_of["cases"]):
        image, labels, affine = make_case(made_of["seed"], index, tuple(made_of["shape"]))
        entry = {key: f"./{key}sTr/PHANTOM_{index:03}.nii.gz" for key in ("image", "label")}
        _write_volume(directory / entry["image"], image, affine)
        _write_volume(directory / entry["label"], labels, affine)
        training.append(entry)
    description = {
        "name": "PHANTOM",
        "description": "Heads with brain tumours, made by tinyunet.data.phantom",
        "tensorImageSize": "4D",
        "modality": {str(number): name for number, name in enumerate(MODALITIES)},
        "labels": {str(number): name for number, name in enumerate(LABELS)},
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        "test": [],
        "phantom": made_of,
    }
    text = json.dumps(description, indent=1) + "\n"
    (directory / "dataset.json").write_text(text, encoding="utf-8")


def _write_volume(path: Path, voxels: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write a volume from right to left and front to back, as scanners and BraTS do."""
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = [size - 1 for size in voxels.shape[:2]]
    image_class: Any = nibabel.Nifti1Image  # nibabel has type hints in some places only
    image = image_class(voxels[::-1, ::-1], affine @ flip)
    image.header.set_xyzt_units("mm")
    # Level 1: noise hardly gets smaller by trying harder. No time stamp: files repeat.
    path.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))
