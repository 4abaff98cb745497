"""The front door: what can be imported from it, and what importing it costs."""

import subprocess
import sys

import pytest

import tinyunet


def test_importing_loads_nothing():
    code = "import sys, tinyunet; assert not {'numpy', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_compiler_loads_kernels_when_a_net_takes_them():
    late = {
        f"kernels.{n}" for n in ("conv3d.winograd_bricks", "ops.activation", "ops.last_layer", "ops.norms")
    }
    code = f"import sys, tinyunet.compiler; assert not {late} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", tinyunet.__all__)
def test_every_name_is_there(name):
    assert getattr(tinyunet, name).__name__ == name
    assert name in dir(tinyunet)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="module 'tinyunet' has no attribute 'Unet'"):
        _ = tinyunet.Unet
