from importlib import import_module

import pytest

from common.labels import load_labels


@pytest.mark.parametrize(
    ("name", "count"),
    [("ct_rate", 18), ("rad_chestct", 16), ("rexgroundingct", 14), ("totalsegmentator", 118)],
)
def test_indices_count_from_zero_and_names_are_unique(name: str, count: int) -> None:
    labels = load_labels(name)
    assert [label.index for label in labels] == list(range(count))
    assert len({label.name for label in labels}) == count
    assert all(label.name == label.name.strip() != "" for label in labels)


def test_ct_rate_keeps_the_order_of_its_label_table() -> None:
    names = [label.name for label in load_labels("ct_rate")]
    assert names[0] == "Medical material"
    assert names[4] == "Coronary artery wall calcification"
    assert names[-1] == "Interlobular septal thickening"


def test_rad_chestct_shares_its_classes_with_ct_rate() -> None:
    """Both calcifications are one class there, and mosaic attenuation is not labelled."""
    ct_rate, rad_chestct = (
        {label.name for label in load_labels(name)} for name in ("ct_rate", "rad_chestct")
    )
    assert rad_chestct - ct_rate == {"Calcification"}
    assert ct_rate - rad_chestct == {
        "Arterial wall calcification",
        "Coronary artery wall calcification",
        "Mosaic attenuation pattern",
    }


def test_classes_of_probes_are_unweighted() -> None:
    assert {label.pos_weight for label in load_labels("ct_rate") + load_labels("rad_chestct")} == {1.0}


def test_rexgroundingct_has_six_non_focal_and_eight_focal_codes() -> None:
    labels = load_labels("rexgroundingct")
    assert [label.code for label in labels] == [f"1{c}" for c in "abcdef"] + [f"2{c}" for c in "abcdefgh"]
    assert {label.pos_weight for label in labels} == {800.0}
    by_code = {label.code: label.name for label in labels}
    assert by_code["1c"] == "Emphysema"
    assert by_code["2g"] == "Pneumothorax"


def test_totalsegmentator_names_are_the_class_map_of_the_package() -> None:
    class_map = import_module("totalsegmentator.map_to_binary").class_map["total"]
    assert class_map == {label.index: label.name for label in load_labels("totalsegmentator")[1:]}
    assert load_labels("totalsegmentator")[0].name == "background"


def test_totalsegmentator_weights_are_those_of_the_released_code() -> None:
    """1 at background and anatomy outside the chest, 1000 at rare organs, else one over the share."""
    weight = {label.name: label.pos_weight for label in load_labels("totalsegmentator")}
    stated = {
        "liver": 30.53,
        "heart": 87.24,
        "lung_upper_lobe_left": 47.51,
        "spleen": 184.42,
        "sternum": 746.09,
    }
    assert {name: weight[name] for name in stated} == stated
    assert weight["lung_lower_lobe_right"] == 45.82
    assert weight["costal_cartilages"] == 338.73
    assert weight["background"] == weight["brain"] == weight["femur_left"] == 1
    assert weight["esophagus"] == weight["rib_left_1"] == weight["vertebrae_L2"] == 1000
    assert weight["vertebrae_L3"] == 1
    assert sum(value == 1000 for value in weight.values()) == 68
    assert sum(value == 1 for value in weight.values()) == 26
    assert min(weight.values()) == 1


def test_codes_other_than_those_of_rexgroundingct_are_empty() -> None:
    assert {
        label.code for name in ("ct_rate", "rad_chestct", "totalsegmentator") for label in load_labels(name)
    } == {""}


def test_an_unknown_list_is_refused_with_the_known_ones() -> None:
    known = r"\['ct_rate', 'rad_chestct', 'rexgroundingct', 'totalsegmentator'\]"
    with pytest.raises(ValueError, match=rf"name must be one of {known}, got 'chexpert'"):
        load_labels("chexpert")
