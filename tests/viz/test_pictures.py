"""Pictures are written whole, show what they are given, and need no screen."""

import errno
import logging
import os
import warnings

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from tinyunet.viz import attempt
from tinyunet.viz.figure import CLASSES, LINES, class_colour, line_colour, line_style, write
from tinyunet.viz.learning_curves import draw_learning_curves
from tinyunet.viz.volumes import PicturedCase, draw_predictions

MODALITIES = ("FLAIR", "T1w", "t1gd", "T2w")
LABELS = ("background", "edema", "non-enhancing tumor", "enhancing tumour")


def pixels(path):
    """The picture without its transparency, 0 to 1."""
    return matplotlib.image.imread(path)[..., :3]


def has(picture, colour, least):
    """Whether so many pixels are near a colour."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (np.abs(picture - rgb).max(axis=-1) < 0.02).sum() >= least


def history(epochs, regions):
    dice = {"whole tumour": 0.9, "tumour core": 0.8, "enhancing": 0.7}
    validation = {"classes": {"liver": 0.5}, "regions": dice if regions else {}}
    return [
        {"epoch": epoch, "loss": 1 / epoch, "dice": 0.5, "validation": validation}
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize(("epochs", "lines"), [(1, 3), (12, 3), (12, 1)])
def test_learning_curves_have_a_line_for_each_region_or_class(tmp_path, epochs, lines):
    draw_learning_curves(tmp_path / "curves.png", history(epochs, regions=lines == 3))
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    picture = pixels(tmp_path / "curves.png")
    for index in range(3):
        assert has(picture, line_colour(index), 50) == (index < lines)


def case(seed, shape=(14, 20, 17)):
    generator = np.random.default_rng(seed)
    image = generator.standard_normal((*shape, 4)).astype(np.float32)
    image[:2] = 0
    truth = np.zeros(shape, np.uint8)
    truth[4:10, 4:12, 4:12] = 1
    truth[6:8, 6:9, 6:9] = 2
    truth[8:10, 8:12, 8:12] = 3
    return PicturedCase(f"case {seed}", image, truth, truth.copy(), "mean Dice 1.00")


def test_predictions_of_cases_of_several_sizes(tmp_path):
    cases = [case(0), case(1, (30, 15, 15)), case(2)]
    before = [case.image.copy() for case in cases]
    draw_predictions(tmp_path / "found.png", cases, MODALITIES, LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["found.png"]
    height, width, _ = pixels(tmp_path / "found.png").shape
    assert width > height > 600
    for case_, image in zip(cases, before, strict=True):
        np.testing.assert_array_equal(case_.image, image)


def test_a_prediction_is_seen(tmp_path):
    shown = case(0)
    nothing = shown._replace(prediction=np.zeros_like(shown.truth))
    for name, one in (("shown", shown), ("nothing", nothing)):
        draw_predictions(tmp_path / name, [one], MODALITIES, LABELS)
    shown_picture, nothing_picture = (pixels(tmp_path / name) for name in ("shown", "nothing"))
    assert (np.abs(shown_picture - nothing_picture).max(axis=-1) > 0.05).sum() > 2000


def test_long_voxels_make_a_long_picture(tmp_path):
    flat = case(0, (20, 20, 20))._replace(spacing=(1.0, 1.0, 1.0))
    tall = flat._replace(spacing=(1.0, 1.0, 2.0))
    for name, one in (("flat", flat), ("tall", tall)):
        draw_predictions(tmp_path / name, [one], MODALITIES, LABELS)
    black = [(pixels(tmp_path / name).max(axis=-1) == 0).mean() for name in ("flat", "tall")]
    # Seen from above nothing has changed but the scale: half of the panel is now around it.
    assert black[1] > black[0] + 0.2


def test_what_is_absent_is_not_needed(tmp_path):
    empty = np.zeros((5, 6, 7), np.uint8)
    blank = PicturedCase("blank", np.zeros((5, 6, 7, 1), np.float32), empty, empty, "")
    draw_predictions(tmp_path / "blank.png", [blank], ["CT"], ["background", "liver"])
    assert pixels(tmp_path / "blank.png").size


def test_names_are_no_formulas_and_a_plane_is_a_volume(tmp_path):
    thin = case(0, (1, 20, 17))._replace(name=r"a$b\frac3$")
    thin.truth[0, 4:9, 5:9] = thin.prediction[0, 5:9, 5:9] = 1
    draw_predictions(tmp_path / "thin.png", [thin], ["x$_$", "$", "c", "d"], ["", "tu$mo$r_^"])
    entry = {"epoch": 1, "loss": 1.0, "dice": 0.5}
    scores = {"regions": {}, "classes": {"tu$mo$r_^": 0.5}}
    draw_learning_curves(tmp_path / "curves.png", [entry | {"validation": scores}])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, ""),
        (ModuleNotFoundError("no\nmatplotlib"), "ModuleNotFoundError: no matplotlib"),
        (UnicodeEncodeError("utf-8", "\udcfc", 0, 1, "no"), "UnicodeEncodeError: 'utf-8' codec"),
        (PermissionError(13, "Permission denied", "a.png"), "Permission denied\n"),
        (MemoryError(), "out of memory"),
        (SystemError("bad call"), "SystemError: bad call\n"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_a_line(capfd, error, told):
    with attempt("a.png"):
        warnings.warn("a glyph is missing", stacklevel=1)
        logging.getLogger("matplotlib").warning("a font is missing")
        if error:
            raise error
    err = capfd.readouterr().err
    assert err.startswith(f"tinyunet: could not draw a.png: {told}" if error else "")
    assert err.count("\n") == (error is not None)
    assert logging.getLogger("matplotlib").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_any_name_is_drawn_into_a_file_of_any_name(tmp_path, ending):
    name = os.fsdecode(b"M\xfcller \x1b[1m\n\x00 \xe4\xb8\xad")
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1], label=name)
    axes.set(title=name, xlabel=name)
    axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a box stands for what the font lacks
        write(figure, tmp_path / (os.fsdecode(b"M\xfcller.") + ending))
    assert [path.suffix for path in tmp_path.iterdir()] == [f".{ending}"]


def test_colours_are_all_different_and_come_again():
    for palette, of in ((CLASSES, lambda i: class_colour(i + 1)), (LINES, line_colour)):
        assert len(set(palette)) == len(palette)
        assert [of(i) for i in range(len(palette))] == list(palette)
        assert of(len(palette)) == of(0)


def test_lines_of_one_colour_differ_in_their_dashes():
    styles = [tuple(line_style(index).values()) for index in range(28)]
    assert len(set(styles)) == 28
    assert [colour for colour, _ in styles] == [line_colour(index) for index in range(28)]


def test_of_a_picture_that_fails_nothing_is_left(tmp_path, monkeypatch):
    def fills_the_disk(figure, file, **options):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Figure, "savefig", fills_the_disk)
    with pytest.raises(OSError, match="no space left"):
        write(Figure(), tmp_path / "picture.png", dpi=80)
    assert list(tmp_path.iterdir()) == []
