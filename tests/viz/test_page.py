"""The page in 3-D: what is in it, and that a real browser turns it and draws its planes."""

import base64
import contextlib
import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

pytest.importorskip("plotly")
pytest.importorskip("skimage")

from tinyunet.common.errors import DataError, UserError
from tinyunet.viz import page as module
from tinyunet.viz.page import Head, make_page
from tinyunet.viz.scans import look
from tinyunet.viz.surfaces import COMPARISON, PARTS, colours_of, compare, surface

NAMES = ("background", "edema", "non-enhancing tumor", "enhancing tumour")


def ball(radius: float, shape: tuple[int, int, int] = (30, 36, 24), shift: int = 0) -> Any:
    """Return a mask of a ball around the middle of a volume, moved along the first axis."""
    grid = np.indices(shape) - (np.array(shape).reshape(3, 1, 1, 1) - 1) / 2
    grid[0] -= shift
    return (grid**2).sum(0) <= radius**2


def head(name: str = "one", both: bool = True, channels: int = 2) -> Head:
    brain = ball(11)
    image = np.random.default_rng(0).standard_normal((*brain.shape, channels)).astype(np.float32)
    prediction, truth = (ball(5, shift=shift).astype(np.uint8) + ball(3, shift=shift) for shift in (2, -1))
    labels = {"prediction": prediction} | ({"truth": truth} if both else {})
    return Head(
        name, image * brain[..., None], labels, (1.0, 1.0, 2.0), "a note", [["", "Dice"], ["edema", "0.5"]]
    )


def content_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def bytes_of(text: str) -> Any:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8)


class TestSurface:
    """A surface is where the mask is, in millimetres."""

    @pytest.mark.parametrize("points", [20, 100])
    def test_of_a_ball(self, points: int) -> None:
        vertices, triangles = surface(ball(9, (40, 40, 40)), (1.0, 2.0, 0.5), points)
        middle = np.array([19.5, 39, 9.75])
        radii = np.linalg.norm((vertices - middle) / (1.0, 2.0, 0.5), axis=1)
        assert abs(radii.mean() - 9) < 0.6
        assert radii.std() < 0.6
        assert triangles.max() == len(vertices) - 1
        edges = np.sort(triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
        assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()  # closed

    def test_at_the_edge_and_of_one_voxel_and_of_none(self) -> None:
        mask = np.zeros((6, 6, 6), bool)
        assert surface(mask, (1, 1, 1)) is None
        mask[0, 5, 0] = True
        vertices, _ = surface(mask, (1, 1, 1))
        np.testing.assert_allclose(vertices.mean(0), [0, 5, 0], atol=0.3)
        assert surface(np.ones((3, 3, 3), bool), (1, 1, 1)) is not None

    def test_colours(self) -> None:
        assert colours_of(NAMES) == [PARTS["edema"], PARTS["core"], PARTS["enhancing"]]
        other = colours_of(("background", "spleen", "liver"))
        assert len({*other}) == 2
        assert not {*other} & {*PARTS.values()}

    def test_comparison(self) -> None:
        prediction, truth = np.array([0, 1, 2, 0], np.uint8), np.array([0, 0, 1, 3], np.uint8)
        found = {name: mask.tolist() for name, mask in compare(prediction, truth).items()}
        assert found == {
            "true positive": [False, False, True, False],
            "false positive": [False, True, False, False],
            "false negative": [False, False, False, True],
        }
        assert [*found] == [*COMPARISON]


class TestPage:
    """What the page holds."""

    def test_volumes_and_surfaces(self) -> None:
        one = head()
        found = content_of(make_page("t", [one], NAMES, ("a", "b")).text)
        (shown,) = found["heads"]
        assert shown["shape"] == [30, 34, 24]  # the ball, and 6 voxels on each side where there is room
        assert found["sequences"] == ["a", "b"]
        grey = bytes_of(shown["image"][1]).reshape(shown["shape"])
        assert np.array_equal(grey > 0, one.image[:, 1:35].any(-1))
        assert grey.max() <= 127
        for kind in ("prediction", "truth"):
            labels = bytes_of(shown["labels"][kind]).reshape(shown["shape"])
            assert np.array_equal(labels, one.labels[kind][:, 1:35])
        traces = [(trace["meta"], trace["name"]) for trace in shown["figure"]["data"]]
        assert traces == [
            ("brain", "brain"),
            *((kind, name) for kind in ("prediction", "truth") for name in NAMES[1:3]),
            *(("difference", name) for name in COMPARISON),
        ]
        assert one.labels["prediction"][tuple(shown["start"])] > 0

    def test_names_of_strangers_are_text(self) -> None:
        evil = "</script><script>alert(1)</script>"
        text = make_page(evil, [head(evil)], ("background", evil, "b", "c"), (evil, "b")).text
        assert "<script>alert(1)" not in text
        assert content_of(text)["classes"][0][0] == evil

    def test_large_volumes_lose_every_second_voxel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_MOST_BYTES", 1000)
        (shown,) = content_of(make_page("t", [head()], NAMES, ("a", "b")).text)["heads"]
        assert (shown["shape"], shown["spacing"]) == ([15, 17, 12], [2.0, 2.0, 4.0])

    def test_nothing_there(self) -> None:
        empty = np.zeros((5, 6, 7), np.uint8)
        page = make_page(
            "t", [Head("n", np.zeros((5, 6, 7, 1), np.float32), {"truth": empty})], NAMES, ("a",)
        )
        assert content_of(page.text)["heads"][0]["figure"]["data"] == []

    def test_without_the_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"needs plotly and scikit-image; pip install 'tinyunet\[viz\]'"):
            make_page("t", [head()], NAMES, ("a", "b"))


class TestFiles:
    """``python -m tinyunet.view``, and the same in Jupyter."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> Path:
        one, folder = head(), tmp_path / "BraTS2021_00000"
        folder.mkdir()
        numbers = np.array([0, 2, 1, 4], np.uint8)  # of edema, core and enhancing tumour in this release
        volumes = {kind: one.image[..., 0] + 9 * (one.image[..., 0] != 0) for kind in ("flair", "t1ce")}
        for kind, volume in (volumes | {"seg": numbers[one.labels["truth"]]}).items():
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / f"{folder.name}_{kind}.nii.gz")
        nibabel.save(
            nibabel.Nifti1Image(numbers[one.labels["prediction"]], np.eye(4)), tmp_path / "found.nii.gz"
        )
        return folder

    def test_a_case_and_its_prediction(self, case: Path) -> None:
        page = look(case, case.parent / "found.nii.gz", convention="brats2018")
        found = content_of(page.text)
        assert found["sequences"] == ["FLAIR", "t1gd"]
        (shown,) = found["heads"]
        assert [*shown["labels"]] == ["prediction", "truth"]
        assert shown["scores"][0] == ["", "Dice", "HD95 mm", "sensitivity", "precision", "ml", "true ml"]
        assert shown["scores"][1][0] == "whole tumour"
        assert 0 < float(shown["scores"][1][1]) < 1
        assert any("labels read as" in note for note in page.notes)
        assert page._repr_html_().startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')

    def test_an_image_alone(self, case: Path) -> None:
        found = content_of(look(case / f"{case.name}_flair.nii.gz").text)
        assert (found["sequences"], found["heads"][0]["labels"]) == (["sequence 1"], {})

    def test_faults(self, case: Path) -> None:
        with pytest.raises(
            UserError, match="none: no such file; expected a NIfTI file or the folder of a BraTS"
        ):
            look(case / "none")
        shutil.copytree(case, case.parent / "BraTS2021_00001")
        with pytest.raises(UserError, match="2 BraTS cases; expected the folder of one"):
            look(case.parent)
        labels = nibabel.Nifti1Image(np.zeros((5, 5, 5), np.uint8), np.eye(4))
        nibabel.save(labels, case.parent / "small.nii.gz")
        with pytest.raises(DataError, match="small"):
            look(case, case.parent / "small.nii.gz", convention="brats2018")


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
HISTORY = [{"epoch": 1, "loss": 1.0, "validation": {"regions": {}, "classes": {"edema": 0.5}}}]


@contextlib.contextmanager
def opened(folder: Path, width: int, **device: Any) -> Iterator[Any]:
    """Show a page of two heads in a browser; no line of the console may be an error."""
    sync_api = pytest.importorskip("playwright.sync_api")
    make_page("t", [head(), head("two")], NAMES, ("a", "b"), HISTORY, {"lr": 1}).write(folder / "page.html")
    flags = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": width, "height": 900}, **device)
        errors = list[str]()
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{folder}/page.html")
        page.wait_for_function("document.body.dataset.ready === 'one'")
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing hangs out
        yield page
        assert errors == []
        browser.close()


def canvas(page: Any, number: int) -> str:
    return str(page.evaluate(f"document.querySelectorAll('.plane canvas')[{number}].toDataURL()"))


def eye(page: Any) -> Any:
    """Where the head is seen from."""
    scene = "document.getElementById('surfaces')._fullLayout.scene._scene"
    return np.array(page.evaluate(f"Object.values({scene}.getCamera().eye)"))


def middle(page: Any, selector: str) -> tuple[float, float]:
    box = page.locator(selector).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def turned(page: Any, drag: Callable[[], None]) -> bool:
    """Drag until the eye has moved: the first drag may come before the first picture is drawn."""
    before = eye(page)
    for _ in range(20):
        drag()
        page.wait_for_timeout(200)
        if not np.allclose(eye(page), before):
            return True
    return False


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(tmp_path: Path, width: int) -> None:
    """Turn the head, move a slider, change what is shown: each changes what is seen, without an error."""
    with opened(tmp_path, width) as page:
        planes, (x, y) = [canvas(page, number) for number in range(3)], middle(page, "#surfaces")

        def drag() -> None:
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + 80, y + 30, steps=5)
            page.mouse.up()

        assert turned(page, drag)
        slider = page.locator("[data-axis='2'] input")
        slider.fill("3")
        assert all(canvas(page, number) != plane for number, plane in enumerate(planes))  # cross-hairs
        for mode in ("truth", "difference", "none"):
            planes = [canvas(page, number) for number in range(3)]
            slider.fill("12")
            page.select_option("#mode", mode)
            assert any(canvas(page, number) != plane for number, plane in enumerate(planes))
        page.select_option("#head", "two")
        page.wait_for_function("document.body.dataset.ready === 'two'")
        page.screenshot(path=tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000


@needs_chromium
def test_with_fingers(tmp_path: Path) -> None:
    """One finger turns the head, two zoom; a tap moves the planes, a finger that moves over one scrolls."""
    with opened(tmp_path, 390, has_touch=True, is_mobile=True) as page:
        session = page.context.new_cdp_session(page)

        def swipe(steps: int, *fingers: tuple[tuple[float, float], tuple[float, float]]) -> None:
            """Move each finger from a point by so much a step."""
            for step in range(steps + 1):
                points = [
                    {"x": x + step * right, "y": y + step * down, "id": number}
                    for number, ((x, y), (right, down)) in enumerate(fingers)
                ]
                kind = "touchMove" if step else "touchStart"
                session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
                page.wait_for_timeout(20)
            session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            page.wait_for_timeout(100)

        x, y = middle(page, "#surfaces")
        assert turned(page, lambda: swipe(5, ((x, y), (12, 3))))
        far = eye(page)
        swipe(4, ((x - 20, y), (-5, 0)), ((x + 20, y), (5, 0)))  # from 40 to 80 pixels apart
        np.testing.assert_allclose(eye(page), far / 2, rtol=0.02)
        assert page.evaluate("[visualViewport.scale, scrollY]") == [1, 0]  # the page has not moved
        page.select_option("#mode", "truth")
        np.testing.assert_allclose(eye(page), far / 2, rtol=0.02)
        assert turned(page, lambda: swipe(5, ((x, y), (-12, 3))))
        np.testing.assert_allclose(np.linalg.norm(eye(page)), np.linalg.norm(far) / 2, rtol=0.02)

        slider = page.locator("[data-axis='2'] input")
        slider.scroll_into_view_if_needed()
        before = slider.input_value()
        swipe(5, (middle(page, "[data-axis='2'] input"), (8, 0)))
        assert int(slider.input_value()) > int(before)

        def place() -> list[str]:
            return [page.locator(f"[data-axis='{axis}'] output").inner_text() for axis in range(3)]

        plane, before, scrolled = "[data-axis='2'] canvas", place(), page.evaluate("scrollY")
        across, down = middle(page, plane)
        swipe(5, ((across + 30, down), (0, -20)))
        page.wait_for_timeout(300)
        assert place() == before
        assert page.evaluate("scrollY") > scrolled
        across, down = middle(page, plane)
        page.touchscreen.tap(across + 40, down + 30)
        moved = [one != other for one, other in zip(place(), before, strict=True)]
        assert moved == [True, True, False]
