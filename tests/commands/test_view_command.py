"""``python -m tinyunet.view RUN``: the page of a run is made again from its folder."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import image_of

pytest.importorskip("plotly")
pytest.importorskip("skimage")


def content_of(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert found
    return dict(json.loads(found[1]))


def dice_of(head: dict[str, Any]) -> dict[str, str]:
    return dict(head["scores"][1:])


def test_test_cases_have_the_scores_of_the_run(trained, command, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    at_the_end = content_of(run / "report.html")
    assert command("view", run).code == 0  # replaces the page
    again = content_of(run / "report.html")
    assert again["curves"] == at_the_end["curves"]
    assert again["settings"] == at_the_end["settings"]
    scored = json.loads((run / "test.json").read_text())["cases"]
    assert {head["name"] for head in again["heads"]} == {*scored}
    for head in again["heads"]:
        dice = [value for group in scored[head["name"]].values() for value in group.values()]
        assert [*dice_of(head).values()] == [f"{value:.3f}" for value in dice]
        assert [*head["labels"]] == ["prediction", "truth"]
        assert head["note"].startswith("a test case, with best.npz: mean Dice ")
    before = {head["name"]: head["labels"] for head in at_the_end["heads"]}
    assert before == {head["name"]: head["labels"] for head in again["heads"]}


def test_cases_that_are_named_and_a_run_that_was_stopped(trained, dataset, command, tmp_path):
    run, page = tmp_path / "run", tmp_path / "page.html"
    run.mkdir()
    shutil.copy(trained / "latest.npz", run)
    name = image_of(dataset, 0).name.removesuffix(".nii.gz")
    done = command("view", run, "--cases", name, "-o", page, "--data-path", dataset)
    assert done.code == 0
    (head,) = content_of(page)["heads"]
    assert head["name"] == name
    assert re.match("a (training|validation|test) case, with latest.npz: mean Dice ", head["note"])


def test_faults(trained, dataset, command, tmp_path):
    def error(*arguments: object) -> str:
        done = command("view", *arguments)
        assert done.code == 2
        return done.error

    assert "--truth: is for a scan; " in error(trained, "--truth", "x.nii")
    assert "--cases: is for a run; " in error(image_of(dataset), "--cases", "x", "-o", tmp_path / "a.html")
    assert "-o: not given; expected a name that ends in .html" in error(image_of(dataset))
    assert "no case 'x' of the run; expected, say, PHANTOM_" in error(trained, "--cases", "x")
    assert "none: no such folder; expected the data of the run" in error(trained, "--data-path", "none")
    other = Path(shutil.copytree(dataset, tmp_path / "other"))
    text = (other / "dataset.json").read_text()
    (other / "dataset.json").write_text(text.replace('"edema"', '"swelling"'))
    assert "other labels than the run has" in error(trained, "--data-path", other)
    (tmp_path / "notes.html").write_text("<!DOCTYPE html>mine")
    assert "notes.html is there already" in error(trained, "-o", tmp_path / "notes.html")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.npz").write_bytes((trained / "best.npz").read_bytes()[:-9])
    assert "best.npz" in error(tmp_path / "run")
