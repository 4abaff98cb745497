"""What has to be there before the first step: data, and compiled kernels."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from tinyunet.data import phantom
from tinyunet.data.decathlon import Dataset, read_dataset
from tinyunet.inference import segment
from tinyunet.losses import dice_cross_entropy
from tinyunet.optim import Adam
from tinyunet.parallel.communicator import Communicator
from tinyunet.training.progress import Progress
from tinyunet.unet import UNet

# The built-in data set: 27 heads to train on, 2 to validate on, 3 to test on.
PHANTOMS = Path("data")
PHANTOM_CASES, PHANTOM_SHAPE, PHANTOM_SEED = 32, (64, 72, 56), 0


def find_dataset(data_path: str | None, communicator: Communicator, progress: Progress) -> Dataset:
    """Read what cases a folder has, or make the built-in phantoms if no folder is named.

    Parameters
    ----------
    data_path : str or None
        Folder of a Decathlon task or of BraTS cases; None for the phantoms in ``data/``, which
        rank 0 makes if they are not there.
    communicator : Communicator
    progress : Progress

    Raises
    ------
    AgreedError
        On every rank, if the folder cannot be read or made on any.
    """
    made_of = (PHANTOM_CASES, PHANTOM_SHAPE, PHANTOM_SEED)
    path = Path(data_path or PHANTOMS / phantom.folder_name(*made_of))
    with communicator.together():
        if data_path is None and communicator.rank == 0:
            there = path.exists()
            with nullcontext() if there else progress.task(f"making {PHANTOM_CASES} phantoms"):
                phantom.make_dataset(path, *made_of)
    with communicator.together():
        return read_dataset(path)


def compile_kernels(
    config: Mapping[str, Any],
    patch_size: tuple[int, int, int],
    communicator: Communicator,
    progress: Progress,
) -> None:
    """Run one training step and one inference on rank 0, with a model that is thrown away.

    The first start on a machine compiles the kernels and keeps them on disk; from then on they are
    loaded. Were all ranks to compile at once, each would do the whole work, on shared cores; so
    they wait, and load what they need in their first step.

    Parameters
    ----------
    config : mapping
        Arguments of the model.
    patch_size : (D, H, W)
        Of the training: kernels are chosen by shape.
    communicator : Communicator
    progress : Progress
        Says that a person has to wait, and for how long it was.
    """
    task = "loading kernels (the first start compiles them, which takes about a minute)"
    with progress.task(task), communicator.together():
        if communicator.rank == 0:
            _step(config, patch_size)


def _step(config: Mapping[str, Any], patch_size: tuple[int, int, int]) -> None:
    model = UNet(**config)
    optimizer = Adam(model.parameters())
    image = np.zeros((*patch_size, model.config["in_channels"]), np.float32)
    labels = np.zeros((1, *patch_size), np.uint8)
    dice_cross_entropy(model.logits(image[None]), labels, from_logits=True).backward()
    optimizer.step()
    segment(model, image)
