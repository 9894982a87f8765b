"""The grid of 20 MIL probes, its metrics and its bootstrap, each against the plain way.

    python benchmarks/mil_grid.py

Synthetic bags of CT-RATE's shape: 300 slices of 1,024 float16 numbers on average, 90 to 763 of them, 18
classes. The plain way trains one probe after the other on padded batches of a DataLoader without workers,
from the same weights on the same batches. Times are processor time on one thread, or on a GPU the clock's;
what 15,000 steps and 47,000 volumes take is worked out from them. As in ``sigreg.py`` the C library keeps the
pages of freed blocks, which spares the plain way much. Ends in one line of JSON.
"""

# N volumes, B bags, S slices, D embedding, C classes, R resamples

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import typer
from monai.optimizers import WarmupCosineSchedule
from rich.console import Console
from sklearn import metrics as sklearn_metrics
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from benchmarks.sigreg import keep_pages, peak_bytes
from common.embeddings.bags import BagReader, ShuffledBatches, collate_bags
from common.metrics.bootstrap import bootstrap, resample_weights
from common.metrics.multilabel import auroc_and_average_precision
from common.networks import mil_probe
from common.networks.mil_probe import MILProbe, ProbeGrid
from common.networks.poolers import PAPER_POOLERS, pad_bags

DIM, NUM_CLASSES, BATCH_SIZE, SEED = 1024, 18, 16, 42
LEARNING_RATES = [0.1, 0.03, 0.01, 0.003]
PAPER_STEPS, CT_RATE_VOLUMES = 15_000, 47_000
METRIC_ROWS, TEST_VOLUMES, NUM_RESAMPLES, PLAIN_RESAMPLES = 400_000, 3_000, 2_000, 5


class Bags(Dataset):
    """Stands in for ``EmbeddingBags``, with random embeddings and labels."""

    def __init__(self, lengths: np.ndarray, dim: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.lengths, self.row_bytes = torch.from_numpy(lengths), 2 * dim
        self.tokens = torch.randn(int(self.lengths.sum()), dim, generator=generator).half()
        self.bags = self.tokens.split(lengths.tolist())
        self.labels = (torch.rand(len(lengths), NUM_CLASSES, generator=generator) < 0.2).float()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a bag as ``EmbeddingBags`` does."""
        return {"index": index, "tokens": self.bags[index], "labels": self.labels[index]}


def ct_rate_lengths(num_volumes: int) -> np.ndarray:
    """Draw numbers of slices as CT-RATE has them: 300 on average, few many more."""
    return np.clip(np.random.default_rng(SEED).gamma(6, 50, num_volumes).astype(int), 90, 763)


class GridStep:
    """A step of all probes, as ``ProbeGridTrainer`` makes it."""

    def __init__(self, bags: Bags, device: torch.device, total_steps: int) -> None:
        self.grid = ProbeGrid(
            poolers=list(PAPER_POOLERS),
            learning_rates=LEARNING_RATES,
            dim=bags.tokens.shape[1],
            num_classes=NUM_CLASSES,
            seed=SEED,
        ).to(device)
        self.optimizer = torch.optim.SGD(self.grid.parameter_groups(), momentum=0.95)
        self.scheduler = WarmupCosineSchedule(self.optimizer, warmup_steps=0, t_total=total_steps)
        self.reader = BagReader(bags, device)  # type: ignore[arg-type]  # stands in for what it takes
        self.loss = nn.BCEWithLogitsLoss(reduction="none")
        batches = ShuffledBatches(len(bags), BATCH_SIZE, SEED)
        self.loader = iter(DataLoader(bags, batch_sampler=batches, collate_fn=collate_bags))
        self.fixed = torch.empty(0)

    def pool(self) -> None:
        """Apply the poolers that have no parameters, once for all steps."""
        self.fixed = self.grid.fixed_features(self.reader(range(len(self.reader.bags))))

    def __call__(self) -> None:
        """Train one step."""
        batch = next(self.loader)
        chosen = batch["index"].tolist()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.grid(self.fixed[chosen], self.reader(chosen))
        self.loss(logits, batch["labels"].to(logits).expand_as(logits)).mean(dim=(1, 2)).sum().backward()
        self.optimizer.step()
        self.scheduler.step()


class PlainStep:
    """A step of one probe, the plain way."""

    def __init__(
        self, probe: MILProbe, learning_rate: float, bags: Bags, device: torch.device, total_steps: int
    ) -> None:
        self.probe, self.device = probe.to(device), device
        self.optimizer = torch.optim.SGD(probe.parameters(), lr=learning_rate, momentum=0.95)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=total_steps)
        batches = ShuffledBatches(len(bags), BATCH_SIZE, SEED)
        self.loader = iter(DataLoader(bags, batch_sampler=batches, collate_fn=self._pad))

    @staticmethod
    def _pad(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        padded, mask = pad_bags([sample["tokens"].float() for sample in samples])
        return padded, mask, torch.stack([sample["labels"] for sample in samples])

    def __call__(self) -> None:
        """Train one step."""
        padded, mask, labels = (tensor.to(self.device) for tensor in next(self.loader))
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.binary_cross_entropy_with_logits(self.probe(padded, mask), labels).backward()
        self.optimizer.step()
        self.scheduler.step()


def seconds_of(once: Callable[[], Any], device: torch.device) -> float:
    """Return what a call takes: processor time, or on a GPU time on the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    now = time.perf_counter if device.type == "cuda" else time.process_time
    start = now()
    once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


def parity(before: list[MILProbe], alone: list[MILProbe], together: list[MILProbe]) -> tuple[float, float]:
    """Return the largest differences after training, each as a share of the update (Euclidean norms).

    Returns:
        Of the classifiers, and of the learned queries.
    """
    of_classifiers: list[float] = []
    of_queries: list[float] = []
    for old, one, other in zip(before, alone, together, strict=True):
        for part, differences in (("classifier", of_classifiers), ("pooler", of_queries)):
            states = [getattr(probe, part).state_dict() for probe in (old, one, other)]
            vectors = [torch.cat([t.flatten().double() for t in state.values()]) for state in states if state]
            if vectors:
                update = float((vectors[1] - vectors[0]).norm())
                differences.append(float((vectors[2] - vectors[1]).norm()) / update)
    return max(of_classifiers), max(of_queries)


def train_both_ways(bags: Bags, steps: int, device: torch.device) -> dict[str, Any]:
    """Train all probes the plain way and in the grid, in turns; return times, memory and differences."""
    grid_step = GridStep(bags, device, steps)
    pooling = seconds_of(grid_step.pool, device) / len(bags)
    probes = [grid_step.grid.probe(index) for index in range(len(grid_step.grid.names))]
    before = [grid_step.grid.probe(index) for index in range(len(grid_step.grid.names))]
    plain: dict[str, list[float]] = {name: [] for name in PAPER_POOLERS}
    plain_steps = [
        PlainStep(probe, rate, bags, device, steps)
        for probe, (_, rate) in zip(probes, grid_step.grid.names, strict=True)
    ]
    ours = []
    for _ in range(steps):
        ours.append(seconds_of(grid_step, device))
        for (name, _), step in zip(grid_step.grid.names, plain_steps, strict=True):
            plain[name].append(seconds_of(step, device))
    together = [grid_step.grid.probe(index) for index in range(len(probes))]
    classifier, query = parity(before, probes, together)
    return {
        "grid_step": statistics.median(ours),
        "plain_steps": {name: statistics.median(seconds) for name, seconds in plain.items()},
        "pooling": pooling,
        "classifier_difference": classifier,
        "query_difference": query,
        "grid_bytes": peak_bytes(grid_step, device),
        "plain_bytes": max(peak_bytes(step, device) for step in plain_steps[: len(PAPER_POOLERS)]),
    }


def host_seconds() -> float:
    """Return what a step as a GPU makes it costs on next to no data: the time in which it is launched."""
    tiny = GridStep(Bags(np.ones(BATCH_SIZE, dtype=int), 8), torch.device("cpu"), 50)
    tiny.pool()
    with mock.patch.object(mil_probe, "_read_together", lambda bags, device: [list(bags)]):
        return statistics.median(seconds_of(tiny, torch.device("cpu")) for _ in range(50))


def rank_metrics() -> tuple[float, float]:
    """Return how many times as fast as scikit-learn AP and AUROC are, and the largest difference."""
    rng, ratios, errors = np.random.default_rng(0), [], []
    for prevalence in (0.1, 0.2):
        targets = (rng.random(METRIC_ROWS) < prevalence).astype(float)
        scores = 1 / (1 + np.exp(-(rng.standard_normal(METRIC_ROWS) + targets)))
        ours, theirs = [], []
        for _ in range(5):
            start = time.process_time()
            values = auroc_and_average_precision(scores[:, None], targets[:, None])
            ours.append(time.process_time() - start)
            start = time.process_time()
            expected = (
                sklearn_metrics.roc_auc_score(targets, scores),
                sklearn_metrics.average_precision_score(targets, scores),
            )
            theirs.append(time.process_time() - start)
        ratios.append(statistics.median(theirs) / statistics.median(ours))
        errors += [abs(float(a[0]) - b) for a, b in zip(values, expected, strict=True)]
    return min(ratios), max(errors)


def resampling() -> tuple[float, float, float]:
    """Return how many times as fast as a plain loop the bootstrap is, the largest difference, its seconds."""
    rng = np.random.default_rng(0)
    targets = (rng.random((TEST_VOLUMES, NUM_CLASSES)) < 0.2).astype(float)
    scores = 1 / (1 + np.exp(-(rng.standard_normal(targets.shape) + targets)))
    thresholds, patients = np.full(NUM_CLASSES, 0.6), [f"valid_{index // 2}" for index in range(TEST_VOLUMES)]
    start = time.process_time()
    weights = resample_weights(patients, NUM_RESAMPLES, seed=0)
    values = bootstrap(scores, targets, thresholds, weights)
    ours = time.process_time() - start
    start, error = time.process_time(), 0.0
    for resample in range(PLAIN_RESAMPLES):
        rows = np.repeat(np.arange(TEST_VOLUMES), weights[resample].astype(int))
        for label in range(NUM_CLASSES):
            y, s = targets[rows, label], scores[rows, label]
            called = s >= thresholds[label]
            expected = {
                "auroc": sklearn_metrics.roc_auc_score(y, s),
                "auprc": sklearn_metrics.average_precision_score(y, s),
                "f1": sklearn_metrics.f1_score(y, called),
                "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(y, called),
            }
            error = max(error, *(abs(values[name][resample, label] - v) for name, v in expected.items()))
    plain = (time.process_time() - start) * NUM_RESAMPLES / PLAIN_RESAMPLES
    return plain / ours, error, ours


def main(
    volumes: int = typer.Option(160, help="Bags to train on; 0.6 MB each."),
    steps: int = typer.Option(24, help="Steps that both ways train."),
    threads: int = typer.Option(1, help="Threads of the CPU."),
) -> None:
    """Measure the probe grid, the ranking metrics and the bootstrap."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler says when it starts and stops
    pages = "kept" if keep_pages() else "fresh"
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {threads}"
    console = Console(width=120, highlight=False)
    lengths = ct_rate_lengths(volumes)
    console.print(
        f"{hardware}; torch {torch.__version__}; pages: {pages}; {volumes} bags of {lengths.mean():.0f} "
        f"slices x {DIM}, {len(LEARNING_RATES)} learning rates x {len(PAPER_POOLERS)} poolers, {steps} steps"
    )
    found = train_both_ways(Bags(lengths, DIM), steps, device)
    plain_step = len(LEARNING_RATES) * sum(found["plain_steps"].values())
    plain_run = PAPER_STEPS * plain_step
    run = PAPER_STEPS * found["grid_step"] + CT_RATE_VOLUMES * found["pooling"]
    each = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in found["plain_steps"].items())
    memory = [found[name] / 2**20 for name in ("grid_bytes", "plain_bytes")]
    console.print(
        f"Plain step, ms: {each}; of all 20: {1e3 * plain_step:.0f}\n"
        f"Step of the grid: {1e3 * found['grid_step']:.1f} ms; pooling once: {1e3 * found['pooling']:.2f} ms "
        f"a volume\nMemory of a step beyond the bags: {memory[0]:.0f} MiB; plain, of one probe: "
        f"{memory[1]:.0f} MiB\nAfter {steps} steps, of the update: classifiers differ by "
        f"{found['classifier_difference']:.1e}, queries by {found['query_difference']:.1e}"
    )
    gigabytes = CT_RATE_VOLUMES * float(lengths.mean()) * DIM * 2 / 1e9
    host = host_seconds()
    console.print(
        f"{PAPER_STEPS:,} steps on {CT_RATE_VOLUMES:,} volumes ({gigabytes:.0f} GB in 16 bits): "
        f"{run / 60:.1f} min here, plain {plain_run / 3600:.1f} h. To launch a GPU's step takes "
        f"{1e3 * host:.1f} ms of this CPU, those of a run {PAPER_STEPS * host:.0f} s."
    )
    metric_ratio, metric_error = rank_metrics()
    bootstrap_ratio, bootstrap_error, bootstrap_seconds = resampling()
    console.print(
        f"AP and AUROC of {METRIC_ROWS:,} rows: {metric_ratio:.1f} times scikit-learn, within "
        f"{metric_error:.0e}\nBootstrap of {NUM_RESAMPLES:,} x {TEST_VOLUMES:,} x {NUM_CLASSES}: "
        f"{bootstrap_seconds:.2f} s, {bootstrap_ratio:.0f} times a loop, within {bootstrap_error:.0e}"
    )
    line = {
        "name": "mil_grid",
        "time_ratio": plain_run / run,
        "step_ratio": plain_step / found["grid_step"],
        "memory_ratio": found["plain_bytes"] / found["grid_bytes"],
        "max_rel_error": found["classifier_difference"],
        "query_rel_error": found["query_difference"],
        "grid_peak_mib": found["grid_bytes"] / 2**20,
        "run_minutes": run / 60,
        "launch_seconds": PAPER_STEPS * host,
        "metric_ratio": metric_ratio,
        "metric_error": metric_error,
        "bootstrap_ratio": bootstrap_ratio,
        "bootstrap_error": bootstrap_error,
        "device": hardware,
        "pages": pages,
    }
    typer.echo(json.dumps({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in line.items()}))


if __name__ == "__main__":
    typer.run(main)
