"""What is printed appears, whatever names are in it, and does nothing else."""

import errno
import io
import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet.common.errors import UserError
from tinyunet.common.terminal import aligned, in_bytes, printable, terminal_stream
from tinyunet.segmentation.scores import table

# Beginning with what strangers would write: escape sequences, line ends, directions, bytes that are no text.
NAMES = st.sampled_from(
    ["\x1b[2J", "a\nTraceback", "x\ry", "\x9b31m", "r\u202eight", "\u2028", os.fsdecode(b"M\xfcller")]
) | st.text(st.characters(categories=("C", "Z", "L")))


def obeyed(text: str) -> set[str]:
    """Characters of a text that a terminal obeys, or cannot be given at all."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


@given(NAMES)
def test_a_name_is_one_line_of_text(name):
    shown = printable(name)
    assert not obeyed(shown)
    assert printable(shown) == shown
    assert str(UserError(name)) == shown
    assert shown.isprintable() if name else shown == ""


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Ödem 中文 $x$", "Ödem 中文 $x$"),
        (os.fsdecode(b"M\xfcller"), r"M\xfcller"),
        ("a\x1b[1mb\n", r"a\x1b[1mb\n"),
    ],
)
def test_what_can_be_read_stays(name, shown):
    assert printable(name) == shown


@given(NAMES, st.sampled_from(["ascii", "latin-1", "utf-8", "cp1252"]))
def test_any_stream_shows_any_name(name, encoding):
    bytes_ = io.BytesIO()
    stream = terminal_stream(io.TextIOWrapper(bytes_, encoding, newline=""))
    print("name", name, file=stream, flush=True)
    text = bytes_.getvalue().decode(encoding)
    assert text.startswith("name ")
    assert obeyed(text) <= {"\n", "\r", "\t"}
    assert terminal_stream(stream) is stream
    print(name, file=terminal_stream(None))


@given(NAMES, NAMES)
def test_tables_keep_their_lines(name, other):
    assert aligned(["", "x"], [[name, other], [other, name]]).count("\n") == 3
    scores = {"classes": {"one" + name: 0.5}, "regions": {"two" + other: 0.5}}
    text = table([(name, scores), (other, scores)])
    assert text.count("\n") == 6
    assert obeyed(text) == {"\n"}


def test_a_terminal_that_is_closed_is_no_error_and_a_full_disk_is_one():
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(self.number, "")

    broken = Broken()
    broken.number = errno.EIO
    print("lost", file=terminal_stream(broken), flush=True)
    broken.number = errno.ENOSPC
    with pytest.raises(OSError, match=str(errno.ENOSPC)):
        print("told", file=terminal_stream(broken))


@given(st.lists(st.integers(0, 10**13), min_size=1, max_size=3))
def test_numbers_of_bytes_that_differ_look_different(numbers):
    assert len({*in_bytes(*numbers)}) == len({*numbers})
