import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image

from common.embeddings.bags import EmbeddingBags
from common.engines.probe_grid import BestProbe
from common.handlers.probe_report import ProbeReport, read_slices, volumes_to_show
from common.metrics.bootstrap import bootstrap, interval_report, resample_weights
from common.metrics.multilabel import multilabel_report
from common.networks.mil_probe import ProbeGrid, load_probe
from common.networks.poolers import pad_bags
from common.reports.results import Predictions, read_predictions, read_rows
from tests.common.conftest import CLASSES, predictions

pytestmark = pytest.mark.usefixtures("any_values")


@pytest.fixture
def engine(write_cohort: Any) -> Engine:
    """An engine that has chosen probe 3 (learned attention, lr .01) and tested it; class 2 is absent."""
    labels = np.random.default_rng(0).integers(0, 2, (13, 3))
    labels[:, 2] = 0
    engine = Engine(lambda engine, batch: None)
    engine.test_bags = EmbeddingBags(*write_cohort("test", 13, labels=labels), CLASSES)
    poolers, rates = ["max", "learned_attention"], [0.1, 0.01]
    engine.grid = ProbeGrid(poolers=poolers, learning_rates=rates, dim=7, num_classes=3, seed=0)
    engine.best = BestProbe()
    scores, targets = np.random.default_rng(1).random((4, 13, 3)), engine.test_bags.labels.numpy()
    auprc = np.array([0.1, 0.2, 0.3, 0.4])
    given = {"weights_of": lambda index: engine.grid.probe(index).state_dict(), "scores": scores}
    engine.best.offer(auprc=auprc, step=20, targets=targets, **given)
    engine.chosen_probe = lambda: engine.grid.probe(3)
    thresholds = engine.best.thresholds.numpy()
    report = multilabel_report(scores[3], targets, thresholds, CLASSES)
    floor = (np.zeros(targets.shape), targets, np.zeros(3))
    engine.state.reports = {"probe": report, "prevalence": multilabel_report(*floor, CLASSES)}
    engine.state.predictions = Predictions(
        "dale_ct_2s", engine.test_bags.volumes, CLASSES, scores[3], thresholds, targets.astype(float)
    )
    engine.state.validation = engine.state.predictions
    engine.state.seed_reports, engine.further_seeds = [report, report], [43]
    weights = resample_weights(engine.test_bags.volumes, 40, seed=0)
    engine.state.intervals = {
        "probe": interval_report(bootstrap(scores[3], targets, thresholds, weights), CLASSES),
        "prevalence": interval_report(bootstrap(*floor, weights), CLASSES),
    }
    return engine


def run(engine: Engine, tmp_path: Path, ct_dir: Path | None = None) -> Path:
    """Write the report and return its folder."""
    facts = {"protocol": "mil_probe", "dataset_name": "ct_rate", "seed": 42, "settings": {"lr": 0.1}}
    paths = {"output_dir": tmp_path / "out", "results_csv": tmp_path / "results" / "all.csv"}
    ProbeReport(**paths, **facts, ct_dir=ct_dir, note="drawn").attach(engine)
    engine.run([0], max_epochs=1)
    return tmp_path / "out"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_chosen_probe_is_saved_with_what_a_user_needs(engine: Engine, tmp_path: Path) -> None:
    probe, card = load_probe(run(engine, tmp_path))
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
    assert card["note"] == "drawn"


def test_card_is_strict_json_even_without_any_defined_class(engine: Engine, tmp_path: Path) -> None:
    engine.state.reports["probe"]["macro"]["auroc"] = float("nan")
    text = (run(engine, tmp_path) / "probe.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["test"]["auroc"] is None


def test_tables_predictions_and_pictures_are_written(engine: Engine, tmp_path: Path) -> None:
    out, labels = run(engine, tmp_path), engine.test_bags.labels
    rows = {row["class"]: row for row in table(out / "per_class.csv")}
    assert list(rows) == CLASSES
    for index, name in enumerate(CLASSES[:2]):
        per_class = engine.state.reports["probe"]["per_class"][name]
        assert float(rows[name]["auroc"]) == pytest.approx(per_class["auroc"], abs=1e-6)
        prevalence = float(labels[:, index].mean())
        assert float(rows[name]["auprc_of_prevalence"]) == pytest.approx(prevalence, abs=1e-6)
        assert int(rows[name]["positives"]) == int(labels[:, index].sum())
        assert rows[name]["volumes"] == "13"
    assert rows["Pleural effusion"]["auroc"] == rows["Pleural effusion"]["f1"] == "nan"
    assert rows["Pleural effusion"]["threshold"] == "0.500000"
    for name in ("test_predictions", "validation_predictions"):
        back = read_predictions(out / f"{name}.csv")
        np.testing.assert_array_equal(back.probabilities, engine.state.predictions.probabilities)
        assert back.volumes == engine.test_bags.volumes
    assert [row["seed"] for row in table(out / "seeds.csv")] == ["42", "43"]
    assert [row["class"] for row in table(out / "thresholds.csv")] == CLASSES
    for name in ("roc", "precision_recall", "reliability", "attention"):
        assert (out / f"{name}.png").stat().st_size > 1000
    with Image.open(out / "per_class.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}
    assert {(0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77)} <= colours


def test_weights_of_slices_are_the_chosen_probes_attention(engine: Engine, tmp_path: Path) -> None:
    rows = table(run(engine, tmp_path) / "attention.csv")
    shown = volumes_to_show(engine.state.predictions)
    assert list(dict.fromkeys(row["volume"] for row in rows)) == list(shown)
    query = engine.grid.probe(3).pooler.queries[0]
    for volume in shown:
        bag = engine.test_bags[engine.test_bags.volumes.index(volume)]["tokens"]
        of_volume = [row for row in rows if row["volume"] == volume]
        expected = (bag @ query / 7**0.5).softmax(0)
        assert [float(row["weight"]) for row in of_volume] == pytest.approx(expected.tolist(), abs=1e-6)
        assert [int(row["slice"]) for row in of_volume] == list(range(len(bag)))


@pytest.mark.parametrize("other", [{"token_kind": "grid"}, {"preprocessing": "tiled_5cut_items"}])
def test_tokens_that_are_no_slices_are_not_called_so(engine: Engine, tmp_path: Path, other: dict) -> None:
    engine.test_bags.identity = engine.test_bags.identity | other
    rows = table(run(engine, tmp_path, ct_dir=tmp_path) / "attention.csv")
    assert list(rows[0]) == ["volume", "token", "weight"]


def test_ct_of_another_length_than_its_embedding_is_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "cts").mkdir()
    for volume in volumes_to_show(engine.state.predictions):
        length = len(engine.test_bags[engine.test_bags.volumes.index(volume)]["tokens"])
        air = np.full((4, 4, length + 1), -1000, dtype=np.int16)
        image = nibabel.Nifti1Image(air, np.diag([-0.7, -0.7, 1.5, 1]))
        nibabel.save(image, tmp_path / "cts" / f"{volume}.nii.gz")
    with pytest.raises(ValueError, match=r"\d+ slices, its embedding \d+"):
        run(engine, tmp_path, ct_dir=tmp_path / "cts")


def test_run_that_was_asked_to_stop_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    engine.state.exit_status = 143
    before = {*tmp_path.iterdir()}
    run(engine, tmp_path)
    assert {*tmp_path.iterdir()} == before


def test_results_are_rows_of_the_encoder_the_floor_and_the_seeds(engine: Engine, tmp_path: Path) -> None:
    auroc = engine.state.reports["probe"]["macro"]["auroc"]
    floor = engine.state.reports["prevalence"]
    engine.state.seed_reports, engine.further_seeds = [engine.state.reports["probe"], floor, floor], [43, 44]
    run(engine, tmp_path)
    path = tmp_path / "results" / "all.csv"
    rows = {(row.encoder, row.protocol, row.metric): row for row in read_rows(path)}
    assert len(rows) == 12
    row = rows["dale_ct_2s", "mil_probe", "macro_auroc"]
    ends = engine.state.intervals["probe"]["macro"]["auroc"]
    assert row.numbers == pytest.approx((auroc, *ends), abs=1e-6)
    assert (row.dataset, row.n, row.seeds) == ("ct_rate", 13, "42")
    row = rows["prevalence", "mil_probe", "macro_auroc"]
    assert (row.numbers, row.seeds) == ((0.5, 0.5, 0.5), "")
    row = rows["dale_ct_2s", "mil_probe_seeds", "macro_auroc"]  # the mean, the lowest and the highest
    values = sorted([auroc, 0.5, 0.5])
    assert row.numbers == pytest.approx((sum(values) / 3, values[0], values[2]), abs=1e-6)
    assert row.seeds == "42 43 44"
    assert len({row.config_hash for row in rows.values()}) == 1
    first = read_rows(path)
    run(engine, tmp_path)
    assert read_rows(path) == first
    engine.test_bags.identity = engine.test_bags.identity | {"encoder": "random"}
    run(engine, tmp_path)
    assert len(read_rows(path)) == 20


N = 40


def test_volumes_to_show_are_the_surest_true_positives() -> None:
    p = predictions(N)
    chosen = volumes_to_show(p)
    for volume, name in chosen.items():
        row, column = p.volumes.index(volume), CLASSES.index(name)
        assert p.labels[row, column] == 1
        assert p.probabilities[row, column] == p.probabilities[p.labels[:, column] == 1, column].max()
    assert "Pleural effusion" not in chosen.values()
    assert len(volumes_to_show(p, most=1)) == 1
    assert volumes_to_show(p._replace(thresholds=np.full(3, 2.0))) == {}


@pytest.mark.parametrize("given", ["file", "folder", "zip"])
def test_slices_are_read_feet_to_head_from_whatever_inference_reads(tmp_path: Path, given: str) -> None:
    # stored head to feet: the affine's z runs downwards
    hu = np.arange(5, dtype=np.int16)[None, None].repeat(3, 0).repeat(4, 1) - 1000
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = tmp_path / "deep" / "er" / "valid_1_a_1.NII"
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([1.0, 1.0, -2.0, 1.0])), path)
    places = {"file": path, "folder": tmp_path / "deep", "zip": tmp_path / "export.zip"}
    with zipfile.ZipFile(places["zip"], "w") as file:
        file.write(path, "export/valid_1_a_1.nii")
    read = read_slices(places[given], ["valid_1_a_1"])["valid_1_a_1"]
    assert read.shape == (5, 4, 4)
    assert read[:, 0, 1].tolist() == [-996, -997, -998, -999, -1000]
    with pytest.raises(FileNotFoundError, match="No CT of 'valid_9_a_1' in"):
        read_slices(places[given], ["valid_9_a_1"])
