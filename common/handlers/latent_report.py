"""What comparing two encoders' latent geometry leaves: Table V, Figure 2 and the world-model probes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from rich.table import Table

from common.cohort.cohort import write_table
from common.engines.latent_geometry import LatentGeometryEvaluator
from common.metrics.paired_samples import Comparison
from common.reports.latent_paths import chosen_paths, draw_paths
from common.reports.results import NAN, ResultRow, add_rows, print_whole, read_rows, result_rows
from common.reports.world_model import draw_continuity, draw_world_model

CLASSIFICATION = {
    "macro_auroc": "Macro AUROC",
    "macro_auprc": "Macro AUPRC",
    "macro_f1": "Macro F1",
    "macro_balanced_accuracy": "Balanced accuracy",
}


class LatentReport:
    """Write results when a ``LatentGeometryEvaluator`` has completed, and print Table V.

    Files: ``table_v.csv``; ``latent_geometry.csv``, every measure with its interval; ``comparisons.csv``, the
    paired tests; ``figure_2.png``, ``continuity.png`` and ``world_model.png``. Rows in the results CSV:
    protocol ``latent_geometry``, and for the differences encoder ``<first> - <second>``.

    Args:
        output_dir: folder of the files.
        results_csv: CSV of all evaluations; made when missing.
        classification_csv: results of the encoders' MIL probes; Table V says "not run" of those it lacks.
        dataset: name of the data.
        figure_volumes: volumes of Figure 2; None for three spread evenly over all.
        seed: seed of the run.
        config: settings that the numbers depend on, JSON values; their hash goes into the rows.
    """

    def __init__(
        self,
        *,
        output_dir: str | Path,
        results_csv: str | Path,
        classification_csv: str | Path | None,
        dataset: str,
        figure_volumes: Sequence[str] | None,
        seed: int,
        config: dict[str, Any],
    ) -> None:
        self.output_dir = Path(output_dir)
        self.results_csv = results_csv
        self.classification_csv = classification_csv
        self.dataset = dataset
        self.figure_volumes = figure_volumes
        self.seed = seed
        self.config = config

    def attach(self, engine: Engine) -> None:
        """Register with a ``LatentGeometryEvaluator``."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: LatentGeometryEvaluator) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_table(self.output_dir / "latent_geometry.csv", engine.state.table)
        comparisons = [
            {"measure": measure, **comparison.difference._asdict(), **_tests(comparison)}
            for measure, comparison in engine.state.comparisons.items()
        ]
        write_table(self.output_dir / "comparisons.csv", comparisons)
        table = self._table_v(engine)
        write_table(self.output_dir / "table_v.csv", table)
        print_whole(_laid_out(table, f"Table V, {len(engine.volumes)} volumes"))
        self._draw(engine)
        add_rows(self.results_csv, self._rows(engine))

    def _draw(self, engine: LatentGeometryEvaluator) -> None:
        places = np.linspace(0, len(engine.volumes) - 1, 3).round().astype(int)
        chosen = self.figure_volumes or [engine.volumes[place] for place in dict.fromkeys(places.tolist())]
        draw_paths(
            self.output_dir / "figure_2.png",
            chosen_paths(list(engine.stores.values()), chosen),
            f"{self.dataset}: each point a slice, in the plane of its volume's first principal components",
        )
        draw_continuity(self.output_dir / "continuity.png", engine.state.continuity, engine.state.comparisons)
        draw_world_model(self.output_dir / "world_model.png", engine.state.world, engine.gaps_mm)

    def _table_v(self, engine: LatentGeometryEvaluator) -> list[dict[str, str]]:
        """Rows of the paper's table, and below them what it leaves open."""
        path = self.classification_csv
        scores = {
            (row.encoder, row.metric): f"{row.value:.4f}"
            for row in (read_rows(path) if path is not None and Path(path).is_file() else [])
            if row.protocol == "mil_probe" and row.dataset == self.dataset
        }
        rows = [
            {"metric": name}
            | {encoder: scores.get((encoder, metric), "not run") for encoder in engine.stores}
            for metric, name in CLASSIFICATION.items()
        ]
        measured = {(row["encoder"], row["measure"]): row for row in engine.state.table}
        first, second = engine.stores
        for measure, comparison in engine.state.comparisons.items():
            cells = {
                encoder: "{value:.4f} ± {error:.4f} ({low:.4f}-{high:.4f})".format(
                    **measured[encoder, measure]
                )
                for encoder in engine.stores
            }
            rows.append({"metric": measure, **cells})
            difference = (
                f"difference {comparison.difference.value:+.4f} ({comparison.difference.low:+.4f} to "
                f"{comparison.difference.high:+.4f}), p {comparison.p_wilcoxon:.2g} (Wilcoxon), "
                f"{comparison.p_permutation:.2g} (permutation)"
            )
            rows.append({"metric": "", first: difference, second: ""})
        return rows

    def _rows(self, engine: LatentGeometryEvaluator) -> list[ResultRow]:
        make = partial(
            result_rows,
            protocol="latent_geometry",
            dataset=self.dataset,
            seeds=str(self.seed),
            config=self.config,
        )
        rows: list[ResultRow] = []
        for encoder in engine.stores:
            lines = [line for line in engine.state.table if line["encoder"] == encoder]
            numbers = {line["measure"]: (line["value"], line["low"], line["high"]) for line in lines}
            made = make(numbers, encoder=encoder, n=len(engine.volumes))
            # a measure may be undefined in some of the volumes
            rows += [row._replace(n=line["n"]) for row, line in zip(made, lines, strict=True)]
        for measure, comparison in engine.state.comparisons.items():
            value, _, low, high, n = comparison.difference
            numbers = {
                measure: (value, low, high),
                f"{measure}_p_wilcoxon": (comparison.p_wilcoxon, NAN, NAN),
                f"{measure}_p_permutation": (comparison.p_permutation, NAN, NAN),
            }
            rows += make(numbers, encoder=" - ".join(engine.stores), n=n)
        return rows


def _tests(comparison: Comparison) -> dict[str, float]:
    _, p_wilcoxon, p_permutation, num_patients = comparison
    return {"p_wilcoxon": p_wilcoxon, "p_permutation": p_permutation, "patients": num_patients}


def _laid_out(rows: list[dict[str, str]], title: str) -> Table:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    return table
