"""PyTorch: eager, compiled by ``torch.compile``, and for predictions frozen as TorchScript.

Tensors are NCDHW by shape and channels last in memory, which was a fifth faster than NCDHW in memory
too (96^3, one thread: step 4.7 s against 6.0, prediction 1.8 against 2.2). A convolution of one volume
goes to oneDNN only where IC * D * H of its input is above 20,480; the others, which are the deeper
levels of this net, run PyTorch's own im2col (``slow_conv3d``, as its profiler shows). ``torch.compile``
fuses what lies between convolutions.

Frozen and optimized for inference, batch norm is folded into the convolutions, and all of them go to oneDNN
with blocked tensors. One thread at 48^3, ms of the processor's time for a prediction: 321 eager, 312 with
NCDHW in memory, 315 with channels last for weights, too, 304 frozen only, 117 frozen and optimized.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tinyunet.benchmarks import problem as common
from tinyunet.benchmarks.peers import Convolution
from tinyunet.benchmarks.peers import channels_last as to_array
from tinyunet.benchmarks.problem import Problem

VERSION = str(torch.__version__)

_BETAS = 0.9, 0.999
# This project's names of what a layer holds, where PyTorch's are others.
_NAMES = {"weights": "weight", "scale": "weight", "shift": "bias", "running_variance": "running_var"}


def settings(case: str, compiled: bool = False, frozen: bool = False) -> str:
    """Return the settings chosen for speed."""
    if frozen:
        return "torch.jit.freeze, optimize_for_inference"
    return "torch.compile, channels last" if compiled else "channels last"


def use_threads(threads: int) -> None:
    """Set the threads inside an operator."""
    torch.set_num_threads(threads)


def block(in_channels: int, width: int) -> nn.Module:
    """Return twice [convolution, batch norm, ReLU], with this project's names of the layers."""
    # PyTorch's momentum is the share of the new statistics, Keras' that of the old.
    norm = {"eps": common.NORM_EPSILON, "momentum": 1 - common.NORM_MOMENTUM}
    layers: dict[str, nn.Module] = {}
    for i, channels in enumerate((in_channels, width)):
        layers[f"conv{i}"] = nn.Conv3d(channels, width, 3, padding=1)
        layers[f"norm{i}"] = nn.BatchNorm3d(width, **norm)
        layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(OrderedDict(layers))


class UNet(nn.Module):
    """The model, with this project's names of its parts."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        widths = [filters << level for level in range(common.DEPTH)]
        pairs = list(zip([common.CHANNELS, *widths], widths, strict=False))
        self.encoder = nn.ModuleList(block(above, width) for above, width in pairs)
        upwards = pairs[:0:-1]
        self.up = nn.ModuleList(nn.ConvTranspose3d(low, width, 2, 2) for width, low in upwards)
        self.decoder = nn.ModuleList(block(2 * width, width) for width, _ in upwards)
        self.head = nn.Conv3d(filters, common.CLASSES, 1)

    def forward(self, x: Any) -> Any:
        """(MB, CHANNELS, D, H, W) -> probabilities (MB, CLASSES, D, H, W)."""
        skips = []
        for level, layers in enumerate(self.encoder):
            x = layers(nn.functional.max_pool3d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for up, layers in zip(self.up, self.decoder, strict=True):
            x = layers(torch.cat([up(x), skips.pop()], 1))
        return torch.softmax(self.head(x), 1)


def unet(problem: Problem) -> UNet:
    """Build the model and give it the problem's weights, whose layouts are PyTorch's too."""
    model = UNet(problem.filters).to(memory_format=torch.channels_last_3d)
    state = {}
    for name, array in problem.weights.items():
        layer, _, variable = name.rpartition(".")
        state[f"{layer}.{_NAMES.get(variable, variable)}"] = torch.from_numpy(array)
    # Not strict only because batch norm also counts its batches.
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or any(not name.endswith("num_batches_tracked") for name in missing):
        raise RuntimeError(f"weights missing {missing}, unknown {unknown}")
    return model


def soft_dice(probabilities: Any, target: Any) -> Any:
    """Return one minus the mean Dice over images and classes."""
    voxels, smoothing = (2, 3, 4), common.DICE_SMOOTHING
    intersection = (probabilities * target).sum(voxels)
    total = probabilities.sum(voxels) + target.sum(voxels)
    return 1 - ((2 * intersection + smoothing) / (total + smoothing)).mean()


def step(problem: Problem, compiled: bool = False) -> Callable[[], float]:
    """Return a training step."""
    model = unet(problem)
    # Keras adds epsilon before the bias correction, PyTorch after: the same at the first step.
    epsilon = common.ADAM_EPSILON / (1 - _BETAS[1]) ** 0.5
    rates = common.LEARNING_RATE, _BETAS, epsilon
    optimizer = torch.optim.Adam(model.parameters(), *rates, fused=True)

    def loss_of(image: Any, target: Any) -> Any:
        return soft_dice(model(image), target)

    forward = torch.compile(loss_of) if compiled else loss_of
    image, target = _channels_last(problem.image), _channels_last(problem.one_hot())

    def train() -> float:
        optimizer.zero_grad()
        loss = forward(image, target)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return train


def infer(problem: Problem, compiled: bool = False, frozen: bool = False) -> Callable[[], Any]:
    """Return a prediction."""
    model = unet(problem).eval()
    image = _channels_last(problem.image)
    forward = torch.compile(model) if compiled else model
    if frozen:
        script = torch.jit.freeze(torch.jit.trace(model, image))
        forward = torch.jit.optimize_for_inference(script)

    def predict() -> Any:
        with torch.inference_mode():
            return forward(image)

    return predict


def convolution(
    src: NDArray[np.float32], weights: NDArray[np.float32], diff_dst: NDArray[np.float32]
) -> Convolution:
    """Return a single convolution in all directions; stride 1, padding "same"."""
    x, w, dy = _channels_last(src), torch.from_numpy(weights), _channels_last(diff_dst)
    one, pad = [1] * 3, [size // 2 for size in weights.shape[2:]]

    def backward(data: bool) -> Any:
        how = [None, one, pad, one, False, [0] * 3, 1, [data, not data, False]]
        return torch.ops.aten.convolution_backward(dy, x, w, *how)

    return {
        "forward": (lambda: nn.functional.conv3d(x, w, None, one, pad), to_array),
        "backward_data": (lambda: backward(True)[0], to_array),
        "backward_weights": (lambda: backward(False)[1], lambda diff_weights: diff_weights.numpy()),
    }


def _channels_last(array: NDArray[np.float32]) -> Any:
    """NDHWC as it is, called NCDHW."""
    return torch.from_numpy(array).permute(0, 4, 1, 2, 3)
