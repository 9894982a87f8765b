import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from sklearn.metrics import average_precision_score
from torch import nn
from torch.utils.data import DataLoader

from common.embeddings.dense_cohort import TOKEN_KINDS, DenseCohort, DrawnRows, RemainingSteps, tasks
from common.engines.best_layers import BestLayers
from common.engines.dense_probe import DenseProbeTrainer
from common.handlers.checkpoint import Checkpoint
from common.networks.dense_probe import DenseProbes
from common.optimizers.adamw import warmup_cosine

RATES = [0.3, 0.1]
KEYS = [(kind, task) for kind in TOKEN_KINDS for task in tasks()]


@pytest.fixture
def cohorts(write_dense: Any) -> dict[str, DenseCohort]:
    dirs = write_dense(num_volumes=24)
    return {
        side: DenseCohort(*dirs, [f"valid_{number}_a_1" for number in numbers])
        for side, numbers in (("train", range(1, 13)), ("validation", range(13, 18)), ("test", range(18, 25)))
    }


def build(
    cohorts: dict[str, DenseCohort],
    max_steps: int = 20,
    val_interval: int = 10,
    rates: list[float] = RATES,
    dtype: torch.dtype = torch.float32,
    checkpoints: Path | None = None,
) -> DenseProbeTrainer:
    """Build everything anew, as a new process does."""
    network = DenseProbes(tasks(), rates, dim=9, seed=42).to(dtype)
    optimizer = torch.optim.SGD(network.parameter_groups(), momentum=0.95)
    scheduler = warmup_cosine(optimizer, warmup_steps=0, max_steps=max_steps, final_lr=0.0)
    best = BestLayers()
    others = {"lr_scheduler": scheduler, "best": best}
    checkpoint = [
        Checkpoint(folder, network, optimizer, others, interval_steps=7, keep=2, knobs={}, only_finite=False)
        for folder in ([checkpoints] if checkpoints else [])
    ]
    drawn = DrawnRows(cohorts["train"], max_steps, batch_size=16, seed=7)
    return DenseProbeTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        epoch_length=max_steps,
        train_data_loader=DataLoader(drawn, batch_size=None, sampler=RemainingSteps(max_steps)),
        val_cohort=cohorts["validation"],
        test_cohort=cohorts["test"],
        network=network,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        loss_function=nn.BCEWithLogitsLoss(reduction="none"),
        best=best,
        val_interval=val_interval,
        min_positives=5,
        num_resamples=20,
        train_handlers=checkpoint,
    )


def test_every_probe_ends_where_it_would_alone(cohorts: dict[str, DenseCohort]) -> None:
    trainer = build(cohorts, max_steps=17, dtype=torch.float64)
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


def test_planted_signals_are_found_where_they_are(cohorts: dict[str, DenseCohort]) -> None:
    trainer = build(cohorts, max_steps=300, val_interval=100, rates=[30.0, 3.0])
    trainer.run()
    assert set(trainer.state.reports) == set(KEYS)
    for key in KEYS[:1] + KEYS[2:]:
        assert trainer.state.reports[key]["macro"]["auroc"][0] > 0.85, key
        assert trainer.state.metrics[f"test_macro_auroc/{'/'.join(key)}"] > 0.85
    left_out = trainer.state.reports["patch", "totalsegmentator"]["left_out"]
    assert "background" in left_out
    assert len(left_out) == 115


def test_the_choice_is_that_of_validation(cohorts: dict[str, DenseCohort]) -> None:
    trainer, cohort, seen = build(cohorts, max_steps=25), cohorts["validation"], {}

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
                seen[kind, rate, trainer.state.iteration] = value
                name = f"val_macro_auprc/{kind}/rexgroundingct/lr_{learning_rate:g}"
                assert trainer.state.metrics[name] == pytest.approx(value, abs=1e-6)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, measure_again)
    trainer.run()
    for kind in TOKEN_KINDS:
        chosen = trainer.best.chosen[kind, "rexgroundingct"]
        best = max(value for (of, _, _), value in seen.items() if of == kind)
        assert chosen["auprc"] == pytest.approx(best, abs=1e-6)
        assert seen[kind, chosen["rate"], chosen["step"]] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("killed_after", [1, 8, 19])
def test_killed_run_resumes_to_the_same_bits(
    cohorts: dict[str, DenseCohort], tmp_path: Path, killed_after: int
) -> None:
    straight = build(cohorts)
    straight.run()
    killed = build(cohorts, checkpoints=tmp_path / "checkpoints")

    def kill() -> None:
        raise KeyboardInterrupt

    killed.add_event_handler(Events.ITERATION_COMPLETED(once=killed_after), kill)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = build(cohorts, checkpoints=tmp_path / "checkpoints")
    resumed.run()
    pairs = zip(resumed.probes.parameters(), straight.probes.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    np.testing.assert_equal(resumed.state.reports, straight.state.reports)  # NaN is equal to NaN


def test_diverged_probes_are_not_chosen(cohorts: dict[str, DenseCohort]) -> None:
    trainer = build(cohorts, rates=[3e38, 0.1], max_steps=10)
    trainer.run()
    assert {chosen["rate"] for chosen in trainer.best.chosen.values()} == {1}
    assert math.isfinite(float(trainer.state.output[0]["loss"]))
    with pytest.raises(
        FloatingPointError, match="got NaN from every (cls|patch) probe of rexgroundingct at step 10"
    ):
        build(cohorts, rates=[3e38], max_steps=10).run()


def test_validation_without_any_positive_is_refused(cohorts: dict[str, DenseCohort]) -> None:
    cohorts["validation"]._findings["patch"][:] = 0
    message = "validation must have a positive of some class of rexgroundingct, got none in 5 volumes"
    with pytest.raises(ValueError, match=message):
        build(cohorts).run()


def test_cohorts_that_share_a_patient_are_refused(cohorts: dict[str, DenseCohort]) -> None:
    with pytest.raises(ValueError, match="must not share a patient, got 'valid_1' in train and test"):
        build(cohorts | {"test": cohorts["train"]})
