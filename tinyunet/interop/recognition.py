"""Find the U-Net in a graph of layers, as a file of Keras or ONNX holds it.

The search goes from the output to the input. A block ends with an activation; above it are normalisation and
convolution, twice. What a block reads says where it is: the result of a concatenation in the decoder, of
pooling in the encoder, the input on the first level.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyunet.segmentation.checkpoint import Checkpoint, CheckpointError
from tinyunet.unet import UNet

Array = NDArray[Any]
# Arguments of a net that change no prediction.
_OF_TRAINING = ("dropout", "seed", "momentum", "spatial_dropout")


@dataclass(frozen=True)
class Layer:
    """A layer of a graph, in words that formats share.

    ``kind`` is "conv", "up" (transposed convolution), "upsample", "norm", "activation", "pool", "concat",
    "final" (softmax or sigmoid), "input", or "pass" for a layer that changes nothing in a prediction.
    ``arrays`` have the names and layouts of :mod:`tinyunet.nn`. ``how`` holds ``type`` of a norm, an
    activation, an upsampling and a final layer, and ``epsilon`` or ``momentum`` of a norm.
    """

    kind: str
    sources: tuple[str, ...] = ()
    arrays: Mapping[str, Array] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)


class _Found:
    """What is collected on the way from the output to the input."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.config: dict[str, Any] = {}
        self.either = False  # whether a norm can be that of groups or of instances

    def source(self, name: str, index: int = 0) -> str:
        """Return the layer that this one reads, beyond layers that change nothing."""
        sources = self.layers[name].sources
        if index >= len(sources):
            raise ValueError(f"{name[:60]!a} reads nothing; expected the output of a layer")
        return self.skip_passes(sources[index])

    def skip_passes(self, name: str) -> str:
        while self.layers[name].kind == "pass":
            name = self.layers[name].sources[0]
        return name

    def expect(self, name: str, kind: str) -> Layer:
        layer = self.layers[name]
        if layer.kind != kind:
            raise ValueError(f"{name[:60]!a} is of the kind {layer.kind!a}, where a U-Net has {kind!a}")
        return layer

    def note(self, key: str, value: Any) -> None:
        """Note an argument of the net; ValueError if it differs from one layer to another."""
        if self.config.setdefault(key, value) != value:
            raise ValueError(
                f"{key} is {self.config[key]!a} in one layer and {value!a} in another; expected one"
            )

    def block(self, name: str) -> tuple[str, dict[str, Array]]:
        """Return what a block reads, and its arrays; ``name`` is its last layer."""
        state: dict[str, Array] = {}
        for i in (1, 0):
            activation = self.expect(name, "activation")
            self.note("activation", activation.how["type"])
            state |= {f"activation{i}.{part}": array for part, array in activation.arrays.items()}
            name = self.source(name)
            norm = self.layers[name]
            kind = norm.how["type"] if norm.kind == "norm" else None
            self.either |= kind == "either"
            if kind != "either":
                self.note("norm", kind)
            if norm.kind == "norm":
                for key in ("epsilon", "momentum"):
                    if key in norm.how:
                        self.note(key, norm.how[key])
                state |= {f"norm{i}.{part}": array for part, array in norm.arrays.items()}
                name = self.source(name)
            state |= {f"conv{i}.{part}": array for part, array in self.expect(name, "conv").arrays.items()}
            name = self.source(name)
        return name, state


def recognize(layers: Mapping[str, Layer], output: str, noted: Mapping[str, Any] | None = None) -> UNet:
    """Return the U-Net that a graph is.

    ``layers`` are by name, each after those that it reads. ``noted`` are arguments of the net that only a
    training needs, such as dropout, if the file says them. The net ends in a softmax or sigmoid, also if the
    graph ends in logits. ValueError, of one line, if the graph is no net that :class:`tinyunet.UNet` can be.
    """
    config, state = _parts(layers, output)
    config |= {name: value for name, value in (noted or {}).items() if name in _OF_TRAINING}
    try:
        return Checkpoint(Path("it"), config, state, {}, [], None, {}, {}).make_model().eval()
    except CheckpointError as error:
        raise ValueError(str(error).removeprefix("it: ")) from error


def _parts(layers: Mapping[str, Layer], output: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return arguments and ``state_dict()`` of the net."""
    found = _Found(_in_order(layers))
    if output not in layers:
        raise ValueError(f"its output {output[:60]!a} is no layer of it")
    name = found.skip_passes(output)
    final = layers[name].how["type"] if layers[name].kind == "final" else None
    if final:
        name = found.source(name)
    state = {f"head.{part}": array for part, array in found.expect(name, "conv").arrays.items()}
    classes = state["head.weights"].shape[0]
    usual = "sigmoid" if classes == 1 else "softmax"
    if final not in (None, usual):
        raise ValueError(f"ends in a {final} of {classes} classes; expected a {usual}")
    lowest, skips, decoder = _decoder(found, found.source(name))
    state |= decoder
    depth = len(skips) + 1
    state |= _encoder(found, lowest, skips)
    first = state["encoder.0.conv0.weights"]
    if found.either and found.config.setdefault("norm", "instance") not in ("instance", "group"):
        raise ValueError("norms differ from one layer to another; expected one kind")
    config = {
        "dim": 2 if first.shape[2] == 1 else 3,
        "in_channels": first.shape[1],
        "classes": classes,
        "filters": first.shape[0],
        "depth": depth,
        "use_upsampling": found.config.pop("use_upsampling", False),
        **{"dropout": 0.0, "seed": 0},
        **found.config,
    }
    return config, state


def _in_order(layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
    """Return the layers, after checking that each reads only those before it: so there is no circle."""
    before = set[str]()
    for name, layer in layers.items():
        if not before.issuperset(layer.sources) or (layer.kind == "pass" and not layer.sources):
            raise ValueError(f"{name[:60]!a} reads what is no layer before it")
        before.add(name)
    return layers


def _decoder(found: _Found, name: str) -> tuple[str, list[str], dict[str, Array]]:
    """Return the last layer of the lowest block, the skips from the first level on, and arrays."""
    parts: list[tuple[dict[str, Array], dict[str, Array]]] = []
    skips: list[str] = []
    while True:
        source, block = found.block(name)
        if found.layers[source].kind != "concat":
            break
        if len(found.layers[source].sources) != 2:
            raise ValueError(f"{source[:60]!a} joins {len(found.layers[source].sources)} tensors; expected 2")
        below, skip = found.source(source, 0), found.source(source, 1)
        if found.layers[below].kind not in ("up", "upsample"):  # the skip comes first
            below, skip = skip, below
            block["conv0.weights"] = _halves_exchanged(found, below, block["conv0.weights"])
        up = found.layers[below]
        if up.kind not in ("up", "upsample"):
            raise ValueError(f"{source[:60]!a} joins no upsampled tensor; expected one and a skip")
        found.note("use_upsampling", up.how["type"] if up.kind == "upsample" else False)
        parts.append((dict(up.arrays), block))
        skips.append(skip)
        name = found.source(below)
    state: dict[str, Array] = {}
    for i, (up_arrays, block) in enumerate(reversed(parts)):
        state |= {f"up.{i}.{part}": array for part, array in up_arrays.items()}
        state |= {f"decoder.{i}.{part}": array for part, array in block.items()}
    return name, skips, state


def _halves_exchanged(found: _Found, up: str, weights: Array) -> Array:
    """Return a convolution's weights for [upsampled, skip] from those for [skip, upsampled]."""
    while found.layers[up].kind not in ("conv", "up"):  # what has as many channels
        up = found.source(up)
    kernel = found.layers[up].arrays["weights"]
    channels = kernel.shape[1] if found.layers[up].kind == "up" else kernel.shape[0]
    return np.roll(weights, channels, axis=1)


def _encoder(found: _Found, name: str, skips: list[str]) -> dict[str, Array]:
    """Return the arrays of the encoder from its last layer; skips must start at its levels."""
    state: dict[str, Array] = {}
    for level in range(len(skips), -1, -1):
        source, block = found.block(name)
        state |= {f"encoder.{level}.{part}": array for part, array in block.items()}
        if level:
            found.expect(source, "pool")
            name = found.source(source)
            if name != skips[level - 1]:
                raise ValueError(
                    f"{name[:60]!a} is pooled, but {skips[level - 1][:60]!a} is the skip; expected one"
                )
        else:
            found.expect(source, "input")
    return state
