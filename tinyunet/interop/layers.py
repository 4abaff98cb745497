"""A U-Net as the list of its layers, in the order in which they run.

Other programs name layers differently, but a U-Net of the same shape runs the same layers in the same order.
So a net is read from the list alone: sizes tell filters, depth and channels; then each array must fit.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyunet.segmentation.checkpoint import check_promise
from tinyunet.unet import UNet

Array = NDArray[np.float32]
Kind = Literal["conv", "up", "norm", "slope"]

EPSILON = 1e-3  # of normalisations here, unless a net has another one: that of Keras


class Layer(NamedTuple):
    """A layer with parameters, by our names; kernels are (OC, IC, KD, KH, KW), or (IC, OC, ...)."""

    name: str
    kind: Kind
    arrays: dict[str, Array]


def layers_of(model: UNet) -> Iterator[Layer]:
    """Yield the layers of a model in the order in which they run; ValueError for one that adds logits."""
    if model.config.get("deep_supervision") is True:
        raise ValueError("deep supervision adds logits of several levels; expected a model without it")
    state = model.state_dict()
    for name in layer_names(model.config):
        arrays = {key.rpartition(".")[2]: a for key, a in state.items() if key.rpartition(".")[0] == name}
        if arrays:
            yield Layer(name, kind_of(name), arrays)


def layer_names(config: dict[str, Any]) -> Iterator[str]:
    """Yield the names of all layers that may have parameters, in the order in which they run."""
    depth = config["depth"]
    blocks = [[f"encoder.{level}"] for level in range(depth)]
    blocks += [[f"up.{i}", f"decoder.{i}"] for i in range(depth - 1)]
    for names in blocks:
        for name in names:
            inner = ("conv0", "norm0", "activation0", "conv1", "norm1", "activation1")
            yield from [name] if name.startswith("up.") else (f"{name}.{part}" for part in inner)
    yield "head"


def kind_of(name: str) -> Kind:
    """Return the kind of a layer, by our name."""
    last = name.rpartition(".")[2]
    if name.startswith("up."):
        return "up"
    return "norm" if last.startswith("norm") else "slope" if last.startswith("activation") else "conv"


def model_from(layers: Sequence[Layer], hints: dict[str, Any]) -> UNet:
    """Return the U-Net that has these layers; ``hints`` are arguments of UNet that sizes do not tell.

    ValueError, of one line, if they are not the layers of such a net.
    """
    convs = [layer for layer in layers if layer.kind == "conv"]
    ups = [layer for layer in layers if layer.kind == "up"]
    depth, rest = divmod(len(convs) + 1, 4)
    if rest or depth < 1 or len(ups) not in (0, depth - 1):
        found = f"{len(convs)} convolutions and {len(ups)} transposed ones"
        raise ValueError(f"{found}; expected 4 depth - 1 of a U-Net, and depth - 1 or none")
    kernel = convs[0].arrays["weights"].shape
    norms = [layer for layer in layers if layer.kind == "norm"]
    config: dict[str, Any] = {
        "dim": 2 if kernel[2] == 1 and kernel[3] > 1 else 3,
        "in_channels": kernel[1],
        "classes": convs[-1].arrays["weights"].shape[0],
        "filters": kernel[0],
        "depth": depth,
        "use_upsampling": not ups and depth > 1,
        "norm": None if not norms else "batch" if "running_mean" in norms[0].arrays else "instance",
    }
    if any(layer.kind == "slope" for layer in layers):
        config["activation"] = "prelu"
    numbers = [array for layer in layers for array in layer.arrays.values()]
    check_promise(config | hints, dict(zip(map(str, range(len(numbers))), numbers, strict=True)))
    model = UNet(**config | hints)
    state = model.state_dict()
    # An instance norm without scale and shift, PyTorch's default, leaves no trace in a file.
    ours = [layer for layer in layers_of(model) if norms or layer.kind != "norm"]
    for mine, theirs in zip(ours, layers, strict=False):
        _fit(mine, theirs)
        for variable, array in _arrays(theirs, mine).items():
            state[f"{mine.name}.{variable}"] = array
    if len(ours) != len(layers):
        raise ValueError(f"{len(layers)} layers with parameters; expected {len(ours)} of {_shown(model)}")
    model.load_state_dict(state)
    return model.eval()


def _fit(mine: Layer, theirs: Layer) -> None:
    """Raise ValueError unless a layer is of the kind and size that this place has."""
    if mine.kind != theirs.kind:
        raise ValueError(f"{theirs.name} is a {theirs.kind} where {mine.name} runs; expected a {mine.kind}")
    for variable, array in mine.arrays.items():
        found = theirs.arrays.get(variable)
        if found is None:
            if variable == "bias":
                continue  # zeros
            raise ValueError(f"{theirs.name}: no {variable}; expected it for {mine.name}")
        if found.shape != array.shape:
            raise ValueError(f"{theirs.name}: {variable} of shape {found.shape}; expected {array.shape}")
        if not np.isfinite(found).all():
            raise ValueError(f"{theirs.name}: {variable} holds NaN or infinity")


def _arrays(theirs: Layer, mine: Layer) -> dict[str, Array]:
    """Return the arrays for a layer."""
    arrays = {name: array.astype(np.float32) for name, array in theirs.arrays.items() if name in mine.arrays}
    if "bias" in mine.arrays and "bias" not in arrays:
        arrays["bias"] = np.zeros_like(mine.arrays["bias"])
    return arrays


def in_three(kernel: Array) -> Array:
    """Return a kernel of two or three dimensions as (OC, IC, KD, KH, KW): KD is 1 in two."""
    return kernel[:, :, np.newaxis] if kernel.ndim == 4 else kernel


def in_its_own(kernel: Array, dim: int) -> Array:
    """Return a kernel (OC, IC, KD, KH, KW) with as many axes as its net has dimensions."""
    return kernel[:, :, 0] if dim == 2 and kernel.ndim == 5 else kernel


def _shown(model: UNet) -> str:
    config = model.config
    return f"a U-Net of {config['depth']} levels from {config['filters']} filters on"


def order_of(names: Sequence[str]) -> list[list[int]]:
    """Return the orders in which layers may run that a file lists in the order of their registration.

    As listed, or, where all transposed convolutions (``up``) stand together, each before the two
    convolutions of its level. ``names`` are kinds of layers.
    """
    listed = list(range(len(names)))
    ups = [n for n in listed if names[n] == "up"]
    if not ups or ups != list(range(ups[0], ups[-1] + 1)) or len(ups) < 2:
        return [listed]
    after = listed[ups[-1] + 1 :]  # the blocks of the decoder, and the last layer
    starts = [n for n, at in enumerate(after) if names[at] == "conv"]
    levels = [after[start:end] for start, end in zip(starts[0::2], [*starts[2::2], len(after)], strict=False)]
    woven = [n for up, level in zip(ups, levels, strict=False) for n in (up, *level)]
    rest = [n for n in after if n not in woven]
    return [listed, [*listed[: ups[0]], *woven, *rest]]
