"""Scores are those of changed files embedded one by one; runs resume; what does not fit is refused."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from common.embeddings.encoder_bundle import open_encoder_bundle
from common.embeddings.store import EmbeddingStore
from common.engines.scan_robustness import read_scores, scan_robustness
from common.networks.mil_probe import MILProbe, load_probe, save_probe
from common.networks.poolers import build_pooler
from common.reports.results import ResultRow, read_rows
from tests.common.engines.conftest import TINY, save_ct, trunk

BUNDLE = Path(__file__).resolve().parents[3] / "bundles" / "dale_ct_2s"
CLASSES = ["Emphysema", "Lung nodule"]
CHANGES = ["thicker_slices", "flipped_head_feet", "hu_offset", "coarser_pixels"]
NUM_VOLUMES = 8


def volumes() -> dict[str, np.ndarray]:
    return {f"valid_{number}_a_1": trunk(number, 8 + number) for number in range(1, NUM_VOLUMES + 1)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight CTs with labels, one that is damaged, one without labels, and a probe."""
    root = tmp_path_factory.mktemp("robustness")
    for volume, hu in volumes().items():
        save_ct(root / "ct" / f"{volume}.nii.gz", hu)
    save_ct(root / "ct" / "valid_77_a_1.nii.gz", trunk(77, 9))
    (root / "ct" / "valid_9_a_1.nii.gz").write_bytes(b"no gzip")
    rows = [
        [f"{volume}.nii.gz", place % 2, int(place < 3)]
        for place, volume in enumerate([*volumes(), "valid_9_a_1"])
    ]
    with (root / "labels.csv").open("w") as file:
        csv.writer(file).writerows([["VolumeName", *CLASSES], *rows])
    probe_of(root / "probe")
    return root


def probe_of(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    card = {
        **{"pooler": "max", "dim": 24, "class_names": CLASSES, "thresholds": [0.625, 0.528]},
        **{"encoder": "dale_ct_2s", "encoder_id": "random:42:layer_scale=1", "preprocessing": "cropped_32"},
        **{"slice_order": "feet_to_head", "token_kind": "slice", "note": "SYNTHETIC <probe>"},
    }
    save_probe(folder, MILProbe(build_pooler("max", 24), 24, 2), card | changes)
    return folder


def run(root: Path, out: Path, **others: Any) -> list[ResultRow]:
    settings = {
        **{"encoder_bundle": BUNDLE, "probe_dir": root / "probe", "dataset_dir": root / "ct"},
        **{"labels_csv": root / "labels.csv", "output_dir": out, "dataset_name": "trunks"},
        **{"results_csv": out / "results.csv", "changes": CHANGES, "masks_dir": None, "encoder_configs": ()},
        **{"encoder_knobs": TINY | {"max_rejected": 0.2}, "num_resamples": 60, "resampling": "patients"},
        **{"seed": 3, "tracking_uri": f"sqlite:///{root}/mlflow.db", "experiment": "robustness"},
    }
    return scan_robustness(**(settings | others))


@pytest.fixture(scope="module")
def measured(root: Path) -> tuple[Path, list[ResultRow]]:
    return root / "out", run(root, root / "out")


def in_pairs(hu: np.ndarray) -> np.ndarray:
    return hu[: len(hu) // 2 * 2].reshape(-1, 2, 64, 64).mean(1).round().astype(np.int16)


def one_by_one(
    root: Path, folder: Path, changed: dict[str, np.ndarray], spacing_mm: float = 8.0
) -> np.ndarray:
    """Probabilities of CTs that were written changed, embedded by their bundle and read by the probe."""
    folder.mkdir()
    for volume, hu in changed.items():
        save_ct(folder / "ct" / f"{volume}.nii.gz", hu, spacing_mm)
    knobs = {
        "dataset_dir": str(folder / "ct"),
        "output_dir": str(folder / "out"),
        "strategies": ["cropped_32"],
    }
    bundle = open_encoder_bundle(BUNDLE, (), TINY | knobs)
    _ = bundle.network  # its random weights are those of the seed
    _ = bundle["run"]
    store, (probe, _) = EmbeddingStore(folder / "out"), load_probe(root / "probe")
    with torch.no_grad():
        bags = [store.read(volume).tokens[None] for volume in changed]
        logits = [probe(bag, torch.ones(bag.shape[:2], dtype=torch.bool))[0] for bag in bags]
    return torch.stack(logits).sigmoid().numpy()


def test_probabilities_are_those_of_files_that_were_changed(measured, root, tmp_path) -> None:
    scores = read_scores(measured[0] / "volumes", list(volumes()))
    files = {
        0: (volumes(), 8.0),
        1: ({volume: in_pairs(hu) for volume, hu in volumes().items()}, 16.0),
        4: ({volume: np.ascontiguousarray(hu[::-1]) for volume, hu in volumes().items()}, 8.0),
        8: ({volume: hu + np.int16(28) for volume, hu in volumes().items()}, 8.0),
    }
    for place, (changed, spacing_mm) in files.items():
        expected = one_by_one(root, tmp_path / str(place), changed, spacing_mm)
        np.testing.assert_allclose(scores.probabilities[:, place], expected, atol=1e-5)
    np.testing.assert_allclose(scores.cosines[:, 0], 1, atol=1e-9)
    np.testing.assert_allclose(scores.cosines[:, 4], 1, atol=1e-6)  # each slice beside its own
    assert np.isnan(scores.cosines[:, -3:]).all()  # pixels of 6 mm are coarser already


def test_rows_are_the_metrics_before_and_after(measured) -> None:
    out, rows = measured
    scores = read_scores(out / "volumes", list(volumes()))
    labels = np.array([[place % 2, place < 3] for place in range(NUM_VOLUMES)], float)
    found = {(row.encoder, row.protocol, row.metric): row for row in rows}
    before, after = scores.probabilities[:, 0], scores.probabilities[:, 1]
    protocol = "robustness_thicker_slices_2"
    for metric, function in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
        expected = [np.mean([function(labels[:, c], of[:, c]) for c in (0, 1)]) for of in (before, after)]
        assert found["dale_ct_2s", "robustness_unchanged", f"macro_{metric}"].value == pytest.approx(
            expected[0]
        )
        assert found["dale_ct_2s", protocol, f"macro_{metric}"].value == pytest.approx(expected[1])
        change = found["dale_ct_2s", protocol, f"macro_{metric}_change"]
        assert change.value == pytest.approx(expected[1] - expected[0])
        assert change.low <= change.value <= change.high
    flips = (before >= [0.625, 0.528]) != (after >= [0.625, 0.528])
    assert found["dale_ct_2s", protocol, "calls_flipped"].value == pytest.approx(flips.mean())
    moved = found["dale_ct_2s", protocol, "probability_change"]
    assert moved.value == pytest.approx(np.abs(after - before).mean())
    assert moved.low < moved.value < moved.high
    assert found["prevalence", "robustness_unchanged", "macro_auroc"].value == 0.5
    unmoved = found["dale_ct_2s", "robustness_flipped_head_feet", "macro_auroc_change"]
    assert unmoved.numbers == (0, 0, 0)
    assert not any("coarser_pixels" in row.protocol for row in rows)
    assert {row.key for row in read_rows(out / "results.csv")} == {row.key for row in rows}
    assert {row.n for row in rows} == {NUM_VOLUMES}


def test_what_is_left_says_what_was_refused_and_what_the_probe_is(measured) -> None:
    out, _ = measured
    with (out / "rejected.csv").open() as file:
        assert [row["volume"] for row in csv.DictReader(file)] == ["valid_9_a_1"]
    page = (out / "robustness.html").read_text()
    assert "SYNTHETIC &lt;probe&gt;" in page
    assert "8 volumes of 8 patients, 1 refused" in page
    assert "coarser_pixels_3 (needs finer pixels)" in page
    with (out / "robustness.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["class"] for line in lines} == {"macro", *CLASSES}


def test_a_stopped_run_goes_on_with_what_is_missing(measured, root, monkeypatch, tmp_path) -> None:
    out, rows = measured
    (tmp_path / "volumes").mkdir()
    for path in sorted((out / "volumes").iterdir())[:5]:
        (tmp_path / "volumes" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "settings.json").write_bytes((out / "settings.json").read_bytes())
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "volumes").iterdir()}
    again = run(root, tmp_path)
    assert [row._replace(commit="") for row in again] == [row._replace(commit="") for row in rows]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((tmp_path / "volumes").iterdir())) == NUM_VOLUMES
    with pytest.raises(ValueError, match="was measured with seed 3, now 4"):
        run(root, tmp_path, seed=4)
    shutil.copytree(root / "ct", tmp_path / "ct")
    save_ct(tmp_path / "ct" / "valid_2_a_1.nii.gz", trunk(99, 10))
    with pytest.raises(ValueError, match="'valid_2_a_1' was measured in .* from another file"):
        run(root, tmp_path, dataset_dir=tmp_path / "ct")
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["encoder_id"] == "random:42:layer_scale=1"


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"changes": ["thickness"]}, "got 'thickness'. Did you mean"),
        ({"encoder_knobs": TINY | {"seed": 7}}, "encoder_id of the embeddings must be"),
        (
            {"encoder_bundle": BUNDLE.with_name("ct_fm"), "encoder_knobs": {}},
            "must encode slices, got 'ct_fm'",
        ),
        ({"probe_dir": None}, "Pass --encoder_bundle and --probe_dir"),
        ({"dataset_dir": "valid_1_a_1.nii.gz"}, "at least 2 patients, got 1"),
        ({"labels": 0}, "No class has positive and negative volumes among the 8"),
        ({"encoder_knobs": TINY | {"max_rejected": 0.0}}, "more than --max_rejected"),
    ],
)
def test_what_does_not_fit_is_refused(others, message, root, tmp_path) -> None:
    if "dataset_dir" in others:
        others = {"dataset_dir": root / "ct" / others["dataset_dir"]}
    if "labels" in others:
        rows = [[f"{volume}.nii.gz", 0, 1] for volume in volumes()]
        with (tmp_path / "labels.csv").open("w") as file:
            csv.writer(file).writerows([["VolumeName", *CLASSES], *rows])
        others = {"labels_csv": tmp_path / "labels.csv"}
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "out", **{"changes": ["transposed"]} | others)
