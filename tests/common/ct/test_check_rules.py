import math

import pytest

from common.ct.check_rules import CHEST_RULES, HU_RULES, judge


def test_only_what_lies_outside_its_range_is_doubted() -> None:
    assert judge({"back": 0.5, "lungs": 120.0, "heart": math.nan, "unknown": 7.0}) == []
    doubts = judge({"back": 0.49, "heart": -3.1, "length": 701.0})
    assert {doubt.rule: doubt.refused for doubt in doubts} == {"length": True, "back": True, "heart": False}
    assert "-3.1 mm" in next(doubt.text for doubt in doubts if doubt.rule == "heart")


@pytest.mark.parametrize("rules", [HU_RULES, CHEST_RULES])
def test_every_bound_has_words(rules: tuple) -> None:
    for rule in rules:
        assert bool(rule.too_low) == math.isfinite(rule.low)
        assert bool(rule.too_high) == (math.isfinite(rule.high) and rule.high != 1) or rule.name == "blank"
