import json
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_max_pool2d

from common.ct import nifti
from common.ct.geometry import Grid
from common.ct.rejection import RejectedError
from data_prep.sources.rexgroundingct import (
    Annotation,
    cell_edges,
    pool_bits,
    read_annotations,
    read_findings,
)

SHAPE_XYZ = (19, 17, 5)
AFFINE = np.array([[-0.7, 0, 0, 40], [0, -0.8, 0, 30], [0, 0, 1.5, -100], [0, 0, 0, 1]])
CT = Grid(SHAPE_XYZ, AFFINE)
CODES = ("1a", "2h", "1a")


def findings() -> np.ndarray:
    """Three findings (F, X, Y, Z), two of them of one code and overlapping."""
    masks = np.zeros((3, *SHAPE_XYZ), np.uint8)
    masks[0, 2:5, 3, 1] = 1
    masks[1, 4, 3:9, 1:3] = 1
    masks[2, 4:7, 3, 1] = 255
    return masks


def pooled(planes: np.ndarray) -> np.ndarray:
    """Slices (Z, H, W) to 128 x 128, cell by cell: all bits of the pixels that a cell touches."""
    cells = np.zeros((len(planes), 128, 128), np.uint16)
    (_, height, width) = planes.shape
    for z, row, column in np.argwhere(planes):
        touched = np.ix_(
            *(
                [i for i in range(128) if i * n < (at + 1) * 128 and (i + 1) * n > at * 128]
                for at, n in ((row, height), (column, width))
            )
        )
        cells[z][touched] |= planes[z, row, column]
    return cells


def expected() -> np.ndarray:
    planes = np.zeros(SHAPE_XYZ[::-1], np.uint16)
    for mask, code in zip(findings(), CODES, strict=True):
        planes |= (mask.transpose(2, 1, 0) > 0).astype(np.uint16) << (0 if code == "1a" else 13)
    return pooled(planes)


def read(
    array: np.ndarray,
    folder: Path,
    affine: np.ndarray = AFFINE,
    codes: tuple[str, ...] = CODES,
    ct: Grid = CT,
) -> np.ndarray:
    nib.save(nib.Nifti1Image(array, affine), folder / "a.nii.gz")
    return read_findings(Annotation(folder / "a.nii.gz", codes), ct)


def turned(axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """The findings stored in another order, and their affine."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    images = [nib.Nifti1Image(mask, AFFINE).as_reoriented(turn) for mask in findings()]
    return np.stack([np.asarray(image.dataobj) for image in images]), images[0].affine


@pytest.mark.parametrize("shape", [(512, 512), (128, 128), (17, 19), (131, 1024), (300, 513)])
def test_cells_cover_all_their_pixels(shape) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.01
    oracle = adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), (128, 128))[0].numpy() > 0
    bits = pool_bits(pool_bits(mask.astype(np.uint16) * 4, 0), 1)
    np.testing.assert_array_equal(bits == 4, oracle)
    for size in shape:
        assert set().union(*(range(start, stop) for start, stop in cell_edges(size))) == set(range(size))


def test_findings_of_one_code_are_united_and_others_keep_their_bit(tmp_path) -> None:
    planes = read(findings(), tmp_path)
    assert planes.dtype == np.uint16
    np.testing.assert_array_equal(planes, expected())
    assert set(np.unique(planes)) == {0, 1, 2**13, 2**13 + 1}


@pytest.mark.parametrize("axcodes", ["LPS", "LAS", "RAS", "SPL", "PIR"])
@pytest.mark.parametrize("chunk_bytes", [1, 10**6])
def test_a_header_with_the_spacing_of_the_ct_is_followed(axcodes, chunk_bytes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(nifti, "CHUNK_BYTES", chunk_bytes)
    stored, affine = turned(axcodes)
    np.testing.assert_array_equal(read(stored, tmp_path, affine), expected())
    no_origin = CT._replace(has_origin=False)
    np.testing.assert_array_equal(read(stored, tmp_path, affine, ct=no_origin), expected())


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_masks_may_have_any_type(dtype, tmp_path) -> None:
    masks = findings().astype(dtype)
    masks[0, 0, 0, 0] = -1
    np.testing.assert_array_equal(read(masks, tmp_path), expected())


@pytest.mark.parametrize("ct_axcodes", ["RAS", "IPL"])
def test_a_blank_header_follows_a_ct_in_another_order(ct_axcodes, tmp_path) -> None:
    stored, affine = turned(ct_axcodes)
    ct = Grid(stored.shape[1:], affine)
    np.testing.assert_array_equal(read(stored, tmp_path, np.eye(4), ct=ct), expected())


GRIDS = {
    "coarser": ((11, 9, 4), np.diag([-1.3, -1.7, 2.1, 1])),
    "finer": ((40, 36, 11), np.diag([-0.36, -0.41, 0.74, 1])),
    "shifted": (
        (30, 30, 9),
        np.array([[0.7, 0, 0, -15.3], [0, -0.8, 0, 3.3], [0, 0, 1.5, -2.6], [0, 0, 0, 1]]),
    ),
    "another order": (
        (9, 30, 30),
        np.array([[0, 0, 0.7, -15.3], [0, -0.8, 0, 3.3], [1.5, 0, 0, -2.6], [0, 0, 0, 1]]),
    ),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_masks_on_another_grid_keep_every_voxel(grid, tmp_path) -> None:
    """One by one: the cell a positive voxel's centre lies in, and the voxel a cell's centre pixel lies in."""
    shape, affine = GRIDS[grid]
    affine = affine + np.pad(AFFINE[:3, 3:], ((0, 1), (3, 0)))
    masks = (np.random.default_rng(0).random((2, *shape)) < 0.02).astype(np.uint16)
    to_ct, to_mask = np.linalg.inv(AFFINE) @ affine, np.linalg.inv(affine) @ AFFINE
    cells = np.zeros((5, 128, 128), np.uint16)
    for f, *place in np.argwhere(masks):
        x, y, z, _ = to_ct @ [*place, 1]
        at = np.floor([z + 0.5, (y + 0.5) * 128 / 17, (x + 0.5) * 128 / 19]).astype(int)
        if (at >= 0).all() and (at < cells.shape).all():
            cells[tuple(at)] |= 1 << (0, 13)[f]
    last = np.array(shape)[:, None] - 1
    columns = np.array([int((column + 0.5) * 19 / 128) for column in range(128)])
    for z, row in product(range(5), range(128)):
        centres = [columns, *np.array([int((row + 0.5) * 17 / 128), z, 1])[:, None].repeat(128, axis=1)]
        i, j, k = np.floor((to_mask @ centres)[:3] + 0.5).astype(int).clip(0, last)
        cells[z, row] |= masks[0, i, j, k] | masks[1, i, j, k] << 13
    assert 10 < np.count_nonzero(cells) < 20_000
    np.testing.assert_array_equal(read(masks, tmp_path, affine, codes=("1a", "2h")), cells)


def test_a_small_finding_survives_a_finer_grid(tmp_path) -> None:
    """One voxel of a quarter of the CT's edge, which no centre of a cell lies in."""
    ct = Grid((256, 256, 4), np.diag([-0.8, -0.8, 2, 1]))
    masks = np.zeros((1, 1024, 1024, 4), np.uint8)
    masks[0, 401, 203, 2] = 1
    affine = np.diag([-0.2, -0.2, 2, 1])
    affine[:3, 3] = (0.3, 0.3, 0)
    planes = read(masks, tmp_path, affine, codes=("2d",), ct=ct)
    assert np.argwhere(planes).tolist() == [[2, 203 // 8, 401 // 8]]


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, -1, 1, 1]), np.diag([0.7, 17, 19, 1])])
def test_a_header_that_says_nothing_leaves_the_masks_on_the_voxels_of_the_ct(affine, tmp_path) -> None:
    np.testing.assert_array_equal(read(findings(), tmp_path, affine), expected())


@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)])
def test_a_header_of_spacing_alone_leaves_the_masks_on_the_voxels_of_the_ct(tmp_path, signs) -> None:
    """What ``np.diag`` of the spacing gives: no origin, and signs that nobody chose."""
    unplaced = np.diag([0.7 * signs[0], 0.8 * signs[1], 1.5, 1.0])
    np.testing.assert_array_equal(read(findings(), tmp_path, unplaced), expected())


def test_three_axes_are_one_finding(tmp_path) -> None:
    four = read(findings()[:1], tmp_path, codes=("2d",))
    three = read(findings()[0], tmp_path, codes=("2d",))
    np.testing.assert_array_equal(three, four)
    assert set(np.unique(three)) == {0, 2**9}


@pytest.mark.parametrize(("slope", "intercept"), [(1, 1), (1, -7), (0.9999, 0), (2, 2)])
def test_the_rescale_of_a_header_says_what_a_finding_is(slope, intercept, tmp_path) -> None:
    """A stored 0 may mean 1, and a stored 7 nothing."""
    stored = np.rint(((findings() > 0).astype(float) * (2 if slope == 2 else 1) - intercept) / slope)
    content = bytearray(nib.Nifti1Image(stored.astype(np.int16), AFFINE).to_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_array_equal(read_findings(Annotation(tmp_path / "a.nii", CODES), CT), expected())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (findings()[:2], r"'a\.nii\.gz' must have one channel per finding, 3, got shape \(2, 19, 17, 5\)"),
        (findings()[0], r"must have one channel per finding, 3, got shape \(19, 17, 5\)"),
        (findings()[:, :-1], r"'a\.nii\.gz' must have the CT's shape \(5, 17, 19\), got \(5, 17, 18\)"),
        (np.moveaxis(findings(), 0, 3), "must have one channel per finding, 3"),
    ],
)
def test_masks_that_do_not_fit_their_ct_are_rejected(array, message, tmp_path) -> None:
    for affine in (AFFINE, np.eye(4)):
        with pytest.raises(RejectedError, match=f"mask: .*{message}") as caught:
            read(array, tmp_path, affine)
        assert caught.value.reason == "mask"


def test_annotated_scans_are_those_with_masks_at_hand(write_rex, caplog) -> None:
    """The masks of the hidden test set are listed and not published."""
    listing, folder = write_rex(
        {"train_1_a_1": findings()}, {"train_1_a_1": list(CODES), "train_2_a_1": ["1b"]}, AFFINE
    )
    annotations = read_annotations(listing, folder)
    assert annotations == {"train_1_a_1": Annotation(folder / "train_1_a_1.nii.gz", CODES)}
    assert "1 of 2 scans listed in" in caplog.text
    assert "such as 'train_2_a_1'" in caplog.text


@pytest.mark.parametrize("name", ["../../train_1_a_1", "/etc/train_1_a_1", "a/../train_1_a_1"])
def test_a_name_with_a_path_stays_in_the_folder_of_masks(name, write_rex) -> None:
    listing, folder = write_rex({"train_1_a_1": findings()}, {name: list(CODES)}, AFFINE)
    assert read_annotations(listing, folder)["train_1_a_1"].path == folder / "train_1_a_1.nii.gz"


@pytest.mark.parametrize("name", ["..", "../..", "/", "passwd", "..\\..\\passwd"])
def test_a_name_that_is_no_file_has_no_mask(name, tmp_path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"train": [{"name": name, "categories": {}}]}))
    with pytest.raises(FileNotFoundError, match="No mask of a scan"):
        read_annotations(tmp_path / "x.json", tmp_path)


@pytest.mark.parametrize("category", ["", " ", None])
def test_an_empty_category_is_no_code(category, write_rex, tmp_path) -> None:
    listing, folder = write_rex({"train_1_a_1": findings()}, {"train_1_a_1": ["1a", category, "1a"]}, AFFINE)
    annotation = read_annotations(listing, folder)["train_1_a_1"]
    assert annotation.codes == ("1a", "", "1a")
    np.testing.assert_array_equal(read_findings(annotation, CT), expected() & 1)


def test_missing_places_are_named(write_rex, tmp_path) -> None:
    listing, folder = write_rex({}, {"train_1_a_1": list(CODES)}, AFFINE)
    with pytest.raises(FileNotFoundError, match="x.json"):
        read_annotations(tmp_path / "x.json", folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_annotations(listing, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="No mask of a scan"):
        read_annotations(listing, folder)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[]", b'{"train": [{"name": "a.nii.gz"}]}', b'{"train": 3}']
)
def test_a_listing_of_another_form_is_refused(content, tmp_path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x\.json' must be \{split: \[\{name, findings, categories\}\]\}, got"
    ):
        read_annotations(tmp_path / "x.json", tmp_path)


def test_a_channel_without_category_is_refused(tmp_path) -> None:
    item = {"name": "a.nii.gz", "categories": {"0": "1a", "2": "1b"}}
    (tmp_path / "x.json").write_text(json.dumps({"train": [item]}))
    with pytest.raises(ValueError, match="must be .*categories.*, got KeyError: '1'"):
        read_annotations(tmp_path / "x.json", tmp_path)


def test_unknown_categories_and_scans_listed_twice_are_refused(write_rex, tmp_path) -> None:
    listing, folder = write_rex({"train_1_a_1": findings()}, {"train_1_a_1": ["1a", "9z", "1a"]}, AFFINE)
    with pytest.raises(ValueError, match=r"categories must be among .* or empty, got \['9z'\]"):
        read_annotations(listing, folder)
    item = {"name": "train_1_a_1.nii.gz", "categories": {"0": "1a"}}
    listing.write_text(json.dumps({"train": [item], "val": [item]}))
    with pytest.raises(ValueError, match="'train_1_a_1' is listed twice"):
        read_annotations(listing, folder)
