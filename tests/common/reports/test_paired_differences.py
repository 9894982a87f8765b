import csv
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from typer.testing import CliRunner

from common.metrics.bootstrap import resample_weights, two_sided_p
from common.reports.paired_differences import (
    MEASURES,
    compare,
    dense_differences,
    differences_table,
    paired_differences,
)
from common.reports.results import Predictions, write_predictions
from dale_ct.cli import app

CLASSES = ["Emphysema", "Lung nodule"]
N, R = 60, 50
OPTIONS = {"num_resamples": R, "resampling": "patients"}
LABELS = (np.random.default_rng(0).random((N, 2)) < 0.4).astype(float)
VOLUMES = [f"valid_{1 + index // 2}_{'ab'[index % 2]}_1" for index in range(N)]


def predictions(encoder: str, signal: float, seed: int) -> Predictions:
    scores = np.random.default_rng(seed).random((N, 2)) + signal * LABELS
    return Predictions(encoder, VOLUMES, CLASSES, scores, np.array([0.6, 0.9]), LABELS)


def shuffled(original: Predictions) -> Predictions:
    order = np.random.default_rng(1).permutation(N)
    return original._replace(
        volumes=[original.volumes[index] for index in order],
        probabilities=original.probabilities[order],
        labels=original.labels[order],
    )


def test_differences_are_those_of_both_on_the_same_patients_drawn() -> None:
    weak, strong = predictions("weak", 0.2, seed=1), predictions("strong", 0.8, seed=2)
    found = paired_differences(weak, [shuffled(strong)], R, "patients")
    rows = {(row["class"], row["metric"]): row for row in found}
    assert len(rows) == 3 * 4
    table = differences_table(found)
    assert list(table.columns[2].cells) == ["AUROC", "AUPRC", "F1", "BA"]
    assert next(iter(table.columns[3].cells)) == f"{rows['macro', 'auroc']['difference']:+.4f}"
    patients = [volume.rsplit("_", 2)[0] for volume in VOLUMES]
    weights = resample_weights(patients, R, seed=0)
    for metric, of_sklearn in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
        samples = []
        for weight in weights:
            chosen = np.repeat(np.arange(N), weight.astype(int))
            a, b = (of_sklearn(LABELS[chosen], p.probabilities[chosen]) for p in (strong, weak))
            samples.append(a - b)
        row = rows["macro", metric]
        expected = of_sklearn(LABELS, strong.probabilities) - of_sklearn(LABELS, weak.probabilities)
        assert row["difference"] == pytest.approx(expected, abs=1e-12)
        assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))
        assert row["low"] > 0
        assert row["p"] == pytest.approx(2 / (R + 1))
    called = [p.probabilities[:, 1] >= 0.9 for p in (strong, weak)]
    expected = f1_score(LABELS[:, 1], called[0]) - f1_score(LABELS[:, 1], called[1])
    assert rows["Lung nodule", "f1"]["difference"] == pytest.approx(expected)


def test_an_encoder_does_not_differ_from_itself() -> None:
    same = predictions("same", 0.3, seed=1)
    for row in paired_differences(same, [shuffled(same)], R, "volumes"):
        assert (row["difference"], row["low"], row["high"], row["p"]) == (0.0, 0.0, 0.0, 1.0)


def test_other_volumes_classes_and_labels_are_refused() -> None:
    first = predictions("first", 0.4, seed=1)
    renamed = first._replace(encoder="b", volumes=["valid_99_a_1", *VOLUMES[1:]])
    with pytest.raises(ValueError, match="'first' and 'b' .* volumes, 60 and 60: 'valid_1_a_1'"):
        paired_differences(first, [renamed], R, "patients")
    with pytest.raises(ValueError, match=r"different classes: \['Emphysema', 'Lung nodule'\] and \['Lung"):
        paired_differences(first, [first._replace(class_names=CLASSES[::-1])], R, "patients")
    labels = LABELS.copy()
    labels[7, 1] = 1 - labels[7, 1]
    with pytest.raises(ValueError, match="different labels for volume 'valid_4_b_1'"):
        paired_differences(first, [first._replace(labels=labels)], R, "patients")


def write_all(folder: Path, *encoders: str) -> list[Path]:
    """Write predictions of encoders into folders of their own."""
    paths = [folder / str(seed) / "test_predictions.csv" for seed in range(len(encoders))]
    for seed, (path, encoder) in enumerate(zip(paths, encoders, strict=True)):
        path.parent.mkdir()
        write_predictions(path, predictions(encoder, 0.4, seed))
    return paths


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_command_compares_files_or_folders_and_writes_every_class(tmp_path: Path) -> None:
    first, second = write_all(tmp_path, "weak", "strong")
    options = ["--num-resamples", str(R), "--out", str(tmp_path / "out" / "paired.csv")]
    paths = map(str, (first.parent, first.parent, second))
    answer = CliRunner().invoke(app, ["compare", *paths, *options])
    assert "AUPRC" in answer.output
    rows = read_table(tmp_path / "out" / "paired.csv")
    assert len(rows) == 12
    assert {(row["encoder"], row["reference"]) for row in rows} == {("strong", "weak")}


def test_evaluations_of_one_encoder_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    first, *others = write_all(tmp_path, "2s", "2s", "other")
    compare(first, others, **OPTIONS, out=tmp_path / "paired.csv")
    rows = read_table(tmp_path / "paired.csv")
    assert {(row["encoder"], row["reference"]) for row in rows} == {("1", "0"), ("other", "0")}


AVERAGED = "patch totalsegmentator classes"


def write_resamples(
    folder: Path, encoder: str, volumes: list[str], seed: int, size: int = 201, classes: str = "heart"
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = {measure: rng.random(size) for measure in MEASURES}
    folder.mkdir()
    further = {"encoder": encoder, "volumes": volumes, AVERAGED: [classes, "liver"]}
    np.savez(folder / "resamples.npz", **further, **values)
    return values


def test_differences_are_taken_resample_by_resample(tmp_path):
    first = write_resamples(tmp_path / "a", "a", ["v1", "v2"], 0)
    second = write_resamples(tmp_path / "b", "b", ["v1", "v2"], 1)
    rows = dense_differences(tmp_path / "a", [tmp_path / "b"])
    assert [row["measure"] for row in rows] == list(MEASURES)
    assert {(row["encoder"], row["reference"]) for row in rows} == {("b", "a")}
    for row in rows:
        difference = second[row["measure"]] - first[row["measure"]]
        assert row["difference"] == difference[0]
        assert (row["low"], row["high"]) == pytest.approx(np.quantile(difference[1:], [0.025, 0.975]))
        assert row["p"] == two_sided_p(difference[1:])


def test_dense_evaluations_are_compared_and_the_reference_is_left_out(tmp_path):
    for seed, name in enumerate("abc"):
        write_resamples(tmp_path / name, name, ["v1"], seed)
    folders = [tmp_path / name for name in "abc"]
    rows = compare(folders[0], folders, **OPTIONS, out=tmp_path / "new" / "d.csv")
    assert "patch rexgroundingct auprc" in list(differences_table(rows).columns[2].cells)
    rows = read_table(tmp_path / "new" / "d.csv")
    assert [row["encoder"] for row in rows] == ["b"] * 8 + ["c"] * 8
    assert [row["measure"] for row in rows[:8]] == list(MEASURES)
    with pytest.raises(ValueError, match=f"Nothing to compare with '{folders[0]}'"):
        compare(folders[0], folders[:1], **OPTIONS)


def test_other_volumes_and_missing_evaluations_are_refused(tmp_path):
    write_resamples(tmp_path / "a", "a", ["v1"], 0)
    for name, volumes, changes, message in (
        ("b", ["v2"], {}, "b' and '.*a' have different volumes"),
        ("c", ["v1"], {"classes": "lung"}, f"c' and '.*a' have different {AVERAGED}"),
        ("d", ["v1"], {"size": 101}, "d' has 100 resamples and '.*a' has 200"),
    ):
        write_resamples(tmp_path / name, name, volumes, 0, **changes)
        with pytest.raises(ValueError, match=message):
            dense_differences(tmp_path / "a", [tmp_path / name])
    with pytest.raises(FileNotFoundError, match=r"No resamples\.npz in '.*none'"):
        dense_differences(tmp_path / "a", [tmp_path / "none"])
