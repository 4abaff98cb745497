"""Whole volumes of any size through a network that takes patches.

Overlapping patches cover the volume. Where several patches meet, their probabilities are averaged with
weights that fall from the middle of a patch to its border, where the network sees least around a voxel.

Source: Isensee et al., "nnU-Net" (2021): Gaussian weights, deviation of an eighth of the patch.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tinyunet.autograd import no_grad, real_numbers
from tinyunet.common.errors import UserError
from tinyunet.common.turns import one_at_a_time
from tinyunet.compiler import Inference
from tinyunet.compiler.ir import Options
from tinyunet.compiler.passes import NAMES
from tinyunet.data.resample import resample_probabilities
from tinyunet.unet import UNet

#: From a batch of patches, (MB, D, H, W, C), to the probabilities of each class, (MB, D, H, W, classes).
Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]

LARGEST_PATCH = 128  # side of a patch at most: a tensor of 16 channels of such a patch takes 134 MB


def predictor(
    model: UNet, eager: bool = False, accuracy: str = "fast", deterministic: bool = False
) -> Predict:
    """Return a function that runs a model on patches: eager, or compiled for each size that comes.

    The model may be trained meanwhile: predictions use its present parameters. ``accuracy`` and
    ``deterministic`` are those of :func:`tinyunet.compile`.
    """
    if eager:
        return partial(_eager, model)
    return Inference(model, Options(NAMES, accuracy, deterministic))


def _eager(model: UNet, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run in inference mode, with the running statistics of batch norm; then restore the mode."""
    with one_at_a_time, model.mode(training=False), no_grad():
        return model(images).data


def patch_for(depth: int, shape: Sequence[int]) -> tuple[int, int, int]:
    """Choose the patch for a volume, shape=(D, H, W), and a U-Net with ``depth`` levels.

    A network of convolutions takes any size, and a large patch has little border: the patch is the whole
    volume, up to 128 voxels an axis, rounded up to a multiple of the factor that pooling divides by.
    """
    step = 2 ** (depth - 1)
    most = max(step, LARGEST_PATCH // step * step)
    d, h, w = (min(-(-size // step) * step, most) for size in shape)
    return d, h, w


def count_patches(depth: int, shape: Sequence[int], overlap: float = 0.5) -> int:
    """Return how many patches :func:`segment` takes for a volume, shape=(D, H, W)."""
    return len(_corners(shape, patch_for(depth, shape), overlap))


def predict_volume(
    model: UNet,
    image: NDArray[np.float32],
    patch_size: Sequence[int],
    overlap: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
    predict: Predict | None = None,
) -> NDArray[np.float32]:
    """Return the probability of each class for each voxel, shape=(D, H, W, classes), float32.

    Parameters
    ----------
    model : UNet
    image : ndarray, shape=(D, H, W, C), float32
        Any size. Where it is smaller than the patch, zeros (the value around a brain) are appended.
    patch_size : (D, H, W)
    overlap : float
        Least share of a patch that the next patch along an axis covers again, 0 <= overlap < 1. ValueError if
        it, ``patch_size`` or the image's shape is out of range.
    progress : callable, optional
        Called after each patch with how many are done and how many there are.
    predict : callable, optional
        Runs the model: from :func:`predictor`. Without it, the eager model runs in inference mode.
    """
    channels = int(model.config["in_channels"])
    image = real_numbers("image", image)
    if image.ndim != 4 or 0 in image.shape or image.shape[3] != channels:
        taken = f"(D, H, W, {channels}), none of them 0"
        raise ValueError(f"image has shape {image.shape}; the model takes {taken}")
    if len(patch_size) != 3 or min(patch_size) < 1:
        raise ValueError(f"patch_size is {tuple(patch_size)}; it takes three sizes of at least 1")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; it takes a share of at least 0 and below 1")

    shape = image.shape[:3]
    missing = np.maximum(np.subtract(patch_size, shape), 0)
    padded = np.pad(image, [*((0, m) for m in missing), (0, 0)]) if any(missing) else image
    weights = gaussian_weights(patch_size)[..., None]
    total = np.zeros((*padded.shape[:3], int(model.config["classes"])), np.float32)
    norm = np.zeros((*padded.shape[:3], 1), np.float32)
    corners = _corners(shape, patch_size, overlap)
    predict = predict or predictor(model, eager=True)
    for done, corner in enumerate(corners, start=1):
        here = tuple(slice(c, c + p) for c, p in zip(corner, patch_size, strict=True))
        patch = np.ascontiguousarray(padded[here])
        total[here] += predict(patch[None])[0] * weights
        norm[here] += weights
        if progress is not None:
            progress(done, len(corners))
    total /= norm
    d, h, w = shape
    return np.ascontiguousarray(total[:d, :h, :w])


def segment(
    model: UNet,
    image: NDArray[np.float32],
    overlap: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
    predict: Predict | None = None,
    shape: Sequence[int] | None = None,
) -> NDArray[np.uint8]:
    """Return the most probable class of each voxel, shape=(D, H, W), uint8; parameters as `predict_volume`.

    If the image was resampled, ``shape`` is that of its own grid, on which classes are wanted.
    For a model of one class, a voxel is 1 where its probability is above a half. A model of more than 256
    classes raises ValueError; NaN or infinite probabilities raise UserError, because no class is the largest.
    """
    if int(model.config["classes"]) > 256:
        raise ValueError(f"labels are uint8: of 256 classes at most, not {model.config['classes']}")
    patch_size = patch_for(int(model.config["depth"]), image.shape[:3])
    probabilities = predict_volume(model, image, patch_size, overlap, progress, predict)
    bad = probabilities.size - np.count_nonzero(np.isfinite(probabilities))
    if bad:
        expected = "expected a model and an image of usual size"
        raise UserError(f"{bad} probabilities are NaN or infinite; {expected}")
    if shape is not None and tuple(shape) != image.shape[:3]:
        probabilities = resample_probabilities(probabilities, shape)
    if probabilities.shape[3] == 1:
        return (probabilities[..., 0] > 0.5).astype(np.uint8)
    return probabilities.argmax(axis=3).astype(np.uint8)


def _corners(shape: Sequence[int], patch_size: Sequence[int], overlap: float) -> list[tuple[int, ...]]:
    """Return where patches begin in a volume, which is padded where a patch is larger."""
    sizes = zip(np.maximum(shape, patch_size).tolist(), patch_size, strict=True)
    return list(itertools.product(*(patch_starts(size, patch, overlap) for size, patch in sizes)))


def patch_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Return where patches, patch <= size, begin along one axis: they cover it evenly and overlap enough."""
    step = max(1, int(patch * (1 - overlap) + 1e-9))  # 10 * (1 - 0.8) is a little below 2
    count = -(-(size - patch) // step) + 1
    return [round(i * (size - patch) / max(1, count - 1)) for i in range(count)]


def gaussian_weights(patch_size: Sequence[int]) -> NDArray[np.float32]:
    """Return the weight of each voxel of a patch: 1 in the middle, about e^-24 in the farthest corners."""
    weights = np.ones((), np.float32)
    for size in patch_size:
        distance = (np.arange(size) - (size - 1) / 2) / (size / 8)
        weights = weights[..., None] * np.exp(-0.5 * distance**2).astype(np.float32)
    return weights / weights.max()
