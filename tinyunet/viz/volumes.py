"""Pictures of volumes in slices: cases with their labels, and predictions over the truth.

The axes of a volume point to the patient's right, to the front and up. A slice is drawn with the later of
its two axes up, so the patient's left is on the left.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from tinyunet.data.cases import Case, load_case
from tinyunet.viz.figure import class_colour, panels, write

# Each plane's name, and the axis of the volume that it is perpendicular to.
_PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
_GREY = {"cmap": "gray", "vmin": 0, "vmax": 1}
_OPACITY = 0.55
# Inches of a panel with a prediction, and of the legend below cases.
_PANEL, _LEGEND = 1.9, 0.35


def plot_cases(
    cases: Sequence[Case],
    path: str | Path,
    modalities: Sequence[str] | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Draw cases below each other, three planes each, a column for each sequence; write atomically.

    The planes go where most of all classes is seen. The last column shows the labels over the
    third sequence (t1gd in brain-tumour data) or the last there is.

    Parameters
    ----------
    cases : sequence of Case
        One at least, all with the same number of sequences, or ValueError; DataError if one is not readable.
    path : str or Path
        Of the picture; its ending gives the format.
    modalities, classes : sequence of str
        Names of the sequences, above the columns; of the classes from 1 on, for a legend below.
    """
    if len({case.channels for case in cases}) != 1:
        raise ValueError("cases: expected one or more, all with the same number of sequences")
    channels, legend = cases[0].channels, _LEGEND if classes else 0
    columns, rows = channels + 1, len(_PLANES) * len(cases)
    height = 1.7 * rows + 0.3 + legend
    figure = Figure(figsize=(1.7 * columns + 0.3, height), facecolor="black")
    grid = figure.subplots(rows, columns, squeeze=False)
    for case, rows_of_case in zip(cases, np.split(grid, len(cases)), strict=True):
        image, labels, geometry = load_case(case)
        box = _around_brain(image)
        shown, labels, title = _grey(image[box]), labels[box], f"{case.name}\n"
        for row, (plane, axis) in zip(rows_of_case, _PLANES.items(), strict=True):
            at, steps = _best_slice(labels, axis), _in_plane(geometry.spacing, axis)
            for axes, channel in zip(row, [*range(channels), min(2, channels - 1)], strict=True):
                _show(axes, _slice(shown[..., channel], at, axis), steps, **_GREY)
                axes.set_axis_off()
            draw_labels(row[-1], _slice(labels, at, axis), steps)
            style = {"ha": "right", "va": "center", "ma": "center", "color": "white", "fontsize": 8}
            row[0].text(-0.04, 0.5, title + plane, rotation=90, transform=row[0].transAxes, **style)
            title = ""
    for axes, name in zip(grid[0], [*(modalities or ()), "labels"], strict=False):
        axes.set_title(name, color="white", fontsize=9)
    figure.subplots_adjust(0.05, (legend or 0.07) / height, 0.995, 1 - 0.25 / height, 0.02, 0.02)
    if classes:
        _explain(figure, classes)
    write(figure, path, dpi=80, facecolor="black")


def _explain(figure: Figure, classes: Sequence[str]) -> None:
    """Write a legend of the label colours in a line at the bottom."""
    handles = [Patch(facecolor=class_colour(label), label=name) for label, name in enumerate(classes, 1)]
    style = {"fontsize": 8, "labelcolor": "white", "frameon": False}
    figure.legend(handles=handles, loc="lower right", ncols=len(handles), **style)


def draw_labels(
    axes: Axes, labels: NDArray[np.integer[Any]], steps: tuple[float, float] = (1.0, 1.0)
) -> None:
    """Draw a slice of labels over the picture, half transparent; the background stays clear.

    ``labels`` have shape=(height, width), the first row on top; ``steps`` are width and height of a voxel.
    """
    most = max(int(labels.max()), 1)
    colours = ListedColormap([class_colour(label) for label in range(1, most + 1)])
    style = {"cmap": colours, "vmin": 0.5, "vmax": most + 0.5, "alpha": 0.65, "interpolation": "nearest"}
    _show(axes, np.ma.masked_equal(labels, 0), steps, **style)


class PicturedCase(NamedTuple):
    """A prediction to show, with a note under its name and the size of a voxel along each axis.

    ``image`` has shape (D, H, W, C); ``truth`` and ``prediction`` hold the class of each voxel.
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
    """Draw each case in a row, one at least, and write a PNG atomically; OSError if that fails.

    A row shows one or two sequences as they are, then three planes through most of the tumour with the
    prediction in colour and the truth as white outlines. ``modalities`` are names of the channels,
    ``labels`` of the classes; class 0 is the background.
    """
    plain = _channels(modalities)
    columns = len(plain) + len(_PLANES)
    figure, grid = panels(_PANEL * columns, _PANEL * len(cases) + 0.6, len(cases), columns, grid="")
    for row, case in zip(grid, cases, strict=True):
        tumour = (case.truth if case.truth.any() else case.prediction) > 0
        grey = _grey(case.image)
        for axes, channel in zip(row, plain, strict=False):
            _show_square(axes, case, grey[..., channel], 2, _best_slice(tumour, 2))
        for axes, axis in zip(row[len(plain) :], _PLANES.values(), strict=True):
            _show_square(axes, case, grey[..., plain[0]], axis, _best_slice(tumour, axis))
            _overlay(axes, case, axis, _best_slice(tumour, axis), len(labels))
        row[0].set_ylabel(f"{case.name}\n{case.note}", fontsize=8)
    for axes, title in zip(grid[0], [*(modalities[channel] for channel in plain), *_PLANES], strict=True):
        axes.set_title(title, fontsize=9)
    handles: list[Any] = [Patch(color=class_colour(n), alpha=_OPACITY, label=x) for n, x in enumerate(labels)]
    handles.append(Line2D([], [], color="white", linewidth=1.2, label="truth"))
    style = {"fontsize": 8, "facecolor": "0.35", "labelcolor": "white"}
    figure.legend(handles=handles[1:], loc="outside lower center", ncols=len(labels), **style)
    write(figure, path, format="png")


def _channels(modalities: Sequence[str]) -> list[int]:
    """Return which channels are shown as they are; the first of them also lies under the colours.

    Edema is bright in FLAIR, the enhancing rim in T1 after gadolinium.
    """
    names = [name.lower() for name in modalities]
    flair = next((i for i, name in enumerate(names) if "flair" in name), 0)
    contrast = next((i for i, name in enumerate(names) if name in ("t1gd", "t1ce", "t1c")), None)
    return [flair] if contrast is None else [flair, contrast]


def _show_square(axes: Axes, case: PicturedCase, grey: NDArray[np.float32], axis: int, at: int) -> None:
    """Show a slice in a square as wide as the volume's longest side, so that all panels line up."""
    sides = [size * step for size, step in zip(grey.shape, case.spacing, strict=True)]
    (width, height), half = _in_plane(sides, axis), max(sides) / 2
    _show(axes, _slice(grey, at, axis), _in_plane(case.spacing, axis), interpolation="bilinear", **_GREY)
    limits = {name: (side / 2 - half, side / 2 + half) for name, side in (("xlim", width), ("ylim", height))}
    axes.set(xticks=[], yticks=[], facecolor="black", **limits)


def _overlay(axes: Axes, case: PicturedCase, axis: int, at: int, classes: int) -> None:
    prediction, truth = (_slice(labels, at, axis) for labels in (case.prediction, case.truth))
    if min(truth.shape) < 2:
        return  # a line of voxels has no contour
    steps = _in_plane(case.spacing, axis)
    x, y = ((np.arange(n) + 0.5) * step for n, step in zip(truth.T.shape, steps, strict=True))
    for label in range(1, classes):
        found, true = ((labels == label).astype(np.float32) for labels in (prediction, truth))
        if found.any():
            axes.contourf(x, y[::-1], found, [0.5, 1.5], colors=[class_colour(label)], alpha=_OPACITY)
        if true.any():
            axes.contour(x, y[::-1], true, [0.5], colors="white", linewidths=0.8)


# ---- slices ----------------------------------------------------------------------------------------


def _grey(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each sequence between 0 and 1 by its own range inside the brain; outside is 0."""
    brain = np.any(image != 0, axis=-1)
    if not brain.any():
        return np.zeros_like(image)
    low, high = np.percentile(image[brain], [0.5, 99.7], axis=0)
    scaled = (image - low) / np.maximum(high - low, 1e-6)
    return np.where(brain[..., None], np.clip(0.1 + 0.9 * scaled, 0, 1), 0).astype(np.float32)


def _around_brain(image: NDArray[np.float32]) -> tuple[slice, slice, slice]:
    """Return the box around all voxels but the background, and two voxels more on each side."""
    occupied = np.nonzero(np.any(image != 0, axis=-1))
    if not occupied[0].size:
        return slice(None), slice(None), slice(None)
    d, h, w = (slice(max(int(at.min()) - 2, 0), int(at.max()) + 3) for at in occupied)
    return d, h, w


def _best_slice(labels: NDArray[Any], axis: int) -> int:
    """Return the slice across an axis that shows the largest shares of all classes, summed."""
    others = tuple(other for other in range(3) if other != axis)
    shown = np.zeros(labels.shape[axis])
    for label in range(1, int(labels.max()) + 1):
        counts = np.count_nonzero(labels == label, axis=others)
        shown += counts / max(counts.sum(), 1)
    return int(shown.argmax()) if shown.any() else labels.shape[axis] // 2


def _slice(volume: NDArray[Any], at: int, axis: int) -> NDArray[Any]:
    """Cut a volume across an axis; the first row is the top."""
    return np.rot90(volume.take(at, axis=axis))


def _in_plane(values: Sequence[float], axis: int) -> tuple[float, float]:
    """Return the values of the two axes in a slice: of its width and of its height."""
    width, height = (value for other, value in enumerate(values) if other != axis)
    return width, height


def _show(axes: Axes, picture: NDArray[Any], steps: tuple[float, float], **style: Any) -> None:
    """Show a slice whose voxels are so wide and so high."""
    height, width = picture.shape
    axes.imshow(picture, extent=(0, width * steps[0], 0, height * steps[1]), **style)
