"""Small volumes and files for the tests of the data layer."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray


def write(path: Path, voxels: NDArray[Any], affine: NDArray[Any] | None = None) -> Path:
    """Write an array as NIfTI, with voxels of 1 mm unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def head(shape: tuple[int, ...] = (6, 7, 5), channels: int = 4, seed: int = 0) -> NDArray[Any]:
    """Return int16 volumes with a brain of positive numbers and a border of zeros."""
    generator = np.random.default_rng(seed)
    image = np.zeros((*shape, channels), np.int16)
    inside = tuple(slice(1, size - 1) for size in shape)
    image[inside] = generator.integers(1, 1000, image[inside].shape)
    return image


def tumour(shape: tuple[int, ...] = (6, 7, 5), classes: int = 4, seed: int = 0) -> NDArray[Any]:
    """Return uint8 labels from 0 to ``classes - 1``, each of them there."""
    labels = np.random.default_rng(seed).integers(0, classes, shape).astype(np.uint8)
    labels.flat[:classes] = range(classes)
    return labels


def orientations() -> Iterator[NDArray[np.float64]]:
    """All 48 affines that store a volume along its axes, with unequal voxel sizes."""
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product([1, -1], repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = 0
            for stored, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
                affine[axis, stored] = sign * (1.0 + axis / 2)
            affine[:3, 3] = 10, -20, 30
            yield affine


def oblique(affine: NDArray[np.float64], degrees: float = 20) -> NDArray[np.float64]:
    """Return an affine turned in space about two axes."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(4)
    turn[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, c, -s], [0, s, c]]
    return turn @ affine


def write_decathlon(folder: Path, cases: int = 3, channels: int = 4, **changes: Any) -> Path:
    """Write a small Decathlon task; ``changes`` replace entries of its dataset.json."""
    description: dict[str, Any] = {
        "modality": {str(i): f"sequence {i}" for i in range(channels)},
        "labels": {"0": "background", "1": "edema", "2": "core", "3": "rim"},
        "training": [],
        "test": ["./imagesTs/T_0.nii.gz"],
    }
    for index in range(cases):
        write(folder / f"imagesTr/T_{index}.nii.gz", head(channels=channels, seed=index))
        write(folder / f"labelsTr/T_{index}.nii.gz", tumour(seed=index))
        description["training"].append(
            {"image": f"./imagesTr/T_{index}.nii.gz", "label": f"./labelsTr/T_{index}.nii.gz"}
        )
    description |= changes
    kept = {key: entry for key, entry in description.items() if entry is not None}
    (folder / "dataset.json").write_text(json.dumps(kept))
    return folder
