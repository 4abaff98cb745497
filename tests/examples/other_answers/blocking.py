"""Pad once, then one transposition there and one back."""

import numpy as np


def to_blocked(src):
    D, H, W, C = src.shape
    padded = np.pad(src, [(0, 0)] * 3 + [(0, -C % 16)])
    return np.ascontiguousarray(padded.reshape(D, H, W, -1, 16).transpose(3, 0, 1, 2, 4))


def from_blocked(blocked, C):
    _, D, H, W, _ = blocked.shape
    return blocked.transpose(1, 2, 3, 0, 4).reshape(D, H, W, -1)[..., :C].copy()
