"""Tests neither read nor write what the user's own runs have measured."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYUNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
