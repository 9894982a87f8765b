"""The robustness card as users run it: on phantoms in CT-RATE's layout, with their masks."""

import csv
import json
from pathlib import Path

import pytest
import torch

from common.cohort.cohort import load_labels
from common.networks.mil_probe import MILProbe, save_probe
from common.networks.poolers import build_pooler
from common.reports.results import read_rows
from common.transforms.scan_changes import CHANGES
from data_prep.phantom.cohort import Settings, write_cohort
from tests.bundles.conftest import BUNDLES

ENCODER = {
    **{"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    **{"layer_scale_init": 1.0, "amp_dtype": "float32", "num_workers": 0, "encoder_weights": None},
}


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    card = {
        **{"pooler": "average", "dim": 24, "class_names": [one.name for one in load_labels("ct_rate")]},
        **{"thresholds": 18 * [0.5], "encoder": "dale_ct_2s", "encoder_id": "random:42:layer_scale=1"},
        **{"preprocessing": "cropped_32", "slice_order": "feet_to_head", "token_kind": "slice"},
    }
    torch.manual_seed(0)
    save_probe(tmp_path / "probe", MILProbe(build_pooler("average", 24), 24, 18), card)
    return tmp_path / "probe"


def test_every_change_of_a_phantom_is_measured_or_said_to_be_left_out(workflow, probe, tmp_path) -> None:
    cohort = tmp_path / "cohort"
    list(write_cohort(cohort, 8, Settings(seed=3, matrix=64, slice_mm=(9.0, 9.0), valid_share=0.6), 1))
    run = workflow(
        "eval_robustness",
        "evaluate",
        **{"dataset_dir": cohort, "encoder_bundle": BUNDLES / "dale_ct_2s", "probe_dir": probe},
        **{"masks_dir": cohort / "dataset" / "ts_seg" / "ts_total" / "valid_fixed", "num_resamples": 20},
        encoder_knobs=ENCODER,
    )
    run.run()
    run.finalize()
    rows = read_rows(tmp_path / "results.csv")
    page = (tmp_path / "out" / "robustness.html").read_text()
    for name, change in CHANGES.items():
        for strength in change.strengths:
            kind = f"{name}_{strength:g}" if change.axis else name
            metrics = {row.metric for row in rows if row.protocol == f"robustness_{kind}"}
            assert len(metrics) == 7 or f"{kind} (needs {change.needs})" in page
    assert {row.encoder for row in rows} == {"dale_ct_2s", "prevalence"}
    assert any(row.protocol == "robustness_more_contrast_300" for row in rows)
    with (tmp_path / "out" / "robustness.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len({line["class"] for line in lines}) == 19
    assert all(0 < float(line["p"]) <= 1 for line in lines if line["p"] not in ("", "nan"))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["masks"] is True
