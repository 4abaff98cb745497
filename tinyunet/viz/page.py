"""One self-contained HTML page of scans and their labels: in 3-D, in three planes, with scores and curves.

The page works offline from a file. Plotly, a library, draws surfaces and curves; ``page.html`` draws planes
on canvases. Volumes are in it as bytes, compressed.
"""

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import UserError
from tinyunet.common.files import SIGNATURE, atomic
from tinyunet.data.brain import box_of, widened
from tinyunet.viz.figure import line_colour
from tinyunet.viz.surfaces import COMPARISON, Spacing, colours_of, head_figure

#: Packages of the extra ``viz``.
_NEEDED = {"plotly": "plotly", "skimage": "scikit-image"}
_MARGIN = 6  # voxels around the head
_LEVELS = 127  # of grey: more cannot be told apart, and would not compress
_BRIGHTEST = 99.8  # per cent of the brain's voxels that are darker than white
_MOST_BYTES = 6_000_000  # of compressed volumes: as text they take a third more, and Plotly takes 5 MB


class Head(NamedTuple):
    """A scan to look at.

    ``image`` has shape=(D, H, W, C) and is 0 outside the brain; ``labels`` hold the class of each voxel, by
    kind: "prediction", "truth" or both. ``scores`` is a table, its head first.
    """

    name: str
    image: NDArray[np.float32]
    labels: Mapping[str, NDArray[np.uint8]]
    spacing: Spacing = (1.0, 1.0, 1.0)
    note: str = ""
    scores: Sequence[Sequence[str]] = ()


class Page(NamedTuple):
    """A page, as text, with lines about what was understood of its files; Jupyter shows it in a frame."""

    text: str
    notes: Sequence[str] = ()

    def write(self, path: Path | str) -> None:
        """Write the page, whole or not at all; OSError if that fails."""
        with atomic(path, follow_links=True) as file:
            file.write(self.text.encode())

    def _repr_html_(self) -> str:
        frame = 'width="100%" height="900" style="border:0"'
        return f'<iframe srcdoc="{html.escape(self.text)}" {frame}></iframe>'


def check_packages() -> None:
    """Raise UserError unless the packages that a page needs are there."""
    missing = [name for module, name in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise UserError(f"needs {' and '.join(missing)}; pip install 'tinyunet[viz]'")


def make_page(
    title: str,
    heads: Sequence[Head],
    names: Sequence[str],
    sequences: Sequence[str],
    history: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> Page:
    """Return a page of one head at least.

    ``names`` are those of the classes, the background first, ``sequences`` those of the channels.
    ``history`` and ``settings`` of a training are shown below. UserError if a package is missing.
    """
    check_packages()
    from plotly.offline import get_plotlyjs

    budget = _MOST_BYTES // len(heads)
    content = {
        "classes": [*zip(names[1:], colours_of(names), strict=True)],
        "comparison": [*COMPARISON.items()],
        "sequences": list(sequences),
        "heads": [_head(head, names, budget) for head in heads],
        "curves": [json.loads(figure.to_json()) for figure in (_curves(history) if history else ())],
        "settings": [[name, str(value)] for name, value in (settings or {}).items() if value is not None],
    }
    # No text in it can end the script element.
    data = json.dumps(content).replace("<", "\\u003c")
    template = files("tinyunet.viz").joinpath("page.html").read_text("utf-8")
    parts = {"TITLE": html.escape(title), "SIGNATURE": SIGNATURE, "PLOTLY": get_plotlyjs(), "DATA": data}
    for name, part in parts.items():
        template = template.replace(f"[[{name}]]", part)
    return Page(template)


def _head(head: Head, names: Sequence[str], budget: int) -> dict[str, Any]:
    """Return what the page needs of a head, in types that JSON has."""
    brain: NDArray[np.bool_] = np.asarray(head.image.any(axis=-1))
    box = widened(box_of(brain), _MARGIN, brain.shape) if brain.any() else (slice(None),) * 3
    brain, image = brain[box], head.image[box]
    labels = {kind: np.ascontiguousarray(volume[box]) for kind, volume in head.labels.items()}
    grey = [_compressed(_grey(image[..., c], brain)) for c in range(image.shape[-1])]
    step = 1
    if sum(map(len, grey)) > budget:  # every second voxel, along each axis
        step = 2
        grey = [_compressed(_grey(image[..., c], brain)[::2, ::2, ::2]) for c in range(image.shape[-1])]
    figure = head_figure(brain, labels, names, head.spacing)
    return {
        "name": head.name,
        "note": head.note,
        "shape": brain[::step, ::step, ::step].shape,
        "spacing": [side * step for side in head.spacing],
        "image": [_as_text(volume) for volume in grey],
        "labels": {
            kind: _as_text(_compressed(volume[::step, ::step, ::step])) for kind, volume in labels.items()
        },
        "figure": json.loads(figure.to_json()),
        "scores": [list(row) for row in head.scores],
        "start": _middle(labels, brain, step),
    }


def _grey(sequence: NDArray[np.float32], brain: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return a sequence as levels of grey: 0 outside the brain, above it from its darkest voxel on."""
    if not brain.any():
        return np.zeros(sequence.shape, np.uint8)
    low, high = np.percentile(sequence[brain], [100 - _BRIGHTEST, _BRIGHTEST])
    levels = np.clip((sequence - low) / max(high - low, 1e-6), 0, 1) * (_LEVELS - 1) + 1
    return np.where(brain, levels, 0).astype(np.uint8)


def _middle(labels: Mapping[str, NDArray[np.uint8]], brain: NDArray[np.bool_], step: int) -> list[int]:
    """Return the voxel in which the page's planes meet first: where most of a tumour is seen."""
    shown = next((volume > 0 for volume in labels.values() if volume.any()), brain)
    sums = [shown.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return [int(line.argmax()) // step for line in sums]


def _compressed(volume: NDArray[np.uint8]) -> bytes:
    return gzip.compress(np.ascontiguousarray(volume).tobytes(), 9, mtime=0)


def _as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _curves(history: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return loss and validation over the epochs, as figures of Plotly."""
    import plotly.graph_objects as go

    epochs = [entry["epoch"] for entry in history]
    validation = [entry["validation"]["regions"] or entry["validation"]["classes"] for entry in history]
    loss = {"loss": ([entry["loss"] for entry in history], "#ccc")}
    dice = {
        name: ([scores[name] for scores in validation], line_colour(index))
        for index, name in enumerate(validation[0])
    }
    figures = []
    titles = "Loss of the training patches", "Dice of the validation"
    for title, lines in zip(titles, (loss, dice), strict=True):
        figure = go.Figure(
            [
                go.Scatter(x=epochs, y=values, name=name, mode="lines+markers", line={"color": colour})
                for name, (values, colour) in lines.items()
            ]
        )
        figure.update_layout(
            template="plotly_dark",
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            title={"text": title, "font": {"size": 15}},
            margin={"l": 45, "r": 10, "t": 40, "b": 40},
            showlegend=len(lines) > 1,
            legend={"orientation": "h", "y": -0.2},
            height=340,
        )
        figure.update_xaxes(title="epoch", tick0=epochs[0], dtick=max(1, len(epochs) // 8))
        figures.append(figure)
    figures[1].update_yaxes(range=[0, 1.02])
    return figures
