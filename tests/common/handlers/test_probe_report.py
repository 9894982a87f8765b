import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image

from common.embeddings.bags import EmbeddingBags
from common.engines.probe_grid import BestProbe, prevalence_report
from common.handlers.probe_report import ProbeReport, ResultsTable, read_slices, volumes_to_show
from common.metrics.bootstrap import bootstrap, interval_report, resample_weights
from common.metrics.multilabel import multilabel_report
from common.networks.mil_probe import ProbeGrid, load_probe
from common.networks.poolers import pad_bags
from common.reports.results import Predictions, read_predictions, read_rows

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
    engine.state.exit_status = 143
    ProbeReport(tmp_path / "out", seed=42).attach(engine)
    engine.run([0], max_epochs=1)
    assert not (tmp_path / "out").exists()


class Bags:
    """Three test volumes, of which only the origin matters here."""

    def __init__(self, encoder: str) -> None:
        self.identity = {"encoder": encoder}

    def __len__(self) -> int:
        return 3


def evaluation(encoder: str = "dale_ct_2s", further_seeds: Sequence[int] = ()) -> Engine:
    """An engine that has trained and tested a probe."""
    engine = Engine(lambda engine, batch: None)
    report = multilabel_report(
        [[0.1, 0.2], [0.8, 0.3], [0.3, 0.1]], [[0, 0], [1, 0], [1, 0]], [0.5, 0.5], ["A", "B"]
    )
    floor = multilabel_report([[0.0, 0.0]] * 3, [[0, 0], [1, 0], [1, 0]], [0.0, 0.0], ["A", "B"])
    engine.state.reports = {"probe": report, "prevalence": floor}
    engine.state.intervals = {
        subject: {"macro": dict.fromkeys(report["macro"], (0.25, 0.75))}
        for subject in ("probe", "prevalence")
    }
    engine.state.seed_reports = [report, floor, floor] if further_seeds else [report]
    engine.further_seeds = list(further_seeds)
    engine.test_bags = Bags(encoder)
    return engine


def run(engine: Engine, path: Path) -> None:
    ResultsTable(path=path, protocol="mil_probe", dataset="ct_rate", seed=42, config={"lr": 0.1}).attach(
        engine
    )
    engine.run([0], max_epochs=1)


def test_evaluation_adds_four_rows_for_the_encoder_and_four_for_the_floor(tmp_path: Path) -> None:
    run(evaluation(), tmp_path / "results" / "eval_ct_rate.csv")
    rows = read_rows(tmp_path / "results" / "eval_ct_rate.csv")
    values = {(row.encoder, row.metric): row.value for row in rows}
    assert values == pytest.approx(
        {
            ("dale_ct_2s", "macro_auroc"): 1.0,
            ("dale_ct_2s", "macro_auprc"): 1.0,
            ("dale_ct_2s", "macro_f1"): 2 / 3,
            ("dale_ct_2s", "macro_balanced_accuracy"): 0.75,
            ("prevalence", "macro_auroc"): 0.5,
            ("prevalence", "macro_auprc"): 2 / 3,
            ("prevalence", "macro_f1"): 0.8,
            ("prevalence", "macro_balanced_accuracy"): 0.5,
        },
        abs=1e-6,
    )
    assert {row.n for row in rows} == {3}
    assert {(row.low, row.high) for row in rows} == {(0.25, 0.75)}
    assert {(row.encoder, row.seeds) for row in rows} == {("dale_ct_2s", "42"), ("prevalence", "")}
    assert len({row.config_hash for row in rows}) == 1


def test_further_seeds_add_four_rows_of_their_mean_and_range(tmp_path: Path) -> None:
    run(evaluation(further_seeds=(43, 44)), tmp_path / "r.csv")
    rows = {row.metric: row for row in read_rows(tmp_path / "r.csv") if row.protocol == "mil_probe_seeds"}
    assert len(rows) == 4
    auroc = rows["macro_auroc"]  # 1 with one seed and .5 with two
    assert auroc.numbers == pytest.approx((2 / 3, 0.5, 1.0), abs=1e-6)
    assert (auroc.encoder, auroc.seeds, auroc.n) == ("dale_ct_2s", "42 43 44", 3)


def test_second_encoder_joins_and_a_second_run_replaces(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    run(evaluation(), path)
    run(evaluation("random"), path)
    first = read_rows(path)
    assert len(first) == 12
    run(evaluation("random"), path)
    assert read_rows(path) == first


def test_run_that_was_asked_to_stop_adds_nothing(tmp_path: Path) -> None:
    engine = evaluation()
    engine.state.exit_status = 143
    run(engine, tmp_path / "r.csv")
    assert not (tmp_path / "r.csv").exists()


N = 40


def predictions() -> Predictions:
    """The last class never occurs."""
    rng = np.random.default_rng(0)
    labels = (rng.random((N, 3)) < 0.4).astype(float)
    labels[:, 2] = 0
    scores = (0.5 * labels + 0.5 * rng.random((N, 3))).round(1)
    volumes = [f"valid_{index}_a_1" for index in range(N)]
    return Predictions("dale_ct_2s", volumes, CLASSES, scores, np.array([0.6, 0.4, 0.5]), labels)


def test_volumes_to_show_are_the_surest_true_positives() -> None:
    p = predictions()
    chosen = volumes_to_show(p)
    for volume, name in chosen.items():
        row, column = p.volumes.index(volume), CLASSES.index(name)
        assert p.labels[row, column] == 1
        assert p.probabilities[row, column] == p.probabilities[p.labels[:, column] == 1, column].max()
    assert "Pleural effusion" not in chosen.values()
    assert len(volumes_to_show(p, most=1)) == 1
    assert volumes_to_show(p._replace(thresholds=np.full(3, 2.0))) == {}


def test_slices_are_read_feet_to_head(tmp_path: Path) -> None:
    # stored head to feet: the affine's z runs downwards
    hu = np.arange(5, dtype=np.int16)[None, None].repeat(3, 0).repeat(4, 1) - 1000
    affine = np.diag([1.0, 1.0, -2.0, 1.0])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / "deep" / "er" / "valid_1_a_1.NII")
    read = read_slices(tmp_path, ["valid_1_a_1"])["valid_1_a_1"]
    assert read.shape == (5, 4, 4)
    assert read[:, 0, 1].tolist() == [-996, -997, -998, -999, -1000]


def test_missing_ct_is_refused(tmp_path: Path) -> None:
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([2, 2, 2, 1])), tmp_path / "a.nii"
    )
    with pytest.raises(FileNotFoundError, match="No CT of 'valid_1_a_1' in"):
        read_slices(tmp_path, ["valid_1_a_1"])
