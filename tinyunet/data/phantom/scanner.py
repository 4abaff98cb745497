"""The scanner: what tissue looks like in FLAIR, T1w, t1gd and T2w.

Contrast, bias field, sharpness, noise and gain are drawn anew for each head. So is what looks like a tumour
and is none: vessels and dura that take up the contrast agent, bright spots of old age and bright surfaces in
FLAIR.

Source: B. Billot et al., "SynthSeg", Medical Image Analysis 86 (2023): contrasts vary more than real ones, so
that a net learns not to rely on them.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tinyunet.data.phantom.anatomy import FLUID, GREY, WHITE, Head, draw_vessels
from tinyunet.data.phantom.bodies import inside
from tinyunet.data.phantom.fields import Array

MODALITIES = ("FLAIR", "T1w", "t1gd", "T2w")
_FLAIR, _T1W, _T1GD, _T2W = range(4)

# Signal of each tissue relative to white matter in T1w; read by eye from BraTS images.
_SIGNAL = np.array(
    [  # FLAIR   T1w  t1gd   T2w
        [0.20, 0.30, 0.30, 1.60],  # fluid
        [0.80, 0.72, 0.74, 0.78],  # grey matter
        [0.62, 1.00, 1.00, 0.52],  # white matter
        [1.15, 0.70, 0.70, 1.05],  # edema
        [0.90, 0.50, 0.52, 1.25],  # core
        [1.05, 0.66, 1.45, 1.00],  # enhancing
    ],
    np.float32,
)
_EDEMA, _CORE, _ENHANCING = range(3, 6)
# Least and largest signal of blood: it flows out of the slice that was excited, and takes up the agent.
_VEIN = np.array([[0.25, 0.45, 1.1, 0.15], [0.7, 0.9, 2.2, 0.8]])
_ARTERY = np.array([[0.2, 0.4, 1.2, 0.15], [0.6, 1.3, 2.2, 0.5]])


def scan(head: Head, shares: Array) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Return the four images of a skull-stripped head, shape=(P, 4), and which voxels it has, shape=(P,).

    ``shares``, shape=(6, P), are of fluid, grey, white, edema, core and enhancing tumour. In the voxels that
    the head has, the image is 1 or more, in the others 0.
    """
    generator = head.fields.generator
    signals = _contrasts(generator).T @ shares
    healthy = 1 - shares[_EDEMA:].sum(0)
    _take_up_agent(signals[_T1GD], head, shares[FLUID])
    _grow_old(signals, head, shares)
    signals *= 1 + 0.028 * head.clouds(14) + 0.07 * head.clouds(8) * (1 - healthy)
    there = (head.depth > 0) & (head.depth > generator.uniform(0, 1.2) + 0.8 * head.clouds(30))
    visible = np.clip(1.5 * shares.sum(0), 0, 1)
    for distance, blood, stays in zip(draw_vessels(head), (_VEIN, _ARTERY), (0.6, 0), strict=True):
        part = inside(distance, 1.3 * head.fields.grid.spacing) * healthy
        signals += part * (generator.uniform(*blood)[:, None] - signals).astype(np.float32)
        visible = np.maximum(visible, part)
        if generator.random() < stays:
            there |= part > 0.5
    there |= (healthy < 0.5) & (head.depth > 0)
    image = np.stack([_receive(head, signal * visible) for signal in signals], axis=1)
    return image * there[:, None], there


def _contrasts(generator: np.random.Generator) -> Array:
    """Draw the signal of each tissue in each sequence, shape=(6, 4)."""
    signal = _SIGNAL * np.exp(generator.normal(0, 0.1, _SIGNAL.shape)).astype(np.float32)
    signal[WHITE, _T1W] = 1
    # The more water a tumour has taken up, the more it differs from the tissue around it.
    tissue, water = (signal[GREY] + signal[WHITE]) / 2, generator.uniform(0.55, 1.25)
    for part, amount in ((_EDEMA, water), (_CORE, (1 + water) / 2), (_ENHANCING, 1.0)):
        differing = amount * np.exp(generator.normal(0, 0.1, 4))
        signal[part] = tissue + (signal[part] - tissue) * differing.astype(np.float32)
    signal[_EDEMA:, [_FLAIR, _T2W]] *= np.exp(generator.normal(0, 0.08, 2)).astype(np.float32)
    signal[_CORE, _FLAIR] *= np.exp(generator.normal(0.1, 0.17))  # from a cyst to tissue full of cells
    # The agent hardly changes what does not enhance.
    signal[:_ENHANCING, _T1GD] = signal[:_ENHANCING, _T1W] * (1 + generator.normal(0.01, 0.02, _ENHANCING))
    return signal


def _take_up_agent(signal: Array, head: Head, fluid: Array) -> None:
    """Brighten small vessels in the fluid, and parts of the dura at the surface, in place."""
    generator = head.fields.generator
    vessels = np.clip(head.clouds(8) - 1, 0, 1)
    dura = np.clip(head.clouds(25) - generator.uniform(0.2, 1.5), 0, 1) * _surface(head)
    signal += generator.uniform(0.3, 1.2) * vessels * fluid + generator.uniform(0, 1.2) * dura


def _grow_old(signals: Array, head: Head, shares: Array) -> None:
    """Brighten spots, the rims of the ventricles and surfaces, in FLAIR and T2w, in place."""
    generator = head.fields.generator
    deep = head.depth > 10
    ventricles = head.volume(((shares[FLUID] > 0.6) & (head.depth > 18)).astype(np.float32))
    caps = np.clip(2 * ndimage.gaussian_filter(ventricles, 1.2).reshape(-1)[head.voxels], 0, 1)
    spots = np.clip(head.clouds(9) - generator.uniform(1.6, 3), 0, 0.5) * deep
    surfaces = _surface(head) * np.clip(head.clouds(20), 0, 1.5)
    signals[_FLAIR] += generator.uniform(0, 0.35) * surfaces
    signals[_FLAIR] += (generator.uniform(0, 0.5) * caps + spots) * shares[WHITE]
    signals[_T2W] += 0.7 * spots * shares[WHITE]


def _surface(head: Head) -> Array:
    """Return 1 at the surface of the brain, falling to 0 at a depth of 5 mm and outside; shape=(P,)."""
    return np.where(head.depth > 0, np.clip(1 - head.depth / 5, 0, 1), 0).astype(np.float32)


def _receive(head: Head, signal: Array) -> NDArray[np.int16]:
    """Return the image of one sequence, shape=(P,): blurred, with the coil's bias field, noise and gain."""
    generator, grid = head.fields.generator, head.fields.grid
    blurred = grid.smooth(head.volume(signal), generator.uniform(0.05, 0.35))[head.voxels]
    bias = np.exp(0.14 * generator.uniform(0.2, 1) * head.clouds(110))
    # The magnitude of a complex signal with noise in both parts: Rician.
    noise = generator.standard_normal((2, len(signal)), np.float32) * np.float32(
        generator.uniform(0.015, 0.045)
    )
    magnitude = np.hypot(blurred * bias + noise[0], noise[1])
    return np.maximum(np.rint(generator.uniform(250, 900) * magnitude), 1).astype(np.int16)
