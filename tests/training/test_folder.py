"""The folder of a run."""

import os
import re
import shutil
import time

import pytest

from tinyunet.common.errors import UserError
from tinyunet.training.folder import RunFolder


def test_nothing_is_made_before_there_is_a_file(tmp_path):
    folder = RunFolder(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    folder.check(1000)
    assert list((tmp_path / "runs").iterdir()) == []
    path = folder / "a.json"
    assert path.parent.is_dir()
    assert str(folder) == str(path.parent)
    assert folder / "b.json" == path.with_name("b.json")


def test_no_run_gets_the_folder_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    made = [(RunFolder(tmp_path) / "x").parent.name for _ in range(3)]
    assert made == ["now", "now-2", "now-3"]


def test_one_process_trains_in_a_folder(tmp_path):
    first = RunFolder(tmp_path)
    path = (first / "x").parent
    second = RunFolder(tmp_path)
    second.go_on(path)
    with pytest.raises(UserError, match=rf"^{path}: another process trains here"):
        second.check(0)
    first.release()
    second.check(0)
    second.release()


def test_too_little_space_is_told(tmp_path):
    with pytest.raises(UserError, match=r"GB left on this disk; a run takes 1000000000.0 GB"):
        RunFolder(tmp_path).check(10**18)


@pytest.mark.parametrize(
    ("free", "needed", "told"),
    [
        (1_200_000, 1_300_000, "1.2 MB left on this disk; a run takes 1.3 MB"),
        (1_000_000, 1_000_001, "1.000000 MB left on this disk; a run takes 1.000001 MB"),
        (0, 400, "0.0 kB left on this disk; a run takes 0.4 kB"),
        (999_950, 1_000_000, "0.99995 MB left on this disk; a run takes 1.00000 MB"),
        (4_000_000_000, 4_100_000_000, "4.0 GB left on this disk; a run takes 4.1 GB"),
    ],
)
def test_what_is_left_and_what_is_needed_never_look_the_same(tmp_path, monkeypatch, free, needed, told):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=re.escape(told)):
        RunFolder(tmp_path).check(needed)


def test_a_folder_of_others_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written to"):
        RunFolder(tmp_path).check(0)


def test_a_run_that_goes_on_is_checked_where_its_folder_lies(tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    moved.mkdir()
    looked_at = []
    monkeypatch.setattr(os, "access", lambda path, _: looked_at.append(path) or True)
    folder = RunFolder(tmp_path / "runs")
    folder.go_on(moved)
    folder.check(0)
    with pytest.raises(UserError, match=rf"^{moved}: [\d.]+ GB left on this disk"):
        folder.check(10**18)
    assert looked_at == [moved, moved]
    assert not (tmp_path / "runs").exists()
