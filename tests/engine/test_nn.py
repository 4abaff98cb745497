"""Modules: names, state, initial weights, switches."""

import threading

import numpy as np
import pytest

from tinyunet import Module, Parameter, Tensor, UNet, nn


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(1, 3, (1, 3, 3)), nn.BatchNorm(3), nn.ReLU(), nn.ConvTranspose3d(3, 2))


class TestNames:
    """Dotted names follow the attributes, in the order in which they were set."""

    def test_parameters_and_buffers(self):
        net = small_net()
        assert [name for name, _ in net.named_parameters()] == [
            "0.weights",
            "0.bias",
            "1.scale",
            "1.shift",
            "3.weights",
            "3.bias",
        ]
        assert [name for name, _ in net.named_buffers()] == ["1.running_mean", "1.running_variance"]
        assert [p.shape for p in net.parameters()][:2] == [(3, 1, 1, 3, 3), (3,)]
        assert [b.shape for b in net.buffers()] == [(3,), (3,)]

    def test_a_module_of_ones_own(self):
        class Scaled(Module):
            def __init__(self):
                self.inner = small_net()
                self.factor = Parameter(np.ones(2, np.float32))

            def forward(self, src):
                return self.inner(src) * self.factor

        net = Scaled()
        assert [name for name, _ in net.named_parameters()][::6] == ["inner.0.weights", "factor"]
        dst = net(np.ones((1, 2, 3, 3, 1), np.float32))
        assert isinstance(dst, Tensor)
        assert dst.shape == (1, 4, 6, 6, 2)
        dst.sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())

    @pytest.mark.parametrize("value", [np.ones(3, np.float32), Tensor(np.ones(3)), 1.0])
    def test_a_parameter_is_not_lost_by_an_assignment(self, value):
        layer, other = nn.Conv3d(1, 3), Parameter(np.ones(3, np.float32))
        with pytest.raises(TypeError, match=r"^bias is a Parameter, not to be replaced by "):
            layer.bias = value
        layer.bias = other
        assert layer.parameters()[1] is other
        layer.bias = None
        assert len(layer.parameters()) == 1


class TestStateDict:
    """Saving is a copy, loading is in place, and an error changes nothing."""

    def test_round_trip(self):
        source, target = small_net(), small_net()
        source[0].weights.data += 1
        source[1].running_mean += 5
        state = source.state_dict()
        assert list(state) == [
            *(name for name, _ in source.named_parameters()),
            *(name for name, _ in source.named_buffers()),
        ]
        target.load_state_dict(state)
        for name, array in target.state_dict().items():
            np.testing.assert_array_equal(array, state[name])

    def test_is_a_copy(self):
        net = small_net()
        state = net.state_dict()
        state["0.bias"] += 1
        assert not net[0].bias.data.any()

    def test_loads_in_place(self):
        net = small_net()
        flat = np.zeros(3 * 9, np.float32)
        net[0].weights.data = flat.reshape(3, 1, 1, 3, 3)
        mean = net[1].running_mean
        state = {name: np.full_like(array, 2) for name, array in net.state_dict().items()}
        net.load_state_dict(state)
        np.testing.assert_array_equal(flat, np.full(27, 2))
        np.testing.assert_array_equal(mean, np.full(3, 2))

    def test_converts_the_precision(self):
        net = small_net()
        net.load_state_dict({name: array.astype(np.float64) for name, array in net.state_dict().items()})
        assert {array.dtype for array in net.state_dict().values()} == {np.dtype(np.float32)}

    def test_arrays_of_the_model_itself_may_be_exchanged(self):
        net = nn.Sequential(nn.BatchNorm(2), nn.BatchNorm(2))
        net[1].scale.data += 5
        own = {name: parameter.data for name, parameter in net.named_parameters()}
        exchanged = {"0.scale": own["1.scale"], "1.scale": own["0.scale"]}
        net.load_state_dict(net.state_dict() | exchanged)
        np.testing.assert_array_equal([net[0].scale.data, net[1].scale.data], [[6, 6], [1, 1]])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("1.shift"), "state has no '1.shift', which the model needs"),
            (
                lambda state: state.update(extra=np.zeros(3)),
                "state has 'extra', which the model does not know",
            ),
            (
                lambda state: state.update({"3.bias": np.zeros(3)}),
                r"state has '3.bias' of shape \(3,\), not \(2,\)",
            ),
            (
                lambda state: state.update({"3.bias": np.array(["a", "b"])}),
                "state has '3.bias' of type <U1, not float32",
            ),
        ],
        ids=["missing", "unexpected", "shape", "type"],
    )
    def test_an_error_names_the_first_key_and_changes_nothing(self, change, message):
        net = small_net()
        before = net.state_dict()
        state = {name: array + 1 for name, array in before.items()}
        change(state)
        with pytest.raises(ValueError, match=message):
            net.load_state_dict(state)
        for name, array in net.state_dict().items():
            np.testing.assert_array_equal(array, before[name])


class TestRandomState:
    """Where the generators stand."""

    @pytest.mark.parametrize(
        "wrong",
        [
            None,
            {"bit_generator": "PCG64"},
            {"bit_generator": "MT19937"},
            {"bit_generator": "PCG64", "state": {"state": -1, "inc": 1}},
        ],
    )
    def test_an_error_changes_nothing(self, wrong):
        net = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
        before = net.random_state()
        state = {"0": np.random.default_rng(9).bit_generator.state, "1": wrong}
        with pytest.raises(ValueError, match="state is none of a random generator"):
            net.load_random_state(state)
        assert net.random_state() == before


class TestInitialWeights:
    """he_uniform as Keras counts, zero biases, the same from the same seed."""

    @pytest.mark.parametrize(
        ("layer", "fan_in"),
        [
            (nn.Conv3d(32, 48, (3, 3, 3)), 32 * 27),
            (nn.Conv3d(32, 48, (1, 3, 3)), 32 * 9),
            (nn.ConvTranspose3d(64, 32, (2, 2, 2)), 32 * 8),
        ],
        ids=["3x3x3", "1x3x3", "transposed"],
    )
    def test_limits_and_variance(self, layer, fan_in):
        weights, limit = layer.weights.data, np.sqrt(6 / fan_in)
        assert weights.dtype == np.float32
        assert 0.999 * limit < weights.max() <= limit
        assert -0.999 * limit > weights.min() >= -limit
        # 13,824 draws or more; the variance of their squares gives a deviation of 0.9 / sqrt(n).
        assert abs(weights.var() / (2 / fan_in) - 1) < 5 * 0.9 / np.sqrt(weights.size)
        assert not layer.bias.data.any()

    def test_batch_norm_has_the_defaults_of_keras_but_for_the_momentum(self):
        layer = nn.BatchNorm(2)
        assert (layer.momentum, layer.epsilon) == (0.9, 1e-3)
        np.testing.assert_array_equal(layer.scale.data, [1, 1])
        np.testing.assert_array_equal(layer.running_variance, [1, 1])
        np.testing.assert_array_equal(layer.shift.data, [0, 0])
        np.testing.assert_array_equal(layer.running_mean, [0, 0])

    def test_seeds(self):
        config = {"filters": 2, "depth": 2}
        one, same, other = (UNet(**config, seed=seed) for seed in (1, 1, 2))
        for name, array in one.state_dict().items():
            np.testing.assert_array_equal(array, same.state_dict()[name])
        assert not np.array_equal(one.head.weights.data, other.head.weights.data)


class TestSwitches:
    """Training and inference, precision."""

    def test_train_and_eval_reach_every_part(self):
        net = nn.Sequential(small_net(), nn.Dropout(0.5))
        assert net.eval() is net
        assert not any(module.training for _, module in net.named_modules())
        assert net.train() is net
        assert all(module.training for _, module in net.named_modules())

    def test_mode_is_the_threads_own(self):
        net = nn.Sequential(small_net(), nn.Dropout(0.5).eval())
        seen = []

        def look():
            seen.append([module.training for _, module in net.named_modules()])

        look()
        with net.mode(training=False):
            with net.mode(training=True):
                look()
            look()
            for _ in range(2):  # the second finds what a thread before has left
                thread = threading.Thread(target=look)
                thread.start()
                thread.join()
            net.train()  # this, too, ends with the mode
            look()
        look()
        before = seen[0]
        assert before[0]
        assert not before[-1]
        size = len(before)
        assert seen[1:] == [[True] * size, [False] * size, before, before, [True] * size, before]

    def test_mode_goes_by_the_models_own_train(self):
        class Frozen(nn.Module):
            training = False

            def __init__(self):
                self.norm, self.layer = nn.BatchNorm(2), nn.Dropout(0.5)

            def train(self, mode=True):
                super().train(mode)
                self.norm.eval()
                return self

        model = Frozen()
        assert [part.training for _, part in model.named_modules()] == [False, True, True]
        with model.mode(training=True):
            assert [part.training for _, part in model.named_modules()] == [True, False, True]
        assert [part.training for _, part in model.named_modules()] == [False, True, True]

    @pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout3d])
    def test_dropout_drops_in_training_only(self, kind):
        src = np.ones((1, 4, 4, 4, 8), np.float32)
        layer = kind(0.5, seed=3)
        first, second = layer(src).data, layer(src).data
        assert not np.array_equal(first, second)
        np.testing.assert_array_equal(kind(0.5, seed=3)(src).data, first)
        np.testing.assert_array_equal(layer.eval()(src).data, src)

    def test_astype(self):
        net = small_net().astype(np.float64)
        assert {array.dtype for array in net.state_dict().values()} == {np.dtype(np.float64)}
        assert net(np.ones((1, 2, 3, 3, 1))).dtype == np.float64
        with pytest.raises(TypeError, match=r"^astype: dtype must be float32 or float64, not int32"):
            net.astype("int32")

    def test_astype_keeps_shared_buffers_and_integers(self):
        net = nn.Sequential(nn.BatchNorm(2), nn.BatchNorm(2))
        net[1].running_mean = net[0].running_mean
        net.counts = np.arange(3)
        net.astype(np.float64)
        assert net[0].running_mean is net[1].running_mean
        assert (net[0].running_mean.dtype, net.counts.dtype) == (np.float64, np.arange(3).dtype)


class TestLayers:
    """Settings reach the operators."""

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.Conv3d(4, 5, (3, 1, 3), stride=(1, 2, 1), padding="valid"), (1, 2, 3, 4, 5)),
            (nn.ConvTranspose3d(4, 5, (3, 1, 2), (2, 1, 2), padding="valid"), (1, 9, 6, 12, 5)),
            (nn.Conv3d(4, 5, 3, 3), (1, 2, 2, 2, 5)),
            (nn.ConvTranspose3d(4, 5, 4, 3), (1, 12, 18, 18, 5)),
            (nn.MaxPool3d((1, 2, 3)), (1, 4, 3, 2, 4)),
            (nn.MaxPool3d(2), (1, 2, 3, 3, 4)),
            (nn.Upsample3d((1, 2, 3)), (1, 4, 12, 18, 4)),
            (nn.BatchNorm(4), (1, 4, 6, 6, 4)),
            (nn.GroupNorm(1, 4), (1, 4, 6, 6, 4)),
            (nn.InstanceNorm(4), (1, 4, 6, 6, 4)),
            (nn.ReLU(), (1, 4, 6, 6, 4)),
            (nn.LeakyReLU(0.5), (1, 4, 6, 6, 4)),
            (nn.ELU(0.5), (1, 4, 6, 6, 4)),
            (nn.PReLU(), (1, 4, 6, 6, 4)),
            (nn.PReLU(4), (1, 4, 6, 6, 4)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_shape_of_the_result(self, layer, shape):
        assert layer(np.ones((1, 4, 6, 6, 4), np.float32)).shape == shape

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: nn.Conv3d(0, 4), "in_channels must be 1 or more, not 0"),
            (lambda: nn.ConvTranspose3d(4, -1), "out_channels must be 1 or more, not -1"),
            (lambda: nn.Conv3d(3, 4, (3, 3)), "kernel must be three whole numbers from 1 on"),
            (lambda: nn.Conv3d(3, 4, 3, 0), "stride must be three whole numbers from 1 on"),
            (lambda: nn.MaxPool3d(0.5), "size must be three whole numbers from 1 on"),
            (lambda: nn.Upsample3d((1, 2, 0)), "factor must be three whole numbers from 1 on"),
            (lambda: nn.BatchNorm(4, momentum=2), "momentum must be 0 to 1, not 2"),
            (lambda: nn.BatchNorm(4, epsilon=-1), "epsilon must be 0 or more and finite, not -1"),
            (lambda: nn.BatchNorm(4, epsilon=0), "epsilon must be above 0, not 0"),
            (lambda: nn.BatchNorm(4, momentum=np.nan), "momentum must be 0 to 1, not nan"),
            (lambda: nn.GroupNorm(3, 4), "groups must divide the 4 channels, not 3"),
            (lambda: nn.GroupNorm(0, 4), "groups must be 1 or more, not 0"),
            (lambda: nn.InstanceNorm(4, epsilon=0), "epsilon must be above 0, not 0"),
            (lambda: nn.Conv3d(2.5, 4), "in_channels must be a whole number of 1 or more, not 2.5"),
            (lambda: nn.Dropout("a half"), "rate must be at least 0 and below 1, not a half"),
            (lambda: nn.LeakyReLU(np.inf), "slope must be above 0 and finite"),
            (lambda: nn.Dropout(1.5), "rate must be at least 0 and below 1, not 1.5"),
            (lambda: nn.LeakyReLU(-1), "slope must be above 0"),
            (lambda: nn.ELU(-1), "alpha must be above 0"),
            (lambda: nn.PReLU(0), "channels must be 1 or more, not 0"),
        ],
    )
    def test_a_wrong_setting_is_refused_at_once(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
    def test_a_convolution_without_bias(self, kind):
        layer, with_bias = kind(2, 5, bias=False), kind(2, 5)
        assert list(layer.state_dict()) == ["weights"]
        src = np.random.default_rng(0).standard_normal((1, 4, 6, 6, 2)).astype(np.float32)
        np.testing.assert_array_equal(layer(src).data, with_bias(src).data)  # whose bias is zero

    def test_prelu_starts_and_learns_as_pytorchs(self):
        for channels in (1, 3):
            layer = nn.PReLU(channels)
            np.testing.assert_array_equal(layer.slope.data, np.full(channels, 0.25))
            dst = layer(np.array([[-4.0, 8.0, -2.0], [-1.0, -1.0, 0.0]], np.float32))
            np.testing.assert_array_equal(dst.data, [[-1, 8, -0.5], [-0.25, -0.25, 0]])
            dst.sum().backward()
            np.testing.assert_array_equal(layer.slope.grad, [-8] if channels == 1 else [-5, -1, -2])

    def test_leaky_relu_has_its_slope(self):
        dst = nn.LeakyReLU(0.5)(np.array([[[[[-2.0, 4.0]]]]]))
        np.testing.assert_array_equal(dst.data, [[[[[-1, 4]]]]])


class TestParameter:
    """Its gradient is its own, so it can be a view of a flat buffer."""

    def test_accumulates_in_place(self):
        parameter = Parameter(np.ones(3, np.float32))
        flat = np.zeros(5, np.float32)
        parameter.grad = flat[1:4]
        for _ in range(2):
            (parameter * 2).sum().backward()
        np.testing.assert_array_equal(flat, [0, 4, 4, 4, 0])

    def test_starts_with_a_copy(self):
        parameter, start = Parameter(np.ones(3)), np.ones(3)
        (parameter + 0).backward(start)
        parameter.grad += 1
        np.testing.assert_array_equal(start, np.ones(3))
