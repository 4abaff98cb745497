"""What the documents show runs: Python blocks of the README, and every example."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.image import imread

from tinyunet.viz.figure import CLASSES as LABEL_COLOURS

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
IMAGES = ROOT / "docs" / "images"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*arguments: str, folder: Path = ROOT) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_something_to_run():
    assert len(BLOCKS) == 2
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:30])
def test_blocks_of_the_readme(block):
    run("-c", block)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path, tmp_path):
    printed = run(str(path), folder=tmp_path)  # some write a file
    assert printed.strip()
    if path.stem == "train_2d":
        assert float(printed.split()[-1]) > 0.8
    if path.stem == "draw_phantoms":
        drawn, shown = (imread(p) for p in (tmp_path / "phantom.png", IMAGES / "phantom.png"))
        # Another version of matplotlib may set its letters otherwise.
        assert drawn.shape == shown.shape
        assert np.abs(drawn - shown).mean() < 0.01


@pytest.mark.parametrize("colour", LABEL_COLOURS[:3])
def test_the_phantoms_show_all_classes(colour):
    pixels = imread(IMAGES / "phantom.png")[..., :3]
    height, width = pixels.shape[:2]
    labels = rgb_to_hsv(pixels[: height * 19 // 20, width * 4 // 5 :])  # without the legend
    near = np.abs(labels[..., 0] - rgb_to_hsv(to_rgb(colour))[0]) < 0.04
    assert (near & (labels[..., 1] > 0.3)).sum() > 500


def lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_path_through_the_source_is_as_long_as_the_readme_says():
    text = (ROOT / "README.md").read_text()
    steps = re.findall(r"^\| \d \|(.*)\| *([\d,]+) \|$", text, flags=re.MULTILINE)
    found = [lines(ROOT / name for name in re.findall(r"\]\(([^)]+\.py)\)", step)) for step, _ in steps]
    whole = lines(path for package in ("kernels", "tinyunet") for path in (ROOT / package).rglob("*.py"))
    said = re.search(r"That is ([\d,]+) lines, a fifth of the source", text).groups()
    numbers = [int(number.replace(",", "")) for number in (*(number for _, number in steps), *said)]
    assert len(steps) == 5
    for actual, number in zip((*found, sum(found)), numbers, strict=True):
        assert abs(actual - number) <= 0.02 * number  # a small change need not change README
    assert sum(found) <= 6000
    assert 0.15 <= sum(found) / whole <= 0.25


DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / document).parent.joinpath(target).exists(), target
