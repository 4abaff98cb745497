"""Options of a training of a second, and ways to spoil a data set."""

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

SMALL = ("--filters", "4", "--depth", "3", "--patch-size", "16", "--patches-per-case", "1", "--epochs", "1")


def image_of(folder: Path, number: int = 2) -> Path:
    return sorted((folder / "imagesTr").iterdir())[number]


def labels_of(folder: Path, number: int = 2) -> Path:
    return sorted((folder / "labelsTr").iterdir())[number]


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Write a NIfTI file again with other voxels."""
    old = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(old.dataobj)), old.affine), path)
    return path


def brats_case(folder: Path, number: int, case: Path) -> Path:
    """Write a case of the data set as BraTS releases it: a file a sequence, labels 1, 2 and 4."""
    case.mkdir(parents=True)
    image, labels = (nibabel.load(path(folder, number)) for path in (image_of, labels_of))
    voxels = {"seg": np.array([0, 2, 1, 4], np.uint8)[np.asarray(labels.dataobj)]}
    for channel, kind in enumerate(("flair", "t1", "t1ce", "t2")):
        voxels[kind] = np.asarray(image.dataobj)[..., channel]
    for kind, volume in voxels.items():
        path = case / f"{case.name}_{kind}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(volume, image.affine), path)
    return case


def missing(folder: Path) -> Path:
    path = image_of(folder)
    path.unlink()
    return path


def truncated(folder: Path) -> Path:
    path = image_of(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def truncated_inside(folder: Path) -> Path:
    """A whole gzip file around a NIfTI file that is not."""
    path = image_of(folder)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1000]))
    return path


def not_nifti(folder: Path) -> Path:
    path = image_of(folder)
    path.write_text("a letter to the editor")
    return path


def wrong_sequences(folder: Path) -> Path:
    return rewrite(image_of(folder), lambda image: image[..., :3])


def strange_label(folder: Path) -> Path:
    def change(labels: np.ndarray) -> np.ndarray:
        labels = labels.copy()
        labels[3, 3, 3] = 7
        return labels

    return rewrite(labels_of(folder), change)


def other_shape(folder: Path) -> Path:
    return rewrite(labels_of(folder), lambda labels: labels[:, :-1])


def nan(folder: Path) -> Path:
    def change(image: np.ndarray) -> np.ndarray:
        image = image.astype(np.float32)
        image[10, 10, 10, 1] = np.nan
        return image

    return rewrite(image_of(folder), change)


#: How a data set is spoilt, and what is said about it.
SPOILT: list[tuple[Callable[[Path], Path], str]] = [
    (missing, "no such file"),
    (truncated, "truncated or damaged"),
    (truncated_inside, "truncated, [0-9]+ of [0-9]+ bytes"),
    (not_nifti, "not a NIfTI file"),
    (wrong_sequences, "3 sequences; expected 4"),
    (strange_label, "holds label 7; expected labels 0, 1, 2, 3"),
    (other_shape, "20 x 23 x 17 voxels; expected 20 x 24 x 17"),
    (nan, "1 voxels are NaN or infinite"),
]
