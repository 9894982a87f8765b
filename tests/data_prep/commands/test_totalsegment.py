import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.shards.shards import ShardSet
from tests.data_prep.conftest import cells_of

SHAPE_XYZ = (140, 150, 5)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
PARTS = (
    "Dataset291_TotalSegmentator_part1_organs_1559subj",
    "Dataset292_TotalSegmentator_part2_vertebrae_1532subj",
    "Dataset293_TotalSegmentator_part3_cardiac_1559subj",
    "Dataset294_TotalSegmentator_part4_muscles_1559subj",
    "Dataset295_TotalSegmentator_part5_ribs_1559subj",
)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders named like those of the weights, which is all that is asked of them before the call."""
    for name in PARTS:
        (tmp_path / "weights" / name).mkdir(parents=True)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def answer_with(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the place of the one that needs weights; it must be called as that one can be."""
    from totalsegmentator import python_api

    signature = inspect.signature(python_api.totalsegmentator)

    def replace(segment: Callable[..., Any]) -> None:
        def totalsegmentator(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            assert (call["ml"], call["task"], call["device"]) == (True, "total", "cpu")
            return segment(call["input"])

        monkeypatch.setattr(python_api, "totalsegmentator", totalsegmentator)

    return replace


def radiological(image: nib.Nifti1Image) -> np.ndarray:
    """The voxels as (Z, H, W): reoriented by nibabel alone."""
    lps = nib.orientations.axcodes2ornt("LPS")
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), lps))
    return np.asarray(turned.dataobj).transpose(2, 1, 0)


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, SHAPE_XYZ, np.int16)


def ids_of(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Ids made of the HU, so that another volume's or another order would show."""
    ids = (np.asarray(image.dataobj).astype(int) % 118).astype(np.uint8)
    return nib.Nifti1Image(ids, image.affine, image.header)


def test_a_folder_is_segmented_and_becomes_shards_with_its_masks(
    answer_with, run_command, tmp_path, save_nifti
) -> None:
    for seed, name in enumerate(("sub/a.nii.gz", "b.nii")):
        save_nifti(tmp_path / "in" / name, scan(seed), AFFINE)
    answer_with(ids_of)
    masks = tmp_path / "masks"
    first = run_command("totalsegment", tmp_path / "in", "--out", masks, "--device", "cpu")
    assert first.exit_code == 0, first.output
    assert re.search(r"segmented +│ +2", first.stdout), first.stdout
    again = run_command("totalsegment", tmp_path / "in", "--out", masks, "--device", "cpu")
    assert re.search(r"there before +│ +2", again.stdout), again.stdout
    written = run_command(
        "nifti", tmp_path / "in", "--masks", masks, "--out", tmp_path / "out", "--workers", 1
    )
    assert written.exit_code == 0, written.output
    shards = ShardSet(tmp_path / "out", "train")
    assert [entry.volume for entry in shards.volumes] == ["a", "b"]
    for seed in (0, 1):
        expected = cells_of((scan(seed).astype(int) % 118).transpose(2, 1, 0))
        np.testing.assert_array_equal(shards.read_slab(seed, 0, 5).read_ts(), expected)


@pytest.mark.real_ct
def test_real_label_maps_reach_the_shards(answer_with, run_command, real_ct_dir, tmp_path) -> None:
    """The label map that the package's authors publish for this CT, in place of the one the weights make."""
    real = nib.load(real_ct_dir / "totalseg_example_sm_seg117_3mm.nii.gz")
    (tmp_path / "in").mkdir()
    link = tmp_path / "in" / "scan.nii.gz"
    link.symlink_to(real_ct_dir / "totalseg_example_ct_sm_3mm.nii.gz")
    seen: list[np.ndarray] = []

    def segment(image: nib.Nifti1Image) -> nib.Nifti1Image:
        seen.append(np.asarray(image.dataobj))
        return real

    answer_with(segment)
    masks = tmp_path / "masks"
    made = run_command("totalsegment", tmp_path / "in", "--out", masks, "--device", "cpu")
    assert made.exit_code == 0, made.output
    original = nib.load(link)
    np.testing.assert_array_equal(seen[0], np.clip(np.asarray(original.dataobj), -1024, 3071))
    label_map = nib.load(masks / "scan.nii.gz")
    np.testing.assert_array_equal(np.asarray(label_map.dataobj), np.asarray(real.dataobj))
    np.testing.assert_allclose(label_map.affine, original.affine, atol=1e-4)
    written = run_command(
        "nifti", tmp_path / "in", "--masks", masks, "--out", tmp_path / "out", "--workers", 1
    )
    assert written.exit_code == 0, written.output
    shards = ShardSet(tmp_path / "out", "train")
    expected = cells_of(radiological(real))
    np.testing.assert_array_equal(shards.read_slab(0, 0, len(expected)).read_ts(), expected)
    assert len(np.unique(expected)) > 35


@pytest.mark.parametrize(("allowed", "status"), [(None, 1), (0.5, 0)])
def test_volumes_without_a_label_map_are_listed_and_a_failure(
    allowed, status, answer_with, run_command, tmp_path, save_nifti
) -> None:
    save_nifti(tmp_path / "in" / "a.nii.gz", scan(0), AFFINE)
    save_nifti(tmp_path / "in" / "raw.nii.gz", scan(1) + 1024, np.eye(4))
    answer_with(ids_of)
    options = [] if allowed is None else ["--max-rejected", allowed]
    answer = run_command(
        "totalsegment", tmp_path / "in", "--out", tmp_path / "out", "--device", "cpu", *options
    )
    assert answer.exit_code == status, answer.output
    assert re.search(r"left out: v1 or v2 +│ +1", answer.stdout)
    table = (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8")
    assert table.startswith('volume,reason,detail\nraw,v1 or v2,"')
    assert "blank header" in table
    said = re.search(r"50\.00% .*\(1\).*1\.00%.*--max-rejected", answer.stderr)
    assert (said is not None) == (status == 1)


def test_processes_share_a_folder(answer_with, run_command, tmp_path, save_nifti) -> None:
    for seed, name in enumerate("abc"):
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", scan(seed), AFFINE)
    answer_with(ids_of)
    command = ("totalsegment", tmp_path / "in", "--out", tmp_path / "out", "--device", "cpu", "--part")
    names = []
    for part in ("2/2", "1/2", "4/4"):
        assert run_command(*command, part).exit_code == 0
        names.append(sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")))
    everything = [f"{name}.nii.gz" for name in "abc"]
    assert names == [everything[1:2], everything, everything]
    assert (tmp_path / "out" / "rejected-2of2.csv").is_file()


def test_mistakes_end_in_one_line(weights, tmp_path, save_nifti, monkeypatch, mistake) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("requests.api.request", no_network)
    save_nifti(tmp_path / "in" / "a.nii.gz", scan(0), AFFINE)
    outside = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    for arguments, message in (
        ([str(tmp_path / "in"), "--out", str(tmp_path / "in" / "masks")], "out must lie outside '"),
        ([str(tmp_path / "weights"), *outside], "No volume in"),
        ([str(tmp_path / "in"), *outside, "--part", "3/2"], "part must be a part such as 1/4"),
        ([str(tmp_path / "in"), *outside, "--fast"], "No weights of TotalSegmentator in '"),
    ):
        assert message in mistake("totalsegment", *arguments)
