"""The test results of a MIL probe as rows of the results CSV."""

from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from ignite.engine import Engine, Events

from common.engines.probe_grid import ProbeGridTrainer
from common.reports.results_csv import add_rows, result_rows


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
        if getattr(engine.state, "stopped_early", False):
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
