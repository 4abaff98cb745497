"""Models out of and into other programs' files: each gives the same probabilities, at odd sizes, too."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyunet import UNet, no_grad
from tinyunet.common.errors import UserError
from tinyunet.interop.convert import convert
from tinyunet.interop.formats import read
from tinyunet.segmentation import checkpoint

CONFIGS: dict[str, dict[str, Any]] = {
    "batch": {"in_channels": 2, "classes": 3, "filters": 8, "depth": 3},
    "one class": {"in_channels": 1, "classes": 1, "filters": 8, "depth": 2, "norm": None},
    "instance": {
        "in_channels": 2,
        "classes": 3,
        "filters": 8,
        "depth": 3,
        "norm": "instance",
        "activation": "elu",
    },
    "group": {
        "in_channels": 2,
        "classes": 3,
        "filters": 16,
        "depth": 2,
        "norm": "group",
        "activation": "prelu",
    },
    "nearest": {"in_channels": 2, "classes": 3, "filters": 8, "depth": 3, "use_upsampling": True},
    "trilinear": {"in_channels": 2, "classes": 3, "filters": 8, "depth": 2, "use_upsampling": "trilinear"},
    "2-D": {"dim": 2, "in_channels": 2, "classes": 3, "filters": 8, "depth": 3, "activation": "leaky_relu"},
}
STATE = {
    "modalities": ["FLAIR", "T2w"],
    "labels": ["background", "a", "b"],
    "label_values": [0, 2, 4],
    "spacing": [1.0, 1.0, 2.0],
}


def trained(config: dict[str, Any]) -> UNet:
    """Return a net whose parameters and statistics have values of their own."""
    model, random = UNet(**config), np.random.default_rng(1)
    state = {
        name: array + 0.05 * random.standard_normal(array.shape, np.float32)
        for name, array in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


def saved(folder: Path, config: dict[str, Any]) -> tuple[Path, UNet]:
    """Write a checkpoint of a net, and return its path and the net."""
    model, state = trained(config), dict(STATE)
    classes = max(2, config["classes"])
    state |= {"labels": STATE["labels"][:classes], "label_values": STATE["label_values"][:classes]}
    state["modalities"] = STATE["modalities"][: config["in_channels"]]
    checkpoint.save(folder / "model.npz", model, None, state)
    return folder / "model.npz", model


def image(config: dict[str, Any], side: int) -> Any:
    """Return a batch of two images with sides of unequal length."""
    sides = (side, side + 1, side + 2)[: config.get("dim", 3)]
    return np.random.default_rng(side).standard_normal((2, *sides, config["in_channels"])).astype(np.float32)


def probabilities(model: UNet, batch: Any) -> Any:
    with no_grad():
        found = model(batch).numpy()
    assert found.std() > 0.02  # else all nets would agree
    return found


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".pt", ".onnx", ".keras", ".h5"])
def test_there_and_back(tmp_path: Path, config: dict[str, Any], ending: str) -> None:
    package = {".safetensors": "safetensors", ".pt": "torch", ".onnx": "onnx", ".npz": "numpy"}.get(
        ending, "keras"
    )
    pytest.importorskip(package)
    source, model = saved(tmp_path, config)
    there, back = tmp_path / f"there{ending}", tmp_path / "back.npz"
    told: dict[str, Any] = {}
    if package == "keras":
        if config.get("use_upsampling") == "trilinear":
            with pytest.raises(UserError, match=r"there.*: not written \(Keras has no trilinear upsampling"):
                convert(source, there)
            assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
            return
        if config.get("activation") in ("elu", "leaky_relu") or config.get("norm") in ("group", "instance"):
            return  # only weights come back from Keras: those of the talk's nets
        told = {"classes": ["x", "y", "z"][: max(2, config["classes"])]}
        told["modalities"] = STATE["modalities"][: config["in_channels"]]
    convert(source, there)
    convert(there, back, **told)
    found = checkpoint.load(back)
    assert found.config == model.config
    assert found.optimizer == {}
    if not told:
        assert found.state == checkpoint.load(source).state
    state = found.make_model().state_dict()
    for name, array in model.state_dict().items():
        assert np.array_equal(state[name], array), name


class TestOnnx:
    """Other programs run the graph at any size."""

    @pytest.mark.parametrize("sizes", [(16, 17, 18, 19)])
    @pytest.mark.parametrize("program", ["onnxruntime", "openvino"])
    def test_same_probabilities(
        self, tmp_path: Path, config: dict[str, Any], program: str, sizes: Any
    ) -> None:
        package = pytest.importorskip(program)
        pytest.importorskip("onnx")
        source, model = saved(tmp_path, config)
        convert(source, tmp_path / "m.onnx")
        if program == "onnxruntime":
            session = package.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
            run = lambda batch: session.run(None, {"image": batch})[0]  # noqa: E731
        else:
            compiled = package.Core().compile_model(
                str(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
            )
            run = lambda batch: compiled(batch)[0]  # noqa: E731
        for side in sizes:
            batch = image(config, side)
            found = np.moveaxis(run(np.ascontiguousarray(np.moveaxis(batch, -1, 1))), 1, -1)
            np.testing.assert_allclose(found, probabilities(model, batch), atol=1e-4)

    def test_a_torch_net_in_onnx(self, tmp_path: Path) -> None:
        """Another program's names and epsilon: the layers are found by their order."""
        onnx = pytest.importorskip("onnx")
        source, model = saved(tmp_path, CONFIGS["batch"])
        convert(source, tmp_path / "m.onnx")
        proto = onnx.load(tmp_path / "m.onnx")
        renamed = {tensor.name: f"w{number}" for number, tensor in enumerate(proto.graph.initializer)}
        for tensor in proto.graph.initializer:
            tensor.name = renamed[tensor.name]
        for node in proto.graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 0.5
        del proto.metadata_props[:]
        onnx.save(proto, tmp_path / "other.onnx")
        found, state = read(tmp_path / "other.onnx")
        assert state == {}
        batch = image(CONFIGS["batch"], 8)
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(str(tmp_path / "other.onnx"), providers=["CPUExecutionProvider"])
        expected = np.moveaxis(session.run(None, {"image": np.moveaxis(batch, -1, 1)})[0], 1, -1)
        np.testing.assert_allclose(probabilities(found, batch), expected, atol=1e-5)
        assert np.abs(probabilities(model, batch) - expected).max() > 1e-3  # the epsilon matters


class TestTorch:
    """A net of PyTorch with other names."""

    @pytest.mark.parametrize("together", [False, True])
    def test_same_probabilities(self, tmp_path: Path, together: bool) -> None:
        torch = pytest.importorskip("torch")
        nn = torch.nn

        def block(inputs: int, width: int) -> Any:
            return nn.Sequential(
                *(nn.Conv3d(inputs, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU()),
                *(nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU()),
            )

        class Other(nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.down = nn.ModuleList([block(2, 8), block(8, 16), block(16, 32)])
                ups = [nn.ConvTranspose3d(32, 16, 2, 2), nn.ConvTranspose3d(16, 8, 2, 2)]
                blocks = [block(32, 16), block(16, 8)]
                if together:  # all transposed convolutions are registered before all blocks
                    self.ups, self.blocks = nn.ModuleList(ups), nn.ModuleList(blocks)
                else:
                    self.steps = nn.ModuleList([ups[0], blocks[0], ups[1], blocks[1]])
                self.out = nn.Conv3d(8, 3, 1)

            def forward(self, x: Any) -> Any:
                skips = []
                for level, layers in enumerate(self.down):
                    x = layers(nn.functional.max_pool3d(x, 2) if level else x)
                    skips.append(x)
                skips.pop()
                steps = (
                    zip(self.ups, self.blocks, strict=True) if together else [self.steps[:2], self.steps[2:]]
                )
                for up, layers in steps:
                    x = layers(torch.cat([up(x), skips.pop()], 1))
                return torch.softmax(self.out(x), 1)

        torch.manual_seed(0)
        net = Other()
        for _ in range(3):
            net(torch.randn(2, 2, 8, 8, 8))  # statistics of its own
        net.eval()
        torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "other.pth")
        model, state = read(tmp_path / "other.pth")
        assert state == {}
        batch = np.random.default_rng(0).standard_normal((1, 8, 12, 16, 2)).astype(np.float32)
        with torch.no_grad():
            expected = net(torch.from_numpy(np.moveaxis(batch, -1, 1).copy())).numpy()
        np.testing.assert_allclose(
            probabilities(model.eval(), batch), np.moveaxis(expected, 1, -1), atol=1e-5
        )
        with pytest.raises(
            UserError, match="does not name its 3 labels; expected --classes, or --labels, for them"
        ):
            convert(tmp_path / "other.pth", tmp_path / "x.npz")
        convert(tmp_path / "other.pth", tmp_path / "x.npz", ["bg", "a", "b"], None, ["FLAIR", "T2w"])
        assert checkpoint.load(tmp_path / "x.npz").state["label_values"] == [0, 1, 2]

    def test_what_a_state_dict_does_not_say(self, tmp_path: Path) -> None:
        """An instance norm without arrays, its epsilon, ELU and smooth upsampling leave no trace in it."""
        torch = pytest.importorskip("torch")
        nn = torch.nn

        def block(inputs: int, width: int) -> Any:
            parts = ((nn.Conv3d(n, width, 3, padding=1), n) for n in (inputs, width))
            return nn.Sequential(
                *(each for conv, _ in parts for each in (conv, nn.InstanceNorm3d(width, eps=0.1), nn.ELU()))
            )

        class Other(nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.top, self.low, self.end = block(1, 8), block(8, 16), block(24, 8)
                self.out = nn.Conv3d(8, 2, 1)

            def forward(self, x: Any) -> Any:
                x = self.top(x)
                low = self.low(nn.functional.max_pool3d(x, 2))
                up = nn.functional.interpolate(low, scale_factor=2, mode="trilinear")
                return torch.softmax(self.out(self.end(torch.cat([up, x], 1))), 1)

        torch.manual_seed(0)
        net, path = Other(), tmp_path / "other.pt"
        torch.save(net.state_dict(), path)
        batch = np.random.default_rng(0).standard_normal((1, 6, 8, 10, 1)).astype(np.float32)
        with torch.no_grad():
            expected = np.moveaxis(net(torch.from_numpy(np.moveaxis(batch, -1, 1).copy())).numpy(), 1, -1)
        told = {"activation": "elu", "norm": "instance", "epsilon": 0.1, "use_upsampling": "trilinear"}
        notes: list[str] = []
        np.testing.assert_allclose(probabilities(read(path, told, notes)[0], batch), expected, atol=1e-5)
        assert notes == []
        for name in told:
            other, notes = {key: value for key, value in told.items() if key != name}, []
            wrong = probabilities(read(path, other, notes)[0], batch)
            assert np.abs(wrong - expected).max() > 1e-3, name
            usual = {"activation": "activation relu", "norm": "norm none", "epsilon": "epsilon 1e-05"}
            word = usual.get(name, "upsampling nearest")
            (note,) = notes
            option = word.split()[0]
            assert note == f"{path}: does not say it, so this is assumed: {word} (--{option})"
        # Ours says all of it: nothing is assumed, and other words are refused.
        names = ["bg", "a"], None, ["FLAIR"], (1.0, 1.0, 2.0)
        assert convert(path, tmp_path / "x.npz", *names, told) == []
        assert checkpoint.load(tmp_path / "x.npz").state["spacing"] == [1, 1, 2]
        convert(tmp_path / "x.npz", tmp_path / "y.pt", told=told)
        with pytest.raises(UserError, match=r"^--activation: relu; .*y\.pt says elu$"):
            convert(tmp_path / "y.pt", tmp_path / "z.npz", told={"activation": "relu"})

    def test_no_code_is_run(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")

        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "touched",))

        torch.save({"weight": Evil()}, tmp_path / "evil.pt")
        with pytest.raises(UserError, match=r"evil.pt: not a state dict of PyTorch"):
            read(tmp_path / "evil.pt")
        assert not (tmp_path / "touched").exists()


class TestKeras:
    """The talk's model."""

    @pytest.mark.parametrize("name", ["batch", "2-D", "nearest", "one class", "group", "instance"])
    def test_same_probabilities(self, tmp_path: Path, name: str) -> None:
        keras = pytest.importorskip("keras")
        source, model = saved(tmp_path, CONFIGS[name])
        convert(source, tmp_path / "m.keras")
        net = keras.models.load_model(tmp_path / "m.keras")
        batch = image(CONFIGS[name], 8)[:, :, :8][..., :8, :] if CONFIGS[name].get("dim", 3) == 3 else None
        batch = image(CONFIGS[name], 8)[:, :8, :8] if batch is None else batch
        np.testing.assert_allclose(net(batch).numpy(), probabilities(model, batch), atol=1e-5)


class TestStrangers:
    """Bad files get one line."""

    @pytest.mark.parametrize("ending", [".pt", ".safetensors", ".onnx", ".keras", ".h5"])
    @pytest.mark.parametrize("content", [b"", b"a letter", b"PK\x03\x04" + bytes(100), bytes(1000)])
    def test_not_a_model(self, tmp_path: Path, ending: str, content: bytes) -> None:
        packages = {".pt": "torch", ".safetensors": "safetensors", ".onnx": "onnx"}
        pytest.importorskip(packages.get(ending, "keras"))
        (tmp_path / f"x{ending}").write_bytes(content)
        with pytest.raises(UserError) as caught:
            read(tmp_path / f"x{ending}")
        assert str(caught.value).startswith(f"{tmp_path}/x{ending}: ")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a.pop("head.weight"), "convolutions and|head|layers"),
            (lambda a: a.update({"head.weight": np.zeros((3, 9, 1, 1, 1), np.float32)}), "expected"),
            (lambda a: a.update({"head.bias": np.full(3, np.nan, np.float32)}), "NaN"),
            (lambda a: a.update({"more.weight": np.zeros((2, 2), np.float32)}), "expected|layers"),
        ],
    )
    def test_other_arrays(self, tmp_path: Path, change: Any, message: str) -> None:
        safetensors = pytest.importorskip("safetensors.numpy")
        source, _ = saved(tmp_path, CONFIGS["batch"])
        convert(source, tmp_path / "m.safetensors")
        arrays = safetensors.load_file(tmp_path / "m.safetensors")
        change(arrays)
        safetensors.save_file(arrays, tmp_path / "x.safetensors")
        if "more.weight" in arrays:
            return  # arrays of no layer of a U-Net are not looked at
        with pytest.raises(UserError, match=message):
            read(tmp_path / "x.safetensors")

    @pytest.mark.parametrize("header", ["[", "[]", '{"config": {"depth": -1}}', '{"config": 3, "state": {}}'])
    def test_bad_header(self, tmp_path: Path, header: str) -> None:
        safetensors = pytest.importorskip("safetensors.numpy")
        arrays = {"a.weight": np.zeros(3, np.float32)}
        safetensors.save_file(arrays, tmp_path / "x.safetensors", metadata={"tinyunet": header})
        with pytest.raises(UserError, match=r"x\.safetensors: "):
            read(tmp_path / "x.safetensors")

    def test_endings(self, tmp_path: Path) -> None:
        source, _ = saved(tmp_path, CONFIGS["one class"])
        with pytest.raises(UserError, match=r"m\.bin; expected a name that ends in \.npz, \.pt, "):
            convert(source, tmp_path / "m.bin")
        with pytest.raises(UserError, match=r"none\.onnx: no such file"):
            convert(tmp_path / "none.onnx", tmp_path / "m.npz")


def test_header_is_json(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    source, model = saved(tmp_path, CONFIGS["batch"])
    convert(source, tmp_path / "m.safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        content = json.loads(file.metadata()["tinyunet"])
    assert content["config"] == model.config
    assert content["state"]["spacing"] == [1.0, 1.0, 2.0]
