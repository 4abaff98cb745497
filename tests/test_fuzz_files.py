"""Some hundred files of a stranger's; ``python tests/fuzz_files.py`` tries thousands."""

import pytest
from fuzz_files import run


@pytest.mark.parametrize("kind", ["nifti", "checkpoints"])
def test_a_file_is_read_right_or_refused_in_one_line(kind, tmp_path):
    (tmp_path / "run").mkdir()
    found = run(kind, 400, seed=1, folder=tmp_path / "run")
    assert found["read"] > 50
    assert found["refused"] > 150
