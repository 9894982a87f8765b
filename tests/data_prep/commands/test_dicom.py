import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from distributed import Client
from typer.testing import CliRunner, Result

from common.ct.geometry import axial_slices
from common.shards.shards import ShardSet
from data_prep import __main__ as module

Write = Callable[..., list[Path]]


@pytest.fixture
def invoke(dask: Client, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command on the workers that all tests share."""

    @contextmanager
    def shared_client(*_: object) -> Iterator[Client]:
        yield dask

    for place in ("prepare", "dicom"):
        monkeypatch.setattr(f"data_prep.commands.{place}.dask_client", shared_client)
    return lambda *arguments: CliRunner().invoke(
        module.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )


def hu(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 600, (4, 17, 19)).astype(np.int16)


def test_a_tree_of_series_is_written_with_label_maps(
    tmp_path: Path, invoke: Callable[..., Result], write_series: Write, save_nifti: Callable[..., Path]
) -> None:
    write_series(tmp_path / "in" / "study ä" / "1", hu(1), series="1.2.3")
    write_series(tmp_path / "in" / "study ä" / "2", hu(2), (-1, 0, 0, 0, -1, 0), series="1.2.4")
    (tmp_path / "in" / "DICOMDIR").write_bytes(b"no preamble")
    # The label map of the prone series, on its CT's voxels and in another order of axes.
    ids = np.arange(4 * 17 * 19).reshape(4, 17, 19).astype(np.uint8) % 118
    affine = np.array([[0.7, 0, 0, 5], [0, 0.8, 0, 7], [0, 0, 1.5, -100], [0, 0, 0, 1]])
    image = nib.Nifti1Image(ids.T, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("SPL"))
    turned = image.as_reoriented(turn)
    save_nifti(tmp_path / "masks" / "1.2.4.nii.gz", np.asarray(turned.dataobj), turned.affine)
    answer = invoke(
        "dicom", tmp_path / "in", "--out", tmp_path / "out", "--split", "valid", "--masks", tmp_path / "masks"
    )
    assert answer.exit_code == 0, answer.output
    shards = ShardSet(tmp_path / "out", "valid")
    assert [(entry.volume, entry.source, entry.has_ts) for entry in shards.volumes] == [
        ("1_2_3", "study ä/1", False),
        ("1_2_4", "study ä/2", True),
    ]
    for volume_id, expected in enumerate((hu(1), hu(2)[:, ::-1, ::-1])):
        slices = np.stack([shards.read_slab(volume_id, z, 1).read_ct(0) for z in range(4)])
        np.testing.assert_array_equal(slices, expected)
        assert shards.volumes[volume_id].spacing_mm == pytest.approx((0.7, 0.8, 1.5))
        assert re.fullmatch("[0-9a-f]{64}", shards.volumes[volume_id].source_sha256)
    rows, columns = (((np.arange(128) + 0.5) * size / 128).astype(int) for size in (17, 19))
    expected_ids = ids[:, ::-1, ::-1][:, rows][:, :, columns]
    np.testing.assert_array_equal(shards.read_slab(1, 0, 4).read_ts(), expected_ids)


def test_a_series_with_a_gap_is_listed_and_the_others_are_written(
    tmp_path: Path, invoke: Callable[..., Result], write_series: Write
) -> None:
    write_series(tmp_path / "in" / "1", hu(1), series="1.2.3")
    write_series(tmp_path / "in" / "2", hu(2), series="1.2.4")[2].unlink()
    answer = invoke("dicom", tmp_path / "in", "--out", tmp_path / "out")
    assert answer.exit_code == 1
    assert re.search(r"left out: missing slices +│ +1", answer.stdout)
    assert [entry.volume for entry in ShardSet(tmp_path / "out", "train").volumes] == ["1_2_3"]
    assert "1_2_4,train,missing slices," in (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8")


def test_the_command_explains_itself(invoke: Callable[..., Result]) -> None:
    answer = invoke("dicom", "--help")
    assert answer.exit_code == 0
    assert "Example: python -m data_prep dicom /data/export" in answer.output


@pytest.mark.real_ct
def test_a_real_series_and_its_label_map_become_the_shard_of_their_nifti(
    real_ct_dir: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    """The label map is stored as LAS and lies on the series by its affine alone."""
    links = {"dicom": "series", "nifti": "ct_native.nii.gz", "masks": "seg117_native.nii.gz"}
    for folder, name in links.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).symlink_to(real_ct_dir / f"totalseg_dicom_{name}")
    answer = invoke("dicom", real_ct_dir / "totalseg_dicom_series", "--out", tmp_path / "probe")
    assert answer.exit_code == 0, answer.output
    volume = ShardSet(tmp_path / "probe", "train").volumes[0].volume
    (tmp_path / "masks" / links["masks"]).rename(tmp_path / "masks" / f"{volume}.nii.gz")
    (tmp_path / "nifti" / links["nifti"]).rename(tmp_path / "nifti" / f"{volume}.nii.gz")
    for command, folder in (("dicom", real_ct_dir / "totalseg_dicom_series"), ("nifti", tmp_path / "nifti")):
        answer = invoke(command, folder, "--out", tmp_path / "out" / command, "--masks", tmp_path / "masks")
        assert answer.exit_code == 0, answer.output
    a, b = (ShardSet(tmp_path / "out" / command, "train") for command in ("dicom", "nifti"))
    np.testing.assert_array_equal(a.read_slab(0, 0, 20).read_ts(), b.read_slab(0, 0, 20).read_ts())
    nifti = nib.load(real_ct_dir / "totalseg_dicom_ct_native.nii.gz")
    expected, _ = axial_slices(np.asarray(nifti.dataobj), nifti.affine)
    for z in range(20):
        np.testing.assert_array_equal(a.read_slab(0, z, 1).read_ct(0), expected[z])
        np.testing.assert_array_equal(b.read_slab(0, z, 1).read_ct(0), expected[z])
