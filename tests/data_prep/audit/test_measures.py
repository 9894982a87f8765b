import math

import pytest

from data_prep.audit.measures import RULES, reasons


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_value_is_suspicious_just_outside_its_range(rule: object) -> None:
    step = 1e-3 * max(1.0, abs(rule.low) if math.isfinite(rule.low) else abs(rule.high))
    for limit, outside, words in (
        (rule.low, rule.low - step, rule.too_low),
        (rule.high, rule.high + step, rule.too_high),
    ):
        if math.isfinite(limit):
            assert reasons({rule.name: limit}) == {}
            if words:  # a side without words is one that no value can be on
                assert reasons({rule.name: outside})[rule.name].startswith(words)
    assert reasons({rule.name: math.nan}) == {}


def test_reasons_state_value_unit_and_range() -> None:
    assert reasons({"lungs": 0.5, "air": -300.0, "blank": 2.0}) == {
        "lungs": "no whole lungs: not a chest, or only part of one "
        "(air enclosed by the body: 0.5 L; 0.8 to 12)",
        "air": "nothing is as dark as air: not in HU, or rescaled wrongly "
        "(HU that 1 % of the voxels stay below: -300 HU; at most -850)",
        "blank": "blank slices (blank slices: 2; must be 0)",
    }
