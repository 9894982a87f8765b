import csv
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.cohort.cohort import load_labels
from common.ct.nifti import Rescale
from common.ct.rejection import EXCLUDED, RejectedError
from data_prep.sources.ct_rate import find_ct_rate, find_volumes, read_metadata, read_no_chest
from data_prep.sources.rexgroundingct import Annotation
from data_prep.sources.source_volume import planned_slices, read_volume

NAN = float("nan")


def test_volumes_come_with_everything_the_dataset_says(tiny) -> None:
    paths = [tiny.add(name) for name in ("train_2_a_1", "train_1_a_1")]
    tiny.ts_path("train_1_a_1", "train").parent.mkdir(parents=True)
    tiny.ts_path("train_1_a_1", "train").touch()
    rex = Annotation(Path("masks/train_2_a_1.nii.gz"), ("1a",))
    sources, rejected = find_ct_rate(tiny.root, "train", annotations={"train_2_a_1": rex})
    assert rejected == []
    first, second = sources
    assert (first.volume, second.volume) == ("train_1_a_1", "train_2_a_1")
    assert (first.ct.path, second.ct.path) == (paths[1], paths[0])
    assert (first.ts, second.ts) == (tiny.ts_path("train_1_a_1", "train"), None)
    assert (first.rex, second.rex) == (None, rex)
    assert first.rescale == Rescale(1, -1024, (0.7, 0.8, 1.5))
    assert first.form == "v2"
    assert first.source == "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"
    assert first.labels == {label.name: label.index % 2 for label in load_labels("ct_rate")}


@pytest.mark.parametrize(
    ("present", "asked", "folder", "form"),
    [
        (["train_fixed", "train"], "auto", "train_fixed", "v2"),
        (["train_fixed", "train"], "v1", "train", "v1"),
        (["train_fixed"], "auto", "train_fixed", "v2"),
        (["train"], "auto", "train", "v1"),
        (["train"], "v2", "train", "v2"),
        ([""], "auto", "", "auto"),
        ([""], "v1", "", "v1"),
    ],
)
def test_the_folder_tells_the_form(present, asked, folder, form, tmp_path) -> None:
    for name in present:
        path = tmp_path / "dataset" / name / "train_1_a_1.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = find_volumes(tmp_path, "train", asked)
    assert found.form == form
    assert found.files == {"train_1_a_1": [tmp_path / "dataset" / folder / "train_1_a_1.nii.gz"]}


def test_a_flat_folder_is_searched_for_the_split_and_not_for_masks(tmp_path) -> None:
    for name in (
        "train_1_a_1",
        "valid_1_a_1",
        "ts_seg/ts_total/train_1_a_1",
        "rex/segmentations/train_1_a_1",
    ):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_volumes(tmp_path, "train", "auto").files == {"train_1_a_1": [tmp_path / "train_1_a_1.nii.gz"]}
    assert list(find_volumes(tmp_path, "valid", "auto").files) == ["valid_1_a_1"]


def test_validation_tables_have_their_own_names(tiny) -> None:
    tiny.add("valid_1_a_1", split="valid")
    sources, _ = find_ct_rate(tiny.root, "valid")
    assert [source.split for source in sources] == ["valid"]
    assert sources[0].labels is not None


def rejections(tiny: Any) -> dict[str, tuple[str, str]]:
    _, rejected = find_ct_rate(tiny.root, "train")
    return {item.volume: (item.reason, item.detail) for item in rejected}


def test_a_volume_the_metadata_lacks_or_has_twice_is_rejected(tiny) -> None:
    for name in ("train_1_a_1", "train_2_a_1", "train_3_a_1"):
        tiny.add(name)
    tiny.rows = [row for row in tiny.rows if not row["VolumeName"].startswith("train_2")] + [tiny.rows[2]]
    tiny.write_tables()
    found = rejections(tiny)
    assert {volume: reason for volume, (reason, _) in found.items()} == dict.fromkeys(
        ("train_2_a_1", "train_3_a_1"), "metadata"
    )
    assert [detail[-5:] for _, detail in found.values()] == ["got 0", "got 2"]


def test_scans_of_other_body_parts_are_left_out(tiny) -> None:
    """The list names volumes by the paths of another form of the dataset."""
    tiny.add("train_1_a_1")
    tiny.add("train_2_a_1")
    listing = tiny.root / "dataset" / "metadata" / "no_chest_train.txt"
    listing.write_text("/data/dataset/train/train_2/train_2_a/train_2_a_1.nii.gz\n\n")
    assert rejections(tiny) == {"train_2_a_1": (EXCLUDED, "listed in no_chest_train.txt")}


def test_lists_of_windows_and_bare_names_are_read(tmp_path) -> None:
    (tmp_path / "list.txt").write_text(
        "\ufefftrain_1_a_1\r\ntrain\\train_2\\train_2_a_1.nii.gz\r\n", encoding="utf-8"
    )
    assert read_no_chest(tmp_path / "list.txt") == {"train_1_a_1", "train_2_a_1"}


def test_a_missing_list_is_said(tiny, caplog) -> None:
    tiny.add("train_1_a_1")
    with caplog.at_level(logging.WARNING):
        assert find_ct_rate(tiny.root, "train")[1] == []
    assert "no list no_chest_<split>.txt" in caplog.text
    assert "Shards will hold no TotalSegmentator ids" in caplog.text


def test_two_files_of_a_volume_are_rejected(tiny) -> None:
    path = tiny.add("train_1_a_1")
    path.with_name("train_1_a_1.nii").write_bytes(b"")
    reason, detail = rejections(tiny)["train_1_a_1"]
    assert reason == "duplicate"
    assert detail.startswith("2 volumes have one name")


def test_two_label_maps_of_a_volume_are_rejected(tiny) -> None:
    tiny.add("train_1_a_1")
    for suffix in (".nii", ".nii.gz"):
        path = tiny.ts_path("train_1_a_1", "train").with_name(f"train_1_a_1{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert rejections(tiny)["train_1_a_1"][1].startswith("2 label maps have one name")


@pytest.mark.parametrize(
    ("row", "rescale"),
    [
        ({"ZSpacing": ""}, (1, -1024, (0.7, 0.8, NAN))),
        ({"ZSpacing": "nan"}, (1, -1024, (0.7, 0.8, NAN))),
        ({"ZSpacing": "thin"}, (1, -1024, (0.7, 0.8, NAN))),
        ({"XYSpacing": ""}, (1, -1024, (NAN, NAN, 1.5))),
        ({"XYSpacing": "[0.7]"}, (1, -1024, (NAN, NAN, 1.5))),
        ({"XYSpacing": "0.7"}, (1, -1024, (NAN, NAN, 1.5))),
        ({"XYSpacing": '["a", [1]]'}, (1, -1024, (NAN, NAN, 1.5))),
        ({"RescaleIntercept": "-8192.0"}, (1, -8192, (0.7, 0.8, 1.5))),
        ({"RescaleIntercept": "0"}, (1, 0, (0.7, 0.8, 1.5))),
        ({"RescaleSlope": ""}, (NAN, -1024, (0.7, 0.8, 1.5))),
    ],
)
def test_fields_of_the_metadata_are_read_without_a_guess(row, rescale, tiny) -> None:
    tiny.add("train_1_a_1", **row)
    sources, _ = find_ct_rate(tiny.root, "train")
    np.testing.assert_equal(tuple(sources[0].rescale), rescale)


def test_tables_may_lie_in_the_root(tiny) -> None:
    tiny.add("train_1_a_1")
    table = tiny.root / "dataset" / "metadata" / "train_metadata.csv"
    table.rename(tiny.root / "train_metadata.csv")
    assert len(find_ct_rate(tiny.root, "train")[0]) == 1


def test_missing_labels_are_said(tiny, caplog) -> None:
    tiny.add("train_1_a_1")
    (tiny.root / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_ct_rate(tiny.root, "train")[0][0].labels is None
    assert "Shards will hold no labels" in caplog.text


def test_label_maps_may_lie_elsewhere(tiny, tmp_path) -> None:
    tiny.add("train_1_a_1")
    (tmp_path / "maps").mkdir()
    with pytest.raises(FileNotFoundError, match="totalsegmentator must hold label maps .*maps'"):
        find_ct_rate(tiny.root, "train", totalsegmentator=tmp_path / "maps")
    (tmp_path / "maps" / "train_1_a_1.nii.gz").touch()
    sources, _ = find_ct_rate(tiny.root, "train", totalsegmentator=tmp_path / "maps")
    assert sources[0].ts == tmp_path / "maps" / "train_1_a_1.nii.gz"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_ct_rate(tiny.root, "train", totalsegmentator=tmp_path / "nowhere")


def test_what_is_not_there_is_named(tiny, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No volumes train_\*.*train_fixed"):
        find_ct_rate(tmp_path / "nowhere", "train")
    tiny.add("train_1_a_1")
    (tiny.root / "dataset" / "metadata" / "train_metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"No dataset/metadata/train_metadata\.csv"):
        find_ct_rate(tiny.root, "train")


def test_other_splits_and_forms_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'valid'\], got 'test'"):
        find_ct_rate(tiny.root, "test")
    with pytest.raises(ValueError, match=r"form must be one of \('auto', 'v1', 'v2'\), got 'v3'"):
        find_ct_rate(tiny.root, "train", form="v3")


def test_metadata_without_a_column_is_refused(tmp_path) -> None:
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["VolumeName", "RescaleSlope", "XYSpacing"], ["a", "1", "[1, 1]"]])
    with pytest.raises(ValueError, match=r"metadata must have the column 'RescaleIntercept', got .*m\.csv'"):
        read_metadata(tmp_path / "m.csv")


def rejection_of(cohort: Any) -> str:
    """Why the one volume of a split is left out: by its tables, its header or its voxels."""
    sources, rejected = find_ct_rate(cohort.root, "train")
    for item in rejected:
        return f"{item.reason}: {item.detail}"
    try:
        planned_slices(sources[0])
        read_volume(sources[0])
    except RejectedError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("v2", {}, "none"),
        ("v2", {"ZSpacing": "nan"}, "none"),
        ("v2", {"XYSpacing": "", "ZSpacing": ""}, "none"),
        ("v2", {"ZSpacing": "1.55"}, "none"),
        ("v2", {"ZSpacing": "3.0"}, r"spacing: .*\(0\.7, 0\.8, 1\.5\).*\(0\.7, 0\.8, 3\)"),
        ("v2", {"ZSpacing": "0.035"}, r"spacing: .*\(0\.7, 0\.8, 1\.5\).*\(0\.7, 0\.8, 0\.035\)"),
        ("v2", {"XYSpacing": "[0.7, 0.7]"}, r"spacing: .*\(0\.7, 0\.8, 1\.5\).*\(0\.7, 0\.7, 1\.5\)"),
        ("v1", {}, "none"),
        ("v1", {"ZSpacing": "nan"}, r"spacing: .*0\.1\.\.20\.0 mm, got \(0\.7, 0\.8, nan\)"),
        ("v1", {"ZSpacing": "0.035"}, r"spacing: .*0\.1\.\.20\.0 mm, got \(0\.7, 0\.8, 0\.035\)"),
        ("v1", {"ZSpacing": "0"}, r"spacing: .*got \(0\.7, 0\.8, 0\)"),
        ("v1", {"ZSpacing": "-1.5"}, r"spacing: .*got \(0\.7, 0\.8, -1\.5\)"),
        ("v1", {"RescaleSlope": ""}, "rescale: .*got nan and -1024"),
        ("v1", {"RescaleSlope": "0"}, "rescale: .*got 0 and -1024"),
        ("v1", {"RescaleIntercept": ""}, "rescale: .*got 1 and nan"),
        ("v1", {"RescaleIntercept": "0"}, "not in HU: .*as dark as air"),
    ],
)
def test_spacing_and_rescale_of_the_tables_are_compared_with_the_file(
    form, row, expected, tiny, tiny_v1
) -> None:
    cohort = {"v1": tiny_v1, "v2": tiny}[form]
    cohort.add("train_1_a_1", **row)
    assert re.match(expected, rejection_of(cohort))


@pytest.mark.parametrize("damage", ["zero bytes", "a link that leads nowhere"])
def test_whatever_has_the_name_of_a_volume_is_accounted_for(damage, tiny) -> None:
    path = tiny.add("train_1_a_1")
    path.unlink()
    if damage == "zero bytes":
        path.touch()
    else:
        path.symlink_to("nowhere")
    assert re.match("unreadable: .*'train_1_a_1.nii.gz'", rejection_of(tiny))


def test_names_of_any_letters_are_made_safe(tiny) -> None:
    path = tiny.add("train_1_a_1")
    path.rename(path.with_name("train_1 é.nii.gz"))
    tiny.rows[0]["VolumeName"] = "train_1 é.nii.gz"
    tiny.write_tables()
    (source,), rejected = find_ct_rate(tiny.root, "train")
    assert rejected == []
    assert source.volume.startswith("train_1_e_")
    assert source.rescale is not None


def test_folders_may_hold_spaces_and_any_letters(tiny) -> None:
    path = tiny.add("train_1_a_1")
    place = path.parents[1].rename(path.parents[1].with_name("Thorax é 1 中"))
    sources, rejected = find_ct_rate(tiny.root, "train")
    assert rejected == []
    assert sources[0].ct.path == place / "train_1_a" / "train_1_a_1.nii.gz"
    assert sources[0].source == "dataset/train_fixed/Thorax é 1 中/train_1_a/train_1_a_1.nii.gz"
    assert read_volume(sources[0]).source == sources[0].source


def test_names_in_tables_lead_nowhere(tiny) -> None:
    """A name is only ever compared with those of files that were found."""
    tiny.add("train_1_a_1")
    for name in ("../../x.nii.gz", "/etc/passwd", "../train_9_a_1.nii.gz"):
        tiny.rows.append(tiny.rows[0] | {"VolumeName": name})
        tiny.labels.append(tiny.labels[0] | {"VolumeName": name})
    tiny.write_tables()
    (tiny.root / "dataset" / "metadata" / "no_chest_train.txt").write_text("../../../x.nii.gz\n/etc/passwd\n")
    sources, rejected = find_ct_rate(tiny.root, "train")
    assert [source.volume for source in sources] == ["train_1_a_1"]
    assert sources[0].ct.path.is_relative_to(tiny.root)
    assert rejected == []
