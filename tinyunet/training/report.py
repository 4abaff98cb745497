"""What a training says in words."""

from kernels.base import machine
from tinyunet.common.terminal import count, printable
from tinyunet.data.conventions import read_as
from tinyunet.segmentation.scores import Scores
from tinyunet.training.loop import EpochResult
from tinyunet.training.settings import Settings
from tinyunet.training.start import Data
from tinyunet.unet import UNet


def plan(settings: Settings, data: Data, model: UNet, ranks: int) -> str:
    """Return a few lines: what is going to be done, on what, with what.

    Parameters
    ----------
    settings : Settings
    data : Data
    model : UNet
    ranks : int
    """
    parameters = sum(parameter.data.size for parameter in model.parameters())
    patch = " x ".join(map(str, settings.patch_size))
    return "\n".join(
        [
            printable(f"data     {data.dataset.path}"),
            f"         {printable(', '.join(data.dataset.modalities))}; {len(data.train)} cases to train on, "
            f"{len(data.validation)} to validate on, {len(data.test)} to test on",
            printable(f"         {read_as(*data.dataset.meaning)}"),
            f"model    U-Net of {count(settings.depth, 'level')} from "
            f"{count(settings.filters, 'filter')} on, {parameters:,} parameters",
            f"steps    {count(settings.epochs, 'epoch')}, "
            f"{count(settings.batch, 'patch', 'patches')} of {patch} voxels a step",
            f"ranks    {count(ranks, 'rank')} of {count(machine.threads(), 'thread')}",
        ]
    )


def epoch_heads(scores: Scores) -> str:
    """Return the heads of the columns that :func:`epoch_row` fills."""
    names = map(printable, scores["regions"] or scores["classes"])
    return "epoch   loss   Dice   validation:" + "".join(f"  {name:>{_width(name)}}" for name in names)


def epoch_row(epoch: int, result: EpochResult, scores: Scores, best: bool) -> str:
    """Return what an epoch has come to, in one line."""
    dice = scores["regions"] or scores["classes"]
    columns = "".join(f"  {value:>{_width(name)}.3f}" for name, value in dice.items())
    start = f"{epoch:>5}  {result.loss:5.3f}  {result.dice:5.3f}              "
    return start + columns + ("  best" if best else "")


def _width(name: str) -> int:
    return max(len(printable(name)), 5)
