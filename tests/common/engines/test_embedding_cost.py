from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from common.engines import embedding_cost as module
from common.engines.embedding_cost import tokens_per_slice
from common.reports.results import read_rows
from common.transforms.slice_strategies import SliceStrategy

pytestmark = pytest.mark.usefixtures("any_values")

CONFIG = Path(__file__).resolve().parents[3] / "bundles" / "dale_ct_2s" / "configs" / "inference.json"
TINY: dict[str, Any] = {
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 2,
    "layer_scale_init": 1.0,
    "num_workers": 1,
}
TINY |= {"img_size_px": 32, "patch_size_px": 8, "amp_dtype": "float32", "encoder_weights": "$None"}


@pytest.mark.parametrize(
    ("name", "side_px", "box", "expected"),
    [
        ("cropped_256", 512, (0, 0, 400), 16 * 16 + 1),
        ("raw_144", 512, None, 9 * 9 + 1),
        ("raw_full", 512, None, 32 * 32 + 1),
        ("raw_full", 700, None, 32 * 32 + 1),
        ("cropped_full", 512, (40, 30, 333), 20 * 20 + 1),
        ("tiled_5cut", 512, (40, 30, 333), 5 * (16 * 16 + 1)),
    ],
)
def test_tokens_are_patches_of_all_images_and_their_cls(name, side_px, box, expected):
    assert tokens_per_slice(SliceStrategy(name, 16), side_px, box) == expected


def test_cost_lands_beside_the_score_of_a_strategy(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "short_errors", lambda: None)
    (tmp_path / "ct").mkdir()
    rng = np.random.default_rng(0)
    for number, length in enumerate((5, 4, 3)):
        hu = np.full((48, 48, length), -1000, np.int16)
        hu[4:40, 4:40] = rng.integers(-100, 200, (36, 36, length))
        image = nib.Nifti1Image(hu, np.diag([-1.5, -1.5, 3.0, 1.0]))
        nib.save(image, tmp_path / "ct" / f"valid_{number}_a_1.nii.gz")
    arguments = ["--config-file", CONFIG, "--dataset-dir", tmp_path / "ct", "--volumes", 2]
    arguments += ["--strategy", "raw_32", "--strategy", "raw_full", "--results-csv", tmp_path / "results.csv"]
    arguments += [word for name, value in TINY.items() for word in (f"--{name}", value)]
    answer = CliRunner().invoke(module.app, [*map(str, arguments)])
    assert answer.exit_code == 0, answer.exception
    rows = {(row.protocol, row.metric): row for row in read_rows(tmp_path / "results.csv")}
    assert rows["preprocessing_raw_32", "tokens_per_slice"].value == 4 * 4 + 1
    assert rows["preprocessing_raw_full", "tokens_per_slice"].value == 6 * 6 + 1
    speed = rows["preprocessing_raw_32", "slices_per_second"]
    assert speed.value > 0
    assert (speed.encoder, speed.n) == ("dale_ct_2s", 2)
    misspelt = CliRunner().invoke(module.app, [*map(str, arguments), "--embed_dims", "8"])
    assert "embed_dims" in str(misspelt.exception)
