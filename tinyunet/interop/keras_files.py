"""Keras models: the talk's U-Net as a file ``.keras`` or ``.h5``, in three dimensions or two.

Written is a whole model, which ``keras.models.load_model`` reads; Keras has no place for our header. Read are
weights of a U-Net in the order in which its layers run. Code that a file may hold (a Lambda) is not run.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from tinyunet.interop.layers import EPSILON, Layer, in_its_own, in_three, layers_of, model_from
from tinyunet.unet import UNet

_VARIABLES = {
    "weights": "kernel",
    "scale": "gamma",
    "shift": "beta",
    "running_mean": "moving_mean",
    "running_variance": "moving_variance",
    "slope": "alpha",
}


def _keras() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its notes on the machine
    import keras

    return keras


def build(model: UNet) -> Any:
    """Return the Keras model with the weights of a model; ValueError for what Keras' layers cannot do."""
    keras = _keras()
    layers, config = keras.layers, model.config
    dim, depth, filters = config["dim"], config["depth"], config["filters"]
    if config["use_upsampling"] == "trilinear" and dim == 3:
        raise ValueError("Keras has no trilinear upsampling; expected use_upsampling False or True")
    axes = list(range(1, dim + 1))

    def block(x: Any, name: str, width: int) -> Any:
        for i in (0, 1):
            x = getattr(layers, f"Conv{dim}D")(width, 3, padding="same", name=f"{name}_conv{i}")(x)
            norm = config.get("norm", "batch")
            if norm == "batch":
                momentum = config.get("momentum", 0.99)
                x = layers.BatchNormalization(momentum=momentum, epsilon=EPSILON, name=f"{name}_norm{i}")(x)
            elif norm is not None:
                groups = width if norm == "instance" else math.gcd(8, width)
                x = layers.GroupNormalization(groups, epsilon=EPSILON, name=f"{name}_norm{i}")(x)
            x = activation(f"{name}_activation{i}")(x)
        return x

    def activation(name: str) -> Any:
        kind = config.get("activation", "relu")
        if kind == "prelu":
            return layers.PReLU(shared_axes=axes, name=name)
        return (
            layers.LeakyReLU(0.01, name=name) if kind == "leaky_relu" else layers.Activation(kind, name=name)
        )

    inputs = x = layers.Input((*(None,) * dim, config["in_channels"]))
    skips = []
    for level in range(depth):
        x = block(x, f"encoder_{level}", filters << level)
        if level < depth - 1:
            skips.append(x)
            x = getattr(layers, f"MaxPooling{dim}D")(2)(x)
    for i, level in enumerate(reversed(range(depth - 1))):
        if config["use_upsampling"]:
            how = {"interpolation": "bilinear"} if config["use_upsampling"] == "trilinear" else {}
            x = getattr(layers, f"UpSampling{dim}D")(2, **how)(x)
        else:
            transposed = getattr(layers, f"Conv{dim}DTranspose")
            x = transposed(filters << level, 2, strides=2, padding="same", name=f"up_{i}")(x)
        x = block(layers.Concatenate()([x, skips.pop()]), f"decoder_{i}", filters << level)
    x = getattr(layers, f"Conv{dim}D")(config["classes"], 1, name="head")(x)
    final = "sigmoid" if config["classes"] == 1 else "softmax"
    found = keras.Model(inputs, layers.Activation(final)(x), name="tinyunet")
    for layer in layers_of(model):
        theirs = found.get_layer(layer.name.replace(".", "_"))
        for name, array in layer.arrays.items():
            variable = getattr(theirs, _VARIABLES.get(name, name))
            value = np.moveaxis(in_its_own(array, dim), (1, 0), (-2, -1)) if name == "weights" else array
            variable.assign(value.reshape(variable.shape))
    return found


def write(path: Path, model: UNet, header: str) -> None:
    """Write a whole model; the header has no place in it."""
    build(model).save(path)


def read(path: Path, hints: dict[str, Any]) -> UNet:
    """Return the U-Net of a Keras file; ValueError if it is not one."""
    keras = _keras()
    try:
        found = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # of Keras, h5py, zipfile, and of layers that a stranger has made
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"not a Keras model that can be read ({first[:120]})") from error
    layers = [layer for each in found.layers if (layer := _layer(each))]
    return model_from(layers, hints)


def _layer(layer: Any) -> Layer | None:
    """Return a layer of Keras with its arrays in our layout; None if it has none."""
    if not layer.weights:
        return None
    kind = type(layer).__name__
    names = {theirs: ours for ours, theirs in _VARIABLES.items()}
    arrays = {names.get(v.name, v.name): np.asarray(v) for v in layer.weights}
    if kind in ("Conv2D", "Conv3D", "Conv2DTranspose", "Conv3DTranspose"):
        arrays["weights"] = in_three(np.moveaxis(arrays["weights"], (-2, -1), (1, 0)))
        return Layer(layer.name, "up" if kind.endswith("Transpose") else "conv", arrays)
    if kind in ("BatchNormalization", "GroupNormalization"):
        return Layer(layer.name, "norm", arrays, float(layer.epsilon))
    if kind == "PReLU":
        return Layer(layer.name, "slope", {"slope": arrays["slope"].reshape(-1)})
    raise ValueError(f"{layer.name} is a {kind}; expected layers of a U-Net")
