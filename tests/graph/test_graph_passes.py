"""What each pass leaves of a U-Net's graph, and which algorithms may be taken."""

import functools
import json
from collections import Counter

import numpy as np
import pytest
from agreement import ROUNDING, assert_agree, assert_within, batch

import tinyunet
from kernels.conv3d import winograd_bricks
from tinyunet import Adam, Module, UNet, functional, losses
from tinyunet.compiler import measure, passes
from tinyunet.compiler.ir import BLOCKED, Graph
from tinyunet.compiler.passes import choose_algorithm, fuse_backward, fuse_gradients
from tinyunet.compiler.show import figures, is_unfused
from tinyunet.nn import BatchNorm, Conv3d, GroupNorm

SHAPE = (1, 12, 14, 16, 4)
CONFIG = {"filters": 16, "depth": 2}


def compiled(training: bool = True, **options) -> Graph:
    model = UNet(**CONFIG)
    arguments = (losses.soft_dice, Adam(model.parameters()), SHAPE) if training else (SHAPE,)
    return tinyunet.compile(model, *arguments, **options).stages(SHAPE)[-1].graph


def operators(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


PIECES = ("moments", "normalize", "mask", "gradient", "concatenation", "reorder")


def test_nothing_is_left_between_the_kernels_of_a_training_step():
    """Every volume is blocked, and written by a convolution, a pooling or the head."""
    graph = compiled()
    found = operators(graph)
    assert not {*PIECES, "relu", "softmax"} & found.keys()
    assert found["convolution"] == 6  # two blocks of the encoder, one of the decoder
    both = found["convolution_backward"]
    assert found["convolution_backward_data"] + both == 5  # all but the first
    assert found["convolution_backward_weights"] + both == 6
    assert (found["head_loss"], found["head_loss_backward"]) == (1, 1)
    assert found["transposed_convolution"] == found["max_pooling"] == 1
    for node in graph.nodes:
        volumes = [v for v in node.outputs.values() if len(graph.values[v].storage_shape) == 6]
        assert not (is_unfused(node) and volumes), node
        assert all(graph.values[v].layout == BLOCKED for v in volumes), node


def test_nothing_but_kernels_is_left_of_an_inference():
    graph = compiled(training=False)
    assert operators(graph) == {
        "fold": 6,
        "pack_weights": 7,
        "convolution": 6,
        "transposed_convolution": 1,
        "max_pooling": 1,
        "head": 1,
    }
    assert not any(is_unfused(node) for node in graph.nodes)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("fuse_epilogue", "moments"),
        ("defer_normalization", "normalize"),
        ("fuse_backward", "gradient"),
        ("eliminate_concat", "concatenation"),
        ("propagate_layout", "reorder"),
    ],
)
def test_what_a_pass_removes_is_there_without_it(name, left):
    assert operators(compiled(disable=(name,)))[left] > 0


@pytest.mark.parametrize("name", ["fuse_epilogue", "defer_normalization", "fuse_backward"])
def test_each_pass_saves_memory_traffic(name):
    model = UNet(**CONFIG)
    step = tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), SHAPE)
    stages = step.stages(SHAPE)
    names = [stage.name for stage in stages]
    after = names.index(name)
    assert figures(stages[after]).moved < figures(stages[after - 1]).moved


def test_passes_twice_are_passes_once():
    """Those that eliminate_concat runs again must not change what they have done."""
    model = UNet(**CONFIG)
    step = tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), SHAPE)
    graph = next(s.graph for s in step.stages(SHAPE) if s.name == "eliminate_concat")
    options = passes.Options(passes.NAMES, "fast")
    for name in ("fuse_epilogue", "defer_normalization", "fuse_backward", "eliminate_concat"):
        assert passes.PASSES[name](graph, options) == graph


class Smooth(Module):
    """Convolutions of concatenated, normalised sources, almost without kinks."""

    def __init__(self, filters):
        generator = np.random.default_rng(0)
        self.conv0 = Conv3d(4, filters, generator=generator)
        self.conv1 = Conv3d(filters, filters, generator=generator)
        self.conv2 = Conv3d(2 * filters, filters, generator=generator)
        self.norm0, self.norm1, self.norm2 = (BatchNorm(filters) for _ in range(3))
        self.head = Conv3d(filters, 4, (1, 1, 1), generator=generator)

    def logits(self, src):
        first = functional.leaky_relu(self.norm0(self.conv0(src)), 0.95)
        second = functional.leaky_relu(self.norm1(self.conv1(first)), 0.9)
        both = functional.concatenate(second, first)
        return self.head(functional.leaky_relu(self.norm2(self.conv2(both)), 0.95))

    def forward(self, src):
        return functional.softmax(self.logits(src))


class TestBothGradients:
    """fuse_gradients, wherever there is a kernel."""

    @pytest.fixture(autouse=True)
    def _everywhere(self, monkeypatch):
        monkeypatch.setattr(winograd_bricks, "_SUMS_OF_BOTH", np.inf)
        monkeypatch.setattr(choose_algorithm, "_SMALL", 0)
        monkeypatch.setattr(choose_algorithm, "_TRANSFORM", 0)

    def test_nothing_forms_a_gradient_but_who_needs_it(self):
        found = operators(compiled())
        assert found["convolution_backward"] == 5  # all but the first
        assert found["convolution_backward_weights"] == 1
        assert not {"convolution_backward_data", "gradient"} & found.keys()

    def test_a_very_large_gradient_is_formed_first(self, monkeypatch):
        monkeypatch.setattr(fuse_backward, "_FORMED_ONCE", 0)
        assert operators(compiled())["gradient"] == 0
        monkeypatch.setattr(fuse_gradients, "_FORMED_FIRST", 0)
        found = operators(compiled())
        assert found["gradient"] == found["convolution_backward"] == 5

    @pytest.mark.parametrize(
        ("grouped", "bias", "sums"), [(False, True, 1), (False, False, 0), (True, True, 1)]
    )
    def test_a_bias_that_no_norm_takes_away_has_a_gradient(self, grouped, bias, sums):
        model = Plain(bias, grouped)
        step = tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), SHAPE)
        found = operators(step.stages(SHAPE)[-1].graph)
        assert (found["convolution_backward"], found["bias_gradient"]) == (1, sums)
        assert_agree(functools.partial(Plain, bias, grouped), (2, 6, 7, 8), ROUNDING, steps=1)

    def test_a_bias_whose_gradient_nobody_sums(self):
        model = Plain(True, activation=functional.sigmoid)
        step = tinyunet.compile(model, losses.soft_dice, Adam(model.parameters()), SHAPE)
        assert operators(step.stages(SHAPE)[-1].graph)["convolution_backward"] == 0


class Plain(Module):
    """Two convolutions, with group norm or without a norm."""

    def __init__(self, bias, grouped=False, activation=lambda x: functional.leaky_relu(x, 0.95)):
        generator = np.random.default_rng(0)
        self.conv0 = Conv3d(4, 16, generator=generator)
        self.conv1 = Conv3d(16, 16, generator=generator)
        self.head = Conv3d(16, 4, (1, 1, 1), generator=generator)
        self.norm = GroupNorm(4, 16) if grouped else lambda x: x
        self.activation = activation
        if not bias:
            self.conv1.bias = None

    def logits(self, src):
        first = functional.leaky_relu(self.conv0(src), 0.9)
        return self.head(self.activation(self.norm(self.conv1(first))))

    def forward(self, src):
        return functional.softmax(self.logits(src))


class TestAlgorithms:
    """Which tiles choose_algorithm takes, and what it remembers."""

    def tiles(self, accuracy: str) -> set[tuple[int, ...] | None]:
        graph = compiled(accuracy=accuracy)
        return {n.attributes.get("tile") for n in graph.nodes if n.op.startswith("convolution")}

    def test_strict_takes_no_coarse_tile(self):
        assert self.tiles("strict") <= {None, (2, 2, 2), (2, 2, 1)}

    @pytest.mark.parametrize("tile", [(2, 2, 2), (2, 4, 4), (4, 4, 4)])
    @pytest.mark.parametrize("filters", [12, 16])
    def test_every_tile_in_every_direction(self, monkeypatch, tile, filters):
        """Outputs may be 5e-5 off at each of three convolutions, and batch norm amplifies that.

        With a ReLU a voxel near zero could take the other side, which is no error of a tile.
        """
        monkeypatch.setattr(choose_algorithm, "_SMALL", 0)
        monkeypatch.setattr(measure, "fastest", lambda *candidates: candidates[-1][-1])
        monkeypatch.setitem(choose_algorithm._TILES, "strict", (tile,))
        monkeypatch.setitem(choose_algorithm._TILES_OF_FEW, "strict", ((*tile[:2], 1),))
        monkeypatch.setattr(choose_algorithm, "_FACTOR", np.inf)
        bound = ROUNDING if tile == (2, 2, 2) else 1e-3
        assert_agree(functools.partial(Smooth, filters), (2, 9, 6, 8), bound, steps=1)

    @pytest.mark.parametrize("tile", [(2, 2, 2), (2, 4, 4), (4, 4, 4)])
    def test_every_tile_with_both_gradients_in_one_pass(self, monkeypatch, tile):
        monkeypatch.setattr(winograd_bricks, "_SUMS_OF_BOTH", np.inf)
        # Or F(2, 2, 2) would be no better than direct.
        monkeypatch.setattr(choose_algorithm, "_TRANSFORM", 0)
        self.test_every_tile_in_every_direction(monkeypatch, tile, 12)

    def test_images(self):
        model = UNet(dim=2, filters=16, depth=2).eval()
        images, _ = batch((2, 30, 31), 4, 4, 0)
        predict = tinyunet.compile(model, images.shape)
        tiles = {n.attributes.get("tile") for n in predict.program(images.shape).graph.nodes}
        assert tiles <= {None, (1, 2, 2), (1, 4, 4)}
        assert_within(predict(images), model(images).data, 1e-4, "prediction")

    def test_what_was_measured_is_remembered(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TINYUNET_CACHE", str(tmp_path))
        monkeypatch.setattr(choose_algorithm, "_FACTOR", np.inf)  # so that there is something to measure
        measure.remembered.cache_clear()
        first = compiled(training=False)
        (path,) = tmp_path.iterdir()
        assert json.loads(path.read_text())
        monkeypatch.setattr(measure, "_seconds", None)  # measuring again would fail
        measure.remembered.cache_clear()
        again = compiled(training=False)
        assert [n.attributes.get("tile") for n in again.nodes] == [
            n.attributes.get("tile") for n in first.nodes
        ]
        measure.remembered.cache_clear()

    def test_what_is_known_is_not_replaced_by_what_is_on_disk(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TINYUNET_CACHE", str(tmp_path))
        measure.remembered.cache_clear()
        monkeypatch.setattr(measure, "_key", lambda node, *_: node)
        candidates = [None, (2, 2, 2), (4, 4, 4)]
        measure.remembered().update(resumed=[2, 2, 2])
        measure._save({"resumed": None, "other": [4, 4, 4]})
        assert measure.fastest("other", None, candidates) == (4, 4, 4)
        assert measure.fastest("resumed", None, candidates) == (2, 2, 2)
        measure.remembered.cache_clear()

    def test_a_run_that_goes_on_keeps_its_own_but_leaves_no_trace(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TINYUNET_CACHE", str(tmp_path))
        measure.remembered.cache_clear()
        monkeypatch.setattr(measure, "_key", lambda node, *_: node)
        monkeypatch.setattr(measure, "_seconds", None)  # measuring would fail
        node, candidates = "a convolution", [None, (2, 2, 2), (4, 4, 4)]
        measure.remembered()[node] = [2, 2, 2]
        measure.use({node: [4, 4, 4]})
        assert measure.fastest(node, None, candidates) == (4, 4, 4)
        assert measure.known()[node] == [4, 4, 4]
        assert measure.remembered()[node] == [2, 2, 2]
        measure.use({})
        assert measure.fastest(node, None, candidates) == (2, 2, 2)
        measure.remembered.cache_clear()

    @pytest.mark.parametrize(
        "strange", [[6, 6, 6], [1], [2, 2, 2.5], "222", {}, True, 6, [[2], 2, 2], [True] * 3, [2] * 9]
    )
    def test_only_candidates_are_taken(self, monkeypatch, tmp_path, strange):
        """From the file, and from a checkpoint; what else is there is measured and put right."""
        monkeypatch.setenv("TINYUNET_CACHE", str(tmp_path))
        monkeypatch.setattr(choose_algorithm, "_FACTOR", np.inf)
        measure.remembered.cache_clear()
        first = compiled(training=False)
        found = json.loads(measure._path().read_text())
        measure._path().write_text(json.dumps(dict.fromkeys(found, strange)))
        measure.remembered.cache_clear()
        if measure._is_tile(strange):
            measure.use(dict.fromkeys(found, strange))
        again = compiled(training=False)
        measure.use({})
        assert [n.op for n in again.nodes] == [n.op for n in first.nodes]
        mended = json.loads(measure._path().read_text())
        assert mended.keys() == found.keys()
        assert strange not in mended.values()
        measure.remembered.cache_clear()

    def test_each_version_of_the_kernels_has_its_own_memory(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TINYUNET_CACHE", str(tmp_path))
        measure._save({"a convolution": [2, 2, 2]})
        monkeypatch.setattr(measure, "_version", lambda: "other")
        assert measure._read() == {}
        measure._save({"a convolution": None})
        monkeypatch.undo()
        monkeypatch.setenv("TINYUNET_CACHE", str(tmp_path))
        assert measure._read() == {"a convolution": [2, 2, 2]}

    @pytest.mark.parametrize("content", ["", "1", '{"a": ', "null"])
    def test_a_broken_memory_is_made_anew(self, monkeypatch, tmp_path, content):
        monkeypatch.setenv("TINYUNET_CACHE", str(tmp_path))
        measure._path().write_text(content)
        monkeypatch.setattr(choose_algorithm, "_FACTOR", np.inf)  # so that there is something to measure
        measure.remembered.cache_clear()
        compiled(training=False)
        assert json.loads(measure._path().read_text())
        measure.remembered.cache_clear()
