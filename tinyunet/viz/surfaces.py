"""Surfaces in 3-D: the brain, translucent, and in it the parts of a tumour, as a figure of Plotly.

A surface is where a smoothed mask is one half, found by marching cubes (Lewiner et al. 2003, scikit-image).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tinyunet.data.brain import box_of, widened
from tinyunet.data.conventions import kind_of_class
from tinyunet.viz.figure import class_colour

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]

#: Colours of the parts of a tumour: those of the talk, red core, green edema, yellow enhancing tumour.
PARTS = {
    "edema": "#3fae49",
    "core": "#e2352f",
    "enhancing": "#f6d93a",
    "cyst": "#9a6fd0",
    "cavity": "#4f9fd8",
}
#: Colours of a comparison.
COMPARISON = {"true positive": "#2ec4b6", "false positive": "#ff8c1a", "false negative": "#e23fd0"}
_BRAIN = "#f2ece4"
_SMOOTH = 0.8  # voxels
_BRAIN_POINTS, _TUMOUR_POINTS = 72, 96  # along the longest side of what is drawn: a page must stay small


def colours_of(names: Sequence[str]) -> list[str]:
    """Return a colour for each class but the background: the talk's, if each name tells a part of its own."""
    kinds = [kind_of_class(name) for name in names[1:]]
    if None in kinds or len({*kinds}) < len(kinds):
        return [class_colour(label) for label in range(1, len(names))]
    return [PARTS[kind] for kind in kinds if kind]


def compare(prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> dict[str, Mask]:
    """Return where a tumour was found, wrongly found and missed, whatever its parts."""
    found, true = prediction > 0, truth > 0
    return {"true positive": found & true, "false positive": found & ~true, "false negative": ~found & true}


def head_figure(
    brain: Mask, labels: Mapping[str, NDArray[np.uint8]], names: Sequence[str], spacing: Spacing
) -> Any:
    """Return a figure: the brain, a surface for each class of each kind of labels, and a comparison.

    ``labels`` are by kind, "prediction" or "truth", shape=(D, H, W). Each surface's ``meta`` is the kind.
    Millimetres to the right, to the front and up.
    """
    import plotly.graph_objects as go

    traces = [_mesh(brain, spacing, _BRAIN_POINTS, "brain", "brain", _BRAIN, 0.18)]
    for kind, volume in labels.items():
        for label, (name, colour) in enumerate(zip(names[1:], colours_of(names), strict=True), 1):
            traces.append(_mesh(volume == label, spacing, _TUMOUR_POINTS, kind, name, colour, 0.75))
    if len(labels) > 1:
        for name, mask in compare(labels["prediction"], labels["truth"]).items():
            # What was missed is often a shell around what was found.
            opacity = 0.4 if name == "false negative" else 0.9
            traces.append(_mesh(mask, spacing, _TUMOUR_POINTS, "difference", name, COMPARISON[name], opacity))
    hidden = {"visible": False, "showgrid": False}
    figure = go.Figure([trace for trace in traces if trace is not None])
    figure.update_layout(
        scene={"xaxis": hidden, "yaxis": hidden, "zaxis": hidden, "aspectmode": "data"},
        scene_camera={"eye": {"x": -1.3, "y": 1.1, "z": 0.6}},
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        legend={"font": {"color": "#ddd"}, "x": 0, "y": 1, "bgcolor": "rgba(0,0,0,0)"},
    )
    return figure


def _mesh(
    mask: Mask, spacing: Spacing, points: int, kind: str, name: str, colour: str, opacity: float
) -> Any:
    import plotly.graph_objects as go

    found = surface(mask, spacing, points)
    if found is None:
        return None
    (x, y, z), (i, j, k) = found[0].T, found[1].T
    light = {"ambient": 0.45, "diffuse": 0.8, "specular": 0.25, "roughness": 0.6}
    return go.Mesh3d(
        x=x, y=y, z=z, i=i, j=j, k=k, name=name, meta=kind, color=colour, opacity=opacity, lighting=light,
        hoverinfo="name", showlegend=True,
    )  # fmt: skip


def surface(
    mask: Mask, spacing: Spacing, points: int = 96
) -> tuple[NDArray[np.float32], NDArray[np.int32]] | None:
    """Return vertices in millimetres, shape=(N, 3), and triangles of them, shape=(M, 3); None if empty.

    Along its longest side the mask's box is sampled at about ``points`` places at most.
    """
    from skimage.measure import marching_cubes

    if not mask.any():
        return None
    box = widened(box_of(mask), 2, mask.shape)
    part = np.pad(mask[box].astype(np.float32), 2)
    step = -(-max(part.shape) // points)
    smooth = ndimage.gaussian_filter(part, _SMOOTH * step)[::step, ::step, ::step]
    if min(smooth.shape) < 2 or smooth.max() <= 0:
        return None
    level = min(0.5, float(smooth.max()) / 2)  # of a few voxels nothing would be left
    vertices, triangles, _, _ = marching_cubes(smooth, level)
    first = np.array([side.start for side in box]) - 2
    placed = (vertices * step + first) * np.asarray(spacing)
    return placed.astype(np.float32), triangles.astype(np.int32)
