"""Training through the Trainer: compiled as eager, and the Dice that both show."""

import json
import time

import numpy as np
import pytest

from tinyunet import Adam, UNet
from tinyunet.data import phantom
from tinyunet.data.decathlon import read_dataset
from tinyunet.parallel import timeline
from tinyunet.parallel.communicator import Communicator
from tinyunet.parallel.timeline import Timeline
from tinyunet.schedules import constant
from tinyunet.training.loop import Trainer
from tinyunet.training.progress import Job, Progress
from tinyunet.training.samples import Batch, Inspector, Loader, Volumes
from tinyunet.training.settings import Settings
from tinyunet.training.step import compiled_gradients, eager_gradients, foreground

SHAPE = (2, 8, 7, 9)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    path = phantom.make_dataset(tmp_path_factory.mktemp("data") / "p", cases=3, shape=(18, 20, 16))
    return list(read_dataset(path).cases)


def make_batch(channels=4, classes=4):
    generator = np.random.default_rng(0)
    images = generator.standard_normal((*SHAPE, channels)).astype(np.float32)
    return Batch(images, generator.integers(0, max(classes, 2), SHAPE).astype(np.uint8))


def make_trainer(cases, communicator=None, **options):
    model = UNet(filters=4, depth=3, seed=3)
    volumes = Volumes(10**9)
    settings = Settings(patch_size=(16, 16, 16), patches_per_case=2, batch_size=2, **options)
    loader = Loader(cases, volumes, settings, inspector=Inspector(cases, volumes))
    job = Job(settings, communicator or Communicator(), Progress(shown=False))
    return Trainer(job, model, Adam(model.parameters()), loader, schedule=constant(1e-3))


def epochs(cases, communicator=None, **options):
    trainer = make_trainer(cases, communicator, **options)
    return [trainer.epoch(number) for number in (1, 2)], trainer.optimizer.flat_parameters


@pytest.mark.parametrize(("accuracy", "bound"), [("fast", 1e-3), ("strict", 1e-4)])
def test_two_epochs_compiled_are_two_epochs_eager(cases, accuracy, bound):
    """Six steps of Adam, which makes a whole step of a gradient that is only rounding.

    Convolutions may err by 5e-5 of their largest result in the fast way, and some ten follow one
    another.
    """
    eager, _ = epochs(cases, eager=True)
    compiled, parameters = epochs(cases, accuracy=accuracy)
    np.testing.assert_allclose(compiled, eager, rtol=bound)
    assert eager[1].loss < eager[0].loss
    again, same = epochs(cases, accuracy=accuracy)
    assert again == compiled
    np.testing.assert_array_equal(same, parameters)


@pytest.mark.parametrize("eager", [False, True])
def test_statistics_leave_out_patches_that_do_not_count(cases, eager):
    trainer = make_trainer(cases, eager=eager)
    batch = next(trainer.loader.epoch(1))
    for weight, is_same in ((0.0, True), (1.0, False)):
        before = [buffer.copy() for buffer in trainer.model.buffers()]
        trainer._step(iter([batch._replace(weight=weight)]))
        after = trainer.model.buffers()
        assert all(map(np.array_equal, before, after)) == is_same


@pytest.mark.parametrize("eager", [False, True])
def test_the_timeline_has_every_kernel_of_a_step(cases, tmp_path, eager):
    communicator = Communicator()
    communicator.timeline = Timeline(0, time.perf_counter())
    epochs(cases, communicator, eager=eager)
    communicator.timeline.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event.get("cat") == "kernels"]
    names = [event["name"] for event in spans]
    assert names[-1] == "Adam"
    assert names.count("Adam") == 6  # steps
    step = names[: names.index("Adam")]
    assert names == [*step, "Adam"] * 6
    if eager:
        forward = [name for name in step if not name.startswith("d ")]
        assert forward == [name.removeprefix("d ") for name in reversed(step[len(forward) :])]
        assert forward.count("Convolution") == 11
    ends = [event["ts"] + event["dur"] for event in spans]
    assert all(end <= event["ts"] for end, event in zip(ends, spans[1:], strict=False))


def test_a_full_timeline_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "_MOST_EVENTS", 2)
    full = Timeline(1, 0.0)
    for number in range(5):
        full.span("kernels", f"kernel {number}", number, number + 1)
    full.save(tmp_path / "trace.json")
    *_, before, last = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert before["name"] == "kernel 1"
    assert (last["ph"], last["name"]) == ("i", "full: 3 later events are left out")
    assert (last["pid"], last["ts"]) == (1, 2e6)


@pytest.mark.parametrize("classes", [1, 4])
def test_loss_and_dice_of_both_ways_are_those_of_the_probabilities(classes):
    batch = make_batch(classes=classes)
    found = []
    for way in ("eager", "compiled"):
        model = UNet(filters=4, depth=2, classes=classes)
        optimizer = Adam(model.parameters())
        gradients = (
            eager_gradients(model, optimizer)
            if way == "eager"
            else compiled_gradients(model, optimizer, batch.images.shape)
        )
        found.append(gradients(batch))
    probabilities = UNet(filters=4, depth=2, classes=classes).train()(batch.images).data
    one_hot = np.eye(4)[batch.labels] if classes > 1 else batch.labels[..., np.newaxis]
    voxels = (1, 2, 3)
    expected = [(probabilities * one_hot).sum(voxels), probabilities.sum(voxels)]
    expected = np.array([*expected, one_hot.sum(voxels)])
    for result in found:
        np.testing.assert_allclose(result.dice_sums, expected, rtol=1e-4)
    np.testing.assert_allclose(found[1].loss, found[0].loss, rtol=1e-5)


def test_background_does_not_count():
    sums = np.arange(3 * 2 * 3, dtype=np.float64).reshape(3, 2, 3)
    np.testing.assert_array_equal(foreground(sums), [1 + 2 + 4 + 5, 2 * (9 * 4 + 12)])
    np.testing.assert_array_equal(foreground(sums[..., :1]), [0 + 3, 6 + 9 + 12 + 15])
