import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from common.embeddings.dense_labels import read_dense_labels


def test_annotated_scans_are_labelled(tiny, write_rex, tmp_path, invoke) -> None:
    for volume in ("valid_1_a_1", "valid_2_a_1", "valid_3_a_1"):
        tiny.add(volume, "valid")
        ids = np.full((19, 17, 5), 5, np.uint8)
        path = tiny.ts_path(volume, "valid")
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(ids if volume != "valid_3_a_1" else ids[:5], tiny.affine()), path)
    for volume in ("valid_4_a_1", "valid_5_a_1"):  # without metadata; only the first is annotated
        tiny.add(volume, "valid")
        tiny.rows.pop()
    tiny.write_tables("valid")
    mask = np.ones((19, 17, 5), np.uint8)
    codes = {volume: ["2e"] for volume in ("valid_1_a_1", "valid_3_a_1", "valid_4_a_1")}
    listing, folder = write_rex(dict.fromkeys(codes, mask), codes, tiny.affine())
    where = ("--root", tiny.root, "--rexgroundingct", listing, "--rexgroundingct-masks", folder)
    answer = invoke("dense-labels", *where, "--out", tmp_path / "out", "--grid", 3)
    assert answer.exit_code == 1
    assert "Left out: 'valid_3_a_1': 'valid_3_a_1.nii.gz' must" in answer.stderr
    assert "Left out: 'valid_4_a_1': 'valid_4_a_1' must have one row in the metadata" in answer.stderr
    assert "valid_5_a_1" not in answer.stderr
    assert "1 volumes labelled" in answer.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["valid_1_a_1.safetensors", "volumes.csv"]
    assert (tmp_path / "out" / "volumes.csv").read_text() == "VolumeName\nvalid_1_a_1\n"
    labels = read_dense_labels(tmp_path / "out" / "valid_1_a_1.safetensors")
    assert (labels.findings == 1 << 10).all()
    assert labels.findings.shape == (5, 9)
    again = invoke("dense-labels", *where, "--out", tmp_path / "out", "--grid", 4)
    assert "'valid_1_a_1'" in str(again.exception)
    assert "have 9 patches per slice, but --grid 4" in str(again.exception)


def test_a_split_without_annotated_scans_is_refused(tiny, write_rex, tmp_path, invoke) -> None:
    tiny.add("valid_1_a_1", "valid")
    mask = np.ones((19, 17, 5), np.uint8)
    listing, folder = write_rex({"train_1_a_1": mask}, {"train_1_a_1": ["2e"]}, tiny.affine())
    where = ("--root", tiny.root, "--rexgroundingct", listing, "--rexgroundingct-masks", folder)
    answer = invoke("dense-labels", *where, "--out", tmp_path / "out")
    assert isinstance(answer.exception, ValueError)
    assert "No scan of split 'valid' is annotated" in str(answer.exception)


@pytest.mark.usefixtures("any_values")
def test_a_picture_of_ct_and_labels_is_drawn(tmp_path, run_command) -> None:
    hu = np.full((60, 50, 7), -1000, np.int16)
    hu[9:50, 4:45] = 30
    ids = np.zeros(hu.shape, np.uint8)
    ids[15:30, 10:25, 2:5] = 5
    for name, array in (("ct", hu), ("map", ids)):
        nib.save(nib.Nifti1Image(array, np.diag([0.7, 0.7, 2, 1])), tmp_path / f"{name}.nii.gz")
    arguments = [tmp_path / "ct.nii.gz", tmp_path / "map.nii.gz", "--out", tmp_path / "a.png"]
    sizes = ["--grid", 4, "--size-px", 64, "--slices", 3]
    answer = run_command("dense-overlay", *arguments, *sizes)
    assert answer.exit_code == 0, answer.output
    picture = Image.open(tmp_path / "a.png")
    assert picture.width > picture.height > 500
    red, green, blue = np.asarray(picture.convert("RGB"), int).transpose(2, 0, 1)
    assert ((red > green + 60) & (red > blue + 60)).sum() > 500
