"""What comparing two encoders' latent geometry leaves: Table V, Figure 2 and the world-model probes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from common.cohort.cohort import write_table
from common.engines.latent_geometry import LatentGeometryEvaluator
from common.handlers.probe_report import EvaluationReport
from common.reports.latent_paths import chosen_paths, draw_paths
from common.reports.results import NAN, ResultRow, print_whole, read_rows
from common.reports.world_model import draw_continuity, draw_world_model

CLASSIFICATION = {
    "macro_auroc": "Macro AUROC",
    "macro_auprc": "Macro AUPRC",
    "macro_f1": "Macro F1",
    "macro_balanced_accuracy": "Balanced accuracy",
}
NUM_SHOWN = 3  # volumes of Figure 2


class LatentReport(EvaluationReport):
    """Write results when a ``LatentGeometryEvaluator`` has completed, and print Table V.

    Files: ``table_v.csv``; ``latent_geometry.csv``, every measure with its interval; ``comparisons.csv``, the
    paired tests; ``figure_2.png``, ``continuity.png`` and ``world_model.png``. Rows in the results CSV:
    protocol ``latent_geometry``, and for the differences encoder ``<first> - <second>``.

    Args:
        classification_csv: results of the encoders' MIL probes; Table V says "not run" of those it lacks.
        dataset_name: name of the data.
        figure_volumes: volumes of Figure 2; None for three spread evenly over all.
        others: as :class:`common.handlers.probe_report.EvaluationReport`.
    """

    def __init__(
        self,
        *,
        classification_csv: str | Path | None,
        dataset_name: str,
        figure_volumes: Sequence[str] | None,
        **others: Any,  # noqa: ANN401 (EvaluationReport's)
    ) -> None:
        super().__init__(**others)
        self.classification_csv = classification_csv
        self.dataset_name, self.figure_volumes = dataset_name, figure_volumes

    def results(self, engine: LatentGeometryEvaluator) -> list[ResultRow]:
        """Return the result rows: each encoder's measures, and the differences between the first two."""
        facts = {"protocol": "latent_geometry", "dataset": self.dataset_name}
        rows = []
        for encoder in engine.stores:
            lines = [line for line in engine.state.table if line["encoder"] == encoder]
            numbers = {line["measure"]: (line["value"], line["low"], line["high"]) for line in lines}
            made = self.rows(numbers, encoder=encoder, n=len(engine.volumes), **facts)
            # a measure may be undefined in some of the volumes
            rows += [row._replace(n=line["n"]) for row, line in zip(made, lines, strict=True)]
        for measure, comparison in engine.state.comparisons.items():
            value, _, low, high, n = comparison.difference
            numbers = {
                measure: (value, low, high),
                f"{measure}_p_wilcoxon": (comparison.p_wilcoxon, NAN, NAN),
                f"{measure}_p_permutation": (comparison.p_permutation, NAN, NAN),
            }
            rows += self.rows(numbers, encoder=" - ".join([*engine.stores][:2]), n=n, **facts)
        return rows

    def write(self, engine: LatentGeometryEvaluator) -> None:
        """Write tables and pictures, and print Table V."""
        write_table(self.output_dir / "latent_geometry.csv", engine.state.table)
        comparisons = []
        for measure, comparison in engine.state.comparisons.items():
            tests = {"p_wilcoxon": comparison.p_wilcoxon, "p_permutation": comparison.p_permutation}
            line = {"measure": measure, **comparison.difference._asdict(), **tests}
            comparisons.append({**line, "patients": comparison.num_patients})
        write_table(self.output_dir / "comparisons.csv", comparisons)
        rows = self._table_v(engine)
        write_table(self.output_dir / "table_v.csv", rows)
        table = Table(*rows[0], title=f"Table V, {len(engine.volumes)} volumes")
        for row in rows:
            table.add_row(*row.values())
        print_whole(table)
        places = np.linspace(0, len(engine.volumes) - 1, NUM_SHOWN).round().astype(int)
        spread = [engine.volumes[place] for place in dict.fromkeys(places.tolist())]
        draw_paths(
            self.output_dir / "figure_2.png",
            chosen_paths(list(engine.stores.values()), self.figure_volumes or spread),
            f"{self.dataset_name}: each point a slice, in the plane of its volume's first principal "
            "components",
        )
        draw_continuity(self.output_dir / "continuity.png", engine.state.continuity, engine.state.comparisons)
        draw_world_model(self.output_dir / "world_model.png", engine.state.world, engine.gaps_mm)

    def _table_v(self, engine: LatentGeometryEvaluator) -> list[dict[str, str]]:
        """Rows of the paper's table, and below them what it leaves open."""
        path = self.classification_csv
        scores = {
            (row.encoder, row.metric): f"{row.value:.4f}"
            for row in (read_rows(path) if path is not None and Path(path).is_file() else [])
            if row.protocol == "mil_probe" and row.dataset == self.dataset_name
        }
        rows = [
            {"metric": name}
            | {encoder: scores.get((encoder, metric), "not run") for encoder in engine.stores}
            for metric, name in CLASSIFICATION.items()
        ]
        measured = {(row["encoder"], row["measure"]): row for row in engine.state.table}
        first, *others = engine.stores
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
            rows.append({"metric": "", first: difference, **dict.fromkeys(others, "")})
        return rows
