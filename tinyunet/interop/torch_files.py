"""PyTorch state dicts (``.pt``, ``.pth``) and safetensors: arrays by name.

Names are ours with PyTorch's words, ``encoder.0.conv0.weight``. A net of PyTorch that has these parts, with
``eps=1e-3`` in its normalisations, loads them by ``load_state_dict``. Other names are read in their order.
"""

import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyunet.interop.layers import (
    EPSILON,
    Array,
    Kind,
    Layer,
    in_its_own,
    in_three,
    layers_of,
    model_from,
    order_of,
)
from tinyunet.unet import UNet

_TO_TORCH = {
    "weights": "weight",
    "scale": "weight",
    "shift": "bias",
    "running_variance": "running_var",
    "slope": "weight",
}
_NORM = {
    "weight": "scale",
    "bias": "shift",
    "running_mean": "running_mean",
    "running_var": "running_variance",
}
_THEIR_EPSILON = 1e-5  # what PyTorch adds to a variance unless told otherwise
_META = "tinyunet"  # entry of the metadata that holds our header


def arrays_of(model: UNet) -> dict[str, Array]:
    """Return the arrays of a model by PyTorch's names."""
    dim, found = model.config["dim"], {}
    for layer in layers_of(model):
        for name, array in layer.arrays.items():
            found[f"{layer.name}.{_TO_TORCH.get(name, name)}"] = np.ascontiguousarray(in_its_own(array, dim))
    return found


def write_torch(path: Path, model: UNet, header: str) -> None:
    """Write a state dict; the header is in its metadata, which PyTorch ignores."""
    import torch

    tensors = OrderedDict((name, torch.from_numpy(array)) for name, array in arrays_of(model).items())
    tensors._metadata = OrderedDict({"": {"version": 1, _META: header}})  # type: ignore[attr-defined]
    torch.save(tensors, path)


def read_torch(path: Path) -> tuple[dict[str, Array], str | None]:
    """Return arrays by name and our header, if there is one; no code of the file is run.

    ValueError if it holds anything else.
    """
    import torch

    try:
        _check_sizes(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"not a state dict of PyTorch ({first[:120]})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # as many training programs keep it
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError("not a state dict of PyTorch; expected tensors by name")
    metadata: Any = getattr(content, "_metadata", {})
    header = metadata.get("", {}).get(_META) if isinstance(metadata, Mapping) else None
    for name, tensor in content.items():
        strided = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{str(name)[:60]!a} is no plain tensor, or larger than what the file holds")
    arrays = {str(name): tensor.detach().float().numpy() for name, tensor in content.items()}
    return arrays, header if isinstance(header, str) else None


def _check_sizes(path: Path) -> None:
    """Refuse an archive that takes more memory than the file; older files are no archives."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError("its tensors are larger than the file")


def write_safetensors(path: Path, model: UNet, header: str) -> None:
    """Write arrays by PyTorch's names, and the header as metadata."""
    from safetensors.numpy import save_file

    save_file(arrays_of(model), path, metadata={_META: header, "format": "pt"})


def read_safetensors(path: Path) -> tuple[dict[str, Array], str | None]:
    """Return arrays by name, and our header if there is one; ValueError for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            # In the order in which they lie in the file: keys() sorts them by name.
            arrays = {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
            return arrays, (file.metadata() or {}).get(_META)
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"not a safetensors file ({str(error)[:120]})") from error


def model_of(
    arrays: Mapping[str, Array], hints: Mapping[str, Any], assumed: dict[str, Any] | None = None
) -> UNet:
    """Return the U-Net of arrays by PyTorch's names; ValueError if they are not those of one.

    ``hints`` are arguments of the net. ``assumed`` gets the arguments that neither arrays nor hints tell.
    """
    arrays = {name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")}
    ours = {"encoder.0.conv0.weight", "head.weight"} <= {*arrays}
    known = {"epsilon": EPSILON if ours else _THEIR_EPSILON} | dict(hints)
    if ours:
        depth = len({name.split(".")[1] for name in arrays if name.startswith("encoder.")})
        prefixes = [layer.name for layer in layers_of(UNet(depth=depth, filters=1, activation="prelu"))]
    else:
        prefixes = list(dict.fromkeys(name.rpartition(".")[0] for name in arrays))
    groups = {name: _group(arrays, name) for name in prefixes}
    layers = [_layer(name, group) for name, group in groups.items() if group]
    errors = []
    for order in [[*range(len(layers))]] if ours else order_of([layer.kind for layer in layers]):
        try:
            model = model_from([layers[n] for n in order], known)
        except ValueError as error:
            errors.append(error)
        else:
            if assumed is not None:
                assumed |= _untold(model, layers, hints)
            return model
    raise errors[0]


def _untold(model: UNet, layers: Sequence[Layer], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a net that neither the arrays of its layers nor hints tell."""
    config = {"activation": "relu", "norm": "batch", "epsilon": EPSILON} | model.config
    told = {
        "activation": config["activation"] == "prelu",
        "norm": any("running_mean" in layer.arrays for layer in layers),
        "epsilon": config["norm"] is None,
        "use_upsampling": not config["use_upsampling"],
    }
    return {name: config[name] for name, is_told in told.items() if not is_told and name not in hints}


def _group(arrays: Mapping[str, Array], layer: str) -> dict[str, Array]:
    """Return the arrays of a layer by PyTorch's words."""
    return {name.rpartition(".")[2]: a for name, a in arrays.items() if name.rpartition(".")[0] == layer}


def _layer(name: str, group: Mapping[str, Array]) -> Layer:
    weight: Array = group.get("weight", np.empty(0, np.float32))
    if weight.ndim in (4, 5):
        arrays = {"weights": in_three(weight)} | ({"bias": group["bias"]} if "bias" in group else {})
        # The kernel of a transposed convolution that doubles sides has a side of two.
        kind: Kind = "up" if weight.shape[-1] == 2 else "conv"
        return Layer(name, kind, arrays)
    if "bias" in group:
        return Layer(name, "norm", {_NORM.get(word, word): array for word, array in group.items()})
    if "weight" in group and weight.ndim == 1:
        return Layer(name, "slope", {"slope": weight})
    raise ValueError(f"{name}: {', '.join(group)}; expected the arrays of a convolution, norm or PReLU")
