"""Patients of cases, and the split into three parts."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyunet.common.errors import DataError
from tinyunet.data.cases import Case
from tinyunet.data.patients import patient_of, read_patients, split


def named(count: int) -> list[Case]:
    return [Case(f"T_{index:03}", (), Path(), 4, (0, 1)) for index in range(count)]


class TestSplit:
    """Each case in one part, decided by seed and names alone."""

    @given(
        count=st.integers(3, 60),
        train=st.floats(0.01, 0.99),
        validate=st.floats(0.01, 0.99),
        seed=st.integers(0, 2**40),
    )
    def test_each_case_once_and_no_part_empty(
        self, count: int, train: float, validate: float, seed: int
    ) -> None:
        cases = named(count)
        parts = split(cases, train, validate, seed)
        assert sorted(case.name for part in parts for case in part) == [case.name for case in cases]
        assert all(parts)

    def test_a_name_need_not_be_utf8(self) -> None:
        case = replace(named(1)[0], name=os.fsdecode(b"M\xfcller"))
        assert len(split([*named(3), case])) == 3

    def test_sizes(self) -> None:
        assert [len(part) for part in split(named(484))] == [411, 36, 37]
        assert [len(part) for part in split(named(40))] == [34, 3, 3]
        assert [len(part) for part in split(named(10))] == [8, 1, 1]
        assert [len(part) for part in split(named(3))] == [1, 1, 1]
        assert [len(part) for part in split(named(100), 0.5, 0.2)] == [50, 10, 40]

    def test_seed_decides_and_order_does_not(self) -> None:
        cases = named(30)
        assert split(cases, seed=1) == split(cases[::-1], seed=1)
        assert split(cases, seed=1) != split(cases, seed=2)

    def test_is_the_same_everywhere(self) -> None:
        names = [[case.name for case in part] for part in split(named(6), 0.5, seed=7)]
        assert names == [["T_005", "T_000", "T_004"], ["T_002", "T_001"], ["T_003"]]

    def test_of_two_the_second_validates_and_tests(self) -> None:
        train, validation, test = split(named(2))
        assert len(train) == 1
        assert validation == test != train

    @pytest.mark.parametrize(
        ("number", "found"), [(0, "0 labelled cases of 0 patients"), (1, "1 labelled case of 1 patient")]
    )
    def test_too_few(self, number: int, found: str) -> None:
        with pytest.raises(DataError, match=f"^{found}; expected at least 2 patients$"):
            split(named(number))

    @pytest.mark.parametrize("share", [0, 1, -0.1, 85, float("nan")])
    def test_shares(self, share: float) -> None:
        with pytest.raises(ValueError, match=r"^train_test_split: "):
            split(named(5), train_test_split=share)
        with pytest.raises(ValueError, match=r"^validate_test_split: "):
            split(named(5), validate_test_split=share)

    @given(visits=st.lists(st.integers(1, 4), min_size=3, max_size=20), seed=st.integers(0, 99))
    def test_patients_stay_whole(self, visits: list[int], seed: int) -> None:
        names = [f"BraTS-GLI-{n:05}-{k:03}" for n, visit in enumerate(visits) for k in range(visit)]
        parts = split([replace(named(1)[0], name=name) for name in names], 0.6, 0.5, seed)
        assert Counter(case.name for part in parts for case in part) == Counter(names)
        patients = [{case.name[:15] for case in part} for part in parts]
        assert all(patients)
        assert sum(map(len, patients)) == len(visits)

    @given(count=st.integers(4, 30), folds=st.integers(2, 5), seed=st.integers(0, 99))
    def test_each_case_is_the_test_of_one_fold(self, count: int, folds: int, seed: int) -> None:
        cases = named(max(count, folds))
        parts = [split(cases, seed=seed, folds=(folds, fold)) for fold in range(folds)]
        assert Counter(case.name for part in parts for case in part.test) == Counter(
            case.name for case in cases
        )
        sizes = [len(part.test) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for part in parts:
            assert part.train
            assert part.validation
            assert sorted(case.name for each in part for case in each) == [case.name for case in cases]

    def test_more_folds_than_patients(self) -> None:
        with pytest.raises(
            DataError, match="4 labelled cases of 4 patients; expected at least 5 patients for 5 folds"
        ):
            split(named(4), folds=(5, 0))


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("BraTS-GLI-00000-000", "BraTS-GLI-00000"),
        ("BraTS-GLI-00000-001", "BraTS-GLI-00000"),
        ("BraTS-MEN-RT-0013-1", "BraTS-MEN-RT-0013"),
        ("BraTS-MET-00002-000", "BraTS-MET-00002"),
        ("BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB_1"),
        ("BraTS2021_00000", "BraTS2021_00000"),
        ("BRATS_001", "BRATS_001"),
        ("my scan-01-02", "my scan-01-02"),
    ],
)
def test_patients_by_name(case: str, patient: str) -> None:
    assert patient_of(case) == patient


class TestTable:
    """A file that says which patient a case is of."""

    def test_names_of_the_file_come_first(self, tmp_path: Path) -> None:
        (tmp_path / "p.csv").write_text("\ufeffcase,age,patient\nA, 3 ,one\nB,4,one\n")
        of = read_patients(tmp_path / "p.csv")
        assert [of(name) for name in ("A", "B", "C", "BraTS-GLI-1-2")] == ["one", "one", "C", "BraTS-GLI-1"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("case,person\nA,one\n", "line 2 lacks case or patient; expected these two columns"),
            ("case,patient\nA,one\nB,\n", "line 3 lacks case or patient"),
            ("case,patient\nA,one\nA,two\n", "A is of two patients, one and two; expected one"),
        ],
    )
    def test_faults(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            read_patients(tmp_path / "p.csv")

    def test_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00")
        for path in (tmp_path / "p.csv", tmp_path / "none.csv", tmp_path):
            with pytest.raises(DataError, match=r"cannot be read .*; expected CSV with case,patient"):
                read_patients(path)
