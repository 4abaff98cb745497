"""A picture of cases: all sequences in three planes through the tumour, and the labels over one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from tinyunet.data.cases import Case, load_case
from tinyunet.viz.colours import of_class
from tinyunet.viz.figure import write

# Each plane's name, and the axis of the volume it is cut across.
_PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
# Inches that a legend takes at the bottom.
_LEGEND = 0.35


def plot_cases(
    cases: Sequence[Case],
    path: str | Path,
    modalities: Sequence[str] | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Draw cases below each other, three planes each, a column for each sequence; write atomically.

    The planes go where most of all classes is seen. The last column shows the labels over the
    third sequence (t1gd in brain-tumour data) or the last there is. The patient's left is on the
    left, front and top are up.

    Parameters
    ----------
    cases
        One at least; all with the same number of sequences.
    path
        Of the picture; its ending gives the format.
    modalities
        Names of the sequences, written above the columns.
    classes
        Names of the classes from 1 on, for a legend below.

    Raises
    ------
    ValueError
        No cases, or with different numbers of sequences.
    DataError
        A case cannot be read.
    OSError
        The picture cannot be written.
    """
    if len({case.channels for case in cases}) != 1:
        raise ValueError("cases: expected one or more, all with the same number of sequences")
    channels = cases[0].channels
    columns, rows = channels + 1, len(_PLANES) * len(cases)
    size = 1.7 * columns + 0.3, 1.7 * rows + 0.3 + (_LEGEND if classes else 0)
    figure = Figure(figsize=size, facecolor="black")
    axes = figure.subplots(rows, columns, squeeze=False)
    for number, case in enumerate(cases):
        image, labels, geometry = load_case(case)
        box = _around_brain(image)
        shown, labels = _to_grey(image[box]), labels[box]
        for offset, (plane, axis) in enumerate(_PLANES):
            row = axes[len(_PLANES) * number + offset]
            index = _best_slice(labels, axis)
            aspect = _aspect(geometry.spacing, axis)
            greys = [_slice(shown[..., channel], index, axis) for channel in range(channels)]
            for column, grey in zip(row, [*greys, greys[min(2, channels - 1)]], strict=True):
                column.imshow(grey, cmap="gray", vmin=0, vmax=1, aspect=aspect)
                column.set_axis_off()
            draw_labels(row[-1], _slice(labels, index, axis), aspect)
            if offset == 0:
                plane = f"{case.name}\n{plane}"
            _write_beside(row[0], plane)
    for column, name in zip(axes[0], [*(modalities or ()), "labels"], strict=False):
        column.set_title(name, color="white", fontsize=9)
    head, foot = (0.25 / figure.get_figheight(), (_LEGEND if classes else 0.07) / figure.get_figheight())
    figure.subplots_adjust(0.05, foot, 0.995, 1 - head, 0.02, 0.02)
    if classes:
        _explain(figure, classes)
    write(figure, path, dpi=80, facecolor="black")


def _explain(figure: Figure, classes: Sequence[str]) -> None:
    """Write a legend of the label colours in a line at the bottom."""
    handles = [Patch(facecolor=of_class(label), label=name) for label, name in enumerate(classes, start=1)]
    figure.legend(
        handles=handles, loc="lower right", ncols=len(handles), fontsize=8, labelcolor="white", frameon=False
    )


def draw_labels(axes: Axes, labels: NDArray[np.integer[Any]], aspect: float = 1) -> None:
    """Lay a slice of labels over what is drawn, half transparent; the background stays clear.

    Parameters
    ----------
    axes
        With the image already in it.
    labels
        shape=(height, width), as the image was given to ``imshow``.
    aspect
        Height of a voxel divided by its width.
    """
    most = max(int(labels.max()), 1)
    axes.imshow(
        np.ma.masked_equal(labels, 0),
        cmap=ListedColormap([of_class(label) for label in range(1, most + 1)]),
        vmin=0.5,
        vmax=most + 0.5,
        alpha=0.65,
        aspect=aspect,
        interpolation="nearest",
    )


def _brain(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return where a normalised image is not background."""
    return np.asarray(image.any(axis=-1))


def _to_grey(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each sequence between 0 and 1 by its own range inside the brain; outside is 0."""
    brain = _brain(image)
    grey = np.zeros_like(image)
    if brain.any():
        low, high = np.percentile(image[brain], [0.5, 99.7], axis=0)
        scaled = (image - low) / np.maximum(high - low, 1e-6)
        grey = np.where(brain[..., None], np.clip(0.1 + 0.9 * scaled, 0, 1), 0)
    return grey.astype(np.float32)


def _best_slice(labels: NDArray[np.uint8], axis: int) -> int:
    """Return the slice across an axis that shows most of all classes, each counted as one whole."""
    others = tuple(other for other in range(3) if other != axis)
    shown = np.zeros(labels.shape[axis])
    for label in range(1, int(labels.max()) + 1):
        counts = np.count_nonzero(labels == label, axis=others)
        shown += counts / max(counts.sum(), 1)
    return int(shown.argmax()) if shown.any() else labels.shape[axis] // 2


def _around_brain(image: NDArray[np.float32]) -> tuple[slice, slice, slice]:
    """Return the box that holds the brain, with two voxels to spare."""
    occupied = _brain(image).nonzero()
    if not occupied[0].size:
        return slice(None), slice(None), slice(None)
    d, h, w = (slice(max(int(at.min()) - 2, 0), int(at.max()) + 3) for at in occupied)
    return d, h, w


def _slice(volume: NDArray[Any], index: int, axis: int) -> NDArray[Any]:
    """Cut a volume across an axis; the later of the other two axes points up."""
    return np.rot90(volume.take(index, axis=axis))


def _aspect(spacing: tuple[float, float, float], axis: int) -> float:
    width, height = (size for other, size in enumerate(spacing) if other != axis)
    return height / width


def _write_beside(axes: Axes, text: str) -> None:
    axes.text(
        -0.04, 0.5, text, color="white", fontsize=8, rotation=90,
        ha="right", va="center", ma="center", transform=axes.transAxes,
    )  # fmt: skip
