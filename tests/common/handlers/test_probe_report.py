import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image

from common.cohort.predictions import Predictions, read_predictions
from common.embeddings.bags import EmbeddingBags
from common.engines.best_probe import BestProbe
from common.engines.probe_grid import prevalence_report
from common.handlers.probe_report import ProbeReport
from common.metrics.bootstrap import bootstrap, interval_report, resample_weights
from common.metrics.multilabel import multilabel_report
from common.networks.mil_probe import ProbeGrid, load_probe
from common.networks.poolers import pad_bags

pytestmark = pytest.mark.usefixtures("any_values")

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]


@pytest.fixture
def engine(write_cohort: Any) -> Engine:
    """An engine that has chosen probe 3 (learned attention, lr .01) and tested it; class 2 is absent."""
    labels = np.random.default_rng(0).integers(0, 2, (13, 3))
    labels[:, 2] = 0
    engine = Engine(lambda engine, batch: None)
    engine.test_bags = EmbeddingBags(*write_cohort("test", 13, labels=labels), CLASSES)
    engine.grid = ProbeGrid(["max", "learned_attention"], [0.1, 0.01], dim=7, num_classes=3, seed=0)
    engine.best = BestProbe()
    scores, targets = np.random.default_rng(1).random((4, 13, 3)), engine.test_bags.labels.numpy()
    engine.best.offer(np.array([0.1, 0.2, 0.3, 0.4]), 20, engine.grid, scores, targets)
    engine.chosen_probe = lambda: engine.grid.probe(3)
    thresholds = engine.best.thresholds.numpy()
    report = multilabel_report(scores[3], targets, thresholds, CLASSES)
    engine.state.reports = {"probe": report, "prevalence": prevalence_report(targets, CLASSES)}
    engine.state.predictions = Predictions(
        "dale_ct_2s", engine.test_bags.volumes, CLASSES, scores[3], thresholds, targets.astype(float)
    )
    engine.state.validation = engine.state.predictions
    engine.state.seed_reports, engine.further_seeds = [report, report], [43]
    weights = resample_weights(engine.test_bags.volumes, 40, seed=0)
    engine.state.intervals = {
        "probe": interval_report(bootstrap(scores[3], targets, thresholds, weights), CLASSES)
    }
    return engine


def test_chosen_probe_is_saved_with_what_a_user_needs(engine: Engine, tmp_path: Path) -> None:
    ProbeReport(tmp_path / "out", seed=42).attach(engine)
    engine.run([0], max_epochs=1)
    probe, card = load_probe(tmp_path / "out")
    bags = [engine.test_bags[index]["tokens"] for index in range(13)]
    assert torch.equal(probe(*pad_bags(bags)), engine.grid.probe(3)(*pad_bags(bags)))
    expected = {
        "pooler": "learned_attention",
        "learning_rate": 0.01,
        "step": 20,
        "seed": 42,
        "validation_macro_auprc": 0.4,
        "dim": 7,
        "class_names": CLASSES,
        "encoder": "dale_ct_2s",
        "encoder_id": "sha256:dale_ct_2s",
        "preprocessing": "cropped_256",
        "slice_order": "feet_to_head",
    }
    assert {name: card[name] for name in expected} == expected
    assert card["thresholds"] == engine.best.thresholds.tolist()
    assert card["undefined_classes"]["auroc"] == ["Pleural effusion"]


def test_card_is_strict_json_even_without_any_defined_class(engine: Engine, tmp_path: Path) -> None:
    engine.state.reports["probe"]["macro"]["auroc"] = float("nan")
    ProbeReport(tmp_path, seed=42).attach(engine)
    engine.run([0], max_epochs=1)
    assert (
        json.loads((tmp_path / "probe.json").read_text(), parse_constant=pytest.fail)["test"]["auroc"] is None
    )


def test_per_class_table_names_an_undefined_metric(engine: Engine, tmp_path: Path) -> None:
    ProbeReport(tmp_path, seed=42).attach(engine)
    engine.run([0], max_epochs=1)
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == CLASSES
    labels = engine.test_bags.labels
    for index, name in enumerate(CLASSES[:2]):
        per_class = engine.state.reports["probe"]["per_class"][name]
        assert float(rows[name]["auroc"]) == pytest.approx(per_class["auroc"], abs=1e-6)
        assert float(rows[name]["auprc_of_prevalence"]) == pytest.approx(
            float(labels[:, index].mean()), abs=1e-6
        )
        assert int(rows[name]["positives"]) == int(labels[:, index].sum())
        assert rows[name]["volumes"] == "13"
    assert rows["Pleural effusion"]["auroc"] == rows["Pleural effusion"]["f1"] == "nan"
    assert rows["Pleural effusion"]["threshold"] == "0.500000"


def test_predictions_come_back_and_every_seed_has_a_row(engine: Engine, tmp_path: Path) -> None:
    ProbeReport(tmp_path, seed=42).attach(engine)
    engine.run([0], max_epochs=1)
    for name in ("test_predictions", "validation_predictions"):
        back = read_predictions(tmp_path / f"{name}.csv")
        np.testing.assert_array_equal(back.probabilities, engine.state.predictions.probabilities)
        assert back.volumes == engine.test_bags.volumes
    with (tmp_path / "seeds.csv").open(newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["42", "43"]
    with (tmp_path / "thresholds.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == CLASSES


def test_weights_of_slices_are_the_chosen_probes_attention(engine: Engine, tmp_path: Path) -> None:
    volume = engine.test_bags.volumes[5]
    ProbeReport(tmp_path, seed=42, attention_volumes=[volume]).attach(engine)
    engine.run([0], max_epochs=1)
    with (tmp_path / "attention.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["volume"] for row in rows} == {volume}
    bag, query = engine.test_bags[5]["tokens"], engine.grid.probe(3).pooler.queries[0]
    expected = (bag @ query / 7**0.5).softmax(0)
    assert [float(row["weight"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-6)
    assert [int(row["slice"]) for row in rows] == list(range(len(bag)))


@pytest.mark.parametrize("other", [{"token_kind": "grid"}, {"preprocessing": "tiled_5cut_items"}])
def test_tokens_that_are_no_slices_are_not_called_so(engine: Engine, tmp_path: Path, other: dict) -> None:
    engine.test_bags.identity = engine.test_bags.identity | other
    volume = engine.test_bags.volumes[5]
    ProbeReport(tmp_path, seed=42, attention_volumes=[volume], ct_dir=tmp_path).attach(engine)
    engine.run([0], max_epochs=1)
    with (tmp_path / "attention.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["volume", "token", "weight"]


def test_volume_to_show_that_is_not_tested_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention_volumes must be in the test set, got 'train_1_a_1'"):
        ProbeReport(tmp_path, seed=42, attention_volumes=["train_1_a_1"]).attach(engine)


def test_folder_of_ct_that_does_not_exist_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No folder '.*none'"):
        ProbeReport(tmp_path, seed=42, ct_dir=tmp_path / "none").attach(engine)


def test_ct_of_another_length_than_its_embedding_is_refused(engine: Engine, tmp_path: Path) -> None:
    volume, length = engine.test_bags.volumes[5], len(engine.test_bags[5]["tokens"])
    air = np.full((4, 4, length + 1), -1000, dtype=np.int16)
    image = nibabel.Nifti1Image(air, np.diag([-0.7, -0.7, 1.5, 1]))
    nibabel.save(image, tmp_path / f"{volume}.nii.gz")
    ProbeReport(tmp_path / "out", seed=42, attention_volumes=[volume], ct_dir=tmp_path).attach(engine)
    message = f"'{volume}' in .* has {length + 1} slices, its embedding {length}"
    with pytest.raises(ValueError, match=message):
        engine.run([0], max_epochs=1)


def test_pictures_are_drawn(engine: Engine, tmp_path: Path) -> None:
    ProbeReport(tmp_path, seed=42).attach(engine)
    engine.run([0], max_epochs=1)
    for name in ("roc", "precision_recall", "reliability", "attention"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    with Image.open(tmp_path / "per_class.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}
    assert {(0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77)} <= colours


def test_run_that_was_asked_to_stop_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    engine.state.stopped_early = True
    ProbeReport(tmp_path / "out", seed=42).attach(engine)
    engine.run([0], max_epochs=1)
    assert not (tmp_path / "out").exists()
