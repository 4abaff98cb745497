"""Checkpoints: what comes back, and what is said of a file that is none."""

import json
import os
import resource
import tracemalloc
import zipfile

import numpy as np
import pytest

from tinyunet.autograd import no_grad
from tinyunet.common.archive import seal
from tinyunet.nn import Parameter
from tinyunet.optim import SGD, Adam
from tinyunet.segmentation.checkpoint import CheckpointError, load, save
from tinyunet.unet import UNet

STATE = {"epoch": 3, "labels": ["background", "edema"], "validation": {"regions": {}}}


def make_model(**changed):
    arguments = {"in_channels": 2, "classes": 3, "filters": 2, "depth": 2, "seed": 5}
    return UNet(**arguments | changed)


def train(model, optimizer, steps=1):
    """Steps along made-up gradients, and batch-norm statistics that are not the initial ones."""
    generator = np.random.default_rng(0)
    for _ in range(steps):
        optimizer.flat_gradients[:] = generator.standard_normal(optimizer.flat_gradients.size)
        optimizer.step()
        with no_grad():
            model(generator.standard_normal((1, 4, 4, 4, 2)).astype(np.float32))


@pytest.fixture
def trained(tmp_path):
    model = make_model()
    optimizer = Adam(model.parameters(), lr=0.01)
    train(model, optimizer)
    path = tmp_path / "some.npz"
    save(path, model, optimizer, STATE)
    return path, model, optimizer


def test_everything_comes_back_bit_for_bit(trained):
    path, model, _ = trained
    found = load(path)
    assert found.config == model.config
    assert found.state == STATE
    again = found.make_model()
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], array)
        assert again.state_dict()[name].dtype == array.dtype
    image = np.random.default_rng(3).standard_normal((1, 6, 4, 5, 2)).astype(np.float32)
    np.testing.assert_array_equal(again.eval()(image).data, model.eval()(image).data)


def test_a_model_of_float64_stays_one(tmp_path):
    model = make_model().astype(np.float64)
    optimizer = Adam(model.parameters(), lr=0.01)
    optimizer.flat_gradients[:] = np.random.default_rng(0).standard_normal(optimizer.flat_gradients.size)
    optimizer.step()
    save(tmp_path / "a.npz", model, optimizer, STATE)
    found = load(tmp_path / "a.npz")
    again = found.make_model()
    optimizer_again = Adam(again.parameters())
    found.load_optimizer(again, optimizer_again)
    np.testing.assert_array_equal(optimizer_again.flat_parameters, optimizer.flat_parameters)
    np.testing.assert_array_equal(optimizer_again.v, optimizer.v)
    assert {array.dtype for array in again.buffers()} == {np.dtype(np.float64)}


def test_what_could_not_be_loaded_is_not_saved(trained):
    path, model, optimizer = trained
    before = path.read_bytes()
    with pytest.raises(ValueError, match="training/z: an array of objects"):
        save(path, model, optimizer, STATE, {"z": np.array([None])})
    own = model.parameters()
    foreign = Adam([*own, Parameter(np.zeros(3, np.float32))])
    with pytest.raises(ValueError, match=rf"parameter {len(own)} of shape \(3,\) is not the model's"):
        save(path, model, foreign, STATE)
    assert path.read_bytes() == before


@pytest.mark.parametrize("optimizer_class", [Adam, SGD])
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path, optimizer_class):
    model = make_model()
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    train(model, optimizer, steps=2)
    save(tmp_path / "a.npz", model, optimizer, STATE)
    found = load(tmp_path / "a.npz")
    again = found.make_model()
    optimizer_again = optimizer_class(again.parameters(), lr=1.0)
    found.load_optimizer(again, optimizer_again)
    train(model, optimizer)
    train(again, optimizer_again)
    np.testing.assert_array_equal(optimizer_again.flat_parameters, optimizer.flat_parameters)


def test_saving_again_replaces_and_leaves_nothing_beside(trained):
    path, model, optimizer = trained
    train(model, optimizer)
    save(path, model, optimizer, STATE | {"epoch": 4})
    assert load(path).state["epoch"] == 4
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_beside(trained):
    path, model, optimizer = trained
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as error:
            save(path, model, optimizer, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def refused(path):
    with pytest.raises(CheckpointError, match="damaged, or not a checkpoint") as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_file_cut_off_at_any_byte_is_refused(trained, tmp_path):
    content = trained[0].read_bytes()
    damaged = tmp_path / "damaged.npz"
    ends = {*range(200), *range(len(content) - 200, len(content)), *range(0, len(content), 97)}
    for length in sorted(ends):
        damaged.write_bytes(content[:length])
        refused(damaged)


def test_a_file_of_which_any_byte_has_changed_is_refused(trained, tmp_path):
    content = trained[0].read_bytes()
    damaged = tmp_path / "damaged.npz"
    # Also where the archive itself would not tell: dates, flags, the seal.
    places = {*range(200), *range(len(content) - 200, len(content)), *range(0, len(content), 97)}
    for place in sorted(places):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        damaged.write_bytes(bytes(changed))
        refused(damaged)
    damaged.write_bytes(content + b"x")
    refused(damaged)


def test_what_is_no_checkpoint_is_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / "absent.npz")
    with pytest.raises(CheckpointError, match="Is a directory"):
        load(tmp_path)
    text = tmp_path / "text.npz"
    text.write_text("weights")
    refused(text)
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    refused(tmp_path / "other.npz")
    with (tmp_path / "other.npz").open("r+b") as file:
        seal(file)
    with pytest.raises(CheckpointError, match="not a checkpoint of tinyunet"):
        load(tmp_path / "other.npz")


def test_pickled_objects_are_never_run(tmp_path):
    path = tmp_path / "pickled.npz"
    np.savez(path, header=np.array([print], dtype=object))
    with path.open("r+b") as file:
        seal(file)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load(path)


def test_the_file_replaced_is_kept_under_another_name(trained):
    path, model, optimizer = trained
    previous = path.with_name("previous.npz")
    before = path.read_bytes()
    save(path, model, optimizer, STATE | {"epoch": 4}, previous=previous)
    assert previous.read_bytes() == before
    assert load(path).state["epoch"] == 4
    assert sorted(path.parent.iterdir()) == sorted([path, previous])


def test_arrays_of_the_training_come_back(trained):
    path, model, optimizer = trained
    arrays = {"statistics": np.arange(6, dtype=np.float32).reshape(2, 3)}
    save(path, model, optimizer, STATE, arrays)
    np.testing.assert_array_equal(load(path).arrays["statistics"], arrays["statistics"])


@pytest.mark.parametrize("kind", ["dropout", "spatial_dropout"])
def test_dropout_goes_on_drawing_where_it_was(tmp_path, kind):
    model = make_model(**{kind: 0.5})
    image = np.random.default_rng(3).standard_normal((1, 8, 4, 4, 2)).astype(np.float32)
    model(image)
    save(tmp_path / "a.npz", model, Adam(model.parameters()), STATE)
    again = load(tmp_path / "a.npz").make_model()
    for _ in range(2):
        np.testing.assert_array_equal(again(image).data, model(image).data)
    assert not np.array_equal(model(image).data, model(image).data)


def test_an_optimizer_may_hold_its_parameters_in_another_order(trained):
    path, model, optimizer = trained
    found = load(path)
    again = found.make_model()
    turned = Adam(again.parameters()[::-1])
    found.load_optimizer(again, turned)
    train(model, optimizer)
    gradients = iter(optimizer.parameters[::-1])
    for parameter in turned.parameters:
        parameter.grad[...] = next(gradients).grad
    turned.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(dict(again.named_parameters())[name].data, parameter.data)


def test_the_state_of_another_optimizer_is_refused(trained):
    found = load(trained[0])
    model = found.make_model()
    with pytest.raises(CheckpointError, match="its optimizer is of another kind"):
        found.load_optimizer(model, SGD(model.parameters(), 0.1))


def rewritten(path, change):
    """Write the archive of a checkpoint again with some members changed."""
    with np.load(path) as archive:
        members = {name: archive[name] for name in archive.files}
    change(members)
    other = path.with_name("other.npz")
    np.savez(other, **members)
    with other.open("r+b") as file:
        seal(file)
    return other


def test_another_format_is_named(trained):
    def change(members):
        header = json.loads(str(members["header"]))
        members["header"] = np.array(json.dumps(header | {"format": "tinyunet checkpoint 9"}))

    with pytest.raises(CheckpointError, match='format "tinyunet checkpoint 9"; this program reads'):
        load(rewritten(trained[0], change))


@pytest.mark.parametrize("absent", ["config", "order", "random", "state"])
def test_a_header_that_lacks_something_is_refused(trained, absent):
    def change(members):
        header = json.loads(str(members["header"]))
        del header[absent]
        members["header"] = np.array(json.dumps(header))

    with pytest.raises(CheckpointError, match="but not a checkpoint of tinyunet"):
        load(rewritten(trained[0], change))


def test_parameters_of_another_model_are_refused(trained):
    def more_filters(members):
        header = json.loads(str(members["header"]))
        header["config"]["filters"] = 4
        members["header"] = np.array(json.dumps(header))

    def unknown_option(members):
        header = json.loads(str(members["header"]))
        header["config"]["colour"] = "blue"
        members["header"] = np.array(json.dumps(header))

    def one_less(members):
        del members["model/head.bias"]

    for change in (more_filters, unknown_option, one_less):
        found = load(rewritten(trained[0], change))
        with pytest.raises(CheckpointError, match="holds another model") as error:
            found.make_model()
        assert "\n" not in str(error.value)


def with_header(change):
    """A change of the members of a checkpoint, by one of its header."""

    def apply(members):
        header = json.loads(str(members["header"]))
        change(header)
        members["header"] = np.array(json.dumps(header))

    return apply


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["head.bias", "encoder.0.norm0.running_mean", "head.weights"])
def test_a_weight_that_is_no_number_is_refused_by_its_name(trained, name, value):
    def spoil(members):
        members[f"model/{name}"].flat[0] = value

    told = rf"'model/{name}': 1 of \d+ values are NaN or infinite"
    with pytest.raises(CheckpointError, match=told):
        load(rewritten(trained[0], spoil))
    path, model, optimizer = trained
    before = path.read_bytes()
    dict(model._named_arrays())[name].flat[0] = value
    with pytest.raises(CheckpointError, match=rf"some.npz: not written \({told}"):
        save(path, model, optimizer, STATE)
    assert path.read_bytes() == before


def test_a_variance_below_zero_is_refused(trained):
    def spoil(members):
        members["model/encoder.0.norm0.running_variance"][0] = -1

    with pytest.raises(CheckpointError, match=r"running_variance': holds -1; expected squares"):
        load(rewritten(trained[0], spoil))


WRONG = [
    ("config", "depth", 10**6),
    ("config", "depth", 0),
    ("config", "depth", True),
    ("config", "dim", 3.0),
    ("config", "filters", "2"),
    ("config", "use_upsampling", None),
    ("config", "dropout", [0]),
    ("config", "spatial_dropout", 2),
    ("config", "activation", "tanh"),
    ("config", "seed", -1),
    ("state", "labels", "background"),
    ("state", "labels", [1, 2]),
    ("state", "modalities", {"0": "FLAIR"}),
    ("state", "label_values", [0, 999, -5, 3]),
    ("state", "label_values", [0, 1, 1]),
    ("state", "label_values", [1, 2]),
    ("state", "label_values", [0, 1.0]),
    (None, "config", []),
    (None, "order", [["a"]]),
    (None, "random", {"encoder": 3}),
    (None, "state", 7),
]


@pytest.mark.parametrize(("part", "name", "value"), WRONG)
def test_each_entry_of_a_wrong_kind_is_told_in_one_line(trained, part, name, value):
    change = with_header(lambda header: (header[part] if part else header).update({name: value}))
    with pytest.raises(CheckpointError, match=r"^[^\n]+; expected [^\n]+$") as error:
        load(rewritten(trained[0], change))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("depth", 30), ("filters", 10**6), ("in_channels", 10**9), ("classes", 10**9)]
)
def test_a_model_larger_than_its_file_is_not_even_made(trained, name, value):
    found = load(rewritten(trained[0], with_header(lambda h: h["config"].update({name: value}))))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="holds another model than its configuration"):
            found.make_model()
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header", ["[" * 10**5, '{"a":' * 10**5, "NaN", "{", "", "1" * 5000, "[1, 2]", '"x"']
)
def test_a_header_that_is_no_object_is_refused(trained, header):
    def change(members):
        members["header"] = np.array(header)

    with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
        load(rewritten(trained[0], change))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("deflated", "is compressed"),
        ("overlapping", "its arrays are larger than the file"),
        ("promise", r"bytes, not those of shape \(268435456,\)"),
    ],
)
def test_a_small_archive_takes_little_memory(tmp_path, kind, told):
    path = tmp_path / "bomb.npz"
    size = 2**28
    content = b"\x93NUMPY\x01\x00" + (64).to_bytes(2, "little")
    content += f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},)}}".encode().ljust(64)
    with zipfile.ZipFile(path, "w") as archive:
        if kind == "deflated":
            with archive.open(zipfile.ZipInfo("model/a.npy"), "w") as member:
                member._compressor = zipfile._get_compressor(zipfile.ZIP_DEFLATED)
                member._zinfo.compress_type = zipfile.ZIP_DEFLATED
                member.write(content)
                for _ in range(64):
                    member.write(bytes(size // 64))
        else:
            archive.writestr("model/a.npy", content + bytes(2**20))
        if kind == "overlapping":  # 300 names of one MB
            for number in range(300):
                other = zipfile.ZipInfo(f"model/{number}.npy")
                first = archive.filelist[0]
                for name in ("CRC", "compress_size", "file_size", "header_offset"):
                    setattr(other, name, getattr(first, name))
                archive.filelist.append(other)
    with path.open("r+b") as file:
        seal(file)
    assert path.stat().st_size < 2**21
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=told):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_what_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path / "pipe.npz", "/dev/zero"):
        with pytest.raises(CheckpointError, match="not a regular file; expected a checkpoint"):
            load(path)


def test_nothing_is_ever_unpickled(monkeypatch, trained):
    """In whatever group: numpy would call this to read objects."""
    monkeypatch.setattr("pickle.load", None)
    for name in ("header", "model/head.bias", "optimizer/m", "training/x"):

        def spoil(members, name=name):
            members[name] = np.array([print], dtype=object)

        with pytest.raises(CheckpointError, match=r"not a checkpoint|not of numbers"):
            load(rewritten(trained[0], spoil))
