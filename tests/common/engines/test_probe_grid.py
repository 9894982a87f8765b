import logging
import math
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.optimizers import WarmupCosineSchedule
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader

from common.embeddings.bags import EmbeddingBags, ShuffledBatches, collate_bags
from common.embeddings.store import IDENTITY_KEYS, EmbeddingStoreWriter
from common.engines.probe_grid import BestProbe, ProbeGridTrainer
from common.handlers.checkpoint import Checkpoint
from common.metrics.bootstrap import bootstrap, interval_report, resample_weights
from common.metrics.multilabel import f1_thresholds
from common.networks.mil_probe import MILProbe, ProbeGrid
from common.networks.poolers import PAPER_POOLERS, build_pooler, pad_bags

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]
RATES = [0.1, 0.03, 0.01, 0.003]
SEED = 42

Cohorts = dict[str, EmbeddingBags]


def cohorts_of(write_cohort: Any, signal: float, sizes: tuple[int, int, int]) -> Cohorts:
    splits = zip(("train", "validation", "test"), sizes, strict=True)
    return {
        split: EmbeddingBags(*write_cohort(split, volumes, signal=signal, seed=seed), CLASSES)
        for seed, (split, volumes) in enumerate(splits)
    }


@pytest.fixture
def cohorts(write_cohort: Any) -> Cohorts:
    return cohorts_of(write_cohort, 2.0, (37, 17, 23))


def build(
    cohorts: Cohorts,
    max_steps: int = 30,
    *,
    learning_rates: Sequence[float] = RATES,
    poolers: Sequence[str] = PAPER_POOLERS,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    checkpoints: Path | None = None,
    **changes: Any,
) -> ProbeGridTrainer:
    """Build everything anew, as a new process does."""
    train = cohorts["train"]
    shape = {"dim": train.identity["dim"], "num_classes": len(CLASSES)}
    network = ProbeGrid(poolers=poolers, learning_rates=learning_rates, **shape, seed=SEED).to(dtype)
    optimizer = torch.optim.SGD(network.parameter_groups(), momentum=0.95, weight_decay=weight_decay)
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps=0, t_total=max_steps)
    best, batches = BestProbe(), ShuffledBatches(len(train), batch_size=batch_size, seed=SEED)
    others = {"lr_scheduler": scheduler, "best": best}
    keeping = {"network": network, "optimizer": optimizer, "others": others, "knobs": {}}
    keeping |= {"interval_steps": 7, "keep": 2, "only_finite": False}
    folders = [checkpoints] if checkpoints else []
    arguments = {"val_interval": 10, "further_seeds": (), "num_resamples": 2000, "resampling": "patients"}
    return ProbeGridTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        max_steps=max_steps,
        train_data_loader=DataLoader(train, batch_sampler=batches, collate_fn=collate_bags),
        val_bags=cohorts["validation"],
        test_bags=cohorts["test"],
        network=network,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        loss_function=nn.BCEWithLogitsLoss(reduction="none"),
        best=best,
        inferer=None,
        train_handlers=[Checkpoint(**keeping, folder=path) for path in folders],
        **arguments | changes,
    )


def train_alone(
    bags: EmbeddingBags,
    pooler: str,
    learning_rate: float,
    *,
    steps: int,
    total: int,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    seed: int = SEED,
) -> MILProbe:
    """The plain way: one probe, padded batches, torch's SGD and cosine."""
    torch.manual_seed(seed)
    dim = bags.identity["dim"]
    probe = MILProbe(build_pooler(pooler, dim), dim, len(CLASSES)).double()
    optimizer = torch.optim.SGD(
        probe.parameters(), lr=learning_rate, momentum=0.95, weight_decay=weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    per_epoch = -(-len(bags) // batch_size)
    for step in range(steps):
        order = np.random.default_rng([seed, step // per_epoch]).permutation(len(bags))
        chosen = order[step % per_epoch * batch_size :][:batch_size]
        logits = probe(*pad_bags([bags[index]["tokens"].double() for index in chosen]))
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits, bags.labels[chosen].double()).backward()
        optimizer.step()
        scheduler.step()
    return probe


def test_every_probe_of_the_grid_ends_where_it_would_alone(cohorts: Cohorts) -> None:
    trainer = build(cohorts, max_steps=31, dtype=torch.float64)
    before = [trainer.grid.probe(index).state_dict() for index in range(len(trainer.grid.names))]
    trainer.run()
    for index, (pooler, learning_rate) in enumerate(trainer.grid.names):
        alone = train_alone(cohorts["train"], pooler, learning_rate, steps=31, total=31)
        together = trainer.grid.probe(index).state_dict()
        assert set(together) == set(alone.state_dict())
        for name, expected in alone.state_dict().items():
            update = float((expected - before[index][name]).norm())
            assert update > 0
            assert float((together[name] - expected).norm()) < 1e-10 * update, (pooler, learning_rate, name)


@pytest.mark.parametrize("index", range(10))
def test_every_further_seed_ends_where_it_would_alone(write_cohort: Any, index: int) -> None:
    cohorts = cohorts_of(write_cohort, 1.0, (13, 4, 4))
    settings = {"batch_size": 4, "weight_decay": 0.01}
    trainer = build(cohorts, 17, learning_rates=[0.1, 0.02], dtype=torch.float64, **settings)
    trainer.prepare()
    trainer.best.index, trainer.best.step = index, 11
    for seed, together in zip((5, 9, 6), trainer.train_seeds((5, 9, 6)), strict=True):
        name = trainer.grid.names[index]
        alone = train_alone(cohorts["train"], *name, steps=11, total=17, seed=seed, **settings)
        torch.testing.assert_close(together.state_dict(), alone.state_dict(), rtol=1e-10, atol=1e-12)
    assert trainer.train_seeds([]) == []


@pytest.mark.parametrize(("signal", "low", "high"), [(4.0, 0.95, 1.0), (0.0, 0.4, 0.6)])
def test_grid_learns_a_planted_signal_and_finds_none_in_noise(
    write_cohort: Any, signal: float, low: float, high: float
) -> None:
    trainer = build(cohorts_of(write_cohort, signal, (149, 53, 101)), max_steps=150, val_interval=50)
    trainer.run()
    assert low <= trainer.state.reports["probe"]["macro"]["auroc"] <= high


def test_validation_measures_every_probe_and_keeps_the_best(cohorts: Cohorts) -> None:
    trainer = build(cohorts, max_steps=25, val_interval=10)
    found: dict[tuple[str, float, int], float] = {}
    bags = cohorts["validation"]

    def measure_again(engine: Engine) -> None:
        if engine.state.iteration not in (10, 20, 25):
            return
        for index, (pooler, rate) in enumerate(trainer.grid.names):
            with torch.no_grad():
                logits = trainer.grid.probe(index)(
                    *pad_bags([item["tokens"] for item in map(bags.__getitem__, range(17))])
                )
            value = average_precision_score(bags.labels.numpy(), logits.numpy(), average="macro")
            found[pooler, rate, engine.state.iteration] = value
            assert engine.state.metrics[f"val_macro_auprc/{pooler}/lr_{rate:g}"] == pytest.approx(
                value, abs=1e-6
            )

    trainer.add_event_handler(Events.ITERATION_COMPLETED, measure_again)
    trainer.run()
    assert len(found) == 60
    chosen = (*trainer.grid.names[trainer.best.index], trainer.best.step)
    assert found[chosen] == pytest.approx(max(found.values()), abs=1e-6)
    assert trainer.state.metrics["val_macro_auprc_best"] == pytest.approx(max(found.values()), abs=1e-6)


def test_chosen_probe_is_tested_with_the_thresholds_of_validation_beside_the_floor(cohorts: Cohorts) -> None:
    trainer = build(cohorts, max_steps=25)
    trainer.run()
    bags, probe = cohorts["test"], trainer.chosen_probe()
    with torch.no_grad():
        logits = probe(*pad_bags([bags[index]["tokens"] for index in range(len(bags))])).double()
    scores, targets = logits.sigmoid().numpy(), bags.labels.numpy()
    report = trainer.state.reports["probe"]["macro"]
    assert report["auroc"] == pytest.approx(roc_auc_score(targets, scores, average="macro"), abs=1e-9)
    assert report["auprc"] == pytest.approx(
        average_precision_score(targets, scores, average="macro"), abs=1e-9
    )
    positive = scores >= trainer.best.thresholds.numpy()
    assert report["f1"] == pytest.approx(f1_score(targets, positive, average="macro"), abs=1e-9)
    assert trainer.state.metrics["test_macro_auroc"] == report["auroc"]
    validation = trainer.state.validation
    value = average_precision_score(validation.labels, validation.probabilities, average="macro")
    assert value == pytest.approx(trainer.best.auprc, abs=1e-6)
    floor = trainer.state.reports["prevalence"]["per_class"]
    for name, p in zip(CLASSES, targets.mean(0).tolist(), strict=True):
        expected = {"auroc": 0.5, "auprc": p, "f1": 2 * p / (1 + p), "balanced_accuracy": 0.5}
        assert floor[name] == pytest.approx(expected)


def weights_of(trainer: ProbeGridTrainer) -> list[torch.Tensor]:
    momentum = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    return [*trainer.grid.parameters(), *momentum, *trainer.best.parameters.values(), trainer.best.thresholds]


@pytest.mark.parametrize("killed_after", [1, 8, 21, 29])
def test_killed_run_resumes_to_the_same_bits(cohorts: Cohorts, tmp_path: Path, killed_after: int) -> None:
    straight = build(cohorts)
    straight.run()

    killed = build(cohorts, checkpoints=tmp_path / "checkpoints")

    def kill(engine: Engine) -> None:
        raise KeyboardInterrupt

    killed.add_event_handler(Events.ITERATION_COMPLETED(once=killed_after), kill)
    with pytest.raises(KeyboardInterrupt):
        killed.run()

    resumed = build(cohorts, checkpoints=tmp_path / "checkpoints")
    steps: list[int] = []
    resumed.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: steps.append(engine.state.iteration))
    resumed.run()
    # a step is saved after all its handlers, so that of the kill never was
    assert steps == list(range((killed_after - 1) // 7 * 7 + 1, 31))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed), weights_of(straight), strict=True))
    assert (resumed.best.index, resumed.best.step) == (straight.best.index, straight.best.step)
    assert resumed.state.reports == straight.state.reports


def test_run_killed_before_its_report_tests_when_resumed(cohorts: Cohorts, tmp_path: Path) -> None:
    finished = build(cohorts, checkpoints=tmp_path)
    finished.run()
    again = build(cohorts, checkpoints=tmp_path)
    again.run()
    assert again.state.iteration == 30
    assert again.state.reports == finished.state.reports


def test_run_that_is_asked_to_stop_does_not_test(cohorts: Cohorts) -> None:
    trainer = build(cohorts)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=12), lambda engine: engine.terminate())
    trainer.run()
    assert trainer.state.reports == {}


def test_class_absent_from_a_split_is_named_and_left_out(
    write_cohort: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(4)
    cohorts = {}
    for split, absent in (("train", 0), ("validation", 1), ("test", 2)):
        labels = (rng.random((19, 3)) < 0.5).astype(int)
        labels[:, absent] = 0
        cohorts[split] = EmbeddingBags(*write_cohort(split, 19, labels=labels), CLASSES)
    with caplog.at_level(logging.WARNING):
        trainer = build(cohorts, max_steps=5)
    for split, absent in (("train", 0), ("validation", 1), ("test", 2)):
        assert f"{split} (19 volumes) has no positive of ['{CLASSES[absent]}']" in caplog.text
    trainer.run()
    report = trainer.state.reports["probe"]
    assert report["undefined"]["auroc"] == report["undefined"]["auprc"] == ["Pleural effusion"]
    assert math.isnan(report["per_class"]["Pleural effusion"]["auroc"])
    defined = [report["per_class"][name]["auroc"] for name in CLASSES[:2]]
    assert report["macro"]["auroc"] == pytest.approx(np.mean(defined))
    assert float(trainer.best.thresholds[1]) == 0.5
    assert math.isfinite(trainer.best.auprc)


def test_diverged_probes_are_named_and_not_chosen(cohorts: Cohorts, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(cohorts, max_steps=12, learning_rates=[3e38, 0.01])
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "'max/lr_3e+38'" in caplog.text
    assert "diverged and cannot be chosen" in caplog.text
    assert trainer.grid.names[trainer.best.index][1] == 0.01
    alone = build(cohorts, max_steps=12, learning_rates=[0.01])
    alone.run()
    torch.testing.assert_close(trainer.best.parameters, alone.best.parameters)
    assert math.isfinite(float(trainer.state.output[0]["loss"]))


def test_what_cannot_be_trained_is_refused(cohorts: Cohorts, write_cohort: Any) -> None:
    other = EmbeddingBags(*write_cohort("other", 5, encoder="dale_ct_0"), CLASSES)
    with pytest.raises(ValueError, match=r"encoder.*dale_ct_"):
        build(cohorts | {"test": other})
    with pytest.raises(FloatingPointError, match=r"step 30.*learning_rates"):
        build(cohorts, val_interval=30, learning_rates=[3e38]).run()
    cohorts["validation"].labels.zero_()
    with pytest.raises(ValueError, match="17 validation volumes"):
        build(cohorts, max_steps=5).run()


@pytest.mark.parametrize("cohort", ["train", "validation", "test"])
def test_embedding_with_nan_is_named_before_training(cohorts: Cohorts, tmp_path: Path, cohort: str) -> None:
    arrays = {}
    for name, bags in cohorts.items():
        (tmp_path / name).mkdir()
        for index, volume in enumerate(bags.volumes):
            tokens = bags[index]["tokens"].numpy().copy()
            if (name, index) == (cohort, 3):
                tokens[1, 2] = np.nan
            np.save(tmp_path / name / f"{volume}.npy", tokens)
        arrays[name] = EmbeddingBags(tmp_path / name, tmp_path / f"{name}_labels.csv", CLASSES)
    trainer = build(arrays, max_steps=3)
    with pytest.raises(ValueError, match=f"NaN or Inf in 1 of .* for volume '{cohorts[cohort].volumes[3]}'"):
        trainer.run()
    assert trainer.state.iteration == 0


def test_intervals_are_the_bootstrap_of_the_predictions_by_patient(cohorts: Cohorts) -> None:
    trainer = build(cohorts, max_steps=25)
    trainer.run()
    predictions = trainer.state.predictions
    assert predictions.volumes == cohorts["test"].volumes
    np.testing.assert_array_equal(predictions.labels, cohorts["test"].labels.numpy())
    np.testing.assert_array_equal(predictions.thresholds, trainer.best.thresholds.numpy())
    patients = [volume.rsplit("_", 2)[0] for volume in predictions.volumes]
    weights = resample_weights(patients, 2000, seed=0)
    scored = (predictions.probabilities, predictions.labels, predictions.thresholds)
    expected = interval_report(bootstrap(*scored, weights), CLASSES)
    assert trainer.state.intervals["probe"] == expected
    low, high = trainer.state.intervals["probe"]["macro"]["auroc"]
    assert low <= trainer.state.reports["probe"]["macro"]["auroc"] <= high
    assert trainer.state.intervals["prevalence"]["macro"]["auroc"] == (0.5, 0.5)


def test_further_seeds_are_tested_with_thresholds_of_their_own(cohorts: Cohorts) -> None:
    trainer = build(cohorts, max_steps=25, further_seeds=[SEED, SEED + 1])
    trainer.run()
    own, same, other = (report["macro"] for report in trainer.state.seed_reports)
    assert own == trainer.state.reports["probe"]["macro"]
    # the run's own seed again: trained apart from the grid, on the same batches
    assert same == pytest.approx(own, abs=1e-6)
    assert other["auprc"] != pytest.approx(own["auprc"], abs=1e-6)


RNG = np.random.default_rng(0)
TARGETS = (RNG.random((11, 3)) < 0.4).astype(float)
SCORES = RNG.random((4, 11, 3))


def grid() -> ProbeGrid:
    poolers, rates = ["average", "learned_attention"], [0.1, 0.01]
    return ProbeGrid(poolers=poolers, learning_rates=rates, dim=5, num_classes=3, seed=0)


def offer(best: BestProbe, auprc: list[float], step: int, network: Any = None) -> None:
    network = network or grid()
    given = {"weights_of": lambda index: network.probe(index).state_dict(), "scores": SCORES}
    best.offer(auprc=np.array(auprc), step=step, targets=TARGETS, **given)


def test_highest_of_all_probes_and_steps_is_kept() -> None:
    best = BestProbe()
    for step, auprc in ((10, [0.2, 0.5, 0.3, 0.4]), (20, [0.2, 0.3, 0.6, 0.4]), (30, [0.59, 0.1, 0.1, 0.1])):
        offer(best, auprc, step)
    assert (best.auprc, best.index, best.step) == (0.6, 2, 20)
    np.testing.assert_array_equal(best.thresholds.numpy(), f1_thresholds(SCORES[2], TARGETS))


def test_ties_keep_the_earlier_step_and_the_first_probe() -> None:
    best = BestProbe()
    offer(best, [0.2, 0.5, 0.5, 0.4], 10)
    offer(best, [0.5, 0.5, 0.5, 0.5], 20)
    assert (best.index, best.step) == (1, 10)


def test_weights_are_those_of_the_moment_of_choice() -> None:
    best, network = BestProbe(), grid()
    offer(best, [0.1, 0.4, 0.2, 0.3], 10, network)
    before = {name: tensor.clone() for name, tensor in network.probe(1).state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    offer(best, [0.1, 0.3, 0.2, 0.3], 20, network)
    assert sorted(best.parameters) == ["classifier.bias", "classifier.weight", "pooler.queries"]
    assert all(torch.equal(best.parameters[name], tensor) for name, tensor in before.items())


LARGE = {"train": 208, "validation": 24, "test": 24}
TOKENS, WIDTH = 2**15, 256  # of a bag: 16 MiB in 16 bits, 4 GiB of all bags


def write_large(folder: Path) -> None:
    """Write bags of zeros but for some rows at random places, as sparse files."""
    rng = np.random.default_rng(3)
    identity = dict.fromkeys(IDENTITY_KEYS, "x") | {"token_kind": "grid"}
    for split, num_volumes in LARGE.items():
        labels = (rng.random((num_volumes, len(CLASSES))) < 0.4).astype(int)
        names = [f"{split}_{index}_a_1" for index in range(num_volumes)]
        with EmbeddingStoreWriter(folder / split, identity, "float16") as writer:
            for name, row in zip(names, labels, strict=True):
                tokens = torch.zeros(TOKENS, WIDTH, dtype=torch.float16)
                rows = torch.from_numpy(rng.choice(TOKENS, 50, replace=False))
                tokens[rows] = torch.from_numpy(rng.standard_normal((50, WIDTH))).half()
                tokens[rows[:20], : len(CLASSES)] += 4 * torch.from_numpy(row).half()
                writer.add(name, tokens, (1, 1, 1))
        for part in (folder / split).iterdir():
            subprocess.run(["fallocate", "--dig-holes", part], check=False)  # where the file system can
        lines = [",".join([name, *map(str, row)]) for name, row in zip(names, labels, strict=True)]
        (folder / f"{split}.csv").write_text("\n".join([",".join(["VolumeName", *CLASSES]), *lines]) + "\n")


class InMemory(EmbeddingBags):
    """The same bags in memory, of which zeros that nobody wrote take none."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        bag = super().__getitem__(index)
        tokens = torch.from_numpy(np.zeros(bag["tokens"].shape, np.float16))
        rows = bag["tokens"].any(1)
        tokens[rows] = bag["tokens"][rows]
        return bag | {"tokens": tokens}


def train_large(folder: Path, kind: type[EmbeddingBags]) -> ProbeGridTrainer:
    cohorts = {split: kind(folder / split, folder / f"{split}.csv", CLASSES) for split in LARGE}
    poolers = ("max", "learned_attention")
    trainer = build(cohorts, 3, val_interval=3, learning_rates=[0.1], poolers=poolers)
    trainer.run()
    return trainer


def train_with_a_gigabyte(folder: Path) -> None:
    """Train with room for the mapped files, which take memory only while it is free, and 1 GiB besides."""
    torch.set_num_threads(1)
    status = Path("/proc/self/status").read_text()
    (in_use,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    files = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + files + 2**30,) * 2)
    trainer = train_large(folder, EmbeddingBags)
    with pytest.raises(MemoryError):  # the control
        np.empty(2**30, np.uint8)
    torch.save(trainer.network.state_dict(), folder / "network.pt")
    np.save(folder / "scores.npy", trainer.state.predictions.probabilities)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory that is enforced")
def test_bags_of_four_gigabytes_train_in_one_as_they_do_in_memory(tmp_path: Path) -> None:
    write_large(tmp_path)
    subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = train_large(tmp_path, InMemory)
    torch.set_num_threads(threads)
    found = torch.load(tmp_path / "network.pt")
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(found[name], tensor), name
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), trainer.state.predictions.probabilities)


if __name__ == "__main__":
    train_with_a_gigabyte(Path(sys.argv[1]))
