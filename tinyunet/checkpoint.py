"""A model and where its training stood, in one ``.npz`` file.

The file is an ordinary archive of NumPy arrays, without pickled objects: reading one from a
stranger runs none of their code. Its members:

    header                JSON: format, the model's configuration, the state of the training
    model/NAME            parameters and buffers, as ``Module.state_dict`` names them
    optimizer/NAME        what ``state_dict`` of the optimizer holds
"""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tinyunet.errors import UserError, one_line
from tinyunet.files import atomic
from tinyunet.unet import UNet

FORMAT = "tinyunet checkpoint 1"

Arrays = dict[str, NDArray[Any]]


class CheckpointError(UserError):
    """A file is no checkpoint that can be used; the message is one line and names the file."""


class HasState(Protocol):
    """An optimizer, as far as a checkpoint is concerned."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a further step depends on."""


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
    state : dict
        What the training has noted beside it: epoch, sequences, labels, ...
    """

    path: Path
    config: dict[str, Any]
    model: Arrays
    optimizer: Arrays
    state: dict[str, Any]

    def make_model(self) -> UNet:
        """Return a model of this configuration that holds these parameters and buffers.

        Raises
        ------
        CheckpointError
            If they do not belong to such a model.
        """
        try:
            model = UNet(**self.config)
            model.load_state_dict(self.model)
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path}: holds another model than its configuration says "
                f"({one_line(str(error))})"
            ) from error
        return model


def save(path: Path | str, model: UNet, optimizer: HasState, state: dict[str, Any]) -> None:
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

    Raises
    ------
    OSError
        If the file cannot be written; what was there before still is.
    """
    header = json.dumps({"format": FORMAT, "config": model.config, "state": state})
    members: dict[str, Any] = {"header": np.array(header)}
    members |= {f"model/{name}": array for name, array in model.state_dict().items()}
    members |= {f"optimizer/{k}": np.asarray(v) for k, v in optimizer.state_dict().items()}
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **members)


def load(path: Path | str) -> Checkpoint:
    """Read a checkpoint whole.

    Parameters
    ----------
    path : Path or str
        A file that :func:`save` wrote.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged anywhere (each array has a checksum), or it is not
        a checkpoint of this program.
    """
    path = Path(path)
    try:
        # Opened first: of a file that is missing or closed to us the system says so best.
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise CheckpointError(f"{path}: damaged, or not a checkpoint (.npz)")
        with np.load(path, allow_pickle=False) as archive:
            members = {name: archive[name] for name in archive.files}
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: {one_line(error.strerror or str(error))}; expected a checkpoint (.npz)"
        ) from error
    except (EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint ({one_line(str(error))})"
        ) from error
    header = _header(path, members)
    return Checkpoint(
        path,
        header["config"],
        _under("model/", members),
        _under("optimizer/", members),
        header["state"],
    )


def _header(path: Path, members: Arrays) -> dict[str, Any]:
    """Return the header, after checking that it is one of this format."""
    try:
        header = json.loads(str(members["header"]))
        found = header["format"]
        usable = isinstance(header["config"], dict) and isinstance(header["state"], dict)
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(
            f"{path}: an archive of arrays, but not a checkpoint of tinyunet"
        ) from None
    if found != FORMAT or not usable:
        raise CheckpointError(f'{path}: format "{found}"; this program reads "{FORMAT}"')
    return dict(header)


def _under(prefix: str, members: Arrays) -> Arrays:
    return {
        name.removeprefix(prefix): array
        for name, array in members.items()
        if name.startswith(prefix)
    }
