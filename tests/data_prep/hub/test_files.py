import pytest

from data_prep.hub.access import open_repository
from data_prep.hub.files import (
    Place,
    RemoteFile,
    label_map_places,
    list_files,
    parse_patients,
    patient_of,
    select,
    stem_of,
    table_places,
    volume_places,
)

REPO = "owner/CT"


def remote(*names: str) -> list[RemoteFile]:
    return [RemoteFile(f"folder/{name}", 1, "") for name in names]


def names_of(files: list[RemoteFile]) -> list[str]:
    return [stem_of(file) for file in files]


def test_a_listing_of_many_pages_holds_every_file_once(start_hub) -> None:
    hub = start_hub(REPO)
    hub.page_size = 3
    hub.files = {
        f"dataset/train_fixed/train_{p}/train_{p}_{s}/train_{p}_{s}_1.nii.gz": bytes(p + 1)
        for p in range(4)
        for s in "ab"
    }
    api, commit = open_repository(REPO, endpoint=hub.url)
    assert commit == hub.COMMIT
    found = list_files(api, REPO, commit, [Place("dataset/train_fixed", "*.nii.gz")])
    assert found == [RemoteFile(path, len(hub.files[path]), hub.digest(path)) for path in sorted(hub.files)]
    pages = [path for path, _ in hub.headers if "/tree/" in path]
    assert len(pages) == 7  # 8 files, 4 folders of patients and 8 of scans, 3 a page


def test_tables_and_volumes_of_ct_rate_lie_where_ct_rate_reads_them(start_hub, tiny) -> None:
    """The hub's layout is that of ``TinyCTRate``, which the tests of ``ct-rate`` read."""
    for number in (1, 2, 31):
        tiny.add(f"train_{number}_a_1")
    tiny.add("valid_1_a_1", split="valid")
    hub = start_hub(REPO)
    hub.files = {
        path.relative_to(tiny.root).as_posix(): path.read_bytes()
        for path in tiny.root.rglob("*")
        if path.is_file()
    }
    hub.files |= {"dataset/train/train_1/train_1_a/train_1_a_1.nii.gz": b"raw"}
    hub.files |= {"dataset/ts_seg/ts_total/train_fixed/train_2/train_2_a/train_2_a_1.nii.gz": b"map"}
    hub.files |= {"dataset/radiology_text_reports/train_reports.csv": b"text"}
    api, commit = open_repository(REPO, endpoint=hub.url)

    def paths(places: list[Place]) -> list[str]:
        return [file.path.removeprefix("dataset/") for file in list_files(api, REPO, commit, places)]

    assert paths(table_places("ct-rate")) == [
        *("metadata/train_metadata.csv", "metadata/validation_metadata.csv"),
        *("multi_abnormality_labels/train_predicted_labels.csv",),
        *("multi_abnormality_labels/valid_predicted_labels.csv",),
    ]
    first, second, last = (f"train_fixed/train_{n}/train_{n}_a/train_{n}_a_1.nii.gz" for n in (1, 2, 31))
    assert paths(volume_places("ct-rate", "train")) == [first, second, last]
    assert paths(volume_places("ct-rate", "train", patients=parse_patients("2:31"))) == [second, last]
    assert paths(volume_places("ct-rate", "train", patients=parse_patients("2:5000"))) == [
        first,
        second,
        last,
    ]
    assert paths(volume_places("ct-rate", "train", form="v1")) == [
        "train/train_1/train_1_a/train_1_a_1.nii.gz"
    ]
    assert len(paths(volume_places("ct-rate", None))) == 4
    assert paths(label_map_places("train")) == [f"ts_seg/ts_total/{second}"]
    assert paths(label_map_places(None, parse_patients("1"))) == []


def test_the_other_datasets_are_found_by_the_names_of_their_files(start_hub) -> None:
    hub = start_hub(REPO)
    hub.files = dict.fromkeys(
        (
            *("dataset.json", "README.md", "segmentations/train_1_a_1.nii.gz", "other/reports.json"),
            *("tables/imgtrain_Abnormality_and_Location_Labels.csv", "trn00001.npz", "a/val00002.npz"),
        ),
        b"",
    )
    api, commit = open_repository(REPO, endpoint=hub.url)
    table, volumes = "tables/imgtrain_Abnormality_and_Location_Labels.csv", ["a/val00002.npz", "trn00001.npz"]
    for dataset, split, tables, expected in (
        ("rexgroundingct", None, ["dataset.json"], ["segmentations/train_1_a_1.nii.gz"]),
        ("rad-chestct", "train", [table], volumes[1:]),
        ("rad-chestct", None, [table], volumes),
    ):
        assert [file.path for file in list_files(api, REPO, commit, table_places(dataset))] == tables
        found = list_files(api, REPO, commit, volume_places(dataset, split))
        assert sorted(file.path for file in found) == expected


def test_a_split_that_a_dataset_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of \('train', 'valid'\) for ct-rate, got 'test'"):
        volume_places("ct-rate", "test")
    with pytest.raises(ValueError, match="split must not be given for rexgroundingct, got 'train'"):
        volume_places("rexgroundingct", "train")


def test_volumes_are_chosen_by_patient_name_and_number() -> None:
    files = remote(
        "train_10_a_1.nii.gz",
        "train_2_b_1.nii.gz",
        "train_2_a_2.nii.gz",
        "train_2_a_1.nii.gz",
        "train_1_a_1.nii.gz",
    )
    by_patient = ["train_1_a_1", "train_2_a_1", "train_2_a_2", "train_2_b_1", "train_10_a_1"]
    assert names_of(select(files)) == by_patient
    assert names_of(select(files, limit=2)) == by_patient[:2]
    assert names_of(select(files, parse_patients("2:9,10"), limit=4)) == by_patient[1:]
    assert names_of(select(files, patterns=["train_2_a_*", "train_1_?_1"])) == by_patient[:3]
    assert names_of(select(files, parse_patients("1"), ["train_2_*"])) == []


def test_the_patient_of_rad_chestct_is_the_number_of_the_scan() -> None:
    assert [patient_of(file) for file in remote("trn00017.npz", "notes.npz")] == [17, -1]
    assert names_of(select(remote("trn00017.npz", "trn00117.npz"), parse_patients("1:100"))) == ["trn00017"]


@pytest.mark.parametrize("text", ["", "1:", "a", "5:3", "-1", "1;2", "1,,2"])
def test_patients_that_are_no_numbers_are_refused(text) -> None:
    with pytest.raises(ValueError, match="patients must be numbers and ranges such as 1:100,205, got"):
        parse_patients(text)
