"""What the latent geometry of two encoders leaves behind: Table V, Figure 2 and the world-model probes."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from rich.console import Console
from rich.table import Table

from common.engines.latent_geometry import LatentGeometryEvaluator
from common.handlers.results_table import add_rows, code_version, config_hash, read_rows
from common.reports.latent_paths import chosen_paths, draw_paths
from common.reports.world_model import draw_continuity, draw_world_model
from common.run.atomic_file import atomic_file

CLASSIFICATION = {
    "macro_auroc": "Macro AUROC",
    "macro_auprc": "Macro AUPRC",
    "macro_f1": "Macro F1",
    "macro_balanced_accuracy": "Balanced accuracy",
}
COLUMNS = ("encoder", "measure", "value", "error", "low", "high", "n")


class LatentReport:
    """Write results when a ``LatentGeometryEvaluator`` has completed, and print Table V.

    Files: ``table_v.csv``; ``latent_geometry.csv``, every measure with its interval; ``comparisons.csv``, the
    paired tests; ``figure_2.png``, ``continuity.png`` and ``world_model.png``. Rows in the results CSV:
    protocol ``latent_geometry``, and for the differences encoder ``<first> - <second>``.

    Args:
        output_dir: folder of the files.
        results_csv: CSV of all evaluations; made when missing.
        classification_csv: results of the encoders' MIL probes; without it, or them, Table V says "not run".
        dataset: name of the data.
        figure_volumes: volumes of Figure 2; None for three spread over all.
        seed: seed of the run.
        config: settings that the numbers depend on, JSON values; their hash goes into the rows.
    """

    def __init__(
        self,
        output_dir: str | Path,
        results_csv: str | Path,
        classification_csv: str | Path | None,
        dataset: str,
        figure_volumes: Sequence[str] | None,
        seed: int,
        config: dict[str, Any],
    ) -> None:
        self.output_dir = Path(output_dir)
        self.results_csv = Path(results_csv)
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
        _write_csv(self.output_dir / "latent_geometry.csv", COLUMNS, engine.state.table)
        comparisons = [
            {
                "measure": measure,
                **comparison.difference._asdict(),
                "p_wilcoxon": comparison.p_wilcoxon,
                "p_permutation": comparison.p_permutation,
                "patients": comparison.num_patients,
            }
            for measure, comparison in engine.state.comparisons.items()
        ]
        columns = ("measure", "value", "error", "low", "high", "n", "p_wilcoxon", "p_permutation", "patients")
        _write_csv(self.output_dir / "comparisons.csv", columns, comparisons)
        table = self._table_v(engine)
        _write_csv(self.output_dir / "table_v.csv", ("metric", *engine.stores), table)
        _print(table, len(engine.volumes))
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
        stored = read_rows(path) if path is not None and Path(path).is_file() else []
        scores = {
            (row["encoder"], row["metric"]): float(row["value"])
            for row in stored
            if row["protocol"] == "mil_probe" and row["dataset"] == self.dataset
        }
        rows = []
        for metric, name in CLASSIFICATION.items():
            values = {encoder: scores.get((encoder, metric)) for encoder in engine.stores}
            cells = {e: "not run" if value is None else f"{value:.4f}" for e, value in values.items()}
            rows.append({"metric": name, **cells})
        measured = {(row["encoder"], row["measure"]): row for row in engine.state.table}
        for measure, comparison in engine.state.comparisons.items():
            cells = {}
            for encoder in engine.stores:
                row = measured[encoder, measure]
                cells[encoder] = (
                    f"{row['value']:.4f} ± {row['error']:.4f} ({row['low']:.4f}-{row['high']:.4f})"
                )
            rows.append({"metric": measure, **cells})
            rows.append({"metric": "", **dict.fromkeys(engine.stores, "")} | _test_cells(engine, comparison))
        return rows

    def _rows(self, engine: LatentGeometryEvaluator) -> list[dict[str, str]]:
        version = code_version()
        common = {
            "protocol": "latent_geometry",
            "dataset": self.dataset,
            "seeds": str(self.seed),
            "commit": version,
            "config_hash": config_hash(self.config),
        }
        rows = [
            {
                "encoder": row["encoder"],
                "metric": row["measure"],
                **{name: _number(row[name]) for name in ("value", "low", "high")},
                "n": str(row["n"]),
                **common,
            }
            for row in engine.state.table
        ]
        pair = " - ".join(engine.stores)
        for measure, comparison in engine.state.comparisons.items():
            difference = comparison.difference
            values = {
                measure: (difference.value, difference.low, difference.high),
                f"{measure}_p_wilcoxon": (comparison.p_wilcoxon, math.nan, math.nan),
                f"{measure}_p_permutation": (comparison.p_permutation, math.nan, math.nan),
            }
            for metric, numbers in values.items():
                cells = dict(zip(("value", "low", "high"), map(_number, numbers), strict=True))
                rows.append({"encoder": pair, "metric": metric, **cells, "n": str(difference.n), **common})
        return rows


def _test_cells(engine: LatentGeometryEvaluator, comparison: Any) -> dict[str, str]:  # noqa: ANN401
    difference = comparison.difference
    first = next(iter(engine.stores))
    text = (
        f"difference {difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f}), "
        f"p {comparison.p_wilcoxon:.2g} (Wilcoxon), {comparison.p_permutation:.2g} (permutation)"
    )
    return {first: text}


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _print(rows: list[dict[str, str]], num_volumes: int) -> None:
    table = Table(*rows[0], title=f"Table V, {num_volumes} volumes")
    for row in rows:
        table.add_row(*row.values())
    Console(width=max(Console().width, 150)).print(table)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
