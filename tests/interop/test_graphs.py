"""Nets in files of Keras and ONNX, read as graphs: no other net passes for a U-Net."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_interop import CONFIGS, image, probabilities, saved, trained

from tinyunet import UNet, no_grad
from tinyunet.common.errors import UserError
from tinyunet.interop.convert import convert
from tinyunet.interop.formats import read
from tinyunet.segmentation import checkpoint

MORE = {
    "the talk's 2-D net": {**{"dim": 2, "norm": None, "spatial_dropout": 0.2}, "classes": 1},
    "bilinear": {"dim": 2, "use_upsampling": "trilinear", "momentum": 0.99, "epsilon": 1e-5},
    "groups of few channels": {"norm": "group", "filters": 6, "dropout": 0.1, "activation": "leaky_relu"},
    "one level": {"depth": 1},
}
ALL = CONFIGS | {
    name: {"in_channels": 2, "classes": 3, "filters": 4, "depth": 3} | config for name, config in MORE.items()
}


@pytest.fixture
def keras():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("keras")


@pytest.mark.parametrize("ending", [".keras", ".h5", ".onnx"])
@pytest.mark.parametrize("name", ALL)
def test_everything_comes_back(keras, tmp_path, name, ending):
    source, model = saved(tmp_path, ALL[name])
    if ending != ".onnx" and (model.config["dim"], model.config["use_upsampling"]) == (3, "trilinear"):
        pytest.skip("Keras cannot")
    convert(source, tmp_path / f"there{ending}")
    convert(tmp_path / f"there{ending}", tmp_path / "back.npz")
    found, before = checkpoint.load(tmp_path / "back.npz"), checkpoint.load(source)
    assert (found.config, found.state) == (before.config, before.state)
    for part, array in before.model.items():
        np.testing.assert_array_equal(found.model[part], array)


@pytest.mark.parametrize("name", [name for name in ALL if name != "trilinear"])
def test_keras_predicts_the_same_at_odd_sizes(keras, tmp_path, name):
    source, model = saved(tmp_path, ALL[name])
    convert(source, tmp_path / "m.keras")
    net = keras.models.load_model(tmp_path / "m.keras", compile=False)
    batch = image(ALL[name], 9)
    np.testing.assert_allclose(np.asarray(net(batch)), probabilities(model, batch), atol=1e-5)
    momenta = {layer.momentum for layer in net.layers if hasattr(layer, "momentum")}
    assert momenta <= {ALL[name].get("momentum", 0.9)}


def talks_net(keras, dim: int, fused: bool, skip_first: bool):
    """The U-Net of IntelAI/unet; ``fused`` has activations in convolutions, as its 2-D net has."""
    layers = keras.layers
    names = "Conv{}D", "Conv{}DTranspose", "MaxPooling{}D"
    conv, up, pool = (getattr(layers, name.format(dim)) for name in names)

    def block(x, name, width):
        for i in (0, 1):
            if fused:
                x = conv(width, 3, padding="same", activation="relu", name=f"{name}{'ab'[i]}")(x)
            else:
                x = conv(width, 3, padding="same", use_bias=i == 0, name=f"{name}_conv{i}")(x)
                x = layers.BatchNormalization(name=f"{name}_bn{i}", epsilon=1e-4)(x)
                x = layers.Activation("relu")(x)
        return x

    inputs = x = layers.Input((*(None,) * dim, 3), name="MRImages")
    first = x = block(x, "encodeA", 4)
    second = x = block(pool(2)(x), "encodeB", 8)
    x = layers.Dropout(0.2)(block(pool(2)(x), "encodeC", 16))
    for skip, name, width in ((second, "decodeB", 8), (first, "decodeA", 4)):
        parts = [up(width, 2, strides=2, padding="same")(x), skip]
        x = layers.concatenate(parts[::-1] if skip_first else parts)
        x = block(x, name, width)
    return keras.Model(inputs, conv(1, 1, activation="sigmoid", name="PredictionMask")(x))


@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.parametrize(
    ("dim", "fused", "skip_first"), [(3, False, False), (2, True, False), (3, False, True)]
)
def test_the_talks_net(keras, tmp_path, dim, fused, skip_first, ending):
    keras.utils.set_random_seed(0)
    net, random = talks_net(keras, dim, fused, skip_first), np.random.default_rng(5)
    for variable in net.weights:  # also moving averages
        if len(variable.shape) == 1:
            variable.assign(random.uniform(0.2, 1, variable.shape))
    net.save(tmp_path / f"talk{ending}")
    found, state = read(tmp_path / f"talk{ending}")
    assert state == {}
    wanted = {"dim": dim, "in_channels": 3, "classes": 1, "filters": 4, "depth": 3, "dropout": 0.2}
    assert wanted.items() <= found.config.items()
    batch = random.standard_normal((2, *(16, 8, 12)[:dim], 3)).astype(np.float32)
    np.testing.assert_allclose(probabilities(found, batch), np.asarray(net(batch)), atol=1e-5)


def test_a_file_of_keras_2(keras, tmp_path):
    """Keras 2 refers to the layers before one by nested lists."""
    h5py = pytest.importorskip("h5py")
    keras.utils.set_random_seed(0)
    net, path = talks_net(keras, 3, False, False), tmp_path / "talk.h5"
    net.save(path)

    def old(node):
        names = [tensor["config"]["keras_history"] for tensor in np.ravel(node["args"])]
        return [[*name, {}] for name in names]

    with h5py.File(path, "a") as file:
        content = json.loads(file.attrs["model_config"])
        for entry in content["config"]["layers"]:
            entry["inbound_nodes"] = [old(node) for node in entry["inbound_nodes"]]
        file.attrs["model_config"] = json.dumps(content)
    batch = np.random.default_rng(0).standard_normal((1, 8, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(read(path)[0](batch).data, np.asarray(net(batch)), atol=1e-5)


def torch_net(torch, norm: str | None):
    """A net of two levels that pads as ours does, and ends in logits."""
    nn = torch.nn
    norms = {"batch": nn.BatchNorm3d, "group": lambda width: nn.GroupNorm(8, width)}
    norms["instance"] = lambda width: nn.InstanceNorm3d(width, affine=True)

    def block(inputs, width):
        made = []
        for channels in (inputs, width):
            made += [
                nn.Conv3d(channels, width, 3, padding=1),
                *([norms[norm](width)] if norm else []),
                nn.ELU(),
            ]
        return nn.Sequential(*made)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = block(2, 16), block(16, 32), block(32, 16)
            self.up, self.out = nn.ConvTranspose3d(32, 16, 2, 2), nn.Conv3d(16, 3, 1)

        def forward(self, x):
            skip = self.a(x)
            x = self.up(self.b(nn.functional.max_pool3d(skip, 2)))
            ends = [size - had for size, had in zip(skip.shape[:1:-1], x.shape[:1:-1], strict=True)]
            x = nn.functional.pad(x, [side for end in ends for side in (0, end)])
            return self.out(self.c(torch.cat([skip, x], 1)))

    net = Net()
    for part in net.modules():
        for name, array in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if array.ndim == 1:
                array.data.uniform_(0.2, 1) if name != "bias" else array.data.normal_()
    return net.eval()


@pytest.mark.parametrize("norm", ["batch", "instance", "group", None])
@pytest.mark.filterwarnings("ignore")
def test_onnx_that_pytorch_wrote(tmp_path, norm):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    net, axes = torch_net(torch, norm), {"x": {0: "batch", 2: "depth", 3: "height", 4: "width"}}
    how = {"input_names": ["x"], "dynamic_axes": axes, "dynamo": False}
    torch.onnx.export(net, (torch.randn(1, 2, 8, 9, 8),), tmp_path / "m.onnx", **how)
    found, _ = read(tmp_path / "m.onnx")
    assert found.config["activation"] == "elu"
    src = np.random.default_rng(0).standard_normal((2, 7, 8, 9, 2)).astype(np.float32) / 20  # epsilon counts
    with torch.no_grad():
        theirs = torch.softmax(net(torch.from_numpy(np.moveaxis(src, -1, 1).copy())), 1).numpy()
    with no_grad():
        np.testing.assert_allclose(found(src).data, np.moveaxis(theirs, 1, -1), atol=1e-5)


class TestOtherNets:
    """A net of the same convolutions that computes something else."""

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ("Relu", "Tanh", "of the kind 'Tanh', where a U-Net has 'activation'"),
            ("MaxPool", "AveragePool", "of the kind 'AveragePool', where a U-Net has 'pool'"),
            ("Sub", "Add", "onnxruntime does not run it"),
        ],
    )
    def test_onnx(self, tmp_path, before, after, message):
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        source, _ = saved(tmp_path, CONFIGS["batch"])
        convert(source, tmp_path / "m.onnx")
        proto = onnx.load(tmp_path / "m.onnx")
        for node in proto.graph.node:
            if node.op_type == before:
                node.op_type = after
        onnx.save(proto, tmp_path / "x.onnx")
        with pytest.raises(UserError, match=message):
            read(tmp_path / "x.onnx")

    @pytest.mark.parametrize("ending", [".keras", ".h5"])
    def test_keras(self, keras, tmp_path, ending):
        layers = keras.layers
        x = inputs = layers.Input((None, None, None, 1))
        for _ in (0, 1):
            x = layers.ReLU()(layers.Conv3D(2, 3, padding="same")(layers.Lambda(lambda x: x + 1)(x)))
        keras.Model(inputs, layers.Conv3D(1, 1, activation="sigmoid")(x)).save(tmp_path / f"x{ending}")
        with pytest.raises(UserError, match="of the kind 'Lambda', where a U-Net has"):
            read(tmp_path / f"x{ending}")


class TestStrangers:
    """Damaged files, and files that would take more memory than they hold."""

    @pytest.mark.parametrize("ending", [".pt", ".safetensors", ".onnx", ".keras", ".h5"])
    def test_mutated_files(self, keras, tmp_path, ending):
        package = {".pt": "torch", ".safetensors": "safetensors", ".onnx": "onnx"}.get(ending, "keras")
        pytest.importorskip(package)
        source, _ = saved(tmp_path, CONFIGS["one class"] | {"filters": 2})
        path, random = tmp_path / f"m{ending}", np.random.default_rng(6)
        convert(source, path)
        content, lines = path.read_bytes(), list[str]()
        for _ in range(40):
            changed = bytearray(content)
            for place in random.integers(len(changed), size=random.integers(1, 20)):
                changed[place] = random.integers(256)
            path.write_bytes(changed[: random.integers(1, len(changed)) if random.random() < 0.3 else None])
            try:
                assert isinstance(read(path)[0], UNet)
            except UserError as error:
                lines.append(str(error))
        assert [line for line in lines if "\n" in line or not line.startswith(str(path))] == []
        assert len(lines) > 5

    def test_a_tensor_larger_than_its_numbers(self, tmp_path):
        torch = pytest.importorskip("torch")
        state = {name: torch.from_numpy(a) for name, a in trained(CONFIGS["batch"]).state_dict().items()}
        torch.save({**state, "head.weight": torch.zeros(1).expand(10**13)}, tmp_path / "x.pt")
        with pytest.raises(UserError, match="larger than what the file holds"):
            read(tmp_path / "x.pt")

    def test_a_net_larger_than_its_numbers(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.numpy")
        conv = np.zeros((10**5, 1, 3, 3, 3), np.float32)
        arrays = {f"encoder.{level}.conv{i}.weight": conv for level in range(5) for i in (0, 1)}
        arrays |= {f"decoder.{level}.conv{i}.weight": conv[:1] for level in range(4) for i in (0, 1)}
        arrays["head.weight"] = conv[:1, :, :1, :1, :1]
        arrays |= {f"up.{level}.weight": conv[:1, :, :2, :2, :2] for level in range(4)}
        safetensors.save_file(
            {n: np.ascontiguousarray(a[:300]) for n, a in arrays.items()}, tmp_path / "x.safetensors"
        )
        with pytest.raises(UserError, match="numbers; expected at least"):
            read(tmp_path / "x.safetensors")

    def test_data_in_another_file(self, tmp_path: Path):
        onnx = pytest.importorskip("onnx")
        source, _ = saved(tmp_path, CONFIGS["batch"])
        convert(source, tmp_path / "m.onnx")
        proto = onnx.load(tmp_path / "m.onnx")
        onnx.external_data_helper.set_external_data(proto.graph.initializer[0], "/etc/passwd")
        proto.graph.initializer[0].ClearField("raw_data")
        (tmp_path / "x.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(UserError, match="is kept in another file"):
            read(tmp_path / "x.onnx")
