"""The picture of what a model finds: slices of whole volumes, prediction over truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from tinyunet.viz.colours import of_class
from tinyunet.viz.figure import write

_PANEL = 1.9  # inches
_OPACITY = 0.55
_PLANES = ("sagittal", "coronal", "axial")


class PicturedCase(NamedTuple):
    """A case to show.

    Attributes
    ----------
    name : str
    image : ndarray, shape=(D, H, W, C), float32
        In the common frame: to the right, to the front, up.
    truth, prediction : ndarray, shape=(D, H, W), uint8
        Class of each voxel.
    note : str
        Shown under the name.
    spacing : (float, float, float)
        Size of a voxel along each axis.
    """

    name: str
    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    note: str
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)


# Names are the data set's: a "$" in one begins no formula.
@matplotlib.rc_context({"text.parse_math": False})
def draw_predictions(
    path: Path | str, cases: Sequence[PicturedCase], modalities: Sequence[str], labels: Sequence[str]
) -> None:
    """Draw each case in a row, and write a PNG atomically.

    A row shows two sequences as they are, then three planes through the tumour with the prediction
    in colour and the truth as white outlines.

    Parameters
    ----------
    path : Path or str
        The file to make or replace.
    cases : sequence of PicturedCase
        One at least.
    modalities, labels : sequence of str
        Names of the channels and of the classes; class 0 is the background.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    plain, under = _channels(modalities)
    columns = len(plain) + len(_PLANES)
    figure = Figure(figsize=(_PANEL * columns, _PANEL * len(cases) + 0.6), dpi=120, layout="constrained")
    grid = figure.subplots(len(cases), columns, squeeze=False)
    for row, case in zip(grid, cases, strict=True):
        where = _center(case.truth if case.truth.any() else case.prediction)
        grey = [_grey(case.image[..., channel]) for channel in range(len(modalities))]
        for axes, channel in zip(row, plain, strict=False):
            _show(axes, grey[channel], case.spacing, 2, where[2])
        for axes, plane in zip(row[len(plain) :], (2, 1, 0), strict=True):
            _show(axes, grey[under], case.spacing, plane, where[plane])
            _overlay(axes, case, plane, where[plane], len(labels))
        row[0].set_ylabel(f"{case.name}\n{case.note}", fontsize=8)
    titles = [modalities[channel] for channel in plain] + [_PLANES[p] for p in (2, 1, 0)]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    figure.legend(
        handles=[
            *(
                Patch(color=of_class(label), alpha=_OPACITY, label=name)
                for label, name in enumerate(labels)
                if label
            ),
            Line2D([], [], color="white", linewidth=1.2, label="truth"),
        ],
        loc="outside lower center",
        ncols=len(labels),
        fontsize=8,
        facecolor="0.35",
        labelcolor="white",
    )
    write(figure, path, format="png")


def _channels(modalities: Sequence[str]) -> tuple[list[int], int]:
    """Return which channels are shown as they are, and which one lies under the colours.

    Edema is bright in FLAIR, the enhancing rim in T1 after gadolinium.
    """
    names = [name.lower() for name in modalities]
    flair = next((i for i, name in enumerate(names) if "flair" in name), 0)
    contrast = next((i for i, name in enumerate(names) if name in ("t1gd", "t1ce", "t1c")), None)
    plain = [flair] if contrast is None else [flair, contrast]
    return plain, flair


def _center(labels: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Return along each axis the slice with most of the tumour, or the middle if there is none."""
    found = labels > 0
    if not found.any():
        d, h, w = (size // 2 for size in labels.shape)
        return d, h, w
    d, h, w = (int(found.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(found.ndim))
    return d, h, w


def _grey(channel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a channel between 0 and 1: black outside of the brain, where it is exactly 0."""
    brain = channel[channel != 0]
    if not brain.size:
        return np.zeros_like(channel)
    low, high = np.percentile(brain, [0.5, 99.5])
    grey = 0.06 + 0.94 * (channel - low) / max(high - low, 1e-6)
    return np.where(channel != 0, grey, 0).clip(0, 1).astype(np.float32)


def _slice(volume: NDArray[Any], plane: int, index: int) -> NDArray[Any]:
    """Return a slice as it is drawn: rows from below to above."""
    return np.take(volume, index, axis=plane).T


def _in_plane(values: Sequence[float], plane: int) -> tuple[float, float]:
    """Return the two of three values that belong to the rows and the columns of a slice."""
    across, along = (value for axis, value in enumerate(values) if axis != plane)
    return along, across


def _show(axes: Axes, grey: NDArray[np.float32], spacing: Sequence[float], plane: int, index: int) -> None:
    sides = [size * step for size, step in zip(grey.shape, spacing, strict=True)]
    height, width = _in_plane(sides, plane)
    axes.imshow(
        _slice(grey, plane, index),
        cmap="gray",
        origin="lower",
        extent=(0, width, 0, height),
        vmin=0,
        vmax=1,
        interpolation="bilinear",
    )
    # Every panel is a square as wide as the longest side, so that they line up.
    half = max(sides) / 2
    axes.set(
        xticks=[],
        yticks=[],
        facecolor="black",
        xlim=(width / 2 - half, width / 2 + half),
        ylim=(height / 2 - half, height / 2 + half),
    )


def _overlay(axes: Axes, case: PicturedCase, plane: int, index: int, classes: int) -> None:
    prediction = _slice(case.prediction, plane, index)
    truth = _slice(case.truth, plane, index)
    if min(truth.shape) < 2:
        return  # a line of voxels has no contour
    middles = [
        (np.arange(size) + 0.5) * step
        for size, step in zip(truth.shape, _in_plane(case.spacing, plane), strict=True)
    ]
    y, x = middles
    for label in range(1, classes):
        found, true = ((labels == label).astype(np.float32) for labels in (prediction, truth))
        if found.any():
            axes.contourf(x, y, found, [0.5, 1.5], colors=[of_class(label)], alpha=_OPACITY)
        if true.any():
            axes.contour(x, y, true, [0.5], colors="white", linewidths=0.8)
