import csv
import logging

import numpy as np
import pytest
import torch

from common.cohort.targets import Target
from common.embeddings.store import EmbeddingStoreWriter
from common.engines.target_probes import Cohort, evaluate_targets, pooled_features, probe_target
from common.metrics.bootstrap import resample_weights
from common.reports.results import read_rows

KINDS = {"size": "number", "sick": "binary", "death": ["days", "died"]}


def write_store(folder, volumes, tokens_of, encoder="drawn"):
    identity = {"encoder": encoder, "encoder_id": "x", "preprocessing": "cropped_256"}
    identity |= {"slice_order": "feet_to_head", "token_kind": "slice"}
    with EmbeddingStoreWriter(folder, identity, "float32") as writer:
        for volume in volumes:
            tokens = tokens_of(volume)
            writer.add(
                volume, torch.from_numpy(tokens), (0.8, 0.8, 2.0), z_mm=2.0 * torch.arange(len(tokens))
            )


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two splits whose tokens carry a number in dimension 0, and a table of what depends on it."""
    root, rng, rows = tmp_path_factory.mktemp("targets"), np.random.default_rng(0), {}
    for split, count in (("train", 120), ("test", 60)):
        volumes = [f"{split}_{index // 2 + 1}_a_{index % 2 + 1}" for index in range(count)]
        hidden = {volume: rng.normal() for volume in volumes}

        def tokens_of(volume, hidden=hidden):
            tokens = rng.normal(size=(int(rng.integers(4, 9)), 7)).astype(np.float32)
            tokens[:, 0] = 0.3 * tokens[:, 0] + hidden[volume]
            return tokens

        write_store(root / split, volumes, tokens_of)
        for volume, value in hidden.items():
            time, seen = rng.exponential(np.exp(-value)), rng.exponential(2.0)
            rows[volume] = [50 + 10 * value, int(value > 0.3), 100 * min(time, seen) + 1, int(time < seen)]
    rows["train_1_a_1"][0] = ""
    with (root / "targets.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["VolumeName", "size", "sick", "days", "died"], *([name, *row] for name, row in rows.items())]
        )
    return root, rows


@pytest.fixture
def run(cohort, tmp_path):
    root, _ = cohort

    def evaluate(**given):
        settings = {
            **{"targets_csv": root / "targets.csv", "targets": KINDS, "encoder": None, "split_seed": 42},
            **{"train_embeddings_dir": root / "train", "test_embeddings_dir": root / "test"},
            **{"num_val_patients": 20, "num_resamples": 40, "resampling": "patients", "dataset_name": "mine"},
            **{"output_dir": tmp_path / "out", "results_csv": tmp_path / "results.csv"},
            **{"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "eval_targets"},
        }
        return evaluate_targets(**(settings | given))

    return evaluate


def test_planted_targets_are_recovered_and_floors_are_not_beaten_by_chance(cohort, run, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tested = run()
    assert "1 of 40 embedded validation volumes have no 'size'" in caplog.text
    rows = {(row.encoder, row.metric): row for row in read_rows(tmp_path / "results.csv")}
    assert {row.protocol for row in rows.values()} == {"targets"}
    assert rows["drawn", "r2/size"].value > 0.85
    assert rows["drawn", "spearman/size"].value > 0.9
    assert rows["drawn", "mae/size"].value < 4  # of a deviation of 10
    assert rows["drawn", "auroc/sick"].value > 0.9
    assert rows["drawn", "c_index/death"].value > 0.7
    for row in rows.values():
        assert not row.low > row.value
        assert row.n == 60
    assert rows["constant", "r2/size"].value == pytest.approx(0, abs=0.1)
    assert rows["constant", "c_index/death"].value == rows["constant", "auroc/sick"].value == 0.5
    assert abs(rows["num_tokens", "r2/size"].value) < 0.3
    difference = rows["drawn - num_tokens", "c_index/death"]
    expected = rows["drawn", "c_index/death"].value - rows["num_tokens", "c_index/death"].value
    assert difference.value == pytest.approx(expected, abs=1e-5)
    assert difference.low > 0
    for name in KINDS:
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    with (tmp_path / "out" / "predictions.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 180
    _, truth = cohort
    for line in lines:
        column = {"size": 0, "sick": 1, "death": 2}[line["target"]]
        assert float(line["truth"]) == pytest.approx(float(truth[line["volume"]][column]))
        assert line["event"] == (str(float(truth[line["volume"]][3])) if column == 2 else "")
    written = np.array([float(line["predicted"]) for line in lines if line["target"] == "size"])
    np.testing.assert_allclose(written, tested[0].predicted["drawn"])


def test_features_are_mean_maximum_and_deviation_of_a_volumes_tokens(cohort):
    root, _ = cohort
    pooled, identity = pooled_features(root / "test", "drawn")
    assert identity["dim"] == 7
    from common.embeddings.store import EmbeddingStore

    tokens = EmbeddingStore(root / "test").view("test_3_a_1").double().numpy()
    expected = [*tokens.mean(0), *tokens.max(0), *tokens.std(0), len(tokens)]
    np.testing.assert_allclose(pooled["test_3_a_1"], expected, rtol=1e-6)


def test_the_penalty_is_chosen_on_validation_and_the_test_set_changes_no_prediction():
    rng = np.random.default_rng(2)

    def side(count, shift=0.0):
        features = rng.normal(size=(count, 41)) + shift
        truth = features[:, :1] + rng.normal(0, 0.5, (count, 1))
        return Cohort([f"v_{index}_a" for index in range(count)], features, truth)

    sides = {"train": side(30), "validation": side(20), "test": side(10)}
    weights = resample_weights(sides["test"].volumes, 5, 0)
    target = Target("size", "number", {})
    first = probe_target(target, sides, "drawn", weights).predicted["drawn"]
    more = {**sides, "test": Cohort(*(part[:3] for part in sides["test"]))}
    again = probe_target(target, more, "drawn", np.ones((2, 3), np.float32)).predicted["drawn"]
    np.testing.assert_allclose(again, first[:3])
    noise = sides["validation"]._replace(
        truth=rng.normal(size=(20, 1))
    )  # nothing to learn: shrink to the mean
    shrunk = probe_target(target, {**sides, "validation": noise}, "drawn", weights).predicted["drawn"]
    assert shrunk.std() < first.std() / 3


@pytest.mark.parametrize(
    ("column", "value", "name", "named"),
    [
        (3, 0, "death", "'death' must have an event among the .* volumes, got .* all censored"),
        (0, 7, "size", "'size' must vary among the .* volumes, got 7 for all"),
        (1, 1, "sick", "'sick' must vary"),
        (0, "", "size", "'size' must be known of a test volume, got none of 60"),
    ],
)
def test_targets_that_say_nothing_are_refused(cohort, run, tmp_path, column, value, name, named):
    _, rows = cohort
    path = tmp_path / "targets.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["VolumeName", "size", "sick", "days", "died"])
        for volume, row in rows.items():
            is_changed = value != "" or volume.startswith("test")
            writer.writerow([volume, *row[:column], value if is_changed else row[column], *row[column + 1 :]])
    with pytest.raises(ValueError, match=named):
        run(targets_csv=path, targets={name: KINDS[name]})


def test_embeddings_of_another_encoder_or_of_the_same_patients_are_refused(cohort, run, tmp_path):
    root, _ = cohort
    with pytest.raises(ValueError, match="cohorts must not share patients, got 'train_"):
        run(test_embeddings_dir=root / "train")
    write_store(tmp_path / "other", ["test_1_a_1"], lambda _: np.ones((3, 7), np.float32), encoder="another")
    with pytest.raises(ValueError, match="another"):
        run(test_embeddings_dir=tmp_path / "other")
