"""What an evaluation leaves behind: the chosen probe, its predictions, tables and pictures."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

import numpy as np
import torch
from ignite.engine import Engine, Events

from common.cohort.cohort import write_table
from common.embeddings.work import ct_sources
from common.engines.probe_grid import ProbeGridTrainer
from common.networks.mil_probe import save_probe
from common.reports.probe_pictures import (
    KINDS,
    class_rows,
    draw_attention,
    draw_classes,
    draw_per_class,
    seed_rows,
    threshold_rows,
)
from common.reports.results import Predictions, add_rows, result_rows, write_predictions

# S slices, H W pixels


def volumes_to_show(predictions: Predictions, most: int = 8) -> dict[str, str]:
    """Choose volumes to look at: of each class the true positive that the probe is surest of.

    Classes that it never finds are passed over, and a volume is chosen once, for its first class.

    Args:
        predictions: of the test set.
        most: volumes to choose at most.

    Returns:
        Volume to the class it was chosen for.
    """
    chosen: dict[str, str] = {}
    for index, name in enumerate(predictions.class_names):
        scores, targets = predictions.probabilities[:, index], predictions.labels[:, index]
        found = np.flatnonzero((targets == 1) & (scores >= predictions.thresholds[index]))
        if len(found) and len(chosen) < most:
            chosen.setdefault(predictions.volumes[found[scores[found].argmax()]], name)
    return chosen


def read_slices(ct_dir: str | Path, volumes: Sequence[str]) -> dict[str, np.ndarray]:
    """Read CT volumes as axial slices, feet to head, shown the radiological way.

    Args:
        ct_dir: what embeddings were made of: whatever ``ct_sources`` reads.
        volumes: volumes to read.

    Returns:
        Volume to its slices ``(S, H, H)`` in HU.

    Raises:
        FileNotFoundError: if a volume is not there.
        RejectedError: if one cannot be read.
    """
    found = {source.volume: source for source in ct_sources(ct_dir)[0]}
    missing = [volume for volume in volumes if volume not in found]
    if missing:
        raise FileNotFoundError(f"No CT of '{missing[0]}' in '{ct_dir}'.")
    return {volume: found[volume].read().hu for volume in volumes}


class ProbeCard(TypedDict):
    """What ``probe.json`` says about the chosen probe, along with the identity of its embeddings."""

    pooler: str
    learning_rate: float
    step: int  # optimizer steps taken when it was chosen
    seed: int
    validation_macro_auprc: float  # what it was chosen for
    class_names: list[str]  # in the order of the probe's outputs
    thresholds: list[float]  # probability from which each class is called positive
    test: dict[str, float | None]  # macro metrics; None where undefined
    test_intervals: dict[str, list[float | None]]  # their 95 % intervals
    undefined_classes: dict[str, list[str]]  # metric to the classes left out of its mean


class ProbeReport:
    """Write the chosen probe and its test results when a ``ProbeGridTrainer`` has completed.

    Files: ``probe.safetensors`` and ``probe.json`` (see :func:`common.networks.mil_probe.load_probe`);
    ``test_predictions.csv`` and ``validation_predictions.csv`` (see :mod:`common.cohort.cohort`);
    ``per_class.csv``, ``thresholds.csv`` and ``seeds.csv``; ``per_class.png``, ``roc.png``,
    ``precision_recall.png`` and ``reliability.png``; ``attention.csv`` and ``attention.png``, the weight of
    each slice, or token of another kind, in some volumes.

    Args:
        output_dir: folder of the files.
        seed: seed of the run, kept in ``probe.json``.
        attention_volumes: test volumes whose slices' weights are shown; if none is named, the true positive
            of each class that the probe is surest of, eight at most.
        ct_dir: folder with the CTs of the test volumes, as embedded, to show the slices of most weight where
            tokens are slices; None for the weights alone.

    Raises:
        ValueError: if a volume of ``attention_volumes`` is not in the test set, or its CT does not have
            as many slices as its embedding.
        FileNotFoundError: if ``ct_dir`` is not a folder, or has no CT of a volume to show.
    """

    def __init__(
        self,
        output_dir: str | Path,
        seed: int,
        attention_volumes: Sequence[str] = (),
        ct_dir: str | Path | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.seed = seed
        self.attention_volumes = list(attention_volumes)
        self.ct_dir = ct_dir

    def attach(self, engine: ProbeGridTrainer) -> None:
        """Register with a ``ProbeGridTrainer``.

        Raises:
            ValueError: if a volume of ``attention_volumes`` is not in the test set.
            FileNotFoundError: if ``ct_dir`` is not a folder.
        """
        if self.ct_dir is not None and not Path(self.ct_dir).is_dir():
            raise FileNotFoundError(f"No folder '{self.ct_dir}' (ct_dir).")
        unknown = [volume for volume in self.attention_volumes if volume not in engine.test_bags.volumes]
        if unknown:
            raise ValueError(f"attention_volumes must be in the test set, got '{unknown[0]}'.")
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: ProbeGridTrainer) -> None:
        if getattr(engine.state, "exit_status", 0):
            return
        state, bags = engine.state, engine.test_bags
        self.output_dir.mkdir(parents=True, exist_ok=True)
        origin = {name: value for name, value in bags.identity.items() if name != "dtype"}
        save_probe(self.output_dir, engine.chosen_probe(), {**self._card(engine), **origin})
        write_predictions(self.output_dir / "test_predictions.csv", state.predictions)
        write_predictions(self.output_dir / "validation_predictions.csv", state.validation)
        seeds = [self.seed, *engine.further_seeds]
        for name, rows in (
            ("per_class", class_rows(state.reports, state.intervals, state.predictions)),
            ("thresholds", threshold_rows(state.validation, state.predictions)),
            ("seeds", seed_rows(seeds, state.seed_reports)),
        ):
            write_table(self.output_dir / f"{name}.csv", rows)
        best, encoder = engine.best, bags.identity["encoder"]
        pooler, learning_rate = engine.grid.names[best.index]
        title = f"{encoder}: {len(bags)} test volumes, {pooler}, lr {learning_rate:g}, step {best.step}"
        per_class = state.intervals["probe"]["per_class"]
        draw_per_class(self.output_dir / "per_class.png", state.reports, state.intervals, title)
        for kind in KINDS:
            path = self.output_dir / f"{kind}.png"
            draw_classes(path, kind=kind, predictions=state.predictions, intervals=per_class, title=title)
        self._show_attention(engine)

    def _card(self, engine: ProbeGridTrainer) -> ProbeCard:
        best, bags, report = engine.best, engine.test_bags, engine.state.reports["probe"]
        pooler, learning_rate = engine.grid.names[best.index]
        intervals = engine.state.intervals["probe"]["macro"]
        return {
            "pooler": pooler,
            "learning_rate": learning_rate,
            "step": best.step,
            "seed": self.seed,
            "validation_macro_auprc": best.auprc,
            "class_names": bags.class_names,
            "thresholds": best.thresholds.tolist(),
            "test": {name: _json_number(value) for name, value in report["macro"].items()},
            "test_intervals": {name: [*map(_json_number, ends)] for name, ends in intervals.items()},
            "undefined_classes": report["undefined"],
        }

    def _show_attention(self, engine: ProbeGridTrainer) -> None:
        predictions = engine.state.predictions
        chosen = dict.fromkeys(self.attention_volumes, "") or volumes_to_show(predictions)
        probe: Any = engine.chosen_probe().cpu()
        if not chosen:
            return
        weights, captions = {}, {}
        pooler: Any = probe.pooler
        for volume, name in chosen.items():
            index = predictions.volumes.index(volume)
            with torch.no_grad():
                bag = engine.test_bags[index]["tokens"].float()
                weights[volume] = np.asarray(pooler.slice_weights(bag), dtype=np.float64)
            present = [
                known
                for known, label in zip(predictions.class_names, predictions.labels[index], strict=True)
                if label
            ]
            found = f", shown for {name}" if name else ""
            captions[volume] = f"{volume}{found} (labels: {', '.join(present) or 'none'})"
        identity = engine.test_bags.identity
        items = str(identity["preprocessing"]).endswith("_items")  # several tokens a slice
        unit = "slice" if identity["token_kind"] == "slice" and not items else "token"
        ct_dir = self.ct_dir if unit == "slice" else None
        slices = {} if ct_dir is None else read_slices(ct_dir, list(chosen))
        for volume, of_ct in slices.items():
            if len(of_ct) != len(weights[volume]):
                raise ValueError(
                    f"The CT of '{volume}' in '{ct_dir}' has {len(of_ct)} slices, its embedding "
                    f"{len(weights[volume])}. Point ct_dir to the CTs that were embedded."
                )
        rows = [
            {"volume": volume, unit: place, "weight": f"{weight:.8f}"}
            for volume, of_volume in weights.items()
            for place, weight in enumerate(of_volume)
        ]
        write_table(self.output_dir / "attention.csv", rows)
        path = self.output_dir / "attention.png"
        draw_attention(path, weights=weights, captions=captions, slices=slices, unit=unit)


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else value


class ResultsTable:
    """Add the test results of a :class:`ProbeGridTrainer` to a results CSV when it has completed.

    Four rows for the encoder and four for "prevalence", the floor on the same volumes, with the bootstrap's
    95 % intervals as low and high. Where the chosen probe was trained with several seeds, four more of
    protocol ``<protocol>_seeds``: their mean, with the lowest and the highest as low and high.

    Args:
        path: CSV of all evaluations; made when missing.
        protocol: name of the evaluation.
        dataset: name of the data.
        seed: seed of the run.
        config: settings that the numbers depend on, JSON values; their hash goes into the rows.
    """

    def __init__(
        self, *, path: str | Path, protocol: str, dataset: str, seed: int, config: dict[str, Any]
    ) -> None:
        self.path = path
        self.protocol = protocol
        self.dataset = dataset
        self.seed = seed
        self.config = config

    def attach(self, engine: Engine) -> None:
        """Register with a ``ProbeGridTrainer``."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: ProbeGridTrainer) -> None:
        if getattr(engine.state, "exit_status", 0):
            return
        state, encoder = engine.state, engine.test_bags.identity["encoder"]
        make = partial(result_rows, dataset=self.dataset, n=len(engine.test_bags), config=self.config)
        rows = []
        for subject, name, seeds in (("probe", encoder, str(self.seed)), ("prevalence", "prevalence", "")):
            ends = state.intervals[subject]["macro"]
            numbers = {
                f"macro_{metric}": (value, *ends[metric])
                for metric, value in state.reports[subject]["macro"].items()
            }
            rows += make(numbers, encoder=name, protocol=self.protocol, seeds=seeds)
        if engine.further_seeds:
            of_seeds = {
                f"macro_{metric}": [report["macro"][metric] for report in state.seed_reports]
                for metric in state.reports["probe"]["macro"]
            }
            spread = {metric: (fmean(of), min(of), max(of)) for metric, of in of_seeds.items()}
            seeds = " ".join(map(str, [self.seed, *engine.further_seeds]))
            rows += make(spread, encoder=encoder, protocol=f"{self.protocol}_seeds", seeds=seeds)
        add_rows(self.path, rows)
