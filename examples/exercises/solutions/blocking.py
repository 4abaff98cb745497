"""nCdhw16c: channels in blocks of 16, so that a vector holds 16 channels of one voxel.

Element (d, h, w, c) of the plain volume is element (c // 16, d, h, w, c % 16) of the blocked one. Where the
channels are no multiple of 16, the last block ends in zeros.
"""

import numpy as np


def to_blocked(src):
    """(D, H, W, C) -> (ceil(C / 16), D, H, W, 16)."""
    # <answer>
    D, H, W, C = src.shape
    blocks = -(-C // 16)
    dst = np.zeros((blocks, D, H, W, 16), src.dtype)
    for block in range(blocks):
        part = src[..., 16 * block : 16 * block + 16]
        dst[block, ..., : part.shape[-1]] = part
    return dst
    # </answer>


def from_blocked(blocked, C):
    """(ceil(C / 16), D, H, W, 16) -> (D, H, W, C)."""
    # <answer>
    parts = [block for block in blocked]
    return np.ascontiguousarray(np.concatenate(parts, axis=-1)[..., :C])
    # </answer>
