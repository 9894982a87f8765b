"""Probabilities are those of the probe on the embeddings, and a probe of other embeddings is refused."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from common.data.embedding_store import EmbeddingStore
from common.engines.predict import predict
from common.networks.mil_probe import MILProbe, save_probe
from common.networks.poolers import build_pooler
from common.short_errors import first_cause

BUNDLE = Path(__file__).resolve().parents[3] / "bundles" / "dale_ct_2s"
CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]
TINY = {
    **{"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    **{"layer_scale_init": 1.0, "amp_dtype": "float32", "embedding_dtype": "float32", "num_workers": 0},
    **{"encoder_weights": None, "seed": 42},
}
CARD = {
    "pooler": "average",
    "dim": 24,
    "class_names": CLASSES,
    "thresholds": [0.0, 0.5, 1.0],
    "encoder": "dale_ct_2s",
    "encoder_id": "random:42",
    "preprocessing": "cropped_32",
    "slice_order": "feet_to_head",
    "token_kind": "slice",
}


@pytest.fixture
def cts(tmp_path: Path) -> Path:
    folder = tmp_path / "ct"
    folder.mkdir()
    for seed, name in enumerate(("p1", "p2")):
        hu = np.random.default_rng(seed).integers(-1000, 500, (40, 40, 3 + seed)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([-1.0, -1.0, 2.0, 1.0])), folder / f"{name}.nii.gz")
    return folder


def probe_dir(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    card = CARD | changes
    save_probe(folder, MILProbe(build_pooler("average", card["dim"]), card["dim"], 3), card)
    return folder


def run(cts: Path, tmp_path: Path, **changes: Any) -> dict[str, list[dict[str, Any]]]:
    probe = probe_dir(tmp_path / "probe", **changes)
    return predict(BUNDLE, probe, cts, tmp_path / "out", encoder_knobs=TINY)


def test_probabilities_are_the_probes_on_the_stored_embeddings(
    cts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = run(cts, tmp_path)
    assert list(predictions) == ["p1", "p2"]
    torch.manual_seed(1)
    linear = MILProbe(build_pooler("average", 24), 24, 3).classifier
    for volume, rows in predictions.items():
        mean = EmbeddingStore(tmp_path / "out" / "embeddings").read(volume).tokens.mean(0)
        expected = 1 / (1 + np.exp(-(linear.weight @ mean + linear.bias).detach().numpy()))
        np.testing.assert_allclose([row["probability"] for row in rows], expected, rtol=1e-5)
        assert [row["class"] for row in rows] == CLASSES
        assert [row["call"] for row in rows] == [1, int(expected[1] >= 0.5), 0]
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == predictions
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["volume"], row["class"]) for row in rows] == [(v, c) for v in ("p1", "p2") for c in CLASSES]
    assert float(rows[1]["threshold"]) == 0.5
    shown = capsys.readouterr().out
    assert "p2\n" in shown
    assert "positive" in shown
    assert "2 volumes in" in shown


def test_a_page_shows_slices_probabilities_and_weights(cts: Path, tmp_path: Path) -> None:
    probe = probe_dir(tmp_path / "probe")
    predictions = predict(BUNDLE, probe, cts, tmp_path / "out", encoder_knobs=TINY, num_pages=1)
    assert [path.name for path in (tmp_path / "out").glob("*.html")] == ["p1.html"]
    page = (tmp_path / "out" / "p1.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    assert data["num_slices"] == 3
    assert data["z_mm"] == [0, 2, 4]
    assert data["attention"] == pytest.approx([1 / 3] * 3, abs=1e-5)  # the probe averages
    assert [(finding["name"], finding["called"]) for finding in data["findings"]] == [
        (row["class"], bool(row["call"])) for row in predictions["p1"]
    ]


def test_one_file_is_scored_alone(cts: Path, tmp_path: Path) -> None:
    everything = run(cts, tmp_path)
    assert run(cts / "p2.nii.gz", tmp_path) == {"p2": everything["p2"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "dinov2_ct"}, "encoder must be 'dinov2_ct' as of the .*, got 'dale_ct_2s'. Pass"),
        ({"encoder_id": "sha256:0"}, "encoder_id must be 'sha256:0' as of .*, got 'random:42'"),
        ({"dim": 25}, "dim must be 25 as of the embeddings .*, got 24"),
        ({"preprocessing": "cropped_full_2"}, "strategy must be one of .*, got 'cropped_full_2'"),
    ],
)
def test_a_probe_of_other_embeddings_is_refused(
    cts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, RuntimeError)) as caught:  # MONAI wraps those of components
        run(cts, tmp_path, **changes)
    cause = first_cause(caught.value)
    assert isinstance(cause, ValueError)
    assert re.search(message, str(cause))


def test_what_is_missing_is_named(cts: Path, tmp_path: Path) -> None:
    probe = probe_dir(tmp_path / "probe")
    with pytest.raises(ValueError, match="encoder_bundle must be a folder, got none. Pass --encoder_bundle"):
        predict(None, probe, cts, tmp_path)
    with pytest.raises(ValueError, match="probe_dir must be a folder, got none. Pass --probe_dir"):
        predict(BUNDLE, None, cts, tmp_path)
    with pytest.raises(FileNotFoundError, match="encoder_bundle must have configs/inference.json, got none"):
        predict(tmp_path, probe, cts, tmp_path)
    with pytest.raises(ValueError, match="encoder_knobs must be knobs of .*, got 'patch_px', which it lacks"):
        predict(BUNDLE, probe, cts, tmp_path, encoder_knobs={"patch_px": 8})
