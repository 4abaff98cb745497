"""A U-Net of few filters: gradients by differences, odd sizes, two and three dimensions, errors."""

import json
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.base import machine
from tinyunet import Adam, Tensor, UNet, functional, losses, nn, no_grad
from tinyunet.functional import Convolution
from tinyunet.segmentation.scores import dice_per_class
from tinyunet.testing import check_gradients


def count(model: UNet) -> int:
    return sum(array.size for array in model.state_dict().values())


def batch(model: UNet, shape: tuple[int, ...], seed: int = 0, dtype: type = np.float32):
    """Random image and labels."""
    generator = np.random.default_rng(seed)
    image = generator.standard_normal((*shape, model.config["in_channels"])).astype(dtype)
    return image, generator.integers(0, max(model.config["classes"], 2), shape)


class TestSize:
    """The talk's model, to the last number."""

    def test_numbers_of_the_talks_model(self):
        model = UNet(in_channels=1, classes=1)
        assert count(model) == 5_650_801
        buffers = sum(buffer.size for buffer in model.buffers())
        assert buffers == 2 * 2 * (2 * (16 + 32 + 64 + 128) + 256)  # two norms a block, two each
        # What makes the number: a transposed convolution halves the channels, and has a bias.
        assert model.up[0].weights.shape == (256, 128, 2, 2, 2)
        assert model.up[0].bias.shape == (128,)
        assert model.decoder[0].conv0.weights.shape == (128, 256, 3, 3, 3)
        assert model.head.weights.shape == (1, 16, 1, 1, 1)

    def test_defaults(self):
        assert UNet().config == {
            "dim": 3,
            "in_channels": 4,
            "classes": 4,
            "filters": 16,
            "depth": 5,
            "use_upsampling": False,
            "dropout": 0.0,
            "seed": 0,
        }

    def test_config_makes_the_same_model(self):
        model = UNet(dim=2, in_channels=3, classes=2, filters=2, depth=3, dropout=0.1, seed=5)
        state = model.state_dict()
        for name, array in UNet(**model.config).state_dict().items():
            np.testing.assert_array_equal(array, state[name])

    @pytest.mark.parametrize(("depth", "levels"), [(2, [0]), (3, [0, 1]), (5, [2, 3])])
    def test_spatial_dropout_is_on_the_two_levels_above_the_lowest(self, depth, levels):
        model = UNet(filters=1, depth=depth, spatial_dropout=0.2)
        assert [i for i, block in enumerate(model.encoder) if block.spatial_dropout] == levels
        assert {block.spatial_dropout.rate for block in model.encoder if block.spatial_dropout} == {0.2}
        assert UNet(**model.config).config["spatial_dropout"] == 0.2

    def test_activations(self):
        for name, slopes in (("relu", 0), ("leaky_relu", 0), ("elu", 0), ("prelu", 2 * (2 + 4 + 8 + 4 + 2))):
            model = UNet(filters=2, depth=3, activation=name)
            assert count(UNet(**model.config)) == count(UNet(filters=2, depth=3)) + slopes
            assert model.config.get("activation", "relu") == name

    def test_upsampling_has_no_weights(self):
        model = UNet(filters=2, depth=3, use_upsampling=True)
        assert not any(name.startswith("up.") for name, _ in model.named_parameters())
        assert model.decoder[0].conv0.weights.shape[:2] == (4, 8 + 4)


@settings(max_examples=8)
@given(
    dim=st.sampled_from([2, 3]),
    depth=st.integers(1, 3),
    classes=st.sampled_from([1, 3]),
    use_upsampling=st.sampled_from([False, True, "trilinear"]),
    dropout=st.sampled_from([{}, {"dropout": 0.2}, {"dropout": 0.1, "spatial_dropout": 0.3}]),
    training=st.booleans(),
    activation=st.sampled_from(["relu", "elu", "prelu"]),
    norm=st.sampled_from(["batch", "instance", "group", None]),
    data=st.data(),
)
def test_gradients(dim, depth, classes, use_upsampling, dropout, training, activation, norm, data):
    """Of the input and of every parameter, two images a batch, sides odd or even."""
    config = {"dim": dim, "in_channels": 2, "classes": classes, "filters": 2, "depth": depth, "norm": norm}
    config["activation"] = activation
    if depth == 1:
        dropout = {name: rate for name, rate in dropout.items() if name == "dropout"}
    shortest = 2 ** (depth - 1)
    sides = data.draw(st.tuples(*[st.integers(shortest, shortest + 3)] * dim))
    seed = data.draw(st.integers(0, 1000))
    model = UNet(**config, use_upsampling=use_upsampling, **dropout, seed=seed)
    names = [name for name, _ in model.named_parameters()]
    generator = np.random.default_rng(seed)
    state = {
        name: array + 0.2 * np.abs(generator.standard_normal(array.shape))
        for name, array in model.astype(np.float64).state_dict().items()
    }

    def function(src: Tensor, *parameters: Tensor) -> Tensor:
        # A new model each time, so that dropout draws the same and statistics start the same.
        model = UNet(**config, use_upsampling=use_upsampling, **dropout, seed=seed)
        model.astype(np.float64).train(training).load_state_dict(state)
        for name, parameter in zip(names, parameters, strict=True):
            *path, last = name.split(".")
            module = model
            for part in path:
                module = getattr(module, part)
            vars(module)[last] = parameter  # a tensor: an assignment refuses it
        return model(src)

    src = generator.standard_normal((2, *sides, 2))
    check_gradients(function, src, *(state[name] for name in names), seed=seed, directions=1)


class TestShapes:
    """Volumes and images of any size that the levels can halve."""

    @pytest.mark.parametrize("use_upsampling", [False, True])
    @pytest.mark.parametrize("shape", [(2, 7, 9, 13), (1, 4, 5, 8)])
    def test_odd_volumes(self, shape, use_upsampling):
        model = UNet(filters=4, depth=3, classes=3, use_upsampling=use_upsampling)
        image, labels = batch(model, shape)
        before = image.copy()
        prediction = model(image)
        assert prediction.shape == (*shape, 3)
        np.testing.assert_allclose(prediction.data.sum(axis=-1), 1, rtol=1e-6)
        losses.soft_dice(prediction, labels).backward()
        np.testing.assert_array_equal(image, before)
        assert all(np.isfinite(parameter.grad).all() for parameter in model.parameters())

    def test_images_are_volumes_of_depth_one(self):
        flat = UNet(dim=2, filters=4, depth=3)
        assert flat.encoder[0].conv0.weights.shape == (4, 4, 1, 3, 3)
        image, _ = batch(flat, (2, 12, 9))
        whole = flat(image)
        assert whole.shape == (2, 12, 9, 4)
        each = [flat.eval()(image[[i]]).data[0] for i in range(2)]
        np.testing.assert_allclose(flat.eval()(image).data, each, rtol=1e-5, atol=1e-7)

    def test_one_class_is_a_sigmoid(self):
        model = UNet(classes=1, filters=4, depth=2).eval()
        image, _ = batch(model, (1, 4, 4, 4))
        logits = model.logits(image)
        np.testing.assert_array_equal(model(image).data, functional.sigmoid(logits).data)

    def test_arrays_take_the_precision_of_the_weights(self):
        model = UNet(filters=4, depth=2)
        image, _ = batch(model, (1, 4, 4, 4), dtype=np.float64)
        assert model(image).dtype == np.float32
        assert model.astype(np.float64)(image.astype(np.float32)).dtype == np.float64

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((8, 8, 8, 4), r"input must be \(MB, D, H, W, C\), not of shape \(8, 8, 8, 4\)"),
            ((1, 8, 8, 8, 3), r"of shape \(1, 8, 8, 8, 3\) must have 4 channels"),
            ((1, 8, 3, 8, 4), r"of shape \(1, 8, 3, 8, 4\) needs sides of 4 or more"),
        ],
    )
    def test_input_that_does_not_fit(self, shape, message):
        with pytest.raises(ValueError, match=message):
            UNet(filters=2, depth=3)(np.zeros(shape, np.float32))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"dim": 4}, "dim must be one of 2, 3, not 4"),
            ({"filters": 0}, "filters must be an integer above 0, not 0"),
            ({"depth": 2.5}, "depth must be an integer above 0, not 2.5"),
            ({"use_upsampling": "no"}, "use_upsampling must be one of True, False, 'trilinear', not 'no'"),
            ({"norm": "layer"}, "norm must be one of 'batch', 'instance', 'group', None, not"),
            ({"activation": "tanh"}, "activation must be one of 'relu', 'leaky_relu', 'elu', 'prelu', not"),
            ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
            ({"spatial_dropout": -0.1}, "spatial_dropout must be at least 0 and below 1, not -0.1"),
            ({"spatial_dropout": 0.1, "depth": 1}, "spatial_dropout needs a depth of 2 or more"),
        ],
    )
    def test_settings_that_do_not_fit(self, setting, message):
        with pytest.raises(ValueError, match=message):
            UNet(**setting)

    def test_integers_of_numpy(self):
        """As ``labels.max() + 1`` is one: of eight bits, and nothing that JSON knows."""
        small = np.uint8(129)
        config = UNet(in_channels=np.uint8(1), classes=np.int64(2), filters=small, depth=2).config
        assert UNet(filters=129, in_channels=1, classes=2, depth=2).config == config
        assert json.loads(json.dumps(config)) == config
        with pytest.raises(ValueError, match="in_channels must be an integer above 0, not True"):
            UNet(in_channels=True)
        config = UNet(np.int64(3), use_upsampling=np.True_, dropout=np.float32(0.25)).config
        assert json.loads(json.dumps(config)) == config


def squares(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images of a bright square each, and their labels."""
    generator = np.random.default_rng(seed)
    labels = np.zeros((count, 16, 16), np.uint8)
    for image, (row, col) in zip(labels, generator.integers(0, 9, (count, 2)), strict=True):
        image[row : row + 7, col : col + 7] = 1
    return (labels[..., None] + 0.5 * generator.standard_normal((*labels.shape, 1))), labels


@pytest.mark.parametrize("momentum", [None, 0.99])
def test_a_short_training_can_be_used_in_inference(momentum):
    """Sixty steps by the defaults; with Keras' momentum the statistics are still near their start."""
    machine.set_threads(1)
    given = {} if momentum is None else {"momentum": momentum}
    model = UNet(dim=2, in_channels=1, classes=2, filters=4, depth=2, **given)
    norms = [m for _, m in model.named_modules() if isinstance(m, nn.BatchNorm)]
    assert {norm.momentum for norm in norms} == {momentum or 0.9}
    assert UNet(**model.config).config == model.config
    optimizer = Adam(model.parameters(), lr=5e-3)
    for step in range(60):
        images, labels = squares(4, step)
        optimizer.zero_grad()
        logits = model.logits(3 + 2 * images)  # statistics far from 0 and 1
        losses.dice_cross_entropy(logits, labels, from_logits=True).backward()
        optimizer.step()
    images, labels = squares(8, 1000)
    scores = []
    for training in (True, False):
        with model.mode(training), no_grad():
            found = model.logits(3 + 2 * images).data.argmax(axis=-1)
        scores.append(dice_per_class(found, labels, 2)[1])
    assert scores[0] > 0.8
    assert (abs(scores[1] - scores[0]) < 0.1) == (momentum is None)


def test_float32_against_float64():
    """The whole net on the fast kernels, compared with the same on the references.

    Measured against the largest element of each array: a few roundings a layer, 2e-6 was seen,
    2e-5 is allowed. (In larger nets a gradient can be 1e-3 off: where a voxel before a ReLU is
    within rounding of zero, or two voxels of a pooling window of each other, float32 may take the
    other side of the kink. Among the 10,000 voxels here none does.) The biases before a batch norm
    have no gradient but rounding; they are held against the largest gradient of all.
    """
    single = UNet(in_channels=3, classes=3, filters=8, depth=3, seed=1)
    double = UNet(**single.config).astype(np.float64)
    image, labels = batch(single, (2, 12, 13, 14))
    results = []
    for model in (single, double):
        logits = model.logits(image)
        losses.dice_cross_entropy(logits, labels, from_logits=True).backward()
        results.append((logits.data, dict(model.named_parameters()), dict(model.named_buffers())))
    (logits, parameters, buffers), (exact_logits, exact_parameters, exact_buffers) = results
    assert np.max(np.abs(logits - exact_logits)) < 2e-5 * np.max(np.abs(exact_logits))
    for name, buffer in buffers.items():
        np.testing.assert_allclose(buffer, exact_buffers[name], rtol=1e-5, atol=1e-6)
    largest = max(np.max(np.abs(parameter.grad)) for parameter in exact_parameters.values())
    for name, parameter in parameters.items():
        exact = exact_parameters[name].grad
        silent = ".conv" in name and name.endswith("bias")
        scale = largest if silent else np.max(np.abs(exact))
        assert np.max(np.abs(parameter.grad - exact)) < 2e-5 * scale, name


class TestMemory:
    """What a training step keeps."""

    def test_two_volumes_a_convolution_are_kept(self):
        """The norm's source, and the ReLU's result, which is the next convolution's source."""
        model = UNet(filters=4, depth=1, in_channels=1)
        image, _ = batch(model, (1, 8, 8, 8))
        seen: dict[int, int] = {}
        logits = model.logits(image)
        contexts = [logits._context]
        while contexts:
            ctx = contexts.pop()
            for array in ctx.saved:
                if array is not None and array.ndim == 5 and array.shape[1] == 8:
                    seen[array.ctypes.data] = array.shape[-1]
            contexts += [parent for parent in ctx.parents if hasattr(parent, "saved")]
        assert sorted(seen.values()) == [1, 4, 4, 4, 4]

    def test_the_first_convolution_makes_no_gradient_of_the_image(self, monkeypatch):
        calls = []
        passes = Convolution.module()

        class Counting:
            forward = staticmethod(passes.forward)
            backward_weights = staticmethod(passes.backward_weights)

            @staticmethod
            def backward_data(*arguments):
                calls.append(arguments)
                return passes.backward_data(*arguments)

        monkeypatch.setattr(Convolution, "module", staticmethod(lambda: Counting))
        model = UNet(filters=4, depth=1, in_channels=1)
        image, labels = batch(model, (1, 4, 4, 4))
        losses.soft_dice(model(image), labels).backward()
        assert len(calls) == 2  # of three convolutions

    def test_inference_keeps_nothing(self):
        model = UNet(filters=4, depth=2)
        image, _ = batch(model, (1, 4, 4, 4))
        src = Tensor(image)
        reference = weakref.ref(src)
        with no_grad():
            prediction = model(src)
        del src
        assert reference() is None
        assert not prediction.requires_grad


@pytest.mark.parametrize("threads", [1, 2])
def test_training_repeats_bit_for_bit(threads):
    """Sums are taken in a fixed order, so equal runs give equal weights."""
    before = machine.threads()
    if threads > machine.cores():
        pytest.skip("there is one core")
    machine.set_threads(threads)
    try:
        states = []
        for _ in range(2):
            model = UNet(filters=4, depth=3, dropout=0.1)
            optimizer = Adam(model.parameters())
            image, labels = batch(model, (2, 9, 10, 11))
            for _ in range(3):
                optimizer.zero_grad()
                losses.dice_cross_entropy(model(image), labels).backward()
                optimizer.step()
            states.append(model.state_dict())
        for name, array in states[0].items():
            np.testing.assert_array_equal(array, states[1][name])
    finally:
        machine.set_threads(before)
