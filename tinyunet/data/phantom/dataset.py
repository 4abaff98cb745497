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
from tinyunet.data.phantom.anatomy import draw_head, tissues
from tinyunet.data.phantom.fields import Grid, RandomFields
from tinyunet.data.phantom.scanner import MODALITIES, scan
from tinyunet.data.phantom.tumour import draw_tumour, grow

LABELS = ("background", "edema", "non-enhancing tumor", "enhancing tumour")

_VERSION = 2  # part of what a folder is recognised by: raised whenever the same seed gives other heads
_SMALLEST = 16


def make_case(
    seed: int, index: int, shape: tuple[int, int, int] = (64, 72, 56)
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]:
    """Make head number ``index`` of the data set of a seed, with a tumour; return image, labels and affine.

    ``shape`` counts voxels from left to right, back to front and bottom to top. They are cubes just large
    enough for a head; ValueError if they are too few. The image, shape=(*shape, 4) int16, has FLAIR, T1w,
    t1gd and T2w, and 0 outside the brain; the labels, shape=shape uint8, 1 edema, 2 core that does not
    enhance and 3 enhancing tumour; not each tumour has all three. The affine, shape=(4, 4), leads from voxel
    indices to millimetres.
    """
    if min(shape) < _SMALLEST:
        raise ValueError(f"shape: {shape}; expected {_SMALLEST} voxels or more along each axis")
    grid = Grid(shape)
    generator = np.random.default_rng([seed, index])
    head = draw_head(RandomFields(generator, grid))
    tumour = draw_tumour(head, tissues(head, head.points))
    atrophy = float(np.exp(generator.normal(0.15, 0.35)))
    shares = tissues(head, tumour.displace(head.points, head.depth), atrophy)
    growth = np.stack(grow(tumour, head, shares))
    image, there = scan(head, np.concatenate([shares * (1 - growth.sum(0)), growth]))

    edema, core, enhancing = growth
    labels = np.where(edema > 0.5, 1, 0)
    labels = np.where(core + enhancing > 0.5, np.where(enhancing > core, 3, 2), labels) * there
    affine = np.diag([grid.spacing] * 3 + [1.0])
    affine[:3, 3] = [-grid.spacing * (size - 1) / 2 for size in shape]
    volume = np.stack([head.volume(sequence) for sequence in image.T], axis=-1)
    return volume, head.volume(labels.astype(np.uint8)), affine


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
