"""A model out of or into a file; its ending says which program's."""

import json
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinyunet.common.errors import UserError, said
from tinyunet.common.files import parse_json, replacing
from tinyunet.interop import keras_files, onnx_files, onnx_reading, torch_files
from tinyunet.interop.layers import EPSILON
from tinyunet.segmentation import checkpoint
from tinyunet.segmentation.checkpoint import Checkpoint
from tinyunet.unet import UNet

#: By ending: the package that the format needs, and what writes a file.
FORMATS: dict[str, tuple[str, Callable[[Path, UNet, str], None]]] = {
    ".pt": ("torch", torch_files.write_torch),
    ".pth": ("torch", torch_files.write_torch),
    ".safetensors": ("safetensors", torch_files.write_safetensors),
    ".keras": ("keras", keras_files.write),
    ".h5": ("keras", keras_files.write),
    ".onnx": ("onnx", onnx_files.write),
}
_OURS = ".npz"
#: Arguments of a net that a file of another program may not tell.
TOLD = ("activation", "norm", "epsilon", "use_upsampling")
#: Words of options for values of these arguments.
VALUES = {"none": None, "nearest": True}
_WORDS: dict[Any, str] = {None: "none", True: "nearest", False: "transposed", "use_upsampling": "upsampling"}
_KEPT = ("modalities", "file_modalities", "labels", "label_values", "labels_source", "spacing")


def check_ending(option: str, path: Path | str) -> None:
    """Raise UserError, which begins with the option, unless a format and its package are known here."""
    ending = Path(path).suffix.lower()
    if ending != _OURS and ending not in FORMATS:
        raise UserError(f"{option}: {path}; expected a name that ends in {', '.join([_OURS, *FORMATS])}")
    package = FORMATS[ending][0] if ending != _OURS else "numpy"
    if find_spec(package) is None:
        raise UserError(f"{option}: {path}: needs {package}; pip install 'tinyunet[interop]'")


def export(found: Checkpoint, path: Path | str) -> None:
    """Write the model of a checkpoint, without its optimizer, into a file of the format of its ending.

    ``.npz`` is a checkpoint of ours. What the model was trained on goes along.
    UserError if the format cannot hold the model, or its package is missing; OSError if the
    file cannot be written: then nothing of it is left.
    """
    path = Path(path)
    check_ending("export", path)
    model = _for_prediction(found.make_model())
    state = {name: found.state[name] for name in _KEPT if name in found.state}
    if path.suffix.lower() == _OURS:
        checkpoint.save(path, model, None, state)
        return
    header = json.dumps({"config": model.config, "state": state})
    try:
        with replacing(path) as temporary:
            FORMATS[path.suffix.lower()][1](temporary, model, header)
    except ValueError as error:
        raise UserError(f"{path}: not written ({said(error)})") from error


def _for_prediction(model: UNet) -> UNet:
    """Return a model without the heads that only a training needs."""
    if model.config.get("deep_supervision") == "levels":
        arrays, random = model.state_dict(), model.random_state()
        model = UNet(**{name: value for name, value in model.config.items() if name != "deep_supervision"})
        model.load_state_dict({name: arrays[name] for name in model.state_dict()})
        model.load_random_state(random)
    return model.eval()


def read(
    path: Path | str, told: Mapping[str, Any] = {}, notes: list[str] | None = None
) -> tuple[UNet, dict[str, Any]]:
    """Return the model in a file of another program, and what it says of its task: entries of a state.

    ``told`` are arguments of the model that the file may not tell: activation, norm, epsilon,
    use_upsampling. ``notes`` gets a
    line if any had to be assumed. UserError, which names the file, if it cannot be used, or says
    otherwise than was told. No code of the file is run.
    """
    try:
        model, state, assumed = _read(Path(path), told)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({said(error)})") from error
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory ({said(error)})") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path}: {said(error)}") from error
    check_told(Path(path), model, told)
    if assumed and notes is not None:
        parts = ", ".join(f"{_word(name)} {_word(value)}" for name, value in assumed.items())
        options = ", ".join(f"--{_word(name)}" for name in assumed)
        notes.append(f"{path}: does not say it, so this is assumed: {parts} ({options})")
    return model, state


def check_told(path: Path, model: UNet, told: Mapping[str, Any]) -> None:
    """Raise UserError, which names the file, if its model is not as was told."""
    config: dict[str, Any] = {"activation": "relu", "norm": "batch", "epsilon": EPSILON} | model.config
    for name, value in told.items():
        found = config[name]
        near = name == "epsilon" and math.isclose(found, value, rel_tol=1e-5)
        if found != value and not near:
            raise UserError(f"--{_word(name)}: {_word(value)}; {path} says {_word(found)}")


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _WORDS.get(value, str(value))


def _read(path: Path, told: Mapping[str, Any]) -> tuple[UNet, dict[str, Any], dict[str, Any]]:
    """Return the model in a file, what it says of its task, and arguments that nobody has told."""
    check_ending("import", path)
    ending = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a model")
    if ending in (".pt", ".pth", ".safetensors"):
        read_arrays = torch_files.read_safetensors if ending == ".safetensors" else torch_files.read_torch
        arrays, text = read_arrays(path)
        hints, state = _header(text)
        assumed: dict[str, Any] = {}
        model = torch_files.model_of(arrays, hints or told, None if hints else assumed)
        return model, state, assumed
    read_graph = onnx_reading.read if ending == ".onnx" else keras_files.read
    model, text = read_graph(path, lambda text: _header(text)[0])
    return model, _header(text)[1], {}


def _header(text: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments of the model and entries of its state; ValueError if they are not such."""
    if text is None:
        return {}, {}
    content = parse_json(text)
    if not isinstance(content, Mapping):
        raise ValueError("its header is no object")
    config, state = content.get("config", {}), content.get("state", {})
    checkpoint.check_header(config, state)
    return dict(config), {name: state[name] for name in _KEPT if name in state}
