"""The data set with real anatomy, for the tests that want it."""

from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "Task01_sample"


@pytest.fixture(scope="session")
def sample() -> Path:
    """Return the folder, which lies beside the repository on some machines only."""
    if not SAMPLE.is_dir():
        pytest.skip(f"{SAMPLE} is not there")
    return SAMPLE
