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
from tinyunet.data.brain import box_of, widened
from tinyunet.data.resample import resample_probabilities
from tinyunet.unet import UNet

#: From a batch of patches, (MB, D, H, W, C), to the probabilities of each class, (MB, D, H, W, classes).
Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_MARGIN = 8  # voxels around the brain that the network sees, too
LARGEST_PATCH = 128  # side of a patch at most: a tensor of 16 channels of such a patch takes 134 MB


def predictor(
    model: UNet, eager: bool = False, accuracy: str = "fast", deterministic: bool = False
) -> Predict:
    """Return a function that runs a model on patches: eager, or compiled for each size that comes.

    The model may be trained meanwhile: predictions use its present parameters. ``accuracy`` and
    ``deterministic`` are those of :func:`tinyunet.compile`.
    """
    options = Options(NAMES, accuracy, deterministic)
    predict: Predict = partial(_eager, model) if eager else Inference(model, options)
    return predict if model.config["dim"] == 3 else partial(_slice_by_slice, predict)


def _slice_by_slice(predict: Predict, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run a model of two dimensions on the axial slices of patches (MB, D, H, W, C): slices of constant W."""
    MB, D, H, W, C = images.shape
    slices = np.ascontiguousarray(np.moveaxis(images, 3, 1)).reshape(MB * W, D, H, C)
    return np.moveaxis(predict(slices).reshape(MB, W, D, H, -1), 1, 3)


def _eager(model: UNet, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run in inference mode, with the running statistics of batch norm; then restore the mode."""
    with one_at_a_time, model.mode(training=False), no_grad():
        return model(images).data


def patch_for(depth: int, shape: Sequence[int], dim: int = 3) -> tuple[int, int, int]:
    """Choose the patch for a volume, shape=(D, H, W), and a U-Net with ``depth`` levels.

    A network of convolutions takes any size, and a large patch has little border: the patch is the whole
    volume, up to 128 voxels an axis, rounded up to a multiple of the factor that pooling divides by. In two
    dimensions it has all of the slices.
    """
    step = 2 ** (depth - 1)
    most = max(step, LARGEST_PATCH // step * step)
    d, h, w = (min(-(-size // step) * step, most) for size in shape)
    return d, h, w if dim == 3 else shape[2]


def count_patches(depth: int, shape: Sequence[int], overlap: float = 0.5, dim: int = 3) -> int:
    """Return how many patches :func:`segment` takes for a volume, shape=(D, H, W)."""
    return len(_corners(shape, patch_for(depth, shape, dim), overlap))


def predict_volume(
    model: UNet,
    image: NDArray[np.float32],
    patch_size: Sequence[int],
    overlap: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
    predict: Predict | None = None,
    mirror: bool = False,
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
    mirror : bool
        Average over all eight reflections of each patch, which takes eight times as long.
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
    flips = [axes for n in range(4 if mirror else 1) for axes in itertools.combinations((1, 2, 3), n)]
    share = weights / np.float32(len(flips))
    total = np.zeros((*padded.shape[:3], int(model.config["classes"])), np.float32)
    norm = np.zeros((*padded.shape[:3], 1), np.float32)
    corners = _corners(shape, patch_size, overlap)
    predict = predict or predictor(model, eager=True)
    for done, corner in enumerate(corners, start=1):
        here = tuple(slice(c, c + p) for c, p in zip(corner, patch_size, strict=True))
        for axes in flips:
            patch = np.ascontiguousarray(np.flip(padded[here][None], axes))
            total[here] += np.flip(predict(patch), axes)[0] * share
        norm[here] += weights
        if progress is not None:
            progress(done, len(corners))
    total /= norm
    d, h, w = shape
    return np.ascontiguousarray(total[:d, :h, :w])


def predict_image(
    model: UNet,
    image: NDArray[np.float32],
    overlap: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
    predict: Predict | None = None,
    shape: Sequence[int] | None = None,
    mirror: bool = False,
) -> NDArray[np.float32]:
    """Return the probability of each class for each voxel of an image that was normalised.

    The network sees the box that holds the brain: around it all channels are 0, and outside of the box the
    class is background. If the image was resampled, ``shape`` is that of its own grid, on which probabilities
    are wanted. Other parameters as :func:`predict_volume`; UserError for NaN or infinite probabilities.
    """
    depth = int(model.config["depth"])
    box = _brain_box(image, 2 ** (depth - 1))
    inside = image[box]
    patch_size = patch_for(depth, inside.shape[:3], model.config["dim"])
    found = predict_volume(model, inside, patch_size, overlap, progress, predict, mirror)
    bad = found.size - np.count_nonzero(np.isfinite(found))
    if bad:
        expected = "expected a model and an image of usual size"
        raise UserError(f"{bad} probabilities are NaN or infinite; {expected}")
    if inside.shape != image.shape:
        probabilities = np.zeros((*image.shape[:3], found.shape[3]), np.float32)
        if found.shape[3] > 1:
            probabilities[..., 0] = 1.0
        probabilities[box] = found
        found = probabilities
    if shape is not None and tuple(shape) != image.shape[:3]:
        found = resample_probabilities(found, shape)
    return found


def _brain_box(image: NDArray[np.float32], step: int) -> tuple[slice, ...]:
    """Return a box that holds all voxels that are not 0 of an image, shape=(D, H, W, C), and a margin.

    It begins at a multiple of ``step``, so that pooling sees the same voxels together as in the whole image.
    """
    brain: NDArray[np.bool_] = np.asarray(image.any(axis=-1))
    box = box_of(brain)
    if box[0].stop == 0:
        return (slice(None),) * 3
    box = widened(box, _MARGIN, image.shape[:3])
    return tuple(slice(side.start // step * step, side.stop) for side in box)


def segment(
    model: UNet,
    image: NDArray[np.float32],
    overlap: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
    predict: Predict | None = None,
    shape: Sequence[int] | None = None,
) -> NDArray[np.uint8]:
    """Return the most probable class of each voxel, shape=(D, H, W), uint8; parameters as `predict_image`."""
    return most_probable(predict_image(model, image, overlap, progress, predict, shape))


def most_probable(probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the most probable class of each voxel, shape=(D, H, W), uint8.

    For a model of one class, a voxel is 1 where its probability is above a half. A model of more than 256
    classes raises ValueError.
    """
    classes = probabilities.shape[3]
    if classes > 256:
        raise ValueError(f"labels are uint8: of 256 classes at most, not {classes}")
    if classes == 1:
        return (probabilities[..., 0] > 0.5).astype(np.uint8)
    labels = np.empty(probabilities.shape[:3], np.uint8)
    for plane, of_plane in zip(probabilities, labels, strict=True):  # argmax makes integers of 8 bytes
        of_plane[:] = plane.argmax(axis=-1)
    return labels


def average(predicts: Sequence[Predict]) -> Predict:
    """Return a function that runs several models, and averages their probabilities."""
    if len(predicts) == 1:
        return predicts[0]

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        total = predicts[0](images)
        for predict in predicts[1:]:
            total = total + predict(images)
        return total / np.float32(len(predicts))

    return run


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
