import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_max_pool2d

from data_prep.nifti_file import NiftiHeader
from data_prep.rejection import RejectedError
from data_prep.rexgroundingct import Annotation, pool_bits, read_annotations, read_findings

SHAPE_XYZ = (19, 17, 5)
SPACING_MM = (0.7, 0.8, 1.5)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
CT = NiftiHeader(SHAPE_XYZ, AFFINE, 1, 0, is_blank=False)
CODES = ("1a", "2h", "1a")
Write = Callable[..., tuple[Path, Path]]


def findings() -> np.ndarray:
    """Three findings (F, X, Y, Z), two of them of one code and overlapping."""
    masks = np.zeros((3, *SHAPE_XYZ), np.uint8)
    masks[0, 2:5, 3, 1] = 1
    masks[1, 4, 3:9, 1:3] = 1
    masks[2, 4:7, 3, 1] = 255
    return masks


def expected() -> np.ndarray:
    planes = np.zeros(SHAPE_XYZ[::-1], np.uint16)
    for mask, code in zip(findings(), CODES, strict=True):
        planes |= (mask.transpose(2, 1, 0) > 0).astype(np.uint16) << (0 if code == "1a" else 13)
    return pool_bits(planes)


def read(
    array: np.ndarray, folder: Path, affine: np.ndarray = AFFINE, codes: tuple[str, ...] = CODES
) -> np.ndarray:
    nib.save(nib.Nifti1Image(array, affine), folder / "a.nii.gz")
    return read_findings(Annotation(folder / "a.nii.gz", codes), CT, AFFINE, SPACING_MM)


@pytest.mark.parametrize("shape", [(512, 512), (128, 128), (17, 19), (131, 1024), (300, 513)])
def test_cells_cover_all_their_pixels(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random((2, *shape)) < 0.01
    oracle = adaptive_max_pool2d(torch.from_numpy(mask).float(), (128, 128)).numpy() > 0
    np.testing.assert_array_equal(pool_bits(mask.astype(np.uint16) * 4) == 4, oracle)


def test_no_pixel_of_a_finding_is_lost() -> None:
    """Nearest sampling keeps one pixel of sixteen, so most nodules of a few pixels vanish."""
    for row, column in np.random.default_rng(0).integers(0, 512, (50, 2)):
        planes = np.zeros((1, 512, 512), np.uint16)
        planes[0, row, column] = 1
        cells = np.argwhere(pool_bits(planes)[0])
        np.testing.assert_array_equal(cells, [[row // 4, column // 4]])


def test_bits_of_a_cell_are_united() -> None:
    planes = np.zeros((1, 256, 256), np.uint16)
    planes[0, 0, 0], planes[0, 1, 1] = 1, 2**13
    assert pool_bits(planes)[0, 0, 0] == 2**13 + 1


def test_findings_of_one_code_are_united_and_others_keep_their_bit(tmp_path: Path) -> None:
    planes = read(findings(), tmp_path)
    assert planes.dtype == np.uint16
    np.testing.assert_array_equal(planes, expected())
    assert set(np.unique(planes)) == {0, 1, 2**13, 2**13 + 1}


@pytest.mark.parametrize("axcodes", ["LAS", "RAS", "SPL"])
def test_a_header_with_the_spacing_of_the_ct_is_followed(axcodes: str, tmp_path: Path) -> None:
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    turned = [nib.Nifti1Image(mask, AFFINE).as_reoriented(turn) for mask in findings()]
    stored = np.stack([np.asarray(image.dataobj) for image in turned])
    np.testing.assert_array_equal(read(stored, tmp_path, turned[0].affine), expected())


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, -1, 1, 1]), np.diag([0.7, 17, 19, 1])])
def test_a_header_that_says_nothing_leaves_the_masks_on_the_voxels_of_the_ct(
    affine: np.ndarray, tmp_path: Path
) -> None:
    np.testing.assert_array_equal(read(findings(), tmp_path, affine), expected())


def test_three_axes_are_one_finding(tmp_path: Path) -> None:
    four = read(findings()[:1], tmp_path, codes=("2d",))
    three = read(findings()[0], tmp_path, codes=("2d",))
    np.testing.assert_array_equal(three, four)
    assert set(np.unique(three)) == {0, 2**9}


def test_findings_without_a_code_are_left_out(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(findings(), tmp_path, codes=("1a", "", "1a")), expected() & 1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (findings()[:2], r"'a\.nii\.gz' must have one channel a finding, got 3 and shape \(2, 19, 17, 5\)"),
        (findings()[0], r"must have one channel a finding, got 3 and shape \(19, 17, 5\)"),
        (findings()[..., None], r"must have one channel a finding, got 3 and shape \(3, 19, 17, 5, 1\)"),
        (findings()[:, :-1], r"'a\.nii\.gz' must have the CT's shape \(5, 17, 19\), got \(5, 17, 18\)"),
        (np.moveaxis(findings(), 0, 3), "must have one channel a finding, got 3"),
    ],
)
def test_masks_that_do_not_fit_their_ct_are_rejected(array: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=f"mask: .*{message}") as caught:
        read(array, tmp_path)
    assert caught.value.reason == "mask"


def test_annotated_scans_are_those_with_masks_at_hand(write_rex: Write) -> None:
    """The masks of the hidden test set are listed and not published."""
    listing, folder = write_rex(
        {"train_1_a_1": findings()}, {"train_1_a_1": list(CODES), "train_2_a_1": ["1b"]}, AFFINE
    )
    annotations = read_annotations(listing, folder)
    assert annotations == {"train_1_a_1": Annotation(folder / "train_1_a_1.nii.gz", CODES)}


def test_a_name_with_a_path_stays_in_the_folder_of_masks(write_rex: Write) -> None:
    listing, folder = write_rex({"train_1_a_1": findings()}, {"../../train_1_a_1": list(CODES)}, AFFINE)
    assert read_annotations(listing, folder)["train_1_a_1"].path.parent == folder


def test_missing_places_are_named(write_rex: Write, tmp_path: Path) -> None:
    listing, folder = write_rex({}, {"train_1_a_1": list(CODES)}, AFFINE)
    with pytest.raises(FileNotFoundError, match="rexgroundingct must be a JSON file, got '.*x.json'"):
        read_annotations(tmp_path / "x.json", folder)
    with pytest.raises(FileNotFoundError, match="rexgroundingct_masks must be a folder, got '.*nowhere'"):
        read_annotations(listing, tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match="rexgroundingct_masks must hold masks of scans in .*, got none"
    ):
        read_annotations(listing, folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"train": [{"name": "a.nii.gz"}]}', '{"train": 3}'])
def test_a_listing_of_another_form_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"x\.json' must be \{split: \[\{name, findings, categories\}\]\}, got"
    ):
        read_annotations(tmp_path / "x.json", tmp_path)


def test_a_channel_without_category_is_refused(tmp_path: Path) -> None:
    item = {"name": "a.nii.gz", "categories": {"0": "1a", "2": "1b"}}
    (tmp_path / "x.json").write_text(json.dumps({"train": [item]}))
    with pytest.raises(ValueError, match="must be .*categories.*, got KeyError: '1'"):
        read_annotations(tmp_path / "x.json", tmp_path)


def test_unknown_categories_and_scans_listed_twice_are_refused(write_rex: Write, tmp_path: Path) -> None:
    listing, folder = write_rex({"train_1_a_1": findings()}, {"train_1_a_1": ["1a", "9z", "1a"]}, AFFINE)
    with pytest.raises(ValueError, match=r"categories must be among .* or empty, got \['9z'\]"):
        read_annotations(listing, folder)
    item = {"name": "train_1_a_1.nii.gz", "categories": {"0": "1a"}}
    listing.write_text(json.dumps({"train": [item], "val": [item]}))
    with pytest.raises(ValueError, match="a scan must come once in .*, got 'train_1_a_1' twice"):
        read_annotations(listing, folder)
