"""Each volume is embedded once, by one process, under every strategy that lacks it."""

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from pydicom import Dataset

from common.ct.rejection import EXCLUDED, RejectedError
from common.embeddings.store import EmbeddingStoreWriter
from common.embeddings.work import (
    CTSlices,
    CTSource,
    ct_sources,
    embedding_work,
    report_embedded,
    report_rejected,
    store_folders,
)
from common.shards.writer import write_shard
from tests.noise_volume import noise_volume

STRATEGIES = ["raw_32", "cropped_32"]
SOURCES = [
    CTSource(volume, lambda: CTSlices(np.zeros((2, 4, 4), np.int16), (1, 1, 1))) for volume in "abcdefg"
]


def embed(folder: Path, strategy: str, volumes: str, **notes: Any) -> None:
    identity = {"encoder": "x", "encoder_id": "x", "slice_order": "feet_to_head", "token_kind": "slice"}
    with EmbeddingStoreWriter(folder, identity | {"preprocessing": strategy}, "float16") as writer:
        for volume in volumes:
            writer.add(volume, torch.ones(2, 3), (1, 1, 1), **notes)


def test_one_strategy_has_the_folder_and_several_a_sub_folder_each() -> None:
    assert store_folders("out", STRATEGIES[:1]) == {"raw_32": Path("out")}
    assert store_folders("out", STRATEGIES) == {
        "raw_32": Path("out/raw_32"),
        "cropped_32": Path("out/cropped_32"),
    }


def test_what_is_embedded_is_done(tmp_path: Path) -> None:
    folders = store_folders(tmp_path, STRATEGIES)
    embed(folders["raw_32"], "raw_32", "ab")
    embed(folders["cropped_32"], "cropped_32", "bc")
    work = embedding_work(SOURCES[:4], folders)
    assert [(source.volume, source.stores) for source in work] == [
        ("a", ("cropped_32",)),
        ("c", ("raw_32",)),
        ("d", ("raw_32", "cropped_32")),
    ]


def test_ranks_share_what_is_left(tmp_path: Path) -> None:
    folders = store_folders(tmp_path, STRATEGIES[:1])
    embed(tmp_path, "raw_32", "b")
    shares = []
    for rank in range(3):
        with mock.patch("common.embeddings.work.rank_and_ranks", return_value=(rank, 3)):
            work = embedding_work(SOURCES, folders)
        shares.append("".join(source.volume for source in work))
    assert shares == ["ae", "cf", "dg"]


SHAPE_ZYX = (4, 17, 19)
LPS = np.diag([-0.7, -0.8, 1.5, 1.0])


def hu(seed: int = 0) -> np.ndarray:
    """Canonical slices (Z, H, W) that have air in them."""
    return np.random.default_rng(seed).integers(-1000, 1000, SHAPE_ZYX).astype(np.int16)


@pytest.fixture
def folder(tmp_path: Path, save_nifti: Callable[..., Path], write_series: Callable[..., list[Path]]) -> Path:
    """One scan as NIfTI, npz (of its own spacing) and DICOM, beside files that are none."""
    root = tmp_path / "ct"
    save_nifti(root / "a" / "scan.nii.gz", hu().T, LPS)
    np.savez_compressed(root / "trn1.npz", ct=hu()[::-1])
    write_series(root / "dicom", hu())
    (root / "notes.txt").write_text("notes")
    return root


def test_one_scan_in_three_formats_is_the_same(folder: Path) -> None:
    sources, rejected = ct_sources(folder)
    assert rejected == []
    assert [source.volume for source in sources] == ["1_2_840_99_7", "scan", "trn1"]
    dicom, nifti, npz = (source.read() for source in sources)
    expected = np.full((4, 19, 19), -1024, np.int16)
    expected[:, 1:18] = hu()
    for ct in (dicom, nifti, npz):
        np.testing.assert_array_equal(ct.hu, expected)
        assert ct.hu.flags.c_contiguous
    assert dicom.spacing_mm == pytest.approx((0.7, 0.8, 1.5))
    assert nifti.spacing_mm == pytest.approx((0.7, 0.8, 1.5))
    assert npz.spacing_mm == pytest.approx((0.8, 0.8, 0.8))


def test_one_file_is_enough(folder: Path) -> None:
    ((source,), _) = ct_sources(folder / "a" / "scan.nii.gz")
    assert source.volume == "scan"
    ((source,), _) = ct_sources(folder / "dicom")
    assert source.volume == "1_2_840_99_7"


def test_shards_are_read_like_the_files_they_came_from(tmp_path: Path) -> None:
    volumes = [noise_volume(name, ts=False, ct=hu(seed)) for seed, name in enumerate(("v2", "v1"))]
    write_shard(tmp_path / "train-000000.tar", volumes)
    sources, rejected = ct_sources(tmp_path, split="train")
    assert rejected == []
    assert [source.volume for source in sources] == ["v1", "v2"]
    ct = sources[0].read()
    np.testing.assert_array_equal(ct.hu[:, 1:18], hu(1))
    assert ct.spacing_mm == (0.7, 0.8, 1.5)
    with pytest.raises(FileNotFoundError, match=r"split 'valid' in .*\['train'\]"):
        ct_sources(tmp_path, split="valid")


def test_a_csv_names_a_subset_and_a_list_leaves_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subset = tmp_path / "subset.csv"
    subset.write_text("split,VolumeName\ntrain,scan.nii.gz\ntrain,trn1.npz\ntrain,other\n")
    with caplog.at_level("INFO"):
        sources, _ = ct_sources(folder, subset_csv=subset)
    assert [source.volume for source in sources] == ["scan", "trn1"]
    assert (
        f"1 of 3 names in subset_csv '{subset}' are no volume of '{folder}', such as 'other'." in caplog.text
    )
    assert "2 of 3 volumes in" in caplog.text
    skip = tmp_path / "no_chest.txt"
    skip.write_text("dataset/train/a/scan.nii.gz\n")
    sources, _ = ct_sources(folder, subset_csv=subset, skip_list=skip)
    assert [source.volume for source in sources] == ["trn1"]
    skip.write_text("trn1.npz\n")
    sources, _ = ct_sources(folder, subset_csv=subset, skip_list=skip)
    assert [source.volume for source in sources] == ["scan"]
    skip.write_text("of_another_split\n")
    assert len(ct_sources(folder, skip_list=skip)[0]) == 3
    assert f"1 of 1 names in skip_list '{skip}' are no volume" in caplog.text


def test_a_list_names_volumes_of_shards_too(tmp_path: Path) -> None:
    volumes = [noise_volume(name, ts=False, source=f"{name}/ct.nii.gz") for name in ("s0", "s1", "s2")]
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "train-000000.tar", volumes)
    (tmp_path / "list.txt").write_text("s0/ct.nii.gz\ns2.nii\n")
    sources, _ = ct_sources(tmp_path / "in", split="train", subset_csv=tmp_path / "list.txt")
    assert [source.volume for source in sources] == ["s0", "s2"]


def test_a_volume_is_no_larger_than_a_ct_once_it_is_padded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.ct.geometry.MAX_VOXELS", 4 * 17 * 19)
    ((source,), _) = ct_sources(folder / "a" / "scan.nii.gz")
    with pytest.raises(RejectedError, match=r"a CT must have at most 1,292 voxels, got shape \(4, 19, 19\)"):
        source.read()


def test_an_npz_of_one_slice_is_rejected(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "trn1.npz", ct=hu()[:1])
    ((source,), _) = ct_sources(tmp_path)
    with pytest.raises(RejectedError, match="volume must have at least 2 slices, got 1"):
        source.read()


def test_a_subset_without_a_volume_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    subset = tmp_path / "subset.csv"
    subset.write_text("VolumeName\nother\n")
    with pytest.raises(FileNotFoundError, match="subset_csv '.*subset.csv'"):
        ct_sources(folder, subset_csv=subset)
    with pytest.raises(FileNotFoundError, match="subset_csv.*'none.csv'"):
        ct_sources(folder, subset_csv="none.csv")


def test_a_folder_of_scouts_alone_is_an_error(
    tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    """Beside CTs they are left out in silence; alone, a run would end well with nothing done."""
    write_series(tmp_path / "coronal", hu(), orientation=(1, 0, 0, 0, 0, -1))
    with pytest.raises(FileNotFoundError, match="1 were left out, such as: a series must hold axial"):
        ct_sources(tmp_path)


def test_every_message_names_its_file(tmp_path: Path, save_nifti: Callable[..., Path]) -> None:
    path = save_nifti(tmp_path / "two.nii.gz", np.zeros((3, 4, 5, 2), np.int16), LPS)
    ((source,), _) = ct_sources(path)
    with pytest.raises(
        RejectedError, match=f"geometry: '{path}': volume must have 3 axes, got shape .* Save one"
    ):
        source.read()


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(FileNotFoundError, match=f"No volumes in '{tmp_path}'"):
        ct_sources(tmp_path)
    with pytest.raises(FileNotFoundError, match="none'"):
        ct_sources(tmp_path / "none")


CUT = RejectedError("unreadable", "cut\noff").of("b")
TWICE = RejectedError("duplicate", "two files").of("a")
LEFT_OUT = RejectedError(EXCLUDED, "no chest").of("c")


def test_the_list_is_sorted_and_complete_and_goes_with_the_last_of_them(tmp_path):
    failed = report_rejected(tmp_path / "out", [CUT, TWICE, LEFT_OUT, CUT], num_volumes=10, max_rejected=0.2)
    with (tmp_path / "out" / "rejected.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["volume", "reason", "detail"]
    assert rows[1:] == [["a", "duplicate", "two files"], ["b", "unreadable", "cut off"], list(LEFT_OUT)]
    assert failed == 2
    report_rejected(tmp_path / "out", [], num_volumes=10, max_rejected=0.2)
    assert not (tmp_path / "out" / "rejected.csv").exists()


def test_a_name_that_is_no_text_is_listed(tmp_path):
    report_rejected(tmp_path, [RejectedError("unreadable", "M\udcfcller.nii").of("M")], 10, 0.2)
    assert "M,unreadable,M\\udcfcller.nii" in (tmp_path / "rejected.csv").read_text(encoding="utf-8")


def test_a_larger_share_than_allowed_is_an_error_that_names_one(tmp_path):
    with pytest.raises(ValueError, match=r"20\.00%.*10\.00%: 2, such as 'a': two files.*rejected\.csv"):
        report_rejected(tmp_path, [CUT, TWICE, LEFT_OUT], num_volumes=10, max_rejected=0.1)
    # volumes that were never meant to be used do not count
    report_rejected(tmp_path, [LEFT_OUT] * 5, num_volumes=5, max_rejected=0.0)


def test_the_last_line_of_a_run_says_what_lies_where_and_what_of_it_is_doubtful(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folders = store_folders(tmp_path, STRATEGIES)
    report_embedded(tmp_path, folders.values(), 0, 0)
    embed(folders["raw_32"], "raw_32", "a")
    embed(folders["raw_32"], "raw_32", "b", doubts=["mirrored?", "short"])
    embed(folders["cropped_32"], "cropped_32", "bc", doubts=["mirrored?"])
    report_embedded(tmp_path, folders.values(), 5, 2)
    nothing, doubts, line = caplog.messages
    assert "0 volumes" in nothing
    assert (
        f"2 embedded volumes are doubtful, such as 'b': mirrored?. EmbeddingStore('{tmp_path}/raw" in doubts
    )
    assert f"3 volumes in '{tmp_path}', 2 of them doubtful; 2 rejected" in line
    assert f"'{tmp_path / 'rejected.csv'}'" in line


def two_series(write_series: Callable[..., list[Path]], folder: Path, same_study: bool = True) -> None:
    hu = np.random.default_rng(0).integers(-900, 300, (7, 6, 9)).astype(np.int16)
    for number, (uid, kernel) in enumerate({"1.2.84.7": "B30f", "1.2.84.8": ["Br40f", "3"]}.items()):

        def describe(z: int, dataset: Dataset, kernel: object = kernel, number: int = number) -> None:
            dataset.StudyInstanceUID = f"1.2.84.{0 if same_study else number}"
            dataset.SeriesDescription, dataset.ConvolutionKernel = "THORAX", kernel

        write_series(folder / f"s{number}", hu[: 7 - number], series=uid, edit=describe)


def test_several_series_of_one_study_are_shown_in_a_table_and_one_is_chosen(
    write_series: Callable[..., list[Path]], tmp_path: Path
) -> None:
    two_series(write_series, tmp_path / "study")
    with pytest.raises(ValueError, match="--series") as caught:
        ct_sources(tmp_path / "study")
    rows = [line.split() for line in str(caught.value).splitlines()[-2:]]
    assert [(row[0], row[1]) for row in rows] == [("1_2_84_7", "7"), ("1_2_84_8", "6")]
    assert " ".join(rows[0][2:]) == f"(0.7, 0.8, 1.5) THORAX B30f {tmp_path / 'study' / 's0'}"
    assert " ".join(rows[1][5:]) == f"THORAX ['Br40f', '3'] {tmp_path}/study/s1"
    for chosen, volumes in (
        ("1_2_84_8", ["1_2_84_8"]),
        ("1.2.84.7", ["1_2_84_7"]),
        ("all", ["1_2_84_7", "1_2_84_8"]),
    ):
        found, _ = ct_sources(tmp_path / "study", series=chosen)
        assert [source.volume for source in found] == volumes
    with pytest.raises(ValueError, match=r"series.*1\.2\.84\.9.*1_2_84_7, 1_2_84_8"):
        ct_sources(tmp_path / "study", series="1.2.84.9")


def test_series_of_several_studies_are_a_cohort(
    write_series: Callable[..., list[Path]], tmp_path: Path
) -> None:
    two_series(write_series, tmp_path, same_study=False)
    assert len(ct_sources(tmp_path)[0]) == 2
