"""What an evaluation leaves behind: the chosen probe, its predictions, result rows, tables and pictures."""

# S slices, H side of a slice in pixels

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
from common.reports.results import Numbers, Predictions, ResultRow, add_rows, result_rows, write_predictions
from common.run.process import rank_and_ranks

MAX_SHOWN = 8
"""Volumes whose slices' weights are shown, at most; our choice."""


class EvaluationReport(ABC):
    """Writes the files and result rows of an evaluation when its engine has completed.

    A run that was asked to stop leaves nothing; of several ranks the first writes.

    Args:
        output_dir: folder of the files.
        results_csv: CSV of all evaluations; made when missing.
        seed: seed of the run.
        settings: what the numbers depend on, JSON values; their hash goes into the rows.
    """

    def __init__(
        self, *, output_dir: str | Path, results_csv: str | Path, seed: int, settings: dict[str, Any]
    ) -> None:
        self.output_dir, self.results_csv = Path(output_dir), results_csv
        self.seed, self.settings = seed, settings

    def attach(self, engine: Engine) -> None:
        """Register with the engine of the evaluation."""
        if rank_and_ranks()[0] == 0:
            engine.add_event_handler(Events.COMPLETED, self._report)

    def _report(self, engine: Engine) -> None:
        if not getattr(engine.state, "exit_status", None):
            add_rows(self.results_csv, self.results(engine))
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.write(engine)

    @abstractmethod
    def results(self, engine: Any) -> list[ResultRow]:  # noqa: ANN401 (each report's)
        """Return the result rows."""

    @abstractmethod
    def write(self, engine: Any) -> None:  # noqa: ANN401 (each report's)
        """Write the files."""

    def macro_rows(self, state: Any, encoder: str, **facts: Any) -> list[ResultRow]:  # noqa: ANN401 (the engine's)
        """Make the rows of macro means, of the encoder and of the floor "prevalence"."""
        rows = []
        for subject, name, seeds in (("probe", encoder, str(self.seed)), ("prevalence", "prevalence", "")):
            ends = state.intervals[subject]["macro"]
            macro = state.reports[subject]["macro"]
            numbers = {f"macro_{metric}": (value, *ends[metric]) for metric, value in macro.items()}
            rows += self.rows(numbers, encoder=name, seeds=seeds, **facts)
        return rows

    def write_evaluation(self, state: Any, title: str) -> None:  # noqa: ANN401 (the engine's)
        """Write predictions, tables and pictures of a tested probe."""
        write_predictions(self.output_dir / "test_predictions.csv", state.predictions)
        write_predictions(self.output_dir / "validation_predictions.csv", state.validation)
        for name, rows in (
            ("per_class", class_rows(state.reports, state.intervals, state.predictions)),
            ("thresholds", threshold_rows(state.validation, state.predictions)),
        ):
            write_table(self.output_dir / f"{name}.csv", rows)
        per_class = state.intervals["probe"]["per_class"]
        draw_per_class(self.output_dir / "per_class.png", state.reports, state.intervals, title)
        for kind in KINDS:
            path = self.output_dir / f"{kind}.png"
            draw_classes(path, kind=kind, predictions=state.predictions, intervals=per_class, title=title)

    def rows(self, numbers: Numbers, **facts: Any) -> list[ResultRow]:  # noqa: ANN401 (of result_rows)
        """Make result rows of this run; facts are further arguments of ``result_rows``."""
        return result_rows(numbers, config=self.settings, **{"seeds": str(self.seed), **facts})


class ProbeCard(TypedDict):
    """What ``probe.json`` says about the chosen probe, along with the identity of its embeddings."""

    pooler: str
    learning_rate: float
    step: int  # optimizer steps taken when it was chosen
    seed: int
    validation_macro_auprc: float  # what it was chosen for
    class_names: list[str]  # in the order of the probe's outputs
    thresholds: list[float]  # probability from which each class is called positive
    test: dict[str, float]  # macro metrics; null where undefined
    test_intervals: dict[str, tuple[float, float]]  # their 95 % intervals
    undefined_classes: dict[str, list[str]]  # metric to the classes left out of its mean
    note: str  # what readers of its predictions must know


class ProbeReport(EvaluationReport):
    """Write the chosen probe and its test results when a ``ProbeGridTrainer`` has completed.

    Files: ``probe.safetensors`` and ``probe.json`` (see :func:`common.networks.mil_probe.load_probe`);
    ``test_predictions.csv`` and ``validation_predictions.csv`` (see :mod:`common.reports.results`);
    ``per_class.csv``, ``thresholds.csv`` and ``seeds.csv``; ``per_class.png``, ``roc.png``,
    ``precision_recall.png`` and ``reliability.png``; ``attention.csv`` and ``attention.png``, the weight of
    each slice, or token of another kind, in the volumes of :func:`volumes_to_show`.

    Rows in the results CSV: four for the encoder and four for "prevalence", the floor on the same volumes,
    with 95 % intervals. Where the chosen probe was trained with several seeds, four more of protocol
    ``<protocol>_seeds``: their mean, with the lowest and the highest as low and high.

    Args:
        protocol: name of the evaluation.
        dataset_name: name of the data.
        ct_dir: CTs of the test volumes, a file, zip or folder as embedded, to show the slices of most weight
            where tokens are slices; None for the weights alone.
        note: sentence that heads each page of the probe's predictions; empty for none.
        others: as :class:`EvaluationReport`.

    Raises:
        FileNotFoundError: when it writes, if ``ct_dir`` has no CT of a volume to show.
        ValueError: when it writes, if a CT does not have as many slices as its embedding.
    """

    def __init__(
        self,
        *,
        protocol: str,
        dataset_name: str,
        ct_dir: str | Path | None,
        note: str = "",
        **others: Any,  # noqa: ANN401 (EvaluationReport's)
    ) -> None:
        super().__init__(**others)
        self.protocol, self.dataset_name, self.ct_dir, self.note = protocol, dataset_name, ct_dir, note

    def results(self, engine: ProbeGridTrainer) -> list[ResultRow]:
        """Return the result rows."""
        encoder = engine.test_bags.identity["encoder"]
        facts = {"dataset": self.dataset_name, "n": len(engine.test_bags)}
        rows = self.macro_rows(engine.state, encoder, protocol=self.protocol, **facts)
        if engine.further_seeds:
            spread = {}
            for metric in engine.state.reports["probe"]["macro"]:
                values = [report["macro"][metric] for report in engine.state.seed_reports]
                spread[f"macro_{metric}"] = (fmean(values), min(values), max(values))
            seeds = " ".join(map(str, [self.seed, *engine.further_seeds]))
            protocol = f"{self.protocol}_seeds"
            rows += self.rows(spread, encoder=encoder, protocol=protocol, seeds=seeds, **facts)
        return rows

    def write(self, engine: ProbeGridTrainer) -> None:
        """Write the files."""
        state, bags = engine.state, engine.test_bags
        origin = {name: value for name, value in bags.identity.items() if name != "dtype"}
        save_probe(self.output_dir, engine.chosen_probe(), {**self._card(engine), **origin})
        seeds = [self.seed, *engine.further_seeds]
        write_table(self.output_dir / "seeds.csv", seed_rows(seeds, state.seed_reports))
        best, encoder = engine.best, bags.identity["encoder"]
        pooler, learning_rate = engine.grid.names[best.index]
        title = f"{encoder}: {len(bags)} test volumes, {pooler}, lr {learning_rate:g}, step {best.step}"
        self.write_evaluation(state, title)
        self._show_attention(engine)

    def _card(self, engine: ProbeGridTrainer) -> ProbeCard:
        best, report = engine.best, engine.state.reports["probe"]
        pooler, learning_rate = engine.grid.names[best.index]
        return {
            "pooler": pooler,
            "learning_rate": learning_rate,
            "step": best.step,
            "seed": self.seed,
            "validation_macro_auprc": best.auprc,
            "class_names": engine.test_bags.class_names,
            "thresholds": best.thresholds.tolist(),
            "test": report["macro"],
            "test_intervals": engine.state.intervals["probe"]["macro"],
            "undefined_classes": report["undefined"],
            "note": self.note,
        }

    def _show_attention(self, engine: ProbeGridTrainer) -> None:
        predictions, bags = engine.state.predictions, engine.test_bags
        probe = engine.chosen_probe().cpu()
        chosen = volumes_to_show(predictions)
        if not chosen:
            return
        weights, captions = {}, {}
        for volume, name in chosen.items():
            index = predictions.volumes.index(volume)
            with torch.no_grad():
                bag = bags[index]["tokens"].float()
                weights[volume] = np.asarray(probe.slice_weights(bag), dtype=np.float64)
            classes = zip(predictions.class_names, predictions.labels[index], strict=True)
            present = ", ".join(known for known, label in classes if label)
            captions[volume] = f"{volume}, shown for {name} (labels: {present})"
        items = str(bags.identity["preprocessing"]).endswith("_items")  # several tokens per slice
        unit = "slice" if bags.identity["token_kind"] == "slice" and not items else "token"
        rows = [
            {"volume": volume, unit: place, "weight": f"{weight:.8f}"}
            for volume, of_volume in weights.items()
            for place, weight in enumerate(of_volume)
        ]
        write_table(self.output_dir / "attention.csv", rows)
        slices = read_slices(self.ct_dir, list(chosen)) if self.ct_dir and unit == "slice" else {}
        for volume, of_ct in slices.items():
            if len(of_ct) != len(weights[volume]):
                raise ValueError(
                    f"The CT of '{volume}' in '{self.ct_dir}' has {len(of_ct)} slices, its embedding "
                    f"{len(weights[volume])}. Point ct_dir to the CTs that were embedded."
                )
        path = self.output_dir / "attention.png"
        draw_attention(path, weights=weights, captions=captions, slices=slices, unit=unit)


def volumes_to_show(predictions: Predictions, most: int = MAX_SHOWN) -> dict[str, str]:
    """Choose volumes to look at: for each class the true positive that the probe is surest of.

    A class that it never finds is passed over, and a volume is chosen once, for its first class. Returns
    volume to the class it was chosen for.
    """
    chosen: dict[str, str] = {}
    for index, name in enumerate(predictions.class_names):
        scores, targets = predictions.probabilities[:, index], predictions.labels[:, index]
        found = np.flatnonzero((targets == 1) & (scores >= predictions.thresholds[index]))
        if len(found) and len(chosen) < most:
            chosen.setdefault(predictions.volumes[found[scores[found].argmax()]], name)
    return chosen


def read_slices(ct_dir: str | Path, volumes: Sequence[str]) -> dict[str, np.ndarray]:
    """Read CT volumes as axial slices ``(S, H, H)`` in HU, feet to head, shown the radiological way.

    ``ct_dir`` is the file, zip or folder that was embedded; see :func:`common.embeddings.work.ct_sources`.

    Raises:
        FileNotFoundError: if a volume is not there.
        RejectedError: if one cannot be read.
    """
    found = {source.volume: source for source in ct_sources(ct_dir)[0]}
    missing = [volume for volume in volumes if volume not in found]
    if missing:
        raise FileNotFoundError(f"No CT of '{missing[0]}' in '{ct_dir}'.")
    return {volume: found[volume].read().hu for volume in volumes}
