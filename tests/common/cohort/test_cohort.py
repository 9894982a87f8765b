import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from common.cohort.cohort import (
    listed_names,
    listed_volumes,
    load_labels,
    low_shot_split,
    natural_order,
    patient_of,
    prior_logits,
    read_labels,
    split_by_patient,
    split_three_ways,
    table_rows,
    write_table,
)


@pytest.mark.parametrize(
    ("name", "count"),
    [("ct_rate", 18), ("rad_chestct", 16), ("rexgroundingct", 14), ("totalsegmentator", 118)],
)
def test_a_label_list_counts_from_zero_its_names_are_unique_and_rex_alone_has_codes(
    name: str, count: int
) -> None:
    labels = load_labels(name)
    assert [label.index for label in labels] == list(range(count))
    assert len({label.name for label in labels}) == count
    assert all(label.name == label.name.strip() != "" for label in labels)
    assert all(bool(label.code) == (name == "rexgroundingct") for label in labels)


def test_ct_rate_keeps_the_order_of_its_label_table_and_rad_chestct_shares_its_classes() -> None:
    ct_rate, rad_chestct = ([label.name for label in load_labels(n)] for n in ("ct_rate", "rad_chestct"))
    calcifications = {"Arterial wall calcification", "Coronary artery wall calcification"}
    assert (ct_rate[0], ct_rate[-1]) == ("Medical material", "Interlobular septal thickening")
    assert ct_rate[4] == "Coronary artery wall calcification"
    assert set(rad_chestct) - set(ct_rate) == {"Calcification"}
    assert set(ct_rate) - set(rad_chestct) == calcifications | {"Mosaic attenuation pattern"}
    assert {label.pos_weight for label in load_labels("ct_rate") + load_labels("rad_chestct")} == {1.0}


def test_rexgroundingct_has_six_non_focal_and_eight_focal_codes() -> None:
    labels = load_labels("rexgroundingct")
    assert [label.code for label in labels] == [f"1{c}" for c in "abcdef"] + [f"2{c}" for c in "abcdefgh"]
    assert {label.pos_weight for label in labels} == {800.0}
    by_code = {label.code: label.name for label in labels}
    assert (by_code["1c"], by_code["2g"]) == ("Emphysema", "Pneumothorax")


def test_totalsegmentator_names_are_the_class_map_of_the_package() -> None:
    class_map = import_module("totalsegmentator.map_to_binary").class_map["total"]
    assert class_map == {label.index: label.name for label in load_labels("totalsegmentator")[1:]}
    assert load_labels("totalsegmentator")[0].name == "background"


def test_totalsegmentator_weights_are_those_of_the_released_code() -> None:
    """1 at background and anatomy outside the chest, 1000 at rare organs, else one over the share."""
    weight = {label.name: label.pos_weight for label in load_labels("totalsegmentator")}
    stated = {"liver": 30.53, "heart": 87.24, "lung_upper_lobe_left": 47.51, "lung_lower_lobe_right": 45.82}
    stated |= {"spleen": 184.42, "sternum": 746.09, "costal_cartilages": 338.73}
    stated |= dict.fromkeys(("background", "brain", "femur_left", "vertebrae_L3"), 1)
    stated |= dict.fromkeys(("esophagus", "rib_left_1", "vertebrae_L2"), 1000)
    assert {name: weight[name] for name in stated} == stated
    assert sum(value == 1000 for value in weight.values()) == 68
    assert sum(value == 1 for value in weight.values()) == 26
    assert min(weight.values()) == 1


@pytest.mark.parametrize(("share", "weight"), [(0.3, 1), (0.002, 40), (0.02, 1000), (0.999, 0.5)])
def test_the_prior_is_the_constant_with_the_least_weighted_cross_entropy(share, weight) -> None:
    def loss(logit: float) -> float:
        return weight * share * np.logaddexp(0, -logit) + (1 - share) * np.logaddexp(0, logit)

    best = minimize_scalar(loss, bounds=(-20, 20), method="bounded", options={"xatol": 1e-9})
    assert prior_logits([share], weight)[0] == pytest.approx(best.x, abs=1e-5)


def test_a_prior_is_finite_for_a_class_never_or_always_seen_and_for_one_nobody_counted() -> None:
    never, always, unknown = prior_logits([0, 1, np.nan], [1, 1, 99])
    assert -12 < never < -11
    assert always == pytest.approx(-never)
    assert unknown == pytest.approx(0)


def test_weights_that_are_one_over_a_share_have_a_prior_of_one_half() -> None:
    """The paper's weights say what a prior would: only classes that weigh 1 start elsewhere."""
    labels = load_labels("totalsegmentator") + load_labels("rexgroundingct")
    priors = prior_logits([label.frequency for label in labels], [label.pos_weight for label in labels])
    weighted = np.array([label.pos_weight for label in labels]) > 1
    assert np.abs(priors[weighted]).max() < 0.04
    assert priors[0] == pytest.approx(np.log(0.78 / 0.22))
    assert np.all(priors[~weighted][1:] == pytest.approx(np.log(1 / 99)))


def test_a_list_of_ones_own_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("index,name,code,pos_weight,frequency,cells\n0,liver,,4,0.25,9\n1,spleen,,1000,,0\n")
    liver, spleen = load_labels(str(path))
    assert (liver.name, liver.pos_weight, liver.frequency, spleen.pos_weight) == ("liver", 4, 0.25, 1000)
    assert np.isnan(spleen.frequency)
    with pytest.raises(FileNotFoundError, match="gone.csv"):
        load_labels(str(tmp_path / "gone.csv"))


def test_an_unknown_list_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'rad_chestct', 'rexgroundingct', 'totalsegmentator'.*'chexpert'"):
        load_labels("chexpert")


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding)
    return path


def test_cells_come_by_the_name_of_their_column(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", 'a,b,c\n1,"2, 3",x\n\n4\n', "utf-8-sig")
    rows = list(table_rows(table, "table", ("b", "a")))
    assert rows == [{"a": "1", "b": "2, 3", "c": "x"}, {"a": "4", "b": "", "c": ""}]


def test_a_table_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"a": 1, "b": "x, y"}, {"a": 2, "b": ""}])
    write_table(tmp_path / "t.csv", [{"a": 3, "b": "x, y"}])
    assert list(table_rows(tmp_path / "t.csv", "table", ("a", "b"))) == [{"a": "3", "b": "x, y"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "table .* column 'a', got None in '.*t.csv'"),
        (b"a,c\n1,2\n", r"table .* column 'b', got \['a', 'c'\] in '.*t.csv'"),
        ("a,b\n1,M\xfcller\n".encode("latin-1"), "table .* UTF-8, got '.*t.csv' \\('utf-8'"),
        (b'a,b\n1,"x\n2,3\n', "table .* UTF-8, got '.*t.csv' \\(unexpected end of data"),
        (b'a,b\n1,"' + 40_000 * b"2,3\n", "table .* UTF-8, got '.*t.csv' \\(field larger"),
    ],
)
def test_what_is_no_such_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(table_rows(tmp_path / "t.csv", "table", ("a", "b")))


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda path: next(table_rows(path, "table", ())), "table"),
        (lambda path: read_labels(path, ["A"]), "labels_csv"),
        (lambda path: listed_names(path, "subset_csv"), "subset_csv"),
        (listed_volumes, "skip_list"),
    ],
)
def test_a_missing_file_is_named_with_its_option(
    tmp_path: Path, read: Callable[[Path], object], name: str
) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}.*none.csv"):
        read(tmp_path / "none.csv")


def test_labels_come_in_the_order_of_rows_and_of_the_asked_classes(tmp_path: Path) -> None:
    text = "VolumeName,A,B,C\nb_2_a_1.nii.gz,0,1,1\na_1_a_1,1,0,1.0\n"
    labels = read_labels(write(tmp_path / "t.csv", text, "utf-8-sig"), ["C", "A"])
    assert list(labels) == ["b_2_a_1", "a_1_a_1"]
    np.testing.assert_array_equal(labels["b_2_a_1"], [1, 0])
    np.testing.assert_array_equal(labels["a_1_a_1"], [1, 1])
    assert labels["a_1_a_1"].dtype == np.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("VolumeName,B\nv,1\n", r"labels_csv .* column 'A', got \['VolumeName', 'B'\]"),
        ("name,A\nv,1\n", r"labels_csv .* column 'VolumeName', got \['name', 'A'\]"),
        ("", "labels_csv .* column 'VolumeName', got None"),
        ("VolumeName,A\nv.nii.gz,1\nw,0\nv,1\n", "labels_csv .* two rows .* 'v' in '.*t.csv'"),
        ("VolumeName,A\nv,\n", "label must be 0 or 1, got '' of 'A' for volume 'v'"),
        ("VolumeName,A\nv\n", "got '' of 'A' for volume 'v'"),
        ("VolumeName,A\nv,nan\n", "got 'nan' of 'A' for volume 'v'"),
        ("VolumeName,A\nv,0.3\n", "got '0.3' of 'A' for volume 'v'"),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(write(tmp_path / "t.csv", text), ["A"])


def test_volumes_are_named_as_their_files_are(tmp_path: Path) -> None:
    """By name, and by folder where several rows have one name."""
    names = " train_1_a_1.NII.GZ", "1.2.840.113", "Patient 01.mha", "s0000/ct.nii.gz", "d\\s0001\\ct.nii.gz"
    text = "VolumeName,A\n" + "".join(f"{name},1\n" for name in names)
    labels = read_labels(write(tmp_path / "t.csv", text), ["A"])
    assert [*labels] == ["train_1_a_1", "1_2_840_113", "Patient_01", "s0000", "s0001"]


def test_a_skip_list_holds_paths_of_either_system_or_names(tmp_path: Path) -> None:
    text = "dataset/valid/valid_1_a_1.nii.gz\nC:\\ct\\valid_2_a_1.nii\n\n  valid_9_a_1 \n"
    listed = write(tmp_path / "no_chest_valid.txt", text, "utf-8-sig")
    assert listed_volumes(listed) == {"valid_1_a_1", "valid_2_a_1", "valid_9_a_1"}


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
@pytest.mark.parametrize(("ending", "encoding"), [("\n", "utf-8-sig"), ("\r\n", "utf-8")])
@pytest.mark.parametrize("heading", ["", "VolumeName", "volume", "Image ID", "series_instance_uid", "FILE"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_a_list_of_one_column_may_have_a_heading_or_none(
    suffix: str, ending: str, encoding: str, heading: str, quote: str, tmp_path: Path
) -> None:
    names = [f"{quote}a_1.nii.gz{quote}", "", f"{quote}d/b 2.NRRD{quote}", "c"]
    lines = [heading, *names] if heading else names
    (tmp_path / f"list{suffix}").write_bytes(ending.join(lines).encode(encoding))
    assert listed_names(tmp_path / f"list{suffix}", "subset_csv") == ["a_1.nii.gz", "d/b 2.NRRD", "c"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_column_of_volume_names_is_read_or_else_the_first(delimiter: str, tmp_path: Path) -> None:
    text = "split;VolumeName;n\ntrain;a;1\nvalid;b\n;;\ntrain\n".replace(";", delimiter)
    assert listed_names(write(tmp_path / "t.csv", text), "subset_csv") == ["a", "b"]
    text = "a.nii;1;x\nb;2;y\n".replace(";", delimiter)
    assert listed_names(write(tmp_path / "t.csv", text), "subset_csv") == ["a.nii", "b"]


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [("l.txt", "Smith, John.nii\n", ["Smith, John.nii"]), ("l.txt", "\n", []), ("l.csv", "\n", [])],
)
def test_a_comma_is_part_of_a_name_in_text_and_an_empty_list_names_nothing(
    tmp_path: Path, name: str, text: str, names: list[str]
) -> None:
    assert listed_names(write(tmp_path / name, text), "skip_list") == names
    (tmp_path / "list.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(ValueError, match="skip_list must be text in UTF-8, got '.*list.xls'"):
        listed_volumes(tmp_path / "list.xls")


VOLUMES = [
    f"train_{patient}_{scan}_{recon}" for patient in range(1, 12) for scan in "ab" for recon in (1, 2, 3)
]
MANY = [f"train_{patient}_a_{recon}" for patient in range(1, 112) for recon in (1, 2)]


def patients(volumes: list[str]) -> set[str]:
    return {patient_of(volume) for volume in volumes}


@pytest.mark.parametrize("name", ["trn", "trn00123_a", "xtst00001", "train_1", "_1_a_1", "1_2_840_55_7"])
def test_a_name_without_a_patient_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"volume .*<patient>.*, got '{name}'"):
        patient_of(name)


def test_names_are_ordered_by_their_numbers_and_never_tie() -> None:
    names = ["train_2_b_1", "train_10_a_1", "valid_1_a_1", "train_2_a_10", "train_2_a_9", "train_02_a_9"]
    ordered = ["train_02_a_9", "train_2_a_9", "train_2_a_10", "train_2_b_1", "train_10_a_1", "valid_1_a_1"]
    assert sorted(names, key=natural_order) == sorted(names[::-1], key=natural_order) == ordered


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        (lambda volumes: split_by_patient(volumes, 3, 42), [54, 3]),
        (lambda volumes: split_three_ways(volumes, 42), [39, 5, 13]),  # 70 % and 10 % of 57, rounded down
    ],
)
def test_no_patient_is_on_two_sides_and_no_volume_is_lost(split: Callable, sizes: list[int]) -> None:
    volumes = [f"valid_{patient}_a_{recon}" for patient in range(1, 58) for recon in (1, 2)]
    parts = list(split(volumes).values())
    sides = [patients(part) for part in parts]
    assert [len(members) for members in sides] == sizes
    assert len(set().union(*sides)) == 57
    assert sorted(sum(parts, [])) == sorted(volumes)
    assert all(part == [volume for volume in volumes if volume in part] for part in parts)


def test_the_same_number_in_two_splits_of_ct_rate_is_two_patients() -> None:
    split = split_by_patient(["train_7_a_1", "valid_7_a_1"], num_val_patients=1, seed=0)
    assert [len(volumes) for volumes in split.values()] == [1, 1]


def test_the_draw_is_numpys_legacy_choice_of_patients_in_order_of_their_numbers() -> None:
    state = np.random.RandomState(42)
    expected = set(state.choice([f"train_{patient}" for patient in range(1, 12)], 4, replace=False))
    assert patients(split_by_patient(VOLUMES, num_val_patients=4, seed=42)["validation"]) == expected


def test_three_ways_are_numpys_legacy_permutation_of_patients_in_alphabetical_order() -> None:
    alphabetical = [f"train_{patient}" for patient in (1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)]
    order = [alphabetical[place] for place in np.random.RandomState(7).permutation(11)]
    sides = {side: patients(part) for side, part in split_three_ways(VOLUMES, seed=7).items()}
    assert sides == {"train": set(order[:7]), "validation": {order[7]}, "test": set(order[8:])}


@pytest.mark.parametrize(
    "split",
    [
        lambda volumes, seed: split_by_patient(volumes, 4, seed),
        split_three_ways,
        lambda volumes, seed: low_shot_split(volumes, 4, seed, 0.3),
    ],
)
def test_the_seed_decides_a_draw_and_the_order_of_the_table_does_not(
    split: Callable[[list[str], int], dict[str, list[str]]],
) -> None:
    drawn = {side: sorted(volumes) for side, volumes in split(VOLUMES, 42).items()}
    shuffled = random.Random(1).sample(VOLUMES, len(VOLUMES))
    assert {side: sorted(volumes) for side, volumes in split(shuffled, 42).items()} == drawn
    assert {side: sorted(volumes) for side, volumes in split(VOLUMES, 43).items()} != drawn


@pytest.mark.parametrize("count", [0, 11, 1000])
def test_a_side_without_patients_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"num_val_patients .* patients, 11, got {count}\."):
        split_by_patient(VOLUMES, num_val_patients=count, seed=42)


@pytest.mark.parametrize(
    ("percent", "message"),
    [
        ((70, 10, 20), r"enough patients .*\(70, 10, 20\).*, got 9: none for 'validation'\."),
        ((70, 10, 10), r"percent .* 100, got \(70, 10, 10\)\."),
        ((90, 10, 0), r"percent .* 100, got \(90, 10, 0\)\."),
    ],
)
def test_three_sides_must_have_patients(percent: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_three_ways([f"valid_{patient}_a_1" for patient in range(9)], 42, percent)


def test_smaller_shares_are_inside_larger_ones_and_all_is_the_plain_split() -> None:
    sides = {share: low_shot_split(MANY, 11, 42, share) for share in (0.01, 0.07, 0.1, 0.5, 1.0)}
    kept = [patients(split["train"]) for split in sides.values()]
    assert [len(of_share) for of_share in kept] == [1, 7, 10, 50, 100]
    assert all(small < large for small, large in zip(kept, kept[1:], strict=False))
    assert sides[1.0] == split_by_patient(MANY, 11, 42)


def test_all_volumes_of_a_patient_are_kept_in_order_and_validation_stays() -> None:
    split = low_shot_split(MANY, 11, 42, 0.1)
    assert split["validation"] == split_by_patient(MANY, 11, 42)["validation"]
    assert split["train"] == [volume for volume in MANY if patient_of(volume) in patients(split["train"])]
    assert len(split["train"]) == 20
    assert not patients(split["train"]) & patients(split["validation"])


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction .* got {fraction}"):
        low_shot_split(MANY, 11, 42, fraction)
