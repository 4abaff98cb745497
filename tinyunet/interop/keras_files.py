"""Keras' files: ``.keras``, and ``.h5`` as Keras 2 and 3 write it; layers have the talk's names.

Source: IntelAI/unet, ``3D/model.py``. Writing needs Keras. Reading needs h5py alone: no layer of a file is
ever made, so no code in the file, such as that of a Lambda layer, can run.
"""

import io
import math
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyunet.common.errors import said
from tinyunet.common.files import LONGEST_JSON, open_file, parse_json
from tinyunet.functional import BATCH_NORM_MOMENTUM
from tinyunet.interop.graph_checks import all_equal, convolution, demand, type_of_groups
from tinyunet.interop.recognition import Layer, recognize
from tinyunet.unet import UNet

Array = NDArray[Any]

_META = "tinyunet"
_CONFIG, _WEIGHTS, _NOTES = "config.json", "model.weights.h5", f"{_META}.json"
# What is added to the name of a convolution for the activation in it.
_ACTIVATED = " (activation)"
# Layers that change nothing in a prediction, or only pad to the size of a skip, as `_pad_end` does.
_PASSES = {"Dropout", "SpatialDropout", "ZeroPadding", "Take"}
_VARIABLES = {"weights": "kernel", "bias": "bias", "scale": "gamma", "shift": "beta", "slope": "alpha"}
_VARIABLES |= {"running_mean": "moving_mean", "running_variance": "moving_variance"}


# ---- write ----


def write(path: Path, model: UNet, header: str) -> None:
    """Write a whole model for ``keras.models.load_model``; ``path`` ends in .keras or .h5.

    A model in ``.keras`` takes volumes of any size, as ours does. One in ``.h5`` takes multiples of
    2 ** (depth - 1), as the talk's does: the format holds no layer that pads to another layer's size.
    ValueError for what Keras' layers cannot do.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its notes on the machine
    import h5py
    import keras

    if model.config["dim"] == 3 and model.config["use_upsampling"] == "trilinear":
        raise ValueError("Keras has no trilinear upsampling; expected use_upsampling False or True")
    theirs = _Net(keras, model.config, pads=path.suffix == ".keras").with_weights(model.state_dict())
    with warnings.catch_warnings():  # that .h5 is legacy
        warnings.simplefilter("ignore")
        theirs.save(path)
    if path.suffix == ".keras":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_NOTES, header)
    else:
        with h5py.File(path, "a") as file:
            file.attrs[_META] = header


class _Net:
    """The net in Keras' functional API."""

    def __init__(self, keras: Any, config: Mapping[str, Any], pads: bool) -> None:
        self.keras, self.config, self.pads = keras, config, pads
        self.given: dict[str, str] = {}  # Keras' names of our layers
        self.dim, self.depth = config["dim"], config["depth"]

    def with_weights(self, arrays: Mapping[str, Array]) -> Any:
        """Build the model, and give it weights."""
        layers, config = self.keras.layers, self.config
        inputs = x = layers.Input((*(None,) * self.dim, config["in_channels"]), name="MRImages")
        skips = []
        for level in range(self.depth):
            if level:
                skips.append(x)
                x = self.make("MaxPooling", f"pool{level}", f"pool{_letter(level - 1)}", 2)(x)
            x = self.block(x, f"encoder.{level}", f"encode{_letter(level)}", level)
        for i, level in enumerate(range(self.depth - 2, -1, -1)):
            x, skip = self.up(x, i, level), skips.pop()
            x = _pad_end(self.keras, x, skip) if self.pads else x
            x = layers.Concatenate(name=f"concat{_letter(level)}")([x, skip])
            x = self.block(x, f"decoder.{i}", f"decode{_letter(level)}", level)
        x = self.make("Conv", "head", "convOut", config["classes"], 1)(x)
        final = "sigmoid" if config["classes"] == 1 else "softmax"
        model = self.keras.Model(inputs, layers.Activation(final, name="PredictionMask")(x))
        for ours, array in arrays.items():
            layer, _, part = ours.rpartition(".")
            variable = getattr(model.get_layer(self.given[layer]), _VARIABLES[part])
            if (
                array.ndim == 5
            ):  # (OC, IC, KD, KH, KW), and (IC, OC, ...) transposed: channels swapped, at the end
                array = array.transpose(2, 3, 4, 1, 0)
            variable.assign(array.reshape(variable.shape))
        return model

    def make(self, kind: str, ours: str, name: str, *arguments: Any, **options: Any) -> Any:
        """Make a layer; one that Keras has for each number of dimensions is named without it."""
        self.given[ours] = name
        sized = {"Conv": "Conv{}D", "ConvTranspose": "Conv{}DTranspose", "MaxPooling": "MaxPooling{}D"}
        sized |= {"UpSampling": "UpSampling{}D", "SpatialDropout": "SpatialDropout{}D"}
        layer = getattr(self.keras.layers, sized.get(kind, kind).format(self.dim))
        return layer(*arguments, name=name, **options)

    def block(self, x: Any, ours: str, name: str, level: int) -> Any:
        config, encodes = self.config, ours.startswith("encoder")
        width = config["filters"] << level
        for i in (0, 1):
            x = self.make("Conv", f"{ours}.conv{i}", f"{name}_conv{i}", width, 3, padding="same")(x)
            if norm := self.norm(width):
                x = self.make(norm[0], f"{ours}.norm{i}", f"{name}_bn{i}", **norm[1])(x)
            kind, options = self.activation()
            x = self.make(kind, f"{ours}.activation{i}", f"{name}_act{i}", **options)(x)
            if (
                encodes
                and i == 0
                and config.get("spatial_dropout")
                and self.depth - 3 <= level < self.depth - 1
            ):
                x = self.make("SpatialDropout", f"{ours}.drop", f"{name}_drop0", config["spatial_dropout"])(x)
        if encodes and config["dropout"] and level >= self.depth - 2:
            x = self.make("Dropout", f"{ours}.drop", f"{name}_drop1", config["dropout"])(x)
        return x

    def up(self, x: Any, i: int, level: int) -> Any:
        below, mode = _letter(level + 1), self.config["use_upsampling"]
        if not mode:
            width = self.config["filters"] << level
            return self.make("ConvTranspose", f"up.{i}", f"transconv{below}", width, 2, 2, padding="same")(x)
        smooth = {"interpolation": "bilinear"} if mode == "trilinear" else {}
        return self.make("UpSampling", f"up.{i}", f"up{below}", 2, **smooth)(x)

    def norm(self, width: int) -> tuple[str, dict[str, Any]] | None:
        kind = self.config.get("norm", "batch")
        epsilon = {"epsilon": self.config.get("epsilon", 1e-3)}
        if kind == "batch":
            return "BatchNormalization", epsilon | {
                "momentum": self.config.get("momentum", BATCH_NORM_MOMENTUM)
            }
        groups = width if kind == "instance" else math.gcd(8, width)
        return ("GroupNormalization", epsilon | {"groups": groups}) if kind else None

    def activation(self) -> tuple[str, dict[str, Any]]:
        kinds: dict[str, tuple[str, dict[str, Any]]] = {
            "relu": ("Activation", {"activation": "relu"}),
            "leaky_relu": ("LeakyReLU", {"negative_slope": 0.01}),
            "elu": ("ELU", {"alpha": 1.0}),
            "prelu": ("PReLU", {"shared_axes": [*range(1, self.dim + 1)]}),
        }
        return kinds[self.config.get("activation", "relu")]


def _letter(level: int) -> str:
    return chr(ord("A") + level) if level < 26 else str(level)


def _pad_end(keras: Any, x: Any, skip: Any) -> Any:
    """Pad with zeros at the end of each axis to the size of the skip, which may be larger by one."""
    axes = len(x.shape) - 2
    x = getattr(keras.layers, f"ZeroPadding{axes}D")(((0, 1),) * axes)(x)
    for axis in range(1, axes + 1):
        others = [other for other in range(axes + 2) if other != axis]
        ones = keras.ops.max(keras.ops.ones_like(skip, dtype="int32"), axis=others)
        x = keras.ops.take(x, keras.ops.cumsum(ones) - 1, axis=axis)
    return x


# ---- read ----


def read(path: Path, config_of: Callable[[str], dict[str, Any]]) -> tuple[UNet, str | None]:
    """Return the U-Net in a file that Keras wrote, and our header if there is one.

    ``config_of`` takes the arguments of the model out of the header. ValueError, of one line, if the file
    holds no such net. No layer of it is made, so none of its code is run.
    """
    import h5py

    try:
        with open_file(path) as file:
            if path.suffix.lower() == ".h5":
                with h5py.File(file, "r") as stored:
                    parts = stored.attrs.get("model_config"), stored, stored.attrs.get(_META)
                    return _model(*parts, config_of)
            with zipfile.ZipFile(file) as archive:
                config, weights = (_member(archive, name) for name in (_CONFIG, _WEIGHTS))
                notes = _member(archive, _NOTES) if _NOTES in archive.namelist() else None
            with h5py.File(io.BytesIO(weights), "r") as stored:
                return _model(config, stored, notes, config_of)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # a damaged file may lack any entry; h5py raises OSError
        raise ValueError(f"damaged, or no model of Keras ({said(error)[:120]})") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a member of an archive, which may not take much more memory than the file."""
    member = archive.getinfo(name)
    most = LONGEST_JSON if name != _WEIGHTS else 16 * member.compress_size + 2**20
    demand(name, member.file_size <= most, f"{member.file_size} bytes, unpacked", f"at most {most}")
    return archive.read(member)


def _model(
    description: Any, stored: Any, notes: Any, config_of: Callable[[str], dict[str, Any]]
) -> tuple[UNet, str | None]:
    if description is None:
        raise ValueError("holds weights, but no model; expected a file of model.save(...)")
    content = parse_json(description if isinstance(description, str) else description.decode())
    kind = content["class_name"]
    if kind not in ("Functional", "Model"):
        raise ValueError(f"holds a {str(kind)[:40]!a} model; expected one of Keras' functional API")
    graph, drops = _graph(content["config"]["layers"], stored)
    (last,) = _sources(content["config"]["output_layers"])
    output = f"{last}{_ACTIVATED}" if f"{last}{_ACTIVATED}" in graph else last
    header = notes.decode() if isinstance(notes, bytes) else notes
    header = header if isinstance(header, str) else None
    return recognize(graph, output, drops | (config_of(header) if header else {})), header


def _graph(entries: list[Any], stored: Any) -> tuple[dict[str, Layer], dict[str, float]]:
    """Return the layers of a model, and its rates of dropout."""
    graph: dict[str, Layer] = {}
    rates: dict[str, float] = {}
    counts = Counter[str]()
    for entry in entries:
        kind, config = str(entry["class_name"]), entry["config"]
        name, sort = str(config["name"]), kind.removesuffix("2D").removesuffix("3D")
        kinds = _snake(kind)
        arrays = _arrays(stored, name, f"{kinds}_{counts[kinds]}" if counts[kinds] else kinds)
        counts[kinds] += 1
        if key := {"Dropout": "dropout", "SpatialDropout": "spatial_dropout"}.get(sort):
            rates[key] = float(config["rate"])
        sources = tuple(
            f"{source}{_ACTIVATED}" if f"{source}{_ACTIVATED}" in graph else source
            for source in dict.fromkeys(_sources(entry["inbound_nodes"]))
        )
        demand(name, config.get("data_format") in (None, "channels_last"), "channels first", "channels last")
        graph[name] = _layer(name, sort, config, sources, arrays)
        if (
            graph[name].kind in ("conv", "up")
            and (after := _checked_word(name, config.get("activation"))) != "linear"
        ):
            graph[f"{name}{_ACTIVATED}"] = _activated((name,), after)
    return graph, rates


def _layer(name: str, sort: str, config: Any, sources: tuple[str, ...], arrays: list[Array]) -> Layer:
    """Return the layer that a layer of Keras is; ``sort`` is its class, without the number of dimensions."""
    if sort in ("Conv", "Conv2DTranspose", "Conv3DTranspose"):
        return _convolution(name, sort != "Conv", config, sources, arrays)
    if sort in ("BatchNormalization", "GroupNormalization"):
        return _normalization(name, sort, config, sources, arrays)
    if sort in ("MaxPooling", "UpSampling"):
        return _resized(name, sort, config, sources)
    if sort in ("Activation", "ReLU", "Softmax", "LeakyReLU", "ELU", "PReLU"):
        return _activation(name, sort, config, sources, arrays)
    if sort == "Concatenate":
        _last_axis(name, config)
    if sort == "ZeroPadding":
        padding = config["padding"]
        demand(name, all(sides == [0, 1] for sides in padding), padding, "0 before and 1 after")
    kinds = {"InputLayer": "input", "Concatenate": "concat"}
    return Layer("pass" if sort in _PASSES and sources else kinds.get(sort, sort), sources)


def _resized(name: str, sort: str, config: Any, sources: tuple[str, ...]) -> Layer:
    size = config["pool_size" if sort == "MaxPooling" else "size"]
    steps = config.get("strides") or size
    fits = all_equal(size, 2) and all_equal(steps, 2) and config.get("padding", "valid") == "valid"
    demand(name, fits, f"size {size}, strides {steps}, {config.get('padding')}", 'size 2, strides 2, "valid"')
    smooth = config.get("interpolation", "nearest")
    demand(name, smooth in ("nearest", "bilinear"), smooth, "nearest or bilinear")
    how = {"type": True if smooth == "nearest" else "trilinear"}
    return Layer("pool" if sort == "MaxPooling" else "upsample", sources, how=how)


def _activation(name: str, sort: str, config: Any, sources: tuple[str, ...], arrays: list[Array]) -> Layer:
    if sort == "Softmax":
        _last_axis(name, config)
    if sort == "Activation":
        return _activated(sources, _checked_word(name, config["activation"]))
    plain = all(config.get(key) in (None, 0) for key in ("max_value", "threshold"))
    slope = config.get("negative_slope", config.get("alpha"))  # alpha in Keras 2
    usual = {"LeakyReLU": 0.01, "ELU": 1.0, "ReLU": 0.0}.get(sort)
    fits = slope is None or usual is None or abs(float(slope) - usual) < 1e-6
    demand(name, plain and fits, f"{sort} of slope {slope}", f"slope {usual}, and no limits")
    if sort == "PReLU":
        slopes = arrays[0] if arrays else np.zeros(0)
        demand(name, slopes.size == slopes.shape[-1], f"slopes of shape {slopes.shape}", "one a channel")
        return Layer("activation", sources, {"slope": slopes.ravel()}, {"type": "prelu"})
    return _activated(sources, {"ReLU": "relu", "ELU": "elu", "Softmax": "softmax"}.get(sort, "leaky_relu"))


def _convolution(name: str, up: bool, config: Any, sources: tuple[str, ...], arrays: list[Array]) -> Layer:
    strides, step = config["strides"], 2 if up else 1
    fits = (
        all_equal(strides, step)
        and all_equal(config.get("dilation_rate"), 1)
        and config.get("groups", 1) == 1
    )
    padded = config["padding"] == "same" or all_equal(config["kernel_size"], 2 if up else 1)
    demand(
        name, fits and padded, f"strides {strides}, {config['padding']}", f'strides {step}, "same", no groups'
    )
    demand(
        name,
        len(arrays) == 1 + bool(config["use_bias"]) and bool(sources),
        f"{len(arrays)} arrays",
        "weights",
    )
    kernel = arrays[0]
    demand(name, kernel.ndim in (4, 5), f"a kernel of shape {kernel.shape}", "two or three dimensions")
    weights = kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))
    return convolution(name, sources[0], weights, arrays[1] if len(arrays) > 1 else None, up)


def _normalization(name: str, sort: str, config: Any, sources: tuple[str, ...], arrays: list[Array]) -> Layer:
    batch = sort == "BatchNormalization"
    _last_axis(name, config)
    parts = ["scale"] * bool(config.get("scale", True)) + ["shift"] * bool(config.get("center", True))
    parts += ["running_mean", "running_variance"] * batch
    demand(name, len(arrays) == len(parts) > 0, f"{len(arrays)} arrays", f"{len(parts)}")
    state = dict(zip(parts, arrays, strict=True))
    channels = arrays[0].shape
    state.setdefault("scale", np.ones(channels, np.float32))
    state.setdefault("shift", np.zeros(channels, np.float32))
    how = {"type": "batch", "epsilon": float(config["epsilon"])}
    if batch:
        how["momentum"] = float(config["momentum"])
    else:
        how["type"] = type_of_groups(name, config["groups"], channels[0])
    return Layer("norm", sources, state, how)


def _last_axis(name: str, config: Any) -> None:
    axis = config.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    demand(name, axis in (-1, 3, 4), f"axis {axis}", "the last axis")


def _activated(sources: tuple[str, ...], word: str) -> Layer:
    if word in ("softmax", "sigmoid"):
        return Layer("final", sources, how={"type": word})
    if word == "linear":
        return Layer("pass", sources)
    return Layer("activation", sources, how={"type": word})


def _checked_word(name: str, activation: Any) -> str:
    """Return the name of an activation; ValueError for an object, which is someone's own function."""
    word = "linear" if activation is None else activation
    known = ("relu", "elu", "softmax", "sigmoid", "linear")  # "leaky_relu" has Keras' slope of 0.2
    demand(
        name, isinstance(word, str) and word in known, f"activation {word!a}", f"one of {', '.join(known)}"
    )
    return str(word)


def _snake(name: str) -> str:
    """Return a class' name as Keras writes it in files (``keras.src.utils.naming``)."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _sources(node: Any) -> Iterator[str]:
    """Yield the names of the layers that an entry of Keras 2 or 3 refers to, in order."""
    if isinstance(node, dict):
        if "keras_history" in node:
            yield str(node["keras_history"][0])
        else:
            for value in node.values():
                yield from _sources(value)
    elif isinstance(node, list):
        if len(node) >= 3 and isinstance(node[0], str) and all(type(index) is int for index in node[1:3]):
            yield node[0]
        else:
            for value in node:
                yield from _sources(value)


def _arrays(stored: Any, name: str, place: str) -> list[Array]:
    """Return what a layer holds, in Keras' order: as Keras 3 stores it, or as ``.h5`` does."""
    if (old := _group(stored, "model_weights")) is not None:
        group = _group(old, name)
        names = [] if group is None else group.attrs.get("weight_names", [])
        return [_dataset(group, n if isinstance(n, str) else n.decode()) for n in names]
    group = _group(stored, f"layers/{place}/vars")
    return [] if group is None else [_dataset(group, str(i)) for i in range(len(group))]


def _group(group: Any, path: str) -> Any:
    """Return a part of a file, or None; never one in another file, to which a link may lead."""
    import h5py

    for name in path.split("/"):
        link = group.get(name, getlink=True) if name in group else None
        if not isinstance(link, h5py.HardLink):
            return None
        group = group[name]
    return group


def _dataset(group: Any, path: str) -> Array:
    found = _group(group, path)
    right = found is not None and hasattr(found, "dtype") and not found.external and not found.is_virtual
    demand(path, right and found.dtype.kind == "f", "no array of numbers", "float32")
    stored = found.id.get_storage_size()
    demand(path, found.nbytes <= 16 * stored, f"{found.nbytes} bytes from {stored}", "as many as it holds")
    return np.asarray(found[()], np.float64 if found.dtype.itemsize > 4 else np.float32)
