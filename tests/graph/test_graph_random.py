"""Small graphs drawn at random, of all operators in all orders."""

import numpy as np
from agreement import EXACT, ROUNDING, assert_agree
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tinyunet import Module, functional
from tinyunet.compiler import passes
from tinyunet.nn import BatchNorm, Conv3d, ConvTranspose3d, Sequential

KINDS = ("conv", "point", "norm", "relu", "leaky", "pool", "up", "upsample", "join", "add")


class Random(Module):
    """Layers drawn as (kind, channels, which earlier value to take as well)."""

    def __init__(self, layers, seed):
        generator = np.random.default_rng(seed)
        self.layers, self.seed = layers, seed
        self.parts = Sequential()
        channels = [4]
        for kind, width, other in layers:
            last = channels[-1]
            if kind == "conv":
                self.parts.append(Conv3d(last, width, generator=generator))
            elif kind == "point":
                self.parts.append(Conv3d(last, width, (1, 1, 1), generator=generator))
            elif kind == "up":
                self.parts.append(ConvTranspose3d(last, width, generator=generator))
            elif kind == "norm":
                norm = BatchNorm(last)
                norm.scale.data[:] = generator.uniform(0.5, 1.5, last)
                norm.shift.data[:] = generator.uniform(-0.5, 0.5, last)
                self.parts.append(norm)
            out = {"conv": width, "point": width, "up": width}.get(kind, last)
            channels.append(last + channels[other % len(channels)] if kind == "join" else out)
        self.head = Conv3d(channels[-1], 3, (1, 1, 1), generator=generator)

    def logits(self, src):
        parts, values = iter(self.parts), [src]
        for kind, _, other in self.layers:
            src = values[-1]
            if kind in ("conv", "point", "up", "norm"):
                src = next(parts)(src)
            elif kind == "relu":
                src = functional.relu(src)
            elif kind == "leaky":
                src = functional.leaky_relu(src, 0.1)
            elif kind == "pool" and min(src.shape[1:4]) >= 2:
                src = functional.max_pool3d(src)
            elif kind == "upsample" and max(src.shape[1:4]) <= 5:
                src = functional.upsample3d(src)
            elif kind in ("join", "add"):
                src = self._combine(kind, src, values[other % len(values)])
            values.append(src)
        return functional.pad_end(self.head(values[-1])[:, :4, :5, :3], (4, 5, 3))

    def _combine(self, kind, src, other):
        size = [max(a, b) for a, b in zip(src.shape[1:4], other.shape[1:4], strict=True)]
        src, other = functional.pad_end(src, size), functional.pad_end(other, size)
        if kind == "join":
            return functional.concatenate(src, other)
        return src + other if src.shape == other.shape else src

    def __repr__(self):
        return f"Random({self.layers}, {self.seed})"

    def forward(self, src):
        return functional.softmax(self.logits(src))


@st.composite
def models(draw):
    layer = st.tuples(st.sampled_from(KINDS), st.sampled_from([4, 16, 17]), st.integers(0, 9))
    layers = draw(st.lists(layer, min_size=1, max_size=7))
    ups = [i for i, (kind, *_) in enumerate(layers) if kind == "up"]
    return Random([layer for i, layer in enumerate(layers) if i not in ups[1:]], draw(st.integers(0, 99)))


# A failing net is small as it is; to make it smaller takes minutes, since each is compiled.
@settings(phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(model=models(), off=st.sets(st.sampled_from(passes.NAMES), max_size=3))
def test_random_graphs(model, off):
    def make():
        return Random(model.layers, model.seed)

    options = {"classes": 3, "steps": 1}
    assert_agree(make, (2, 4, 5, 3), EXACT, enable=(), **options)
    assert_agree(make, (2, 4, 5, 3), ROUNDING, disable=tuple(off), **options)
