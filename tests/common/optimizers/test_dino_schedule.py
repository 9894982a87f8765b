"""Schedules against their values at the ends, in the middle, and against torch's own cosine."""

import math

import pytest
import torch

from common.optimizers.dino_schedule import DINOSchedule, cosine

SETTINGS = {
    **{"max_steps": 20, "warmup_steps": 5, "lr": 0.1, "final_lr": 0.01, "weight_decay": [0.04, 0.2]},
    **{"teacher_momentum": [0.994, 1.0], "teacher_temp": [0.04, 0.07], "teacher_temp_warmup_steps": 6},
    "freeze_last_layer_steps": 3,
}


def schedule(**changes) -> DINOSchedule:
    facts = [(1.0, True, False), (0.5, False, False), (1.0, True, True)]
    groups = [
        {
            "params": [torch.nn.Parameter(torch.zeros(1))],
            "lr_multiplier": multiplier,
            "decays": decays,
            "is_last_layer": last,
        }
        for multiplier, decays, last in facts
    ]
    return DINOSchedule(torch.optim.SGD(groups, lr=1.0), **SETTINGS | changes)


def values(name: str, group: int) -> list[float]:
    own = schedule()
    found = []
    for step in range(21):
        own.set_step(step)
        found.append(own.optimizer.param_groups[group][name])
    return found


def test_the_learning_rate_rises_and_falls_like_torchs_schedulers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5)
    expected = []
    for _ in range(5):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rising.step()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = 0.1
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15, eta_min=0.01)
    for _ in range(16):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        falling.step()
    assert values("lr", 0) == pytest.approx(expected)
    assert values("lr", 1) == pytest.approx([lr / 2 for lr in expected])
    assert values("lr", 2) == pytest.approx([0, 0, 0, *expected[3:]])  # frozen at first


def test_weight_decay_rises_where_there_is_any():
    expected = [0.2 - 0.16 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(21)]
    assert values("weight_decay", 0) == pytest.approx(expected)
    assert values("weight_decay", 1) == [0.0] * 21


def test_the_teacher_slows_down_to_a_stand_and_grows_less_sharp():
    own = schedule()
    steps = [own.set_step(step) for step in range(21)]
    assert [steps[at].momentum for at in (0, 10, 20)] == pytest.approx([0.994, 0.997, 1.0])
    assert [steps[at].temperature for at in (0, 2, 6, 20)] == pytest.approx([0.04, 0.05, 0.07, 0.07])
    assert schedule(teacher_temp_warmup_steps=0).set_step(0).temperature == 0.07


def test_a_cosine_is_symmetric_about_its_middle_and_stays_at_its_end():
    early, late = cosine(3, 2.0, 8.0, 10), cosine(7, 2.0, 8.0, 10)
    assert early + late == pytest.approx(10)
    assert cosine(11, 2.0, 8.0, 10) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 21}, "warmup_steps must be between 0 and max_steps = 20, got 21"),
        (
            {"freeze_last_layer_steps": -1},
            "freeze_last_layer_steps must be between 0 and max_steps = 20, got -1",
        ),
        ({"teacher_momentum": [0.9]}, r"teacher_momentum must be a first and a last value, got \[0.9\]"),
        ({"teacher_temp": [0, 0.07]}, r"teacher_temp must be positive, got \[0, 0.07\]"),
    ],
)
def test_settings_without_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        schedule(**changes)
