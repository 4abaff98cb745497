"""Files appear whole or not at all; errors become one line."""

import json
import os
from pathlib import Path

import pytest

from tinyunet.errors import AgreedError, UserError, as_user_error
from tinyunet.files import atomic, can_be_written, write_json


def test_a_file_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "some.json"
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.suffix == path.suffix
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, OSError])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "some.json"
    path.write_text("old")

    def fail(at):
        at.write_text("ne")
        raise error

    with pytest.raises(error), atomic(path) as temporary:
        fail(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_wanted(tmp_path):
    path = tmp_path / "absent" / "some.json"
    with pytest.raises(FileNotFoundError) as raised, atomic(path) as temporary:
        temporary.write_text("new")
    assert raised.value.filename == str(path)


def test_where_nothing_can_be_removed_the_first_error_is_told(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", read_only)
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
    assert (
        str(as_user_error(FileNotFoundError(2, "No such file", "a.nii"))) == "a.nii: No such file"
    )
    assert str(as_user_error(OSError(28, "No space left on device"))) == "No space left on device"
    assert str(as_user_error(MemoryError("8 GiB\nwanted"))) == "out of memory: 8 GiB wanted"
    agreed = AgreedError("as it is")
    assert as_user_error(agreed) is agreed
    assert isinstance(agreed, UserError)
    assert isinstance(agreed, ValueError)


def test_faults_of_the_program_are_none_of_the_users():
    for fault in (ZeroDivisionError(), ValueError("shape"), TypeError(), KeyError("x")):
        assert as_user_error(fault) is None


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"a": 1}


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
