"""Files appear whole or not at all; errors become one line."""

import json
import os
import secrets
import socket
from pathlib import Path

import pytest

from tinyunet.common import files
from tinyunet.common.errors import AgreedError, UserError, as_user_error
from tinyunet.common.files import atomic, can_be_written, open_file, read_json, write_json


def test_a_file_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "some.json"
    with atomic(path) as file:
        file.write(b"new")
        assert not path.exists()
        assert Path(file.name).parent == path.parent
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, OSError])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "some.json"
    path.write_text("old")

    def fail(file):
        file.write(b"ne")
        raise error

    with pytest.raises(error), atomic(path) as file:
        fail(file)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_wanted(tmp_path):
    path = tmp_path / "absent" / "some.json"
    with pytest.raises(FileNotFoundError) as raised, atomic(path) as file:
        file.write(b"new")
    assert raised.value.filename == str(path)


def test_where_nothing_can_be_removed_the_first_error_is_told(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError, match="Read-only") as raised:
        write_json(tmp_path / "some.json", {})
    assert raised.value.filename == str(tmp_path / "some.json")


def test_whether_a_file_can_be_written_is_tried_and_nothing_left(tmp_path):
    path = tmp_path / "some.json"
    assert can_be_written(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    assert can_be_written(str(path))
    assert path.read_text() == "old"
    for bad in (tmp_path, "", "/", path / "a.json", tmp_path / "absent" / "a.json", "/proc/a.json"):
        assert not can_be_written(bad)
    assert not can_be_written(tmp_path / ("a" * 300))
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_readable_and_has_no_nan(tmp_path):
    path = tmp_path / "some.json"
    write_json(path, {"name": "Ödem", "dice": [0.5]})
    assert json.loads(path.read_text()) == {"name": "Ödem", "dice": [0.5]}
    assert "Ödem" in path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert json.loads(path.read_text())["dice"] == [0.5]


def test_errors_that_the_user_can_put_right_are_one_line():
    assert str(as_user_error(FileNotFoundError(2, "No such file", "a.nii"))) == "a.nii: No such file"
    assert str(as_user_error(OSError(28, "No space left on device"))) == "No space left on device"
    assert str(as_user_error(MemoryError("8 GiB\nwanted"))) == "out of memory: 8 GiB wanted"
    agreed = AgreedError("as it is")
    assert as_user_error(agreed) is agreed
    assert isinstance(agreed, UserError)
    assert isinstance(agreed, ValueError)


def test_faults_of_the_program_are_none_of_the_users():
    for fault in (ZeroDivisionError(), ValueError("shape"), TypeError(), KeyError("x")):
        assert as_user_error(fault) is None


def test_a_link_is_replaced_or_where_the_user_names_it_what_it_leads_to(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    write_json(link, {"a": 1}, follow_links=True)
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"a": 1}
    write_json(link, {"a": 2})
    assert not link.is_symlink()
    assert json.loads(link.read_text()) == {"a": 2}
    assert json.loads(real.read_text()) == {"a": 1}


def test_a_link_does_not_get_the_name_of_the_file_replaced(tmp_path):
    real, link, previous = (tmp_path / name for name in ("real", "latest", "previous"))
    real.write_text("old")
    link.symlink_to(real)
    with atomic(link, previous) as file:
        file.write(b"new")
    assert (real.read_text(), link.read_text(), previous.exists()) == ("old", "new", False)


def test_a_temporary_name_cannot_be_foreseen_and_follows_no_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f".{os.getpid()}-a.json").symlink_to(victim)  # as names were before
    names = set()
    for _ in range(2):
        with atomic(folder / "a.json") as file:
            names.add(file.name)
    assert len(names) == 2
    # Even one that was: it is not opened, and not removed.
    monkeypatch.setattr(secrets, "token_hex", lambda _: "known")
    (folder / f".{os.getpid()}-known.json").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_json(folder / "a.json", {})
    assert not can_be_written(folder / "a.json")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_of_any_new_one(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    pipe, place = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        for path in (pipe, place, tmp_path, "/dev/zero", "/dev/null"):
            with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
                open_file(path)
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "link")


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 100_000, b"NaN", b'{"a": -Infinity}', b"9" * 5000, b"\xff", b"\0" * 9, b""]
)
def test_what_is_not_json_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_json(tmp_path / "a.json")


def test_json_that_never_ends_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_JSON", 10)
    (tmp_path / "a.json").write_text('"12345678"')
    assert read_json(tmp_path / "a.json") == "12345678"
    (tmp_path / "a.json").write_text('"123456789"')
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        read_json(tmp_path / "a.json")


def test_what_is_no_file_is_left_alone(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert not can_be_written(pipe)
    with pytest.raises(OSError, match="not a regular file") as raised:
        write_json(pipe, {})
    assert raised.value.filename == str(pipe)
    assert pipe.is_fifo()


def test_a_name_that_is_not_utf8_comes_back_from_json(tmp_path):
    name = os.fsdecode(b"M\xfcller")
    write_json(tmp_path / "some.json", {name: 1})
    assert json.loads((tmp_path / "some.json").read_text()) == {name: 1}
