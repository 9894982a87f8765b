from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from common.cohort.cohort import load_labels
from common.embeddings.bags import EmbeddingBags
from common.embeddings.store import EmbeddingStoreWriter
from common.engines.probe_evaluation import Prediction, evaluate_probes, measure, predict
from common.metrics.bootstrap import interval, resample_weights
from common.networks.mil_probe import MILProbe, save_probe
from common.networks.poolers import build_pooler, pad_bags
from common.reports.results import read_rows

CT_RATE, RAD = ([label.name for label in load_labels(name)] for name in ("ct_rate", "rad_chestct"))
DIM = 19


@pytest.fixture
def test_set(write_cohort: Any) -> tuple[Path, Path]:
    return write_cohort("valid", 33, dim=DIM, signal=1.0, classes=RAD, seed=3)


@pytest.fixture
def bags(test_set: tuple[Path, Path]) -> EmbeddingBags:
    return EmbeddingBags(*test_set, RAD)


def write_probe(
    folder: Path, bags: EmbeddingBags, names: list[str], **card: Any
) -> tuple[MILProbe, list[float]]:
    torch.manual_seed(len(names))
    probe = MILProbe(build_pooler("average", DIM), DIM, len(names))
    thresholds = np.linspace(0.35, 0.65, len(names)).tolist()
    identity = {name: value for name, value in bags.identity.items() if name != "dtype"}
    save_probe(
        folder,
        probe,
        {"pooler": "average", "class_names": names, "thresholds": thresholds, **identity, **card},
    )
    return probe, thresholds


def evaluate(tmp_path: Path, labels_csv: Path, **changes: Any) -> dict[str, Any]:
    arguments = {
        "labels_csv": labels_csv,
        "label_set": "rad_chestct",
        "test_prefix": "valid",
        "dataset_name": "rad_chestct",
        "results_csv": tmp_path / "results.csv",
        "num_resamples": 50,
        "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
        "experiment": "x",
    }
    return evaluate_probes(**{**arguments, **changes})


def test_a_frozen_probe_decides_by_its_own_thresholds_through_the_map(bags, tmp_path):
    probe, thresholds = write_probe(tmp_path / "probe", bags, CT_RATE)
    with torch.no_grad():
        padded = pad_bags([bags[index]["tokens"] for index in range(len(bags))])
        raw = probe(*padded).double().sigmoid().numpy()
    prediction = predict(tmp_path / "probe", bags)
    arterial, coronary = (
        CT_RATE.index(f"{kind} wall calcification") for kind in ("Arterial", "Coronary artery")
    )
    np.testing.assert_allclose(prediction.scores[:, 0], raw[:, [arterial, coronary]].max(1), atol=1e-7)
    either = (raw[:, arterial] >= thresholds[arterial]) | (raw[:, coronary] >= thresholds[coronary])
    np.testing.assert_array_equal(prediction.decisions[:, 0], either)
    for k, name in enumerate(RAD[1:], start=1):
        place = CT_RATE.index(name)
        np.testing.assert_allclose(prediction.scores[:, k], raw[:, place], atol=1e-7)
        np.testing.assert_array_equal(prediction.decisions[:, k], raw[:, place] >= thresholds[place])


def test_metrics_are_scikit_learns_of_scores_and_of_decisions(bags):
    rng = np.random.default_rng(0)
    scores, decisions = rng.random((33, 16)), rng.random((33, 16)) < 0.5
    targets = bags.labels.numpy()
    weights = resample_weights(bags.volumes, num_resamples=7, seed=0)
    measured = measure(Prediction(scores, decisions), bags, weights)
    columns = range(16)
    expected = {
        "auroc": np.mean([roc_auc_score(targets[:, c], scores[:, c]) for c in columns]),
        "auprc": np.mean([average_precision_score(targets[:, c], scores[:, c]) for c in columns]),
        "f1": np.mean([f1_score(targets[:, c], decisions[:, c]) for c in columns]),
        "balanced_accuracy": np.mean(
            [balanced_accuracy_score(targets[:, c], decisions[:, c]) for c in columns]
        ),
    }
    assert measured.values == pytest.approx(expected, abs=1e-12)
    places = np.repeat(np.arange(33), weights[4].astype(int))
    defined = [c for c in columns if 0 < targets[places, c].sum() < len(places)]
    auroc = np.mean([roc_auc_score(targets[places, c], scores[places, c]) for c in defined])
    assert measured.resampled["auroc"][4] == pytest.approx(auroc, abs=1e-6)
    drawn = [c for c in columns if targets[places, c].any()]
    f1 = np.mean([f1_score(targets[places, c], decisions[places, c]) for c in drawn])
    assert measured.resampled["f1"][4] == pytest.approx(f1, abs=1e-6)


def write_another_view(bags: EmbeddingBags, folder: Path, num_volumes: int) -> Path:
    """The same volumes as another preprocessing may show them to the encoder."""
    with EmbeddingStoreWriter(folder, bags.identity, "float32") as writer:
        for index in range(num_volumes):
            tokens = bags[index]["tokens"].flip(1)
            writer.add(bags.volumes[index], tokens, (0.7, 0.7, 1.5), z_mm=torch.arange(len(tokens)) * 1.5)
    return folder


def test_rows_hold_frozen_retrained_other_views_and_paired_differences(test_set, bags, tmp_path):
    write_probe(tmp_path / "frozen", bags, CT_RATE)
    write_probe(tmp_path / "retrained", bags, RAD)
    turned, labels_csv = write_another_view(bags, tmp_path / "turned", 33), test_set[1]
    probes = {"frozen": str(tmp_path / "frozen"), "retrained": str(tmp_path / "retrained")}
    views = {"right": str(test_set[0]), "transposed": str(turned), "flipped": None}
    measured = evaluate(tmp_path, labels_csv, probes=probes, embeddings=views)
    assert list(measured) == ["frozen", "retrained", "frozen_transposed"]
    rows = {(row.protocol, row.metric): row for row in read_rows(tmp_path / "results.csv")}
    assert {protocol for protocol, _ in rows} == {
        *measured,
        "retrained-frozen",
        "frozen_transposed-frozen",
    }
    for protocol in ("retrained", "frozen_transposed"):
        row = rows[f"{protocol}-frozen", "macro_auroc"]
        difference = measured[protocol].values["auroc"] - measured["frozen"].values["auroc"]
        paired = measured[protocol].resampled["auroc"] - measured["frozen"].resampled["auroc"]
        low, high = interval(paired)
        assert row.numbers == pytest.approx((difference, low, high), abs=1e-6)
    row = rows["frozen", "macro_f1"]
    assert (row.encoder, row.dataset, row.n) == ("dale_ct_2s", "rad_chestct", 33)
    assert row.low <= row.value <= row.high


def test_embeddings_of_another_encoder_are_refused(test_set, bags, tmp_path):
    write_probe(tmp_path / "probe", bags, CT_RATE, encoder="dale_ct_0")
    with pytest.raises(ValueError, match="encoder.*dale_ct_"):
        predict(tmp_path / "probe", bags)


def test_what_cannot_be_evaluated_is_refused(test_set, bags, tmp_path):
    folder, labels_csv = test_set
    with pytest.raises(ValueError, match="probes and embeddings must name at least one each"):
        evaluate(tmp_path, labels_csv, probes={"frozen": None}, embeddings={"right": str(folder)})
    with pytest.raises(ValueError, match="probes and embeddings must name at least one each"):
        evaluate(tmp_path, labels_csv, probes={"frozen": "x"}, embeddings={"right": None})
    given = {"probes": {"frozen": "x"}, "embeddings": {"right": str(folder)}, "test_prefix": "tst"}
    with pytest.raises(ValueError, match="test_prefix 'tst'"):
        evaluate(tmp_path, labels_csv, **given)
    write_probe(tmp_path / "probe", bags, CT_RATE)
    views = {"right": str(folder), "flipped": str(write_another_view(bags, tmp_path / "fewer", 30))}
    with pytest.raises(ValueError, match="33 in 'right' and 30 in 'flipped'"):
        evaluate(tmp_path, labels_csv, probes={"frozen": str(tmp_path / "probe")}, embeddings=views)
    with pytest.raises(FileNotFoundError, match="No 'probe.safetensors'"):
        evaluate(tmp_path, labels_csv, probes={"frozen": str(tmp_path)}, embeddings={"right": str(folder)})
