"""Table I's protocol (labels, probes, metrics, bootstrap) against the plain way.

    python benchmarks/dense_probe.py
    python benchmarks/dense_probe.py --ct-rate-memory    (peak memory at CT-RATE's size: some 10 GB)

Synthetic scans: label maps of ellipses, tokens that know them in part. The plain way looks at every cell for
labels, trains one probe after the other on features in float32, and calls scikit-learn for every class and
resample. Both ways get the same rows, weights and resamples, and must give the same figures. All is measured
but most of the plain way's resamples, of which it makes a few. Processor time on one thread. Ends in one line
of JSON; ``time_ratio`` is that of the whole.
"""

# S slices, P patches of a slice, D embedding, C classes, R resamples

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import typer
from monai.optimizers import WarmupCosineSchedule
from rich.console import Console
from scipy.sparse import csr_matrix, vstack
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from common.cohort.cohort import load_labels
from common.embeddings import dense_cohort
from common.embeddings.dense_cohort import TOKEN_KINDS, DenseCohort, DrawnRows, RemainingSteps
from common.embeddings.dense_labels import TASKS, DenseLabels, findings_present, write_dense_labels
from common.embeddings.store import EmbeddingStoreWriter
from common.engines.dense_probe import BACKGROUND, BestLayers, DenseProbeTrainer, validation_auprc
from common.metrics.bootstrap import RESAMPLING_SEED, interval, resample_weights
from common.networks.dense_probe import DenseProbes
from common.transforms.dense_labels import patch_bits, patch_shares

VOLUMES, SLICES, SIZE_PX, GRID, DIM = 20, 12, 512, 16, 384
BOX = (64, 48, 384)  # cells of 24 pixels: the plain way has no answer for pixels that a border cuts
ORGANS, FINDINGS = range(1, 31), range(8)
STEPS, VAL_INTERVAL, BATCH_SIZE, SEED = 300, 100, 256, 42
LEARNING_RATES = [0.1, 0.03, 0.01, 0.003]
MIN_POSITIVES, NUM_RESAMPLES, PLAIN_RESAMPLES = 5, 2_000, 3
CT_RATE_SCANS, CT_RATE_SLICES, CT_RATE_STEPS = (281, 47, 86), 300, 15_000


def masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a label map and findings of a scan, ``(S, H, H)``: ellipses in a body, as large as organs are."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:SIZE_PX, :SIZE_PX]
    ids, bits = (
        np.zeros((SLICES, SIZE_PX, SIZE_PX), np.uint8),
        np.zeros((SLICES, SIZE_PX, SIZE_PX), np.uint16),
    )
    for values, classes, largest in ((ids, ORGANS, 70), (bits, FINDINGS, 20)):
        for number in classes:
            centre, axes = rng.uniform(140, 380, 2), rng.uniform(8, largest, 2)
            first, last = np.sort(rng.integers(0, SLICES + 1, 2))
            inside = (row - centre[0]) ** 2 / axes[0] ** 2 + (column - centre[1]) ** 2 / axes[1] ** 2 < 1
            shown = values[first:last]
            if values is ids:
                shown[:, inside] = number
            else:
                shown[:, inside] |= np.uint16(1 << number)
    return ids, bits


def plain_labels(ids: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Look at every cell: shares ``(S * P, 118)`` and presence ``(S * P, 14)``."""
    top, left, side = BOX
    cell = side // GRID
    shares = np.zeros((SLICES, GRID, GRID, TASKS["totalsegmentator"]), np.float32)
    present = np.zeros((SLICES, GRID, GRID, TASKS["rexgroundingct"]), bool)
    for z in range(SLICES):
        for i in range(GRID):
            for j in range(GRID):
                rows = slice(top + i * cell, top + (i + 1) * cell)
                columns = slice(left + j * cell, left + (j + 1) * cell)
                found, counts = np.unique(ids[z, rows, columns], return_counts=True)
                shares[z, i, j, found] = counts / cell**2
                for k in range(present.shape[-1]):
                    present[z, i, j, k] = (bits[z, rows, columns] >> k & 1).any()
    return shares.reshape(-1, shares.shape[-1]), present.reshape(-1, present.shape[-1])


def seconds_of(once: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of a call, and what it returns."""
    start = time.process_time()
    result = once()
    return time.process_time() - start, result


def our_labels(ids: np.ndarray, bits: np.ndarray) -> tuple[Any, Any]:
    """Count as the package does: shares of organs, and which findings a patch shows."""
    return patch_shares(ids, BOX, GRID, TASKS["totalsegmentator"]), patch_bits(bits, BOX, GRID)


def write_cohort(root: Path) -> dict[str, float]:
    """Label and embed synthetic scans; return the times and the largest difference of both ways' labels."""
    ours = plain = error = 0.0
    directions = torch.randn(sum(TASKS.values()), DIM, generator=torch.Generator().manual_seed(0))
    identity = {"encoder": "synthetic", "encoder_id": "none", "preprocessing": "cropped_256"}
    identity |= {"slice_order": "feet_to_head", "token_kind": "slice"}
    with EmbeddingStoreWriter(root / "tokens", identity, "float16") as writer:
        for number in range(VOLUMES):
            ids, bits = masks(number)
            seconds, (shares, found) = seconds_of(partial(our_labels, ids, bits))
            ours += seconds
            seconds, (plain_shares, plain_present) = seconds_of(partial(plain_labels, ids, bits))
            plain += seconds
            error = max(error, float(np.abs(shares.toarray() - plain_shares).max()))
            assert (findings_present(found.ravel()) == plain_present).all()
            volume = f"valid_{number + 1}_a_1"
            write_dense_labels(root / "labels", DenseLabels(volume, BOX, shares, found))
            signal = torch.from_numpy(np.concatenate([plain_present, plain_shares], axis=1)).float()
            generator = torch.Generator().manual_seed(number)
            patches = torch.randn(len(signal), DIM, generator=generator) + signal @ directions
            patches = patches.unflatten(0, (SLICES, -1))
            z_mm = torch.arange(SLICES) * 2.0
            grid = {"patches": patches, "patch_grid": [GRID, GRID], "box": list(BOX)}
            writer.add(volume, patches.mean(1), (0.7, 0.7, 2.0), z_mm=z_mm, **grid)
    return {"ours": ours, "plain": plain, "error": error}


def cohorts_of(root: Path) -> list[DenseCohort]:
    """Open the three sides: 14, 2 and 4 patients."""
    sides = (range(1, 15), range(15, 17), range(17, 21))
    return [
        DenseCohort(root / "tokens", root / "labels", [f"valid_{number}_a_1" for number in side])
        for side in sides
    ]


def trainer_of(cohorts: list[DenseCohort]) -> DenseProbeTrainer:
    """Build the trainer of all probes, rows drawn and read."""
    network = DenseProbes(TASKS, LEARNING_RATES, DIM, SEED)
    optimizer = torch.optim.SGD(network.parameter_groups(), momentum=0.95)
    drawn = DrawnRows(cohorts[0], STEPS, BATCH_SIZE, SEED)
    return DenseProbeTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        max_steps=STEPS,
        train_data_loader=DataLoader(drawn, batch_size=None, sampler=RemainingSteps(STEPS)),
        val_cohort=cohorts[1],
        test_cohort=cohorts[2],
        network=network,
        optimizer=optimizer,
        lr_scheduler=WarmupCosineSchedule(optimizer, warmup_steps=0, t_total=STEPS),
        loss_function=nn.BCEWithLogitsLoss(reduction="none"),
        best=BestLayers(),
        val_interval=VAL_INTERVAL,
        min_positives=MIN_POSITIVES,
        num_resamples=NUM_RESAMPLES,
        train_handlers=[],
    )


class Everything:
    """All of a cohort in float32, as the plain way has it."""

    def __init__(self, cohort: DenseCohort, kind: str, first: int, last: int) -> None:
        rows = np.arange(cohort.num_rows[kind])
        self.tokens = torch.cat(list(cohort.tokens(kind))).float()
        self.soft = torch.from_numpy(cohort.soft_targets(kind, rows)[:, first:last]).float()
        self.hard = self.soft.numpy() > 0
        self.patients = cohort.patient_of_row(kind)


def plain_probe(
    layer: nn.Linear, rate: float, rows: np.ndarray, train: Everything, val: Everything, averaged: list[int]
) -> tuple[float, int, nn.Linear]:
    """Train one probe and validate it; return its best macro AUPRC, the step and the weights of then."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.95)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    best = (-1.0, 0, layer)
    for step, batch in enumerate(rows, 1):
        optimizer.zero_grad()
        logits = layer(train.tokens[batch])
        nn.functional.binary_cross_entropy_with_logits(logits, train.soft[batch]).backward()
        optimizer.step()
        scheduler.step()
        if step % VAL_INTERVAL == 0:
            with torch.no_grad():
                scores = layer(val.tokens).numpy()
            mean = float(np.mean([average_precision_score(val.hard[:, c], scores[:, c]) for c in averaged]))
            if mean > best[0]:
                copied = nn.Linear(layer.in_features, layer.out_features)
                copied.load_state_dict(layer.state_dict())
                best = (mean, step, copied)
    return best


def plain_kind_and_task(trainer: DenseProbeTrainer, kind: str, task: str) -> dict[str, Any]:
    """Do one kind and task the plain way, on the same rows and from the same weights."""
    number, columns = TOKEN_KINDS.index(kind), trainer.probes.columns[task]
    start = DenseProbes(TASKS, LEARNING_RATES, DIM, SEED)
    parts = (trainer.drawn.cohort, trainer.val_cohort, trainer.test_cohort)
    names = [label.name for label in load_labels(task)]
    began = time.process_time()
    train, val, test = (Everything(cohort, kind, columns.start, columns.stop) for cohort in parts)
    rows = np.random.default_rng([SEED, number]).integers(0, len(train.tokens), (STEPS, BATCH_SIZE))
    organs = [c for c, name in enumerate(names) if name != BACKGROUND and val.hard[:, c].any()]
    best = max(
        (
            plain_probe(start.layer(number, place, columns), rate, rows, train, val, organs)
            for place, rate in enumerate(LEARNING_RATES)
        ),
        key=lambda found: found[0],
    )
    training = time.process_time() - began
    began = time.process_time()
    with torch.no_grad():
        scores = best[2](test.tokens).numpy()
    counted = [
        c for c, name in enumerate(names) if name != BACKGROUND and test.hard[:, c].sum() >= MIN_POSITIVES
    ]
    macro = {
        "auroc": np.nanmean([roc_auc_score(test.hard[:, c], scores[:, c]) for c in counted]),
        "auprc": np.mean([average_precision_score(test.hard[:, c], scores[:, c]) for c in counted]),
    }
    testing = time.process_time() - began
    weights = resample_weights(trainer.test_cohort.patients, NUM_RESAMPLES, RESAMPLING_SEED)[:PLAIN_RESAMPLES]
    began, resampled = time.process_time(), []
    for weight in weights:
        drawn = np.repeat(np.arange(len(scores)), weight[test.patients].astype(int))
        areas = []
        for c in counted:
            target = test.hard[drawn, c]
            defined = target.any() and not target.all()
            areas.append(
                (
                    roc_auc_score(target, scores[drawn, c]) if defined else np.nan,
                    average_precision_score(target, scores[drawn, c]) if target.any() else np.nan,
                )
            )
        resampled.append(np.nanmean(areas, axis=0))
    bootstrap = (time.process_time() - began) * NUM_RESAMPLES / PLAIN_RESAMPLES
    seconds = {"training and validation": training, "test": testing, "bootstrap": bootstrap}
    return {"best": best, "macro": macro, "resampled": np.array(resampled), "seconds": seconds}


def largest_differences(
    trainer: DenseProbeTrainer, kind: str, task: str, found: dict[str, Any]
) -> dict[str, float]:
    """Compare a kind and task of both ways: weights, macro means and intervals of a few resamples."""
    report, chosen = trainer.state.reports[kind, task], trainer.best.chosen[kind, task]
    few = trainer.report_on_test(kind, task, PLAIN_RESAMPLES)
    weight = found["best"][2].weight.detach()
    intervals = zip(("auroc", "auprc"), found["resampled"].T, strict=True)
    return {
        "weights": float((chosen["weight"] - weight).norm() / weight.norm()),
        "macro": max(abs(report["macro"][name][0] - value) for name, value in found["macro"].items()),
        "intervals": max(
            abs(one - other)
            for name, values in intervals
            for one, other in zip(few["macro"][name][1], interval(values), strict=True)
        ),
    }


def report_seconds(trainer: DenseProbeTrainer, num_resamples: int) -> float:
    """Return the time of all tests with so many resamples."""

    def test_all() -> None:
        for kind, task in ((kind, task) for kind in TOKEN_KINDS for task in TASKS):
            trainer.report_on_test(kind, task, num_resamples)

    return seconds_of(test_all)[0]


def ct_rate_peak_gib() -> float:
    """Return the peak memory of a process that draws, reads and validates at CT-RATE's size.

    Tokens are of ViT-L's width and made on the spot rather than read; labels as dense as those of real scans.
    """

    class LargeCohort(DenseCohort):
        def __init__(self, scans: int) -> None:
            patches = scans * CT_RATE_SLICES * GRID**2
            self.identity = {"dim": 1024}
            self.patches_of_slice, self._by_class = GRID**2, {}
            self.num_rows = {"cls": scans * CT_RATE_SLICES, "patch": patches}
            self._findings = {kind: np.zeros(rows, np.uint16) for kind, rows in self.num_rows.items()}
            self._shares = {kind: self.shares_of(rows) for kind, rows in self.num_rows.items()}

        @staticmethod
        def shares_of(rows: int) -> csr_matrix:
            block = np.zeros((4, TASKS["totalsegmentator"]), np.float32)
            block[:, 0], block[:, 10], block[::2, 51] = 0.5, 0.3, 0.2
            part = csr_matrix(np.tile(block, (1000, 1)))
            return vstack([part] * -(-rows // 4000), format="csr")[:rows]

        def tokens(self, kind: str) -> Any:  # noqa: ANN401 (an iterator)
            chunk = torch.zeros(64 * (GRID**2 if kind == "patch" else 1), 1024, dtype=torch.float16)
            for first in range(0, self.num_rows[kind], len(chunk)):
                yield chunk[: self.num_rows[kind] - first]

    train, val = LargeCohort(CT_RATE_SCANS[0]), LargeCohort(CT_RATE_SCANS[1])
    test = LargeCohort(CT_RATE_SCANS[2])
    drawn = DrawnRows(train, CT_RATE_STEPS, BATCH_SIZE, SEED)
    weight = torch.randn(len(LEARNING_RATES), sum(TASKS.values()), 1024)
    # one block of classes: the memory is that of every block
    with mock.patch.object(val, "targets", lambda kind, column: np.zeros(val.num_rows[kind], bool)):
        validation_auprc(val, "patch", weight[:, :10], weight[:, :10, 0])
    num_drawn = dict(zip(TOKEN_KINDS, map(len, drawn.tokens), strict=True))
    rows = {"drawn": num_drawn, "of": train.num_rows, "tested": test.num_rows}
    typer.echo(json.dumps(rows), err=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(
    ct_rate_memory: bool = typer.Option(False, "--ct-rate-memory", help="Measure peak memory alone."),
) -> None:
    """Measure Table I's protocol."""
    torch.set_num_threads(1)
    console = Console(width=120, highlight=False)
    if ct_rate_memory:
        typer.echo(json.dumps({"name": "dense_probe_memory", "peak_gib": round(ct_rate_peak_gib(), 2)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        labels = write_cohort(Path(folder))
        preparation, trainer = seconds_of(lambda: trainer_of(cohorts_of(Path(folder))))
        with mock.patch.object(dense_cohort, "SLICES_PER_CHUNK", SLICES):
            running, _ = seconds_of(trainer.run)
        ours = labels["ours"] + preparation + running
        plain = {"labels": labels["plain"]}
        errors = {"labels": labels["error"], "weights": 0.0, "macro": 0.0, "intervals": 0.0}
        for kind in TOKEN_KINDS:
            for task in TASKS:
                found = plain_kind_and_task(trainer, kind, task)
                for part, seconds in found["seconds"].items():
                    plain[part] = plain.get(part, 0.0) + seconds
                for part, difference in largest_differences(trainer, kind, task, found).items():
                    errors[part] = max(errors[part], float(difference))
        bootstrap = report_seconds(trainer, NUM_RESAMPLES) - report_seconds(trainer, 1)
        console.print(
            f"{VOLUMES} scans of {SLICES} slices x {GRID**2} patches x {DIM}, {STEPS} steps of 16 probes, "
            f"{NUM_RESAMPLES:,} resamples (plain: {PLAIN_RESAMPLES}, scaled)"
        )
        console.print(
            f"Ours: labels {labels['ours']:.2f} s, rows {preparation:.2f} s, the rest {running:.1f} s, "
            f"of which the bootstrap {bootstrap:.2f} s"
        )
        console.print("Plain: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in plain.items()))
        console.print(f"Largest differences: {errors}")
        line = {
            "name": "dense_probe",
            "time_ratio": sum(plain.values()) / ours,
            "labels_ratio": labels["plain"] / labels["ours"],
            "without_bootstrap_ratio": (sum(plain.values()) - plain["bootstrap"]) / (ours - bootstrap),
            "bootstrap_ratio": plain["bootstrap"] / bootstrap,
            "max_rel_error": errors["weights"],
            "macro_error": errors["macro"],
            "interval_error": errors["intervals"],
        }
    typer.echo(json.dumps({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in line.items()}))


if __name__ == "__main__":
    typer.run(main)
