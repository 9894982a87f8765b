"""Differences between encoders in Table I, over the same resamples of patients.

``python -m common.handlers.dense_differences dale_ct_2s */`` compares each further folder with the first one.
"""

# R resamples

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from common.handlers.paired_differences import lay_out_differences, write_differences
from common.handlers.results_table import print_whole
from common.metrics.bootstrap import interval, two_sided_p
from common.run.short_errors import short_errors

MEASURES = tuple(
    f"{kind} {task} {metric}"
    for kind in ("cls", "patch")
    for task in ("rexgroundingct", "totalsegmentator")
    for metric in ("auroc", "auprc")
)
HINT = "Evaluate both with the same labels, split, min_positives and num_resamples."


def dense_differences(reference: str | Path, others: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Compare macro means of linear probes on the same test volumes.

    Args:
        reference: folder of an evaluation by ``eval_dense_2d``, which holds ``resamples.npz``.
        others: folders to compare with it.

    Returns:
        One row for each of the others and each kind of token, task and metric: ``encoder``, ``reference``,
        ``measure``, ``difference`` (encoder less reference) with its 95 % interval ``low`` and ``high``, and
        ``p``, not corrected for the number of comparisons.

    Raises:
        FileNotFoundError: if a folder holds no ``resamples.npz``.
        ValueError: if two evaluations are of other volumes, average other classes or resample otherwise.
    """
    first, rows = _read(reference), []
    for folder in others:
        other = _read(folder)
        if other["volumes"].tolist() != first["volumes"].tolist():
            raise ValueError(
                f"'{folder}' must be tested on the volumes of '{reference}', got {len(other['volumes'])} and "
                f"{len(first['volumes'])} volumes. {HINT}"
            )
        for name in sorted(first.keys() - {"encoder", *MEASURES}):
            if other.get(name, np.array(None)).tolist() != first[name].tolist():
                raise ValueError(f"'{folder}' must have the {name} of '{reference}', got others. {HINT}")
        if len(other[MEASURES[0]]) != len(first[MEASURES[0]]):
            raise ValueError(f"'{folder}' must have as many resamples as '{reference}', got others. {HINT}")
        for measure in MEASURES:
            value, *resampled = other[measure] - first[measure]
            low, high = interval(np.array(resampled))
            compared = {
                "encoder": str(other["encoder"]),
                "reference": str(first["encoder"]),
                "measure": measure,
            }
            numbers = {"difference": float(value), "low": low, "high": high}
            rows.append(compared | numbers | {"p": two_sided_p(np.array(resampled))})
    return rows


def _read(folder: str | Path) -> dict[str, np.ndarray]:
    path = Path(folder) / "resamples.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"evaluation must hold resamples.npz, got none in '{folder}'. Run eval_dense_2d."
        )
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def main(
    reference: Annotated[Path, typer.Argument(help="Folder of the evaluation to compare with.")],
    others: Annotated[list[Path], typer.Argument(help="Those of the other encoders.")],
    out: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Compare encoders by their dense probes, on the same test volumes and resamples."""
    short_errors()
    rows = dense_differences(reference, [path for path in others if path.resolve() != reference.resolve()])
    if out is not None:
        write_differences(out, rows)
    print_whole(lay_out_differences(rows, "measure", [row["measure"] for row in rows]))


if __name__ == "__main__":
    typer.run(main)
