import csv
import logging
from pathlib import Path

import pytest

from common.cohort.cohort import load_labels
from common.ct.nifti import Rescale
from data_prep.sources.rad_chestct import METADATA, PREFIXES, find_rad_chestct, read_labels
from tests.conftest import touch

TRAIN_LABELS = "imgtrain_Abnormality_and_Location_Labels.csv"
LOCATIONS = ("left_lung", "right_lung")
ABNORMALITIES = sorted(
    {prefix for prefixes in PREFIXES.values() for prefix in prefixes} | {"opacity_other", "mass"}
)


def test_every_class_has_its_abnormalities() -> None:
    assert list(PREFIXES) == [label.name for label in load_labels("rad_chestct")]


def write(path: Path, positive: dict[str, set[str]], leave_out: str = "") -> Path:
    """A label table in which each volume has some positive columns."""
    columns = [f"{a}*{place}" for a in ABNORMALITIES for place in LOCATIONS if a != leave_out]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["NoteAcc_DEID", *columns])
        table.writerows([volume, *(int(c in own) for c in columns)] for volume, own in positive.items())
    return path


def test_a_class_is_positive_if_any_abnormality_is_anywhere(tmp_path) -> None:
    train = write(
        tmp_path / "train.csv",
        {
            "trn00001": {"nodulegr1cm*left_lung", "stent*right_lung"},
            "trn00002": {"nodule*right_lung", "hernia*left_lung", "fibrosis*left_lung"},
            "trn00003": {"opacity_other*left_lung", "mass*left_lung"},
        },
    )
    labels = read_labels([train, write(tmp_path / "valid.csv", {"val00001": {"calcification*left_lung"}})])
    assert list(labels) == ["trn00001", "trn00002", "trn00003", "val00001"]
    positive = {volume: [name for name, value in own.items() if value] for volume, own in labels.items()}
    assert positive["trn00001"] == ["Lung nodule", "Medical material"]
    assert positive["trn00002"] == ["Hiatal hernia", "Lung nodule", "Pulmonary fibrotic sequela"]
    assert positive["trn00003"] == []
    assert positive["val00001"] == ["Calcification"]
    assert list(labels["trn00001"]) == [label.name for label in load_labels("rad_chestct")]


def test_tables_that_lack_something_are_refused(tmp_path) -> None:
    table = write(tmp_path / "a.csv", {"trn00001": set()}, leave_out="stent")
    with pytest.raises(ValueError, match=r"a\.csv' has no columns of \['stent'\]"):
        read_labels([table])
    table = write(tmp_path / "b.csv", {"trn00001": set()})
    with pytest.raises(ValueError, match="'trn00001' has two rows .*b.csv'"):
        read_labels([table, table])
    table.write_text(table.read_text().replace("trn00001,0", "trn00001,?"))
    with pytest.raises(ValueError, match=r"label must be 0 or 1, got '\?' of '.*' for volume 'trn00001'"):
        read_labels([table])


def write_spacings(folder: Path, spacings: dict[str, str]) -> None:
    with (folder / METADATA).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["NoteAcc_DEID", "VolumeAcc_DEID", "final_spacing"])
        table.writerows([volume, f"{volume}.npz", text] for volume, text in spacings.items())


@pytest.mark.parametrize(("split", "prefix"), [("train", "trn"), ("valid", "val"), ("test", "tst")])
def test_the_prefix_of_a_file_is_its_split(split, prefix, tmp_path) -> None:
    names = [f"{own}0000{n}.npz" for own in ("trn", "val", "tst") for n in (2, 1)]
    touch(tmp_path, *(f"sub {name[4]}/{name}" for name in names), f"{prefix}00003.zip")
    sources, rejected = find_rad_chestct(tmp_path, split)
    assert rejected == []
    assert [(source.volume, source.source) for source in sources] == [
        (f"{prefix}00001", f"sub 0/{prefix}00001.npz"),
        (f"{prefix}00002", f"sub 0/{prefix}00002.npz"),
    ]
    assert {(source.split, source.form, source.labels) for source in sources} == {(split, "v2", None)}


def test_volumes_get_their_labels_and_label_maps(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    root = touch(tmp_path / "rad", "trn00001.npz", "trn00002.npz", "trn00003.npz")
    hernia = "hernia*left_lung"
    positive = {"trn00001": {hernia, "stent*right_lung"}, "trn00002": set(), "trn00009": {hernia}}
    write(root / TRAIN_LABELS, positive)
    masks = touch(tmp_path / "masks", "trn00002.nii.gz")
    sources, _ = find_rad_chestct(root, "train", masks)
    labels = [source.labels for source in sources]
    assert [name for name, value in (labels[0] or {}).items() if value] == [
        "Hiatal hernia",
        "Medical material",
    ]
    assert labels[1] == dict.fromkeys(PREFIXES, 0)
    assert labels[2] is None
    assert [source.ts for source in sources] == [None, masks / "trn00002.nii.gz", None]
    assert caplog.messages == ["1 of 3 volumes have no row in the label table."]


def test_the_metadata_may_state_another_spacing(tmp_path) -> None:
    names = [f"trn0000{n}" for n in range(7)]
    root = touch(tmp_path, *(f"{name}.npz" for name in names))
    texts = ["0.8", "[0.8, 0.8, 0.8]", "2.5", "", "[0.8, 0.8, 0.9]", "nan", "unknown"]
    write_spacings(root, dict(zip(names, texts, strict=True)))
    sources, rejected = find_rad_chestct(root, "train")
    assert [source.rescale for source in sources] == [
        *(Rescale(1, 0, (mm, mm, mm)) for mm in (0.8, 0.8, 2.5)),
        None,
    ]
    assert [(item.volume, item.reason) for item in rejected] == [(name, "spacing") for name in names[4:]]
    assert rejected[0].detail == "final_spacing must be the edge of cubes in mm, got '[0.8, 0.8, 0.9]'"


def test_volumes_or_label_maps_of_one_name_are_rejected(tmp_path) -> None:
    root = touch(tmp_path / "rad", "a/trn00001.npz", "b/trn00001.npz", "trn00002.npz", "trn00003.npz")
    masks = touch(tmp_path / "masks", "trn00002.nii.gz", "trn00002.nii")
    sources, rejected = find_rad_chestct(root, "train", masks)
    assert [source.volume for source in sources] == ["trn00003"]
    assert [(item.volume, item.reason) for item in rejected] == [
        ("trn00001", "duplicate"),
        ("trn00002", "duplicate"),
    ]


def test_what_is_not_there_is_named(tmp_path, caplog) -> None:
    root = touch(tmp_path / "rad", "trn00001.npz")
    with pytest.raises(FileNotFoundError, match=r"No volumes val\*\.npz"):
        find_rad_chestct(root, "valid")
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train', 'valid'\], got 'val'"):
        find_rad_chestct(root, "val")
    with pytest.raises(FileNotFoundError, match="totalsegmentator must hold label maps named like"):
        find_rad_chestct(root, "train", touch(tmp_path / "masks", "trn00002.nii.gz"))
    (root / METADATA).write_text("NoteAcc_DEID\ntrn00001\n")
    with pytest.raises(ValueError, match="metadata must have the column 'VolumeAcc_DEID', got"):
        find_rad_chestct(root, "train")
    assert "Shards will hold no labels: there is no label table of 'train'" in caplog.text


def test_a_table_that_is_there_twice_is_refused(tmp_path) -> None:
    root = touch(tmp_path / "rad", "trn00001.npz")
    (root / "backup").mkdir()
    for folder in (root, root / "backup"):
        write(folder / TRAIN_LABELS, {"trn00001": {"hernia*left_lung"}})
    with pytest.raises(ValueError, match="there twice: .*imgtrain.* Keep one"):
        find_rad_chestct(root, "train")
