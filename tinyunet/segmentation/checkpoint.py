"""A model and the state of its training, in one ``.npz`` file.

The file is an ordinary archive of NumPy arrays without pickled objects, so loading a stranger's file runs
none of the stranger's code. Its members:

    header                JSON: format, configuration and random generators of the model, order of the
                          optimizer's parameters, state of the training
    model/NAME            parameters and buffers, as ``Module.state_dict`` names them
    optimizer/NAME        arrays of the optimizer's ``state_dict``
    training/NAME         further arrays of the training

The file ends in the SHA-256 of all bytes before it, as the archive's comment: :func:`load` refuses a file
that is cut off, or in which a byte has changed, before it believes anything in it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyunet.common import archive, schema
from tinyunet.common.archive import Arrays
from tinyunet.common.errors import UserError, one_line, said
from tinyunet.common.files import atomic, parse_json
from tinyunet.common.schema import each, number, optional, record, text, whole
from tinyunet.data.labels import check_label_values
from tinyunet.nn import Module
from tinyunet.optim import Optimizer
from tinyunet.unet import ACTIVATIONS, NORMS, UNet

FORMAT = "tinyunet checkpoint 2"
_GROUPS = ("model/", "optimizer/", "training/")
_PARTS = ("config", "order", "random", "state")
_NOT_OURS = "an archive of arrays, but not a checkpoint of tinyunet"
_LONGEST_HEADER = 2**24  # characters: the history of 30,000 epochs


def _label_values(value: Any, where: str) -> None:
    each(lambda *_: None)(value, where)
    check_label_values(value)


# The arguments of UNet. The arrays limit how large a model may be: see `check_promise`.
_CONFIG = record(
    {"dim": schema.one_of(2, 3), "depth": whole(1, 64), "seed": whole(0, 2**128)}
    | dict.fromkeys(("in_channels", "classes", "filters"), whole(1))
    | {"use_upsampling": schema.one_of(False, True, "trilinear"), "dropout": number(0, 1)},
    {"momentum": number(0, 1), "norm": schema.one_of(*NORMS)}
    | {"spatial_dropout": number(0, 1), "activation": schema.one_of(*ACTIVATIONS)}
    | {"epsilon": number(0, 1), "deep_supervision": schema.one_of(False, True, "levels")},
)
# State of a NumPy generator, PCG64.
_GENERATOR = record(
    {"bit_generator": text, "has_uint32": whole(0, 1), "uinteger": whole(0, 2**32 - 1)}
    | {"state": record(dict.fromkeys(("state", "inc"), whole(0, 2**128 - 1)))}
)
# The state of a training has more entries: see :mod:`tinyunet.training.resume`.
_NAMES, _SPACING = each(text), each(number(1e-3, 1e3), 3, 3)
_STATE = record(
    {},
    {"labels": _NAMES, "modalities": _NAMES, "label_values": _label_values}
    | {"spacing": optional(_SPACING)}
    | {"file_modalities": _NAMES},
)
_HEADER = record({"config": _CONFIG, "order": _NAMES, "random": schema.by_name(_GENERATOR), "state": _STATE})


class CheckpointError(UserError):
    """A file is not a checkpoint that can be used; the message is one line and names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file."""

    path: Path
    config: dict[str, Any]  # arguments of UNet
    model: Arrays  # state_dict() of the model
    optimizer: Arrays  # state_dict() of the optimizer
    order: list[str]  # names of the parameters, in the order in which the optimizer held them
    random: dict[str, Any] | None  # random_state() of the model; None: generators begin at their seeds
    state: dict[str, Any]  # notes of the training: epoch, sequences, labels, ...
    arrays: Arrays  # arrays of the training

    def make_model(self) -> UNet:
        """Return the model as it was saved; CheckpointError if the arrays do not fit the configuration."""
        try:
            check_promise(self.config, self.model)
            model = UNet(**self.config)
            if any(array.dtype == np.float64 for array in self.model.values()):
                model.astype(np.float64)
            model.load_state_dict(self.model)
            if self.random is not None:
                model.load_random_state(self.random)
        except MemoryError as error:
            raise CheckpointError(f"{self.path}: not enough memory ({said(error)})") from error
        except (TypeError, ValueError, KeyError) as error:
            reason = f"holds another model than its configuration says ({one_line(str(error))})"
            raise CheckpointError(f"{self.path}: {reason}") from error
        return model

    def load_optimizer(self, model: Module, optimizer: Optimizer) -> None:
        """Load the saved state into an optimizer, which may hold the model's parameters in another order.

        CheckpointError if the state belongs to another kind of optimizer, or to other parameters.
        """
        sizes = {name: parameter.data.size for name, parameter in model.named_parameters()}
        order = _order(model, optimizer)
        state = dict(self.optimizer)
        try:
            ends = np.cumsum([sizes[name] for name in self.order])
            for name in optimizer.averages:
                parts = dict(zip(self.order, np.split(state[name], ends[:-1]), strict=True))
                state[name] = np.concatenate([parts[parameter] for parameter in order])
            optimizer.load_state_dict(state)
        except (ValueError, KeyError, IndexError) as error:
            reason = f"its optimizer is of another kind or another model ({one_line(str(error))})"
            raise CheckpointError(f"{self.path}: {reason}") from error


def save(
    path: Path | str,
    model: UNet,
    optimizer: Optimizer | None,
    state: dict[str, Any],
    arrays: Mapping[str, NDArray[Any]] | None = None,
    previous: Path | None = None,
) -> None:
    """Write a checkpoint, ``*.npz``; a reader finds the old file or the whole new one.

    Without an optimizer no training can go on from it. ``state`` (content for JSON) and ``arrays`` come back
    in :class:`Checkpoint`. ``previous`` is another name in that folder, which the replaced checkpoint gets.
    OSError if the file cannot be written: the old one stays. ValueError if :func:`load` would refuse the
    file: the optimizer holds another model's parameter, or an array holds objects, NaN or infinity.
    """
    header = {
        "format": FORMAT,
        "config": model.config,
        "random": model.random_state(),
        "order": _order(model, optimizer) if optimizer else [],
        "state": state,
    }
    members: dict[str, Any] = {}
    of_optimizer = optimizer.state_dict() if optimizer else {}
    for group, named in zip(_GROUPS, (model.state_dict(), of_optimizer, arrays or {}), strict=True):
        members |= {f"{group}{name}": np.asarray(array) for name, array in named.items()}
    for name, array in members.items():
        if array.dtype.hasobject:
            raise ValueError(f"{name}: an array of objects, which a checkpoint does not hold")
    try:
        _check_arrays(members)
    except ValueError as error:
        raise CheckpointError(f"{path}: not written ({error})") from error
    with atomic(path, previous) as file:
        np.savez(file, header=np.array(json.dumps(header)), **members)
        archive.seal(file)


def check_header(config: Any, state: Any) -> None:
    """Raise ValueError unless a stranger's configuration of a model, and its state, are what they must be."""
    _CONFIG(config, "config")
    _STATE(state, "state")


def _order(model: Module, optimizer: Optimizer) -> list[str]:
    """Return the names of an optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, held in enumerate(optimizer.parameters):
        if id(held) not in names:
            raise ValueError(f"optimizer: its parameter {index} of shape {held.shape} is not the model's")
    return [names[id(parameter)] for parameter in optimizer.parameters]


def load(path: Path | str) -> Checkpoint:
    """Read a file that :func:`save` wrote; CheckpointError if it is missing, changed anywhere or not ours."""
    path = Path(path)
    try:
        members = archive.read(path)
        header = _header(members)
        _check_arrays(members)
    except OSError as error:
        raise CheckpointError(f"{path}: {said(error)}; expected a checkpoint (.npz)") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: not enough memory ({said(error)})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {said(error)}") from error
    model, optimizer, arrays = (
        {name.removeprefix(group): array for name, array in members.items() if name.startswith(group)}
        for group in _GROUPS
    )
    config, order, random, state = (header[part] for part in _PARTS)
    return Checkpoint(path, config, model, optimizer, order, random, state, arrays)


def _header(members: Arrays) -> dict[str, Any]:
    """Take the header from the members; check its format and all entries that are used."""
    header = members.pop("header", np.empty(0))
    if header.dtype.kind != "U" or header.ndim:
        raise ValueError(_NOT_OURS)
    if header.itemsize > 4 * _LONGEST_HEADER:
        raise ValueError(f"a header of more than {_LONGEST_HEADER} characters")
    try:
        content = parse_json(str(header))
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({said(error)})") from error
    if not isinstance(content, dict) or not {"format", *_PARTS} <= content.keys():
        raise ValueError(_NOT_OURS)
    found = content["format"]
    if found != FORMAT:
        named = f'"{found[:40]}"' if isinstance(found, str) else schema.shown(found)
        raise ValueError(f'format {named}; this program reads "{FORMAT}"')
    _HEADER(content, "header")
    return content


def _check_arrays(members: Arrays) -> None:
    """Check that arrays belong to a group, and hold finite numbers of 8 bytes at most."""
    for name, array in members.items():
        shown = ascii(name[:60])
        if not name.startswith(_GROUPS):
            raise ValueError(f"{shown}: an array that no checkpoint has")
        kinds = "f" if name.startswith("model/") else "fiu"
        if array.dtype.kind not in kinds or array.dtype.itemsize > 8:
            raise ValueError(f"{shown}: of type {array.dtype}; expected float32 or float64")
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            raise ValueError(f"{shown}: {bad} of {array.size} values are NaN or infinite; expected numbers")
        if name.endswith((".running_variance", "optimizer/v")) and array.min(initial=0) < 0:
            raise ValueError(f"{shown}: holds {array.min():.6g}; expected squares")


def check_promise(config: Mapping[str, Any], arrays: Arrays) -> None:
    """Raise ValueError if there are too few numbers for a model of this size, before it takes memory."""
    lowest = config["filters"] * 2 ** (config["depth"] - 1)
    least = 3 ** config["dim"] * (config["filters"] * config["in_channels"] + lowest**2)
    least += config["filters"] * config["classes"]
    stored = sum(array.size for array in arrays.values())
    if least > stored:
        raise ValueError(f"{stored} numbers; expected at least {least}")
