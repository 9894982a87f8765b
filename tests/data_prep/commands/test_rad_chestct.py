import csv
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from distributed import Client
from typer.testing import CliRunner, Result

from common.ct.npz import npz_affine
from common.shards.shards import ShardSet
from data_prep import __main__ as module
from data_prep.phantom.cohort import Settings, write_cohort
from data_prep.phantom.files import npz_bytes, rad_chestct_array
from data_prep.phantom.population import roster
from data_prep.phantom.scan import Volume, render

Save = Callable[[Path, np.ndarray, np.ndarray], Path]


@pytest.fixture
def invoke(dask: Client, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command on the workers that all tests share."""

    @contextmanager
    def shared_client(*_: object) -> Iterator[Client]:
        yield dask

    monkeypatch.setattr("data_prep.commands.prepare.dask_client", shared_client)
    return lambda *arguments: CliRunner().invoke(
        module.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )


@pytest.fixture(scope="module")
def phantom() -> Volume:
    """A rendered chest, clipped as RAD-ChestCT is, on cubes of 0.8 mm, all axes of other sizes."""
    drawn = render(roster(1, seed=2)[0], "b", 40, (8.0, 8.0), {})
    hu = drawn.hu[:, :-3].clip(-1000, 1000)
    assert len({*hu.shape}) == 3
    return drawn._replace(hu=hu, protocol=drawn.protocol._replace(pixel_mm=0.8, slice_mm=0.8))


def slices(folder: Path, split: str) -> np.ndarray:
    shards = ShardSet(folder, split)
    return np.stack([shards.read_slab(0, z, 1).read_ct(0) for z in range(shards.volumes[0].num_slices)])


def test_a_scan_stored_both_ways_gives_the_same_shards(
    phantom: Volume, tmp_path: Path, invoke: Callable[..., Result], save_nifti: Save
) -> None:
    """Once as NIfTI in LPS, once as npz in (I, P, L), with a label map in an orientation of its own."""
    for folder in ("nifti", "rad", "masks"):
        (tmp_path / folder).mkdir()
    affine = np.diag([-0.8, -0.8, 0.8, 1])
    save_nifti(tmp_path / "nifti" / "trn00001.nii.gz", phantom.hu.T, affine)
    (tmp_path / "rad" / "trn00001.npz").write_bytes(npz_bytes(rad_chestct_array(phantom, 0.8)))
    ids = phantom.ts[:, :-3].astype(np.uint8)
    on_npz = nib.Nifti1Image(ids[::-1], npz_affine())
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(on_npz.affine), nib.orientations.axcodes2ornt("RAS")
    )
    nib.save(on_npz.as_reoriented(turn), tmp_path / "masks" / "trn00001.nii.gz")
    for arguments in (
        ("nifti", tmp_path / "nifti", "--out", tmp_path / "a"),
        ("rad-chestct", "--root", tmp_path / "rad", "--split", "train", "--out", tmp_path / "b")
        + ("--totalsegmentator", tmp_path / "masks"),
    ):
        answer = invoke(*arguments)
        assert answer.exit_code == 0, answer.output
    np.testing.assert_array_equal(slices(tmp_path / "a", "train"), phantom.hu)
    np.testing.assert_array_equal(slices(tmp_path / "b", "train"), phantom.hu)
    shards = ShardSet(tmp_path / "b", "train")
    assert shards.volumes[0].spacing_mm == pytest.approx((0.8, 0.8, 0.8))
    rows, columns = (((np.arange(128) + 0.5) * size / 128).astype(int) for size in ids.shape[1:])
    np.testing.assert_array_equal(shards.read_slab(0, 0, len(ids)).read_ts(), ids[:, rows][:, :, columns])


def test_a_phantom_download_is_written_with_its_labels(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    settings = Settings(seed=3, site="b", matrix=40, slice_mm=(8.0, 8.0), npz_spacing_mm=8.0)
    assert len(list(write_cohort(tmp_path, 2, settings, 1))) == 2
    volumes = sorted((tmp_path / "rad_chestct").glob("*.npz"))
    split = {"trn": "train", "val": "valid", "tst": "test"}[volumes[0].stem[:3]]
    bad = volumes[0].with_name(f"{volumes[0].stem[:3]}99999.npz")
    bad.write_bytes(b"<html><body>Too many requests</body></html>")
    arguments = ("rad-chestct", "--root", tmp_path, "--split", split, "--out", tmp_path / "out")
    answer = invoke(*arguments)
    assert answer.exit_code == 1
    assert re.search(r"left out: unreadable +│ +1", answer.stdout)
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["volume"] == bad.stem
    assert "got a web page. Copy or download it again" in row["detail"]
    entry = ShardSet(tmp_path / "out", split).volumes[0]
    assert (entry.volume, entry.source) == (volumes[0].stem, f"rad_chestct/{volumes[0].name}")
    assert entry.source_sha256 == hashlib.sha256(volumes[0].read_bytes()).hexdigest()
    assert entry.spacing_mm == pytest.approx((8, 8, 8))
    assert entry.labels is not None
    with np.load(volumes[0]) as arrays:
        np.testing.assert_array_equal(slices(tmp_path / "out", split), arrays["ct"][::-1])


def test_the_command_explains_itself(invoke: Callable[..., Result]) -> None:
    answer = invoke("rad-chestct", "--help")
    assert answer.exit_code == 0
    assert "Example: python -m data_prep rad-chestct --root" in answer.output
