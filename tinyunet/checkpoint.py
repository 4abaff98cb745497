"""A model and where its training stood, in one ``.npz`` file.

The file is an ordinary archive of NumPy arrays, without pickled objects: reading one from a
stranger runs none of their code. Its members:

    header                JSON: format, the model's configuration and random generators, the order
                          of the optimizer's parameters, the state of the training
    model/NAME            parameters and buffers, as ``Module.state_dict`` names them
    optimizer/NAME        what ``state_dict`` of the optimizer holds
    training/NAME         further arrays of the training

The file ends in the SHA-256 of all that comes before, as the archive's comment. So a file that is
cut off, or in which a byte has changed, is refused before anything of it is believed.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyunet.errors import UserError, one_line
from tinyunet.files import atomic
from tinyunet.nn import Module
from tinyunet.optim import Optimizer
from tinyunet.unet import UNet

FORMAT = "tinyunet checkpoint 2"
# Hexadecimal digits of the SHA-256 that a file ends in.
_SEAL = 64

Arrays = dict[str, NDArray[Any]]


class CheckpointError(UserError):
    """A file is no checkpoint that can be used; the message is one line and names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes
    ----------
    path : Path
        Where it came from.
    config : dict
        The arguments that :class:`tinyunet.unet.UNet` was made with.
    model : dict of ndarray
        Its ``state_dict()``.
    optimizer : dict of ndarray
        The optimizer's ``state_dict()``.
    order : list of str
        Names of the parameters, in the order in which the optimizer held them.
    random : dict
        The model's ``random_state()``.
    state : dict
        What the training has noted beside it: epoch, sequences, labels, ...
    arrays : dict of ndarray
        What it has noted of numbers.
    """

    path: Path
    config: dict[str, Any]
    model: Arrays
    optimizer: Arrays
    order: list[str]
    random: dict[str, Any]
    state: dict[str, Any]
    arrays: Arrays

    def make_model(self) -> UNet:
        """Return a model of this configuration, as it was saved.

        Raises
        ------
        CheckpointError
            If they do not belong to such a model.
        """
        try:
            model = UNet(**self.config)
            if any(array.dtype == np.float64 for array in self.model.values()):
                model.astype(np.float64)
            model.load_state_dict(self.model)
            model.load_random_state(self.random)
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path}: holds another model than its configuration says "
                f"({one_line(str(error))})"
            ) from error
        return model

    def load_optimizer(self, model: Module, optimizer: Optimizer) -> None:
        """Give an optimizer of the model's parameters the state that was saved.

        It may hold the parameters in another order than the one that was saved.

        Raises
        ------
        CheckpointError
            If the state is that of another optimizer, or of other parameters.
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
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path}: its optimizer is of another kind or another model "
                f"({one_line(str(error))})"
            ) from error


def save(
    path: Path | str,
    model: UNet,
    optimizer: Optimizer,
    state: dict[str, Any],
    arrays: Mapping[str, NDArray[Any]] | None = None,
    previous: Path | None = None,
) -> None:
    """Write a checkpoint; a reader finds the old one or the whole new one.

    Parameters
    ----------
    path : Path or str
        Ends in ``.npz``; its folder exists.
    model : UNet
        Its configuration, parameters and buffers are written.
    optimizer : Adam or SGD
        Its state is written.
    state : dict
        What JSON can hold; comes back as :attr:`Checkpoint.state`.
    arrays : mapping of ndarray, optional
        Comes back as :attr:`Checkpoint.arrays`.
    previous : Path, optional
        Name beside it that the checkpoint replaced gets.

    Raises
    ------
    OSError
        If the file cannot be written; what was there before still is.
    ValueError
        If the optimizer holds a parameter that is not the model's, or an array holds objects, which
        :func:`load` would refuse.
    """
    header = {
        "format": FORMAT,
        "config": model.config,
        "random": model.random_state(),
        "order": _order(model, optimizer),
        "state": state,
    }
    members: dict[str, Any] = {"header": np.array(json.dumps(header))}
    groups = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "training": arrays or {},
    }
    for group, named in groups.items():
        members |= {f"{group}/{name}": np.asarray(array) for name, array in named.items()}
    for name, array in members.items():
        if array.dtype.hasobject:
            raise ValueError(f"{name}: an array of objects, which a checkpoint does not hold")
    with atomic(path, previous) as file:
        np.savez(file, **members)
        _seal(file)


def seal(path: Path) -> None:
    """Append to an archive the SHA-256 of all its bytes, as its comment."""
    with path.open("r+b") as file:
        _seal(file)


def _seal(file: io.BufferedRandom) -> None:
    # An archive ends in the length of its comment, which is 0 so far.
    file.seek(-2, io.SEEK_END)
    file.write(_SEAL.to_bytes(2, "little"))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, io.SEEK_END)
    file.write(digest.encode())


def _order(model: Module, optimizer: Optimizer) -> list[str]:
    """Return the names of an optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, parameter in enumerate(optimizer.parameters):
        if id(parameter) not in names:
            raise ValueError(
                f"optimizer: its parameter {index} of shape {parameter.shape} is not the model's"
            )
    return [names[id(parameter)] for parameter in optimizer.parameters]


def load(path: Path | str) -> Checkpoint:
    """Read a checkpoint whole.

    Parameters
    ----------
    path : Path or str
        A file that :func:`save` wrote.

    Raises
    ------
    CheckpointError
        If there is no such file, it is cut off or changed anywhere, or it is not a checkpoint of
        this program.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: {one_line(error.strerror or str(error))}; expected a checkpoint (.npz)"
        ) from error
    if hashlib.sha256(content[:-_SEAL]).hexdigest().encode() != content[-_SEAL:]:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint (its checksum is wrong)")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            members = {name: archive[name] for name in archive.files}
    except ValueError as error:  # whole, but with pickled objects
        raise CheckpointError(f"{path}: not a checkpoint ({one_line(str(error))})") from error
    header = _header(path, members)
    return Checkpoint(
        path,
        header["config"],
        _under("model/", members),
        _under("optimizer/", members),
        header["order"],
        header["random"],
        header["state"],
        _under("training/", members),
    )


def _header(path: Path, members: Arrays) -> dict[str, Any]:
    """Return the header, after checking that it is one of this format."""
    try:
        header = json.loads(str(members["header"]))
        found = header["format"]
        if found != FORMAT:
            raise CheckpointError(f'{path}: format "{found}"; this program reads "{FORMAT}"')
        return {name: header[name] for name in ("config", "order", "random", "state")}
    except (KeyError, TypeError, json.JSONDecodeError):
        raise CheckpointError(
            f"{path}: an archive of arrays, but not a checkpoint of tinyunet"
        ) from None


def _under(prefix: str, members: Arrays) -> Arrays:
    return {
        name.removeprefix(prefix): array
        for name, array in members.items()
        if name.startswith(prefix)
    }
