"""What names of classes tell, and the table of what numbers in label files mean."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tinyunet.data.conventions import CONVENTIONS, decide, key_of, numbers_of, read_as, tumour_parts

# As the releases say: whole tumour, tumour core and enhancing tumour as numbers in the files.
REGIONS = {
    "decathlon": ({1, 2, 3}, {2, 3}, {3}),
    "brats2015": ({1, 2, 3, 4}, {1, 3, 4}, {4}),
    "brats2018": ({1, 2, 4}, {1, 4}, {4}),
    "brats2023": ({1, 2, 3}, {1, 3}, {3}),
    "brats2024": ({1, 2, 3}, {1, 3}, {3}),
    "brats-met": ({1, 2, 3}, {1, 3}, {3}),
    "brats-ped": ({1, 2, 3, 4}, {1, 2, 3}, {1}),
}


@pytest.mark.parametrize("key", CONVENTIONS)
def test_the_table_has_the_regions_of_the_releases(key: str) -> None:
    convention = CONVENTIONS[key]
    names, numbers, _ = convention.classes()
    assert sorted(numbers) == [0, *sorted(convention.meaning)]
    assert [convention.meaning.get(n, "background") for n in numbers] == [*names]
    parts = tumour_parts(names)
    if key not in REGIONS:
        assert parts is None
        return
    assert parts is not None
    by_number = dict(zip(numbers, parts, strict=True))
    for least, numbers in zip((1, 2, 3), REGIONS[key], strict=True):
        assert {number for number, part in by_number.items() if part >= least} == numbers


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("necrosis", "edema", "enhancing tumour"), (0, 2, 1, 3)),
        (("Enhancing tumor", "Non-enhancing tumor", "Peritumoral oedema"), (0, 3, 2, 1)),
        (("edema", "core", "enhancing"), (0, 1, 2, 3)),
        (("NCR", "ED", "ET"), (0, 2, 1, 3)),
        (("NETC", "SNFH", "ET", "RC"), (0, 2, 1, 3, 0)),
        (("surrounding non-enhancing FLAIR hyperintensity", "NCR/NET", "ET"), (0, 1, 2, 3)),
        (("nonenhancing", "non contrast-enhancing", "edema", "ET"), (0, 2, 2, 1, 3)),
        (("label_1", "label_2", "label_3"), None),
        (("edema", "non-enhancing core", "enhancing core"), None),
        (("enhancing core", "edema", "non-enhancing core"), None),
        (("edema", "edema left", "core", "enhancing"), None),
        (("edema", "core", "enhancing", "enhancing elsewhere"), None),
        (("edema", "enhancing"), None),
        (("whole tumour", "tumour core", "enhancing tumour"), None),
        (("edema", "core", "enhancing", "liver"), None),
        (("without edema", "core", "enhancing"), None),
        (("edema and necrosis", "core", "enhancing"), None),
    ],
)
def test_regions_only_where_names_say_so(names: Sequence[str], parts: tuple[int, ...] | None) -> None:
    assert tumour_parts(("background", *names)) == parts


@pytest.mark.parametrize(
    ("names", "key", "values"),
    [
        (("edema", "non-enhancing tumor", "enhancing tumour"), "brats2018", (0, 2, 1, 4)),
        (("necrosis", "edema", "enhancing tumour"), "brats2018", (0, 1, 2, 4)),
        (("edema", "non-enhancing tumor", "enhancing tumour"), "brats-ped", (0, 4, 2, 1)),
        (("edema", "core", "ET", "resection cavity"), "brats2024", (0, 2, 1, 3, 4)),
        (("edema", "core", "ET", "resection cavity"), "brats2023", (0, 2, 1, 3, None)),
        (("edema", "core", "ET"), "brats2015", None),  # which of its two cores?
        (("CSF", "grey matter", "white matter"), "brats2018", None),
        (("edema",), "brats2018", (0, 2)),
    ],
)
def test_numbers_of_classes(names: Sequence[str], key: str, values: tuple[int | None, ...] | None) -> None:
    assert numbers_of(("background", *names), CONVENTIONS[key].meaning) == values


def test_no_more_files_are_read_than_needed() -> None:
    files = iter([{0, 1, 2}, {0, 4}])
    paths = [Path("BraTS-PED-00001-000-seg.nii.gz")] * 3  # of 2023 or later
    assert decide("here", paths, lambda _: next(files)).key == "brats-ped"


def test_a_cavity_is_looked_for_from_the_first_file_to_the_last() -> None:
    paths = [Path(f"BraTS-MET-{number:05}-000-seg.nii.gz") for number in range(1000)]
    read: list[Path] = []

    def numbers(path: Path) -> set[int]:
        read.append(path)
        return {0, 1, 4} if path in paths[900:] else {0, 1, 2, 3}

    assert decide("here", paths, numbers).key == "brats-met"
    assert len(read) < 60


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("brats2023-ped", "brats-ped"),
        ("BraTS2026-PED", "brats-ped"),
        ("brats2021", "brats2018"),
        ("brats2023-gli", "brats2023"),
        ("brats2025-gli", "brats2024"),
        ("brats2024-mets", "brats-met"),
        ("brats2024-men-rt", "brats-men-rt"),
        ("brats2024-ssa", "brats2023"),
        ("msd", "decathlon"),
        ("brats-ped", "brats-ped"),
        ("brats2024-men", "brats2024-men"),  # no such release
        ("brats1999", "brats1999"),
    ],
)
def test_names_of_releases(text: str, key: str) -> None:
    assert key_of(text) == key


def test_the_line() -> None:
    line = read_as(("background", "edema", "label 7"), (0, 2, 7), "dataset.json")
    assert line == "labels read as: 2 edema, 7 (dataset.json)"
    assert re.fullmatch("labels read as: 1 liver", read_as(("", "liver"), (0, 1), ""))
