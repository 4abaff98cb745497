"""A model as text: a table of its layers."""

import numpy as np

from tinyunet import UNet, nn


def test_a_unet_is_a_table():
    model = UNet(in_channels=1, classes=3, filters=8, depth=3)
    lines = repr(model).splitlines()
    assert lines[0].split() == ["UNet", "kind", "output", "parameters"]
    rows = {line.split()[0]: line for line in lines[2:]}
    assert rows["encoder.2.conv1"].split()[1:] == ["Conv3d", "MB,", "D/4,", "H/4,", "W/4,", "32", "27,680"]
    assert rows["up.0"].split()[1:] == ["ConvTranspose3d", "MB,", "D/2,", "H/2,", "W/2,", "16", "4,112"]
    assert rows["decoder.1.norm0"].split()[1:] == ["BatchNorm", "MB,", "D,", "H,", "W,", "8", "16"]
    assert rows["head"].split()[1:] == ["Conv3d", "MB,", "D,", "H,", "W,", "3", "27"]
    learnt = [int(line.split()[-1].replace(",", "")) for line in lines[2:]]
    assert sum(learnt[:-1]) == learnt[-1] == sum(p.data.size for p in model.parameters())
    assert "MB, H/2, W/2, 16" in repr(UNet(dim=2, filters=8, depth=2))


def test_other_modules():
    conv = nn.Conv3d(4, 16, 3, generator=np.random.default_rng(0))
    assert repr(conv) == "Conv3d(weights (16, 4, 3, 3, 3), bias (16,))"
    assert repr(nn.Sequential(conv, nn.ReLU())).splitlines()[2].split() == ["0", "Conv3d", "1,744"]
