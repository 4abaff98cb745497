"""A small data set, a model trained on it, and the commands run in this process."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from small_runs import SMALL

from tinyunet import evaluate, export, plan, predict, train, view
from tinyunet.commandline import run
from tinyunet.data import phantom

COMMANDS = {"plan": plan.main, "train": train.main, "predict": predict.main, "evaluate": evaluate.main}
COMMANDS |= {"export": export.main, "view": view.main}


class Done(NamedTuple):
    """What a command left: its exit code, and what it wrote to the screen."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; progress bars, which end in a carriage return, left out."""
        lines = [line for line in self.err.replace("\r", "\n").split("\n") if "tinyunet." in line]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Five phantoms of unequal sides, one of them shorter than a multiple of the patch."""
    path = tmp_path_factory.mktemp("data") / "phantoms"
    return phantom.make_dataset(path, cases=5, shape=(20, 24, 17))


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    """The data set, to be damaged."""
    return Path(shutil.copytree(dataset, tmp_path / "data"))


@pytest.fixture
def command(capsys) -> Callable[..., Done]:
    """Run a command of this name with these arguments, as ``python -m`` would."""

    def call(name: str, *arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(f"tinyunet.{name}", lambda ranks: COMMANDS[name](ranks, [str(a) for a in arguments]))
        return Done(int(left.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory) -> Path:
    """The folder of a run of two epochs."""
    output = tmp_path_factory.mktemp("runs")
    with pytest.raises(SystemExit) as left:
        run(
            "tinyunet.train",
            lambda ranks: train.main(
                ranks, ["--data-path", str(dataset), "--output", str(output), *SMALL, "--epochs", "2"]
            ),
        )
    assert left.value.code == 0
    (folder,) = output.iterdir()
    return folder
