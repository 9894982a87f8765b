import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from common.cohort.cohort import load_labels
from common.embeddings.dense_cohort import TOKEN_KINDS, DenseCohort, tasks
from common.engines import dense_probe
from common.engines.dense_probe import (
    BestLayers,
    DenseProbeTrainer,
    each_column,
    validation_auprc,
)
from common.metrics.bootstrap import RESAMPLING_SEED, resample_weights
from common.networks.dense_probe import DenseProbes

RATES = (0.3, 0.1)
KEYS = [(kind, task) for kind in TOKEN_KINDS for task in tasks()]


Cohorts = dict[str, DenseCohort]
Build = Callable[..., DenseProbeTrainer]


def test_every_probe_ends_where_it_would_alone(build_dense: Build, dense_cohorts: Cohorts) -> None:
    trainer = build_dense(dense_cohorts, max_steps=17, dtype=torch.float64)
    start = DenseProbes(tasks(), RATES, dim=9, seed=42).double()
    trainer.run()
    for kind in range(2):
        for rate, learning_rate in enumerate(RATES):
            for columns in start.columns.values():
                alone = start.layer(kind, rate, columns)
                before = alone.weight.detach().clone()
                optimizer = torch.optim.SGD(alone.parameters(), lr=learning_rate, momentum=0.95)
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=17)
                for step in range(17):
                    batch = trainer.drawn[step]
                    targets = batch["targets"][kind][:, columns].double()
                    optimizer.zero_grad()
                    logits = alone(batch["tokens"][kind].double())
                    nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
                    optimizer.step()
                    scheduler.step()
                together = trainer.probes.layer(kind, rate, columns).weight
                update = float((alone.weight - before).detach().norm())
                assert float((together - alone.weight).detach().norm()) < 1e-10 * update


def test_planted_signals_are_found_where_they_are(build_dense: Build, dense_cohorts: Cohorts) -> None:
    trainer = build_dense(dense_cohorts, max_steps=300, val_interval=100, rates=[30.0, 3.0])
    trainer.run()
    assert set(trainer.state.reports) == set(KEYS)
    for key in KEYS[:1] + KEYS[2:]:
        assert trainer.state.reports[key]["macro"]["auroc"][0] > 0.85, key
        assert trainer.state.metrics[f"test_macro_auroc/{'/'.join(key)}"] > 0.85
    left_out = trainer.state.reports["patch", "totalsegmentator"]["left_out"]
    assert "background" in left_out
    assert len(left_out) == 115


def test_the_choice_is_that_of_validation(build_dense: Build, dense_cohorts: Cohorts) -> None:
    trainer, cohort, found = build_dense(dense_cohorts, max_steps=25), dense_cohorts["validation"], {}

    def measure_again() -> None:
        if trainer.state.iteration not in (10, 20, 25):
            return
        for number, kind in enumerate(TOKEN_KINDS):
            tokens = torch.cat(list(cohort.tokens(kind)))
            for rate, learning_rate in enumerate(RATES):
                layer = trainer.probes.layer(number, rate, slice(0, 14))
                scores = layer(tokens).detach()
                value = np.mean(
                    [average_precision_score(cohort.targets(kind, k), scores[:, k]) for k in (0, 1)]
                )
                found[kind, rate, trainer.state.iteration] = value
                name = f"val_macro_auprc/{kind}/rexgroundingct/lr_{learning_rate:g}"
                assert trainer.state.metrics[name] == pytest.approx(value, abs=1e-6)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, measure_again)
    trainer.run()
    for kind in TOKEN_KINDS:
        chosen = trainer.best.chosen[kind, "rexgroundingct"]
        best = max(value for (of, _, _), value in found.items() if of == kind)
        assert chosen["auprc"] == pytest.approx(best, abs=1e-6)
        assert found[kind, chosen["rate"], chosen["step"]] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("killed_after", [1, 8, 19])
def test_killed_run_resumes_to_the_same_bits(
    build_dense: Build, dense_cohorts: Cohorts, tmp_path: Path, killed_after: int
) -> None:
    straight = build_dense(dense_cohorts)
    straight.run()
    killed = build_dense(dense_cohorts, checkpoints=tmp_path / "checkpoints")

    def kill() -> None:
        raise KeyboardInterrupt

    killed.add_event_handler(Events.ITERATION_COMPLETED(once=killed_after), kill)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = build_dense(dense_cohorts, checkpoints=tmp_path / "checkpoints")
    resumed.run()
    pairs = zip(resumed.probes.parameters(), straight.probes.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    np.testing.assert_equal(resumed.state.reports, straight.state.reports)  # NaN is equal to NaN


def test_diverged_probes_are_not_chosen(build_dense: Build, dense_cohorts: Cohorts) -> None:
    trainer = build_dense(dense_cohorts, rates=[3e38, 0.1], max_steps=10)
    trainer.run()
    assert {chosen["rate"] for chosen in trainer.best.chosen.values()} == {1}
    assert math.isfinite(float(trainer.state.output[0]["loss"]))


def test_what_cannot_be_trained_is_refused(build_dense: Build, dense_cohorts: Cohorts) -> None:
    with pytest.raises(ValueError, match="patients, got 'valid_1' in train and test"):
        build_dense(dense_cohorts | {"test": dense_cohorts["train"]})
    with pytest.raises(FloatingPointError, match="(cls|patch) probe of rexgroundingct .* step 10"):
        build_dense(dense_cohorts, rates=[3e38], max_steps=10).run()
    dense_cohorts["validation"]._findings["patch"][:] = 0
    with pytest.raises(ValueError, match="5 validation volumes .* rexgroundingct"):
        build_dense(dense_cohorts).run()


def test_the_best_learning_rate_and_step_are_kept_and_restored() -> None:
    probes, best = DenseProbes({"rex": 3, "ts": 4}, [0.1, 0.01], dim=5, seed=0), BestLayers()
    with torch.no_grad():
        probes.weights[1].add_(1)
    best.offer(("patch", "ts"), np.array([np.nan, 0.4]), 10, probes)
    expected = probes.layer(1, 1, probes.columns["ts"])
    with torch.no_grad():
        probes.weights[1].add_(1)
    best.offer(("patch", "ts"), np.array([0.4, 0.1]), 20, probes)
    best.offer(("cls", "rex"), np.array([0.1, 0.1]), 20, probes)
    assert (best.chosen["patch", "ts"]["rate"], best.chosen["patch", "ts"]["step"]) == (1, 10)
    assert best.chosen["cls", "rex"]["rate"] == 0
    restored = BestLayers()
    restored.load_state_dict(best.state_dict())
    for choice in (best, restored):
        assert torch.equal(choice.layer(("patch", "ts")).weight, expected.weight)
    assert restored.chosen["patch", "ts"]["auprc"] == 0.4


NAMES = [label.name for label in load_labels("totalsegmentator")]


@pytest.fixture
def five(write_dense: Any) -> DenseCohort:
    return DenseCohort(*write_dense(num_volumes=9), [f"valid_{n}_a_1" for n in (1, 9, 4, 5, 7)])


def test_columns_are_those_of_the_linear_layer(five: DenseCohort, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(9, 7)
    monkeypatch.setattr(dense_probe, "SCORE_BYTES", 3 * 4 * five.num_rows["patch"])
    scores = np.stack(list(each_column(five, "patch", layer.weight.detach(), layer.bias.detach())))
    expected = layer(torch.cat(list(five.tokens("patch")))).detach().T
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_validation_is_sklearns_for_every_probe_and_class(five: DenseCohort) -> None:
    weight, bias = torch.randn(3, 132, 9), torch.randn(3, 132)
    bias[1, 15] = float("nan")
    values = validation_auprc(five, "cls", weight, bias)
    tokens = torch.cat(list(five.tokens("cls")))
    for rate, column in ((0, 0), (2, 1), (1, 16), (0, 17)):
        scores = tokens @ weight[rate, column] + bias[rate, column]
        expected = average_precision_score(five.targets("cls", column), scores)
        assert values[rate, column] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(values[:, 100]).all()  # no positive
    assert np.isnan(values[:, 15]).tolist() == [False, True, False]


def test_report_is_sklearns_and_its_interval_that_of_resampled_patients(
    build_dense: Build,
    dense_cohorts: Cohorts,
) -> None:
    trainer, cohort = build_dense(dense_cohorts, max_steps=3), dense_cohorts["test"]
    trainer.run()
    report = trainer.state.reports["patch", "totalsegmentator"]
    layer = trainer.best.layer(("patch", "totalsegmentator"))
    scores = layer(torch.cat(list(cohort.tokens("patch")))).detach().numpy()
    targets = np.stack([cohort.targets("patch", 14 + organ) for organ in (1, 2, 3)], axis=1)
    for organ, name in enumerate(NAMES[1:4]):
        values = report["per_class"][name]
        assert values["auroc"] == pytest.approx(roc_auc_score(targets[:, organ], scores[:, organ + 1]))
        assert values["positives"] == targets[:, organ].sum()
    assert sorted(report["left_out"]) == sorted({*NAMES} - {*NAMES[1:4]})
    mean, (low, high) = report["macro"]["auprc"]
    assert mean == pytest.approx(average_precision_score(targets, scores[:, 1:4], average="macro"))
    patients, drawn = cohort.patient_of_row("patch"), []
    for weights in resample_weights(cohort.patients, 20, RESAMPLING_SEED):
        rows = np.repeat(np.arange(len(patients)), weights[patients].astype(int))
        drawn.append(average_precision_score(targets[rows], scores[rows, 1:4], average="macro"))
    assert report["resampled"]["auprc"] == pytest.approx(np.array(drawn), abs=1e-9)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-9)
