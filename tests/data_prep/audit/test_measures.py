import math

import pytest

from common.ct.checks import Rule, judge
from data_prep.audit.measures import RULES


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_value_is_suspicious_just_outside_its_range(rule: Rule) -> None:
    step = 1e-3 * max(1.0, abs(rule.low) if math.isfinite(rule.low) else abs(rule.high))
    for limit, outside, words in (
        (rule.low, rule.low - step, rule.too_low),
        (rule.high, rule.high + step, rule.too_high),
    ):
        if math.isfinite(limit):
            assert judge({rule.name: limit}, RULES) == []
            if words:  # a side without words is one that no value can be on
                (doubt,) = judge({rule.name: outside}, RULES)
                assert (doubt.rule, doubt.refused) == (rule.name, rule.refused)
                assert doubt.text.startswith(words)
    assert judge({rule.name: math.nan}, RULES) == []


def test_names_are_unique_and_doubts_state_value_unit_and_range() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for name, value, shown in (
        ("lungs", 50.5, "50.5 mm, expected at least 120"),
        ("blank", 2, "2, expected at most 0"),
    ):
        assert shown in judge({name: value}, RULES)[0].text
