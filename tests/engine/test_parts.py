"""What is a part of a model: layers and parameters in lists and dicts; all parameters of one type."""

import numpy as np
import pytest

import tinyunet
from tinyunet import Adam, Module, Parameter, Tensor, UNet, functional, nn


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(1, 3), nn.BatchNorm(3), nn.ReLU(), nn.ConvTranspose3d(3, 2))


class InContainers(Module):
    """Parts in a list, a tuple and dicts, one in the other, and settings that are no parts."""

    def __init__(self):
        self.stem = nn.Conv3d(1, 4)
        self.blocks = [nn.Sequential(nn.Conv3d(4, 4), nn.BatchNorm(4)), nn.Dropout(0.5)]
        self.more = {"up": nn.Conv3d(4, 4), 3: (Parameter(np.ones(4, np.float32)), [nn.ReLU()])}
        self.sizes, self.options = [1, 2, [3]], {"name": "x", "table": np.zeros(3)}

    def forward(self, src):
        src = self.stem(src)
        for block in self.blocks:
            src = block(src)
        factor, (last,) = self.more[3]
        return last(self.more["up"](src) * factor)


class TestContainers:
    """What lies in plain lists, tuples and dicts is a part of the model like any other."""

    NAMES = (
        *("stem.weights", "stem.bias", "blocks.0.0.weights", "blocks.0.0.bias"),
        *("blocks.0.1.scale", "blocks.0.1.shift", "more.up.weights", "more.up.bias", "more.3.0"),
    )

    def test_all_parts_are_found(self):
        net = InContainers()
        assert tuple(name for name, _ in net.named_parameters()) == self.NAMES
        assert [name for name, _ in net.named_buffers()] == [
            "blocks.0.1.running_mean",
            "blocks.0.1.running_variance",
        ]
        assert list(net.random_state()) == ["blocks.1"]
        assert not any(module.training for _, module in net.eval().named_modules())
        assert net.blocks[1].training is False
        assert {a.dtype.char for a in net.astype(np.float64).state_dict().values()} == {"d"}

    def test_they_learn_and_are_saved(self):
        net, other = InContainers(), InContainers()
        before = net.state_dict()
        optimizer = Adam(net.parameters(), lr=0.1)
        net(np.random.default_rng(0).standard_normal((1, 4, 4, 4, 1)).astype("f4")).sum().backward()
        optimizer.step()
        other.load_state_dict(net.state_dict())
        for name in self.NAMES:
            now = dict(other.named_parameters())[name].data
            # batch norm takes the bias before it away
            assert name == "blocks.0.0.bias" or not np.array_equal(now, before[name]), name

    def test_what_is_appended_later_is_found_too(self):
        net = InContainers()
        net.blocks.append(nn.Conv3d(4, 4))
        assert "blocks.2.weights" in net.state_dict()

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({nn.Conv3d(1, 1)}, "parts: a set of layers or parameters has no order; use a list"),
            ({1: nn.ReLU(), "1": nn.ReLU()}, "parts: the key '1' is not a name of its own"),
            ([{"a.b": nn.ReLU()}], r"parts.0: the key 'a.b' is not a name of its own"),
            ([[frozenset([nn.Conv3d(1, 1)])]], r"parts.0.0: a set of layers"),
        ],
    )
    def test_what_has_no_name_is_refused(self, value, message):
        with pytest.raises(TypeError, match=message):
            small_net().parts = value

    def test_a_part_may_know_what_it_is_a_part_of(self):
        net = small_net()
        names = list(net.state_dict())
        net[0].users, net[0].owner = [net], net
        net.loop = [1]
        net.loop.append(net.loop)
        assert list(net.state_dict()) == names
        assert len(list(net.named_modules())) == 5


class TestTypes:
    """One Parameter of float64 among float32: the message names it, wherever the model is used."""

    class Scaled(Module):
        """Learns a factor for each sequence."""

        def __init__(self, factor):
            self.factor, self.unet = Parameter(factor), UNet(filters=4, depth=2)

        def forward(self, src):
            return self.unet(src * self.factor)

    LINE = "factor: a Parameter of float64 in a model of float32; expected one type"

    def test_message(self):
        net = self.Scaled(np.ones(4))
        images = np.ones((1, 4, 4, 4, 4), np.float32)
        with pytest.raises(TypeError, match=self.LINE):
            net(images)
        with pytest.raises(TypeError, match=f"0.{self.LINE}"):
            nn.Sequential(net)(images)
        with pytest.raises(TypeError, match=self.LINE):
            tinyunet.compile(net, images.shape)
        with pytest.raises(TypeError, match="UNet: input is a tensor of float64, the weights are"):
            net.unet.logits(Tensor(images) * net.factor)
        assert net.astype(np.float32)(images).dtype == np.float32
        assert self.Scaled(np.ones(4, "f4"))(images).dtype == np.float32

    @pytest.mark.parametrize(
        "call",
        [
            lambda src, x: functional.conv3d(src, x.reshape(2, 2, 1, 1, 1)),
            lambda src, x: functional.conv_transpose3d(src, x.reshape(2, 2, 1, 1, 1)),
            lambda src, x: functional.batch_norm(src, x[:2], x[:2], np.ones(2), np.ones(2), True),
            lambda src, x: functional.concatenate(src, x.reshape(1, 1, 1, 1, 4)),
        ],
    )
    def test_operators_say_which_is_which(self, call):
        src = np.ones((1, 1, 1, 1, 2), np.float32)
        with pytest.raises(TypeError, match=r"src is float32, .* float64; expected one type"):
            call(Tensor(src), Tensor(np.ones(4)))
