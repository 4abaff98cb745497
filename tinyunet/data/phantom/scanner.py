"""The scanner: what tissue looks like in FLAIR, T1w, t1gd and T2w, with bias field and noise."""

import numpy as np
from numpy.typing import NDArray

from tinyunet.data.phantom.anatomy import FLUID, Head
from tinyunet.data.phantom.bodies import ellipsoid, inside, mirror
from tinyunet.data.phantom.fields import Array

MODALITIES = ("FLAIR", "T1w", "t1gd", "T2w")

# Signal of each tissue relative to white matter in T1w; read by eye from BraTS images.
_SIGNAL = np.array(
    [  # FLAIR   T1w  t1gd   T2w
        [0.60, 1.00, 1.00, 0.52],  # white matter
        [0.74, 0.74, 0.76, 0.70],  # grey matter
        [0.70, 0.79, 0.81, 0.60],  # deep grey
        [0.20, 0.30, 0.30, 1.35],  # fluid
        [1.12, 0.68, 0.68, 1.00],  # edema
        [0.72, 0.42, 0.42, 1.20],  # necrosis
        [0.95, 0.62, 1.50, 0.85],  # enhancing rim
    ],
    np.float32,
)
_TUMOUR, _GADOLINIUM = slice(5, 7), 2


def scan(head: Head, shares: Array, brain: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Take the four images of a skull-stripped head, shape=grid.shape + (4,), int16: 0 outside the brain.

    ``shares``, shape=(7, P), are of white, grey, deep grey, fluid, edema, necrosis and enhancing rim.
    ``brain``, shape=(P,), says which of the head's voxels are kept: in these the image is 1 or more.
    """
    fields, voxels = head.fields, head.voxels
    generator, grid = fields.generator, fields.grid
    contrast = _SIGNAL * np.exp(generator.normal(0, 0.05, _SIGNAL.shape)).astype(np.float32)
    signals = contrast.T @ shares
    # Vessels and the choroid plexus take up the contrast agent as well.
    vessels = np.clip(fields.clouds(8)[voxels] - 1, 0, 1)
    plexus = inside(ellipsoid(mirror(head.points), (22, -42, 9), (2.5, 6, 4)), grid.spacing)
    signals[_GADOLINIUM] += (vessels + 0.6 * plexus) * shares[FLUID]
    texture = 0.025 * fields.clouds(14)[voxels]
    texture += 0.06 * fields.clouds(9)[voxels] * shares[_TUMOUR].sum(0)
    signals *= 1 + texture

    image = np.zeros((grid.positions.shape[1], len(MODALITIES)), np.int16)
    everywhere = np.zeros(len(image), np.float32)
    for channel, signal in enumerate(signals):
        everywhere[voxels] = signal
        blurred = grid.smooth(everywhere, 0.2)[voxels]
        bias = np.exp(0.07 * fields.clouds(110)[voxels])
        # The magnitude of a complex signal with noise in both parts: Rician.
        noise = generator.standard_normal((2, len(voxels)), np.float32)
        noise *= generator.uniform(0.02, 0.04)
        magnitude = np.hypot(blurred * bias + noise[0], noise[1])
        gain = generator.uniform(250, 900)
        image[voxels, channel] = np.maximum(np.rint(gain * magnitude), 1) * brain
    return image.reshape(*grid.shape, len(MODALITIES))
