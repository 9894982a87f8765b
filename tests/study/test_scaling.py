import csv
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from common.reports.results import FIELDS, ResultRow
from study import scaling
from study.plan import SIZES
from study.run import keys_of
from study.stages import REPOSITORY, all_stages

SMALL, OUT = SIZES["small"], Path("study/out/test")


@pytest.fixture
def stages() -> list:
    return scaling.scaling_stages(SMALL, OUT, "bfloat16", max_steps=250, seeds=2)


def test_cohort_and_floors_are_the_study_s_own(stages):
    study, curve = keys_of(all_stages(SMALL, OUT, "bfloat16")), keys_of(stages)
    shared = {
        "site a",
        "shards",
        "table III random_weights",
        "table III intensity_histogram",
        "table III pixels",
    }
    assert {name: key for name, key in study.items() if name in curve} == {
        name: curve[name] for name in shared
    }


def test_there_is_a_training_for_each_encoder_length_and_seed(stages):
    trained = [stage.commands for stage in stages if stage.name.startswith("scaling ")]
    assert len(trained) == 2 * 2 * 2
    found = set()
    for train, *embed, probe in trained:
        option = dict(zip(train[4::2], train[5::2], strict=False)) | {
            "root": train[train.index("--bundle_root") + 1]
        }
        found.add((option["root"], option["--max_steps"], option["--seed"]))
        assert int(option["--warmup_steps"]) < int(option["--max_steps"])
        weights = option["--encoder_weights"]
        assert all(words[words.index("--encoder_weights") + 1] == weights for words in embed)
        assert Path(weights).parent == Path(option["--output_dir"])
        assert probe[probe.index("--standardize") + 1] == "True"
    assert found == {
        (f"bundles/{name}", steps, seed)
        for name in scaling.ENCODERS
        for steps in ("64", "250")
        for seed in ("1", "2")
    }


def test_views_of_a_step_are_those_of_the_demo():
    demo = json.loads((REPOSITORY / "demo" / "train.json").read_text())
    assert scaling.views_a_step(SMALL) == demo["batch_size"] * (2 + 8)


@pytest.fixture
def rows() -> list[ResultRow]:
    return [
        ResultRow(
            scaling.point_name(name, steps, seed),
            scaling.PROTOCOL,
            "ct_rate",
            metric,
            steps / 5000 + seed / 50,
        )
        for name in scaling.ENCODERS
        for steps in (250, 64)
        for seed in (1, 2)
        for metric in scaling.MEASURES
    ]


def test_values_are_gathered_by_steps(rows):
    other = ResultRow("dale_ct_0_64_steps_seed_1", "mil_probe", "ct_rate", "macro_auroc", 0.9)
    values = scaling.points([*rows, other], "dale_ct_0", "macro_auroc")
    assert list(values) == [64, 250]
    assert values[64] == pytest.approx([64 / 5000 + 0.02, 64 / 5000 + 0.04])


def test_a_line_goes_through_the_means_and_floors_are_levels(rows):
    floor = ResultRow("pixels", scaling.PROTOCOL, "ct_rate", "macro_auroc", 0.58, 0.53, 0.63)
    plain = floor._replace(protocol="mil_probe", value=0.1)
    axes = Figure().subplots()
    scaling.draw_panel(axes, rows, [floor, plain], "macro_auroc", 160)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["dale_ct_2s"].get_xdata()) == [64 * 160, 250 * 160]
    assert list(lines["dale_ct_2s"].get_ydata()) == pytest.approx([64 / 5000 + 0.03, 250 / 5000 + 0.03])
    assert lines["pixels"].get_ydata()[0] == 0.58


def test_the_picture_is_drawn_from_the_results(rows, tmp_path):
    (tmp_path / "results").mkdir()
    floors = [
        ResultRow("pixels", scaling.PROTOCOL, "ct_rate", metric, 0.58, 0.53, 0.63)
        for metric in scaling.MEASURES
    ]
    for name, of_file in (("scaling", rows), ("eval_ct_rate", floors)):
        with (tmp_path / "results" / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([FIELDS, *of_file])
    assert Image.open(scaling.draw(tmp_path, 160)).width > 800
