"""Mutated NIfTI files and crafted checkpoints: each is read right, or refused in one line that names it.

    PYTHONPATH=. python tests/fuzz_files.py nifti --cases 5000
    PYTHONPATH=. python tests/fuzz_files.py checkpoints --cases 3000

Each case depends on the seed and its number alone, and may take ten seconds and 512 MB.
"""

import argparse
import contextlib
import copy
import functools
import gzip
import hashlib
import io
import json
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from tinyunet.common.errors import DataError, UserError
from tinyunet.data.labels import read_labels
from tinyunet.data.nifti import read_header, read_volume
from tinyunet.optim import Adam
from tinyunet.parallel.communicator import Communicator
from tinyunet.segmentation import checkpoint, prediction
from tinyunet.segmentation.scores import overall
from tinyunet.segmentation.sliding_window import segment
from tinyunet.training import resume
from tinyunet.training.loop import schedule_of
from tinyunet.training.settings import Settings
from tinyunet.unet import UNet

Generator = np.random.Generator
DTYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "c8"]
NUMBERS = [0, 1, -1, 2, 7, 255, 32767, -32768, 1e-45, 3e38, -3e38, np.nan, np.inf, 1e6, 0.5, 1e30]


def one_of(generator: Generator, choices: Any) -> Any:
    return choices[generator.integers(len(choices))]


# --- NIfTI ---------------------------------------------------------------------------------------


def whole_nifti(generator: Generator) -> bytes:
    """A file of any size, type, version, byte order, scaling and orientation, as nibabel writes it."""
    shape = tuple(generator.integers(1, 7, generator.integers(3, 5)))
    dtype = np.dtype(one_of(generator, DTYPES))
    voxels = generator.integers(0, 100, shape).astype(dtype)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(generator.standard_normal((3, 3)))[0] * generator.uniform(0.1, 9)
    version = one_of(generator, [nibabel.Nifti1Image, nibabel.Nifti2Image])
    header = version.header_class(endianness=one_of(generator, "<>"))
    header.set_data_dtype(dtype)
    image = version(voxels, affine, header, dtype=dtype)
    if generator.random() < 0.3:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 99))
    content = bytearray(image.to_bytes())
    if generator.random() < 0.3:
        fields = version.header_class(bytes(content[: image.header.sizeof_hdr]))
        fields["scl_slope"], fields["scl_inter"] = generator.uniform(-9, 9, 2)
        content[: image.header.sizeof_hdr] = fields.binaryblock
    return bytes(content)


def set_field(content: bytes, generator: Generator) -> bytes:
    version = nibabel.Nifti2Header if content[4:7] == b"n+2" else nibabel.Nifti1Header
    size = version.template_dtype.itemsize
    if len(content) < size:
        return content
    header = version(content[:size], check=False)
    name = one_of(generator, header.keys())
    with np.errstate(all="ignore"):
        field = np.array(header[name])
        value = np.asarray(one_of(generator, NUMBERS)).astype(field.dtype)
        if field.ndim:
            field[generator.integers(len(field))] = value
            value = field
    header[name] = value
    return bytes(header.binaryblock) + content[size:]


def set_affine(content: bytes, generator: Generator) -> bytes:
    """Axes in one plane, of no length or of one that no voxel has."""
    if content[344:347] != b"n+1":
        return content
    header = nibabel.Nifti1Header(content[:348], check=False)
    axes = generator.standard_normal((3, 2)) @ generator.standard_normal((2, 3))
    if generator.random() < 0.5:
        axes = np.eye(3) * 10 ** generator.uniform(-5, 5, 3)
    header["sform_code"] = 1
    for row, name in zip(axes, ("srow_x", "srow_y", "srow_z"), strict=True):
        header[name][:3] = row
    return bytes(header.binaryblock) + content[348:]


def set_byte(content: bytes, generator: Generator, most: int = 10**9) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[generator.integers(min(len(changed), most))] = generator.integers(256)
    return bytes(changed)


def cut(content: bytes, generator: Generator) -> bytes:
    return content[: generator.integers(len(content) + 1)]


def append(content: bytes, generator: Generator) -> bytes:
    more = generator.bytes(int(generator.integers(1, 2000)))
    return content + (more if generator.random() < 0.5 else bytes(len(more)))


@functools.cache
def zeros(megabytes: int) -> bytes:
    """Zeros, compressed a thousand times."""
    return gzip.compress(bytes(2**22), 1) * (megabytes // 4)


def pack(content: bytes, generator: Generator, megabytes: int) -> bytes:
    """Compress in one part or more, perhaps with something behind them."""
    at = int(generator.integers(len(content) + 1))
    packed = gzip.compress(content[:at], 1) + gzip.compress(content[at:], 1)
    behind = ["", "", "", "", "", "padding", "garbage", "zeros", "twice"]
    match one_of(generator, behind):
        case "padding":
            packed += bytes(100)
        case "garbage":
            packed += generator.bytes(20)
        case "zeros":
            packed += zeros(megabytes)
        case "twice":
            packed += packed
    return packed


def nifti_case(path: Path, generator: Generator, megabytes: int) -> None:
    """Write a file, and read it in each way."""
    content = whole_nifti(generator)
    mutations = [set_field, set_field, set_affine, cut, append]
    mutations.append(lambda c, g: set_byte(c, g, most=540))
    for _ in range(generator.integers(3)):
        content = one_of(generator, mutations)(content, generator)
    if generator.random() < 0.5:
        content = pack(content, generator, megabytes)
        if generator.random() < 0.2:
            content = one_of(generator, [set_byte, cut])(content, generator)
    path.write_bytes(content)
    voxels, geometry = read_volume(path)
    check_nifti(content, voxels, geometry)
    assert read_header(path)[0] == voxels.shape
    try:
        labels, _ = read_labels(path, range(100))
        assert np.array_equal(labels, np.rint(voxels))
    except DataError as error:  # numbers that are no labels
        check_line(path, error)


def check_nifti(content: bytes, voxels: Any, geometry: Any) -> None:
    """Compare what was read with what nibabel reads."""
    plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    version = nibabel.Nifti2Image if plain[4:7] == b"n+2" else nibabel.Nifti1Image
    with np.errstate(all="ignore"):
        image = version.from_bytes(plain)
        expected = np.asanyarray(image.dataobj)
    stored = geometry.from_canonical(voxels).reshape(expected.shape)
    nearly_zero = (stored == 0) & (np.abs(expected) <= abs(image.dataobj.slope) / 2)
    assert np.all((stored == expected.astype(stored.dtype)) | nearly_zero)
    assert np.isfinite(voxels).all()
    held = expected.size * image.get_data_dtype().itemsize
    assert len(plain) == image.dataobj.offset + held, "bytes were left over"
    assert min(geometry.spacing) > 0.0099
    assert max(geometry.spacing) < 101
    assert geometry.millilitres > 1e-10


# --- Checkpoints ---------------------------------------------------------------------------------

SCORES = {"classes": {"edema": 0.5, "core": 0.25}, "regions": {}}
STATE: dict[str, Any] = {
    "epoch": 2,
    "step": 1,
    "steps": 3,
    "sums": [1.5, 2.0, 3.0, 4.0],
    "seconds": 0.5,
    "history": [{"epoch": 1, "loss": 0.5, "dice": 0.25, "validation": SCORES, "lr": 0.01, "seconds": 1.0}],
    "validation": SCORES,
    "modalities": ["FLAIR", "T1w"],
    "labels": ["background", "edema", "core"],
    "label_values": [0, 2, 4],
    "cases": {"training": ["a", "b"], "validation": ["c"], "test": ["d"]},
    "algorithms": {"a convolution": [2, 2, 2], "another": None},
}
SETTINGS = Settings(filters=2, depth=2, patch_size=(8, 8, 8))
JSON: list[Any] = [
    *(None, True, False, 0, 1, -1, 10**6, 10**30, 0.5, -1.5, 1e308, "", "x", "/etc/passwd", "../x"),
    *([], {}, [1], [[]], {"a": 1}, ["a"], [6, 6, 6], "\n", "\ud800", "x" * 5000, [0] * 1000),
]


@functools.cache
def members() -> dict[str, Any]:
    """What a checkpoint of a training holds."""
    model = UNet(in_channels=2, classes=3, filters=2, depth=2, dropout=0.5)
    optimizer = Adam(model.parameters())
    statistics = np.concatenate([buffer.ravel() for buffer in model.buffers()])[None]
    state = STATE | {"settings": vars(SETTINGS)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latest.npz"
        checkpoint.save(path, model, optimizer, state, {"statistics": statistics})
        with np.load(path) as archive:
            found = {name: archive[name] for name in archive.files}
    return found | {"header": json.loads(str(found["header"]))}


def places(content: Any) -> list[tuple[Any, Any]]:
    """Each entry of JSON objects and lists: what holds it, and its key."""
    found = []
    keys = content if isinstance(content, dict) else range(len(content))
    for key in list(keys):
        found.append((content, key))
        if isinstance(content[key], dict | list):
            found += places(content[key])
    return found


def any_json(generator: Generator) -> Any:
    return copy.deepcopy(one_of(generator, JSON))  # a list may be changed later


def change_header(found: dict[str, Any], generator: Generator) -> None:
    if not isinstance(found.get("header"), dict):
        return
    holder, key = one_of(generator, places(found["header"]) or [({"": 0}, "")])
    match one_of(generator, ["set", "set", "set", "delete", "add", "exchange"]):
        case "set":
            holder[key] = any_json(generator)
        case "delete":
            del holder[key]
        case "add":
            if isinstance(holder, dict):
                holder[one_of(generator, ["x", "", "\n", "depth"])] = any_json(generator)
            else:
                holder.append(any_json(generator))
        case "exchange":
            other, name = one_of(generator, places(found["header"]))
            holder[key] = copy.deepcopy(other[name])


def change_text(found: dict[str, Any], generator: Generator) -> None:
    texts = ["[" * 10**5, "NaN", "{", "", "1" * 5000, '{"a": 1e999}', "\0", '{"format": ' * 900]
    found["header"] = one_of(generator, texts)


def change_array(found: dict[str, Any], generator: Generator) -> None:
    name = one_of(generator, list(found))
    array = found[name]
    if not isinstance(array, np.ndarray):
        return
    kind = one_of(generator, ["type", "shape", "value", "value", "delete", "rename", "add"])
    if kind == "type":
        types = ["i1", "?", "f2", "f8", ">f4", "c8", "O", "U3", "S3", "V4", "f16", "m8[s]", "u8"]
        with np.errstate(all="ignore"):
            found[name] = array.astype(one_of(generator, [*types, [("a", "f4"), ("b", "O")]]))
    elif kind == "shape":
        shapes = [array.ravel(), array[None], array.ravel()[:0], np.float32(1), array.ravel()[:-1]]
        found[name] = np.asarray(one_of(generator, shapes))
    elif kind == "value" and array.size and array.dtype.kind in "fiu":
        numbers = [n for n in NUMBERS if np.isfinite(n) or array.dtype.kind == "f"]
        with np.errstate(all="ignore"):
            found[name] = array = array.copy()
            array.flat[generator.integers(array.size)] = np.asarray(one_of(generator, numbers)).astype(
                array.dtype
            )
    elif kind in ("delete", "rename"):
        del found[name]
    if kind in ("rename", "add"):
        names = ["", "../x", "/x", "model/", "model/x", "training/residuals", "x" * 300, "\n"]
        found[one_of(generator, names)] = array


def encoded(found: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Name and bytes of each member of an archive."""
    files = []
    for name, value in found.items():
        if name == "header" and not isinstance(value, np.ndarray):
            value = np.array(value if isinstance(value, str) else json.dumps(value))
        file = io.BytesIO()
        np.lib.format.write_array(file, value, allow_pickle=True)
        files.append((f"{name}.npy", file.getvalue()))
    return files


def change_file(files: list[tuple[str, bytes]], generator: Generator) -> None:
    """Another header of an array, which promises something else; or not even an array."""
    index = generator.integers(len(files))
    name, content = files[index]
    headers = [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -8), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (10000000000,), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (), }",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': 3, }",
        "(" * 3000,
        "__import__('os')",
    ]
    match one_of(generator, ["header", "byte", "cut", "name", "twice"]):
        case "header":
            text = one_of(generator, headers).encode()
            start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
            files[index] = name, start + text + content[128:]
        case "byte":
            files[index] = name, set_byte(content, generator, most=128)
        case "cut":
            files[index] = name, cut(content, generator)
        case "name":
            files[index] = one_of(generator, ["x", "a/../../b.npy", ".npy"]), content
        case "twice":
            files.append((name, content))


def sealed(files: list[tuple[str, bytes]], generator: Generator) -> bytes:
    """An archive with its checksum, perhaps compressed or changed before it was sealed."""
    kind = one_of(generator, [*["stored"] * 12, "deflated", "bomb", "byte", "cut", "end"])
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if kind in ("deflated", "bomb") else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # of two members of one name
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name), content, method)
        if kind == "bomb":
            archive.writestr("model/x.npy", bytes(2**24))
    content = file.getvalue()
    if kind == "byte":
        content = set_byte(content, generator)
    elif kind == "cut":
        content = cut(content, generator)
    elif kind == "end":  # the list of members, and how long it is
        changed = set_byte(content[-500:], generator)
        content = content[:-500] + changed
    content = content[:-2] + (64).to_bytes(2, "little")
    return content + hashlib.sha256(content).hexdigest().encode()


def checkpoint_case(path: Path, generator: Generator, _: int) -> None:
    """Write a checkpoint, and use it as prediction and a training that goes on would."""
    found = copy.deepcopy(members())
    changes = [change_header, change_header, change_header, change_array, change_array, change_text]
    for _ in range(generator.integers(3)):
        one_of(generator, changes)(found, generator)
    files = encoded(found)
    if generator.random() < 0.2:
        change_file(files, generator)
    content = sealed(files, generator)
    path.write_bytes(content if generator.random() < 0.95 else set_byte(content, generator))
    loaded = checkpoint.load(path)
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
        for name, array in loaded.model.items():
            assert np.array_equal(array, archive[f"model/{name}"])
            assert np.isfinite(array).all()
        header = json.loads(str(archive["header"]))
        assert loaded.state == header["state"]
    model = loaded.make_model()
    loaded.load_optimizer(model, Adam(model.parameters()))
    if generator.random() < 0.2:
        predicts(loaded)
    goes_on(loaded)


def predicts(found: checkpoint.Checkpoint) -> None:
    """Segment an image, and look at what was written."""
    image = found.path.with_name("image.nii")
    if not image.exists():
        voxels = np.random.default_rng(0).integers(1, 100, (3, 2, 2, 2)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), image)
    outcome = prediction.predict([found.path], [image], image.parent / "out", Communicator(), eager=True)
    if outcome.failures:
        raise UserError(outcome.failures[0])
    (one,) = outcome.segmented
    labels, _ = read_labels(one.output, found.state["label_values"])
    assert labels.max() < found.config["classes"]
    assert np.isclose(sum(one.millilitres.values()), np.count_nonzero(labels) / 1000)


def goes_on(found: checkpoint.Checkpoint) -> None:
    resume._check(found)
    settings = resume.settings_of(resume.Resumed(found.path.parent, found, found, []), {})
    assert settings.timeline is None
    assert settings.output == str(found.path.parent.parent)
    settings.check()
    assert np.isfinite(schedule_of(settings, 3)(int(found.optimizer["steps"])))
    state = found.state
    assert all(np.isfinite(overall(entry["validation"])) for entry in state["history"])
    assert np.isfinite(np.array(state["sums"]) + state["seconds"]).all()


# --- Running them --------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, Callable[[Path, Generator, int], None]]] = {
    "nifti": ("case.nii.gz", nifti_case),
    "checkpoints": ("latest.npz", checkpoint_case),
}


def check_line(path: Path, error: Exception) -> None:
    line = str(error)
    assert "\n" not in line
    assert str(path.parent) in line  # the file, or an image beside it
    assert "not enough memory" not in line


def load_kernels() -> None:
    """Predict once: kernels are compiled, or read from their cache, before a case has its time."""
    for dtype in (np.float32, np.float64):
        model = UNet(in_channels=2, classes=3, filters=2, depth=2, dropout=0.5).astype(dtype)
        segment(model, np.ones((2, 2, 2, 2), np.float32))


def run(kind: str, cases: int, seed: int, folder: Path, megabytes: int = 64) -> Counter[str]:
    """Try cases, and count those that were read and those that were refused; raise at the first fault."""
    name, case = KINDS[kind]
    counted: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, _too_long)
    load_kernels()
    for number in range(cases):
        signal.alarm(10)
        try:
            case(folder / name, np.random.default_rng([seed, number]), megabytes)
            counted["read"] += 1
        except UserError as error:
            check_line(folder / name, error)
            counted["refused"] += 1
            words = re.sub(r"[\d.+e-]*\d", "N", str(error).removeprefix(f"{folder / name}: "))
            counted["  " + " ".join(words.split()[:5])] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed} of {kind}: {error!r}") from error
        finally:
            signal.alarm(0)
    return counted


def _too_long(*_: object) -> None:
    raise TimeoutError("a case took more than ten seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        run(options.kind, 20, 10**6, Path(folder))  # kernels are loaded, before memory is bounded
        zeros(4096)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 2**29
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            found = run(options.kind, options.cases, options.seed, Path(folder), 4096)
        except AssertionError:
            traceback.print_exc(file=sys.stdout)
            raise SystemExit(1) from None
    for line, count in found.most_common(40):
        print(f"{count:6} {line}")


if __name__ == "__main__":
    main()
